"""Mixtures of experts: the stacks ``[experts, out, in]`` that transformers keeps as one parameter, on planes."""

import copy
from typing import Any

import torch
from torch import nn

from .._errors import InvalidError, UnsupportedError
from . import _ops
from ._planes import Quantized, encode
from ._weight import DecodedWeight

#: The name under which transformers finds :func:`experts_forward`.
IMPLEMENTATION = "tenpak"


class QuantizedStack(Quantized):
    """A stack of matrices ``[experts, out, in]`` whose weights are planes; each row of a product has one expert.

    Parameters
    ----------
    experts, out_features, in_features
        Size of the stack.
    codec
        Id of a codec; see :func:`tenpak.codecs`. Groups run along ``in``.
    act
        As for :class:`tenpak.torch.QuantizedLinear`.
    per_expert
        Whether planes have the shape ``[experts, out, elements of a row]`` instead of ``[experts * out, elements of a
        row]``; the bytes are the same.
    device, dtype
        Where planes live, and the dtype of :attr:`weight`.

    Raises
    ------
    InvalidError
        Another arithmetic or dtype.
    UnsupportedError
        There is no such codec.
    """

    def __init__(
        self,
        experts: int,
        out_features: int,
        in_features: int,
        *,
        codec: str,
        act: str | None = None,
        per_expert: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.experts, self.out_features, self.in_features = experts, out_features, in_features
        self._set_up(codec, experts * out_features, in_features, act, dtype, device)
        if per_expert:
            self.split_planes()
        #: Whether the source holds each matrix as ``[in, out]``.
        self.transposed = False
        # transformers initializes whatever lacks this mark, after loading.
        self._is_hf_initialized = True

    def split_planes(self) -> None:
        """Give planes the shape ``[experts, out, elements of a row]``, without a copy."""
        if any(self.extra):
            raise UnsupportedError(
                "a stack with column scales or outliers cannot be divided into planes of single experts; compress its "
                "tensor without them"
            )
        for name, plane in self.planes.items():
            self._buffers[name] = plane.view(self.experts, self.out_features, -1)

    @classmethod
    def from_weight(cls, weight: torch.Tensor, codec: str, *, act: str | None = None) -> "QuantizedStack":
        """Encode a stack of weights.

        Parameters
        ----------
        weight
            ``[experts, out, in]``.
        codec, act
            As for the class.

        Returns
        -------
        QuantizedStack
            On the weight's device.

        Raises
        ------
        InvalidError
            Not three dimensions, or scales leave the range of their stored type.
        NonfiniteError
            A weight is NaN or infinite.
        """
        if weight.dim() != 3:
            raise InvalidError(f"weights of shape {tuple(weight.shape)}, expected [experts, out, in]")
        encoded = encode(weight, codec)
        dtype = weight.dtype if weight.dtype in _ops.DTYPES else torch.float32
        out = cls(*weight.shape, codec=codec, act=act, device="meta", dtype=dtype)
        out._set_planes({name: plane.copy() for name, plane in encoded.planes.items()})
        return out.to(weight.device) if weight.device.type != "cpu" else out

    @property
    def weight(self) -> DecodedWeight:
        """The weights ``[experts, out, in]``; shape, dtype and device are free, each use decodes anew."""
        return self._decoded_weight((self.experts, self.out_features, self.in_features))

    def forward(self, input: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Multiply each row with its expert's matrix.

        Parameters
        ----------
        input
            ``[m, in]``, sorted by expert; float32, float16 or bfloat16.
        ends
            ``[experts]``, int64 or int32: the rows of expert ``e`` are ``ends[e-1]:ends[e]``.

        Returns
        -------
        torch.Tensor
            ``[m, out]`` in the dtype of ``input``.

        Raises
        ------
        InvalidError
            Shapes or ends that do not fit.
        UnsupportedError
            No backend for the device.
        """
        act = self.act or _ops.default_act(input)
        y: torch.Tensor = _ops.grouped_linear(input, ends, *self.matrix, act)
        return y

    def extra_repr(self) -> str:
        """Return size, codec and bits per weight."""
        text = f"experts={self.experts}, out_features={self.out_features}, in_features={self.in_features}"
        return f"{text}, codec={self.codec}, {self.bits_per_weight:.3f} bits/weight"


def is_experts(module: nn.Module) -> bool:
    """Return whether a module is one of transformers' stacks of experts whose forward can be chosen."""
    marks = ("num_experts", "config", "has_gate", "has_bias", "is_transposed", "_apply_gate")
    return all(hasattr(module, mark) for mark in marks) and hasattr(type(module).forward, "__wrapped__")


def stack_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the stacked parameters of a module of experts."""
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def set_stack(module: nn.Module, name: str, stack: QuantizedStack) -> None:
    """Put a quantized stack in the place of a parameter of a module of experts, and choose the forward for it."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    delattr(module, name)
    stack.transposed = bool(module.is_transposed)
    module.add_module(name, stack)
    # The config is the whole model's: other modules of experts may stay dense.
    config = copy.copy(module.config)
    config._experts_implementation = IMPLEMENTATION  # type: ignore[union-attr]
    module.config = config


def _project(module: Any, name: str, x: torch.Tensor, ends: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """Return each row of ``x`` times its expert's matrix, plus its bias."""
    stack = getattr(module, name)
    if isinstance(stack, QuantizedStack):
        out: torch.Tensor = stack(x, ends)
    else:
        from transformers.integrations.moe import _grouped_linear

        out = _grouped_linear(x, stack, ends.to(torch.int32), is_transposed=module.is_transposed)
    return out + getattr(module, f"{name}_bias")[experts].to(out.dtype) if module.has_bias else out


def experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute a module of experts: every token through its experts, weighted and added up.

    Parameters
    ----------
    self
        A module of experts of transformers with at least one :class:`QuantizedStack`.
    hidden_states
        ``[tokens, hidden]``.
    top_k_index, top_k_weights
        ``[tokens, k]``: which experts, and how much of each.

    Returns
    -------
    torch.Tensor
        ``[tokens, hidden]`` in the dtype of ``hidden_states``.

    Raises
    ------
    UnsupportedError
        The experts are spread over several devices.
    """
    if self._is_expert_parallel:
        raise UnsupportedError(
            "quantized experts are computed on one device; load the model without expert parallelism"
        )
    tokens, k = top_k_index.shape
    experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
    ends = torch.searchsorted(experts, torch.arange(self.num_experts, device=experts.device), right=True)
    x = _project(self, stack_names(self)[0], hidden_states[order // k], ends, experts)
    x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
    x = _project(self, "down_proj", x, ends, experts)
    if getattr(self, "has_post_expert_norm", False):
        x = self.post_expert_norm(x)
    x = x * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0], device=order.device)
    return x[back].view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)
