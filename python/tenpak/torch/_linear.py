"""Linear layers on planes."""

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .._artifact import Artifact
from .._errors import InvalidError
from .._tenpak import DEFAULT_CODEC_IN_MEMORY
from . import _ops
from ._planes import Quantized, as_tensor, encode, is_graphics, planes_of, source_dtype
from ._weight import DecodedWeight

logger = logging.getLogger("tenpak")


class QuantizedLinear(Quantized, nn.Linear):
    """A linear layer ``y = x @ w.T + bias`` whose weights ``[out, in]`` are planes and are never decoded as a whole.

    An ``nn.Linear`` in the eyes of PEFT and transformers: gradients reach ``x`` and ``bias``, not the planes.
    Activations are float32, float16 or bfloat16 ``[..., in_features]``, the result has their dtype and is
    ``[..., out_features]``.
    ``.to(dtype)``, ``.half()`` and the like set the dtype of bias and :attr:`weight`; planes keep theirs.

    Parameters
    ----------
    in_features, out_features
        Size of the layer.
    bias
        Whether there is a bias, ``[out_features]``.
    codec
        Id of a codec; see :func:`tenpak.codecs`.
    act
        Arithmetic: ``"float32"``, ``"bfloat16"``, ``"float16"`` or ``"int8"``, see :func:`tenpak.matmul`; with None
        ``"bfloat16"`` for bfloat16 activations and ``"float32"`` for others.
    device, dtype
        Where planes live, and the dtype of the bias. ``"wgpu"`` and ``"wgpu:N"`` leave planes and activations on the
        CPU and have a graphics device multiply, see :func:`set_backend`.

    Raises
    ------
    InvalidError
        Another arithmetic or dtype.
    UnsupportedError
        There is no such codec.

    Notes
    -----
    A new layer has planes of zeros; :meth:`from_linear`, :meth:`from_artifact` and :meth:`from_planes` fill it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        codec: str = DEFAULT_CODEC_IN_MEMORY,
        act: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        backend = device if is_graphics(device) else "cpu"
        device = "cpu" if is_graphics(device) else device
        self._set_up(codec, out_features, in_features, act, dtype, device)
        self.set_backend(backend)
        #: Whether the source holds the weights as ``[in, out]``.
        self.transposed = False
        #: Why the codec is not the one that was asked for; None where it is.
        self.fallback: str | None = None
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=self.dtype)) if bias else None
        )

    @classmethod
    def from_linear(
        cls, layer: nn.Module, codec: str = DEFAULT_CODEC_IN_MEMORY, *, act: str | None = None, **options: Any
    ) -> "QuantizedLinear":
        """Encode the weights of a dense layer.

        Parameters
        ----------
        layer
            ``torch.nn.Linear`` or transformers' ``Conv1D``, whose ``[in, out]`` weights are transposed.
        codec, act
            As for the class.
        **options
            ``device``, where a graphics device shall multiply, and further arguments of a derived class.

        Returns
        -------
        QuantizedLinear
            On the layer's device, with its bias (the same parameter) and dtype.

        Raises
        ------
        InvalidError
            Another kind of layer, or weights whose scales leave the range of their stored type.
        NonfiniteError
            A weight is NaN or infinite.
        UnsupportedError
            There is no such codec.
        """
        weight = getattr(layer, "weight", None)
        transposed = type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")
        if not isinstance(weight, torch.Tensor) or not (isinstance(layer, nn.Linear) or transposed):
            raise InvalidError(f"cannot make a linear layer of {type(layer).__name__}, expected nn.Linear or Conv1D")
        matrix = weight.detach().T if transposed else weight.detach()
        encoded = encode(matrix, codec)
        bias = getattr(layer, "bias", None)
        planes = {name: plane.copy() for name, plane in encoded.planes.items()}
        dtype = weight.dtype if weight.dtype in _ops.DTYPES else torch.float32
        out = cls.from_planes(codec, encoded.rows, encoded.cols, planes, bias=bias, act=act, dtype=dtype, **options)
        out.transposed = transposed
        out.train(layer.training)
        return out.to(weight.device) if weight.device.type != "cpu" else out

    @classmethod
    def from_artifact(
        cls,
        artifact: Artifact,
        name: str,
        bias: Any = None,
        *,
        act: str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> "QuantizedLinear":
        """Take the planes of an artifact's tensor where they are: in its mapped file, without a copy.

        Parameters
        ----------
        artifact
            An open artifact.
        name
            Name of an encoded two-dimensional tensor.
        bias
            Tensor or array ``[out_features]``, or the name of a tensor of the artifact; None for no bias.
        act
            As for the class.
        dtype
            Dtype of bias and :attr:`weight`; default: the source's, where it is a 16- or 32-bit float.
        **options
            ``device``, where a graphics device shall multiply, and further arguments of a derived class.

        Returns
        -------
        QuantizedLinear
            On the CPU.

        Raises
        ------
        KeyError
            There is no such tensor.
        InvalidError
            The tensor is stored raw or is not a matrix.
        CorruptError
            A chunk does not have its checksum.
        """
        planes = planes_of(artifact, name)
        entry = artifact[name]
        if len(entry.shape) != 2:
            raise InvalidError(
                f"tensor {name!r} has shape {entry.shape}, expected a matrix; for experts take QuantizedStack"
            )
        kind = source_dtype(entry.dtype) if dtype is None else dtype
        if isinstance(bias, str):
            bias = torch.from_numpy(artifact.decode(bias)).to(kind)
        out = cls.from_planes(entry.codec, entry.rows, entry.cols, planes, bias=bias, act=act, dtype=kind, **options)
        out.transposed = entry.transposed
        return out

    @classmethod
    def from_planes(
        cls,
        codec: str,
        rows: int,
        cols: int,
        planes: Mapping[str, Any],
        *,
        bias: Any = None,
        act: str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> "QuantizedLinear":
        """Make a layer of planes, without a copy.

        Parameters
        ----------
        codec
            Id of the codec.
        rows, cols
            Outputs and inputs.
        planes
            Tensors or arrays by name, as :meth:`tenpak.Artifact.planes` gives them.
        bias
            Parameter, tensor or array ``[rows]``; a parameter is used as it is, anything else becomes a new one.
        act, dtype
            As for the class; ``dtype`` is by default the bias's, else torch's default.
        **options
            ``device``, where a graphics device shall multiply, and further arguments of a derived class.

        Returns
        -------
        QuantizedLinear
            On the device of the planes.

        Raises
        ------
        InvalidError
            Planes or bias do not fit codec and size.
        """
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(as_tensor(bias).clone(), requires_grad=False)
        if bias is not None and tuple(bias.shape) != (rows,):
            raise InvalidError(f"a bias of shape {tuple(bias.shape)} for {rows} outputs, expected ({rows},)")
        if dtype is None and bias is not None:
            dtype = bias.dtype
        backend = options.pop("device", "cpu")
        out = cls(cols, rows, bias=False, codec=codec, act=act, device="meta", dtype=dtype, **options)
        out._set_planes(planes)
        out.bias = bias
        out.set_backend(backend)
        return out

    @property
    def weight(self) -> DecodedWeight:  # type: ignore[override]
        """The weights ``[out_features, in_features]``; shape, dtype and device are free, each use decodes anew."""
        return self._decoded_weight((self.out_features, self.in_features))

    @weight.setter
    def weight(self, value: object) -> None:
        raise InvalidError(
            f"the weights of a quantized module ({self.codec}) cannot be set; put a dense one in its place"
        )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter to the module, but no dense weight: it would never be used."""
        if name == "weight":
            raise InvalidError(
                f"the weights of a quantized layer ({self.codec}) cannot be replaced by dense ones; "
                "put an nn.Linear in its place"
            )
        super().register_parameter(name, param)

    def reset_parameters(self) -> None:
        """Do nothing: codes are not drawn at random."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return ``input @ w.T + bias``.

        Parameters
        ----------
        input
            ``[..., in_features]``, float32, float16 or bfloat16.

        Returns
        -------
        torch.Tensor
            ``[..., out_features]`` in the dtype of ``input``.

        Raises
        ------
        InvalidError
            Another dtype or width, or planes on another device.
        UnsupportedError
            No backend for the device.
        """
        act = self.act or _ops.default_act(input)
        bias = self._parameters["bias"]
        if self.backend != "cpu":
            y = _ops.device_linear(input, *self.matrix, act, self.backend)
        elif _ops.is_direct(input):
            y = _ops.linear_direct(input, *self.matrix, act)
            if bias is not None and not (bias.requires_grad and torch.is_grad_enabled()):
                return y.add_(bias)
        else:
            y = _ops.linear(input, *self.matrix, act)
        return y if bias is None else y + bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Return size, codec and bits per weight."""
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        text += f", codec={self.codec}, {self.bits_per_weight:.3f} bits/weight"
        text += "" if self.act is None else f", act={self.act}"
        return text if self.backend == "cpu" else f"{text}, backend={self.backend}"


class QuantizedLinearInt4(QuantizedLinear):
    """A linear layer with 4-bit codes in groups of 128, 64 or 32 inputs, symmetric or with an integer zero point.

    A layer narrower than a group gets 8-bit codes with one scale per row instead; :attr:`fallback` says so, and a
    warning is given.

    Parameters
    ----------
    in_features, out_features, bias, act, device, dtype
        As for :class:`QuantizedLinear`.
    group
        Inputs that share a scale: 32, 64 or 128.
    symmetric
        Whether codes are centred on zero; else each group has a zero point.
    codec
        What group and symmetry would choose; given by the constructors that read planes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group: int = 128,
        symmetric: bool = True,
        codec: str | None = None,
        act: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        wanted = _int4_codec(group, symmetric)
        chosen = codec or _or_int8(wanted, group, in_features)
        super().__init__(in_features, out_features, bias, codec=chosen, act=act, device=device, dtype=dtype)
        if codec is None and chosen != wanted:
            self.fallback = f"{in_features} inputs are fewer than the group of {group} of {wanted}"

    @classmethod
    def from_linear(
        cls,
        layer: nn.Module,
        codec: str | None = None,
        *,
        act: str | None = None,
        group: int = 128,
        symmetric: bool = True,
        **options: Any,
    ) -> "QuantizedLinear":
        """Encode the weights of a dense layer; see :meth:`QuantizedLinear.from_linear` and the class.

        Parameters
        ----------
        layer, act, **options
            As for :meth:`QuantizedLinear.from_linear`.
        codec
            Id of a codec instead of what ``group`` and ``symmetric`` choose.
        group, symmetric
            As for the class.

        Returns
        -------
        QuantizedLinearInt4
            :attr:`fallback` says so where the codes have 8 bits.

        Raises
        ------
        InvalidError, NonfiniteError, UnsupportedError
            As for :meth:`QuantizedLinear.from_linear`, or another group.
        """
        wanted = codec or _int4_codec(group, symmetric)
        cols = int(getattr(layer, "in_features", 0) or getattr(layer, "nx", 0))
        chosen = wanted if codec else _or_int8(wanted, group, cols)
        out = super().from_linear(layer, chosen, act=act, **options)
        if chosen != wanted:
            out.fallback = f"{cols} inputs are fewer than the group of {group} of {wanted}"
        return out


