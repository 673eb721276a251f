"""Column scales and outliers: files against the text of the format, products and modules against decoded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import oracle
import pytest
import tenpak
from conftest import Cli
from test_format import check_artifact

Array = npt.NDArray[Any]
CODECS = [c["id"] for c in tenpak.codecs() if c["bits"]]
KINDS = [(True, True), (True, False), (False, True)]


def made(rng: np.random.Generator, codec: str, rows: int, cols: int, scaled: bool, sparse: bool) -> oracle.Tensor:
    """Make a tensor with extra planes of random numbers, codes and scales included."""
    layout = oracle.CODECS[codec]
    weights = rng.standard_normal((rows, cols)).astype(np.float32)
    own = tenpak.encode(weights, codec).planes
    planes: dict[str, bytes | Array] = {name: own[name] for name in layout.planes()}
    if scaled:
        planes["column_scales"] = (rng.standard_normal(cols) * 10.0 ** rng.uniform(-3, 3, cols)).astype("<f4")
    count = 0
    if sparse:
        mask = rng.random((rows, cols)) < 0.1
        mask[0, 0] = True
        count = int(mask.sum())
        planes["outlier_counts"] = mask.sum(1).astype("<u4")
        planes["outlier_columns"] = np.nonzero(mask)[1].astype("<u2" if cols <= 65536 else "<u4")
        planes["outlier_values"] = (8 * rng.standard_normal(count)).astype("<f2")
    return oracle.Tensor(
        f"{codec} {cols} {scaled} {sparse}", "F32", (rows, cols), codec, planes, False, {}, None, scaled, count
    )


def test_extra_planes_decode_as_the_text_says(cli: Cli, tmp_path: Path, rng: np.random.Generator) -> None:
    """Files that the oracle wrote, decoded by both, and written as a directory and back."""
    tensors = [made(rng, codec, 5, 71, *kinds) for codec in CODECS for kinds in KINDS]
    tensors.append(made(rng, "int4_g8_fp16_v1", 2, 65537, True, True))
    path = tmp_path / "a.tenpak"
    path.write_bytes(oracle.write(tensors))
    check_artifact(cli, path, None)
    assert cli("verify", path).returncode == 0
    cli("export", path, "-o", tmp_path / "planes", "--to", "hf")
    assert oracle.join(tmp_path / "planes") == path.read_bytes()
    cli("verify", tmp_path / "planes")
    (tmp_path / "planes/tenpak.json").unlink()
    assert tenpak.open(tmp_path / "planes").identity == tenpak.open(path).identity
    artifact = tenpak.open(path)
    for tensor in tensors:
        entry = artifact[tensor.name]
        assert (entry.column_scales, entry.outliers) == (tensor.column_scales, tensor.outliers)
        for name, plane in artifact.planes(tensor.name).items():
            given = tensor.planes[name]
            assert not isinstance(given, bytes) and plane.tobytes() == given.tobytes()
            assert plane.ndim == (1 if name in oracle.extra_planes(1, 1, True, 1) else 2)


def test_what_both_refuse(cli: Cli, tmp_path: Path, rng: np.random.Generator) -> None:
    """Planes that contradict each other are seen by the oracle and by the library, wherever they are read."""
    path = tmp_path / "a.tenpak"

    def refused(name: str, values: Any) -> None:
        tensor = made(rng, "int4_g16_fp16_v1", 4, 32, True, True)
        given = np.array(tensor.planes[name])
        changed = values(given)
        path.write_bytes(oracle.write([oracle.Tensor(**{**vars(tensor), "planes": {**tensor.planes, name: changed}})]))
        with pytest.raises(oracle.FormatError):
            oracle.read(path.read_bytes())
        assert cli("verify", path, code=None).returncode == 1
        artifact = tenpak.open(path)
        with pytest.raises(tenpak.CorruptError):
            artifact.decode(tensor.name)
        with pytest.raises(tenpak.CorruptError):
            artifact.planes(tensor.name)

    refused("column_scales", lambda s: np.where(np.arange(32) == 3, np.float32(0), s))
    refused("column_scales", lambda s: np.where(np.arange(32) == 31, np.float32(np.nan), s))
    refused("outlier_counts", lambda c: c + (np.arange(4) == 2).astype(c.dtype))
    refused("outlier_columns", lambda c: c[::-1].copy())
    refused("outlier_columns", lambda c: c + np.uint16(32))
    refused("outlier_values", lambda v: np.full_like(v, np.inf))


@pytest.mark.parametrize("codec", CODECS)
def test_products_and_rows_are_those_of_the_decoded_weights(codec: str, rng: np.random.Generator) -> None:
    """``tenpak.encode`` with column scales and outliers, decoded and multiplied."""
    weights = rng.standard_normal((48, 160)).astype(np.float32)
    weights[rng.random(weights.shape) < 0.01] *= 20
    scales = (0.2 + rng.random(160)).astype(np.float32)
    plain = tenpak.encode(weights, codec)
    encoded = tenpak.encode(weights, codec, column_scales=scales, outliers=0.01)
    assert encoded.planes["outlier_values"].shape == (76,) and encoded.planes["column_scales"].shape == (160,)
    beside = 4 * (160 + 48 + 76)
    assert encoded.bits_per_weight == pytest.approx(plain.bits_per_weight + 8 * beside / weights.size)
    decoded = encoded.decode()
    assert ((decoded - weights) ** 2).sum() < ((plain.decode() - weights) ** 2).sum()
    x = rng.standard_normal((3, 160)).astype(np.float32)
    for m in (1, 3):
        got = tenpak.matmul(x[:m], encoded)
        size = (np.abs(decoded).max(1) + 4)[:, None].repeat(160, 1)
        bound = 400 * np.finfo(np.float32).eps * (np.abs(x[:m]) @ size.T)
        assert (np.abs(got - x[:m].astype(np.float64) @ decoded.T) <= bound).all()
    for bad in ({"column_scales": scales * 0}, {"column_scales": scales[:5]}, {"outliers": 0.0}, {"outliers": 0.5}):
        with pytest.raises(tenpak.InvalidError):
            tenpak.encode(weights, codec, **bad)


def test_modules_compute_move_save_and_share_extra_planes(tmp_path: Path, rng: np.random.Generator) -> None:
    """A linear layer, an embedding and a stack, forwards, backwards and through a state dict."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed; pip install 'tenpak[torch]'")
    import tenpak.torch as tt

    weights = rng.standard_normal((40, 96)).astype(np.float32)
    codec = "int4_g32_fp16_v1"
    encoded = tenpak.encode(weights, codec, column_scales=0.5 + rng.random(96).astype(np.float32), outliers=0.02)
    dense = torch.from_numpy(encoded.decode())
    layer = tt.QuantizedLinear.from_planes(codec, 40, 96, encoded.planes)
    assert layer.bits_per_weight == pytest.approx(encoded.bits_per_weight)
    x = torch.randn(5, 96, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, x @ dense.T, rtol=1e-4, atol=1e-4)
    y.sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand(5, 96), rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.weight.decoded(), dense) and torch.equal(layer.decode(), dense)
    compiled = torch.library.opcheck
    compiled(torch.ops.tenpak.linear.default, (x.detach(), *layer.matrix, "float32"))

    half = layer.half()
    assert half.column_scales.dtype == torch.float32 and torch.equal(half.decode(torch.float32), dense)
    fresh = tt.QuantizedLinear(96, 40, bias=False, codec=codec)
    fresh.load_state_dict(layer.state_dict())
    assert fresh.extra == (True, 76) and torch.equal(fresh.decode(torch.float32), dense)
    plain = tt.QuantizedLinear.from_linear(torch.nn.Linear(96, 40, bias=False), codec)
    fresh.load_state_dict(plain.state_dict())
    assert fresh.extra == (False, 0) and torch.equal(fresh.decode(), plain.decode())
    fresh.share_planes(layer)
    assert torch.equal(fresh.decode(torch.float32), dense)

    table = tt.QuantizedEmbedding.from_planes(codec, 40, 96, encoded.planes)
    ids = torch.tensor([[3, 39], [0, 3]])
    assert torch.equal(table(ids), dense[ids])

    stack = tt.QuantizedStack(4, 10, 96, codec=codec)
    stack._set_planes(encoded.planes)
    ends = torch.tensor([2, 2, 3, 5])
    x = torch.randn(5, 96, requires_grad=True)
    experts = torch.tensor([0, 0, 2, 3, 3])
    want = torch.einsum("mi,moi->mo", x, dense.view(4, 10, 96)[experts])
    got = stack(x, ends)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(got.sum(), x)
    torch.testing.assert_close(gradient, dense.view(4, 10, 96)[experts].sum(1), rtol=1e-5, atol=1e-5)
    with pytest.raises(tenpak.UnsupportedError, match="single experts"):
        stack.split_planes()


