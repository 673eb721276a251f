"""A GGUF file as a model of transformers: names, config and tokenizer out of its keys, and back again."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tenpak
from conftest import read_safetensors

torch = pytest.importorskip("torch", reason="PyTorch is not installed; pip install 'tenpak[torch]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed; pip install 'tenpak[hf]'")
gguf = pytest.importorskip("gguf")

from families import CONFIGS  # noqa: E402

ROOT = Path(__file__).parents[2]
#: Families whose config follows from GGUF, and the codec of the matrices in it: those of GPT-2 are turned there.
CODECS = dict.fromkeys(CONFIGS, "int4_g32_fp16_v1") | {"gpt2": "raw_v1"}
KINDS = [kind for kind in CONFIGS if kind not in ("opt", "phi")]
TEXT = ["The old house stood at the end of Mill Lane, and nobody's dog would go near it.", " two  spaces\n\n7 héé ☃"]


class Made:
    """A model of a family, its GGUF file, and what comes out of that again."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        torch.manual_seed(5)
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(std=0.15)
            elif "norm" in name or "ln_" in name:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder / "source")
        tenpak.compress(folder / "source", folder / "m.tenpak", codec=CODECS[kind])
        tenpak.decompress(folder / "m.tenpak", folder / "expected", dtype="float32")
        tenpak.export(folder / "m.tenpak", folder / "m.gguf", "gguf")
        # Codes are taken over as they are, where there are any.
        codec = {"codec": "raw_v1"} if kind == "gpt2" else {}
        tenpak.compress(folder / "m.gguf", folder / "again.tenpak", **codec)
        tenpak.decompress(folder / "again.tenpak", folder / "found", dtype="float32")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    return functools.cache(lambda kind: Made(tmp_path_factory.mktemp("made"), kind))


def logits(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(2, 40)[None]).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_becomes_a_directory_that_transformers_loads(kind: str, made: Any) -> None:
    folder = made(kind).folder
    expected, found = (read_safetensors(folder / name / "model.safetensors") for name in ("expected", "found"))
    prefix = "transformer." if kind == "gpt2" else ""
    assert {name.removeprefix(prefix) for name in found} == {name.removeprefix(prefix) for name in expected}
    for name, weights in expected.items():
        own = found[name if name in found else prefix + name]
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            weights = (weights + np.float32(1)) - np.float32(1)
        np.testing.assert_array_equal(own, weights, err_msg=name)
    torch.testing.assert_close(logits(folder / "found"), logits(folder / "expected"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_came_from_gguf_goes_there_again(kind: str, made: Any) -> None:
    folder = made(kind).folder
    if not (folder / "again.gguf").exists():
        tenpak.export(folder / "again.tenpak", folder / "again.gguf", "gguf")
    first, second = (gguf.GGUFReader(folder / name) for name in ("m.gguf", "again.gguf"))
    own = {tensor.name: tensor for tensor in second.tensors}
    assert set(own) == {tensor.name for tensor in first.tensors}
    for tensor in first.tensors:
        assert own[tensor.name].tensor_type == tensor.tensor_type
        if not kind.startswith("gemma"):
            np.testing.assert_array_equal(own[tensor.name].data, tensor.data, err_msg=tensor.name)
    ignored = {"GGUF.kv_count", "general.name"}
    keys = [{key: field.contents() for key, field in reader.fields.items()} for reader in (first, second)]
    assert {key: value for key, value in keys[0].items() if key not in ignored}.items() <= keys[1].items()


def finish(writer: Any, reader: Any) -> None:
    """Write the tensors of a file behind the keys that the writer has."""
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rewritten(source: Path, target: Path, split: int = 0, **texts: str) -> None:
    """A file with more keys, in parts of so many tensors, as the writer of gguf itself has them."""
    reader = gguf.GGUFReader(source)
    name = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(target, name, split_max_tensors=split)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), kind, sub_type=sub)
    for key, text in texts.items():
        writer.add_key_value(f"general.{key}", text, gguf.GGUFValueType.STRING)
    finish(writer, reader)


def test_a_model_in_parts_is_read_as_one_and_what_is_said_of_it_is_passed_on(made: Any, tmp_path: Path) -> None:
    whole = made("mixtral").folder / "m.gguf"
    rewritten(whole, tmp_path / "one.gguf", license="mit", author="someone")
    rewritten(whole, tmp_path / "m.gguf", split=6, license="mit", author="someone")
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 2
    expected = tenpak.compress(tmp_path / "one.gguf", tmp_path / "one.tenpak")
    for number in (0, 1):
        found = tenpak.compress(parts[number], tmp_path / f"{number}.tenpak")
        assert {t["name"] for t in found["tensors"]} == {t["name"] for t in expected["tensors"]}
        assert found["identity"] == expected["identity"]
        assert len(tenpak.open(tmp_path / f"{number}.tenpak").provenance["sources"]) == len(parts)
    tenpak.export(tmp_path / "0.tenpak", tmp_path / "again.gguf", "gguf")
    fields = gguf.GGUFReader(tmp_path / "again.gguf").fields
    assert (fields["general.license"].contents(), fields["general.author"].contents()) == ("mit", "someone")
    bytes_of = {part: part.read_bytes() for part in parts}
    parts[1].rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match="00002-of"):
        tenpak.compress(parts[0], dry_run=True)
    parts[1].write_bytes(bytes_of[parts[2]])
    with pytest.raises(tenpak.InvalidError, match="the file is part 3 of .*, expected part 2 of"):
        tenpak.compress(parts[0], dry_run=True)
    parts[0].rename(tmp_path / "any.gguf")
    with pytest.raises(tenpak.InvalidError, match=r"expected a name that ends in -00001-of-.*--merge"):
        tenpak.compress(tmp_path / "any.gguf", dry_run=True)


