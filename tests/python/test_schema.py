"""What `--format json` prints, held against `src/cli/schema.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import oracle
import pytest
from conftest import ROOT, Cli, read_safetensors, write_safetensors

SCHEMA = json.loads((ROOT / "src/cli/schema.json").read_text())
VERBS = (
    "compress",
    "decompress",
    "inspect",
    "verify",
    "bench",
    "delta",
    "diff",
    "export",
    "materialize",
    "merge-index",
    "plan",
    "codecs",
    "devices",
    "eval",
)


def assert_valid(report: dict[str, Any], verb: str) -> dict[str, Any]:
    assert report["schema"] == f"tenpak.{verb}/1"
    # Against its own definition, since an error of `oneOf` names every branch.
    own = {"$ref": f"#/$defs/tenpak.{verb}~11", "$defs": SCHEMA["$defs"]}
    jsonschema.Draft202012Validator(own).validate(report)
    jsonschema.Draft202012Validator(SCHEMA).validate(report)
    return report


def objects(node: object) -> Iterator[dict[str, Any]]:
    """Every schema of an object."""
    if isinstance(node, dict):
        if node.get("type") == "object":
            yield node
        for value in node.values():
            yield from objects(value)
    elif isinstance(node, list):
        for value in node:
            yield from objects(value)


@pytest.fixture
def artifact(cli: Cli, tmp_path: Path, sample_model: Path) -> Path:
    path = tmp_path / "base.tenpak"
    cli("compress", sample_model, "-o", path, "--codec", "int4_g32_fp16_v1")
    return path


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert {ref["$ref"] for ref in SCHEMA["oneOf"]} == {f"#/$defs/tenpak.{verb}~11" for verb in VERBS}


def test_every_field_is_described_and_no_other_is_allowed() -> None:
    for schema in objects(SCHEMA["$defs"]):
        if "properties" in schema:
            assert schema["additionalProperties"] is False
            for name, field in schema["properties"].items():
                assert "description" in field or "$ref" in field, name


def test_every_dtype_and_plane_of_the_format_is_known() -> None:
    assert set(SCHEMA["$defs"]["dtype"]["enum"]) == set(oracle.ELEMENT_BYTES)
    own = {plane for codec in oracle.CODECS.values() for plane in codec.planes()}
    assert set(SCHEMA["$defs"]["plane"]["enum"]) == {"data", *own, *oracle.extra_planes(1, 1, True, 1)}


@pytest.mark.parametrize("codec", [*oracle.CODECS, oracle.RAW])
def test_compress_and_its_dry_run_print_what_the_schema_says(
    cli: Cli, tmp_path: Path, sample_model: Path, codec: str
) -> None:
    path = tmp_path / "a.tenpak"
    plan = assert_valid(cli.json("compress", sample_model, "--dry-run", "--codec", codec), "compress")
    done = assert_valid(cli.json("compress", sample_model, "-o", path, "--codec", codec), "compress")
    assert plan["dry_run"] and not done["dry_run"] and plan["output"] is None
    assert done["file_bytes"] == path.stat().st_size
    # Streams reach the size that was asked for from below.
    coded = any("target_bits" in t for t in done["tensors"])
    assert 0 <= plan["file_bytes"] - done["file_bytes"] <= (0.001 * done["file_bytes"] if coded else 0)
    attached = sum(oracle.align(file["bytes"]) for file in done["attached"])
    assert plan["attached"] == done["attached"] and done["total"]["bytes"] == done["file_bytes"] - attached
    assert not {"identity", "seconds", "loss"} & set(plan)
    assert [t["name"] for t in plan["tensors"]] == [t["name"] for t in done["tensors"]]
    artifact = oracle.read(path.read_bytes())
    assert done["identity"] == artifact.header.identity
    assert [(f["name"], f["bytes"]) for f in done["attached"]] == [(f.name, f.bytes) for f in artifact.header.files]
    for tensor in done["tensors"]:
        entry = artifact.entry(tensor["name"])
        assert tensor["stored_bytes"] == sum(p.bytes for p in entry.planes)
        assert tensor["codec"] == entry.codec and tensor["shape"] == list(entry.shape)
    assert ("loss" in done) == any(t["codec"] != oracle.RAW for t in done["tensors"])


def test_the_loss_is_that_of_the_decoded_weights(cli: Cli, tmp_path: Path, sample_model: Path) -> None:
    path = tmp_path / "a.tenpak"
    done = assert_valid(cli.json("compress", sample_model, "-o", path), "compress")
    artifact = oracle.read(path.read_bytes())
    source = read_safetensors(sample_model / "model.safetensors")
    for tensor in done["tensors"]:
        if "loss" not in tensor:
            continue
        weights = source[tensor["name"]].astype(np.float64)
        error = weights - artifact.decode(artifact.entry(tensor["name"])).astype(np.float64)
        # Sums of n terms in double precision, in another order: n units in the last place at most.
        bound = weights.size * 2.0**-52
        nmse = float((error**2).sum() / (weights**2).sum())
        assert tensor["loss"]["nmse"] == pytest.approx(nmse, rel=bound)
        assert tensor["loss"]["rms"] == pytest.approx(float(np.sqrt((error**2).mean())), rel=bound)
        assert tensor["loss"]["max"] == float(np.abs(error).max())
        assert tensor["loss"]["snr_db"] == pytest.approx(-10 * np.log10(nmse))


def test_edge_cases_of_compress_fit_the_schema(cli: Cli, tmp_path: Path) -> None:
    cases: dict[str, dict[str, np.ndarray[Any, Any]]] = {
        "nothing": {},
        "empties": {"a": np.zeros((0, 3), np.float32), "b": np.zeros((), np.float16), "c": np.zeros(0, np.bool_)},
        "exact": {"w": np.ones((4, 64), np.float32), "z": np.zeros((4, 64), np.float32)},
        "repaired": {"w": np.where(np.eye(64) > 0, np.nan, 1).astype(np.float32)},
        "short rows": {"w": np.ones((4, 3), np.float32)},
    }
    for name, tensors in cases.items():
        source = write_safetensors(tmp_path / "s.safetensors", tensors)
        options = ["--all", "--nonfinite", "zero", "--codec", "int4_g32_fp16_v1"]
        path = tmp_path / f"{name}.tenpak"
        plan = assert_valid(cli.json("compress", source, "--dry-run", *options), "compress")
        done = assert_valid(cli.json("compress", source, "-o", path, *options), "compress")
        assert plan["file_bytes"] == done["file_bytes"] == path.stat().st_size, name
        assert_valid(cli.json("inspect", path), "inspect")
        assert_valid(cli.json("verify", path), "verify")
    write_safetensors(source, cases["exact"])
    exact = assert_valid(
        cli.json("compress", source, "-o", tmp_path / "x.tenpak", "--all", "--codec", "int4_g32_fp16_v1"), "compress"
    )
    assert exact["loss"] == {"nmse": 0, "snr_db": None, "rms": 0, "max": 0}


@pytest.mark.parametrize("sort", ["file", "name", "size", "loss"])
def test_sorting_keeps_the_schema(cli: Cli, sample_model: Path, sort: str) -> None:
    report = assert_valid(cli.json("compress", sample_model, "--dry-run", "--per-tensor", "--sort", sort), "compress")
    if sort == "name":
        names = [t["name"] for t in report["tensors"]]
        assert names == sorted(names)
    if sort == "size":
        sizes = [t["stored_bytes"] for t in report["tensors"]]
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("target", ["w.safetensors", "w.npz", "w.json", "folder"])
def test_decompress_prints_what_the_schema_says(cli: Cli, tmp_path: Path, artifact: Path, target: str) -> None:
    out = tmp_path / target
    report = assert_valid(cli.json("decompress", artifact, "-o", out), "decompress")
    assert report["files"]
    for file in report["files"]:
        assert Path(file["path"]).stat().st_size == file["bytes"]


def test_inspect_prints_what_the_schema_says(cli: Cli, artifact: Path) -> None:
    report = assert_valid(cli.json("inspect", artifact), "inspect")
    entries = oracle.read(artifact.read_bytes()).header.tensors
    assert len(report["tensors"]) == len(entries) and "delta" not in report
    for tensor, entry in zip(report["tensors"], entries, strict=True):
        assert tensor["transposed"] == entry.transposed
        got = [(p["plane"], p["offset"], p["bytes"], p["blake3"]) for p in tensor["planes"]]
        assert got == [(p.plane, p.offset, p.bytes, p.blake3) for p in entry.planes]
    files = oracle.read(artifact.read_bytes()).header.files
    got_files = [(f["name"], f["offset"], f["bytes"], f["blake3"]) for f in report["attached"]]
    assert files and got_files == [(f.name, f.offset, f.bytes, f.blake3) for f in files]
    one = assert_valid(cli.json("inspect", artifact, "--tensor", entries[0].name), "inspect")
    assert one["tensors"] == report["tensors"][:1] and one["total"] == report["total"]


def test_verify_prints_what_the_schema_says_of_sound_and_damaged_files(
    cli: Cli, tmp_path: Path, artifact: Path
) -> None:
    data = artifact.read_bytes()
    sound = assert_valid(cli.json("verify", artifact), "verify")
    header = oracle.read(data).header
    assert sound["sound"] and not sound["problems"]
    assert sound["bytes"] == sum(p.bytes for _, p in oracle.contents(header))
    assert sound["chunks"] == sum(len(p.crc32c) // 8 for _, p in oracle.contents(header))
    places = [(e, p) for e in header.tensors for p in e.planes if p.bytes]
    bad = bytearray(data)
    for _, p in places[:: len(places) // 5]:
        bad[p.offset + p.bytes // 2] ^= 0x10
    damaged = tmp_path / "damaged.tenpak"
    damaged.write_bytes(bad)
    report = assert_valid(cli.json("verify", damaged, code=1), "verify")
    assert not report["sound"]
    assert [(p["tensor"], p["plane"], p["chunk"], p["at"]) for p in report["problems"]] == [
        (e.name, p.plane, 0, p.offset) for e, p in places[:: len(places) // 5]
    ]
    file = header.files[-1]
    scratched = bytearray(data)
    scratched[file.offset] ^= 1
    damaged.write_bytes(scratched)
    (found,) = assert_valid(cli.json("verify", damaged, code=1), "verify")["problems"]
    assert (found["tensor"], found["plane"], found["file"], found["chunk"]) == (None, None, file.name, 0)
    last = header.tensors[-1].planes[-1]
    if last.bytes % 64:
        padded = bytearray(data)
        padded[last.offset + last.bytes] = 1
        damaged.write_bytes(padded)
        assert_valid(cli.json("verify", damaged, code=1), "verify")


def test_verify_of_padding_and_digests_fits_the_schema(cli: Cli, tmp_path: Path) -> None:
    tensor = oracle.Tensor("w", "U8", (3,), oracle.RAW, {"data": b"abc"})
    data = bytearray(oracle.write([tensor]))
    data[64 + 3] = 1
    path = tmp_path / "a.tenpak"
    path.write_bytes(data)
    report = assert_valid(cli.json("verify", path, code=1), "verify")
    assert [(p["tensor"], p["chunk"]) for p in report["problems"]] == [("w", None)]


def test_bench_prints_what_the_schema_says(cli: Cli, sample_model: Path, codec_ids: list[str]) -> None:
    report = assert_valid(cli.json("bench", sample_model, "--include", "*layers.0*"), "bench")
    assert [row["codec"] for row in report["codecs"]] == codec_ids
    few = assert_valid(cli.json("bench", sample_model, "--codec", "int8_sym_v1", "--threads", "1"), "bench")
    assert [row["codec"] for row in few["codecs"]] == ["int8_sym_v1"] and few["threads"] == 1
    assert "device" not in few and "device" not in few["codecs"][0]
    few = assert_valid(cli.json("bench", sample_model, "--codec", "int8_sym_v1", "--device", "cpu"), "bench")
    assert few["device"] == "cpu" and few["codecs"][0]["device"]["product_gb_per_s"] > 0


def test_delta_and_materialize_print_what_the_schema_says(
    cli: Cli, tmp_path: Path, artifact: Path, sample_model: Path
) -> None:
    source = read_safetensors(sample_model / "model.safetensors")
    name = next(n for n, a in source.items() if a.ndim == 2)
    source[name] = source[name] * np.float16(1.5)
    variant = write_safetensors(tmp_path / "v.safetensors", source)
    delta, out = tmp_path / "d.tenpak", tmp_path / "r.tenpak"
    report = assert_valid(cli.json("delta", "--base", artifact, variant, "-o", delta), "delta")
    assert [t["name"] for t in report["changed"]] == [name]
    assert report["unchanged"] == len(source) - 1
    assert report["file_bytes"] == delta.stat().st_size and report["base_bytes"] == artifact.stat().st_size
    assert_valid(cli.json("verify", delta), "verify")
    shown = assert_valid(cli.json("inspect", delta), "inspect")
    assert shown["delta"]["result"] == report["result"]
    made = assert_valid(cli.json("materialize", "--base", artifact, "--delta", delta, "-o", out), "materialize")
    assert made["identity"] == report["result"] and made["tensors"] == len(source)
    assert made["file_bytes"] == out.stat().st_size


def test_deltas_of_checkpoints_print_what_the_schema_says(cli: Cli, tmp_path: Path, sample_model: Path) -> None:
    source = read_safetensors(sample_model / "model.safetensors")
    name = next(n for n, a in source.items() if a.ndim == 2)
    source[name] = source[name] * np.float16(1.01)
    variant = write_safetensors(tmp_path / "v.safetensors", source)
    delta, out = tmp_path / "d.tenpak", tmp_path / "r.safetensors"
    for mode, options in (("lossless", ()), ("quantized", ("--codec", "int8_sym_v1"))):
        command = ("delta", "--base", sample_model, variant, "-o", delta, "--force", *options)
        report = assert_valid(cli.json(*command), "delta")
        assert report["mode"] == mode and [t["name"] for t in report["changed"]] == [name]
        assert report["variant_bytes"] == report["base_bytes"] == sum(a.nbytes for a in source.values())
        assert ("loss" in report) == ("loss" in report["alone"]) == (mode == "quantized")
        assert_valid(cli.json("verify", delta), "verify")
        shown = assert_valid(cli.json("inspect", delta), "inspect")
        assert shown["delta"]["checkpoint"] and ("difference" in shown["tensors"][0]) == (mode == "quantized")
        command = ("materialize", "--base", sample_model, "--delta", delta, "-o", out, "--force")
        made = assert_valid(cli.json(*command), "materialize")
        assert made["identity"] == report["result"] and made["tensors"] == len(source)
        assert made["file_bytes"] == out.stat().st_size and [f["path"] for f in made["files"]] == [str(out)]


def test_diff_prints_what_the_schema_says(cli: Cli, tmp_path: Path, sample_model: Path, artifact: Path) -> None:
    assert not assert_valid(cli.json("diff", sample_model, artifact, code=1), "diff")["same"]
    assert assert_valid(cli.json("diff", artifact, artifact), "diff")["same"]
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    write_safetensors(one, {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.int32)}, {"key": "text"})
    write_safetensors(other, {"a": np.ones((3, 2), np.float32), "c": np.ones(4, np.int32)})
    report = assert_valid(cli.json("diff", one, other, code=1), "diff")
    assert report["metadata"] == ["key"]


def test_export_and_a_directory_print_what_the_schema_says(cli: Cli, tmp_path: Path, artifact: Path) -> None:
    folder, back = tmp_path / "d", tmp_path / "b.tenpak"
    plan = assert_valid(cli.json("export", artifact, "--to", "hf", "-o", folder, "--dry-run"), "export")
    done = assert_valid(cli.json("export", artifact, "--to", "hf", "-o", folder), "export")
    assert plan["files"] == done["files"] and plan["dry_run"] and not done["dry_run"]
    assert done["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    back_report = assert_valid(cli.json("export", folder, "--to", "tenpak", "-o", back), "export")
    assert back_report["bytes"] == artifact.stat().st_size and back.read_bytes() == artifact.read_bytes()
    assert_valid(cli.json("verify", folder), "verify")
    shown = assert_valid(cli.json("inspect", folder), "inspect")
    assert shown["tensors"] == cli.json("inspect", artifact)["tensors"] and shown["file_bytes"] == done["bytes"]
    shard = folder / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (problem,) = assert_valid(cli.json("verify", folder, code=1), "verify")["problems"]
    assert problem["file"] == "model.safetensors" and problem["tensor"] is not None


def test_compress_into_a_directory_prints_what_the_schema_says(cli: Cli, tmp_path: Path, sample_model: Path) -> None:
    folder = tmp_path / "d"
    codec = ("--codec", "int4_g32_fp16_v1")
    plan = assert_valid(cli.json("compress", sample_model, "-o", folder, "--dry-run", *codec), "compress")
    done = assert_valid(cli.json("compress", sample_model, "-o", folder, *codec), "compress")
    assert plan["files"] == done["files"] and plan["file_bytes"] == done["file_bytes"]
    assert {Path(f["path"]): f["bytes"] for f in done["files"]} == {p: p.stat().st_size for p in folder.iterdir()}
    assert done["file_bytes"] == sum(f["bytes"] for f in done["files"])


def test_parts_and_what_puts_them_together_print_what_the_schema_says(
    cli: Cli, tmp_path: Path, sample_model: Path
) -> None:
    folder = tmp_path / "d"
    how = ("--codec", "int4_g32_fp16_v1", "--max-shard-size", 100_000)
    for shard in ("1/2", "2/2"):
        plan = assert_valid(
            cli.json("compress", sample_model, "-o", folder, "--dry-run", "--shard", shard, *how), "compress"
        )
        done = assert_valid(cli.json("compress", sample_model, "-o", folder, "--shard", shard, *how), "compress")
        assert plan["files"] == done["files"] and f"{done['part']['number']}/{done['part']['of']}" == shard
        own = folder / f"part-0000{shard[0]}-of-00002"
        assert {Path(f["path"]): f["bytes"] for f in done["files"]} == {p: p.stat().st_size for p in own.iterdir()}
        assert_valid(cli.json("verify", own), "verify")
    merged = assert_valid(cli.json("merge-index", folder), "merge-index")
    assert {Path(f["path"]): f["bytes"] for f in merged["files"]} == {p: p.stat().st_size for p in folder.iterdir()}
    whole = cli.json("compress", sample_model, "-o", tmp_path / "whole", *how)
    assert (merged["identity"], merged["total"]) == (whole["identity"], whole["total"])
    assert assert_valid(cli.json("verify", folder), "verify")["identity"] == whole["identity"]


def test_plan_prints_what_the_schema_says(cli: Cli, sample_model: Path) -> None:
    report = assert_valid(cli.json("plan", sample_model, "--target-bits", 3.5), "plan")
    assert {t["target_bits"] for t in report["tensors"]} == {3.5}
    rated = [p for p in report["points"] if "target_bits" in p]
    assert {p["codec"] for p in rated} == {"ecu_v1"}
    assert {p["codec"] for p in report["points"]} == {"ecu_v1", *oracle.CODECS} - {oracle.RAW}


def test_codecs_print_what_the_schema_says(cli: Cli) -> None:
    report = assert_valid(cli.json("codecs"), "codecs")
    assert len({c["id"] for c in report["codecs"]}) == len(report["codecs"])


def test_devices_print_what_the_schema_says(cli: Cli) -> None:
    report = assert_valid(cli.json("devices"), "devices")
    assert [a["device"] for a in report.get("wgpu", [])] == [f"wgpu:{i}" for i in range(len(report.get("wgpu", [])))]


def test_errors_print_nothing_on_standard_output(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "junk.tenpak").write_bytes(b"junk" * 100)
    for verb in ("inspect", "verify"):
        done = cli(verb, tmp_path / "junk.tenpak", "--format", "json", code=2)
        assert done.stdout == "" and done.stderr.startswith("tenpak: ")
