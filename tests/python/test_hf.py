"""Models of Hugging Face on planes, against the same models with decoded weights."""

from __future__ import annotations

import copy
import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tenpak

torch = pytest.importorskip("torch", reason="PyTorch is not installed; pip install 'tenpak[torch]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed; pip install 'tenpak[hf]'")
pytest.importorskip("accelerate", reason="accelerate is not installed; pip install 'tenpak[hf]'")

import safetensors.torch  # noqa: E402
import tenpak.torch as tt  # noqa: E402
from families import CONFIGS  # noqa: E402
from tenpak.huggingface import TenpakConfig, TenpakQuantizer  # noqa: E402
from tenpak.huggingface import _load as loading  # noqa: E402
from torch import nn  # noqa: E402

#: Ends of the messages that transformers gives when it does not find what it looks for.
COMPLAINTS = ("MISSING", "UNEXPECTED", "MISMATCH", "newly initialized", "not used")


@pytest.fixture(autouse=True)
def _settle() -> None:
    torch.manual_seed(3)
    torch.set_num_threads(2)


class Made:
    """A model, its artifact, its directory of planes, and a directory of its decoded weights."""

    def __init__(self, folder: Path, kind: str, **options: Any) -> None:
        torch.manual_seed(11)
        config = CONFIGS[kind]()
        dense = transformers.AutoModelForCausalLM.from_config(config)
        for param in dense.parameters():
            if param.dim() > 1:
                param.data.normal_(std=0.15)
        self.source, self.file = folder / "source", folder / "model.tenpak"
        self.planes, self.decoded = folder / "planes", folder / "decoded"
        dense.save_pretrained(self.source)
        tenpak.compress(self.source, self.file, **options)
        tenpak.export(self.file, self.planes)
        tenpak.decompress(self.file, self.decoded, dtype="float32")
        for name in ("config.json", "generation_config.json"):
            if not (self.decoded / name).exists():
                shutil.copy(self.source / name, self.decoded)

    def reference(self, **options: Any) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(self.decoded, **options)

    def load(self, **options: Any) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(self.planes, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    kept: dict[str, Made] = {}

    def make(kind: str) -> Made:
        if kind not in kept:
            kept[kind] = Made(tmp_path_factory.mktemp("made"), kind, codec="int4_g32_fp16_v1")
        return kept[kind]

    return make


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    transformers.utils.logging.enable_propagation()
    yield lambda: caplog.text
    transformers.utils.logging.disable_propagation()


IDS = torch.tensor([[5, 17, 2, 90, 33, 8, 41], [1, 95, 60, 7, 7, 12, 3]])


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def assert_same_logits(model: Any, want: torch.Tensor) -> None:
    """Each product is within 2k·eps of the dense one, which some dozens of layers add up."""
    torch.testing.assert_close(logits(model).float(), want.float(), rtol=1e-4, atol=1e-4 * want.abs().max().item())


def quantized(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "planes")]


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_directory_of_planes_loads_and_gives_the_logits_of_the_decoded_weights(
    kind: str, made: Any, said: Callable[[], str]
) -> None:
    model = made(kind).load()
    assert not any(complaint in said() for complaint in COMPLAINTS), said()
    assert model.is_quantized and isinstance(model.hf_quantizer, TenpakQuantizer)
    assert not model.training and not any(buffer.is_meta for buffer in model.buffers())
    assert_same_logits(model, logits(made(kind).reference()))
    dense = [
        name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D", "Embedding")
    ]
    # What is too small for a codec stays as it is.
    assert all(name.endswith("shared_expert_gate") for name in dense), dense
    assert len(quantized(model)) >= 10 and type(model).__name__ == type(made(kind).reference()).__name__