def round_trip(model: Path, folder: Path) -> Any:
    """The tokenizer that comes out of the file that a model becomes."""
    tenpak.compress(model, folder / "m.tenpak", codec="int4_g32_fp16_v1")
    tenpak.export(folder / "m.tenpak", folder / "m.gguf", "gguf")
    tenpak.compress(folder / "m.gguf", folder / "out")
    return transformers.AutoTokenizer.from_pretrained(folder / "out")


def assert_same(found: Any, own: Any, texts: list[str]) -> None:
    for text in texts:
        ids = own(text)["input_ids"]
        assert found(text)["input_ids"] == ids
        assert found.decode(ids, skip_special_tokens=True) == own.decode(ids, skip_special_tokens=True)


def test_byte_level_tokens_come_back(tmp_path: Path) -> None:
    model = ROOT / "tests/data/tiny-books"
    found, own = round_trip(model, tmp_path), transformers.AutoTokenizer.from_pretrained(model)
    assert_same(found, own, TEXT)
    assert (found.bos_token, found.eos_token) == (own.bos_token, own.eos_token)


@pytest.mark.parametrize("cut", ["llama-bpe", "qwen2"])
def test_ways_of_cutting_text_come_back(cut: str, made: Any, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokens = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "Ġt", "Ġth", "77", "<|end|>"]
    reader = gguf.GGUFReader(made("llama").folder / "m.gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, field in reader.fields.items():
        if key.startswith("llama."):
            writer.add_key_value(key, field.contents(), field.types[0])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["Ġ t", "Ġt h", "7 7"])
    writer.add_eos_token_id(len(tokens) - 1)
    finish(writer, reader)
    tenpak.compress(tmp_path / "m.gguf", tmp_path / "out")
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    # Llama 3 takes up to three digits at once, Qwen one.
    ids = found(" the 777<|end|>")["input_ids"]
    digits = ["77", "7"] if cut == "llama-bpe" else ["7", "7", "7"]
    assert found.convert_ids_to_tokens(ids) == ["Ġth", "e", "Ġ", *digits, "<|end|>"]
    assert found.decode(ids) == " the 777<|end|>"
    assert found.eos_token == "<|end|>"


def test_pieces_with_scores_come_back(made: Any, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.SentencePieceBPETokenizer(unk_token="<unk>", add_prefix_space=True)
    text = (ROOT / "tests/data/excerpt.txt").read_text(encoding="utf-8")
    bytes_of = [f"<0x{byte:02X}>" for byte in range(256)]
    trained.train_from_iterator([text], vocab_size=700, special_tokens=["<unk>", "<s>", "</s>"])
    state = json.loads(trained.to_str())
    vocab = dict(state["model"]["vocab"])
    vocab |= {token: len(vocab) + index for index, token in enumerate(bytes_of)}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    state["model"] |= {"vocab": vocab, "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    state["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]}
    state["pre_tokenizer"] = None
    state["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    model = tmp_path / "model"
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**{**CONFIGS["llama"]().to_dict(), "vocab_size": len(vocab)})
    config.bos_token_id, config.eos_token_id = 1, 2
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model)
    (model / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "unk_token": "<unk>"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<s>", "eos_token": "</s>"}))
    found, own = round_trip(model, tmp_path), transformers.AutoTokenizer.from_pretrained(model)
    assert_same(found, own, [*TEXT, text[:2000]])


def test_what_no_config_says_is_said(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = tenpak.compress(tmp_path / "m.gguf", tmp_path / "m.tenpak")
    assert "no config.json follows" in report["notes"][0] and "llama.embedding_length is missing" in report["notes"][0]
    assert [t["name"] for t in report["tensors"]] == ["model.embed_tokens.weight"]


def test_a_tensor_that_no_model_has_leaves_the_file_without_a_config(made: Any, tmp_path: Path) -> None:
    reader = gguf.GGUFReader(made("llama").folder / "m.gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, field in reader.fields.items():
        if key.startswith("llama."):
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.add_tensor("blk.0.ffn_gate.0.weight", np.ones((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = tenpak.compress(tmp_path / "m.gguf", tmp_path / "m.tenpak")
    assert "'blk.0.ffn_gate.0.weight' has no place in a model of type llama" in report["notes"][0]
    assert list(tenpak.open(tmp_path / "m.tenpak").files) == []
    names = {t["name"] for t in report["tensors"]}
    assert {"model.layers.0.self_attn.q_proj.weight", "blk.0.ffn_gate.0.weight"} <= names
