"""Layers under the names that GPU users know; see :mod:`tenpak.torch`, where they live."""

from .torch import G8Linear, QuantizedLinearInt4

__all__ = ["G8Linear", "QuantizedLinearInt4"]
