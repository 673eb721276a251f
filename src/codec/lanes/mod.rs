//! Several groups at once: one arithmetic, written once, for every vector width.
//!
//! An encoder works on [`Lanes::N`] groups side by side, one group per lane, so that the arithmetic of a group has the
//! same order at every width and the bytes cannot depend on the machine. Only IEEE operations that round correctly
//! are offered (no reciprocal, no fused multiply-add), and `f32` itself is the width of one: what the vectors must equal.

pub(crate) mod array;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
#[cfg(target_arch = "x86_64")]
pub(crate) mod sse2;

#[cfg(target_arch = "x86_64")]
pub(crate) use sse2::prefetch;

use std::ops::{Add, Div, Mul, Sub};

/// The most lanes that any width has.
pub(crate) const MAX_LANES: usize = 16;

/// `1.5 * 2^23`: adding it rounds a number of less than 2^22 to the nearest integer, ties to even.
const ROUNDER: f32 = 12_582_912.0;

/// `N` numbers, one per group.
pub(crate) trait Lanes:
    Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self>
{
    /// The answer of a comparison in every lane.
    type Mask: Copy;
    /// How many lanes there are.
    const N: usize;

    /// The same number in every lane.
    fn splat(x: f32) -> Self;
    /// The first `N` numbers.
    fn load(src: &[f32]) -> Self;
    /// Writes the first `N` numbers.
    fn store(self, dst: &mut [f32]);
    /// Numbers `lane * stride ..+ 8` of `src`, lane by lane: eight columns of as many groups as there are lanes.
    fn columns(src: &[f32], stride: usize) -> [Self; 8];
    /// `self < other ? self : other`
    fn min(self, other: Self) -> Self;
    /// `self > other ? self : other`
    fn max(self, other: Self) -> Self;
    /// `self < other`
    fn lt(self, other: Self) -> Self::Mask;
    /// `self == other`
    fn eq(self, other: Self) -> Self::Mask;
    /// Both.
    fn and(a: Self::Mask, b: Self::Mask) -> Self::Mask;
    /// Either.
    fn or(a: Self::Mask, b: Self::Mask) -> Self::Mask;
    /// Whether any lane says yes.
    fn any(mask: Self::Mask) -> bool;
    /// `mask ? yes : no`
    fn select(mask: Self::Mask, yes: Self, no: Self) -> Self;
    /// The nearest IEEE half, ties to even, as f32.
    fn round_f16(self) -> Self;
    /// Writes the nearest IEEE halves, little-endian.
    fn store_f16(self, dst: &mut [u8]);
    /// Reads `N` little-endian IEEE halves.
    fn load_f16(src: &[u8]) -> Self;
    /// Writes `low + 65536 * high` of every lane as an integer; both are integers of 16 bits.
    fn store_words(low: Self, high: Self, dst: &mut [u32; MAX_LANES]);
    /// Writes every lane, an integer of 8 bits, as a byte.
    fn store_bytes(self, dst: &mut [u8]);

    /// The nearest integer, ties to even, of a number of less than 2^22.
    #[inline(always)]
    fn round(self) -> Self {
        (self + Self::splat(ROUNDER)) - Self::splat(ROUNDER)
    }

    /// The nearest integer, ties to the lower one, of a number of less than 2^22.
    #[inline(always)]
    fn nearest(self) -> Self {
        let even = self.round();
        Self::select((self - even).eq(Self::splat(-0.5)), even - Self::splat(1.0), even)
    }

    /// [`Lanes::nearest`] of a number that is not negative.
    #[inline(always)]
    fn nearest_positive(self) -> Self {
        self.nearest()
    }

    /// The magnitude.
    #[inline(always)]
    fn abs(self) -> Self {
        self.max(Self::splat(0.0) - self)
    }

    /// How many of the ascending thresholds are less.
    #[inline(always)]
    fn count_above(self, thresholds: &[f32; 16]) -> Self {
        let mut count = Self::splat(0.0);
        for &threshold in &thresholds[..15] {
            count = Self::select(Self::splat(threshold).lt(self), count + Self::splat(1.0), count);
        }
        count
    }
}

/// Eight lanes that hold consecutive weights of one group, as a decoder writes them.
pub(crate) trait Eight: Lanes {
    /// The eight codes of a word, the lowest bits first.
    fn nibbles(word: u32) -> Self;
    /// Eight codes of a byte each.
    fn bytes(codes: [u8; 8]) -> Self;
    /// `table[code]` for the eight codes of a word.
    fn lookup(word: u32, table: &[f32; 16]) -> Self;
}

/// Asks for numbers that are needed soon; nothing where there is no such instruction.
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
pub(crate) fn prefetch(_src: &[f32], _at: usize) {}

/// Implements the arithmetic operators of a vector type by its intrinsics.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! operators {
    ($vector:ident: $($op:ident $method:ident $intrinsic:ident),*) => {
        $(impl std::ops::$op for $vector {
            type Output = Self;
            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                // SAFETY: vectors of this type exist only in functions that enable its instruction set.
                Self(unsafe { $intrinsic(self.0, other.0) })
            }
        })*
    };
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use operators;