@pytest.mark.parametrize("kind", CONFIGS)
def test_saving_and_loading_again_changes_nothing(
    kind: str, made: Any, tmp_path: Path, said: Callable[[], str]
) -> None:
    model = made(kind).load()
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"]
    assert config == json.loads((made(kind).planes / "config.json").read_text())["quantization_config"]
    ours = safetensors.torch.load_file(tmp_path / "saved/model.safetensors")
    theirs = safetensors.torch.load_file(made(kind).planes / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[n].dtype == t.dtype and torch.equal(ours[n], t) for n, t in theirs.items())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not any(complaint in said() for complaint in COMPLAINTS), said()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind", ["llama tied", "gpt2", "mixtral", "qwen3 moe"])
def test_a_model_quantized_in_memory_is_saved_and_loaded_like_a_compressed_one(
    kind: str, made: Any, tmp_path: Path, said: Callable[[], str]
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(made(kind).source)
    report = tt.quantize_model(model)
    assert all(
        m["codec"] != "raw_v1" for m in report["modules"] if m["reason"] != "role router" and m["weights"] > 4096
    )
    assert_same_logits(model, logits(made(kind).load()))
    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not any(complaint in said() for complaint in COMPLAINTS), said()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "qwen3 moe"])
def test_coded_planes_are_decoded_when_a_model_is_loaded(kind: str, tmp_path: Path, said: Callable[[], str]) -> None:
    made = Made(tmp_path, kind, target_bits=6.5)
    tensors = json.loads((made.planes / "config.json").read_text())["quantization_config"]["tensors"]
    assert sum("codes" in entry.get("coding", {}) for entry in tensors.values()) >= 8
    model = made.load()
    assert not any(complaint in said() for complaint in COMPLAINTS), said()
    assert_same_logits(model, logits(made.reference()))
    assert torch.equal(logits(tenpak.from_pretrained(made.file)), logits(model))
    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not any(complaint in said() for complaint in COMPLAINTS), said()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind", ["llama", "llama tied", "gpt2", "mixtral"])
def test_a_single_file_loads_as_views_of_itself_where_it_is_mapped(kind: str, made: Any) -> None:
    read = tenpak.from_pretrained(made(kind).file)
    assert torch.equal(logits(read), logits(made(kind).load()))
    model = tenpak.from_pretrained(made(kind).file, mmap=True)
    assert torch.equal(logits(model), logits(made(kind).load())) and model.generation_config.eos_token_id == 1
    layers = [m for m in quantized(model) if isinstance(m, tt.QuantizedLinear)]
    maps = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if "tenpak" in line]
    inside = [any(int(a, 16) <= m.codes.data_ptr() < int(b, 16) for a, b in maps) for m in layers]
    assert all(inside), "planes were copied"
    other = copy.deepcopy(model.state_dict())
    model.load_state_dict(other)
    assert torch.equal(logits(model), logits(made(kind).load()))


def test_an_artifact_without_a_config_is_refused(made: Any, tmp_path: Path) -> None:
    tenpak.compress(made("llama").source / "model.safetensors", tmp_path / "a.tenpak", codec="int4_g32_fp16_v1")
    with pytest.raises(tenpak.InvalidError, match="carries no config.json"):
        tenpak.from_pretrained(tmp_path / "a.tenpak")


def test_fused_experts_are_stored_and_loaded_as_they_are(made: Any, tmp_path: Path) -> None:
    dense = transformers.AutoModelForCausalLM.from_pretrained(made("mixtral").source)
    dense.save_pretrained(tmp_path / "fused", save_original_format=False)
    tenpak.compress(tmp_path / "fused", tmp_path / "planes", codec="int4_g32_fp16_v1")
    assert "model.layers.0.mlp.experts.gate_up_proj" in tenpak.open(tmp_path / "planes")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "planes")
    assert torch.equal(logits(model), logits(made("mixtral").load()))
    model.save_pretrained(tmp_path / "saved")
    again = tenpak.open(tmp_path / "saved")
    assert {n: (e.codec, e.shape) for n, e in again.items()} == {
        n: (e.codec, e.shape) for n, e in tenpak.open(tmp_path / "planes").items()
    }
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_saved_is_an_artifact(kind: str, made: Any, tmp_path: Path) -> None:
    made(kind).load().save_pretrained(tmp_path / "saved")
    saved, source = tenpak.open(tmp_path / "saved"), tenpak.open(made(kind).file)
    assert set(saved) == set(source) and not saved.verify()
    assert all(np.array_equal(saved.decode(name), source.decode(name)) for name in source)


