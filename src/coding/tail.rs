//! How far outliers go beyond the codes: whole numbers of steps that follow the tail of a distribution, by rANS.
//!
//! What lies beyond the last code is the tail of what the codes follow, so two bytes say how often each number is to be
//! expected. Small numbers are symbols; of larger ones the octave and three more bits are, and what lies below these takes
//! the bits that it has. Numbers stand in blocks of rows that are those of [`super::ends`], in two lanes that take their
//! words from one sequence.

#![expect(clippy::cast_possible_truncation, reason = "classes, bits and numbers are small by construction")]

use half::f16;

use super::block::{LOW, put, slots, take};
use super::context::log2;
use super::ends::Blocks;
use super::head::rows_per_block;
use super::table::{FINE, LOG_TOTAL, PER_OCTAVE, SHAPES, TOTAL, Table, half_mass, power};
use crate::error::{Error, Result};

/// Lanes of a block.
const LANES: usize = 2;
/// Bytes before the lengths of blocks.
const HEAD: usize = 3;
/// The first number that is too large.
const END: u32 = 1 << 24;
/// Numbers below this are classes of their own.
const DIRECT: u32 = 16;
/// Classes, of which the first has no number.
const CLASSES: usize = class(END - 1).0 as usize + 1;
/// The first deviation that is too large, in eighths of an octave.
const DEVIATIONS: u8 = 128;
/// From here on levels are beyond the codes.
const CODES: f64 = 127.5;
/// The least part of a distribution that counts as its tail.
const LEAST: f64 = 1.0 / 1_048_576.0;

/// The class of a number, and how many bits of it follow.
const fn class(number: u32) -> (u32, u32) {
    if number < DIRECT {
        return (number, 0);
    }
    let rest = number.ilog2() - 3;
    (8 * rest + (number >> rest), rest)
}

/// The least number of a class, and how many bits of it follow.
const fn least(class: u32) -> (u32, u32) {
    if class < DIRECT {
        return (class, 0);
    }
    let rest = class / 8 - 1;
    ((8 + class % 8) << rest, rest)
}

/// How often each class is expected.
#[derive(Debug, Clone, Copy)]
struct Tail {
    /// Index into [`SHAPES`].
    shape: u8,
    /// Logarithm of the deviation in steps, in eighths of an octave.
    deviation: u8,
    /// The last class there is.
    last: u8,
}

impl Tail {
    /// The frequencies, by class; nothing where so little of the distribution is beyond the codes that rounding decides.
    fn table(self) -> Option<Table> {
        let deviation = power(i32::from(self.deviation) * (FINE / PER_OCTAVE));
        let mass = |steps: u32| half_mass(SHAPES[usize::from(self.shape)], (CODES + f64::from(steps)) / deviation);
        let inside = mass(0);
        let beyond = 0.5 - inside;
        if beyond < LEAST {
            return None;
        }
        let classes: Vec<u8> = (1..=self.last).collect();
        let end = |class: &u8| match class {
            class if *class == self.last => 1.0,
            class => (mass(least(u32::from(*class) + 1).0 - 1) - inside) / beyond,
        };
        let ends: Vec<f64> = classes.iter().map(end).collect();
        Some(Table::build(&[], &classes, &ends, 0.0))
    }

    /// The one that takes the fewest bits for classes that occur so often.
    fn fit(counts: &[u64; CLASSES]) -> (Self, Table) {
        // Two classes keep every frequency below the total.
        let last = counts.iter().rposition(|&count| count > 0).unwrap_or(0).max(2) as u8;
        let mut best: Option<(f64, Self, Table)> = None;
        let mut look = |shape: u8, deviation: u8| {
            let tail = Self { shape, deviation, last };
            let Some(table) = tail.table() else { return f64::INFINITY };
            let bits = |(&count, &freq): (&u64, &u16)| count as f64 * (f64::from(LOG_TOTAL) - log2(f64::from(freq)));
            let bits = counts.iter().zip(&table.freq).filter(|(count, _)| **count > 0).map(bits).sum();
            if best.as_ref().is_none_or(|(least, ..)| bits < *least) {
                best = Some((bits, tail, table));
            }
            bits
        };
        for shape in 0..SHAPES.len() as u8 {
            // By octaves first, then nearer and nearer to the best of them.
            let octaves = (0..DEVIATIONS).step_by(8).map(|deviation| (look(shape, deviation), deviation));
            let (mut bits, mut deviation) = octaves.min_by(|a, b| a.0.total_cmp(&b.0)).expect("octaves");
            for step in [4, 2, 1] {
                for near in [deviation.saturating_sub(step), (deviation + step).min(DEVIATIONS - 1)] {
                    let found = look(shape, near);
                    if found < bits {
                        (bits, deviation) = (found, near);
                    }
                }
            }
        }
        let (_, tail, table) = best.expect("wide distributions have a tail");
        (tail, table)
    }
}

