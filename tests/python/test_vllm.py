"""The plugin for vLLM, against stand-ins of the classes that it meets: every codec, whole and in parts."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tenpak
from conftest import ROOT, write_safetensors

torch = pytest.importorskip("torch", reason="PyTorch is not installed; pip install 'tenpak[torch]'")

import safetensors.torch  # noqa: E402
import vllm_stand_in as stand_in  # noqa: E402

HIDDEN, KV, MLP, TOKENS = 128, 64, 256, 100
SHAPES = {
    "model.embed_tokens": (TOKENS, HIDDEN),
    "model.layers.0.self_attn.q_proj": (HIDDEN, HIDDEN),
    "model.layers.0.self_attn.k_proj": (KV, HIDDEN),
    "model.layers.0.self_attn.v_proj": (KV, HIDDEN),
    "model.layers.0.self_attn.o_proj": (HIDDEN, HIDDEN),
    "model.layers.0.mlp.gate_proj": (MLP, HIDDEN),
    "model.layers.0.mlp.up_proj": (MLP, HIDDEN),
    "model.layers.0.mlp.down_proj": (HIDDEN, MLP),
}
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LAYER = "model.layers.0"
#: All but those whose planes are coded in a directory, which are refused.
CODECS = [c["id"] for c in tenpak.codecs() if c["id"] not in ("raw_v1", "ecu_v1")]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The plugin, registered with the stand-ins."""
    for name, module in stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(stand_in, "QUANTIZATION_METHODS", ["awq"])
    sys.modules["vllm.model_executor.layers.quantization"].QUANTIZATION_METHODS = stand_in.QUANTIZATION_METHODS  # type: ignore[attr-defined]
    monkeypatch.setattr(stand_in, "size", 1)
    monkeypatch.setattr(stand_in, "rank", 0)
    import tenpak.vllm

    tenpak.vllm.register()
    tenpak.vllm.register()
    assert stand_in.QUANTIZATION_METHODS == ["awq", "tenpak"]
    yield monkeypatch


class Made:
    """A directory of planes, and what it decodes to."""

    def __init__(self, folder: Path, codec: str, **options: Any) -> None:
        rng = np.random.default_rng(3)
        weights = {f"{n}.weight": rng.standard_normal(s).astype(np.float32) * 0.1 for n, s in SHAPES.items()}
        (folder / "source").mkdir(parents=True)
        write_safetensors(folder / "source/model.safetensors", weights)
        (folder / "source/config.json").write_text('{"model_type": "llama"}')
        tenpak.compress(folder / "source", folder / "planes", codec=codec, **options)
        self.planes = safetensors.torch.load_file(folder / "planes/model.safetensors")
        self.config = json.loads((folder / "planes/config.json").read_text())["quantization_config"]
        self.decoded = {
            n: torch.tensor(a.decode(f"{n}.weight")) for a in [tenpak.open(folder / "planes")] for n in SHAPES
        }

    def quantization(self) -> Any:
        config = stand_in.get_quantization_config("tenpak").from_config(self.config)
        config.packed_modules_mapping = FUSED
        return config


