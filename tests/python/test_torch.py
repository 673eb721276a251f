"""The PyTorch layers, against dense layers on the decoded weights."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tenpak

torch = pytest.importorskip("torch", reason="PyTorch is not installed; pip install 'tenpak[torch]'")

import tenpak.torch as tt  # noqa: E402
from tenpak.torch import _ops  # noqa: E402
from tenpak.torch._weight import DecodedWeight  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

CODECS = [c["id"] for c in tenpak.codecs() if c["bits"]]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CODEC = "int4_g32_fp16_v1"


@pytest.fixture(autouse=True)
def _settle() -> None:
    torch.manual_seed(7)
    torch.set_num_threads(2)


def linear(codec: str = CODEC, cols: int = 96, rows: int = 40, **options: Any) -> tt.QuantizedLinear:
    return tt.QuantizedLinear.from_linear(nn.Linear(cols, rows), codec, **options)


def bound(layer: tt.QuantizedLinear, x: torch.Tensor, act: str) -> torch.Tensor:
    """How far a product may be from the exact one: the theorem of `Act`, with |scale · level| + |offset| per weight."""
    weight, offset = layer.decode(torch.float64), torch.zeros(1, dtype=torch.float64)
    if "offsets" in layer.plane_names:
        group = next(c["group"] for c in tenpak.codecs() if c["id"] == layer.codec)
        offset = layer.offsets.double().repeat_interleave(group, 1)[:, : layer.cols]
    size = (weight - offset).abs() + offset.abs()
    a = x.double().abs()
    out = 2 * layer.cols * torch.finfo(torch.float32).eps * (a @ size.T)
    if act == "bfloat16":
        out = out + 2.0**-8 * (a @ size.T)
    if act == "int8":
        step = torch.cat([part.amax(-1, keepdim=True).expand_as(part) for part in a.split(32, -1)], -1) / 127
        out = out + step @ weight.abs().T / 2
    y = x.double() @ weight.T
    rounding = 2.0**-24 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps / 2
    return out + (y.abs() + out) * rounding + torch.finfo(x.dtype).tiny


def check(layer: tt.QuantizedLinear, x: torch.Tensor, act: str | None = None) -> None:
    y = layer(x)
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], layer.out_features)
    want = x.double() @ layer.decode(torch.float64).T
    limit = bound(layer, x, act or _ops.default_act(x))
    assert torch.all((y.double() - want).abs() <= limit), f"{layer.codec} {x.dtype} {tuple(x.shape)}"


# Products


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_multiplies_with_its_decoded_weights(codec: str, dtype: torch.dtype) -> None:
    for cols, rows in ((128, 24), (75, 9), (8, 1)):
        layer = linear(codec, cols, rows, act=None)
        layer.bias = None
        for shape in ((cols,), (1, cols), (2, 3, cols), (0, cols), (2, 0, 3, cols)):
            check(layer, torch.randn(shape).to(dtype))


@pytest.mark.parametrize("act", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_arithmetic_can_be_chosen(act: str, dtype: torch.dtype) -> None:
    layer = linear(act=act)
    layer.bias = None
    check(layer, torch.randn(5, 96).to(dtype), act)
    exact = linear(act="float32")
    assert f"act={act}" in repr(layer) and "act" not in repr(linear())
    x = torch.randn(4, 96)
    assert torch.equal(layer(x), _ops.linear(x, *layer.matrix, act))
    with pytest.raises(tenpak.InvalidError, match="float8.*float32, bfloat16, int8"):
        linear(act="float8")
    assert exact.act == "float32"


@pytest.mark.skipif(sys.platform != "linux", reason="shares OpenMP on Linux only")
def test_products_run_on_the_threads_of_pytorch(tmp_path: Path) -> None:
    from tenpak.torch._threads import share_threads

    assert share_threads()
    path = tmp_path / "layer.pickle"
    path.write_bytes(pickle.dumps(tt.QuantizedLinear.from_linear(nn.Linear(1024, 1024), "int4_g32_fp16_v1")))
    # In a process that has encoded nothing: a large product starts no threads besides PyTorch's.
    code = """
import os, pickle, sys, torch
torch.set_num_threads(2)
layer = pickle.load(open(sys.argv[1], "rb"))
torch.ones(1 << 20).sum()
threads = lambda: len(os.listdir("/proc/self/task"))
before = threads()
with torch.inference_mode():
    layer(torch.ones(1, 1024))
assert threads() == before, (before, threads())
pid = os.fork()  # the child has no team: it must not wait for one
if pid == 0:
    with torch.inference_mode():
        layer(torch.ones(1, 1024))
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, path], check=True, timeout=120)


