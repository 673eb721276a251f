"""`tenpak eval`: the arguments, one call, the report."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from .. import _tenpak
from .._console import Bar, check_output, guarded, tokens, write
from .._errors import InvalidError
from ..methods import METHODS
from . import DEFAULT_CACHE_BYTES, DEFAULT_TOKENS, evaluate, plot
from .plan import COMPUTES, DTYPES

SUMMARY = "Measure what quantization costs a model on a text: KL divergence, perplexity, bits/weight"


def run(arguments: Sequence[str]) -> int:
    """Run ``tenpak eval`` and return its exit code: 0 done, 2 could not run, 130 and 143 stopped by a signal."""
    return guarded(lambda: _evaluate(_parser().parse_args(arguments)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tenpak eval",
        description=f"{SUMMARY}. Windows do not overlap, the first token of each is not scored, and the source model "
        "is the first row of the table.",
        epilog="exit codes: 0 done, 2 could not run, 130/143 stopped by a signal",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="Hugging Face directory of the source model")
    add("--text", metavar="FILE", required=True, help="UTF-8 text to score")
    add("--artifact", metavar="FILE", nargs="+", action="extend", default=[], help="artifacts to measure as they are")
    add(
        "--codec",
        metavar="ID",
        nargs="+",
        action="extend",
        default=[],
        help="codecs to measure on the matrices inside the decoder's layers, or 'all'; see `tenpak codecs`",
    )
    add("--recipe", metavar="FILE", nargs="+", action="extend", default=[], help="TOML recipes to compress with")
    add(
        "--method",
        metavar="NAME",
        nargs="+",
        action="extend",
        default=[],
        help="other quantizers to run and measure, where they are installed: " + ", ".join(METHODS),
    )
    add("--method-text", metavar="FILE", help="text for those methods that need data, another than --text")
    add("--stats", metavar="FILE", help="statistics that codecs and recipes are compressed with, of another text")
    add(
        "--fit",
        choices=[name for name, _ in _tenpak.FITS],
        help="fit of codecs and recipes; see `tenpak compress`",
    )
    add(
        "--tokens",
        metavar="N",
        type=tokens,
        default=DEFAULT_TOKENS,
        help=f"tokens to use, from the first, or 'all' [default: {DEFAULT_TOKENS}]",
    )
    add("--context", metavar="N", type=int, help="tokens of a window [default: the model's context]")
    add("--window-batch", metavar="N", type=int, default=0, help="windows per forward pass; 0 to choose [default: 0]")
    add("--dtype", choices=DTYPES, default="float32", help="of weights and forward pass [default: float32]")
    add(
        "--compute",
        choices=COMPUTES,
        default="decoded",
        help="multiply decoded weights, or planes as they are stored, in this arithmetic [default: decoded]",
    )
    add(
        "--cache-bytes",
        metavar="N",
        type=int,
        default=DEFAULT_CACHE_BYTES,
        help="most bytes of base logits to keep in a temporary file; above, each row computes them again "
        f"[default: {DEFAULT_CACHE_BYTES}]",
    )
    add("--output", "-o", metavar="FILE", type=Path, help="also write the report there, as JSON")
    add("--plot", metavar="FILE", type=Path, help="also draw KL against bits/weight there, as PNG")
    add("--peers", metavar="FILE", type=Path, help="JSON of other tools' figures to draw beside them")
    add("--force", action="store_true", help="replace existing outputs")
    add("--threads", metavar="N", type=int, default=0, help="threads; 0 for the libraries' own choice [default: 0]")
    add("--format", choices=("text", "json"), default="text", help="how to print the result [default: text]")
    add("--quiet", "-q", action="store_true", help="no progress bar and no result, only errors")
    add("--mmap", action="store_true", help="map windows of files instead of reading them")
    return parser


def _evaluate(options: argparse.Namespace) -> int:
    if options.peers is not None and options.plot is None:
        raise InvalidError("--peers is drawn by --plot, which is missing; pass --plot FILE")
    for path in (options.output, options.plot):
        check_output(path, options.force)
    peers = None if options.peers is None else plot.read_peers(options.peers, options.model, options.text)
    if options.plot is not None:
        plot.check_library()
    with Bar(hidden=options.quiet) as bar:
        evaluation = evaluate(
            options.model,
            options.text,
            artifacts=options.artifact,
            codecs=options.codec,
            recipes=options.recipe,
            methods=options.method,
            method_text=options.method_text,
            stats=options.stats,
            fit=options.fit,
            tokens=options.tokens,
            context=options.context,
            window_batch=options.window_batch,
            dtype=options.dtype,
            compute=options.compute,
            threads=options.threads,
            cache_bytes=options.cache_bytes,
            mmap=options.mmap,
            progress=bar.step,
        )
    report = json.dumps(evaluation.to_json(), indent=2, ensure_ascii=False)
    if options.output is not None:
        write(options.output, lambda path: path.write_text(report + "\n", encoding="utf-8"))
    if not options.quiet:
        print(report if options.format == "json" else evaluation.to_text(), flush=True)
    if options.plot is not None:
        write(options.plot, lambda path: plot.draw(evaluation, path, peers))
    return 0
