"""Models from checkpoints and from artifacts, and how far the weights of the one are from those of the other."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np
import safetensors
import torch
import transformers

from .._artifact import Artifact
from .._errors import InvalidError
from .._huggingface import from_pretrained
from .._tenpak import Entry
from .plan import some

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
#: Weights that are widened to float64 at once: 8 MiB.
_SLICE = 1 << 20
#: What PyTorch aligns its own memory to, in bytes.
_ALIGNMENT = 64


def source_model(folder: Path, dtype: torch.dtype) -> Any:
    """Load the model of a Hugging Face directory.

    Raises
    ------
    InvalidError
        The checkpoint lacks weights, which would be random numbers.
    """
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, output_loading_info=True
    )
    return _ready(model, info, str(folder))


def model_of(artifact: Artifact, source: Any, dtype: torch.dtype) -> Any:
    """Build the model that an artifact holds, with its weights decoded.

    Each weight is decoded at the moment it is put into its place. Which place that is, how experts are fused and which
    weights are tied is left to transformers, which does with these tensors what it does with those of the checkpoint.

    Parameters
    ----------
    artifact
        The artifact.
    source
        Class and config of the source model.
    dtype
        Dtype of the forward pass.

    Returns
    -------
    transformers.PreTrainedModel
        A model of its own, in evaluation mode.

    Raises
    ------
    InvalidError
        The artifact does not fill the model.
    CorruptError, OSError
        A tensor cannot be decoded.
    """
    cls, config = source
    failed: list[Exception] = []
    tensors = {name: _Decoded(artifact, name, failed) for name in artifact}
    try:
        model, info = cls.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    except Exception as error:
        # transformers reports what it could not convert, but not why.
        if failed:
            raise failed[0] from error
        raise
    if failed:
        raise failed[0]
    return _ready(model, info, str(artifact.path))


def packed_model_of(path: Path, dtype: torch.dtype, act: str) -> Any:
    """Load the model that an artifact holds, with its planes as they are stored.

    Parameters
    ----------
    path
        The artifact, which carries the model's config.
    dtype
        Dtype of the forward pass.
    act
        Arithmetic of the products; see :func:`tenpak.matmul`.

    Returns
    -------
    transformers.PreTrainedModel
        A model in evaluation mode.

    Raises
    ------
    InvalidError
        The artifact carries no config or does not fill the model.
    CorruptError, OSError
        A plane is damaged or cannot be read.
    """
    return from_pretrained(path, dtype=dtype, act=act).eval()


class _Decoded:
    """A tensor of an artifact that is decoded when it is sliced, as those of a safetensors file are read."""

    def __init__(self, artifact: Artifact, name: str, failed: list[Exception]) -> None:
        self._artifact, self._name, self._failed = artifact, name, failed

    def __getitem__(self, index: EllipsisType) -> torch.Tensor:
        try:
            return decode(self._artifact, self._name)[index]
        except Exception as error:
            self._failed.append(error)
            raise


def decode(artifact: Artifact, name: str) -> torch.Tensor:
    """Decode a tensor: floats as float32, others as they are stored."""
    entry = artifact[name]
    if entry.dtype not in _FLOATS:
        return torch.from_numpy(artifact.decode(name, dtype="source"))
    tensor = torch.empty(entry.shape, dtype=torch.float32)
    artifact.decode(name, out=tensor.numpy())
    return tensor


def _ready(model: Any, info: Mapping[str, Any], where: str) -> Any:
    """Check that every weight was found, and put all of them on addresses of one alignment."""
    for what in ("missing_keys", "mismatched_keys", "error_msgs"):
        found = sorted(map(str, info[what]))
        if found:
            raise InvalidError(
                f"{where} does not fill the model: {what.replace('_', ' ')} {some(found)}; "
                "what is missing would be random numbers"
            )
    # Products may be summed in another order on memory of another alignment, such as a mapped file's, and a model
    # would then differ from itself.
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()
    return model.eval()


def memory_bytes(model: Any) -> int:
    """Return the bytes of a model's parameters and buffers, shared ones counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def weight_bytes(artifact: Artifact) -> int:
    """Return the bytes of weights and header: all of an artifact but the files that it carries along.

    In a file they stand behind each other on multiples of 64 bytes; in a directory they are files of their own.
    """
    folder = Path(artifact.path)
    if not folder.is_dir():
        return artifact.file_bytes - sum(-(-len(content) // 64) * 64 for content in artifact.files.values())
    header = folder / "tenpak.json"
    files = [*folder.glob("*.safetensors"), *([header] if header.exists() else [])]
    return sum(file.stat().st_size for file in files)


def quantized(artifact: Artifact) -> list[Entry]:
    """Return the entries that are not stored as they were."""
    return [entry for entry in artifact.values() if entry.codec != "raw_v1"]


def nmse(artifact: Artifact, folder: Path) -> float | None:
    """Return squared error over squared weights, in float64, over all quantized tensors; None where there are none.

    Parameters
    ----------
    artifact
        The artifact.
    folder
        Directory of the checkpoint it was made from.
    """
    noise = signal = 0.0
    entries = quantized(artifact)
    for entry, source in zip(entries, _tensors(folder, [entry.name for entry in entries]), strict=True):
        weights, decoded = source.flatten(), decode(artifact, entry.name).flatten()
        for at in range(0, len(weights), _SLICE):
            w = weights[at : at + _SLICE].double().numpy()
            error = w - decoded[at : at + _SLICE].double().numpy()
            noise += float(np.dot(error, error))
            signal += float(np.dot(w, w))
    if not entries:
        return None
    return noise / signal if signal else 0.0


def _tensors(folder: Path, names: Sequence[str]) -> Iterator[torch.Tensor]:
    """Read tensors of a checkpoint one by one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    else:
        files = dict.fromkeys(names, "model.safetensors")
    for name in names:
        with safetensors.safe_open(folder / files[name], framework="pt") as file:
            yield file.get_tensor(name)
