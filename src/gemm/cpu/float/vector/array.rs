//! Plain arrays, in loops that the compiler turns into vectors by itself.

use super::Vector;
use crate::codec::lanes::array::Array;

impl<const N: usize> Vector for Array<N> {
    type Words = [u32; N];
    type Table = [f32; 16];
    const TABLES: bool = false;
    const REGISTERS: usize = 16;
    const HEIGHT: usize = 4;

    /// Rounded twice: without an instruction for it, a fused product is a call into a library.
    #[inline(always)]
    fn add_product(self, a: Self, b: Self) -> Self {
        self + a * b
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        self.0.iter().sum()
    }

    #[inline(always)]
    fn pick(src: &[f32], indices: &[u32]) -> Self {
        let mut lanes = [0.0; N];
        for (x, &index) in lanes.iter_mut().zip(&indices[..N]) {
            *x = src[index as usize];
        }
        Self(lanes)
    }

    #[inline(always)]
    fn words(src: &[u8]) -> [u32; N] {
        let mut words = [0; N];
        for (word, bytes) in words.iter_mut().zip(&src[..4 * N].as_chunks::<4>().0[..N]) {
            *word = u32::from_le_bytes(*bytes);
        }
        words
    }

    #[inline(always)]
    fn bits(self) -> [u32; N] {
        self.0.map(f32::to_bits)
    }

    #[inline(always)]
    fn flip(words: [u32; N], mask: u32) -> [u32; N] {
        words.map(|word| word ^ mask)
    }

    #[inline(always)]
    fn unsigned(words: [u32; N], bits: u32, shift: u32) -> Self {
        Self(words.map(|word| ((word >> shift) & ((1 << bits) - 1)).cast_signed() as f32))
    }

    #[inline(always)]
    fn signed(words: [u32; N], bits: u32, shift: u32) -> Self {
        Self(words.map(|word| ((word << (32 - bits - shift)).cast_signed() >> (32 - bits)) as f32))
    }

    #[inline(always)]
    fn table(levels: &[f32; 16]) -> [f32; 16] {
        *levels
    }

    #[inline(always)]
    fn lookup(words: [u32; N], table: [f32; 16], shift: u32) -> Self {
        Self(words.map(|word| table[(word >> shift & 15) as usize]))
    }
}
