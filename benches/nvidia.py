"""Products, decoding and attention on an NVIDIA device, beside PyTorch's own, in one run: ``python benches/nvidia.py``.

Prints every goal with its figure; a row that this machine cannot measure says why. Products run from CUDA graphs, over
as many matrices in turn as fill 256 MiB, so that none is in a cache, and times are medians. ``--check`` compares every
codec with f64 products of its decoded weights first. Without a device everything is printed but the figures.
"""

import argparse
import contextlib
import functools
import itertools
import os
import shlex
import shutil
import statistics
import subprocess
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
from tenpak.torch._kv import Cache, kv_append, kv_attend, kv_recall, shapes

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
def ours(codec: str, n: int, k: int, m: int, dense: bool | None = None, wgmma: bool = True) -> tuple[float, int]:
    """Return seconds of a product and bytes of the weights; with `dense` decoded first, or never; as before Hopper."""
    made = layers(codec, n, k)
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    before = backend.DENSE
    if dense is not None:
        backend.DENSE = 0 if dense else 1 << 30
    with without_wgmma() if not wgmma else contextlib.nullcontext():
        try:
            return graph_seconds([lambda layer=layer: layer(x) for layer in made]), payload(made[0])
        finally:
            backend.DENSE = before


@contextlib.contextmanager
def without_wgmma() -> Iterator[None]:
    """Have a device without the instructions of Hopper: it is opened anew, which is when it is asked."""
    os.environ["TENPAK_WGMMA"] = "0"
    backend._devices.clear()
    backend._sizes.clear()
    try:
        yield
    finally:
        del os.environ["TENPAK_WGMMA"]
        backend._devices.clear()
        backend._sizes.clear()


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


#: Heads of keys and values, query heads of each, channels: those of a model of 8 billion parameters.
HEADS, SHARED, CHANNELS = 8, 4, 128


