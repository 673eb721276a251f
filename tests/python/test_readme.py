"""The README's commands and its Python snippet, run as they stand."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    parts = README.split("```")[1::2]
    return [part.removeprefix(language + "\n") for part in parts if part.startswith(language + "\n")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sample = ROOT / "tests" / "data" / "tiny-books"
    for name in ("model", "finetuned", "tests/data/tiny-books"):
        shutil.copytree(sample, tmp_path / name)
    return tmp_path


def test_the_commands_of_a_checkpoint_s_life_work_in_order(folder: Path) -> None:
    blocks = [part.strip().splitlines() for part in README.split("```")[1::2]]
    lines = next(block for block in blocks if block[0].startswith("tenpak "))
    assert len(lines) == 12
    for line in lines:
        command = shlex.split(line, comments=True)
        command[0] = os.environ.get("TENPAK_BIN", command[0])
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}: {done.stderr}"
    assert (folder / "finetuned.tenpak").read_bytes() == (folder / "model.tenpak").read_bytes()
    assert (folder / "again.tenpak").read_bytes() == (folder / "model.tenpak").read_bytes()


def run(snippet: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", snippet], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_snippet_works(folder: Path) -> None:
    snippet, *_ = blocks("python")
    assert len(run(snippet, folder).split()) == 3


def test_the_snippet_of_transformers_works(folder: Path) -> None:
    for module in ("torch", "transformers", "accelerate"):
        pytest.importorskip(module, reason=f"{module} is not installed; pip install 'tenpak[torch,hf]'")
    _, snippet, *_ = blocks("python")
    assert "codec=int4_g32_fp16_v1, 5.000 bits/weight" in run(snippet, folder)


def test_the_snippet_of_graphics_devices_works(folder: Path) -> None:
    for module in ("torch", "transformers", "accelerate"):
        pytest.importorskip(module, reason=f"{module} is not installed; pip install 'tenpak[torch,hf]'")
    *_, snippet = blocks("python")
    assert "bits/weight, backend=wgpu" in run(snippet, folder)


def test_the_snippet_of_caches_and_drafts_works(folder: Path) -> None:
    for module in ("torch", "transformers", "accelerate"):
        pytest.importorskip(module, reason=f"{module} is not installed; pip install 'tenpak[torch,hf]'")
    _, _, snippet, _ = blocks("python")
    texts = run(snippet, folder).splitlines()
    assert all("The old house" in text for text in texts if "house" in text) and " of " in texts[-1]
