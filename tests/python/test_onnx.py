"""Graphs for onnxruntime: what it multiplies by is what tenpak decodes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tenpak
import torch
from conftest import write_safetensors
from transformers import AutoModelForCausalLM

CODECS = ["int4_sym_g32_fp16_v1", "int4_sym_g128_fp16_v1", "int4_zp_g64_fp16_v1", "int8_sym_g32_fp16_v1"]


def exported(model: Path, folder: Path, codec: str) -> tuple[Path, Path]:
    """A model in a codec, and its graphs."""
    artifact, out = folder / "m.tenpak", folder / "graphs"
    tenpak.compress(model, artifact, codec=codec, roles={"embedding": "raw_v1"})
    tenpak.export(artifact, out, "onnx")
    return artifact, out


@pytest.mark.parametrize("codec", CODECS)
def test_onnxruntime_multiplies_by_what_tenpak_decodes(sample_model: Path, tmp_path: Path, codec: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    artifact, out = exported(sample_model, tmp_path, codec)
    table = json.loads((out / "matrices.json").read_text())
    assert len(table["matrices"]) == 28 and table["operator"] == "com.microsoft.MatMulNBits"
    opened, random = tenpak.open(artifact), np.random.default_rng(7)
    for module, matrix in table["matrices"].items():
        session = onnxruntime.InferenceSession(out / matrix["file"], providers=["CPUExecutionProvider"])
        weights = opened.decode(f"{module}.weight").astype(np.float32)
        assert weights.shape == (matrix["N"], matrix["K"])
        for rows in (1, 33):
            x = random.standard_normal((rows, matrix["K"]), dtype=np.float32)
            (found,) = session.run(["y"], {"x": x})
            expected = x.astype(np.float64) @ weights.T.astype(np.float64)
            # A level may be multiplied apart from its zero point, which has the same magnitude as a code.
            magnitude = np.abs(x).astype(np.float64) @ (np.abs(weights) + 16 * step(weights)).T
            bound = (matrix["K"] + 4) * 2.0**-23 * magnitude
            assert (np.abs(found - expected) <= bound).all(), (module, rows)


def step(weights: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> float:
    """No less than any step between two levels of a matrix."""
    return float(np.abs(weights).max())


@pytest.mark.parametrize(("engine", "codec"), [("awq", "int4_zp_g32_fp16_v1"), ("gptq", "int4_sym_g32_fp16_v1")])
def test_genai_runs_the_whole_model_that_its_builder_made_of_an_export(
    sample_model: Path, tmp_path: Path, engine: str, codec: str
) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    exported, graph, decoded = tmp_path / engine, tmp_path / "graph", tmp_path / "decoded"
    tenpak.export(sample_model, exported, engine, codec=codec)
    tenpak.compress(exported, tmp_path / "m.tenpak")
    tenpak.decompress(tmp_path / "m.tenpak", decoded, dtype="F32")
    # Activations stay floats, and what was not quantized stays so: the builder would round both by itself.
    options = [
        "accuracy_level=1",
        "include_hidden_states=true",
        "shared_embeddings=false",
        "nodes_to_exclude=/lm_head/MatMul",
    ]
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
    paths = ["-i", str(exported), "-o", str(graph), "-c", str(tmp_path / "cache")]
    subprocess.run([*builder, *paths, "--extra_options", *options], check=True, capture_output=True)
    ids = torch.tensor([[5, 17, 2, 90, 33, 8, 41, 3]])
    model = genai.Model(str(graph))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=16, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(ids.numpy().astype(np.int32))
    found = np.array(generator.get_output("hidden_states"))
    with torch.no_grad():
        out = AutoModelForCausalLM.from_pretrained(decoded, dtype=torch.float32)(ids, output_hidden_states=True)
    expected = out.hidden_states[-1].numpy()
    # Sums of floats in another order, layer after layer; one code off by one moves them by a hundredth.
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    # The model on its own, without the quantization, is much farther away.
    with torch.no_grad():
        other = AutoModelForCausalLM.from_pretrained(sample_model, dtype=torch.float32)(ids, output_hidden_states=True)
    assert np.abs(other.hidden_states[-1].numpy() - expected).max() > 1e-2 * np.abs(expected).max()


def test_a_plan_foretells_every_byte_and_what_is_left_out_is_named(sample_model: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "m.tenpak"
    tenpak.compress(sample_model, artifact, codec="int4_sym_g32_fp16_v1")
    planned = tenpak.export(artifact, tmp_path / "out", "onnx", dry_run=True)
    assert not (tmp_path / "out").exists()
    written = tenpak.export(artifact, tmp_path / "out", "onnx")
    assert planned["files"] == written["files"] and planned["notes"] == written["notes"]
    sizes = {Path(file["path"]): file["bytes"] for file in written["files"]}
    assert sizes == {path: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert any("1 embeddings, heads or other tensors are left out" in note for note in written["notes"])
    at_once = tenpak.export(sample_model, tmp_path / "once", "onnx")
    assert len(at_once["files"]) == len(written["files"])


def test_what_has_no_place_in_a_graph_is_refused(sample_model: Path, tmp_path: Path) -> None:
    for codec in ("int4_g32_fp16_v1", "int8_sym_v1"):
        artifact = tmp_path / f"{codec}.tenpak"
        tenpak.compress(sample_model, artifact, codec=codec)
        with pytest.raises(tenpak.InvalidError, match=r"cannot be expressed exactly as onnx.*--allow-requantize"):
            tenpak.export(artifact, tmp_path / "out", "onnx", force=True)
        notes = tenpak.export(artifact, tmp_path / "out", "onnx", allow_requantize=True, force=True)["notes"]
        assert sum("int4_zp_g32_fp16_v1 instead of" in note for note in notes) == 28
    source = tmp_path / "m.safetensors"
    write_safetensors(source, {"a/up_proj.weight": np.ones((32, 64), np.float32)})
    with pytest.raises(tenpak.InvalidError, match=r"no file can be called as the module 'a/up_proj'"):
        tenpak.export(source, tmp_path / "x", "onnx")
    assert not (tmp_path / "x").exists()


def test_the_bytes_of_a_graph_stay_as_they_are(tmp_path: Path) -> None:
    values = ((np.arange(96 * 128) * 37 % 251 - 125) / 64).astype(np.float32).reshape(96, 128)
    write_safetensors(tmp_path / "m.safetensors", {"model.layers.0.mlp.up_proj.weight": values})
    _, out = exported(tmp_path / "m.safetensors", tmp_path, "int4_zp_g32_fp16_v1")
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in sorted(out.iterdir())}
    assert digests.pop("README.md")
    assert digests == {
        "matrices.data": "c58a541c28afc76a",
        "matrices.json": "5bfc4485cec3b2de",
        "model.layers.0.mlp.up_proj.onnx": "d5c95d1657836877",
    }