/// Frequency and start of some bits as a symbol.
fn plain(bits: u32, value: u32) -> u32 {
    1 << (LOG_TOTAL - bits) << 16 | value << (LOG_TOTAL - bits)
}

/// What an outlier adds that is so many steps beyond its code, as it is stored.
#[must_use]
pub fn value(steps: u32, negative: bool, step: f32) -> f16 {
    let value = f16::from_f32(steps as f32 * step);
    if negative { -value } else { value }
}

/// How many steps beyond its code an outlier is; nothing where no number of them is stored as this value.
#[must_use]
pub fn steps(stored: f16, negative: bool, step: f32) -> Option<u32> {
    let near = (stored.to_f64() / f64::from(step)).abs().round_ties_even();
    if !(near < f64::from(END) && stored.is_finite()) {
        return None;
    }
    let near = near as u32;
    [near, near.saturating_sub(1), near + 1]
        .into_iter()
        .find(|&steps| (1..END).contains(&steps) && value(steps, negative, step).to_bits() == stored.to_bits())
}

/// How many steps beyond its code each outlier is, as bytes, given how many there are in each row of a matrix of `cols` columns.
///
/// # Panics
/// When a number is 0 or 2^24 or more, or there are not as many as counts say.
#[must_use]
pub fn encode_steps(cols: usize, counts: &[u32], steps: &[u32]) -> Vec<u8> {
    let mut found = [0; CLASSES];
    for &number in steps {
        assert!((1..END).contains(&number), "an outlier of {number} steps");
        found[class(number).0 as usize] += 1;
    }
    let (tail, table) = Tail::fit(&found);
    let mut rest = steps;
    let blocks = counts.chunks(rows_per_block(cols)).map(|counts| {
        let own = counts.iter().map(|&count| count as usize).sum();
        let (own, later) = rest.split_at(own);
        rest = later;
        encode_block(&table, own)
    });
    Blocks::write(&[tail.shape, tail.deviation, tail.last], &blocks.collect::<Vec<_>>())
}

/// The states and the words of a block.
fn encode_block(table: &Table, numbers: &[u32]) -> Vec<u8> {
    if numbers.is_empty() {
        return Vec::new();
    }
    let (mut states, mut words) = ([LOW; LANES], Vec::with_capacity(numbers.len() / 2));
    for (i, &number) in numbers.iter().enumerate().rev() {
        let state = &mut states[i % LANES];
        let (class, rest) = class(number);
        // What is decoded last comes first.
        let mut below = 0;
        while below < rest {
            let bits = if rest - below > LOG_TOTAL { rest - LOG_TOTAL } else { rest - below };
            put(state, plain(bits, number >> below & ((1 << bits) - 1)), &mut words);
            below += bits;
        }
        let class = class as usize;
        put(state, u32::from(table.freq[class]) << 16 | u32::from(table.start[class]), &mut words);
    }
    let mut out: Vec<u8> = states.iter().flat_map(|state| state.to_le_bytes()).collect();
    out.extend(words.iter().rev().flat_map(|word| word.to_le_bytes()));
    out
}

/// How far outliers go beyond their codes, open for reading.
#[derive(Debug)]
pub struct Steps<'a> {
    blocks: Blocks<'a>,
    slots: Vec<u32>,
}

impl<'a> Steps<'a> {
    /// Reads the head of the stream of a matrix.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the head contradicts itself, the matrix or the length.
    pub fn open(bytes: &'a [u8], rows: usize, cols: usize) -> Result<Self> {
        let refuse = |what: String| Err(Error::corrupt(0, what));
        let Some(&[shape, deviation, last]) = bytes.first_chunk::<HEAD>() else {
            return refuse(format!("a stream of {} bytes, expected a head", bytes.len()));
        };
        let known = usize::from(shape) < SHAPES.len() && deviation < DEVIATIONS;
        if !known || !(2..CLASSES).contains(&usize::from(last)) {
            return refuse(format!("a tail of shape {shape}, deviation {deviation} and {last} classes"));
        }
        let Some(table) = (Tail { shape, deviation, last }).table() else {
            return refuse(format!("a distribution of shape {shape} and deviation {deviation} without a tail"));
        };
        Ok(Self { blocks: Blocks::open(bytes, HEAD, rows, cols)?, slots: slots(&[table]) })
    }

