"""Products with encoded matrices, on the CPU or a graphics device."""

from collections.abc import Sequence

import numpy as np

from . import _arrays, _tenpak
from ._arrays import Array
from ._artifact import Artifact
from ._encoded import Encoded
from ._errors import InvalidError
from ._nvrtc import find
from ._tenpak import Entry


def matmul(
    x: Array,
    weights: Encoded | Artifact,
    name: str | None = None,
    *,
    act: str | None = None,
    ends: Sequence[int] | None = None,
    device: str = "cpu",
) -> Array:
    """Multiply activations with an encoded matrix without decoding it first: ``x @ w.T``.

    Parameters
    ----------
    x
        Activations ``[..., in]``, float32, float16 or ml_dtypes.bfloat16.
    weights
        A matrix ``[out, in]`` from :func:`encode`, or an open artifact.
    name
        Name of the tensor, where ``weights`` is an artifact. A matrix that is stored transposed is multiplied as it is
        stored, ``[out, in]``.
    act
        Arithmetic: ``"float32"``; ``"bfloat16"``, activations and weights rounded to 16 bits as in a 16-bit layer; or
        ``"int8"``, activations rounded to 8 bits with one scale for each 32 columns; or ``"float16"``, activations, and
        on devices that can weights too, rounded to halves. Sums are float32 in all of them.
        Default: ``"bfloat16"`` for bfloat16 activations, else ``"float32"``.
    ends
        Multiply with a stack of matrices, one below the other, as a mixture of experts does: rows
        ``ends[e-1]:ends[e]`` of ``x`` (two-dimensional) with matrix ``e`` of ``len(ends)``. On the CPU only.
    device
        ``"cpu"``, ``"wgpu"`` or ``"wgpu:N"`` for a graphics device, ``"cuda"`` or ``"cuda:N"`` for one of NVIDIA's, see
        ``tenpak devices``. The first product takes the matrix there, where it stays for as long as ``weights`` lives.

    Returns
    -------
    numpy.ndarray
        ``[..., out]`` in the dtype of ``x``.

    Raises
    ------
    InvalidError
        Shapes that do not fit, another dtype, a tensor that is stored raw.
    CorruptError
        A plane of the artifact is damaged.
    UnsupportedError
        This build knows no graphics devices.
    TenpakError
        There is no such device, or it fails.
    """
    if isinstance(weights, Artifact):
        if name is None:
            raise InvalidError("which tensor of the artifact, pass its name")
        entry: Entry | Encoded = weights[name]
    else:
        entry = weights
    rows, cols = entry.rows, entry.cols
    x = np.ascontiguousarray(x)
    dtype = _arrays.dtype_name(x.dtype)
    if x.ndim == 0 or x.shape[-1] != cols:
        raise InvalidError(f"activations of shape {x.shape} for a matrix of {rows} x {cols}, expected [..., {cols}]")
    m = int(np.prod(x.shape[:-1]))
    y = np.empty((*x.shape[:-1], rows if ends is None else rows // max(1, len(ends))), x.dtype)
    act = act or ("bfloat16" if dtype == "BF16" else "float32")
    groups = None if ends is None else [int(end) for end in ends]
    places = (x.ctypes.data, x.nbytes), (y.ctypes.data, y.nbytes)
    if device != "cpu":
        if groups is not None:
            raise InvalidError(f"a stack of matrices on device {device!r}, expected 'cpu'; leave out device or ends")
        _on_device(weights, name, device, (rows, cols)).multiply(*places, dtype, m, act)
    elif isinstance(weights, Encoded):
        weights._matrix.multiply(places, dtype, m, act, groups)
    else:
        planes = weights.planes(str(name))
        _tenpak.multiply(weights[str(name)].codec, rows, cols, _memory(planes), *places, dtype, m, act, groups)
    return y


def _memory(planes: dict[str, Array]) -> list[tuple[int, int]]:
    """Return address and bytes of each plane, for as long as the caller holds them."""
    return [(plane.ctypes.data, plane.nbytes) for plane in planes.values()]


def _on_device(
    weights: Encoded | Artifact, name: str | None, device: str, shape: tuple[int, int]
) -> _tenpak.DeviceMatrix:
    """Return a matrix on a device, taken there where it is not yet."""
    key = device, name if isinstance(weights, Artifact) else None
    matrix = weights._on_devices.get(key)
    if matrix is None:
        if isinstance(weights, Artifact):
            planes, codec = weights.planes(str(name)), weights[str(name)].codec
        else:
            planes, codec = weights.planes, weights.codec
        if device.startswith("cuda") and (compiler := find()):
            _tenpak.cuda_use_compiler(str(compiler))
        matrix = _tenpak.DeviceMatrix(device, codec, shape, _memory(planes), planes)
        weights._on_devices[key] = matrix
    return matrix