def served(made: Made, config: Any) -> dict[str, Any]:
    """The layers of a rank, loaded."""
    at = f"{LAYER}.self_attn"
    layers = {
        "qkv": stand_in.QKVParallelLinear(HIDDEN, [HIDDEN, KV, KV], config, f"{at}.qkv_proj"),
        "o": stand_in.RowParallelLinear(HIDDEN, HIDDEN, config, f"{at}.o_proj"),
        "gate_up": stand_in.MergedColumnParallelLinear(HIDDEN, [MLP, MLP], config, f"{LAYER}.mlp.gate_up_proj"),
        "down": stand_in.RowParallelLinear(MLP, HIDDEN, config, f"{LAYER}.mlp.down_proj"),
        # vLLM's Llama does not say how its table is called.
        "embed": stand_in.VocabParallelEmbedding(TOKENS, HIDDEN, config, ""),
    }
    head = stand_in.ParallelLMHead(TOKENS, HIDDEN, config, "lm_head")
    head.weight = layers["embed"].weight  # tied
    for shard in "qkv":
        stand_in.load(layers["qkv"], made.planes, f"{at}.{shard}_proj", shard)
    for number, part in enumerate(("gate_proj", "up_proj")):
        stand_in.load(layers["gate_up"], made.planes, f"{LAYER}.mlp.{part}", number)
    stand_in.load(layers["o"], made.planes, f"{at}.o_proj")
    stand_in.load(layers["down"], made.planes, f"{LAYER}.mlp.down_proj")
    stand_in.load(layers["embed"], made.planes, "model.embed_tokens")
    for layer in (*layers.values(), head):
        layer.quant_method.process_weights_after_loading(layer)
        layer.quant_method.process_weights_after_loading(layer)
    return layers | {"head": head}


@pytest.mark.parametrize("codec", CODECS)
def test_layers_give_what_decoded_weights_give_whole_and_in_parts(vllm: Any, tmp_path: Path, codec: str) -> None:
    made = Made(tmp_path, codec, all=True)
    for parts in (1, 2):
        check(vllm, made, parts)


def check(vllm: Any, made: Made, parts: int) -> None:
    """Hold every layer against the decoded weights."""
    x, y = torch.randn(5, HIDDEN), torch.randn(5, MLP)
    ids = torch.tensor([0, 7, TOKENS - 1])
    ranks = []
    vllm.setattr(stand_in, "size", parts)
    for rank in range(parts):
        vllm.setattr(stand_in, "rank", rank)
        try:
            ranks.append(served(made, made.quantization()))
        except tenpak.UnsupportedError as error:
            # Groups or words that the cut would go through.
            assert parts > 1 and "no whole groups" in str(error)
            return
    rows = {name: weights.chunk(parts) for name, weights in made.decoded.items()}
    fused = {"qkv": ("self_attn", "qkv"), "gate_up": ("mlp", ("gate", "up"))}
    want = {
        name: [torch.cat([rows[f"{LAYER}.{module}.{part}_proj"][rank] for part in those]) for rank in range(parts)]
        for name, (module, those) in fused.items()
    }
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
    for rank, layers in enumerate(ranks):
        for name, weights in want.items():
            torch.testing.assert_close(layers[name](x), x @ weights[rank].T, **close)
        table = torch.zeros(128, HIDDEN)
        table[:TOKENS] = made.decoded["model.embed_tokens"]
        assert torch.equal(layers["embed"].weight[: TOKENS - 64], table.chunk(parts)[rank][: TOKENS - 64])
        assert not {"codes", "scales"} & set(dict(layers["qkv"].named_parameters()))
        assert layers["head"].weight is layers["embed"].weight
    for name, module, full in (("o", "self_attn.o_proj", x), ("down", "mlp.down_proj", y)):
        cuts = full.chunk(parts, 1)
        got = sum(layers[name](cut.contiguous()) for layers, cut in zip(ranks, cuts, strict=True))
        torch.testing.assert_close(got, full @ made.decoded[f"{LAYER}.{module}"].T, **close)
    if parts == 1:
        embed = ranks[0]["embed"]
        assert torch.equal(embed.quant_method.embedding(embed, ids), made.decoded["model.embed_tokens"][ids])


def test_a_layer_that_is_not_quantized_is_left_to_vllm(vllm: Any, tmp_path: Path) -> None:
    made = Made(tmp_path, "int4_g32_fp16_v1", exclude=["*o_proj*"], roles={"embedding": "raw_v1"})
    config = made.quantization()
    layer = stand_in.RowParallelLinear(HIDDEN, HIDDEN, config, f"{LAYER}.self_attn.o_proj")
    assert type(layer.quant_method) is stand_in.UnquantizedLinearMethod
    table = stand_in.VocabParallelEmbedding(TOKENS, HIDDEN, config, "model.embed_tokens")
    assert type(table.quant_method) is stand_in.UnquantizedEmbeddingMethod
    unnamed = stand_in.VocabParallelEmbedding(TOKENS, HIDDEN, config, "")
    assert type(unnamed.quant_method) is stand_in.UnquantizedEmbeddingMethod
    assert config.get_quant_method(torch.nn.LayerNorm(3), "model.norm") is None


