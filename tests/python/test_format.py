"""The artifact format, held against the independent implementation of its text in `oracle`."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import oracle
import pytest
from conftest import NUMPY, Cli, dtype_name, read_safetensors, write_safetensors

Array = npt.NDArray[Any]

CAMPAIGN = int(os.environ.get("TENPAK_CAMPAIGN", "1000"))

SHAPES = [
    (),
    (0,),
    (1,),
    (7,),
    (300,),
    (0, 5),
    (5, 0),
    (3, 0, 4),
    (1, 1),
    (3, 8),
    (5, 129),
    (2, 3, 33),
    (4, 257),
    (1, 2, 1, 2, 1, 2, 1, 135),
]

F16 = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
FINITE_F16 = F16[np.isfinite(F16)]


def random_array(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Array:
    """Make up a finite tensor of a kind that models have, or that breaks encoders."""
    numpy = np.dtype(NUMPY[dtype])
    if dtype == "BOOL":
        return rng.integers(0, 2, shape).astype(bool)
    if dtype not in oracle.FLOAT_DTYPES:
        count = int(np.prod(shape)) * numpy.itemsize
        return np.frombuffer(rng.bytes(count), numpy).reshape(shape)
    match rng.integers(0, 9):
        case 0:
            values = np.zeros(shape)
        case 1:
            values = np.full(shape, rng.standard_normal())
        case 2:
            values = rng.standard_t(2, shape)
        case 3:
            values = np.where(rng.random(shape) < 0.9, 0.0, rng.standard_normal(shape))
        case 4:
            values = rng.standard_normal(shape) * 10.0 ** rng.uniform(-7, 4, shape)
        case 5:
            values = np.round(rng.standard_normal(shape) * 4) / 4
        case 6:
            values = 5 + 1e-3 * rng.standard_normal(shape)
        case 7:
            values = -np.abs(rng.standard_normal(shape)) * 1e-5
        case _:
            values = 0.02 * rng.standard_normal(shape)
    limit = 400.0 if dtype.startswith("F8") else 60000.0
    return np.asarray(np.clip(values, -limit, limit)).astype(numpy)


def assert_same_bits(got: Array, want: Array, what: str) -> None:
    """Compare dtype, shape and every bit."""
    assert got.dtype == want.dtype and got.shape == want.shape, what
    size = got.dtype.itemsize
    a, b = (np.frombuffer(x.tobytes(), f"<u{size}") for x in (got, want))
    if not np.array_equal(a, b):
        at = int(np.flatnonzero(a != b)[0])
        pytest.fail(f"{what}: element {at} is {a[at]:#x}, not {b[at]:#x}")


def restored_as(weights: Array, numpy: np.dtype[Any]) -> Array:
    """Round decoded weights to their dtype; a finite one beyond its range becomes the largest, not an infinity."""
    limit = float(ml_dtypes.finfo(numpy).max)
    wide = weights.astype(np.float64)
    inside = np.where(np.isfinite(wide), np.clip(wide, -limit, limit), wide)
    return inside.astype(np.float32).astype(numpy) if numpy.itemsize < 4 else inside.astype(numpy)


def as_stored(entry: oracle.Entry, source: Array) -> npt.NDArray[np.float32]:
    """Give the matrix that an encoder sees."""
    with np.errstate(over="ignore"):
        weights = source.astype(np.float32)
    return np.ascontiguousarray(weights.T) if entry.transposed else weights.reshape(entry.matrix)


def check_codes(artifact: oracle.Artifact, entry: oracle.Entry, source: Array) -> None:
    """Every stored code is the nearest level, given the stored parameters."""
    codec, (_, cols) = oracle.CODECS[entry.codec], entry.matrix
    if entry.codec == "ecu_v1":
        return  # Its codes are chosen for their bits too.
    planes = artifact.matrices(entry)
    stored = oracle.parameters(codec, planes, cols)
    want = oracle.encode(codec, as_stored(entry, source), stored)
    got = oracle.unpack_codes(codec, planes, cols)
    wrong = np.argwhere(got != want)
    if len(wrong):
        r, c = wrong[0]
        pytest.fail(
            f"{entry.name} {entry.codec} {entry.dtype}: {len(wrong)} codes differ; the first at row {r}, column {c}: "
            f"{got[r, c]}, not {want[r, c]}, for weight {as_stored(entry, source)[r, c]!r} and {stored}"
        )


def check_artifact(cli: Cli, path: Path, source: dict[str, Array] | None) -> oracle.Artifact:
    """Hold a file against the text, its decoded weights against the binary's, and its codes against the source."""
    data = path.read_bytes()
    artifact = oracle.read(data)
    header = artifact.header
    again = oracle.write(
        artifact.tensors(),
        metadata=header.metadata,
        provenance=header.provenance,
        delta=header.delta,
        files=artifact.files(),
    )
    assert again == data, f"{path}: writing what was read gives other bytes"
    assert cli.json("inspect", path)["identity"] == header.identity
    if header.delta is not None:
        return artifact
    wide, own = path.with_suffix(".wide.safetensors"), path.with_suffix(".own.safetensors")
    cli("decompress", path, "-o", wide, "--dtype", "F32", "--force")
    cli("decompress", path, "-o", own, "--force")
    widened, restored = read_safetensors(wide), read_safetensors(own)
    assert len(widened) == len(restored) == len(header.tensors)
    for entry in header.tensors:
        numpy = np.dtype(NUMPY[entry.dtype])
        if entry.codec == oracle.RAW:
            raw = np.frombuffer(artifact.raw(entry), numpy).reshape(entry.shape)
            assert_same_bits(restored[entry.name], raw, f"{entry.name} restored")
            if source is not None:
                assert_same_bits(raw, source[entry.name], f"{entry.name} stored raw")
            continue
        weights = artifact.decode(entry)
        assert_same_bits(widened[entry.name], weights, f"{entry.name} decoded from {entry.codec}")
        want = restored_as(weights, numpy)
        assert_same_bits(restored[entry.name], want, f"{entry.name} restored as {entry.dtype}")
        if source is not None:
            assert dtype_name(source[entry.name]) == entry.dtype and source[entry.name].shape == entry.shape
            check_codes(artifact, entry, source[entry.name])
    wide.unlink()
    own.unlink()
    return artifact


def test_the_checksum_is_crc32c() -> None:
    """The published check value, and lanes against the plain loop."""
    assert oracle.crc32c(b"123456789") == 0xE3069283
    assert oracle.crc32c(b"") == 0
    data = np.random.default_rng(1).bytes(20001)
    state = 0xFFFFFFFF
    for i, byte in enumerate(data):
        if i in (8192, 8193, 12288, 20000):
            assert oracle.crc32c(data[:i]) == state ^ 0xFFFFFFFF
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (0x82F63B78 if state & 1 else 0)
    assert oracle.crc32c(data) == state ^ 0xFFFFFFFF


