"""An independent decoder of coded planes, in numpy.

Written from *Coded planes* in `src/artifact/FORMAT.md` alone, so that the text and the Rust code check each other. It
favours being obviously right over being fast, and shares no code with the package.

| function | what |
|---|---|
| `decode_codes` | a stream to codes `[rows, cols]` |
| `decode_scales` | coded scales to float32 `[rows]` |
| `decode_bytes` | coded bytes to the plane `[rows, row]` |
| `decode_words` | coded words to those of a tensor, given the base's |
| `decode_counts` | coded counts of outliers to `[rows]` |
| `decode_columns` | columns of outliers, given codes and counts |
| `decode_steps` | values of outliers, given codes, counts, columns and scales |
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

LANES = 32
TOTAL = 4096
LOW = 1 << 16
ZERO = 128
SHAPES = (2, 4, 6, 8, 12, 16, 24, 32, 64, 128)
ROOTS = (
    1.0108892860517005,
    1.0218971486541167,
    1.0442737824274138,
    1.0905077326652577,
    1.189207115002721,
    1.4142135623730951,
)
TRELLISES = {2: (2, 1), 3: (5, 2), 4: (9, 2), 5: (18, 4), 6: (33, 10), 7: (78, 43), 8: (166, 121)}


class CodedError(Exception):
    """Bytes that the text refuses."""


def require(condition: bool, what: str) -> None:
    """Raise `CodedError` unless the condition holds."""
    if not condition:
        raise CodedError(what)


class Decisions:
    """The binary range coder, reading."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.range = 2**32 - 1
        self.code = 0
        for _ in range(4):
            self.code = self.code * 256 + self._next()

    def _next(self) -> int:
        byte = self.data[self.at] if self.at < len(self.data) else 0
        self.at += 1
        return byte

    def bit(self, odds: list[int], index: int) -> int:
        """One decision, whose probability `odds[index]` learns from it."""
        bound = self.range // 4096 * odds[index]
        bit = int(self.code >= bound)
        if bit:
            self.range -= bound
            self.code -= bound
            odds[index] -= odds[index] // 16
        else:
            self.range = bound
            odds[index] += (4096 - odds[index]) // 16
        while self.range < 1 << 24:
            self.range *= 256
            self.code = self.code * 256 + self._next()
        return bit

    def finish(self) -> None:
        """Refuse bytes that were not read, and a zero at the end."""
        require(self.at >= len(self.data) and self.data[-1:] != b"\0", "bytes left over")


def deviations(source: Decisions, count: int) -> list[int]:
    """Read as many deviations."""
    more = [[2048] * 16 for _ in range(3)]
    sign = [2048]
    values = []
    before = 0
    for _ in range(count):
        n = 0
        while n < 127 and source.bit(more[min(before, 2)], min(n, 15)):
            n += 1
        before = n
        values.append(-n if n > 0 and source.bit(sign, 0) else n)
    return values


