"""The classes of vLLM that its plugins meet, as small as they can be: layers, their loaders in tensor parallelism.

vLLM itself is gigabytes and wants a GPU or a build of its own, so everyday tests use these. Names, signatures, the
order of calls and what loaders read of a parameter (``output_dim``, ``input_dim``) are vLLM's; collectives are left to
the test, which has all ranks. ``python tests/vllm.py`` runs the real one.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter

#: Rank and size of the tensor parallel group, set by the test.
rank, size = 0, 1
QUANTIZATION_METHODS: list[str] = ["awq", "gptq"]
_CONFIGS: dict[str, type] = {}


def set_weight_attrs(weight: torch.Tensor, attributes: dict[str, Any] | None) -> None:
    """Set attributes that are not there yet."""
    for key, value in (attributes or {}).items():
        assert not hasattr(weight, key), f"Overwriting existing tensor attribute: {key}"
        setattr(weight, key, value)


def register_quantization_config(quantization: str) -> Any:
    """Register a class under a name, once."""

    def wrapper(cls: type) -> type:
        if quantization in QUANTIZATION_METHODS:
            raise ValueError(f"The quantization method `{quantization}` is already exists.")
        if not issubclass(cls, QuantizationConfig):
            raise ValueError("The quantization config must be a subclass of `QuantizationConfig`.")
        QUANTIZATION_METHODS.append(quantization)
        _CONFIGS[quantization] = cls
        return cls

    return wrapper


def get_quantization_config(quantization: str) -> Any:
    """Return what was registered."""
    return _CONFIGS[quantization]


class QuantizeMethodBase:
    """Base of all methods."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Do nothing."""


class QuantizationConfig:
    """Base of all configs."""

    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class LinearMethodBase(QuantizeMethodBase):
    """Base of methods of linear layers."""


class UnquantizedLinearMethod(LinearMethodBase):
    """Dense weights."""

    def create_weights(
        self, layer: Any, cols: int, parts: list[int], input_size: int, output_size: int, dtype: Any, **extra: Any
    ) -> None:
        """Make one dense parameter."""
        weight = Parameter(torch.empty(sum(parts), cols, dtype=dtype), requires_grad=False)
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0})
        layer.register_parameter("weight", weight)
        set_weight_attrs(weight, extra)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply."""
        return nn.functional.linear(x, layer.weight, bias)


class UnquantizedEmbeddingMethod(QuantizeMethodBase):
    """Dense tables."""

    create_weights = UnquantizedLinearMethod.create_weights
    apply = UnquantizedLinearMethod.apply

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """Look up."""
        return nn.functional.embedding(input_, layer.weight)


class LinearBase(nn.Module):
    """Base of linear layers."""

    def __init__(self, cols: int, parts: list[int], own: list[int], own_cols: int, config: Any, prefix: str) -> None:
        super().__init__()
        self.parts = parts
        self.quant_method = UnquantizedLinearMethod() if config is None else config.get_quant_method(self, prefix)
        self.quant_method.create_weights(
            self, own_cols, own, cols, sum(parts), torch.float32, weight_loader=self.weight_loader
        )

    def weight_loader(self, param: Any, loaded: torch.Tensor, shard: Any = None) -> None:
        """Place a loaded tensor."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply by the part that lies here."""
        out: torch.Tensor = self.quant_method.apply(self, x, None)
        return out


