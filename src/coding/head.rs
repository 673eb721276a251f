//! The head of a stream: model, deviations of rows and columns, and where each block lies.
//!
//! Everything is checked here, so that a block is decoded with indices that cannot be out of range.

use std::ops::Range;

use super::range::{Decoder, Encoder, Small};
use super::table::{LEAST_BASE, MOST_BASE, MOST_CONTEXTS, Model, SHAPES};
use super::trellis::Trellis;
use crate::error::{Error, Result};

/// Rows that are coded side by side.
pub(crate) const LANES: usize = 32;
/// A block has about as many codes.
const BLOCK: usize = 1 << 18;
/// More codes than this to a byte cannot be: with at least four codes in every table, none is free.
const CODES_PER_BYTE: usize = 8192;
/// Bytes before the deviations.
const FIXED: usize = 12;

/// Which context every code has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Contexts {
    pub(crate) model: Model,
    /// The context of a row and a column that both stand at zero.
    pub(crate) center: u8,
    /// Deviation of a row in contexts above the usual one; as many as rows.
    pub(crate) rows: Vec<i8>,
    /// The same for columns.
    pub(crate) cols: Vec<i8>,
}

impl Contexts {
    /// The context of a code.
    pub(crate) fn at(&self, row: usize, col: usize) -> usize {
        let sum = i32::from(self.center) + i32::from(self.rows[row]) + i32::from(self.cols[col]);
        sum.clamp(0, i32::from(self.model.contexts) - 1) as usize
    }
}

/// Rows of one block; the last one may have fewer.
pub(crate) fn rows_per_block(cols: usize) -> usize {
    LANES * (BLOCK / LANES / cols.max(1)).max(1)
}

/// What lies where in the bytes of a block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) rows: Range<usize>,
    /// First byte in the stream.
    pub(crate) at: usize,
    /// Number of 16-bit words.
    pub(crate) words: usize,
    /// Number of escaped codes.
    pub(crate) escapes: usize,
}

impl Span {
    pub(crate) fn lanes(&self) -> usize {
        self.rows.len().min(LANES)
    }

    pub(crate) fn bytes(&self) -> usize {
        4 * self.lanes() + 2 * self.words + self.escapes
    }
}

/// The deviations of rows and columns, as far as they vary.
pub(crate) fn deviations(contexts: &Contexts) -> ([bool; 2], Vec<u8>) {
    let mut to = Encoder::new();
    let sides = [&contexts.rows, &contexts.cols];
    let vary = sides.map(|values| values.iter().any(|&d| d != 0));
    for (values, vary) in sides.into_iter().zip(vary) {
        let mut small = Small::new();
        for &value in values.iter().filter(|_| vary) {
            small.encode(&mut to, i32::from(value));
        }
    }
    (vary, to.finish())
}

/// The bytes before the first block, for blocks of these numbers of words and escapes.
pub(crate) fn write(contexts: &Contexts, blocks: &[(u32, u32)]) -> Vec<u8> {
    let model = &contexts.model;
    let (vary, coded) = deviations(contexts);
    let mut out = Vec::with_capacity(FIXED + coded.len() + 8 * blocks.len());
    out.push(model.trellis.map_or(0, Trellis::log_states));
    out.push(model.shape);
    out.extend(model.base.to_le_bytes());
    out.push(model.contexts);
    out.push(contexts.center);
    out.push(u8::from(vary[0]) | u8::from(vary[1]) << 1);
    out.push(u8::from(model.ends));
    out.extend(u32::try_from(coded.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend(coded);
    for (words, escapes) in blocks {
        out.extend(words.to_le_bytes());
        out.extend(escapes.to_le_bytes());
    }
    out
}

fn refuse<T>(at: usize, what: impl Into<String>) -> Result<T> {
    Err(Error::corrupt(at as u64, what))
}

fn u32_at(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]) as usize
}

