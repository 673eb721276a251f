"""The weight of a quantized module as a tensor that is decoded when somebody computes with it."""

from typing import Any, NoReturn

import torch
from torch.utils._pytree import tree_map

from .._errors import InvalidError
from . import _ops
from ._ops import Matrix

#: What does not reach the dispatcher and therefore needs the numbers at once.
_OUTSIDE = {torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__, torch.Tensor.__deepcopy__}
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


class DecodedWeight(torch.Tensor):
    """The weights of planes: shape, dtype and device cost nothing, any computation decodes them anew.

    Read-only: there is nothing behind it that could be written. An attempt, such as merging an adapter into it, is an
    error and not lost in silence.
    """

    _matrix: Matrix

    @staticmethod
    def __new__(
        cls,
        matrix: Matrix,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> "DecodedWeight":
        """Wrap the planes ``matrix``, a matrix of the operators, as a tensor of ``shape`` and ``dtype``."""
        out: DecodedWeight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=matrix[0].device)
        out._matrix = matrix
        # transformers initializes whatever lacks this mark, after loading.
        out._is_hf_initialized = True  # type: ignore[attr-defined]
        return out

    def decoded(self) -> torch.Tensor:
        """Return the weights as a plain tensor of the same shape, dtype and device."""
        return _ops.dequantize(*self._matrix, self.dtype).reshape(self.shape)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Return shape, dtype and codec, without decoding."""
        return f"DecodedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, codec={self._matrix[4]!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the decoded weights."""
        return self.decoded().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Decode for what does not reach the dispatcher; refuse to be given other numbers."""
        if func == _SET_DATA and isinstance(args[0], cls):
            _refuse(args[0])
        if func in _OUTSIDE:
            args = (args[0].decoded(), *args[1:])
            return func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Decode and compute; a second name for the same weights stays undecoded."""
        if func is torch.ops.aten.detach.default:
            return cls(args[0]._matrix, tuple(args[0].shape), args[0].dtype)
        kwargs = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                if isinstance(value, cls):
                    _refuse(value)
        args, kwargs = tree_map(lambda x: x.decoded() if isinstance(x, cls) else x, (args, kwargs))
        return func(*args, **kwargs)


def _refuse(weight: DecodedWeight) -> NoReturn:
    """Raise the error about weights that cannot be written."""
    raise InvalidError(
        f"the weights of a quantized module (codec {weight._matrix[4]}, shape {tuple(weight.shape)}) cannot be changed "
        "in place: they are decoded from codes; keep adapters unmerged, or put a dense module in its place first"
    )
