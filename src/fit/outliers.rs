//! Outliers: the few weights whose exact storage saves most, taken out before the rest is fitted.
//!
//! A weight that is stored by itself loses nothing and no longer stretches the range of its group. What it saves grows with
//! what a layer loses when it is off: its square, times the mean square of its input where that is known. So the largest
//! of these are taken, in the whole matrix and not per row. In the matrix that is fitted the nearest weight of its group
//! that stays stands in the place of an outlier, which therefore widens no range.

use std::fmt;
use std::str::FromStr;

use rayon::prelude::*;

use crate::error::{Error, Result};

/// Which part of the weights are outliers, in millionths, so that it is printed, stored and compared exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Share(u32);

impl Share {
    /// The greatest share: beyond a tenth more bits per code are cheaper.
    pub const MOST: Self = Self(100_000);

    /// The share nearest to a number.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what is no number above 0 and up to [`Share::MOST`].
    pub fn from_part(part: f64) -> Result<Self> {
        let millionths = part * 1e6 + 0.5;
        if !(millionths >= 1.0 && part <= 0.1) {
            return Err(Error::invalid(format!(
                "a share of {part} outliers, expected above 0 and at most {}",
                Self::MOST
            )));
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "at most 10^5, checked above")]
        Ok(Self(millionths as u32))
    }

    /// How many of so many weights.
    #[must_use]
    pub fn of(self, weights: u64) -> u64 {
        u64::try_from(u128::from(weights) * u128::from(self.0) / 1_000_000).expect("a part of a u64")
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("0.{:06}", self.0);
        f.write_str(text.trim_end_matches('0'))
    }
}

impl FromStr for Share {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let part = s.parse().map_err(|_| Error::invalid(format!("'{s}' is no share of the weights, such as 0.005")))?;
        Self::from_part(part)
    }
}

/// The places of the `count` weights whose storage saves most, ascending; of equal ones the first.
///
/// `importance` is what a unit of squared error costs in each column, or the same everywhere where there is none.
///
/// # Panics
/// When the weights are not whole rows, or fewer than `count`.
#[must_use]
pub fn choose(weights: &[f32], cols: usize, count: usize, importance: Option<&[f32]>) -> Vec<usize> {
    assert!(weights.len().is_multiple_of(cols.max(1)) && count <= weights.len(), "weights are not whole rows");
    if count == 0 {
        return Vec::new();
    }
    // Savings are not negative, so their bits rank as they do.
    let ranks = |first: usize, weights: &[f32]| -> Vec<u32> {
        let saving = |(i, &w): (usize, &f32)| {
            let cost = importance.map_or(1.0, |importance| f64::from(importance[(first + i) % cols]));
            #[expect(clippy::cast_possible_truncation, reason = "rounded, which keeps the order")]
            let saving = (f64::from(w) * f64::from(w) * cost) as f32;
            saving.to_bits()
        };
        weights.iter().enumerate().map(saving).collect()
    };
    let threshold = |above: u32, shift: u32, wanted: usize| {
        // The greatest digit, among the ranks that begin with `above`, at which there are as many as wanted.
        let counts = weights
            .par_chunks(PART)
            .enumerate()
            .map(|(part, weights)| {
                let mut counts = vec![0_usize; 1 << 16];
                for rank in ranks(part * PART, weights) {
                    if shift == 16 || rank >> 16 == above {
                        counts[((rank >> shift) & 0xffff) as usize] += 1;
                    }
                }
                counts
            })
            .reduce(
                || vec![0; 1 << 16],
                |mut all, part| {
                    all.iter_mut().zip(part).for_each(|(all, part)| *all += part);
                    all
                },
            );
        let mut left = wanted;
        for (digit, &count) in (0..=0xffff_u32).rev().zip(counts.iter().rev()) {
            if count >= left {
                return (digit, left);
            }
            left -= count;
        }
        unreachable!("there are as many weights as wanted")
    };
    let (high, left) = threshold(0, 16, count);
    let (low, mut equal) = threshold(high, 0, left);
    let least = (high << 16) | low;
    let mut places = Vec::with_capacity(count);
    for (part, weights) in weights.chunks(PART).enumerate() {
        for (i, rank) in ranks(part * PART, weights).into_iter().enumerate() {
            let tied = rank == least && equal > 0;
            equal -= usize::from(tied);
            if rank > least || tied {
                places.push(part * PART + i);
            }
        }
    }
    places
}

/// Weights that a task ranks.
const PART: usize = 1 << 18;

/// Puts the nearest weight of its group that stays, or zero where none does, in the place of every outlier.
///
/// `group` is the number of columns that share a scale.
pub fn take_out(weights: &mut [f32], cols: usize, group: usize, places: &[usize]) {
    let mut places = places.iter().copied().peekable();
    while let Some(&place) = places.peek() {
        let row = place / cols * cols;
        let first = row + (place - row) / group * group;
        let end = (first + group).min(row + cols);
        let mut here = Vec::new();
        while let Some(place) = places.next_if(|&place| place < end) {
            here.push(place);
        }
        let mut out = here.iter().copied().peekable();
        let (mut least, mut greatest) = (f32::INFINITY, f32::NEG_INFINITY);
        for (i, &w) in (first..end).zip(&weights[first..end]) {
            if out.next_if_eq(&i).is_none() {
                least = if w < least { w } else { least };
                greatest = if w > greatest { w } else { greatest };
            }
        }
        for place in here {
            weights[place] = if least > greatest { 0.0 } else { weights[place].clamp(least, greatest) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_printed_as_people_write_it_and_read_back() {
        for (text, of_a_million) in [("0.005", 5_000), ("0.1", 100_000), ("0.000001", 1), ("0.0125", 12_500)] {
            let share: Share = text.parse().unwrap();
            assert_eq!((share.of(1_000_000), share.to_string().as_str()), (of_a_million, text));
        }
        for text in ["", "half", "nan", "-1", "0", "0.11", "0.0000001", "inf"] {
            assert!(text.parse::<Share>().is_err(), "{text}");
        }
    }
}
