"""The operators on CUDA tensors: kernels of tenpak on PyTorch's context, memory and current stream.

A product is launched with addresses and nothing else: no copy, no synchronisation, and its workspace comes from
PyTorch's allocator, so that CUDA graphs record it. Planes are multiplied with as they are stored; there is no second
copy of them.

Where there is no driver, no compiler or too old a device, the first call says what to install; nothing is computed
slowly instead. What compiles kernels is NVRTC, which PyTorch brings along.
"""

import contextlib
import math
from typing import Any

import torch

from .. import _tenpak
from .._errors import InvalidError
from .._nvrtc import find
from ._ops import DTYPES, _check_ids, _library, _planes, _prepared, _weights

#: Rows of activations from which decoding the weights and PyTorch's own product are taken to be faster: by then the
#: product takes longer than to write and read the decoded weights once. ``benches/nvidia.py`` prints both sides of it.
DENSE = 512
#: The same for products in f32 throughout, which no tensor core computes.
DENSE_EXACT = 64

_devices: dict[int, Any] = {}
#: Bytes of workspace of products: device, codec, shape, rows of activations, dtype, whether exact.
_sizes: dict[tuple[Any, ...], int] = {}
_MOST_SIZES = 4096


def device(index: int) -> Any:
    """Return the device with a number, opened once."""
    found = _devices.get(index)
    if found is None:
        path = find((torch.version.cuda or "").split(".")[0] or None)
        if path is not None:
            _tenpak.cuda_use_compiler(str(path))
        found = _devices[index] = _tenpak.CudaDevice(index)
    return found


def _places(first: torch.Tensor, planes: tuple[torch.Tensor, ...]) -> list[tuple[int, int]]:
    """Return address and bytes of each plane, having checked that they are where ``first`` is."""
    for plane in planes:
        if plane.device != first.device:
            raise InvalidError(
                f"activations are on {first.device} and planes on {plane.device}, expected one device; move both to "
                "the same one with .to()"
            )
        if not plane.is_contiguous():
            raise InvalidError(
                f"a plane of shape {tuple(plane.shape)} has strides {plane.stride()}, expected a contiguous one; "
                "call .contiguous() on it once, not for every product"
            )
    return [(plane.data_ptr(), plane.nbytes) for plane in planes]


def _extra(extra: list[torch.Tensor], first: torch.Tensor) -> list[tuple[int, int]]:
    """Return the places of column scales, and of counts, columns and values of outliers; zeros for no plane."""
    places = _places(first, tuple(extra))
    none = (0, 0)
    scales = places[0] if len(places) in (1, 4) else none
    return [scales, *(places[-3:] if len(places) >= 3 else [none, none, none])]


def _stream(first: torch.Tensor) -> int:
    """Return the current stream of a tensor's device, as the driver knows it."""
    stream: int = torch._C._cuda_getCurrentRawStream(first.device.index)
    return stream


def _current(first: torch.Tensor) -> Any:
    """Return a context in which a tensor's device is the current one, which it mostly is."""
    if torch.cuda.current_device() == first.device.index:
        return contextlib.nullcontext()
    return torch.cuda.device(first.device)


def _product(
    x: torch.Tensor, ends: torch.Tensor | None, matrix: tuple[Any, ...], act: str, y: torch.Tensor, m: int
) -> torch.Tensor:
    """Launch a product into ``y``."""
    codes, scales, addends, high_codes, extra, codec, rows, cols = matrix
    planes = _places(x, _planes(codes, scales, addends, high_codes, []))
    beside = _extra(extra, x)
    if y.numel() == 0 or cols == 0:
        return y.zero_()
    shape = (rows, cols, 1 if ends is None else ends.shape[0])
    # Only what is asked to be f32 throughout is. Activations of 8 bits are for processors: halves are nearer.
    exact = act == "float32" or (act == "int8" and x.dtype is torch.float32)
    name = DTYPES[x.dtype]
    call = (codec, shape, planes, beside, m, name, exact)
    with _current(x):
        on = device(x.device.index)
        # What a product needs depends on sizes alone.
        key = (x.device.index, codec, shape, m, name, exact)
        size = _sizes.get(key)
        if size is None:
            if len(_sizes) >= _MOST_SIZES:
                _sizes.clear()
            size = _sizes[key] = on.prepare(*call, x.data_ptr())
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
        places = (x.data_ptr(), 0 if ends is None else ends.data_ptr(), y.data_ptr(), workspace.data_ptr())
        on.multiply(*call, places, _stream(x))
    return y


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    addends: torch.Tensor | None,
    high_codes: torch.Tensor | None,
    extra: list[torch.Tensor],
    codec: str,
    rows: int,
    cols: int,
    act: str,
) -> torch.Tensor:
    """Return ``x @ w.T`` of shape ``[..., rows]`` in the dtype of ``x``."""
    x, y, m, _ = _prepared(x, rows, cols)
    matrix = (codes, scales, addends, high_codes, extra, codec, rows, cols)
    if m > (DENSE_EXACT if act == "float32" else DENSE) and rows and cols:
        kind = torch.float32 if act == "float32" else x.dtype
        weight = dequantize(*matrix, kind)
        if kind is not x.dtype:
            return torch.mm(x.reshape(m, cols).to(kind), weight.t()).to(x.dtype).view(y.shape)
        return torch.mm(x.reshape(m, cols), weight.t(), out=y.view(m, rows)).view(y.shape)
    return _product(x, None, matrix, act, y, m)


