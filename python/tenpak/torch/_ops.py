"""The operators ``tenpak::linear``, ``device_linear``, ``grouped_linear``, ``dequantize`` and ``embedding`` of PyTorch.

Planes are plain tensors: ``codes`` uint8, ``scales`` float16, float32 or uint8, ``addends`` the plane ``offsets``,
``zero_points`` or ``row_scales`` where the codec has one, ``high_codes`` uint8 where it has them, ``extra`` the planes
that come behind the codec's: none, ``column_scales``, the three of outliers, or all four. Every operator takes the
codec's id and the matrix's ``rows`` and ``cols``, from which follows how many bytes each plane must have; the shape in
which a plane holds them is its owner's business.

They are registered with ``define``, ``impl`` and ``register_fake`` and not with ``custom_op``, whose wrapper costs
twice as much on every call. Compilers see them as opaque, gradients flow to activations, never to planes.
"""

import math
from typing import Any, NoReturn

import torch
from torch.library import Library
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.weak import WeakIdKeyDictionary

from .. import _tenpak
from .._errors import InvalidError, UnsupportedError

#: The names that the extension module has for the dtypes of activations and weights.
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
#: Arithmetic of products; see :func:`tenpak.matmul`.
ACTS = ("float32", "bfloat16", "int8", "float16")

#: A matrix as operators know it: codes, scales, addends, high codes, extra planes, codec, rows, columns.
Matrix = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, list[torch.Tensor], str, int, int]
_MATRIX = (
    "Tensor codes, Tensor scales, Tensor? addends, Tensor? high_codes, Tensor[] extra, "
    "str codec, SymInt rows, SymInt cols"
)

_library = Library("tenpak", "DEF")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define(f"linear(Tensor x, {_MATRIX}, str act) -> Tensor", tags=_tags)
_library.define(f"device_linear(Tensor x, {_MATRIX}, str act, str device) -> Tensor", tags=_tags)
_library.define(f"grouped_linear(Tensor x, Tensor ends, {_MATRIX}, str act) -> Tensor", tags=_tags)
_library.define(f"grouped_linear_backward(Tensor grad, Tensor ends, {_MATRIX}) -> Tensor", tags=_tags)
_library.define(f"dequantize({_MATRIX}, ScalarType dtype) -> Tensor", tags=_tags)
_library.define(f"embedding(Tensor ids, {_MATRIX}, ScalarType dtype) -> Tensor", tags=_tags)


def default_act(x: torch.Tensor) -> str:
    """Return the arithmetic for activations where none was asked for; on CUDA halves are what tensor cores take."""
    if x.dtype is torch.float16 and x.is_cuda:
        return "float16"
    return "bfloat16" if x.dtype is torch.bfloat16 else "float32"


