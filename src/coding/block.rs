//! A block: whole rows of codes in interleaved range asymmetric numeral systems (rANS).
//!
//! Lane `l` codes rows `l, l + 32, …` of the block, all lanes advance column by column, and all take their words from
//! one sequence, so that a vector of lanes is decoded at once: the column's part of the context is the same in all of
//! them, and the state machine of a trellis, which is sequential along a row, runs in each of them.

use super::head::{Contexts, LANES, Span};
use super::table::{LOG_TOTAL, TOTAL, Table, escape_codes, escapes};
use super::trellis::Trellis;
#[cfg(target_arch = "x86_64")]
use super::vector;
use crate::error::{Error, Result};

/// States are at least this, so that a word refills them at once.
pub(crate) const LOW: u32 = 1 << 16;

/// Codes that are looked at together for escapes.
const PIECE: usize = 64;

/// For every context and slot: frequency, slot minus start, and code, in 12, 12 and 8 bits; even states first.
pub(crate) fn slots(tables: &[Table]) -> Vec<u32> {
    let mut slots = vec![0; tables.len() << LOG_TOTAL];
    for (table, slots) in tables.iter().zip(slots.chunks_exact_mut(TOTAL as usize)) {
        for code in 0..=255u8 {
            let (start, freq) = (table.start[usize::from(code)], table.freq[usize::from(code)]);
            for i in 0..freq {
                slots[usize::from(start + i)] = u32::from(freq) << 20 | u32::from(i) << 8 | u32::from(code);
            }
        }
    }
    slots
}

/// Puts a symbol into a state, given its frequency and start in 16 bits each; a word leaves where there is no room.
#[inline(always)]
pub(super) fn put(state: &mut u32, part: u32, words: &mut Vec<u16>) {
    let (freq, start) = (part >> 16, part & 0xFFFF);
    if *state >> (32 - LOG_TOTAL) >= freq {
        words.push((*state & 0xFFFF) as u16);
        *state >>= 16;
    }
    *state = ((*state / freq) << LOG_TOTAL) + *state % freq + start;
}

/// Takes the symbol of a slot out of a state again; returns whether there was a word where one is needed.
#[inline(always)]
pub(super) fn take(state: &mut u32, slot: u32, words: &mut &[u8]) -> bool {
    *state = (slot >> 20) * (*state >> LOG_TOTAL) + (slot >> 8 & (TOTAL - 1));
    if *state < LOW {
        let Some((word, rest)) = words.split_first_chunk::<2>() else { return false };
        *state = *state << 16 | u32::from(u16::from_le_bytes(*word));
        *words = rest;
    }
    true
}

/// A coded block.
#[derive(Debug)]
pub(crate) struct Coded {
    pub(crate) words: u32,
    pub(crate) escapes: u32,
    pub(crate) bytes: Vec<u8>,
}

/// What an encoder looks up for a code in a table: frequency and start of its symbol, and whether that is an escape.
/// Zero where the code is not allowed.
pub(crate) struct Symbols(Vec<[u32; 256]>);

impl Symbols {
    const ESCAPED: u32 = 1 << 31;

    pub(crate) fn new(contexts: &Contexts) -> Self {
        let model = &contexts.model;
        let (tables, number, trellis) = (model.tables(), usize::from(model.contexts), model.trellis.is_some());
        let one = |(i, table): (usize, &Table)| {
            let mut symbols = [0; 256];
            let odd = i >= number;
            for code in 1..=255u8 {
                let symbol = table.symbol(code, trellis, odd);
                let (freq, start) = (table.freq[usize::from(symbol)], table.start[usize::from(symbol)]);
                let escaped = if symbol < escape_codes(trellis) { Self::ESCAPED } else { 0 };
                if freq != 0 {
                    symbols[usize::from(code)] = escaped | u32::from(freq) << 16 | u32::from(start);
                }
            }
            symbols
        };
        Self(tables.iter().enumerate().map(one).collect())
    }
}

/// Codes the rows from `first` on.
///
/// # Errors
/// The row and column of a code that its state does not allow, or that is no level.
pub(crate) fn encode(
    contexts: &Contexts,
    symbols: &Symbols,
    first: usize,
    codes: &[u8],
    cols: usize,
) -> Result<Coded, (usize, usize)> {
    let rows = codes.len() / cols;
    let (number, trellis) = (usize::from(contexts.model.contexts), contexts.model.trellis);
    let top = i32::from(contexts.model.contexts) - 1;
    let lanes = rows.min(LANES);
    let mut states = [LOW; LANES];
    let mut words: Vec<u16> = Vec::with_capacity(codes.len() / 3);
    // What was looked up for the rows in flight, by column and lane.
    let mut parts: Vec<u32> = vec![0; lanes * cols];
    let mut escaped = Vec::new();
    for set in (0..rows.div_ceil(LANES)).rev() {
        let here = (rows - set * LANES).min(LANES);
        let mut escaped_here = Vec::new();
        for lane in 0..here {
            let row = set * LANES + lane;
            let base = i32::from(contexts.center) + i32::from(contexts.rows[first + row]);
            let mut state = 0u8;
            let pairs = codes[row * cols..][..cols].iter().zip(&contexts.cols);
            for ((col, (&code, &column)), parts) in pairs.enumerate().zip(parts.chunks_exact_mut(lanes)) {
                let context = (base + i32::from(column)).clamp(0, top) as usize;
                let part = symbols.0[usize::from(state & 1) * number + context][usize::from(code)];
                if part == 0 {
                    return Err((row, col));
                }
                if part & Symbols::ESCAPED != 0 {
                    escaped_here.push(code);
                }
                parts[lane] = part & !Symbols::ESCAPED;
                if let Some(trellis) = trellis {
                    state = trellis.next(state, code);
                }
            }
        }
        escaped.push(escaped_here);
        for parts in parts.chunks_exact(lanes).rev() {
            for (state, part) in states[..here].iter_mut().zip(&parts[..here]).rev() {
                put(state, *part, &mut words);
            }
        }
    }
    let mut bytes = Vec::with_capacity(4 * lanes + 2 * words.len());
    for state in &states[..lanes] {
        bytes.extend(state.to_le_bytes());
    }
    bytes.extend(words.iter().rev().flat_map(|word| word.to_le_bytes()));
    let before = bytes.len();
    bytes.extend(escaped.iter().rev().flatten());
    let [words, escapes] = [words.len(), bytes.len() - before].map(|n| u32::try_from(n).unwrap_or(u32::MAX));
    Ok(Coded { words, escapes, bytes })
}

