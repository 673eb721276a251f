//! Loss: how much of the weights rounding may take, where that is for the user to choose.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// The most squared error that quantized matrices may have together, relative to the sum of their squares (nMSE).
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub struct MaxLoss(f64);

impl MaxLoss {
    /// The loss `nmse`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for what is no number above 0 and below 1.
    pub fn new(nmse: f64) -> Result<Self> {
        if nmse > 0.0 && nmse < 1.0 {
            return Ok(Self(nmse));
        }
        Err(Error::invalid(format!("a loss of {nmse}, expected an nMSE above 0 and below 1, such as 1e-3")))
    }

    /// Squared error over squared weights.
    #[must_use]
    pub fn nmse(self) -> f64 {
        self.0
    }
}

impl fmt::Display for MaxLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:e}", self.0)
    }
}

impl FromStr for MaxLoss {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        Self::new(s.parse().map_err(|_| Error::invalid(format!("'{s}' is no nMSE, such as 1e-3")))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_is_printed_as_it_is_read() {
        for text in ["1e-3", "2.5e-4", "5e-1", "3.3333e-2"] {
            assert_eq!(text.parse::<MaxLoss>().unwrap().to_string(), text);
        }
        for text in ["", "none", "nan", "inf", "0", "-1e-3", "1", "2"] {
            assert!(text.parse::<MaxLoss>().is_err(), "{text}");
        }
    }
}
