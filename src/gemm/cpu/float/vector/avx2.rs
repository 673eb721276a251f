//! Eight lanes of AVX2 with FMA.

#![expect(unsafe_code, reason = "vector intrinsics are unsafe outside functions that enable them")]

use std::arch::x86_64::*;

use super::Vector;
use crate::codec::lanes::avx2::F32x8;

impl Vector for F32x8 {
    type Words = __m256i;
    type Table = (__m256, __m256);
    const TABLES: bool = false;
    const REGISTERS: usize = 16;
    const HEIGHT: usize = 6;

    #[inline(always)]
    fn add_product(self, a: Self, b: Self) -> Self {
        // SAFETY: only functions that enable AVX2 and FMA multiply with this type.
        Self(unsafe { _mm256_fmadd_ps(a.0, b.0, self.0) })
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: only functions that enable AVX2 name this type.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    fn pick(src: &[f32], indices: &[u32]) -> Self {
        let (src, indices) = (&src[..8], &indices[..8]);
        // SAFETY: both slices hold eight elements; only functions that enable AVX2 name this type.
        Self(unsafe {
            _mm256_permutevar8x32_ps(_mm256_loadu_ps(src.as_ptr()), _mm256_loadu_si256(indices.as_ptr().cast()))
        })
    }

    #[inline(always)]
    fn prefetch(src: &[u8], at: usize) {
        // SAFETY: a prefetch of any address does nothing that a program can see.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(src.as_ptr().wrapping_add(at).cast()) }
    }

    #[inline(always)]
    fn words(src: &[u8]) -> __m256i {
        let src = &src[..32];
        // SAFETY: the slice holds 32 bytes; only functions that enable AVX2 name this type.
        unsafe { _mm256_loadu_si256(src.as_ptr().cast()) }
    }

    #[inline(always)]
    fn bits(self) -> __m256i {
        // SAFETY: only functions that enable AVX2 name this type.
        unsafe { _mm256_castps_si256(self.0) }
    }

    #[inline(always)]
    fn flip(words: __m256i, mask: u32) -> __m256i {
        // SAFETY: only functions that enable AVX2 name this type.
        unsafe { _mm256_xor_si256(words, _mm256_set1_epi32(mask.cast_signed())) }
    }

    #[inline(always)]
    fn unsigned(words: __m256i, bits: u32, shift: u32) -> Self {
        // SAFETY: only functions that enable AVX2 name this type.
        Self(unsafe {
            let codes = _mm256_srlv_epi32(words, _mm256_set1_epi32(shift.cast_signed()));
            _mm256_cvtepi32_ps(_mm256_and_si256(codes, _mm256_set1_epi32((1 << bits) - 1)))
        })
    }

    #[inline(always)]
    fn signed(words: __m256i, bits: u32, shift: u32) -> Self {
        // SAFETY: only functions that enable AVX2 name this type.
        Self(unsafe {
            let above = _mm256_sllv_epi32(words, _mm256_set1_epi32((32 - bits - shift).cast_signed()));
            _mm256_cvtepi32_ps(_mm256_srav_epi32(above, _mm256_set1_epi32((32 - bits).cast_signed())))
        })
    }

    #[inline(always)]
    fn table(levels: &[f32; 16]) -> (__m256, __m256) {
        // SAFETY: the array holds sixteen numbers; only functions that enable AVX2 name this type.
        unsafe { (_mm256_loadu_ps(levels.as_ptr()), _mm256_loadu_ps(levels[8..].as_ptr())) }
    }

    #[inline(always)]
    fn lookup(words: __m256i, (low, high): (__m256, __m256), shift: u32) -> Self {
        // SAFETY: only functions that enable AVX2 name this type.
        Self(unsafe {
            let codes = _mm256_srlv_epi32(words, _mm256_set1_epi32(shift.cast_signed()));
            // Bit 3 of a code chooses the half of the table, and a blend looks at the sign.
            let upper = _mm256_sllv_epi32(words, _mm256_set1_epi32((28 - shift).cast_signed()));
            let low = _mm256_permutevar8x32_ps(low, codes);
            let high = _mm256_permutevar8x32_ps(high, codes);
            _mm256_blendv_ps(low, high, _mm256_castsi256_ps(upper))
        })
    }
}