class G8Linear(QuantizedLinear):
    """A linear layer with 4-bit codes in groups of 8 inputs, each with a float scale and offset.

    The cost is 8 bits per weight. The layer runs where a backend does: on the CPU in every build, on a GPU in builds
    with one for it; elsewhere ``forward`` says what to do.

    Parameters
    ----------
    in_features, out_features, bias, act, device, dtype
        As for :class:`QuantizedLinear`.
    codec
        Any codec with groups of 8.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        codec: str = "int4_g8_fp16_v1",
        act: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_g8(codec)
        super().__init__(in_features, out_features, bias, codec=codec, act=act, device=device, dtype=dtype)

    @classmethod
    def from_linear(
        cls, layer: nn.Module, codec: str = "int4_g8_fp16_v1", *, act: str | None = None, **options: Any
    ) -> "QuantizedLinear":
        """Encode the weights of a dense layer; see :meth:`QuantizedLinear.from_linear`."""
        _check_g8(codec)
        return super().from_linear(layer, codec, act=act, **options)


def _check_g8(codec: str) -> None:
    """Refuse codecs whose group is not 8."""
    from .. import codecs

    known = [listed["id"] for listed in codecs() if listed["group"] == 8]
    if codec not in known:
        raise InvalidError(f"codec {codec} does not have groups of 8, expected one of {', '.join(known)}")


def _int4_codec(group: int, symmetric: bool) -> str:
    """Return the id of the 4-bit codec with this group."""
    from .. import codecs

    levels = "signed" if symmetric else "zero point"
    found = {c["group"]: c["id"] for c in codecs() if c["bits"] == 4 and c["levels"] == levels}
    if group not in found:
        raise InvalidError(
            f"no 4-bit codec with {levels} levels has a group of {group}, expected one of {sorted(found)}"
        )
    return str(found[group])


def _or_int8(codec: str, group: int, cols: int) -> str:
    """Return the codec, or the one with a scale per row where rows are shorter than a group; says so."""
    if cols >= group:
        return codec
    text = f"a layer of {cols} inputs is narrower than the group of {group} of {codec} and gets int8_sym_v1 instead"
    logger.warning(text)
    warnings.warn(text, stacklevel=3)
    return "int8_sym_v1"
