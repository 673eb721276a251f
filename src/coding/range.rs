//! An adaptive binary range coder: the small numbers of a head, in close to their entropy.
//!
//! Every decision has a probability that follows what was coded before, so nothing has to be sent to describe it. It is
//! slow beside [`super::block`], and codes only what there is one of per row or column.

#![expect(clippy::cast_possible_truncation, reason = "a byte is taken out of a wider number")]

use crate::error::{Error, Result};

/// Probabilities have this many bits.
const BITS: u32 = 12;
/// A probability moves by this share of its distance to certainty.
const RATE: u32 = 4;
/// Below this the range is refilled.
const LOW: u32 = 1 << 24;

/// The probability that a decision is a zero, as it was seen so far.
#[derive(Debug, Clone, Copy)]
pub(super) struct Odds(u16);

impl Odds {
    pub(super) const EVEN: Self = Self(1 << (BITS - 1));

    fn bound(self, range: u32) -> u32 {
        (range >> BITS) * u32::from(self.0)
    }

    #[inline]
    fn learn(&mut self, bit: bool) {
        let (one, zero) = (self.0 - (self.0 >> RATE), self.0 + (((1 << BITS) - self.0) >> RATE));
        self.0 = if bit { one } else { zero };
    }
}

/// Writes decisions.
#[derive(Debug)]
pub(super) struct Encoder {
    low: u64,
    range: u32,
    /// The last byte that a carry may still change, with the 0xFF bytes behind it; none at the start.
    held: Option<u8>,
    run: u64,
    out: Vec<u8>,
}

impl Encoder {
    pub(super) fn new() -> Self {
        Self { low: 0, range: u32::MAX, held: None, run: 0, out: Vec::new() }
    }

    pub(super) fn bit(&mut self, odds: &mut Odds, bit: bool) {
        let bound = odds.bound(self.range);
        if bit {
            self.low += u64::from(bound);
            self.range -= bound;
        } else {
            self.range = bound;
        }
        odds.learn(bit);
        while self.range < LOW {
            self.range <<= 8;
            self.shift();
        }
    }

    /// Moves the top byte of `low` out.
    fn shift(&mut self) {
        let [top, carry, ..] = [(self.low >> 24) as u8, (self.low >> 32) as u8];
        if carry != 0 || top != 0xFF {
            if let Some(held) = self.held {
                self.out.push(held.wrapping_add(carry));
            }
            for _ in 0..self.run {
                self.out.push(0xFFu8.wrapping_add(carry));
            }
            self.run = 0;
            self.held = Some(top);
        } else {
            self.run += 1;
        }
        self.low = (self.low << 8) & 0xFFFF_FFFF;
    }

    /// The bytes, without the zeros at their end: a decoder reads zeros there.
    pub(super) fn finish(mut self) -> Vec<u8> {
        for _ in 0..5 {
            self.shift();
        }
        while self.out.last() == Some(&0) {
            self.out.pop();
        }
        self.out
    }
}

/// Tells the compiler that the branch which calls it is seldom taken.
#[cold]
#[inline(always)]
fn seldom() {}

/// Reads decisions.
#[derive(Debug)]
pub(super) struct Decoder<'a> {
    bytes: &'a [u8],
    /// Bytes that have been shifted into the code; zeros follow the last one.
    at: usize,
    range: u32,
    /// The code in the upper half, and what follows it.
    window: u64,
    /// Bits of the lower half that have been read.
    ahead: u32,
}

