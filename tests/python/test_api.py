"""The Python package, as a user calls it."""

from __future__ import annotations

import collections.abc
import gc
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import numpy.typing as npt
import oracle
import pytest
import safetensors.numpy
import tenpak
from conftest import NUMPY, Cli, read_safetensors, write_safetensors
from hypothesis import given, settings

Array = npt.NDArray[Any]

FLOATS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
CODECS = [c["id"] for c in tenpak.codecs() if c["id"] != oracle.RAW]


@pytest.fixture
def artifact(tmp_path: Path, sample_model: Path) -> Path:
    path = tmp_path / "model.tenpak"
    tenpak.compress(sample_model, path)
    return path


@pytest.fixture
def weights(rng: np.random.Generator) -> Array:
    return rng.standard_normal((24, 300)).astype(np.float32)


def bits(array: Array) -> bytes:
    return array.tobytes()


def files(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


# Reports


def test_every_verb_returns_the_report_of_the_command_line(cli: Cli, tmp_path: Path, sample_model: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    source = read_safetensors(sample_model / "model.safetensors")
    name = next(n for n, a in source.items() if a.ndim == 2)
    variant = write_safetensors(tmp_path / "v.safetensors", {**source, name: source[name] * np.float16(2)})

    def compare(report: dict[str, Any], *args: object) -> None:
        want = cli.json(*args)
        for side, folder in ((report, ours), (want, theirs)):
            side.pop("seconds", None)
            for key in ("input", "output", "base"):
                if isinstance(side.get(key), str):
                    side[key] = side[key].replace(str(folder), "")
            for file in side.get("files", []):
                file["path"] = file["path"].replace(str(folder), "")
        assert report == want

    compare(tenpak.compress(sample_model, dry_run=True), "compress", sample_model, "--dry-run")
    compare(tenpak.compress(sample_model, ours / "a.tenpak"), "compress", sample_model, "-o", theirs / "a.tenpak")
    compare(tenpak.verify(ours / "a.tenpak"), "verify", theirs / "a.tenpak")
    compare(
        tenpak.decompress(ours / "a.tenpak", ours / "w.safetensors"),
        "decompress", theirs / "a.tenpak", "-o", theirs / "w.safetensors",
    )  # fmt: skip
    compare(
        tenpak.delta(ours / "a.tenpak", variant, ours / "d.tenpak"),
        "delta", "--base", theirs / "a.tenpak", variant, "-o", theirs / "d.tenpak",
    )  # fmt: skip
    compare(
        tenpak.export(ours / "a.tenpak", ours / "hf"),
        "export", theirs / "a.tenpak", "--to", "hf", "-o", theirs / "hf",
    )  # fmt: skip
    compare(tenpak.compress(sample_model, ours / "form"), "compress", sample_model, "-o", theirs / "form")
    compare(
        tenpak.materialize(ours / "a.tenpak", [ours / "d.tenpak"], ours / "r.tenpak"),
        "materialize", "--base", theirs / "a.tenpak", "--delta", theirs / "d.tenpak", "-o", theirs / "r.tenpak",
    )  # fmt: skip
    assert tenpak.codecs() == cli.json("codecs")["codecs"]
    for path in (path for path in ours.rglob("*") if path.is_file()):
        assert path.read_bytes() == (theirs / path.relative_to(ours)).read_bytes(), path
    assert files(ours / "form") == files(theirs / "form") and files(ours / "hf") == files(theirs / "hf")


def test_options_of_compress_choose_codecs(tmp_path: Path, sample_model: Path) -> None:
    out = tmp_path / "a.tenpak"

    def codecs(**options: Any) -> dict[str, str]:
        report = tenpak.compress(sample_model, out, force=True, **options)
        return {t["name"]: t["codec"] for t in report["tensors"]}

    assert set(codecs().values()) == {"ecu_v1", oracle.RAW}
    plain = codecs(codec="int4_g16_fp16_v1")
    assert "int4_g16_fp16_v1" in plain.values()
    roles = codecs(codec="int4_g16_fp16_v1", roles={"attention": "int8_sym_v1"})
    assert all(c == "int8_sym_v1" for n, c in roles.items() if "_proj" in n and "self_attn" in n)
    rules = codecs(rules=[("*.down_proj.weight", "nf4_g64_fp16_v1"), ("re:.*_proj", "int4_g8_v1")])
    assert all(c == "nf4_g64_fp16_v1" for n, c in rules.items() if n.endswith("down_proj.weight"))
    assert all(c == "int4_g8_v1" for n, c in rules.items() if n.endswith("up_proj.weight"))
    few = codecs(include=["*layers.0.*"], exclude=["*mlp*"])
    assert all(c == oracle.RAW for n, c in few.items() if "layers.0" not in n or "mlp" in n)
    everything = codecs(codec="int8_sym_v1", all=True)
    assert set(everything.values()) == {"int8_sym_v1"}
    recipe = tenpak.open(out).provenance["recipe"]
    assert codecs(recipe=recipe) == everything


def test_compress_writes_the_same_bytes_whatever_the_options_of_speed(tmp_path: Path, sample_model: Path) -> None:
    written = set()
    for i, options in enumerate(({}, {"threads": 1}, {"threads": 3}, {"mmap": True}, {"progress": lambda *a: None})):
        tenpak.compress(str(sample_model), str(tmp_path / f"{i}.tenpak"), **options)
        written.add((tmp_path / f"{i}.tenpak").read_bytes())
    assert len(written) == 1


def test_a_run_that_was_stopped_goes_on_with_what_it_had_finished(tmp_path: Path, sample_model: Path) -> None:
    whole, out = tmp_path / "whole.tenpak", tmp_path / "m.tenpak"
    tenpak.compress(sample_model, whole, codec="int4_g16_fp16_v1")
    seen: list[str] = []

    def stop(done: int, total: int, tensor: str) -> None:
        seen.append(tensor)
        if len(set(seen)) == 4:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        tenpak.compress(sample_model, out, codec="int4_g16_fp16_v1", resume=True, progress=stop)
    assert not out.exists()
    assert (tmp_path / "m.tenpak.journal").is_dir()
    with pytest.raises(tenpak.InvalidError, match=r"m\.tenpak\.journal is of a run with another recipe"):
        tenpak.compress(sample_model, out, codec="int4_g32_fp16_v1", resume=True)
    report = tenpak.compress(sample_model, out, codec="int4_g16_fp16_v1", resume=True)
    assert "3 tensors were finished by a run that was stopped" in report["notes"]
    assert out.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "m.tenpak.journal").exists()


def test_a_dry_run_writes_nothing_and_knows_the_length(tmp_path: Path, sample_model: Path) -> None:
    out = tmp_path / "a.tenpak"
    plan = tenpak.compress(sample_model, out, codec="int4_g32_fp16_v1", dry_run=True)
    assert not out.exists() and plan["dry_run"]
    assert (
        tenpak.compress(sample_model, out, codec="int4_g32_fp16_v1")["file_bytes"]
        == plan["file_bytes"]
        == out.stat().st_size
    )


def test_decompress_takes_a_dtype_and_a_shard_size(tmp_path: Path, artifact: Path) -> None:
    read = oracle.read(artifact.read_bytes())
    for kind in ("float32", "F32", "bfloat16"):
        out = tmp_path / f"{kind}.safetensors"
        tenpak.decompress(artifact, out, dtype=kind)
        for name, array in read_safetensors(out).items():
            entry = read.entry(name)
            if entry.codec != oracle.RAW:
                want = read.decode(entry)
                assert bits(array) == bits(want.astype(array.dtype)), name
                assert array.dtype == (np.float32 if kind != "bfloat16" else ml_dtypes.bfloat16)
    report = tenpak.decompress(artifact, tmp_path / "shards", max_shard_size=300_000)
    shards = [f for f in report["files"] if f["path"].endswith(".safetensors")]
    assert len(shards) > 3 and all(f["bytes"] <= 300_000 + 16_384 for f in shards)


def test_what_is_decompressed_is_read_by_the_safetensors_package(tmp_path: Path, artifact: Path) -> None:
    out = tmp_path / "w.safetensors"
    tenpak.decompress(artifact, out)
    want = read_safetensors(out)
    got = safetensors.numpy.load_file(out)
    assert set(got) == set(want)
    assert all(bits(got[name]) == bits(want[name]) for name in want)


# Artifacts


def test_an_artifact_is_a_mapping_of_names_to_entries(artifact: Path) -> None:
    opened = tenpak.open(artifact)
    header = oracle.read(artifact.read_bytes()).header
    assert isinstance(opened, tenpak.Artifact) and isinstance(opened, collections.abc.Mapping)
    assert list(opened) == [e.name for e in header.tensors] and len(opened) == len(header.tensors)
    assert "no such tensor" not in opened and opened.get("no such tensor") is None
    for want, (name, entry) in zip(header.tensors, opened.items(), strict=True):
        assert isinstance(entry, tenpak.Entry) and name in opened
        assert (entry.name, entry.dtype, entry.shape) == (want.name, want.dtype, want.shape)
        assert (entry.codec, entry.transposed) == (want.codec, want.transposed)
        assert (entry.rows, entry.cols) == want.matrix
        assert entry.stored_bytes == sum(p.bytes for p in want.planes)
        assert entry.bits_per_weight == 8 * entry.stored_bytes / np.prod(want.shape)
        assert want.name in repr(entry)
    with pytest.raises(KeyError):
        opened["no such tensor"]
    with pytest.raises(AttributeError):
        opened[header.tensors[0].name].name = "other"  # type: ignore[misc]
    assert str(len(opened)) in repr(opened)


def test_an_artifact_says_where_it_came_from(tmp_path: Path, artifact: Path, sample_model: Path) -> None:
    opened = tenpak.open(str(artifact))
    header = oracle.read(artifact.read_bytes()).header
    assert os.fspath(opened.path) == str(artifact)
    assert opened.file_bytes == artifact.stat().st_size
    assert opened.identity == header.identity
    assert opened.metadata == header.metadata
    assert opened.provenance == header.provenance
    assert opened.delta is None
    opened.metadata["x"] = "y"
    assert opened.metadata == header.metadata
    delta = tmp_path / "d.tenpak"
    tenpak.delta(artifact, sample_model, delta)
    section = tenpak.open(delta).delta
    assert section == {"base": header.identity, "result": header.identity, "runs": [[0, len(header.tensors)]]}


@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])
def test_decode_gives_the_weights_of_the_text(tmp_path: Path, rng: np.random.Generator, mmap: bool) -> None:
    source = {
        f"{dtype}.{codec}": rng.standard_normal((5, 150)).astype(NUMPY[dtype])
        for dtype in oracle.FLOAT_DTYPES
        for codec in (*CODECS, oracle.RAW)
    }
    path = tmp_path / "a.tenpak"
    checkpoint = write_safetensors(tmp_path / "s.safetensors", source)
    tenpak.compress(checkpoint, path, rules=[(name, name.split(".")[1]) for name in source])
    opened, read = tenpak.open(path, mmap=mmap), oracle.read(path.read_bytes())
    for entry in read.header.tensors:
        name = entry.name
        assert entry.codec == name.split(".")[1]
        if entry.codec == oracle.RAW:
            want = source[name]
            assert bits(opened.decode(name, dtype="source")) == bits(want)
            assert opened.decode(name, dtype="source").dtype == want.dtype
            wide = want.astype(np.float32)
        else:
            wide = read.decode(entry)
            restored = opened.decode(name, dtype="source")
            assert restored.dtype == source[name].dtype and bits(restored) == bits(wide.astype(restored.dtype))
        got = opened.decode(name)
        assert got.dtype == np.float32 and got.shape == (5, 150) and got.flags.c_contiguous and got.flags.writeable
        assert bits(got) == bits(wide), name
        for dtype in FLOATS:
            numpy = np.dtype(NUMPY[FLOATS[dtype]])
            for spelled in (dtype, numpy):
                got = opened.decode(name, dtype=spelled)
                # A raw tensor goes through single precision, except as its own dtype.
                same = source[name] if entry.codec == oracle.RAW and numpy == source[name].dtype else wide.astype(numpy)
                assert got.dtype == numpy and bits(got) == bits(same), (name, spelled)


