"""What a fine-tuned model differs in from its base, by every mode of `tenpak delta`: bytes, nMSE and KL divergence.

    pip install "tenpak[torch,hf]"
    python benches/finetune.py MODEL_DIR --train TEXT.txt --test OTHER.txt [--steps 200] [--rate 2e-5] [--threads 1]

The recipe is that of a light fine-tune: AdamW (weight decay 0.01), a warm-up of 20 steps, then linearly to zero,
gradients clipped to 1, batches of 4 x 96 tokens drawn from the text of ``--train``, weights of the optimizer in F32.
Base and variant are stored in BF16. Each row is a delta, or the variant compressed alone: bytes on disk with all that a
file has, how many times smaller than the 16-bit file, nMSE of all weights against the variant's, the squared error over
the square of what was learned, and the KL divergence in nats per token from the variant, on ``--test``; ``base`` is
using the base instead of the variant. ``svd`` is what low rank would give: the best approximation of each matrix's
difference of rank r, by an exact SVD, its factors counted as F16 without any header; ``sign`` what one bit for the sign
of each difference and the F16 mean magnitude of its row would, which is the best scale for signs. ``--variant`` takes a
model that is fine-tuned already instead of training one, and ``--rows`` some kinds of rows only.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tenpak
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH, LENGTH, WINDOWS = 4, 96, 24
ROWS = ("delta", "alone", "svd", "sign")
Weights = dict[str, torch.Tensor]


def train(model: Any, ids: torch.Tensor, steps: int, rate: float) -> tuple[float, float]:
    """Train in place; give the mean loss of the first and of the last tenth of the steps, in nats per token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    draw = torch.Generator().manual_seed(1)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        starts = torch.randint(0, len(ids) - LENGTH, (BATCH,), generator=draw).tolist()
        batch = torch.stack([ids[at : at + LENGTH] for at in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    part = max(1, steps // 10)
    return sum(losses[:part]) / part, sum(losses[-part:]) / part


class Scale:
    """The variant, as what others are measured against."""

    def __init__(self, model: Any, base: Weights, variant: Weights, ids: torch.Tensor) -> None:
        """Take a model to run, weights of base and variant, and tokens."""
        self.model, self.base, self.variant = model, base, variant
        step = (len(ids) - LENGTH) // WINDOWS
        self.windows = torch.stack([ids[i * step : i * step + LENGTH] for i in range(WINDOWS)])
        self.own = self.log_probabilities(variant)
        self.learned = self.squares(base)
        self.power = sum(float(w.double().square().sum()) for w in variant.values())

    def log_probabilities(self, weights: Weights) -> torch.Tensor:
        """Log-probabilities `[windows, tokens, vocabulary]` with these weights."""
        self.model.load_state_dict({name: w.float() for name, w in weights.items()}, strict=False)
        self.model.tie_weights()
        with torch.no_grad():
            return torch.log_softmax(self.model(input_ids=self.windows).logits, -1)

    def squares(self, weights: Weights) -> float:
        """Squared error of weights against the variant's."""
        return sum(float((w.double() - self.variant[n].double()).square().sum()) for n, w in weights.items())

    def row(self, what: str, size: int, weights: Weights) -> None:
        """Print a row."""
        error = self.squares(weights)
        other = self.log_probabilities(weights)
        kl = float((self.own.exp() * (self.own - other)).sum(-1).mean())
        bits = sum(w.numel() for w in weights.values()) * 2
        times = f"{bits / size:9.2f}" if size else f"{'-':>9}"
        print(
            f"{what:34} {size:11,} {times} {error / self.power:10.2e} {error / self.learned:10.2e} {max(kl, 0):10.2e}",
            flush=True,
        )


def low_rank(base: Weights, variant: Weights, rank: int) -> tuple[int, Weights]:
    """Bytes and weights of the base with the best differences of a rank; what is no matrix is the variant's."""
    size, out = 0, {}
    for name, new in variant.items():
        difference = new.float() - base[name].float()
        if new.ndim != 2 or not bool(difference.any()):
            out[name] = new
            size += 0 if new.ndim == 2 else 2 * new.numel()
            continue
        u, s, v = torch.linalg.svd(difference, full_matrices=False)
        left, right = (u[:, :rank] * s[:rank].sqrt()).half(), (s[:rank].sqrt()[:, None] * v[:rank]).half()
        out[name] = (base[name].float() + left.float() @ right.float()).bfloat16()
        size += 2 * (left.numel() + right.numel())
    return size, out


def signs(base: Weights, variant: Weights) -> tuple[int, Weights]:
    """Bytes and weights of the base with signs and a scale per row; what is no matrix is the variant's."""
    size, out = 0, {}
    for name, new in variant.items():
        if new.ndim != 2:
            out[name] = new
            size += 2 * new.numel()
            continue
        difference = new.float() - base[name].float()
        scale = difference.abs().mean(dim=1, keepdim=True).half().float()
        out[name] = (base[name].float() + torch.where(difference < 0, -scale, scale)).bfloat16()
        size += new.numel() // 8 + 2 * len(new)
    return size, out


def main() -> int:
    """Train, then print a row per mode."""
    parser = argparse.ArgumentParser(description="deltas of a fine-tuned model: size and loss")
    parser.add_argument("model", type=Path)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--train", type=Path, help="UTF-8 text that the model is trained on")
    given.add_argument("--variant", type=Path, help="directory of the fine-tuned model, instead of training")
    parser.add_argument("--test", type=Path, required=True, help="UTF-8 text that divergence is measured on")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=2e-5, help="greatest learning rate")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def tokens(path: Path) -> torch.Tensor:
        return torch.tensor(tokenizer(path.read_text(encoding="utf-8")[: 1 << 20])["input_ids"])

    with tempfile.TemporaryDirectory() as folder:
        base, variant = Path(folder, "base.safetensors"), Path(folder, "variant.safetensors")
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).float()
        tied = [name for name in model.state_dict() if name == "lm_head.weight" and model.config.tie_word_embeddings]

        def save(path: Path) -> Weights:
            save_file({n: w.bfloat16().contiguous() for n, w in model.state_dict().items() if n not in tied}, path)
            return load_file(path)

        old = save(base)
        began = time.monotonic()
        if args.variant is None:
            before, after = train(model, tokens(args.train), args.steps, args.rate)
            what = f"{args.steps} steps on {args.train.name} at {args.rate:g}, {BATCH} x {LENGTH} tokens each"
            print(f"{args.model.name}, {what}, {time.monotonic() - began:.0f} s: loss {before:.3f} to {after:.3f}")
        else:
            print(f"{args.model.name} and {args.variant.name}")
            model = AutoModelForCausalLM.from_pretrained(args.variant, dtype=torch.bfloat16).float()
        new = save(variant)
        same = sum(int((new[n] == w).sum()) for n, w in old.items()) / sum(w.numel() for w in old.values())
        print(f"{100 * same:.1f} % of the weights stayed as they were; ", end="")
        print(f"KL on {args.test.name}, {WINDOWS} x {LENGTH} tokens\n")
        scale = Scale(model.eval(), old, new, tokens(args.test))
        print(f"{'':34} {'bytes':>11} {'x 16 bits':>9} {'nMSE':>10} {'of learned':>10} {'KL':>10}")
        scale.row("base", 0, old)
        made, delta, out = Path(folder, "made.tenpak"), Path(folder, "d.tenpak"), Path(folder, "out.safetensors")
        forms: list[tuple[str, dict[str, Any]]] = [("lossless", {})]
        forms += [(f"ecu_v1 at {bits:g}", {"target_bits": bits}) for bits in (0.5, 1, 1.5, 2, 3)]
        forms += [(codec, {"codec": codec}) for codec in ("int4_g128_fp16_v1", "int8_sym_v1")]
        for name, how in forms if "delta" in args.rows else []:
            report = tenpak.delta(base, variant, delta, force=True, **how)
            tenpak.materialize(base, delta, out, force=True)
            scale.row(f"delta, {name}", report["file_bytes"], load_file(out))
            if name == "lossless":
                print(f"{'alone, lossless (estimate)':34} {report['alone']['bytes']:11,}", flush=True)
        for bits in (1, 2, 3, 4.5) if "alone" in args.rows else []:
            size = tenpak.compress(variant, made, target_bits=bits, force=True)["file_bytes"]
            tenpak.decompress(made, out, force=True)
            scale.row(f"alone, ecu_v1 at {bits:g}", size, load_file(out))
        for rank in (1, 4, 16, 48) if "svd" in args.rows else []:
            size, weights = low_rank(old, new, rank)
            scale.row(f"svd of rank {rank}", size, weights)
        if "sign" in args.rows:
            scale.row("sign, a scale per row", *signs(old, new))
    return 0


if __name__ == "__main__":
    sys.exit(main())
