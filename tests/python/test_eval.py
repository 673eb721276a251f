"""`tenpak eval`: its figures against a slow implementation in numpy, its protocol, its report, its refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import oracle
import pytest
import tenpak
from conftest import ROOT, read_safetensors, write_safetensors
from test_schema import assert_valid

torch = pytest.importorskip("torch", reason="tenpak eval needs PyTorch, see CONTRIBUTING")
transformers = pytest.importorskip("transformers", reason="tenpak eval needs transformers, see CONTRIBUTING")

from tenpak.evaluate import Evaluation, Row, evaluate, plan, windows  # noqa: E402
from tenpak.evaluate.fidelity import Scores, fidelity  # noqa: E402

Array = npt.NDArray[Any]

EXCERPT = ROOT / "tests/data/excerpt.txt"
CODEC = "int4_g32_fp16_v1"
#: A run that takes about a second: 16 windows of 64 tokens.
SMALL: dict[str, Any] = {"context": 64, "tokens": 1024, "threads": 2}


def eval_cli(*args: object, code: int | None = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the console script; `code` is the exit code to insist on."""
    command = [sys.executable, "-m", "tenpak.cli", "eval", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)
    if code is not None and done.returncode != code:
        pytest.fail(f"{command}: exit code {done.returncode}, not {code}\n{done.stderr}")
    return done


def slow_log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max()
    return shifted - math.log(math.fsum(np.exp(shifted).tolist()))


def slow_scores(base: Array, other: Array, ids: Array) -> list[list[tuple[float, bool, float, float]]]:
    """For each window and scored token: KL, same top, negative log-likelihoods of other and base; one by one."""
    out = []
    for window in range(len(ids)):
        row = []
        for position in range(ids.shape[1] - 1):
            p = slow_log_softmax(base[window, position].astype(np.float64))
            q = slow_log_softmax(other[window, position].astype(np.float64))
            kld = math.fsum((np.exp(p) * (p - q)).tolist())
            target = ids[window, position + 1]
            row.append((kld, bool(p.argmax() == q.argmax()), -float(q[target]), -float(p[target])))
        out.append(row)
    return out


def slow_quantile(values: list[float], fraction: float) -> float:
    """The value that `fraction` of the others lie below, linear between neighbours."""
    ordered = sorted(values)
    place = fraction * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def slow_mean(values: list[list[float]]) -> tuple[float, float]:
    """Mean over all tokens, and its standard error with windows as clusters."""
    means = [math.fsum(window) / len(window) for window in values]
    mean = math.fsum(means) / len(means)
    variance = math.fsum((m - mean) ** 2 for m in means) / (len(means) - 1)
    return mean, math.sqrt(variance / len(means))


