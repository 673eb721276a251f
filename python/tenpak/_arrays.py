"""Between numpy dtypes and those of safetensors; bfloat16 and float8 come from ml_dtypes where it is installed."""

from typing import Any

import numpy as np
import numpy.typing as npt

from ._errors import InvalidError

Array = npt.NDArray[Any]

#: numpy's name of each dtype that numpy has by itself.
_NUMPY = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
#: ml_dtypes' name of each dtype that numpy lacks, and the integers that hold its bits without ml_dtypes.
_ML_DTYPES = {
    "BF16": ("bfloat16", "uint16"),
    "F8_E4M3": ("float8_e4m3fn", "uint8"),
    "F8_E5M2": ("float8_e5m2", "uint8"),
}
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the numpy dtype of a safetensors dtype; integers of the same size where ml_dtypes is missing."""
    if name in _NUMPY:
        return np.dtype(_NUMPY[name])
    ml_name, bits = _ML_DTYPES[name]
    try:
        import ml_dtypes
    except ImportError:
        return np.dtype(bits)
    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, ml_name))
    return dtype


def dtype_name(dtype: npt.DTypeLike | str) -> str:
    """Return the safetensors name of a floating-point dtype, given as a name or as a numpy dtype."""
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    known = {numpy: ours for ours, numpy in _NUMPY.items()} | {ml: ours for ours, (ml, _) in _ML_DTYPES.items()}
    ours = known.get(name, name)
    if ours not in _FLOATS:
        floats = "float32, float16, bfloat16, float64"
        raise InvalidError(
            f"weights cannot be {name}, expected one of {floats}; "
            "bfloat16 held as uint16 is told by .view(ml_dtypes.bfloat16)"
        )
    return ours


def as_bytes(array: Array) -> Array:
    """Return a one-dimensional uint8 view of a C-contiguous array."""
    return array.reshape(-1).view(np.uint8) if array.size else np.empty(0, np.uint8)


def output(shape: tuple[int, ...], name: str, out: Array | None) -> Array:
    """Return an array to decode into: a new one, or ``out`` when it fits."""
    dtype = numpy_dtype(name)
    if out is None:
        return np.empty(shape, dtype)
    if out.dtype != dtype or out.shape != shape or not out.flags.c_contiguous or not out.flags.writeable:
        raise InvalidError(
            f"out has dtype {out.dtype} and shape {out.shape}, "
            f"expected a writable, C-contiguous array of dtype {dtype} and shape {shape}"
        )
    return out


#: Planes that any codec's matrix may have, in stored order, behind the codec's own: one dimension each.
EXTRA_PLANES = ("column_scales", "outlier_counts", "outlier_columns", "outlier_values")


def plane_shape(plane: str, rows: int, size: int) -> tuple[int, ...]:
    """Return the shape of a plane of a matrix of ``rows`` rows that holds ``size`` bytes or elements."""
    if plane in EXTRA_PLANES:
        return (-1,) if size else (0,)
    return (rows, -1 if size else 0)
