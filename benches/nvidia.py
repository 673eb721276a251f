"""Products and decoding on an NVIDIA device, beside PyTorch's own, in one run: ``python benches/nvidia.py``.

Prints every goal with its figure; a row that this machine cannot measure says why. Products run from CUDA graphs, over
as many matrices in turn as fill 256 MiB, so that none is in a cache, and times are medians. ``--check`` compares every
codec with f64 products of its decoded weights first. Without a device everything is printed but the figures.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tenpak
import torch
import torch.nn.functional as F
from tenpak import _tenpak
from tenpak.torch import QuantizedLinear, QuantizedStack
from tenpak.torch import _cuda as backend

#: What is in turn has at least so many bytes: more than any L2 cache.
ROTATION = 256 << 20
ROWS_OF_ACTIVATIONS = (1, 16, 64, 512, 2048, 8192)
CODECS = ("int4_g128_fp16_v1", "int4_g32_fp16_v1", "int4_g16_fp16_v1", "int4_g8_fp16_v1")
#: Outputs and inputs.
SHAPES = ((8192, 8192), (28672, 8192))


def why_not() -> str | None:
    """Return why nothing can be measured here, None where it can."""
    try:
        backend.device(0)
    except tenpak.TenpakError as error:
        return str(error)
    return None if torch.cuda.is_available() else "this PyTorch has no CUDA; install one that has"


class Table:
    """Lines of what was measured."""

    def __init__(self, missing: str | None) -> None:
        self.missing = missing

    def row(self, what: str, goal: str, measure: Callable[[], str]) -> None:
        """Measure, or say why not."""
        if self.missing:
            figure = f"not measured: {self.missing.split(',')[0]}"
        else:
            try:
                figure = measure()
            except (RuntimeError, tenpak.TenpakError) as error:
                figure = f"not measured: {str(error).splitlines()[0]}"
            finally:
                torch.cuda.empty_cache()
        print(f"{what:58} {goal:22} {figure}", flush=True)


def graph_seconds(calls: list[Callable[[], Any]], seconds: float = 0.4) -> float:
    """Return the median time of one call, all of them recorded in a graph, which is replayed."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = [call() for call in calls]
    times = []
    until = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < until:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    del held
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Return bytes read and written in a second by a copy on the device."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / graph_seconds([lambda: b.copy_(a)] * 4)


