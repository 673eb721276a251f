"""CUDA kernels without a GPU: their source, run on a processor, computes what it should."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path
from typing import Any

import blake3
import cuda_host as host
import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import tenpak
from conftest import ROOT
from cuda_host import CODECS, LAYOUTS, SAME, WIDE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cuda")


def case(codec: str) -> dict[str, Any]:
    """What is tried with a codec: sizes, types and devices take turns, so that all codecs together try all of them."""
    i = CODECS.index(SAME[codec])
    aligned = i % 2 == 0
    return {
        "dtype": ("F16", "BF16", "F32")[i % 3],
        "aligned": aligned,
        "n": (33, 70, 17, 131)[i % 4],
        "k": (416, 160, 1056, 288)[i // 2 % 4] if aligned else (300, 8, 1001, 129)[i // 2 % 4],
        # Kernels of one library have the same constants, and here both sizes have the same kernel.
        "few": 11 if codec in WIDE else (1, 11, 3, 16, 5)[i % 5],
        "many": (17, 33, 70)[i // 3 % 3],
        "multiprocessors": (1, 4, 60)[i // 2 % 3],
        # Too little for activations: they are put in order by a kernel of their own.
        "shared_bytes": (100 << 10, 17 << 10)[i // 5 % 2],
        "scaled": i % 7 == 0,
        "experts": 5 if i % 4 == 1 else 1,
    }


def tried(codec: str, kind: str) -> dict[str, Any]:
    """The plan of a case: `few`, `many`, or `exact`."""
    how = case(codec)
    experts = how["experts"] if kind != "few" else 1
    device = {"multiprocessors": how["multiprocessors"], "shared_bytes": how["shared_bytes"]}
    if kind == "many":
        # Stages of activations have to fit.
        device["shared_bytes"] = 100 << 10
    m = how["few" if kind == "few" else "many"]
    exact = kind == "exact"
    return host.plan(
        codec, how["n"], how["k"], m, experts=experts, dtype=how["dtype"], exact=exact, aligned=how["aligned"], **device
    )


@pytest.fixture(scope="module")
def libraries(folder: Path) -> dict[str, ctypes.CDLL]:
    return {}


def library(codec: str, folder: Path, libraries: dict[str, ctypes.CDLL]) -> ctypes.CDLL:
    layout = SAME[codec]
    if layout not in libraries:
        plans = [tried(layout, kind) for kind in ("exact", "few", "many")]
        libraries[layout] = host.build(host.definitions(*plans), folder)
    return libraries[layout]


@pytest.mark.parametrize("codec", CODECS)
def test_reading_a_weight_decodes_every_golden_file_bit_for_bit(
    codec: str, folder: Path, libraries: dict[str, ctypes.CDLL]
) -> None:
    lines = dict(line.split(" ", 1) for line in (ROOT / f"tests/golden/{codec}.txt").read_text().splitlines())
    wanted = lines.pop("weights")
    planes = {name: np.frombuffer(bytes.fromhex(text), np.uint8) for name, text in lines.items()}
    rows, cols = 3, 172
    matrix = host.Matrix(planes, rows, cols)
    weights = np.empty(rows * cols, np.float32)
    library(codec, folder, libraries).weights(matrix.by_reference, host.at(weights))
    found = weights.tobytes()
    text = f"{found[:64].hex()} .. {found[-64:].hex()} blake3 {blake3.blake3(found).hexdigest()}"
    assert text == wanted


def random_planes(codec: str, rows: int, cols: int, rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
    """Planes of ordinary weights with rows of very different sizes, and the weights in f64."""
    weights = rng.standard_normal((rows, cols)) * 0.05 * np.exp(rng.standard_normal((rows, 1)))
    encoded = tenpak.encode(weights.astype(np.float32), codec)
    return dict(encoded.planes), encoded.decode().astype(np.float64)


def random_activations(
    m: int, cols: int, dtype: str, rng: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
    """Bytes of activations, and what they are; rows of f32 and bfloats are of sizes that halves do not have."""
    spread = 4.0 if dtype == "F16" else 30.0
    x = rng.standard_normal((m, cols)) * np.exp(rng.uniform(-spread, spread / 4, (m, 1)))
    kind = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[dtype]
    stored = x.astype(kind)
    return host.aligned(stored.view(np.uint8)), stored.astype(np.float64)


def numbers(y: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float64]:
    kind = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[dtype]
    return y.view(kind).astype(np.float64)


def assert_product(
    y: npt.NDArray[np.float64], x: npt.NDArray[np.float64], w: npt.NDArray[np.float64], dtype: str, *,
    halves: bool, rounded: bool, spread: float, what: str,
) -> None:  # fmt: skip
    """Results are within what roundings can do.

    `halves`: weights become halves, off by 2^-11 of themselves and 2^-25 of the row's scale; `rounded`: activations do
    as well, 2^-11. Sums in f32 add 2^-24 of what is added up for each of the columns and a few. The result is rounded.
    """
    k = x.shape[1]
    magnitude = np.abs(x) @ np.abs(w).T
    relative = (2.0**-11 if halves else 0.0) * (1 + rounded) * 1.01 + (k + 16) * 2.0**-24
    # Offsets cancel in weights but not in the sums of f32.
    bound = relative * magnitude + (k + 16) * 2.0**-24 * np.abs(x).sum(1)[:, None] * spread
    if halves:
        bound += np.abs(x).sum(1)[:, None] * max(spread, 1.0) * 2.0**-24
        bound += np.abs(x).max(1)[:, None] * np.abs(w).sum(1) * 2.0**-38
    want = x @ w.T
    last = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}[dtype]
    bound += last * (np.abs(want) + bound) + (2.0**-25 if dtype == "F16" else 2.0**-140)
    inside = np.abs(y - want) <= bound
    assert inside.all(), f"{what}: {y[~inside][:4]} is not {want[~inside][:4]} ± {bound[~inside][:4]}"


@pytest.mark.parametrize("codec", LAYOUTS)
def test_kernels_compute_products_within_their_roundings(
    codec: str, folder: Path, libraries: dict[str, ctypes.CDLL], rng: np.random.Generator
) -> None:
    how = case(codec)
    dtype, n, k = how["dtype"], how["n"], how["k"]
    offset = 0 if how["aligned"] else 4
    kernels = library(codec, folder, libraries)
    for kind in ("exact", "few", "many"):
        experts = how["experts"] if kind != "few" else 1
        m = how["few" if kind == "few" else "many"]
        found = tried(codec, kind)
        planes, w = random_planes(codec, n * experts, k, rng)
        matrix = host.Matrix(planes, n * experts, k, offset)
        stored, x = random_activations(m, k, dtype, rng)
        scales = None
        if how["scaled"]:
            values = rng.uniform(0.5, 2.0, k).astype(np.float32)
            scales = host.aligned(values)
            x = x * values
        halves = found["multiply"]["kernel"] != "exact"
        assert halves == (kind != "exact" and codec not in WIDE)
        sizes: list[int] = [m]
        ends = None
        if experts > 1:
            # Experts without rows at the beginning, in the middle and at the end.
            cuts = np.sort(rng.integers(0, m + 1, experts - 4))
            sizes = [0, *np.diff([0, *cuts, m]), 0]
            sizes.insert(2, 0)
            ends = host.aligned(np.cumsum(sizes).astype(np.int32))
        y = host.multiply(
            kernels, found, matrix, stored, m, dtype, column_scales=scales, ends=ends, experts=experts
        )  # fmt: skip
        results = numbers(y, dtype).reshape(m, n)
        first = 0
        for expert, size in enumerate(sizes):
            rows, own = slice(first, first + size), slice(expert * n, (expert + 1) * n)
            assert_product(
                results[rows], x[rows], w[own], dtype, halves=halves, rounded=dtype == "F32" or how["scaled"],
                spread=float(np.abs(w).max()), what=f"{codec} {kind} {how} expert {expert}",
            )  # fmt: skip
            first += size
        assert first == m


def test_what_is_not_finite_stays_in_its_own_row(folder: Path, rng: np.random.Generator) -> None:
    codec, n, k = "int4_g32_fp16_v1", 40, 160
    plans = {m: host.plan(codec, n, k, m, dtype="BF16") for m in (5, 20)}
    kernels = host.build(host.definitions(*plans.values()), folder)
    planes, _ = random_planes(codec, n, k, rng)
    matrix = host.Matrix(planes, n, k)
    for m, bad in ((5, 2), (20, 9)):
        good = rng.standard_normal((m, k)).astype(ml_dtypes.bfloat16)
        want = numbers(host.multiply(kernels, plans[m], matrix, host.aligned(good.view(np.uint8)), m, "BF16"), "BF16")
        for value in (np.nan, np.inf, -np.inf):
            broken = good.copy()
            broken[bad, 77] = value
            got = host.multiply(kernels, plans[m], matrix, host.aligned(broken.view(np.uint8)), m, "BF16")
            rows = numbers(got, "BF16").reshape(m, n)
            assert not np.isfinite(rows[bad]).any()
            others = np.arange(m) != bad
            assert np.array_equal(rows[others], want.reshape(m, n)[others])


def test_a_missing_barrier_is_seen(folder: Path, rng: np.random.Generator) -> None:
    codec, n, k, m = "int4_g32_fp16_v1", 160, 1056, 17
    found = host.plan(codec, n, k, m, dtype="F16")
    sources = folder / "broken"
    shutil.copytree(ROOT / "cuda", sources, dirs_exist_ok=True)
    text = (sources / "gemm.cu").read_text()
    barrier = "        __syncthreads();\n        if (block + STAGES - 1 < end) copy_stage"
    assert text.count(barrier) == 1
    (sources / "gemm.cu").write_text(text.replace(barrier, barrier.partition("\n")[2]))
    planes, w = random_planes(codec, n, k, rng)
    matrix = host.Matrix(planes, n, k)
    stored, x = random_activations(m, k, "F16", rng)
    off = []
    for kernels in (host.build(host.definitions(found), folder), host.build(host.definitions(found), folder, sources)):
        y = numbers(host.multiply(kernels, found, matrix, stored, m, "F16"), "F16").reshape(m, n)
        off.append(float(np.abs(y - x @ w.T).max() / np.abs(x @ w.T).max()))
    assert off[0] < 1e-2 and not off[1] < 1e-2


def test_decoding_rounds_once_and_finds_rows_by_number(folder: Path, rng: np.random.Generator) -> None:
    for codec, dtype, k, aligned in (("int5_k16_v1", "BF16", 96, True), ("int4_g8_fp16_v1", "F16", 101, False)):
        n = 9
        found = host.plan(codec, n, k, 1, dtype=dtype, aligned=aligned)
        kernels = host.build(host.definitions(found), folder)
        planes, w = random_planes(codec, n, k, rng)
        matrix = host.Matrix(planes, n, k)
        kind = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}[dtype]
        out = host.poisoned(n * k * 2)
        kernels.decode(matrix.by_reference, host.at(None), host.at(None), 0, n, host.at(out))
        assert np.array_equal(out.view(kind).reshape(n, k), w.astype(np.float32).astype(kind))
        ids = np.array([3, 8, 3, 0, n, -1])
        out = host.poisoned(len(ids) * k * 2)
        kernels.decode(matrix.by_reference, host.at(None), host.at(ids), 0, len(ids), host.at(out))
        rows = out.view(kind).reshape(len(ids), k)
        assert np.array_equal(rows[:4], w[ids[:4]].astype(np.float32).astype(kind))
        assert np.isnan(rows[4:].astype(np.float32)).all(), "a row that is not there is seen"


@pytest.mark.parametrize("experts", [1, 3])
def test_outliers_are_added_where_they_stand(experts: int, folder: Path, rng: np.random.Generator) -> None:
    n, k, m = 45, 200, 11
    rows = n * experts
    found = host.plan("int4_g32_fp16_v1", n, k, m, experts=experts, dtype="F32", exact=True, outliers=True)
    step = found["outliers"]
    dense = rng.standard_normal((rows, k)) * (rng.random((rows, k)) < 0.05) * (np.arange(rows) % 5 != 2)[:, None]
    dense = dense.astype(np.float16).astype(np.float64)
    counts, (_, columns) = (dense != 0).sum(1).astype(np.uint32), np.nonzero(dense)
    planes = [
        host.aligned(counts),
        host.aligned(columns.astype(np.uint16)),
        host.aligned(dense[dense != 0].astype("<f2")),
    ]
    places = [host.at(plane) for plane in planes]
    kernels = host.build(host.definitions(found) | step["definitions"], folder)
    x, before = rng.standard_normal((m, k)).astype(np.float32), rng.standard_normal((m, n)).astype(np.float32)
    sizes = [m] if experts == 1 else [4, 0, 7]
    ends = None if experts == 1 else host.aligned(np.cumsum(sizes).astype(np.int32))
    y = host.aligned(before)
    stored = host.aligned(x)
    kernels.outliers(
        *places,
        host.at(stored),
        host.at(ends),
        host.at(None),
        experts,
        host.at(y),
        rows,
        k,
        m,
        len(columns),
        host.grid_of(step),
    )
    first = 0
    for expert, size in enumerate(sizes):
        part, own = slice(first, first + size), dense[expert * n : (expert + 1) * n]
        want = before[part] + x[part].astype(np.float64) @ own.T
        bound = 40 * 2.0**-24 * (np.abs(before[part]) + np.abs(x[part]) @ np.abs(own).T)
        assert (np.abs(y.view(np.float32).reshape(m, n)[part] - want) <= bound).all()
        first += size
    decoded = host.build(host.definitions(found) | step["definitions"] | {"DECODED": "1"}, folder)
    base = rng.standard_normal((rows, k)).astype(np.float32)
    ids = np.array([7, rows - 1, 7, -1, rows])
    for chosen in (None, ids):
        numbers_of = np.arange(rows) if chosen is None else chosen
        out = host.aligned(base[np.clip(numbers_of, 0, rows - 1)])
        grid = host.ctypes.byref(host.Grid(len(numbers_of), 1, 1))
        decoded.outliers(
            *places, host.at(None), host.at(None), host.at(chosen), 1, host.at(out), rows, k, 0, len(columns), grid
        )
        got = out.view(np.float32).reshape(-1, k)
        for row, found_row in zip(numbers_of, got, strict=True):
            there = 0 <= row < rows
            want_row = base[np.clip(row, 0, rows - 1)] + (dense[row].astype(np.float32) if there else 0)
            assert np.array_equal(found_row, want_row), f"row {row}"
