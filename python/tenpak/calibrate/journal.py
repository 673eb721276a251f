"""The journal of a run: a directory beside the output with the file under way and the sums so far.

| file | what |
|---|---|
| `plan.json` | what is calculated; another plan cannot go on from here |
| `body` | the statistics file, with those layers in their places that are done |
| `sums.safetensors` | the sums of the layers under way, and after how many windows |

`body` is on disk before `sums.safetensors` says so, and both are replaced in one step, so that a crash at any moment
leaves a journal that a run can go on from. The file appears under its name when all is done.
"""

import json
import os
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from .._console import umask
from .._errors import InvalidError
from .moments import Array, Kind

#: Bytes of an element.
_SIZE = {"F32": 4, "F64": 8, "I64": 8}


class Layout:
    """Where each statistic lies in the file.

    Attributes
    ----------
    header
        What stands before the data.
    bytes
        Length of the file.
    """

    def __init__(self, tensors: Sequence[tuple[str, Kind]], metadata: Mapping[str, str]) -> None:
        """Place tensors, those of 8-byte elements first, so that all are aligned."""
        entries: dict[str, Any] = {"__metadata__": dict(metadata)}
        at = 0
        for name, kind in sorted(tensors, key=lambda tensor: -_SIZE[tensor[1].dtype]):
            size = _SIZE[kind.dtype] * int(np.prod(kind.shape, dtype=np.int64))
            offsets = [at, at + size]
            entries[name] = {"dtype": kind.dtype, "shape": list(kind.shape), "data_offsets": offsets}
            at += size
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.header = struct.pack("<Q", len(text)) + text
        self.bytes = len(self.header) + at
        self._places: dict[str, int] = {
            name: len(self.header) + entry["data_offsets"][0] for name, entry in entries.items() if "dtype" in entry
        }

    def place(self, name: str) -> int:
        """Return the byte at which a tensor begins."""
        return self._places[name]


class Journal:
    """The directory of a run under way.

    Attributes
    ----------
    stage
        The pass and the windows done of it, as they were saved last.
    sums
        The sums saved last, by ``weight name`` and kind; empty at the start of a pass.
    """

    def __init__(self, output: Path, plan: Mapping[str, Any], layout: Layout, resume: bool, force: bool) -> None:
        """Begin a journal, or take up the one that is there.

        Raises
        ------
        InvalidError
            There is one already and it is neither to be taken up nor to be replaced, or it is of another run.
        """
        self._output, self._layout = output, layout
        self._folder = output.with_name(output.name + ".partial")
        self.stage = (0, 0)
        self.sums: dict[str, dict[str, torch.Tensor]] = {}
        text = json.dumps(plan, indent=1, sort_keys=True)
        plan_file = self._folder / "plan.json"
        # A directory without a plan is what a run left that ended before it had begun.
        if plan_file.exists():
            if resume:
                self._take_up(plan_file, text)
                return
            if not force:
                raise InvalidError(
                    f"{self._folder}: an interrupted run left this; pass --resume to go on, or --force to start anew"
                )
        if self._folder.exists():
            shutil.rmtree(self._folder)
        self._folder.mkdir()
        with open(self._folder / "body", "wb") as file:
            file.write(layout.header)
            file.truncate(layout.bytes)
            _sync(file)
        self._replace("plan.json", lambda path: path.write_text(text, encoding="utf-8"))

    def _take_up(self, plan_file: Path, text: str) -> None:
        theirs, ours = json.loads(plan_file.read_text(encoding="utf-8")), json.loads(text)
        differing = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
        if differing:
            raise InvalidError(
                f"{self._folder} is of a run with another {', '.join(differing)}; "
                "give the same arguments, or --force to start anew"
            )
        sums = self._folder / "sums.safetensors"
        if not sums.exists():
            return
        with safetensors.safe_open(sums, framework="pt") as file:
            metadata = file.metadata()
            self.stage = (int(metadata["pass"]), int(metadata["windows"]))
            for key in file.keys():  # noqa: SIM118 - not a mapping
                name, _, kind = key.rpartition(".")
                self.sums.setdefault(name, {})[kind] = file.get_tensor(key)

    def save(self, stage: tuple[int, int], sums: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Save sums after so many windows of a pass; none at the start of one."""
        flat = {f"{name}.{kind}": tensor for name, kinds in sums.items() for kind, tensor in kinds.items()}
        metadata = {"pass": str(stage[0]), "windows": str(stage[1])}
        self._replace("sums.safetensors", lambda path: safetensors.torch.save_file(flat, path, metadata))
        self.stage = stage

    def put(self, statistics: Sequence[tuple[str, Array]]) -> None:
        """Write statistics into their places in the file, and onto the disk."""
        with open(self._folder / "body", "r+b") as file:
            for name, array in statistics:
                file.seek(self._layout.place(name))
                file.write(np.ascontiguousarray(array).tobytes())
            _sync(file)

    def finish(self) -> None:
        """Give the file its name and remove the journal."""
        body = self._folder / "body"
        body.chmod(0o666 & ~umask())
        body.replace(self._output)
        _sync_directory(self._output.absolute().parent)
        shutil.rmtree(self._folder)

    def _replace(self, name: str, fill: Any) -> None:
        """Write a file of the journal that is there whole or not at all."""
        new = self._folder / f"{name}.new"
        fill(new)
        with open(new, "r+b") as file:
            _sync(file)
        new.replace(self._folder / name)
        _sync_directory(self._folder)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
