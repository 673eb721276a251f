"""An independent reader, decoder, encoder and writer of tenpak artifacts, in numpy.

Written from `src/artifact/FORMAT.md` alone, so that the text and the Rust code check each other: what the text leaves
open shows here first. It favours being obviously right over being fast, holds whole files in memory, and shares no code
with the package.

| function | what |
|---|---|
| `read` | bytes of a file to an `Artifact`, refusing all that the text refuses |
| `Artifact.decode` | weights of one tensor: float32 of a quantized one, bytes of a raw one |
| `encode` | codes of weights, given the stored scales, offsets and zero points |
| `write` | tensors to the bytes of a file |
| `materialize` | base and deltas to the bytes of a file |
| `fine_tuned` | the tensors of a base and a delta to those of its variant |

From a shell: `python oracle.py FILE` checks a file and prints a line per tensor.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import coded
import numpy as np
import numpy.typing as npt
from blake3 import blake3

Bytes = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
Object = dict[str, Any]

MAGIC = bytes.fromhex("89544E504B0D0A1A")
VERSION = 1
DELTA_FLAG = 1
CHECKPOINT_FLAG = 8
CODED_FLAG = 2
EXTRA_FLAG = 4
PREAMBLE = 64
CHUNK = 4 << 20
HEADER_LIMIT = 64 << 20
DIMS_LIMIT = 8
NAME_LIMIT = 1024
FILE_NAME_LIMIT = 255
FILE_ENDINGS = (".jinja", ".json", ".model", ".tiktoken", ".txt")
FILES_LIMIT = 64
FILE_LIMIT = 256 << 20

ELEMENT_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=np.float32,
)


@dataclass(frozen=True)
class Bank:
    """Levels of all tables, and the magnitude from which multipliers are `step` apart."""

    knee: int
    step: int
    levels: npt.NDArray[np.int8]

    def split(self, scales: Bytes, bits: int) -> tuple[Bytes, F32]:
        """Tables and multipliers of scale bytes."""
        magnitude = (scales & ((2 << bits) - 1)).astype(np.int64)
        table = (scales % 128 >> bits + 1).astype(np.uint8)
        whole = np.where(magnitude <= self.knee, magnitude, self.knee + (magnitude - self.knee) * self.step)
        multiplier = whole.astype(np.float32)  # a zero has a sign too
        return table, np.where(scales >= 128, -multiplier, multiplier).astype(np.float32)


#: By the bits of a code.
BANKS = {
    4: Bank(
        28,
        4,
        np.array(
            [
                int(level)
                for level in """
            -101 -83 -67 -52 -38 -26 -15 -3 7 19 31 44 57 71 87 105
            -96 -78 -60 -46 -33 -22 -11 0 10 21 32 44 57 71 89 117
            -97 -75 -58 -44 -32 -22 -13 -5 5 14 24 34 46 61 83 127
            -114 -62 -47 -34 -24 -15 -7 1 9 18 28 38 50 63 79 117
            """.split()
            ],
            np.int8,
        ),
    ),
    5: Bank(
        56,
        8,
        np.array(
            [
                int(level)
                for level in """
            -126 -103 -93 -83 -74 -66 -57 -49 -42 -35 -28 -22 -16 -10 -4 2
            8 14 20 26 32 38 44 51 57 65 72 81 90 98 110 126
            -127 -115 -88 -77 -68 -61 -53 -46 -40 -34 -28 -22 -17 -11 -6 -1
            4 9 14 19 24 30 35 41 48 55 63 71 81 94 115 127
            """.split()
            ],
            np.int8,
        ),
    ),
    6: Bank(
        112,
        8,
        np.array(
            [
                int(level)
                for level in """
            -127 -121 -116 -112 -107 -98 -94 -89 -84 -80 -76 -72 -67 -64 -60 -56
            -52 -49 -44 -41 -37 -33 -30 -26 -23 -19 -16 -12 -9 -6 -2 1
            4 7 10 13 17 20 24 27 30 33 37 40 44 47 51 54
            58 62 66 70 74 78 83 87 91 96 102 106 111 116 122 127
            """.split()
            ],
            np.int8,
        ),
    ),
}


class FormatError(Exception):
    """The file is not an artifact that the text allows; `kind` is `corrupt` or `unsupported`."""

    def __init__(self, what: str, kind: str = "corrupt") -> None:
        """Keep the kind beside the message."""
        super().__init__(what)
        self.kind = kind


def require(condition: bool, what: str, kind: str = "corrupt") -> None:
    """Refuse the file unless the condition holds."""
    if not condition:
        raise FormatError(what, kind)


@dataclass(frozen=True)
class Codec:
    """One row of the table of codecs; `group` 0 is a whole row."""

    id: str
    bits: int
    levels: str
    group: int
    scale: str
    offset: str | None = None

    @property
    def bank(self) -> Bank | None:
        """The bank of a codec with nested scales."""
        return BANKS[self.bits] if self.levels == "bank" else None

    def plane_bits(self, plane: str) -> int:
        """Bits of a number in a plane of codes or zero points."""
        if self.bank is None or plane == "zero_points":
            return self.bits
        return 4 if plane == "codes" else self.bits - 4

    def floats(self) -> dict[str, str]:
        """Dtypes of the planes that hold floats."""
        if self.bank is not None:
            return {"row_scales": "F32"}
        return {"scales": self.scale} | ({"offsets": self.offset} if self.offset else {})

    def groups(self, cols: int) -> int:
        """Count the groups of a row of `cols` columns."""
        if self.group == 0:
            return 1 if cols else 0
        return -(-cols // self.group)

    def row_bytes(self, plane: str, cols: int) -> int:
        """Bytes of one row of a plane."""
        groups = self.groups(cols)
        match plane:
            case "codes" | "high_codes":
                return 4 * -(-cols * self.plane_bits(plane) // 32)
            case "scales":
                return groups * ELEMENT_BYTES[self.scale]
            case "row_scales":
                return 4 if cols else 0
            case "offsets":
                return groups * ELEMENT_BYTES[self.offset or self.scale]
            case "zero_points":
                return -(-groups * self.bits // 8)
        raise KeyError(plane)

    def planes(self) -> list[str]:
        """Names of the planes, in the order of the file."""
        names = ["codes", "scales"]
        if self.offset:
            names.append("offsets")
        if self.bank is not None:
            return ["codes", *(["high_codes"] if self.bits > 4 else []), "scales", "row_scales"]
        if self.levels == "zero point":
            names.append("zero_points")
        return names


RAW = "raw_v1"
CODECS = {
    codec.id: codec
    for codec in [
        Codec("int4_g8_v1", 4, "unsigned", 8, "F32", "F32"),
        Codec("int4_g8_fp16_v1", 4, "unsigned", 8, "F16", "F16"),
        Codec("int4_g16_v1", 4, "unsigned", 16, "F32", "F32"),
        Codec("int4_g16_fp16_v1", 4, "unsigned", 16, "F16", "F16"),
        Codec("int4_g32_fp16_v1", 4, "unsigned", 32, "F16", "F16"),
        Codec("int4_g128_fp16_v1", 4, "unsigned", 128, "F16", "F16"),
        Codec("int4_g256_fp16_v1", 4, "unsigned", 256, "F16", "F16"),
        Codec("int4_g512_fp16_v1", 4, "unsigned", 512, "F16", "F16"),
        Codec("int4_g2048_fp16_v1", 4, "unsigned", 2048, "F16", "F16"),
        Codec("int4_g4096_fp16_v1", 4, "unsigned", 4096, "F16", "F16"),
        Codec("int4_opt_v1", 4, "unsigned", 16, "F16", "F16"),
        Codec("int4_opt_llama_v1", 4, "unsigned", 8, "F16", "F16"),
        Codec("int8_sym_v1", 8, "signed", 0, "F32"),
        Codec("int4_sym_g32_fp16_v1", 4, "signed", 32, "F16"),
        Codec("int4_sym_g64_fp16_v1", 4, "signed", 64, "F16"),
        Codec("int4_sym_g128_fp16_v1", 4, "signed", 128, "F16"),
        Codec("int4_zp_g32_fp16_v1", 4, "zero point", 32, "F16"),
        Codec("int4_zp_g64_fp16_v1", 4, "zero point", 64, "F16"),
        Codec("int4_zp_g128_fp16_v1", 4, "zero point", 128, "F16"),
        Codec("int8_sym_g32_fp16_v1", 8, "signed", 32, "F16"),
        Codec("int8_sym_g128_fp16_v1", 8, "signed", 128, "F16"),
        Codec("int4_k32_v1", 4, "bank", 32, "U8"),
        Codec("int4_k16_v1", 4, "bank", 16, "U8"),
        Codec("int5_k32_v1", 5, "bank", 32, "U8"),
        Codec("int5_k16_v1", 5, "bank", 16, "U8"),
        Codec("int6_k16_v1", 6, "bank", 16, "U8"),
        Codec("nf4_g64_fp16_v1", 4, "table", 64, "F16"),
        Codec("ecu_v1", 8, "signed", 0, "F32"),
    ]
}


# Checksums


def _crc_table() -> npt.NDArray[np.uint32]:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0x82F63B78), table >> 1).astype(np.uint32)
    return table


_TABLE = _crc_table()
_TABLE_LIST: list[int] = [int(x) for x in _TABLE]
_LANES = 4096

Operator = npt.NDArray[np.uint32]
"""A linear map of 32 bits: the image of each bit, the lowest first."""


def _apply(operator: Operator, states: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    out = np.zeros_like(states)
    for bit in range(32):
        out ^= ((states >> np.uint32(bit)) & np.uint32(1)) * operator[bit]
    return out


def _zeros(count: int) -> Operator:
    """Give the map from a state to the state `count` zero bytes later."""
    basis = np.uint32(1) << np.arange(32, dtype=np.uint32)
    power = (basis >> np.uint32(8)) ^ _TABLE[basis & np.uint32(0xFF)]
    result = basis
    while count:
        if count & 1:
            result = _apply(power, result)
        power = _apply(power, power)
        count >>= 1
    return result


def crc32c(data: bytes | memoryview) -> int:
    """CRC-32C (Castagnoli: reflected polynomial 0x82F63B78, initial value and final exclusive or 0xFFFFFFFF).

    Long input is cut into lanes that numpy walks in step. The state of a concatenation is the first state moved over
    the zeros that stand for the second part, exclusive or the second state: so the lanes are put together pairwise.
    """
    length = len(data)
    if length < 2 * _LANES:
        state = 0xFFFFFFFF
        for byte in bytes(data):
            state = _TABLE_LIST[(state ^ byte) & 0xFF] ^ (state >> 8)
        return state ^ 0xFFFFFFFF
    per_lane = -(-length // _LANES)
    padded = np.zeros(per_lane * _LANES, np.uint8)  # zeros before the data leave a zero state as it is
    padded[len(padded) - length :] = np.frombuffer(data, np.uint8)
    states = np.zeros(_LANES, np.uint32)
    for column in np.ascontiguousarray(padded.reshape(_LANES, per_lane).T):
        states = (states >> np.uint32(8)) ^ _TABLE[(states ^ column) & np.uint32(0xFF)]
    move = _zeros(per_lane)
    while len(states) > 1:
        states = _apply(move, states[0::2]) ^ states[1::2]
        move = _apply(move, move)
    start = _apply(_zeros(length), np.array([0xFFFFFFFF], np.uint32))
    return int(start[0] ^ states[0]) ^ 0xFFFFFFFF


def chunk_checksums(plane: bytes | memoryview) -> str:
    """Give the `crc32c` of a plane: 8 hex digits per chunk."""
    return "".join(f"{crc32c(plane[at : at + CHUNK]):08x}" for at in range(0, len(plane), CHUNK))


# Header

OUTLIERS = {"outlier_counts": "counts_v1", "outlier_columns": "columns_v1", "outlier_values": "tails_v1"}
CODINGS = ("rows_v1", "rows_v2", "scales_v1", "bytes_v1", "words_v1", *OUTLIERS.values())


@dataclass(frozen=True)
class Plane:
    """A plane of an entry, as the header has it."""

    plane: str
    offset: int
    bytes: int
    crc32c: str
    blake3: str
    coding: str | None = None


@dataclass(frozen=True)
class Entry:
    """A tensor, as the header has it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    transposed: bool
    codec: str
    planes: tuple[Plane, ...]
    rate: int | None = None
    column_scales: bool = False
    outliers: int = 0
    difference: bool = False

    @property
    def has_extra(self) -> bool:
        """Whether there are planes beside the codec's."""
        return self.column_scales or self.outliers > 0

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns that are stored."""
        return matrix(self.shape, self.transposed)


@dataclass(frozen=True)
class File:
    """An attached file, as the header has it."""

    name: str
    offset: int
    bytes: int
    crc32c: str
    blake3: str


@dataclass(frozen=True)
class Delta:
    """What a delta says about its base and its result."""

    base: str
    result: str
    runs: tuple[tuple[int, int], ...]
    checkpoint: bool = False


@dataclass(frozen=True)
class Header:
    """All that the header says."""

    metadata: dict[str, str]
    provenance: Object
    delta: Delta | None
    identity: str
    tensors: tuple[Entry, ...]
    files: tuple[File, ...] = ()


def matrix(shape: Sequence[int], transposed: bool) -> tuple[int, int]:
    """Rows and columns of a shape: the last dimension, and the product of the others."""
    if transposed:
        a, b = shape
        return b, a
    if not shape:
        return 1, 1
    rows = 1
    for dim in shape[:-1]:
        rows *= dim
    return rows, shape[-1]


def extra_planes(rows: int, cols: int, column_scales: bool, outliers: int) -> dict[str, tuple[str, int]]:
    """Dtype and number of the elements of every extra plane, in order."""
    planes = {"column_scales": ("F32", cols)} if column_scales else {}
    if outliers:
        planes["outlier_counts"] = "U32", rows
        planes["outlier_columns"] = "U16" if cols <= 65536 else "U32", outliers
        planes["outlier_values"] = "F16", outliers
    return planes


def plane_lengths(
    codec: str,
    dtype: str,
    shape: Sequence[int],
    transposed: bool,
    column_scales: bool = False,
    outliers: int = 0,
) -> dict[str, int]:
    """Bytes of every plane of a tensor, in order."""
    rows, cols = matrix(shape, transposed)
    if codec == RAW:
        return {"data": rows * cols * ELEMENT_BYTES[dtype]}
    layout = CODECS[codec]
    extra = extra_planes(rows, cols, column_scales, outliers)
    own = {plane: rows * layout.row_bytes(plane, cols) for plane in layout.planes()}
    return own | {plane: count * ELEMENT_BYTES[kind] for plane, (kind, count) in extra.items()}


def align(x: int) -> int:
    """Round up to a multiple of 64."""
    return -(-x // 64) * 64


def print_header(header: Header) -> bytes:
    """Print a header as canonical JSON."""
    out: Object = {}
    if header.metadata:
        out["metadata"] = {k: header.metadata[k] for k in sorted(header.metadata, key=lambda s: s.encode())}
    p = header.provenance
    out["provenance"] = {
        "tool": p["tool"],
        "recipe": p["recipe"],
        "nonfinite": p["nonfinite"],
        "sources": [{key: s[key] for key in ("name", "bytes", "blake3")} for s in p["sources"]],
    }
    if header.delta is not None:
        d = header.delta
        out["delta"] = {"checkpoint": True} if d.checkpoint else {}
        out["delta"] |= {"base": d.base, "result": d.result, "runs": [list(run) for run in d.runs]}
    out["identity"] = header.identity
    out["tensors"] = [_print_entry(entry) for entry in header.tensors]
    if header.files:
        out["files"] = [
            {"name": f.name, "offset": f.offset, "bytes": f.bytes, "crc32c": f.crc32c, "blake3": f.blake3}
            for f in header.files
        ]
    return print_json(out)


def _print_entry(entry: Entry) -> Object:
    out: Object = {"name": entry.name, "dtype": entry.dtype, "shape": list(entry.shape)}
    if entry.transposed:
        out["transposed"] = True
    out["codec"] = entry.codec
    if entry.rate is not None:
        out["rate"] = entry.rate
    if entry.column_scales:
        out["column_scales"] = True
    if entry.outliers:
        out["outliers"] = entry.outliers
    if entry.difference:
        out["difference"] = True
    out["planes"] = [
        {"plane": p.plane}
        | ({"coding": p.coding} if p.coding is not None else {})
        | {"offset": p.offset, "bytes": p.bytes, "crc32c": p.crc32c, "blake3": p.blake3}
        for p in entry.planes
    ]
    return out


def print_json(value: object) -> bytes:
    """JSON without white space, escaped as little as JSON allows."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _fields(value: object, where: str, required: Sequence[str], optional: Sequence[str] = ()) -> Object:
    require(isinstance(value, dict), f"{where} is not an object")
    assert isinstance(value, dict)
    missing = [key for key in required if key not in value]
    require(not missing, f"{where} has no field {missing}")
    unknown = [key for key in value if key not in required and key not in optional]
    require(not unknown, f"{where} has the unknown field {unknown}")
    return value