def test_decode_gives_back_orientation_and_every_shape(tmp_path: Path, rng: np.random.Generator) -> None:
    shapes: list[tuple[int, ...]] = [(), (0,), (3,), (0, 4), (4, 0), (2, 3, 40), (1, 1, 1, 1, 1, 1, 1, 9)]
    source: dict[str, Array] = {
        f"x.{i}": np.asarray(rng.standard_normal(shape)).astype(np.float32) for i, shape in enumerate(shapes)
    }
    source["h.0.attn.c_attn.weight"] = rng.standard_normal((64, 96)).astype(np.float32)
    source["ints"] = np.arange(-3, 3, dtype=np.int64)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    write_safetensors(tmp_path / "model.safetensors", source)
    path = tmp_path / "a.tenpak"
    tenpak.compress(tmp_path, path, codec="int8_sym_v1", all=True)
    opened = tenpak.open(path)
    assert opened["h.0.attn.c_attn.weight"].transposed
    read = oracle.read(path.read_bytes())
    for entry in read.header.tensors:
        if entry.codec != oracle.RAW:
            got = opened.decode(entry.name)
            assert got.shape == source[entry.name].shape and bits(got) == bits(read.decode(entry))
    assert bits(opened.decode("ints", dtype="source")) == bits(source["ints"])


