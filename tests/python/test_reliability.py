"""Files that change under open handles, panics, signals, forks, threads: an exception or a result, never a crash.

`TENPAK_CAMPAIGN` says how often signals and forks are tried.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import oracle
import pytest
import tenpak
from conftest import ROOT, write_safetensors
from tenpak import _tenpak


def cases(default: int) -> int:
    """How many cases a campaign has."""
    return int(os.environ.get("TENPAK_CAMPAIGN", default))


def reached(campaign: str, count: int, what: str) -> None:
    """Say what `tests/campaigns` prints in its table."""
    print(f"campaign {campaign}: {count} cases, 0 failures; {what}")


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """An artifact of matrices of several chunks in all, and what they decode to beside it."""
    rng = np.random.default_rng(5)
    names = [f"layers.{i}.up_proj.weight" for i in range(6)]
    source = write_safetensors(
        tmp_path / "s.safetensors", {name: rng.standard_normal((512, 512), np.float32) for name in names}
    )
    tenpak.compress(source, tmp_path / "a.tenpak", codec="int8_sym_v1")
    return tmp_path / "a.tenpak"


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_an_artifact_that_is_cut_short_is_an_exception(artifact: Path, part: float) -> None:
    opened = tenpak.open(artifact)
    names = list(opened)
    planes = opened.planes(names[0])
    before = {plane: array.copy() for plane, array in planes.items()}
    os.truncate(artifact, int(artifact.stat().st_size * part))
    for read in (opened.decode, opened.planes):
        with pytest.raises(OSError, match="became shorter while it was read"):
            read(names[-1])
    with pytest.raises(OSError, match="became shorter"):
        opened.verify()
    # Planes that were handed out are memory of their own.
    for plane, array in planes.items():
        assert np.array_equal(array, before[plane])


def test_an_artifact_that_is_replaced_is_read_to_its_end_as_it_was(artifact: Path, tmp_path: Path) -> None:
    opened = tenpak.open(artifact)
    want = {name: tenpak.open(artifact).decode(name) for name in opened}
    (tmp_path / "other").write_bytes(b"something else")
    os.replace(tmp_path / "other", artifact)
    for name in opened:
        assert np.array_equal(opened.decode(name), want[name])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see what is mapped")
def test_nothing_is_mapped_unless_it_is_asked_for(artifact: Path) -> None:
    opened = tenpak.open(artifact)
    held = [opened.planes(name) for name in opened]
    assert str(artifact) not in Path("/proc/self/maps").read_text()
    mapped = tenpak.open(artifact, mmap=True)
    also = mapped.planes(next(iter(mapped)))
    assert str(artifact) in Path("/proc/self/maps").read_text()
    assert np.array_equal(held[0]["codes"], also["codes"])


#: What catches panics; `multiply_encoded` is `computed` in other words.
GUARD = re.compile(r"\b(guarded|interruptible|computed|multiply_encoded)\s*\(")
#: Entries that call nothing of the engine: they give what an object holds.
HELD = {
    "src/python/artifact.rs": {
        "name dtype shape codec transposed rows cols stored_bytes memory_bytes coding column_scales outliers",
        "bits_per_weight __repr__ path file_bytes identity names file_names entry",
    },
    "src/python/cuda.rs": {"cuda_use_compiler"},
    "src/python/gemm.rs": {"use_openmp"},
    "src/python/mod.rs": {"codec rows cols stored_bytes planes"},
}


def entries(text: str) -> Iterator[tuple[str, str]]:
    """Names and bodies of what Python can call in a Rust file."""
    for found in re.finditer(r"#\[py(function|methods)\]", text):
        start = text.index("{", text.index("fn " if found[1] == "function" else "impl ", found.end()))
        depth, end = 0, start
        for end in range(start, len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 0:
                break
        if found[1] == "function":
            name = re.search(r"fn (\w+)", text[found.end() : start])
            assert name is not None
            yield name[1], text[start:end]
        else:
            parts = re.split(r"\n    fn (\w+)", text[start:end])
            yield from zip(parts[1::2], parts[2::2], strict=True)


def test_every_entry_of_the_module_catches_panics() -> None:
    seen = 0
    for path in sorted((ROOT / "src/python").glob("*.rs")):
        file = str(path.relative_to(ROOT))
        held = {name for names in HELD.get(file, ()) for name in names.split()}
        bare = {name for name, body in entries(path.read_text()) if not GUARD.search(body)}
        assert bare == held, f"{file}: entries without a guard, or no longer without one: {bare ^ held}"
        seen += sum(1 for _ in entries(path.read_text()))
    assert seen > 50
    # Unwinding is what a guard catches, and what PyO3 catches around the others.
    assert "panic" not in (ROOT / "Cargo.toml").read_text()


def test_a_panic_is_an_exception_and_the_next_call_works() -> None:
    # The Python layer never asks for this: more weights than there are bytes, and more than there can be.
    weights = np.zeros(8, np.uint8)
    for rows, cols in [(4, 4), (1 << 40, 1 << 30)]:
        with pytest.raises(
            tenpak.TenpakError, match="(?s)internal error: .*; this is a bug of tenpak, please report it"
        ):
            _tenpak.encode(weights, "F16", rows, cols, "int4_g8_fp16_v1", None, None)
    encoded = tenpak.encode(np.ones((2, 8), np.float32), "int4_g8_fp16_v1")
    with pytest.raises(tenpak.TenpakError, match="internal error"):
        encoded._matrix.decode_into("F32", np.zeros(4, np.uint8))
    assert np.allclose(encoded.decode(), 1)


INTERRUPTED = """
import os, random, signal, sys, threading, tenpak
source, out, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
random.seed(1)
# What a shell starts in its background ignores the signal.
signal.signal(signal.SIGINT, signal.default_int_handler)
for i in range(count):
    timer = threading.Timer(random.uniform(0, 0.15), lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        timer.start()
        tenpak.compress(source, out, codec="int4_g32_fp16_v1", progress=None if i % 2 else lambda *a: None)
        print("ran to its end")
    except KeyboardInterrupt:
        pass
    assert not os.path.exists(out) and len(os.listdir(os.path.dirname(out))) == 0, i
    timer.join()
print("stopped", count)
"""


def test_ctrl_c_at_any_time_stops_the_work_and_leaves_nothing(tmp_path: Path) -> None:
    source, out = tmp_path / "large.safetensors", tmp_path / "out"
    out.mkdir()
    size = 2 << 30
    header = f'{{"layers.0.up_proj.weight":{{"dtype":"F32","shape":[131072,4096],"data_offsets":[0,{size}]}}}}'
    source.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    os.truncate(source, 8 + len(header) + size)
    count = cases(4)
    command = [sys.executable, "-c", INTERRUPTED, str(source), str(out / "a.tenpak"), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 + 10 * count, check=False)
    assert (done.returncode, done.stdout) == (0, f"stopped {count}\n"), done.stderr
    reached("ctrl-c", count, "KeyboardInterrupt each time, nothing left")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_children_forked_while_threads_work_do_their_own_work(artifact: Path) -> None:
    opened = tenpak.open(artifact)
    names = list(opened)
    want = opened.decode(names[0]).tobytes()
    stop = threading.Event()

    def decode() -> None:
        while not stop.is_set():
            opened.decode(names[1])

    count = cases(6)
    with ThreadPoolExecutor(2) as threads:
        work = [threads.submit(decode) for _ in range(2)]
        try:
            for _ in range(count):
                pid = os.fork()
                if pid == 0:
                    code = 1
                    try:
                        code = 0 if opened.decode(names[0]).tobytes() == want else 2
                    finally:
                        os._exit(code)
                until = time.monotonic() + 60
                status = None
                while status is None and time.monotonic() < until:
                    done, code = os.waitpid(pid, os.WNOHANG)
                    status = os.waitstatus_to_exitcode(code) if done else None
                    time.sleep(0.002)
                if status is None:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                assert status == 0, "the child hangs" if status is None else status
        finally:
            stop.set()
        for each in work:
            each.result()
    reached("fork", count, "two threads at work meanwhile")


def test_eight_threads_on_one_handle_and_one_that_changes_the_file(artifact: Path) -> None:
    whole = artifact.read_bytes()
    want = {name: tenpak.open(artifact).decode(name).tobytes() for name in tenpak.open(artifact)}
    rounds = cases(6)
    errors = results = 0
    for _ in range(rounds):
        artifact.write_bytes(whole)
        opened = tenpak.open(artifact)
        start = threading.Barrier(9)

        def read(first: int) -> tuple[int, int]:
            start.wait()  # noqa: B023  (all threads of a round have ended before the next one)
            names = list(want)
            bad = good = 0
            for i in range(12):
                name = names[(first + i) % len(names)]
                try:
                    assert opened.decode(name).tobytes() == want[name]  # noqa: B023
                    good += 1
                except (OSError, tenpak.CorruptError):
                    bad += 1
            return bad, good

        def change() -> None:
            start.wait()  # noqa: B023
            for size in (len(whole) * 3 // 4, len(whole) // 2, len(whole) // 4):
                time.sleep(0.003)
                os.truncate(artifact, size)

        with ThreadPoolExecutor(9) as threads:
            readers = [threads.submit(read, i) for i in range(8)]
            threads.submit(change).result()
            for reader in readers:
                bad, good = reader.result()
                errors, results = errors + bad, results + good
    assert errors + results == rounds * 8 * 12
    assert oracle.read(whole).header.tensors
    reached("threads", rounds, f"8 threads and a mutator: {results} right results, {errors} errors")