def _text(value: object, where: str) -> str:
    require(isinstance(value, str), f"{where} is not a string")
    assert isinstance(value, str)
    return value


def _number(value: object, where: str, least: int = 0) -> int:
    require(type(value) is int and least <= value < 2**64, f"{where} is not an integer from {least}")
    assert isinstance(value, int)
    return value


def _array(value: object, where: str) -> list[Any]:
    require(isinstance(value, list), f"{where} is not an array")
    assert isinstance(value, list)
    return value


def _hex(value: object, where: str, digits: int | None = 64) -> str:
    text = _text(value, where)
    require(all(c in "0123456789abcdef" for c in text), f"{where} is not lower-case hex")
    require(digits is None or len(text) == digits, f"{where} has not {digits} digits")
    return text


def is_control(c: str) -> bool:
    """Whether a character is a control character: U+0000 … U+001F and U+007F … U+009F."""
    return c < " " or "\x7f" <= c <= "\x9f"


def is_coded(tensors: Iterable[Entry]) -> bool:
    """Whether a plane is coded."""
    return any(p.coding is not None for entry in tensors for p in entry.planes)


def parse_header(text: bytes, *, is_delta: bool) -> Header:
    """Read a header and check all that can be checked without the planes."""

    def pairs(items: list[tuple[str, Any]]) -> Object:
        out = dict(items)
        require(len(out) == len(items), "a field stands twice")
        return out

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as e:
        raise FormatError(f"the header is not JSON: {e}") from e
    top = _fields(value, "header", ["provenance", "identity", "tensors"], ["metadata", "delta", "files"])
    require(("delta" in top) == is_delta, "field delta and flag bit 0 disagree")
    metadata = _fields(top.get("metadata", {}), "metadata", [], list(top.get("metadata", {})))
    for key, item in metadata.items():
        _text(item, f"metadata {key}")
    header = Header(
        metadata=metadata,
        provenance=_parse_provenance(top["provenance"]),
        delta=_parse_delta(top["delta"]) if is_delta else None,
        identity=_hex(top["identity"], "identity"),
        tensors=tuple(_parse_entry(entry) for entry in _array(top["tensors"], "tensors")),
        files=tuple(_parse_file(file) for file in _array(top.get("files", []), "files")),
    )
    try:
        printed = print_header(header)
    except UnicodeEncodeError as e:
        raise FormatError(f"the header has half a surrogate pair: {e}") from e
    require(printed == text, "the header is not canonical")
    names = [entry.name for entry in header.tensors]
    require(len(set(names)) == len(names), "a name stands twice")
    files = [file.name.encode("utf-8", "surrogatepass") for file in header.files]
    require(all(a < b for a, b in zip(files, files[1:], strict=False)), "files are not sorted, or one stands twice")
    require(len(files) <= FILES_LIMIT, "more files than the limit")
    _check_offsets(header)
    require(header.identity == identity(header.tensors), "identity is not that of the tensors")
    if header.delta is not None:
        _check_runs(header.delta, len(header.tensors))
    checkpoint = header.delta is not None and header.delta.checkpoint
    for entry in header.tensors:
        words = any(p.coding == "words_v1" for p in entry.planes)
        require(checkpoint or not (entry.difference or words), f"{entry.name} is a difference of no checkpoint")
        require(not checkpoint or entry.difference == (entry.codec != RAW), f"{entry.name} stands for weights")
    raw_names = [name.encode("utf-8", "surrogatepass") for name in names]
    require(not checkpoint or raw_names == sorted(raw_names), "tensors of a delta of a checkpoint are not sorted")
    return header


