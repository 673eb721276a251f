"""The quantizer: what transformers asks while it loads, saves and trains a model on planes."""

import re
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .._errors import CorruptError, InvalidError, UnsupportedError
from ..torch._embedding import QuantizedEmbedding, beside, hindrance_of
from ..torch._experts import QuantizedStack, is_experts, set_stack, stack_names
from ..torch._linear import QuantizedLinear
from ..torch._planes import Quantized
from ._decode import DecodePlane, decodes_only, finish

METHOD = "tenpak"
FORMAT = 1
#: What an encoded tensor's entry in the config says: codec, dtype and shape of the source, whether it is transposed.
Entry = dict[str, Any]


class TenpakConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a directory of planes.

    Parameters
    ----------
    format
        Version of the description; this build knows 1.
    tensors
        For each encoded tensor, by its name in the source: ``codec``, ``dtype`` (as safetensors names it), ``shape``
        and, where it is stored transposed, ``transposed``; ``column_scales`` and the number of ``outliers`` where it
        has them; ``coding`` of the planes that are coded, by plane.

    Raises
    ------
    UnsupportedError
        Another version.
    """

    def __init__(self, format: int = FORMAT, tensors: dict[str, Entry] | None = None, **_: Any) -> None:
        if format != FORMAT:
            raise UnsupportedError(
                f"format {format} of quantization_config is not known, this build reads format {FORMAT}; upgrade tenpak"
            )
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format = format
        self.tensors = dict(tensors or {})


class TenpakQuantizer(HfQuantizer):
    """Puts quantized modules in the place of dense ones before weights are loaded, and describes them when saved.

    Parameters
    ----------
    quantization_config
        :class:`TenpakConfig`.
    **kwargs
        ``pre_quantized``, from transformers.
    """

    quantization_config: TenpakConfig

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        #: Modules that use another one's planes, which are not there before weights are loaded.
        self._followers: list[tuple[Any, Any]] = []

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to quantize while loading: that is done to a loaded model, or by the command line."""
        import transformers

        if int(transformers.__version__.split(".")[0]) < 5:
            raise ImportError(f"transformers {transformers.__version__} is too old, expected 5 or later; upgrade it")
        if not self.pre_quantized:
            raise InvalidError(
                "this checkpoint is not compressed; compress it with `tenpak compress`, or load it without "
                "quantization_config and call tenpak.torch.quantize_model"
            )

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained: they can, codes are constants."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether torch.compile takes the model."""
        return True

    def is_serializable(self, **_: Any) -> bool:
        """Whether ``save_pretrained`` writes a directory that loads again."""
        return True

    def _process_model_before_weight_loading(self, model: Any, dtype: Any = None, **_: Any) -> None:
        """Replace the modules of encoded tensors; the model is on the meta device."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        conversions = get_model_conversion_mapping(model)
        renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        operations = {pattern: entry.operations for entry in converters for pattern in entry.source_patterns}
        expected = model.state_dict()
        merged: dict[str, list[tuple[str, str]]] = {}
        direct: dict[str, str] = {}
        for name in self.quantization_config.tensors:
            target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
            if target not in expected and name in expected:
                target, pattern = name, None
            if target not in expected:
                continue  # of a part that this class does not have, such as a head: transformers lists it
            if pattern is None:
                direct[target] = name
            else:
                merged.setdefault(target, []).append((name, pattern))
        for target, name in direct.items():
            self._replace(model, target, name, dtype)
        for target, parts in merged.items():
            self._replace_merged(model, target, parts, [operations[pattern] for _, pattern in parts], dtype)
        self._replace_tied(model, direct, dtype)
        for module in model.modules():
            if isinstance(module, Quantized):
                module.describes_itself = False

    def _replace(self, model: Any, target: str, name: str, dtype: Any) -> None:
        """Put a quantized module in the place of the owner of one parameter."""
        entry = self.quantization_config.tensors[name]
        path, _, parameter = target.rpartition(".")
        module = model.get_submodule(path)
        shape = tuple(module._parameters[parameter].shape)
        if shape != tuple(entry["shape"]):
            raise CorruptError(f"tensor '{name}' has shape {entry['shape']} and the model wants {list(shape)}")
        if is_experts(module) and parameter in stack_names(module):
            if module.is_transposed:
                raise UnsupportedError(
                    f"tensor '{name}' holds experts as [experts, in, out], whose groups do not run along inputs; "
                    "compress the model with this tensor excluded"
                )
            stack = QuantizedStack(*shape, codec=entry["codec"], **_place(module._parameters[parameter], dtype))
            set_stack(module, parameter, _told(stack, entry))
        else:
            _set(model, path, _told(_quantized(module, parameter, entry, dtype, name), entry))

    def _replace_merged(
        self, model: Any, target: str, parts: list[tuple[str, str]], operations: list[Any], dtype: Any
    ) -> None:
        """Put a quantized stack in the place of a parameter that transformers merges from one tensor per expert."""
        path, _, parameter = target.rpartition(".")
        module = model.get_submodule(path)
        entries = [self.quantization_config.tensors[name] for name, _ in parts]
        first, names = entries[0], f"'{parts[0][0]}' and {len(parts) - 1} more"
        known = {("MergeModulelist", 0), ("Concatenate", 1)}
        foreign = {(type(op).__name__, getattr(op, "dim", None)) for ops in operations for op in ops} - known
        if foreign or not (is_experts(module) and parameter in stack_names(module)):
            raise UnsupportedError(
                f"tensors {names} are put together by transformers in a way that planes do not allow; "
                "compress the model with them excluded"
            )
        if len({entry["codec"] for entry in entries}) > 1:
            codecs = ", ".join(sorted({entry["codec"] for entry in entries}))
            raise UnsupportedError(
                f"tensors {names} become one stack and have the codecs {codecs}, expected one; compress the experts of "
                "a layer with one codec"
            )
        if any(entry.get("column_scales") or entry.get("outliers") for entry in entries):
            raise UnsupportedError(
                f"tensors {names} become one stack and have column scales or outliers, one set for each; compress the "
                "experts without them"
            )
        experts, rows, cols = module._parameters[parameter].shape
        if sum(entry["shape"][0] for entry in entries) != experts * rows or first["shape"][1] != cols:
            raise CorruptError(f"tensors {names} do not add up to {experts} experts of {rows} x {cols}")
        options = _place(module._parameters[parameter], dtype)
        stack = QuantizedStack(experts, rows, cols, codec=first["codec"], per_expert=True, **options)
        set_stack(module, parameter, _told(stack, first))

    def _replace_tied(self, model: Any, direct: dict[str, str], dtype: Any) -> None:
        """Replace the modules that share a parameter with a replaced one; they will use its planes."""
        groups: dict[str, list[str]] = {}
        for target, source in model.all_tied_weights_keys.items():
            groups.setdefault(source, [source]).append(target)
        for names in groups.values():
            stored = [name for name in names if name in direct]
            if not stored:
                continue
            owner = model.get_submodule(stored[0].rpartition(".")[0])
            # Several may be stored: then they are not tied, whatever the config says.
            for name in set(names) - set(stored):
                self._replace(model, name, direct[stored[0]], dtype)
                follower = model.get_submodule(name.rpartition(".")[0])
                follower.follow(owner)
                self._followers.append((follower, owner))
            _untie(model, set(names))

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """Add, for each conversion that merges experts, copies that merge their planes."""
        from transformers.core_model_loading import WeightConverter

        stacks = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedStack) and m.codes.dim() == 3}
        updated = []
        for conversion in weight_conversions:
            updated.append(conversion)
            if not isinstance(conversion, WeightConverter):
                continue
            sources = conversion._original_source_patterns
            target = conversion._original_target_patterns[0]
            planes = {plane for name, stack in stacks.items() if name.endswith(target) for plane in stack.plane_names}
            for plane in sorted(planes):
                renamed = [f"{source.removesuffix('.weight')}.{plane}" for source in sources]
                first = [DecodePlane(plane)] if plane in self._coded() else []
                updated.append(
                    conversion.copy(renamed, f"{target}.{plane}", operations=[*first, *conversion.operations])
                )
        # Behind those above: a key goes to the first one that matches.
        return updated + [WeightConverter(plane, plane, operations=[DecodePlane(plane)]) for plane in self._coded()]

    def _coded(self) -> list[str]:
        """Return the planes that are coded in some tensor."""
        return sorted(
            {plane for entry in self.quantization_config.tensors.values() for plane in entry.get("coding", ())}
        )

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Let tied modules share planes, and refuse a model whose planes were not all found."""
        for module in model.modules():
            if isinstance(module, Quantized) and not module.codes.is_meta:
                finish(module)
        for follower, owner in self._followers:
            follower.share_planes(owner)
        self._followers.clear()
        # Planes are saved as they are in memory: what only decodes them has no part in it.
        if getattr(model, "_weight_conversions", None):
            model._weight_conversions = [c for c in model._weight_conversions if not decodes_only(c)]
        missing = [
            f"{path}.{name}"
            for path, module in model.named_modules()
            if isinstance(module, Quantized)
            for name, plane in module.planes.items()
            if not plane.is_meta and not getattr(plane, "_is_hf_initialized", False)
        ]
        if missing:
            raise CorruptError(
                f"{len(missing)} planes are missing from the checkpoint or have another shape than its config says, "
                f"the first one '{missing[0]}'; fetch or compress the model again"
            )
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[Any, dict[str, Any]]:
        """Describe the model as it is now in its config; transformers takes the state dict itself."""
        self.quantization_config.tensors = described(model)
        model.config.quantization_config = self.quantization_config
        return None, {}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        """Put dense modules back."""
        quantized = [(path, m) for path, m in model.named_modules() if isinstance(m, Quantized)]
        for path, module in quantized:
            if isinstance(module, QuantizedStack):
                raise UnsupportedError(f"experts such as '{path}' are not decoded in place; use `tenpak decompress`")
        owners: dict[int, nn.Parameter] = {}
        for path, module in quantized:
            _set(model, path, _dense(module, dtype, owners))
        return model


