//! Outliers that go on where the codes end: their planes on disk, in little more than the entropy of what codes do not say.
//!
//! A weight beyond the codes has the code at their end, and as an outlier a whole number of steps more: then its place is
//! known but for a decision per code at the ends, its sign is that of the code, and what remains is the number, of which
//! [`super::tail`] knows. Places and counts go through the adaptive coder of `range`; places in blocks of rows that are
//! those of `block`, so that rows are read without those before them.

#![expect(clippy::cast_possible_truncation, reason = "numbers are below 2^24 where they are coded")]

use std::ops::Range;

use super::head::rows_per_block;
use super::range::{Decoder, Encoder, Odds};
use crate::error::{Error, Result};

/// Octaves of numbers: they and one are below `2^OCTAVES`.
const OCTAVES: usize = 24;
/// Codes that are looked at together.
const LOOK: usize = u64::BITS as usize;
/// Bits below the highest one that are learned.
const LEARNED: u32 = 3;

/// Whole numbers of any size, small ones in few decisions: the octave in unary, then what lies below its first bit.
struct Numbers {
    octave: [Odds; OCTAVES],
    below: [[Odds; 1 << LEARNED]; OCTAVES],
}

impl Numbers {
    /// The first number that is too large.
    const END: u32 = (1 << OCTAVES) - 1;

    fn new() -> Self {
        Self { octave: [Odds::EVEN; OCTAVES], below: [[Odds::EVEN; 1 << LEARNED]; OCTAVES] }
    }

    fn encode(&mut self, to: &mut Encoder, number: u32) {
        let number = number + 1;
        let octave = number.ilog2();
        for i in 0..OCTAVES as u32 - 1 {
            to.bit(&mut self.octave[i as usize], i < octave);
            if i == octave {
                break;
            }
        }
        let mut node = 1;
        for i in (0..octave).rev() {
            let bit = number >> i & 1;
            match self.below[octave as usize].get_mut(node) {
                Some(odds) => to.bit(odds, bit == 1),
                None => to.bit(&mut Odds::EVEN.clone(), bit == 1),
            }
            node = (node << 1 | bit as usize).min(1 << LEARNED);
        }
    }

    #[inline(always)] // in a loop the decoder stays in registers
    fn decode(&mut self, from: &mut Decoder<'_>) -> u32 {
        let mut octave = 0;
        while octave < OCTAVES - 1 && from.bit(&mut self.octave[octave]) {
            octave += 1;
        }
        // As long as a bit is learned, the number so far says by which odds.
        let mut number = 1;
        for _ in 0..octave.min(LEARNED as usize) {
            number = number << 1 | u32::from(from.bit(&mut self.below[octave][number as usize]));
        }
        for _ in LEARNED as usize..octave {
            number = number << 1 | u32::from(from.bit(&mut Odds::EVEN.clone()));
        }
        number - 1
    }
}

fn refuse<T>(at: usize, what: impl Into<String>) -> Result<T> {
    Err(Error::corrupt(at as u64, what))
}

/// How many outliers each row has, as bytes; nothing where one has too many for it.
#[must_use]
pub fn encode_counts(counts: &[u32]) -> Option<Vec<u8>> {
    let (mut to, mut numbers) = (Encoder::new(), Numbers::new());
    for &count in counts {
        if count >= Numbers::END {
            return None;
        }
        numbers.encode(&mut to, count);
    }
    Some(to.finish())
}

/// The counts of `rows` rows back.
///
/// # Errors
/// [`Error::Corrupt`] when these are not the bytes of so many counts.
pub fn decode_counts(bytes: &[u8], rows: usize) -> Result<Vec<u32>> {
    let mut counts = Vec::new();
    if counts.try_reserve_exact(rows).is_err() {
        return Err(Error::OutOfMemory { what: "counts of outliers".into(), bytes: 4 * rows as u64 });
    }
    if rows == 0 {
        return if bytes.is_empty() { Ok(counts) } else { refuse(0, "bytes for no counts") };
    }
    let (mut from, mut numbers) = (Decoder::new(bytes), Numbers::new());
    counts.extend((0..rows).map(|_| numbers.decode(&mut from)));
    from.finish(0)?;
    Ok(counts)
}

/// A matrix of codes as it is in memory.
#[derive(Debug, Clone, Copy)]
pub struct Codes<'a> {
    /// Rows of `stride` bytes.
    pub plane: &'a [u8],
    /// Bytes of a row, of which the first `cols` are codes.
    pub stride: usize,
    /// Columns.
    pub cols: usize,
}