class ColumnParallelLinear(LinearBase):
    """Cut by outputs."""

    def __init__(self, cols: int, rows: int, config: Any, prefix: str) -> None:
        super().__init__(cols, [rows], [rows // size], cols, config, prefix)

    def weight_loader(self, param: Any, loaded: torch.Tensor, shard: Any = None) -> None:
        """Take the rows of this rank."""
        output_dim, data = getattr(param, "output_dim", None), param.data
        if output_dim is not None:
            rows = data.shape[output_dim]
            loaded = loaded.narrow(output_dim, rank * rows, rows)
        assert data.shape == loaded.shape
        data.copy_(loaded)


class MergedColumnParallelLinear(LinearBase):
    """Several layers below each other, each cut by outputs: gate and up; query, key and value by their names."""

    names: tuple[Any, ...] = (0, 1)

    def __init__(self, cols: int, rows: list[int], config: Any, prefix: str) -> None:
        super().__init__(cols, rows, [r // size for r in rows], cols, config, prefix)

    def weight_loader(self, param: Any, loaded: torch.Tensor, shard: Any = None) -> None:
        """Take the rows of this rank, to the place of the part."""
        number = self.names.index(shard)
        output_dim = param.output_dim
        rows, offset = self.parts[number] // size, sum(self.parts[:number]) // size
        data = param.data.narrow(output_dim, offset, rows)
        loaded = loaded.narrow(output_dim, rank * rows, rows)
        assert data.shape == loaded.shape
        data.copy_(loaded)


class QKVParallelLinear(MergedColumnParallelLinear):
    """Query, key and value."""

    names = ("q", "k", "v")


class RowParallelLinear(LinearBase):
    """Cut by inputs; the sum over ranks is the caller's."""

    def __init__(self, cols: int, rows: int, config: Any, prefix: str) -> None:
        super().__init__(cols, [rows], [rows], cols // size, config, prefix)

    def weight_loader(self, param: Any, loaded: torch.Tensor, shard: Any = None) -> None:
        """Take the columns of this rank."""
        input_dim, data = getattr(param, "input_dim", None), param.data
        if input_dim is not None:
            width = data.shape[input_dim]
            loaded = loaded.narrow(input_dim, rank * width, width)
        assert data.shape == loaded.shape
        data.copy_(loaded)


class VocabParallelEmbedding(nn.Module):
    """Cut by tokens, and filled up to a multiple of 64."""

    def __init__(self, tokens: int, cols: int, config: Any, prefix: str) -> None:
        super().__init__()
        self.tokens, self.padded = tokens, -(-tokens // 64) * 64
        self.org_vocab_size, self.embedding_dim = tokens, cols
        self.quant_method = config.get_quant_method(self, prefix) or UnquantizedEmbeddingMethod()
        self.quant_method.create_weights(
            self, cols, [self.padded // size], cols, self.padded, torch.float32, weight_loader=self.weight_loader
        )

    def weight_loader(self, param: Any, loaded: torch.Tensor) -> None:
        """Take the rows of this rank; those that no token has are zero."""
        rows = self.padded // size
        loaded = loaded.narrow(0, rank * rows, min(rows, self.tokens - rank * rows))
        param[: loaded.shape[0]].data.copy_(loaded)
        param[loaded.shape[0] :].data.fill_(0)


class ParallelLMHead(VocabParallelEmbedding):
    """A head."""


class FusedMoE(nn.Module):
    """A mixture of experts."""

    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        self.quant_method = config.get_quant_method(self, prefix)


def modules() -> dict[str, types.ModuleType]:
    """Return the modules under the names by which plugins import them."""
    layers = "vllm.model_executor.layers"
    places = {
        f"{layers}.linear": (LinearBase, LinearMethodBase, UnquantizedLinearMethod),
        f"{layers}.quantization": (register_quantization_config, get_quantization_config),
        f"{layers}.quantization.base_config": (QuantizationConfig, QuantizeMethodBase),
        f"{layers}.vocab_parallel_embedding": (UnquantizedEmbeddingMethod, VocabParallelEmbedding),
        "vllm.model_executor.utils": (set_weight_attrs,),
    }
    found = {}
    for name in ("vllm", "vllm.model_executor", layers, *places):
        found[name] = types.ModuleType(name)
        for thing in places.get(name, ()):
            setattr(found[name], thing.__name__, thing)
    found[f"{layers}.quantization"].QUANTIZATION_METHODS = QUANTIZATION_METHODS  # type: ignore[attr-defined]
    return found


def load(layer: Any, tensors: dict[str, torch.Tensor], prefix: str, shard: Any = None) -> None:
    """Give a layer the tensors of a module, as a model's ``load_weights`` does."""
    own = dict(layer.named_parameters())
    for name, tensor in tensors.items():
        if name.startswith(f"{prefix}."):
            parameter = own[name.removeprefix(f"{prefix}.")]
            parameter.weight_loader(parameter, tensor, *(() if shard is None else (shard,)))


this = sys.modules[__name__]
