"""The extension module, written in Rust; its functions take and give bytes, names and JSON."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt

__version__: str
DEFAULT_CODEC: str
DEFAULT_CODEC_IN_MEMORY: str
FITS: list[tuple[str, bool]]

_Bytes = npt.NDArray[np.uint8]
_Progress = Callable[[int, int, str], object] | None

@final
class Entry:
    """What an artifact says of a tensor."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def codec(self) -> str: ...
    @property
    def transposed(self) -> bool: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def stored_bytes(self) -> int: ...
    @property
    def memory_bytes(self) -> int: ...
    @property
    def coding(self) -> dict[str, str]: ...
    @property
    def column_scales(self) -> bool: ...
    @property
    def outliers(self) -> int: ...
    @property
    def bits_per_weight(self) -> float: ...

@final
class Artifact:
    """An artifact, open for reading."""

    def __new__(cls, path: str, mmap: bool) -> Artifact: ...
    @property
    def path(self) -> Path: ...
    @property
    def file_bytes(self) -> int: ...
    @property
    def identity(self) -> str: ...
    def header_json(self) -> str: ...
    def names(self) -> list[str]: ...
    def file_names(self) -> list[str]: ...
    def read_file(self, name: str) -> bytes: ...
    def entry(self, name: str) -> Entry | None: ...
    def decode_into(self, name: str, dtype: str, out: npt.NDArray[Any]) -> None: ...
    def planes(self, name: str) -> list[tuple[str, str, _Bytes]]: ...
    def verify_json(self, threads: int, progress: _Progress) -> str: ...

