//! Vectors of 32-bit numbers, as wide as this machine has them, with what a decoder of [`super::vector`] does to lanes.

#![expect(
    unsafe_code,
    reason = "vector instructions are unsafe to call where they may be missing, and gathers read memory"
)]

use std::arch::x86_64::*;

/// Unsigned integers of 32 bits side by side.
pub(super) trait Vector: Copy {
    /// How many.
    const WIDTH: usize;
    fn splat(x: i32) -> Self;
    fn load(from: &[u32]) -> Self;
    fn store(self, to: &mut [u32]);
    fn add(self, other: Self) -> Self;
    fn and(self, other: Self) -> Self;
    fn or(self, other: Self) -> Self;
    fn xor(self, other: Self) -> Self;
    fn multiply(self, other: Self) -> Self;
    /// Between zero and `top`, as signed numbers.
    fn clamp(self, top: Self) -> Self;
    fn left<const BITS: u32>(self) -> Self;
    fn right<const BITS: u32>(self) -> Self;
    /// All bits where the lowest one is set.
    fn lowest(self) -> Self;
    /// # Safety
    /// Every element is an index into `slots`.
    unsafe fn gather(self, slots: &[u32]) -> Self;
    /// The lowest byte of every element.
    fn store_bytes(self, to: &mut [u8]);
    /// Elements below 2^16 go up by 16 bits and take a word each, in their order; also says how many do.
    ///
    /// # Safety
    /// As many words as elements can be read.
    unsafe fn refill(self, words: *const u8) -> (Self, usize);
}

/// Sixteen elements; only made where AVX-512F is.
#[derive(Clone, Copy)]
pub(super) struct Z(__m512i);

/// Eight elements; only made where AVX2 is.
#[derive(Clone, Copy)]
pub(super) struct Y(__m256i);

/// For a method whose instructions are there because its type is only used in functions that enable them.
macro_rules! there {
    ($body:expr) => {
        // SAFETY: the type is only used inside functions that enable its instruction set.
        unsafe { $body }
    };
}

impl Vector for Z {
    const WIDTH: usize = 16;
    #[inline(always)]
    fn splat(x: i32) -> Self {
        Self(there!(_mm512_set1_epi32(x)))
    }
    #[inline(always)]
    fn load(from: &[u32]) -> Self {
        let from = &from[..16];
        Self(there!(_mm512_loadu_si512(from.as_ptr().cast())))
    }
    #[inline(always)]
    fn store(self, to: &mut [u32]) {
        let to = &mut to[..16];
        there!(_mm512_storeu_si512(to.as_mut_ptr().cast(), self.0));
    }
    #[inline(always)]
    fn store_bytes(self, to: &mut [u8]) {
        let to = &mut to[..16];
        there!(_mm_storeu_si128(to.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(self.0)));
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(there!(_mm512_add_epi32(self.0, other.0)))
    }
    #[inline(always)]
    fn and(self, other: Self) -> Self {
        Self(there!(_mm512_and_si512(self.0, other.0)))
    }
    #[inline(always)]
    fn or(self, other: Self) -> Self {
        Self(there!(_mm512_or_si512(self.0, other.0)))
    }
    #[inline(always)]
    fn xor(self, other: Self) -> Self {
        Self(there!(_mm512_xor_si512(self.0, other.0)))
    }
    #[inline(always)]
    fn multiply(self, other: Self) -> Self {
        Self(there!(_mm512_mullo_epi32(self.0, other.0)))
    }
    #[inline(always)]
    fn clamp(self, top: Self) -> Self {
        Self(there!(_mm512_min_epi32(_mm512_max_epi32(self.0, _mm512_setzero_si512()), top.0)))
    }
    #[inline(always)]
    fn left<const BITS: u32>(self) -> Self {
        Self(there!(_mm512_slli_epi32::<BITS>(self.0)))
    }
    #[inline(always)]
    fn right<const BITS: u32>(self) -> Self {
        Self(there!(_mm512_srli_epi32::<BITS>(self.0)))
    }
    #[inline(always)]
    fn lowest(self) -> Self {
        Self(there!(_mm512_srai_epi32::<31>(_mm512_slli_epi32::<31>(self.0))))
    }
    #[inline(always)]
    unsafe fn gather(self, slots: &[u32]) -> Self {
        Self(there!(_mm512_i32gather_epi32::<4>(self.0, slots.as_ptr().cast())))
    }
    #[inline(always)]
    unsafe fn refill(self, words: *const u8) -> (Self, usize) {
        there!({
            let low = _mm512_cmplt_epu32_mask(self.0, _mm512_set1_epi32(1 << 16));
            let next = _mm512_cvtepu16_epi32(_mm256_loadu_si256(words.cast()));
            let next = _mm512_maskz_expand_epi32(low, next);
            let up = _mm512_mask_slli_epi32::<16>(self.0, low, self.0);
            (Self(_mm512_or_si512(up, next)), low.count_ones() as usize)
        })
    }
}