def test_decode_fills_an_array_that_fits_and_no_other(artifact: Path) -> None:
    opened = tenpak.open(artifact)
    name = next(n for n, e in opened.items() if e.codec != oracle.RAW)
    shape = opened[name].shape
    out = np.full(shape, np.nan, np.float32)
    assert opened.decode(name, out=out) is out
    assert bits(out) == bits(opened.decode(name))
    half = np.empty(shape, np.float16)
    assert opened.decode(name, dtype="float16", out=half) is half
    frozen = np.empty(shape, np.float32)
    frozen.flags.writeable = False
    wrong = [
        np.empty(shape, np.float64),
        np.empty((*shape, 1), np.float32),
        np.empty(shape[::-1], np.float32).T,
        np.empty((shape[0], 2 * shape[1]), np.float32)[:, ::2],
        np.empty(shape, ">f4"),
        frozen,
    ]
    for other in wrong:
        with pytest.raises(tenpak.InvalidError):
            opened.decode(name, out=other)


@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])
def test_planes_are_read_only_views_of_the_bytes_of_the_file(
    tmp_path: Path, rng: np.random.Generator, mmap: bool
) -> None:
    source: dict[str, Array] = {codec: rng.standard_normal((6, 200)).astype(np.float32) for codec in CODECS}
    for dtype, numpy in NUMPY.items():
        source[f"raw {dtype}"] = np.zeros((2, 3), numpy)
    path = tmp_path / "a.tenpak"
    checkpoint = write_safetensors(tmp_path / "s.safetensors", source)
    tenpak.compress(checkpoint, path, rules=[*((c, c) for c in CODECS), ("raw *", oracle.RAW)])
    opened, read = tenpak.open(path, mmap=mmap), oracle.read(path.read_bytes())
    for entry in read.header.tensors:
        planes = opened.planes(entry.name)
        assert list(planes) == [p.plane for p in entry.planes]
        for plane, view in planes.items():
            assert bits(view) == read.plane(entry, plane), (entry.name, plane)
            assert not view.flags.writeable and not view.flags.owndata and view.flags.c_contiguous
            with pytest.raises(ValueError, match="read-only"):
                view[...] = 0
            with pytest.raises(ValueError):
                view.flags.writeable = True
            if entry.codec == oracle.RAW:
                assert view.shape == entry.shape and view.dtype == source[entry.name].dtype
                continue
            codec = oracle.CODECS[entry.codec]
            rows, cols = entry.matrix
            if plane not in codec.floats():
                assert view.dtype == np.uint8 and view.shape == (rows, codec.row_bytes(plane, cols))
            else:
                assert view.dtype == (np.float16 if codec.floats()[plane] == "F16" else np.float32)
                assert view.shape == (rows, 1 if plane == "row_scales" else codec.groups(cols))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see what is mapped")
