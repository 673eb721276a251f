"""The linear layers of a model, under the names that their weights have in the checkpoint."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Linear:
    """A weight that multiplies, and the modules that multiply by it.

    Attributes
    ----------
    name
        Its name in the checkpoint.
    weight
        The parameter.
    modules
        The modules that have it: more than one where it is tied.
    rows, cols
        Outputs and inputs.
    transposed
        Whether it is kept as ``[in, out]``.
    """

    name: str
    weight: Any
    modules: tuple[Any, ...]
    rows: int
    cols: int
    transposed: bool


def linears(model: Any, checkpoint: Collection[str]) -> tuple[list[Linear], list[str]]:
    """Find the linear layers of a model.

    Parameters
    ----------
    model
        Any module; layers are ``torch.nn.Linear`` and transformers' ``Conv1D``.
    checkpoint
        Names of the tensors of its checkpoint.

    Returns
    -------
    list of Linear
        One for each weight, in the order of the modules. A weight that the checkpoint has under several names is
        there under each.
    list of str
        The others, each with the reason: the checkpoint has them under none of their names, or they are an embedding
        too, whose rows are looked up, so that what flows into the head says nothing of half of their use.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    users: dict[int, list[Any]] = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and id(module.weight) in names:
            users.setdefault(id(module.weight), []).append(module)
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    found, skipped = [], []
    for key, modules in users.items():
        weight = modules[0].weight
        transposed = isinstance(modules[0], Conv1D)
        rows, cols = weight.shape[::-1] if transposed else weight.shape
        if key in embedded:
            skipped.append(f"{names[key][0]} is an embedding too")
            continue
        here = [name for name in names[key] if name in checkpoint]
        found += [Linear(name, weight, tuple(modules), int(rows), int(cols), transposed) for name in here]
        if not here:
            skipped.append(f"{names[key][0]} is not in the checkpoint")
    return found, skipped
