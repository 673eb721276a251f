"""Promises of `tenpak calibrate`: sums that numpy agrees with, runs that go on where they stopped, names that match."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tenpak

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from conftest import ROOT, read_safetensors  # noqa: E402
from tenpak.calibrate import calibrate  # noqa: E402

MODEL, TEXT = ROOT / "tests/data/tiny-books", ROOT / "tests/data/excerpt.txt"
NAME = "model.layers.1.mlp.down_proj.weight"
Array = npt.NDArray[Any]


def window(count: int, context: int) -> Any:
    """Cut the text as `calibrate` does."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    return torch.tensor(ids[: count * context]).reshape(count, context)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give statistics of everything, over 6 windows of 32 tokens."""
    path = tmp_path_factory.mktemp("stats") / "full.safetensors"
    calibrate(MODEL, TEXT, path, tokens=192, context=32, full=True, fisher=True, threads=1)
    return path


def inputs(name: str) -> tuple[Array, Array]:
    """Return the inputs of a linear layer and the gradients of its weight, window by window, in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    module = model.get_submodule(name.removesuffix(".weight"))
    seen: list[Array] = []
    module.register_forward_hook(lambda _, args, __: seen.append(args[0].detach()[0].double().numpy()))
    gradients = []
    for ids in window(6, 32):
        model.zero_grad()
        logits = model(input_ids=ids[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").backward()
        gradients.append(module.weight.grad.double().numpy().copy())
    return np.concatenate(seen), np.stack(gradients)


@pytest.mark.parametrize("name", [NAME, "model.layers.0.self_attn.k_proj.weight", "model.layers.3.mlp.up_proj.weight"])
def test_the_hooks_give_the_moments_that_numpy_computes_from_the_inputs(full: Path, name: str) -> None:
    x, gradients = inputs(name)
    found = read_safetensors(full)
    squares = (gradients**2).sum(0) / (6 * 31)
    expected = {
        "mean_abs": np.abs(x).mean(0),
        "mean_sq": (x**2).mean(0),
        "second_moment": x.T @ x / len(x),
        "fisher": squares.sum(),
        "fisher_rows": squares.sum(1),
        "fisher_cols": squares.sum(0),
    }
    assert found[f"{name}.tokens"] == len(x) == 192
    for kind, want in expected.items():
        # The forward passes may round otherwise, for they run other batches.
        scale = np.abs(want).max()
        np.testing.assert_allclose(found[f"{name}.{kind}"], want, rtol=1e-3, atol=1e-4 * scale, err_msg=kind)


def test_second_moments_are_symmetric_and_hold_the_mean_squares_on_their_diagonal(full: Path) -> None:
    found = read_safetensors(full)
    moments = {name: array for name, array in found.items() if name.endswith(".second_moment")}
    assert len(moments) == 28
    for name, moment in moments.items():
        assert np.array_equal(moment, moment.T)
        mean_sq = found[name.replace("second_moment", "mean_sq")]
        np.testing.assert_allclose(np.diag(moment), mean_sq, rtol=1e-6)


def test_a_tied_head_is_named_and_left_out(tmp_path: Path) -> None:
    summary = calibrate(MODEL, TEXT, tmp_path / "s.safetensors", tokens=64, context=32)
    assert summary.linears == 28
    assert summary.skipped == ["model.embed_tokens.weight is an embedding too"]


class Stop(Exception):
    """Stops a run at a certain window."""


def stopper(at: int) -> Callable[[int, int, str], None]:
    """Return a progress callback that stops the work."""

    def progress(done: int, total: int, name: str) -> None:
        if done >= at:
            raise Stop

    return progress


@pytest.mark.parametrize("how", [{}, {"full": True, "memory_bytes": 3_000_000}, {"full": True, "fisher": True}])
def test_an_interrupted_run_goes_on_and_writes_the_same_bytes(tmp_path: Path, how: dict[str, Any]) -> None:
    options = {"tokens": 128, "context": 32, "window_batch": 2, "threads": 1, **how}
    whole = tmp_path / "whole.safetensors"
    summary = calibrate(MODEL, TEXT, whole, **options)
    assert (summary.passes > 1) == ("memory_bytes" in how)
    total = summary.windows * summary.passes
    for at in sorted({1, total // 2 + 1, total}):
        path = tmp_path / f"{at}.safetensors"
        with pytest.raises(Stop):
            calibrate(MODEL, TEXT, path, progress=stopper(at), **options)
        assert not path.exists()
        with pytest.raises(tenpak.InvalidError, match="--resume"):
            calibrate(MODEL, TEXT, path, **options)
        resumed = calibrate(MODEL, TEXT, path, resume=True, **options)
        assert resumed.resumed >= min(at, total - 1) - 1
        assert path.read_bytes() == whole.read_bytes()
        assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(f"{at}.")) == [path.name]


def test_a_journal_of_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    with pytest.raises(Stop):
        calibrate(MODEL, TEXT, path, tokens=128, context=32, progress=stopper(1))
    with pytest.raises(tenpak.InvalidError, match="tokens"):
        calibrate(MODEL, TEXT, path, tokens=256, context=32, resume=True)
    calibrate(MODEL, TEXT, path, tokens=256, context=32, force=True)
    with pytest.raises(tenpak.InvalidError, match="exists"):
        calibrate(MODEL, TEXT, path, tokens=256, context=32)


def run(*arguments: object, **keywords: Any) -> subprocess.Popen[str]:
    """Start the verb in a process of its own."""
    code = "import sys; from tenpak.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "calibrate", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **keywords)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_journal_that_resumes(tmp_path: Path, number: int, code: int) -> None:
    path = tmp_path / "s.safetensors"
    size = ["--tokens", 3072, "--context", 16, "--window-batch", 1, "--threads", 1]
    options = [MODEL, "--text", TEXT, "-o", path, *size]
    process = run(*options)
    while process.poll() is None and not (tmp_path / "s.safetensors.partial/plan.json").exists():
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(120) == code, process.stderr and process.stderr.read()
    assert not path.exists()
    done = run(*options, "--resume", "--format", "json")
    report = json.loads(done.communicate(timeout=300)[0])
    assert done.returncode == 0 and report["schema"] == "tenpak.calibrate/1"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_conv1d_weights_have_statistics_of_their_inputs(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=32, vocab_size=1024)
    folder = tmp_path / "gpt2"
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((MODEL / name).read_bytes())
    stats = tmp_path / "s.safetensors"
    calibrate(folder, TEXT, stats, tokens=128, full=True, fisher=True)
    found = read_safetensors(stats)
    fisher = found["transformer.h.0.mlp.c_fc.weight.fisher_rows"]
    assert fisher.shape == (128,)
    assert found["transformer.h.0.mlp.c_fc.weight.mean_sq"].shape == (32,)
    assert found["transformer.h.0.mlp.c_proj.weight.second_moment"].shape == (128, 128)
    report = tenpak.compress(folder, tmp_path / "m.tenpak", codec="int4_g16_fp16_v1", stats=stats)
    fits = {tensor["name"]: tensor.get("fit") for tensor in report["tensors"]}
    assert fits["transformer.h.0.mlp.c_fc.weight"] == "gptq"
    assert fits["transformer.wte.weight"] is None


def loss(artifact: Path, name: str, moment: Array) -> float:
    """Return what the outputs of a layer lose on average: tr(E H Eᵀ)."""
    weights = read_safetensors(MODEL / "model.safetensors")[name].astype(np.float64)
    error = weights - tenpak.open(artifact).decode(name).astype(np.float64)
    return float(np.einsum("ij,jk,ik->", error, moment.astype(np.float64), error))


@pytest.mark.parametrize("codec", ["int4_g32_fp16_v1", "int4_sym_g128_fp16_v1", "nf4_g64_fp16_v1", "int8_sym_v1"])
def test_each_fit_loses_less_of_the_outputs_than_the_one_before(full: Path, tmp_path: Path, codec: str) -> None:
    moment = read_safetensors(full)[f"{NAME}.second_moment"]
    losses = []
    for fit in ("codec", "weighted", "gptq"):
        stats = None if fit == "codec" else full
        path = tmp_path / f"{fit}.tenpak"
        report = tenpak.compress(MODEL, path, codec=codec, stats=stats, fit=fit)
        assert report["notes"] == [] or any(f"'{fit}'" in note for note in report["notes"])
        losses.append(loss(path, NAME, moment))
    assert losses[0] > losses[1] > losses[2], losses


def test_statistics_of_another_model_are_refused_and_those_of_the_scored_text_too(full: Path, tmp_path: Path) -> None:
    from tenpak.evaluate import evaluate

    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    folder = tmp_path / "other"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    with pytest.raises(
        tenpak.InvalidError, match="statistics of (128|384) inputs for 'model.layers.0.*calibrate this model"
    ):
        tenpak.compress(folder, tmp_path / "m.tenpak", stats=full)
    assert not (tmp_path / "m.tenpak").exists()
    with pytest.raises(tenpak.InvalidError, match="calibrate on another"):
        evaluate(MODEL, TEXT, codecs=["int4_g32_fp16_v1"], stats=full, tokens=512)
