"""Matrices in memory: an array into a codec and back."""

import numpy as np
import numpy.typing as npt

from . import _arrays, _tenpak
from ._arrays import Array


class Encoded:
    """A matrix in a codec, in memory; made by :func:`encode`."""

    def __init__(self, matrix: _tenpak.Matrix, shape: tuple[int, ...]) -> None:
        """Wrap a matrix of the extension module; use :func:`encode`."""
        self._matrix = matrix
        self._shape = shape
        #: Where products on other devices have taken it: by device and None.
        self._on_devices: dict[tuple[str, str | None], _tenpak.DeviceMatrix] = {}

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
            planes[name] = flat.reshape(_arrays.plane_shape(name, self.rows, flat.size))
        return planes

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight on average, everything counted."""
        return 8 * self._matrix.stored_bytes / max(1, self.rows * self.cols)

    def decode(self, dtype: npt.DTypeLike | str = "float32", out: Array | None = None) -> Array:
        """Return the weights in the shape that was encoded; see :meth:`Artifact.decode` for ``dtype`` and ``out``."""
        name = _arrays.dtype_name(dtype)
        array = _arrays.output(self.shape, name, out)
        self._matrix.decode_into(name, _arrays.as_bytes(array))
        return array

    def __repr__(self) -> str:
        """Return shape, codec and bits per weight."""
        return f"Encoded({self.shape}, codec={self.codec!r}, {self.bits_per_weight:.3f} bits/weight)"


def encode(array: Array, codec: str, *, column_scales: Array | None = None, outliers: float | None = None) -> Encoded:
    """Encode an array.

    Parameters
    ----------
    array
        Weights, float32, float16, float64 or ml_dtypes.bfloat16, of any shape; the last dimension holds the groups.
        Arrays that are not C-contiguous are copied.
    codec
        Id of a codec other than ``raw_v1``.
    column_scales
        float32 ``[cols]``, finite and not zero: weights are divided by the scale of their column before they are
        encoded and multiplied with it when they are decoded. A plane of its own; any codec takes it.
    outliers
        Part of the weights, above 0 and at most 0.1, to store by themselves as float16: those of the greatest squares,
        32 bits each (48 where there are more than 65536 columns). The rest is encoded without them.

    Returns
    -------
    Encoded
        The planes and the way back.

    Raises
    ------
    InvalidError
        Another dtype, weights whose scales leave the range of their stored type, or column scales that break a rule.
    NonfiniteError
        A weight is NaN or infinite.
    UnsupportedError
        There is no such codec.
    """
    array = np.asarray(array)
    name = _arrays.dtype_name(array.dtype)
    shape = array.shape
    contiguous = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    cols = shape[-1] if shape else 1
    rows = 1
    for dim in shape[:-1]:
        rows *= dim
    scales = None if column_scales is None else np.asarray(column_scales, np.float32).tolist()
    matrix = _tenpak.encode(_arrays.as_bytes(contiguous), name, rows, cols, codec, scales, outliers)
    return Encoded(matrix, shape)


def decode(encoded: Encoded, dtype: npt.DTypeLike | str = "float32", out: Array | None = None) -> Array:
    """Decode what :func:`encode` gave; see :meth:`Artifact.decode` for ``dtype`` and ``out``."""
    return encoded.decode(dtype, out)