def _planes(
    codes: torch.Tensor,
    scales: torch.Tensor,
    addends: torch.Tensor | None,
    high_codes: torch.Tensor | None,
    extra: list[torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """Return the planes that there are, in stored order."""
    return tuple(plane for plane in (codes, high_codes, scales, addends, *extra) if plane is not None)


def _memory(
    codes: torch.Tensor,
    scales: torch.Tensor,
    addends: torch.Tensor | None,
    high_codes: torch.Tensor | None,
    extra: list[torch.Tensor],
    first: torch.Tensor,
) -> list[tuple[int, int]]:
    """Return address and bytes of each plane, having checked that the CPU can read them and ``first``."""
    planes = _planes(codes, scales, addends, high_codes, extra)
    if not (first.is_cpu and all(plane.is_cpu for plane in planes)):
        _refuse_devices(first, planes)
    memory = []
    for plane in planes:
        if not plane.is_contiguous():
            raise InvalidError(
                f"a plane of shape {tuple(plane.shape)} has strides {plane.stride()}, expected a contiguous one; "
                "call .contiguous() on it once, not for every product"
            )
        memory.append((plane.data_ptr(), plane.nbytes))
    return memory


def _refuse_devices(first: torch.Tensor, planes: tuple[torch.Tensor, ...]) -> None:
    """Raise the error about the devices that tensors are on."""
    devices = sorted({str(tensor.device) for tensor in (first, *planes)})
    if len(devices) > 1:
        raise InvalidError(
            f"activations are on {first.device} and planes on {', '.join(str(p.device) for p in planes)}, "
            "expected one device; move both to the same one with .to()"
        )
    raise UnsupportedError(
        f"this build of tenpak multiplies on the CPU, and these tensors are on {devices[0]}; "
        'move the module and its inputs with .to("cpu")'
    )


def _refuse_dtype(x: torch.Tensor) -> NoReturn:
    """Raise the error about the dtype of activations."""
    raise InvalidError(
        f"activations are {x.dtype}, expected torch.float32, torch.float16 or torch.bfloat16; convert them with .to()"
    )


def _refuse_cols(x: torch.Tensor, rows: int, cols: int) -> NoReturn:
    """Raise the error about activations of the wrong width."""
    raise InvalidError(f"activations of shape {tuple(x.shape)} for a matrix of {rows} x {cols}, expected [..., {cols}]")


def is_direct(x: torch.Tensor) -> bool:
    """Return whether nobody watches operators, so that an implementation may be called without the dispatcher.

    That is: on the CPU, no compiler, tracer, dispatch mode, functional transform or tensor subclass, and no gradient
    to record. The dispatcher and its autograd wrapper in Python cost more than a small product.
    """
    return (
        type(x) is torch.Tensor
        and x.is_cpu
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not torch._C._len_torch_function_stack()
    )


def _linear(
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
    memory = _memory(codes, scales, addends, high_codes, extra, x)
    x, y, m, name = _prepared(x, rows, cols)
    place, result = (x.data_ptr(), x.nbytes), (y.data_ptr(), y.nbytes)
    _tenpak.multiply(codec, rows, cols, memory, place, result, name, m, act, None)
    return y


def _prepared(x: torch.Tensor, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor, int, str]:
    """Return contiguous activations, memory for the results, rows of activations, and the name of their dtype."""
    name = DTYPES.get(x.dtype)
    if name is None or name == "F64":
        _refuse_dtype(x)
    shape = x.shape
    if not shape or shape[-1] != cols:
        _refuse_cols(x, rows, cols)
    if not x.is_contiguous():
        x = x.contiguous()
    return x, x.new_empty((*shape[:-1], rows)), x.numel() // cols if cols else math.prod(shape[:-1]), name


def _linear_fake(
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
    """Return what :func:`_linear` gives, without numbers."""
    if x.dim() == 0 or x.shape[-1] != cols:
        _refuse_cols(x, rows, cols)
    return x.new_empty((*x.shape[:-1], rows))


#: Matrices on graphics devices by their codes: device and versions of the planes, matrix. What a matrix keeps of its
#: planes is their memory and not the tensors, so that an entry goes with them.
_on_devices: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _device_linear(
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
    device: str,
) -> torch.Tensor:
    """Return what :func:`_linear` gives, computed on a graphics device that the matrix is taken to once."""
    memory = _memory(codes, scales, addends, high_codes, extra, x)
    x, y, m, name = _prepared(x, rows, cols)
    planes = _planes(codes, scales, addends, high_codes, extra)
    state = device, [(plane.data_ptr(), plane._version) for plane in planes]
    held = _on_devices.get(codes)
    if held is None or held[0] != state:
        kept = [plane.untyped_storage() for plane in planes]
        held = state, _tenpak.DeviceMatrix(device, codec, (rows, cols), memory, kept)
        _on_devices[codes] = held
    held[1].multiply((x.data_ptr(), x.nbytes), (y.data_ptr(), y.nbytes), name, m, act)
    return y


def _device_linear_fake(x: torch.Tensor, *matrix_act_device: Any) -> torch.Tensor:
    """Return what :func:`_device_linear` gives, without numbers."""
    return _linear_fake(x, *matrix_act_device[:-1])


def _ends(ends: torch.Tensor, x: torch.Tensor, rows: int) -> list[int]:
    """Return the ends of the groups as a list, checked against activations and stack."""
    listed: list[int] = ends.tolist()
    if ends.dim() != 1 or not listed or rows % len(listed) or listed[-1] != x.shape[0] or x.dim() != 2:
        raise InvalidError(
            f"ends {listed} for activations of shape {tuple(x.shape)} and a stack of {rows} rows, expected as many "
            "ascending ends as the stack has matrices, the last one the number of rows of two-dimensional activations"
        )
    return listed


def _grouped_linear(
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
    """Return rows ``ends[e-1]:ends[e]`` of ``x`` times matrix ``e`` of the stack, ``[m, rows / experts]``."""
    memory = _memory(codes, scales, addends, high_codes, extra, x)
    name = DTYPES.get(x.dtype)
    if name is None or name == "F64":
        _refuse_dtype(x)
    if not x.shape or x.shape[-1] != cols:
        _refuse_cols(x, rows, cols)
    listed = _ends(ends, x, rows)
    x = x.contiguous()
    y = x.new_empty((x.shape[0], rows // len(listed)))
    place, result = (x.data_ptr(), x.nbytes), (y.data_ptr(), y.nbytes)
    _tenpak.multiply(codec, rows, cols, memory, place, result, name, x.shape[0], act, listed)
    return y


def _grouped_linear_fake(
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
    """Return what :func:`_grouped_linear` gives, without numbers."""
    if x.dim() == 0 or x.shape[-1] != cols:
        _refuse_cols(x, rows, cols)
    return x.new_empty((x.shape[0], rows // ends.shape[0]))


def _grouped_linear_backward(
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
    """Return the gradient of :func:`_grouped_linear` to its activations, one matrix decoded at a time."""
    _memory(codes, scales, addends, high_codes, extra, grad)
    listed = _ends(ends, grad, rows)
    n = rows // len(listed)
    out = grad.new_empty((grad.shape[0], cols))
    first = 0
    for e, end in enumerate(listed):
        if end > first:
            ids = torch.arange(e * n, (e + 1) * n)
            weight = _embedding(ids, codes, scales, addends, high_codes, extra, codec, rows, cols, grad.dtype)
            torch.mm(grad[first:end], weight, out=out[first:end])
        first = end
    return out


def _grouped_linear_backward_fake(
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
    """Return what :func:`_grouped_linear_backward` gives, without numbers."""
    return grad.new_empty((grad.shape[0], cols))


def _dequantize(
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
    memory = _memory(codes, scales, addends, high_codes, extra, codes)
    out = torch.empty((rows, cols), dtype=dtype, device=codes.device)
    _tenpak.decode_rows(codec, rows, cols, memory, None, (out.data_ptr(), out.nbytes), _weights(dtype))
    return out


def _dequantize_fake(
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
    """Return what :func:`_dequantize` gives, without numbers."""
    return codes.new_empty((rows, cols), dtype=dtype)


def _weights(dtype: torch.dtype) -> str:
    """Return the extension module's name for a dtype of weights."""
    name = DTYPES.get(dtype)
    if name is None:
        raise InvalidError(
            f"weights cannot be {dtype}, expected one of {', '.join(str(known) for known in DTYPES)}; decode to one of "
            "them and convert with .to()"
        )
    return name


def _check_ids(ids: torch.Tensor) -> None:
    """Refuse what cannot name rows."""
    if ids.dtype not in (torch.int64, torch.int32):
        raise InvalidError(f"ids are {ids.dtype}, expected torch.int64 or torch.int32; convert them with .long()")


def _embedding(
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
    """Return the rows ``ids`` of the matrix, ``[..., cols]`` in ``dtype``."""
    memory = _memory(codes, scales, addends, high_codes, extra, ids)
    _check_ids(ids)
    ids = ids.to(torch.int64).contiguous()
    out = torch.empty((*ids.shape, cols), dtype=dtype, device=ids.device)
    place, result = (ids.data_ptr(), ids.nbytes), (out.data_ptr(), out.nbytes)
    _tenpak.decode_rows(codec, rows, cols, memory, place, result, _weights(dtype))
    return out


def _embedding_fake(
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
    """Return what :func:`_embedding` gives, without numbers."""
    _check_ids(ids)
    return ids.new_empty((*ids.shape, cols), dtype=dtype)


def _keep_matrix(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """Keep what the gradient of ``linear`` needs: the matrix, not the activations."""
    _, codes, scales, addends, high_codes, extra, codec, rows, cols, _ = inputs
    ctx.save_for_backward(codes, scales, addends, high_codes, *extra)
    ctx.matrix = (codec, rows, cols)


def _linear_gradient(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """Return ``grad @ w``: the weights are constants, whatever arithmetic the product used."""
    codes, scales, addends, high_codes, *extra = ctx.saved_tensors
    gradient = None
    if ctx.needs_input_grad[0]:
        weight = torch.ops.tenpak.dequantize(codes, scales, addends, high_codes, extra, *ctx.matrix, grad.dtype)
        gradient = grad @ weight
    return (gradient, *[None] * 4, [None] * len(extra), *[None] * 4)


def _keep_device_matrix(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """Keep what the gradient of ``device_linear`` needs."""
    _keep_matrix(ctx, inputs[:-1], output)


def _device_linear_gradient(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """Return ``grad @ w``, on the CPU."""
    return (*_linear_gradient(ctx, grad), None)


def _keep_stack(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """Keep what the gradient of ``grouped_linear`` needs."""
    _, ends, codes, scales, addends, high_codes, extra, codec, rows, cols, _ = inputs
    ctx.save_for_backward(ends, codes, scales, addends, high_codes, *extra)
    ctx.matrix = (codec, rows, cols)


def _grouped_linear_gradient(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """Return the gradient of each row with its own matrix."""
    ends, codes, scales, addends, high_codes, *extra = ctx.saved_tensors
    gradient = None
    if ctx.needs_input_grad[0]:
        gradient = torch.ops.tenpak.grouped_linear_backward(
            grad, ends, codes, scales, addends, high_codes, extra, *ctx.matrix
        )
    return (gradient, *[None] * 5, [None] * len(extra), *[None] * 4)


def _keep_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    """Keep what the second derivative of ``grouped_linear`` needs."""
    _, ends, codes, scales, addends, high_codes, extra, codec, rows, cols = inputs
    ctx.save_for_backward(ends, codes, scales, addends, high_codes, *extra)
    ctx.matrix = (codec, rows, cols)


def _grouped_linear_backward_gradient(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """Return the gradient of the gradient, which is the product itself."""
    ends, codes, scales, addends, high_codes, *extra = ctx.saved_tensors
    gradient = torch.ops.tenpak.grouped_linear(
        grad, ends, codes, scales, addends, high_codes, extra, *ctx.matrix, "float32"
    )
    return (gradient, *[None] * 5, [None] * len(extra), *[None] * 3)


# One implementation for every device, which refuses those that it cannot serve: a backend for another device registers
# its own under that device's key, which goes first.
for _name, _impl, _fake in (
    ("linear", _linear, _linear_fake),
    ("device_linear", _device_linear, _device_linear_fake),
    ("grouped_linear", _grouped_linear, _grouped_linear_fake),
    ("grouped_linear_backward", _grouped_linear_backward, _grouped_linear_backward_fake),
    ("dequantize", _dequantize, _dequantize_fake),
    ("embedding", _embedding, _embedding_fake),
):
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tenpak::{_name}", _fake, lib=_library)
for _name, _gradient, _keep in (
    ("linear", _linear_gradient, _keep_matrix),
    ("device_linear", _device_linear_gradient, _keep_device_matrix),
    ("grouped_linear", _grouped_linear_gradient, _keep_stack),
    ("grouped_linear_backward", _grouped_linear_backward_gradient, _keep_backward),
):
    torch.library.register_autograd(f"tenpak::{_name}", _gradient, setup_context=_keep, lib=_library)

linear = torch.ops.tenpak.linear.default
linear_direct = _linear
device_linear = torch.ops.tenpak.device_linear.default
grouped_linear = torch.ops.tenpak.grouped_linear.default
dequantize = torch.ops.tenpak.dequantize.default
embedding = torch.ops.tenpak.embedding.default
embedding_direct = _embedding
