"""Other quantizers: what they made comes in as it is, and stands beside our own rows."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tenpak
from tenpak import methods

TEXT = "The old house stood at the end of the lane, and nobody would go near it after dark. "


def test_what_is_missing_or_wrong_is_said_before_anything_runs(
    sample_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m.tenpak"
    with pytest.raises(tenpak.InvalidError, match="method 'awq', expected one of auto-round, bitsandbytes, gptqmodel"):
        methods.run("awq", sample_model, out)
    monkeypatch.setattr(methods, "available", lambda: dict.fromkeys(methods.METHODS))
    with pytest.raises(ImportError, match="gptqmodel is not installed; install it with: pip install gptqmodel"):
        methods.run("gptqmodel", sample_model, out)
    monkeypatch.setattr(methods, "available", lambda: dict.fromkeys(methods.METHODS, "1"))
    out.write_text("dear")
    with pytest.raises(tenpak.InvalidError, match=r"exists; choose another name or pass force"):
        methods.run("gptqmodel", sample_model, out)
    assert out.read_text() == "dear" and list(tmp_path.iterdir()) == [out]


def test_nf4_of_bitsandbytes_comes_in_exactly_and_is_measured(sample_model: Path, tmp_path: Path) -> None:
    for module in ("torch", "transformers", "accelerate", "bitsandbytes"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    report = methods.run("bitsandbytes", sample_model, tmp_path / "nf4.tenpak")
    found = {tensor["name"]: tensor for tensor in report["tensors"]}
    matrix = found[name := "model.layers.1.mlp.up_proj.weight"]
    assert matrix["codec"] == "nf4_g64_fp16_v1" and "bitsandbytes" in matrix["imported"], matrix

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs = AutoModelForCausalLM.from_pretrained(sample_model, quantization_config=config, device_map="cpu")
    weight = theirs.get_submodule(name.removesuffix(".weight")).weight
    expected = dequantize_4bit(weight.data, weight.quant_state).to(torch.float32).numpy()
    ours = tenpak.open(tmp_path / "nf4.tenpak").decode(name)
    # They round to the dtype of the model, F16 at the least.
    np.testing.assert_allclose(ours, expected, rtol=2**-10, atol=2**-24)

    from tenpak.evaluate import evaluate

    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40)
    rows = evaluate(sample_model, text, methods=["bitsandbytes"], codecs=["nf4_g64_fp16_v1"], tokens=256).rows
    ours_row, theirs_row = rows
    assert theirs_row.name == "bitsandbytes" and theirs_row.fidelity.kld > 0
    # Both are NF4 in blocks of 64; ours are fitted with F16 scales, theirs exact.
    assert theirs_row.fidelity.kld == pytest.approx(ours_row.fidelity.kld, rel=0.5)


def test_methods_that_need_data_get_pieces_of_the_text(
    sample_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("torch", "transformers"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    seen: list[list[str]] = []

    class Stand:
        """What gptqmodel's class is asked for; it saves what we export."""

        def quantize(self, texts: list[str], batch_size: int) -> None:
            seen.append(texts)

        def save(self, folder: str) -> None:
            tenpak.export(sample_model, f"{folder}/inner", "gptq", codec="int4_sym_g128_fp16_v1")

    module = types.ModuleType("gptqmodel")
    module.GPTQModel = types.SimpleNamespace(load=lambda path, config: Stand())  # type: ignore[attr-defined]
    module.QuantizeConfig = lambda **options: options  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gptqmodel", module)
    monkeypatch.setattr(methods, "available", lambda: dict.fromkeys(methods.METHODS, "1"))
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 10)
    with pytest.raises(tenpak.InvalidError, match="needs a text"):
        methods.run("gptqmodel", sample_model, tmp_path / "m.tenpak")
    with pytest.raises(tenpak.InvalidError, match="fewer than one sample of 4096"):
        methods.run("gptqmodel", sample_model, tmp_path / "m.tenpak", text=text, length=4096)
    assert not (tmp_path / "m.tenpak").exists()
    report = methods.run("gptqmodel", sample_model, tmp_path / "m.tenpak", text=text, samples=3, length=16)
    assert len(seen[0]) == 3 and seen[0][0].startswith("The old house")
    taken = [tensor["codec"] for tensor in report["tensors"] if tensor.get("imported")]
    assert taken == ["int4_sym_g128_fp16_v1"] * 28
