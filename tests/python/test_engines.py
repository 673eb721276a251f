"""Checkpoints for other engines: what these read is what tenpak decodes.

The formats without an engine here are unpacked by numpy, from their description.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tenpak
from conftest import read_safetensors, write_safetensors

Array = npt.NDArray[Any]
Tensors = dict[str, Array]

SHARD = "model.safetensors"
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
#: Codecs that each target holds.
HELD = {
    "compressed-tensors": [
        "int4_sym_g32_fp16_v1",
        "int4_sym_g128_fp16_v1",
        "int4_zp_g64_fp16_v1",
        "int8_sym_g32_fp16_v1",
        "int8_sym_v1",
    ],
    "gptq": ["int4_sym_g64_fp16_v1", "int4_zp_g128_fp16_v1", "int8_sym_g128_fp16_v1"],
    "awq": ["int4_zp_g32_fp16_v1", "int4_zp_g128_fp16_v1", "int4_sym_g128_fp16_v1"],
    "mlx": [
        "int4_g32_fp16_v1",
        "int4_g128_fp16_v1",
        "int4_sym_g64_fp16_v1",
        "int4_zp_g32_fp16_v1",
        "int8_sym_g32_fp16_v1",
    ],
    "gguf": [
        "int4_sym_g32_fp16_v1",
        "int4_sym_g128_fp16_v1",
        "int4_g32_fp16_v1",
        "int4_g128_fp16_v1",
        "int8_sym_g32_fp16_v1",
    ],
}
CASES = [(to, codec) for to, codecs in HELD.items() for codec in codecs]


def unpack(words: Array, bits: int, axis: int) -> Array:
    """Numbers of words of 32 bits, low bits first, along an axis."""
    words = np.moveaxis(words.view(np.uint32), axis, -1)
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    numbers = (words[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return np.moveaxis(numbers.reshape(*words.shape[:-1], -1), -1, axis).astype(np.float32)


def spread(parameters: Array, cols: int, axis: int = 1) -> Array:
    """Parameters of groups, one for each column."""
    return np.repeat(parameters.astype(np.float32), cols // parameters.shape[axis], axis)


def compressed_tensors(part: Callable[[str], Array | None], config: dict[str, Any]) -> Array:
    """A matrix of ``pack-quantized``."""
    bits = config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"]
    packed, scale, shape, zero = (part(f"weight_{name}") for name in ("packed", "scale", "shape", "zero_point"))
    assert packed is not None and scale is not None and shape is not None
    rows, cols = (int(side) for side in shape)
    codes = unpack(packed, bits, 1)[:, :cols] - (1 << (bits - 1))
    if zero is not None:
        codes -= spread(unpack(zero, bits, 0)[:rows] - (1 << (bits - 1)), cols)
    return codes * spread(scale, cols)


def gptq(part: Callable[[str], Array | None], config: dict[str, Any]) -> Array:
    """A matrix of GPTQ, by the group of each column."""
    quantization = config["quantization_config"]
    bits = quantization["bits"]
    weight, zeros, scales, index = (part(name) for name in ("qweight", "qzeros", "scales", "g_idx"))
    assert weight is not None and zeros is not None and scales is not None and index is not None
    zero = unpack(zeros, bits, 1) + (quantization["checkpoint_format"] == "gptq")
    return ((unpack(weight, bits, 0) - zero[index]) * scales.astype(np.float32)[index]).T


def awq(part: Callable[[str], Array | None], config: dict[str, Any]) -> Array:
    """A matrix of AWQ."""
    weight, zeros, scales = (part(name) for name in ("qweight", "qzeros", "scales"))
    assert weight is not None and zeros is not None and scales is not None
    group = config["quantization_config"]["group_size"]

    def ordered(words: Array) -> Array:
        numbers = unpack(words, 4, 1).reshape(words.shape[0], -1, 8)
        out = np.empty_like(numbers)
        out[..., AWQ_ORDER] = numbers
        return out.reshape(words.shape[0], -1)

    zero, scale = ordered(zeros), scales.astype(np.float32)
    return ((ordered(weight) - np.repeat(zero, group, 0)) * np.repeat(scale, group, 0)).T


def mlx(part: Callable[[str], Array | None], config: dict[str, Any]) -> Array:
    """A matrix of MLX's affine mode."""
    weight, scales, biases = (part(name) for name in ("weight", "scales", "biases"))
    assert weight is not None and scales is not None and biases is not None
    codes = unpack(weight, config["quantization"]["bits"], 1)
    cols = codes.shape[1]
    return codes * spread(scales, cols) + spread(biases, cols)


