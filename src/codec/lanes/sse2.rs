//! Four lanes of SSE2, which every x86-64 has.
//!
//! Halves are converted one by one: the instruction for them came with F16C.

#![expect(unsafe_code, reason = "vector intrinsics are unsafe outside functions that enable them")]

use std::arch::x86_64::*;

use half::f16;

use super::{Lanes, MAX_LANES, operators};

/// Four lanes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct F32x4(__m128);

operators!(F32x4: Add add _mm_add_ps, Sub sub _mm_sub_ps, Mul mul _mm_mul_ps, Div div _mm_div_ps);

/// Asks for the cache line of number `at`, which may lie past the end.
#[inline(always)]
pub(crate) fn prefetch(src: &[f32], at: usize) {
    let address = src.as_ptr().wrapping_add(at);
    // SAFETY: SSE is part of x86-64, and a prefetch of any address does nothing that a program can see.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
}

impl F32x4 {
    #[inline(always)]
    fn to_array(self) -> [f32; 4] {
        let mut lanes = [0.0; 4];
        self.store(&mut lanes);
        lanes
    }
}

impl Lanes for F32x4 {
    type Mask = __m128;
    const N: usize = 4;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: SSE2 is part of x86-64.
        Self(unsafe { _mm_set1_ps(x) })
    }

    #[inline(always)]
    fn load(src: &[f32]) -> Self {
        let src = &src[..4];
        // SAFETY: the slice holds four numbers; SSE2 is part of x86-64.
        Self(unsafe { _mm_loadu_ps(src.as_ptr()) })
    }

    #[inline(always)]
    fn store(self, dst: &mut [f32]) {
        let dst = &mut dst[..4];
        // SAFETY: the slice holds four numbers; SSE2 is part of x86-64.
        unsafe { _mm_storeu_ps(dst.as_mut_ptr(), self.0) }
    }

    #[inline(always)]
    fn columns(src: &[f32], stride: usize) -> [Self; 8] {
        assert!(src.len() >= (Self::N - 1) * stride + 8, "every lane has eight numbers");
        let mut columns = [Self::splat(0.0); 8];
        for half in 0..2 {
            let mut r = [Self::splat(0.0).0; 4];
            for l in 0..4 {
                // SAFETY: eight numbers from every lane's start on are there, as asserted above.
                r[l] = unsafe { _mm_loadu_ps(src.as_ptr().add(l * stride + 4 * half)) };
            }
            // SAFETY: SSE2 is part of x86-64.
            unsafe {
                let (a, b) = (_mm_unpacklo_ps(r[0], r[1]), _mm_unpackhi_ps(r[0], r[1]));
                let (c, d) = (_mm_unpacklo_ps(r[2], r[3]), _mm_unpackhi_ps(r[2], r[3]));
                columns[4 * half] = Self(_mm_movelh_ps(a, c));
                columns[4 * half + 1] = Self(_mm_movehl_ps(c, a));
                columns[4 * half + 2] = Self(_mm_movelh_ps(b, d));
                columns[4 * half + 3] = Self(_mm_movehl_ps(d, b));
            }
        }
        columns
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        // SAFETY: SSE2 is part of x86-64.
        Self(unsafe { _mm_min_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // SAFETY: SSE2 is part of x86-64.
        Self(unsafe { _mm_max_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn lt(self, other: Self) -> __m128 {
        // SAFETY: SSE2 is part of x86-64.
        unsafe { _mm_cmplt_ps(self.0, other.0) }
    }

    #[inline(always)]
    fn eq(self, other: Self) -> __m128 {
        // SAFETY: SSE2 is part of x86-64.
        unsafe { _mm_cmpeq_ps(self.0, other.0) }
    }

    #[inline(always)]
    fn and(a: __m128, b: __m128) -> __m128 {
        // SAFETY: SSE2 is part of x86-64.
        unsafe { _mm_and_ps(a, b) }
    }

    #[inline(always)]
    fn or(a: __m128, b: __m128) -> __m128 {
        // SAFETY: SSE2 is part of x86-64.
        unsafe { _mm_or_ps(a, b) }
    }

    #[inline(always)]
    fn any(mask: __m128) -> bool {
        // SAFETY: SSE2 is part of x86-64.
        unsafe { _mm_movemask_ps(mask) != 0 }
    }

    #[inline(always)]
    fn select(mask: __m128, yes: Self, no: Self) -> Self {
        // SAFETY: SSE2 is part of x86-64.
        Self(unsafe { _mm_or_ps(_mm_and_ps(mask, yes.0), _mm_andnot_ps(mask, no.0)) })
    }

    #[inline(always)]
    fn round_f16(self) -> Self {
        Self::load(&self.to_array().map(|x| f16::from_f32(x).to_f32()))
    }

    #[inline(always)]
    fn store_f16(self, dst: &mut [u8]) {
        for (half, x) in dst.as_chunks_mut::<2>().0[..4].iter_mut().zip(self.to_array()) {
            *half = f16::from_f32(x).to_le_bytes();
        }
    }

    #[inline(always)]
    fn load_f16(src: &[u8]) -> Self {
        let mut lanes = [0.0; 4];
        for (x, &half) in lanes.iter_mut().zip(&src.as_chunks::<2>().0[..4]) {
            *x = f16::from_le_bytes(half).to_f32();
        }
        Self::load(&lanes)
    }

    #[inline(always)]
    fn store_words(low: Self, high: Self, dst: &mut [u32; MAX_LANES]) {
        // SAFETY: the array holds more than four words; SSE2 is part of x86-64.
        unsafe {
            let words = _mm_or_si128(_mm_cvttps_epi32(low.0), _mm_slli_epi32::<16>(_mm_cvttps_epi32(high.0)));
            _mm_storeu_si128(dst.as_mut_ptr().cast(), words);
        }
    }

    #[inline(always)]
    fn store_bytes(self, dst: &mut [u8]) {
        // SAFETY: SSE2 is part of x86-64.
        let packed = unsafe {
            let words = _mm_packs_epi32(_mm_cvttps_epi32(self.0), _mm_setzero_si128());
            _mm_cvtsi128_si32(_mm_packus_epi16(words, words))
        };
        dst[..4].copy_from_slice(&packed.to_le_bytes());
    }
}
