"""The operators ``tenpak::kv_append``, ``kv_attend`` and ``kv_recall`` of PyTorch: quantized keys and values.

A cache is eight plain tensors. Its blocks of 32 tokens lie on pages of a pool, all heads of a block on one; the format
is that of ``src/attention/``:

- ``key_codes`` and ``value_codes``, int32 ``[pages, heads, 32, words]``: codes of 4 or 8 bits, low bits first;
- ``key_params``, int32 ``[pages, heads, channels]``, and ``value_params``, int32 ``[pages, heads, 32, groups]``: scale
  and offset, two float16 in a word;
- ``key_tail`` and ``value_tail``, float16 ``[sequences, 32, heads, channels]``: tokens after the last whole block;
- ``pages``, int32 ``[sequences, columns]``: the page of each block, and ``lengths``, int32 ``[sequences]``: tokens.

On the CPU the code is that of ``src/attention/``, on CUDA that of ``cuda/append.cu``, ``attend.cu`` and ``recall.cu``,
launched on PyTorch's memory and current stream without waiting for anything, so that CUDA graphs record it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .. import _tenpak
from .._errors import InvalidError
from . import _cuda
from ._ops import DTYPES, _library, _refuse_devices, _tags

#: Tokens of a block.
BLOCK = 32
#: Channels that share the scale and the offset of a token's values.
GROUP = 32

_PLANES = "key_codes key_params value_codes value_params key_tail value_tail".split()
_READ = ", ".join(f"Tensor {name}" for name in (*_PLANES, "pages", "lengths")) + ", int key_bits, int value_bits"
_WRITTEN = (
    ", ".join(f"Tensor({mark}!) {name}" for mark, name in zip("abcdef", _PLANES, strict=True))
    + ", Tensor pages, Tensor lengths, int key_bits, int value_bits"
)
_library.define(f"kv_append(Tensor keys, Tensor values, {_WRITTEN}) -> ()", tags=_tags)
_library.define(
    f"kv_attend(Tensor q, {_READ}, Tensor? mask, float scale, bool causal, SymInt longest) -> Tensor", tags=_tags
)
_library.define(f"kv_recall({_READ}, SymInt tokens, ScalarType dtype) -> (Tensor, Tensor)", tags=_tags)


class Cache(NamedTuple):
    """A cache as operators take it."""

    key_codes: torch.Tensor
    key_params: torch.Tensor
    value_codes: torch.Tensor
    value_params: torch.Tensor
    key_tail: torch.Tensor
    value_tail: torch.Tensor
    pages: torch.Tensor
    lengths: torch.Tensor
    key_bits: int
    value_bits: int

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The parts that are tensors."""
        return (
            self.key_codes, self.key_params, self.value_codes, self.value_params, self.key_tail, self.value_tail,
            self.pages, self.lengths,
        )  # fmt: skip

    @property
    def format(self) -> tuple[int, int, int, int]:
        """Heads, channels, bits of keys and of values."""
        return (self.key_params.shape[1], self.key_params.shape[2], self.key_bits, self.value_bits)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, room for tokens to come included."""
        return sum(part.nbytes for part in self.tensors)


def shapes(
    sequences: int, pages: int, columns: int, heads: int, channels: int, bits: tuple[int, int]
) -> Iterator[tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of each tensor of a cache."""
    for width, params in zip(bits, ((channels,), (BLOCK, -(-channels // GROUP))), strict=True):
        yield (pages, heads, BLOCK, -(-channels * width // 32)), torch.int32
        yield (pages, heads, *params), torch.int32
    for _ in range(2):
        yield (sequences, BLOCK, heads, channels), torch.float16
    yield (sequences, columns), torch.int32
    yield (sequences,), torch.int32


def _places(cache: Cache, first: torch.Tensor) -> list[tuple[int, int]]:
    """Return address and bytes of each part, having checked what stands there and that it is where ``first`` is."""
    parts = cache.tensors
    if any(part.device != first.device for part in parts):
        _refuse_devices(first, parts)
    pages, heads, channels = cache.key_params.shape
    wanted = shapes(
        cache.lengths.shape[0], pages, cache.pages.shape[-1], heads, channels, (cache.key_bits, cache.value_bits)
    )
    for name, part, (shape, dtype) in zip(Cache._fields, parts, wanted, strict=False):
        if tuple(part.shape) != shape or part.dtype is not dtype or not part.is_contiguous():
            raise InvalidError(
                f"{name} of a cache is {part.dtype} of shape {tuple(part.shape)} and strides {part.stride()}, expected "
                f"contiguous {dtype} of shape {shape}"
            )
    if channels % 2:
        raise InvalidError(f"heads of {channels} channels, expected an even number")
    return [(part.data_ptr(), part.nbytes) for part in parts]


def _name(x: torch.Tensor, what: str) -> str:
    """Return the extension module's name for the dtype of numbers."""
    name = DTYPES.get(x.dtype)
    if name is None or name == "F64":
        raise InvalidError(
            f"{what} are {x.dtype}, expected torch.float32, torch.float16 or torch.bfloat16; convert them with .to()"
        )
    return name


def _check_tokens(keys: torch.Tensor, values: torch.Tensor, cache: Cache) -> str:
    """Refuse keys and values that do not fit a cache; return the name of their dtype."""
    heads, channels = cache.format[:2]
    shape = (cache.lengths.shape[0], heads, keys.shape[2] if keys.dim() == 4 else 0, channels)
    if tuple(keys.shape) != shape or values.shape != keys.shape or values.dtype is not keys.dtype:
        raise InvalidError(
            f"keys of shape {tuple(keys.shape)} and {keys.dtype}, values of {tuple(values.shape)} and {values.dtype}, "
            f"expected both of one dtype and [{shape[0]}, {heads}, tokens, {channels}]"
        )
    return _name(keys, "keys and values")


def _check_queries(q: torch.Tensor, mask: torch.Tensor | None, cache: Cache) -> str:
    """Refuse queries and masks that do not fit a cache; return the name of the queries' dtype."""
    sequences, (heads, channels) = cache.lengths.shape[0], cache.format[:2]
    if q.dim() != 4 or q.shape[0] != sequences or q.shape[1] % heads or not q.shape[1] or q.shape[3] != channels:
        raise InvalidError(
            f"queries of shape {tuple(q.shape)}, expected [{sequences}, a multiple of {heads}, tokens, {channels}]"
        )
    if mask is not None and (
        mask.dtype is not torch.bool or mask.dim() != 3 or mask.shape[:2] != (sequences, q.shape[2])
    ):
        raise InvalidError(
            f"a mask of {mask.dtype} and shape {tuple(mask.shape)}, expected torch.bool and "
            f"[{sequences}, {q.shape[2]}, tokens]"
        )
    return _name(q, "queries")


def _append(keys: torch.Tensor, values: torch.Tensor, *of: Any) -> None:
    """Add tokens, ``[sequences, heads, tokens, channels]``, behind ``lengths``, which stay as they are."""
    cache = Cache(*of)
    name = _check_tokens(keys, values, cache)
    if not keys.is_cpu:
        _refuse_devices(keys, (keys,))
    places = _places(cache, keys)
    keys, values = keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous()
    a, b = (keys.data_ptr(), keys.nbytes), (values.data_ptr(), values.nbytes)
    _tenpak.kv_append(cache.format, places, a, b, name, keys.shape[1])


def _attend(q: torch.Tensor, *of: Any) -> torch.Tensor:
    """Return attention of queries ``[sequences, heads, m, channels]`` as ``[sequences, m, heads, channels]``."""
    cache, (mask, scale, causal, _) = Cache(*of[:10]), of[10:]
    name = _check_queries(q, mask, cache)
    if not q.is_cpu:
        _refuse_devices(q, (q,))
    places = _places(cache, q)
    q = q.transpose(1, 2).contiguous()
    out = torch.empty_like(q)
    own = None
    if mask is not None:
        mask = mask.contiguous()
        own = (mask.data_ptr(), mask.nbytes)
    a, b = (q.data_ptr(), q.nbytes), (out.data_ptr(), out.nbytes)
    _tenpak.kv_attend(cache.format, places, a, own, b, name, q.shape[1], scale, causal)
    return out


def _recall(*of: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values of the first tokens, ``[sequences, heads, tokens, channels]``, zeros beyond lengths."""
    cache, (tokens, dtype) = Cache(*of[:10]), of[10:]
    if not cache.lengths.is_cpu:
        _refuse_devices(cache.lengths, (cache.lengths,))
    places = _places(cache, cache.lengths)
    heads, channels = cache.format[:2]
    keys = torch.empty((cache.lengths.shape[0], tokens, heads, channels), dtype=dtype)
    values = torch.empty_like(keys)
    name = _name(keys, "keys and values")
    a, b = (keys.data_ptr(), keys.nbytes), (values.data_ptr(), values.nbytes)
    _tenpak.kv_recall(cache.format, places, tokens, name, a, b)
    return keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous()


def _spread(x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, tuple[int, int, int]]]:
    """Return numbers whose channels stand side by side, their address and their other strides."""
    if x.stride(3) != 1:
        x = x.contiguous()
    return x, (x.data_ptr(), (x.stride(0), x.stride(1), x.stride(2)))


def _append_cuda(keys: torch.Tensor, values: torch.Tensor, *of: Any) -> None:
    """Add tokens on a device: a launch, and nobody waits to know whether they are finite."""
    cache = Cache(*of)
    name = _check_tokens(keys, values, cache)
    places = _places(cache, keys)
    (keys, a), (values, b) = _spread(keys), _spread(values)
    with _cuda._current(keys):
        on = _cuda.device(keys.device.index)
        _tenpak.cuda_kv_append(on, cache.format, places, a, b, name, keys.shape[2], _cuda._stream(keys))


def _attend_cuda(q: torch.Tensor, *of: Any) -> torch.Tensor:
    """Attend on a device."""
    cache, (mask, scale, causal, longest) = Cache(*of[:10]), of[10:]
    name = _check_queries(q, mask, cache)
    places = _places(cache, q)
    sequences, heads, m, channels = q.shape
    out = torch.empty((sequences, m, heads, channels), dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    q, numbers = _spread(q)
    own = (0, (0, 0))
    if mask is not None:
        if mask.stride(2) != 1:
            mask = mask.contiguous()
        own = (mask.data_ptr(), (mask.stride(0), mask.stride(1)))
    sizes = (sequences, m, heads // cache.format[0], longest)
    with _cuda._current(q):
        on = _cuda.device(q.device.index)
        size = _tenpak.cuda_kv_attend_bytes(on, cache.format, sizes, name)
        workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
        _tenpak.cuda_kv_attend(
            on, cache.format, places, sizes, numbers, own, name, scale, causal, workspace.data_ptr(), out.data_ptr(),
            _cuda._stream(q),
        )  # fmt: skip
    return out


def _recall_cuda(*of: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Make numbers of a cache on a device."""
    cache, (tokens, dtype) = Cache(*of[:10]), of[10:]
    first = cache.lengths
    places = _places(cache, first)
    heads, channels = cache.format[:2]
    keys = torch.empty((first.shape[0], heads, tokens, channels), dtype=dtype, device=first.device)
    values = torch.empty_like(keys)
    name = _name(keys, "keys and values")
    with _cuda._current(first):
        on = _cuda.device(first.device.index)
        _tenpak.cuda_kv_recall(
            on, cache.format, places, tokens, name, keys.data_ptr(), values.data_ptr(), _cuda._stream(first)
        )
    return keys, values


def _append_fake(keys: torch.Tensor, values: torch.Tensor, *of: Any) -> None:
    """Check what :func:`_append` checks of shapes."""
    _check_tokens(keys, values, Cache(*of))


def _attend_fake(q: torch.Tensor, *of: Any) -> torch.Tensor:
    """Return what :func:`_attend` gives, without numbers."""
    _check_queries(q, of[10], Cache(*of[:10]))
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3]))


def _recall_fake(*of: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what :func:`_recall` gives, without numbers."""
    cache, (tokens, dtype) = Cache(*of[:10]), of[10:]
    heads, channels = cache.format[:2]
    keys = cache.lengths.new_empty((cache.lengths.shape[0], heads, tokens, channels), dtype=dtype)
    return keys, torch.empty_like(keys)


for _operator, _impl, _on_device, _fake in (
    ("kv_append", _append, _append_cuda, _append_fake),
    ("kv_attend", _attend, _attend_cuda, _attend_fake),
    ("kv_recall", _recall, _recall_cuda, _recall_fake),
):
    _library.impl(_operator, _impl, "CompositeExplicitAutograd")
    _library.impl(_operator, _on_device, "CUDA")
    torch.library.register_fake(f"tenpak::{_operator}", _fake, lib=_library)

kv_append = torch.ops.tenpak.kv_append.default
kv_attend = torch.ops.tenpak.kv_attend.default
kv_recall = torch.ops.tenpak.kv_recall.default