def test_the_registry_is_the_table_of_the_text(cli: Cli) -> None:
    """No codec is missing, none is described otherwise."""
    codecs = cli.json("codecs")["codecs"]
    assert {c["id"] for c in codecs} == {*oracle.CODECS, oracle.RAW}
    for c in codecs:
        if c["id"] != oracle.RAW:
            want = oracle.CODECS[c["id"]]
            assert (c["bits"], c["levels"], c["group"]) == (want.bits, want.levels, want.group)
            assert (c["scale"], c["offset"]) == (want.scale, want.offset)


@pytest.mark.parametrize("codec", [*oracle.CODECS, oracle.RAW])
def test_every_dtype_and_shape_comes_back_as_the_text_says(
    cli: Cli, tmp_path: Path, rng: np.random.Generator, codec: str
) -> None:
    """Ragged groups, empties, scalars and eight dimensions, in all dtypes."""
    source = {f"{dtype}.{i}": random_array(rng, dtype, shape) for dtype in NUMPY for i, shape in enumerate(SHAPES)}
    path = tmp_path / "a.tenpak"
    cli("compress", write_safetensors(tmp_path / "s.safetensors", source), "-o", path, "--codec", codec, "--all")
    artifact = check_artifact(cli, path, source)
    assert {e.name for e in artifact.header.tensors} == set(source)
    assert any(e.codec == codec for e in artifact.header.tensors)
    assert all(e.codec == oracle.RAW for e in artifact.header.tensors if e.dtype not in oracle.FLOAT_DTYPES)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_weights_at_the_end_of_their_range_come_back_finite(
    cli: Cli, tmp_path: Path, rng: np.random.Generator, dtype: str
) -> None:
    """What is decoded may lie half a step outside the range of the source."""
    largest = float(ml_dtypes.finfo(NUMPY[dtype]).max)
    weights = (rng.uniform(-1, 1, (8, 256)) * min(largest, 1e38)).astype(NUMPY[dtype])
    weights[:, ::7], weights[:, 1::7] = largest, -largest
    source = {codec: weights for codec in oracle.CODECS}
    rules = [x for codec in source for x in ("--rule", f"{codec}={codec}")]
    path = tmp_path / "a.tenpak"
    cli("compress", write_safetensors(tmp_path / "s.safetensors", source), "-o", path, *rules)
    check_artifact(cli, path, source)
    cli("decompress", path, "-o", tmp_path / "own.safetensors")
    for name, array in read_safetensors(tmp_path / "own.safetensors").items():
        assert np.isfinite(array.astype(np.float32)).all(), name


@pytest.mark.parametrize("codec", [*oracle.CODECS, oracle.RAW])
def test_the_sample_model_comes_back_as_the_text_says(cli: Cli, tmp_path: Path, sample_model: Path, codec: str) -> None:
    """A trained model, in every codec."""
    path = tmp_path / "a.tenpak"
    cli("compress", sample_model, "-o", path, "--codec", codec)
    check_artifact(cli, path, read_safetensors(sample_model / "model.safetensors"))


def test_shared_models_come_back_as_the_text_says(cli: Cli, tmp_path: Path, shared_models: Path) -> None:
    """Larger models, with a codec that numpy reads at once; streams are read above, one symbol after another."""
    for model in sorted(shared_models.glob("*/model.safetensors")):
        path = tmp_path / f"{model.parent.name}.tenpak"
        cli("compress", model.parent, "-o", path, "--codec", "int5_k16_v1")
        check_artifact(cli, path, read_safetensors(model))


@pytest.mark.parametrize("codec", oracle.CODECS)
def test_a_conv1d_weight_is_stored_transposed_and_comes_back(
    cli: Cli, tmp_path: Path, rng: np.random.Generator, codec: str
) -> None:
    """GPT-2 stores `[in, out]`; groups run along the input."""
    source = {
        "h.0.attn.c_attn.weight": rng.standard_normal((131, 70)).astype(np.float32),
        "h.0.attn.c_attn.bias": rng.standard_normal(70).astype(np.float32),
    }
    write_safetensors(tmp_path / "model.safetensors", source)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    path = tmp_path / "a.tenpak"
    cli("compress", tmp_path, "-o", path, "--codec", codec)
    entry = check_artifact(cli, path, source).entry("h.0.attn.c_attn.weight")
    assert entry.transposed and entry.matrix == (70, 131) and entry.codec == codec


