//! Sixteen lanes of AVX-512 (F, BW, VL, DQ).
//!
//! Every value of this type lives in a function that enables them, which is what makes the intrinsics sound here.

#![expect(unsafe_code, reason = "vector intrinsics are unsafe outside functions that enable them")]

use std::arch::x86_64::*;

use super::{Lanes, MAX_LANES, operators};

/// Sixteen lanes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct F32x16(pub(crate) __m512);

operators!(F32x16: Add add _mm512_add_ps, Sub sub _mm512_sub_ps, Mul mul _mm512_mul_ps, Div div _mm512_div_ps);

impl Lanes for F32x16 {
    type Mask = __mmask16;
    const N: usize = 16;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: only functions that enable AVX-512 name this type.
        Self(unsafe { _mm512_set1_ps(x) })
    }

    #[inline(always)]
    fn load(src: &[f32]) -> Self {
        let src = &src[..16];
        // SAFETY: the slice holds sixteen numbers; only functions that enable AVX-512 name this type.
        Self(unsafe { _mm512_loadu_ps(src.as_ptr()) })
    }

    #[inline(always)]
    fn store(self, dst: &mut [f32]) {
        let dst = &mut dst[..16];
        // SAFETY: the slice holds sixteen numbers; only functions that enable AVX-512 name this type.
        unsafe { _mm512_storeu_ps(dst.as_mut_ptr(), self.0) }
    }

    #[inline(always)]
    fn columns(src: &[f32], stride: usize) -> [Self; 8] {
        assert!(src.len() >= (Self::N - 1) * stride + 8, "every lane has eight numbers");
        // Row l in the lower and row l + 8 in the upper half: both halves are then transposed as 8 x 8.
        let mut r = [Self::splat(0.0).0; 8];
        for (l, row) in r.iter_mut().enumerate() {
            // SAFETY: eight numbers from every lane's start on are there, as asserted above.
            *row = unsafe {
                let low = _mm256_loadu_ps(src.as_ptr().add(l * stride));
                let high = _mm256_loadu_ps(src.as_ptr().add((l + 8) * stride));
                _mm512_insertf32x8::<1>(_mm512_castps256_ps512(low), high)
            };
        }
        // SAFETY: only functions that enable AVX-512 name this type.
        unsafe {
            let (a0, a1) = (_mm512_unpacklo_ps(r[0], r[1]), _mm512_unpackhi_ps(r[0], r[1]));
            let (b0, b1) = (_mm512_unpacklo_ps(r[2], r[3]), _mm512_unpackhi_ps(r[2], r[3]));
            let (c0, c1) = (_mm512_unpacklo_ps(r[4], r[5]), _mm512_unpackhi_ps(r[4], r[5]));
            let (d0, d1) = (_mm512_unpacklo_ps(r[6], r[7]), _mm512_unpackhi_ps(r[6], r[7]));
            let low = [
                _mm512_shuffle_ps::<0x44>(a0, b0),
                _mm512_shuffle_ps::<0xee>(a0, b0),
                _mm512_shuffle_ps::<0x44>(a1, b1),
                _mm512_shuffle_ps::<0xee>(a1, b1),
            ];
            let high = [
                _mm512_shuffle_ps::<0x44>(c0, d0),
                _mm512_shuffle_ps::<0xee>(c0, d0),
                _mm512_shuffle_ps::<0x44>(c1, d1),
                _mm512_shuffle_ps::<0xee>(c1, d1),
            ];
            let even = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
            let odd = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
            let mut columns = [Self::splat(0.0); 8];
            for j in 0..4 {
                let (low, high) = (_mm512_castps_pd(low[j]), _mm512_castps_pd(high[j]));
                columns[j] = Self(_mm512_castpd_ps(_mm512_permutex2var_pd(low, even, high)));
                columns[j + 4] = Self(_mm512_castpd_ps(_mm512_permutex2var_pd(low, odd, high)));
            }
            columns
        }
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        // SAFETY: only functions that enable AVX-512 name this type.
        Self(unsafe { _mm512_min_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // SAFETY: only functions that enable AVX-512 name this type.
        Self(unsafe { _mm512_max_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn lt(self, other: Self) -> __mmask16 {
        // SAFETY: only functions that enable AVX-512 name this type.
        unsafe { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, other.0) }
    }

    #[inline(always)]
    fn eq(self, other: Self) -> __mmask16 {
        // SAFETY: only functions that enable AVX-512 name this type.
        unsafe { _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(self.0, other.0) }
    }

    #[inline(always)]
    fn and(a: __mmask16, b: __mmask16) -> __mmask16 {
        a & b
    }

    #[inline(always)]
    fn or(a: __mmask16, b: __mmask16) -> __mmask16 {
        a | b
    }

    #[inline(always)]
    fn any(mask: __mmask16) -> bool {
        mask != 0
    }

    #[inline(always)]
    fn select(mask: __mmask16, yes: Self, no: Self) -> Self {
        // SAFETY: only functions that enable AVX-512 name this type.
        Self(unsafe { _mm512_mask_blend_ps(mask, no.0, yes.0) })
    }

    #[inline(always)]
    fn round_f16(self) -> Self {
        // SAFETY: only functions that enable AVX-512 name this type.
        Self(unsafe { _mm512_cvtph_ps(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0)) })
    }

    #[inline(always)]
    fn store_f16(self, dst: &mut [u8]) {
        let dst = &mut dst[..32];
        // SAFETY: the slice holds 32 bytes; only functions that enable AVX-512 name this type.
        unsafe { _mm256_storeu_si256(dst.as_mut_ptr().cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0)) }
    }

    #[inline(always)]
    fn load_f16(src: &[u8]) -> Self {
        let src = &src[..32];
        // SAFETY: the slice holds 32 bytes; only functions that enable AVX-512 name this type.
        Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(src.as_ptr().cast())) })
    }

    #[inline(always)]
    fn store_words(low: Self, high: Self, dst: &mut [u32; MAX_LANES]) {
        // SAFETY: the array holds sixteen words; only functions that enable AVX-512 name this type.
        unsafe {
            let high = _mm512_slli_epi32::<16>(_mm512_cvttps_epi32(high.0));
            let words = _mm512_or_si512(_mm512_cvttps_epi32(low.0), high);
            _mm512_storeu_si512(dst.as_mut_ptr().cast(), words);
        }
    }

    #[inline(always)]
    fn store_bytes(self, dst: &mut [u8]) {
        let dst = &mut dst[..16];
        // SAFETY: the slice holds sixteen bytes; only functions that enable AVX-512 name this type.
        unsafe { _mm_storeu_si128(dst.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(self.0))) }
    }

    #[inline(always)]
    fn nearest_positive(self) -> Self {
        // Exact: from 0.25 up the difference loses no bit, and below it the result rounds up to zero anyway.
        let low = self - Self::splat(0.5);
        // SAFETY: only functions that enable AVX-512 name this type.
        Self(unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC }>(low.0) })
    }

    #[inline(always)]
    fn count_above(self, thresholds: &[f32; 16]) -> Self {
        // The thresholds ascend, so a binary search finds the count; a permutation fetches each lane's own threshold.
        let table = Self::load(thresholds);
        // SAFETY: only functions that enable AVX-512 name this type.
        unsafe {
            let mut count = _mm512_setzero_si512();
            for step in [8, 4, 2, 1] {
                let step = _mm512_set1_epi32(step);
                let probe = _mm512_add_epi32(count, _mm512_sub_epi32(step, _mm512_set1_epi32(1)));
                let threshold = Self(_mm512_permutexvar_ps(probe, table.0));
                count = _mm512_mask_add_epi32(count, threshold.lt(self), count, step);
            }
            Self(_mm512_cvtepi32_ps(count))
        }
    }
}
