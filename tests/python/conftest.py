"""Fixtures: the binary, the sample model, shared models, and checkpoints made up for a test.

| variable | meaning |
|---|---|
| `TENPAK_BIN` | binary to test; else the `tenpak` on the PATH |
| `TENPAK_SHARED` | folder with larger models under `data/models`; else `../shared` beside the repository |
| `TENPAK_CAMPAIGN` | cases of a campaign, tensors of the random one |
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

ROOT = Path(__file__).resolve().parents[2]

# Tests run in two processes, where threads that spin while they wait take each other's cores; read when OpenMP starts.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

NUMPY: dict[str, npt.DTypeLike] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
"""The numpy dtype of every dtype of a checkpoint."""

Arrays = Mapping[str, npt.NDArray[Any]]


def dtype_name(array: npt.NDArray[Any]) -> str:
    """Name the dtype of an array as checkpoints do."""
    return next(name for name, dtype in NUMPY.items() if np.dtype(dtype) == array.dtype)


def write_safetensors(path: Path, tensors: Arrays, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file without the package of that name, in the order of the mapping."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    parts, at = [], 0
    for name, array in tensors.items():
        data = array.tobytes()
        header[name] = {
            "dtype": dtype_name(array),
            "shape": list(array.shape),
            "data_offsets": [at, at + len(data)],
        }
        parts.append(data)
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))
    return path


def read_safetensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Read a safetensors file without the package of that name."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    out = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        raw = np.frombuffer(data[8 + length + first : 8 + length + last], NUMPY[entry["dtype"]])
        out[name] = raw.reshape(entry["shape"])
    return out


class Cli:
    """The binary, run as a user runs it."""

    def __init__(self, program: str) -> None:
        """Take the program's path."""
        self.program = program

    def __call__(self, *args: object, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        """Run a verb; `code` is the exit code to insist on, `None` for any."""
        done = subprocess.run([self.program, *map(str, args)], capture_output=True, text=True, timeout=600, check=False)
        if code is not None and done.returncode != code:
            pytest.fail(f"tenpak {' '.join(map(str, args))}: exit code {done.returncode}, not {code}\n{done.stderr}")
        return done

    def json(self, *args: object, code: int | None = 0) -> dict[str, Any]:
        """Run a verb with `--format json` and parse what it prints."""
        out: dict[str, Any] = json.loads(self(*args, "--format", "json", code=code).stdout)
        return out


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Find the binary; a test run without one is a failed run."""
    given = os.environ.get("TENPAK_BIN")
    program = given or shutil.which("tenpak")
    if program is None or not os.access(program, os.X_OK):
        pytest.fail(
            f"no tenpak to test: {given or 'none on the PATH'}; install the package, or build the binary with "
            "`cargo build --release` and set TENPAK_BIN to it"
        )
    return Cli(str(Path(program).resolve()))


@pytest.fixture(scope="session")
def sample_model() -> Path:
    """Give the directory of the sample model."""
    return ROOT / "tests/data/tiny-books"


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """Give the folder of larger models."""
    folder = Path(os.environ.get("TENPAK_SHARED", ROOT.parent / "shared")) / "data/models"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}; set TENPAK_SHARED to the folder with data/models")
    return folder


@pytest.fixture(scope="session")
def codec_ids(cli: Cli) -> list[str]:
    """List the codecs of the binary, without the raw one."""
    return [codec["id"] for codec in cli.json("codecs")["codecs"] if codec["id"] != "raw_v1"]


@pytest.fixture
def rng() -> np.random.Generator:
    """Give the same random numbers to every run."""
    return np.random.default_rng(20240229)