def test_a_model_compiles_into_one_graph(made: Any) -> None:
    torch._dynamo.reset()
    model = made("mixtral").load()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model))


def test_from_pretrained_takes_a_directory_too(made: Any) -> None:
    model = tenpak.from_pretrained(made("qwen2").planes)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert torch.equal(logits(model), logits(made("qwen2").load()))


def test_a_base_model_loads_from_a_checkpoint_with_a_head_and_the_other_way_round(made: Any, tmp_path: Path) -> None:
    base = transformers.AutoModel.from_pretrained(made("gpt2").planes)
    with torch.no_grad():
        want = transformers.AutoModel.from_pretrained(made("gpt2").decoded)(IDS).last_hidden_state
        torch.testing.assert_close(base(IDS).last_hidden_state, want, rtol=1e-4, atol=1e-4)
    base.save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert_same_logits(model, logits(made("gpt2").reference()))


@pytest.mark.parametrize("kind", ["llama tied", "mixtral"])
def test_dtype_sets_activations_and_leaves_planes(kind: str, made: Any) -> None:
    plain = made(kind).load()
    for dtype in (torch.bfloat16, torch.float16):
        model = made(kind).load(dtype=dtype)
        assert model.dtype == dtype and logits(model).dtype == dtype
        for ours, theirs in zip(quantized(model), quantized(plain), strict=True):
            assert ours.dtype == dtype
            assert all(torch.equal(plane, theirs.planes[name]) for name, plane in ours.planes.items())
        want = logits(made(kind).reference(dtype=dtype)).double()
        got, exact = logits(model).double(), logits(plain).double()
        assert (got - exact).norm() <= 2 * (want - exact).norm() + 1e-3 * exact.norm()


@pytest.mark.parametrize("kind", ["llama tied", "mixtral"])
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps_place_planes(kind: str, device_map: Any, made: Any) -> None:
    if device_map == "auto" and torch.cuda.is_available():
        device_map = {"": "cpu"}
    model = made(kind).load(device_map=device_map)
    assert torch.equal(logits(model), logits(made(kind).load()))


def test_planes_are_offloaded_to_disk(made: Any, tmp_path: Path) -> None:
    layout = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    layout |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = made("llama").load(device_map=layout, offload_folder=tmp_path, offload_buffers=True)
    assert model.model.layers[1].mlp.up_proj.codes.is_meta
    assert torch.equal(logits(model), logits(made("llama").load()))


def test_tied_embeddings_are_held_once(made: Any) -> None:
    model = made("llama tied").load()
    embed, head = model.model.embed_tokens, model.lm_head
    assert all(head.planes[name] is plane for name, plane in embed.planes.items())
    model.tie_weights()
    assert not any(name.startswith("lm_head") for name in model.state_dict())
    twin = copy.deepcopy(model)
    assert twin.lm_head.codes is twin.model.embed_tokens.codes
    assert model.get_input_embeddings() is embed and model.get_output_embeddings() is head


def test_no_dense_weight_is_held(made: Any) -> None:
    model = made("mixtral").load()
    size = sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    stored = sum(entry.stored_bytes for entry in tenpak.open(made("mixtral").file).values())
    extra = sum(b.nbytes for n, b in model.named_buffers() if "inv_freq" in n)
    assert size == stored + extra
    logits(model)
    gc.collect()
    large = {tuple(o.shape) for o in gc.get_objects() if type(o) is torch.Tensor and o.is_floating_point()}
    assert not large & {(96, 64), (64, 96), (4, 192, 64), (4, 64, 96)}