impl<'a> Codes<'a> {
    /// The codes of a row.
    fn row(&self, row: usize) -> &'a [u8] {
        &self.plane[row * self.stride..][..self.cols]
    }
}

/// What lies where in a stream of blocks.
#[derive(Debug)]
pub struct Blocks<'a> {
    bytes: &'a [u8],
    /// Rows of a block.
    per_block: usize,
    spans: Vec<Range<usize>>,
}

impl<'a> Blocks<'a> {
    /// Reads the lengths that stand in front of the blocks of a matrix.
    pub(super) fn open(bytes: &'a [u8], at: usize, rows: usize, cols: usize) -> Result<Self> {
        let per_block = rows_per_block(cols);
        let count = rows.div_ceil(per_block);
        let Some(index) = bytes.get(at..).filter(|rest| rest.len() / 4 >= count) else {
            return refuse(bytes.len(), format!("a stream of {} bytes for {count} blocks", bytes.len()));
        };
        let mut start = at + 4 * count;
        let mut spans = Vec::with_capacity(count);
        for length in index[..4 * count].as_chunks::<4>().0 {
            let end = start.saturating_add(u32::from_le_bytes(*length) as usize);
            spans.push(start..end);
            start = end;
        }
        if start != bytes.len() {
            return refuse(bytes.len(), format!("a stream of {} bytes, expected {start}", bytes.len()));
        }
        Ok(Self { bytes, per_block, spans })
    }

    /// A stream of blocks, with what stands before the lengths.
    pub(super) fn write(head: &[u8], blocks: &[Vec<u8>]) -> Vec<u8> {
        let mut out = head.to_vec();
        for block in blocks {
            out.extend((block.len() as u32).to_le_bytes());
        }
        blocks.iter().for_each(|block| out.extend(block));
        out
    }

    /// Rows of a block; the last one may have fewer.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.per_block
    }

    /// The bytes of a block, and where it begins.
    pub(super) fn bytes(&self, block: usize) -> (&'a [u8], usize) {
        let span = self.spans[block].clone();
        (&self.bytes[span.clone()], span.start)
    }
}

/// Which columns hold outliers, as bytes, given how many there are in each row; nothing where an outlier has code 128,
/// or a code below none has.
#[must_use]
pub fn encode_columns(codes: &Codes<'_>, counts: &[u32], columns: &[u32]) -> Option<Vec<u8>> {
    let mut rest = columns;
    let mut least = 127;
    for (row, &count) in counts.iter().enumerate() {
        let (own, later) = rest.split_at_checked(count as usize)?;
        for &column in own {
            least = least.min(magnitude(*codes.row(row).get(column as usize)?));
        }
        rest = later;
    }
    if least == 0 {
        return None;
    }
    let mut rest = columns;
    let blocks = counts.chunks(rows_per_block(codes.cols)).enumerate().map(|(block, counts)| {
        let (mut to, mut odds) = (Encoder::new(), [Odds::EVEN; 128]);
        for (i, &count) in counts.iter().enumerate() {
            let row = codes.row(block * rows_per_block(codes.cols) + i);
            let (mut own, later) = rest.split_at(count as usize);
            rest = later;
            let mut ends = Ends::new(row, least);
            while let (Some(&next), Some(column)) = (own.first(), ends.next()) {
                let here = next as usize == column;
                to.bit(&mut odds[usize::from(magnitude(row[column]))], here);
                own = &own[usize::from(here)..];
            }
        }
        to.finish()
    });
    Some(Blocks::write(&[least], &blocks.collect::<Vec<_>>()))
}

/// The magnitude of the level of a code; that of 0, which is none, is that of the greatest one.
fn magnitude(code: u8) -> u8 {
    code.abs_diff(128).min(127)
}

/// The columns of a row whose codes have at least a given magnitude, in order.
struct Ends<'a> {
    row: &'a [u8],
    /// In each byte: the first code that has less, and how many have.
    less: [u64; 2],
    /// The column of the first bit of `found`.
    base: usize,
    found: u64,
}

impl<'a> Ends<'a> {
    const EACH: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = Self::EACH << 7;

    fn new(row: &'a [u8], least: u8) -> Self {
        let less = [129 - least, 2 * least - 1].map(|byte| u64::from(byte) * Self::EACH);
        Self { row, less, base: 0, found: Self::look(row, less) }
    }

