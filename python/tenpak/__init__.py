"""Low-bit weights for language models: compress, verify, decode.

>>> import numpy as np, tenpak
>>> weights = np.linspace(-1, 1, 64, dtype=np.float32).reshape(4, 16)
>>> tenpak.encode(weights, "int4_g16_fp16_v1").bits_per_weight
6.0
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _tenpak
from ._errors import CorruptError, InvalidError, LimitError, NonfiniteError, TenpakError, UnsupportedError
from ._huggingface import from_pretrained, watch
from ._tenpak import Entry, __version__
from ._types import Path, Progress, Report

if TYPE_CHECKING:
    from ._artifact import Artifact, open
    from ._encoded import Encoded, decode, encode
    from ._matmul import matmul

__all__ = [
    "Artifact",
    "CorruptError",
    "Encoded",
    "Entry",
    "InvalidError",
    "LimitError",
    "NonfiniteError",
    "TenpakError",
    "UnsupportedError",
    "__version__",
    "codecs",
    "compress",
    "decode",
    "decompress",
    "delta",
    "encode",
    "export",
    "from_pretrained",
    "materialize",
    "matmul",
    "merge_index",
    "open",
    "verify",
]

#: What needs numpy, imported when it is first asked for: the command line is three times as fast to start without.
_WITH_NUMPY = {
    "Artifact": "_artifact",
    "Encoded": "_encoded",
    "decode": "_encoded",
    "encode": "_encoded",
    "matmul": "_matmul",
    "open": "_artifact",
}


def __getattr__(name: str) -> Any:
    """Import what needs numpy."""
    if name not in _WITH_NUMPY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_WITH_NUMPY[name]}", __name__), name)
    return value


def compress(
    source: Path,
    output: Path | None = None,
    *,
    codec: str | None = None,
    target_bits: float | None = None,
    target_size: int | None = None,
    max_loss: float | None = None,
    allocate: bool | None = None,
    recipe: str | None = None,
    roles: Mapping[str, str] | None = None,
    rules: Iterable[tuple[str, str]] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    all: bool = False,
    stats: Path | None = None,
    fit: str | None = None,
    coded: bool = False,
    outliers: float | None = None,
    nonfinite: str = "error",
    allow_requantize: bool = False,
    max_shard_size: int = 5_000_000_000,
    shard: tuple[int, int] | None = None,
    force: bool = False,
    resume: bool = False,
    threads: int = 0,
    mmap: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compress a checkpoint into an artifact, streaming: memory does not grow with the model.

    Only a tensor in ``ecu_v1``, whose size is open, or one with outliers or column scales is in memory as a whole while
    it is quantized.

    Parameters
    ----------
    source
        ``.safetensors``, Hugging Face directory (also one of GPTQ, AWQ, compressed-tensors, bitsandbytes or MLX),
        ``.gguf``, ``.npz``, ``.npy`` or JSON bundle.
    output
        Artifact to write: one file where the name ends in ``.tenpak``, otherwise a Hugging Face directory. It appears
        whole or not at all. May be missing with ``dry_run``.
    codec
        Id of the codec of linear weights (2-D, ``[out, in]``, groups along ``in``), see :func:`codecs`;
        ``ecu_v1`` when not given, at 4.5 bits where no size is asked for. Or the name of a recipe: ``awq_v10`` or
        ``awq_v60``, for large models, which need ``stats``.
    target_bits
        Bits per weight on disk of the tensors in ``ecu_v1``, any number from 0.1 to 8. In memory they take 8.
    target_size
        Bytes of the whole output: the tensors in ``ecu_v1`` get what the rest leaves.
    max_loss
        The most nMSE (squared error over squared weights) that the tensors in ``ecu_v1`` may have together, above 0 and
        below 1: the smallest file that keeps it, instead of a size. No other quantized tensor may exceed it either.
    allocate
        Whether the bits of ``target_bits`` or ``target_size`` are dealt out to tensors by what their errors cost the
        model: squared gradients, from ``stats`` calibrated with ``fisher=True``. By default where there are any.
    recipe
        TOML text that says which codec for which tensor, or the name of a recipe, instead of ``codec``.
    roles
        Other codecs by role: ``attention``, ``mlp``, ``linear``, ``router``, ``embedding``, ``head``.
    rules
        Pairs of a pattern (a glob, or ``re:`` and a regular expression) and a codec id; the first match counts.
    include, exclude
        Patterns of the tensors to quantize, and of those to keep as they are.
    all
        Give every float tensor the codec, whatever its role.
    stats
        Statistics of the model's inputs, from :func:`tenpak.calibrate.calibrate`.
    fit
        What scales and codes are chosen by: ``codec`` (its own fit), ``search`` (least squared error), ``weighted``
        (the same, weighted by the mean squares of the inputs), ``gptq`` (least error of the layer's output), ``awq``
        (column scales from the magnitudes of the inputs, for tensors with 4-bit codes; kept with them). By
        default ``codec``; with ``stats`` ``gptq``, or ``weighted`` where the file has no second moments. A tensor
        that lacks what its fit needs is named in ``notes``; statistics of another shape are an error.
    coded
        Entropy-code every plane that gets shorter by it: the same weights and the same identity in a smaller file,
        decoded when it is opened instead of mapped. A tensor at a time is in memory.
    outliers
        Part of the weights with 4-bit codes to store by themselves, such as 0.005: those that save most.
    nonfinite
        What to do about NaN and infinities: ``error``, ``zero``, ``clamp`` or ``raw``.
    allow_requantize
        Where another tool has quantized the source already: choose codecs for its decoded weights as the other
        arguments say, which is refused otherwise. Without any such argument codes and scales are taken over as they are
        where a codec holds them; what none holds is decoded and kept raw, and ``notes`` says so.
    max_shard_size
        Most bytes of one shard of a directory, as headers foretell them.
    shard
        ``(i, n)``, ``i`` from 1 to ``n``: write only what falls to process ``i`` of ``n``, into a part of the output
        directory, which :func:`merge_index` makes whole when all parts are there. The processes may run anywhere and in
        any order and need the same source, options and version. Not with ``max_loss``.
    force
        Replace an existing output; with ``shard`` an existing part; with ``resume`` also a journal of another run.
    resume
        Keep a journal of finished tensors beside the output (``OUTPUT.journal``), and go on with the one that a run
        with the same source, options and version has left when it was stopped, whatever stopped it. The output has the
        bytes of a run that was not stopped; the journal is gone then. A journal of another run is refused.
    threads
        Worker threads; 0 for one per core.
    mmap
        Map windows of the source instead of reading them; a file that shrinks meanwhile then ends the process.
    dry_run
        Report what would be written, to the byte, from headers alone.
    progress
        Called with bytes done, bytes in all and the tensor's name.

    Returns
    -------
    dict
        The report of ``tenpak compress --format json``: sizes in bytes and bits per weight, loss per tensor.

    Raises
    ------
    NonfiniteError, InvalidError, CorruptError, UnsupportedError, LimitError, OSError, KeyboardInterrupt
        Nothing is left behind, but with ``resume`` the journal.
    """
    return _report(
        _tenpak.compress(
            os.fspath(source),
            None if output is None else os.fspath(output),
            codec,
            target_bits,
            target_size,
            max_loss,
            allocate,
            recipe,
            list((roles or {}).items()),
            list(rules or ()),
            list(include),
            list(exclude),
            all,
            None if stats is None else os.fspath(stats),
            fit,
            coded,
            outliers,
            nonfinite,
            allow_requantize,
            max_shard_size,
            shard,
            force,
            resume,
            threads,
            mmap,
            dry_run,
            progress,
        )
    )