@pytest.mark.parametrize("kind", ["llama tied", "gpt2", "mixtral"])
def test_generation_chooses_the_tokens_of_the_decoded_model(kind: str, made: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    mine = made(kind).load().generate(IDS, **options)
    assert torch.equal(mine, made(kind).reference().generate(IDS, **options))


@pytest.mark.parametrize("kind", ["llama tied", "mixtral"])
def test_an_adapter_trains_on_a_loaded_model(kind: str, made: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = made(kind).load()
    assert model.hf_quantizer.is_trainable and model.hf_quantizer.is_serializable()
    before = [{name: plane.clone() for name, plane in m.planes.items()} for m in quantized(model)]
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(6):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    after = [m.planes for m in quantized(adapted)]
    assert all(torch.equal(a[n], b[n]) for a, b in zip(after, before, strict=True) for n in b)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(made(kind).load(), tmp_path)
    torch.testing.assert_close(logits(again), logits(adapted))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3 moe"])
def test_gradients_pass_through_experts(kind: str, made: Any) -> None:
    ours, theirs = made(kind).load(), made(kind).reference(experts_implementation="eager")
    grads = []
    for model in (ours, theirs):
        x = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=x).logits.square().mean().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4 * grads[1].abs().max().item())


def test_dequantize_gives_dense_modules_back(made: Any) -> None:
    for kind in ("llama tied", "gpt2"):
        model = made(kind).load()
        want = logits(model)
        model.dequantize(torch.float32)
        assert not quantized(model) and not model.is_quantized
        assert_same_logits(model, want)
    with pytest.raises(tenpak.UnsupportedError, match="experts"):
        made("mixtral").load().dequantize()


# What is wrong is said


