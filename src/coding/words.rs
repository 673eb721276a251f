//! A tensor on disk as what it differs from another of its dtype and shape: words of 1, 2 or 4 bytes, coded by rANS.
//!
//! A word counts along the order of the numbers that it stands for, so that neighbouring floats are neighbouring
//! integers, and what is coded is the difference of the two integers. How far a fine-tuned weight has moved, in steps of
//! its float, depends on how fine the steps are where it stands: so the frequencies depend on the exponent of the base's
//! word, of which neighbouring ones share a table where two would cost more than they save. A small difference is a
//! symbol; of a large one the length and two more bits are, and the rest follows as it is.

#![expect(clippy::cast_possible_truncation, reason = "words, symbols and frequencies are small by construction")]

use std::ops::Range;

use super::block::{LOW, put, slots, take};
use super::bytes::{frequencies, read, write};
use super::context::log2;
use super::table::{LOG_TOTAL, TOTAL, Table};
use crate::error::{Error, Result};

/// Elements of a block.
pub const BLOCK: usize = 1 << 16;
/// Lanes of a block.
const LANES: usize = 4;
/// Differences below this are symbols.
const DIRECT: u32 = 64;
/// Bits of the least difference that is none.
const SHORTEST: u32 = 7;
/// Keys of base words: the eight bits behind the sign.
const KEYS: usize = 256;
/// The most tables.
const MOST_TABLES: usize = 64;

/// Symbols of words of so many bits.
const fn symbols(bits: u32) -> usize {
    (DIRECT + 4 * (bits + 1 - SHORTEST)) as usize
}

/// Whether words of so many bytes can be coded.
#[must_use]
pub const fn is_width(bytes: u64) -> bool {
    matches!(bytes, 1 | 2 | 4)
}

/// How words of `bits` bits are compared.
#[derive(Debug, Clone, Copy)]
struct Width {
    bits: u32,
}

impl Width {
    fn new(bytes: usize) -> Self {
        assert!(is_width(bytes as u64), "words of {bytes} bytes");
        Self { bits: 8 * bytes as u32 }
    }

    fn bytes(self) -> usize {
        self.bits as usize / 8
    }

    fn mask(self) -> u32 {
        u32::MAX >> (32 - self.bits)
    }

    fn top(self) -> u32 {
        1 << (self.bits - 1)
    }

    fn load(self, bytes: &[u8], index: usize) -> u32 {
        let mut word = [0; 4];
        let size = self.bytes();
        word[..size].copy_from_slice(&bytes[index * size..][..size]);
        u32::from_le_bytes(word)
    }

    fn store(self, bytes: &mut [u8], index: usize, word: u32) {
        let size = self.bytes();
        bytes[index * size..][..size].copy_from_slice(&word.to_le_bytes()[..size]);
    }

    /// The integer of a word: as floats ascend, so do these.
    fn ordered(self, word: u32) -> u32 {
        if word & self.top() == 0 { word | self.top() } else { !word & self.mask() }
    }

    fn word(self, ordered: u32) -> u32 {
        if ordered & self.top() == 0 { !ordered & self.mask() } else { ordered ^ self.top() }
    }

    /// The key of a base's word.
    fn key(self, word: u32) -> usize {
        ((word << 1 << (32 - self.bits)) >> 24) as usize
    }

    /// What `to` differs from `from`: small for small differences of either sign.
    fn difference(self, from: u32, to: u32) -> u32 {
        let d = self.ordered(to).wrapping_sub(self.ordered(from)) << (32 - self.bits);
        let sign = if d >> 31 == 0 { 0 } else { self.mask() };
        (d >> (32 - self.bits) << 1 & self.mask()) ^ sign
    }

    /// The word that differs so from `from`.
    fn moved(self, from: u32, difference: u32) -> u32 {
        let d = difference >> 1 ^ (difference & 1).wrapping_neg();
        self.word(self.ordered(from).wrapping_add(d) & self.mask())
    }
}

