//! Eight lanes of AVX2 with F16C.
//!
//! Every value of this type lives in a function that enables both, which is what makes the intrinsics sound here.

#![expect(unsafe_code, reason = "vector intrinsics are unsafe outside functions that enable them")]

use std::arch::x86_64::*;

use super::{Eight, Lanes, MAX_LANES, operators};

/// Eight lanes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct F32x8(pub(crate) __m256);

operators!(F32x8: Add add _mm256_add_ps, Sub sub _mm256_sub_ps, Mul mul _mm256_mul_ps, Div div _mm256_div_ps);

impl Lanes for F32x8 {
    type Mask = __m256;
    const N: usize = 8;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: only functions that enable AVX2 and F16C name this type.
        Self(unsafe { _mm256_set1_ps(x) })
    }

    #[inline(always)]
    fn load(src: &[f32]) -> Self {
        let src = &src[..8];
        // SAFETY: the slice holds eight numbers; only functions that enable AVX2 and F16C name this type.
        Self(unsafe { _mm256_loadu_ps(src.as_ptr()) })
    }

    #[inline(always)]
    fn store(self, dst: &mut [f32]) {
        let dst = &mut dst[..8];
        // SAFETY: the slice holds eight numbers; only functions that enable AVX2 and F16C name this type.
        unsafe { _mm256_storeu_ps(dst.as_mut_ptr(), self.0) }
    }

    #[inline(always)]
    fn columns(src: &[f32], stride: usize) -> [Self; 8] {
        assert!(src.len() >= (Self::N - 1) * stride + 8, "every lane has eight numbers");
        let mut r = [Self::splat(0.0).0; 8];
        for (l, row) in r.iter_mut().enumerate() {
            // SAFETY: eight numbers from every lane's start on are there, as asserted above.
            *row = unsafe { _mm256_loadu_ps(src.as_ptr().add(l * stride)) };
        }
        // SAFETY: only functions that enable AVX2 and F16C name this type.
        unsafe {
            let (a0, a1) = (_mm256_unpacklo_ps(r[0], r[1]), _mm256_unpackhi_ps(r[0], r[1]));
            let (b0, b1) = (_mm256_unpacklo_ps(r[2], r[3]), _mm256_unpackhi_ps(r[2], r[3]));
            let (c0, c1) = (_mm256_unpacklo_ps(r[4], r[5]), _mm256_unpackhi_ps(r[4], r[5]));
            let (d0, d1) = (_mm256_unpacklo_ps(r[6], r[7]), _mm256_unpackhi_ps(r[6], r[7]));
            let low = [
                _mm256_shuffle_ps::<0x44>(a0, b0),
                _mm256_shuffle_ps::<0xee>(a0, b0),
                _mm256_shuffle_ps::<0x44>(a1, b1),
                _mm256_shuffle_ps::<0xee>(a1, b1),
            ];
            let high = [
                _mm256_shuffle_ps::<0x44>(c0, d0),
                _mm256_shuffle_ps::<0xee>(c0, d0),
                _mm256_shuffle_ps::<0x44>(c1, d1),
                _mm256_shuffle_ps::<0xee>(c1, d1),
            ];
            [
                Self(_mm256_permute2f128_ps::<0x20>(low[0], high[0])),
                Self(_mm256_permute2f128_ps::<0x20>(low[1], high[1])),
                Self(_mm256_permute2f128_ps::<0x20>(low[2], high[2])),
                Self(_mm256_permute2f128_ps::<0x20>(low[3], high[3])),
                Self(_mm256_permute2f128_ps::<0x31>(low[0], high[0])),
                Self(_mm256_permute2f128_ps::<0x31>(low[1], high[1])),
                Self(_mm256_permute2f128_ps::<0x31>(low[2], high[2])),
                Self(_mm256_permute2f128_ps::<0x31>(low[3], high[3])),
            ]
        }
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        // SAFETY: only functions that enable AVX2 and F16C name this type.
        Self(unsafe { _mm256_min_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // SAFETY: only functions that enable AVX2 and F16C name this type.
        Self(unsafe { _mm256_max_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn lt(self, other: Self) -> __m256 {
        // SAFETY: only functions that enable AVX2 and F16C name this type.
        unsafe { _mm256_cmp_ps::<_CMP_LT_OQ>(self.0, other.0) }
    }

    #[inline(always)]
    fn eq(self, other: Self) -> __m256 {
        // SAFETY: only functions that enable AVX2 and F16C name this type.
        unsafe { _mm256_cmp_ps::<_CMP_EQ_OQ>(self.0, other.0) }
    }

    #[inline(always)]
    fn and(a: __m256, b: __m256) -> __m256 {
        // SAFETY: only functions that enable AVX2 and F16C name this type.
        unsafe { _mm256_and_ps(a, b) }
    }

    #[inline(always)]
    fn or(a: __m256, b: __m256) -> __m256 {
        // SAFETY: only functions that enable AVX2 and F16C name this type.
        unsafe { _mm256_or_ps(a, b) }
    }

    #[inline(always)]
    fn any(mask: __m256) -> bool {
        // SAFETY: only functions that enable AVX2 and F16C name this type.
        unsafe { _mm256_movemask_ps(mask) != 0 }
    }

    #[inline(always)]
    fn select(mask: __m256, yes: Self, no: Self) -> Self {
        // SAFETY: only functions that enable AVX2 and F16C name this type.
        Self(unsafe { _mm256_blendv_ps(no.0, yes.0, mask) })
    }

    #[inline(always)]
    fn round_f16(self) -> Self {
        // SAFETY: only functions that enable AVX2 and F16C name this type.
        Self(unsafe { _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0)) })
    }

    #[inline(always)]
    fn store_f16(self, dst: &mut [u8]) {
        let dst = &mut dst[..16];
        // SAFETY: the slice holds sixteen bytes; only functions that enable AVX2 and F16C name this type.
        unsafe { _mm_storeu_si128(dst.as_mut_ptr().cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0)) }
    }

    #[inline(always)]
    fn load_f16(src: &[u8]) -> Self {
        let src = &src[..16];
        // SAFETY: the slice holds sixteen bytes; only functions that enable AVX2 and F16C name this type.
        Self(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(src.as_ptr().cast())) })
    }

    #[inline(always)]
    fn store_words(low: Self, high: Self, dst: &mut [u32; MAX_LANES]) {
        // SAFETY: the array holds more than eight words; only functions that enable AVX2 and F16C name this type.
        unsafe {
            let high = _mm256_slli_epi32::<16>(_mm256_cvttps_epi32(high.0));
            let words = _mm256_or_si256(_mm256_cvttps_epi32(low.0), high);
            _mm256_storeu_si256(dst.as_mut_ptr().cast(), words);
        }
    }

    #[inline(always)]
    fn store_bytes(self, dst: &mut [u8]) {
        let dst = &mut dst[..8];
        // SAFETY: the slice holds eight bytes; only functions that enable AVX2 and F16C name this type.
        unsafe {
            let codes = _mm256_cvttps_epi32(self.0);
            let words = _mm_packus_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256::<1>(codes));
            _mm_storel_epi64(dst.as_mut_ptr().cast(), _mm_packus_epi16(words, words));
        }
    }

    #[inline(always)]
    fn nearest_positive(self) -> Self {
        // Exact: from 0.25 up the difference loses no bit, and below it the result rounds up to zero anyway.
        let low = self - Self::splat(0.5);
        // SAFETY: only functions that enable AVX2 and F16C name this type.
        Self(unsafe { _mm256_ceil_ps(low.0) })
    }
}

