"""What vLLM asks of a way to quantize: which layers, which parameters, how to multiply.

Planes are parameters named as in the directory, so vLLM's own loaders place them. All planes have one row per output,
so layers that are fused (query, key and value; gate and up) are planes one below the other, and tensor parallelism
over outputs cuts rows. Over inputs it cuts columns of codes and of whatever has one number per group, which is exact
where every part is whole groups and whole words of codes; what has one number per row every part keeps. Embeddings and
heads are decoded when they are loaded. What cannot be served is refused with the way round it, before weights are read.

This module is imported by :func:`tenpak.vllm.register` only; its classes stand at module level, since vLLM pickles
them. It is written against vLLM's interface and tested against stand-ins of the classes that it meets; ``python
tests/vllm.py`` runs it in vLLM itself, where that is installed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.utils import set_weight_attrs

from ._errors import InvalidError, UnsupportedError
from .torch import QuantizedLinear
from .torch._planes import row_planes

METHOD = "tenpak"
FORMAT = 1
#: What to do about what cannot be served here.
OTHERWISE = "serve another export instead: tenpak export --to compressed-tensors"
#: What one fused layer is made of, where the model does not say.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}

#: What the table of embeddings is called, where the model does not say.
TABLES = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")


class TenpakConfig(QuantizationConfig):
    """The ``quantization_config`` of a directory of planes.

    Parameters
    ----------
    tensors
        For each encoded tensor, by its name: ``codec``, ``shape`` and how it is stored; see
        :class:`tenpak.huggingface.TenpakConfig`.

    Raises
    ------
    UnsupportedError
        A tensor is stored in a way that vLLM's loaders cannot take.
    """

    def __init__(self, tensors: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        for name, entry in tensors.items():
            for key, what in (
                ("coding", "has coded planes; export the artifact without --coded"),
                ("transposed", "is stored transposed"),
                ("column_scales", "has column scales"),
                ("outliers", "has outliers"),
            ):
                if entry.get(key):
                    raise UnsupportedError(f"tensor '{name}' {what}, which vLLM does not load in parts; {OTHERWISE}")
        self.tensors = tensors

    def __repr__(self) -> str:
        return f"TenpakConfig({len(self.tensors)} tensors)"

    @classmethod
    def get_name(cls) -> str:
        """Return the name in configs and on vLLM's command line."""
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return the dtypes in which layers compute."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the least compute capability of a GPU."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return files to look for beside ``config.json``: none."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TenpakConfig:
        """Read a ``quantization_config``."""
        if config.get("format", FORMAT) != FORMAT:
            raise UnsupportedError(
                f"format {config['format']} of quantization_config is not known, this build reads format {FORMAT}; "
                "upgrade tenpak"
            )
        return cls(dict(config.get("tensors") or {}))

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """Return what loads and multiplies a layer; None for layers that are no concern of quantization."""
        if isinstance(layer, LinearBase):
            codec = self._codec(prefix)
            return UnquantizedLinearMethod() if codec is None else TenpakLinearMethod(codec, prefix)
        if isinstance(layer, VocabParallelEmbedding):
            entry = self._entry(prefix) if prefix else self._table(layer)
            return UnquantizedEmbeddingMethod() if entry is None else TenpakEmbeddingMethod(entry["codec"])
        if any(name.startswith(f"{prefix}.") for name in self.tensors) and type(layer).__name__.endswith("MoE"):
            raise UnsupportedError(f"'{prefix}' is a mixture of experts, which is not served from planes; {OTHERWISE}")
        return None

    def _entry(self, prefix: str) -> dict[str, Any] | None:
        return self.tensors.get(f"{prefix}.weight") or self.tensors.get(f"{prefix}.weight".removeprefix("model."))

    def _table(self, layer: Any) -> dict[str, Any] | None:
        """Return the entry of the embedding in a model that does not name it; such models have one."""
        shape = [layer.org_vocab_size, layer.embedding_dim]
        found = [
            entry
            for name, entry in self.tensors.items()
            if name.removesuffix(".weight").rpartition(".")[2] in TABLES and list(entry["shape"]) == shape
        ]
        if len(found) > 1:
            raise UnsupportedError(f"{len(found)} embeddings of shape {shape}, unnamed in the model; {OTHERWISE}")
        return found[0] if found else None

    def _codec(self, prefix: str) -> str | None:
        """Return the codec that all parts of a layer have, None where none is quantized."""
        path, _, name = prefix.rpartition(".")
        parts: Iterable[str] = getattr(self, "packed_modules_mapping", {}).get(name) or (name,)
        names = [f"{path}.{part}" if path else part for part in parts]
        if len(names) == 1 and self._entry(prefix) is None and name in FUSED:
            names = [f"{path}.{part}" for part in FUSED[name]]
        codecs = {part: None if (entry := self._entry(part)) is None else str(entry["codec"]) for part in names}
        if len(set(codecs.values())) > 1:
            each = ", ".join(f"{part} {codec or 'raw_v1'}" for part, codec in codecs.items())
            raise UnsupportedError(
                f"'{prefix}' is one layer to vLLM and its parts have different codecs: {each}; compress with one codec "
                "for all of them"
            )
        return next(iter(codecs.values()))


