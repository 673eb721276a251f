"""Low-bit weights for language models: compress, verify, decode.

>>> import numpy as np, tenpak
>>> weights = np.linspace(-1, 1, 64, dtype=np.float32).reshape(4, 16)
>>> tenpak.encode(weights, "int4_g16_fp16_v1").bits_per_weight
6.0
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _arrays, _tenpak
from ._arrays import Array
from ._errors import CorruptError, InvalidError, LimitError, NonfiniteError, TenpakError, UnsupportedError
from ._tenpak import Entry, __version__

__all__ = [
    "Artifact",
    "CorruptError",
    "Encoded",
    "Entry",
    "InvalidError",
    "LimitError",
    "NonfiniteError",
    "TenpakError",
    "UnsupportedError",
    "__version__",
    "codecs",
    "compress",
    "decode",
    "decompress",
    "delta",
    "encode",
    "materialize",
    "open",
    "verify",
]

Path = str | os.PathLike[str]
#: Called with source bytes done, source bytes in all, and the name of the tensor; an exception stops the work.
Progress = Callable[[int, int, str], object]
Report = dict[str, Any]

DEFAULT_CODEC = "int4_g32_fp16_v1"


def compress(
    source: Path,
    output: Path | None = None,
    *,
    codec: str = DEFAULT_CODEC,
    recipe: str | None = None,
    roles: Mapping[str, str] | None = None,
    rules: Iterable[tuple[str, str]] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    all: bool = False,
    nonfinite: str = "error",
    force: bool = False,
    threads: int = 0,
    mmap: bool = True,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compress a checkpoint into an artifact, streaming: memory does not grow with the model.

    Parameters
    ----------
    source
        ``.safetensors``, Hugging Face directory, ``.npz``, ``.npy`` or JSON bundle.
    output
        Artifact to write; it appears whole or not at all. May be missing with ``dry_run``.
    codec
        Id of the codec of linear weights (2-D, ``[out, in]``, groups along ``in``); see :func:`codecs`.
    recipe
        TOML text that says which codec for which tensor, instead of ``codec``.
    roles
        Other codecs by role: ``attention``, ``mlp``, ``linear``, ``router``, ``embedding``, ``head``.
    rules
        Pairs of a pattern (a glob, or ``re:`` and a regular expression) and a codec id; the first match counts.
    include, exclude
        Patterns of the tensors to quantize, and of those to keep as they are.
    all
        Give every float tensor the codec, whatever its role.
    nonfinite
        What to do about NaN and infinities: ``error``, ``zero``, ``clamp`` or ``raw``.
    force
        Replace an existing output.
    threads
        Worker threads; 0 for one per core.
    mmap
        Map windows of the source instead of reading them.
    dry_run
        Report what would be written, to the byte, from headers alone.
    progress
        Called with bytes done, bytes in all and the tensor's name.

    Returns
    -------
    dict
        The report of ``tenpak compress --format json``: sizes in bytes and bits per weight, loss per tensor.

    Raises
    ------
    NonfiniteError, InvalidError, CorruptError, UnsupportedError, LimitError, OSError, KeyboardInterrupt
        Nothing is left behind.
    """
    return _report(
        _tenpak.compress(
            os.fspath(source),
            None if output is None else os.fspath(output),
            codec,
            recipe,
            list((roles or {}).items()),
            list(rules or ()),
            list(include),
            list(exclude),
            all,
            nonfinite,
            force,
            threads,
            mmap,
            dry_run,
            progress,
        )
    )