/// Symbol of a difference, and how many bits of it follow.
fn symbol(difference: u32) -> (usize, u32) {
    if difference < DIRECT {
        return (difference as usize, 0);
    }
    let length = 32 - difference.leading_zeros();
    let rest = length - 3;
    ((DIRECT + 4 * (length - SHORTEST) + (difference >> rest & 3)) as usize, rest)
}

/// The difference of a symbol but for the bits that follow, and how many these are.
fn least(symbol: u32) -> (u32, u32) {
    if symbol < DIRECT {
        return (symbol, 0);
    }
    let rest = (symbol - DIRECT) / 4 + SHORTEST - 3;
    ((4 | ((symbol - DIRECT) % 4)) << rest, rest)
}

/// How often each symbol occurs, by key; the first of two passes over a tensor and its base.
#[derive(Debug)]
pub struct Counter {
    width: Width,
    counts: Vec<[u64; 256]>,
}

impl Counter {
    /// Nothing counted, of words of so many bytes.
    ///
    /// # Panics
    /// When [`is_width`] says no.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        Self { width: Width::new(bytes), counts: vec![[0; 256]; KEYS] }
    }

    /// Counts words and those of the base.
    pub fn add(&mut self, base: &[u8], words: &[u8]) {
        let width = self.width;
        for i in 0..words.len() / width.bytes() {
            let from = width.load(base, i);
            let (symbol, _) = symbol(width.difference(from, width.load(words, i)));
            self.counts[width.key(from)][symbol] += 1;
        }
    }

    /// About the bytes of the stream.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let tables = self.tables();
        let starts = tables.starts.iter().map(|&start| usize::from(start));
        let ends = tables.starts.iter().skip(1).map(|&start| usize::from(start)).chain([KEYS]);
        let bits = starts.zip(ends).map(|(start, end)| {
            let sum: [u64; 256] = std::array::from_fn(|i| self.counts[start..end].iter().map(|c| c[i]).sum());
            let rest = (0..symbols(self.width.bits)).map(|s| sum[s] as f64 * f64::from(least(s as u32).1)).sum::<f64>();
            cost(&sum) + rest
        });
        #[expect(clippy::cast_sign_loss, reason = "bits are not negative")]
        let bytes = (bits.sum::<f64>() / 8.0).ceil() as u64;
        bytes
    }

    /// The tables that take the fewest bits together with what is coded by them, as far as joining neighbours finds them.
    #[must_use]
    pub fn tables(&self) -> Tables {
        // Keys that never occur go with those before them.
        let mut groups: Vec<(usize, [u64; 256], f64)> = Vec::new();
        for (key, counts) in self.counts.iter().enumerate() {
            if counts.iter().any(|&count| count > 0) || (key == KEYS - 1 && groups.is_empty()) {
                groups.push((if groups.is_empty() { 0 } else { key }, *counts, cost(counts)));
            }
        }
        let join = |a: &[u64; 256], b: &[u64; 256]| -> [u64; 256] { std::array::from_fn(|i| a[i] + b[i]) };
        while groups.len() > 1 {
            let gain = |i: usize| groups[i].2 + groups[i + 1].2 - cost(&join(&groups[i].1, &groups[i + 1].1));
            let (best, most) = (0..groups.len() - 1)
                .map(|i| (i, gain(i)))
                .fold((0, f64::NEG_INFINITY), |best, pair| if pair.1 > best.1 { pair } else { best });
            if most <= 0.0 && groups.len() <= MOST_TABLES {
                break;
            }
            let (_, counts, _) = groups.remove(best + 1);
            let joined = join(&groups[best].1, &counts);
            groups[best] = (groups[best].0, joined, cost(&joined));
        }
        let starts = groups.iter().map(|(key, _, _)| *key as u8).collect();
        Tables::new(self.width, starts, groups.iter().map(|(_, counts, _)| frequencies(counts)).collect())
    }
}

/// Bits of a table and of the symbols that it codes.
fn cost(counts: &[u64; 256]) -> f64 {
    let total: u64 = counts.iter().sum();
    let used = counts.iter().filter(|&&count| count > 0);
    let whole = if total > 0 { log2(total as f64) } else { 0.0 };
    used.fold(256.0, |bits, &count| bits + 16.0 + count as f64 * (whole - log2(count as f64)))
}

