"""The run itself: the source model once, then one quantized model after the other over the same windows."""

import contextlib
import functools
import gc
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
import transformers

from .. import _artifact, _tenpak, compress
from .._errors import InvalidError
from . import session, weights
from .fidelity import Scores, fidelity, perplexity
from .plan import Candidate, Plan
from .report import Baseline, Evaluation, Row, Sizes
from .windows import Windows, cut

#: Called with windows done, windows in all, and the name of the row; an exception stops the work.
Progress = Callable[[int, int, str], object]
#: Most bytes of a batch's logits, where the batch is chosen here, and most windows.
_BATCH_BYTES, _BATCH_WINDOWS = 64 << 20, 8


@dataclass(frozen=True)
class Setting:
    """What all rows share.

    Attributes
    ----------
    windows
        The tokens.
    batch
        Windows per forward pass.
    vocabulary
        Logits per token.
    dtype
        Dtype of the forward pass.
    """

    windows: Windows
    batch: int
    vocabulary: int
    dtype: torch.dtype

    @property
    def logits_bytes(self) -> int:
        """Bytes of the float32 logits of all scored tokens."""
        count, context = self.windows.ids.shape
        return count * (context - 1) * self.vocabulary * 4

    def batches(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Iterate over the number of the first window and the tokens of each batch."""
        for first in range(0, len(self.windows.ids), self.batch):
            yield first, self.windows.ids[first : first + self.batch]

    def logits(self, model: Any, ids: torch.Tensor, what: str) -> torch.Tensor:
        """Run a batch and return the logits of its scored tokens, float32 ``[batch, context - 1, vocabulary]``."""
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        if not bool(torch.isfinite(logits).all()):
            raise InvalidError(
                f"{what} gives logits that are not finite; its weights overflow, or the dtype is too narrow"
            )
        return logits


class BaseLogits:
    """The source model's logits: kept in a file, or computed again whenever they are asked for."""

    def __init__(self, setting: Setting, model: Any, path: Path | None) -> None:
        """Take the model, and where its logits are to be kept, if they are."""
        self._setting, self._model = setting, model
        self._file = None if path is None else open(path, "w+b")  # noqa: SIM115 - closed by close()

    @property
    def kept(self) -> bool:
        """Whether they are in a file."""
        return self._file is not None

    def compute(self, first: int, ids: torch.Tensor) -> torch.Tensor:
        """Run the model, and keep what it gives where that is wanted."""
        logits = self._setting.logits(self._model, ids, "the source model")
        if self._file is not None:
            self._file.seek(first * self._window_bytes())
            self._file.write(_bytes(logits.contiguous()))
        return logits

    def release_model(self) -> None:
        """Let go of the model where its logits are kept: nothing else needs it any more."""
        if self.kept:
            self._model = None

    def get(self, first: int, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits of a batch that has been computed."""
        if self._file is None:
            return self._setting.logits(self._model, ids, "the source model")
        logits = torch.empty(len(ids), ids.shape[1] - 1, self._setting.vocabulary)
        self._file.seek(first * self._window_bytes())
        buffer = _bytes(logits)
        while buffer:
            read = self._file.readinto(buffer)
            if not read:
                raise OSError(f"{self._file.name}: the kept logits end early")
            buffer = buffer[read:]
        return logits

    def _window_bytes(self) -> int:
        return self._setting.logits_bytes // len(self._setting.windows.ids)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def run(plan: Plan, progress: Progress | None) -> Evaluation:
    """Carry out a plan that has been checked; see :func:`tenpak.evaluate.evaluate`."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(session.quiet_transformers())
        stack.enter_context(session.threads(plan.threads))
        stack.enter_context(torch.inference_mode())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tenpak-eval-")))
        return _run(plan, folder, stack, progress or (lambda done, total, name: None))


def _run(plan: Plan, folder: Path, stack: contextlib.ExitStack, progress: Progress) -> Evaluation:
    tokenizer = transformers.AutoTokenizer.from_pretrained(plan.model, local_files_only=True)
    config = transformers.AutoConfig.from_pretrained(plan.model, local_files_only=True)
    windows = cut(plan.text, plan.text_bytes, tokenizer, config, plan.tokens, plan.context)
    if plan.stats is not None:
        _check_text(plan.stats, windows)
    dtype = getattr(torch, plan.dtype)

    started = time.perf_counter()
    model = weights.source_model(plan.model, dtype)
    load_seconds = time.perf_counter() - started
    setting = _setting(plan, windows, model, dtype)
    keep = 0 < setting.logits_bytes <= min(plan.cache_bytes, shutil.disk_usage(folder).free // 2)
    logits = BaseLogits(setting, model, folder / "logits" if keep and plan.candidates else None)
    stack.callback(logits.close)
    count, context = windows.ids.shape
    total = count * (1 + len(plan.candidates))

    started = time.perf_counter()
    base = Scores.empty(count, context)
    noise_floor = 0.0
    for first, ids in setting.batches():
        progress(first, total, "source")
        ours = logits.compute(first, ids)
        if first == 0:
            again = Scores.empty(len(ids), context)
            again.put(0, logits.get(0, ids), setting.logits(model, ids, "the source model"), ids[:, 1:])
            noise_floor = float(again.kld.max())
        base.put(first, ours, ours, ids[:, 1:])
    ppl, ppl_error = perplexity(base.nll)
    baseline = Baseline(
        size=plan.size,
        ppl=ppl,
        ppl_error=ppl_error,
        noise_floor=noise_floor,
        memory_bytes=weights.memory_bytes(model),
        load_seconds=load_seconds,
        score_seconds=time.perf_counter() - started,
    )
    source = (type(model), model.config)
    logits.release_model()
    del model

    rows = []
    for i, candidate in enumerate(plan.candidates):
        gc.collect()  # the model before this one, whose modules know each other
        at = count * (1 + i)
        here = _Here(plan, folder, setting, logits, source)
        rows.append(_row(candidate, here, base, functools.partial(_shifted, progress, at, total)))
    progress(total, total, "")
    return Evaluation(
        model=os.fspath(plan.model),
        text=os.fspath(plan.text),
        text_sha256=windows.sha256,
        text_tokens=windows.text_tokens,
        context=context,
        windows=count,
        scored=count * (context - 1),
        vocabulary=setting.vocabulary,
        dtype=plan.dtype,
        compute=plan.compute,
        threads=torch.get_num_threads(),
        window_batch=setting.batch,
        base_logits="kept" if logits.kept else "recomputed",
        base_logits_bytes=setting.logits_bytes,
        baseline=baseline,
        rows=rows,
    )


def _check_text(stats: Path, windows: Windows) -> None:
    """Refuse statistics of the very text that is scored: what they gain on it they gain nowhere else.

    Raises
    ------
    InvalidError
        They are.
    """
    with safetensors.safe_open(stats, framework="pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("text_sha256") == windows.sha256:
        raise InvalidError(f"{stats} was calibrated on the text that is to be scored; calibrate on another one")


@dataclass(frozen=True)
class _Here:
    """The surroundings of a row."""

    plan: Plan
    folder: Path
    setting: Setting
    logits: BaseLogits
    source: tuple[Any, Any]


def _row(candidate: Candidate, here: _Here, base: Scores, progress: Callable[[int, str], object]) -> Row:
    """Measure one quantized model."""
    progress(0, candidate.name)
    plan, setting = here.plan, here.setting
    path, encode_seconds, notes = candidate.artifact, None, []
    if path is None:
        path = here.folder / "row.tenpak"
        started = time.perf_counter()
        report = compress(
            plan.model,
            path,
            recipe=candidate.recipe,
            stats=plan.stats,
            fit=plan.fit,
            force=True,
            threads=plan.threads,
            mmap=plan.mmap,
        )
        encode_seconds = time.perf_counter() - started
        notes = report["notes"]
    artifact = _artifact.open(path, mmap=plan.mmap)
    entries = weights.quantized(artifact)
    stored = sum(entry.stored_bytes for entry in artifact.values())
    everything = Sizes(sum(map(_elements, artifact.values())), weights.weight_bytes(artifact))

    started = time.perf_counter()
    if plan.compute == "decoded":
        model = weights.model_of(artifact, here.source, setting.dtype)
    else:
        model = weights.packed_model_of(path, setting.dtype, plan.compute)
    load_seconds = time.perf_counter() - started

    started = time.perf_counter()
    scores = Scores.empty(*setting.windows.ids.shape)
    for first, ids in setting.batches():
        progress(first, candidate.name)
        theirs = setting.logits(model, ids, candidate.name)
        scores.put(first, here.logits.get(first, ids), theirs, ids[:, 1:])
    score_seconds = time.perf_counter() - started
    return Row(
        name=candidate.name,
        kind=candidate.kind,
        codecs=dict(sorted(Counter(entry.codec for entry in entries).items())),
        matrices=Sizes(sum(map(_elements, entries)), sum(e.stored_bytes for e in entries)) if entries else None,
        file=everything,
        overhead_bytes=everything.bytes - stored,
        nmse=weights.nmse(artifact, plan.model),
        fidelity=fidelity(scores, base.nll),
        memory_bytes=weights.memory_bytes(model),
        encode_seconds=encode_seconds,
        load_seconds=load_seconds,
        score_seconds=score_seconds,
        notes=notes,
    )


def _shifted(progress: Progress, at: int, total: int, done: int, name: str) -> None:
    """Report progress of a row that began at window ``at`` of all rows' windows."""
    progress(at + done, total, name)


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    view: memoryview = tensor.numpy().reshape(-1).view(np.uint8).data
    return view


def _elements(entry: _tenpak.Entry) -> int:
    return int(np.prod(entry.shape, dtype=np.int64))


def _setting(plan: Plan, windows: Windows, model: Any, dtype: torch.dtype) -> Setting:
    """Find out how many logits a token has and how many windows go into a batch."""
    vocabulary = model(input_ids=windows.ids[:1, :1], use_cache=False).logits.shape[-1]
    fits = _BATCH_BYTES // (4 * windows.ids.shape[1] * vocabulary)
    return Setting(windows, plan.window_batch or max(1, min(_BATCH_WINDOWS, fits)), vocabulary, dtype)
