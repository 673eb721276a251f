//! Lanes as plain arrays: one lane, the reference of the vectors, and four for machines without a width of their own.
//!
//! Four lanes are what most baseline instruction sets have, and straight loops over them are what the compiler
//! turns into vectors by itself.

use std::ops::{Add, Div, Mul, Sub};

use half::f16;

use super::{Eight, Lanes, MAX_LANES};

/// `N` lanes in an array.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Array<const N: usize>(pub(crate) [f32; N]);

impl<const N: usize> Array<N> {
    #[inline(always)]
    fn zip(mut self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        for l in 0..N {
            self.0[l] = f(self.0[l], other.0[l]);
        }
        self
    }

    #[inline(always)]
    fn compare(self, other: Self, f: impl Fn(&f32, &f32) -> bool) -> [bool; N] {
        let mut mask = [false; N];
        for (l, answer) in mask.iter_mut().enumerate() {
            *answer = f(&self.0[l], &other.0[l]);
        }
        mask
    }
}

macro_rules! operators {
    ($($op:ident $method:ident),*) => {
        $(impl<const N: usize> $op for Array<N> {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                self.zip(other, f32::$method)
            }
        })*
    };
}
operators!(Add add, Sub sub, Mul mul, Div div);

impl<const N: usize> Lanes for Array<N> {
    type Mask = [bool; N];
    const N: usize = N;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self([x; N])
    }

    #[inline(always)]
    fn load(src: &[f32]) -> Self {
        let mut lanes = [0.0; N];
        lanes.copy_from_slice(&src[..N]);
        Self(lanes)
    }

    #[inline(always)]
    fn store(self, dst: &mut [f32]) {
        dst[..N].copy_from_slice(&self.0);
    }

    #[inline(always)]
    fn columns(src: &[f32], stride: usize) -> [Self; 8] {
        assert!(src.len() >= (Self::N - 1) * stride + 8, "every lane has eight numbers");
        let mut columns = [Self::splat(0.0); 8];
        for l in 0..N {
            let row = &src[l * stride..][..8];
            for j in 0..8 {
                columns[j].0[l] = row[j];
            }
        }
        columns
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn lt(self, other: Self) -> Self::Mask {
        self.compare(other, f32::lt)
    }

    #[inline(always)]
    fn eq(self, other: Self) -> Self::Mask {
        self.compare(other, f32::eq)
    }

    #[inline(always)]
    fn and(mut a: Self::Mask, b: Self::Mask) -> Self::Mask {
        for l in 0..N {
            a[l] &= b[l];
        }
        a
    }

    #[inline(always)]
    fn or(mut a: Self::Mask, b: Self::Mask) -> Self::Mask {
        for l in 0..N {
            a[l] |= b[l];
        }
        a
    }

    #[inline(always)]
    fn any(mask: Self::Mask) -> bool {
        mask.contains(&true)
    }

    #[inline(always)]
    fn select(mask: Self::Mask, yes: Self, mut no: Self) -> Self {
        for (l, lane) in no.0.iter_mut().enumerate() {
            *lane = if mask[l] { yes.0[l] } else { *lane };
        }
        no
    }

    #[inline(always)]
    fn round_f16(self) -> Self {
        self.zip(self, |x, _| f16::from_f32(x).to_f32())
    }

    #[inline(always)]
    fn store_f16(self, dst: &mut [u8]) {
        for (half, &x) in dst.as_chunks_mut::<2>().0[..N].iter_mut().zip(&self.0) {
            *half = f16::from_f32(x).to_le_bytes();
        }
    }

    #[inline(always)]
    fn load_f16(src: &[u8]) -> Self {
        let mut lanes = [0.0; N];
        for (x, &half) in lanes.iter_mut().zip(&src.as_chunks::<2>().0[..N]) {
            *x = f16::from_le_bytes(half).to_f32();
        }
        Self(lanes)
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "integers of 16 bits by contract")]
    fn store_words(low: Self, high: Self, dst: &mut [u32; MAX_LANES]) {
        for (l, word) in dst[..N].iter_mut().enumerate() {
            *word = low.0[l] as u32 | (high.0[l] as u32) << 16;
        }
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "integers of 8 bits by contract")]
    fn store_bytes(self, dst: &mut [u8]) {
        for (byte, &x) in dst[..N].iter_mut().zip(&self.0) {
            *byte = x as u8;
        }
    }
}

impl Eight for Array<8> {
    #[inline(always)]
    fn nibbles(word: u32) -> Self {
        let mut codes = [0; 8];
        for (pair, byte) in codes.as_chunks_mut::<2>().0.iter_mut().zip(word.to_le_bytes()) {
            *pair = [byte & 15, byte >> 4];
        }
        Self::bytes(codes)
    }

    #[inline(always)]
    fn bytes(codes: [u8; 8]) -> Self {
        Self(codes.map(f32::from))
    }

    #[inline(always)]
    fn lookup(word: u32, table: &[f32; 16]) -> Self {
        let mut levels = [0.0; 8];
        for (pair, byte) in levels.as_chunks_mut::<2>().0.iter_mut().zip(word.to_le_bytes()) {
            *pair = [table[usize::from(byte & 15)], table[usize::from(byte >> 4)]];
        }
        Self(levels)
    }
}
