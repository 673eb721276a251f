"""Quantizing a model in memory, with the choices that ``tenpak compress`` makes for a checkpoint."""

import json
import struct
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import codecs, compress
from .._errors import InvalidError, NonfiniteError
from .._tenpak import DEFAULT_CODEC_IN_MEMORY
from .._types import Report
from ._embedding import QuantizedEmbedding, beside, hindrance_of
from ._experts import QuantizedStack, is_experts, set_stack, stack_names
from ._linear import QuantizedLinear
from ._ops import DTYPES
from ._planes import Quantized

RAW = "raw_v1"


@dataclass(frozen=True)
class _Owner:
    """A place of a parameter in the model."""

    path: str
    module: nn.Module
    name: str

    @property
    def kind(self) -> str:
        """What can be made of it: ``linear``, ``embedding``, ``experts``, or why nothing can."""
        module, cls = self.module, type(self.module)
        if is_experts(module) and self.name in stack_names(module):
            return "experts"
        if self.name == "weight" and not _hooked(module):
            conv1d = cls.__name__ == "Conv1D" and hasattr(module, "nf")
            if conv1d or (isinstance(module, nn.Linear) and cls.forward is nn.Linear.forward and not _is_read(module)):
                return "linear"
            if isinstance(module, nn.Embedding):
                return hindrance_of(module) or "embedding"
        if _hooked(module):
            return f"a module with hooks ({cls.__name__}) cannot be replaced"
        return f"parameter '{self.name}' of {cls.__name__}, which has no quantized form"

    def matrix_shape(self, param: torch.Tensor) -> list[int]:
        """Return the shape with the inputs last: what a codec groups."""
        shape = list(param.shape)
        if type(self.module).__name__ == "Conv1D" or (self.kind == "experts" and self.module.is_transposed):
            shape[-2:] = shape[:-3:-1]
        return shape


