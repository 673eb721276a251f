"""Families of models: which part of a model a tensor is taken for, and what each engine's format makes of it."""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tenpak
from conftest import read_safetensors

torch = pytest.importorskip("torch", reason="PyTorch is not installed; pip install 'tenpak[torch]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed; pip install 'tenpak[hf]'")

from families import CONFIGS  # noqa: E402

#: Roles by the ends of names; the first that fits counts.
ROLES = {
    r"norm\d?\.weight|ln_\w\.weight|\.bias": "small",
    r"(mlp|block_sparse_moe)\.gate\.weight|shared_expert_gate\.weight": "router",
    r"(embed_tokens|embed_positions|wte|wpe)\.weight": "embedding",
    r"lm_head\.weight": "head",
    r"(attn|self_attn)\.\w+\.weight": "attention",
    r"(mlp|experts\.\d+|shared_expert|layers\.\d+)\.\w+\.weight": "mlp",
}
CODECS = {
    "compressed-tensors": "int4_sym_g32_fp16_v1",
    "gptq": "int4_sym_g32_fp16_v1",
    "awq": "int4_zp_g32_fp16_v1",
    "mlx": "int4_g32_fp16_v1",
    "gguf": "int4_g32_fp16_v1",
}
#: What is refused, and why; everything else is taken.
REFUSED = {(kind, to): "c_attn.weight is a Conv1D" for kind in ("gpt2",) for to in CODECS if to != "gguf"}
REFUSED |= {("opt", "gguf"): "model type 'opt'", ("phi", "gguf"): "model type 'phi'"}
#: The architecture of gguf, where it is not the model's name.
ARCHITECTURES = {"llama3": "llama", "llama tied": "llama", "mistral": "llama", "mixtral": "llama"}
ARCHITECTURES |= {"qwen2 moe": "qwen2moe", "qwen3 moe": "qwen3moe"}
#: What transformers reads of gguf in the way that llama.cpp does.
READ = ("llama", "llama3", "qwen2", "qwen3", "qwen2 moe", "qwen3 moe", "phi3", "gpt2", "gemma2", "gemma3")
IN_GGUF = [kind for kind in CONFIGS if (kind, "gguf") not in REFUSED]


