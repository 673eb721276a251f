"""How a key-value cache is quantized best: the measurement behind `src/attention/`.

    pip install "tenpak[eval]"
    python benches/kv.py MODEL_DIR --text FILE [--windows 32] [--bits 4 8]

Every attention of a model computes with its own keys and values, quantized and decoded by each form in turn, as a cache
would hold them: causal, keys after their rotation. Printed are the cost in bits per number with all parameters in f16,
the relative error of what attention puts out, `Σ (o - ô)² / Σ o²` over all layers, heads and positions, with only keys,
only values and both quantized, and the nats per token that the model loses with both.

- *token*: scale and offset for each group along the head, one token at a time.
- *centred*: the same after a vector of each head was subtracted from its keys, the mean over the first 32 tokens. The
  softmax does not see it: `q · c` is the same for all tokens (SageAttention, Zhang et al., 2024, calls it smoothing).
- *channel*: keys have scale and offset for each channel over a block of tokens, and the last block stays f16 until it
  is full (KIVI, Liu et al., 2024); values are as in *token*.
- *recent*: *token*, but keys of the last block of as many tokens stay f16 as in *channel*: what of its gain is theirs.
- *tail*: *channel*, and the values of that last block stay f16 too.
- *columns*: *tail*, with values quantized by channel as the keys are.
- *rotated*: *token* after a Hadamard matrix on queries and keys, which leaves their products as they are (QuaRot).
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch


class Form(NamedTuple):
    """A way to quantize a cache: its kind, and the numbers that share a scale, along the head or along the tokens."""

    kind: str
    group: int


def quantized(x: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Round `x` to levels between its least and its greatest number along `dim`, with scale and offset in f16."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    offset = low.half().float()
    scale = ((high - offset) / (2**bits - 1)).half().float()
    codes = ((x - offset) / scale.where(scale > 0, torch.ones_like(scale))).round().clamp(0, 2**bits - 1)
    return codes * scale + offset


def by_token(x: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Quantize groups of `group` channels of each token of `x[..., tokens, channels]`."""
    return quantized(x.unflatten(-1, (-1, min(group, x.shape[-1]))), bits, -1).flatten(-2)


def by_channel(x: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """Quantize each channel of blocks of `block` tokens of `x[..., tokens, channels]`; a last ragged block stays."""
    whole = x.shape[-2] // block * block
    full = quantized(x[..., :whole, :].unflatten(-2, (-1, block)), bits, -2).flatten(-3, -2)
    return torch.cat([full, x[..., whole:, :]], -2)


def hadamard(n: int) -> torch.Tensor:
    """Return the orthogonal Hadamard matrix of a power of two."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < n:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    return matrix / n**0.5


class Attention:
    """Causal attention as a model calls it, with quantized keys and values, beside the exact one."""

    def __init__(self) -> None:
        """Start exact: nothing is quantized."""
        self.form: Form | None = None
        self.bits = 8
        self.parts = "kv"
        self.lost = self.total = 0.0

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Take `[batch, heads, tokens, channels]`, give `[batch, tokens, heads, channels]`."""
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        shared = query.shape[1] // key.shape[1]

        def scores(keys: torch.Tensor) -> torch.Tensor:
            return query @ keys.repeat_interleave(shared, 1).transpose(2, 3) * scale

        def weights(scores: torch.Tensor) -> torch.Tensor:
            n = scores.shape[-1]
            return scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)

        exact, values = scores(key), value.repeat_interleave(shared, 1)
        want = weights(exact) @ values
        if self.form is None:
            return want.transpose(1, 2), None
        kind, group = self.form
        # Who asks sees whole blocks quantized, and the tokens of the block that is being filled as they are.
        at = torch.arange(key.shape[-2])
        whole = at[None, :] < (at[:, None] + 1) // group * group
        ours = exact
        if "k" in self.parts:
            ours = scores(self.keys(key))
            if kind in ("recent", "channel", "tail", "columns"):
                ours = torch.where(whole, ours, exact)
        out = weights(ours) @ values
        if "v" in self.parts:
            along = 32 if kind in ("channel", "tail") else group
            rounded = (by_channel if kind == "columns" else by_token)(value, self.bits, along)
            lost = rounded.repeat_interleave(shared, 1) - values
            out = out + (weights(ours) * whole if kind in ("tail", "columns") else weights(ours)) @ lost
        self.lost += float((out - want).square().sum(dtype=torch.float64))
        self.total += float(want.square().sum(dtype=torch.float64))
        return out.transpose(1, 2), None

    def keys(self, key: torch.Tensor) -> torch.Tensor:
        """Quantize keys in the form and the width that are set."""
        assert self.form is not None
        kind, group = self.form
        if kind in ("channel", "tail", "columns"):
            return by_channel(key, self.bits, group)
        if kind == "centred":
            # A constant added to all keys adds the same number to all scores of a query.
            return by_token(key - key[..., :32, :].mean(-2, keepdim=True), self.bits, group)
        if kind == "rotated":
            turn = hadamard(key.shape[-1]).to(key)
            return by_token(key @ turn, self.bits, group) @ turn.T
        return by_token(key, self.bits, group)


