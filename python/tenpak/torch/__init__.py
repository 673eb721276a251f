"""Quantized layers for PyTorch.

>>> import torch
>>> from tenpak.torch import QuantizedLinear
>>> layer = QuantizedLinear.from_linear(torch.nn.Linear(64, 8), "int4_g32_fp16_v1")
>>> layer(torch.ones(2, 64)).shape
torch.Size([2, 8])
"""

try:
    import torch as _torch  # noqa: F401  the real one: imports are absolute
except ImportError as error:
    raise ImportError("tenpak.torch needs PyTorch, which is not installed; pip install 'tenpak[torch]'") from error

from . import _cuda as _cuda
from ._embedding import QuantizedEmbedding
from ._experts import QuantizedStack
from ._linear import G8Linear, QuantizedLinear, QuantizedLinearInt4
from ._model import quantize_model, set_act, set_backend
from ._threads import share_threads as _share_threads

_share_threads()

__all__ = [
    "G8Linear",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedLinearInt4",
    "QuantizedStack",
    "quantize_model",
    "set_act",
    "set_backend",
]