def layers(codec: str, n: int, k: int) -> list[QuantizedLinear]:
    """Return layers of random planes, enough of them for no cache to hold."""
    rng = np.random.default_rng(1)
    first = QuantizedLinear.from_linear(torch.nn.Linear(k, 128, bias=False), codec)
    small = {name: plane.numpy() for name, plane in first.planes.items()}
    planes = {name: np.tile(plane, (-(-n // 128), 1))[:n] for name, plane in small.items()}
    planes["codes"] = rng.integers(0, 256, planes["codes"].shape, np.uint8)
    size = sum(plane.nbytes for plane in planes.values())
    made = []
    for _ in range(max(2, -(-ROTATION // size))):
        layer = QuantizedLinear.from_planes(codec, n, k, {name: torch.from_numpy(p) for name, p in planes.items()})
        made.append(layer.cuda())
    return made


def payload(layer: QuantizedLinear) -> int:
    """Return the bytes of a layer's planes."""
    return sum(plane.nbytes for plane in layer.planes.values())


@torch.inference_mode()
def ours(codec: str, n: int, k: int, m: int, dense: bool | None = None) -> tuple[float, int]:
    """Return seconds of a product and bytes of the weights; with `dense` decoded first, or never."""
    made = layers(codec, n, k)
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    before = backend.DENSE
    if dense is not None:
        backend.DENSE = 0 if dense else 1 << 30
    try:
        return graph_seconds([lambda layer=layer: layer(x) for layer in made]), payload(made[0])
    finally:
        backend.DENSE = before


_theirs: dict[tuple[int, int, int], float] = {}


@torch.inference_mode()
def theirs(n: int, k: int, m: int) -> float:
    """Return seconds of PyTorch's product in bfloats."""
    key = (n, k, m)
    if key not in _theirs:
        weights = [
            torch.randn(n, k, dtype=torch.bfloat16, device="cuda") for _ in range(max(2, ROTATION // (2 * n * k)))
        ]
        x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
        _theirs[key] = graph_seconds([lambda w=w: F.linear(x, w) for w in weights])
    return _theirs[key]


@torch.inference_mode()
def packed(n: int, k: int, m: int) -> float:
    """Return seconds of PyTorch's own product with 4-bit weights, groups of 128."""
    made = []
    for _ in range(max(2, ROTATION // (n * k // 2))):
        codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda")
        weight = torch._convert_weight_to_int4pack(codes, 8)
        made.append((weight, torch.rand(k // 128, n, 2, dtype=torch.bfloat16, device="cuda")))
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    return graph_seconds([lambda w=w, s=s: torch._weight_int4pack_mm(x, w, 128, s) for w, s in made])


@torch.inference_mode()
def host_cost() -> float:
    """Return what a call costs the host in eager mode, by that of ``F.linear``."""
    layer = QuantizedLinear.from_linear(torch.nn.Linear(256, 256, bias=False), CODECS[0]).cuda()
    weight = torch.randn(256, 256, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(1, 256, dtype=torch.bfloat16, device="cuda")

    def cost(call: Callable[[], Any]) -> float:
        times = []
        for _ in range(20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(50):
                call()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    return cost(lambda: layer(x)) / cost(lambda: F.linear(x, weight))


@torch.inference_mode()
def grouped() -> float:
    """Return how much faster 16 tokens go through a stack of experts than through its matrices one after the other."""
    experts, n, k, tokens = 64, 2048, 2048, 16
    rng = np.random.default_rng(2)
    one = QuantizedLinear.from_linear(torch.nn.Linear(k, 128, bias=False), CODECS[1])
    planes = {name: np.tile(plane.numpy(), (experts * n // 128, 1)) for name, plane in one.planes.items()}
    planes["codes"] = rng.integers(0, 256, planes["codes"].shape, np.uint8)
    stack = QuantizedStack(experts, n, k, codec=CODECS[1], device="meta", dtype=torch.bfloat16)
    stack._set_planes({name: torch.from_numpy(plane).cuda() for name, plane in planes.items()})
    singles = []
    for e in range(experts):
        own = {name: plane[e * n : (e + 1) * n] for name, plane in stack.planes.items()}
        singles.append(QuantizedLinear.from_planes(CODECS[1], n, k, own, dtype=torch.bfloat16))
    chosen = np.sort(rng.integers(0, experts, tokens * 4))
    ends = torch.from_numpy(np.searchsorted(chosen, np.arange(experts), side="right").astype(np.int32)).cuda()
    x = torch.randn(tokens * 4, k, dtype=torch.bfloat16, device="cuda")
    starts = [0, *ends.tolist()]
    pairs = [(e, starts[e], starts[e + 1]) for e in range(experts) if starts[e + 1] > starts[e]]

    def loop() -> torch.Tensor:
        return torch.cat([singles[e](x[a:b]) for e, a, b in pairs])

    return graph_seconds([loop]) / graph_seconds([lambda: stack(x, ends)])


def check() -> Iterator[str]:
    """Compare every codec with f64 products of its decoded weights; yield what is out of bounds."""
    torch.manual_seed(1)
    for codec in (listed["id"] for listed in tenpak.codecs() if listed["id"] != "raw_v1"):
        for n, k in ((1, 1), (17, 33), (130, 1000), (1000, 4096), (256, 28672)):
            layer = QuantizedLinear.from_linear(torch.nn.Linear(k, n, bias=False), codec)
            want_bits = layer.decode(torch.float32)
            layer = layer.cuda()
            if not torch.equal(layer.decode(torch.float32).cpu(), want_bits):
                yield f"{codec} {n} x {k}: decoded weights differ"
            for m in (1, 2, 3, 8, 9, 16, 17, 33, 64, 100, 513, 8192):
                for dtype, limit in ((torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 5e-3)):
                    x = torch.randn(m, k, device="cuda").to(dtype)
                    with torch.inference_mode():
                        y = layer(x).double()
                    want = x.double() @ want_bits.cuda().double().T
                    error = float((y - want).norm() / want.norm().clamp_min(1e-30))
                    if not error <= limit:
                        yield f"{codec} m={m} n={n} k={k} {dtype}: error {error:.1e}, expected at most {limit:.0e}"


def products(table: Table, copy: Callable[[], float]) -> None:
    """Print the rows of products."""
    goals = {1: "0.60", 16: "0.60"}
    for n, k in SHAPES:
        for m in ROWS_OF_ACTIVATIONS:
            for codec in CODECS:

                def share(codec: str = codec, n: int = n, k: int = k, m: int = m) -> str:
                    seconds, size = ours(codec, n, k, m)
                    other = theirs(n, k, m)
                    return (
                        f"{seconds * 1e6:8.1f} us, {size / seconds / copy():.2f} of copy, "
                        f"{other / seconds:.2f}x of bf16 ({other * 1e6:.1f} us)"
                    )

                table.row(f"{codec} m={m} {n} x {k}", f"copy {goals.get(m, '-')}", share)
    n, k = SHAPES[0]
    seconds = functools.cache(lambda m: ours(CODECS[0], n, k, m)[0])
    for m, goal in ((16, "1.10"), (64, "1.6")):
        table.row(f"t({m}) / t(1), {CODECS[0]}", f"<= {goal}", lambda m=m: f"{seconds(m) / seconds(1):.2f}")
    for m, goal in ((1, "1.5"), (16, "3"), (64, "8")):
        table.row(f"_weight_int4pack_mm / ours, m={m}", f">= {goal}", lambda m=m: f"{packed(n, k, m) / seconds(m):.2f}")
    for m in (128, 256, 512, 1024, 2048):
        table.row(
            f"decoded first / fused, m={m}, {CODECS[0]}",
            "says where DENSE is",
            lambda m=m: f"{ours(CODECS[0], n, k, m, True)[0] / ours(CODECS[0], n, k, m, False)[0]:.2f}",
        )


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare every codec and shape with f64 first")
    arguments = parser.parse_args()
    missing = why_not()
    print(f"tenpak {tenpak.__version__}, PyTorch {torch.__version__}, devices {devices()}")
    table = Table(missing)
    failures = 0
    if arguments.check and not missing:
        for failure in check():
            failures += 1
            print(failure)
        print(f"{failures} products out of bounds")
    known: list[float] = []

    def copy() -> float:
        if not known:
            known.append(copy_bandwidth())
        return known[0]

    table.row("copy on the device", "-", lambda: f"{copy() / 1e12:.2f} TB/s")
    products(table, copy)
    table.row("16 tokens x 4 of 64 experts, loop / grouped", ">= 2.5", lambda: f"{grouped():.2f}")
    for what, goal in (("int4 keys and values, 32k tokens / copy", "0.60"), ("SDPA bf16 / the same", "1.8")):
        print(f"{what:58} {goal:22} not measured: attention over quantized keys and values has no CUDA kernel")
    table.row("host, eager, a call / F.linear", "<= 1.5", lambda: f"{host_cost():.2f}")
    return 1 if failures else 0


def devices() -> str:
    """Return what the driver shows, or why nothing."""
    try:
        return _tenpak.cuda_devices()
    except tenpak.TenpakError as error:
        return f"none: {error}"


if __name__ == "__main__":
    sys.exit(main())