def test_a_model_of_hugging_face_loads_with_extra_planes(tmp_path: Path) -> None:
    """From a file and from a directory, saved and loaded again; merged experts are refused."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed; pip install 'tenpak[torch]'")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from test_hf import CONFIGS

    for kind in ("llama", "gpt2", "mixtral"):
        torch.manual_seed(4)
        dense = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())
        folder = tmp_path / kind
        dense.save_pretrained(folder / "source")
        tenpak.compress(folder / "source", folder / "a.tenpak", codec="int4_g32_fp16_v1", outliers=0.01)
        tenpak.export(folder / "a.tenpak", folder / "planes")
        if kind == "mixtral":
            with pytest.raises(tenpak.UnsupportedError, match="column scales or outliers"):
                tenpak.from_pretrained(folder / "planes")
            continue
        tenpak.decompress(folder / "a.tenpak", folder / "decoded", dtype="float32")
        ids = torch.arange(24).reshape(2, 12)
        with torch.no_grad():
            models = [tenpak.from_pretrained(folder / name, dtype=torch.float32) for name in ("a.tenpak", "planes")]
            models[0].save_pretrained(folder / "saved")
            models.append(tenpak.from_pretrained(folder / "saved", dtype=torch.float32))
            plain = transformers.AutoModelForCausalLM.from_config(dense.config)
            state = tenpak.open(folder / "a.tenpak")
            plain.load_state_dict(
                {name: torch.from_numpy(state.decode(name)) for name in state},
                strict=not dense.config.tie_word_embeddings,
            )
            want = plain.eval()(ids).logits
            for model in models:
                outliers = [m.extra[1] for m in model.modules() if isinstance(m, tenpak.torch.QuantizedLinear)]
                assert any(outliers)
                torch.testing.assert_close(model.eval()(ids).logits, want, rtol=1e-3, atol=1e-3)