def excerpt_ids(model: Path, context: int, tokens: int) -> Array:
    """The excerpt's first tokens as windows."""
    ids = transformers.AutoTokenizer.from_pretrained(model)(EXCERPT.read_text(), verbose=False)["input_ids"]
    return np.array(ids[: tokens // context * context]).reshape(-1, context)


def logits_of(model: Path, weights: dict[str, Array] | None, ids: Array) -> Array:
    """Logits of a model whose weights are overwritten in place by name."""
    built = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        for name, array in (weights or {}).items():
            built.get_parameter(name).data = torch.from_numpy(array.astype(np.float32))
        built.tie_weights()
        found: Array = built(torch.from_numpy(ids)).logits.numpy()
    return found


@pytest.fixture(scope="module")
def tiny() -> Path:
    return ROOT / "tests/data/tiny-books"


@pytest.fixture(scope="module")
def small(tiny: Path) -> Evaluation:
    return evaluate(tiny, EXCERPT, codecs=["raw_v1", CODEC, "int8_sym_v1", "int4_g128_fp16_v1"], **SMALL)


def figures(row: Row) -> dict[str, Any]:
    """What must not depend on how fast it was found."""
    timed = {"encode_seconds", "load_seconds", "score_seconds"}
    return {name: value for name, value in row.to_json().items() if name not in timed}


# Figures


def test_figures_are_those_of_a_slow_implementation(tiny: Path, tmp_path: Path) -> None:
    context, tokens = 32, 256
    path = tmp_path / "a.tenpak"
    tenpak.compress(tiny, path, codec="int4_g128_fp16_v1")
    row = evaluate(tiny, EXCERPT, artifacts=[path], context=context, tokens=tokens, threads=2).rows[0]

    ids = excerpt_ids(tiny, context, tokens)
    artifact = oracle.read(path.read_bytes())
    weights = {e.name: artifact.decode(e) for e in artifact.header.tensors if e.codec != oracle.RAW}
    # The quantized embedding is the head, too.
    assert "model.embed_tokens.weight" in weights
    slow = slow_scores(logits_of(tiny, None, ids), logits_of(tiny, weights, ids), ids)
    klds = [[token[0] for token in window] for window in slow]
    flat = [kld for window in klds for kld in window]
    got = row.fidelity
    # Forward passes in float32 of batches of another size: their logits agree to some 1e-5, and KL sees the square.
    close = {"rel": 1e-4, "abs": 1e-9}
    assert (got.kld, got.kld_error) == pytest.approx(slow_mean(klds), **close)
    assert got.kld_p99 == pytest.approx(slow_quantile(flat, 0.99), **close)
    assert got.kld_p999 == pytest.approx(slow_quantile(flat, 0.999), **close)
    assert got.kld_max == pytest.approx(max(flat), **close)
    same = [[float(token[1]) for token in window] for window in slow]
    assert (got.top1, got.top1_error) == pytest.approx(slow_mean(same), rel=1e-12)
    nll, nll_error = slow_mean([[token[2] for token in window] for window in slow])
    assert got.ppl == pytest.approx(math.exp(nll), **close)
    assert got.ppl_error == pytest.approx(math.exp(nll) * nll_error, **close)
    ratio, ratio_error = slow_mean([[token[2] - token[3] for token in window] for window in slow])
    assert got.ppl_ratio == pytest.approx(math.exp(ratio), **close)
    assert got.ppl_ratio_error == pytest.approx(math.exp(ratio) * ratio_error, rel=1e-3)


@pytest.mark.parametrize("vocabulary", [1, 2, 7, 5000])
def test_scores_of_random_logits_are_those_of_a_slow_implementation(rng: np.random.Generator, vocabulary: int) -> None:
    shape = (3, 4, vocabulary)
    base = (8 * rng.standard_normal(shape)).astype(np.float32)
    other = (base + rng.standard_normal(shape)).astype(np.float32)
    ids = rng.integers(0, vocabulary, (3, 5))
    scores = Scores.empty(3, 5)
    for first in range(3):
        here = slice(first, first + 1)
        batch = (torch.from_numpy(base[here]), torch.from_numpy(other[here]), torch.from_numpy(ids[here, 1:]))
        scores.put(first, *batch)
    slow = np.array(slow_scores(base, other, ids))
    # Sums of `vocabulary` terms in float64, each of at most some tens.
    bound = 100 * vocabulary * 2.0**-52 + 1e-13
    assert np.abs(scores.kld - slow[..., 0]).max() <= bound
    assert np.array_equal(scores.same, slow[..., 1].astype(bool))
    assert np.abs(scores.nll - slow[..., 2]).max() <= bound


def test_slices_of_a_batch_change_nothing(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    base = torch.from_numpy(rng.standard_normal((5, 8, 96)).astype(np.float32))
    other = base + 0.1
    other[:, :, 3] += 1
    targets = torch.zeros((5, 8), dtype=torch.int64)
    found = []
    for logits in (1, 96 * 7, 1 << 20):
        monkeypatch.setattr("tenpak.evaluate.fidelity.SLICE", logits)
        scores = Scores.empty(5, 9)
        scores.put(0, base, other, targets)
        found.append(scores)
    for scores in found[1:]:
        assert np.array_equal(scores.kld, found[0].kld) and np.array_equal(scores.nll, found[0].nll)


def test_equal_logits_lose_exactly_nothing(rng: np.random.Generator) -> None:
    logits = torch.from_numpy((30 * rng.standard_normal((2, 6, 333))).astype(np.float32))
    scores = Scores.empty(2, 7)
    scores.put(0, logits, logits.clone(), torch.ones((2, 6), dtype=torch.int64))
    found = fidelity(scores, scores.nll)
    assert (found.kld, found.kld_error, found.kld_max, found.top1) == (0, 0, 0, 1)
    assert (found.ppl_ratio, found.ppl_ratio_error) == (1, 0)


def test_an_identical_model_gives_exactly_the_baseline(small: Evaluation) -> None:
    raw = small.rows[0]
    assert raw.name == "raw_v1" and small.baseline.noise_floor == 0
    found = raw.fidelity
    assert (found.kld, found.kld_p99, found.kld_p999, found.kld_max) == (0, 0, 0, 0)
    assert (found.top1, found.ppl_ratio, found.ppl_ratio_error) == (1, 1, 0)
    assert (found.ppl, found.ppl_error) == (small.baseline.ppl, small.baseline.ppl_error)
    assert raw.matrices is None and raw.nmse is None and not raw.codecs
    assert raw.memory_bytes == small.baseline.memory_bytes


def test_a_lossier_codec_loses_more(small: Evaluation) -> None:
    raw, g32, int8, g128 = (row.fidelity.kld for row in small.rows)
    assert raw < int8 < g32 < g128


def test_one_window_has_no_error_bars(tiny: Path) -> None:
    report = evaluate(tiny, EXCERPT, codecs=[CODEC], tokens=64, context=64, threads=2)
    found = report.rows[0].fidelity
    assert report.windows == 1 and report.baseline.ppl_error is None
    assert (found.kld_error, found.top1_error, found.ppl_error, found.ppl_ratio_error) == (None,) * 4
    assert_valid(report.to_json(), "eval")
    assert "None" not in report.to_text()


# Sizes and weights


def test_sizes_and_nmse_are_those_of_the_compress_report(tiny: Path, tmp_path: Path, small: Evaluation) -> None:
    for row in small.rows[1:]:
        report = tenpak.compress(tiny, tmp_path / "a.tenpak", recipe=plan.recipe_of(row.name), force=True)
        quantized = [t for t in report["tensors"] if t["codec"] != oracle.RAW]
        assert row.codecs == {row.name: 28} and len(quantized) == 28
        assert row.matrices is not None
        assert row.matrices.weights == sum(math.prod(t["shape"]) for t in quantized)
        assert row.matrices.bytes == sum(t["stored_bytes"] for t in quantized)
        assert row.file.to_json() == report["total"]
        assert row.overhead_bytes == row.file.bytes - sum(t["stored_bytes"] for t in report["tensors"])
        # Sums of n terms in double precision, in another order.
        assert row.nmse == pytest.approx(report["loss"]["nmse"], rel=row.matrices.weights * 2.0**-52)
        assert row.file.bytes < (tmp_path / "a.tenpak").stat().st_size, "the tokenizer is no weight"
    source = small.baseline.size
    assert source.bytes == (tiny / "model.safetensors").stat().st_size
    assert small.baseline.memory_bytes >= 4 * source.weights


def test_codecs_quantize_only_the_matrices_inside_the_layers(tmp_path: Path) -> None:
    matrices = [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.11.mlp.experts.3.down_proj.weight",
        "h.7.mlp.c_fc.weight",
        "transformer.h.0.attn.c_attn.weight",
        "gpt_neox.layers.1.attention.query_key_value.weight",
        "model.language_model.layers.0.mlp.up_proj.weight",
    ]
    others = [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "project_in.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.block_sparse_moe.gate.weight",
        "vision_tower.encoder.layers.0.self_attn.q_proj.weight",
        "model.visual.blocks.3.attn.proj.weight",
        "audio_tower.layers.1.fc1.weight",
    ]
    tensors = {name: np.ones((64, 64), np.float32) for name in matrices + others}
    tensors |= {"model.layers.0.input_layernorm.weight": np.ones(4096, np.float32)}
    source = write_safetensors(tmp_path / "s.safetensors", tensors)
    report = tenpak.compress(source, dry_run=True, recipe=plan.recipe_of(CODEC))
    assert {t["name"] for t in report["tensors"] if t["codec"] != oracle.RAW} == set(matrices)
    assert {t["codec"] for t in report["tensors"]} == {CODEC, oracle.RAW}


def test_an_artifact_is_measured_as_it_is(tiny: Path, tmp_path: Path, small: Evaluation) -> None:
    wide, folder, recipe = tmp_path / "wide.tenpak", tmp_path / "wide", tmp_path / "narrow.toml"
    sizes = [tenpak.compress(tiny, path, codec=CODEC)["total"] for path in (wide, folder)]
    recipe.write_text(plan.recipe_of(CODEC))
    found = evaluate(tiny, EXCERPT, artifacts=[wide, folder], recipes=[recipe], **SMALL)
    first, directory, second = found.rows
    assert [first.file.to_json(), directory.file.to_json()] == sizes
    assert (directory.name, directory.fidelity, directory.codecs) == ("wide", first.fidelity, first.codecs)
    assert (first.name, first.kind, first.encode_seconds) == ("wide.tenpak", "artifact", None)
    assert first.codecs == {CODEC: 28, "int8_sym_v1": 1}
    assert (second.name, second.kind) == ("narrow.toml", "recipe")
    assert second.fidelity == small.rows[1].fidelity and second.nmse == small.rows[1].nmse
    assert first.fidelity.kld > second.fidelity.kld
    text = found.to_text()
    assert f"wide.tenpak: quantized tensors: 28 in {CODEC}, 1 in int8_sym_v1" in text


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "untied", "sharded"])
def test_weights_find_their_places_in_every_family(tmp_path: Path, tiny: Path, family: str) -> None:
    """Conv1D matrices are transposed, experts fused, heads not tied, checkpoints cut in shards."""
    torch.manual_seed(7)
    sizes = {"vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 0}
    if family == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_embd=64, n_head=4, n_positions=64, **sizes)
    elif family == "mixtral":
        config = transformers.MixtralConfig(
            num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
            num_local_experts=4, max_position_embeddings=64, **sizes,
        )  # fmt: skip
    else:
        config = transformers.LlamaConfig(
            num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
            tie_word_embeddings=False, max_position_embeddings=64, **sizes,
        )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    model.save_pretrained(tmp_path, max_shard_size="100KB" if family == "sharded" else "5GB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((tiny / file).read_bytes())

    found = evaluate(tmp_path, EXCERPT, codecs=["raw_v1", CODEC], tokens=512, threads=2)
    raw, row = found.rows
    assert (raw.fidelity.kld_max, raw.fidelity.ppl_ratio) == (0, 1)
    per_layer = {"gpt2": 4, "mixtral": 4 + 4 * 3}.get(family, 7)
    assert row.codecs == {CODEC: 2 * per_layer}

    # The same matrices rounded in place, in memory, by the layers' own names.
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            inside = any(part.isdigit() for part in name.split("."))
            if not inside or parameter.ndim < 2 or name.endswith("mlp.gate.weight"):
                continue
            matrix = parameter.T if family == "gpt2" else parameter
            rounded = tenpak.encode(matrix.contiguous().numpy(), CODEC).decode()
            matrix.copy_(torch.from_numpy(rounded))
        ids = torch.from_numpy(excerpt_ids(tiny, 64, 512))
        want = model(ids).logits[:, :-1].double().log_softmax(-1)
        nll = -want.gather(2, ids[:, 1:, None]).mean()
    assert row.fidelity.ppl == pytest.approx(math.exp(float(nll)), rel=1e-6)
    assert row.fidelity.ppl != raw.fidelity.ppl


# Protocol


def test_windows_do_not_overlap_and_their_first_token_is_not_scored(tiny: Path, small: Evaluation) -> None:
    assert (small.context, small.windows, small.scored) == (64, 16, 16 * 63)
    ids = excerpt_ids(tiny, 64, 1024)
    slow = slow_scores(*[logits_of(tiny, None, ids)] * 2, ids)
    nll = [token[3] for window in slow for token in window]
    assert len(nll) == small.scored
    assert small.baseline.ppl == pytest.approx(math.exp(math.fsum(nll) / len(nll)), rel=1e-6)


class Letters:
    """A tokenizer of one token per character, and a config."""

    vocab_size, max_position_embeddings = 128, 8

    def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def get_text_config(self) -> Letters:
        return self


def cut(data: bytes, tokens: int | None = None, context: int | None = None) -> windows.Windows:
    return windows.cut(Path("text"), data, Letters(), Letters(), tokens, context)


def test_the_text_is_cut_in_order_and_a_short_last_window_is_left_out() -> None:
    data = bytes(range(32, 32 + 27))
    assert cut(data).ids.tolist() == [list(data[:8]), list(data[8:16]), list(data[16:24])]
    assert cut(data, tokens=17).ids.tolist() == [list(data[:8]), list(data[8:16])]
    assert cut(data, context=5).ids.tolist() == [list(data[i : i + 5]) for i in range(0, 25, 5)]
    assert cut(data, tokens=10**9).ids.shape == (3, 8)
    assert cut(data, tokens=9).text_tokens == 27


def test_line_ends_of_every_system_are_the_same_text() -> None:
    unix = cut(b"one\ntwo\n\nthree").ids.tolist()
    assert cut(b"one\r\ntwo\r\n\r\nthree").ids.tolist() == unix == cut(b"one\rtwo\r\rthree").ids.tolist()


def test_figures_do_not_depend_on_the_batch(tiny: Path, small: Evaluation) -> None:
    for batch in (3, 16):
        found = evaluate(tiny, EXCERPT, codecs=[CODEC], window_batch=batch, **SMALL)
        assert found.window_batch == batch
        got, want = found.rows[0].fidelity, small.rows[1].fidelity
        # Products of other shapes sum in another order, in float32.
        assert dataclasses.astuple(got) == pytest.approx(dataclasses.astuple(want), rel=2e-4)


def test_planes_multiplied_as_they_are_stored_cost_what_their_decoded_weights_cost(
    tiny: Path, small: Evaluation
) -> None:
    packed = evaluate(tiny, EXCERPT, codecs=[CODEC], compute="float32", **SMALL)
    rounded = evaluate(tiny, EXCERPT, codecs=[CODEC], compute="int8", **SMALL)
    got, want, int8 = packed.rows[0], small.rows[1], rounded.rows[0]
    # Products sum in another order, in float32; the divergence itself is a hundred times that noise.
    assert got.fidelity.kld == pytest.approx(want.fidelity.kld, rel=1e-3)
    assert got.fidelity.ppl == pytest.approx(want.fidelity.ppl, rel=1e-5)
    assert int8.fidelity.kld != got.fidelity.kld
    assert int8.fidelity.ppl == pytest.approx(want.fidelity.ppl, rel=2e-2)
    assert got.memory_bytes < 0.5 * want.memory_bytes
    assert packed.compute == "float32" and "weights packed, products in int8" in rounded.to_text()
    with pytest.raises(tenpak.InvalidError, match="compute 'fast'"):
        evaluate(tiny, EXCERPT, codecs=[CODEC], compute="fast", **SMALL)


def test_kept_and_recomputed_base_logits_give_the_same_figures(tiny: Path, small: Evaluation) -> None:
    again = evaluate(tiny, EXCERPT, codecs=["raw_v1", CODEC], cache_bytes=small.base_logits_bytes - 1, **SMALL)
    assert (small.base_logits, again.base_logits) == ("kept", "recomputed")
    assert small.base_logits_bytes == again.base_logits_bytes == 16 * 63 * 1024 * 4
    assert [figures(row) for row in again.rows] == [figures(row) for row in small.rows[:2]]
    assert again.baseline.ppl == small.baseline.ppl
    exactly = evaluate(tiny, EXCERPT, codecs=[CODEC], cache_bytes=small.base_logits_bytes, **SMALL)
    assert exactly.base_logits == "kept"


def test_at_most_two_models_are_in_memory(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gc

    from tenpak.evaluate import weights

    def alive() -> int:
        return sum(type(o) is transformers.LlamaForCausalLM for o in gc.get_objects())

    build, most = weights.model_of, []

    def counting(*args: Any) -> Any:
        most.append(alive() + 1)
        return build(*args)

    gc.collect()
    before = alive()
    monkeypatch.setattr(weights, "model_of", counting)
    for cache, want in ((1 << 30, 1), (0, 2)):
        most.clear()
        evaluate(tiny, EXCERPT, codecs=["int8_sym_v1", CODEC, "nf4_g64_fp16_v1"], cache_bytes=cache, **SMALL)
        assert [n - before for n in most] == [want] * 3


def test_the_caller_s_settings_come_back(tiny: Path) -> None:
    log = transformers.utils.logging
    before = (torch.get_num_threads(), log.get_verbosity(), log.is_progress_bar_enabled(), torch.is_grad_enabled())
    assert evaluate(tiny, EXCERPT, tokens=128, context=64, threads=1).threads == 1
    after = (torch.get_num_threads(), log.get_verbosity(), log.is_progress_bar_enabled(), torch.is_grad_enabled())
    assert before == after


def test_progress_runs_from_nothing_to_all(tiny: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    evaluate(tiny, EXCERPT, codecs=[CODEC], progress=lambda *call: calls.append(call), **SMALL)
    done = [call[0] for call in calls]
    assert done[0] == 0 and done[-1] == 32 and done == sorted(done)
    assert {call[1] for call in calls} == {32} and {call[2] for call in calls} == {"source", CODEC, ""}


def test_an_exception_of_progress_stops_the_work_and_leaves_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def stop(done: int, total: int, name: str) -> None:
        if name == CODEC and done > 16:
            assert list(tmp_path.iterdir()), "it works elsewhere, so this test sees nothing"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny, EXCERPT, codecs=[CODEC], progress=stop, window_batch=4, **SMALL)
    assert not list(tmp_path.iterdir())


# The command line


def test_the_command_line_prints_what_python_returns(tiny: Path, tmp_path: Path, small: Evaluation) -> None:
    out, picture, codecs = tmp_path / "report.json", tmp_path / "a.png", [row.name for row in small.rows]
    peers = peers_file(tmp_path / "peers.json")
    options = ["--codec", *codecs, "--context", 64, "--tokens", 1024, "--threads", 2, "--plot", picture]
    done = eval_cli(tiny, "--text", EXCERPT, *options, "--peers", peers, "--format", "json", "-o", out)
    report = assert_valid(json.loads(done.stdout), "eval")
    assert done.stderr == "", "a pipe shows no progress"
    assert json.loads(out.read_text()) == report
    png_size(picture)
    assert {p.name for p in tmp_path.iterdir()} == {"report.json", "a.png", "peers.json"}
    assert len({p.stat().st_mode for p in tmp_path.iterdir()}) == 1
    want = small.to_json()
    for side in (report, want):
        for part in (side["baseline"], *side["rows"]):
            for key in [key for key in part if key.endswith("_seconds")]:
                part[key] = part[key] is None
        side["model"], side["text"] = str(side["model"]), str(side["text"])
    assert report == want


def test_the_report_in_python_fits_the_schema(small: Evaluation) -> None:
    report = assert_valid(json.loads(json.dumps(small.to_json())), "eval")
    assert report["text_sha256"] == __import__("hashlib").sha256(EXCERPT.read_bytes()).hexdigest()


def test_the_text_report_is_one_table_with_the_source_first(small: Evaluation) -> None:
    lines = small.to_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("model "))
    assert [line.split()[0] for line in lines[at + 1 : at + 6]] == ["(source)", *(row.name for row in small.rows)]
    assert len({len(line) for line in lines[at : at + 6]}) == 1
    row = small.rows[1]
    assert f"{row.fidelity.kld:.3e}".replace("e-0", "e-") in lines[at + 3]
    assert f"{row.fidelity.ppl:.4f}" in lines[at + 3]
    assert "noise floor: KL of the source with itself is exactly 0" in lines
    assert "raw_v1: nothing is quantized" in lines
    assert any(line.startswith("each codec alone: 28 tensors inside the layers, 786,432 of 918,656") for line in lines)


def test_common_options_may_stand_before_the_verb(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", "tenpak.cli", "--threads", "2", "--format=json", "-q", "eval", str(tiny)]
    arguments = ["--text", str(EXCERPT), "--tokens", "64", "--context", "32", "-o", str(out)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == "" and json.loads(out.read_text())["threads"] == 2


def test_help_lists_eval_and_describes_it() -> None:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "tenpak.cli", *args], capture_output=True, text=True, check=False)

    for arguments in (["--help"], ["-h"], ["help"], ["--quiet", "--help"]):
        done = run(*arguments)
        assert done.returncode == 0 and "\n  eval  " in done.stdout and "\n  compress  " in done.stdout, arguments
    nothing = run()
    assert nothing.returncode == 2 and "\n  eval  " in nothing.stderr and nothing.stdout == ""
    for arguments in (["compress", "--help"], ["help", "verify"], ["--version"], ["help", "nonsense"]):
        done = run(*arguments)
        assert "  eval  " not in done.stdout + done.stderr, arguments
    assert run("help", "eval").stdout == run("eval", "--help").stdout
    assert "--cache-bytes" in run("eval", "--help").stdout


def test_help_and_errors_need_no_torch(tiny: Path, tmp_path: Path) -> None:
    """Without PyTorch the way to get it is told; what else is wrong is told before."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for module in ("torch", "transformers", "matplotlib"):
        (blocked / f"{module}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{module}'\")")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(blocked), str(Path(tenpak.__file__).parents[1])])}
    assert "--text FILE" in eval_cli("--help", env=env).stdout
    done = eval_cli(tiny, "--text", EXCERPT, code=2, env=env)
    assert done.stderr == (
        "tenpak: tenpak eval needs PyTorch and transformers: No module named 'torch'; "
        'install it with: pip install "tenpak[eval]"\n'
    )
    done = eval_cli(tiny, "--text", EXCERPT, "--plot", tmp_path / "a.png", code=2, env=env)
    assert "matplotlib" in done.stderr and 'pip install "tenpak[eval]"' in done.stderr
    assert "unknown codec" in eval_cli(tiny, "--text", EXCERPT, "--codec", "int3", code=2, env=env).stderr


def test_importing_tenpak_imports_neither_torch_nor_eval() -> None:
    code = "import sys, tenpak, tenpak.cli; print(*(m for m in sys.modules if 'torch' in m or 'evaluate' in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
    code = "import sys, tenpak.evaluate.console; print(*{m.partition('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "matplotlib", "safetensors", "tqdm"} & set(done.stdout.split())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_and_leaves_nothing(tiny: Path, tmp_path: Path, number: signal.Signals) -> None:
    text = tmp_path / "long.txt"
    text.write_text(EXCERPT.read_text() * 100)
    folder = tmp_path / "temporary"
    folder.mkdir()
    command = [sys.executable, "-m", "tenpak.cli", "eval", tiny, "--text", text, "--tokens", "all", "--codec", "all"]
    child = subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until and not any(p.stat().st_size for p in folder.glob("tenpak-eval-*/logits")):
            time.sleep(0.02)
        assert child.poll() is None, "it was done before it could be stopped"
        child.send_signal(number)
        stdout, stderr = child.communicate(timeout=120)
    finally:
        child.kill()
    assert (child.returncode, stdout, stderr) == (128 + number, "", "")
    assert not list(folder.glob("tenpak-eval-*"))


# Pictures


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def peers_file(path: Path, **changes: Any) -> Path:
    rows = [{"name": "other", "bpw": 4.5, "kld": 1e-3}, {"name": "free", "bpw": 16, "kld": 0.0}]
    peers = {"model": "tiny-books", "text": "excerpt.txt", "ctx": 64, "tokens": 1024, "rows": rows, **changes}
    path.write_text(json.dumps(peers))
    return path


def test_the_plot_has_one_labelled_point_per_row(small: Evaluation, tmp_path: Path) -> None:
    from matplotlib.axes import Axes
    from tenpak.evaluate import plot

    drawn: list[tuple[list[float], list[float]]] = []
    labels: list[str] = []
    scatter, annotate = Axes.scatter, Axes.annotate

    def watched_scatter(self: Any, x: list[float], y: list[float], **options: Any) -> Any:
        drawn.append((list(x), list(y)))
        return scatter(self, x, y, **options)

    def watched_annotate(self: Any, text: str, *args: Any, **options: Any) -> Any:
        labels.append(text)
        return annotate(self, text, *args, **options)

    peers = plot.read_peers(peers_file(tmp_path / "peers.json"), small.model, small.text)
    out = tmp_path / "a.png"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "scatter", watched_scatter)
        patch.setattr(Axes, "annotate", watched_annotate)
        plot.draw(small, out, peers)
    width, height = png_size(out)
    assert width > 500 and height > 300
    lossy = small.rows[1:]
    assert ([4.5], [1e-3]) in drawn
    want = ([r.matrices.bits_per_weight for r in lossy if r.matrices], [r.fidelity.kld for r in lossy])
    assert want in drawn
    assert set(labels) == {"other", *(row.name for row in lossy)}


def test_peers_of_another_protocol_are_refused(small: Evaluation, tmp_path: Path) -> None:
    from tenpak.evaluate import plot

    path = tmp_path / "peers.json"
    for change in ({"model": "books5m"}, {"text": "wiki.test.raw"}):
        with pytest.raises(tenpak.InvalidError, match="different protocols do not compare"):
            plot.read_peers(peers_file(path, **change), small.model, small.text)
    for change in ({"ctx": 256}, {"tokens": 20480}):
        peers = plot.read_peers(peers_file(path, **change), small.model, small.text)
        with pytest.raises(tenpak.InvalidError, match="different protocols do not compare"):
            plot.draw(small, tmp_path / "a.png", peers)
    for wrong in ("[]", "{}", '{"rows": 1}', "nonsense", '{"rows": [{"name": "x"}]}', "\xff"):
        path.write_bytes(wrong.encode("latin-1"))
        with pytest.raises(tenpak.InvalidError, match="not figures of peers"):
            plot.read_peers(path, small.model, small.text)
    assert not (tmp_path / "a.png").exists()


# Refusals


@pytest.fixture
def variant(tiny: Path, tmp_path: Path) -> Iterator[Any]:
    """Make artifacts of checkpoints that are not quite the model."""

    def make(name: str, tensors: dict[str, Array]) -> Path:
        path = tmp_path / f"{name}.tenpak"
        tenpak.compress(write_safetensors(tmp_path / "s.safetensors", tensors), path)
        return path

    yield make


def test_an_artifact_of_another_model_is_refused_by_name_and_shape(tiny: Path, tmp_path: Path, variant: Any) -> None:
    tensors = read_safetensors(tiny / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    less = variant("less", {k: v for k, v in tensors.items() if k != name})
    more = variant("more", {**tensors, "extra.weight": np.ones((2, 2), np.float32)})
    other = variant("other", {**tensors, name: tensors[name][:, :64]})
    for path, words in (
        (less, [f"lacks {name}", "which", "has"]),
        (more, ["has extra.weight", "lacks"]),
        (other, [name, "[384, 64]", "[384, 128]"]),
    ):
        done = eval_cli(tiny, "--text", EXCERPT, "--artifact", path, code=2)
        assert done.stdout == "" and done.stderr.startswith(f"tenpak: {path}"), done.stderr
        assert all(word in done.stderr for word in words), done.stderr
    base, delta = tmp_path / "base.tenpak", tmp_path / "delta.tenpak"
    tenpak.compress(tiny, base)
    tenpak.delta(base, tiny, delta)
    with pytest.raises(tenpak.InvalidError, match="is a delta.*tenpak materialize"):
        evaluate(tiny, EXCERPT, artifacts=[delta], **SMALL)
    (tmp_path / "junk.tenpak").write_bytes(b"junk" * 99)
    assert "junk.tenpak" in eval_cli(tiny, "--text", EXCERPT, "--artifact", tmp_path / "junk.tenpak", code=2).stderr


@pytest.mark.parametrize("codec", [CODEC, oracle.RAW])
def test_a_damaged_tensor_is_an_error_and_no_figure(tiny: Path, tmp_path: Path, codec: str) -> None:
    path = tmp_path / "a.tenpak"
    tenpak.compress(tiny, path, codec=CODEC)
    data = bytearray(path.read_bytes())
    entry = next(e for e in oracle.read(bytes(data)).header.tensors if e.codec == codec)
    data[entry.planes[0].offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(tenpak.CorruptError, match=entry.name):
        evaluate(tiny, EXCERPT, artifacts=[path], **SMALL)


def test_what_cannot_be_measured_is_refused_with_the_remedy(tiny: Path, tmp_path: Path) -> None:
    empty, short, latin = tmp_path / "empty.txt", tmp_path / "short.txt", tmp_path / "latin.txt"
    empty.write_text(" \n")
    short.write_text("Too short.")
    latin.write_bytes(b"caf\xe9 " * 1000)
    recipe = tmp_path / "wrong.toml"
    recipe.write_text('codec = "int3"')

    def refused(*arguments: Any, match: str, error: type[Exception] = tenpak.InvalidError, **options: Any) -> None:
        with pytest.raises(error, match=match):
            evaluate(*arguments, **options)

    refused(tiny, empty, match=r"empty\.txt: no text in 2 bytes")
    refused(tiny, short, match=r"short\.txt: \d+ tokens, expected at least one window of 256; .*--context")
    refused(tiny, EXCERPT, tokens=100, match=r"100 tokens asked for with --tokens, expected .* 256")
    refused(tiny, latin, match=r"latin\.txt: not UTF-8 at byte 3")
    refused(tiny, tmp_path / "none.txt", error=FileNotFoundError, match=r"none\.txt")
    refused(tiny, EXCERPT, context=257, match=r"windows of 257 tokens, expected 2 to 256")
    refused(tiny, EXCERPT, codecs=["int3"], match=r"unknown codec 'int3', expected 'all' or one of raw_v1")
    refused(tiny, EXCERPT, recipes=[recipe], error=tenpak.TenpakError, match="int3")
    refused(tmp_path, EXCERPT, match=r"a directory without config\.json, expected a Hugging Face directory")
    refused(tmp_path / "none", EXCERPT, match="not there")
    refused(EXCERPT, EXCERPT, match="a file, expected a Hugging Face directory")
    refused(tiny, EXCERPT, dtype="int8", match="dtype 'int8', expected one of float32")
    for name, value in (("tokens", 0), ("context", 1), ("window_batch", -1), ("threads", -1), ("cache_bytes", -1)):
        refused(tiny, EXCERPT, match=f"{name} is {value}, expected", **{name: value})


def test_a_checkpoint_that_lacks_a_weight_is_refused(tiny: Path, tmp_path: Path) -> None:
    for file in tiny.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = read_safetensors(tiny / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write_safetensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(tenpak.InvalidError, match=r"missing keys model\.layers\.1\.mlp\.up_proj\.weight.*random"):
        evaluate(tmp_path, EXCERPT, **SMALL)


def test_weights_that_overflow_are_told_apart_from_a_result(tiny: Path, tmp_path: Path) -> None:
    for file in tiny.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = read_safetensors(tiny / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    write_safetensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(tenpak.InvalidError, match="the source model gives logits that are not finite"):
        evaluate(tmp_path, EXCERPT, **SMALL)


def test_the_command_line_refuses_what_it_cannot_do(tiny: Path, tmp_path: Path) -> None:
    done = eval_cli(tiny, code=2)
    assert "--text" in done.stderr and done.stdout == ""
    assert "--tokens" in eval_cli(tiny, "--text", EXCERPT, "--tokens", "many", code=2).stderr
    none = tmp_path / "none.txt"
    assert eval_cli(tiny, "--text", none, code=2).stderr == f"tenpak: {none}: No such file or directory\n"
    report = tmp_path / "report.json"
    report.write_text("kept")
    for option in ("-o", "--plot"):
        assert "exists; pass --force" in eval_cli(tiny, "--text", EXCERPT, option, report, code=2).stderr
    assert report.read_text() == "kept"
    missing = tmp_path / "none" / "report.json"
    assert "there is no directory" in eval_cli(tiny, "--text", EXCERPT, "-o", missing, code=2).stderr
    assert "--plot" in eval_cli(tiny, "--text", EXCERPT, "--peers", report, code=2).stderr


# Real models


def shared_text(models: Path, name: str) -> Path:
    path = models.parent / "text" / name
    if not path.is_file():
        pytest.skip(f"no text {path}; set TENPAK_SHARED to the folder with data/text")
    return path


def readme_table() -> list[str]:
    """The lines of the README that show what `tenpak eval` prints."""
    block = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- eval -->")[1].split("```")[1]
    return block.strip().splitlines()


def numbers(line: str) -> list[float]:
    """The figures of a row, behind its name."""
    return [float(word) for word in line.split()[1:] if word != "±"]


def test_the_readme_shows_every_codec_with_every_column(small: Evaluation) -> None:
    command, *lines = readme_table()
    assert command.startswith("$ tenpak eval ") and "--codec all" in command
    head = next(line for line in lines if line.startswith("model "))
    ours = next(line for line in small.to_text().splitlines() if line.startswith("model "))
    assert head.split() == ours.split(), "copy the output of `tenpak eval` into README.md"
    rows = lines[lines.index(head) + 1 :]
    names = [row.split()[0] for row in rows[: rows.index("")]]
    assert names == ["(source)", *(codec["id"] for codec in tenpak.codecs())]


@pytest.mark.parametrize(
    ("model", "text", "ppl"),
    [
        ("tiny-books", "books.heldout.txt", 88.73),
        ("books5m", "books.heldout.txt", 42.49),
        ("stories260K", "tinystories.valid.txt", 4.07),
    ],
)
def test_baselines_are_the_recorded_ones(shared_models: Path, model: str, text: str, ppl: float) -> None:
    found = evaluate(shared_models / model, shared_text(shared_models, text), threads=2)
    assert round(found.baseline.ppl, 2) == ppl
    assert found.context * found.windows == 20480


def test_figures_of_books5m_are_the_recorded_ones(shared_models: Path) -> None:
    recorded = json.loads((shared_models.parent / "peers-books5m.json").read_text())
    codecs = {"int4_g8_fp16_v1": "int4_g8_fp16", "int4_g128_fp16_v1": "int4_g128_fp16"}
    found = evaluate(
        shared_models / recorded["model"], shared_text(shared_models, recorded["text"]), codecs=codecs, threads=2
    )
    assert (found.context, found.context * found.windows) == (recorded["ctx"], recorded["tokens"])
    assert found.baseline.ppl == pytest.approx(recorded["ppl0"], rel=1e-5) and found.baseline.noise_floor == 0
    by_name = {row["name"]: row for row in recorded["rows"]}
    for row in found.rows:
        want = by_name[codecs[row.name]]
        assert row.nmse == pytest.approx(want["nmse"], rel=1e-5)
        assert row.fidelity.kld == pytest.approx(want["kld"], rel=1e-3)
        assert row.fidelity.ppl == pytest.approx(want["ppl"], rel=1e-5)
        assert 100 * (row.fidelity.ppl_ratio - 1) == pytest.approx(want["dppl"], abs=2e-3)
        # One token more or less, of 20,400, is a tie that rounding decides.
        assert row.fidelity.top1 == pytest.approx(want["top1"], abs=3 / found.scored)
        assert row.matrices is not None and row.matrices.bits_per_weight == want["bpw"]

    shown = {line.split()[0]: numbers(line) for line in readme_table() if line.startswith("int4")}
    lines = {line.split()[0]: numbers(line) for line in found.to_text().splitlines() if line.startswith("int4")}
    assert set(lines) == set(codecs)
    for name, line in lines.items():
        # All but memory and time; another machine's products sum in another order.
        assert shown[name][:-2] == pytest.approx(line[:-2], rel=0.02), "copy the output of `tenpak eval` into README.md"