def bits_per_number(form: Form, bits: int, channels: int) -> float:
    """Codes and their f16 scale and offset, for keys and values together."""
    along_head = bits + 32 / min(form.group, channels)
    along_tokens = bits + 32 / form.group
    if form.kind == "columns":
        return along_tokens
    if form.kind in ("channel", "tail"):
        return (along_tokens + bits + 32 / min(32, channels)) / 2
    return along_head


def main() -> int:
    """Print one row per width and form."""
    parser = argparse.ArgumentParser(description="what forms of a quantized key-value cache cost")
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    from tenpak.evaluate.windows import cut
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    torch.set_num_threads(args.threads)
    attention = Attention()
    ALL_ATTENTION_FUNCTIONS.register("tenpak_kv", attention)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="tenpak_kv")
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = cut(args.text, args.text.read_bytes(), tokenizer, model.config, 1 << 30, None).ids[: args.windows]
    channels = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads

    @torch.inference_mode()
    def run(form: Form | None, bits: int, parts: str) -> tuple[float, np.ndarray]:
        attention.form, attention.bits, attention.parts = form, bits, parts
        attention.lost = attention.total = 0.0
        nll = []
        for ids in windows.split(8):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            nll.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none"))
        return attention.lost / max(attention.total, 1e-30), torch.cat(nll).double().numpy().reshape(-1)

    _, base = run(None, 8, "")
    print(f"{args.model.name}: {windows.shape[0]} windows of {windows.shape[1]} tokens, {channels} channels of a head")
    print(f"{'bits':>4}  {'form':<14}{'per number':>11}{'keys':>11}{'values':>11}{'both':>11}{'nats':>11}{'±':>9}")
    for bits in args.bits:
        for form in forms(channels):
            errors = [run(form, bits, parts)[0] for parts in ("k", "v")]
            both, nll = run(form, bits, "kv")
            more = nll - base
            print(
                f"{bits:>4}  {form.kind + ' ' + str(form.group):<14}{bits_per_number(form, bits, channels):>11.2f}"
                f"{errors[0]:>11.3g}{errors[1]:>11.3g}{both:>11.3g}{more.mean():>11.5f}"
                f"{more.std() / more.size**0.5:>9.5f}",
                flush=True,
            )
    return 0


def forms(channels: int) -> list[Form]:
    """Every form that a head of so many channels can have."""
    groups = [group for group in (8, 16, 32, 64, 128) if group <= channels and channels % group == 0]
    kinds: list[Callable[[int], Form]] = [lambda group: Form("token", group), lambda group: Form("centred", group)]
    if channels & (channels - 1) == 0:
        kinds.append(lambda group: Form("rotated", group))
    along = [kind(group) for kind in kinds for group in groups]
    along += [Form("recent", group) for group in groups if group >= 16]
    return along + [Form(kind, block) for kind in ("channel", "tail", "columns") for block in (16, 32, 64)]


if __name__ == "__main__":
    sys.exit(main())
