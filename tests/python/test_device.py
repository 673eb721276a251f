"""Products on a graphics device from Python: the same as on the CPU, whatever the device is.

A software device will do, such as Mesa's lavapipe; without any these tests fail, since nobody would notice that they
have not run.
"""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tenpak

Array = npt.NDArray[Any]
CODECS = [codec["id"] for codec in tenpak.codecs() if codec["id"] != "raw_v1"]
#: Sums of a few hundred products in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("codec", CODECS)
def test_a_product_is_that_of_the_cpu(rng: np.random.Generator, codec: str) -> None:
    weights = tenpak.encode(rng.standard_normal((37, 259)).astype(np.float32), codec)
    for shape in [(259,), (3, 259), (2, 5, 259)]:
        x = rng.standard_normal(shape).astype(np.float32)
        y = tenpak.matmul(x, weights, device="wgpu")
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, tenpak.matmul(x, weights), **CLOSE)


def test_extra_planes_and_other_arithmetic_are_honoured(rng: np.random.Generator) -> None:
    scales = rng.uniform(0.5, 2, 128).astype(np.float32)
    array = rng.standard_normal((40, 128)).astype(np.float32)
    weights = tenpak.encode(array, "int4_g32_fp16_v1", column_scales=scales, outliers=0.02)
    x = rng.standard_normal((4, 128)).astype(np.float32)
    for act, error in [("float32", 1e-4), ("bfloat16", 0.1), ("float16", 0.1), ("int8", 0.5)]:
        y = tenpak.matmul(x, weights, act=act, device="wgpu")
        np.testing.assert_allclose(y, x @ weights.decode().T, atol=error, rtol=1e-4)
    half = tenpak.matmul(x.astype(np.float16), weights, device="wgpu")
    assert half.dtype == np.float16


def test_tensors_of_an_artifact_are_taken_once_and_go_with_it(tmp_path: Path, sample_model: Path) -> None:
    path = tmp_path / "a.tenpak"
    tenpak.compress(sample_model, path, codec="int5_k32_v1")
    artifact = tenpak.open(path)
    name = "model.layers.0.mlp.down_proj.weight"
    x = np.ones((2, artifact[name].cols), np.float32)
    first = tenpak.matmul(x, artifact, name, device="wgpu")
    held = artifact._on_devices["wgpu", name]
    assert (tenpak.matmul(x, artifact, name, device="wgpu") == first).all()
    assert artifact._on_devices["wgpu", name] is held and len(artifact._on_devices) == 1
    np.testing.assert_allclose(first, tenpak.matmul(x, artifact, name), **CLOSE)


def test_devices_that_are_not_there_are_refused_by_name(rng: np.random.Generator) -> None:
    weights = tenpak.encode(rng.standard_normal((8, 32)).astype(np.float32), "int4_g8_v1")
    x = np.ones((1, 32), np.float32)
    with pytest.raises(tenpak.InvalidError, match="unknown device 'gpu', expected cpu, wgpu, wgpu:N, cuda or cuda:N"):
        tenpak.matmul(x, weights, device="gpu")
    with pytest.raises(tenpak.TenpakError, match="there is no device wgpu:99, expected wgpu:0"):
        tenpak.matmul(x, weights, device="wgpu:99")
    with pytest.raises(tenpak.InvalidError, match="a stack of matrices on device 'wgpu', expected 'cpu'"):
        tenpak.matmul(x, weights, ends=[1], device="wgpu")
    with pytest.raises(tenpak.InvalidError, match=r"activations of shape \(1, 31\)"):
        tenpak.matmul(x[:, 1:], weights, device="wgpu")


def test_a_forked_process_is_told_that_it_has_no_device() -> None:
    code = """
import os, warnings
import numpy as np, tenpak
warnings.simplefilter("ignore", DeprecationWarning)
weights = tenpak.encode(np.ones((8, 32), np.float32), "int4_g8_v1")
x = np.ones((1, 32), np.float32)
y = tenpak.matmul(x, weights, device="wgpu")
if os.fork() == 0:
    for matrix in (weights, tenpak.encode(np.ones((8, 32), np.float32), "int4_g8_v1")):
        try:
            tenpak.matmul(x, matrix, device="wgpu")
        except tenpak.UnsupportedError as error:
            assert "forked" in str(error) and (tenpak.matmul(x, matrix) == y).all()
        else:
            os._exit(1)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
assert (tenpak.matmul(x, weights, device="wgpu") == y).all()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


class TestLayers:
    """`device="wgpu"` in PyTorch's layers, whose tensors stay on the CPU."""

    torch = pytest.importorskip("torch", reason="layers need PyTorch, see CONTRIBUTING")

    def layer(self, **options: Any) -> Any:
        from tenpak.torch import QuantizedLinear

        self.torch.manual_seed(1)
        return QuantizedLinear.from_linear(self.torch.nn.Linear(96, 40), "int4_g32_fp16_v1", **options)

    def test_a_layer_multiplies_on_the_device_it_was_made_for(self) -> None:
        torch = self.torch
        layer, plain = self.layer(device="wgpu"), self.layer()
        assert layer.backend == "wgpu" and "backend=wgpu" in repr(layer) and layer.codes.is_cpu
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = torch.randn(2, 3, 96, dtype=dtype)
            y = layer.to(dtype)(x)
            assert y.dtype == dtype
            eps = max(1e-5, float(torch.finfo(dtype).eps))
            torch.testing.assert_close(y, plain.to(dtype)(x), rtol=8 * eps, atol=16 * eps)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert other.backend == "wgpu" and torch.equal(other(x), layer(x))

    def test_models_are_moved_and_gradients_reach_activations(self) -> None:
        torch = self.torch
        from tenpak.torch import set_backend

        model = torch.nn.Sequential(self.layer(), torch.nn.ReLU())
        x = torch.randn(3, 96, requires_grad=True)
        model(x).sum().backward()
        want, x.grad = x.grad, None
        set_backend(model, "wgpu")
        model(x).sum().backward()
        torch.testing.assert_close(x.grad, want)
        set_backend(model, "cpu")
        assert model[0].backend == "cpu"
        with pytest.raises(tenpak.InvalidError, match="unknown backend 'cuda', expected 'cpu', 'wgpu' or 'wgpu:N'"):
            set_backend(model, "cuda")

    def test_planes_that_change_are_taken_again_and_those_that_die_are_let_go(self) -> None:
        torch = self.torch
        from tenpak.torch import _ops

        layer = self.layer(device="wgpu")
        x = torch.randn(1, 96)
        before = layer(x)
        other = self.layer()
        other.codes.zero_()
        layer.load_state_dict(other.state_dict())
        assert not torch.equal(layer(x), before)
        torch.testing.assert_close(layer(x), other(x))
        held = len(_ops._on_devices)
        del layer
        gc.collect()
        assert len(_ops._on_devices) == held - 1

    def test_the_operator_keeps_the_rules_of_the_dispatcher(self) -> None:
        torch = self.torch
        layer = self.layer(device="wgpu")
        x = torch.randn(3, 96, requires_grad=True)
        torch.library.opcheck(torch.ops.tenpak.device_linear, (x, *layer.matrix, "float32", "wgpu"))