def half(nu: int, x: float) -> float:
    """Probability from 0 to `x` of Student's t with `nu` degrees of freedom."""
    square = x * x
    ratio = nu / (nu + square)
    term = total = 1.0
    for i in range(1, nu // 2):
        term = term * (ratio * ((2 * i - 1) / (2 * i)))
        total = total + term
    return (0.5 * (x / math.sqrt(nu + square))) * total


def deviation(exponent: int) -> float:
    """`2^(exponent / 64)`."""
    sigma = 1.0
    for bit, root in enumerate(ROOTS):
        if exponent >> bit & 1:
            sigma *= root
    octaves = exponent >> 6
    for _ in range(abs(octaves)):
        sigma *= 0.5 if octaves < 0 else 2.0
    return sigma


@dataclass
class Table:
    """For each of 4096 slots: the symbol, its start and its frequency."""

    symbol: npt.NDArray[np.int64]
    start: npt.NDArray[np.int64]
    freq: npt.NDArray[np.int64]


def table(nu: int, sigma: float, kind: str, ends: bool) -> Table:
    """Build the table of a context; `kind` is `plain`, `even` or `odd`, `ends` whether last levels stand for more."""
    escapes = {"plain": [0], "even": [0, 2], "odd": [1, 3]}[kind]
    levels = list({"plain": range(128), "even": range(0, 125, 2), "odd": range(1, 124, 2)}[kind])
    rooms = [0.5 if kind == "plain" else 1.0] * len(levels)
    if kind == "odd" and sigma < 1.5:
        levels, rooms = [0, *levels], [0.5, *rooms]
    upper: list[float] = []
    for level, room in zip(levels, rooms, strict=True):
        end = half(nu, (level + room) / sigma)
        if len(upper) >= 2 and end - upper[-1] < 1 / 8192:
            break
        upper.append(end)
    if ends and len(upper) == len(levels):
        upper[-1] = 0.5
    levels = levels[: len(upper)]
    inside = upper[-1]
    outside = 1.0 - 2.0 * inside
    symbols = [(escape, outside * (j + 1) / len(escapes)) for j, escape in enumerate(escapes)]
    for i in reversed(range(len(levels))):
        if levels[i] > 0:
            symbols.append((ZERO - levels[i], outside + (inside - (upper[i - 1] if i else 0.0))))
    symbols += [(ZERO + level, outside + (inside + end)) for level, end in zip(levels, upper, strict=True)]
    return filled(symbols)


def filled(symbols: list[tuple[int, float]]) -> Table:
    """Build the table of symbols with their ends."""
    built = Table(*(np.zeros(TOTAL, np.int64) for _ in range(3)))
    start = 0
    for i, (symbol, end) in enumerate(symbols, 1):
        stop = max(start + 1, min(TOTAL - len(symbols) + i, math.floor(end * TOTAL + 0.5)))
        built.symbol[start:stop], built.start[start:stop], built.freq[start:stop] = symbol, start, stop - start
        start = stop
    require(start == TOTAL, "frequencies that do not sum to 4096")
    return built


def decode_codes(data: bytes, rows: int, cols: int, version: int = 1) -> Bytes:
    """Codes `[rows, cols]` of a stream of `rows_v1` or `rows_v2`.

    Raises
    ------
    CodedError
        When the text refuses the stream.
    """
    if rows * cols == 0:
        require(not data, "a stream for no codes")
        return np.zeros((rows, cols), np.uint8)
    require(rows * cols // 8192 <= len(data) and len(data) >= 12, "a short stream")
    method, shape, base, contexts, centre, vary, ends, length = struct.unpack_from("<BBhBBBBI", data)
    require(method == 0 or method in TRELLISES, "method")
    require(shape < len(SHAPES) and -384 <= base <= 448, "shape or base")
    require(1 <= contexts <= 96 and centre < contexts and vary <= 3 and ends == version - 1, "contexts or flags")
    rows_per_block = LANES * max(1, 8192 // cols)
    blocks = -(-rows // rows_per_block)
    require(len(data) >= 12 + length + 8 * blocks, "a short head")
    source = Decisions(data[12 : 12 + length])
    row_deviations = np.array(deviations(source, rows) if vary & 1 else [0] * rows)
    col_deviations = np.array(deviations(source, cols) if vary & 2 else [0] * cols)
    if vary:
        source.finish()
    else:
        require(length == 0, "deviations that do not follow")
    kinds = ("even", "odd") if method else ("plain",)
    tables = [
        [table(SHAPES[shape], deviation(base + 8 * k), kind, ends == 1) for k in range(contexts)] for kind in kinds
    ]
    symbols, starts, freqs = (
        np.array([[getattr(t, name) for t in kind] for kind in tables]) for name in ("symbol", "start", "freq")
    )
    odd, second = TRELLISES.get(method, (0, 0))
    codes = np.zeros((rows, cols), np.uint8)
    at = 12 + length + 8 * blocks
    for block in range(blocks):
        words_count, escapes_count = struct.unpack_from("<II", data, 12 + length + 8 * block)
        first, last = block * rows_per_block, min((block + 1) * rows_per_block, rows)
        lanes = min(LANES, last - first)
        require(max(words_count, escapes_count) <= (last - first) * cols, "more words or escapes than codes")
        end = at + 4 * lanes + 2 * words_count + escapes_count
        require(end <= len(data), "a short block")
        state = np.frombuffer(data, "<u4", lanes, at).astype(np.int64)
        words = np.frombuffer(data, "<u2", words_count, at + 4 * lanes).astype(np.int64)
        escaped = data[end - escapes_count : end]
        require(bool((state >= LOW).all()), "a low state")
        taken = 0
        for set_ in range(first, last, LANES):
            here = np.arange(set_, min(set_ + LANES, last))
            machine = np.zeros(len(here), np.int64)
            for col in range(cols):
                context = np.clip(centre + row_deviations[here] + col_deviations[col], 0, contexts - 1)
                quantizer = machine & 1 if method else 0
                x = state[: len(here)]
                slot = x % TOTAL
                symbol = symbols[quantizer, context, slot]
                x = freqs[quantizer, context, slot] * (x // TOTAL) + slot - starts[quantizer, context, slot]
                low = np.flatnonzero(x < LOW)
                require(taken + len(low) <= words_count, "too few words")
                x[low] = x[low] * LOW + words[taken : taken + len(low)]
                taken += len(low)
                state[: len(here)] = x
                codes[here, col] = symbol
                machine = machine >> 1 ^ odd * (machine & 1) ^ second * (symbol >> 1 & 1)
        require(taken == words_count and bool((state == LOW).all()), "words left over, or a wrong state")
        flat = codes[first:last].reshape(-1)
        places = np.flatnonzero(flat < (4 if method else 1))
        require(len(places) == escapes_count, "escapes and escaped codes do not match")
        for place, code in zip(places, escaped, strict=True):
            escape = int(flat[place])
            fits = not method or code % 4 == escape or (code == ZERO and escape == 1)
            require(code != 0 and fits, "an escaped code of another kind")
            flat[place] = code
        codes[first:last] = flat.reshape(last - first, cols)
        at = end
    require(at == len(data), "bytes left over")
    return codes


def decode_scales(data: bytes, rows: int) -> F32:
    """Scales `[rows]` of coded scales.

    Raises
    ------
    CodedError
        When the text refuses the bytes.
    """
    if rows == 0:
        require(not data, "bytes for no scales")
        return np.zeros(0, np.float32)
    require(len(data) > 0, "no bytes")
    if data[0] == 0:
        require(len(data) == 5, "length")
        return np.repeat(np.frombuffer(data, "<f4", 1, 1), rows).astype(np.float32)
    if data[0] == 2:
        require(len(data) == 1 + 4 * rows, "length")
        return np.frombuffer(data, "<f4", rows, 1).astype(np.float32)
    require(data[0] == 1 and len(data) >= 2 and len(data) >= 2 + 4 * (data[1] + 1), "kind or length")
    count = data[1] + 1
    values = np.frombuffer(data, "<f4", count, 2)
    source = Decisions(data[2 + 4 * count :])
    odds = [2048] * 256
    which = []
    for _ in range(rows):
        node = 1
        for _ in range(8):
            node = 2 * node + source.bit(odds, node)
        require(node - 256 < count, "a scale that is not there")
        which.append(node - 256)
    source.finish()
    return values[which].astype(np.float32)


def frequencies(data: bytes, at: int) -> tuple[Integers, int]:
    """Read how often each of 256 symbols is; give the place behind it, too."""
    require(len(data) >= at + 32, "a short table")
    present = np.flatnonzero(np.unpackbits(np.frombuffer(data, np.uint8, 32, at), bitorder="little"))
    require(len(data) >= at + 32 + 2 * len(present), "a short table")
    freq = np.zeros(256, np.int64)
    freq[present] = np.frombuffer(data, "<u2", len(present), at + 32)
    require(bool(((freq[present] >= 1) & (freq[present] < TOTAL)).all()) and freq.sum() == TOTAL, "frequencies")
    return freq, at + 32 + 2 * len(present)


def decode_bytes(data: bytes, rows: int, row: int) -> Bytes:
    """Bytes `[rows, row]` of coded bytes.

    Raises
    ------
    CodedError
        When the text refuses the stream.
    """
    if rows * row == 0:
        require(not data, "a stream for no bytes")
        return np.zeros((rows, row), np.uint8)
    require(len(data) >= 4 and data[0] in (1, 2, 4, 8) and data[1:4] == b"\0\0\0", "head")
    size = data[0]
    require(row % size == 0, "rows of parts of elements")
    at = 4
    tables = []
    for _ in range(size):
        freq, at = frequencies(data, at)
        start = np.cumsum(freq) - freq
        symbol = np.repeat(np.arange(256), freq)
        tables.append(Table(symbol, start[symbol], freq[symbol]))
    symbols, starts, freqs = (np.array([getattr(t, name) for t in tables]) for name in ("symbol", "start", "freq"))
    rows_per_block = max(1, (1 << 18) // row)
    blocks = -(-rows // rows_per_block)
    require(len(data) >= at + 4 * blocks, "a short index")
    counts = np.frombuffer(data, "<u4", blocks, at).astype(np.int64)
    at += 4 * blocks
    plane = np.zeros(rows * row, np.uint8)
    for block in range(blocks):
        first, last = block * rows_per_block * row, min((block + 1) * rows_per_block, rows) * row
        end = at + 4 * LANES + 2 * int(counts[block])
        require(end <= len(data), "a short block")
        state = np.frombuffer(data, "<u4", LANES, at).astype(np.int64)
        words = np.frombuffer(data, "<u2", int(counts[block]), at + 4 * LANES).astype(np.int64)
        require(bool((state >= LOW).all()), "a low state")
        taken = 0
        for i in range(first, last, LANES):
            here = min(LANES, last - i)
            x, kind = state[:here], np.arange(here) % size
            slot = x % TOTAL
            plane[i : i + here] = symbols[kind, slot]
            x = freqs[kind, slot] * (x // TOTAL) + slot - starts[kind, slot]
            low = np.flatnonzero(x < LOW)
            require(taken + len(low) <= len(words), "too few words")
            x[low] = x[low] * LOW + words[taken : taken + len(low)]
            taken += len(low)
            state[:here] = x
        require(taken == len(words) and bool((state == LOW).all()), "words left over, or a wrong state")
        at = end
    require(at == len(data), "bytes left over")
    return plane.reshape(rows, row)


class Numbers:
    """Whole numbers: the octave in unary, then the bits below the first one, of which three are learned."""

    def __init__(self) -> None:
        self.octave = [2048] * 24
        self.below = [[2048] * 8 for _ in range(24)]

    def read(self, source: Decisions) -> int:
        """Read a number."""
        k = 0
        while k < 23 and source.bit(self.octave, k):
            k += 1
        m = 1
        for _ in range(k):
            m = 2 * m + (source.bit(self.below[k], m) if m < 8 else source.bit([2048], 0))
        return m - 1


def decode_counts(data: bytes, rows: int) -> Integers:
    """Read counts `[rows]` of outliers.

    Raises
    ------
    CodedError
        When the text refuses the bytes.
    """
    source, numbers = Decisions(data), Numbers()
    counts = [numbers.read(source) for _ in range(rows)]
    source.finish()
    return np.array(counts, np.int64)


def blocks_of(data: bytes, rows: int, cols: int) -> list[tuple[int, int, bytes]]:
    """First row, last row and bytes of each block, behind the lengths at the start of `data`."""
    step = LANES * max(1, 8192 // cols)
    count = -(-rows // step)
    require(len(data) >= 4 * count, "a short index")
    at = 4 * count
    out = []
    for block, length in enumerate(np.frombuffer(data, "<u4", count).tolist()):
        out.append((block * step, min((block + 1) * step, rows), data[at : at + length]))
        at += length
    require(at == len(data), "a stream of another length")
    return out


def decode_columns(data: bytes, codes: Bytes, counts: Integers) -> Integers:
    """Columns of all outliers, given codes `[rows, cols]` and counts `[rows]`.

    Raises
    ------
    CodedError
        When the text refuses the stream.
    """
    require(len(data) > 0 and 1 <= data[0] <= 127, "least")
    magnitudes = np.minimum(abs(codes.astype(np.int64) - ZERO), 127)
    columns = []
    for first, last, block in blocks_of(data[1:], *codes.shape):
        source, odds, decided = Decisions(block), [2048] * 128, False
        for row in range(first, last):
            missing = int(counts[row])
            for column in np.flatnonzero(magnitudes[row] >= data[0]).tolist():
                if missing == 0:
                    break
                decided = True
                if source.bit(odds, int(magnitudes[row, column])):
                    columns.append(column)
                    missing -= 1
            require(missing == 0, "too few codes at the ends")
        require(decided or not block, "bytes of nothing")
        source.finish()
    return np.array(columns, np.int64)


def greatest(kind: int) -> int:
    """Return the greatest number of a class."""
    return kind if kind < 16 else ((9 + kind % 8) << (kind // 8 - 1)) - 1


def tail(nu: int, sigma: float, last: int) -> Table:
    """Build the table of classes 1 to `last`."""
    inside = half(nu, 127.5 / sigma)
    beyond = 0.5 - inside
    require(beyond >= 2**-20, "a distribution without a tail")
    ends = [(half(nu, (127.5 + greatest(kind)) / sigma) - inside) / beyond for kind in range(1, last)]
    return filled(list(enumerate([*ends, 1.0], 1)))


def decode_numbers(block: bytes, classes: Table, count: int) -> list[int]:
    """Numbers of steps `[count]` of a block."""
    require(len(block) >= 8 and len(block) % 2 == 0, "a short block")
    states = np.frombuffer(block, "<u4", 2).tolist()
    words = np.frombuffer(block, "<u2", -1, 8).tolist()
    require(min(states) >= LOW, "a low state")
    taken = 0

    def take(lane: int, start: int, freq: int) -> None:
        nonlocal taken
        state = freq * (states[lane] // TOTAL) + states[lane] % TOTAL - start
        if state < LOW:
            require(taken < len(words), "too few words")
            state = state * LOW + words[taken]
            taken += 1
        states[lane] = state

    numbers = []
    for i in range(count):
        slot = states[i % 2] % TOTAL
        kind = int(classes.symbol[slot])
        take(i % 2, int(classes.start[slot]), int(classes.freq[slot]))
        rest = max(0, kind // 8 - 1)
        number = kind if rest == 0 else (8 + kind % 8) << rest
        while rest > 0:
            bits = min(rest, 12)
            rest -= bits
            freq = 2 ** (12 - bits)
            found = states[i % 2] % TOTAL // freq
            take(i % 2, found * freq, freq)
            number += found << rest
        numbers.append(number)
    require(taken == len(words) and states == [LOW, LOW], "words left over, or a wrong state")
    return numbers


def decode_steps(
    data: bytes, codes: Bytes, counts: Integers, columns: Integers, scales: F32, column_scales: F32 | None
) -> npt.NDArray[np.float16]:
    """Values of all outliers, given codes `[rows, cols]`, counts and scales `[rows]` and all columns.

    Raises
    ------
    CodedError
        When the text refuses the stream.
    """
    rows = np.repeat(np.arange(len(counts)), counts)
    require(len(data) >= 3 and data[0] < len(SHAPES) and data[1] < 128 and 2 <= data[2] <= 175, "head")
    classes = tail(SHAPES[data[0]], deviation(8 * data[1]), data[2])
    steps = []
    for first, last, block in blocks_of(data[3:], *codes.shape):
        number = int(counts[first:last].sum())
        require(number > 0 or not block, "bytes of nothing")
        if number:
            steps += decode_numbers(block, classes, number)
    step = scales[rows] if column_scales is None else scales[rows] * column_scales[columns]
    with np.errstate(over="ignore", invalid="ignore"):
        values = (np.array(steps, np.float32) * step).astype(np.float16)
    require(bool(np.isfinite(values).all()), "a value that is not finite")
    return np.where(codes[rows, columns] < ZERO, -values, values)


def decode_words(data: bytes, base: bytes, size: int) -> bytes:
    """Words of `size` bytes, given those that they differ from.

    Raises
    ------
    CodedError
        When the text refuses the stream.
    """
    bits, top = 8 * size, 1 << (8 * size - 1)
    old = [int(w) for w in np.frombuffer(base, f"<u{size}")]
    tables = data[0] if data else 0
    require(1 <= tables <= 64 and len(data) >= tables, "number of tables")
    keys = [0, *data[1:tables]]
    require(all(a < b for a, b in zip(keys, keys[1:], strict=False)), "keys do not ascend")
    at = tables
    freqs, starts, symbols = [], [], []
    for _ in range(tables):
        freq, at = frequencies(data, at)
        require(not freq[64 + 4 * (bits - 6) :].any(), "a symbol of longer words")
        freqs.append([int(f) for f in freq])
        starts.append([int(s) for s in np.cumsum(freq) - freq])
        symbols.append([int(s) for s in np.repeat(np.arange(256), freq)])
    blocks = -(-len(old) // 65536)
    require(len(data) >= at + 8 * blocks, "a short index")
    index = struct.unpack_from(f"<{2 * blocks}I", data, at)
    at += 8 * blocks
    out = []
    for block in range(blocks):
        count, more = index[2 * block : 2 * block + 2]
        require(len(data) >= at + 16 + 2 * count + more, "a short block")
        states = list(struct.unpack_from("<4I", data, at))
        require(min(states) >= LOW, "a low state")
        words = iter(struct.unpack_from(f"<{count}H", data, at + 16))
        at += 16 + 2 * count
        follow, taken = int.from_bytes(data[at : at + more], "little"), 0
        at += more
        for i, word in enumerate(old[block * 65536 : (block + 1) * 65536]):
            key = (word << 1 & ((1 << bits) - 1)) >> (bits - 8)
            table = max(t for t in range(tables) if keys[t] <= key)
            state = states[i % 4]
            slot = state % TOTAL
            symbol = symbols[table][slot]
            state = freqs[table][symbol] * (state // TOTAL) + slot - starts[table][symbol]
            if state < LOW:
                following = next(words, None)
                require(following is not None, "too few words")
                state = state * LOW + (following or 0)
            states[i % 4] = state
            difference = symbol
            if symbol >= 64:
                length = (symbol - 64) // 4 + 7
                difference = (4 + (symbol - 64) % 4) << (length - 3)
                difference += (follow >> taken) & ((1 << (length - 3)) - 1)
                taken += length - 3
            d = difference // 2 if difference % 2 == 0 else -(difference + 1) // 2
            integer = (word + top if word < top else 2 * top - 1 - word) + d
            integer %= 1 << bits
            out.append(integer - top if integer >= top else 2 * top - 1 - integer)
        require(next(words, None) is None and states == [LOW] * 4, "words left over, or a wrong state")
        require(-(-taken // 8) == more and follow >> taken == 0, "bits left over")
    require(at == len(data), "bytes left over")
    return np.array(out, f"<u{size}").tobytes()