def broken(made: Any, kind: str, folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """Copy a directory of planes and change its config's tensors, and its stored tensors."""
    shutil.copytree(made(kind).planes, folder / "broken")
    config = json.loads((folder / "broken/config.json").read_text())
    tensors = safetensors.torch.load_file(folder / "broken/model.safetensors")
    change(config["quantization_config"], tensors)
    safetensors.torch.save_file(tensors, folder / "broken/model.safetensors", {"format": "pt"})
    (folder / "broken/config.json").write_text(json.dumps(config))
    return folder / "broken"


DOWN = "model.layers.0.mlp.down_proj"


def test_missing_planes_are_an_error(made: Any, tmp_path: Path) -> None:
    path = broken(made, "llama", tmp_path, lambda config, tensors: tensors.pop(f"{DOWN}.scales"))
    with pytest.raises(tenpak.CorruptError, match=f"1 planes are missing .* '{DOWN}.scales'"):
        transformers.AutoModelForCausalLM.from_pretrained(path)


def test_an_unknown_codec_is_an_error(made: Any, tmp_path: Path) -> None:
    def change(config: Any, tensors: Any) -> None:
        config["tensors"][f"{DOWN}.weight"]["codec"] = "int3_v9"

    with pytest.raises(tenpak.UnsupportedError, match="unknown codec 'int3_v9'.*upgrade"):
        transformers.AutoModelForCausalLM.from_pretrained(broken(made, "llama", tmp_path, change))


def test_a_newer_format_is_an_error(made: Any, tmp_path: Path) -> None:
    path = broken(made, "llama", tmp_path, lambda config, _: config.update(format=2))
    with pytest.raises(tenpak.UnsupportedError, match="format 2 .* upgrade"):
        transformers.AutoModelForCausalLM.from_pretrained(path)


def test_a_shape_that_is_not_the_model_s_is_an_error(made: Any, tmp_path: Path) -> None:
    def change(config: Any, tensors: Any) -> None:
        config["tensors"][f"{DOWN}.weight"]["shape"] = [64, 95]

    with pytest.raises(tenpak.CorruptError, match=r"\[64, 95\] and the model wants \[64, 96\]"):
        transformers.AutoModelForCausalLM.from_pretrained(broken(made, "llama", tmp_path, change))


def test_experts_of_different_codecs_are_an_error(made: Any, tmp_path: Path) -> None:
    def change(config: Any, tensors: Any) -> None:
        name = next(name for name in config["tensors"] if "experts.1" in name)
        config["tensors"][name]["codec"] = "nf4_g64_fp16_v1"

    with pytest.raises(tenpak.UnsupportedError, match="one stack and have the codecs int4_g32_fp16_v1, nf4_g64"):
        transformers.AutoModelForCausalLM.from_pretrained(broken(made, "mixtral", tmp_path, change))


def test_a_module_without_a_quantized_form_is_an_error(made: Any, tmp_path: Path) -> None:
    def change(config: Any, tensors: Any) -> None:
        config["tensors"]["model.norm.weight"] = {"codec": "int8_sym_v1", "dtype": "F32", "shape": [64]}

    with pytest.raises(tenpak.UnsupportedError, match="LlamaRMSNorm, which has no quantized form"):
        transformers.AutoModelForCausalLM.from_pretrained(broken(made, "llama", tmp_path, change))


def test_a_dense_checkpoint_is_not_quantized_while_it_loads(made: Any) -> None:
    with pytest.raises(tenpak.InvalidError, match="not compressed.*quantize_model"):
        made("llama").reference(quantization_config=TenpakConfig())


# Registration


ORDERS = {
    "tenpak first": "import tenpak, transformers",
    "transformers first": "import transformers, tenpak",
    "its table first, and tenpak twice": (
        "import transformers.quantizers.auto, tenpak, importlib; importlib.reload(tenpak)"
    ),
}


@pytest.mark.parametrize("order", ORDERS)
def test_transformers_knows_the_quantizer_whichever_is_imported_first(order: str) -> None:
    code = f"{ORDERS[order]}\nfrom transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table\n"
    code += "import inspect, transformers.quantizers.auto as auto\n"
    code += "assert 'AUTO_QUANTIZER_MAPPING' in inspect.getsource(auto) and auto.__loader__.name == auto.__name__\n"
    code += "print(table['tenpak'].__name__)\n"
    code += "from tenpak.huggingface._quantizer import register\nregister(); register()"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["TenpakQuantizer"] and not done.stderr


def test_importing_tenpak_imports_nothing_heavy_and_leaves_one_finder() -> None:
    code = "import sys, tenpak, importlib; importlib.reload(tenpak)\n"
    code += "assert not {'torch', 'transformers', 'tenpak.huggingface', 'tenpak.torch'} & set(sys.modules)\n"
    code += "print(sum('_Finder' == type(f).__name__ for f in sys.meta_path))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "1"


def test_without_transformers_or_with_an_old_one_the_error_says_what_to_do() -> None:
    def printed(before: str) -> str:
        code = f"import sys, types, tenpak\n{before}\n"
        code += "try:\n tenpak.from_pretrained('x')\nexcept ImportError as e: print(e)"
        return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout

    assert "pip install 'tenpak[torch,hf]'" in printed("sys.modules['transformers'] = None")
    old = "old = sys.modules['transformers'] = types.ModuleType('transformers'); old.__version__ = '4.57.1'"
    assert "transformers 4.57.1 is too old, expected 5 or later" in printed(old)


def test_the_sample_model_is_as_good_from_planes(sample_model: Path, tmp_path: Path) -> None:
    tenpak.compress(sample_model, tmp_path / "a.tenpak", codec="int8_sym_g32_fp16_v1")
    tenpak.compress(sample_model, tmp_path / "planes", codec="int8_sym_g32_fp16_v1")
    model = tenpak.from_pretrained(tmp_path / "planes", dtype=torch.float32)
    dense = transformers.AutoModelForCausalLM.from_pretrained(sample_model, dtype=torch.float32)
    ids = torch.arange(40)[None] * 7
    torch.testing.assert_close(logits(model, ids), logits(dense, ids), rtol=0.05, atol=0.25)
    assert (
        sum(p.nbytes for m in quantized(model) for p in m.planes.values())
        < os.path.getsize(tmp_path / "a.tenpak") * 1.3
    )
    assert loading.entries(tenpak.open(tmp_path / "a.tenpak")).keys() == model.config.quantization_config.tensors.keys()
