"""Drafts by a low-bit copy: the tokens are the model's own, whatever the draft proposes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tenpak

torch = pytest.importorskip("torch", reason="PyTorch is not installed; pip install 'tenpak[torch]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed; pip install 'tenpak[hf]'")

from tenpak import speculative  # noqa: E402

PROMPTS = ([5, 17, 2, 90, 33, 8, 41], [1], list(range(40, 70)))
NEW = 24


@pytest.fixture(scope="module")
def model(sample_model: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(sample_model, dtype=torch.float32).eval()


def greedy(model: Any, prompt: list[int], **options: Any) -> Any:
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, **options)


@pytest.mark.parametrize("codec", ["int8_sym_v1", "int4_g32_fp16_v1", "int4_g4096_fp16_v1"])
def test_the_tokens_are_those_of_the_model_s_own_greedy_decoding(model: Any, codec: str) -> None:
    pair = speculative.Speculative(model, codec, draft_tokens=4)
    for prompt in PROMPTS:
        found = pair.generate(prompt, max_new_tokens=NEW)
        assert torch.equal(found.tokens, greedy(model, prompt))
        assert found.new == found.tokens.shape[1] - len(prompt)
        assert 0 <= found.accepted <= found.drafted <= 4 * found.rounds
        assert found.new == found.accepted + found.rounds
        assert 0 <= found.acceptance <= 1


def test_a_draft_that_is_the_model_is_accepted_entirely_and_another_one_hardly(model: Any) -> None:
    same = speculative.generate(
        model, copy.deepcopy(model), PROMPTS[0], draft_tokens=4, max_new_tokens=NEW, eos_token_id=None
    )
    # 24 tokens: four rounds of five and one of four.
    assert (same.acceptance, same.rounds, same.drafted) == (1.0, 5, 19)
    noise = transformers.AutoModelForCausalLM.from_config(model.config).eval()
    other = speculative.generate(model, noise, PROMPTS[0], draft_tokens=4, max_new_tokens=NEW, eos_token_id=None)
    assert torch.equal(other.tokens, same.tokens) and other.acceptance < 0.2


def test_a_compressed_model_drafts_at_any_rate(model: Any, sample_model: Path, tmp_path: Path) -> None:
    found = {}
    for bits in (1.5, 6):
        tenpak.compress(sample_model, tmp_path / f"{bits}.tenpak", target_bits=bits)
        pair = speculative.Speculative(model, tmp_path / f"{bits}.tenpak")
        runs = [pair.generate(prompt, max_new_tokens=NEW) for prompt in PROMPTS]
        assert all(torch.equal(run.tokens, greedy(model, p)) for run, p in zip(runs, PROMPTS, strict=True))
        found[bits] = sum(run.accepted for run in runs) / sum(run.drafted for run in runs)
    assert found[6] > found[1.5]


def test_a_quantized_model_takes_an_artifact_and_no_codec(model: Any, sample_model: Path, tmp_path: Path) -> None:
    tenpak.compress(sample_model, tmp_path / "m.tenpak", codec="int8_sym_v1")
    target = tenpak.from_pretrained(tmp_path / "m.tenpak", dtype=torch.float32)
    found = speculative.generate(target, tmp_path / "m.tenpak", PROMPTS[0], max_new_tokens=NEW)
    assert torch.equal(found.tokens, greedy(target, PROMPTS[0])) and found.acceptance == 1
    with pytest.raises(tenpak.InvalidError, match="quantized already"):
        speculative.Speculative(target, "int4_g32_fp16_v1")


def test_what_cannot_be_done_is_said(model: Any, tmp_path: Path) -> None:
    with pytest.raises(tenpak.UnsupportedError, match="unknown codec"):
        speculative.Speculative(model, "int3_v9")
    with pytest.raises(FileNotFoundError, match="no compressed model"):
        speculative.Speculative(model, tmp_path / "missing")
    with pytest.raises(tenpak.InvalidError, match="the model itself"):
        speculative.Speculative(model, model)
    with pytest.raises(tenpak.InvalidError, match="at least one"):
        speculative.Speculative(model, copy.deepcopy(model), draft_tokens=0)
    with pytest.raises(tenpak.InvalidError, match="one prompt"):
        speculative.Speculative(model, copy.deepcopy(model)).generate([[1, 2], [3, 4]])
    small = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(tenpak.InvalidError, match="vocabulary of 50"):
        speculative.Speculative(model, transformers.AutoModelForCausalLM.from_config(small))
