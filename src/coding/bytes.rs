//! A plane of any bytes on disk: rANS with the frequencies of its own bytes.
//!
//! Codes of four bits go two to a byte and numbers of several bytes have a table for each of their bytes, so one coder
//! serves every plane that has no better one. Byte `i` of a block belongs to lane `i mod 32`, and with elements of
//! 1, 2, 4 or 8 bytes a lane keeps to one table; all lanes take their words from one sequence, as in [`super::block`].

#![expect(clippy::cast_possible_truncation, reason = "bytes, words and frequencies are small by construction")]

use std::ops::Range;

use rayon::prelude::*;

use super::block::{LOW, put, slots, take};
use super::head::LANES;
use super::table::{LOG_TOTAL, TOTAL, Table};
use crate::error::{Error, Result};

/// A block has about as many bytes.
const BLOCK: usize = 1 << 18;
/// Bytes before the tables.
const FIXED: usize = 4;
/// Bytes that say which bytes a table has.
const PRESENT: usize = 32;

/// Rows of `row` bytes that a block has.
fn rows_per_block(row: usize) -> usize {
    (BLOCK / row.max(1)).max(1)
}

/// The frequencies nearest to the counts: every byte that occurs gets a part, at least two do, and what rounding leaves
/// goes to the largest remainders.
pub(super) fn frequencies(counts: &[u64; 256]) -> Table {
    let mut counts = *counts;
    for byte in 0..=255 {
        // One more, never seen, keeps every frequency below the total.
        if counts.iter().filter(|&&count| count > 0).count() < 2 && counts[byte] == 0 {
            counts[byte] = 1;
        }
    }
    let total: u64 = counts.iter().sum();
    let mut freq = [0u16; 256];
    let mut order: Vec<usize> = (0..256).filter(|&byte| counts[byte] > 0).collect();
    for &byte in &order {
        freq[byte] = ((u128::from(counts[byte]) * u128::from(TOTAL) / u128::from(total)) as u16).max(1);
    }
    let remainder = |byte: usize| (u128::from(counts[byte]) * u128::from(TOTAL) % u128::from(total)) as u64;
    order.sort_by_key(|&byte| (std::cmp::Reverse(remainder(byte)), byte));
    let mut sum: u32 = freq.iter().map(|&f| u32::from(f)).sum();
    for &byte in order.iter().cycle() {
        match sum.cmp(&TOTAL) {
            std::cmp::Ordering::Less => (freq[byte], sum) = (freq[byte] + 1, sum + 1),
            std::cmp::Ordering::Equal => break,
            std::cmp::Ordering::Greater => {
                let most = (0..256).max_by_key(|&byte| (freq[byte], byte)).unwrap_or_default();
                (freq[most], sum) = (freq[most] - 1, sum - 1);
            }
        }
    }
    table(freq)
}

/// The table of these frequencies, whose sum is [`TOTAL`].
fn table(freq: [u16; 256]) -> Table {
    let mut before = 0;
    let start = freq.map(|freq| {
        let start = before;
        before += freq;
        start
    });
    Table { freq, start }
}

/// Writes the frequencies of a table.
pub(super) fn write(table: &Table, out: &mut Vec<u8>) {
    let mut present = [0u8; PRESENT];
    for byte in (0..256).filter(|&byte| table.freq[byte] != 0) {
        present[byte / 8] |= 1 << (byte % 8);
    }
    out.extend(present);
    out.extend(table.freq.iter().filter(|&&freq| freq != 0).flat_map(|freq| freq.to_le_bytes()));
}

/// The table at `at`, and where it ends.
pub(super) fn read(bytes: &[u8], at: usize) -> Result<(Table, usize)> {
    let short = || Error::corrupt(bytes.len() as u64, "the tables are cut off");
    let (present, rest) = bytes.get(at..).and_then(|rest| rest.split_first_chunk::<PRESENT>()).ok_or_else(short)?;
    let mut freq = [0u16; 256];
    let mut numbers = rest.as_chunks::<2>().0.iter();
    let mut count = 0;
    for byte in (0..256).filter(|&byte| present[byte / 8] >> (byte % 8) & 1 == 1) {
        freq[byte] = u16::from_le_bytes(*numbers.next().ok_or_else(short)?);
        count += 1;
        if freq[byte] == 0 || u32::from(freq[byte]) >= TOTAL {
            return Err(Error::corrupt(at as u64, format!("frequency {} of byte {byte}", freq[byte])));
        }
    }
    let sum: u32 = freq.iter().map(|&f| u32::from(f)).sum();
    if sum != TOTAL {
        return Err(Error::corrupt(at as u64, format!("frequencies that sum to {sum}, expected {TOTAL}")));
    }
    Ok((table(freq), at + PRESENT + 2 * count))
}