/// The frequencies of the symbols by the key of the base's word.
#[derive(Debug)]
pub struct Tables {
    width: Width,
    /// The first key of each table.
    starts: Vec<u8>,
    tables: Vec<Table>,
    /// The number of the table of each key.
    of_key: [u8; KEYS],
}

/// A coded block.
#[derive(Debug)]
pub struct Coded {
    words: u32,
    rest: u32,
    bytes: Vec<u8>,
}

impl Tables {
    fn new(width: Width, starts: Vec<u8>, tables: Vec<Table>) -> Self {
        let of_key =
            std::array::from_fn(|key| starts.iter().filter(|&&start| usize::from(start) <= key).count() as u8 - 1);
        Self { width, starts, tables, of_key }
    }

    /// Codes at most [`BLOCK`] words.
    ///
    /// # Panics
    /// When there are more, or a word that was not counted.
    #[must_use]
    pub fn encode(&self, base: &[u8], words: &[u8]) -> Coded {
        let count = words.len() / self.width.bytes();
        assert!(count <= BLOCK && base.len() == words.len(), "a block of {count} words");
        let mut found = Vec::with_capacity(count);
        let (mut rest, mut held, mut bits) = (Vec::new(), 0_u64, 0);
        for i in 0..count {
            let from = self.width.load(base, i);
            let difference = self.width.difference(from, self.width.load(words, i));
            let (symbol, more) = symbol(difference);
            let table = &self.tables[usize::from(self.of_key[self.width.key(from)])];
            let (freq, start) = (table.freq[symbol], table.start[symbol]);
            assert!(freq != 0, "a word that was not counted");
            found.push(u32::from(freq) << 16 | u32::from(start));
            held |= u64::from(difference & ((1 << more) - 1)) << bits;
            bits += more;
            while bits >= 8 {
                rest.push(held as u8);
                (held, bits) = (held >> 8, bits - 8);
            }
        }
        if bits > 0 {
            rest.push(held as u8);
        }
        let (mut states, mut out) = ([LOW; LANES], Vec::with_capacity(count / 2));
        for (i, &part) in found.iter().enumerate().rev() {
            put(&mut states[i % LANES], part, &mut out);
        }
        let mut bytes: Vec<u8> = states.iter().flat_map(|state| state.to_le_bytes()).collect();
        bytes.extend(out.iter().rev().flat_map(|word| word.to_le_bytes()));
        bytes.extend(&rest);
        Coded { words: out.len() as u32, rest: rest.len() as u32, bytes }
    }

    /// The stream of all blocks.
    #[must_use]
    pub fn stream(&self, blocks: &[Coded]) -> Vec<u8> {
        let mut out = vec![self.starts.len() as u8];
        out.extend(&self.starts[1..]);
        self.tables.iter().for_each(|table| write(table, &mut out));
        out.extend(blocks.iter().flat_map(|b| [b.words.to_le_bytes(), b.rest.to_le_bytes()]).flatten());
        blocks.iter().for_each(|block| out.extend(&block.bytes));
        out
    }
}

/// What lies where in a stream.
#[derive(Debug)]
struct Span {
    at: usize,
    words: usize,
    rest: usize,
}

/// A stream whose head was read and checked.
#[derive(Debug)]
pub struct WordStream<'a> {
    bytes: &'a [u8],
    elements: usize,
    tables: Tables,
    slots: Vec<u32>,
    spans: Vec<Span>,
}