def decompress(
    artifact: Path,
    output: Path,
    *,
    dtype: str | None = None,
    max_shard_size: int = 5_000_000_000,
    force: bool = False,
    threads: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Decode an artifact into a checkpoint.

    Parameters
    ----------
    artifact
        Artifact to read.
    output
        ``.safetensors``, ``.npz``, ``.json`` (a JSON bundle), or a directory of safetensors shards.
    dtype
        Dtype of the floating-point tensors (``float32``, ``float16``, ``bfloat16``, …) instead of the source's.
    max_shard_size
        Most bytes of one file of a directory.
    force, threads, progress
        As for :func:`compress`.

    Returns
    -------
    dict
        The report of ``tenpak decompress --format json``.

    Raises
    ------
    InvalidError, CorruptError, OSError, KeyboardInterrupt
        No file is left half written.
    """
    return _report(
        _tenpak.decompress(os.fspath(artifact), os.fspath(output), dtype, max_shard_size, force, threads, progress)
    )


def delta(
    base: Path,
    variant: Path,
    output: Path,
    *,
    epsilon: float = 0.0,
    force: bool = False,
    threads: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Store a variant checkpoint as its difference from a base artifact, with the base's recipe.

    Parameters
    ----------
    base
        Artifact of the base model.
    variant
        Checkpoint of the variant.
    output
        Delta to write.
    epsilon
        Also take a tensor for unchanged when no decoded weight differs from the base's by more than this.
    force, threads, progress
        As for :func:`compress`.

    Returns
    -------
    dict
        The report of ``tenpak delta --format json``.

    Raises
    ------
    InvalidError, CorruptError, OSError, KeyboardInterrupt
        Nothing is left behind.
    """
    return _report(
        _tenpak.delta(os.fspath(base), os.fspath(variant), os.fspath(output), epsilon, force, threads, progress)
    )


def materialize(
    base: Path,
    deltas: Path | Sequence[Path],
    output: Path,
    *,
    force: bool = False,
    threads: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Put a base artifact and a chain of deltas, the base's first, together into one artifact.

    With ``epsilon`` 0 the result is byte for byte what compressing the variant directly gives.

    Parameters
    ----------
    base
        Artifact that the first delta was made against.
    deltas
        One delta, or several in order.
    output
        Artifact to write.
    force, threads, progress
        As for :func:`compress`.

    Returns
    -------
    dict
        The report of ``tenpak materialize --format json``.

    Raises
    ------
    InvalidError
        A delta was made against another base, or the chain is too long or circular.
    CorruptError, OSError, KeyboardInterrupt
        Nothing is left behind.
    """
    chain = [deltas] if isinstance(deltas, str | os.PathLike) else list(deltas)
    paths = [os.fspath(path) for path in chain]
    return _report(_tenpak.materialize(os.fspath(base), paths, os.fspath(output), force, threads, progress))


def verify(path: Path, *, threads: int = 0, progress: Progress | None = None) -> Report:
    """Read every byte of an artifact and report what is damaged.

    Parameters
    ----------
    path
        Artifact.
    threads, progress
        As for :func:`compress`.

    Returns
    -------
    dict
        The report of ``tenpak verify --format json``; ``sound`` is false and ``problems`` lists every bad chunk where
        there is damage.

    Raises
    ------
    CorruptError, UnsupportedError, LimitError, OSError
        The header cannot be read at all.
    """
    return _report(_tenpak.Artifact(os.fspath(path), True).verify_json(threads, progress))


def codecs() -> list[Report]:
    """Return the codecs of this build: id, levels, bits, group, dtypes of scale and offset, fit, bits per weight."""
    listed: list[Report] = json.loads(_tenpak.codecs_json())["codecs"]
    return listed


def open(path: Path, *, mmap: bool = True) -> "Artifact":
    """Open an artifact; reads and validates its header only.

    Parameters
    ----------
    path
        Artifact.
    mmap
        Map planes instead of reading them.

    Returns
    -------
    Artifact
        A mapping of names to :class:`Entry`.

    Raises
    ------
    CorruptError, UnsupportedError, LimitError, OSError
        The file is not a sound artifact.
    """
    return Artifact(path, mmap=mmap)


class Artifact(Mapping[str, Entry]):
    """An open artifact: a mapping of tensor names to :class:`Entry`, and access to weights and planes."""

    def __init__(self, path: Path, *, mmap: bool = True) -> None:
        """Open ``path``; see :func:`open`."""
        self._inner = _tenpak.Artifact(os.fspath(path), mmap)
        self._metadata, self._provenance, self._delta = json.loads(self._inner.header_json())

    def __getitem__(self, name: str) -> Entry:
        """Return what the artifact says of a tensor."""
        entry = self._inner.entry(name)
        if entry is None:
            raise KeyError(name)
        return entry

    def __iter__(self) -> Iterator[str]:
        """Iterate over names in stored order."""
        return iter(self._inner.names())

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._inner.names())

    def __repr__(self) -> str:
        """Return path, number of tensors and bytes."""
        return f"Artifact({str(self.path)!r}, {len(self)} tensors, {self.file_bytes} bytes)"

    @property
    def path(self) -> os.PathLike[str]:
        """Where the file is."""
        return self._inner.path

    @property
    def file_bytes(self) -> int:
        """Length of the file in bytes."""
        return self._inner.file_bytes

    @property
    def identity(self) -> str:
        """BLAKE3-256 of the logical content, in hex: equal for equal weights."""
        return self._inner.identity

    @property
    def metadata(self) -> dict[str, str]:
        """Free text carried over from the source."""
        return dict(self._metadata)

    @property
    def provenance(self) -> Report:
        """Where the content came from: tool, recipe, policy for non-finite weights, source files with digests."""
        return dict(self._provenance)

    @property
    def delta(self) -> Report | None:
        """Identities of base and result and the runs, where the file is a delta."""
        return None if self._delta is None else dict(self._delta)

    def decode(self, name: str, *, dtype: npt.DTypeLike | str = "float32", out: Array | None = None) -> Array:
        """Decode a tensor in the source's shape and orientation.

        Parameters
        ----------
        name
            Name of the tensor.
        dtype
            ``float32``, ``float16``, ``bfloat16``, ``float64`` or ``"source"``; with ``"source"`` a raw tensor comes
            back bit for bit. Where ml_dtypes is not installed, bfloat16 is returned as its bits in uint16.
        out
            Writable C-contiguous array of the tensor's shape and that dtype to decode into.

        Returns
        -------
        numpy.ndarray
            The weights, of the tensor's shape.

        Raises
        ------
        KeyError
            There is no such tensor.
        InvalidError
            ``out`` does not fit, or weights cannot be ``dtype``.
        CorruptError
            A chunk does not have its checksum.
        """
        entry = self[name]
        wanted = entry.dtype if isinstance(dtype, str) and dtype == "source" else _arrays.dtype_name(dtype)
        array = _arrays.output(entry.shape, wanted, out)
        self._inner.decode_into(name, wanted, _arrays.as_bytes(array))
        return array

    def planes(self, name: str) -> dict[str, Array]:
        """Return the stored planes of a tensor as read-only views of the file, without a copy.

        Parameters
        ----------
        name
            Name of the tensor.

        Returns
        -------
        dict
            ``codes`` and ``zero_points`` as uint8 ``[rows, bytes of a row]``; ``scales`` and ``offsets`` as float16 or
            float32 ``[rows, groups]``; ``data`` of a raw tensor in its source's shape. The views stay valid after
            the artifact is gone.

        Raises
        ------
        KeyError
            There is no such tensor.
        CorruptError
            A chunk does not have its checksum.
        """
        entry = self[name]
        planes = {}
        for plane, dtype, data in self._inner.planes(name):
            shape = entry.shape if plane == "data" else (entry.rows, -1 if data.size else 0)
            planes[plane] = data.view(_arrays.numpy_dtype(dtype)).reshape(shape)
        return planes

    def verify(self, *, threads: int = 0, progress: Progress | None = None) -> list[Report]:
        """Read everything and return what is damaged: tensor, plane, chunk, byte, what; empty when sound."""
        problems: list[Report] = _report(self._inner.verify_json(threads, progress))["problems"]
        return problems


class Encoded:
    """A matrix in a codec, in memory; made by :func:`encode`."""

    def __init__(self, matrix: _tenpak.Matrix, shape: tuple[int, ...]) -> None:
        """Wrap a matrix of the extension module; use :func:`encode`."""
        self._matrix = matrix
        self._shape = shape

    @property
    def codec(self) -> str:
        """Id of the codec."""
        return self._matrix.codec

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that was encoded."""
        return self._shape

    @property
    def rows(self) -> int:
        """Rows of the matrix: the product of all dimensions but the last."""
        return self._matrix.rows

    @property
    def cols(self) -> int:
        """Columns of the matrix: the last dimension; groups run along it."""
        return self._matrix.cols

    @property
    def planes(self) -> dict[str, Array]:
        """The planes, as :meth:`Artifact.planes` gives them, in memory of their own."""
        planes = {}
        for name, dtype, data in self._matrix.planes():
            flat: Array = np.frombuffer(data, _arrays.numpy_dtype(dtype))
            planes[name] = flat.reshape(self.rows, -1 if flat.size else 0)
        return planes

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight on average, everything counted."""
        return 8 * sum(len(data) for _, _, data in self._matrix.planes()) / max(1, self.rows * self.cols)

    def decode(self, dtype: npt.DTypeLike | str = "float32", out: Array | None = None) -> Array:
        """Return the weights in the shape that was encoded; see :meth:`Artifact.decode` for ``dtype`` and ``out``."""
        name = _arrays.dtype_name(dtype)
        array = _arrays.output(self.shape, name, out)
        self._matrix.decode_into(name, _arrays.as_bytes(array))
        return array

    def __repr__(self) -> str:
        """Return shape, codec and bits per weight."""
        return f"Encoded({self.shape}, codec={self.codec!r}, {self.bits_per_weight:.3f} bits/weight)"


def encode(array: Array, codec: str) -> Encoded:
    """Encode an array.

    Parameters
    ----------
    array
        Weights, float32, float16, float64 or ml_dtypes.bfloat16, of any shape; the last dimension holds the groups.
        Arrays that are not C-contiguous are copied.
    codec
        Id of a codec other than ``raw_v1``.

    Returns
    -------
    Encoded
        The planes and the way back.

    Raises
    ------
    InvalidError
        Another dtype, or weights whose scales leave the range of their stored type.
    NonfiniteError
        A weight is NaN or infinite.
    UnsupportedError
        There is no such codec.
    """
    name = _arrays.dtype_name(array.dtype)
    shape = array.shape
    contiguous = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    cols = shape[-1] if shape else 1
    rows = 1
    for dim in shape[:-1]:
        rows *= dim
    return Encoded(_tenpak.encode(_arrays.as_bytes(contiguous), name, rows, cols, codec), shape)


def decode(encoded: Encoded, dtype: npt.DTypeLike | str = "float32", out: Array | None = None) -> Array:
    """Decode what :func:`encode` gave; see :meth:`Artifact.decode` for ``dtype`` and ``out``."""
    return encoded.decode(dtype, out)


def _report(text: str) -> Report:
    """Parse a report of the extension module."""
    report: Report = json.loads(text)
    return report