def test_planes_of_a_mapped_artifact_are_the_file_itself(tmp_path: Path, sample_model: Path) -> None:
    artifact = tmp_path / "plain.tenpak"
    tenpak.compress(sample_model, artifact, codec="int4_g32_fp16_v1")
    opened = tenpak.open(artifact, mmap=True)
    name = next(n for n, e in opened.items() if e.codec != oracle.RAW)
    view = opened.planes(name)["codes"]
    at = view.__array_interface__["data"][0]
    ranges = [
        tuple(int(x, 16) for x in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(artifact))
    ]
    assert any(first <= at and at + view.nbytes <= last for first, last in ranges)


def test_views_outlive_their_artifact(artifact: Path) -> None:
    opened = tenpak.open(artifact)
    read = oracle.read(artifact.read_bytes())
    views = {name: opened.planes(name) for name in opened}
    entry = opened[read.header.tensors[0].name]
    del opened
    gc.collect()
    artifact.unlink()
    for want in read.header.tensors:
        for plane, view in views[want.name].items():
            assert bits(view) == read.plane(want, plane)
    assert entry.name == read.header.tensors[0].name


def test_a_slice_keeps_the_memory_alive(artifact: Path) -> None:
    name = next(n for n, e in tenpak.open(artifact).items() if e.codec != oracle.RAW)
    corner = tenpak.open(artifact).planes(name)["scales"][1:3, ::2]
    gc.collect()
    assert np.isfinite(corner).all()


def test_verify_lists_what_is_damaged(tmp_path: Path, artifact: Path) -> None:
    opened = tenpak.open(artifact)
    assert opened.verify() == [] and tenpak.verify(artifact)["sound"]
    data = bytearray(artifact.read_bytes())
    entry = oracle.read(bytes(data)).header.tensors[2]
    data[entry.planes[0].offset] ^= 1
    bad = tmp_path / "bad.tenpak"
    bad.write_bytes(data)
    damaged = tenpak.open(bad)
    (problem,) = damaged.verify()
    assert (problem["tensor"], problem["plane"], problem["chunk"]) == (entry.name, entry.planes[0].plane, 0)
    report = tenpak.verify(bad)
    assert not report["sound"] and report["problems"] == [problem]
    with pytest.raises(tenpak.CorruptError, match=entry.planes[0].plane):
        damaged.decode(entry.name)
    with pytest.raises(tenpak.CorruptError):
        damaged.planes(entry.name)
    sound = next(n for n in damaged if n != entry.name)
    assert bits(damaged.decode(sound)) == bits(opened.decode(sound))


