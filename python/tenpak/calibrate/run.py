"""The run itself: the text through the model, in as many passes as the sums need, with a journal."""

import contextlib
import hashlib
import itertools
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers

from .. import _tenpak, compress
from .._errors import InvalidError
from ..evaluate import session
from ..evaluate.weights import source_model
from ..evaluate.windows import Windows, cut
from . import Summary
from .journal import Journal, Layout
from .linears import Linear, linears
from .moments import Moments, kinds

#: Called with windows done, windows in all, and what is done; an exception stops the work.
Progress = Callable[[int, int, str], object]
#: Most tokens of a batch, where the batch is chosen here.
_BATCH_TOKENS = 4096
#: Least seconds between two saves, and how many times longer than a save takes.
_SAVE_SECONDS, _SAVE_FACTOR = 60.0, 20.0


@dataclass(frozen=True)
class Plan:
    """What to calculate; see :func:`tenpak.calibrate.calibrate`.

    Attributes
    ----------
    model, text, output
        Directory of the model, file of the text, file to write.
    text_bytes
        The text.
    tokens, context, window_batch, full, fisher, memory_bytes, threads
        As they were given.
    """

    model: Path
    text: Path
    text_bytes: bytes
    output: Path
    tokens: int | None
    context: int | None
    window_batch: int
    full: bool
    fisher: bool
    memory_bytes: int
    threads: int


