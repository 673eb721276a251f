"""Many workers on a cluster of this machine: the directory of one process, even when a worker dies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tenpak
import tenpak.distributed as distributed

ray = pytest.importorskip("ray", reason="Ray is not installed; pip install 'tenpak[ray]'")

HOW: dict[str, Any] = {"codec": "int4_g8_v1", "max_shard_size": 60_000}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def marks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Path]]:
    """A cluster of two workers; each file that is made by the argument kills one worker in the midst of its work."""
    folder = tmp_path_factory.mktemp("marks")

    def hook() -> None:
        import os
        from pathlib import Path

        import tenpak

        plain = tenpak.compress

        def compress(*args: Any, **options: Any) -> Any:
            def step(done: int, total: int, name: str) -> None:
                for mark in Path(folder).iterdir():
                    mark.unlink()
                    os.kill(os.getpid(), 9)

            return plain(*args, progress=step, **options)

        tenpak.compress = compress

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 << 20,
        runtime_env={"worker_process_setup_hook": hook},
    )

    def mark(count: int) -> Path:
        for number in range(count):
            (folder / str(number)).touch()
        return folder

    yield mark
    ray.shutdown()


def test_a_worker_that_dies_loses_nothing(marks: Callable[[int], Path], tmp_path: Path, sample_model: Path) -> None:
    whole = tenpak.compress(sample_model, tmp_path / "whole", **HOW)
    folder = marks(1)
    told: list[str] = []
    report = distributed.compress(
        sample_model, tmp_path / "d", shards=3, progress=lambda done, total, name: told.append(name), **HOW
    )
    assert not list(folder.iterdir()), "no worker died"
    assert report["identity"] == whole["identity"] and report["parts"] == 3
    assert sorted(told) == ["part 1/3", "part 2/3", "part 3/3"]
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")


def test_parts_that_are_done_are_kept_when_a_run_fails(
    marks: Callable[[int], Path], tmp_path: Path, sample_model: Path
) -> None:
    whole = tenpak.compress(sample_model, tmp_path / "whole", **HOW)
    tenpak.compress(sample_model, tmp_path / "d", shard=(1, 2), **HOW)
    part = tmp_path / "d/part-00001-of-00002/part.json"
    made = part.stat().st_mtime_ns
    marks(2)
    with pytest.raises(tenpak.TenpakError, match="the worker of part 2/2 died again and again"):
        distributed.compress(sample_model, tmp_path / "d", shards=2, retries=1, **HOW)
    assert part.stat().st_mtime_ns == made
    report = distributed.compress(sample_model, tmp_path / "d", shards=2, **HOW)
    assert report["identity"] == whole["identity"]
    assert contents(tmp_path / "d") == contents(tmp_path / "whole")


def test_what_one_process_refuses_is_refused_as_such(
    marks: Callable[[int], Path], tmp_path: Path, sample_model: Path
) -> None:
    with pytest.raises(tenpak.UnsupportedError, match="unknown codec"):
        distributed.compress(sample_model, tmp_path / "d", shards=2, codec="int3_v9")
    with pytest.raises(tenpak.InvalidError, match="at least one of either"):
        distributed.compress(sample_model, tmp_path / "d", shards=0)
    with pytest.raises(tenpak.InvalidError, match="option threads is for one process"):
        distributed.compress(sample_model, tmp_path / "d", shards=1, threads=2)
    assert ray.is_initialized()