/// Reads the head of a stream of a matrix that has codes, and checks every number in it.
pub(crate) fn read(bytes: &[u8], rows: usize, cols: usize) -> Result<(Contexts, Vec<Span>)> {
    if rows.checked_mul(cols).is_none_or(|codes| codes / CODES_PER_BYTE > bytes.len()) {
        return refuse(bytes.len(), format!("a stream of {} bytes for {rows} x {cols} codes", bytes.len()));
    }
    let per_block = rows_per_block(cols);
    let count = rows.div_ceil(per_block);
    let index = count.checked_mul(8);
    if bytes.len() < FIXED || index.is_none_or(|index| bytes.len() - FIXED < index) {
        return refuse(bytes.len(), format!("a stream of {} bytes for {count} blocks of codes", bytes.len()));
    }
    let trellis = match (bytes[0], Trellis::new(bytes[0])) {
        (0, _) => None,
        (_, Some(trellis)) => Some(trellis),
        (found, None) => return refuse(0, format!("coded by method {found}, expected 0 or 2 to 8")),
    };
    let (shape, base) = (bytes[1], i16::from_le_bytes([bytes[2], bytes[3]]));
    if usize::from(shape) >= SHAPES.len() {
        return refuse(1, format!("shape {shape}, expected one below {}", SHAPES.len()));
    }
    if !(LEAST_BASE..=MOST_BASE).contains(&i32::from(base)) {
        return refuse(2, format!("deviation {base}, expected {LEAST_BASE} to {MOST_BASE}"));
    }
    let (number, center, vary) = (bytes[4], bytes[5], bytes[6]);
    if number == 0 || usize::from(number) > MOST_CONTEXTS || center >= number {
        return refuse(4, format!("context {center} of {number}, expected at most {MOST_CONTEXTS}"));
    }
    if vary > 3 || bytes[7] > 1 {
        return refuse(6, format!("flags {vary} and {}, expected at most 3 and 1", bytes[7]));
    }
    let ends = bytes[7] == 1;
    let coded = u32_at(bytes, 8);
    let index = FIXED.saturating_add(coded);
    let blocks = index.saturating_add(8 * count);
    if bytes.len() < blocks {
        return refuse(8, format!("a head of {blocks} bytes in a stream of {}", bytes.len()));
    }
    let mut from = Decoder::new(&bytes[FIXED..index]);
    let mut side = |count: usize, vary: bool| -> Result<Vec<i8>> {
        let mut small = Small::new();
        let mut values = Vec::new();
        if values.try_reserve_exact(count).is_err() {
            return Err(Error::OutOfMemory { what: "deviations".into(), bytes: count as u64 });
        }
        values.extend((0..count).map(|_| if vary { small.decode(&mut from) } else { 0 }));
        Ok(values)
    };
    let deviations = (side(rows, vary & 1 != 0)?, side(cols, vary & 2 != 0)?);
    if vary == 0 && coded != 0 {
        return refuse(8, format!("{coded} bytes for deviations that do not vary"));
    }
    if vary != 0 {
        from.finish(FIXED as u64)?;
    }
    let model = Model { shape, base, contexts: number, trellis, ends };
    let mut at = blocks;
    let mut spans = Vec::with_capacity(count);
    for i in 0..count {
        let entry = index + 8 * i;
        let rows = i * per_block..((i + 1) * per_block).min(rows);
        let span = Span { rows, at, words: u32_at(bytes, entry), escapes: u32_at(bytes, entry + 4) };
        if span.words > span.rows.len() * cols || span.escapes > span.rows.len() * cols {
            return refuse(entry, format!("{} words and {} escapes in block {i}", span.words, span.escapes));
        }
        at = at.saturating_add(span.bytes());
        spans.push(span);
    }
    if at != bytes.len() {
        return refuse(bytes.len(), format!("a stream of {} bytes, expected {at}", bytes.len()));
    }
    Ok((Contexts { model, center, rows: deviations.0, cols: deviations.1 }, spans))
}