/// For each mask of lanes, which word each lane takes.
static SPREAD: [[u8; 8]; 256] = {
    let mut spread = [[0; 8]; 256];
    let mut mask = 0;
    while mask < 256 {
        let (mut lane, mut word) = (0, 0);
        while lane < 8 {
            if mask >> lane & 1 == 1 {
                spread[mask][lane] = word;
                word += 1;
            }
            lane += 1;
        }
        mask += 1;
    }
    spread
};

impl Vector for Y {
    const WIDTH: usize = 8;
    #[inline(always)]
    fn splat(x: i32) -> Self {
        Self(there!(_mm256_set1_epi32(x)))
    }
    #[inline(always)]
    fn load(from: &[u32]) -> Self {
        let from = &from[..8];
        Self(there!(_mm256_loadu_si256(from.as_ptr().cast())))
    }
    #[inline(always)]
    fn store(self, to: &mut [u32]) {
        let to = &mut to[..8];
        there!(_mm256_storeu_si256(to.as_mut_ptr().cast(), self.0));
    }
    #[inline(always)]
    fn store_bytes(self, to: &mut [u8]) {
        let to = &mut to[..8];
        there!({
            // The lowest bytes of each half come first in it, then those four of both halves together.
            let lowest = _mm256_setr_epi8(
                0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1,
                -1, -1, -1, -1, -1,
            );
            let halves = _mm256_shuffle_epi8(self.0, lowest);
            let both = _mm256_permutevar8x32_epi32(halves, _mm256_setr_epi32(0, 4, 1, 1, 1, 1, 1, 1));
            _mm_storel_epi64(to.as_mut_ptr().cast(), _mm256_castsi256_si128(both));
        });
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(there!(_mm256_add_epi32(self.0, other.0)))
    }
    #[inline(always)]
    fn and(self, other: Self) -> Self {
        Self(there!(_mm256_and_si256(self.0, other.0)))
    }
    #[inline(always)]
    fn or(self, other: Self) -> Self {
        Self(there!(_mm256_or_si256(self.0, other.0)))
    }
    #[inline(always)]
    fn xor(self, other: Self) -> Self {
        Self(there!(_mm256_xor_si256(self.0, other.0)))
    }
    #[inline(always)]
    fn multiply(self, other: Self) -> Self {
        Self(there!(_mm256_mullo_epi32(self.0, other.0)))
    }
    #[inline(always)]
    fn clamp(self, top: Self) -> Self {
        Self(there!(_mm256_min_epi32(_mm256_max_epi32(self.0, _mm256_setzero_si256()), top.0)))
    }
    #[inline(always)]
    fn left<const BITS: u32>(self) -> Self {
        Self(there!(_mm256_sll_epi32(self.0, _mm_cvtsi32_si128(BITS as i32))))
    }
    #[inline(always)]
    fn right<const BITS: u32>(self) -> Self {
        Self(there!(_mm256_srl_epi32(self.0, _mm_cvtsi32_si128(BITS as i32))))
    }
    #[inline(always)]
    fn lowest(self) -> Self {
        Self(there!(_mm256_srai_epi32::<31>(_mm256_slli_epi32::<31>(self.0))))
    }
    #[inline(always)]
    unsafe fn gather(self, slots: &[u32]) -> Self {
        Self(there!(_mm256_i32gather_epi32::<4>(slots.as_ptr().cast(), self.0)))
    }
    #[inline(always)]
    unsafe fn refill(self, words: *const u8) -> (Self, usize) {
        there!({
            let low = _mm256_cmpeq_epi32(_mm256_srli_epi32::<16>(self.0), _mm256_setzero_si256());
            let mask = _mm256_movemask_ps(_mm256_castsi256_ps(low));
            let next = _mm256_cvtepu16_epi32(_mm_loadu_si128(words.cast()));
            let order = _mm256_cvtepu8_epi32(_mm_loadl_epi64(SPREAD[mask as usize].as_ptr().cast()));
            let next = _mm256_permutevar8x32_epi32(next, order);
            let up = _mm256_or_si256(_mm256_slli_epi32::<16>(self.0), next);
            (Self(_mm256_blendv_epi8(self.0, up, low)), mask.count_ones() as usize)
        })
    }
}