def test_activations_need_not_be_contiguous() -> None:
    layer = linear()
    x = torch.randn(96, 7, 3)
    assert torch.equal(layer(x.permute(2, 1, 0)), layer(x.permute(2, 1, 0).contiguous()))
    wide = torch.randn(4, 200)
    assert torch.equal(layer(wide[:, 50:146]), layer(wide[:, 50:146].clone()))
    assert torch.equal(layer(wide[:1, :96].expand(6, 96)), layer(wide[:1, :96].repeat(6, 1)))


def test_the_bias_is_added_in_the_dtype_of_the_activations() -> None:
    layer = linear()
    x = torch.randn(3, 96)
    plain = copy.deepcopy(layer)
    plain.bias = None
    for dtype in DTYPES:
        y = layer(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y, plain(x.to(dtype)) + layer.bias.to(dtype), rtol=0.01, atol=0.02)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain(x) + layer.bias)


def test_a_product_of_a_stack_is_that_of_each_matrix() -> None:
    weight = torch.randn(4, 10, 64)
    for codec in CODECS:
        stack = tt.QuantizedStack.from_weight(weight, codec)
        dense = stack.weight.float()
        x, ends = torch.randn(9, 64), torch.tensor([2, 2, 7, 9])
        first, y = 0, stack(x, ends)
        for e, end in enumerate(ends.tolist()):
            torch.testing.assert_close(y[first:end], x[first:end] @ dense[e].T, rtol=1e-4, atol=1e-4)
            first = end
    assert stack(torch.empty(0, 64), torch.zeros(4, dtype=torch.int32)).shape == (0, 10)
    for ends in (torch.tensor([2, 2, 7]), torch.tensor([2, 2, 7, 8]), torch.tensor([3, 2, 7, 9])):
        with pytest.raises(tenpak.InvalidError, match="ascending"):
            stack(torch.randn(9, 64), ends)


@pytest.mark.parametrize("codec", CODECS)
def test_an_embedding_decodes_the_rows_it_looks_up(codec: str) -> None:
    dense = nn.Embedding(50, 64, padding_idx=-1)
    layer = tt.QuantizedEmbedding.from_embedding(dense, codec)
    ids = torch.tensor([[0, 49, 7], [7, 7, 1]])
    assert layer.padding_idx == 49
    for dtype in (*DTYPES, torch.float64):
        layer = layer.to(dtype)
        rows = layer(ids)
        assert rows.dtype == dtype and torch.equal(rows, layer.decode(dtype)[ids])
        assert torch.equal(rows, layer(ids.int())) and layer(ids[:0]).shape == (0, 3, 64)
    assert torch.equal(layer(ids.T), layer(ids).transpose(0, 1))
    for wrong in (50, -1):
        with pytest.raises(tenpak.InvalidError, match="row"):
            layer(torch.tensor([wrong]))
    with pytest.raises(tenpak.InvalidError, match="int64 or torch.int32"):
        layer(torch.tensor([1.0]))


class Scaled(nn.Embedding):
    """An embedding that does something to what it looks up."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input + 1) * self.factor


class Direct(nn.Embedding):
    """An embedding that reads its weight."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.weight[input]


def test_an_embedding_of_a_derived_class_keeps_its_forward() -> None:
    dense = Scaled(50, 64)
    dense.register_buffer("factor", torch.tensor(3.0), persistent=False)
    layer = tt.QuantizedEmbedding.from_embedding(dense)
    ids = torch.tensor([0, 4])
    assert isinstance(layer, Scaled) and isinstance(layer, tt.QuantizedEmbedding)
    assert torch.equal(layer(ids), layer.decode()[ids + 1] * 3) and "weight" not in dict(layer.named_parameters())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is type(layer) and torch.equal(other(ids), layer(ids))
        assert other.codes.data_ptr() != layer.codes.data_ptr()
    assert set(layer.state_dict()) == {"codes", "scales", "_extra_state"}
    with pytest.raises(tenpak.InvalidError, match="Direct looks rows up by itself"):
        tt.QuantizedEmbedding.from_embedding(Direct(50, 64))