    /// A bit for each of the first codes of `row` that is an end.
    fn look(row: &[u8], less: [u64; 2]) -> u64 {
        #[cfg(target_arch = "x86_64")]
        if let Some(codes) = row.first_chunk::<LOOK>() {
            return super::vector::outside(codes, less.map(|bytes| (bytes & 0xFF) as u8));
        }
        Self::look_by_eight(row, less)
    }

    /// The same, eight codes at a time.
    fn look_by_eight(row: &[u8], [first, many]: [u64; 2]) -> u64 {
        let eight = |codes: &[u8; 8]| {
            let word = u64::from_le_bytes(*codes);
            // Byte by byte: how far the code is from the first that is none, and whether that is at least `many`.
            let from = ((word | Self::HIGH) - (first & !Self::HIGH)) ^ ((word ^ !first) & Self::HIGH);
            let low = (from | Self::HIGH) - (many & !Self::HIGH);
            let end = ((from & !many) | (!(from ^ many) & low)) & Self::HIGH;
            // The product moves the bit of byte i to bit 56 + i.
            (end >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56
        };
        let row = &row[..row.len().min(LOOK)];
        let (words, rest) = row.as_chunks::<8>();
        let mut last = [128; 8];
        last[..rest.len()].copy_from_slice(rest);
        let bits = words.iter().enumerate().fold(0, |bits, (i, word)| bits | eight(word) << (8 * i));
        if rest.is_empty() { bits } else { bits | eight(&last) << (8 * words.len()) }
    }
}

impl Iterator for Ends<'_> {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        while self.found == 0 {
            self.base += LOOK;
            self.found = Self::look(self.row.get(self.base..)?, self.less);
        }
        let column = self.base + self.found.trailing_zeros() as usize;
        self.found &= self.found - 1;
        Some(column)
    }
}

/// The columns of outliers, open for reading.
#[derive(Debug)]
pub struct Columns<'a> {
    least: u8,
    blocks: Blocks<'a>,
}

impl<'a> Columns<'a> {
    /// Reads the head of the stream of a matrix.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the head contradicts itself, the matrix or the length.
    pub fn open(bytes: &'a [u8], rows: usize, cols: usize) -> Result<Self> {
        match bytes.first() {
            Some(&least @ 1..=127) => Ok(Self { least, blocks: Blocks::open(bytes, 1, rows, cols)? }),
            Some(least) => refuse(0, format!("outliers from level {least} on, expected 1 to 127")),
            None => refuse(0, "a stream of no bytes"),
        }
    }

    /// The blocks.
    #[must_use]
    pub fn blocks(&self) -> &Blocks<'a> {
        &self.blocks
    }

    /// Appends the columns of the outliers of a block, given its codes and how many each of its rows has.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when its bytes are not those of a block; `out` has grown by no more than the counts then.
    pub fn decode(&self, block: usize, codes: &Codes<'_>, counts: &[u32], out: &mut Vec<u32>) -> Result<()> {
        let (bytes, at) = self.blocks.bytes(block);
        let mut from = Decoder::new(bytes);
        let mut odds = [Odds::EVEN; 128];
        let mut used = false;
        for (row, &count) in counts.iter().enumerate() {
            let row = codes.row(row);
            let (mut left, mut ends) = (count, Ends::new(row, self.least));
            while left > 0
                && let Some(column) = ends.next()
            {
                used = true;
                if from.likely(&mut odds[usize::from(magnitude(row[column]))]) {
                    out.push(column as u32);
                    left -= 1;
                }
            }
            if left > 0 {
                return refuse(at, format!("a row of {count} outliers has codes for {} of them", count - left));
            }
        }
        if !used && !bytes.is_empty() {
            return refuse(at, format!("a block of {} bytes that says nothing", bytes.len()));
        }
        from.finish(at as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_the_codes_of_a_magnitude_wherever_they_stand() {
        let row: Vec<u8> = (0..=255).chain((0..=255).rev()).chain(100..=160).collect();
        for least in 1..=127 {
            for len in [0, 1, 7, 8, 63, 64, 65, 128, row.len()] {
                let row = &row[..len];
                let expected: Vec<usize> = (0..len).filter(|&i| magnitude(row[i]) >= least).collect();
                let ends = Ends::new(row, least);
                assert_eq!(ends.found, Ends::look_by_eight(row, ends.less), "{least} in {len}");
                assert_eq!(ends.collect::<Vec<_>>(), expected, "{least} in {len}");
            }
        }
    }
}
