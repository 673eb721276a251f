"""What PyTorch and transformers are told for the time of a run, and told back after it."""

import contextlib
from collections.abc import Iterator

import torch
import transformers


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let PyTorch use so many threads, 0 for its own choice."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' bars and advice off the terminal: one bar is drawn here, and errors are raised."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