def filled(tokens: int, bits: tuple[int, int], sequences: int = 1, room: int = 64) -> Cache:
    """Return a cache of random codes on the device, its blocks on pages in no order."""
    columns = -(-(tokens + room) // 32)
    parts = []
    for shape, dtype in shapes(sequences, sequences * columns, columns, HEADS, CHANNELS, bits):
        if dtype is torch.float16:
            parts.append(torch.randn(shape, dtype=dtype, device="cuda"))
        else:
            parts.append(torch.randint(-(2**31), 2**31 - 1, shape, dtype=dtype, device="cuda"))
    cache = Cache._make((*parts, *bits))
    for params in (cache.key_params, cache.value_params):
        # Scales of 2^-6 and offsets of -1/8: no random bits are infinite.
        params.fill_(0x2400 | 0xB000 - 0x10000 << 16)
    cache.pages.copy_(torch.randperm(sequences * columns, device="cuda").view(sequences, columns))
    cache.lengths.fill_(tokens)
    return cache


def turns(tokens: int, number: float) -> int:
    """Return how many caches of so many bytes for a number are in turn, so that none is in the L2 cache."""
    return max(2, -(-ROTATION // int(2 * tokens * HEADS * CHANNELS * number)))


def stored(tokens: int, bits: tuple[int, int]) -> float:
    """Return the bytes of a sequence that attention has to read."""
    return tokens * HEADS * CHANNELS * (sum(bits) + 2) / 8


@torch.inference_mode()
def attended(tokens: int, bits: tuple[int, int], m: int = 1) -> float:
    """Return seconds of attention of a step over a quantized cache."""
    held = [filled(tokens, bits) for _ in range(turns(tokens, (sum(bits) + 2) / 16))]
    q = torch.randn(1, HEADS * SHARED, m, CHANNELS, dtype=torch.bfloat16, device="cuda")
    scale = CHANNELS**-0.5
    return graph_seconds([lambda cache=cache: kv_attend(q, *cache, None, scale, True, tokens) for cache in held])


@torch.inference_mode()
def their_attention(tokens: int) -> float:
    """Return seconds of the same step by PyTorch over bfloats."""
    shape = (1, HEADS, tokens, CHANNELS)
    held = [
        [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2)] for _ in range(turns(tokens, 2.0))
    ]
    # Queries of a head as tokens of it: what PyTorch is fastest with.
    q = torch.randn(1, HEADS, SHARED, CHANNELS, dtype=torch.bfloat16, device="cuda")
    return graph_seconds([lambda k=k, v=v: F.scaled_dot_product_attention(q, k, v) for k, v in held])


@torch.inference_mode()
def appended(before: int, count: int, bits: tuple[int, int], sequences: int = 64) -> float:
    """Return seconds of adding tokens to every sequence."""
    held = [filled(before, bits, sequences, count + 64) for _ in range(4)]
    shape = (sequences, HEADS, count, CHANNELS)
    keys, values = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return graph_seconds([lambda cache=cache: kv_append(keys, values, *cache) for cache in held])


def check_caches() -> Iterator[str]:
    """Compare caches on the device with those of the CPU, and attention with f64 over what they decode to."""
    torch.manual_seed(2)
    for channels in (64, 80, 96, 128, 256):
        for bits in ((4, 4), (8, 8), (4, 8)):
            for dtype, limit in ((torch.float32, 4e-3), (torch.float16, 4e-3), (torch.bfloat16, 8e-3)):
                what = f"cache {channels} channels {bits} bits {dtype}"
                parts = shapes(3, 3 * 70, 70, 2, channels, bits)
                ours = Cache._make((*(torch.zeros(s, dtype=d) for s, d in parts), *bits))
                ours.pages.copy_(torch.randperm(3 * 70).view(3, 70))
                device = Cache._make((*(part.cuda() for part in ours.tensors), *bits))
                for count in (1, 40, 2000, 1, 33):
                    keys, values = (torch.randn(3, 2, count, channels).to(dtype) for _ in range(2))
                    kv_append(keys, values, *ours)
                    kv_append(keys.cuda(), values.cuda(), *device)
                    for cache in (ours, device):
                        cache.lengths.add_(count)
                if not all(torch.equal(a, b.cpu()) for a, b in zip(ours.tensors[:4], device.tensors[:4], strict=True)):
                    yield f"{what}: codes differ"
                found = kv_recall(*device, 2075, torch.float32)
                if not all(
                    torch.equal(a, b.cpu()) for a, b in zip(kv_recall(*ours, 2075, torch.float32), found, strict=True)
                ):
                    yield f"{what}: decoded numbers differ"
                for m, per_head in ((1, 1), (1, 8), (4, 4), (16, 1)):
                    q = torch.randn(3, 2 * per_head, m, channels).to(dtype).cuda()
                    seen = torch.ones(m, 2075, dtype=torch.bool, device="cuda").tril(2075 - m)
                    k, v = (part.double() for part in found)
                    want = F.scaled_dot_product_attention(q.double(), k, v, seen, enable_gqa=True).transpose(1, 2)
                    got = kv_attend(q, *device, None, channels**-0.5, True, 2075).double()
                    error = float((got - want).norm() / want.norm())
                    if not error <= limit:
                        yield f"{what} m={m} x {per_head}: error {error:.1e}, expected at most {limit:.0e}"


def caches(table: Table, copy: Callable[[], float]) -> None:
    """Print the rows of caches of keys and values."""
    for bits in ((4, 4), (8, 8)):
        for tokens, goal in ((2048, "1.0"), (32768, "1.8" if bits == (4, 4) else "-")):

            def step(tokens: int = tokens, bits: tuple[int, int] = bits) -> str:
                seconds = attended(tokens, bits)
                other = their_attention(tokens)
                return (
                    f"{seconds * 1e6:8.1f} us, {stored(tokens, bits) / seconds / copy():.2f} of copy, "
                    f"{other / seconds:.2f}x of SDPA bf16 ({other * 1e6:.1f} us)"
                )

            share = "0.60" if (tokens, bits) == (32768, (4, 4)) else "-"
            table.row(f"attention, {bits[0]}-bit cache, {tokens} tokens", f"copy {share}, SDPA {goal}", step)
        table.row(
            f"attention, {bits[0]}-bit cache, 32768 tokens, m=4 / m=1",
            "-",
            lambda bits=bits: f"{attended(32768, bits, 4) / attended(32768, bits):.2f}",
        )
        # The cache may be anywhere in a block: a token that fills one, and one that does not.
        table.row(
            f"append, {bits[0]} bits, 64 sequences, a token",
            "-",
            lambda bits=bits: (
                f"{appended(2040, 1, bits) * 1e6:8.1f} us, {appended(2047, 1, bits) * 1e6:.1f} where it fills a block"
            ),
        )

        def prompt(bits: tuple[int, int] = bits) -> str:
            seconds = appended(0, 2048, bits, 8)
            moved = 8 * (2048 * HEADS * CHANNELS * 4 + stored(2048, bits))
            return f"{seconds * 1e6:8.1f} us, {moved / seconds / copy():.2f} of copy"

        table.row(f"append, {bits[0]} bits, 8 sequences, 2048 tokens", "-", prompt)


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
    for m in (256, 512, 2048, 8192):
        for codec in (CODECS[0], "int8_sym_g128_fp16_v1"):
            table.row(
                f"{codec} m={m}, mma.sync / wgmma",
                "> 1 from MANY on",
                lambda m=m, codec=codec: (
                    f"{ours(codec, n, k, m, False, False)[0] / ours(codec, n, k, m, False)[0]:.2f}"
                ),
            )
    for m in (128, 256, 512, 1024, 2048):
        table.row(
            f"decoded first / fused, m={m}, {CODECS[0]}",
            "says where DENSE is",
            lambda m=m: f"{ours(CODECS[0], n, k, m, True)[0] / ours(CODECS[0], n, k, m, False)[0]:.2f}",
        )


#: Tools of NVIDIA's compute-sanitizer.
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


def sanitize(tool: str, missing: str | None) -> int:
    """Run every kernel once under a tool of compute-sanitizer, or say why not."""
    path = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    command = [path, "--tool", tool, "--error-exitcode", "3", sys.executable, __file__, "--once"]
    if missing:
        print(f"compute-sanitizer {tool:9} not run: {missing.split(',')[0]}")
    elif not os.access(path, os.X_OK):
        print(
            f"compute-sanitizer {tool:9} not run: it was not found; install NVIDIA's toolkit, or the package "
            "cuda-sanitizer, and put it on the PATH"
        )
    else:
        # Memory that PyTorch keeps for later would hide what is read beyond its end.
        return subprocess.run(
            command, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, check=False
        ).returncode
    print(f"the command is: PYTORCH_NO_CUDA_MEMORY_CACHING=1 {shlex.join(command)}")
    return 0


@torch.inference_mode()
def once(missing: str | None) -> int:
    """Run every kernel once, on small and odd sizes."""
    if missing:
        print(f"nothing was run: {missing}")
        return 0
    codecs = [listed["id"] for listed in tenpak.codecs() if listed["id"] != "raw_v1"]
    for codec in codecs:
        for n, k in ((33, 100), (130, 256)):
            layer = QuantizedLinear.from_linear(torch.nn.Linear(k, n, bias=False), codec).cuda()
            for m in (1, 5, 20, 70, 260):
                for dtype in (torch.float32, torch.bfloat16):
                    layer(torch.randn(m, k, device="cuda").to(dtype))
            layer.decode(torch.bfloat16)
    for failure in check_caches():
        print(failure)
    torch.cuda.synchronize()
    print(f"{len(codecs)} codecs and caches ran")
    return 0


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare every codec and shape with f64 first")
    parser.add_argument(
        "--sanitize",
        choices=SANITIZERS,
        help="run every kernel once, on small sizes, under this tool of compute-sanitizer",
    )
    parser.add_argument("--once", action="store_true", help="run every kernel once, on small sizes, and nothing else")
    arguments = parser.parse_args()
    missing = why_not()
    if arguments.sanitize:
        return sanitize(arguments.sanitize, missing)
    if arguments.once:
        return once(missing)
    print(f"tenpak {tenpak.__version__}, PyTorch {torch.__version__}, devices {devices()}")
    table = Table(missing)
    failures = 0
    if arguments.check and not missing:
        for failure in itertools.chain(check(), check_caches()):
            failures += 1
            print(failure)
        print(f"{failures} results out of bounds")
    known: list[float] = []

    def copy() -> float:
        if not known:
            known.append(copy_bandwidth())
        return known[0]

    table.row("copy on the device", "-", lambda: f"{copy() / 1e12:.2f} TB/s")
    products(table, copy)
    table.row("16 tokens x 4 of 64 experts, loop / grouped", ">= 2.5", lambda: f"{grouped():.2f}")
    caches(table, copy)
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