/// A plane in rows of `row` bytes, elements of `size` bytes, as a stream.
///
/// # Panics
/// When rows are not whole elements of 1, 2, 4 or 8 bytes or do not fill the plane.
#[must_use]
pub fn encode_bytes(plane: &[u8], row: usize, size: usize) -> Vec<u8> {
    if plane.is_empty() {
        return Vec::new();
    }
    assert!(matches!(size, 1 | 2 | 4 | 8) && row.is_multiple_of(size), "rows of whole elements");
    assert!(plane.len().is_multiple_of(row), "rows fill the plane");
    let chunk = rows_per_block(row) * row;
    let counts = plane
        .par_chunks(chunk)
        .map(|block| {
            let mut counts = vec![[0u64; 256]; size];
            for element in block.chunks_exact(size) {
                for (counts, &byte) in counts.iter_mut().zip(element) {
                    counts[usize::from(byte)] += 1;
                }
            }
            counts
        })
        .reduce(
            || vec![[0; 256]; size],
            |mut all, part| {
                all.iter_mut().flatten().zip(part.iter().flatten()).for_each(|(sum, count)| *sum += count);
                all
            },
        );
    let tables: Vec<Table> = counts.iter().map(frequencies).collect();
    let part = |table: &Table, byte| u32::from(table.freq[byte]) << 16 | u32::from(table.start[byte]);
    let parts: Vec<[u32; 256]> = tables.iter().map(|table| std::array::from_fn(|byte| part(table, byte))).collect();
    let blocks: Vec<Vec<u8>> = plane.par_chunks(chunk).map(|block| encode_block(block, &parts)).collect();
    let mut out = vec![size as u8, 0, 0, 0];
    tables.iter().for_each(|table| write(table, &mut out));
    for block in &blocks {
        out.extend(((block.len() - 4 * LANES) as u32 / 2).to_le_bytes());
    }
    blocks.iter().for_each(|block| out.extend(block));
    out
}

/// The states and the words of a block; `parts` has frequency and start of every byte.
fn encode_block(block: &[u8], parts: &[[u32; 256]]) -> Vec<u8> {
    let mut states = [LOW; LANES];
    let mut words: Vec<u16> = Vec::with_capacity(block.len() / 2);
    for (i, &byte) in block.iter().enumerate().rev() {
        put(&mut states[i % LANES], parts[i % parts.len()][usize::from(byte)], &mut words);
    }
    let mut out = Vec::with_capacity(4 * LANES + 2 * words.len());
    out.extend(states.iter().flat_map(|state| state.to_le_bytes()));
    out.extend(words.iter().rev().flat_map(|word| word.to_le_bytes()));
    out
}

/// What lies where in a stream.
#[derive(Debug)]
struct Span {
    /// First byte in the stream.
    at: usize,
    /// Bytes in the stream.
    bytes: usize,
}

/// A stream of bytes whose head was read and checked.
#[derive(Debug)]
pub struct ByteStream<'a> {
    bytes: &'a [u8],
    rows: usize,
    row: usize,
    /// The slots of all tables.
    slots: Vec<u32>,
    spans: Vec<Span>,
}

