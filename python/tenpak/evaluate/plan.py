"""What is to be measured, checked as far as headers allow before anything is loaded."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import _artifact, codecs, compress, methods
from .._errors import InvalidError
from .report import Sizes

DTYPES = ("float32", "bfloat16", "float16")
#: Weights decoded for the forward pass, or the arithmetic in which they are multiplied without that.
COMPUTES = ("decoded", "float32", "bfloat16", "int8")

#: Only the matrices inside the decoder's layers: modules of a numbered list, not those of towers for other senses.
_RECIPE = r"""
codec = "{codec}"
include = ['re:(.*\.)?\d+\.']
exclude = ['re:.*(vision|visual|image|audio)']
[roles]
embedding = "raw_v1"
head = "raw_v1"
"""


@dataclass(frozen=True)
class Candidate:
    """One quantized model to be measured.

    Attributes
    ----------
    name
        What its row is called.
    kind
        ``codec``, ``recipe`` or ``artifact``.
    artifact
        The artifact, where it is given.
    recipe
        TOML that makes it, where it is not.
    """

    name: str
    kind: str
    artifact: Path | None = None
    recipe: str | None = None


@dataclass(frozen=True)
class Plan:
    """What to measure, and how; see :func:`tenpak.evaluate.evaluate`.

    Attributes
    ----------
    model, text
        Directory of the model and file of the text.
    text_bytes
        The text.
    size
        Size of the checkpoint's files.
    candidates
        The rows.
    tokens, context, window_batch, dtype, compute, threads, cache_bytes, mmap, stats, fit
        As they were given.
    """

    model: Path
    text: Path
    text_bytes: bytes
    size: Sizes
    candidates: Sequence[Candidate]
    tokens: int | None
    context: int | None
    window_batch: int
    dtype: str
    compute: str
    threads: int
    cache_bytes: int
    mmap: bool
    stats: Path | None
    fit: str | None


def recipe_of(codec: str) -> str:
    """Return the recipe that gives a codec to the matrices inside the decoder's layers and keeps everything else."""
    return _RECIPE.format(codec=codec)


def check_model(folder: Path) -> None:
    """Check that a path is a model's directory.

    Raises
    ------
    InvalidError
        It is not.
    """
    if not (folder / "config.json").is_file():
        what = "a file" if folder.is_file() else "a directory without config.json" if folder.is_dir() else "not there"
        raise InvalidError(f"{folder}: {what}, expected a Hugging Face directory: config.json, tokenizer, weights")


def read_text(path: Path) -> bytes:
    """Return the bytes of a text that has something in it.

    Raises
    ------
    InvalidError
        It is empty.
    OSError
        It cannot be read.
    """
    data = path.read_bytes()
    if not data.strip():
        raise InvalidError(f"{path}: no text in {len(data)} bytes, expected the text to score")
    return data


def candidates(
    artifacts: Iterable[Path],
    codec_ids: Iterable[str],
    recipes: Iterable[Path],
    model: Path,
    mmap: bool,
    stats: Path | None = None,
    fit: str | None = None,
) -> tuple[list[Candidate], Sizes]:
    """Return the rows and the size of the checkpoint, after a look at every header and recipe.

    ``stats`` and ``fit`` are those that recipes will be compressed with.

    Raises
    ------
    InvalidError
        A codec is unknown, a recipe is wrong, or an artifact is not of this model.
    CorruptError, UnsupportedError, LimitError, OSError
        A file cannot be read.
    """
    plain = compress(model, dry_run=True, codec="raw_v1", mmap=mmap)
    found = []
    artifacts = list(artifacts)
    twice = Counter(path.name for path in artifacts)
    for path in artifacts:
        check_match(_artifact.open(path, mmap=mmap), plain["tensors"], model)
        found.append(Candidate(path.name if twice[path.name] == 1 else str(path), "artifact", artifact=path))
    found += [Candidate(codec, "codec", recipe=recipe_of(codec)) for codec in _known(codec_ids)]
    for path in recipes:
        text = path.read_text(encoding="utf-8")
        try:
            compress(model, dry_run=True, recipe=text, mmap=mmap, stats=stats, fit=fit)
        except InvalidError as error:
            raise InvalidError(f"{path}: {error}") from error
        found.append(Candidate(path.name, "recipe", recipe=text))
    return found, Sizes(plain["total"]["weights"], plain["source_bytes"])


def known_methods(names: Iterable[str]) -> list[str]:
    """Return names of other quantizers once each.

    Raises
    ------
    ImportError
        One is not installed.
    InvalidError
        One is unknown.
    """
    for name in (chosen := list(dict.fromkeys(names))):
        methods.check(name)
    return chosen


def quantized_by(names: Sequence[str], model: Path, folder: Path, text: Path | None) -> list[Candidate]:
    """Run other quantizers on a model and return the rows of what they made.

    Parameters
    ----------
    names
        The methods; see :func:`tenpak.methods.run`.
    model
        Directory of the model.
    folder
        Where artifacts are put.
    text
        What methods see that need data.
    """
    found = []
    plain = compress(model, dry_run=True, codec="raw_v1")["tensors"] if names else []
    for name in names:
        path = folder / f"{name}.tenpak"
        methods.run(name, model, path, text=text)
        check_match(_artifact.open(path), plain, model)
        found.append(Candidate(name, "artifact", artifact=path))
    return found


def _known(ids: Iterable[str]) -> list[str]:
    """Return codec ids once each, ``all`` standing for the whole registry."""
    known = [codec["id"] for codec in codecs()]
    chosen: dict[str, None] = {}
    for codec in ids:
        if codec != "all" and codec not in known:
            raise InvalidError(f"unknown codec '{codec}', expected 'all' or one of {', '.join(known)}")
        chosen.update(dict.fromkeys(known if codec == "all" else [codec]))
    return list(chosen)


def check_match(artifact: _artifact.Artifact, checkpoint: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Check that an artifact holds the tensors of a checkpoint.

    Parameters
    ----------
    artifact
        The artifact.
    checkpoint
        The tensors of the report of ``compress``.
    folder
        The checkpoint, for messages.

    Raises
    ------
    InvalidError
        It is a delta, or names or shapes differ.
    """
    where = artifact.path
    if artifact.delta is not None:
        raise InvalidError(f"{where} is a delta; put it together with its base first: tenpak materialize")
    ours = {tensor["name"]: tuple(tensor["shape"]) for tensor in checkpoint}
    theirs = {name: entry.shape for name, entry in artifact.items()}
    remedy = "compress this model, or give the model it was made from"
    if missing := sorted(ours.keys() - theirs.keys()):
        raise InvalidError(f"{where} lacks {some(missing)}, which {folder} has; {remedy}")
    if foreign := sorted(theirs.keys() - ours.keys()):
        raise InvalidError(f"{where} has {some(foreign)}, which {folder} lacks; {remedy}")
    for name, shape in ours.items():
        if theirs[name] != shape:
            raise InvalidError(f"{where}: {name} has shape {list(theirs[name])}, {folder} has {list(shape)}; {remedy}")


def some(names: Sequence[str]) -> str:
    """Name up to three and count the rest."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
