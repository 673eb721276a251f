"""Other quantizers, where they are installed: run them on a model and bring in what they made, to compare with.

Nothing of them is imported before it is used. A tool writes a checkpoint of its own format into a temporary folder, and
:func:`tenpak.compress` takes that over: codes and scales as they are where a codec holds them, decoded weights
elsewhere. PyTorch and transformers are needed: ``pip install 'tenpak[torch,hf]'``.
"""

import importlib.metadata
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path as _Path
from typing import Any

import tenpak

from ._errors import InvalidError
from ._types import Path, Report

__all__ = ["METHODS", "available", "check", "run"]


@dataclass(frozen=True)
class _Job:
    """What a tool is asked for."""

    model: _Path
    folder: _Path
    bits: int
    group: int
    samples: int
    length: int
    text: _Path | None
    options: Mapping[str, Any]

    def texts(self, tokenizer: Any) -> list[str]:
        """Cut the first samples of the text, of ``length`` tokens each."""
        if self.text is None:
            raise InvalidError("the method looks at activations, so it needs a text; pass text")
        ids = tokenizer(self.text.read_text(encoding="utf-8"))["input_ids"]
        starts = range(0, len(ids) - self.length + 1, self.length)
        found = [tokenizer.decode(ids[at : at + self.length]) for at in starts[: self.samples]]
        if not found:
            raise InvalidError(f"{self.text} has {len(ids)} tokens, fewer than one sample of {self.length}")
        return found


def _loaded(job: _Job) -> tuple[Any, Any]:
    """Load the model in F32 and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="float32")
    return model, AutoTokenizer.from_pretrained(job.model)


def _bitsandbytes(job: _Job) -> None:
    """NF4 in blocks of 64, or LLM.int8; no data."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if job.bits not in (4, 8):
        raise InvalidError(f"bitsandbytes has 4 and 8 bits, not {job.bits}")
    choice = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if job.bits == 4 else {"load_in_8bit": True}
    config = BitsAndBytesConfig(**(choice | dict(job.options)))
    model = AutoModelForCausalLM.from_pretrained(job.model, quantization_config=config, device_map="cpu")
    model.save_pretrained(job.folder)


def _auto_round(job: _Job) -> None:
    """Signed gradient descent on the rounding of each block, symmetric codes; saved in GPTQ's format."""
    from auto_round import AutoRound

    model, tokenizer = _loaded(job)
    given = {"nsamples": job.samples, "seqlen": job.length, "device_map": "cpu"} | dict(job.options)
    quantizer = AutoRound(
        model, tokenizer, bits=job.bits, group_size=job.group, sym=True, dataset=job.texts(tokenizer), **given
    )
    quantizer.quantize_and_save(str(job.folder), format="auto_gptq")


def _gptqmodel(job: _Job) -> None:
    """GPTQ with symmetric codes and columns in their order."""
    if (os.cpu_count() or 1) < 3:
        # By itself it takes half of the processors and then asks for two of them.
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    config = QuantizeConfig(bits=job.bits, group_size=job.group, desc_act=False, sym=True, **job.options)
    model = GPTQModel.load(str(job.model), config)
    model.quantize(job.texts(tokenizer), batch_size=1)
    model.save(str(job.folder))


#: What each method runs, by the name of its distribution.
METHODS: Mapping[str, Callable[[_Job], None]] = {
    "auto-round": _auto_round,
    "bitsandbytes": _bitsandbytes,
    "gptqmodel": _gptqmodel,
}


def available() -> dict[str, str | None]:
    """Every method with the version that is installed, or None."""
    found: dict[str, str | None] = {}
    for name in METHODS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def check(method: str) -> None:
    """Check that a method can be run.

    Raises
    ------
    ImportError
        It is not installed.
    InvalidError
        There is no such method.
    """
    if method not in METHODS:
        raise InvalidError(f"method {method!r}, expected one of {', '.join(METHODS)}")
    if available()[method] is None:
        raise ImportError(f"{method} is not installed; install it with: pip install {method}")


def run(
    method: str,
    model: Path,
    output: Path,
    *,
    bits: int = 4,
    group: int = 128,
    text: Path | None = None,
    samples: int = 128,
    length: int = 512,
    options: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Report:
    """Quantize a model with another tool, on the CPU, and write what it made as an artifact.

    Parameters
    ----------
    method
        ``auto-round``, ``bitsandbytes`` or ``gptqmodel``, which must be installed.
    model
        Hugging Face directory of the model.
    output
        Artifact to write, as for :func:`tenpak.compress`.
    bits
        Of a code.
    group
        Weights that share a scale, where the tool has a choice: bitsandbytes has blocks of 64.
    text
        UTF-8 file that activations come from, for all but bitsandbytes; never one that scores the result.
    samples, length
        How many pieces of the text, from the first on, and their tokens.
    options
        Handed to the tool: to ``AutoRound``, ``BitsAndBytesConfig`` or ``QuantizeConfig``.
    force
        Replace an existing output.

    Returns
    -------
    dict
        The report of :func:`tenpak.compress`; ``imported`` says of each tensor what it was.

    Raises
    ------
    ImportError
        The tool is not installed.
    InvalidError
        There is no such method, the text is missing or short, or the output exists.
    """
    check(method)
    if os.path.lexists(output) and not force:
        raise InvalidError(f"output {os.fspath(output)} exists; choose another name or pass force=True")
    with tempfile.TemporaryDirectory(prefix="tenpak-") as name:
        folder = _Path(name)
        given = None if text is None else _Path(text)
        METHODS[method](_Job(_Path(model), folder, bits, group, samples, length, given, options or {}))
        # Some tools write a folder of their own into the one that they are given.
        configs = sorted(folder.rglob("config.json"), key=lambda path: len(path.parts))
        if not configs:
            raise InvalidError(f"{method} has written no config.json")
        return tenpak.compress(configs[0].parent, output, force=force)
