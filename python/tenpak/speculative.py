"""Speculative decoding: a low-bit copy of a model drafts, the model itself checks, and the tokens are the model's own.

The draft has the model's tokenizer and nearly its distribution, which no other small model has. transformers does the
decoding (assisted generation, Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding"); what
is here makes the draft and counts. PyTorch and transformers are needed: ``pip install 'tenpak[torch,hf]'``.
"""

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ._errors import InvalidError
from ._huggingface import from_pretrained
from ._types import Path
from .torch import quantize_model
from .torch._planes import Quantized

__all__ = ["Generated", "Speculative", "generate"]


@dataclass(frozen=True)
class Generated:
    """Tokens, and what drafting them came to."""

    #: Prompt and what follows, int64 ``[1, tokens]``.
    tokens: torch.Tensor
    #: Tokens behind the prompt.
    new: int
    #: Forward passes of the model itself; each gives one token of its own beside the accepted ones.
    rounds: int
    #: Tokens that the draft proposed, and those of them that stand in the output.
    drafted: int
    accepted: int

    @property
    def acceptance(self) -> float:
        """Accepted tokens over drafted ones; 0 where none was drafted."""
        return self.accepted / max(1, self.drafted)


class Speculative:
    """A model and its draft.

    Parameters
    ----------
    model
        A model of transformers that generates.
    draft
        Id of a codec, in which a copy of the model is quantized (:func:`tenpak.torch.quantize_model`); path of a
        compressed model; or a model of transformers with the same vocabulary.
    draft_tokens
        How many tokens are drafted at a time.

    Raises
    ------
    InvalidError
        Fewer than one token at a time, another vocabulary, or a codec for a model that is quantized already.
    UnsupportedError, OSError
        There is neither such a codec nor such a path.
    """

    def __init__(self, model: Any, draft: Any, *, draft_tokens: int = 5) -> None:
        if draft_tokens < 1:
            raise InvalidError(f"{draft_tokens} tokens at a time, expected at least one")
        if draft is model:
            raise InvalidError("the draft is the model itself, expected a smaller copy")
        self.model, self.draft = model, _draft(model, draft)
        ours, theirs = (m.get_input_embeddings().num_embeddings for m in (self.model, self.draft))
        if ours != theirs:
            raise InvalidError(
                f"the draft has a vocabulary of {theirs} tokens, the model one of {ours}; a draft must be a copy of "
                "the model, or share its tokenizer"
            )
        config = self.draft.generation_config
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = draft_tokens, "constant"
        # Always so many tokens, whatever the draft thinks of them: the model decides.
        config.assistant_confidence_threshold = 0.0

    def generate(self, inputs: torch.Tensor | Sequence[int], **options: Any) -> Generated:
        """Continue one prompt.

        Without ``do_sample`` the tokens are those of the model's own greedy decoding, up to ties that the order of sums
        decides: the model scores several tokens at once where it otherwise scores one.

        Parameters
        ----------
        inputs
            The prompt's tokens, ``[tokens]`` or ``[1, tokens]``, at least one.
        **options
            As for ``model.generate``, such as ``max_new_tokens``.

        Returns
        -------
        Generated
            Tokens and counts.

        Raises
        ------
        InvalidError
            More than one prompt, or an empty one.
        """
        prompt = torch.as_tensor(inputs, dtype=torch.long, device=self.model.device)
        prompt = prompt[None] if prompt.dim() == 1 else prompt
        if prompt.dim() != 2 or prompt.shape[0] != 1 or prompt.shape[1] == 0:
            raise InvalidError(f"inputs of shape {list(prompt.shape)}, expected the tokens of one prompt, [1, tokens]")
        options = {"do_sample": False, "attention_mask": torch.ones_like(prompt)} | options
        scored: list[int] = []

        def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            scored.append(ids.shape[1])

        handle = self.model.register_forward_pre_hook(count, with_kwargs=True)
        try:
            found = self.model.generate(prompt, assistant_model=self.draft, **options)
        finally:
            handle.remove()
        tokens: torch.Tensor = getattr(found, "sequences", found)
        new, rounds = tokens.shape[1] - prompt.shape[1], len(scored)
        # Each pass but the first scores the last token and the draft; the first one the prompt and the draft.
        drafted = sum(scored) - prompt.shape[1] - (rounds - 1)
        return Generated(tokens, new, rounds, drafted, new - rounds)


def generate(
    model: Any, draft: Any, inputs: torch.Tensor | Sequence[int], *, draft_tokens: int = 5, **options: Any
) -> Generated:
    """Continue one prompt with a draft; see :class:`Speculative`, which keeps the draft for the next prompt.

    Parameters
    ----------
    model, draft, draft_tokens
        As for :class:`Speculative`.
    inputs, **options
        As for :meth:`Speculative.generate`.

    Returns
    -------
    Generated
        Tokens and counts.

    Raises
    ------
    InvalidError, UnsupportedError, OSError
        As there.
    """
    return Speculative(model, draft, draft_tokens=draft_tokens).generate(inputs, **options)


def _draft(model: Any, draft: Any) -> Any:
    """Return the model that drafts."""
    if not isinstance(draft, str | os.PathLike):
        return draft
    path: Path = draft
    if os.path.exists(path):
        return from_pretrained(path, dtype=model.dtype).to(model.device).eval()
    if isinstance(draft, os.PathLike):
        raise FileNotFoundError(f"{os.fspath(draft)}: no compressed model is there")
    if any(isinstance(module, Quantized) for module in model.modules()):
        raise InvalidError(
            f"the model is quantized already, so no copy of it can be made in '{draft}'; compress its source and "
            "pass the path"
        )
    copied = copy.deepcopy(model)
    quantize_model(copied, draft)
    return copied.eval()