def run(plan: Plan, *, resume: bool, force: bool, progress: Progress) -> Summary:
    """Carry out a plan that has been checked."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(session.quiet_transformers())
        stack.enter_context(session.threads(plan.threads))
        tokenizer = transformers.AutoTokenizer.from_pretrained(plan.model, local_files_only=True)
        config = transformers.AutoConfig.from_pretrained(plan.model, local_files_only=True)
        windows = cut(plan.text, plan.text_bytes, tokenizer, config, plan.tokens, plan.context)
        model = source_model(plan.model, torch.float32).requires_grad_(False)
        checkpoint = compress(plan.model, dry_run=True, codec="raw_v1")["tensors"]
        layers, skipped = linears(model, {tensor["name"] for tensor in checkpoint})
        if not layers:
            raise InvalidError(f"{plan.model}: no linear layer whose weight is in the checkpoint; nothing to calibrate")
        with _Patience() as patience:
            return _Run(plan, windows, model, layers, skipped, resume, force, progress, patience).run()


class _Run:
    """A run under way."""

    def __init__(
        self,
        plan: Plan,
        windows: Windows,
        model: Any,
        layers: Sequence[Linear],
        skipped: list[str],
        resume: bool,
        force: bool,
        progress: Progress,
        patience: "_Patience",
    ) -> None:
        """Divide the layers into passes and begin the journal, or take it up."""
        self._patience = patience
        self._plan, self._windows, self._model, self._progress = plan, windows, model, progress
        self._skipped = skipped
        self._passes = list(_passes(layers, plan))
        count, context = windows.ids.shape
        self._batch = 1 if plan.fisher else plan.window_batch or max(1, _BATCH_TOKENS // context)
        tensors = [(f"{layer.name}.{kind.name}", kind) for layer in layers for kind in self._kinds(layer)]
        self._layout = Layout(tensors, _metadata(plan, windows, len(layers)))
        ours = {
            "model": _digest(plan.model),
            "text": windows.sha256,
            "context": context,
            "tokens": count * context,
            "window batch": self._batch,
            "statistics": [kind.name for kind in self._kinds(layers[0])],
            "passes": [[layer.name for layer in layers] for layers in self._passes],
            "threads": torch.get_num_threads(),
            "version": [_tenpak.__version__, torch.__version__, transformers.__version__],
            "header": hashlib.sha256(self._layout.header).hexdigest(),
        }
        self._journal = Journal(plan.output, ours, self._layout, resume, force)
        self._layers = layers

    def _kinds(self, layer: Linear) -> list[Any]:
        return kinds(layer, self._plan.full, self._plan.fisher)

    def run(self) -> Summary:
        """Run the passes that are left."""
        count, context = self._windows.ids.shape
        stage, windows = self._journal.stage
        resumed = stage * count + windows
        for number in range(stage, len(self._passes)):
            self._pass(number, windows)
            windows = 0
        self._patience.check()
        self._progress(count * len(self._passes), count * len(self._passes), "writing")
        self._journal.finish()
        return Summary(
            output=str(self._plan.output),
            bytes=self._layout.bytes,
            linears=len(self._layers),
            tokens=count * context,
            windows=count,
            context=context,
            passes=len(self._passes),
            resumed=resumed,
            skipped=self._skipped,
        )

    def _pass(self, number: int, done: int) -> None:
        """Run the text from window ``done`` on for the layers of one pass."""
        layers, count = self._passes[number], len(self._windows.ids)
        moments = Moments(layers, self._plan.full, self._plan.fisher)
        if done:
            moments.sums.update(self._journal.sums)
        total = count * len(self._passes)
        name = "calibrating" if len(self._passes) == 1 else f"pass {number + 1} of {len(self._passes)}"
        with contextlib.ExitStack() as stack:
            for handle in moments.attach():
                stack.callback(handle.remove)
            saved, save_seconds = time.monotonic(), 0.0
            while done < count:
                ids = self._windows.ids[done : done + self._batch]
                self._forward(ids)
                moments.forget()
                done += len(ids)
                try:
                    self._patience.check()
                    self._progress(number * count + done, total, name)
                except BaseException:
                    # Between two batches the sums are whole.
                    self._journal.save((number, done), moments.sums)
                    raise
                now = time.monotonic()
                if now - saved > max(_SAVE_SECONDS, _SAVE_FACTOR * save_seconds):
                    self._journal.save((number, done), moments.sums)
                    saved = time.monotonic()
                    save_seconds = saved - now
        scored = count * (self._windows.ids.shape[1] - 1)
        for layer in layers:
            layer.weight.requires_grad_(False)
            self._journal.put([(f"{layer.name}.{kind.name}", a) for kind, a in moments.statistics(layer, scored)])
        self._journal.save((number + 1, 0), {})

    def _forward(self, ids: torch.Tensor) -> None:
        """Run a batch of windows, and backward where gradients are wanted."""
        with torch.set_grad_enabled(self._plan.fisher):
            logits = self._model(input_ids=ids, use_cache=False).logits
            if self._plan.fisher:
                scored = logits[:, :-1].flatten(0, 1).float()
                targets = ids[:, 1:].flatten()
                loss: Any = torch.nn.functional.cross_entropy(scored, targets, reduction="sum")
                loss.backward()


class _Patience:
    """Holds SIGINT and SIGTERM back until sums are whole; a second one comes through at once."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._before: dict[int, Any] = {}
        self._came: int | None = None

    def __enter__(self) -> "_Patience":
        """Watch signals, where this thread may."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._came is not None:
            self._deliver(number)
        self._came = number

    def _deliver(self, number: int) -> None:
        self.__exit__()
        signal.raise_signal(number)

    def check(self) -> None:
        """Let a signal through that came meanwhile."""
        if self._came is not None:
            self._deliver(self._came)


def _passes(layers: Sequence[Linear], plan: Plan) -> Iterator[list[Linear]]:
    """Divide layers into runs whose sums fit the memory; a layer that does not fit is a run of its own."""
    here: list[Linear] = []
    used = 0
    for layer in layers:
        needed = 8 * sum(torch.Size(kind.shape).numel() for kind in kinds(layer, plan.full, plan.fisher))
        if here and used + needed > plan.memory_bytes:
            yield here
            here, used = [], 0
        here.append(layer)
        used += needed
    yield here


def _metadata(plan: Plan, windows: Windows, layers: int) -> dict[str, str]:
    count, context = windows.ids.shape
    return {
        "format": "tenpak statistics 1",
        "tool": f"tenpak {_tenpak.__version__}",
        "model": plan.model.resolve().name,
        "model_sha256": _digest(plan.model),
        "text": plan.text.name,
        "text_sha256": windows.sha256,
        "windows": str(count),
        "context": str(context),
        "tokens": str(count * context),
        "linears": str(layers),
    }


def _digest(folder: Path) -> str:
    """Return a SHA-256 over names and digests of the weights' files and of the settings."""
    found = sorted(itertools.chain(folder.glob("*.safetensors"), [folder / "config.json"]))
    digests = []
    for path in found:
        with open(path, "rb") as file:
            digests.append([path.name, hashlib.file_digest(file, "sha256").hexdigest()])
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()
