"""Layers on CUDA devices as far as can be promised without one: shapes, graphs, and what to do about missing parts.

Everything up to the launch is tried here: which operator a layer becomes on a device, for every tracer and compiler
that PyTorch has, and its shapes and dtypes. What only a device can say is left: that a launch is accepted, that graphs
record it, gradients (autograd asks the driver for a context), `opcheck` with numbers on the device, and code that
Inductor makes around it. With a device, `python benches/nvidia.py --check` compares every codec and shape, and records
every product in a graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tenpak

torch = pytest.importorskip("torch", reason="PyTorch is not installed; pip install 'tenpak[torch]'")

import tenpak.torch as tt  # noqa: E402
from tenpak import _nvrtc  # noqa: E402
from tenpak.torch import _cuda, _ops  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

CODECS = [c["id"] for c in tenpak.codecs() if c["bits"]]
without_device = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")


def on_cuda(matrix: tuple[Any, ...], mode: FakeTensorMode) -> tuple[Any, ...]:
    """A matrix whose planes are on a device, without their numbers."""

    def move(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            with mode:
                return torch.empty(value.shape, dtype=value.dtype, device="cuda")
        return [move(item) for item in value] if isinstance(value, list) else value

    return tuple(move(value) for value in matrix)


@pytest.mark.parametrize("codec", CODECS)
def test_operators_know_their_results_on_a_device_before_there_are_any(codec: str) -> None:
    layer = tt.QuantizedLinear(96, 40, codec=codec)
    stack = tt.QuantizedStack(4, 24, 96, codec=codec)
    mode = FakeTensorMode()
    matrix, stacked = on_cuda(layer.matrix, mode), on_cuda(stack.matrix, mode)
    with mode:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = torch.empty(2, 3, 96, dtype=dtype, device="cuda")
            y = _ops.linear(x, *matrix, _ops.default_act(x))
            assert (y.shape, y.dtype, y.device.type) == ((2, 3, 40), dtype, "cuda")
            ends = torch.empty(4, dtype=torch.int32, device="cuda")
            y = _ops.grouped_linear(x[0], ends, *stacked, _ops.default_act(x))
            assert (y.shape, y.dtype, y.device.type) == ((3, 24), dtype, "cuda")
            w = _ops.dequantize(*matrix, dtype)
            assert (w.shape, w.dtype, w.device.type) == ((40, 96), dtype, "cuda")
            rows = _ops.embedding(torch.empty(5, dtype=torch.int64, device="cuda"), *matrix, dtype)
            assert (rows.shape, rows.dtype, rows.device.type) == ((5, 96), dtype, "cuda")


def test_a_layer_on_a_device_is_one_operator_in_a_graph_whatever_the_batch() -> None:
    layer = tt.QuantizedLinear(96, 40, bias=False, dtype=torch.bfloat16)
    mode = FakeTensorMode()
    matrix = on_cuda(layer.matrix, mode)
    with mode:
        x = torch.empty(7, 96, dtype=torch.bfloat16, device="cuda")
        graph = make_fx(lambda x: _ops.linear(x, *matrix, "bfloat16"))(x)
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert calls == [torch.ops.tenpak.linear.default]


LAYERS = {
    "QuantizedLinear": (lambda: tt.QuantizedLinear(96, 40, device="cuda", dtype=torch.bfloat16), torch.bfloat16),
    "G8Linear": (lambda: tt.G8Linear(96, 40, device="cuda"), torch.float16),
    "QuantizedEmbedding": (lambda: tt.QuantizedEmbedding(50, 40, device="cuda", dtype=torch.bfloat16), None),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_on_a_device_are_one_operator_to_tracers_exporters_and_compilers(name: str) -> None:
    make, dtype = LAYERS[name]
    operator = (torch.ops.tenpak.linear if dtype else torch.ops.tenpak.embedding).default
    seen: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    with FakeTensorMode():
        layer = make()
        assert all(plane.is_cuda for plane in layer.planes.values())
        x = (
            torch.empty(5, 96, dtype=dtype, device="cuda")
            if dtype
            else torch.empty(5, dtype=torch.int64, device="cuda")
        )
        eager = layer(x)
        rows = torch.export.Dim("rows", min=2, max=512)
        exported = torch.export.export(layer, (x,), strict=False, dynamic_shapes=({0: rows},))
        traced = make_fx(layer)(x)
        compiled = torch.compile(layer, fullgraph=True, backend=backend)(x)
    for y in (eager, compiled):
        assert (y.shape, y.device.type) == ((5, 40), "cuda") and y.dtype in (dtype, torch.bfloat16)
    for graph in (exported.graph, traced.graph):
        seen.extend(node.target for node in graph.nodes)
    assert seen.count(operator) == 3, "decoding, or a product of PyTorch's, would be another"
    assert torch.ops.tenpak.dequantize.default not in seen


def test_every_operator_has_an_implementation_of_its_own_for_devices() -> None:
    for name in ("linear", "grouped_linear", "grouped_linear_backward", "dequantize", "embedding"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tenpak::{name}", "CUDA"), name


def test_halves_are_multiplied_as_halves_on_a_device_and_in_f32_on_a_processor() -> None:
    with FakeTensorMode():
        assert _ops.default_act(torch.empty(1, dtype=torch.float16, device="cuda")) == "float16"
        assert _ops.default_act(torch.empty(1, dtype=torch.bfloat16, device="cuda")) == "bfloat16"
        assert _ops.default_act(torch.empty(1, device="cuda")) == "float32"
    assert _ops.default_act(torch.empty(1, dtype=torch.float16)) == "float32"


@without_device
def test_a_missing_driver_or_device_is_a_message_that_says_what_to_do() -> None:
    with pytest.raises(tenpak.TenpakError, match="driver|no device") as caught:
        _cuda.device(0)
    assert "multiply on the CPU" in str(caught.value) or "tenpak devices" in str(caught.value)


def test_planes_elsewhere_are_refused_by_name() -> None:
    plane = torch.empty(4, dtype=torch.uint8)
    with pytest.raises(tenpak.InvalidError, match=r"meta and planes on cpu.*\.to\(\)"):
        _cuda._places(torch.empty(1, device="meta"), (plane,))
    with pytest.raises(tenpak.InvalidError, match="contiguous"):
        _cuda._places(plane, (torch.empty(4, 4, dtype=torch.uint8).T,))
    a, b, c, d = (torch.empty(1) for _ in range(4))
    places, none = [(tensor.data_ptr(), 4) for tensor in (a, b, c, d)], (0, 0)
    assert _cuda._extra([], a) == [none] * 4
    assert _cuda._extra([a], a) == [places[0], none, none, none]
    assert _cuda._extra([b, c, d], a) == [none, *places[1:]]
    assert _cuda._extra([a, b, c, d], a) == places


def test_the_compiler_that_belongs_to_pytorch_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert _nvrtc.find(), "NVRTC was not found beside PyTorch; pip install nvidia-cuda-nvrtc"
    for place in ("cu13/lib/libnvrtc.so.13", "cuda_nvrtc/lib/libnvrtc.so.12", "cu13/lib/libnvrtc-builtins.so.13.2"):
        path = tmp_path / "nvidia" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(
        _nvrtc, "find_spec", lambda name: type("Spec", (), {"submodule_search_locations": [tmp_path / name]})
    )
    assert str(_nvrtc.find()).endswith("libnvrtc.so.13")
    assert str(_nvrtc.find("12")).endswith("libnvrtc.so.12")
    assert _nvrtc.find("11") is None
    monkeypatch.setattr(_nvrtc, "find_spec", lambda name: None)
    assert _nvrtc.find() is None