def _hooked(module: nn.Module) -> bool:
    """Return whether replacing a module would lose hooks."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or hasattr(module, "_hf_hook") or hasattr(module, "parametrizations")


def _is_read(module: nn.Module) -> bool:
    """Return whether the module around a linear layer reads its weight instead of calling it."""
    return type(module) is torch.nn.modules.linear.NonDynamicallyQuantizableLinear


def quantize_model(
    model: nn.Module,
    codec: str = DEFAULT_CODEC_IN_MEMORY,
    *,
    recipe: str | None = None,
    roles: Mapping[str, str] | None = None,
    rules: Iterable[tuple[str, str]] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    act: str | None = None,
) -> Report:
    """Replace the linear layers, embeddings and experts of a model by quantized ones, in place.

    Which parameter gets which codec is decided as ``tenpak compress`` decides it, by the names of the model's
    parameters. Parameters that several modules share stay shared. Memory is freed as the work goes on: at no time is
    there more than the model and one encoded parameter.

    Parameters
    ----------
    model
        A module with weights; on any device, the work is done on the CPU.
    codec
        Id of the codec of linear weights; see :func:`tenpak.codecs`. Nothing lies on disk here, so the default is one
        that is small in memory, and not that of :func:`tenpak.compress`.
    recipe
        TOML text that says which codec for which tensor, instead of ``codec``.
    roles, rules, include, exclude
        As for :func:`tenpak.compress`.
    act
        Arithmetic of the linear layers; see :class:`QuantizedLinear`.

    Returns
    -------
    dict
        ``modules``: for each parameter of at least two dimensions ``name``, ``codec`` (``raw_v1`` where it was left as
        it is), ``reason``, ``weights``, ``bytes`` and ``bits_per_weight``; ``total``: the sums over all parameters and
        buffers.

    Raises
    ------
    InvalidError
        The model itself is a linear layer or an embedding, has no weights (device ``meta``), or the recipe is wrong.
    NonfiniteError
        A weight is NaN or infinite.
    UnsupportedError
        There is no such codec.
    """
    if _Owner("", model, "weight").kind in ("linear", "embedding"):
        raise InvalidError(
            f"a {type(model).__name__} cannot be replaced in itself, expected a model around it; "
            "use QuantizedLinear.from_linear or QuantizedEmbedding.from_embedding"
        )
    owners: dict[str, list[_Owner]] = {}
    first: dict[int, str] = {}
    for path, module in model.named_modules():
        for name, param in module._parameters.items():
            if param is None or isinstance(module, Quantized):
                continue
            full = f"{path}.{name}" if path else name
            owners.setdefault(first.setdefault(id(param), full), []).append(_Owner(path, module, name))
    matrices = {}
    for full, places in owners.items():
        param = places[0].module._parameters[places[0].name]
        assert param is not None
        if param.is_meta:
            raise InvalidError(
                f"parameter '{full}' is on device meta and has no numbers; load the model's weights first"
            )
        if param.dim() >= 2 and param.dtype in DTYPES:
            matrices[full] = (DTYPES[param.dtype], places[0].matrix_shape(param))
    choices = plan(matrices, codec, recipe, roles, rules, include, exclude)
    modules = [_quantized(model, full, owners[full], *choices[full], act) for full in matrices]
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    transformers: Any = sys.modules.get("transformers")
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        from ..huggingface._quantizer import attach

        attach(model)
    weights, size = sum(m["weights"] for m in modules), sum(tensor.nbytes for tensor in tensors)
    return {
        "modules": modules,
        "total": {"weights": weights, "bytes": size, "bits_per_weight": 8 * size / max(1, weights)},
    }


def set_act(model: nn.Module, act: str | None) -> None:
    """Choose the arithmetic of all quantized layers of a model.

    Parameters
    ----------
    model
        A model with quantized layers.
    act
        ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"int8"``, see :func:`tenpak.matmul`; None for ``"bfloat16"``
        with bfloat16 activations and ``"float32"`` with others.

    Raises
    ------
    InvalidError
        Another arithmetic.
    """
    for module in model.modules():
        if isinstance(module, Quantized):
            module.set_act(act)


def set_backend(model: nn.Module, backend: str) -> None:
    """Choose what multiplies in all quantized linear layers of a model whose planes are on the CPU.

    A layer's planes go to a graphics device with its first product and stay there; activations come from the CPU and
    results return to it. Gradients, embeddings and stacks of experts are computed on the CPU.

    Parameters
    ----------
    model
        A model with quantized layers.
    backend
        ``"cpu"``, or ``"wgpu"`` or ``"wgpu:N"`` for a graphics device, see ``tenpak devices``.

    Raises
    ------
    InvalidError
        Another backend.
    """
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.set_backend(backend)


def plan(
    tensors: Mapping[str, tuple[str, Sequence[int]]],
    codec: str,
    recipe: str | None,
    roles: Mapping[str, str] | None,
    rules: Iterable[tuple[str, str]] | None,
    include: Sequence[str],
    exclude: Sequence[str],
) -> dict[str, tuple[str, str]]:
    """Return codec and reason for tensors given by dtype (its safetensors name) and shape.

    The rules live in Rust and read headers, so they are shown a file that has nothing but a header: its data is a hole.
    """
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = {"F64": 8, "F32": 4}.get(dtype, 2)
        for dim in shape:
            size *= dim
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with tempfile.TemporaryDirectory(prefix="tenpak-plan-") as folder:
        path = Path(folder) / "model.safetensors"
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + at)
        report = compress(
            path, codec=codec, recipe=recipe, roles=roles, rules=rules, include=include, exclude=exclude, dry_run=True
        )
    return {tensor["name"]: (tensor["codec"], tensor["reason"]) for tensor in report["tensors"]}


def _wider(codec: str) -> str | None:
    """Return the codec with the same codes and float32 scales: what ``compress`` takes where scales leave float16."""
    listed = {c["id"]: c for c in codecs()}
    mine = listed[codec]
    for other in listed.values():
        same = all(other[key] == mine[key] for key in ("levels", "bits", "group"))
        offset = other["offset"] == ("F32" if mine["offset"] else None)
        if same and offset and other["scale"] == "F32" and mine["scale"] == "F16":
            return str(other["id"])
    return None


def _quantized(
    model: nn.Module, full: str, owners: list[_Owner], codec: str, reason: str, act: str | None
) -> dict[str, Any]:
    """Put quantized modules in the place of all owners of a parameter and report it."""
    param = owners[0].module._parameters[owners[0].name]
    assert param is not None
    report: dict[str, Any] = {
        "name": full,
        "codec": RAW,
        "reason": reason,
        "weights": param.numel(),
        "bytes": param.nbytes,
    }
    if codec != RAW:
        hindrance = next((owner.kind for owner in owners if owner.kind not in ("linear", "embedding", "experts")), None)
        tied_transposed = len(owners) > 1 and any(o.matrix_shape(param) != list(param.shape) for o in owners)
        if hindrance is not None or tied_transposed:
            report["reason"] = hindrance or "shared by modules of different orientation"
        else:
            quantized, report["reason"] = _encoded(owners[0], param, codec, reason, act, full)
            if quantized is not None:
                _replace(model, owners, quantized, act)
                report |= {"codec": quantized.codec, "bytes": sum(p.nbytes for p in quantized.planes.values())}
    report["bits_per_weight"] = 8 * report["bytes"] / max(1, report["weights"])
    return report


def _encoded(
    owner: _Owner, param: torch.Tensor, codec: str, reason: str, act: str | None, full: str
) -> tuple[Quantized | None, str]:
    """Return a quantized module for a parameter, or None, and the reason."""
    tried: str | None = codec
    while tried is not None:
        try:
            return _module(owner, param, tried, act), reason
        except NonfiniteError as error:
            raise NonfiniteError(f"parameter '{full}': {error}") from error
        except InvalidError as error:
            tried, reason = _wider(tried), str(error)
    return None, reason


def _module(owner: _Owner, param: torch.Tensor, codec: str, act: str | None) -> Quantized:
    """Return a quantized module for the place of a parameter."""
    module: Any = owner.module
    if owner.kind == "experts":
        weight = param.detach().transpose(1, 2) if module.is_transposed else param.detach()
        return QuantizedStack.from_weight(weight, codec, act=act)
    if owner.kind == "embedding":
        return QuantizedEmbedding.from_embedding(module, codec)
    return QuantizedLinear.from_linear(module, codec, act=act)


def _replace(model: nn.Module, owners: list[_Owner], quantized: Quantized, act: str | None) -> None:
    """Put a quantized module in the place of the first owner, and modules on the same planes in those of the others."""
    for position, owner in enumerate(owners):
        module: Any = owner.module
        if owner.kind == "experts":
            assert isinstance(quantized, QuantizedStack)
            set_stack(module, owner.name, quantized)
            continue
        new = quantized if position == 0 else _beside(owner, quantized, act)
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is module:
                    parent._modules[name] = new


def _beside(owner: _Owner, quantized: Quantized, act: str | None) -> Quantized:
    """Return a module for another owner of the same parameter, on the same planes."""
    module: Any = owner.module
    codec, rows, cols = quantized.codec, quantized.rows, quantized.cols
    planes, dtype = quantized.planes, quantized.dtype
    other: Quantized
    if owner.kind == "embedding":
        table = QuantizedEmbedding.from_planes(codec, rows, cols, planes, padding_idx=module.padding_idx, dtype=dtype)
        other = beside(module, table)
    else:
        other = QuantizedLinear.from_planes(codec, rows, cols, planes, bias=module.bias, act=act, dtype=dtype)
    other.train(module.training)
    other.share_planes(quantized)
    return other
