"""A cache of quantized keys and values for models of transformers, and attention that reads it as it is.

>>> from tenpak.torch import QuantizedCache
>>> cache = QuantizedCache(model.config, bits=4)                    # doctest: +SKIP
>>> model.generate(**inputs, past_key_values=cache)                 # doctest: +SKIP

With any attention a model gets its keys and values decoded. With the one that this module registers, ``tenpak``
(``model.set_attn_implementation("tenpak")``), a step of few tokens attends on the codes, and nothing is decoded.
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .._errors import InvalidError, UnsupportedError
from . import _kv
from ._kv import BLOCK

#: The name of the attention that reads codes.
ATTENTION = "tenpak"
#: Most tokens of queries that attend on codes: more of them are a prompt, for which decoding once is faster.
FEW = 16


def _widths(bits: int | tuple[int, int]) -> tuple[int, int]:
    """Return the bits of keys and of values."""
    keys, values = bits if isinstance(bits, tuple) else (bits, bits)
    if keys not in (4, 8) or values not in (4, 8):
        raise InvalidError(f"keys and values of {bits} bits, expected 4 or 8, or a pair of them")
    return keys, values


class QuantizedCacheLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer of a model, in blocks of 32 tokens, quantized; the last ones in float16.

    All sequences have as many tokens. Block ``b`` of a sequence is on a page that it got when the block became whole;
    which one is in a table, so that choosing sequences, as beam search does, moves no block.

    Parameters
    ----------
    config
        That of the model, which says at every step which attention it uses; None for one that wants numbers.
    bits
        4 or 8, or a pair of them: of keys and of values.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, config: Any = None, bits: int | tuple[int, int] = 8) -> None:
        """Take no memory yet: sizes come with the first tokens."""
        super().__init__()
        self.config = config
        self.bits = _widths(bits)
        self.length = 0
        self.cache: _kv.Cache | None = None
        # The first page of each block of all sequences, and the first one that nobody has.
        self._starts: list[int] = []
        self._next = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take memory for the sizes of tokens ``[sequences, heads, tokens, channels]``."""
        sequences, heads, _, channels = key_states.shape
        if value_states.shape[-1] != channels:
            raise UnsupportedError(
                f"keys of {channels} channels and values of {value_states.shape[-1]}, expected as many; use "
                "transformers' DynamicCache for this model"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        parts = _kv.shapes(sequences, max(sequences, 1), 1, heads, channels, self.bits)
        tensors = (torch.zeros(shape, dtype=dtype, device=self.device) for shape, dtype in parts)
        self.cache = _kv.Cache._make((*tensors, *self.bits))
        self.is_initialized = True

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return 0 if self.cache is None else self.cache.lengths.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, room for tokens to come included."""
        return 0 if self.cache is None else self.cache.nbytes

    def _set(self, **parts: Any) -> None:
        assert self.cache is not None
        self.cache = self.cache._replace(**parts)

    def _reserve(self, tokens: int) -> None:
        """Give every block that so many more tokens make whole a page, for each sequence."""
        assert self.cache is not None
        sequences, first, last = self.batch_size, len(self._starts), (self.length + tokens) // BLOCK
        if last <= first:
            return
        columns, pool = self.cache.pages.shape[1], self.cache.key_codes.shape[0]
        # Twice of what there was, so that a token moves what there is once at most on average.
        if last > columns:
            wider = self.cache.pages.new_zeros((sequences, max(last, 2 * columns)))
            wider[:, :columns] = self.cache.pages
            self._set(pages=wider)
        needed = self._next + (last - first) * sequences
        if needed > pool:
            for name in self.cache._fields[:4]:
                plane = getattr(self.cache, name)
                larger = plane.new_zeros((max(needed, 2 * pool), *plane.shape[1:]))
                larger[: self._next] = plane[: self._next]
                self._set(**{name: larger})
        fresh = torch.arange(self._next, needed, dtype=torch.int32, device=self.device)
        self.cache.pages[:, first:last] = fresh.view(last - first, sequences).T
        self._starts += range(self._next, needed, sequences)
        self._next = needed

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add tokens; return keys and values as the model's attention wants them.

        Parameters
        ----------
        key_states, value_states
            ``[sequences, heads, tokens, channels]``, float32, float16 or bfloat16.

        Returns
        -------
        tuple of torch.Tensor
            Those of all tokens; as they were brought, where there was nothing before. With the attention
            ``tenpak`` only what this call brings, marked with the layer.

        Raises
        ------
        InvalidError
            For numbers that float16 does not hold (on the CPU; a device makes what it attends to NaN).
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[-2]
        self._reserve(tokens)
        assert self.cache is not None
        _kv.kv_append(key_states, value_states, *self.cache)
        self.cache.lengths.add_(tokens)
        before, self.length = self.length, self.length + tokens
        if getattr(self.config, "_attn_implementation", None) == ATTENTION:
            # A tensor of its own: a model may hand the same one on elsewhere.
            marked = key_states.view_as(key_states)
            marked.tenpak_layer = (self, before)  # type: ignore[attr-defined]
            return marked, value_states
        if not before:
            return key_states, value_states
        return self.recall()

    def recall(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of all tokens, ``[sequences, heads, tokens, channels]`` in the dtype they came in."""
        assert self.cache is not None
        keys, values = _kv.kv_recall(*self.cache, self.length, self.dtype)
        return keys, values

    def attend(self, query: torch.Tensor, mask: torch.Tensor | None, scale: float, causal: bool) -> torch.Tensor:
        """Return attention of queries ``[sequences, heads, m, channels]`` as ``[sequences, m, heads, channels]``."""
        assert self.cache is not None
        out: torch.Tensor = _kv.kv_attend(query, *self.cache, mask, scale, causal, self.length)
        return out

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return tokens with those of the query, and where they begin."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Return the tokens of each sequence."""
        return self.length

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def reset(self) -> None:
        """Forget all tokens and sizes, and give the memory back."""
        self.cache, self.is_initialized = None, False
        self.length, self._starts, self._next = 0, [], 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens.

        What is left of a block that was whole goes back to the tail as it was decoded, rounded to float16; it is
        quantized again when the block is whole again.
        """
        if tokens_to_remove > 0:
            raise InvalidError(f"crop({tokens_to_remove}), expected a negative number: how many tokens to remove")
        length = max(self.length + tokens_to_remove, 0)
        if self.cache is None or length == self.length:
            return
        block, left = divmod(length, BLOCK)
        if block < self.length // BLOCK:
            if left:
                # The one block, as a cache of its own.
                column = self.cache.pages[:, block : block + 1].contiguous()
                one = self.cache._replace(pages=column, lengths=torch.full_like(self.cache.lengths, BLOCK))
                keys, values = _kv.kv_recall(*one, BLOCK, torch.float16)
                self.cache.key_tail.copy_(keys.transpose(1, 2))
                self.cache.value_tail.copy_(values.transpose(1, 2))
            self._next = self._starts[block]
            del self._starts[block:]
        self.length = length
        self.cache.lengths.fill_(length)

    def _select(self, indices: torch.Tensor) -> None:
        """Take sequences, each as often as it is named."""
        if self.cache is not None:
            indices = indices.to(self.device)
            parts = ("key_tail", "value_tail", "pages", "lengths")
            self._set(**{name: getattr(self.cache, name).index_select(0, indices) for name in parts})

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take sequences in another order; blocks stay where they are."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences: numbers of them, or a mask."""
        self._select(indices.nonzero().flatten() if indices.dtype is torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Take every sequence so many times."""
        self._select(torch.arange(self.batch_size).repeat_interleave(repeats))

    def _move(self, device: Any) -> None:
        if self.cache is not None:
            moved = (part.to(device, non_blocking=True) for part in self.cache.tensors)
            self.cache = _kv.Cache._make((*moved, *self.bits))

    def offload(self) -> None:
        """Move all parts to the CPU."""
        self._move("cpu")

    def prefetch(self) -> None:
        """Move all parts to where they were."""
        if self.cache is not None and self.cache.lengths.device != self.device:
            self._move(self.device)


class QuantizedCache(Cache):  # type: ignore[misc]
    """Keys and values of a model of transformers in 4 or 8 bits: ``past_key_values`` of its calls and of ``generate``.

    Layers that see all tokens are quantized; those of another kind (a sliding window, linear attention) are what
    transformers makes of them.

    Parameters
    ----------
    config
        That of the model.
    bits
        4 or 8, or a pair of them: of keys and of values. Scales and offsets cost one more bit for each number, a little
        more where the channels of a head are no multiple of 32.

    Raises
    ------
    InvalidError
        For another width.
    """

    def __init__(self, config: Any, bits: int | tuple[int, int] = 8) -> None:
        """Take no memory yet."""
        _widths(bits)
        text = config.get_text_config(decoder=True)
        layers = [
            QuantizedCacheLayer(text, bits) if type(layer) is DynamicLayer else layer
            for layer in DynamicCache(config=config).layers
        ]
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values of all layers, room for tokens to come included."""
        total = 0
        for layer in self.layers:
            plain = [getattr(layer, name, None) for name in ("keys", "values")]
            own = sum(part.nbytes for part in plain if isinstance(part, torch.Tensor))
            total += layer.nbytes if isinstance(layer, QuantizedCacheLayer) else own
        return total


def _seen(mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """Return a mask ``[sequences, 1, m, tokens]`` as the operator takes it."""
    if mask is None:
        return None
    if mask.shape[1] != 1:
        raise UnsupportedError("a mask for each head, expected one for all; use another attention")
    if mask.dtype is not torch.bool:
        mask = mask >= 0
    return mask[:, 0, :, :length]


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend as transformers' models do, on codes where keys come from a :class:`QuantizedCacheLayer`.

    Parameters
    ----------
    module
        The model's own, for what it says of itself.
    query, key, value
        ``[sequences, heads, tokens, channels]``.
    attention_mask
        Bool, ``[sequences, 1, m, tokens]``, or None for what comes before.
    scaling
        What scores are multiplied by.
    is_causal
        Whether a token sees none after its own, where there is no mask.
    **kwargs
        What ``sdpa`` takes; dropout, biases and caps are left to it.

    Returns
    -------
    tuple
        Results ``[sequences, m, heads, channels]``, and None for weights.
    """
    found = getattr(key, "tenpak_layer", None)
    layer, before = found if found is not None else (None, 0)
    rest = {"scaling": scaling, "is_causal": is_causal, **kwargs}
    m = query.shape[2]
    odd = kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None or kwargs.get("dropout")
    if layer is None or not before:
        # Nothing is stored of it but what is here as it came.
        done: tuple[torch.Tensor, torch.Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **rest
        )
        return done
    mask = _seen(attention_mask, layer.length)
    if odd or m > FEW:
        key, value = layer.recall()
        if attention_mask is None and m > 1:
            attention_mask = torch.ones(m, layer.length, dtype=torch.bool, device=query.device).tril(before)
        done = sdpa_attention_forward(module, query, key, value, attention_mask, **rest)
        return done
    if mask is not None and mask.shape[0] != query.shape[0]:
        mask = mask.expand(query.shape[0], -1, -1)
    causal = mask is None and (is_causal if is_causal is not None else getattr(module, "is_causal", True))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layer.attend(query, mask, scale, bool(causal)), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