impl<'a> WordStream<'a> {
    /// Reads the head of the stream of so many elements of `width` bytes.
    ///
    /// # Errors
    /// [`Error::Corrupt`], with the byte of the stream, when the head contradicts itself or the length.
    ///
    /// # Panics
    /// When [`is_width`] says no.
    pub fn open(bytes: &'a [u8], elements: usize, width: usize) -> Result<Self> {
        let width = Width::new(width);
        let refuse = |at: usize, what: String| Err(Error::corrupt(at as u64, what));
        let count = bytes.first().map_or(0, |&count| usize::from(count));
        if count == 0 || count > MOST_TABLES || bytes.len() < count {
            return refuse(0, format!("a stream of {} bytes with {count} tables", bytes.len()));
        }
        let starts: Vec<u8> = std::iter::once(0).chain(bytes[1..count].iter().copied()).collect();
        if !starts.is_sorted_by(|a, b| a < b) {
            return refuse(1, "the first words of tables do not ascend".to_owned());
        }
        let mut at = count;
        let mut tables = Vec::with_capacity(count);
        for _ in 0..count {
            let (table, end) = read(bytes, at)?;
            if table.freq[symbols(width.bits)..].iter().any(|&freq| freq != 0) {
                return refuse(at, format!("a table has symbols that words of {} bits do not", width.bits));
            }
            tables.push(table);
            at = end;
        }
        let blocks = elements.div_ceil(BLOCK);
        if (bytes.len() - at) / (8 + 4 * LANES) < blocks {
            return refuse(bytes.len(), format!("a stream of {} bytes for {blocks} blocks", bytes.len()));
        }
        let (index, _) = bytes[at..].split_at(8 * blocks);
        at += index.len();
        let mut spans = Vec::with_capacity(blocks);
        for pair in index.as_chunks::<8>().0 {
            let [words, rest] =
                [0, 4].map(|i| u32::from_le_bytes([pair[i], pair[i + 1], pair[i + 2], pair[i + 3]]) as usize);
            spans.push(Span { at, words, rest });
            at = at.saturating_add(4 * LANES + 2 * words).saturating_add(rest);
        }
        if at != bytes.len() {
            return refuse(bytes.len(), format!("a stream of {} bytes, expected {at}", bytes.len()));
        }
        let slots = slots(&tables);
        Ok(Self { bytes, elements, tables: Tables::new(width, starts, tables), slots, spans })
    }

    /// The elements in a block.
    #[must_use]
    pub fn elements(&self, block: usize) -> Range<usize> {
        block * BLOCK..((block + 1) * BLOCK).min(self.elements)
    }

    /// Decodes a block, given the same elements of the base.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when its bytes are not those of a block; `out` then holds anything.
    ///
    /// # Panics
    /// When there is no such block, or `base` or `out` do not have its size.
    pub fn decode(&self, block: usize, base: &[u8], out: &mut [u8]) -> Result<()> {
        let (width, count) = (self.tables.width, self.elements(block).len());
        assert!(base.len() == out.len() && out.len() == count * width.bytes(), "words do not fill the block");
        let span = &self.spans[block];
        let refuse = |what: &str| Err(Error::corrupt(span.at as u64, what));
        let (head, tail) = self.bytes[span.at..][..4 * LANES + 2 * span.words + span.rest].split_at(4 * LANES);
        let (mut words, mut rest) = tail.split_at(2 * span.words);
        let mut states = [LOW; LANES];
        for (state, bytes) in states.iter_mut().zip(head.as_chunks::<4>().0) {
            *state = u32::from_le_bytes(*bytes);
        }
        if states.iter().any(|&state| state < LOW) {
            return refuse("a block starts with a state below 2^16");
        }
        let (mut held, mut bits) = (0_u64, 0);
        for i in 0..count {
            let from = width.load(base, i);
            let table = usize::from(self.tables.of_key[width.key(from)]);
            let state = &mut states[i % LANES];
            let slot = self.slots[table << LOG_TOTAL | (*state & (TOTAL - 1)) as usize];
            if !take(state, slot, &mut words) {
                return refuse("a block needs more words than it has");
            }
            let (mut difference, more) = least(slot & 0xFF);
            while bits < more {
                let Some((byte, others)) = rest.split_first() else {
                    return refuse("a block needs more bits than it has");
                };
                held |= u64::from(*byte) << bits;
                (rest, bits) = (others, bits + 8);
            }
            difference |= (held & ((1 << more) - 1)) as u32;
            (held, bits) = (held >> more, bits - more);
            width.store(out, i, width.moved(from, difference));
        }
        if !words.is_empty() || states.iter().any(|&state| state != LOW) {
            return refuse("a block ends with words left over, or in a wrong state");
        }
        if !rest.is_empty() || held != 0 {
            return refuse("a block ends with bits left over");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(seed: u32) -> impl FnMut() -> u32 {
        let mut state = u64::from(seed) * 2 + 1;
        move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 32) as u32
        }
    }