@final
class Matrix:
    """A matrix in a codec."""

    @property
    def codec(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def stored_bytes(self) -> int: ...
    def planes(self) -> list[tuple[str, str, bytes]]: ...
    def multiply(
        self,
        places: tuple[tuple[int, int], tuple[int, int]],
        dtype: str,
        m: int,
        act: str,
        ends: list[int] | None,
    ) -> None: ...
    def decode_into(self, dtype: str, out: npt.NDArray[Any]) -> None: ...

@final
class CudaDevice:
    """An NVIDIA device, which multiplies with addresses of its memory."""

    def __new__(cls, index: int) -> CudaDevice: ...
    def prepare(
        self,
        codec: str,
        shape: tuple[int, int, int],
        planes: list[tuple[int, int]],
        extra: list[tuple[int, int]],
        m: int,
        dtype: str,
        exact: bool,
        x: int,
    ) -> int: ...
    def multiply(
        self,
        codec: str,
        shape: tuple[int, int, int],
        planes: list[tuple[int, int]],
        extra: list[tuple[int, int]],
        m: int,
        dtype: str,
        exact: bool,
        places: tuple[int, int, int, int],
        stream: int,
    ) -> None: ...
    def decode(
        self,
        codec: str,
        shape: tuple[int, int, int],
        planes: list[tuple[int, int]],
        extra: list[tuple[int, int]],
        ids: int,
        count: int,
        dtype: str,
        out: int,
        stream: int,
    ) -> None: ...

@final
class DeviceMatrix:
    """A matrix that a backend of another device has taken."""

    def __new__(
        cls, device: str, codec: str, shape: tuple[int, int], places: list[tuple[int, int]], planes: object
    ) -> DeviceMatrix: ...
    def multiply(self, x: tuple[int, int], y: tuple[int, int], dtype: str, m: int, act: str) -> None: ...

def main(argv: list[str]) -> int: ...
def compress(
    source: str,
    output: str | None,
    codec: str | None,
    target_bits: float | None,
    target_size: int | None,
    max_loss: float | None,
    allocate: bool | None,
    recipe: str | None,
    roles: list[tuple[str, str]],
    rules: list[tuple[str, str]],
    include: list[str],
    exclude: list[str],
    all: bool,
    stats: str | None,
    fit: str | None,
    coded: bool,
    outliers: float | None,
    nonfinite: str,
    allow_requantize: bool,
    max_shard_size: int,
    shard: tuple[int, int] | None,
    force: bool,
    resume: bool,
    threads: int,
    mmap: bool,
    dry_run: bool,
    progress: _Progress,
) -> str: ...
def decompress(
    artifact: str,
    output: str,
    dtype: str | None,
    max_shard_size: int,
    force: bool,
    threads: int,
    progress: _Progress,
) -> str: ...
def delta(
    base: str,
    variant: str,
    output: str,
    mode: str | None,
    codec: str | None,
    target_bits: float | None,
    epsilon: float,
    stats: str | None,
    force: bool,
    threads: int,
    progress: _Progress,
) -> str: ...
def export(
    artifact: str,
    output: str,
    to: str,
    codec: str | None,
    max_shard_size: int,
    allow_requantize: bool,
    force: bool,
    threads: int,
    dry_run: bool,
    progress: _Progress,
) -> str: ...
def materialize(
    base: str,
    deltas: list[str],
    output: str,
    force: bool,
    threads: int,
    progress: _Progress,
) -> str: ...
def merge_index(directory: str) -> str: ...
def codecs_json() -> str: ...
def decode_plane(codec: str, plane: str, rows: int, cols: int, stream: _Bytes) -> bytes: ...
def decode_outliers(
    codec: str,
    plane: str,
    rows: int,
    cols: int,
    outliers: int,
    planes: list[tuple[str, str | None, _Bytes]],
) -> bytes: ...
def encode(
    bytes: npt.NDArray[Any],
    dtype: str,
    rows: int,
    cols: int,
    codec: str,
    column_scales: list[float] | None,
    outliers: float | None,
) -> Matrix: ...
def multiply(
    codec: str,
    rows: int,
    cols: int,
    planes: list[tuple[int, int]],
    x: tuple[int, int],
    y: tuple[int, int],
    dtype: str,
    m: int,
    act: str,
    ends: list[int] | None,
) -> None: ...
def decode_rows(
    codec: str,
    rows: int,
    cols: int,
    planes: list[tuple[int, int]],
    ids: tuple[int, int] | None,
    out: tuple[int, int],
    dtype: str,
) -> None: ...
def use_openmp(parallel: int, max_threads: int) -> None: ...
def cuda_use_compiler(path: str) -> None: ...
def cuda_compile(name: str, text: str, architecture: str, options: list[str]) -> tuple[bytes, str]: ...
def cuda_plan(
    codec: str,
    shape: tuple[int, int, int],
    m: int,
    dtype: str,
    exact: bool,
    aligned: bool,
    outliers: bool,
    multiprocessors: int,
    shared_bytes: int,
    wgmma: bool,
) -> str: ...
def cuda_devices() -> str: ...
def cuda_cache_plan(
    format: tuple[int, int, int, int],
    sizes: tuple[int, int, int, int],
    count: int,
    dtype: str,
    multiprocessors: int,
    shared_bytes: int,
) -> str: ...
def cuda_kv_append(
    device: CudaDevice,
    format: tuple[int, int, int, int],
    of: list[tuple[int, int]],
    keys: tuple[int, tuple[int, int, int]],
    values: tuple[int, tuple[int, int, int]],
    dtype: str,
    count: int,
    stream: int,
) -> None: ...
def cuda_kv_attend_bytes(
    device: CudaDevice, format: tuple[int, int, int, int], sizes: tuple[int, int, int, int], dtype: str
) -> int: ...
def cuda_kv_attend(
    device: CudaDevice,
    format: tuple[int, int, int, int],
    of: list[tuple[int, int]],
    sizes: tuple[int, int, int, int],
    q: tuple[int, tuple[int, int, int]],
    mask: tuple[int, tuple[int, int]],
    dtype: str,
    scale: float,
    causal: bool,
    workspace: int,
    out: int,
    stream: int,
) -> None: ...
def cuda_kv_recall(
    device: CudaDevice,
    format: tuple[int, int, int, int],
    of: list[tuple[int, int]],
    tokens: int,
    dtype: str,
    keys: int,
    values: int,
    stream: int,
) -> None: ...
def kv_append(
    format: tuple[int, int, int, int],
    of: list[tuple[int, int]],
    keys: tuple[int, int],
    values: tuple[int, int],
    dtype: str,
    tokens: int,
) -> None: ...
def kv_attend(
    format: tuple[int, int, int, int],
    of: list[tuple[int, int]],
    q: tuple[int, int],
    mask: tuple[int, int] | None,
    out: tuple[int, int],
    dtype: str,
    m: int,
    scale: float,
    causal: bool,
) -> None: ...
def kv_recall(
    format: tuple[int, int, int, int],
    of: list[tuple[int, int]],
    tokens: int,
    dtype: str,
    keys: tuple[int, int],
    values: tuple[int, int],
) -> None: ...