def _planes(layer: Any, codec: str, rows: int, cols: int, whole_cols: int, loader: Any) -> tuple[str, ...]:
    """Give a layer the planes of a matrix as parameters; ``cols`` of ``whole_cols`` columns lie here."""
    own, whole, many = (row_planes(codec, number) for number in (cols, whole_cols, 8 * cols))
    parts = whole_cols // cols
    for name, (dtype, width) in own.items():
        # One number per row is the same for every part of the columns; of the rest a part must be filled to its end.
        per_row = many[name][1] == width
        if not per_row and parts > 1 and (many[name][1] != 8 * width or whole[name][1] != parts * width):
            raise UnsupportedError(
                f"{whole_cols} columns in {parts} parts of {cols} are no whole groups or words of codec {codec} in "
                "each; use fewer parts or a codec of smaller groups"
            )
        parameter = Parameter(torch.zeros((rows, width), dtype=dtype), requires_grad=False)
        attributes = {"output_dim": 0, "weight_loader": loader}
        if not (per_row and parts > 1):
            attributes["input_dim"] = 1
        set_weight_attrs(parameter, attributes)
        layer.register_parameter(name, parameter)
    return tuple(own)


def _take(layer: Any, codec: str, names: tuple[str, ...], cols: int, dtype: torch.dtype) -> QuantizedLinear:
    """Take the planes out of a layer, as a module that multiplies."""
    planes = {name: layer._parameters.pop(name) for name in names}
    tensors = {name: plane.data for name, plane in planes.items() if plane is not None}
    return QuantizedLinear.from_planes(codec, tensors["codes"].shape[0], cols, tensors, dtype=dtype)


class TenpakLinearMethod(LinearMethodBase):
    """Linear layers on planes.

    Parameters
    ----------
    codec
        Id of the codec.
    prefix
        Name of the layer, for messages.
    """

    def __init__(self, codec: str, prefix: str = "") -> None:
        self.codec, self.prefix = codec, prefix

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer its planes, of the part that lies here."""
        loader = extra_weight_attrs.get("weight_loader")
        rows, cols = sum(output_partition_sizes), input_size_per_partition
        try:
            names = _planes(layer, self.codec, rows, cols, input_size, loader)
        except UnsupportedError as error:
            raise UnsupportedError(f"'{self.prefix}': {error}") from None
        layer.tenpak_planes, layer.tenpak_cols, layer.tenpak_dtype = names, cols, params_dtype

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make the module that multiplies, of the planes that have been loaded."""
        if "codes" in layer._parameters:
            module = _take(layer, self.codec, layer.tenpak_planes, layer.tenpak_cols, layer.tenpak_dtype)
            layer.add_module("tenpak", module)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return ``x · weightᵀ + bias``, ``[..., out]`` in the dtype of ``x``."""
        out: torch.Tensor = layer.tenpak(x)
        return out if bias is None else out + bias


class TenpakEmbeddingMethod(UnquantizedEmbeddingMethod):
    """Embeddings and heads, loaded as planes and decoded then: heads that are tied to them share the decoded weight.

    Parameters
    ----------
    codec
        Id of the codec.
    """

    def __init__(self, codec: str) -> None:
        super().__init__()
        self.codec = codec

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer a dense weight, and planes until they are loaded."""
        if input_size_per_partition != input_size:
            raise InvalidError("an embedding is cut by rows only")
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra_weight_attrs,
        )
        loader = extra_weight_attrs.get("weight_loader")
        names = _planes(layer, self.codec, sum(output_partition_sizes), input_size, input_size, loader)
        layer.tenpak_planes, layer.tenpak_cols = names, input_size

    def process_weights_after_loading(self, layer: Any) -> None:
        """Decode what has been loaded."""
        if "codes" in layer._parameters:
            module = _take(layer, self.codec, layer.tenpak_planes, layer.tenpak_cols, layer.weight.dtype)
            layer.weight.data.copy_(module.decode(layer.weight.dtype))
        parent = getattr(super(), "process_weights_after_loading", None)
        if parent is not None:
            parent(layer)


def register() -> None:
    """Register the config; see :func:`tenpak.vllm.register`."""
    register_quantization_config(METHOD)(TenpakConfig)
