//! Rate: how many bits a weight shall take on disk, where that is for the user to choose.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// Bits per weight in thousandths, so that a rate is printed, stored and compared exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rate(u32);

impl Rate {
    /// The least rate that can be asked for.
    pub const LEAST: Self = Self(100);
    /// The greatest one: what the codes take in memory.
    pub const MOST: Self = Self(8_000);
    /// What is taken where nothing is asked for: the size of the usual 4-bit formats.
    pub const DEFAULT: Self = Self(4_500);

    /// A rate of so many thousandths of a bit.
    ///
    /// # Errors
    /// [`Error::Invalid`] outside [`Rate::LEAST`] to [`Rate::MOST`].
    pub fn from_thousandths(thousandths: u32) -> Result<Self> {
        let rate = Self(thousandths);
        if rate < Self::LEAST || rate > Self::MOST {
            return Err(Error::invalid(format!("{rate} bits per weight, expected {} to {}", Self::LEAST, Self::MOST)));
        }
        Ok(rate)
    }

    /// The rate nearest to a number of bits.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what is no number from [`Rate::LEAST`] to [`Rate::MOST`].
    pub fn from_bits(bits: f64) -> Result<Self> {
        if !(0.0..=1e6).contains(&bits) {
            return Err(Error::invalid(format!("{bits} bits per weight, expected {} to {}", Self::LEAST, Self::MOST)));
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to 10^9, checked above")]
        Self::from_thousandths((bits * 1000.0 + 0.5) as u32)
    }

    /// So many thousandths of a bit more, at most [`Rate::MOST`].
    #[must_use]
    pub fn plus(self, thousandths: u32) -> Self {
        Self(self.0.saturating_add(thousandths)).min(Self::MOST)
    }

    /// Thousandths of a bit.
    #[must_use]
    pub fn thousandths(self) -> u32 {
        self.0
    }

    /// Bits per weight.
    #[must_use]
    pub fn bits(self) -> f64 {
        f64::from(self.0) / 1000.0
    }

    /// Bytes of so many weights at this rate.
    #[must_use]
    pub fn bytes(self, weights: u64) -> u64 {
        u64::try_from((u128::from(weights) * u128::from(self.0)).div_ceil(8000)).unwrap_or(u64::MAX)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{}.{:03}", self.0 / 1000, self.0 % 1000);
        f.write_str(text.trim_end_matches('0').trim_end_matches('.'))
    }
}

impl FromStr for Rate {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let bits: f64 =
            s.parse().map_err(|_| Error::invalid(format!("'{s}' is no number of bits per weight, such as 4.25")))?;
        Self::from_bits(bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_printed_as_people_write_it_and_read_back() {
        for (text, thousandths) in [("4.25", 4250), ("3", 3000), ("0.1", 100), ("8", 8000), ("3.333", 3333)] {
            let rate: Rate = text.parse().unwrap();
            assert_eq!((rate.thousandths(), rate.to_string().as_str()), (thousandths, text));
        }
        for text in ["", "four", "nan", "-1", "inf", "0.05", "8.001"] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
        }
        assert_eq!(Rate(4250).bytes(1000), 532);
    }
}
