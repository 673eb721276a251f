//! Sums of integer products in vectors of every width: what the kernels of [`super`] are written in.
//!
//! A vector holds [`Lanes::N`] words; a word is four bytes, an integer or a float. All integer operations are exact, so
//! every instruction set gives the same sums; only the order in which floats are added differs.

pub(super) mod array;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(super) mod neon;

/// The most words of any width.
pub(super) const MAX_LANES: usize = 16;

/// `N` words at a time.
pub(super) trait Lanes {
    /// Words of a vector.
    const N: usize;
    /// What [`Lanes::dot`] wants to be added to levels of 8 bits: 128, which makes them codes without sign, or nothing.
    const BIAS: u8 = 128;
    /// Four bytes in every lane.
    type Bytes: Copy;
    /// An integer in every lane.
    type Ints: Copy;
    /// A float in every lane.
    type Floats: Copy;
    /// For every lane, which of the numbers that follow each other it takes.
    type Index: Copy;

    /// Asks for the cache line that is `ahead` bytes after the start of `bytes`, which may lie beyond all memory.
    fn prefetch(bytes: &[u8], ahead: usize);
    /// 4-bit codes `8l ..+ 8` in lane `l`: the even ones, then the odd ones.
    fn nibbles(codes: &[u8]) -> [Self::Bytes; 2];
    /// 8-bit codes `8l ..+ 8` in lane `l` as levels plus [`Lanes::BIAS`]: the first four, then the last four.
    fn octets(codes: &[u8]) -> [Self::Bytes; 2];
    /// The bytes of the first `N` words.
    fn load_bytes(words: &[u32]) -> Self::Bytes;
    /// The first `N` words as integers.
    fn load_ints(words: &[u32]) -> Self::Ints;
    /// The first `N` words as floats.
    fn load_floats(words: &[u32]) -> Self::Floats;
    /// The first `N` floats.
    fn load(floats: &[f32]) -> Self::Floats;
    /// The same four bytes in every lane.
    fn splat_bytes(bytes: [u8; 4]) -> Self::Bytes;
    /// The same integer in every lane.
    fn splat_int(x: i32) -> Self::Ints;
    /// The same float in every lane.
    fn splat(x: f32) -> Self::Floats;
    /// `sum + Σ codes[i] · x[i]` over the four bytes of a lane; `codes` are unsigned and less than `1 << BITS`, or levels
    /// plus [`Lanes::BIAS`] where they have 8 bits, `x` is signed and not -128.
    fn dot<const BITS: u32>(sum: Self::Ints, codes: Self::Bytes, x: Self::Bytes) -> Self::Ints;
    /// `a · b`, where `a` is not negative and both fit 16 bits.
    fn times(a: Self::Ints, b: Self::Ints) -> Self::Ints;
    /// The integers as floats, rounded to nearest.
    fn to_floats(x: Self::Ints) -> Self::Floats;
    /// `a · b`
    fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a · b + c`, fused where the instruction set does that.
    fn mul_add(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    /// The sum over all lanes.
    fn sum(x: Self::Floats) -> f32;
    /// Writes the floats over the first `N` of `out`.
    fn store(x: Self::Floats, out: &mut [f32]);
    /// Number `l >> shift` for lane `l`.
    fn index(shift: u32) -> Self::Index;
    /// The floats that the index names; `N` of them are there.
    fn spread(floats: &[f32], index: Self::Index) -> Self::Floats;
    /// The integers that the index names; `N` of them are there.
    fn spread_ints(ints: &[i32], index: Self::Index) -> Self::Ints;
}
