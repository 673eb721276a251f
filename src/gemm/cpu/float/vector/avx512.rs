//! Sixteen lanes of AVX-512: one permutation looks at the low four bits of every lane and finds all sixteen levels.

#![expect(unsafe_code, reason = "vector intrinsics are unsafe outside functions that enable them")]

use std::arch::x86_64::*;

use super::Vector;
use crate::codec::lanes::avx512::F32x16;

impl Vector for F32x16 {
    type Words = __m512i;
    type Table = __m512;
    const TABLES: bool = true;
    const REGISTERS: usize = 32;
    const HEIGHT: usize = 14;

    #[inline(always)]
    fn add_product(self, a: Self, b: Self) -> Self {
        // SAFETY: only functions that enable AVX-512 name this type.
        Self(unsafe { _mm512_fmadd_ps(a.0, b.0, self.0) })
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: only functions that enable AVX-512 name this type.
        unsafe { _mm512_reduce_add_ps(self.0) }
    }

    #[inline(always)]
    fn pick(src: &[f32], indices: &[u32]) -> Self {
        let (src, indices) = (&src[..16], &indices[..16]);
        // SAFETY: both slices hold sixteen elements; only functions that enable AVX-512 name this type.
        Self(unsafe {
            _mm512_permutexvar_ps(_mm512_loadu_si512(indices.as_ptr().cast()), _mm512_loadu_ps(src.as_ptr()))
        })
    }

    #[inline(always)]
    fn prefetch(src: &[u8], at: usize) {
        // SAFETY: a prefetch of any address does nothing that a program can see.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(src.as_ptr().wrapping_add(at).cast()) }
    }

    #[inline(always)]
    fn words(src: &[u8]) -> __m512i {
        let src = &src[..64];
        // SAFETY: the slice holds 64 bytes; only functions that enable AVX-512 name this type.
        unsafe { _mm512_loadu_si512(src.as_ptr().cast()) }
    }

    #[inline(always)]
    fn bits(self) -> __m512i {
        // SAFETY: only functions that enable AVX-512 name this type.
        unsafe { _mm512_castps_si512(self.0) }
    }

    #[inline(always)]
    fn flip(words: __m512i, mask: u32) -> __m512i {
        // SAFETY: only functions that enable AVX-512 name this type.
        unsafe { _mm512_xor_si512(words, _mm512_set1_epi32(mask.cast_signed())) }
    }

    #[inline(always)]
    fn unsigned(words: __m512i, bits: u32, shift: u32) -> Self {
        // SAFETY: only functions that enable AVX-512 name this type.
        Self(unsafe {
            let codes = _mm512_srlv_epi32(words, _mm512_set1_epi32(shift.cast_signed()));
            _mm512_cvtepi32_ps(_mm512_and_si512(codes, _mm512_set1_epi32((1 << bits) - 1)))
        })
    }

    #[inline(always)]
    fn signed(words: __m512i, bits: u32, shift: u32) -> Self {
        // SAFETY: only functions that enable AVX-512 name this type.
        Self(unsafe {
            let above = _mm512_sllv_epi32(words, _mm512_set1_epi32((32 - bits - shift).cast_signed()));
            _mm512_cvtepi32_ps(_mm512_srav_epi32(above, _mm512_set1_epi32((32 - bits).cast_signed())))
        })
    }

    #[inline(always)]
    fn table(levels: &[f32; 16]) -> __m512 {
        // SAFETY: the array holds sixteen numbers; only functions that enable AVX-512 name this type.
        unsafe { _mm512_loadu_ps(levels.as_ptr()) }
    }

    #[inline(always)]
    fn lookup(words: __m512i, table: __m512, shift: u32) -> Self {
        // SAFETY: only functions that enable AVX-512 name this type.
        Self(unsafe { _mm512_permutexvar_ps(_mm512_srlv_epi32(words, _mm512_set1_epi32(shift.cast_signed())), table) })
    }
}
