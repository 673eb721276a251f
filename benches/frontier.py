"""Loss against bits of everything tenpak can do to a model, beside what other tools reach: one table and one picture.

    pip install "tenpak[eval]"
    tenpak calibrate MODEL_DIR --text CALIBRATION.txt -o stats.safetensors --full
    python benches/frontier.py MODEL_DIR --text TEST.txt [--stats stats.safetensors] [--peers peers.json] [--plot F.png]

Rows are every codec of the registry by every fit of the build, and ``ecu_v1`` at several rates; fits that need
statistics are left out without them, and so is a row whose artifact is that of another fit. ``bpw`` is what matrices
take on disk and ``in memory`` what products read, everything counted; the protocol is that of ``tenpak eval``, and KL
is in nats, ± one standard error over windows. Rows of other tools are marked with ``*``: their file says how they were
measured.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

RATES = (3, 3.5, 4, 4.25, 4.5, 5, 6, 8)


def main() -> int:
    """Print the table, and draw the picture where one is asked for."""
    parser = argparse.ArgumentParser(description="loss against bits of every codec and fit on a model")
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to score")
    parser.add_argument("--stats", type=Path, help="statistics of another text, from tenpak calibrate --full")
    parser.add_argument("--peers", type=Path, help="JSON of other tools' figures, as for tenpak eval")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    parser.add_argument("--tokens", type=int, default=20_480)
    parser.add_argument("--codec", nargs="+", help="only these codecs")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    from tenpak.evaluate import evaluate, plot
    from tenpak.evaluate.report import table

    peers = None if args.peers is None else plot.read_peers(args.peers, str(args.model), str(args.text))
    with tempfile.TemporaryDirectory() as folder:
        memory = make(args, Path(folder))
        found = evaluate(args.model, args.text, artifacts=memory, stats=None, tokens=args.tokens, threads=args.threads)
    rows = [cells(row, memory[path]) for row, path in zip(found.rows, memory, strict=True)]
    if args.peers is not None:
        rows += [peer_cells(row) for row in json.loads(args.peers.read_text(encoding="utf-8"))["rows"]]
    rows.sort(key=lambda row: (float(row[1]), float(row[4])))
    print(f"{args.model.name} on {args.text.name}: {found.windows} windows of {found.context} tokens, {found.dtype}")
    print(f"PPL of the source {found.baseline.ppl:.4f}; {'no statistics' if args.stats is None else args.stats.name}\n")
    print(table(["codec and fit", "bpw", "in memory", "nMSE", "mean KL", "±", "same top-1 %", "PPL"], rows))
    if args.plot is not None:
        plot.draw(found, args.plot, peers)
    return 0


def make(args: argparse.Namespace, folder: Path) -> dict[Path, float]:
    """Write an artifact per row, named after it, and return the bits per weight of each in memory."""
    import tenpak
    from tenpak import _tenpak
    from tenpak.evaluate.plan import recipe_of

    codecs = args.codec or [codec["id"] for codec in tenpak.codecs() if codec["id"] != "raw_v1"]
    known = {codec["id"]: codec for codec in tenpak.codecs()}
    memory: dict[Path, float] = {}
    for codec in codecs:
        rated = known[codec]["fit"] == "rate"
        digests = set()
        for rate in RATES if rated else (None,):
            for fit, needs_stats in _tenpak.FITS:
                if needs_stats and args.stats is None:
                    continue
                name = codec if rate is None else f"{codec} at {rate:g}"
                path = folder / (name if fit == "codec" else f"{name}, {fit}")
                path = path.with_name(path.name + ".tenpak")
                report = tenpak.compress(
                    args.model,
                    path,
                    recipe=recipe_of(codec),
                    target_bits=rate,
                    stats=args.stats if needs_stats else None,
                    fit=fit,
                    threads=args.threads,
                )
                digest = tenpak.open(path).identity
                if digest in digests:
                    path.unlink()
                    continue
                digests.add(digest)
                matrices = [tensor for tensor in report["tensors"] if tensor["codec"] != "raw_v1"]
                weights = sum(8 * t["memory_bytes"] / t["memory_bits_per_weight"] for t in matrices)
                memory[path] = 8 * sum(t["memory_bytes"] for t in matrices) / weights
                print(f"made {path.stem}", file=sys.stderr)
    return memory


def cells(row: Any, memory: float) -> list[str]:
    """Return the figures of a row of tenpak."""
    f = row.fidelity
    name = row.name.removesuffix(".tenpak")
    error = "-" if f.kld_error is None else f"{f.kld_error:.1e}"
    bits = row.matrices.bits_per_weight
    return [
        name, f"{bits:.3f}", f"{memory:.3f}", f"{row.nmse:.3e}", f"{f.kld:.3e}", error, f"{100 * f.top1:.2f}",
        f"{f.ppl:.4f}",
    ]  # fmt: skip


def peer_cells(row: dict[str, Any]) -> list[str]:
    """Return the figures of another tool."""
    return [
        f"* {row['name']}", f"{row['bpw']:.3f}", "-", f"{row['nmse']:.3e}", f"{row['kld']:.3e}", "-",
        f"{100 * row['top1']:.2f}", f"{row['ppl']:.4f}",
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