def grouped_linear(
    x: torch.Tensor,
    ends: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    addends: torch.Tensor | None,
    high_codes: torch.Tensor | None,
    extra: list[torch.Tensor],
    codec: str,
    rows: int,
    cols: int,
    act: str,
) -> torch.Tensor:
    """Return rows ``ends[e-1]:ends[e]`` of ``x`` times matrix ``e`` of the stack; nobody waits to know the ends."""
    if x.dim() != 2 or ends.dim() != 1 or not ends.shape[0] or rows % ends.shape[0]:
        raise InvalidError(
            f"ends of shape {tuple(ends.shape)} for activations of shape {tuple(x.shape)} and a stack of {rows} rows, "
            "expected as many ends as the stack has matrices and two-dimensional activations"
        )
    count = rows // ends.shape[0]
    x, y, m, _ = _prepared(x, count, cols)
    ends = ends.to(device=x.device, dtype=torch.int32, non_blocking=True).contiguous()
    # A stack of one is a stack all the same: its ends are not looked at by the kernels of single matrices.
    stack = None if ends.shape[0] == 1 else ends
    return _product(x, stack, (codes, scales, addends, high_codes, extra, codec, rows, cols), act, y, m)


def grouped_linear_backward(
    grad: torch.Tensor,
    ends: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    addends: torch.Tensor | None,
    high_codes: torch.Tensor | None,
    extra: list[torch.Tensor],
    codec: str,
    rows: int,
    cols: int,
) -> torch.Tensor:
    """Return the gradient of :func:`grouped_linear` to its activations, one matrix decoded at a time."""
    count = rows // ends.shape[0]
    out = grad.new_empty((grad.shape[0], cols))
    first = 0
    for e, end in enumerate(ends.tolist()):
        if end > first:
            ids = torch.arange(e * count, (e + 1) * count, device=grad.device)
            weight = embedding(ids, codes, scales, addends, high_codes, extra, codec, rows, cols, grad.dtype)
            torch.mm(grad[first:end], weight, out=out[first:end])
        first = end
    return out


def _decode(ids: torch.Tensor | None, count: int, matrix: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
    """Launch the decoding of rows into ``out``."""
    codes, scales, addends, high_codes, extra, codec, rows, cols = matrix
    planes = _places(out, _planes(codes, scales, addends, high_codes, []))
    beside = _extra(extra, out)
    if out.numel() == 0:
        return out
    with _current(out):
        on = device(out.device.index)
        place = 0 if ids is None else ids.data_ptr()
        name = _weights(out.dtype)
        on.decode(codec, (rows, cols, 1), planes, beside, place, count, name, out.data_ptr(), _stream(out))
    return out


def _decoded(dtype: torch.dtype, extra: list[torch.Tensor]) -> torch.dtype:
    """Return the dtype that kernels decode to: outliers are added in f32, so that all is rounded once."""
    return torch.float32 if dtype is torch.float64 or len(extra) >= 3 else dtype


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    addends: torch.Tensor | None,
    high_codes: torch.Tensor | None,
    extra: list[torch.Tensor],
    codec: str,
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the weights ``[rows, cols]`` in ``dtype``."""
    out = torch.empty((rows, cols), dtype=_decoded(dtype, extra), device=codes.device)
    matrix = (codes, scales, addends, high_codes, extra, codec, rows, cols)
    return _decode(None, rows, matrix, out).to(dtype)


def embedding(
    ids: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    addends: torch.Tensor | None,
    high_codes: torch.Tensor | None,
    extra: list[torch.Tensor],
    codec: str,
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the rows ``ids`` of the matrix, ``[..., cols]`` in ``dtype``; NaN for an id that there is no row for."""
    _check_ids(ids)
    ids = ids.to(torch.int64).contiguous()
    out = torch.empty((*ids.shape, cols), dtype=_decoded(dtype, extra), device=ids.device)
    matrix = (codes, scales, addends, high_codes, extra, codec, rows, cols)
    return _decode(ids, math.prod(ids.shape), matrix, out).to(dtype)


for _name, _impl in (
    ("linear", linear),
    ("grouped_linear", grouped_linear),
    ("grouped_linear_backward", grouped_linear_backward),
    ("dequantize", dequantize),
    ("embedding", embedding),
):
    _library.impl(_name, _impl, "CUDA")
