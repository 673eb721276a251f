"""What flows into every linear layer of a model on a text: the statistics file that ``compress --stats`` reads.

The forward pass is PyTorch, of any Hugging Face causal language model; solving is left to Rust, which needs neither.
The file is safetensors. For a weight ``W`` of ``[rows, cols]`` (``[out, in]``, also where the checkpoint stores it
transposed) whose inputs are the vectors ``x``:

=====================  =================  ==========================================================================
tensor                 dtype, shape       what
=====================  =================  ==========================================================================
``W.tokens``           I64 ``[]``         how many vectors were seen
``W.mean_abs``         F32 ``[cols]``     mean ``|x|``
``W.mean_sq``          F32 ``[cols]``     mean ``x²``
``W.second_moment``    F32 ``[cols]²``    mean ``x xᵀ``, with ``full``
``W.fisher``           F64 ``[]``         sum over the matrix of the squared gradient per token, with ``fisher``
``W.fisher_rows``      F32 ``[rows]``     the same, summed over columns
``W.fisher_cols``      F32 ``[cols]``     the same, summed over rows
=====================  =================  ==========================================================================

Sums are float64. The gradient is that of a window's negative log-likelihood in nats (empirical Fisher information, one
sample per window); its squares are summed over windows and divided by the number of scored tokens.

>>> from tenpak.calibrate import calibrate
>>> calibrate("model/", "text.txt", "stats.safetensors", full=True)  # doctest: +SKIP
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path as _Path

from .._console import check_output
from .._errors import InvalidError
from .._types import Path

__all__ = ["DEFAULT_MEMORY_BYTES", "DEFAULT_TOKENS", "Summary", "calibrate"]

#: Tokens that are used unless told otherwise.
DEFAULT_TOKENS = 131_072
#: Most bytes of sums that are in memory at once unless told otherwise.
DEFAULT_MEMORY_BYTES = 4 << 30


@dataclass(frozen=True)
class Summary:
    """What a statistics file holds.

    Attributes
    ----------
    output
        The file.
    bytes
        Its length.
    linears
        Weights with statistics.
    tokens, windows, context
        Tokens that were run, as so many windows of so many tokens.
    passes
        How often the text was run: more than once where not all sums fit ``memory_bytes``.
    resumed
        Windows that an interrupted run had done already, over all passes.
    skipped
        Linear layers without statistics, and why: fused or renamed when they are loaded, or tied to an embedding.
    """

    output: str
    bytes: int
    linears: int
    tokens: int
    windows: int
    context: int
    passes: int
    resumed: int
    skipped: list[str]


def calibrate(
    model: Path,
    text: Path,
    output: Path,
    *,
    tokens: int | None = DEFAULT_TOKENS,
    context: int | None = None,
    window_batch: int = 0,
    full: bool = False,
    fisher: bool = False,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    resume: bool = False,
    force: bool = False,
    threads: int = 0,
    progress: Callable[[int, int, str], object] | None = None,
) -> Summary:
    """Run a model over a text and write statistics of the inputs of its linear layers.

    A journal beside the output (``OUTPUT.partial``) is kept while it runs, so that an interrupted run can go on where
    it stopped and then writes the same bytes. Ctrl-C takes effect between two batches of windows, a second one at
    once.

    Parameters
    ----------
    model
        Hugging Face directory: config, tokenizer, safetensors.
    text
        UTF-8 text that is like what the model will read; never one that it is scored on.
    output
        Statistics file to write; it appears whole or not at all.
    tokens
        Tokens to use, from the first, rounded down to whole windows; None for the whole text.
    context
        Tokens of a window; None for the model's context.
    window_batch
        Windows per forward pass; 0 to choose. With ``fisher`` it is 1.
    full
        Also second moments, which GPTQ needs: the square of a layer's inputs in size.
    fisher
        Also squared gradients, which take a backward pass.
    memory_bytes
        Most bytes of sums in memory; where they take more, the text is run several times, for some layers each.
    resume
        Go on with the run that the journal is of. It must be the same in all that shows in the file.
    force
        Replace an existing output, and start anew where there is a journal.
    threads
        Threads of PyTorch; 0 for its own choice. Another number may round otherwise in the last digit.
    progress
        Called with windows done, windows in all, and what is done; an exception stops the work.

    Returns
    -------
    Summary
        What was written.

    Raises
    ------
    ImportError
        PyTorch or transformers is missing.
    InvalidError
        An argument is out of range, the text is empty or shorter than a window, the model has no linear layers, the
        output exists, or the journal is of another run.
    CorruptError, UnsupportedError, LimitError, OSError, KeyboardInterrupt
        As for :func:`tenpak.compress`. The journal stays for ``resume``.
    """
    from ..evaluate import check_libraries
    from ..evaluate.plan import check_model, read_text

    for name, value, least in (
        ("tokens", tokens, 1),
        ("context", context, 2),
        ("window_batch", window_batch, 0),
        ("memory_bytes", memory_bytes, 0),
        ("threads", threads, 0),
    ):
        if value is not None and value < least:
            raise InvalidError(f"{name} is {value}, expected {least} or more")
    folder, path, target = _Path(model), _Path(text), _Path(output)
    text_bytes = read_text(path)
    check_model(folder)
    check_output(target, force)
    check_libraries("tenpak calibrate")
    from .run import Plan, run

    plan = Plan(folder, path, text_bytes, target, tokens, context, window_batch, full, fisher, memory_bytes, threads)
    return run(plan, resume=resume, force=force, progress=progress or (lambda done, total, name: None))