impl<'a> Decoder<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        let mut decoder = Self { bytes, at: 4, range: u32::MAX, window: 0, ahead: 0 };
        decoder.window = u64::from(decoder.word(0)) << 32;
        decoder.fill();
        decoder
    }

    /// Four bytes from `at` on.
    fn word(&self, at: usize) -> u32 {
        match self.bytes.get(at..).and_then(<[u8]>::first_chunk::<4>) {
            Some(bytes) => u32::from_be_bytes(*bytes),
            None => (at..at + 4).fold(0, |word, at| word << 8 | u32::from(self.bytes.get(at).copied().unwrap_or(0))),
        }
    }

    /// Reads what follows the code again.
    fn fill(&mut self) {
        self.window = self.window >> 32 << 32 | u64::from(self.word(self.at));
        self.ahead = 32;
    }

    /// One decision; what it is goes into numbers and not into branches, since it cannot be foretold.
    #[inline(always)] // in a loop the state stays in registers
    pub(super) fn bit(&mut self, odds: &mut Odds) -> bool {
        let bound = odds.bound(self.range);
        let bit = (self.window >> 32) as u32 >= bound;
        let one = u32::from(bit).wrapping_neg();
        self.window -= u64::from(bound & one) << 32;
        self.range = bound ^ (bound ^ (self.range - bound)) & one;
        odds.learn(bit);
        self.refill();
        bit
    }

    /// The same for one that is nearly always a one: a branch foretells it, so that the next one need not wait for it.
    #[inline(always)]
    pub(super) fn likely(&mut self, odds: &mut Odds) -> bool {
        let bound = odds.bound(self.range);
        let bit = (self.window >> 32) as u32 >= bound;
        if bit {
            self.window -= u64::from(bound) << 32;
            self.range -= bound;
        } else {
            seldom();
            self.range = bound;
        }
        odds.learn(bit);
        self.refill();
        bit
    }

    /// Moves bytes into the code where the range has become small.
    #[inline(always)]
    fn refill(&mut self) {
        let shift = self.range.leading_zeros() & !7;
        if shift > 0 {
            self.range <<= shift;
            if self.ahead < shift {
                self.fill();
            }
            self.window <<= shift;
            self.ahead -= shift;
            self.at += (shift / 8) as usize;
        }
    }

    /// Refuses bytes that no decision has looked at, and zeros at the end.
    pub(super) fn finish(self, at: u64) -> Result<()> {
        if self.at < self.bytes.len() || self.bytes.last() == Some(&0) {
            let what = format!("{} bytes of a coded head where {} were used", self.bytes.len(), self.at);
            return Err(Error::corrupt(at, what));
        }
        Ok(())
    }
}

/// Numbers from −127 to 127 that are mostly small: magnitude in unary, then sign.
#[derive(Debug)]
pub(super) struct Small {
    magnitude: [[Odds; 16]; 3],
    sign: Odds,
    /// The magnitude before: large ones stand together.
    before: usize,
}

impl Small {
    /// The greatest magnitude.
    pub(super) const MOST: i32 = 127;

    pub(super) fn new() -> Self {
        Self { magnitude: [[Odds::EVEN; 16]; 3], sign: Odds::EVEN, before: 0 }
    }

    pub(super) fn encode(&mut self, to: &mut Encoder, value: i32) {
        let most = value.unsigned_abs() as usize;
        let row = &mut self.magnitude[self.before.min(2)];
        for i in 0..Self::MOST as usize {
            to.bit(&mut row[i.min(15)], i < most);
            if i == most {
                break;
            }
        }
        if value != 0 {
            to.bit(&mut self.sign, value < 0);
        }
        self.before = most;
    }

    pub(super) fn decode(&mut self, from: &mut Decoder<'_>) -> i8 {
        let row = &mut self.magnitude[self.before.min(2)];
        let mut most = 0;
        while most < Self::MOST && from.bit(&mut row[(most as usize).min(15)]) {
            most += 1;
        }
        self.before = most as usize;
        let most = most as i8;
        if most != 0 && from.bit(&mut self.sign) { -most } else { most }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read() {
        for spread in [1i64, 2, 5, 40, 255] {
            let values: Vec<i32> = (0..5000i64).map(|i| ((i * i * 7919 / 13) % spread - spread / 2) as i32).collect();
            let (mut to, mut small) = (Encoder::new(), Small::new());
            for &v in &values {
                small.encode(&mut to, v.clamp(-127, 127));
            }
            let bytes = to.finish();
            let (mut from, mut small) = (Decoder::new(&bytes), Small::new());
            for &v in &values {
                assert_eq!(i32::from(small.decode(&mut from)), v.clamp(-127, 127));
            }
            from.finish(0).expect("all bytes were used");
        }
    }
}
