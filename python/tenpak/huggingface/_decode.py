"""Coded planes on their way from a file into a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.core_model_loading import ConversionOps

from .. import _tenpak
from .._errors import CorruptError
from ..torch._planes import Quantized

#: Where a module keeps the streams of planes that are decoded with others, until all are there.
_STREAMS = "_tenpak_streams"
#: Planes of outliers, by the coding that they have where they have one.
_OUTLIERS = {"outlier_counts": "counts_v1", "outlier_columns": "columns_v1", "outlier_values": "tails_v1"}


class DecodePlane(ConversionOps):
    """Decodes planes that are coded, which have one dimension, and leaves others as they are.

    Parameters
    ----------
    plane
        Name of the plane, such as ``codes``.
    """

    def __init__(self, plane: str) -> None:
        self.plane = plane

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: Any = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Return the planes by the same patterns; one that is not merged with others, by its target."""
        path = full_layer_name.rpartition(".")[0]
        module = model.get_submodule(path)
        decoded = {}
        for pattern, found in input_dict.items():
            decoded[pattern] = found if isinstance(found, list) else [found]
            # Anything else of this name is no plane.
            if isinstance(module, Quantized) and full_layer_name.endswith(f".{self.plane}"):
                # Of a stack, every source holds a part of each expert's rows.
                rows = module.rows // getattr(module, "experts", 1) // len(source_patterns)
                decoded[pattern] = [self._decode(tensor, module, rows) for tensor in decoded[pattern]]
        if len(source_patterns) == 1 and len(next(iter(decoded.values()))) == 1:
            return {target_patterns[0]: next(iter(decoded.values()))[0]}
        return decoded

    def _decode(self, tensor: torch.Tensor, module: Quantized, rows: int) -> torch.Tensor:
        """Return a plane of ``rows`` rows."""
        if tensor.dim() != 1:
            return tensor
        if self.plane in _OUTLIERS:
            return self._keep(tensor, module)
        if tensor.dtype != torch.uint8:
            raise CorruptError(f"plane '{self.plane}' has one dimension and dtype {tensor.dtype}, expected torch.uint8")
        stream = tensor.cpu().contiguous().numpy()
        data = bytearray(_tenpak.decode_plane(module.codec, self.plane, rows, module.cols, stream))
        dtype = getattr(module, self.plane).dtype
        plane = torch.frombuffer(data, dtype=dtype).reshape(rows, -1) if data else torch.empty((rows, 0), dtype=dtype)
        return plane.to(tensor.device)

    def _keep(self, tensor: torch.Tensor, module: Quantized) -> torch.Tensor:
        """Put the stream of a plane of outliers aside, if it is one, and return a plane to be filled later."""
        plane = getattr(module, self.plane)
        if tensor.dtype != torch.uint8:
            return tensor
        module.__dict__.setdefault(_STREAMS, {})[self.plane] = tensor.cpu().contiguous().numpy()
        return torch.zeros(plane.shape, dtype=plane.dtype, device=tensor.device)

    @property
    def reverse_op(self) -> ConversionOps:
        """What saving does: planes are written as they are."""
        return _Keep()


def finish(module: Quantized) -> None:
    """Decode the planes of outliers that were put aside: all others are there now.

    Raises
    ------
    CorruptError
        A stream is not that of a plane of this matrix.
    """
    streams: dict[str, Any] = module.__dict__.pop(_STREAMS, {})
    if not streams:
        return
    _, outliers = module.extra
    planes: list[tuple[str, str | None, Any]] = []
    for name, plane in module.planes.items():
        memory = plane.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        planes.append((name, _OUTLIERS[name], streams[name]) if name in streams else (name, None, memory))
    for name in streams:
        data = _tenpak.decode_outliers(module.codec, name, module.rows, module.cols, outliers, planes)
        plane = getattr(module, name)
        decoded = np.frombuffer(bytearray(data), np.uint8)
        with torch.no_grad():
            plane.view(torch.uint8).copy_(torch.from_numpy(decoded))


def decodes_only(conversion: Any) -> bool:
    """Return whether a conversion does nothing but decode planes."""
    operations = getattr(conversion, "operations", None) or []
    return len(operations) > 0 and all(isinstance(operation, DecodePlane) for operation in operations)


class _Keep(ConversionOps):
    """Leaves planes as they are."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **_: Any
    ) -> dict[str, Any]:
        """Return what came in."""
        return input_dict

    @property
    def reverse_op(self) -> ConversionOps:
        """The same."""
        return self
