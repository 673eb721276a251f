"""Coded planes: the decoder that was written from the text alone reads what the Rust code writes.

`tests/data/coded` holds streams that a Rust test pins; their codes follow from a formula that both tests state.
"""

from pathlib import Path

import coded
import numpy as np
import pytest

DATA = Path(__file__).parent.parent / "data" / "coded"
STREAMS = sorted(DATA.glob("codes-*.hex"))


def codes(rows: int, cols: int, spread: int, method: int) -> np.ndarray:
    seed = 1
    out = np.zeros((rows, cols), np.uint8)
    for row in range(rows):
        state = 0
        for col in range(cols):
            seed = (seed * 6364136223846793005 + 1442695040888963407) % 2**64
            level = sum(seed >> shift & 63 for shift in (40, 46, 52, 58)) - 126
            level = level * spread * (row % 5 + 1) * (col % 3 + 1) // 512
            code = min(max(level, -120), 120) + 128
            if method:
                odd, second = coded.TRELLISES[method]
                code += (code ^ state) & 1
                state = state >> 1 ^ odd * (state & 1) ^ second * (code >> 1 & 1)
            out[row, col] = code
    return out


@pytest.mark.parametrize("path", STREAMS, ids=lambda path: path.stem)
def test_a_pinned_stream_decodes_to_its_codes(path):
    rows, cols, spread, method = map(int, path.stem.split("-")[1:])
    stream = bytes.fromhex(path.read_text())
    np.testing.assert_array_equal(coded.decode_codes(stream, rows, cols), codes(rows, cols, spread, method))


def test_there_are_streams_of_both_kinds():
    assert {path.stem.split("-")[4] == "0" for path in STREAMS} == {True, False}


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_pinned_scales_decode(kind):
    rows = [1, 7, 3][kind] * 5
    want = np.float32(0.5) + np.arange(rows) * [0, 0, 1][kind] + (np.arange(rows) % 4 == 1) * np.float32(kind == 1)
    data = bytes.fromhex((DATA / f"scales-{kind}.hex").read_text())
    assert data[0] == kind
    np.testing.assert_array_equal(coded.decode_scales(data, rows), want.astype(np.float32))


@pytest.mark.parametrize("path", STREAMS[:2], ids=lambda path: path.stem)
def test_a_stream_of_another_length_is_refused(path):
    rows, cols, _, _ = map(int, path.stem.split("-")[1:])
    stream = bytes.fromhex(path.read_text())
    for bad in (stream[:-1], stream[: len(stream) // 2], stream + b"\0", b""):
        with pytest.raises(coded.CodedError):
            coded.decode_codes(bad, rows, cols)


@pytest.mark.parametrize("path", sorted(DATA.glob("bytes-*.hex")), ids=lambda path: path.stem)
def test_pinned_bytes_decode(path):
    rows, row, size = map(int, path.stem.split("-")[1:])
    stream = bytes.fromhex(path.read_text())
    assert stream[0] == size
    want = codes(rows, row, 0 if rows == 5 else 40, 0)
    np.testing.assert_array_equal(coded.decode_bytes(stream, rows, row), want)
    for bad in (stream[:-1], stream[: len(stream) // 2], stream + b"\0", b""):
        with pytest.raises(coded.CodedError):
            coded.decode_bytes(bad, rows, row)


def clipped(rows: int, cols: int, spread: int) -> np.ndarray:
    """Codes of which many are at the ends, as the Rust test makes them."""
    out = codes(rows, cols, spread, 0) if spread else np.full((rows, cols), 128, np.uint8)
    out = np.where(out <= 28, 1, np.where(out >= 228, 255, out)).astype(np.uint8)
    if spread == 0:
        out.reshape(-1)[::499] = 255
    return out


@pytest.mark.parametrize("path", sorted(DATA.glob("clipped-*.hex")), ids=lambda path: path.stem)
def test_pinned_codes_at_the_ends_decode(path):
    rows, cols, spread = map(int, path.stem.split("-")[1:])
    stream = bytes.fromhex(path.read_text())
    np.testing.assert_array_equal(coded.decode_codes(stream, rows, cols, 2), clipped(rows, cols, spread))
    with pytest.raises(coded.CodedError):
        coded.decode_codes(stream, rows, cols, 1)


@pytest.mark.parametrize("path", sorted(DATA.glob("counts-*.hex")), ids=lambda path: path.stem)
def test_pinned_outliers_decode(path):
    rows, cols, spread = map(int, path.stem.split("-")[1:])
    name = path.stem.removeprefix("counts")
    counts, columns, steps = (
        bytes.fromhex((DATA / f"{kind}{name}.hex").read_text()) for kind in ("counts", "columns", "tails")
    )
    plane = clipped(rows, cols, spread)
    places = np.flatnonzero(abs(plane.reshape(-1).astype(int) - 128) == 127)
    places = places[places % 7 != 3]
    want = np.bincount(places // cols, minlength=rows)
    np.testing.assert_array_equal(coded.decode_counts(counts, rows), want)
    np.testing.assert_array_equal(coded.decode_columns(columns, plane, want), places % cols)
    numbers = 1 + (places * 7919 % 2**32 % 64) * np.where(places % 97 == 0, 200_000, 1)
    scales, factors = np.full(rows, 2.0**-10, np.float32), np.full(cols, 0.5, np.float32)
    values = np.where(plane.reshape(-1)[places] < 128, -1, 1) * numbers * 2.0**-10
    decoded = coded.decode_steps(steps, plane, want, places % cols, scales, None)
    np.testing.assert_array_equal(decoded, values.astype(np.float16))
    decoded = coded.decode_steps(steps, plane, want, places % cols, scales, factors)
    np.testing.assert_array_equal(decoded, (values / 2).astype(np.float16))
    for bad in (columns[:-1], columns + b"\0", b"\0" + columns[1:], b""):
        with pytest.raises(coded.CodedError):
            coded.decode_columns(bad, plane, want)
    for bad in (steps[:-1], steps + b"\0", b""):
        with pytest.raises(coded.CodedError):
            coded.decode_steps(bad, plane, want, places % cols, scales, None)
