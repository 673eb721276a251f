"""Sums over what flows through linear layers, in float64, gathered by hooks while the model runs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch

from .._errors import InvalidError
from .linears import Linear

Array = npt.NDArray[Any]
#: Numbers that are widened to float64 at once: 32 MiB.
_SLICE = 1 << 22


@dataclass(frozen=True)
class Kind:
    """A sum that is kept per linear layer, and what becomes of it.

    Attributes
    ----------
    name
        Behind the weight's name, in the file.
    dtype
        Of the statistic: ``F32``, ``F64`` or ``I64``.
    shape
        Of sum and statistic.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


def kinds(linear: Linear, full: bool, fisher: bool) -> list[Kind]:
    """List what is kept of a layer, statistics of 8 bytes first."""
    found = [Kind("tokens", "I64", ())]
    if fisher:
        found.append(Kind("fisher", "F64", ()))
    found += [Kind("mean_abs", "F32", (linear.cols,)), Kind("mean_sq", "F32", (linear.cols,))]
    if full:
        found.append(Kind("second_moment", "F32", (linear.cols, linear.cols)))
    if fisher:
        found += [Kind("fisher_rows", "F32", (linear.rows,)), Kind("fisher_cols", "F32", (linear.cols,))]
    return found


class Moments:
    """The sums of some layers.

    Attributes
    ----------
    sums
        Float64 tensors by weight name and by kind.
    """

    def __init__(self, layers: Sequence[Linear], full: bool, fisher: bool) -> None:
        """Begin with zeros."""
        self._layers, self._full, self._fisher = layers, full, fisher
        self.sums: dict[str, dict[str, torch.Tensor]] = {
            layer.name: {kind.name: torch.zeros(kind.shape, dtype=torch.float64) for kind in kinds(layer, full, fisher)}
            for layer in layers
        }
        self._product: tuple[torch.Tensor, int, Mapping[str, torch.Tensor]] | None = None

    def attach(self) -> Iterator[Any]:
        """Attach hooks to the layers, and yield what takes each away again."""
        for layer in self._layers:
            for module in layer.modules:
                yield module.register_forward_pre_hook(_bound(self._see, layer), with_kwargs=True)
            if self._fisher:
                layer.weight.requires_grad_(True)
                yield layer.weight.register_post_accumulate_grad_hook(_bound_grad(self._see_gradient, layer))

    def _see(self, layer: Linear, x: torch.Tensor) -> None:
        """Add the inputs of a layer, ``[..., cols]``."""
        # Layers that share an input, such as the three projections of attention, share the sums too.
        if self._product is None or self._product[0] is not x or self._product[1] != x._version:
            with torch.no_grad():
                self._product = (x, x._version, self._of(layer, x.detach()))
        for kind, value in self._product[2].items():
            self.sums[layer.name][kind] += value

    def _of(self, layer: Linear, x: torch.Tensor) -> Mapping[str, torch.Tensor]:
        rows = x.reshape(-1, layer.cols)
        new = {
            "tokens": torch.tensor(float(len(rows)), dtype=torch.float64),
            "mean_abs": torch.zeros(layer.cols, dtype=torch.float64),
            "mean_sq": torch.zeros(layer.cols, dtype=torch.float64),
        }
        if self._full:
            new["second_moment"] = torch.zeros(layer.cols, layer.cols, dtype=torch.float64)
        step = max(1, _SLICE // layer.cols)
        for at in range(0, len(rows), step):
            wide = rows[at : at + step].double()
            new["mean_abs"] += wide.abs().sum(0)
            new["mean_sq"] += wide.square().sum(0)
            if self._full:
                new["second_moment"] += wide.T @ wide
        if not bool(torch.isfinite(new["mean_sq"]).all()):
            raise InvalidError(f"the inputs of {layer.name} are not finite; the model overflows on this text")
        return new

    def forget(self) -> None:
        """Let go of the last input: after a forward pass nothing shares it any more."""
        self._product = None

    def _see_gradient(self, layer: Linear, gradient: torch.Tensor) -> None:
        """Add the squared gradient of a window."""
        sums = self.sums[layer.name]
        gradient = gradient.T if layer.transposed else gradient
        step = max(1, _SLICE // layer.cols)
        for at in range(0, layer.rows, step):
            squares = gradient[at : at + step].double().square_()
            by_row = squares.sum(1)
            sums["fisher_rows"][at : at + step] += by_row
            sums["fisher_cols"] += squares.sum(0)
            sums["fisher"] += by_row.sum()

    def statistics(self, layer: Linear, scored: int) -> Iterator[tuple[Kind, Array]]:
        """Turn the sums of a layer into what the file holds.

        Parameters
        ----------
        layer
            The layer.
        scored
            Tokens that gradients were of.
        """
        sums = self.sums[layer.name]
        tokens = max(1.0, float(sums["tokens"]))
        for kind in kinds(layer, self._full, self._fisher):
            if kind.name == "tokens":
                yield kind, sums["tokens"].to(torch.int64).numpy()
                continue
            value = sums[kind.name] / (float(scored) if kind.name.startswith("fisher") else tokens)
            if kind.name == "second_moment":
                value = (value + value.T) / 2  # products of blocks may round the two halves otherwise
            yield kind, (value.float() if kind.dtype == "F32" else value).numpy().astype(_NUMPY[kind.dtype])


_NUMPY = {"F32": "<f4", "F64": "<f8", "I64": "<i8"}


def _bound(see: Any, layer: Linear) -> Any:
    return lambda module, inputs, named: see(layer, inputs[0] if inputs else named["input"])


def _bound_grad(see: Any, layer: Linear) -> Any:
    def hook(parameter: Any) -> None:
        see(layer, parameter.grad)
        parameter.grad = None

    return hook
