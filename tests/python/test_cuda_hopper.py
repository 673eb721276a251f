"""The kernel of Hopper without one: run on a processor, products and copies as late as they may be; and compiled."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import cuda_host as host
import numpy as np
import pytest
from conftest import ROOT
from cuda_host import LAYOUTS, WIDE
from tenpak import _tenpak
from test_cuda import assert_product, numbers, random_activations, random_planes
from test_cuda_nvrtc import EVERYTHING, assert_registers, sections, use_nvrtc

#: Layouts of every kind of levels, width and group that `dequant.cuh` tells apart.
SOME = [
    "int4_g8_fp16_v1",
    "int8_sym_g32_fp16_v1",
    "int5_k16_v1",
    "nf4_g64_fp16_v1",
]
PAIRED = [codec for codec in LAYOUTS if codec not in WIDE]
HOPPER = {"multiprocessors": 132, "shared_bytes": 227 << 10, "wgmma": True}

#: The last 12 bits of an instruction that multiplies by a warpgroup, with its first operand in registers.
HGMMA = 0xDF0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hopper")


def build(found: dict[str, Any], folder: Path, sources: Path = ROOT / "cuda") -> ctypes.CDLL:
    assert found["multiply"]["kernel"] == "wgmma" and found["prepare"]["definitions"]["MATRICES"] == "1"
    return host.build(found["multiply"]["definitions"], folder, sources, "hopper.cpp")


def product(
    codec: str, n: int, k: int, m: int, dtype: str, multiprocessors: int, folder: Path, rng: np.random.Generator,
    sources: Path = ROOT / "cuda",
) -> tuple[Any, Any, Any, dict[str, Any]]:  # fmt: skip
    """The product of random numbers, what was multiplied, and the plan."""
    found = host.plan(codec, n, k, m, dtype=dtype, **HOPPER | {"multiprocessors": multiprocessors})
    planes, w = random_planes(codec, n, k, rng)
    stored, x = random_activations(m, k, dtype, rng)
    y = host.multiply(build(found, folder, sources), found, host.Matrix(planes, n, k), stored, m, dtype)
    return numbers(y, dtype).reshape(m, n), x, w, found


@pytest.mark.parametrize("codec", [codec for codec in SOME if codec in PAIRED] or PAIRED[:4])
def test_warpgroups_compute_products_within_their_roundings(codec: str, folder: Path, rng: np.random.Generator) -> None:
    i = PAIRED.index(codec)
    dtype = ("BF16", "F16", "F32")[i % 3]
    # One tile and a part of another of either; columns that end within a block, and fewer blocks than stages or more.
    sizes = [(300, 160 + 32 * (i % 4), 257, 1)]
    if codec == SOME[0]:
        sizes.append((17, 2080, 260, 40))
    for n, k, m, multiprocessors in sizes:
        y, x, w, found = product(codec, n, k, m, dtype, multiprocessors, folder, rng)
        assert (found["shares"] > 1) == (multiprocessors > 1)
        assert_product(
            y, x, w, dtype, halves=True, rounded=dtype == "F32", spread=float(np.abs(w).max()),
            what=f"{codec} {n} x {k} m={m}",
        )  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        # Without it products read what the copy has not brought yet.
        "        barrier_wait(full + stage, number / STAGES % 2);\n",
        # Without it a copy overwrites what products have yet to read.
        "            if (number > 1) barrier_wait(empty + (number - 2) % STAGES, (number - 2) / STAGES % 2);\n",
        # Without it results are stored before they are there.
        "        group_wait<0>();\n",
    ],
    ids=["full", "empty", "results"],
)
def test_a_missing_wait_is_seen(line: str, folder: Path, rng: np.random.Generator) -> None:
    sources = folder / f"broken{abs(hash(line))}"
    shutil.copytree(ROOT / "cuda", sources, dirs_exist_ok=True)
    text = (sources / "wgmma.cu").read_text()
    assert text.count(line) == 1
    (sources / "wgmma.cu").write_text(text.replace(line, ""))
    codec, n, k, m = "int4_g128_fp16_v1", 128, 1536, 256
    found = host.plan(codec, n, k, m, dtype="F16", **HOPPER | {"multiprocessors": 1})
    planes, w = random_planes(codec, n, k, rng)
    stored, x = random_activations(m, k, "F16", rng)
    matrix, want = host.Matrix(planes, n, k), x @ w.T
    kernels = [build(found, folder), build(found, folder, sources)]
    right = []
    for library in kernels:
        # In a process of its own: threads that wait for each other for ever are ended with it.
        child = os.fork()
        if child == 0:
            faulthandler.disable()
            y = numbers(host.multiply(library, found, matrix, stored, m, "F16"), "F16").reshape(m, n)
            os._exit(0 if np.abs(y - want).max() < 1e-2 * np.abs(want).max() else 1)
        right.append(os.waitpid(child, 0)[1] == 0)
    assert right == [True, False]


def test_large_products_are_for_hopper_alone_and_only_where_wanted() -> None:
    def kernel(m: int, **options: Any) -> str:
        found = host.plan("int4_g128_fp16_v1", 4096, options.pop("cols", 4096), m, **HOPPER | options)
        return str(found["multiply"]["kernel"])

    assert [kernel(m) for m in (16, 255, 256, 8192)] == ["gemv", "gemm", "wgmma", "wgmma"]
    assert kernel(8192, wgmma=False) == kernel(8192, cols=4100) == kernel(8192, aligned=False) == "gemm"
    assert kernel(8192, experts=4) == "gemm" and kernel(8192, exact=True) == "exact"


@pytest.mark.parametrize("codec", PAIRED if EVERYTHING else [codec for codec in SOME if codec in PAIRED])
def test_products_of_warpgroups_compile_without_local_memory_or_waiting_for_each_other(codec: str) -> None:
    use_nvrtc()
    every = ("BF16", "F16", "F32")
    for dtype in every if EVERYTHING else (every[PAIRED.index(codec) % 3],):
        found = host.plan(codec, 4096, 4096, 2048, dtype=dtype, **HOPPER)
        step = found["multiply"]
        for name in ("prepare", "multiply"):
            cubin = assert_registers(found[name], "90a")
        _, log = _tenpak.cuda_compile("wgmma", step["text"], "90a", ["--ptxas-options=-v"])
        assert "serialized" not in log, log
        code = sections(cubin)[".text.tenpak_wgmma"]
        count = sum(struct.unpack_from("<Q", code, i)[0] & 0xFFF == HGMMA for i in range(0, len(code), 16))
        # Eight steps of 16 columns for each tile of weights.
        assert count == 8 * int(step["definitions"]["WEIGHT_TILES"])