impl Eight for F32x8 {
    #[inline(always)]
    fn nibbles(word: u32) -> Self {
        // SAFETY: only functions that enable AVX2 and F16C name this type.
        Self(unsafe { _mm256_cvtepi32_ps(_mm256_and_si256(shifted(word), _mm256_set1_epi32(15))) })
    }

    #[inline(always)]
    fn bytes(codes: [u8; 8]) -> Self {
        // SAFETY: the array holds eight bytes; only functions that enable AVX2 and F16C name this type.
        Self(unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(codes.as_ptr().cast()))) })
    }

    #[inline(always)]
    fn lookup(word: u32, table: &[f32; 16]) -> Self {
        let (low, high) = (Self::load(&table[..8]), Self::load(&table[8..]));
        // SAFETY: only functions that enable AVX2 and F16C name this type.
        unsafe {
            let codes = shifted(word);
            // Bit 3 of a code chooses the half of the table, and a blend looks at the sign.
            let upper = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes));
            let low = _mm256_permutevar8x32_ps(low.0, codes);
            let high = _mm256_permutevar8x32_ps(high.0, codes);
            Self(_mm256_blendv_ps(low, high, upper))
        }
    }
}

/// The word in every lane, each shifted so that its own code comes first.
///
/// # Safety
/// The caller enables AVX2.
#[inline(always)]
unsafe fn shifted(word: u32) -> __m256i {
    // SAFETY: the caller enables AVX2.
    unsafe {
        let shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
        _mm256_srlv_epi32(_mm256_set1_epi32(word.cast_signed()), shifts)
    }
}
