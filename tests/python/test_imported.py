"""Checkpoints of other quantizers: what comes in is what their own libraries say is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tenpak
from conftest import write_safetensors

Array = npt.NDArray[Any]

#: Types of GGUF: weights and bytes of a block, and where its halves are.
GGUF = {
    "Q4_0": (32, 18, [0]),
    "Q4_1": (32, 20, [0, 2]),
    "Q5_0": (32, 22, [0]),
    "Q5_1": (32, 24, [0, 2]),
    "Q8_0": (32, 34, [0]),
    "Q2_K": (256, 84, [80, 82]),
    "Q3_K": (256, 110, [108]),
    "Q4_K": (256, 144, [0, 2]),
    "Q5_K": (256, 176, [0, 2]),
    "Q6_K": (256, 210, [208]),
    "IQ4_NL": (32, 18, [0]),
    "IQ4_XS": (256, 136, [0]),
}
#: The codecs that hold the types of GGUF as they are.
HELD = {
    "Q4_0": "int4_sym_g32_fp16_v1",
    "Q4_1": "int4_g32_fp16_v1",
    "Q8_0": "int8_sym_g32_fp16_v1",
    "Q2_K": "int4_g16_v1",
    "Q4_K": "int4_g16_v1",
}


def model(folder: Path, config: dict[str, Any], tensors: dict[str, Array]) -> Path:
    """A checkpoint of these tensors."""
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def imported(source: Path, name: str = "m.weight") -> tuple[Array, dict[str, Any]]:
    """The weights of a tensor that was taken over, and what the report says of it."""
    output = source.with_name(f"{source.name}.tenpak")
    report = tenpak.compress(source, output)
    assert tenpak.compress(source, dry_run=True)["schema"] == report["schema"]
    [told] = [tensor for tensor in report["tensors"] if tensor["name"] == name]
    return tenpak.open(output).decode(name), told


def assert_bits(found: Array, expected: Array) -> None:
    """Equal numbers, zeros with their signs."""
    np.testing.assert_array_equal(found.view(np.uint32), expected.astype(np.float32).view(np.uint32))


def packed(numbers: Array, bits: int, axis: int = 1) -> Array:
    """Numbers in words of 32 bits along an axis, low bits first, across words."""
    numbers = np.moveaxis(numbers.astype(np.uint8), axis, -1)
    digits = np.unpackbits(numbers[..., None], axis=-1, count=bits, bitorder="little")
    words = np.packbits(digits.reshape(*numbers.shape[:-1], -1), axis=-1, bitorder="little").view(np.uint32)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)


@pytest.mark.parametrize("kind", GGUF)
def test_blocks_of_gguf_are_what_its_own_reader_decodes(tmp_path: Path, kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    weights, size, halves = GGUF[kind]
    random = np.random.default_rng(7)
    blocks = random.integers(0, 256, (512 * 6 // weights, size), dtype=np.uint8)
    for at in halves:
        scale = (random.normal(size=len(blocks)) / 64).astype(np.float16)
        blocks[:, at : at + 2] = scale[:, None].view(np.uint8)
    rows = blocks.reshape(6, -1)
    own = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "any")
    writer.add_array("some.texts", ["a", "bc"])
    writer.add_tensor("m.weight", rows, raw_dtype=own)
    writer.add_tensor("m.bias", np.arange(6, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, told = imported(tmp_path / "m.gguf")
    assert_bits(found, gguf.dequantize(rows, own))
    assert (told["imported"], told["codec"]) == (f"gguf {kind.lower()}", HELD.get(kind, "raw_v1"))
    assert "loss" not in told


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (8, 32), (8, 0), (4, 0)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_packs_what_comes_in(
    tmp_path: Path, dtype: str, bits: int, group: int, symmetric: bool
) -> None:
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    random, rows, cols = np.random.default_rng(bits + group), 24, 128
    least, most = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    groups = cols // group if group else 1
    levels = random.integers(least, most + 1, (rows, cols), dtype=np.int8)
    zeros = random.integers(least, most + 1, (rows, groups), dtype=np.int8)
    scales = torch.tensor(random.uniform(0.001, 0.1, (rows, groups))).to(getattr(torch, dtype))
    tensors = {
        "m.weight_packed": helpers.pack_to_int32(torch.tensor(levels), bits),
        "m.weight_scale": scales,
        "m.weight_shape": torch.tensor([rows, cols]),
    }
    if not symmetric:
        tensors["m.weight_zero_point"] = helpers.pack_to_int32(torch.tensor(zeros), bits, packed_dim=0).contiguous()
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": group or None}
    weights["strategy"] = "group" if group else "channel"
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"g": {"weights": weights}},
    }
    source = tmp_path / "model"
    source.mkdir()
    pytest.importorskip("safetensors.torch").save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text(json.dumps({"quantization_config": config}))
    found, told = imported(source)
    spread = np.repeat(scales.float().numpy(), cols // groups, 1)
    level = levels.astype(np.float32) - (0 if symmetric else np.repeat(zeros, cols // groups, 1).astype(np.float32))
    assert_bits(found, level * spread)
    exact = dtype != "float32" or (bits, group) == (8, 0)
    held = exact and (symmetric or bits == 4)
    assert (told["codec"] != "raw_v1") == held, told
    assert told["imported"] == "compressed-tensors"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (4, 128), (8, 64), (2, 64), (3, 64), (5, 32), (6, 64)])
def test_mlx_quantizes_what_comes_in(tmp_path: Path, dtype: str, bits: int, group: int) -> None:
    mx = pytest.importorskip("mlx.core")
    values = (np.random.default_rng(3).normal(size=(16, 256)) / 20).astype(np.float32)
    codes, scales, biases = mx.quantize(mx.array(values).astype(getattr(mx, dtype)), group_size=group, bits=bits)
    source = tmp_path / "model"
    source.mkdir()
    mx.save_safetensors(str(source / "model.safetensors"), {"m.weight": codes, "m.scales": scales, "m.biases": biases})
    own = {"group_size": group, "bits": bits}
    (source / "config.json").write_text(json.dumps({"quantization": own, "quantization_config": own}))
    found, told = imported(source)
    digits = np.unpackbits(np.array(codes).view(np.uint8), axis=-1, bitorder="little").reshape(16, 256, bits)
    numbers = np.packbits(digits, axis=-1, bitorder="little")
    scale, bias = (np.repeat(np.array(p.astype(mx.float32)), group, 1) for p in (scales, biases))
    assert_bits(found, numbers.reshape(16, 256).astype(np.float32) * scale + bias)
    held = "raw_v1" if bits > 4 else {(4, 128): "int4_g128_fp16_v1"}.get((bits, group), "int4_g32_fp16_v1")
    assert told["codec"] == held, told["reason"]
    exact = np.array(mx.dequantize(codes, scales.astype(mx.float32), biases.astype(mx.float32), **own))
    np.testing.assert_allclose(found, exact, rtol=0, atol=2.0**-23 * np.abs(exact).max())


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("bits", "group"), [(2, 64), (3, 32), (3, -1), (4, 32), (4, -1), (8, 64)])
def test_gptq_written_from_its_description_comes_in(tmp_path: Path, version: str, bits: int, group: int) -> None:
    random, rows, cols = np.random.default_rng(bits), 32, 128
    groups = 1 if group < 0 else cols // group
    codes = random.integers(0, 1 << bits, (rows, cols))
    zeros = random.integers(1, 1 << bits, (rows, groups))
    scales = random.uniform(0.001, 0.1, (rows, groups)).astype(np.float16)
    tensors = {
        "m.qweight": packed(codes.T, bits, 0),
        "m.qzeros": packed(zeros.T - (version == "gptq"), bits, 1),
        "m.scales": np.ascontiguousarray(scales.T),
        "m.g_idx": (np.arange(cols) // (cols // groups)).astype(np.int32),
        "m.bias": np.ones(rows, np.float16),
    }
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": False, "checkpoint_format": version}
    found, told = imported(model(tmp_path / "model", {"quantization_config": config}, tensors))
    zero, scale = (np.repeat(numbers.astype(np.float32), cols // groups, 1) for numbers in (zeros, scales))
    assert_bits(found, (codes.astype(np.float32) - zero) * scale)
    assert (told["imported"], told["codec"] == "raw_v1") == (version, bits == 8)


def test_awq_written_from_its_description_comes_in(tmp_path: Path) -> None:
    random, rows, cols, group = np.random.default_rng(5), 24, 128, 64
    codes, zeros = random.integers(0, 16, (rows, cols)), random.integers(0, 16, (rows, cols // group))
    scales = random.uniform(0.001, 0.1, (rows, cols // group)).astype(np.float16)

    def words(numbers: Array) -> Array:
        turned = numbers.T.reshape(numbers.shape[1], -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return packed(turned.reshape(numbers.shape[1], -1), 4, 1)

    tensors = {"m.qweight": words(codes), "m.qzeros": words(zeros), "m.scales": np.ascontiguousarray(scales.T)}
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    found, told = imported(model(tmp_path / "model", {"quantization_config": config}, tensors))
    spread = np.repeat(scales.astype(np.float32), group, 1)
    assert_bits(found, (codes - np.repeat(zeros, group, 1)).astype(np.float32) * spread)
    assert told["codec"] == "int4_zp_g64_fp16_v1"


@pytest.mark.parametrize("cols", [128, 96])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_decodes_what_comes_in(tmp_path: Path, kind: str, nested: bool, cols: int) -> None:
    torch = pytest.importorskip("torch")
    own = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(1)
    weights = (torch.randn(33, cols) / 20).to(torch.bfloat16)
    codes, state = own.quantize_4bit(weights, quant_type=kind, compress_statistics=nested, blocksize=64)
    state.dtype = torch.float32
    tensors = {"m.weight": codes} | {f"m.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    source = tmp_path / "model"
    source.mkdir()
    pytest.importorskip("safetensors.torch").save_file(
        {key: value.contiguous() for key, value in tensors.items()}, source / "model.safetensors"
    )
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (source / "config.json").write_text(json.dumps({"quantization_config": config}))
    found, told = imported(source)
    scales = own.dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
    flat = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1).flatten().long()
    expected = state.code[flat] * scales.repeat_interleave(64)[: flat.numel()]
    assert_bits(found, expected.reshape(weights.shape).numpy())
    if cols % 64 == 0:
        # Of blocks that cross rows, the kernel for CPUs takes the scales of others; some of its zeros have another sign
        # than those of its table, depending on the processor.
        assert_bits(found, own.dequantize_4bit(codes, state).numpy() + np.float32(0))
    held = kind == "nf4" and not nested and cols == 128
    assert told["codec"] == ("nf4_g64_fp16_v1" if held else "raw_v1"), told["reason"]
    assert told["imported"] == f"bitsandbytes {kind}"


def test_eight_bits_of_bitsandbytes_come_in(tmp_path: Path) -> None:
    levels = np.random.default_rng(2).integers(-128, 128, (24, 80), dtype=np.int8)
    scales = np.random.default_rng(3).uniform(0.1, 4, 24).astype(np.float32)
    tensors = {"m.weight": levels, "m.SCB": scales, "m.weight_format": np.zeros((), np.uint8)}
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    found, told = imported(model(tmp_path / "model", {"quantization_config": config}, tensors))
    assert_bits(found, levels.astype(np.float32) * (scales / np.float32(127))[:, None])
    assert (told["codec"], told["imported"]) == ("int8_sym_v1", "bitsandbytes int8")
    # A level that no encoder of tenpak chooses lies in no stream of codes, and is kept all the same.
    tenpak.compress(tmp_path / "model", tmp_path / "coded.tenpak", coded=True)
    assert_bits(tenpak.open(tmp_path / "coded.tenpak").decode("m.weight"), found)


def test_quantizing_again_must_be_allowed(tmp_path: Path) -> None:
    levels = np.random.default_rng(2).integers(-127, 128, (64, 128), dtype=np.int8)
    tensors = {"m.weight": levels, "m.SCB": np.ones(64, np.float32)}
    source = model(tmp_path / "model", {"quantization_config": {"quant_method": "bitsandbytes"}}, tensors)
    output = tmp_path / "m.tenpak"
    wishes: list[dict[str, Any]] = [
        {"codec": "int4_g8_v1"},
        {"target_bits": 3.0},
        {"all": True},
        {"fit": "search"},
        {"exclude": ["x"]},
        {"roles": {"head": "raw_v1"}},
    ]
    for wish in wishes:
        with pytest.raises(tenpak.InvalidError, match="--allow-requantize"):
            tenpak.compress(source, output, **wish)
    assert not output.exists()
    [told] = tenpak.compress(source, output, codec="int4_g8_v1", allow_requantize=True)["tensors"]
    assert (told["codec"], told["imported"], told["loss"]["nmse"] > 0) == ("int4_g8_v1", "bitsandbytes int8", True)