def register() -> None:
    """Add config and quantizer to transformers' tables; a second call changes nothing."""
    from transformers.quantizers import auto

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, TenpakConfig)
    auto.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, TenpakQuantizer)


def attach(model: Any) -> None:
    """Make a model that was quantized in memory known to transformers as such, so that it can be saved."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    quantizer = TenpakQuantizer(TenpakConfig(), pre_quantized=True)
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    merged = [entry._original_target_patterns[0] for entry in conversions if hasattr(entry, "operations")]
    for path, module in model.named_modules():
        if isinstance(module, Quantized):
            module.describes_itself = False
        if isinstance(module, QuantizedStack) and any(path.endswith(target) for target in merged):
            module.split_planes()
    for target, source in list(model.all_tied_weights_keys.items()):
        follower, owner = (model.get_submodule(name.rpartition(".")[0]) for name in (target, source))
        if isinstance(follower, Quantized) and isinstance(owner, Quantized):
            follower.follow(owner)
            _untie(model, {target})
    model._weight_conversions = quantizer.update_weight_conversions(conversions, model)
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, METHOD
    quantizer.quantization_config.tensors = described(model)
    model.config.quantization_config = quantizer.quantization_config


def described(model: Any) -> dict[str, Entry]:
    """Return what a config says of each encoded tensor, by the names under which transformers saves it."""
    from transformers.core_model_loading import revert_weight_conversion

    tensors = {}
    for path, module in model.named_modules():
        if not isinstance(module, Quantized) or module.is_follower:
            continue
        codes = module.planes["codes"]
        saved = revert_weight_conversion(model, {f"{path}.codes": torch.empty_like(codes, device="meta")})
        for name, tensor in saved.items():
            base, dims = name.removesuffix(".codes"), list(tensor.shape[:-1])
            if isinstance(module, QuantizedStack) and codes.dim() == 2:
                full, dims = base, [module.experts, module.out_features]
            else:
                full = f"{base}.weight"
            entry: Entry = {"codec": module.codec, "dtype": module.source, "shape": [*dims, module.cols]}
            if isinstance(module, QuantizedLinear) and module.transposed:
                entry["shape"].reverse()
                entry["transposed"] = True
            column_scales, outliers = module.extra
            if column_scales:
                entry["column_scales"] = True
            if outliers:
                entry["outliers"] = outliers
            tensors[full] = entry
    return tensors


def _place(parameter: torch.Tensor, dtype: torch.dtype | None) -> dict[str, Any]:
    """Return where a module is made that replaces a parameter, and the dtype it computes in."""
    return {"device": parameter.device, "dtype": dtype if dtype is not None else parameter.dtype}


def _told(module: Any, entry: Entry) -> Any:
    """Tell a module what its source was, and which planes it has beside its codec's."""
    module.source = entry["dtype"]
    extra = bool(entry.get("column_scales")), int(entry.get("outliers", 0))
    if extra != module.extra:
        module.set_extra(*extra)
    return module


