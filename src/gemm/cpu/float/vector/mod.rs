//! What a product asks of a vector beyond what the codec does: fused multiply-add, and codes a word per lane.
//!
//! A word holds consecutive codes of one row, so it is loaded as it is stored: a vector of words is shifted so that one
//! code of every lane comes first, and becomes a vector of levels. No byte is moved between lanes, whatever the width;
//! the activations are brought into the same order instead, once for all rows.

mod array;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

use crate::codec::lanes::Lanes;
use crate::layout::Levels;

/// `N` numbers, or words of 32 bits with codes of as many groups or rows.
pub(super) trait Vector: Lanes {
    /// `N` words.
    type Words: Copy;
    /// Sixteen levels.
    type Table: Copy;
    /// Whether a permutation finds all sixteen levels, which makes every 4-bit layout a table.
    const TABLES: bool;
    /// Vectors that the machine holds.
    const REGISTERS: usize;
    /// Rows of activations that the registers hold sums of, beside two vectors of weights.
    const HEIGHT: usize;

    /// `self + a * b`, rounded once where the machine can.
    fn add_product(self, a: Self, b: Self) -> Self;
    /// The sum of all lanes.
    fn sum(self) -> f32;
    /// `src[indices[lane]]`, with indices below `N`.
    fn pick(src: &[f32], indices: &[u32]) -> Self;

    /// Asks for the cache line of byte `at`, which may lie past the end; nothing where there is no such instruction.
    #[inline(always)]
    fn prefetch(_src: &[u8], _at: usize) {}

    /// The first `N` little-endian words.
    fn words(src: &[u8]) -> Self::Words;
    /// Words that were loaded as if they were numbers.
    fn bits(self) -> Self::Words;
    /// Every word with the bits of `mask` flipped.
    fn flip(words: Self::Words, mask: u32) -> Self::Words;
    /// The `bits` bits of every word from bit `shift` on, as an integer without sign.
    fn unsigned(words: Self::Words, bits: u32, shift: u32) -> Self;
    /// The `bits` bits of every word from bit `shift` on, as an integer in two's complement.
    fn signed(words: Self::Words, bits: u32, shift: u32) -> Self;
    /// Sixteen levels.
    fn table(levels: &[f32; 16]) -> Self::Table;
    /// `table[code]` for the four bits of every word from bit `shift` on.
    fn lookup(words: Self::Words, table: Self::Table, shift: u32) -> Self;
}

/// How codes become levels.
pub(super) trait Kind<V: Vector>: Copy {
    /// Bits of a code.
    const BITS: u32;
    /// Codes in a word.
    const CODES: usize = 32 / Self::BITS as usize;

    /// What is done once to words for all their codes.
    #[inline(always)]
    fn prepare(self, words: V::Words) -> V::Words {
        words
    }

    /// The level of code `index` of every word.
    fn level(self, words: V::Words, index: u32) -> V;
}

/// `q`
#[derive(Clone, Copy)]
pub(super) struct Unsigned<const BITS: u32>;

/// `q - 2^(BITS-1)`
#[derive(Clone, Copy)]
pub(super) struct Signed<const BITS: u32>;

/// `table[q]`
pub(super) struct Table<V: Vector>(V::Table);

impl<V: Vector> Clone for Table<V> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<V: Vector> Copy for Table<V> {}

impl<V: Vector> Table<V> {
    #[inline(always)]
    pub(super) fn new(levels: &[f32; 16]) -> Self {
        Self(V::table(levels))
    }
}

impl<V: Vector, const BITS: u32> Kind<V> for Unsigned<BITS> {
    const BITS: u32 = BITS;

    #[inline(always)]
    fn level(self, words: V::Words, index: u32) -> V {
        V::unsigned(words, BITS, BITS * index)
    }
}

impl<V: Vector, const BITS: u32> Kind<V> for Signed<BITS> {
    const BITS: u32 = BITS;

    /// A code with its highest bit flipped is its level in two's complement.
    #[inline(always)]
    fn prepare(self, words: V::Words) -> V::Words {
        V::flip(words, if BITS == 4 { 0x8888_8888 } else { 0x8080_8080 })
    }

    #[inline(always)]
    fn level(self, words: V::Words, index: u32) -> V {
        V::signed(words, BITS, BITS * index)
    }
}

impl<V: Vector> Kind<V> for Table<V> {
    const BITS: u32 = 4;

    #[inline(always)]
    fn level(self, words: V::Words, index: u32) -> V {
        V::lookup(words, self.0, 4 * index)
    }
}

/// The sixteen levels of a 4-bit layout whose zero points are taken as [`centre`] says.
pub(super) fn levels_of_nibbles(levels: Levels) -> [f32; 16] {
    match levels {
        Levels::Table(table) => *table,
        Levels::Unsigned => std::array::from_fn(|q| q as f32),
        Levels::Signed | Levels::ZeroPoint => std::array::from_fn(|q| q as f32 - 8.0),
        Levels::Bank(_) => unreachable!("levels of a bank are unpacked to 8 bits"),
    }
}

/// What is taken off a code with a zero point before it is multiplied: the middle of the codes, so that products are as
/// small as those of signed levels, and the rest of the zero point leaves the loop as an offset does.
pub(super) fn centre(bits: usize) -> f32 {
    if bits == 4 { 8.0 } else { 128.0 }
}

/// Evaluates an expression with the kind of a layout: a closure would not be compiled for the instruction set.
macro_rules! with_kind {
    ($vector:ty, $layout:expr, $kind:ident => $body:expr) => {{
        use crate::gemm::cpu::float::vector::{Signed, Table, Unsigned, levels_of_nibbles};
        use crate::layout::Levels;
        let layout = $layout;
        // By `if`, whose branch the compiler drops before it generates code where the vector decides it.
        if layout.bits() == 8 {
            if layout.levels() == Levels::Unsigned {
                let $kind = Unsigned::<8>;
                $body
            } else {
                let $kind = Signed::<8>;
                $body
            }
        } else if <$vector>::TABLES {
            let $kind = Table::<$vector>::new(&levels_of_nibbles(layout.levels()));
            $body
        } else {
            match layout.levels() {
                levels @ Levels::Table(_) => {
                    let $kind = Table::<$vector>::new(&levels_of_nibbles(levels));
                    $body
                }
                Levels::Unsigned => {
                    let $kind = Unsigned::<4>;
                    $body
                }
                _ => {
                    let $kind = Signed::<4>;
                    $body
                }
            }
        }
    }};
}
pub(super) use with_kind;