def decompress(
    artifact: Path,
    output: Path,
    *,
    dtype: str | None = None,
    max_shard_size: int = 5_000_000_000,
    force: bool = False,
    threads: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Decode an artifact into a checkpoint.

    Parameters
    ----------
    artifact
        Artifact to read.
    output
        ``.safetensors``, ``.npz``, ``.json`` (a JSON bundle), or a directory of safetensors shards.
    dtype
        Dtype of the floating-point tensors (``float32``, ``float16``, ``bfloat16``, …) instead of the source's.
    max_shard_size
        Most bytes of one file of a directory.
    force, threads, progress
        As for :func:`compress`.

    Returns
    -------
    dict
        The report of ``tenpak decompress --format json``.

    Raises
    ------
    InvalidError, CorruptError, OSError, KeyboardInterrupt
        No file is left half written.
    """
    return _report(
        _tenpak.decompress(os.fspath(artifact), os.fspath(output), dtype, max_shard_size, force, threads, progress)
    )


def export(
    artifact: Path,
    output: Path,
    to: str = "hf",
    *,
    codec: str | None = None,
    max_shard_size: int = 5_000_000_000,
    allow_requantize: bool = False,
    force: bool = False,
    threads: int = 0,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write an artifact in another form, its weights as they are stored, or as the checkpoint of another engine.

    Parameters
    ----------
    artifact
        Artifact to read: a file or a directory. For another engine also a checkpoint, which is compressed on the way.
    output
        Directory or file to write.
    to
        ``hf`` for a Hugging Face directory of safetensors, ``tenpak`` for one file: both ways lose nothing.
        ``compressed-tensors``, ``gptq``, ``awq``, ``mlx``, ``gguf`` (one file) or ``onnx`` (a graph for each matrix)
        for other engines: codes and scales exactly as they are, or an error; embeddings and heads are decoded.
        ``safetensors`` for a directory of decoded weights.
    codec
        Of a checkpoint's linear weights, instead of the engine's first whose groups divide all rows; the rest stays as
        it is.
    max_shard_size
        Most bytes of one shard of a directory.
    allow_requantize
        Quantize anew, from their decoded weights, matrices that an engine has no exact layout for; the report names
        them.
    dry_run
        Report what would be written, to the byte.
    force, threads, progress
        As for :func:`compress`.

    Returns
    -------
    dict
        The report of ``tenpak export --format json``.

    Raises
    ------
    InvalidError, CorruptError, OSError, KeyboardInterrupt
        Nothing is left behind.
    """
    return _report(
        _tenpak.export(
            os.fspath(artifact),
            os.fspath(output),
            to,
            codec,
            max_shard_size,
            allow_requantize,
            force,
            threads,
            dry_run,
            progress,
        )
    )


def delta(
    base: Path,
    variant: Path,
    output: Path,
    *,
    mode: str | None = None,
    codec: str | None = None,
    target_bits: float | None = None,
    epsilon: float = 0.0,
    stats: Path | None = None,
    force: bool = False,
    threads: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Store a variant checkpoint as its difference from a base: an artifact, or the checkpoint it was fine-tuned from.

    Parameters
    ----------
    base
        Artifact of the base model, whose recipe is then used for the variant; or its checkpoint.
    variant
        Checkpoint of the variant.
    output
        Delta to write.
    mode
        ``changed``: of an artifact, the tensors that compress to something else. ``lossless``: of a checkpoint, what
        the words of tensors differ in. ``quantized``: of a checkpoint, what the weights of matrices differ in, in a
        codec, and anything else lossless. Default: ``changed`` for an artifact; for a checkpoint ``lossless``, or
        ``quantized`` with ``codec`` or ``target_bits``.
    codec
        Codec of quantized differences; default ``ecu_v1``.
    target_bits
        Bits per weight on disk of differences in ``ecu_v1``; default 4.5.
    epsilon
        Also take a tensor for unchanged when no decoded weight differs from the base's by more than this.
    stats
        The statistics that the base was made with, where it was.
    force, threads, progress
        As for :func:`compress`.

    Returns
    -------
    dict
        The report of ``tenpak delta --format json``.

    Raises
    ------
    InvalidError, CorruptError, OSError, KeyboardInterrupt
        Nothing is left behind.
    """
    return _report(
        _tenpak.delta(
            os.fspath(base),
            os.fspath(variant),
            os.fspath(output),
            mode,
            codec,
            target_bits,
            epsilon,
            None if stats is None else os.fspath(stats),
            force,
            threads,
            progress,
        )
    )


def merge_index(directory: Path) -> Report:
    """Put the parts that :func:`compress` wrote with ``shard`` together.

    The result is the directory that one process would have written, byte for byte. Shards are not read, only their
    heads are; :func:`verify` checks every byte.

    Parameters
    ----------
    directory
        Where the parts are; it takes their place.

    Returns
    -------
    dict
        The report of ``tenpak merge-index --format json``.

    Raises
    ------
    InvalidError
        Parts are missing or of different runs, or there is anything else in the directory.
    CorruptError, UnsupportedError, LimitError, OSError, KeyboardInterrupt
        The parts are as they were.
    """
    return _report(_tenpak.merge_index(os.fspath(directory)))


def materialize(
    base: Path,
    deltas: Path | Sequence[Path],
    output: Path,
    *,
    force: bool = False,
    threads: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Put a base and a chain of deltas, the base's first, together: an artifact, or of a checkpoint a checkpoint.

    Of an artifact, with ``epsilon`` 0, the result is byte for byte what compressing the variant directly gives.

    Parameters
    ----------
    base
        Artifact or checkpoint that the first delta was made against.
    deltas
        One delta, or several in order; lossless and quantized ones may follow each other.
    output
        Artifact to write; of a checkpoint one file where the name ends in ``.safetensors``, otherwise a directory, or
        with ``.tenpak`` an artifact of raw tensors.
    force, threads, progress
        As for :func:`compress`.

    Returns
    -------
    dict
        The report of ``tenpak materialize --format json``.

    Raises
    ------
    InvalidError
        A delta was made against another base, or the chain is too long or circular.
    CorruptError, OSError, KeyboardInterrupt
        Nothing is left behind.
    """
    chain = [deltas] if isinstance(deltas, str | os.PathLike) else list(deltas)
    paths = [os.fspath(path) for path in chain]
    return _report(_tenpak.materialize(os.fspath(base), paths, os.fspath(output), force, threads, progress))


def verify(path: Path, *, threads: int = 0, progress: Progress | None = None) -> Report:
    """Read every byte of an artifact and report what is damaged.

    Parameters
    ----------
    path
        Artifact.
    threads, progress
        As for :func:`compress`.

    Returns
    -------
    dict
        The report of ``tenpak verify --format json``; ``sound`` is false and ``problems`` lists every bad chunk where
        there is damage.

    Raises
    ------
    CorruptError, UnsupportedError, LimitError, OSError
        The header cannot be read at all.
    """
    return _report(_tenpak.Artifact(os.fspath(path), False).verify_json(threads, progress))


def codecs() -> list[Report]:
    """Return the codecs of this build: id, levels, bits, group, dtypes of scale and offset, fit, bits per weight."""
    listed: list[Report] = json.loads(_tenpak.codecs_json())["codecs"]
    return listed


def _report(text: str) -> Report:
    """Parse a report of the extension module."""
    report: Report = json.loads(text)
    return report


watch()