def _parse_provenance(value: object) -> Object:
    out = _fields(value, "provenance", ["tool", "recipe", "nonfinite", "sources"])
    _text(out["tool"], "tool")
    _text(out["recipe"], "recipe")
    require(out["nonfinite"] in ("error", "zero", "clamp", "raw"), "unknown policy in nonfinite")
    for source in _array(out["sources"], "sources"):
        _fields(source, "source", ["name", "bytes", "blake3"])
        _text(source["name"], "name of a source")
        _number(source["bytes"], "bytes of a source")
        _hex(source["blake3"], "blake3 of a source")
    return out


def _parse_delta(value: object) -> Delta:
    out = _fields(value, "delta", ["base", "result", "runs"], ["checkpoint"])
    require(out.get("checkpoint", True) is True, "checkpoint is not true")
    runs = []
    for run in _array(out["runs"], "runs"):
        require(len(_array(run, "run")) == 2, "a run is not [first, count]")
        first, count = _number(run[0], "first", -1), _number(run[1], "count", 1)
        require(first + count < 2**63, "first + count of a run is 2^63 or more")
        runs.append((first, count))
    return Delta(_hex(out["base"], "base"), _hex(out["result"], "result"), tuple(runs), "checkpoint" in out)


def _check_runs(delta: Delta, own: int) -> None:
    require(sum(count for first, count in delta.runs if first == -1) == own, "runs do not use every tensor once")
    for (first, count), (next_first, _) in zip(delta.runs, delta.runs[1:], strict=False):
        joined = next_first == (-1 if first == -1 else first + count)
        require(not joined, "two runs could be one")