def test_what_cannot_be_multiplied_is_refused() -> None:
    layer = linear()
    with pytest.raises(tenpak.InvalidError, match=r"\(3, 95\).*40 x 96, expected \[\.\.\., 96\]"):
        layer(torch.randn(3, 95))
    with pytest.raises(tenpak.InvalidError, match="float64, expected torch.float32"):
        layer(torch.randn(3, 96, dtype=torch.float64))
    with pytest.raises(tenpak.InvalidError, match="expected"):
        layer(torch.tensor(1.0))
    with pytest.raises(tenpak.InvalidError, match="meta"):
        _ops._linear(torch.randn(1, 96), *copy.deepcopy(layer).to("meta").matrix, "float32")
    codes, *rest = layer.matrix
    with pytest.raises(tenpak.InvalidError, match="contiguous"):
        _ops.linear(torch.randn(1, 96), codes.T.contiguous().T, *rest, "float32")
    with pytest.raises(tenpak.InvalidError, match="plane codes.*bytes, expected"):
        _ops.linear(torch.randn(1, 96), codes[1:], *rest, "float32")
    with pytest.raises(tenpak.UnsupportedError, match="unknown codec 'int5'"):
        linear("int5")


def test_tensors_on_a_gpu_are_refused_with_the_remedy() -> None:
    class Elsewhere:
        """As much of a tensor on a GPU as the check looks at."""

        is_cpu, device = False, torch.device("cuda:0")

    there: Any = Elsewhere()
    with pytest.raises(tenpak.UnsupportedError, match=r'on cuda:0; move .* \.to\("cpu"\)'):
        _ops._linear(there, there, there, there, there, [there], CODEC, 40, 96, "float32")
    with pytest.raises(tenpak.InvalidError, match="one device; move both"):
        _ops._linear(torch.randn(1, 96), there, there, None, None, [], CODEC, 40, 96, "float32")


# Gradients and compilers


def test_gradients_are_those_of_the_dense_layer() -> None:
    layer = linear()
    layer.bias.requires_grad_(True)
    dense = nn.Linear(96, 40)
    dense.weight.data, dense.bias.data = layer.decode(), layer.bias.detach().clone()
    x = torch.randn(2, 5, 96, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    (layer(x).tanh() ** 2).sum().backward()
    (dense(z).tanh() ** 2).sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=1e-4, atol=1e-4)
    assert all(not plane.requires_grad for plane in layer.requires_grad_(True).planes.values())


def test_gradients_pass_a_numerical_check() -> None:
    layer = linear(cols=32, rows=4)

    def product(x: torch.Tensor) -> torch.Tensor:
        return _ops.linear(x, *layer.matrix, "float32")

    # The product is linear in x, so a step as large as x itself is exact up to rounding.
    x = torch.randn(2, 32, requires_grad=True)
    warnings.filterwarnings("ignore", "Input #")  # not double precision: no need, see above
    options: dict[str, Any] = {"eps": 1.0, "atol": 1e-3, "rtol": 1e-3, "fast_mode": False}
    assert torch.autograd.gradcheck(product, (x,), **options)
    assert torch.autograd.gradgradcheck(product, (x,), **options)
    stack = tt.QuantizedStack.from_weight(torch.randn(3, 4, 32), CODEC)
    ends = torch.tensor([1, 1, 2])
    assert torch.autograd.gradcheck(lambda x: stack(x, ends), (x,), **options)
    assert torch.autograd.gradgradcheck(lambda x: stack(x, ends), (x,), **options)


OPERATORS = ["linear", "grouped_linear", "grouped_linear_backward", "dequantize", "embedding"]


@pytest.mark.parametrize("codec", [CODEC, "int8_sym_v1", "int4_zp_g64_fp16_v1", "nf4_g64_fp16_v1"])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_keep_the_rules_of_the_dispatcher(codec: str, name: str) -> None:
    matrix = linear(codec, 64, 12).matrix
    x, ends = torch.randn(6, 64, requires_grad=True), torch.tensor([1, 1, 6])
    samples = {
        "linear": (x, *matrix, "float32"),
        "grouped_linear": (x, ends, *matrix, "bfloat16"),
        "grouped_linear_backward": (torch.randn(6, 4, requires_grad=True), ends, *matrix),
        "dequantize": (*matrix, torch.float16),
        "embedding": (torch.tensor([[1, 2]]), *matrix, torch.bfloat16),
    }
    results = torch.library.opcheck(getattr(torch.ops.tenpak, name).default, samples[name])
    assert len(results) >= 4 and set(results.values()) == {"SUCCESS"}