class Made:
    """A model of a family, and what was made of it, each once."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.source = folder, folder / "source"
        torch.manual_seed(5)
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(std=0.15)
            elif "norm" in name or "ln_" in name:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(self.source)

    def artifact(self, codec: str) -> Path:
        path = self.folder / f"{codec}.tenpak"
        if not path.exists():
            tenpak.compress(self.source, path, codec=codec)
        return path

    def gguf(self) -> Path:
        path = self.folder / "m.gguf"
        if not path.exists():
            tenpak.export(self.artifact(CODECS["gguf"]), path, "gguf")
        return path

    def decoded(self) -> Path:
        path = self.folder / "decoded"
        if not path.exists():
            tenpak.decompress(self.artifact(CODECS["gguf"]), path, dtype="float32")
            shutil.copy(self.source / "generation_config.json", path)
        return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    return functools.cache(lambda kind: Made(tmp_path_factory.mktemp("made"), kind))


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_tensor_is_taken_for_what_it_is(kind: str, made: Any, tmp_path: Path) -> None:
    report = tenpak.compress(made(kind).source, dry_run=True)
    for tensor in report["tensors"]:
        role = next(role for pattern, role in ROLES.items() if re.search(f"({pattern})$", tensor["name"]))
        few = int(np.prod(tensor["shape"])) < 1024
        assert tensor["reason"] == f"role {'small' if few else role}", tensor["name"]


@pytest.mark.parametrize("to", CODECS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_format_takes_a_family_or_says_why_not(kind: str, to: str, made: Any, tmp_path: Path) -> None:
    out = tmp_path / ("m.gguf" if to == "gguf" else "m")
    if (kind, to) in REFUSED:
        with pytest.raises(tenpak.InvalidError, match=REFUSED[kind, to]):
            tenpak.export(made(kind).artifact(CODECS[to]), out, to)
        assert not out.exists()
    else:
        tenpak.export(made(kind).artifact(CODECS[to]), out, to)
        assert out.exists()


@pytest.mark.parametrize("kind", IN_GGUF)
def test_names_shapes_and_weights_of_gguf_are_those_of_the_architecture(kind: str, made: Any) -> None:
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(made(kind).gguf())
    name = reader.get_field("general.architecture").contents()
    assert name == ARCHITECTURES.get(kind, kind)
    arch = next(arch for arch, text in gguf.constants.MODEL_ARCH_NAMES.items() if text == name)
    known = {gguf.constants.TENSOR_NAMES[tensor] for tensor in gguf.constants.MODEL_TENSORS[arch]}
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert {re.sub(r"blk\.\d+\.", "blk.{bid}.", n.rpartition(".")[0]) for n in found} <= known
    decoded = read_safetensors(made(kind).decoded() / "model.safetensors")
    # What the tables of gguf itself call the tensors of a model.
    names, seen = gguf.get_tensor_name_map(arch, 2), set()
    for theirs, weights in decoded.items():
        stacked = re.sub(r"experts\.\d+\.", "experts.", theirs)
        own = names.get_name(stacked, try_suffixes=(".weight", ".bias")) or stacked.replace("w1", "gate")
        if own not in found:
            mixtral = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
            layer, part = re.search(r"layers\.(\d+)\..*\.(w\d)\.weight", theirs).groups()  # type: ignore[union-attr]
            own = f"blk.{layer}.{mixtral[part]}.weight"
        tensor = found[own]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        seen.add(own)
        if expert := re.search(r"experts\.(\d+)\.", theirs):
            values = values[int(expert[1])]
        if re.search(r"(c_attn|c_proj|c_fc)\.weight$", theirs):
            weights = weights.T
        if kind.startswith("gemma") and theirs.endswith("norm.weight"):
            weights = weights + np.float32(1)
        if name == "llama" and re.search(r"[qk]_proj", theirs):
            continue  # reordered: its logits are compared
        np.testing.assert_array_equal(values.reshape(weights.shape), weights, err_msg=theirs)
    assert set(found) - seen <= {"rope_freqs.weight"}
    if "moe" in kind or kind == "mixtral":
        assert found["blk.0.ffn_up_exps.weight"].tensor_type.name == "Q4_1"
        assert found["blk.0.ffn_gate_inp.weight"].tensor_type.name == "F32"


@pytest.mark.parametrize("kind", READ)
def test_logits_of_gguf_are_those_of_the_decoded_weights(kind: str, made: Any) -> None:
    pytest.importorskip("gguf")
    path, load = made(kind).gguf(), transformers.AutoModelForCausalLM.from_pretrained
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        want = load(made(kind).decoded(), dtype=torch.float32)(ids).logits
        # Its reader takes sizes of vocabularies from tokenizers, of which there is none.
        config = transformers.AutoConfig.from_pretrained(made(kind).decoded())
        got = load(path.parent, gguf_file=path.name, config=config, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("qwen3 moe", {"norm_topk_prob": False}, "norm_topk_prob is false, and gguf's architecture qwen3moe always"),
        ("qwen2 moe", {"norm_topk_prob": True}, "norm_topk_prob is true"),
        ("qwen2 moe", {"num_experts": 3}, "experts.3.* has no place"),
        ("qwen2 moe", {"num_experts": 5}, "expert 4 of 'blk.0.*' is missing"),
        ("gemma2", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar is 24, and gguf's architecture gemma2 has 16"),
        ("gemma2", {"final_logit_softcapping": None}, "a softcapping is missing"),
        ("gemma3", {"layer_types": ["full_attention"] * 2}, "layer 0 has full_attention"),
        ("phi3", {"partial_rotary_factor": 0.5}, "only a part of each head is turned"),
    ],
)
def test_what_an_engine_computes_in_another_way_is_refused(
    kind: str, change: dict[str, Any], says: str, made: Any, tmp_path: Path
) -> None:
    import json

    shutil.copytree(made(kind).source, tmp_path / "source")
    path = tmp_path / "source/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    tenpak.compress(tmp_path / "source", tmp_path / "m.tenpak", codec=CODECS["gguf"])
    with pytest.raises(tenpak.InvalidError, match=says):
        tenpak.export(tmp_path / "m.tenpak", tmp_path / "m.gguf", "gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_experts_of_different_codecs_have_no_stack_in_gguf(made: Any, tmp_path: Path) -> None:
    rules = [("*layers.1*experts.2.*", "int4_sym_g32_fp16_v1")]
    tenpak.compress(made("mixtral").source, tmp_path / "m.tenpak", codec=CODECS["gguf"], rules=rules)
    with pytest.raises(tenpak.InvalidError, match="expert 2 of 'blk.1.*int4_sym_g32_fp16_v1.*one stack"):
        tenpak.export(tmp_path / "m.tenpak", tmp_path / "m.gguf", "gguf")
