"""Quantized layers for PyTorch.

>>> import torch
>>> from tenpak.torch import QuantizedLinear
>>> layer = QuantizedLinear.from_linear(torch.nn.Linear(64, 8), "int4_g32_fp16_v1")
>>> layer(torch.ones(2, 64)).shape
torch.Size([2, 8])
"""

from typing import TYPE_CHECKING, Any

try:
    import torch as _torch  # noqa: F401  the real one: imports are absolute
except ImportError as error:
    raise ImportError("tenpak.torch needs PyTorch, which is not installed; pip install 'tenpak[torch]'") from error

from . import _cuda as _cuda
from . import _kv as _kv
from ._embedding import QuantizedEmbedding
from ._experts import QuantizedStack
from ._linear import G8Linear, QuantizedLinear, QuantizedLinearInt4
from ._model import quantize_model, set_act, set_backend
from ._threads import share_threads as _share_threads

if TYPE_CHECKING:
    from ._cache import QuantizedCache as QuantizedCache

_share_threads()

__all__ = [
    "G8Linear",
    "QuantizedCache",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedLinearInt4",
    "QuantizedStack",
    "quantize_model",
    "set_act",
    "set_backend",
]


def __getattr__(name: str) -> Any:
    """Import what needs transformers when it is asked for: it takes seconds, and is not installed everywhere."""
    if name != "QuantizedCache":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from ._cache import QuantizedCache
    except ImportError as error:
        raise ImportError(
            f"tenpak.torch.QuantizedCache needs transformers 5 or later: {error}; pip install 'tenpak[hf]'"
        ) from error
    globals()[name] = QuantizedCache
    return QuantizedCache