def test_bfloat16_is_uint16_where_ml_dtypes_is_missing(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "a.tenpak"
    source = {
        "bf16": rng.standard_normal((2, 64)).astype(ml_dtypes.bfloat16),
        "fp8": rng.standard_normal((2, 64)).astype(ml_dtypes.float8_e4m3fn),
    }
    tenpak.compress(write_safetensors(tmp_path / "s.safetensors", source), path, codec=oracle.RAW)
    code = f"""
import sys
sys.modules["ml_dtypes"] = None
import numpy as np, tenpak
a = tenpak.open({str(path)!r})
for name, dtype in (("bf16", np.uint16), ("fp8", np.uint8)):
    for got in (a.decode(name, dtype="source"), a.planes(name)["data"]):
        assert got.dtype == dtype and got.shape == (2, 64), got.dtype
        print(got.tobytes().hex())
assert a.decode("bf16", dtype="bfloat16").dtype == np.uint16
assert tenpak.encode(np.ones((1, 8), np.float32), "int8_sym_v1").decode("bfloat16").dtype == np.uint16
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [bits(source[n]).hex() for n in ("bf16", "bf16", "fp8", "fp8")]


# Arrays


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec != "ecu_v1"])
def test_encode_gives_the_planes_that_compress_stores(tmp_path: Path, weights: Array, codec: str) -> None:
    encoded = tenpak.encode(weights, codec)
    path = tmp_path / "a.tenpak"
    tenpak.compress(write_safetensors(tmp_path / "s.safetensors", {"w": weights}), path, codec=codec, all=True)
    stored = tenpak.open(path).planes("w")
    assert isinstance(encoded, tenpak.Encoded) and encoded.codec == codec
    assert (encoded.shape, encoded.rows, encoded.cols) == ((24, 300), 24, 300)
    assert encoded.bits_per_weight == tenpak.open(path)["w"].bits_per_weight
    assert list(encoded.planes) == list(stored)
    for plane, array in encoded.planes.items():
        assert array.dtype == stored[plane].dtype and array.shape == stored[plane].shape
        assert bits(array) == bits(stored[plane])
    want = tenpak.open(path).decode("w")
    assert bits(encoded.decode()) == bits(want) == bits(tenpak.decode(encoded))
    for dtype in FLOATS:
        got = tenpak.decode(encoded, dtype=dtype)
        assert got.dtype == NUMPY[FLOATS[dtype]] and bits(got) == bits(want.astype(got.dtype))
    out = np.empty_like(want)
    assert tenpak.decode(encoded, out=out) is out and bits(out) == bits(want)
    assert codec in repr(encoded)


@pytest.mark.parametrize("dtype", [*FLOATS.values(), "F8_E4M3", "F8_E5M2"])
def test_encode_takes_every_float_as_its_single(weights: Array, dtype: str) -> None:
    narrow = weights.astype(NUMPY[dtype])
    want = tenpak.encode(narrow.astype(np.float32), "int4_g16_fp16_v1").planes
    got = tenpak.encode(narrow, "int4_g16_fp16_v1").planes
    assert all(bits(got[plane]) == bits(want[plane]) for plane in want)


def test_encode_takes_any_memory_layout(weights: Array) -> None:
    codec = "int4_g8_fp16_v1"
    big = np.repeat(np.repeat(weights, 2, axis=0), 3, axis=1)
    offset = np.frombuffer(b"x" + bits(weights), np.uint8)[1:].view(np.float32).reshape(weights.shape)
    assert not offset.flags.aligned
    layouts = {
        "fortran": np.asfortranarray(weights),
        "strided": big[::2, ::3],
        "backwards": weights[::-1, ::-1].copy()[::-1, ::-1],
        "big-endian": weights.astype(">f4"),
        "unaligned": offset,
        "read-only": np.frombuffer(bits(weights), np.float32).reshape(weights.shape),
    }
    want = tenpak.encode(weights, codec).planes
    for name, array in layouts.items():
        got = tenpak.encode(array, codec).planes
        assert all(bits(got[plane]) == bits(want[plane]) for plane in want), name


@pytest.mark.parametrize("shape", [(), (0,), (5,), (0, 7), (7, 0), (2, 3, 20)])
@pytest.mark.parametrize("codec", ["int8_sym_v1", "int4_g8_fp16_v1", "int4_zp_g32_fp16_v1"])
def test_encode_keeps_the_shape(rng: np.random.Generator, shape: tuple[int, ...], codec: str) -> None:
    array = np.asarray(rng.standard_normal(shape)).astype(np.float32)
    encoded = tenpak.encode(array, codec)
    assert encoded.shape == shape and encoded.decode().shape == shape
    assert (encoded.rows, encoded.cols) == oracle.matrix(shape, False)
    assert np.isfinite(encoded.bits_per_weight)
    for plane in encoded.planes.values():
        assert plane.shape[0] == encoded.rows


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8, np.uint64, np.bool_, np.complex64])
def test_arrays_that_are_not_floats_are_refused(dtype: npt.DTypeLike) -> None:
    with pytest.raises(tenpak.InvalidError, match="float32"):
        tenpak.encode(np.zeros((4, 8), dtype), "int8_sym_v1")


def test_uint16_is_refused_with_the_way_to_say_bfloat16(weights: Array) -> None:
    as_bits = weights.astype(ml_dtypes.bfloat16).view(np.uint16)
    with pytest.raises(tenpak.InvalidError, match=r"view\(ml_dtypes\.bfloat16\)"):
        tenpak.encode(as_bits, "int8_sym_v1")
    tenpak.encode(as_bits.view(ml_dtypes.bfloat16), "int8_sym_v1")


@settings(max_examples=300, deadline=None)
@given(data=st.data(), codec=st.sampled_from(CODECS))
def test_any_array_is_encoded_as_the_text_says(data: st.DataObject, codec: str) -> None:
    array = data.draw(
        arrays.arrays(
            np.float32,
            st.tuples(st.integers(1, 4), st.integers(1, 40)),
            elements=st.floats(-(2.0**15), 2.0**15, width=32),
            fill=st.nothing(),
        )
    )
    try:
        encoded = tenpak.encode(array, codec)
    except tenpak.InvalidError as e:
        assert "range" in str(e)
        return
    layout, cols = oracle.CODECS[codec], array.shape[1]
    packed = {name: plane.view(np.uint8).reshape(array.shape[0], -1) for name, plane in encoded.planes.items()}
    assert bits(encoded.decode()) == bits(oracle.decode_matrix(layout, packed, cols))
    codes = oracle.encode(layout, array, oracle.parameters(layout, packed, cols))
    assert np.array_equal(oracle.unpack_codes(layout, packed, cols), codes)


# Errors


def test_exceptions_form_the_documented_tree() -> None:
    for name in ("InvalidError", "CorruptError", "UnsupportedError", "LimitError", "NonfiniteError"):
        assert issubclass(getattr(tenpak, name), tenpak.TenpakError)
    assert issubclass(tenpak.InvalidError, ValueError)
    assert issubclass(tenpak.NonfiniteError, tenpak.InvalidError)
    assert issubclass(tenpak.TenpakError, Exception) and not issubclass(tenpak.TenpakError, OSError)


def test_errors_are_of_the_class_that_says_who_acts(tmp_path: Path, artifact: Path, sample_model: Path) -> None:
    data = artifact.read_bytes()

    def opened(content: bytes) -> None:
        (tmp_path / "x.tenpak").write_bytes(content)
        tenpak.open(tmp_path / "x.tenpak")

    def sealed(at: int, replaced: bytes) -> bytes:
        front = data[:at] + replaced + data[at + len(replaced) : 60]
        return front + struct.pack("<I", oracle.crc32c(front)) + data[64:]

    out = tmp_path / "new.tenpak"
    bad_recipe = '[[[ "'
    cases: list[tuple[type[BaseException], Any]] = [
        (FileNotFoundError, lambda: tenpak.open(tmp_path / "missing")),
        (FileNotFoundError, lambda: tenpak.verify(tmp_path / "missing")),
        (FileNotFoundError, lambda: tenpak.compress(tmp_path / "missing", out)),
        (FileNotFoundError, lambda: tenpak.compress(sample_model, tmp_path / "no" / "folder.tenpak")),
        (FileNotFoundError, lambda: tenpak.decompress(tmp_path / "missing", tmp_path / "w.npz")),
        (FileNotFoundError, lambda: tenpak.delta(tmp_path / "missing", sample_model, out)),
        (FileNotFoundError, lambda: tenpak.materialize(artifact, [tmp_path / "missing"], out)),
        (tenpak.CorruptError, lambda: opened(b"")),
        (tenpak.CorruptError, lambda: opened(data[:-1])),
        (tenpak.CorruptError, lambda: opened(data + b"x")),
        (tenpak.CorruptError, lambda: opened(data[:20] + b"\xff" + data[21:])),
        (tenpak.UnsupportedError, lambda: opened(sealed(8, b"\2"))),
        (tenpak.UnsupportedError, lambda: opened(sealed(12, b"\x10"))),
        (tenpak.LimitError, lambda: opened(sealed(16, struct.pack("<Q", 1 << 40)))),
        (tenpak.UnsupportedError, lambda: tenpak.encode(np.ones((1, 8), np.float32), "int3_v9")),
        (tenpak.UnsupportedError, lambda: tenpak.compress(sample_model, out, codec="int3_v9")),
        (tenpak.InvalidError, lambda: tenpak.compress(sample_model, out, nonfinite="ignore")),
        (tenpak.InvalidError, lambda: tenpak.compress(sample_model, out, roles={"attentoin": "int8_sym_v1"})),
        (tenpak.InvalidError, lambda: tenpak.compress(sample_model, out, recipe=bad_recipe)),
        (tenpak.InvalidError, lambda: tenpak.compress(sample_model, out, include=["re:("])),
        (tenpak.InvalidError, lambda: tenpak.compress(sample_model)),
        (tenpak.InvalidError, lambda: tenpak.compress(sample_model, artifact)),
        (tenpak.InvalidError, lambda: tenpak.compress(sample_model, sample_model / "model.safetensors", force=True)),
        (tenpak.InvalidError, lambda: tenpak.decompress(artifact, tmp_path / "w.gguf", dtype="float3")),
        (tenpak.InvalidError, lambda: tenpak.materialize(artifact, [artifact], out)),
        (tenpak.InvalidError, lambda: tenpak.materialize(artifact, [], out)),
        (tenpak.InvalidError, lambda: tenpak.delta(artifact, sample_model, out, epsilon=-1.0)),
        (tenpak.InvalidError, lambda: tenpak.encode(np.ones((1, 8), np.float32), oracle.RAW)),
        (tenpak.NonfiniteError, lambda: tenpak.encode(np.array([[1, np.nan]], np.float32), "int8_sym_v1")),
        (tenpak.NonfiniteError, lambda: tenpak.encode(np.array([[1, np.inf]], np.float64), "int8_sym_v1")),
        (tenpak.InvalidError, lambda: tenpak.encode(np.array([[0, 1e9]], np.float64), "int4_g8_fp16_v1")),
        (KeyError, lambda: tenpak.open(artifact).decode("missing")),
        (KeyError, lambda: tenpak.open(artifact).planes("missing")),
        (TypeError, lambda: tenpak.open(3)),  # type: ignore[arg-type]
    ]
    before = files(tmp_path)
    original = (sample_model / "model.safetensors").read_bytes()
    for i, (expected, call) in enumerate(cases):
        try:
            call()
        except BaseException as e:
            assert type(e) is expected, f"case {i}: {type(e).__name__}: {e}, expected {expected.__name__}"
            assert str(e), i
        else:
            pytest.fail(f"case {i}: expected {expected.__name__}")
    assert files(tmp_path) - before <= {"x.tenpak"}
    assert artifact.read_bytes() == data
    assert (sample_model / "model.safetensors").read_bytes() == original


def test_a_url_is_a_local_path_or_an_error_that_says_how_to_read_it(tmp_path: Path, artifact: Path) -> None:
    assert tenpak.open(artifact.as_uri()).identity == tenpak.open(artifact).identity
    for url in ("s3://bucket/model", "https://host/model", Path("gs://bucket/model")):
        for work in (tenpak.open, tenpak.verify, lambda url: tenpak.compress(url, tmp_path / "x.tenpak")):
            with pytest.raises(tenpak.UnsupportedError, match="features python,objects"):
                work(url)
        with pytest.raises(tenpak.UnsupportedError, match="features python,objects"):
            tenpak.decompress(artifact, url)
    with pytest.raises(tenpak.InvalidError, match="s3://"):
        tenpak.open("ftp://bucket/model")


def test_errors_of_the_system_keep_number_and_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        tenpak.open(tmp_path / "missing")
    assert caught.value.errno == 2 and str(tmp_path / "missing") == caught.value.filename
    assert str(caught.value).count("No such file") == 1 and "os error" not in str(caught.value)


def test_a_full_disk_is_an_error_of_the_system(sample_model: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with pytest.raises((OSError, tenpak.InvalidError)):
        tenpak.compress(sample_model, "/dev/full", force=True)
    assert Path("/dev/full").is_char_device()


def test_an_existing_output_is_replaced_only_when_asked(tmp_path: Path, artifact: Path, sample_model: Path) -> None:
    target = tmp_path / "target.tenpak"
    target.write_text("precious")
    calls = [
        lambda **force: tenpak.compress(sample_model, target, **force),
        lambda **force: tenpak.delta(artifact, sample_model, target, **force),
        lambda **force: tenpak.materialize(artifact, tmp_path / "d.tenpak", target, **force),
    ]
    tenpak.delta(artifact, sample_model, tmp_path / "d.tenpak")
    for call in calls:
        target.write_text("precious")
        with pytest.raises(tenpak.InvalidError):
            call()
        assert target.read_text() == "precious"
        call(force=True)
        assert tenpak.verify(target)["sound"]


# Progress, threads, signals


def test_progress_is_told_in_order(tmp_path: Path, artifact: Path, sample_model: Path) -> None:
    calls: dict[str, list[tuple[int, int, str]]] = {}

    def watch(verb: str) -> Any:
        calls[verb] = []
        main = threading.get_ident()

        def progress(done: int, total: int, tensor: str) -> None:
            assert threading.get_ident() == main
            calls[verb].append((done, total, tensor))

        return progress

    delta = tmp_path / "d.tenpak"
    tenpak.compress(sample_model, tmp_path / "a.tenpak", progress=watch("compress"))
    tenpak.decompress(artifact, tmp_path / "w.safetensors", progress=watch("decompress"))
    tenpak.verify(artifact, progress=watch("verify"))
    tenpak.open(artifact).verify(progress=watch("Artifact.verify"))
    tenpak.delta(artifact, sample_model, delta, progress=watch("delta"))
    tenpak.materialize(artifact, [delta], tmp_path / "r.tenpak", progress=watch("materialize"))
    names = list(tenpak.open(artifact))
    for verb, seen in calls.items():
        assert seen, verb
        done = [d for d, _, _ in seen]
        assert done == sorted(done), verb
        assert len({total for _, total, _ in seen}) == 1 and done[-1] == seen[-1][1], verb
        tensors = list(dict.fromkeys(t for _, _, t in seen))
        assert all(type(d) is int and type(t) is str for d, _, t in seen)
        if "verify" not in verb:
            assert tensors == [n for n in names if n in tensors], verb


class Stop(Exception):
    pass


@pytest.mark.parametrize("when", [0, 1, 5, -1])
def test_an_exception_of_progress_stops_the_work_and_leaves_nothing(
    tmp_path: Path, artifact: Path, sample_model: Path, when: int
) -> None:
    delta = tmp_path / "d.tenpak"
    tenpak.delta(artifact, sample_model, delta)
    work = tmp_path / "work"
    work.mkdir()
    verbs = {
        "compress": lambda progress: tenpak.compress(sample_model, work / "a.tenpak", progress=progress),
        "decompress": lambda progress: tenpak.decompress(artifact, work / "w.safetensors", progress=progress),
        "folder": lambda progress: tenpak.decompress(
            artifact, work / "folder", progress=progress, max_shard_size=300_000
        ),
        "form": lambda progress: tenpak.compress(sample_model, work / "form", progress=progress),
        "export": lambda progress: tenpak.export(artifact, work / "form", max_shard_size=300_000, progress=progress),
        "verify": lambda progress: tenpak.verify(artifact, progress=progress),
        "delta": lambda progress: tenpak.delta(artifact, sample_model, work / "d.tenpak", progress=progress),
        "materialize": lambda progress: tenpak.materialize(artifact, delta, work / "r.tenpak", progress=progress),
    }
    for verb, call in verbs.items():
        count = 0

        def counting(*_: object) -> None:
            nonlocal count
            count += 1

        call(counting)
        for path in sorted(work.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        last = (count - 1) if when == -1 else min(when, count - 1)
        reason = Stop(verb)
        left = last

        def stopping(*_: object, reason: Stop = reason) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise reason

        with pytest.raises(Stop) as caught:
            call(stopping)
        assert caught.value is reason and left == -1, f"{verb}: called again after it had raised"
        assert files(work) == set(), verb


def test_the_interpreter_runs_on_while_weights_are_encoded(rng: np.random.Generator) -> None:
    array = rng.standard_normal((2048, 4096)).astype(np.float32)
    encoded = tenpak.encode(array, "int4_opt_v1")
    ticks, stop = 0, False

    def tick() -> None:
        nonlocal ticks
        while not stop:
            ticks += 1
            time.sleep(0)

    other = threading.Thread(target=tick)
    other.start()
    try:
        for work in (lambda: tenpak.encode(array, "int4_opt_v1"), encoded.decode):
            started = time.monotonic()
            before = ticks
            while time.monotonic() - started < 0.3:
                work()
            # Each call would otherwise give way only when it returns: a handful of times.
            assert ticks - before > 100
    finally:
        stop = True
        other.join()


def test_one_artifact_serves_many_threads(artifact: Path) -> None:
    opened = tenpak.open(artifact)
    want = {name: bits(tenpak.open(artifact).decode(name)) for name in opened}

    def read(name: str) -> bool:
        planes = opened.planes(name)
        return bits(opened.decode(name)) == want[name] and all(p.nbytes >= 0 for p in planes.values())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, list(opened) * 8))


def test_many_threads_encode_at_once(weights: Array) -> None:
    want = {codec: bits(tenpak.encode(weights, codec).decode()) for codec in CODECS}
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda codec: bits(tenpak.encode(weights, codec).decode()) == want[codec], CODECS * 10)
        assert all(results)


def wait_for(pid: int, seconds: float = 60) -> int:
    """Give the exit code of a child, and kill one that hangs."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    pytest.fail("the child hangs")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_works(tmp_path: Path, artifact: Path, sample_model: Path, weights: Array) -> None:
    encoded = tenpak.encode(weights, "int4_g32_fp16_v1")
    want = bits(encoded.decode())
    opened = tenpak.open(artifact)
    name = next(iter(opened))
    decoded = bits(opened.decode(name))
    for i in range(10):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                good = bits(tenpak.encode(weights, "int4_g32_fp16_v1").decode()) == want
                good &= bits(opened.decode(name)) == decoded
                if i == 0:
                    tenpak.compress(sample_model, tmp_path / "child.tenpak")
                    good &= (tmp_path / "child.tenpak").read_bytes() == artifact.read_bytes()
                code = 0 if good else 2
            finally:
                os._exit(code)
        assert wait_for(pid) == 0
        assert bits(encoded.decode()) == want


def large_checkpoint(folder: Path) -> Path:
    """A checkpoint of 2 GiB of zeros that takes no room, where files may have holes."""
    path = folder / "large.safetensors"
    size = 2 << 30
    header = (
        f'{{"model.layers.0.mlp.up_proj.weight":{{"dtype":"F32","shape":[131072,4096],"data_offsets":[0,{size}]}}}}'
    )
    text = header.encode() + b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + size)
    return path


