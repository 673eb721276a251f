"""Compressing a model on many machines: one task of Ray per part, paths instead of bytes, and nothing lost on the way.

Ray is imported here when it is used and nowhere else; ``pip install 'tenpak[ray]'``. Without it, run ``tenpak compress
--shard I/N`` in any scheduler and ``tenpak merge-index`` when all are done: this module does nothing more.
"""

import os
from typing import Any

import tenpak

from ._errors import InvalidError, TenpakError
from ._types import Path, Progress, Report

__all__ = ["compress"]


def compress(
    source: Path,
    output: Path,
    *,
    shards: int,
    cpus: int = 1,
    retries: int = 3,
    force: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Compress a checkpoint in so many parts at once, on the cluster that Ray is connected to, and put them together.

    Where Ray is not initialized, ``ray.init()`` is called, which connects to the cluster of ``RAY_ADDRESS`` or starts
    one on this machine, and is undone at the end. Every machine must see ``source`` and ``output`` under the same
    paths.

    A part appears whole or not at all, so a worker that is killed is simply run again, and so is this function: parts
    that are there already are kept, and checked to be of the same source and options when all are put together.

    Parameters
    ----------
    source
        ``.safetensors``, Hugging Face directory, ``.npz``, ``.npy`` or JSON bundle.
    output
        Directory to write; the bytes in it are those that one process would write.
    shards
        How many parts. Shards of the directory are not divided, so more parts than shards are of no use: choose
        ``max_shard_size`` accordingly.
    cpus
        Processors that a task asks Ray for, and its threads.
    retries
        How often a part whose worker died is tried again.
    force
        Write parts anew that are there already.
    progress
        Called with source bytes done, source bytes in all as far as they are known, and the part's name, whenever a
        part is done.
    **options
        As for :func:`tenpak.compress`.

    Returns
    -------
    dict
        The report of :func:`tenpak.merge_index`.

    Raises
    ------
    ImportError
        Ray is not installed.
    InvalidError
        No part, or whatever :func:`tenpak.compress` or :func:`tenpak.merge_index` refuses.
    TenpakError
        The worker of a part died more often than ``retries`` allows; parts that are done stay.
    """
    if shards < 1 or cpus < 1:
        raise InvalidError(f"{shards} parts with {cpus} processors each, expected at least one of either")
    if wrong := {"shard", "threads", "dry_run"} & options.keys():
        raise InvalidError(f"option {min(wrong)} is for one process, use shards, cpus or tenpak.compress")
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ImportError("Ray is not installed; pip install 'tenpak[ray]'") from error
    places = (os.path.abspath(source), os.path.abspath(output))
    own = not ray.is_initialized()
    if own:
        ray.init(log_to_driver=False)
    try:
        task = ray.remote(num_cpus=cpus, max_retries=retries)(_part)
        names = {
            task.remote(*places, (number, shards), force, options | {"threads": cpus}): f"part {number}/{shards}"
            for number in range(1, shards + 1)
        }
        _wait(ray, names, progress)
    finally:
        if own:
            ray.shutdown()
    return tenpak.merge_index(places[1])


def _part(source: str, output: str, shard: tuple[int, int], force: bool, options: dict[str, Any]) -> int:
    """Write a part, unless it is there, and return the bytes of the source in it; runs in a worker."""
    number, of = shard
    # A worker may have died between its last step and its answer.
    if not force and os.path.isfile(os.path.join(output, f"part-{number:05}-of-{of:05}", "part.json")):
        return 0
    report = tenpak.compress(source, output, shard=shard, force=force, **options)
    return sum(tensor["source_bytes"] for tensor in report["tensors"])


def _wait(ray: Any, names: dict[Any, str], progress: Progress | None) -> None:
    """Wait for all tasks; the first that fails stops the others."""
    left, done = list(names), 0
    try:
        while left:
            (ready, *_), left = ray.wait(left)
            try:
                done += ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                raise getattr(error, "cause", None) or error from None
            except ray.exceptions.RayError as error:
                raise TenpakError(
                    f"the worker of {names[ready]} died again and again: {error}; parts that are done are kept, run "
                    "this again for the others"
                ) from error
            if progress is not None:
                progress(done, done, names[ready])
    except BaseException:
        for task in left:
            ray.cancel(task)
        raise