READERS = {"compressed-tensors": compressed_tensors, "gptq": gptq, "awq": awq, "mlx": mlx}


class Made:
    """Artifacts of the sample model and their decoded weights, each made once."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model

    def artifact(self, codec: str) -> Path:
        """The model with linear weights in a codec, the rest as it is."""
        path = self.folder / f"{codec}.tenpak"
        if not path.exists():
            tenpak.compress(self.model, path, codec=codec, roles={"embedding": "raw_v1"})
        return path

    def decoded(self, codec: str) -> Path:
        """Its weights in F32, as a directory."""
        path = self.folder / f"{codec}-decoded"
        if not path.exists():
            tenpak.decompress(self.artifact(codec), path, dtype="F32")
        return path

    def exported(self, codec: str, to: str) -> Path:
        """It, for an engine."""
        path = self.folder / f"{codec}-{to}{'.gguf' if to == 'gguf' else ''}"
        if not path.exists():
            tenpak.export(self.artifact(codec), path, to)
        return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, sample_model: Path) -> Made:
    return Made(tmp_path_factory.mktemp("engines"), sample_model)


@pytest.mark.parametrize(("to", "codec"), [case for case in CASES if case[0] in READERS])
def test_what_stands_in_the_file_is_what_tenpak_decodes(made: Made, to: str, codec: str) -> None:
    folder = made.exported(codec, to)
    config = json.loads((folder / "config.json").read_text())
    stored = read_safetensors(folder / "model.safetensors")
    packed = 0
    for name, expected in read_safetensors(made.decoded(codec) / "model.safetensors").items():
        module = name.removesuffix(".weight")
        own = {key.removeprefix(f"{module}."): value for key, value in stored.items() if key.startswith(f"{module}.")}
        if list(own) == ["weight"]:
            found = own["weight"].astype(np.float32)
        else:
            found, packed = READERS[to](own.get, config), packed + 1
        np.testing.assert_array_equal(found, expected, err_msg=name)
    assert packed == 28


# This version of compressed-tensors fails to load zero points, whoever wrote them.
@pytest.mark.parametrize("codec", [codec for codec in HELD["compressed-tensors"] if "zp" not in codec])
def test_transformers_computes_with_compressed_tensors_what_it_computes_with_decoded_weights(
    made: Made, codec: str
) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("compressed_tensors")
    assert difference(torch, made.decoded(codec), made.exported(codec, "compressed-tensors")) == 0.0


@pytest.mark.parametrize("codec", HELD["gguf"])
def test_gguf_holds_what_tenpak_decodes(made: Made, codec: str) -> None:
    torch = pytest.importorskip("torch")
    gguf = pytest.importorskip("gguf")
    path = made.exported(codec, "gguf")
    reader = gguf.GGUFReader(path)
    kinds = {tensor.tensor_type.name for tensor in reader.tensors if "attn_v" in tensor.name}
    assert kinds == {"Q8_0" if codec.startswith("int8") else "Q4_0" if "sym" in codec else "Q4_1"}
    decoded = read_safetensors(made.decoded(codec) / "model.safetensors")
    values = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    assert len(values) == len(decoded)
    np.testing.assert_array_equal(values["blk.2.ffn_down.weight"], decoded["model.layers.2.mlp.down_proj.weight"])
    # Rows of queries and keys come back in their order, and every key of the model is found.
    assert difference(torch, made.decoded(codec), path) == 0.0


def difference(torch: Any, directory: Path, other: Path) -> float:
    """The largest difference of the logits of two models."""
    transformers = pytest.importorskip("transformers")
    load, options = transformers.AutoModelForCausalLM.from_pretrained, {"dtype": torch.float32}
    ids = torch.arange(2, 90)[None]
    with torch.no_grad():
        first = load(directory, **options)(ids).logits
        second = load(other.parent, gguf_file=other.name, **options) if other.is_file() else load(other, **options)
        return float((first - second(ids).logits).abs().max())


def test_the_tokenizer_of_gguf_cuts_text_as_the_models_does(made: Made) -> None:
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("gguf")
    path = made.exported("int4_sym_g32_fp16_v1", "gguf")
    own = transformers.AutoTokenizer.from_pretrained(made.model)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = "The old house stood at the end of Mill Lane, and nobody's dog would go near it."
    assert theirs(text)["input_ids"] == own(text)["input_ids"]


@pytest.mark.parametrize("codec", HELD["mlx"])
def test_mlx_dequantizes_what_tenpak_decodes(made: Made, codec: str) -> None:
    mx = pytest.importorskip("mlx.core")
    folder = made.exported(codec, "mlx")
    quantization = json.loads((folder / "config.json").read_text())["quantization"]
    stored = mx.load(str(folder / "model.safetensors"))
    decoded = read_safetensors(made.decoded(codec) / "model.safetensors")
    module = "model.layers.1.self_attn.q_proj"
    parts = [stored[f"{module}.{name}"].astype(kind) for name, kind in (("scales", mx.float32), ("biases", mx.float32))]
    sides = {"group_size": quantization["group_size"], "bits": quantization["bits"]}
    found = np.array(mx.dequantize(stored[f"{module}.weight"], *parts, **sides))
    expected = decoded[f"{module}.weight"]
    # A product and a sum, rounded once or twice.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-23 * 16 * np.abs(expected).max())


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


#: The bytes of every format stay as they are.
PINNED = {
    "compressed-tensors": "fcd6550c63a7ba3f",
    "gptq": "bc0325fdfa7d2491",
    "awq": "1c1a66faa9da7f9f",
    "mlx": "c16b1ebdcbc7be91",
    "gguf": "941ef00fd2ea9e33",
}


@pytest.mark.parametrize("to", HELD)
def test_the_bytes_of_a_format_stay_as_they_are(tmp_path: Path, to: str) -> None:
    values = ((np.arange(96 * 128) * 37 % 251 - 125) / 64).astype(np.float32).reshape(96, 128)
    tensors = {f"model.layers.0.mlp.{name}_proj.weight": values for name in ("gate", "up")}
    source = tmp_path / "model"
    source.mkdir()
    write_safetensors(source / "model.safetensors", tensors)
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = {"model_type": "llama", "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "vocab_size": 32, **sizes}
    (source / "config.json").write_text(json.dumps(config))
    artifact, out = tmp_path / "m.tenpak", tmp_path / ("out.gguf" if to == "gguf" else "out")
    tenpak.compress(source, artifact, codec=HELD[to][0])
    report = tenpak.export(artifact, out, to)
    assert digest(out if out.is_file() else out / "model.safetensors") == PINNED[to]
    if to == "gguf":
        assert "tokenizer is left out" in report["notes"][-1]


@pytest.mark.parametrize("to", HELD)
def test_a_plan_foretells_every_byte(made: Made, tmp_path: Path, to: str) -> None:
    out = tmp_path / ("out.gguf" if to == "gguf" else "out")
    artifact = made.artifact(HELD[to][0])
    planned = tenpak.export(artifact, out, to, dry_run=True, max_shard_size=200_000)
    assert not out.exists()
    written = tenpak.export(artifact, out, to, max_shard_size=200_000)
    assert planned["files"] == written["files"]
    assert all(Path(file["path"]).stat().st_size == file["bytes"] for file in written["files"])
    if out.is_dir():
        index = json.loads((out / "model.safetensors.index.json").read_text())
        names = {name for shard in out.glob("*.safetensors") for name in read_safetensors(shard)}
        assert set(index["weight_map"]) == names and len(set(index["weight_map"].values())) > 1


def test_a_checkpoint_is_exported_at_once(made: Made, tmp_path: Path) -> None:
    # The sample's rows are multiples of 128, so the first codec of each format fits.
    for to, codec in [("gptq", "int4_sym_g128_fp16_v1"), ("awq", "int4_zp_g128_fp16_v1"), ("gguf", "int4_g32_fp16_v1")]:
        out = tmp_path / ("out.gguf" if to == "gguf" else to)
        tenpak.export(made.model, out, to)
        ours, theirs = (
            (out, made.exported(codec, to)) if out.is_file() else (out / SHARD, made.exported(codec, to) / SHARD)
        )
        if to != "gguf":  # Its keys have the name of the model.
            assert ours.read_bytes() == theirs.read_bytes()
        assert tenpak.export(made.model, out, to, dry_run=True, force=True)["files"][0]["bytes"] == ours.stat().st_size
    tenpak.export(made.model, tmp_path / "g32", "gptq", codec="int4_sym_g64_fp16_v1")
    assert json.loads((tmp_path / "g32" / "quantize_config.json").read_text())["group_size"] == 64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["awq", "g32", "gptq", "out.gguf"], "nothing is left"
    with pytest.raises(tenpak.InvalidError, match="run tenpak compress first"):
        tenpak.export(made.model, tmp_path / "hf", "hf")
    with pytest.raises(tenpak.InvalidError, match="codes stay as they are"):
        tenpak.export(made.artifact("int4_g32_fp16_v1"), tmp_path / "x", "mlx", codec="int4_g32_fp16_v1")
    with pytest.raises(tenpak.InvalidError, match="exists"):
        tenpak.export(made.model, made.model, "gptq")


def test_what_has_no_place_is_refused_with_the_remedy_or_quantized_anew_and_named(made: Made, tmp_path: Path) -> None:
    artifact = made.artifact("int4_g32_fp16_v1")
    for to in ("compressed-tensors", "gptq", "awq"):
        with pytest.raises(tenpak.InvalidError, match=r"28 of 38 tensors cannot be expressed exactly.*--allow-req"):
            tenpak.export(artifact, tmp_path / to, to)
        assert not (tmp_path / to).exists()
        notes = tenpak.export(artifact, tmp_path / to, to, allow_requantize=True)["notes"]
        assert sum("instead of int4_g32_fp16_v1, quantized anew" in note for note in notes) == 28
    with pytest.raises(tenpak.InvalidError, match=r"does not end in \.gguf"):
        tenpak.export(artifact, tmp_path / "gguf", "gguf")


def test_a_matrix_of_no_whole_groups_is_decoded_where_that_is_allowed(tmp_path: Path) -> None:
    source = tmp_path / "m.safetensors"
    wide, ragged = np.ones((64, 64), np.float32), np.arange(64 * 40, dtype=np.float32).reshape(64, 40)
    write_safetensors(source, {"a.down_proj.weight": ragged, "a.up_proj.weight": wide, "a.gate_proj.weight": wide})
    tenpak.compress(source, tmp_path / "m.tenpak", codec="int4_sym_g32_fp16_v1")
    with pytest.raises(tenpak.InvalidError, match="its 40 columns are no multiple of the group of 32"):
        tenpak.export(tmp_path / "m.tenpak", tmp_path / "out", "compressed-tensors")
    notes = tenpak.export(tmp_path / "m.tenpak", tmp_path / "out", "compressed-tensors", allow_requantize=True)["notes"]
    assert any(note.startswith("a.down_proj.weight: decoded") for note in notes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["a.down_proj", "lm_head"]
    decoded = tenpak.open(tmp_path / "m.tenpak").decode("a.down_proj.weight")
    np.testing.assert_array_equal(
        read_safetensors(tmp_path / "out" / "model.safetensors")["a.down_proj.weight"], decoded
    )


def test_projections_that_engines_fuse_must_be_quantized_alike(sample_model: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "m.tenpak"
    tenpak.compress(sample_model, artifact, codec="int4_sym_g32_fp16_v1", exclude=["*.layers.1.self_attn.k_proj*"])
    with pytest.raises(tenpak.InvalidError, match=r"layers\.1\.self_attn\.k_proj\.weight' is not, but engines"):
        tenpak.export(artifact, tmp_path / "out", "compressed-tensors")
    tenpak.export(artifact, tmp_path / "out.gguf", "gguf")
    with pytest.raises(tenpak.InvalidError, match="one scheme for all matrices"):
        mixed = tmp_path / "mixed.tenpak"
        tenpak.compress(sample_model, mixed, codec="int4_sym_g32_fp16_v1", rules=[("*mlp*", "int8_sym_g32_fp16_v1")])
        tenpak.export(mixed, tmp_path / "out", "gptq")


def test_gguf_refuses_what_it_has_no_names_for(made: Made, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    weight = np.ones((64, 64), np.float32)
    config = json.loads((made.model / "config.json").read_text())
    for change, name, match in [
        ({"model_type": "opt"}, "model.norm.weight", "model type 'opt' has no table of names"),
        ({}, "model.extra.weight", "tensor 'model.extra.weight' has no place"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "model.norm.weight", "positions are scaled by 'yarn'"),
        ({"hidden_size": None}, "model.norm.weight", r"config\.json: .*hidden_size|config\.json: invalid type"),
    ]:
        write_safetensors(source / "model.safetensors", {name: weight})
        (source / "config.json").write_text(json.dumps(config | change))
        tenpak.compress(source, tmp_path / "m.tenpak", codec="int4_sym_g32_fp16_v1", force=True)
        with pytest.raises(tenpak.InvalidError, match=match):
            tenpak.export(tmp_path / "m.tenpak", tmp_path / "m.gguf", "gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_an_export_replaces_only_a_model_and_only_when_forced(made: Made, tmp_path: Path) -> None:
    artifact, out = made.artifact("int4_sym_g64_fp16_v1"), tmp_path / "out"
    tenpak.export(artifact, out, "gptq")
    with pytest.raises(tenpak.InvalidError, match="exists"):
        tenpak.export(artifact, out, "gptq")
    tenpak.export(artifact, out, "awq", force=True)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    with pytest.raises(tenpak.InvalidError, match=r"no config\.json"):
        tenpak.export(artifact, other, "awq", force=True)
    assert (other / "letter.txt").read_text() == "dear"