@pytest.mark.parametrize("progress", ["None", "lambda *a: None"])
def test_ctrl_c_stops_a_long_compress_and_leaves_nothing(tmp_path: Path, progress: str) -> None:
    source = large_checkpoint(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    code = f"""
import os, signal, threading, tenpak
threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try:
    tenpak.compress({str(source)!r}, {str(out / "a.tenpak")!r}, codec="int4_g32_fp16_v1", progress={progress})
except KeyboardInterrupt:
    print("stopped")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stdout, f"it was not stopped: {done.stderr}"
    assert files(out) == set(), "it was stopped only when it had written all"


def test_ctrl_c_stops_the_console_script_with_130(tmp_path: Path) -> None:
    source = large_checkpoint(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    target = ["-o", str(out / "a.tenpak"), "--codec", "int4_g32_fp16_v1"]
    command = [sys.executable, "-m", "tenpak.cli", "compress", str(source), *target]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 20
    while time.monotonic() < until and b"tenpak" not in b"".join(
        p.read_bytes() for p in [Path(f"/proc/{child.pid}/maps")] if p.exists()
    ):
        time.sleep(0.01)
    time.sleep(0.3)
    assert child.poll() is None, "it was done before it could be stopped"
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=60)
    assert child.returncode == 130, (stdout, stderr)
    assert files(out) == set(), "it was stopped only when it had written all"


def test_the_console_script_is_the_command_line(cli: Cli) -> None:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tenpak.cli", *args]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run("codecs", "--format", "json").stdout == cli("codecs", "--format", "json").stdout
    assert run("--version").stdout.split() == ["tenpak", tenpak.__version__]
    assert run("verify", "/nowhere").returncode == 2
    assert run("nonsense").returncode == 2


def test_importing_it_imports_nothing_heavy_and_numpy_when_it_is_asked_for() -> None:
    code = """
import sys
before = set(sys.modules)
import tenpak, tenpak.cli
print(*sorted({m.partition(".")[0] for m in set(sys.modules) - before}))
assert set(tenpak.__all__) - set(dir(tenpak)) == set(tenpak._WITH_NUMPY)
assert all(callable(getattr(tenpak, name)) for name in tenpak._WITH_NUMPY) and "numpy" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    roots = set(done.stdout.split())
    assert roots - set(sys.stdlib_module_names) == {"tenpak"}
    assert not roots & {"asyncio", "multiprocessing", "http", "email", "tkinter", "unittest"}
    with pytest.raises(AttributeError, match="module 'tenpak' has no attribute 'nothing'"):
        _ = tenpak.nothing


def test_files_of_the_model_are_read_by_name(artifact: Path, sample_model: Path, tmp_path: Path) -> None:
    files = tenpak.open(artifact).files
    assert list(files) == ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert len(files) == 4 and "config.json" in files
    for name, content in files.items():
        assert content == (sample_model / name).read_bytes()
    with pytest.raises(KeyError):
        files["modeling.py"]
    place = next(f for f in oracle.read(artifact.read_bytes()).header.files if f.name == "tokenizer.json")
    data = bytearray(artifact.read_bytes())
    data[place.offset] ^= 1
    damaged = tmp_path / "damaged.tenpak"
    damaged.write_bytes(data)
    with pytest.raises(tenpak.CorruptError, match=r"file 'tokenizer\.json'"):
        tenpak.open(damaged).files["tokenizer.json"]
    (problem,) = tenpak.open(damaged).verify()
    assert problem["file"] == "tokenizer.json" and problem["tensor"] is None