def test_planes_of_several_chunks_have_a_checksum_each(cli: Cli, tmp_path: Path, rng: np.random.Generator) -> None:
    """Chunks are 4 MiB; the last one is shorter, or full."""
    source = {
        "exact": np.frombuffer(rng.bytes(2 * oracle.CHUNK), np.uint8),
        "more": np.frombuffer(rng.bytes(oracle.CHUNK + 5), np.uint8),
        "codes": rng.standard_normal((3001, 2999), np.float32),
    }
    path = tmp_path / "a.tenpak"
    cli("compress", write_safetensors(tmp_path / "s.safetensors", source), "-o", path, "--codec", "int8_sym_v1")
    artifact = check_artifact(cli, path, source)
    chunks = [len(p.crc32c) // 8 for name in source for p in artifact.entry(name).planes]
    assert chunks == [2, 2, 3, 1]


def test_the_same_input_gives_the_same_bytes_whatever_the_threads(cli: Cli, tmp_path: Path, sample_model: Path) -> None:
    """One thread, two, five; mapped or read."""
    written = set()
    for i, options in enumerate((["--threads", "1"], ["--threads", "2"], ["--threads", "5"], ["--mmap"])):
        path = tmp_path / f"{i}.tenpak"
        cli("compress", sample_model, "-o", path, "--codec", "int4_opt_v1", *options)
        written.add(path.read_bytes())
    assert len(written) == 1


def test_raw_tensors_keep_every_bit_of_what_is_not_a_number(cli: Cli, tmp_path: Path, rng: np.random.Generator) -> None:
    """Payloads and signs of NaN, infinities, negative zeros, subnormals."""
    source = {dtype: np.frombuffer(rng.bytes(4096), NUMPY[dtype]) for dtype in NUMPY if dtype != "BOOL"}
    source["all F16"] = F16.reshape(256, 256)
    path = tmp_path / "a.tenpak"
    cli("compress", write_safetensors(tmp_path / "s.safetensors", source), "-o", path, "--codec", oracle.RAW)
    check_artifact(cli, path, source)
    cli(
        "compress", tmp_path / "s.safetensors", "-o", path, "--force", "--all", "--nonfinite", "raw", "--codec",
        "int8_sym_v1",
    )  # fmt: skip
    artifact = check_artifact(cli, path, None)
    assert artifact.entry("all F16").codec == oracle.RAW
    assert artifact.raw(artifact.entry("all F16")) == F16.tobytes()


def test_any_text_survives_in_metadata(cli: Cli, tmp_path: Path) -> None:
    """Every ASCII character, its neighbours, separators of lines, and characters beyond the basic plane."""
    text = "".join(map(chr, range(0x250))) + "\u2028\u2029\ufeff\uffff\U0001f600"
    metadata = {"": "", "\U00010000": "after", "\uffff": "before", text: text, "a/b": "</script>"}
    path = tmp_path / "a.tenpak"
    source = write_safetensors(tmp_path / "s.safetensors", {"x": np.zeros((2, 2), np.float32)}, metadata)
    cli("compress", source, "-o", path)
    assert check_artifact(cli, path, None).header.metadata == metadata
    assert cli.json("inspect", path)["metadata"] == metadata


def crafted(codec: str, rows: int, cols: int, planes: dict[str, Array], name: str = "w") -> oracle.Tensor:
    """A float32 tensor with given planes; codes and zero points are unpacked."""
    layout = oracle.CODECS[codec]
    packed = dict(planes)
    if "high_codes" in layout.planes() and "codes" in planes:
        packed["codes"], packed["high_codes"] = planes["codes"] & 15, planes["codes"] >> 4
    for plane in ("codes", "high_codes", "zero_points"):
        if plane in packed:
            packed[plane] = oracle.pack(packed[plane], layout.plane_bits(plane), layout.row_bytes(plane, cols))
    return oracle.Tensor(name, "F32", (rows, cols), codec, packed)


@pytest.mark.parametrize("codec", [c.id for c in oracle.CODECS.values() if c.scale == "F16"])
def test_every_finite_f16_scale_decodes_to_the_same_bits(
    cli: Cli, tmp_path: Path, rng: np.random.Generator, codec: str
) -> None:
    """All 63,488 finite scales, each with all 16 codes, or 64 of the 256; offsets and zero points at random."""
    layout = oracle.CODECS[codec]
    per_group = min(layout.group, 64 if layout.bits == 8 else 16)
    groups = 4 if per_group == layout.group else 1
    rows, cols = len(FINITE_F16) // groups, per_group * groups
    steps = np.arange(cols, dtype=np.int64)[None, :] + (37 * np.arange(rows, dtype=np.int64))[:, None]
    planes: dict[str, Array] = {
        "codes": (steps % (1 << layout.bits)).astype(np.uint8),
        "scales": FINITE_F16.reshape(rows, groups),
    }
    if layout.offset:
        planes["offsets"] = rng.permutation(FINITE_F16).reshape(rows, groups)
    if layout.levels == "zero point":
        planes["zero_points"] = rng.integers(0, 16, (rows, groups), np.uint8)
    path = tmp_path / "a.tenpak"
    path.write_bytes(oracle.write([crafted(codec, rows, cols, planes)]))
    cli("verify", path)
    check_artifact(cli, path, None)
    print(f"campaign f16 scales: {FINITE_F16.size} cases, 0 failures; finite scales, equal to the bit")


@pytest.mark.parametrize("codec", [c.id for c in oracle.CODECS.values() if "F32" in c.floats().values()])
def test_any_finite_f32_scale_decodes_to_the_same_bits(
    cli: Cli, tmp_path: Path, rng: np.random.Generator, codec: str
) -> None:
    """Random bits, the largest and smallest numbers, subnormals and both zeros; products may overflow."""
    layout = oracle.CODECS[codec]
    cols = 2 * layout.group or 256
    edge = np.array([0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF], np.uint32)
    edge = np.concatenate([edge, edge | 0x80000000])

    def numbers(rows: int, groups: int) -> Array:
        bits = rng.integers(0, 1 << 32, rows * groups, np.uint32)
        bits[: len(edge)] = edge
        values = rng.permutation(bits).view(np.float32)
        return np.where(np.isfinite(values), values, np.float32(0)).astype(np.float32).reshape(rows, groups)

    rows = 4096
    groups = layout.groups(cols)
    planes = {"codes": rng.integers(0, 1 << layout.bits, (rows, cols), np.uint8)}
    if layout.bank is not None:
        planes["scales"] = rng.integers(0, 256, (rows, groups), np.uint8)
    for plane in layout.floats():
        planes[plane] = numbers(rows, 1 if plane == "row_scales" else groups)
        if plane == "row_scales":
            planes[plane][abs(planes[plane]) >= 2.0**112] = 0
    artifact = oracle.write([crafted(codec, rows, cols, planes)])
    path = tmp_path / "a.tenpak"
    path.write_bytes(artifact)
    cli("verify", path)
    wide = tmp_path / "w.safetensors"
    cli("decompress", path, "-o", wide)
    read = oracle.read(artifact)
    got, want = read_safetensors(wide)["w"], read.decode(read.header.tensors[0])
    # An infinite product and an infinite offset of the other sign cannot meet, since offsets are finite: no NaN.
    assert not np.isnan(want).any()
    assert_same_bits(got, want, codec)


def refused_by_both(cli: Cli, tmp_path: Path, tensors: list[oracle.Tensor]) -> None:
    """The oracle refuses each tensor alone; the binary finds each of them, and decompresses none."""
    for tensor in tensors:
        with pytest.raises(oracle.FormatError):
            oracle.read(oracle.write([tensor]))
    path = tmp_path / "a.tenpak"
    path.write_bytes(oracle.write(tensors))
    report = cli.json("verify", path, code=1)
    assert {p["tensor"] for p in report["problems"]} == {t.name for t in tensors}
    path.write_bytes(oracle.write(tensors[-1:]))
    for extension in ("safetensors", "npz", "json"):
        out = tmp_path / f"w.{extension}"
        assert "corrupt" in cli("decompress", path, "-o", out, code=2).stderr
        assert not out.exists()


@pytest.mark.parametrize("codec", oracle.CODECS)
def test_a_scale_that_is_not_finite_is_refused(cli: Cli, tmp_path: Path, codec: str) -> None:
    """Infinities and NaN, quiet and signalling, in scales and in offsets; scales of rows that are too large."""
    layout = oracle.CODECS[codec]
    cols = 2 * layout.group or 8
    for plane, dtype in layout.floats().items():
        bad: Array = (
            np.array([0x7C00, 0xFC00, 0x7C01, 0x7E00, 0xFFFF], np.uint16).view(np.float16)
            if dtype == "F16"
            else np.array([0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000, 0xFFFFFFFF], np.uint32).view(np.float32)
        )
        if plane == "row_scales":
            bad = np.append(bad, np.array([2.0**112, -(2.0**112)], np.float32))
        tensors = []
        for i, value in enumerate(bad):
            values = np.ones((2, 1 if plane == "row_scales" else layout.groups(cols)), bad.dtype)
            values[1, -1] = value
            tensors.append(crafted(codec, 2, cols, {plane: values}, f"{plane} {i}"))
        refused_by_both(cli, tmp_path, tensors)


@pytest.mark.parametrize("codec", oracle.CODECS)
def test_a_bit_that_no_weight_uses_is_refused(cli: Cli, tmp_path: Path, codec: str) -> None:
    """Each unused bit of codes and of zero points, in the last row."""
    layout = oracle.CODECS[codec]
    cols = layout.group + 1 if layout.group > 8 else 1
    tensors = []
    for plane, count in (("codes", cols), ("high_codes", cols), ("zero_points", layout.groups(cols))):
        if plane not in layout.planes():
            continue
        row = layout.row_bytes(plane, cols)
        for bit in range(count * layout.plane_bits(plane), row * 8):
            packed = np.zeros((2, row), np.uint8)
            packed[1, bit // 8] = 1 << bit % 8
            tensors.append(oracle.Tensor(f"{plane} {bit}", "F32", (2, cols), codec, {plane: packed}))
    refused_by_both(cli, tmp_path, tensors)


def batches(count: int, size: int = 100) -> Iterator[int]:
    """Split the campaign into files."""
    while count > 0:
        yield min(count, size)
        count -= size


def test_a_random_campaign_finds_no_differing_bit(cli: Cli, tmp_path: Path, rng: np.random.Generator) -> None:
    """Random shapes, dtypes, contents and codecs: decoded bits, restored bits, and every code."""
    ids = list(oracle.CODECS)
    used: set[str] = set()
    for batch, count in enumerate(batches(CAMPAIGN)):
        source, rules = {}, []
        for i in range(count):
            codec = oracle.CODECS[ids[int(rng.integers(len(ids)))]]
            least = codec.group or 1
            cols = int(rng.integers(least, least + 140)) if rng.random() < 0.5 else least * int(rng.integers(1, 5))
            shape = (int(rng.integers(1, 20)), cols)
            if rng.random() < 0.1:
                shape = (int(rng.integers(1, 4)), *shape)
            dtype = oracle.FLOAT_DTYPES[int(rng.integers(len(oracle.FLOAT_DTYPES)))]
            source[f"t{i}"] = random_array(rng, dtype, shape)
            rules += ["--rule", f"t{i}={codec.id}"]
        path = tmp_path / f"{batch}.tenpak"
        checkpoint = write_safetensors(tmp_path / "s.safetensors", source)
        cli("compress", checkpoint, "-o", path, *rules)
        artifact = check_artifact(cli, path, source)
        used |= {e.codec for e in artifact.header.tensors}
        path.unlink()
    assert CAMPAIGN < 1000 or used >= set(ids)
    print(f"campaign numpy decoder: {CAMPAIGN} cases, 0 failures; tensors of {len(used)} codecs, 0 differing bits")


@pytest.mark.parametrize("policy", ["zero", "clamp"])
@pytest.mark.parametrize("codec", oracle.CODECS)
def test_weights_that_are_not_finite_are_replaced_as_the_text_says(
    cli: Cli, tmp_path: Path, rng: np.random.Generator, codec: str, policy: str
) -> None:
    """Codes are those of the finite weights that the policy gives."""
    weights = rng.standard_normal((9, 300)).astype(np.float32)
    weights[0, 5], weights[1, 6], weights[2, 7] = np.nan, np.inf, -np.inf
    weights[3] = np.where(np.arange(300) % 3 == 0, np.inf, weights[3])
    weights[4], weights[5, 0], weights[5, 1:] = np.nan, np.inf, 0
    weights[6] = -np.inf
    path = tmp_path / "a.tenpak"
    source = write_safetensors(tmp_path / "s.safetensors", {"w": weights})
    cli("compress", source, "-o", path, "--all", "--codec", codec, code=2)
    assert not path.exists()
    report = cli.json("compress", source, "-o", path, "--all", "--codec", codec, "--nonfinite", policy)
    finite = np.where(np.isfinite(weights), weights, np.float32(0))
    if policy == "clamp":
        largest = np.abs(finite).max(axis=1, keepdims=True)
        finite = np.where(np.isinf(weights), np.copysign(largest, weights), finite)
    assert report["tensors"][0]["repaired"] == int((~np.isfinite(weights)).sum())
    artifact = check_artifact(cli, path, {"w": finite})
    assert artifact.header.provenance["nonfinite"] == policy
    assert artifact.header.tensors[0].codec == codec


def test_a_delta_that_uses_a_tensor_of_its_base_twice_is_refused(cli: Cli, tmp_path: Path) -> None:
    """Names of a result are unique, and runs stay inside the base, whatever identity is promised."""
    base_data = oracle.write([oracle.Tensor(n, "U8", (2,), oracle.RAW, {"data": n.encode() * 2}) for n in "ab"])
    base = oracle.read(base_data)
    (tmp_path / "base.tenpak").write_bytes(base_data)
    for runs, picked in (((0, 2), (1, 1)), (0, 1, 1)), (((1, 1), (0, 1)), (1, 0)), (((0, 3),), (0, 1)):
        result = oracle.identity([base.header.tensors[i] for i in picked])
        data = oracle.write([], delta=oracle.Delta(base.header.identity, result, runs))
        delta = tmp_path / "d.tenpak"
        delta.write_bytes(data)
        out = tmp_path / "out.tenpak"
        good = picked == (1, 0)
        cli("materialize", "--base", tmp_path / "base.tenpak", "--delta", delta, "-o", out, code=0 if good else 2)
        if good:
            assert out.read_bytes() == oracle.materialize(base, [oracle.read(data)])
            out.unlink()
        else:
            assert not out.exists()
            with pytest.raises(oracle.FormatError):
                oracle.materialize(base, [oracle.read(data)])


def variant_of(source: dict[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    """Change some tensors, drop one, add one, and change the order."""
    names = list(source)
    out = {name: source[name].copy() for name in names[1:]}
    for name in names[3::4]:
        out[name] = (out[name].astype(np.float32) + 0.01).astype(out[name].dtype)
    out["new.weight"] = rng.standard_normal((6, 64)).astype(np.float32)
    order = list(out)
    order = order[5:] + order[:5]
    return {name: out[name] for name in order}


def test_a_chain_of_deltas_materializes_as_the_text_says(
    cli: Cli, tmp_path: Path, sample_model: Path, rng: np.random.Generator
) -> None:
    """The oracle, `tenpak materialize`, and compressing the variant give the same file."""
    source = read_safetensors(sample_model / "model.safetensors")
    base = tmp_path / "base.tenpak"
    cli("compress", write_safetensors(tmp_path / "v0.safetensors", source), "-o", base, "--codec", "int4_g32_fp16_v1")
    deltas: list[Path] = []
    current = base
    for step in (1, 2):
        source = variant_of(source, rng) if step == 1 else {**source, "again.weight": source["new.weight"] + 1}
        variant = write_safetensors(tmp_path / f"v{step}.safetensors", source, {"step": str(step)})
        deltas.append(tmp_path / f"d{step}.tenpak")
        cli("delta", "--base", current, variant, "-o", deltas[-1])
        check_artifact(cli, deltas[-1], None)
        whole = oracle.materialize(oracle.read(base.read_bytes()), [oracle.read(d.read_bytes()) for d in deltas])
        current = tmp_path / f"r{step}.tenpak"
        options = [x for d in deltas for x in ("--delta", d)]
        cli("materialize", "--base", base, *options, "-o", current)
        assert current.read_bytes() == whole
        check_artifact(cli, current, source)
        plain = tmp_path / f"p{step}.tenpak"
        cli("compress", variant, "-o", plain, "--codec", "int4_g32_fp16_v1")
        assert plain.read_bytes() == whole
    cli("materialize", "--base", base, "--delta", deltas[1], "-o", tmp_path / "x.tenpak", code=2)
    with pytest.raises(oracle.FormatError, match="another base"):
        oracle.materialize(oracle.read(base.read_bytes()), [oracle.read(deltas[1].read_bytes())])


def small(delta: bool = False) -> bytes:
    """A small artifact with every kind of plane."""
    rng = np.random.default_rng(7)
    cols = 33
    tensors = [
        oracle.Tensor("empty", "F32", (0, 3), oracle.RAW),
        crafted(
            "int4_zp_g32_fp16_v1",
            3,
            cols,
            {
                "codes": rng.integers(0, 16, (3, cols), np.uint8),
                "scales": np.full((3, 2), 0.5, np.float16),
                "zero_points": rng.integers(0, 16, (3, 2), np.uint8),
            },
            "zp",
        ),
        oracle.Tensor("last", "I16", (5,), oracle.RAW, {"data": np.arange(5, dtype=np.int16)}),
        crafted("int4_g8_v1", 2, 9, {"scales": np.ones((2, 2), np.float32)}, "g8"),
        oracle.Tensor("none", "BOOL", (0,), oracle.RAW),
    ]
    mark = oracle.Delta("ab" * 32, "cd" * 32, ((0, 2), (-1, 5), (3, 1))) if delta else None
    files = {"config.json": b"{}", "tokenizer.model": b"", "vocab.txt": b"a\n" * 50}
    return oracle.write(tensors, metadata={"k": 'a"\n', "z": ""}, delta=mark, files=files)


def sound(cli: Cli, path: Path, data: bytes) -> tuple[bool, str]:
    """What `tenpak verify` says."""
    path.write_bytes(data)
    done = cli("verify", path, code=None)
    assert done.returncode in (0, 1, 2), done
    return done.returncode == 0, (done.stdout + done.stderr).strip()


def allowed(data: bytes) -> tuple[bool, str]:
    """What the oracle says."""
    try:
        oracle.read(data)
    except oracle.FormatError as e:
        return False, str(e)
    return True, "sound"


@pytest.mark.parametrize("delta", [False, True], ids=["plain", "delta"])
def test_a_small_artifact_is_sound_to_both(cli: Cli, tmp_path: Path, delta: bool) -> None:
    """The file that the next tests damage is not damaged."""
    data = small(delta)
    assert allowed(data) == (True, "sound")
    assert sound(cli, tmp_path / "a.tenpak", data)[0]
    check_artifact(cli, tmp_path / "a.tenpak", None)


def test_no_flipped_bit_goes_unseen(cli: Cli, tmp_path: Path, rng: np.random.Generator) -> None:
    """A bit of every byte for the oracle, of every 64th byte for the binary."""
    data = small()
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(rng.integers(8))
        assert not allowed(bytes(flipped))[0], at
        if at % 64 == 0:
            assert not sound(cli, tmp_path / "a.tenpak", bytes(flipped))[0], at


def test_no_other_length_is_accepted(cli: Cli, tmp_path: Path) -> None:
    """Truncation and extension."""
    data = small()
    for other in [data[:n] for n in (0, 1, 63, 64, 65, 200, len(data) - 1)] + [data + b"\0", data + data]:
        assert not allowed(other)[0]
        assert not sound(cli, tmp_path / "a.tenpak", other)[0]


Edit = Callable[[dict[str, Any]], object]


def tensor(header: dict[str, Any], index: int) -> dict[str, Any]:
    """Give an entry of a header."""
    out: dict[str, Any] = header["tensors"][index]
    return out


def rename(text: str) -> Edit:
    """Give the first tensor another name."""
    return lambda h: tensor(h, 0).update(name=text)


def call(text: str) -> Edit:
    """Give the first attached file another name."""
    return lambda h: h["files"][0].update(name=text)


def reshape(index: int, *dims: object) -> Edit:
    """Give a tensor another shape."""
    return lambda h: tensor(h, index).update(shape=list(dims))


def swap(value: dict[str, Any], *order: str) -> None:
    """Put the fields of an object into another order."""
    items = {key: value[key] for key in order}
    value.clear()
    value.update(items)


EDITS: dict[str, tuple[bool, Edit]] = {
    "nothing": (True, lambda h: None),
    "name of 1024 bytes": (True, rename("é" * 512)),
    "name of 1025 bytes": (False, rename("é" * 512 + "x")),
    "name of no bytes": (False, rename("")),
    "name with a space": (True, rename(" ")),
    "name with a slash and dots": (True, rename("../../etc/passwd")),
    "name with a quote": (True, rename('"\\')),
    "name with a tab": (False, rename("a\tb")),
    "name with U+0000": (False, rename("\0")),
    "name with U+007F": (False, rename("a\x7f")),
    "name with U+0085": (False, rename("a\x85")),
    "name with U+009F": (False, rename("a\x9f")),
    "name with U+00A0": (True, rename("a\xa0")),
    "name with U+00AD, a format character": (True, rename("a\xad")),
    "name with U+2028, a line separator": (True, rename("a\u2028")),
    "name with U+202E, a direction mark": (True, rename("a\u202e")),
    "name with a noncharacter": (True, rename("\ufffe")),
    "name beyond the basic plane": (True, rename("\U0001f600")),
    "name twice": (False, rename("zp")),
    "name twice but for its normal form": (True, lambda h: (rename("\xe9")(h), tensor(h, 1).update(name="e\u0301"))),
    "name a number": (False, lambda h: tensor(h, 0).update(name=1)),
    "unknown dtype": (False, lambda h: tensor(h, 0).update(dtype="F4")),
    "dtype in lower case": (False, lambda h: tensor(h, 0).update(dtype="f32")),
    "integer dtype in a grouped codec": (False, lambda h: tensor(h, 1).update(dtype="I32")),
    "BOOL in a grouped codec": (False, lambda h: tensor(h, 1).update(dtype="BOOL")),
    "other float dtype in a grouped codec": (True, lambda h: tensor(h, 1).update(dtype="F8_E5M2")),
    "other dtype of the same width": (True, lambda h: tensor(h, 2).update(dtype="BF16")),
    "unknown codec": (False, lambda h: tensor(h, 1).update(codec="int3_v9")),
    "nine dimensions": (False, reshape(0, 0, 1, 1, 1, 1, 1, 1, 1, 1)),
    "eight dimensions": (True, reshape(0, 0, 1, 1, 1, 1, 1, 1, 1)),
    "empty shape of one element too many": (False, reshape(0)),
    "an empty tensor of 2^61 - 1 rows": (True, reshape(0, 2**61 - 1, 0)),
    "an empty tensor of 2^61 rows": (False, reshape(0, 2**61, 0)),
    "an empty tensor of 2^64 - 1 rows": (False, reshape(0, 2**64 - 1, 0)),
    "an empty tensor of 2^64 rows": (False, reshape(0, 2**64, 0)),
    "an empty tensor whose other dimensions are too large": (False, reshape(0, 2**31, 0, 2**31)),
    "a negative dimension": (False, reshape(2, -5)),
    "a dimension as text": (False, reshape(2, "5")),
    "a dimension as a float": (False, reshape(2, 5.0)),
    "another shape of the same size": (True, reshape(2, 5, 1)),
    "shape missing": (False, lambda h: tensor(h, 0).pop("shape")),
    "shape null": (False, lambda h: tensor(h, 0).update(shape=None)),
    "transposed": (False, lambda h: tensor(h, 1).update(transposed=True)),
    "planes missing": (False, lambda h: tensor(h, 1)["planes"].pop()),
    "planes in another order": (False, lambda h: tensor(h, 1)["planes"].reverse()),
    "a plane twice": (False, lambda h: tensor(h, 1)["planes"].append(tensor(h, 1)["planes"][0])),
    "a plane of another name": (False, lambda h: tensor(h, 1)["planes"][0].update(plane="data")),
    "another offset": (False, lambda h: tensor(h, 1)["planes"][0].update(offset=128)),
    "an offset of 0 for an empty plane": (False, lambda h: tensor(h, 0)["planes"][0].update(offset=0)),
    "an offset of an empty plane before the padding": (
        False,
        lambda h: tensor(h, 4)["planes"][0].update(offset=tensor(h, 4)["planes"][0]["offset"] - 1),
    ),
    "other bytes": (False, lambda h: tensor(h, 1)["planes"][0].update(bytes=59)),
    "a checksum in upper case": (
        False,
        lambda h: tensor(h, 1)["planes"][0].update(crc32c=tensor(h, 1)["planes"][0]["crc32c"].upper()),
    ),
    "a checksum too many": (False, lambda h: tensor(h, 1)["planes"][0].update(crc32c="00000000" * 2)),
    "a checksum of an empty plane": (False, lambda h: tensor(h, 0)["planes"][0].update(crc32c="00000000")),
    "another checksum": (False, lambda h: tensor(h, 1)["planes"][0].update(crc32c="12345678")),
    "another digest": (False, lambda h: tensor(h, 1)["planes"][0].update(blake3="0" * 64)),
    "a digest in upper case": (
        False,
        lambda h: tensor(h, 1)["planes"][0].update(blake3=tensor(h, 1)["planes"][0]["blake3"].upper()),
    ),
    "a short digest": (False, lambda h: tensor(h, 1)["planes"][0].update(blake3="0" * 63)),
    "an unknown field of the header": (False, lambda h: h.update(more=1)),
    "an unknown field of a tensor": (False, lambda h: tensor(h, 0).update(more=1)),
    "an unknown field of a plane": (False, lambda h: tensor(h, 0)["planes"][0].update(more=1)),
    "an unknown field of the provenance": (False, lambda h: h["provenance"].update(more=1)),
    "metadata that is empty": (False, lambda h: h.update(metadata={})),
    "metadata absent": (True, lambda h: h.pop("metadata")),
    "metadata not of text": (False, lambda h: h["metadata"].update(k=1)),
    "metadata null": (False, lambda h: h["metadata"].update(k=None)),
    "metadata with an empty key": (True, lambda h: h.update(metadata={"": ""})),
    "metadata not sorted": (False, lambda h: h.update(metadata={"b": "", "a": ""})),
    "metadata sorted by code points": (True, lambda h: h.update(metadata={"\uffff": "", "\U00010000": ""})),
    "metadata sorted by UTF-16": (False, lambda h: h.update(metadata={"\U00010000": "", "\uffff": ""})),
    "metadata with control characters": (True, lambda h: h.update(metadata={"a": "\0\x1f\x7f\x80\b\f"})),
    "no provenance": (False, lambda h: h.pop("provenance")),
    "no tool": (False, lambda h: h["provenance"].pop("tool")),
    "no recipe": (False, lambda h: h["provenance"].pop("recipe")),
    "no sources": (False, lambda h: h["provenance"].pop("sources")),
    "a recipe that is no TOML": (True, lambda h: h["provenance"].update(recipe="[[[")),
    "an unknown policy": (False, lambda h: h["provenance"].update(nonfinite="skip")),
    "a known policy": (True, lambda h: h["provenance"].update(nonfinite="clamp")),
    "a source": (True, lambda h: h["provenance"].update(sources=[{"name": "a", "bytes": 1, "blake3": "0" * 64}])),
    "a source of 2^64 - 1 bytes": (
        True,
        lambda h: h["provenance"].update(sources=[{"name": "", "bytes": 2**64 - 1, "blake3": "0" * 64}]),
    ),
    "a source of 2^64 bytes": (
        False,
        lambda h: h["provenance"].update(sources=[{"name": "", "bytes": 2**64, "blake3": "0" * 64}]),
    ),
    "a source with a path": (
        True,
        lambda h: h["provenance"].update(sources=[{"name": "a/b", "bytes": 1, "blake3": "0" * 64}]),
    ),
    "a source without digest": (False, lambda h: h["provenance"].update(sources=[{"name": "a", "bytes": 1}])),
    "another identity": (False, lambda h: h.update(identity="0" * 64)),
    "fields in another order": (False, lambda h: swap(h, "metadata", "provenance", "tensors", "identity")),
    "fields of a plane in another order": (
        False,
        lambda h: swap(tensor(h, 0)["planes"][0], "offset", "plane", "bytes", "crc32c", "blake3"),
    ),
    "no tensors": (False, lambda h: h.pop("tensors")),
    "tensors null": (False, lambda h: h.update(tensors=None)),
    "an empty tensor less": (True, lambda h: h["tensors"].pop(0)),
    "a tensor less": (False, lambda h: h["tensors"].pop(2)),
    "a file with an accent": (True, call("caf\xe9.json")),
    "a file with a space": (True, call("a b.jinja")),
    "a file of 255 bytes": (True, call("a" * 250 + ".json")),
    "a file of 256 bytes": (False, call("a" * 251 + ".json")),
    "a file of no name": (False, call("")),
    "a file that is an ending": (False, call(".json")),
    "a file that ends in a letter more": (False, call("config.jsonl")),
    "a file in upper case": (False, call("CONFIG.JSON")),
    "a file with a slash": (False, call("a/b.json")),
    "a file with a backslash": (False, call("a\\b.json")),
    "a file with a colon": (False, call("a:b.json")),
    "a file with U+0000": (False, call("a\0.json")),
    "a file with U+007F": (False, call("a\x7f.json")),
    "a file with U+009F": (False, call("a\x9f.json")),
    "a file with U+00A0": (True, call("a\xa0.json")),
    "a program": (False, call("config.py")),
    "weights": (False, call("a.safetensors")),
    "an index of weights": (False, call("model.safetensors.index.json")),
    "an index of anything else": (True, call("a.index.json")),
    "the header of a directory": (False, call("tenpak.json")),
    "a file twice": (False, call("tokenizer.model")),
    "files not sorted": (False, call("w.json")),
    "files of another order": (False, lambda h: h["files"].reverse()),
    "files sorted by code points": (
        True,
        lambda h: (h["files"][1].update(name="\uffff.txt"), h["files"][2].update(name="\U00010000.txt")),
    ),
    "another offset of a file": (False, lambda h: h["files"][0].update(offset=64)),
    "other bytes of a file": (False, lambda h: h["files"][0].update(bytes=3)),
    "another checksum of a file": (False, lambda h: h["files"][0].update(crc32c="12345678")),
    "a checksum of an empty file": (False, lambda h: h["files"][1].update(crc32c="00000000")),
    "another digest of a file": (False, lambda h: h["files"][0].update(blake3="0" * 64)),
    "a digest of a file in upper case": (False, lambda h: h["files"][0].update(blake3="A" * 64)),
    "an unknown field of a file": (False, lambda h: h["files"][0].update(more=1)),
    "fields of a file in another order": (
        False,
        lambda h: swap(h["files"][0], "offset", "name", "bytes", "crc32c", "blake3"),
    ),
    "an empty file less": (True, lambda h: h["files"].pop(1)),
    "a file less": (False, lambda h: h["files"].pop(2)),
    "files before tensors": (False, lambda h: h.update(tensors=h.pop("tensors"))),
    "files absent, but stored": (False, lambda h: h.pop("files")),
    "no files, said so": (False, lambda h: h.update(files=[])),
    "files null": (False, lambda h: h.update(files=None)),
    "a delta without the flag": (False, lambda h: h.update(delta={"base": "0" * 64, "result": "0" * 64, "runs": []})),
}


def reidentify(header: dict[str, Any]) -> None:
    """Correct the identity after an edit, where the header still makes sense."""
    try:
        entries = [
            oracle.Entry(
                t["name"],
                t["dtype"],
                tuple(t["shape"]),
                t.get("transposed", False),
                t["codec"],
                tuple(oracle.Plane(**p) for p in t["planes"]),
            )
            for t in header["tensors"]
        ]
        header["identity"] = oracle.identity(entries)
    except (KeyError, TypeError, ValueError, AttributeError, oracle.struct.error):
        pass


def edited(data: bytes, edit: Edit, *, keep_identity: bool = False) -> bytes:
    """Change the header and correct lengths, checksums and identity."""
    length = int.from_bytes(data[16:24], "little")
    flags = int.from_bytes(data[12:16], "little")
    header = json.loads(data[-length:])
    edit(header)
    if not keep_identity:
        reidentify(header)
    return oracle.seal(data[:-length], oracle.print_json(header), flags)


@pytest.mark.parametrize("name", EDITS)
def test_a_header_is_judged_as_the_text_says(cli: Cli, tmp_path: Path, name: str) -> None:
    """Correct checksums do not make a header right."""
    expected, edit = EDITS[name]
    data = edited(small(), edit, keep_identity=name == "another identity")
    got, why = sound(cli, tmp_path / "a.tenpak", data)
    assert allowed(data)[0] == expected, f"the oracle: {allowed(data)[1]}"
    assert got == expected, f"the binary: {why}"


def runs(*runs: object) -> Edit:
    """Give a delta other runs."""
    return lambda h: h["delta"].update(runs=list(runs))


DELTA_EDITS: dict[str, tuple[bool, Edit]] = {
    "nothing": (True, lambda h: None),
    "own tensors first": (True, runs([-1, 5], [0, 3])),
    "own tensors apart": (True, runs([-1, 2], [0, 3], [-1, 3])),
    "base tensors in another order": (True, runs([4, 2], [0, 3], [-1, 5])),
    "only own tensors": (True, runs([-1, 5])),
    "a run of nothing": (False, runs([0, 0], [-1, 5])),
    "own runs that could be one": (False, runs([-1, 2], [-1, 3])),
    "base runs that could be one": (False, runs([0, 2], [2, 2], [-1, 5])),
    "not every own tensor": (False, runs([-1, 4], [0, 3])),
    "more than the own tensors": (False, runs([-1, 6], [0, 3])),
    "a base tensor twice, which only the base can tell": (True, runs([0, 3], [-1, 5], [2, 1])),
    "a run that goes to 2^63 - 1": (True, runs([2**62, 2**62 - 1], [-1, 5])),
    "a run that goes to 2^63": (False, runs([2**62, 2**62], [-1, 5])),
    "first of -2": (False, runs([-2, 1], [-1, 5])),
    "a run of three": (False, runs([-1, 5, 0])),
    "a run of one": (False, runs([-1], [-1, 5])),
    "a run of text": (False, runs(["-1", 5])),
    "a run beyond every base": (False, runs([2**62, 2**63 + 5], [-1, 5])),
    "a count of 2^64": (False, runs([0, 2**64], [-1, 5])),
    "no runs": (False, runs()),
    "no field": (False, lambda h: h.pop("delta")),
    "no base": (False, lambda h: h["delta"].pop("base")),
    "base in upper case": (False, lambda h: h["delta"].update(base="AB" * 32)),
    "base and result the same": (True, lambda h: h["delta"].update(result="ab" * 32)),
    "an unknown field": (False, lambda h: h["delta"].update(more=1)),
    "fields in another order": (False, lambda h: swap(h["delta"], "result", "base", "runs")),
}


@pytest.mark.parametrize("name", DELTA_EDITS)
def test_a_delta_is_judged_as_the_text_says(cli: Cli, tmp_path: Path, name: str) -> None:
    """Runs say without doubt what the result is made of."""
    expected, edit = DELTA_EDITS[name]
    data = edited(small(delta=True), edit)
    got, why = sound(cli, tmp_path / "a.tenpak", data)
    assert allowed(data)[0] == expected, f"the oracle: {allowed(data)[1]}"
    assert got == expected, f"the binary: {why}"


TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "a space": lambda t: t.replace(b":", b": ", 1),
    "a line end": lambda t: t + b"\n",
    "a byte order mark": lambda t: b"\xef\xbb\xbf" + t,
    "an escaped slash": lambda t: t.replace(b'"oracle"', b'"ora\\/cle"'),
    "an escaped letter": lambda t: t.replace(b'"oracle"', b'"\\u006fracle"'),
    "a long escape of a line end": lambda t: t.replace(b'"a\\"\\n"', b'"a\\"\\u000a"'),
    "upper-case hex in an escape": lambda t: t.replace(b'"oracle"', b'"\\u001F"'),
    "DEL as an escape": lambda t: t.replace(b'"oracle"', b'"\\u007f"'),
    "half a surrogate pair": lambda t: t.replace(b'"oracle"', b'"\\ud800"'),
    "half a surrogate pair in UTF-8": lambda t: t.replace(b'"oracle"', b'"\xed\xa0\x80"'),
    "a byte that is not UTF-8": lambda t: t.replace(b'"oracle"', b'"\xff"'),
    "a raw control character": lambda t: t.replace(b'"oracle"', b'"\x01"'),
    "a field twice": lambda t: t.replace(b'{"tool":"oracle",', b'{"tool":"oracle","tool":"oracle",'),
    "a key of metadata twice": lambda t: t.replace(b'"z":""', b'"z":"","z":""'),
    "a leading zero": lambda t: t.replace(b"[0,3]", b"[00,3]"),
    "a negative zero": lambda t: t.replace(b"[0,3]", b"[-0,3]"),
    "an exponent": lambda t: t.replace(b"[0,3]", b"[0,3e0]"),
    "a fraction": lambda t: t.replace(b"[0,3]", b"[0,3.0]"),
    "transposed false": lambda t: t.replace(b'[3,33],"codec"', b'[3,33],"transposed":false,"codec"'),
    "a trailing comma": lambda t: t[:-1] + b",}",
    "two values": lambda t: t + t,
    "an array": lambda t: b"[" + t + b"]",
    "nothing": lambda t: b"",
    "null": lambda t: b"null",
    "depth": lambda t: b"[" * 100_000,
    "metadata depth": lambda t: t.replace(b'"z":""', b'"z":' + b"[" * 1000 + b"]" * 1000),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_header_in_other_words_is_refused(cli: Cli, tmp_path: Path, name: str) -> None:
    """One content has one header."""
    data = small()
    length = int.from_bytes(data[16:24], "little")
    text = TEXTS[name](data[-length:])
    assert text != data[-length:], "the edit found nothing to change"
    other = oracle.seal(data[:-length], text)
    assert not allowed(other)[0]
    assert not sound(cli, tmp_path / "a.tenpak", other)[0]


def test_controls_are_written_with_lower_case_hex(cli: Cli, tmp_path: Path) -> None:
    """The other spelling of the test above is the right one."""
    data = small()
    length = int.from_bytes(data[16:24], "little")
    other = oracle.seal(data[:-length], data[-length:].replace(b'"oracle"', b'"\\u001f"'))
    assert allowed(other)[0]
    assert sound(cli, tmp_path / "a.tenpak", other)[0]


def test_a_preamble_is_judged_as_the_text_says(cli: Cli, tmp_path: Path) -> None:
    """Versions, flags and reserved bytes, with correct checksums."""
    data = small()

    def sealed(at: int, replaced: bytes) -> bytes:
        front = bytearray(data)
        front[at : at + len(replaced)] = replaced
        front[60:64] = oracle.crc32c(bytes(front[:60])).to_bytes(4, "little")
        return bytes(front)

    cases = {
        "version 0": sealed(8, b"\0"),
        "version 2": sealed(8, b"\2"),
        "an unknown flag": sealed(12, b"\2"),
        "the highest flag": sealed(15, b"\x80"),
        "the delta flag without a delta": sealed(12, b"\1"),
        "a longer header": sealed(16, (int.from_bytes(data[16:24], "little") + 1).to_bytes(8, "little")),
        "a header of the file's length": sealed(16, len(data).to_bytes(8, "little")),
        "a header of 2^64 - 1": sealed(16, b"\xff" * 8),
        "a file length of 2^64 - 1": sealed(24, b"\xff" * 8),
        **{f"byte {at}": sealed(at, b"\1") for at in range(36, 60)},
    }
    assert allowed(sealed(8, b"\1"))[0]
    for name, other in cases.items():
        assert not allowed(other)[0], name
        assert not sound(cli, tmp_path / "a.tenpak", other)[0], name


def test_padding_is_zero(cli: Cli, tmp_path: Path) -> None:
    """Nothing hides between planes."""
    data = small()
    artifact = oracle.read(data)
    header_at = len(data) - int.from_bytes(data[16:24], "little")
    used = {at for e in artifact.header.tensors for p in e.planes for at in range(p.offset, p.offset + p.bytes)}
    padding = [at for at in range(64, header_at) if at not in used]
    assert len(padding) > 100
    for i, at in enumerate(padding):
        other = data[:at] + b"\1" + data[at + 1 :]
        assert not allowed(other)[0], at
        if i % 16 == 0:
            assert not sound(cli, tmp_path / "a.tenpak", other)[0], at


def test_transposed_is_for_quantized_matrices(cli: Cli, tmp_path: Path) -> None:
    """Two dimensions, and not raw."""

    def tensor(shape: tuple[int, ...], codec: str) -> bytes:
        plain = oracle.write([oracle.Tensor("w", "F32", shape, codec)])

        def edit(h: dict[str, Any]) -> None:
            fields = copy.copy(h["tensors"][0])
            swapped = {"name": "w", "dtype": "F32", "shape": fields["shape"], "transposed": True}
            h["tensors"][0] = {**swapped, "codec": codec, "planes": fields["planes"]}

        return edited(plain, edit)

    cases = [((4, 4), "int8_sym_v1", True), ((4, 4), oracle.RAW, False), ((16,), "int8_sym_v1", False),
             ((2, 2, 4), "int8_sym_v1", False), ((0, 0), "int8_sym_v1", True)]  # fmt: skip
    for shape, codec, expected in cases:
        data = tensor(shape, codec)
        assert allowed(data)[0] == expected, (shape, codec, allowed(data))
        got, why = sound(cli, tmp_path / "a.tenpak", data)
        assert got == expected, (shape, codec, why)
