"""One table: products with encoded matrices beside PyTorch's own, and the read bandwidth, in one run.

Every contender takes its turn in every round and the best of its rounds counts, because only ratios mean anything on a
machine that is shared. Weights are copied until they are larger than the caches, so a product with one row of
activations reads them from memory; activations and weights are random.

    python benches/gemm.py [--rows N] [--cols K] [--batches 1,8,512] [--codecs ID,...] [--acts NAME,...] [--threads T]

`x f32` and `x bf16` are speed over `torch.nn.functional.linear` with float32 and bfloat16 weights of the same shape.
`read` is the bytes of weights a second over the fastest way that PyTorch reads memory (its sum, or its own product).
PyTorch's `_weight_int4pack_mm_for_cpu` has group 32 or 128, bfloat16 activations, and a bfloat16 zero point.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

DEFAULT_CODECS = (
    "int4_g8_fp16_v1,int4_g16_fp16_v1,int4_g32_fp16_v1,int4_g128_fp16_v1,int4_sym_g32_fp16_v1,"
    "int4_zp_g128_fp16_v1,nf4_g64_fp16_v1,int8_sym_v1,int8_sym_g32_fp16_v1"
)


@dataclass
class Contender:
    """Something that is timed: a call on copy number `i` of the weights, and the bytes of weights that it reads."""

    name: str
    act: str
    run: Callable[[int], object]
    weight_bytes: int
    copies: int
    best: float = field(default=float("inf"))

    def turn(self, start: int, calls: int) -> None:
        """Time `calls` calls, each on the next copy."""
        begin = time.perf_counter()
        for i in range(calls):
            self.run((start + i) % self.copies)
        self.best = min(self.best, (time.perf_counter() - begin) / calls)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="products with encoded matrices beside PyTorch's own")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--batches", default="1,8,64,512")
    parser.add_argument("--codecs", default=DEFAULT_CODECS)
    parser.add_argument("--acts", default="float32,bfloat16,int8")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=384, help="of weights in rotation for each contender")
    args = parser.parse_args()
    # Both thread pools read their size when they start.
    os.environ["RAYON_NUM_THREADS"] = str(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    for m in map(int, args.batches.split(",")):
        table(args, m)


def table(args: argparse.Namespace, m: int) -> None:
    """Print the part for one number of rows of activations."""
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows, cols = args.rows, args.cols
    dense = torch.randn(rows, cols) * 0.02
    x = {dtype: torch.randn(m, cols).to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    # Large batches are bound by arithmetic: a few copies are enough, and take less time to make.
    target = args.megabytes * 10**6 if m <= 16 else 0
    contenders = [*torch_linear(dense, x, target), *torch_int4(dense, x[torch.bfloat16], target)]
    for codec in args.codecs.split(","):
        contenders += ours(dense, x, codec, args.acts.split(","), target)
    flops = 2 * m * rows * cols
    big = torch.ones(args.megabytes * 10**6 // 4)
    contenders.append(Contender("torch sum", "", lambda _: big.sum(), big.nbytes, 1))
    for c in contenders:
        c.turn(0, 1)
    calls = {id(c): max(1, round(0.1 / max(c.best, 1e-6))) for c in contenders}
    for round_ in range(args.rounds):
        for c in contenders:
            c.turn(round_ * calls[id(c)], calls[id(c)])
    by_name = {(c.name, c.act): c for c in contenders}
    f32, bf16 = (by_name["torch linear", act].best for act in ("float32", "bfloat16"))
    read = max(c.weight_bytes / c.best for c in contenders if c.name.startswith("torch")) if m == 1 else None
    print(f"\nM={m}  {rows} x {cols}  threads={args.threads}")
    if read:
        print(f"read bandwidth {read / 1e9:.1f} GB/s")
    print(f"{'codec':<26}{'activations':<13}{'ms':>9}{'GB/s':>8}{'read':>7}{'GFLOP/s':>9}{'x f32':>8}{'x bf16':>8}")
    for c in contenders[:-1]:
        rate = c.weight_bytes / c.best
        share = f"{rate / read:7.2f}" if read else "       "
        print(
            f"{c.name:<26}{c.act:<13}{1e3 * c.best:9.3f}{rate / 1e9:8.1f}{share}{flops / c.best / 1e9:9.0f}"
            f"{f32 / c.best:8.2f}{bf16 / c.best:8.2f}"
        )


def copies_of(weight_bytes: int, target: int) -> int:
    """Return how many copies of the weights fill `target` bytes."""
    return max(1, -(-target // weight_bytes))


def torch_linear(dense, x, target):
    """Return PyTorch's float32 and bfloat16 linear."""
    import torch
    from torch.nn import functional

    for dtype in (torch.float32, torch.bfloat16):
        copies = copies_of(dense.numel() * dtype.itemsize, target)
        weights = [dense.to(dtype, copy=True) for _ in range(copies)]
        act = str(dtype).removeprefix("torch.")

        def run(i, weights=weights, x=x[dtype]):
            return functional.linear(x, weights[i])

        yield Contender("torch linear", act, run, weights[0].nbytes, copies)


def torch_int4(dense, x, target):
    """Return PyTorch's int4 product, group 32 and 128, min-max scales and zero points."""
    import torch

    rows, cols = dense.shape
    for group in (32, 128):
        groups = dense.reshape(rows, -1, group)
        low, high = groups.amin(-1), groups.amax(-1)
        scale = (high - low) / 15
        codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.int32).reshape(rows, cols)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        # The op computes (code - 8) * scale + zero.
        params = torch.stack([scale, low + 8 * scale], -1).transpose(0, 1).contiguous().bfloat16()
        weight_bytes = packed.nbytes + params.nbytes
        copies = copies_of(weight_bytes, target)
        held = [(packed.clone(), params.clone()) for _ in range(copies)]

        def run(i, held=held, group=group):
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, held[i][0], group, held[i][1])

        yield Contender(f"torch int4pack g{group}", "bfloat16", run, weight_bytes, copies)


def ours(dense, x, codec, acts, target):
    """Return tenpak's layer with one codec, once for each arithmetic."""
    import copy

    import torch
    from tenpak.torch import QuantizedLinear

    layer = torch.nn.Linear(dense.shape[1], dense.shape[0], bias=False)
    layer.weight.data = dense
    quantized = QuantizedLinear.from_linear(layer, codec=codec)
    weight_bytes = sum(buffer.nbytes for buffer in quantized.buffers())
    layers = [copy.deepcopy(quantized) for _ in range(copies_of(weight_bytes, target))]
    for act in acts:
        inputs = x[torch.bfloat16 if act == "bfloat16" else torch.float32]

        def run(i, act=act, inputs=inputs):
            layers[i].act = act
            return layers[i](inputs)

        yield Contender(codec, act, torch.no_grad()(run), weight_bytes, len(layers))


if __name__ == "__main__":
    main()
