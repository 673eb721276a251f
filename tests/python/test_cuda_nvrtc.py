"""CUDA kernels compile for every architecture by NVRTC, which needs no GPU, and become what they are meant to."""

from __future__ import annotations

import os
import re
import struct
from typing import Any

import cuda_host as host
import pytest
from cuda_host import CODECS, LAYOUTS
from tenpak import _tenpak

ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
#: With `all`, every kernel of every layout for every architecture.
EVERYTHING = os.environ.get("TENPAK_CUDA") == "all"


def sections(cubin: bytes) -> dict[str, bytes]:
    """The machine code of a file of the format ELF, by section."""
    (offset,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, offset + i * size) for i in range(count)]
    start = headers[names][4]
    out = {}
    for header in headers:
        name = cubin[start + header[0] : cubin.index(b"\0", start + header[0])].decode()
        out[name] = cubin[header[4] : header[4] + header[5]] if header[1] != 8 else b""
    return out


#: The last 12 bits of an instruction say what it is; these multiply matrices of halves in tensor cores.
HMMA = 0x23C


def tensor_instructions(cubin: bytes, entry: str) -> int:
    code = sections(cubin)[f".text.{entry}"]
    return sum(struct.unpack_from("<Q", code, i)[0] & 0xFFF == HMMA for i in range(0, len(code), 16))


def use_nvrtc() -> None:
    """Tell tenpak where the compiler is: with PyTorch, which the tests require."""
    from tenpak._nvrtc import find

    found = find()
    assert found, "NVRTC was not found beside PyTorch; pip install nvidia-cuda-nvrtc"
    _tenpak.cuda_use_compiler(str(found))


def assert_registers(step: dict[str, Any], architecture: str) -> bytes:
    """A kernel compiles and keeps all it has in registers; its machine code."""
    name, defined = step["kernel"], step["definitions"]
    cubin, log = _tenpak.cuda_compile(name, step["text"], architecture, ["--ptxas-options=-v"])
    what = f"{name} for sm_{architecture} with {defined}:\n{log}"
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert frames == [("0", "0", "0")], what
    assert not re.search(r"\(\d+\): (warning|error)", log), what
    return cubin


def assert_compiles(step: dict[str, Any], architecture: str) -> None:
    """A kernel keeps all it has in registers, and multiplies in tensor cores where it is meant to."""
    name, defined = step["kernel"], step["definitions"]
    cubin = assert_registers(step, architecture)
    wanted = {
        "gemv": lambda: 8 * int(defined["ROW_TILES"]) * int(defined["M_TILES"]),
        "gemm": lambda: 16 * int(defined["M_BLOCK"]) // 8,
    }.get(name, lambda: 0)()
    assert tensor_instructions(cubin, f"tenpak_{name}") == wanted, f"{name} for sm_{architecture} with {defined}"


def steps(codec: str, sizes: tuple[tuple[int, bool], ...], dtype: str = "BF16") -> list[dict[str, Any]]:
    """The kernels of products with so many rows of activations, each once."""
    out: dict[str, dict[str, Any]] = {}
    for m, exact in sizes:
        found = host.plan(
            codec, 4096, 4096, m, dtype=dtype, exact=exact, outliers=exact, multiprocessors=132, shared_bytes=227 << 10
        )
        for step in (found["decode"], found["prepare"], found["multiply"], found["outliers"]):
            if step:
                out[step["text"]] = step
    return list(out.values())


SIZES = ((1, False), (16, False), (64, False), (8, True))
EVERY_SIZE = tuple((m, False) for m in (1, 4, 8, 16, 17, 32, 64)) + tuple((m, True) for m in (1, 4, 8))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_for_every_architecture_without_local_memory(architecture: str) -> None:
    use_nvrtc()
    for codec in CODECS if EVERYTHING else ["int4_g8_fp16_v1"]:
        for dtype in ("BF16", "F16", "F32") if EVERYTHING else ("BF16",):
            for step in steps(codec, EVERY_SIZE if EVERYTHING else SIZES, dtype):
                assert_compiles(step, architecture)


@pytest.mark.parametrize("codec", LAYOUTS)
def test_every_layout_compiles_without_local_memory(codec: str) -> None:
    use_nvrtc()
    architecture = ARCHITECTURES[CODECS.index(codec) % len(ARCHITECTURES)]
    dtype = ("F16", "BF16")[CODECS.index(codec) % 2]
    for step in steps(codec, ((1, False), (64, False)), dtype):
        assert_compiles(step, architecture)
