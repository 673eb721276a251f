"""What the quantized modules have in common: planes as buffers, and what happens to them on their way."""

import functools
import json
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from .. import _tenpak
from .._arrays import Array
from .._artifact import Artifact
from .._encoded import Encoded
from .._errors import InvalidError
from ._ops import ACTS, DTYPES, Matrix
from ._weight import DecodedWeight

#: Planes whose memory may not be written: views of an artifact's file.
_mapped: WeakIdKeyDictionary = WeakIdKeyDictionary()
#: Where planes were moved to, so that modules that share them still do afterwards: version, device, planes.
_moved: WeakIdKeyDictionary = WeakIdKeyDictionary()

_PLANE_DTYPES = {"F16": torch.float16, "F32": torch.float32, "U8": torch.uint8}
#: The dtypes in which modules compute, by the dtype of a source; others compute in float32.
_COMPUTE = {"F16": torch.float16, "BF16": torch.bfloat16}
_STATE = "_extra_state"
#: Planes that operators know as addends: a codec has at most one of them.
_ADDENDS = ("offsets", "zero_points", "row_scales")


@functools.cache
def row_planes(codec: str, cols: int) -> dict[str, tuple[torch.dtype, int]]:
    """Return the planes of a codec in stored order: dtype and number of elements that one row of ``cols`` takes."""
    row = _tenpak.encode(np.zeros(4 * cols, np.uint8), "F32", 1, cols, codec, None, None)
    planes = {}
    for name, dtype, data in row.planes():
        kind = _PLANE_DTYPES[dtype]
        planes[name] = (kind, len(data) // kind.itemsize)
    return planes


def extra_planes(
    rows: int, cols: int, column_scales: bool, outliers: int
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return the planes that a matrix has behind its codec's, in stored order: dtype and shape."""
    planes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    if column_scales:
        planes["column_scales"] = torch.float32, (cols,)
    if outliers:
        planes["outlier_counts"] = torch.uint32, (rows,)
        planes["outlier_columns"] = torch.uint16 if cols <= 1 << 16 else torch.uint32, (outliers,)
        planes["outlier_values"] = torch.float16, (outliers,)
    return planes


def is_graphics(device: object) -> bool:
    """Return whether a device is one of :func:`tenpak.matmul`'s that PyTorch does not know."""
    return isinstance(device, str) and (device == "wgpu" or device.startswith("wgpu:"))


def source_dtype(name: str) -> torch.dtype:
    """Return the dtype in which a module computes whose source had the safetensors dtype ``name``."""
    return _COMPUTE.get(name, torch.float32)


def as_tensor(plane: Any) -> torch.Tensor:
    """Return a plane as a tensor of the same memory; memory that may not be written is remembered as such."""
    if isinstance(plane, torch.Tensor):
        return plane.detach()
    array = np.asarray(plane)
    if not array.flags.c_contiguous or not array.dtype.isnative:
        array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # nobody writes to it: see _mapped
        tensor = torch.from_numpy(array)
    mark_mapped(tensor)
    return tensor


def mark_mapped(tensor: torch.Tensor) -> None:
    """Remember that a tensor's memory may not be written."""
    _mapped[tensor] = True


def encode(weight: torch.Tensor, codec: str) -> Encoded:
    """Encode a weight of any float dtype of torch; its last dimension holds the groups."""
    dense = weight.detach().to("cpu").contiguous()
    if dense.dtype not in DTYPES:
        raise InvalidError(
            f"weights are {dense.dtype}, expected one of {', '.join(map(str, DTYPES))}; convert them with .float()"
        )
    cols = dense.shape[-1]
    rows = math.prod(dense.shape[:-1])
    memory = dense.reshape(-1).view(torch.uint8).numpy()
    return Encoded(_tenpak.encode(memory, DTYPES[dense.dtype], rows, cols, codec, None, None), tuple(dense.shape))


class Quantized(nn.Module):
    """A matrix, or a stack of matrices, whose weights are planes: base of the quantized modules.

    The planes are buffers named as in an artifact, ``codes``, ``scales`` and, where the codec has them, ``high_codes``
    and ``offsets``, ``zero_points`` or ``row_scales``, of shape ``[rows, elements of a row]``, and behind them what the
    matrix has beside: ``column_scales`` ``[cols]``, ``outlier_counts`` ``[rows]``, ``outlier_columns`` and
    ``outlier_values`` ``[outliers]``. Conversions between dtypes never touch them, devices do.
    """

    codec: str
    rows: int
    cols: int
    act: str | None
    codes: torch.Tensor
    scales: torch.Tensor

    def _set_up(
        self, codec: str, rows: int, cols: int, act: str | None, dtype: torch.dtype | None, device: Any
    ) -> None:
        """Check and set the attributes, and register planes of zeros."""
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in DTYPES:
            raise InvalidError(f"modules cannot compute in {dtype}, expected one of {', '.join(map(str, DTYPES))}")
        self.codec, self.rows, self.cols = codec, rows, cols
        self.set_act(act)
        #: What multiplies: ``"cpu"``, or ``"wgpu"`` and ``"wgpu:N"`` for a graphics device.
        self.backend = "cpu"
        self.dtype = dtype
        #: Dtype of the source, as safetensors names it.
        self.source = DTYPES[dtype]
        #: Whether state dicts say what the codec is; not where a config beside them does.
        self.describes_itself = True
        for name, (kind, width) in row_planes(codec, cols).items():
            self.register_buffer(name, torch.zeros((rows, width), dtype=kind, device=device))
        self._names = tuple(row_planes(codec, cols))
        self._addends = next((name for name in self._names if name in _ADDENDS), None)
        self._extra: tuple[str, ...] = ()

    def set_extra(self, column_scales: bool, outliers: int) -> None:
        """Have planes beside the codec's: column scales, so many outliers; their numbers are yet to come.

        Parameters
        ----------
        column_scales
            Whether columns have scales.
        outliers
            How many weights are outliers.
        """
        for name in self._extra:
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)
        device = self._plane("codes").device
        wanted = extra_planes(self.rows, self.cols, column_scales, outliers)
        for name, (kind, shape) in wanted.items():
            # A module that follows another leaves these to it too.
            self.register_buffer(name, torch.zeros(shape, dtype=kind, device=device), not self.is_follower)
        self._extra = tuple(wanted)
        self._names = (*row_planes(self.codec, self.cols), *self._extra)

    @property
    def extra(self) -> tuple[bool, int]:
        """Whether columns have scales, and how many weights are outliers."""
        buffers: dict[str, Any] = self._buffers
        outliers = buffers["outlier_values"].numel() if "outlier_values" in self._extra else 0
        return "column_scales" in self._extra, outliers

    def set_act(self, act: str | None) -> None:
        """Choose the arithmetic of products; see :func:`tenpak.torch.set_act`."""
        if act is not None and act not in ACTS:
            raise InvalidError(f"unknown arithmetic of activations {act!r}, expected None or one of {', '.join(ACTS)}")
        self.act = act

    def set_backend(self, backend: str) -> None:
        """Choose what multiplies; see :func:`tenpak.torch.set_backend`."""
        if backend != "cpu" and not is_graphics(backend):
            raise InvalidError(f"unknown backend {backend!r}, expected 'cpu', 'wgpu' or 'wgpu:N'")
        self.backend = backend

    @property
    def plane_names(self) -> tuple[str, ...]:
        """Names of the planes, in stored order."""
        return self._names

    @property
    def planes(self) -> dict[str, torch.Tensor]:
        """The planes by name, in stored order."""
        return {name: self._plane(name) for name in self._names}

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight on average, everything counted but a bias."""
        return 8 * sum(plane.nbytes for plane in self.planes.values()) / max(1, self.rows * self.cols)

    @property
    def matrix(self) -> Matrix:
        """The arguments by which operators know the matrix."""
        buffers: dict[str, Any] = self._buffers
        addends = None if self._addends is None else buffers[self._addends]
        high_codes = buffers.get("high_codes")
        extra = [buffers[name] for name in self._extra] if self._extra else []
        return buffers["codes"], buffers["scales"], addends, high_codes, extra, self.codec, self.rows, self.cols

    def decode(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the weights as a dense tensor ``[rows, cols]``.

        Parameters
        ----------
        dtype
            ``torch.float32``, ``float16``, ``bfloat16`` or ``float64``; default: the module's dtype.

        Returns
        -------
        torch.Tensor
            New memory on the planes' device.

        Raises
        ------
        InvalidError
            Weights cannot be ``dtype``.
        UnsupportedError
            The planes are on a device that this build cannot decode on.
        """
        return torch.ops.tenpak.dequantize(*self.matrix, self.dtype if dtype is None else dtype)  # type: ignore[no-any-return]

    def _decoded_weight(self, shape: tuple[int, ...]) -> DecodedWeight:
        """Return the weights as a tensor that is decoded on use."""
        return DecodedWeight(self.matrix, shape, self.dtype)

    def _plane(self, name: str) -> torch.Tensor:
        """Return a plane."""
        plane = self._buffers[name]
        assert plane is not None
        return plane

    def _set_planes(self, planes: Mapping[str, Any]) -> None:
        """Take planes from elsewhere, without a copy where they are tensors or arrays of the right dtype and shape."""
        self._fit_extra(planes)
        if set(planes) != set(self._names):
            raise InvalidError(
                f"planes {', '.join(planes) or 'none'} for codec {self.codec}, expected {', '.join(self._names)}"
            )
        for name in self._names:
            tensor, expected = as_tensor(planes[name]), self._plane(name)
            if tensor.dtype != expected.dtype or tensor.numel() != expected.numel():
                raise InvalidError(
                    f"plane {name} has dtype {tensor.dtype} and shape {tuple(tensor.shape)}, expected {expected.dtype} "
                    f"and {tuple(expected.shape)} for codec {self.codec} and {self.rows} x {self.cols} weights"
                )
            if tensor.shape != expected.shape or not tensor.is_contiguous():
                tensor = tensor.contiguous().view(expected.shape)
            self._buffers[name] = tensor

    def _fit_extra(self, planes: Mapping[str, Any], prefix: str = "") -> None:
        """Have the planes beside the codec's that ``planes`` has under ``prefix``."""
        values = planes.get(prefix + "outlier_values")
        outliers = 0 if values is None else int(np.prod(values.shape))
        wanted = prefix + "column_scales" in planes, outliers
        if wanted != self.extra:
            self.set_extra(*wanted)

    def share_planes(self, other: "Quantized") -> None:
        """Use the planes of another module of the same codec and size from now on, without a copy.

        Parameters
        ----------
        other
            A module with the same codec, rows and columns.

        Raises
        ------
        InvalidError
            Codec or size differ.
        """
        mine, theirs = (self.codec, self.rows, self.cols), (other.codec, other.rows, other.cols)
        if mine != theirs:
            raise InvalidError(
                f"a module of {_described(*theirs)} cannot lend its planes to one of {_described(*mine)}"
            )
        if self.extra != other.extra:
            self.set_extra(*other.extra)
        for name in self._names:
            self._buffers[name] = other._plane(name)

    def follow(self, owner: "Quantized") -> None:
        """Use the planes of another module, and leave it to that one to save and load them."""
        self.share_planes(owner)
        self._non_persistent_buffers_set.update(self._names)

    @property
    def is_follower(self) -> bool:
        """Whether another module saves and loads the planes."""
        return "codes" in self._non_persistent_buffers_set

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Move planes, convert the bias: what ``.to()``, ``.half()``, ``.cuda()``, ``to_empty()`` … come down to."""
        planes = {id(plane) for plane in self.planes.values()}
        probe = fn(torch.empty(0, dtype=self.dtype, device=self._plane("codes").device))
        if probe.dtype in DTYPES:
            self.dtype = probe.dtype
        out = super()._apply(lambda tensor: _moved_plane(fn, tensor) if id(tensor) in planes else fn(tensor), recurse)
        return out

    def _description(self) -> dict[str, Any]:
        """Return what a state dict must agree on."""
        return {"codec": self.codec, "rows": self.rows, "cols": self.cols}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Say which codec the planes are in: two codecs may have planes of the same shapes."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None and prefix[:-1] in metadata:
            metadata[prefix[:-1]]["tenpak"] = self._description()
        if self.describes_itself:
            text = json.dumps(self._description()).encode()
            destination[prefix + _STATE] = torch.tensor(list(text), dtype=torch.uint8)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Refuse planes of another codec or size; never write into a mapped file."""
        saved = state_dict.pop(prefix + _STATE, None)
        found = local_metadata.get("tenpak") if saved is None else json.loads(bytes(saved.tolist()))
        where = prefix[:-1] or type(self).__name__
        if found is not None and found != self._description():
            error_msgs.append(
                f"{where} holds {_described(**self._description())}, the state dict {_described(**found)}; "
                "build the module with the codec and size of the state dict"
            )
            return
        if prefix + "weight" in state_dict and prefix + "codes" not in state_dict:
            error_msgs.append(
                f"{where} is quantized ({self.codec}), the state dict has dense weights '{prefix}weight'; load them "
                "into a dense module and quantize that"
            )
            return
        if prefix + "codes" in state_dict:
            self._fit_extra(state_dict, prefix)
        wrong = [
            f"plane {prefix}{name} has dtype {plane.dtype} and shape {tuple(plane.shape)}, expected {own.dtype} and "
            f"{tuple(own.shape)} for codec {self.codec}; build the module with the codec of the state dict"
            for name, own in self.planes.items()
            if (plane := state_dict.get(prefix + name)) is not None
            and (plane.dtype != own.dtype or plane.shape != own.shape)
        ]
        error_msgs.extend(wrong)
        if wrong:
            return
        for name, own in self.planes.items():
            if own in _mapped and prefix + name in state_dict:
                self._buffers[name] = torch.empty_like(own)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _described(codec: str, rows: int, cols: int) -> str:
    """Name a codec and a size in an error."""
    return f"{rows} x {cols} weights in codec {codec}"


def _moved_plane(fn: Callable[[torch.Tensor], torch.Tensor], plane: torch.Tensor) -> torch.Tensor:
    """Apply to a plane what ``fn`` does about devices and memory, and nothing that it does about dtypes."""
    probe = plane.view(torch.uint8)
    before = _moved.get(plane)
    moved = fn(probe)
    if moved.dtype is not torch.uint8:
        moved = probe.to(moved.device)
    if moved is probe or (moved.device == plane.device and moved.device.type != "meta" and _same_memory(moved, probe)):
        return plane
    version = 0 if plane.is_inference() else plane._version
    if before is not None and before[:2] == (version, moved.device):
        earlier = before[2]()
        if earlier is not None:
            return earlier
    out = moved.view(plane.dtype)
    _moved[plane] = (version, moved.device, TensorWeakRef(out))
    return out


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether two tensors begin at the same address."""
    return a.data_ptr() == b.data_ptr()


def planes_of(artifact: Artifact, name: str) -> dict[str, Array]:
    """Return the planes of an encoded tensor of an artifact; raw tensors are refused."""
    entry = artifact[name]
    if "codes" not in (planes := artifact.planes(name)):
        raise InvalidError(
            f"tensor {name!r} is stored raw ({entry.codec}, {entry.dtype}), expected an encoded one; "
            "decode it with Artifact.decode and load it into a dense layer"
        )
    return planes
