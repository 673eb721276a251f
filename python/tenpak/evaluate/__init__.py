"""What quantization costs a model: divergence, perplexity and size on a real text, with error bars.

The protocol is one for every method: the text, its line ends read as line feeds, is tokenised once and cut into windows
of the model's context that do not overlap; every token but the first of a window is scored; the forward pass is
float32. Figures of other protocols do not compare. The judge is the mean KL divergence from the source model: on small
models, perplexities within half a percent of each other are noise, which the error bars show.

PyTorch and transformers are needed (``pip install "tenpak[eval]"``) and are imported when :func:`evaluate` is called.

>>> from tenpak.evaluate import evaluate
>>> report = evaluate("model/", "wiki.test.raw", codecs=["int4_g32_fp16_v1"])  # doctest: +SKIP
>>> print(report.rows[0].fidelity.kld)  # doctest: +SKIP
"""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path as _Path

from .._errors import InvalidError
from .._types import Path
from . import plan as _plan
from .report import Baseline, Evaluation, Fidelity, Row, Sizes

__all__ = ["DEFAULT_CACHE_BYTES", "DEFAULT_TOKENS", "Baseline", "Evaluation", "Fidelity", "Row", "Sizes", "evaluate"]

#: Tokens that are used unless told otherwise.
DEFAULT_TOKENS = 20_480
#: Most bytes of the source model's logits that are kept in a temporary file unless told otherwise.
DEFAULT_CACHE_BYTES = 4 << 30


def evaluate(
    model: Path,
    text: Path,
    *,
    artifacts: Iterable[Path] = (),
    codecs: Iterable[str] = (),
    recipes: Iterable[Path] = (),
    methods: Iterable[str] = (),
    method_text: Path | None = None,
    stats: Path | None = None,
    fit: str | None = None,
    tokens: int | None = DEFAULT_TOKENS,
    context: int | None = None,
    window_batch: int = 0,
    dtype: str = "float32",
    compute: str = "decoded",
    threads: int = 0,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    mmap: bool = False,
    progress: Callable[[int, int, str], object] | None = None,
) -> Evaluation:
    """Measure quantized models against their source model on a text.

    Memory holds the source model and at most one quantized model. The source model's logits are computed once and kept
    in a temporary file where they fit ``cache_bytes`` and half of the free disk; then the source model leaves memory.
    Otherwise they are computed again for each row, to the same figures.

    Parameters
    ----------
    model
        Hugging Face directory: config, tokenizer, safetensors.
    text
        UTF-8 text; not one that calibrated or trained what is measured.
    artifacts
        Artifacts of this model, measured as they are.
    codecs
        Ids of codecs; ``all`` for every one. Only the linear matrices inside the decoder's layers are quantized:
        embedding, head, norms and routers stay as they are.
    recipes
        TOML files that say which codec for which tensor, as for ``tenpak compress``.
    methods
        Other quantizers that are run on the model first, see :func:`tenpak.methods.run`: 4 bits in groups of 128, or
        of their own.
    method_text
        UTF-8 text that those which need data see; never the one that is scored.
    stats, fit
        Statistics and fit that codecs and recipes are compressed with, as for :func:`tenpak.compress`; never statistics
        of the text that is scored.
    tokens
        Tokens to use, from the first, rounded down to whole windows; None for the whole text.
    context
        Tokens of a window; None for the model's context.
    window_batch
        Windows per forward pass; 0 for as many as keep a batch's logits small.
    dtype
        ``float32``, ``bfloat16`` or ``float16``, of weights and forward pass. 16-bit logits have a floor of their own
        (near 5e-4 nats): figures to be compared are float32.
    compute
        ``decoded``: quantized weights are decoded for the forward pass. Or the arithmetic in which
        :mod:`tenpak.torch` multiplies them without that: ``float32``, ``bfloat16`` or ``int8``, see
        :func:`tenpak.matmul`; memory is then that of the planes.
    threads
        Threads; 0 for the libraries' own choice.
    cache_bytes
        Most bytes of logits to keep.
    mmap
        Map windows of files instead of reading them; a file that shrinks meanwhile then ends the process.
    progress
        Called with windows done, windows in all, and the name of the row; an exception stops the work.

    Returns
    -------
    Evaluation
        The figures: of the source model, and of each artifact, codec, recipe and method, in this order.

    Raises
    ------
    ImportError
        PyTorch, transformers or a method is missing.
    InvalidError
        An argument is out of range, the text is empty or shorter than a window, a codec is unknown, or an artifact is
        not of this model.
    CorruptError, UnsupportedError, LimitError, OSError, KeyboardInterrupt
        As for :func:`tenpak.compress`. Nothing is left behind.
    """
    if dtype not in _plan.DTYPES:
        raise InvalidError(f"dtype {dtype!r}, expected one of {', '.join(_plan.DTYPES)}")
    if compute not in _plan.COMPUTES:
        raise InvalidError(f"compute {compute!r}, expected one of {', '.join(_plan.COMPUTES)}")
    for name, value, least in (
        ("tokens", tokens, 1),
        ("context", context, 2),
        ("window_batch", window_batch, 0),
        ("threads", threads, 0),
        ("cache_bytes", cache_bytes, 0),
    ):
        if value is not None and value < least:
            raise InvalidError(f"{name} is {value}, expected {least} or more")
    folder, path = _Path(model), _Path(text)
    stats = None if stats is None else _Path(stats)
    text_bytes = _plan.read_text(path)
    _plan.check_model(folder)
    found, size = _plan.candidates(map(_Path, artifacts), codecs, map(_Path, recipes), folder, mmap, stats, fit)
    others, other_text = _plan.known_methods(methods), None if method_text is None else _Path(method_text)
    check_libraries("tenpak eval")
    from .run import run

    with tempfile.TemporaryDirectory(prefix="tenpak-") as made:
        found += _plan.quantized_by(others, folder, _Path(made), other_text)
        plan = _plan.Plan(
            folder,
            path,
            text_bytes,
            size,
            found,
            tokens,
            context,
            window_batch,
            dtype,
            compute,
            threads,
            cache_bytes,
            mmap,
            stats,
            fit,
        )
        return run(plan, progress)


def check_libraries(verb: str) -> None:
    """Import what the forward pass of a verb needs, or raise the ImportError that says how to get it."""
    remedy = 'install it with: pip install "tenpak[eval]"'
    try:
        import safetensors  # noqa: F401
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise ImportError(f"{verb} needs PyTorch and transformers: {error}; {remedy}") from error
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ImportError(f"transformers is {transformers.__version__}, expected 5 or later; {remedy}")
