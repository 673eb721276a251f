"""An open artifact: what it says of its tensors, their weights and their planes."""

import json
import os
from collections.abc import Iterator, Mapping

import numpy.typing as npt

from . import _arrays, _tenpak
from ._arrays import Array
from ._tenpak import Entry
from ._types import Path, Progress, Report


def open(path: Path, *, mmap: bool = False) -> "Artifact":
    """Open an artifact; reads and validates its header only.

    Parameters
    ----------
    path
        Artifact: a file or a directory.
    mmap
        Map planes instead of reading them: they are then the pages of the file, shared by all processes and taken back
        by the system as it likes. A file that is cut short meanwhile ends the process (SIGBUS), and one that is written
        into changes planes that were checked.

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
    """An open artifact: a mapping of tensor names to :class:`Entry`, and access to weights, planes and files."""

    def __init__(self, path: Path, *, mmap: bool = False) -> None:
        """Open ``path``; see :func:`open`."""
        self._inner = _tenpak.Artifact(os.fspath(path), mmap)
        self._metadata, self._provenance, self._delta = json.loads(self._inner.header_json())
        #: Matrices that products on other devices have taken there: by device and name.
        self._on_devices: dict[tuple[str, str | None], _tenpak.DeviceMatrix] = {}

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
        """Length of the file, or of all files of the directory, in bytes."""
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

    @property
    def files(self) -> Mapping[str, bytes]:
        """The files that the artifact carries besides weights, by name: config, tokenizer; each checked when read."""
        return _Files(self._inner)

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
        """Return the stored planes of a tensor as read-only arrays: read and checked, or views of a mapped file.

        Parameters
        ----------
        name
            Name of the tensor.

        Returns
        -------
        dict
            ``codes``, ``high_codes`` and ``zero_points`` as uint8 ``[rows, bytes of a row]``; ``scales`` and
            ``offsets`` as float16 or float32 ``[rows, groups]``, scales of a bank as uint8; ``row_scales`` as float32
            ``[rows, 1]``;
            where there are any, ``column_scales`` as float32 ``[cols]``, and of outliers ``outlier_counts`` as uint32
            ``[rows]``, ``outlier_columns`` as uint16 or uint32 and ``outlier_values`` as float16 ``[outliers]``;
            ``data`` of a raw tensor in its source's shape. The views stay valid after the artifact is gone.

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
            shape = entry.shape if plane == "data" else _arrays.plane_shape(plane, entry.rows, data.size)
            planes[plane] = data.view(_arrays.numpy_dtype(dtype)).reshape(shape)
        return planes

    def verify(self, *, threads: int = 0, progress: Progress | None = None) -> list[Report]:
        """Read everything and return what is damaged: tensor and plane or file, chunk, byte, what; empty when sound."""
        problems: list[Report] = json.loads(self._inner.verify_json(threads, progress))["problems"]
        return problems


class _Files(Mapping[str, bytes]):
    """The attached files of an artifact: a mapping of names to bytes, which are read when they are asked for."""

    def __init__(self, inner: _tenpak.Artifact) -> None:
        self._inner = inner
        self._names = inner.file_names()

    def __getitem__(self, name: str) -> bytes:
        if name not in self._names:
            raise KeyError(name)
        return self._inner.read_file(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"<files {', '.join(self._names)}>"
