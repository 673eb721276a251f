//! Numbers that begin at a cache line, so that no vector of them lies across two: loads of activations are what limits
//! a product beside its arithmetic, and twice as many lines would be twice as many loads.

use std::ops::{Deref, DerefMut};

/// Numbers in a cache line.
const LINE: usize = 16;

/// Numbers in memory that begin at a cache line.
pub(super) struct Aligned {
    numbers: Vec<f32>,
    start: usize,
    len: usize,
}

impl Aligned {
    /// As many zeros.
    pub(super) fn zeros(len: usize) -> Self {
        let numbers = vec![0.0f32; len + LINE - 1];
        // Numbers are found by this offset for as long as the vector lives, which never grows.
        let start = numbers.as_ptr().align_offset(4 * LINE).min(LINE - 1);
        Self { numbers, start, len }
    }
}

impl Deref for Aligned {
    type Target = [f32];

    #[inline(always)]
    fn deref(&self) -> &[f32] {
        &self.numbers[self.start..][..self.len]
    }
}

impl DerefMut for Aligned {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.numbers[self.start..][..self.len]
    }
}