def _quantized(module: Any, parameter: str, entry: Entry, dtype: Any, name: str) -> Quantized:
    """Return the quantized form of a module, without weights."""
    kind, transposed = type(module), bool(entry.get("transposed"))
    conv1d = kind.__name__ == "Conv1D" and hasattr(module, "nf")
    plain = parameter == "weight" and transposed == conv1d
    codec, place = entry["codec"], _place(module._parameters[parameter], dtype)
    if plain and isinstance(module, nn.Embedding) and hindrance_of(module) is None:
        size = (module.num_embeddings, module.embedding_dim, module.padding_idx)
        return beside(module, QuantizedEmbedding(*size, codec=codec, **place))
    if plain and (conv1d or (isinstance(module, nn.Linear) and kind.forward is nn.Linear.forward)):
        outputs, inputs = (module.nf, module.nx) if conv1d else (module.out_features, module.in_features)
        new = QuantizedLinear(inputs, outputs, bias=False, codec=codec, **place)
        new.transposed, new.bias = transposed, module.bias
        return new
    raise UnsupportedError(
        f"tensor '{name}' is parameter '{parameter}' of a {kind.__name__}, which has no quantized form"
        f"{' for weights that are stored transposed' if transposed else ''}; compress the model with it excluded"
    )


def _set(model: Any, path: str, module: nn.Module) -> None:
    """Put a module at a path."""
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module


