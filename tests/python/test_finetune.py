"""Deltas of checkpoints: what the text of the format says of them, and what the Python functions do."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import oracle
import pytest
import tenpak
from conftest import ROOT, dtype_name, read_safetensors, write_safetensors

Arrays = dict[str, npt.NDArray[np.generic]]
GOLDEN = ROOT / "tests/data/deltas"


def tensors(arrays: Arrays) -> dict[str, oracle.RawTensor]:
    """Give the tensors of a checkpoint as the oracle takes them."""
    return {n: oracle.RawTensor(dtype_name(a), a.shape, a.tobytes()) for n, a in arrays.items()}


def model(rng: np.random.Generator) -> Arrays:
    """Make a model of every dtype that differences are added in, and of some others."""
    out: Arrays = {
        f"{dtype.__name__}.up_proj.weight": rng.standard_normal((9, 70)).astype(dtype)
        for dtype in (np.float16, np.float32, ml_dtypes.bfloat16, np.float64, ml_dtypes.float8_e4m3fn)
    }
    out["ids"] = rng.integers(-1000, 1000, (5, 7), np.int32)
    out["norm.weight"] = rng.standard_normal(300).astype(np.float16)
    out["long.weight"] = rng.standard_normal((66, 1000)).astype(ml_dtypes.bfloat16)
    return out


def tuned(base: Arrays, rng: np.random.Generator, by: float) -> Arrays:
    """Move every float a little, and a few of them to the end of their range."""
    out: Arrays = {}
    for name, array in base.items():
        if array.dtype.kind == "i":
            out[name] = array + 1
            continue
        moved = array.astype(np.float64) + by * rng.standard_normal(array.shape)
        out[name] = moved.astype(array.dtype)
    out["float16.up_proj.weight"][0, :3] = [65504, -65504, 0]
    return out


@pytest.mark.parametrize(
    "how", [{}, {"codec": "int4_g32_fp16_v1"}, {"target_bits": 2.5}], ids=["lossless", "int4", "ecu"]
)
def test_the_oracle_restores_what_materialize_does(
    tmp_path: Path, rng: np.random.Generator, how: dict[str, object]
) -> None:
    """Three implementations agree to the bit: the text, the writer that measured, and the reader."""
    first = model(rng)
    base, variant = tmp_path / "base.safetensors", tmp_path / "variant.safetensors"
    delta, out = tmp_path / "d.tenpak", tmp_path / "out.safetensors"
    second = tuned(first, rng, 0.01)
    write_safetensors(base, first)
    write_safetensors(variant, second)
    report = tenpak.delta(base, variant, delta, **how)  # type: ignore[arg-type]
    restored = oracle.fine_tuned(tensors(first), oracle.read(delta.read_bytes()))
    made = tenpak.materialize(base, delta, out)
    got = tensors(read_safetensors(out))
    assert got == restored
    assert made["identity"] == report["result"] == oracle.checkpoint_identity(got)
    assert (got == tensors(second)) == (not how)
    if how:
        assert 0 < report["loss"]["nmse"] < report["alone"]["loss"]["nmse"]
    with pytest.raises(tenpak.InvalidError, match="wrong base"):
        tenpak.materialize(variant, delta, tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


def test_a_directory_comes_back_with_its_files_and_bit_for_bit(tmp_path: Path, sample_model: Path) -> None:
    source = read_safetensors(sample_model / "model.safetensors")
    variant = tmp_path / "variant"
    variant.mkdir()
    moved = {n: (a.astype(np.float32) * 1.001).astype(a.dtype) for n, a in source.items()}
    write_safetensors(variant / "model.safetensors", moved, {"format": "pt"})
    for file in sample_model.glob("*.json"):
        (variant / file.name).write_bytes(file.read_bytes())
    (variant / "config.json").write_text((sample_model / "config.json").read_text().replace("{", '{"note": 1,', 1))
    report = tenpak.delta(sample_model, variant, tmp_path / "d.tenpak")
    tenpak.materialize(sample_model, tmp_path / "d.tenpak", tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in variant.iterdir()}
    for file in variant.glob("*.json"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    got = read_safetensors(tmp_path / "out/model.safetensors")
    assert tensors(got) == tensors(moved)
    attached = sum(p.stat().st_size for p in variant.glob("*.json"))
    assert 2 * (report["file_bytes"] - attached) < report["variant_bytes"]


@pytest.mark.parametrize("name", ["lossless", "quantized"])
def test_the_oracle_reads_the_golden_deltas(name: str) -> None:
    base = tensors(read_safetensors(GOLDEN / "base.safetensors"))
    want = tensors(read_safetensors(GOLDEN / f"{name}.safetensors"))
    assert oracle.fine_tuned(base, oracle.read((GOLDEN / f"{name}.tenpak").read_bytes())) == want