impl<'a> ByteStream<'a> {
    /// Reads the head of the stream of a plane of `rows` rows of `row` bytes.
    ///
    /// # Errors
    /// [`Error::Corrupt`], with the byte of the stream, when the head contradicts itself, the plane or the length.
    pub fn open(bytes: &'a [u8], rows: usize, row: usize) -> Result<Self> {
        let refuse = |at: usize, what: String| Err(Error::corrupt(at as u64, what));
        if rows == 0 || row == 0 {
            if !bytes.is_empty() {
                return refuse(0, format!("a stream of {} bytes for an empty plane", bytes.len()));
            }
            return Ok(Self { bytes, rows: 0, row, slots: Vec::new(), spans: Vec::new() });
        }
        let size = match bytes.first_chunk::<FIXED>() {
            Some(&[size @ (1 | 2 | 4 | 8), 0, 0, 0]) if row.is_multiple_of(usize::from(size)) => usize::from(size),
            Some(head) => return refuse(0, format!("a head of {head:?} for rows of {row} bytes")),
            None => return refuse(bytes.len(), format!("a stream of {} bytes, expected a head", bytes.len())),
        };
        let mut at = FIXED;
        let mut tables = Vec::with_capacity(size);
        for _ in 0..size {
            let (table, end) = read(bytes, at)?;
            tables.push(table);
            at = end;
        }
        let slots = slots(&tables);
        let count = rows.div_ceil(rows_per_block(row));
        if (bytes.len() - at) / (4 + 4 * LANES) < count {
            return refuse(bytes.len(), format!("a stream of {} bytes for {count} blocks", bytes.len()));
        }
        let (index, _) = bytes[at..].split_at(4 * count);
        let mut at = at + 4 * count;
        let mut spans = Vec::with_capacity(count);
        for words in index.as_chunks::<4>().0 {
            let words = u32::from_le_bytes(*words) as usize;
            spans.push(Span { at, bytes: 4 * LANES + 2 * words });
            at = at.saturating_add(4 * LANES + 2 * words);
        }
        if at != bytes.len() {
            return refuse(bytes.len(), format!("a stream of {} bytes, expected {at}", bytes.len()));
        }
        Ok(Self { bytes, rows, row, slots, spans })
    }

    /// How many blocks there are; each is decoded on its own.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.spans.len()
    }

    /// The rows in a block.
    ///
    /// # Panics
    /// When there is no such block.
    #[must_use]
    pub fn rows(&self, block: usize) -> Range<usize> {
        assert!(block < self.spans.len(), "block {block} of {}", self.spans.len());
        let count = rows_per_block(self.row);
        block * count..((block + 1) * count).min(self.rows)
    }

    /// Decodes a block, on this thread.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when its bytes are not those of a block; `out` then holds anything.
    ///
    /// # Panics
    /// When there is no such block, or `out` does not have its size.
    pub fn decode_block(&self, block: usize, out: &mut [u8]) -> Result<()> {
        assert_eq!(out.len(), self.rows(block).len() * self.row, "bytes do not fill the block");
        let span = &self.spans[block];
        let (head, words) = self.bytes[span.at..][..span.bytes].split_at(4 * LANES);
        let mut progress = Progress { states: [LOW; LANES], words };
        for (state, bytes) in progress.states.iter_mut().zip(head.as_chunks::<4>().0) {
            *state = u32::from_le_bytes(*bytes);
        }
        let refuse = |what: &str| Err(Error::corrupt(span.at as u64, what));
        if progress.states.iter().any(|&state| state < LOW) {
            return refuse("a block starts with a state below 2^16");
        }
        #[cfg(target_arch = "x86_64")]
        let from = super::vector::decode_bytes(&self.slots, &mut progress, out);
        #[cfg(not(target_arch = "x86_64"))]
        let from = 0;
        if !decode(&self.slots, &mut progress, &mut out[from..]) {
            return refuse("a block needs more words than it has");
        }
        if !progress.words.is_empty() || progress.states.iter().any(|&state| state != LOW) {
            return refuse("a block ends with words left over, or in a wrong state");
        }
        Ok(())
    }
}

/// Where a decoder stands.
#[derive(Debug, Clone)]
pub(super) struct Progress<'a> {
    pub(super) states: [u32; LANES],
    /// The words that no lane has taken yet.
    pub(super) words: &'a [u8],
}

/// Decodes bytes one at a time, from one of lane 0 on; returns whether there were words enough.
pub(super) fn decode(slots: &[u32], progress: &mut Progress<'_>, out: &mut [u8]) -> bool {
    let tables = slots.len() >> LOG_TOTAL;
    for (i, out) in out.iter_mut().enumerate() {
        let state = &mut progress.states[i % LANES];
        let slot = slots[(i % tables) << LOG_TOTAL | (*state & (TOTAL - 1)) as usize];
        *out = (slot & 0xFF) as u8;
        if !take(state, slot, &mut progress.words) {
            return false;
        }
    }
    true
}