    /// The blocks.
    #[must_use]
    pub fn blocks(&self) -> &Blocks<'a> {
        &self.blocks
    }

    /// Appends the numbers of a block of so many outliers.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when its bytes are not those of a block; `out` has grown by no more than the number then.
    pub fn decode(&self, block: usize, number: usize, out: &mut Vec<u32>) -> Result<()> {
        let (bytes, at) = self.blocks.bytes(block);
        let refuse = |what: &str| Err(Error::corrupt(at as u64, what));
        if number == 0 {
            return if bytes.is_empty() { Ok(()) } else { refuse("a block of bytes for no outliers") };
        }
        let Some((head, mut words)) = bytes.split_first_chunk::<{ 4 * LANES }>() else {
            return refuse("a block ends before its states do");
        };
        let mut states = [LOW; LANES];
        for (state, bytes) in states.iter_mut().zip(head.as_chunks::<4>().0) {
            *state = u32::from_le_bytes(*bytes);
        }
        if states.iter().any(|&state| state < LOW) {
            return refuse("a block starts with a state below 2^16");
        }
        out.reserve(number);
        for i in 0..number {
            let state = &mut states[i % LANES];
            let slot = self.slots[(*state & (TOTAL - 1)) as usize];
            let mut enough = take(state, slot, &mut words);
            let (mut found, mut rest) = least(slot & 0xFF);
            while rest > 0 {
                let bits = rest.min(LOG_TOTAL);
                rest -= bits;
                let low = *state & (TOTAL - 1);
                let freq = 1 << (LOG_TOTAL - bits);
                found |= (low / freq) << rest;
                enough &= take(state, freq << 20 | (low & (freq - 1)) << 8, &mut words);
            }
            if !enough {
                return refuse("a block needs more words than it has");
            }
            out.push(found);
        }
        if !words.is_empty() || states.iter().any(|&state| state != LOW) {
            return refuse("a block ends with words left over, or in a wrong state");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_have_each_number_once_and_in_order() {
        assert_eq!(class(1), (1, 0));
        let mut before = (0, 0);
        for number in (1..70_000).chain([END / 3, END - 2, END - 1]) {
            let (class, rest) = class(number);
            assert!((class, number) > before && (class as usize) < CLASSES, "{number}");
            let (first, bits) = least(class);
            assert!(bits == rest && first <= number && number - first < 1 << rest, "{number}");
            before = (class, number);
        }
        assert_eq!(class(END - 1).0 as usize, CLASSES - 1);
    }

    #[test]
    fn frequencies_sum_to_the_total_and_leave_every_class_a_part() {
        let mut without = 0;
        for (shape, deviation) in (0..SHAPES.len() as u8).flat_map(|s| (0..DEVIATIONS).map(move |d| (s, d))) {
            for last in [2, 3, 15, 16, 90, CLASSES as u8 - 1] {
                let Some(table) = (Tail { shape, deviation, last }).table() else {
                    without += 1;
                    continue;
                };
                assert_eq!(table.freq.iter().map(|&freq| u32::from(freq)).sum::<u32>(), TOTAL);
                let classes = 1..=usize::from(last);
                assert!((0..256).all(|c| classes.contains(&c) == (1..TOTAL).contains(&u32::from(table.freq[c]))));
            }
        }
        assert!(without > 0, "narrow distributions have no tail");
    }

    #[test]
    fn the_fit_is_within_a_fortieth_bit_of_the_entropy_of_the_tails_it_is_for() {
        for (shape, deviation) in [(9, 46), (2, 40), (0, 60), (5, 52)] {
            let tail = Tail { shape, deviation, last: 120 };
            let table = tail.table().expect("a tail");
            let mut counts = [0; CLASSES];
            for (count, &freq) in counts.iter_mut().zip(&table.freq).skip(1) {
                *count = u64::from(freq);
            }
            let bits = |table: &Table| -> f64 {
                let each = |(&count, &freq): (&u64, &u16)| count as f64 * (12.0 - f64::from(freq.max(1)).log2());
                counts.iter().zip(&table.freq).map(each).sum::<f64>() / f64::from(TOTAL)
            };
            let (_, fitted) = Tail::fit(&counts);
            assert!(bits(&fitted) < bits(&table) + 0.025, "{tail:?}: {} and {}", bits(&fitted), bits(&table));
        }
    }
}
