"""CUDA kernels of caches without a GPU: run on a processor, they write what the processor's code writes, and attend."""

from __future__ import annotations

import ctypes
import json
import shutil
from pathlib import Path
from typing import Any

import cuda_host as host
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from conftest import ROOT
from tenpak import _tenpak

BLOCK = 32
KINDS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class Cache(ctypes.Structure):
    """`Cache` of `cache.cuh`."""

    _fields_ = [("at", ctypes.c_void_p * 8), ("columns", ctypes.c_uint), ("pool", ctypes.c_uint)]


class Pool:
    """A cache in memory: planes of a pool of pages, tails, a table in no order, lengths."""

    def __init__(
        self, rng: np.random.Generator, heads: int, dim: int, bits: tuple[int, int], sequences: int, columns: int
    ) -> None:
        """Take memory for so many pages as the table has places, and three more; none is zero."""
        self.format = (heads, dim, *bits)
        self.pool = sequences * columns + 3
        key_words, value_words = ((dim * b + 31) // 32 for b in bits)
        groups = (dim + 31) // 32
        shapes = [(self.pool, heads, n) for n in (32 * key_words, dim, 32 * value_words, 32 * groups)]
        shapes += [(sequences, BLOCK, heads, dim // 2)] * 2
        self.planes = [host.poisoned(4 * int(np.prod(shape))) for shape in shapes]
        pages = rng.permutation(self.pool)[: sequences * columns].astype(np.int32)
        self.pages, self.lengths = host.aligned(pages), host.aligned(np.zeros(sequences, np.int32))
        self.sequences, self.columns = sequences, columns

    @property
    def parts(self) -> list[tuple[int, int]]:
        """What the functions of the extension module take."""
        return [(part.ctypes.data, part.nbytes) for part in (*self.planes, self.pages, self.lengths)]

    @property
    def by_reference(self) -> Any:
        """What kernels take."""
        struct_ = Cache(columns=self.columns, pool=self.pool)
        for i, (address, _) in enumerate(self.parts):
            struct_.at[i] = address
        return ctypes.byref(struct_)

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """Tokens of each sequence, to be written as well."""
        return self.lengths.view(np.int32)

    def append(self, keys: npt.NDArray[Any], values: npt.NDArray[Any], dtype: str) -> None:
        """Add tokens as the processor does: `[sequences, tokens, heads, channels]`."""
        a, b = np.ascontiguousarray(keys), np.ascontiguousarray(values)
        _tenpak.kv_append(
            self.format, self.parts, (a.ctypes.data, a.nbytes), (b.ctypes.data, b.nbytes), dtype, a.shape[1]
        )
        self.tokens[:] += a.shape[1]

    def decoded(self) -> list[npt.NDArray[np.float64]]:
        """Keys and values, `[sequences, tokens, heads, channels]`, as the processor reads them."""
        heads, dim = self.format[:2]
        shape = (self.sequences, int(self.tokens.max()), heads, dim)
        out = [np.empty(shape, np.float32) for _ in range(2)]
        a, b = ((array.ctypes.data, array.nbytes) for array in out)
        _tenpak.kv_recall(self.format, self.parts, shape[1], "F32", a, b)
        return [array.astype(np.float64) for array in out]


def plan(pool: Pool, m: int, per_head: int, count: int, dtype: str, device: tuple[int, int]) -> dict[str, Any]:
    """How a device would work with a cache."""
    longest = max(int(pool.tokens.max()), 1)
    sizes = (pool.sequences, m, per_head, longest)
    found: dict[str, Any] = json.loads(_tenpak.cuda_cache_plan(pool.format, sizes, count, dtype, *device))
    return found


def build(found: dict[str, Any], folder: Path, sources: Path = ROOT / "cuda") -> ctypes.CDLL:
    """Compile all kernels of a plan."""
    defined = found["recall"]["definitions"] | found["attend"]["definitions"]
    return host.build(defined, folder, sources, "cache.cpp")


def strides(array: npt.NDArray[Any], axes: tuple[int, ...]) -> Any:
    """Numbers between neighbours along axes."""
    return ctypes.byref((ctypes.c_uint64 * len(axes))(*(array.strides[axis] // array.itemsize for axis in axes)))


def launch_append(kernels: ctypes.CDLL, pool: Pool, keys: Any, values: Any, found: dict[str, Any]) -> None:
    """Add tokens as a device does; `[sequences, heads, tokens, channels]` in any order in memory."""
    kernels.append(
        pool.by_reference, host.at(keys), strides(keys, (0, 1, 2)), host.at(values), strides(values, (0, 1, 2)),
        keys.shape[2], host.grid_of(found["append"]),
    )  # fmt: skip
    pool.tokens[:] += keys.shape[2]


def launch_attend(
    kernels: ctypes.CDLL, pool: Pool, q: Any, found: dict[str, Any], scale: float, causal: bool, mask: Any = None
) -> npt.NDArray[np.uint8]:
    """Attend as a device does; the bytes of the results."""
    sequences, heads, m, dim = q.shape
    out, partial = host.poisoned(q.size * q.itemsize), host.poisoned(found["workspace"] + 16)
    step = found["attend"]
    rows = (0, 0) if mask is None else mask.strides[:2]
    kernels.attend(
        pool.by_reference, host.at(q), strides(q, (0, 1, 2)), host.at(mask), ctypes.c_uint64(rows[0]),
        ctypes.c_uint64(rows[1]), ctypes.c_float(scale), m, heads // pool.format[0], int(causal), host.at(partial),
        host.at(out), host.grid_of(step), step["shared"],
    )  # fmt: skip
    if found["merge"]:
        shares = step["grid"][0]
        kernels.merge(host.at(partial), shares, sequences * m * heads, host.at(out), host.grid_of(found["merge"]))
    return out


def random_tokens(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """Numbers with channels of very different sizes and offsets, some constant, some zero."""
    dim = shape[-1]
    size, offset = np.exp(rng.standard_normal(dim)), 3 * rng.standard_normal(dim)
    numbers = rng.standard_normal(shape) * size + offset
    numbers[..., 1] = 0.25
    numbers[..., 2] = -0.0
    return numbers.astype(KINDS[dtype])


# Heads, channels, bits of keys and values, type, sequences, tokens of queries, query heads of each head, tokens of
# each step, multiprocessors, shared memory, causal.
CASES = [
    (2, 64, (4, 4), "F16", 2, 1, 4, (70, 1), (4, 100 << 10), True),
    (1, 80, (4, 8), "BF16", 1, 3, 5, (33, 3), (1, 100 << 10), True),
    (2, 96, (8, 4), "BF16", 3, 2, 2, (1, 63, 2), (2, 100 << 10), False),
    (2, 128, (4, 4), "BF16", 1, 1, 8, (300, 1), (16, 227 << 10), True),
    (1, 128, (8, 8), "F32", 2, 4, 4, (95, 4), (8, 100 << 10), True),
    (1, 256, (8, 8), "F16", 1, 2, 8, (40, 20, 4), (2, 50 << 10), True),
    (3, 32, (4, 8), "F32", 1, 1, 1, (31, 1), (4, 100 << 10), True),
    (1, 40, (8, 4), "F16", 2, 20, 1, (128, 20), (1, 100 << 10), True),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda")


def expected(
    pool: Pool, q: npt.NDArray[np.float64], scale: float, causal: bool, mask: Any
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Attention in f64 over what is stored, and how far roundings may take it.

    Keys and values become halves, 2^-11 of themselves; so do queries by their row's size, and weights. A score that is
    off by d changes a weight by a factor of at most e^2d.
    """
    keys, values = pool.decoded()
    sequences, heads, m, _ = q.shape
    shared = heads // pool.format[0]
    out, bounds = np.empty((sequences, m, heads, q.shape[-1])), np.empty((sequences, m, heads, q.shape[-1]))
    u = 2.0**-11
    for s in range(sequences):
        length = int(pool.tokens[s])
        for h in range(heads):
            k, v = keys[s, :length, h // shared], values[s, :length, h // shared]
            for i in range(m):
                row = q[s, h, i]
                seen = np.arange(length) < (length + i + 1 - m if causal else length)
                if mask is not None:
                    seen &= mask[s, i, :length] != 0
                scores = np.where(seen, scale * (k @ row), -np.inf)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                # Subnormal halves of a query are 2^-38 of its greatest number, of a key or value 2^-25.
                size = np.abs(k) @ np.abs(row)
                lost = (2 * u * 1.01 + 2.0**-20) * size + np.abs(row).max() * np.abs(k).sum(1) * 2.0**-38
                lost += np.abs(row).sum() * 2.0**-25
                delta = float((abs(scale) * lost)[seen].max()) + 2.0**-20 * np.abs(scores[seen]).max()
                relative = np.expm1(2 * delta) + u * 1.01 + 2.0**-19
                out[s, i, h] = weights @ v
                bounds[s, i, h] = (relative + u * 1.01) * (weights @ np.abs(v)) + 2.0**-24
    return out, bounds


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[1]}-{case[2][0]}{case[2][1]}-{case[3]}")
def test_a_device_stores_what_a_processor_stores_and_attends_within_its_roundings(case: Any, folder: Path) -> None:
    heads, dim, bits, dtype, sequences, m, per_head, steps, device, causal = case
    rng = np.random.default_rng(dim)
    columns = sum(steps) // BLOCK + 1
    theirs = Pool(rng, heads, dim, bits, sequences, columns)
    ours = Pool(np.random.default_rng(dim), heads, dim, bits, sequences, columns)
    ours.pages[:] = theirs.pages
    # Sequences of different lengths: all but the last one begin with some tokens more.
    kernels = build(plan(theirs, m, per_head, 1, dtype, device), folder)
    for count in steps:
        # Tokens of a head side by side, and heads of a token: both are what models bring.
        keys = random_tokens(rng, (sequences, heads, count, dim), dtype)
        values = random_tokens(rng, (sequences, count, heads, dim), dtype).swapaxes(1, 2)
        theirs.append(keys.swapaxes(1, 2), values.swapaxes(1, 2), dtype)
        launch_append(kernels, ours, keys, values, plan(ours, m, per_head, count, dtype, device))
    for plane, (a, b) in enumerate(zip(ours.planes[:4], theirs.planes[:4], strict=True)):
        # Pages that nobody has stay as they were, in both.
        assert np.array_equal(a, b), f"plane {plane} of {case}"
    assert [x.tolist() for x in ours.decoded()] == [x.tolist() for x in theirs.decoded()]

    found = plan(ours, m, per_head, 1, dtype, device)
    # The bound of the longest sequence may be any: it says how finely they are divided.
    q = random_tokens(rng, (sequences, heads * per_head, m, dim), dtype)
    scale = float(dim) ** -0.5 / 4
    mask = None
    if m == 2:
        mask = (rng.random((sequences, m, int(ours.tokens.max()))) < 0.7).astype(np.uint8)
        mask[..., 0] = 1
    want, bound = expected(ours, q.astype(np.float64), scale, causal, mask)
    out = launch_attend(kernels, ours, q, found, scale, causal, mask)
    got = out.view(KINDS[dtype]).astype(np.float64).reshape(want.shape)
    bound = bound + {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}[dtype] * (np.abs(want) + bound)
    off = np.abs(got - want) / bound
    assert off.max() <= 1, f"{case}: {off.max()} times the bound"
    # And the processor's own, which the layers of PyTorch fall back to where nobody asks for a device.
    theirs_out = np.empty((sequences, m, heads * per_head, dim), KINDS[dtype])
    own = np.ascontiguousarray(q.swapaxes(1, 2))
    mask_at = None if mask is None else (mask.ctypes.data, mask.nbytes)
    _tenpak.kv_attend(
        ours.format, ours.parts, (own.ctypes.data, own.nbytes), mask_at,
        (theirs_out.ctypes.data, theirs_out.nbytes), dtype, m, scale, causal,
    )  # fmt: skip
    assert (np.abs(theirs_out.astype(np.float64) - want) <= bound).all()

    # What the kernel makes of codes is the specification, bit for bit.
    tokens = int(ours.tokens.max())
    recalled = [host.poisoned(sequences * heads * tokens * dim * host.NUMBERS[dtype]) for _ in range(2)]
    kernels.recall(ours.by_reference, sequences, tokens, *map(host.at, recalled), host.grid_of(found["recall"]))
    for numbers, stored in zip(recalled, ours.decoded(), strict=True):
        rounded = stored.astype(np.float32).astype(KINDS[dtype]).swapaxes(1, 2)
        assert np.array_equal(numbers.view(KINDS[dtype]).reshape(rounded.shape), rounded)


def test_what_is_not_finite_is_seen_and_pages_that_are_not_there_are_not_touched(folder: Path) -> None:
    rng = np.random.default_rng(5)
    for bad in (np.nan, np.inf, -np.inf):
        pool = Pool(rng, 1, 64, (4, 4), 1, 3)
        kernels = build(plan(pool, 1, 1, 40, "F32", (1, 100 << 10)), folder)
        keys, values = (random_tokens(rng, (1, 1, 40, 64), "F32") for _ in range(2))
        values[0, 0, 7, 9] = bad
        launch_append(kernels, pool, keys, values, plan(pool, 1, 1, 40, "F32", (1, 100 << 10)))
        q = random_tokens(rng, (1, 1, 1, 64), "F32")
        found = plan(pool, 1, 1, 1, "F32", (1, 100 << 10))
        out = launch_attend(kernels, pool, q, found, 0.01, True).view(np.float32)
        # The group of 32 channels that the number is in.
        assert not np.isfinite(out[:32]).any() and np.isfinite(out[32:]).all()
    pool = Pool(rng, 1, 64, (4, 4), 1, 3)
    pool.pages.view(np.int32)[:] = [-1, 10**6, 2]
    before = [plane.copy() for plane in pool.planes]
    launch_append(kernels, pool, keys, values, plan(pool, 1, 1, 40, "F32", (1, 100 << 10)))
    unit = before[0].size // pool.pool
    assert np.array_equal(before[0][:-unit], pool.planes[0][:-unit])


def test_sequences_of_different_lengths_see_their_own_tokens(folder: Path) -> None:
    rng = np.random.default_rng(6)
    pool = Pool(rng, 2, 64, (8, 4), 3, 5)
    lengths = (1, 32, 149)
    for s, length in enumerate(lengths):
        one = Pool(rng, 2, 64, (8, 4), 1, 5)
        keys, values = (random_tokens(rng, (1, length, 2, 64), "F32") for _ in range(2))
        one.append(keys, values, "F32")
        mine = pool.pages.view(np.int32).reshape(3, 5)[s]
        for plane in range(4):
            to, of = pool.planes[plane].reshape(pool.pool, -1), one.planes[plane].reshape(one.pool, -1)
            to[mine] = of[one.pages.view(np.int32)]
        for plane in (4, 5):
            pool.planes[plane].reshape(3, -1)[s] = one.planes[plane]
        pool.tokens[s] = length
    found = plan(pool, 1, 4, 1, "F32", (16, 100 << 10))
    assert found["merge"], "a share without tokens is part of this"
    q = random_tokens(rng, (3, 8, 1, 64), "F32")
    want, bound = expected(pool, q.astype(np.float64), 0.02, True, None)
    out = launch_attend(build(found, folder), pool, q, found, 0.02, True).view(np.float32).reshape(want.shape)
    assert (np.abs(out - want) <= bound + 2.0**-24 * np.abs(want)).all()


def test_a_missing_wait_is_seen(folder: Path) -> None:
    rng = np.random.default_rng(7)
    pool = Pool(rng, 1, 64, (4, 4), 1, 20)
    keys, values = (random_tokens(rng, (1, 600, 1, 64), "F32") for _ in range(2))
    pool.append(keys, values, "F32")
    found = plan(pool, 1, 1, 1, "F32", (1, 100 << 10))
    sources = folder / "broken"
    shutil.copytree(ROOT / "cuda", sources, dirs_exist_ok=True)
    text = (sources / "attend.cu").read_text()
    wait = "        copies_wait<STAGES - 1>();\n        __syncwarp();\n"
    assert text.count(wait) == 1
    (sources / "attend.cu").write_text(text.replace(wait, "        copies_wait<STAGES - 1>();\n"))
    q = random_tokens(rng, (1, 1, 1, 64), "F32")
    want, bound = expected(pool, q.astype(np.float64), 0.02, True, None)
    off = []
    for kernels in (build(found, folder), build(found, folder, sources)):
        out = launch_attend(kernels, pool, q, found, 0.02, True).view(np.float32).reshape(want.shape)
        off.append((np.abs(out - want) / (bound + 2.0**-24 * np.abs(want))).max())
    assert off[0] <= 1 and not off[1] <= 1


ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_of_caches_compile_without_local_memory(architecture: str) -> None:
    from test_cuda_nvrtc import EVERYTHING, assert_registers, tensor_instructions, use_nvrtc

    use_nvrtc()
    at = ARCHITECTURES.index(architecture)
    every = [
        (dim, bits, dtype, per_head)
        for dim in (64, 80, 96, 128, 256)
        for bits in ((4, 4), (8, 8), (4, 8), (8, 4))
        for dtype in ("F16", "BF16", "F32")
        for per_head in (8, 16)
    ]
    # All of them together try every size, width and type; the widest with most queries is everyone's.
    usual = [every[i] for i in range(len(every)) if i % 40 == at * 6] + [(256, (8, 8), "BF16", 16)]
    for dim, bits, dtype, per_head in every if EVERYTHING else usual:
        sizes = (1, 1, per_head, 1 << 15)
        found = json.loads(_tenpak.cuda_cache_plan((8, dim, *bits), sizes, 1, dtype, 132, 227 << 10))
        for name in ("append", "attend", "merge", "recall"):
            step = found[name]
            cubin = assert_registers(step, architecture)
            if name != "attend":
                continue
            tiles, parts = int(step["definitions"]["ROW_TILES"]), (dim + 31) // 32
            # Of a block: two tiles of tokens of each half octet, and two of channels of each quad of 16 tokens. The
            # tail has the same for values; its scores are a loop.
            scores, values = tiles * parts * 4, tiles * parts * 4
            count = tensor_instructions(cubin, "tenpak_attend")
            # Compilers may write the loop down more than once.
            once = scores + tiles * 4 + 2 * values
            assert count >= once and (count - once) % (tiles * 4) == 0, f"{step['definitions']}: {count}"
