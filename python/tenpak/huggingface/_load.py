"""Loading: a directory of planes, or a single file as if it were one."""

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from .._artifact import Artifact
from .._artifact import open as open_artifact
from .._errors import InvalidError
from ..torch import set_act
from ..torch._planes import Quantized, as_tensor, mark_mapped
from ._quantizer import FORMAT, METHOD, register

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def from_pretrained(path: str | os.PathLike[str], *, act: str | None = None, mmap: bool = False, **options: Any) -> Any:
    """Load a compressed model; see :func:`tenpak.from_pretrained`."""
    register()
    place = os.fspath(path)
    if os.path.isfile(place):
        model = _from_artifact(open_artifact(place, mmap=mmap), **options)
    else:
        config = options.pop("config", None) or transformers.AutoConfig.from_pretrained(place)
        model = _class(config).from_pretrained(place, config=config, **options)
    if act is not None:
        set_act(model, act)
    return model


def _from_artifact(artifact: Artifact, **options: Any) -> Any:
    """Load a model whose planes are views of an artifact."""
    files = artifact.files
    if "config.json" not in files:
        raise InvalidError(
            f"artifact {artifact.path} carries no config.json, so nothing says what model it is; compress a Hugging "
            "Face directory, or build the model and take its layers with QuantizedLinear.from_artifact"
        )
    generation = None
    with tempfile.TemporaryDirectory(prefix="tenpak-") as folder:
        for name in files:
            if name in ("config.json", "generation_config.json"):
                (Path(folder) / name).write_bytes(files[name])
        config = options.pop("config", None) or transformers.AutoConfig.from_pretrained(folder)
        if "generation_config.json" in files:
            generation = transformers.GenerationConfig.from_pretrained(folder)
    config.quantization_config = {"quant_method": METHOD, "format": FORMAT, "tensors": entries(artifact)}
    tensors = state_dict(artifact)
    model = _class(config).from_pretrained(None, config=config, state_dict=tensors, **options)
    if generation is not None and model.can_generate():
        model.generation_config = generation
    # transformers takes views of views, which nobody knows to be read-only any more.
    mapped = {tensor.data_ptr() for name, tensor in tensors.items() if not _is_raw(artifact, name)}
    for module in model.modules():
        if isinstance(module, Quantized):
            for plane in module.planes.values():
                if not plane.is_meta and plane.is_cpu and plane.data_ptr() in mapped:
                    mark_mapped(plane)
    return model


def entries(artifact: Artifact) -> dict[str, dict[str, Any]]:
    """Return what a ``quantization_config`` says of an artifact's encoded tensors."""
    described: dict[str, dict[str, Any]] = {}
    for name, entry in artifact.items():
        if entry.codec != "raw_v1":
            described[name] = {"codec": entry.codec, "dtype": entry.dtype, "shape": list(entry.shape)}
            if entry.transposed:
                described[name]["transposed"] = True
            if entry.column_scales:
                described[name]["column_scales"] = True
            if entry.outliers:
                described[name]["outliers"] = entry.outliers
    return described


def state_dict(artifact: Artifact) -> dict[str, torch.Tensor]:
    """Return the tensors of the directory form: planes as views of the file, raw tensors as copies, to be trained."""
    tensors = {}
    for name, entry in artifact.items():
        planes = artifact.planes(name)
        if entry.codec == "raw_v1":
            data = np.array(planes["data"]).reshape(-1).view(np.uint8)
            tensors[name] = torch.from_numpy(data).view(_DTYPES[entry.dtype]).reshape(entry.shape)
            continue
        base = name.removesuffix(".weight") or name
        tensors |= {f"{base}.{plane}": as_tensor(array) for plane, array in planes.items()}
    return tensors


def _is_raw(artifact: Artifact, name: str) -> bool:
    """Return whether a tensor of :func:`state_dict` is a raw tensor's."""
    return name in artifact and artifact[name].codec == "raw_v1"


def _class(config: Any) -> Any:
    """Return the class that a config names, or the one for causal language models."""
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    return transformers.AutoModelForCausalLM