def test_a_table_is_found_by_its_own_name_and_by_its_shape(vllm: Any, tmp_path: Path) -> None:
    made = Made(tmp_path, "int4_g32_fp16_v1", all=True)
    config = made.quantization()
    for name in ("model.embed_tokens", ""):
        layer = stand_in.VocabParallelEmbedding(TOKENS, HIDDEN, config, name)
        assert layer.quant_method.codec == "int4_g32_fp16_v1"
    other = stand_in.VocabParallelEmbedding(TOKENS + 1, HIDDEN, config, "")
    assert type(other.quant_method) is stand_in.UnquantizedEmbeddingMethod
    config.tensors["draft.embed_tokens.weight"] = config.tensors["model.embed_tokens.weight"]
    with pytest.raises(tenpak.UnsupportedError, match=r"2 embeddings of shape \[100, 128\].*compressed-tensors"):
        stand_in.VocabParallelEmbedding(TOKENS, HIDDEN, config, "")


def test_what_cannot_be_served_is_refused_with_the_way_round(vllm: Any, tmp_path: Path) -> None:
    mixed = Made(tmp_path / "mixed", "int4_g32_fp16_v1", rules=[("*k_proj*", "int8_sym_v1")])
    with pytest.raises(tenpak.UnsupportedError, match="different codecs: .*k_proj int8_sym_v1"):
        stand_in.QKVParallelLinear(HIDDEN, [HIDDEN, KV, KV], mixed.quantization(), f"{LAYER}.self_attn.qkv_proj")
    coded = Made(tmp_path / "coded", "int4_g32_fp16_v1", coded=True)
    if any("coding" in entry for entry in coded.config["tensors"].values()):
        with pytest.raises(tenpak.UnsupportedError, match="coded planes"):
            coded.quantization()
    sparse = Made(tmp_path / "outliers", "int4_g32_fp16_v1", outliers=0.01)
    with pytest.raises(tenpak.UnsupportedError, match="outliers.*compressed-tensors"):
        sparse.quantization()
    wide = Made(tmp_path / "wide", "int4_g128_fp16_v1")
    vllm.setattr(stand_in, "size", 2)
    with pytest.raises(tenpak.UnsupportedError, match="o_proj.*128 columns in 2 parts of 64 are no whole"):
        stand_in.RowParallelLinear(HIDDEN, HIDDEN, wide.quantization(), f"{LAYER}.self_attn.o_proj")
    config = stand_in.get_quantization_config("tenpak")
    with pytest.raises(tenpak.UnsupportedError, match="format 2"):
        config.from_config({"format": 2})
    experts = config.from_config(
        {"tensors": {"model.layers.0.mlp.experts.0.up_proj.weight": {"codec": "int4_g32_fp16_v1"}}}
    )
    with pytest.raises(tenpak.UnsupportedError, match="mixture of experts"):
        stand_in.FusedMoE(experts, "model.layers.0.mlp.experts")


def test_configs_are_pickled_for_other_processes(vllm: Any, tmp_path: Path) -> None:
    made = Made(tmp_path, "int4_g32_fp16_v1")
    again = pickle.loads(pickle.dumps(made.quantization()))
    assert again.tensors == made.config["tensors"] and again.get_name() == "tenpak"
    assert repr(again) == f"TenpakConfig({len(again.tensors)} tensors)"


def test_the_entry_point_imports_nothing_heavy() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert '[project.entry-points."vllm.general_plugins"]\ntenpak = "tenpak.vllm:register"' in text
    code = "import sys, tenpak.vllm; assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