class Block(nn.Module):
    """Everything at once."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = tt.QuantizedEmbedding.from_embedding(nn.Embedding(30, 64))
        self.up = linear(cols=64, rows=96)
        self.down = linear("int4_sym_g32_fp16_v1", 96, 64)
        self.stack = tt.QuantizedStack.from_weight(torch.randn(2, 64, 64), CODEC)
        self.head = self.embed.tied_linear()

    def forward(self, ids: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = self.down(F.silu(self.up(x)))
        return self.head(self.stack(x, ends))


def test_a_model_compiles_into_one_graph_of_dynamic_shape() -> None:
    torch._dynamo.reset()
    model = Block()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for n in (3, 8):
            ids, ends = torch.randint(30, (n,)), torch.tensor([1, n])
            torch.testing.assert_close(compiled(ids, ends), model(ids, ends))


def test_a_layer_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    layer = linear()
    with torch.no_grad():
        x = torch.randn(3, 96)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_a_compiled_layer_has_the_same_gradients() -> None:
    torch._dynamo.reset()
    layer = linear()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (2, 5):
        x = torch.randn(n, 96, requires_grad=True)
        z = x.detach().clone().requires_grad_()
        compiled(x).square().sum().backward()
        layer(z).square().sum().backward()
        torch.testing.assert_close(x.grad, z.grad)


def test_transforms_and_modes_see_the_operator() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    layer = linear()
    graph = make_fx(layer)(torch.randn(2, 96))
    assert any(node.target is _ops.linear for node in graph.graph.nodes)
    exported = torch.export.export(layer, (torch.randn(2, 96),))
    x = torch.randn(2, 96)
    assert torch.equal(exported.module()(x), layer(x))
    torch.testing.assert_close(torch.func.jvp(lambda x: x @ layer.weight.T, (x,), (x,))[1], x @ layer.decode().T)


# What happens to planes


def planes(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: plane.clone() for name, plane in layer.planes.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("codec", CODECS)
def test_conversions_touch_the_bias_and_never_the_planes(codec: str) -> None:
    layer = linear(codec)
    before = planes(layer)
    held = {name: plane.data_ptr() for name, plane in layer.planes.items()}
    for convert in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16)):
        convert(layer)
        assert layer.bias.dtype == layer.weight.dtype == layer.dtype
    assert layer.dtype == torch.float16 and layer.type(torch.float32).bias.dtype == torch.float32
    assert same(before, layer.planes)
    assert held == {name: plane.data_ptr() for name, plane in layer.planes.items()}, "converting copied planes"


def test_meta_and_back() -> None:
    layer = linear()
    x, before = torch.randn(2, 96), planes(layer)
    want, state = layer(x), copy.deepcopy(layer.state_dict())
    layer.to("meta")
    assert layer.codes.is_meta and layer.weight.is_meta and layer.weight.device.type == "meta"
    assert layer(x.to("meta")).shape == (2, 40)
    layer.to_empty(device="cpu").load_state_dict(state)
    assert same(before, layer.planes) and torch.equal(layer(x), want)
    other = tt.QuantizedLinear(96, 40, codec=CODEC, device="meta")
    other.load_state_dict(state, assign=True)
    assert torch.equal(other(x), want)


def test_copies_and_pickles_are_the_same_layer() -> None:
    for layer in (linear(act="int8"), tt.QuantizedLinearInt4.from_linear(nn.Linear(128, 8)), linear().half()):
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(other) is type(layer) and repr(other) == repr(layer) and other.dtype == layer.dtype
            assert same(planes(layer), other.planes) and other.codes.data_ptr() != layer.codes.data_ptr()
            x = torch.randn(2, layer.in_features)
            assert torch.equal(layer(x), other(x))
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        assert same(planes(layer), torch.load(file, weights_only=False).planes)


@pytest.mark.parametrize("codec", CODECS)
def test_a_state_dict_goes_to_a_layer_of_the_same_codec_only(codec: str, tmp_path: Path) -> None:
    import safetensors.torch

    layer = linear(codec)
    assert set(layer.plane_names) | {"bias"} == set(layer.state_dict()) - {"_extra_state"}
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    safetensors.torch.save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    for state in (torch.load(file), safetensors.torch.load_file(tmp_path / "layer.safetensors")):
        other = tt.QuantizedLinear(96, 40, codec=codec)
        other.load_state_dict(state)
        assert same(planes(layer), other.planes)
        for wrong in CODECS:
            if wrong != codec:
                with pytest.raises(RuntimeError, match=f"{wrong}.*{codec}|{codec}.*{wrong}"):
                    tt.QuantizedLinear(96, 40, codec=wrong).load_state_dict(state)
        with pytest.raises(RuntimeError, match="40 x 95 .* 40 x 96"):
            tt.QuantizedLinear(95, 40, codec=codec).load_state_dict(state)
    bare = {name: plane for name, plane in layer.state_dict().items() if name != "_extra_state"}
    other.load_state_dict(bare)
    with pytest.raises(RuntimeError, match='Missing key.*"scales"'):
        other.load_state_dict({"codes": layer.codes, "bias": layer.bias})
    with pytest.raises(RuntimeError, match="plane scales has dtype torch.float64"):
        other.load_state_dict({**bare, "scales": layer.scales.double()})
    with pytest.raises(RuntimeError, match="dense weights 'weight'"):
        other.load_state_dict(nn.Linear(96, 40).state_dict())


def test_tied_layers_stay_tied() -> None:
    embed = tt.QuantizedEmbedding.from_embedding(nn.Embedding(20, 64))
    model = nn.ModuleDict({"embed": embed, "head": embed.tied_linear()})

    def tied() -> bool:
        return all(model["head"].planes[n] is plane for n, plane in model["embed"].planes.items())

    assert tied() and sum(b.nbytes for b in model.buffers()) == 20 * 64 + 4 * 20
    x = torch.randn(3, 64)
    torch.testing.assert_close(model["head"](x), x @ embed.decode().T)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert tied() and copy.deepcopy(model)["head"].codes.shape == (20, 64)
    for step in (lambda m: m.half(), lambda m: m.to("meta"), lambda m: m.to_empty(device="cpu")):
        step(model)
        assert tied()
    model.load_state_dict(state)
    assert tied() and torch.equal(model["embed"].codes, state["embed.codes"])
    twin = copy.deepcopy(model)
    assert all(twin["head"].planes[n] is plane for n, plane in twin["embed"].planes.items())
    with pytest.raises(tenpak.InvalidError, match="lend"):
        linear().share_planes(embed)


def test_planes_that_changed_are_not_mistaken_for_those_that_moved() -> None:
    embed = tt.QuantizedEmbedding.from_embedding(nn.Embedding(20, 64))
    head = embed.tied_linear()
    embed.to("meta")
    head.codes.zero_()
    head.to("meta")
    assert head.codes is not embed.codes


def test_several_threads_use_a_layer_at_once() -> None:
    layer = linear(cols=256, rows=256)
    inputs = [torch.randn(n, 256) for n in (1, 2, 7, 16)]
    want = [layer(x) for x in inputs]
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in range(40):
            k = (seed + i) % len(inputs)
            if not torch.equal(layer(inputs[k]), want[k]):
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# The weight that is not there


def test_shape_dtype_and_device_of_the_weight_decode_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = linear()

    def decoded(*_: object) -> None:
        pytest.fail("the weights were decoded")

    with monkeypatch.context() as patch:
        patch.setattr(DecodedWeight, "decoded", decoded)
        weight = layer.weight
        assert (weight.shape, weight.dtype, weight.device.type) == ((40, 96), torch.float32, "cpu")
        assert (
            weight.data.shape == (40, 96) and not weight.requires_grad and weight.ndim == 2 and "codec" in repr(weight)
        )
        assert weight.is_floating_point() and weight.numel() == 3840 and weight.size(1) == 96
    assert not dict(layer.named_parameters()).keys() - {"bias"} and "weight" not in layer.state_dict()


def test_the_weight_computes_like_the_decoded_one() -> None:
    layer = linear()
    dense = layer.decode()
    x = torch.randn(3, 96)
    assert torch.equal(x @ layer.weight.T, x @ dense.T) and torch.equal(layer.weight + 1, dense + 1)
    assert torch.equal(layer.weight[3:5], dense[3:5]) and layer.weight.norm() == dense.norm()
    assert torch.equal(layer.weight.clone(), dense) and torch.equal(layer.weight.to(torch.float16), dense.half())
    assert np.array_equal(layer.weight.numpy(), dense.numpy()) and layer.weight.tolist() == dense.tolist()
    for other in (copy.deepcopy(layer.weight), pickle.loads(pickle.dumps(layer.weight)), layer.weight.cpu() * 1):
        assert torch.equal(other, dense)
    assert torch.equal(F.linear(x, layer.weight, layer.bias), F.linear(x, dense, layer.bias))


@pytest.mark.parametrize("layer", [linear(), tt.QuantizedEmbedding.from_embedding(nn.Embedding(40, 96))])
def test_the_weight_cannot_be_changed(layer: Any) -> None:
    before = planes(layer)
    with pytest.raises(tenpak.InvalidError, match="cannot be changed in place"):
        layer.weight.data += 1
    with pytest.raises(tenpak.InvalidError, match="cannot be changed in place"):
        layer.weight.data = torch.zeros(40, 96)
    with pytest.raises(tenpak.InvalidError, match="cannot be changed in place"):
        nn.init.normal_(layer.weight)
    with pytest.raises(tenpak.InvalidError, match="cannot be set"):
        layer.weight = torch.zeros(40, 96)
    with pytest.raises(tenpak.InvalidError, match="cannot be replaced"):
        layer.weight = nn.Parameter(torch.zeros(40, 96))
    layer.reset_parameters()
    assert same(before, layer.planes)


def test_a_layer_holds_its_planes_and_nothing_else() -> None:
    layer = tt.QuantizedLinear.from_linear(nn.Linear(1024, 1024, bias=False), "int4_sym_g128_fp16_v1")
    size = sum(t.nbytes for t in (*layer.parameters(), *layer.buffers()))
    assert size == 1024 * 1024 * 4.125 / 8 and layer.bits_per_weight == 4.125 and "4.125 bits/weight" in repr(layer)
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        layer(torch.randn(1, 1024))
    taken = max(event.self_cpu_memory_usage for event in profile.events())
    assert taken < 100_000, "a product allocated as much as a decoded matrix"
    layer(torch.randn(2, 1024))
    gc.collect()
    dense = [
        o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape == (1024, 1024) and o.is_floating_point()
    ]
    assert not dense


# Where layers come from


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> tenpak.Artifact:
    path = tmp_path_factory.mktemp("artifact") / "model.tenpak"
    tenpak.compress(Path(__file__).parents[1] / "data/tiny-books", path, codec=CODEC)
    return tenpak.open(path)


def test_an_artifact_s_planes_are_used_where_they_are(
    artifact: tenpak.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    views = artifact.planes(name)
    with monkeypatch.context() as patch:
        patch.setattr(artifact, "planes", lambda _: views)
        layer = tt.QuantizedLinear.from_artifact(artifact, name)
    assert all(layer.planes[n].data_ptr() == view.ctypes.data for n, view in views.items()), "planes were copied"
    assert layer.dtype == torch.float16 and torch.equal(
        layer.decode(torch.float32), torch.from_numpy(artifact.decode(name))
    )
    check(layer, torch.randn(3, 384))
    embed = tt.QuantizedEmbedding.from_artifact(artifact, "model.embed_tokens.weight")
    assert embed(torch.tensor([5])).dtype == torch.float16
    norm = "model.norm.weight"
    with pytest.raises(tenpak.InvalidError, match="stored raw"):
        tt.QuantizedLinear.from_artifact(artifact, norm)
    assert tt.QuantizedLinear.from_artifact(artifact, name, bias=norm).bias.dtype == torch.float16
    with pytest.raises(tenpak.InvalidError, match="bias of shape"):
        tt.QuantizedLinear.from_artifact(artifact, name, bias=torch.zeros(3))
    with pytest.raises(KeyError):
        tt.QuantizedLinear.from_artifact(artifact, "none")


def test_loading_does_not_write_into_the_file(artifact: tenpak.Artifact) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    layer = tt.QuantizedLinear.from_artifact(artifact, name)
    other = tt.QuantizedLinear.from_linear(nn.Linear(384, 128, bias=False), layer.codec)
    layer.load_state_dict(other.state_dict())
    assert same(planes(layer), other.planes)
    assert not np.array_equal(artifact.planes(name)["codes"], layer.codes.numpy())
    fresh = tt.QuantizedLinear.from_artifact(artifact, name)
    fresh.half().load_state_dict(other.state_dict())
    assert same(planes(fresh), other.planes)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_encoding_a_layer_gives_the_planes_of_encoding_its_weights(dtype: torch.dtype) -> None:
    dense = nn.Linear(96, 40).to(dtype)
    layer = tt.QuantizedLinear.from_linear(dense, CODEC)
    want = tenpak.encode(dense.weight.detach().float().numpy(), CODEC).planes
    assert all(np.array_equal(want[name], plane.numpy()) for name, plane in layer.planes.items())
    assert layer.dtype == dtype and layer.bias is dense.bias
    with pytest.raises(tenpak.InvalidError, match="Conv2d"):
        tt.QuantizedLinear.from_linear(nn.Conv2d(1, 1, 1))
    with pytest.raises(tenpak.NonfiniteError):
        dense.weight.data[3, 4] = float("nan")
        tt.QuantizedLinear.from_linear(dense)
    with pytest.raises(tenpak.InvalidError, match="max_norm"):
        tt.QuantizedEmbedding.from_embedding(nn.Embedding(4, 32, max_norm=1.0))


def test_planes_that_do_not_fit_are_refused() -> None:
    held = planes(linear())
    layer = tt.QuantizedLinear.from_planes(CODEC, 40, 96, {n: p.numpy() for n, p in held.items()})
    assert same(held, layer.planes)
    with pytest.raises(
        tenpak.InvalidError, match="planes codes, scales for codec int4_g32_fp16_v1, expected codes, sc"
    ):
        tt.QuantizedLinear.from_planes(CODEC, 40, 96, {n: held[n] for n in ("codes", "scales")})
    with pytest.raises(tenpak.InvalidError, match="plane codes has dtype"):
        tt.QuantizedLinear.from_planes(CODEC, 41, 96, held)
    with pytest.raises(tenpak.InvalidError, match="plane scales has dtype torch.float32"):
        tt.QuantizedLinear.from_planes(CODEC, 40, 96, {**held, "scales": held["scales"].float()})
    with pytest.raises(tenpak.InvalidError, match="compute in torch.int8"):
        tt.QuantizedLinear(96, 40, dtype=torch.int8)
    with pytest.raises(tenpak.InvalidError, match="padding_idx 9"):
        tt.QuantizedEmbedding(4, 32, padding_idx=9)


def test_int4_layers_say_when_they_are_not(caplog: pytest.LogCaptureFixture) -> None:
    for group in (32, 64, 128):
        for symmetric, kind in ((True, "sym"), (False, "zp")):
            layer = tt.QuantizedLinearInt4.from_linear(nn.Linear(128, 8), group=group, symmetric=symmetric)
            assert layer.codec == f"int4_{kind}_g{group}_fp16_v1" and layer.fallback is None
            layer.bias = None
            check(layer, torch.randn(3, 128))
    assert tt.QuantizedLinearInt4(256, 4).codec == "int4_sym_g128_fp16_v1"
    for make in (lambda: tt.QuantizedLinearInt4.from_linear(nn.Linear(96, 8)), lambda: tt.QuantizedLinearInt4(96, 8)):
        with pytest.warns(UserWarning, match="96 inputs is narrower than the group of 128.*int8_sym_v1"):
            narrow = make()
        assert narrow.codec == "int8_sym_v1" and "fewer than the group of 128" in (narrow.fallback or "")
    assert "narrower" in caplog.text
    with pytest.raises(tenpak.InvalidError, match=r"group of 48, expected one of \[32, 64, 128\]"):
        tt.QuantizedLinearInt4(96, 8, group=48)


def test_g8_layers_have_groups_of_eight() -> None:
    from tenpak.cuda import G8Linear

    layer = G8Linear.from_linear(nn.Linear(40, 8))
    assert isinstance(layer, G8Linear) and layer.codec == "int4_g8_fp16_v1" and layer.bits_per_weight == 8
    assert layer.scales.shape == layer.offsets.shape == (8, 5)
    layer.bias = None
    check(layer, torch.randn(3, 40))
    assert G8Linear(40, 8, codec="int4_g8_v1").scales.dtype == torch.float32
    with pytest.raises(
        tenpak.InvalidError, match="int4_g32_fp16_v1 does not have groups of 8, expected one of int4_g8"
    ):
        G8Linear(40, 8, codec=CODEC)


# Models


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(100, 64, padding_idx=0)
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(64, 64), "out": nn.Linear(64, 64, bias=False)})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(64, 128), "down_proj": nn.Linear(128, 64)})
        self.small = nn.Linear(8, 8)
        self.conv = nn.Conv1d(64, 64, 3)
        self.norm = nn.LayerNorm(64)
        self.lm_head = nn.Linear(64, 100, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(ids)
        x = x + self.self_attn["out"](self.self_attn["q_proj"](x))
        x = x + self.mlp["down_proj"](F.relu(self.mlp["up_proj"](x)))
        return self.lm_head(self.norm(x))


def dense_twin(model: nn.Module) -> nn.Module:
    """The same model with dense layers of the decoded weights."""
    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, tt.QuantizedLinear):
                dense = nn.Linear(child.in_features, child.out_features, child.bias is not None)
                dense.weight.data = child.decode()
                if child.bias is not None:
                    dense.bias = child.bias
                parent._modules[name] = dense
            elif isinstance(child, tt.QuantizedEmbedding):
                parent._modules[name] = nn.Embedding.from_pretrained(child.decode())
    return twin


def test_a_model_gets_the_codecs_that_compress_chooses(tmp_path: Path) -> None:
    import safetensors.torch

    model = Tied()
    state = {n: p.detach() for n, p in model.named_parameters()}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    options: dict[str, Any] = {"exclude": ["*q_proj*"], "rules": [("mlp.up*.weight", "int8_sym_g32_fp16_v1")]}
    plan = tenpak.compress(tmp_path, dry_run=True, codec="int4_g16_fp16_v1", **options)
    report = tt.quantize_model(model, "int4_g16_fp16_v1", **options)
    want = {t["name"]: (t["codec"], t["reason"]) for t in plan["tensors"] if len(t["shape"]) >= 2}
    assert {m["name"]: (m["codec"], m["reason"]) for m in report["modules"]} == want
    assert want["embed_tokens.weight"][0] == "int8_sym_v1" and want["conv.weight"][0] == "raw_v1"
    assert report["total"]["bytes"] == sum(t["stored_bytes"] for t in plan["tensors"])
    assert type(model.mlp["up_proj"]) is tt.QuantizedLinear and type(model.self_attn["q_proj"]) is nn.Linear
    assert model.lm_head.codes is model.embed_tokens.codes and model.embed_tokens.padding_idx == 0
    ids = torch.randint(100, (2, 5))
    torch.testing.assert_close(model(ids), dense_twin(model)(ids), rtol=1e-4, atol=1e-4)
    recipe = 'codec = "nf4_g64_fp16_v1"\nall = true\n'
    everything = {m["name"]: m for m in tt.quantize_model(Tied(), recipe=recipe)["modules"]}
    assert (
        everything["lm_head.weight" if "lm_head.weight" in everything else "embed_tokens.weight"]["codec"][:3] == "nf4"
    )
    assert "Conv1d, which has no quantized form" in everything["conv.weight"]["reason"]
    assert everything["small.weight"]["codec"] == "int8_sym_v1" and "shorter" in everything["small.weight"]["reason"]


def test_layers_that_cannot_be_replaced_are_left_with_the_reason() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(64, 4)
            self.hooked = nn.Linear(64, 64)
            self.hooked.register_forward_hook(lambda *_: None)
            self.table = nn.Embedding(64, 64, max_norm=1.0)
            self.large = nn.Linear(64, 64)
            self.larger = nn.Linear(64, 64)

    model = Odd()
    model.large.weight.data *= 1e30
    model.larger.weight.data *= 1e30
    rules = [("large.weight", "int4_g8_fp16_v1"), ("larger.weight", "int4_g32_fp16_v1")]
    report = {m["name"]: m for m in tt.quantize_model(model, rules=rules)["modules"]}
    assert "in_proj_weight" in report["attention.in_proj_weight"]["reason"]
    assert "NonDynamicallyQuantizableLinear" in report["attention.out_proj.weight"]["reason"]
    assert "hooks" in report["hooked.weight"]["reason"] and "max_norm" in report["table.weight"]["reason"]
    assert report["large.weight"]["codec"] == model.large.codec == "int4_g8_v1"
    assert report["larger.weight"]["codec"] == "raw_v1" and type(model.larger) is nn.Linear
    assert all(m["codec"] == "raw_v1" for n, m in report.items() if n != "large.weight")
    with pytest.raises(tenpak.InvalidError, match="from_linear"):
        tt.quantize_model(nn.Linear(64, 64))
    with pytest.raises(tenpak.InvalidError, match="meta"):
        tt.quantize_model(Tied().to("meta"))
    model.large = nn.Linear(64, 64)
    model.large.weight.data[0, 0] = float("inf")
    with pytest.raises(tenpak.NonfiniteError, match="parameter 'large.weight'"):
        tt.quantize_model(model)


def test_peft_trains_an_adapter_and_leaves_planes_alone() -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = Tied()
    tt.quantize_model(model)
    quantized = [m for m in model.modules() if hasattr(m, "planes")]
    before = [planes(layer) for layer in quantized]
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj", "down_proj"], lora_alpha=8)
    adapted = peft.get_peft_model(model, lora)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 6
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    ids, losses = torch.randint(100, (4, 8)), []
    for _ in range(8):
        loss = F.cross_entropy(adapted(ids).flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05, losses
    assert len(quantized) == 6
    assert all(same(held, layer.planes) for held, layer in zip(before, quantized, strict=True))
    with pytest.raises(tenpak.InvalidError, match="keep adapters unmerged"):
        adapted.merge_and_unload()


# The package


def test_importing_tenpak_does_not_import_torch() -> None:
    code = "import sys, tenpak, tenpak.planes; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_pytorch_the_error_says_how_to_get_it(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None\ntry:\n import tenpak.torch\nexcept ImportError as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "pip install 'tenpak[torch]'" in done.stdout


def test_everything_public_is_documented() -> None:
    import inspect

    import tenpak.planes

    assert sorted(tt.__all__) == list(tt.__all__)
    for module in (tt, tenpak.planes):
        for name in module.__all__:
            thing = getattr(module, name)
            doc = inspect.getdoc(thing) or ""
            assert "Parameters" in doc and "Raises" in doc or name in ("G8Linear", "QuantizedLinearInt4"), name
            if isinstance(thing, type):
                for member, value in vars(thing).items():
                    assert member.startswith("_") or not callable(value) or inspect.getdoc(value), f"{name}.{member}"
