"""CUDA kernels on a processor: builds `tests/cuda/host.cpp` for a plan and runs what a GPU would."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tenpak
from conftest import ROOT
from tenpak import _tenpak

Array = npt.NDArray[Any]

LISTED = [codec for codec in tenpak.codecs() if codec["id"] != "raw_v1"]
CODECS = [codec["id"] for codec in LISTED]
#: Codecs with scales of groups in 32 bits: tensor cores have no kernel for them.
WIDE = [codec["id"] for codec in LISTED if codec["scale"] == "F32" and codec["group"] and codec["levels"] != "bank"]
#: The first codec with the layout of each: what kernels are compiled for.
SAME = {
    codec["id"]: next(
        other["id"]
        for other in LISTED
        if all(other[field] == codec[field] for field in ("levels", "bits", "group", "scale", "offset"))
    )
    for codec in LISTED
}
LAYOUTS = sorted(set(SAME.values()), key=CODECS.index)

#: Planes as the kernels take them.
PLACES = {"codes": 0, "high_codes": 1, "scales": 2, "offsets": 3, "zero_points": 3, "row_scales": 4}
NUMBERS = {"F32": 4, "F16": 2, "BF16": 2}


class Planes(ctypes.Structure):
    """`Planes` of `dequant.cuh`."""

    _fields_ = [("at", ctypes.c_void_p * 5), ("rows", ctypes.c_uint), ("cols", ctypes.c_uint)]


class Grid(ctypes.Structure):
    """`dim3`."""

    _fields_ = [("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint)]


def compiler() -> str:
    """Find the C++ compiler; its absence is a failure, because nothing else runs the kernels without a GPU."""
    found = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    assert found, "no C++ compiler to run CUDA kernels with; on Debian: apt-get install g++"
    return found


def plan(
    codec: str,
    rows: int,
    cols: int,
    m: int,
    *,
    experts: int = 1,
    dtype: str = "F16",
    exact: bool = False,
    aligned: bool = True,
    outliers: bool = False,
    multiprocessors: int = 4,
    shared_bytes: int = 100 << 10,
    wgmma: bool = False,
) -> dict[str, Any]:
    """Return how the backend would compute a product."""
    shape = (rows * experts, cols, experts)
    text = _tenpak.cuda_plan(codec, shape, m, dtype, exact, aligned, outliers, multiprocessors, shared_bytes, wgmma)
    out: dict[str, Any] = json.loads(text)
    return out


def definitions(*plans: Mapping[str, Any]) -> dict[str, str]:
    """Return what to compile all kernels of some plans with, at once; they must not contradict each other."""
    out: dict[str, str] = {"M_TILE": "1", "ROW_TILES": "1", "M_TILES": "1", "FUSED": "1"}
    out |= {"WIDE_COLUMNS": "0", "DECODED": "0", "M_BLOCK": "16", "GEMM_WARPS": "4", "STAGES": "3"}
    seen: dict[str, str] = {}
    for found in plans:
        for step in (found["decode"], found["multiply"]):
            names = {"GEMM_WARPS" if name == "WARPS" else name: value for name, value in step["definitions"].items()}
            assert all(seen.get(name, value) == value for name, value in names.items()), "plans contradict each other"
            seen |= names
    return out | seen


def build(
    defined: Mapping[str, str], folder: Path, sources: Path = ROOT / "cuda", file: str = "host.cpp"
) -> ctypes.CDLL:
    """Compile the kernels that a file of `tests/cuda` calls."""
    name = hashlib.sha256(repr((sorted(defined.items()), sources, file)).encode()).hexdigest()[:16]
    library = folder / f"{name}.so"
    if not library.exists():
        flags = "-O1 -std=c++17 -ffp-contract=off -fno-strict-aliasing -U_FORTIFY_SOURCE -shared -fPIC -w".split()
        macros = [f"-D{name}={value}" for name, value in defined.items()]
        source = ROOT / "tests/cuda" / file
        command = [compiler(), *flags, *macros, f"-I{sources}", "-o", str(library), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[:4000]
    return ctypes.CDLL(str(library))


def aligned(array: npt.ArrayLike, offset: int = 0) -> npt.NDArray[np.uint8]:
    """Copy the bytes of an array to a multiple of 64 plus `offset`, as a device has them, and a few behind."""
    source = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    memory = np.empty(source.size + 192, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    out = memory[start : start + source.size]
    out[:] = source
    return out


def poisoned(size: int) -> npt.NDArray[np.uint8]:
    """Return memory whose numbers are all NaN."""
    return aligned(np.full(size, 0xFF, np.uint8))


class Matrix:
    """Planes in memory."""

    def __init__(self, planes: Mapping[str, Array], rows: int, cols: int, offset: int = 0) -> None:
        self.held = {name: aligned(plane, offset) for name, plane in planes.items()}
        self.struct = Planes(rows=rows, cols=cols)
        for name, plane in self.held.items():
            self.struct.at[PLACES[name]] = plane.ctypes.data

    @property
    def by_reference(self) -> Any:
        """What a function takes."""
        return ctypes.byref(self.struct)


def at(array: Array | None) -> ctypes.c_void_p:
    """Return the address of an array, null for none."""
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def grid_of(step: Mapping[str, Any]) -> Any:
    """Return the blocks of a step."""
    return ctypes.byref(Grid(*step["grid"]))


def multiply(
    library: ctypes.CDLL,
    found: Mapping[str, Any],
    matrix: Matrix,
    x: Array,
    m: int,
    dtype: str,
    *,
    column_scales: Array | None = None,
    ends: Array | None = None,
    experts: int = 1,
) -> npt.NDArray[np.uint8]:
    """Launch a product as `src/gemm/cuda/launch.rs` does; the bytes of the results."""
    rows, cols = matrix.struct.rows // experts, matrix.struct.cols
    y = poisoned(m * rows * NUMBERS[dtype])
    space, step = found["workspace"], found["multiply"]
    workspace = poisoned(space["bytes"] + 16)
    parts = {name: workspace[start:] for name, start in space.items()} | {"fragments": workspace}
    if found["shares"] > 1:
        parts["counters"][: space["bytes"] - space["counters"]] = 0
    prepared = found["prepare"]
    if prepared:
        library.prepare(
            at(x), at(column_scales), at(ends), experts, m, cols, found["tile_rows"],
            at(parts["fragments"]), at(parts["inverses"]), grid_of(prepared),
        )  # fmt: skip
    space_of = at(parts["inverses"]), at(y), at(parts["partial"]), at(parts["counters"])
    if step["kernel"] == "exact":
        library.exact(matrix.by_reference, at(column_scales), at(x), at(ends), experts, at(y), m, grid_of(step))
    elif step["kernel"] == "gemv":
        from_ = parts["fragments"] if prepared else x
        library.gemv(
            matrix.by_reference, at(column_scales), at(from_), *space_of, m, grid_of(step), step["shared"]
        )  # fmt: skip
    else:
        inverses, results, partial, counters = space_of
        function = library.wgmma if step["kernel"] == "wgmma" else library.gemm
        function(
            matrix.by_reference, at(parts["fragments"]), inverses, at(ends), experts, results, partial, counters, m,
            grid_of(step), step["shared"],
        )  # fmt: skip
    if found["shares"] > 1:
        left = parts["counters"][: space["bytes"] - space["counters"]]
        assert not left.any(), "counters are zero again after a product"
    return y