/// What a decoder of rows needs to know.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub(crate) contexts: &'a Contexts,
    pub(crate) slots: &'a [u32],
    /// The first row.
    pub(crate) first: usize,
    /// Columns.
    pub(crate) cols: usize,
}

/// Where a decoder stands.
#[derive(Debug)]
pub(crate) struct Progress<'a> {
    pub(crate) states: [u32; LANES],
    /// States of the trellis.
    pub(crate) machines: [u8; LANES],
    /// The words that no lane has taken yet.
    pub(crate) words: &'a [u8],
}

/// Decodes at most [`LANES`] rows from column `from` on, each in a lane of its own; escapes stay as they are.
///
/// Returns whether there were words enough.
pub(crate) fn decode_set(rows: &Rows<'_>, from: usize, progress: &mut Progress<'_>, out: &mut [u8]) -> bool {
    let contexts = rows.contexts;
    let lanes = out.len() / rows.cols;
    let number = usize::from(contexts.model.contexts);
    for col in from..rows.cols {
        for lane in 0..lanes {
            let machine = &mut progress.machines[lane];
            let quantizer = if contexts.model.trellis.is_some() { usize::from(*machine & 1) } else { 0 };
            let table = quantizer * number + contexts.at(rows.first + lane, col);
            let state = &mut progress.states[lane];
            let slot = rows.slots[table << LOG_TOTAL | (*state & (TOTAL - 1)) as usize];
            let code = (slot & 0xFF) as u8;
            if !take(state, slot, &mut progress.words) {
                return false;
            }
            out[lane * rows.cols + col] = code;
            if let Some(trellis) = contexts.model.trellis {
                *machine = Trellis::next(trellis, *machine, code);
            }
        }
    }
    true
}

/// Decodes the block at `span`.
pub(crate) fn decode(
    contexts: &Contexts,
    slots: &[u32],
    bytes: &[u8],
    span: &Span,
    cols: usize,
    out: &mut [u8],
) -> Result<()> {
    let block = &bytes[span.at..][..span.bytes()];
    let (head, rest) = block.split_at(4 * span.lanes());
    let (words, mut escaped) = rest.split_at(2 * span.words);
    let mut progress = Progress { states: [LOW; LANES], machines: [0; LANES], words };
    for (state, bytes) in progress.states.iter_mut().zip(head.chunks_exact(4)) {
        *state = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    let refuse = |what: String| Err(Error::corrupt(span.at as u64, what));
    if progress.states.iter().any(|&state| state < LOW) {
        return refuse("a block starts with a state below 2^16".into());
    }
    for (i, set) in out.chunks_mut(LANES * cols).enumerate() {
        let rows = Rows { contexts, slots, first: span.rows.start + i * LANES, cols };
        progress.machines = [0; LANES];
        #[cfg(target_arch = "x86_64")]
        let from = if set.len() == LANES * cols { vector::decode_set(&rows, &mut progress, set) } else { 0 };
        #[cfg(not(target_arch = "x86_64"))]
        let from = 0;
        if !decode_set(&rows, from, &mut progress, set) {
            return refuse(format!("a block needs more than its {} words", span.words));
        }
    }
    if !progress.words.is_empty() || progress.states.iter().any(|&state| state != LOW) {
        return refuse(format!("a block ends with {} bytes left over, or in a wrong state", progress.words.len()));
    }
    let trellis = contexts.model.trellis.is_some();
    let is_escape = |code: &u8| *code < escape_codes(trellis);
    // Most pieces have none, which vectors see at once.
    let pieces = out.chunks_mut(PIECE).filter(|piece| piece.iter().fold(false, |any, code| any | is_escape(code)));
    for code in pieces.flatten().filter(|code| is_escape(code)) {
        match escaped.split_first() {
            Some((&real, rest)) if escapes(*code, real, trellis) => {
                *code = real;
                escaped = rest;
            }
            Some((real, _)) => return refuse(format!("escaped code {real} where one of class {code} stands")),
            None => return refuse(format!("a block escapes more than its {} codes", span.escapes)),
        }
    }
    if escaped.is_empty() { Ok(()) } else { refuse(format!("{} escaped codes are left over", escaped.len())) }
}
