//! The trellis: which levels a weight may take depends on the levels before it in its row.
//!
//! All levels together are the multiples of one step. A state allows every second of them: the even ones (state even)
//! or the odd ones (state odd, and there the level zero too where [`super::table`] gives it room). So a level costs what
//! it would with twice the step, and yet the path through the states, which a decoder follows without being told,
//! can be chosen so that the allowed levels lie near the weights. That is trellis-coded quantization with set
//! partitioning into residues modulo 4; the machines are the feedback convolutional codes of rate 1/2 that are
//! known to spread paths of one-dimensional signals best.

#![expect(clippy::cast_possible_truncation, reason = "polynomials fit their byte without the lowest bit")]

/// A state machine; every row starts in state 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trellis {
    log_states: u8,
    /// Added (exclusive or) in odd states.
    odd: u8,
    /// Added after a level whose second bit is set.
    second: u8,
}

/// Parity-check polynomials by the logarithm of the number of states, from two on, without their lowest bits.
const CODES: [(u8, u8); 7] = [
    (0o5 >> 1, 0o2 >> 1),
    (0o13 >> 1, 0o4 >> 1),
    (0o23 >> 1, 0o4 >> 1),
    (0o45 >> 1, 0o10 >> 1),
    (0o103 >> 1, 0o24 >> 1),
    (0o235 >> 1, 0o126 >> 1),
    ((0o515u16 >> 1) as u8, (0o362u16 >> 1) as u8),
];

impl Trellis {
    /// The machine of `2^log_states` states, from 4 to 256.
    #[must_use]
    pub fn new(log_states: u8) -> Option<Self> {
        let (odd, second) = *CODES.get(usize::from(log_states.checked_sub(2)?))?;
        Some(Self { log_states, odd, second })
    }

    /// Logarithm of the number of states.
    #[must_use]
    pub fn log_states(self) -> u8 {
        self.log_states
    }

    /// The number of states.
    #[must_use]
    pub fn states(self) -> usize {
        1 << self.log_states
    }

    /// The state after `code` in `state`.
    #[must_use]
    pub fn next(self, state: u8, code: u8) -> u8 {
        let odd = if state & 1 == 1 { self.odd } else { 0 };
        let second = if code & 2 == 2 { self.second } else { 0 };
        (state >> 1) ^ odd ^ second
    }

    /// The two constants that a vector of machines needs: see [`Trellis::next`].
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn taps(self) -> (u8, u8) {
        (self.odd, self.second)
    }
}