    fn coded(width: usize, base: &[u8], words: &[u8]) -> Vec<u8> {
        let mut counter = Counter::new(width);
        counter.add(base, words);
        let tables = counter.tables();
        let size = BLOCK * width;
        let blocks: Vec<_> = base.chunks(size).zip(words.chunks(size)).map(|(b, w)| tables.encode(b, w)).collect();
        tables.stream(&blocks)
    }

    fn decoded(width: usize, base: &[u8], stream: &[u8]) -> Result<Vec<u8>> {
        let stream = WordStream::open(stream, base.len() / width, width)?;
        let mut out = vec![0; base.len()];
        let size = BLOCK * width;
        for (i, (base, out)) in base.chunks(size).zip(out.chunks_mut(size)).enumerate() {
            stream.decode(i, base, out)?;
        }
        Ok(out)
    }

    #[test]
    fn every_pair_of_words_comes_back() {
        let width = Width::new(1);
        for from in 0..=255 {
            for to in 0..=255 {
                let difference = width.difference(from, to);
                assert!(difference < 256 && width.moved(from, difference) == to, "{from} {to}");
            }
        }
        for bytes in [2, 4] {
            let (width, mut next) = (Width::new(bytes), random(7));
            for _ in 0..100_000 {
                let (from, to) = (next() & width.mask(), next() & width.mask());
                let difference = width.difference(from, to);
                let (symbol, rest) = symbol(difference);
                assert!(symbol < symbols(width.bits) && difference <= width.mask());
                let (least, more) = least(symbol as u32);
                assert!(rest == more && least | difference & ((1 << more) - 1) == difference);
                assert_eq!(width.moved(from, difference), to);
            }
        }
    }

    #[test]
    fn neighbouring_floats_differ_by_one_step() {
        let width = Width::new(2);
        let word = |x: f32| u32::from(half::bf16::from_f32(x).to_bits());
        assert_eq!(width.difference(word(1.0), word(1.007_812_5)), 2);
        assert_eq!(width.difference(word(1.007_812_5), word(1.0)), 1);
        assert_eq!(width.difference(word(-1.0), word(-1.007_812_5)), 1);
        assert_eq!(width.difference(word(0.0), word(-0.0)), 1, "zeros are neighbours");
    }

    #[test]
    fn streams_give_back_what_was_coded_and_equal_tensors_cost_nothing() {
        let mut next = random(3);
        for width in [1, 2, 4] {
            for count in [0, 1, 5, 1000, BLOCK, BLOCK + 1, 2 * BLOCK + 77] {
                let base: Vec<u8> = (0..count * width).map(|_| next() as u8).collect();
                for odds in [0, 1, 100, 256] {
                    let words: Vec<u8> =
                        base.iter().map(|&b| if next() & 255 < odds { b ^ (next() & 7) as u8 } else { b }).collect();
                    let stream = coded(width, &base, &words);
                    assert!(decoded(width, &base, &stream).unwrap() == words, "{width} {count} {odds}");
                    if odds == 0 && count >= BLOCK {
                        assert!(stream.len() < 150 + count / 2000, "{} bytes", stream.len());
                    }
                }
            }
        }
    }

    #[test]
    fn damage_is_refused_or_gives_other_words_and_never_more() {
        let mut next = random(11);
        let base: Vec<u8> = (0..600).map(|_| next() as u8).collect();
        let words: Vec<u8> = base.iter().map(|&b| b ^ (next() & 3) as u8).collect();
        let stream = coded(2, &base, &words);
        for at in 0..stream.len() {
            for bit in 0..8 {
                let mut bad = stream.clone();
                bad[at] ^= 1 << bit;
                drop(decoded(2, &base, &bad));
            }
            assert!(decoded(2, &base, &stream[..at]).is_err(), "cut at {at}");
        }
        assert!(decoded(2, &base, &[&stream[..], &[0]].concat()).is_err());
    }
}
