"""The text as windows of tokens: tokenised once, cut without overlap, the first token of a window not scored."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .._errors import InvalidError


@dataclass(frozen=True)
class Windows:
    """The tokens that every model is run on.

    Attributes
    ----------
    ids
        Tokens, int64 ``[windows, context]``.
    text_tokens
        Tokens of the whole text.
    sha256
        SHA-256 of the text's bytes, in hex.
    """

    ids: torch.Tensor
    text_tokens: int
    sha256: str


def cut(path: Path, data: bytes, tokenizer: Any, config: Any, tokens: int | None, context: int | None) -> Windows:
    """Tokenise a text once and cut its first tokens into windows; a last, shorter one is left out.

    Line ends of every system count as a line feed, so that a text gives the same tokens however it was checked out.

    Parameters
    ----------
    path
        Where the text came from, for messages.
    data
        The text, UTF-8.
    tokenizer, config
        Those of the model.
    tokens
        How many tokens to use, from the first; None for all.
    context
        Tokens of a window; None for the model's context.

    Returns
    -------
    Windows
        The windows.

    Raises
    ------
    InvalidError
        The text is not UTF-8 or shorter than a window, the model has fewer positions than a window has tokens or does
        not say how many, or the tokenizer has more tokens than the model.
    """
    try:
        text = data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise InvalidError(f"{path}: not UTF-8 at byte {error.start}; convert it to UTF-8") from error
    text_config = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    if context is None and not positions:
        raise InvalidError("the model's config has no max_position_embeddings, pass --context")
    context = int(positions or 0) if context is None else context
    if context < 2 or (positions and context > positions):
        raise InvalidError(f"windows of {context} tokens, expected 2 to {positions or 'any'} (the model's context)")
    # The whole text at once is longer than the model's context, which is no mistake here.
    ids = tokenizer(text, verbose=False)["input_ids"]
    used = len(ids) if tokens is None else min(tokens, len(ids))
    count = used // context
    if count == 0:
        whose = f"{len(ids):,} tokens" if used == len(ids) else f"{used:,} tokens asked for with --tokens"
        raise InvalidError(
            f"{path}: {whose}, expected at least one window of {context:,}; "
            "take a longer text, more --tokens or a shorter --context"
        )
    windows = torch.tensor(ids[: count * context], dtype=torch.int64).reshape(count, context)
    if int(windows.max()) >= text_config.vocab_size:
        raise InvalidError(
            f"the tokenizer gives token {int(windows.max())}, the model has {text_config.vocab_size}; "
            "they do not belong together"
        )
    return Windows(windows, len(ids), hashlib.sha256(data).hexdigest())
