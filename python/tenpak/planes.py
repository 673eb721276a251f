"""Planes by hand, in numpy: codes in words, and the scales, offsets and zero points that fits choose.

The bytes are those of artifacts and of :class:`tenpak.Encoded`; see ``FORMAT.md``. Arrays may be torch tensors, results
are numpy arrays.

>>> import numpy as np
>>> from tenpak import planes
>>> words = planes.pack(np.array([[1, 2, 15]]), bits=4)
>>> words
array([[3873]], dtype=uint32)
>>> planes.unpack(words, bits=4, cols=3)
array([[ 1,  2, 15]], dtype=uint8)
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from ._arrays import Array
from ._errors import InvalidError

__all__ = ["absmax", "minmax", "pack", "unpack", "zero_point"]

#: The smallest scale that is stored, by dtype: below it the rounding of the scale itself would add more than an eighth
#: of a step of error.
_MIN_SCALE = {"float16": 2.0**-18, "float32": float(np.finfo(np.float32).tiny)}


def pack(codes: Any, bits: int) -> npt.NDArray[np.uint32]:
    """Put codes into words of 32 bits, low bits first, each row on a fresh word.

    Parameters
    ----------
    codes
        Integers ``[..., cols]`` from 0 to ``2**bits - 1``.
    bits
        Bits of a code, 1 to 8.

    Returns
    -------
    numpy.ndarray
        uint32 ``[..., ceil(cols * bits / 32)]``, little-endian; ``.view(numpy.uint8)`` is the plane ``codes``. Bits
        that belong to no column are zero.

    Raises
    ------
    InvalidError
        A code that is not an integer of so many bits.
    """
    _check_bits(bits)
    array = _array(codes)
    if array.ndim == 0 or array.dtype.kind not in "iub":
        raise InvalidError(f"codes have dtype {array.dtype} and shape {array.shape}, expected integers [..., cols]")
    if array.size and (array.min() < 0 or array.max() >= 1 << bits):
        raise InvalidError(f"codes reach from {array.min()} to {array.max()}, expected 0 to {(1 << bits) - 1}")
    *outer, cols = array.shape
    words = -(-cols * bits // 32)
    stream = np.unpackbits(array.astype(np.uint8)[..., None], axis=-1, count=bits, bitorder="little")
    packed = np.packbits(stream.reshape(*outer, cols * bits), axis=-1, bitorder="little")
    out = np.zeros((*outer, 4 * words), np.uint8)
    out[..., : packed.shape[-1]] = packed
    return out.view("<u4")


def unpack(words: Any, bits: int, cols: int) -> npt.NDArray[np.uint8]:
    """Take codes out of words: the inverse of :func:`pack`.

    Parameters
    ----------
    words
        uint32 ``[..., words of a row]``, or the same bytes as uint8, such as the plane ``codes``, ``high_codes`` (of 1 or 2
        bits) or ``zero_points``.
    bits
        Bits of a code, 1 to 8.
    cols
        Codes of a row.

    Returns
    -------
    numpy.ndarray
        uint8 ``[..., cols]``.

    Raises
    ------
    InvalidError
        Another dtype, or rows too short for so many codes.
    """
    _check_bits(bits)
    array = _array(words)
    if array.ndim == 0 or array.dtype.kind not in "iu" or array.itemsize not in (1, 4):
        raise InvalidError(f"words have dtype {array.dtype} and shape {array.shape}, expected uint32 or uint8 [..., n]")
    if cols < 0 or array.shape[-1] * array.itemsize * 8 < cols * bits:
        raise InvalidError(
            f"rows of {array.shape[-1] * array.itemsize} bytes for {cols} codes of {bits} bits, expected at least "
            f"{-(-cols * bits // 8)}"
        )
    flat = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).view(np.uint8)
    stream = np.unpackbits(flat, axis=-1, count=cols * bits, bitorder="little")
    return np.packbits(stream.reshape(*array.shape[:-1], cols, bits), axis=-1, bitorder="little")[..., 0]


def minmax(groups: Any, bits: int = 4, dtype: npt.DTypeLike = "float16") -> tuple[Array, Array]:
    """Return scale and offset of groups: ``offset = min``, ``scale = (max - min) / (2**bits - 1)``.

    Parameters
    ----------
    groups
        Weights ``[..., group]``.
    bits
        Bits of a code.
    dtype
        Stored type: float16 or float32.

    Returns
    -------
    tuple
        ``scale`` and ``offset``, each ``[...]``, rounded to ``dtype``.

    Raises
    ------
    InvalidError
        A group is empty or not finite, or its scale or offset leaves the range of ``dtype``.
    """
    low, high = _range(groups)
    scale = _stored((high - low) / np.float32((1 << _check_bits(bits)) - 1), dtype)
    with np.errstate(over="ignore"):
        offset = low.astype(dtype)
    lost = (scale == 0) & (offset.astype(np.float32) != low) & (abs(low) < _MIN_SCALE[np.dtype(dtype).name])
    if not np.isfinite(offset).all() or lost.any():
        raise _out_of_range("offset", low, dtype)
    return scale, offset


def absmax(groups: Any, bits: int = 4, dtype: npt.DTypeLike = "float16") -> Array:
    """Return the scale of symmetric codes: ``max|w| / 127`` for 8 bits, ``max|w| / 8`` with a sign for 4.

    Signed codes of 4 bits reach from -8 to 7. The weight of greatest magnitude lies at -8, the longer end, so the scale
    is negative where that weight is positive. A group of one repeated weight gets its magnitude as its scale.

    Parameters
    ----------
    groups
        Weights ``[..., group]``.
    bits
        Bits of a code: 4 or 8.
    dtype
        Stored type: float16 or float32.

    Returns
    -------
    numpy.ndarray
        ``[...]``, rounded to ``dtype``.

    Raises
    ------
    InvalidError
        A group is empty or not finite, or its scale leaves the range of ``dtype``.
    """
    if bits not in (4, 8):
        raise InvalidError(f"symmetric codes have 4 or 8 bits, not {bits}")
    low, high = _range(groups)
    down, up = np.float32(0) - low, high
    magnitude = np.where(down > up, down, up)
    if bits == 8:
        scale = magnitude / np.float32(127)
    else:
        scale = magnitude / np.where(down >= up, np.float32(8), np.float32(-8))
    return _stored(np.where(low == high, magnitude, scale), dtype)


def zero_point(groups: Any, bits: int = 4, dtype: npt.DTypeLike = "float16") -> tuple[Array, npt.NDArray[np.uint8]]:
    """Return scale and integer zero point of groups, whose range is widened to hold zero.

    ``scale = (max - min) / (2**bits - 1)`` and ``zero_point = round(-min / scale)``, ties to the lower one. A group of
    one repeated weight gets its magnitude as its scale.

    Parameters
    ----------
    groups
        Weights ``[..., group]``.
    bits
        Bits of a code and of a zero point.
    dtype
        Stored type of the scale: float16 or float32.

    Returns
    -------
    tuple
        ``scale`` in ``dtype`` and ``zero_point`` in uint8, each ``[...]``; :func:`pack` puts zero points into words.

    Raises
    ------
    InvalidError
        A group is empty or not finite, or its scale leaves the range of ``dtype``.
    """
    low, high = _range(groups)
    top = np.float32((1 << _check_bits(bits)) - 1)
    constant = low == high
    down, up = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
    scale = _stored(np.where(constant, abs(low), (up - down) / top), dtype)
    step = scale.astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        nearest = np.ceil((np.float32(0) - down) / step - np.float32(0.5))
    zero = np.where(constant, (low < 0).astype(np.float32), np.clip(nearest, 0, top))
    return scale, np.asarray(zero, np.uint8)


def _array(array: Any) -> Array:
    """Return an array, or a torch tensor, as a numpy array."""
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array
    return np.asarray(array)


def _check_bits(bits: int) -> int:
    """Refuse codes that do not fit a byte."""
    if not 1 <= bits <= 8:
        raise InvalidError(f"codes of {bits} bits, expected 1 to 8")
    return bits


def _range(groups: Any) -> tuple[Array, Array]:
    """Return least and greatest weight of each group, in float32; a negative zero counts as zero."""
    weights = _array(groups).astype(np.float32)
    if weights.ndim == 0 or weights.shape[-1] == 0 or not np.isfinite(weights).all():
        raise InvalidError(f"groups of shape {weights.shape}, expected finite weights [..., group]")
    return weights.min(-1) + np.float32(0), weights.max(-1) + np.float32(0)


def _stored(scale: Array, dtype: npt.DTypeLike) -> Array:
    """Round scales to their stored type, or refuse them."""
    name = np.dtype(dtype).name
    if name not in _MIN_SCALE:
        raise InvalidError(f"scales are stored as float16 or float32, not {name}")
    with np.errstate(over="ignore"):
        stored = scale.astype(name)
    fits = (scale == 0) | (np.isfinite(stored) & (abs(stored) >= _MIN_SCALE[name]))
    if not fits.all():
        raise _out_of_range("scale", scale[~fits], name)
    return stored


def _out_of_range(what: str, values: Array, dtype: npt.DTypeLike) -> InvalidError:
    """Return the error about numbers that cannot be stored."""
    return InvalidError(
        f"a {what} as large as {abs(values).max()} or as small as {abs(values).min()} cannot be stored as "
        f"{np.dtype(dtype).name}; take float32"
    )
