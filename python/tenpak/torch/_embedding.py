"""Embeddings on planes: rows are decoded when they are looked up."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .._artifact import Artifact
from .._errors import InvalidError
from . import _ops
from ._linear import QuantizedLinear
from ._planes import Quantized, encode, planes_of, source_dtype
from ._weight import DecodedWeight


class QuantizedEmbedding(Quantized, nn.Embedding):
    """An embedding whose table ``[num_embeddings, embedding_dim]`` is planes; a look-up decodes the rows it needs.

    An ``nn.Embedding`` in the eyes of transformers. The table is constant. Results have the module's dtype, which
    ``.to(dtype)`` sets; planes keep theirs.

    Parameters
    ----------
    num_embeddings, embedding_dim
        Size of the table.
    padding_idx
        Row that stands for padding; kept for those who ask, since no row has a gradient.
    codec
        Id of a codec; see :func:`tenpak.codecs`.
    device, dtype
        Where planes live, and the dtype of results: float32, float16, bfloat16 or float64.

    Raises
    ------
    InvalidError
        Another dtype, or a ``padding_idx`` outside the table.
    UnsupportedError
        There is no such codec.

    Notes
    -----
    A new table has planes of zeros; :meth:`from_embedding`, :meth:`from_artifact` and :meth:`from_planes` fill it.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        codec: str = "int8_sym_v1",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise InvalidError(f"padding_idx {padding_idx} is outside a table of {num_embeddings} rows")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx if padding_idx is None or padding_idx >= 0 else padding_idx + num_embeddings
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self._set_up(codec, num_embeddings, embedding_dim, None, dtype, device)

    @classmethod
    def from_embedding(cls, layer: nn.Embedding, codec: str = "int8_sym_v1") -> "QuantizedEmbedding":
        """Encode the table of a dense embedding.

        Parameters
        ----------
        layer
            ``torch.nn.Embedding`` without ``max_norm``, which would change rows as they are looked up; or an object of
            a class derived from it whose ``forward`` uses that of ``nn.Embedding``: then so is what is returned.
        codec
            Id of a codec.

        Returns
        -------
        QuantizedEmbedding
            On the layer's device, with its dtype.

        Raises
        ------
        InvalidError
            The layer has ``max_norm`` or looks rows up by itself, or scales leave the range of their stored type.
        NonfiniteError
            A weight is NaN or infinite.
        UnsupportedError
            There is no such codec.
        """
        hindrance = hindrance_of(layer)
        if hindrance is not None:
            raise InvalidError(hindrance)
        encoded = encode(layer.weight, codec)
        planes = {name: plane.copy() for name, plane in encoded.planes.items()}
        dtype = layer.weight.dtype if layer.weight.dtype in _ops.DTYPES else torch.float32
        out = beside(layer, cls(encoded.rows, encoded.cols, layer.padding_idx, codec=codec, device="meta", dtype=dtype))
        out._set_planes(planes)
        out.train(layer.training)
        return out.to(layer.weight.device) if layer.weight.device.type != "cpu" else out

    @classmethod
    def from_artifact(
        cls, artifact: Artifact, name: str, *, padding_idx: int | None = None, dtype: torch.dtype | None = None
    ) -> "QuantizedEmbedding":
        """Take the planes of an artifact's tensor where they are: in its mapped file, without a copy.

        Parameters
        ----------
        artifact
            An open artifact.
        name
            Name of an encoded two-dimensional tensor that is not stored transposed.
        padding_idx
            As for the class.
        dtype
            Dtype of results; default: the source's, where it is a 16- or 32-bit float.

        Returns
        -------
        QuantizedEmbedding
            On the CPU.

        Raises
        ------
        KeyError
            There is no such tensor.
        InvalidError
            The tensor is stored raw or transposed, or is not a matrix.
        CorruptError
            A chunk does not have its checksum.
        """
        planes = planes_of(artifact, name)
        entry = artifact[name]
        if len(entry.shape) != 2 or entry.transposed:
            raise InvalidError(
                f"tensor {name!r} of shape {entry.shape} is not a table whose rows are stored one by one"
            )
        kind = source_dtype(entry.dtype) if dtype is None else dtype
        return cls.from_planes(entry.codec, entry.rows, entry.cols, planes, padding_idx=padding_idx, dtype=kind)

    @classmethod
    def from_planes(
        cls,
        codec: str,
        rows: int,
        cols: int,
        planes: Mapping[str, Any],
        *,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> "QuantizedEmbedding":
        """Make an embedding of planes, without a copy; see :meth:`QuantizedLinear.from_planes`.

        Parameters
        ----------
        codec
            Id of the codec.
        rows, cols
            Size of the table.
        planes
            Tensors or arrays by name.
        padding_idx, dtype
            As for the class.

        Returns
        -------
        QuantizedEmbedding
            On the device of the planes.

        Raises
        ------
        InvalidError
            Planes do not fit codec and size.
        """
        out = cls(rows, cols, padding_idx, codec=codec, device="meta", dtype=dtype)
        out._set_planes(planes)
        return out

    def tied_linear(self, bias: Any = None, *, act: str | None = None) -> QuantizedLinear:
        """Return an output head ``[..., embedding_dim]`` to ``[..., num_embeddings]`` on the same planes.

        Parameters
        ----------
        bias
            As for :meth:`QuantizedLinear.from_planes`.
        act
            As for :class:`QuantizedLinear`.

        Returns
        -------
        QuantizedLinear
            Shares memory with this table, also after both are moved to another device as parts of one model.
        """
        head = QuantizedLinear.from_planes(
            self.codec, self.rows, self.cols, self.planes, bias=bias, act=act, dtype=self.dtype
        )
        head.share_planes(self)
        return head

    @property
    def weight(self) -> DecodedWeight:  # type: ignore[override]
        """The table ``[num_embeddings, embedding_dim]``; shape, dtype and device are free, each use decodes anew."""
        return self._decoded_weight((self.num_embeddings, self.embedding_dim))

    @weight.setter
    def weight(self, value: object) -> None:
        raise InvalidError(
            f"the weights of a quantized module ({self.codec}) cannot be set; put a dense one in its place"
        )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Add a parameter to the module, but no dense weight: it would never be used."""
        if name == "weight":
            raise InvalidError(
                f"the table of a quantized embedding ({self.codec}) cannot be replaced by a dense one; "
                "put an nn.Embedding in its place"
            )
        super().register_parameter(name, param)

    def reset_parameters(self) -> None:
        """Do nothing: codes are not drawn at random."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the rows ``input``.

        Parameters
        ----------
        input
            Ids of any shape, int64 or int32.

        Returns
        -------
        torch.Tensor
            ``[..., embedding_dim]`` in the module's dtype.

        Raises
        ------
        InvalidError
            An id outside the table, or another dtype.
        UnsupportedError
            No backend for the device.
        """
        look_up = _ops.embedding_direct if _ops.is_direct(input) else _ops.embedding
        rows: torch.Tensor = look_up(input, *self.matrix, self.dtype)
        return rows

    def extra_repr(self) -> str:
        """Return size, codec and bits per weight."""
        text = f"{self.num_embeddings}, {self.embedding_dim}"
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx}"
        return f"{text}, codec={self.codec}, {self.bits_per_weight:.3f} bits/weight"


def hindrance_of(layer: nn.Embedding) -> str | None:
    """Return why an embedding has no quantized form, or None where it has one."""
    forward = type(layer).forward
    if layer.max_norm is not None:
        return f"an embedding with max_norm={layer.max_norm} changes its rows, which codes do not allow"
    if forward is not nn.Embedding.forward and "super" not in forward.__code__.co_names:
        return f"a {type(layer).__name__} looks rows up by itself, expected it to use nn.Embedding.forward"
    return None


def beside(layer: nn.Embedding, table: QuantizedEmbedding) -> QuantizedEmbedding:
    """Return a table that does to rows what ``layer`` does: scale them, shift ids."""
    if type(layer).forward is nn.Embedding.forward:
        return table
    out: QuantizedEmbedding = _made(type(layer))
    out.__dict__.update(layer.__dict__ | table.__dict__)
    out._parameters = {name: param for name, param in layer._parameters.items() if name != "weight"}
    out._buffers = {**layer._buffers, **table._buffers}
    out._modules = dict(layer._modules)
    out._non_persistent_buffers_set = set(layer._non_persistent_buffers_set)
    return out


@functools.cache
def _derived(kind: Any) -> Any:
    """Return the class whose ``forward`` is that of ``kind`` and whose rows come from planes."""

    def reduce(self: Any, protocol: Any) -> Any:
        return _made, (kind,), self.__dict__

    members = {"__reduce_ex__": reduce, "__doc__": f"A :class:`{kind.__name__}` whose rows are decoded from planes."}
    return type(f"Quantized{kind.__name__}", (kind, QuantizedEmbedding), members)


def _made(kind: Any) -> Any:
    """Return an empty object of a derived class; pickles call it."""
    derived = _derived(kind)
    return derived.__new__(derived)