EXTRAS = ("column_scales", "outliers", "difference")


def _parse_entry(value: object) -> Entry:
    out = _fields(value, "tensor", ["name", "dtype", "shape", "codec", "planes"], ["transposed", "rate", *EXTRAS])
    name = _text(out["name"], "name")
    require(not any(is_control(c) for c in name), "control character in a name")
    require(1 <= len(name.encode("utf-8", "surrogatepass")) <= NAME_LIMIT, "a name is not of 1 to 1024 bytes")
    dtype, codec = _text(out["dtype"], "dtype"), _text(out["codec"], "codec")
    require(dtype in ELEMENT_BYTES, f"unknown dtype {dtype}", "unsupported")
    require(codec == RAW or codec in CODECS, f"unknown codec {codec}", "unsupported")
    shape = tuple(_number(dim, "dimension") for dim in _array(out["shape"], "shape"))
    require(len(shape) <= DIMS_LIMIT, "more than 8 dimensions")
    size = ELEMENT_BYTES[dtype]
    for dim in shape:
        size *= dim or 1
    require(size < 2**63, "the product of the dimensions and the element size is 2^63 or more")
    transposed = out.get("transposed", False)
    require(transposed is True or "transposed" not in out, "transposed is not true")
    if transposed:
        require(len(shape) == 2, "a transposed tensor has not two dimensions")
        require(codec != RAW, "a raw tensor is never transposed")
    if codec != RAW:
        require(dtype in FLOAT_DTYPES, f"{codec} cannot hold {dtype}")
    rate = None
    if "rate" in out:
        rate = _number(out["rate"], "rate", 100)
        require(rate <= 8000 and codec == "ecu_v1", "a rate above 8000, or of a codec that takes none")
    scaled = out.get("column_scales", False)
    require(scaled is True or "column_scales" not in out, "column_scales is not true")
    outliers = _number(out["outliers"], "outliers", 1) if "outliers" in out else 0
    difference = out.get("difference", False)
    require(difference is True or "difference" not in out, "difference is not true")
    sums = dtype in ("F32", "F16", "BF16") and codec != RAW and not transposed
    require(sums or not difference, "a difference in a dtype or an order that has none, or raw")
    rows, cols = matrix(shape, transposed)
    require(codec != RAW or not (scaled or outliers), "a raw tensor with extra planes")
    require(
        outliers <= rows * cols and (not outliers or cols <= 2**32), "more outliers than weights, or too many columns"
    )
    lengths = plane_lengths(codec, dtype, shape, transposed, scaled, outliers)
    planes = []
    for item in _array(out["planes"], "planes"):
        _fields(item, "plane", ["plane", "offset", "bytes", "crc32c", "blake3"], ["coding"])
        coding = _text(item["coding"], "coding") if "coding" in item else None
        require(coding is None or coding in CODINGS, f"unknown coding {coding}", "unsupported")
        planes.append(
            Plane(
                _text(item["plane"], "plane"),
                _number(item["offset"], "offset"),
                _number(item["bytes"], "bytes"),
                _hex(item["crc32c"], "crc32c", None),
                _hex(item["blake3"], "blake3"),
                coding,
            )
        )
    require([p.plane for p in planes] == list(lengths), f"the planes of {codec} are {list(lengths)}")
    for p in planes:
        length = lengths[p.plane]
        if p.coding is None:
            require(p.bytes == length, f"plane {p.plane} has not {length} bytes")
        else:
            layout = CODECS.get(codec)
            takes: tuple[str, ...] = ("words_v1",) if codec == RAW and ELEMENT_BYTES[dtype] in (1, 2, 4) else ()
            if layout is not None:
                row_scales = layout.scale == "F32" and layout.group == 0
                if p.plane.startswith("outlier_"):
                    takes = (OUTLIERS[p.plane],) if row_scales and layout.bits == 8 else ()
                elif p.plane != "column_scales":
                    takes = ("scales_v1",) if p.plane == "scales" and row_scales else ("bytes_v1",)
                if p.plane == "codes" and layout.bits == 8:
                    takes = ("rows_v1", "rows_v2")
            require(p.coding in takes, f"coding {p.coding} of plane {p.plane} of {codec}")
            require(p.bytes < length, f"coded plane {p.plane} is not shorter than {length} bytes")
            require(p.coding == "scales_v1" or length // 16384 <= p.bytes, f"coded plane {p.plane} is too short")
        require(len(p.crc32c) == 8 * -(-p.bytes // CHUNK), "crc32c has not 8 digits per chunk")
    return Entry(name, dtype, shape, transposed, codec, tuple(planes), rate, scaled, outliers, difference)


def _parse_file(value: object) -> File:
    out = _fields(value, "file", ["name", "offset", "bytes", "crc32c", "blake3"])
    name = _text(out["name"], "name of a file")
    require(not any(is_control(c) or c in "/\\:" for c in name), "a character that a file's name may not have")
    require(
        1 <= len(name.encode("utf-8", "surrogatepass")) <= FILE_NAME_LIMIT, "a file's name is not of 1 to 255 bytes"
    )
    ending = next((ending for ending in FILE_ENDINGS if name.endswith(ending)), None)
    require(ending is not None and name != ending, "a file's name has none of the endings")
    require(name != "tenpak.json" and not name.endswith(".safetensors.index.json"), "a name that is reserved")
    file = File(
        name,
        _number(out["offset"], "offset"),
        _number(out["bytes"], "bytes"),
        _hex(out["crc32c"], "crc32c", None),
        _hex(out["blake3"], "blake3"),
    )
    require(file.bytes <= FILE_LIMIT, "a file is longer than the limit")
    require(len(file.crc32c) == 8 * -(-file.bytes // CHUNK), "crc32c has not 8 digits per chunk")
    return file


def contents(header: Header) -> list[tuple[str, Plane | File]]:
    """Give planes and attached files in the order of the file, each with what it is called in messages."""
    planes: list[tuple[str, Plane | File]] = [
        (f"plane {p.plane} of {e.name}", p) for e in header.tensors for p in e.planes
    ]
    return planes + [(f"file {f.name}", f) for f in header.files]


def _check_offsets(header: Header) -> int:
    """Check that planes and files follow each other, and give the offset of the header."""
    at = PREAMBLE
    for what, p in contents(header):
        require(p.offset == align(at), f"{what} is not at {align(at)}")
        at = p.offset + p.bytes
    return align(at)


def identity(tensors: Iterable[Entry]) -> str:
    """BLAKE3-256 of the logical content, as 64 hex digits."""

    def text(s: str) -> bytes:
        raw = s.encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(raw)) + raw

    entries = list(tensors)
    out = [b"tenpak identity 1", struct.pack("<Q", len(entries))]
    for entry in entries:
        out += [text(entry.name), text(entry.dtype), struct.pack("<Q", len(entry.shape))]
        out += [struct.pack("<Q", dim) for dim in entry.shape]
        extra = "+column_scales" * entry.column_scales + "+outliers" * (entry.outliers > 0)
        extra += "+difference" * entry.difference
        out += [bytes([entry.transposed]), text(entry.codec + extra)]
        out += [bytes.fromhex(p.blake3) for p in entry.planes]
    return str(blake3(b"".join(out)).hexdigest())


# Planes and numbers


def unpack(plane: Bytes, bits: int, count: int) -> Bytes:
    """Codes `[rows, count]` of packed rows `[rows, bytes]`."""
    if bits == 8:
        return plane[:, :count]
    per = 8 // bits
    out = np.empty((plane.shape[0], plane.shape[1] * per), np.uint8)
    for i in range(per):
        out[:, i::per] = plane >> i * bits & (1 << bits) - 1
    return out[:, :count]


def pack(codes: Bytes, bits: int, row_bytes: int) -> Bytes:
    """Packed rows `[rows, row_bytes]` of codes `[rows, count]`; what is left over is zero."""
    out = np.zeros((codes.shape[0], row_bytes), np.uint8)
    if bits == 8:
        out[:, : codes.shape[1]] = codes
        return out
    per = 8 // bits
    for i in range(per):
        part = codes[:, i::per]
        out[:, : part.shape[1]] |= part << i * bits
    return out


def _floats(plane: Bytes, dtype: str) -> npt.NDArray[np.float16 | np.float32]:
    return plane.view("<f2" if dtype == "F16" else "<f4")


def _levels(codec: Codec) -> F32:
    """Give the level of every code, without its zero point where there is one."""
    if codec.levels == "table":
        return NF4
    codes = np.arange(1 << codec.bits, dtype=np.float32)
    return codes - np.float32(1 << (codec.bits - 1)) if codec.levels == "signed" else codes


@dataclass(frozen=True)
class Parameters:
    """What a group stores besides its codes, `[rows, groups]`: scales and offsets widened, zero points unpacked.

    With a bank, the scale is that of the row times the multiplier, and there is the number of the table.
    """

    scales: F32
    offsets: F32 | None = None
    zero_points: Bytes | None = None
    tables: Bytes | None = None


def parameters(codec: Codec, planes: Mapping[str, Bytes], cols: int) -> Parameters:
    """Widen the parameters of packed planes `[rows, row bytes]`."""
    offsets = zero_points = None
    if codec.bank is not None:
        tables, multipliers = codec.bank.split(planes["scales"], codec.bits)
        with np.errstate(over="ignore", under="ignore"):
            return Parameters(multipliers * _floats(planes["row_scales"], "F32").astype(np.float32), tables=tables)
    if codec.offset:
        offsets = _floats(planes["offsets"], codec.offset).astype(np.float32)
    if codec.levels == "zero point":
        zero_points = unpack(planes["zero_points"], codec.bits, codec.groups(cols))
    return Parameters(_floats(planes["scales"], codec.scale).astype(np.float32), offsets, zero_points)


def unpack_codes(codec: Codec, planes: Mapping[str, Bytes], cols: int) -> Bytes:
    """Codes `[rows, cols]` of packed planes, the high bits put back."""
    codes = unpack(planes["codes"], codec.plane_bits("codes"), cols)
    if "high_codes" in planes:
        high = unpack(planes["high_codes"], codec.plane_bits("high_codes"), cols)
        codes = (codes | high << 4).astype(np.uint8)
    return codes


def decode_matrix(codec: Codec, planes: Mapping[str, Bytes], cols: int) -> F32:
    """Weights `[rows, cols]` of packed planes `[rows, row bytes]`."""
    stored = parameters(codec, planes, cols)
    group = np.arange(cols) // (codec.group or max(cols, 1))
    codes = unpack_codes(codec, planes, cols)
    if codec.bank is not None and stored.tables is not None:
        level = codec.bank.levels[(stored.tables[:, group].astype(int) << codec.bits) + codes].astype(np.float32)
    else:
        level = _levels(codec)[codes]
    if stored.zero_points is not None:
        level = level - stored.zero_points[:, group].astype(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        weights: F32 = level * stored.scales[:, group]
        if stored.offsets is not None:
            weights = weights + stored.offsets[:, group]
    return weights


def encode(codec: Codec, weights: F32, stored: Parameters) -> Bytes:
    """Codes `[rows, cols]` of weights `[rows, cols]`: the nearest level, ties to the lower code."""
    rows, cols = weights.shape
    group = np.arange(cols) // (codec.group or max(cols, 1))
    scale = stored.scales[:, group]
    with np.errstate(all="ignore"):
        shifted = weights if stored.offsets is None else weights - stored.offsets[:, group]
        ratio = (shifted / scale).astype(np.float64)
    if codec.bank is not None and stored.tables is not None:
        codes: Bytes = np.zeros((rows, cols), np.uint8)
        for table, levels in enumerate(codec.bank.levels.reshape(-1, 1 << codec.bits).astype(np.float64)):
            found = np.searchsorted((levels[1:] + levels[:-1]) / 2, ratio.ravel(), side="left").reshape(rows, cols)
            codes = np.where(stored.tables[:, group] == table, found, codes).astype(np.uint8)
        return np.where(scale == 0, np.uint8(0), codes)
    levels = _levels(codec).astype(np.float64)
    if codec.levels == "signed" and codec.bits == 8:
        levels[0] = -np.inf  # the code of -128 is not used
    zero_points = np.zeros((rows, cols), np.uint8)
    if stored.zero_points is not None:
        zero_points = stored.zero_points[:, group]
        ratio = ratio + zero_points  # exact up to where the code is clamped anyway
    # Levels rise with the code, so the code is the number of midpoints that lie strictly below the weight. Midpoints of
    # singles are exact in double precision.
    midpoints = (levels[1:] + levels[:-1]) / 2
    codes = np.searchsorted(midpoints, ratio.ravel(), side="left").reshape(rows, cols).astype(np.uint8)
    if codec.levels == "signed" and codec.bits == 8:
        codes = np.maximum(codes, 1).astype(np.uint8)
    zero = int(np.flatnonzero(_levels(codec) == 0)[0])
    at_zero = zero_points if stored.zero_points is not None else np.full((rows, cols), zero, np.uint8)
    return np.where(scale == 0, at_zero, codes).astype(np.uint8)


# Files


@dataclass(frozen=True)
class Artifact:
    """An artifact whose bytes have been checked."""

    header: Header
    data: bytes = field(repr=False)

    def entry(self, name: str) -> Entry:
        """Find the entry of a name."""
        return next(entry for entry in self.header.tensors if entry.name == name)

    def stored(self, p: Plane) -> bytes:
        """Bytes of a plane in the file."""
        return self.data[p.offset : p.offset + p.bytes]

    def plane(self, entry: Entry, name: str) -> bytes:
        """Bytes of a plane, decoded where it is coded."""
        p = next(p for p in entry.planes if p.plane == name)
        if p.coding is None:
            return self.stored(p)
        rows, cols = entry.matrix
        try:
            if p.coding == "scales_v1":
                return coded.decode_scales(self.stored(p), rows).astype("<f4").tobytes()
            if p.coding == "bytes_v1":
                return coded.decode_bytes(self.stored(p), rows, CODECS[entry.codec].row_bytes(name, cols)).tobytes()
            if p.coding in OUTLIERS.values():
                return self._outliers(entry, p)
            codes = coded.decode_codes(self.stored(p), rows, cols, 2 if p.coding == "rows_v2" else 1)
        except coded.CodedError as e:
            raise FormatError(f"plane {name} of {entry.name}: {e}") from e
        return pack(codes, 8, CODECS[entry.codec].row_bytes("codes", cols)).tobytes()

    def _outliers(self, entry: Entry, p: Plane) -> bytes:
        """Bytes of a plane of outliers that is coded."""
        rows, cols = entry.matrix
        if p.coding == "counts_v1":
            return coded.decode_counts(self.stored(p), rows).astype("<u4").tobytes()
        counts = np.frombuffer(self.plane(entry, "outlier_counts"), "<u4").astype(np.int64)
        require(int(counts.sum()) == entry.outliers, f"counts of {entry.name} do not add up")
        codes = np.frombuffer(self.plane(entry, "codes"), np.uint8).reshape(rows, -1)[:, :cols]
        width = "<u2" if cols <= 1 << 16 else "<u4"
        if p.coding == "columns_v1":
            return coded.decode_columns(self.stored(p), codes, counts).astype(width).tobytes()
        columns = np.frombuffer(self.plane(entry, "outlier_columns"), width).astype(np.int64)
        require(bool((columns < cols).all()), f"an outlier of {entry.name} beyond its row")
        scales = np.frombuffer(self.plane(entry, "scales"), "<f4")
        factors = np.frombuffer(self.plane(entry, "column_scales"), "<f4") if entry.column_scales else None
        return coded.decode_steps(self.stored(p), codes, counts, columns, scales, factors).astype("<f2").tobytes()

    def file(self, name: str) -> bytes:
        """Bytes of an attached file."""
        f = next(f for f in self.header.files if f.name == name)
        return self.data[f.offset : f.offset + f.bytes]

    def files(self) -> dict[str, bytes]:
        """Give the attached files as `write` takes them."""
        return {f.name: self.file(f.name) for f in self.header.files}

    def matrices(self, entry: Entry) -> dict[str, Bytes]:
        """Packed planes `[rows, row bytes]` of a quantized tensor."""
        rows, cols = entry.matrix
        codec = CODECS[entry.codec]
        return {
            p.plane: np.frombuffer(self.plane(entry, p.plane), np.uint8).reshape(rows, codec.row_bytes(p.plane, cols))
            for p in entry.planes
            if p.plane in codec.planes()
        }

    def extra(self, entry: Entry) -> dict[str, npt.NDArray[Any]]:
        """Give the extra planes of a tensor, checked against each other."""
        rows, cols = entry.matrix
        kinds = {"F32": "<f4", "F16": "<f2", "U32": "<u4", "U16": "<u2"}
        listed = extra_planes(rows, cols, entry.column_scales, entry.outliers)
        out = {name: np.frombuffer(self.plane(entry, name), kinds[kind]) for name, (kind, _) in listed.items()}
        if entry.column_scales:
            scales = out["column_scales"]
            require(bool(np.isfinite(scales).all() and (scales != 0).all()), f"column scales of {entry.name}")
        if entry.outliers:
            counts = out["outlier_counts"].astype(np.int64)
            require(int(counts.sum()) == entry.outliers, f"counts of {entry.name} do not add up")
            require(bool(np.isfinite(out["outlier_values"]).all()), f"outliers of {entry.name} are not finite")
            columns = out["outlier_columns"].astype(np.int64)
            require(bool((columns < cols).all()), f"an outlier of {entry.name} beyond its row")
            flat = np.repeat(np.arange(rows), counts) * cols + columns
            require(bool((np.diff(flat) > 0).all()), f"outliers of {entry.name} do not ascend")
        return out

    def decode(self, entry: Entry) -> F32:
        """Weights of a quantized tensor in the shape and the orientation of the source."""
        rows, cols = entry.matrix
        weights = decode_matrix(CODECS[entry.codec], self.matrices(entry), cols)
        extra = self.extra(entry)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            if entry.column_scales:
                weights = weights * extra["column_scales"]
            if entry.outliers:
                row = np.repeat(np.arange(rows), extra["outlier_counts"].astype(np.int64))
                weights[row, extra["outlier_columns"].astype(np.int64)] += extra["outlier_values"].astype(np.float32)
        return np.ascontiguousarray(weights.T if entry.transposed else weights).reshape(entry.shape)

    def raw(self, entry: Entry) -> bytes:
        """Bytes of a raw tensor in the order of the source."""
        assert entry.codec == RAW
        return self.plane(entry, "data")

    def tensors(self) -> list[Tensor]:
        """Give the tensors as `write` takes them."""
        return [
            Tensor(
                e.name,
                e.dtype,
                e.shape,
                e.codec,
                {p.plane: self.plane(e, p.plane) for p in e.planes},
                e.transposed,
                {p.plane: (p.coding, self.stored(p)) for p in e.planes if p.coding is not None},
                e.rate,
                e.column_scales,
                e.outliers,
            )
            for e in self.header.tensors
        ]


def read(data: bytes, *, header_limit: int = HEADER_LIMIT) -> Artifact:
    """Check all of a file.

    Raises
    ------
    FormatError
        The text does not allow these bytes.
    """
    require(len(data) >= PREAMBLE, "the file is shorter than a preamble")
    magic, version, flags, header_length, file_length, header_crc, rest, preamble_crc = struct.unpack(
        "<8sIIQQI24sI", data[:PREAMBLE]
    )
    require(magic == MAGIC, "wrong magic")
    require(preamble_crc == crc32c(data[:60]), "wrong checksum of the preamble")
    require(version == VERSION, f"unknown version {version}", "unsupported")
    require(
        flags & ~(DELTA_FLAG | CODED_FLAG | EXTRA_FLAG | CHECKPOINT_FLAG) == 0,
        f"unknown flags {flags:#x}",
        "unsupported",
    )
    require(rest == bytes(24), "bytes 36 to 60 are not zero")
    require(file_length <= len(data), "truncated")
    require(file_length >= len(data), "trailing data")
    require(header_length <= header_limit, "the header is longer than the limit")
    require(header_length <= len(data) - PREAMBLE, "the header is longer than the file")
    header_at = len(data) - header_length
    require(header_crc == crc32c(data[header_at:]), "wrong checksum of the header")
    header = parse_header(data[header_at:], is_delta=bool(flags & DELTA_FLAG))
    checkpoint = header.delta is not None and header.delta.checkpoint
    require(checkpoint == bool(flags & CHECKPOINT_FLAG), "field checkpoint and flag bit 3 disagree")
    require(is_coded(header.tensors) == bool(flags & CODED_FLAG), "coded planes and flag bit 1 disagree")
    has_extra = any(e.has_extra for e in header.tensors)
    require(has_extra == bool(flags & EXTRA_FLAG), "extra planes and flag bit 2 disagree")
    require(header_at == _check_offsets(header), "the header is not where planes and files end")
    end = PREAMBLE
    view = memoryview(data)
    for what, p in contents(header):
        require(not any(data[end : p.offset]), f"padding before {what} is not zero")
        end = p.offset + p.bytes
        content = view[p.offset : end]
        require(chunk_checksums(content) == p.crc32c, f"wrong checksum in {what}")
        whole = isinstance(p, Plane) and p.coding is not None
        require(whole or blake3(content).hexdigest() == p.blake3, f"wrong digest of {what}")
    require(not any(data[end:header_at]), "padding before the header is not zero")
    artifact = Artifact(header, data)
    for entry in header.tensors:
        for plane in entry.planes:
            if plane.coding == "words_v1":  # known with the base only
                continue
            digest = blake3(artifact.plane(entry, plane.plane)).hexdigest()
            require(digest == plane.blake3, f"wrong digest of plane {plane.plane} of {entry.name}")
        if entry.codec != RAW:
            _check_content(artifact, entry)
    return artifact


def _check_content(artifact: Artifact, entry: Entry) -> None:
    artifact.extra(entry)
    codec, (_, cols) = CODECS[entry.codec], entry.matrix
    planes = artifact.matrices(entry)
    for name, dtype in codec.floats().items():
        numbers = _floats(planes[name], dtype)
        require(bool(np.isfinite(numbers).all()), f"{name} of {entry.name} are not finite")
        if name == "row_scales":
            require(bool((abs(numbers) < 2.0**112).all()), f"{name} of {entry.name} are too large")
    for name, count in (("codes", cols), ("high_codes", cols), ("zero_points", codec.groups(cols))):
        if name in planes:
            bits = codec.plane_bits(name)
            again = pack(unpack(planes[name], bits, count), bits, planes[name].shape[1])
            require(bool((again == planes[name]).all()), f"unused bits in {name} of {entry.name} are not zero")


@dataclass(frozen=True)
class Tensor:
    """A tensor to write: planes are bytes or arrays, in any shape; an absent plane is all zero."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: str
    planes: Mapping[str, bytes | npt.NDArray[Any]] = field(default_factory=dict)
    transposed: bool = False
    coded: Mapping[str, tuple[str, bytes]] = field(default_factory=dict)
    rate: int | None = None
    column_scales: bool = False
    outliers: int = 0


PROVENANCE: Object = {"tool": "oracle", "recipe": "", "nonfinite": "error", "sources": []}


def write(
    tensors: Iterable[Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    provenance: Object = PROVENANCE,
    delta: Delta | None = None,
    files: Mapping[str, bytes] | None = None,
) -> bytes:
    """Give the bytes of an artifact. Values are not judged, so that what a reader must refuse can be written too."""
    out = bytearray(PREAMBLE)
    entries = []
    for tensor in tensors:
        planes = []
        extra = tensor.column_scales, tensor.outliers
        for name, length in plane_lengths(tensor.codec, tensor.dtype, tensor.shape, tensor.transposed, *extra).items():
            given = tensor.planes.get(name, bytes(length))
            content = given if isinstance(given, bytes) else given.tobytes()
            require(len(content) == length, f"plane {name} of {tensor.name} takes {length} bytes, got {len(content)}")
            out += bytes(align(len(out)) - len(out))
            digest = str(blake3(content).hexdigest())
            coding, stored = tensor.coded.get(name, (None, content))
            planes.append(Plane(name, len(out), len(stored), chunk_checksums(stored), digest, coding))
            out += stored
        what = tensor.name, tensor.dtype, tensor.shape, tensor.transposed, tensor.codec
        entries.append(Entry(*what, tuple(planes), tensor.rate, *extra))
    attached = []
    for name, content in sorted((files or {}).items(), key=lambda item: item[0].encode()):
        out += bytes(align(len(out)) - len(out))
        digest = str(blake3(content).hexdigest())
        attached.append(File(name, len(out), len(content), chunk_checksums(content), digest))
        out += content
    out += bytes(align(len(out)) - len(out))
    header = Header(dict(metadata or {}), provenance, delta, identity(entries), tuple(entries), tuple(attached))
    return seal(bytes(out), print_header(header), (DELTA_FLAG if delta else 0) | content_flags(entries))


def content_flags(tensors: Iterable[Entry]) -> int:
    """Give the flags that follow from the tensors."""
    entries = list(tensors)
    extra = any(entry.has_extra for entry in entries)
    return (CODED_FLAG if is_coded(entries) else 0) | (EXTRA_FLAG if extra else 0)


def seal(front: bytes, header: bytes, flags: int = 0, version: int = VERSION) -> bytes:
    """Make a file of a front (room for the preamble, then planes) and a header, with correct lengths and checksums."""
    length = len(front) + len(header)
    preamble = struct.pack("<8sIIQQI24x", MAGIC, version, flags, len(header), length, crc32c(header))
    return preamble + struct.pack("<I", crc32c(preamble)) + front[PREAMBLE:] + header


def join(directory: Path) -> bytes:
    """Give the bytes of the single file that a directory stands for.

    Raises
    ------
    FormatError
        The shards do not hold what `tenpak.json` says.
    """
    text = (directory / "tenpak.json").read_bytes()
    header = parse_header(text, is_delta=False)
    config = json.loads((directory / "config.json").read_bytes())["quantization_config"]
    require(config["quant_method"] == "tenpak" and config["format"] == 1, "config.json is of another method or format")
    told = {e.name: e for e in header.tensors if e.codec != RAW}
    require(set(config["tensors"]) == set(told), "config.json lists other tensors")
    found: dict[str, tuple[str, list[int], bytes]] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        data = shard.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        entries = json.loads(data[8 : 8 + length])
        crc = entries.pop("__metadata__")["tenpak_header_crc32c"]
        require(crc == f"{crc32c(text):08x}", f"{shard.name} is of another tenpak.json")
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            found[name] = entry["dtype"], entry["shape"], data[8 + length + begin : 8 + length + end]
    out = bytearray(PREAMBLE)
    for entry in header.tensors:
        rows, cols = entry.matrix
        for p in entry.planes:
            name, dtype, shape = entry.name, entry.dtype, list(entry.shape)
            if entry.codec != RAW:
                layout = CODECS[entry.codec]
                base = entry.name.removesuffix(".weight") or entry.name
                name = f"{base}.{p.plane}"
                extra = extra_planes(rows, cols, entry.column_scales, entry.outliers)
                if p.plane in extra:
                    dtype, shape = extra[p.plane][0], [extra[p.plane][1]]
                else:
                    dtype = layout.floats().get(p.plane, "U8")
                    shape = [rows, layout.row_bytes(p.plane, cols) // ELEMENT_BYTES[dtype]]
                if p.coding is not None:
                    dtype, shape = "U8", [p.bytes]
                told_here = config["tensors"][entry.name]
                require(told_here.get("transposed", False) == entry.transposed, "config.json differs in transposed")
                fields = [told_here["codec"], told_here["dtype"], told_here["shape"]]
                require(fields == [entry.codec, entry.dtype, list(entry.shape)], "config.json differs")
                extras = [told_here.get("column_scales", False), told_here.get("outliers", 0)]
                require(extras == [entry.column_scales, entry.outliers], "config.json differs in extra planes")
                require(told_here.get("coding", {}).get(p.plane) == p.coding, "config.json differs in coding")
            got_dtype, got_shape, content = found.pop(name)
            require((got_dtype, got_shape) == (dtype, shape), f"{name} is {got_dtype} of {got_shape}")
            out += bytes(p.offset - len(out)) + content
    require(not found, f"the shards hold more: {sorted(found)}")
    for file in header.files:
        content = (directory / file.name).read_bytes()
        out += bytes(file.offset - len(out)) + (_restored(content) if file.name == "config.json" else content)
    out += bytes(align(len(out)) - len(out))
    return seal(bytes(out), text, content_flags(header.tensors))


def _restored(config: bytes) -> bytes:
    """Take `quantization_config` out of a config to which it was the last field, or the key of which it has taken."""
    text = config.decode()
    decoder = json.JSONDecoder()
    start = text.index('"quantization_config": {\n    "quant_method": "tenpak"')
    _, end = decoder.raw_decode(text, start + len('"quantization_config": '))
    moved = ',\n  "source_quantization_config"'
    if text.startswith(moved, end):
        return (text[:start] + '"quantization_config"' + text[end + len(moved) :]).encode()
    first = text[:start].strip() == "{"
    return (text[: start if first else start - len(",\n  ")] + text[end:]).encode()


def materialize(base: Artifact, deltas: Iterable[Artifact]) -> bytes:
    """Give the bytes of the artifact that a base and a chain of deltas give.

    Raises
    ------
    FormatError
        A delta is not of what stands before it, or gives something else than it says.
    """
    for artifact in deltas:
        delta = artifact.header.delta
        if delta is None:
            raise FormatError("not a delta")
        require(delta.base == base.header.identity, "the delta is of another base")
        from_base, own = base.tensors(), iter(artifact.tensors())
        tensors: list[Tensor] = []
        for first, count in delta.runs:
            require(first + count <= len(from_base), "a run goes beyond the base")
            tensors += [next(own) for _ in range(count)] if first == -1 else from_base[first : first + count]
        header = artifact.header
        data = write(tensors, metadata=header.metadata, provenance=header.provenance, files=artifact.files())
        base = read(data)
        require(base.header.identity == delta.result, "the result has another identity")
    return base.data


@dataclass(frozen=True)
class RawTensor:
    """A tensor of a checkpoint."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def checkpoint_identity(tensors: Mapping[str, RawTensor]) -> str:
    """Give the identity of a checkpoint."""
    names = sorted(tensors, key=lambda name: name.encode())
    planes = {name: Plane("data", 0, 0, "", str(blake3(tensors[name].data).hexdigest())) for name in names}
    return identity(Entry(n, tensors[n].dtype, tensors[n].shape, False, RAW, (planes[n],)) for n in names)


def fine_tuned(base: Mapping[str, RawTensor], delta: Artifact) -> dict[str, RawTensor]:
    """Give the checkpoint that a delta makes of another one.

    Raises
    ------
    FormatError
        The delta is not of this checkpoint, or gives something else than it says.
    """
    section = delta.header.delta
    require(section is not None and section.checkpoint, "not a delta of a checkpoint")
    assert section is not None
    require(section.base == checkpoint_identity(base), "the delta is of another base")
    names = sorted(base, key=lambda name: name.encode())
    own = iter(delta.header.tensors)
    out: dict[str, RawTensor] = {}
    for first, count in section.runs:
        require(first + count <= len(names), "a run goes beyond the base")
        if first != -1:
            out |= {name: base[name] for name in names[first : first + count]}
            continue
        for entry in (next(own) for _ in range(count)):
            old = base.get(entry.name)
            words = entry.planes[0].coding == "words_v1"
            if words or entry.difference:
                alike = old is not None and (old.dtype, old.shape) == (entry.dtype, entry.shape)
                require(alike, f"{entry.name} is a difference of nothing")
            if words:
                assert old is not None
                try:
                    data = coded.decode_words(delta.stored(entry.planes[0]), old.data, ELEMENT_BYTES[entry.dtype])
                except coded.CodedError as e:
                    raise FormatError(f"{entry.name}: {e}") from e
                require(blake3(data).hexdigest() == entry.planes[0].blake3, f"wrong digest of {entry.name}")
            elif entry.difference:
                assert old is not None
                data = add(entry.dtype, old.data, delta.decode(entry))
            else:
                data = delta.raw(entry)
            out[entry.name] = RawTensor(entry.dtype, entry.shape, data)
    require(list(out) == sorted(out, key=lambda name: name.encode()), "the result is not sorted")
    require(checkpoint_identity(out) == section.result, "the result has another identity")
    return out


def add(dtype: str, old: bytes, difference: F32) -> bytes:
    """Bytes of the base's elements with a difference added, in the dtype of the base."""
    if dtype == "BF16":
        wide = (np.frombuffer(old, "<u2").astype("<u4") << 16).view("<f4")
    else:
        wide = np.frombuffer(old, "<f2" if dtype == "F16" else "<f4").astype("<f4")
    total = wide + difference.ravel()
    if dtype == "F32":
        return total.astype("<f4").tobytes()
    if dtype == "F16":
        return np.clip(total, np.float32(-65504), np.float32(65504)).astype("<f2").tobytes()
    most = np.array([0x7F7F0000], "<u4").view("<f4")[0]
    bits = np.clip(total, -most, most).view("<u4").astype(np.int64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()


def main(paths: Sequence[str]) -> int:
    """Check files and print what they hold."""
    for path in paths:
        artifact = read(Path(path).read_bytes())
        for entry in artifact.header.tensors:
            print(f"{entry.name}\t{entry.dtype}\t{list(entry.shape)}\t{entry.codec}")
        print(f"{path}: sound, identity {artifact.header.identity}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
