"""The directory form, to readers that know nothing of the package: the oracle, and the safetensors package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import safetensors
import tenpak
from conftest import Cli, read_safetensors, write_safetensors


def gpt2(folder: Path, rng: np.random.Generator, config: str = '{"model_type": "gpt2"}') -> Path:
    """A model with a weight that is stored transposed, and one of an odd name."""
    folder.mkdir()
    tensors = {
        "h.0.attn.c_attn.weight": rng.standard_normal((64, 96)).astype(np.float32),
        "h.0.attn.c_attn.bias": rng.standard_normal(96).astype(np.float32),
        'odd/n\u00e4me "quoted".weight': rng.standard_normal((3, 70)).astype(np.float16),
        "weight": rng.standard_normal((5, 33)).astype(np.float32),
        "ids": np.arange(3, dtype=np.int64),
    }
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(config)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize("codec", [*oracle.CODECS, oracle.RAW])
def test_the_oracle_joins_what_compress_writes(cli: Cli, tmp_path: Path, rng: np.random.Generator, codec: str) -> None:
    model = gpt2(tmp_path / "m", rng)
    for limit in (10**9, 3000):
        folder, file = tmp_path / f"d{limit}", tmp_path / f"{limit}.tenpak"
        cli("compress", model, "-o", folder, "--codec", codec, "--all", "--max-shard-size", limit)
        cli("compress", model, "-o", file, "--codec", codec, "--all")
        assert oracle.join(folder) == file.read_bytes()
        oracle.read(file.read_bytes())


@pytest.mark.parametrize(
    "config",
    [
        "{}",
        " { } \n",
        '{"a":1}',
        '{"a": [1, "}"],\n "b": {"quantization_config": 2}}\n',
        '{"quantization_config": {}, "z": 1}',
    ],
)
def test_any_config_comes_back_byte_for_byte(cli: Cli, tmp_path: Path, rng: np.random.Generator, config: str) -> None:
    model = gpt2(tmp_path / "m", rng, config)
    cli("compress", model, "-o", tmp_path / "d")
    written = json.loads((tmp_path / "d" / "config.json").read_text())
    assert written["quantization_config"]["quant_method"] == "tenpak"
    for name, value in json.loads(config).items():
        assert written["source_quantization_config" if name == "quantization_config" else name] == value
    assert tenpak.open(tmp_path / "d").files["config.json"].decode() == config
    cli("compress", model, "-o", tmp_path / "a.tenpak")
    assert oracle.join(tmp_path / "d") == (tmp_path / "a.tenpak").read_bytes()


def test_the_safetensors_package_opens_every_shard(tmp_path: Path, sample_model: Path) -> None:
    folder = tmp_path / "d"
    report = tenpak.compress(sample_model, folder, codec="int4_zp_g64_fp16_v1", max_shard_size=200_000)
    artifact = tenpak.open(folder)
    assert {Path(f["path"]).name for f in report["files"]} == {path.name for path in folder.iterdir()}
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    seen = set()
    for shard in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(shard, "np") as opened:
            assert opened.metadata()["format"] == "pt"
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                assert index["weight_map"][name] == shard.name
                seen.add(name)
    assert seen == set(index["weight_map"])
    tensors = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= read_safetensors(shard)
    for name, entry in artifact.items():
        for plane, array in artifact.planes(name).items():
            stored = name if entry.codec == oracle.RAW else f"{name.removesuffix('.weight')}.{plane}"
            assert tensors[stored].shape == array.shape and (tensors[stored] == array).all()


def test_export_goes_both_ways_in_python(cli: Cli, tmp_path: Path, sample_model: Path) -> None:
    file, folder, back = tmp_path / "a.tenpak", tmp_path / "d", tmp_path / "b.tenpak"
    tenpak.compress(sample_model, file)
    plan = tenpak.export(file, folder, max_shard_size=300_000, dry_run=True)
    assert plan["dry_run"] and not folder.exists()
    done = tenpak.export(file, folder, max_shard_size=300_000)
    assert done["files"] == plan["files"] and done["to"] == "hf" and done["identity"] == tenpak.open(file).identity
    assert {Path(f["path"]): f["bytes"] for f in done["files"]} == {p: p.stat().st_size for p in folder.iterdir()}
    tenpak.export(folder, back, "tenpak")
    assert back.read_bytes() == file.read_bytes()
    whole, parts = tenpak.open(file), tenpak.open(folder)
    assert list(whole) == list(parts) and dict(whole.files) == dict(parts.files)
    assert parts.file_bytes == done["bytes"] and parts.verify() == []
    for name in whole:
        assert (whole.decode(name) == parts.decode(name)).all()
    with pytest.raises(tenpak.InvalidError, match="exists"):
        tenpak.export(file, folder)
    with pytest.raises(tenpak.InvalidError, match="expected hf or tenpak"):
        tenpak.export(file, tmp_path / "x", "ggml")
    with pytest.raises(tenpak.InvalidError, match="tenpak compress"):
        tenpak.open(sample_model)
    with pytest.raises(tenpak.UnsupportedError, match="tenpak decompress"):
        tenpak.compress(folder, tmp_path / "x.tenpak")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(tenpak.CorruptError, match=r"'tokenizer\.json' is missing"):
        tenpak.open(folder)


# Written in parts


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_parts_in_any_order_become_the_directory_of_one_process(tmp_path: Path, rng: np.random.Generator) -> None:
    model, how = gpt2(tmp_path / "m", rng), {"codec": "int4_g8_v1", "max_shard_size": 2000}
    whole = tenpak.compress(model, tmp_path / "whole", **how)
    for n in (1, 2, 4):
        for i in reversed(range(1, n + 1)):
            report = tenpak.compress(model, tmp_path / f"d{n}", shard=(i, n), **how)
            assert report["part"] == {"number": i, "of": n}
        merged = tenpak.merge_index(tmp_path / f"d{n}")
        assert merged["identity"] == whole["identity"] and merged["parts"] == n
        assert tree(tmp_path / f"d{n}") == tree(tmp_path / "whole")
    with pytest.raises(tenpak.InvalidError, match="no shard 3/2"):
        tenpak.compress(model, tmp_path / "x", shard=(3, 2))


def test_a_killed_worker_leaves_nothing_that_counts_and_is_run_again(tmp_path: Path, rng: np.random.Generator) -> None:
    model, folder, how = gpt2(tmp_path / "m", rng), tmp_path / "d", {"codec": "int4_g8_v1", "max_shard_size": 2000}
    tenpak.compress(model, folder, shard=(1, 2), **how)
    before = tree(folder)
    code = "import os, sys, tenpak\ndef die(done, total, name):\n    if 2 * done > total: os.kill(os.getpid(), 9)\n"
    code += f"tenpak.compress(sys.argv[1], sys.argv[2], shard=(2, 2), progress=die, **{how})"
    assert subprocess.run([sys.executable, "-c", code, model, folder], check=False).returncode == -9
    assert {name: data for name, data in tree(folder).items() if ".tmp" not in name} == before
    with pytest.raises(tenpak.InvalidError, match="1 of 2 parts are missing.*--shard 2/2"):
        tenpak.merge_index(folder)
    tenpak.compress(model, folder, shard=(2, 2), **how)
    tenpak.merge_index(folder)
    tenpak.compress(model, tmp_path / "whole", **how)
    assert tree(folder) == tree(tmp_path / "whole")