def _untie(model: Any, targets: set[str]) -> None:
    """Have transformers forget that parameters are tied: planes are, and modules see to it."""
    from transformers import PreTrainedModel

    for target in targets:
        model.all_tied_weights_keys.pop(target, None)
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and module._tied_weights_keys:
            prefix = f"{path}." if path else ""
            own = {target.removeprefix(prefix) for target in targets if target.startswith(prefix)}
            kept = {k: v for k, v in module._tied_weights_keys.items() if not any(re.search(f"^{k}", t) for t in own)}
            module._tied_weights_keys = kept


def _dense(module: Any, dtype: torch.dtype | None, owners: dict[int, nn.Parameter]) -> nn.Module:
    """Return a dense module with the decoded weights; modules that share planes share them."""
    codes = module.planes["codes"]
    weight = owners.get(id(codes))
    if weight is None:
        weight = owners[id(codes)] = nn.Parameter(module.decode(dtype), requires_grad=False)
    if isinstance(module, QuantizedEmbedding):
        table = nn.Embedding(module.num_embeddings, module.embedding_dim, module.padding_idx, device="meta")
        table.weight = weight
        return table
    if module.transposed:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            conv1d = Conv1D(module.out_features, module.in_features)
        conv1d.weight, conv1d.bias = nn.Parameter(weight.T.contiguous(), requires_grad=False), module.bias
        return conv1d
    dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    dense.weight, dense.bias = weight, module.bias
    return dense
