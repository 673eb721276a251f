//! Four lanes of NEON, which every 64-bit ARM has.
//!
//! Halves are converted one by one: their vector type is not stable in Rust yet.

#![expect(unsafe_code, reason = "vector intrinsics are unsafe outside functions that enable them")]

use std::arch::aarch64::*;

use half::f16;

use super::{Lanes, MAX_LANES, operators};

/// Four lanes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct F32x4(pub(crate) float32x4_t);

operators!(F32x4: Add add vaddq_f32, Sub sub vsubq_f32, Mul mul vmulq_f32, Div div vdivq_f32);

impl F32x4 {
    #[inline(always)]
    fn to_array(self) -> [f32; 4] {
        let mut lanes = [0.0; 4];
        self.store(&mut lanes);
        lanes
    }
}

impl Lanes for F32x4 {
    type Mask = uint32x4_t;
    const N: usize = 4;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        // SAFETY: NEON is part of 64-bit ARM.
        Self(unsafe { vdupq_n_f32(x) })
    }

    #[inline(always)]
    fn load(src: &[f32]) -> Self {
        let src = &src[..4];
        // SAFETY: the slice holds four numbers; NEON is part of 64-bit ARM.
        Self(unsafe { vld1q_f32(src.as_ptr()) })
    }

    #[inline(always)]
    fn store(self, dst: &mut [f32]) {
        let dst = &mut dst[..4];
        // SAFETY: the slice holds four numbers; NEON is part of 64-bit ARM.
        unsafe { vst1q_f32(dst.as_mut_ptr(), self.0) }
    }

    #[inline(always)]
    fn columns(src: &[f32], stride: usize) -> [Self; 8] {
        assert!(src.len() >= (Self::N - 1) * stride + 8, "every lane has eight numbers");
        let mut columns = [Self::splat(0.0); 8];
        for half in 0..2 {
            let mut r = [Self::splat(0.0).0; 4];
            for (l, row) in r.iter_mut().enumerate() {
                // SAFETY: eight numbers from every lane's start on are there, as asserted above.
                *row = unsafe { vld1q_f32(src.as_ptr().add(l * stride + 4 * half)) };
            }
            // SAFETY: NEON is part of 64-bit ARM.
            unsafe {
                let (a, b) = (vtrn1q_f32(r[0], r[1]), vtrn2q_f32(r[0], r[1]));
                let (c, d) = (vtrn1q_f32(r[2], r[3]), vtrn2q_f32(r[2], r[3]));
                columns[4 * half] = Self(vcombine_f32(vget_low_f32(a), vget_low_f32(c)));
                columns[4 * half + 1] = Self(vcombine_f32(vget_low_f32(b), vget_low_f32(d)));
                columns[4 * half + 2] = Self(vcombine_f32(vget_high_f32(a), vget_high_f32(c)));
                columns[4 * half + 3] = Self(vcombine_f32(vget_high_f32(b), vget_high_f32(d)));
            }
        }
        columns
    }

    /// By comparison and selection: `vminq_f32` treats NaN and zeros otherwise.
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Self::select(self.lt(other), self, other)
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self::select(other.lt(self), self, other)
    }

    #[inline(always)]
    fn lt(self, other: Self) -> uint32x4_t {
        // SAFETY: NEON is part of 64-bit ARM.
        unsafe { vcltq_f32(self.0, other.0) }
    }

    #[inline(always)]
    fn eq(self, other: Self) -> uint32x4_t {
        // SAFETY: NEON is part of 64-bit ARM.
        unsafe { vceqq_f32(self.0, other.0) }
    }

    #[inline(always)]
    fn and(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t {
        // SAFETY: NEON is part of 64-bit ARM.
        unsafe { vandq_u32(a, b) }
    }

    #[inline(always)]
    fn or(a: uint32x4_t, b: uint32x4_t) -> uint32x4_t {
        // SAFETY: NEON is part of 64-bit ARM.
        unsafe { vorrq_u32(a, b) }
    }

    #[inline(always)]
    fn any(mask: uint32x4_t) -> bool {
        // SAFETY: NEON is part of 64-bit ARM.
        unsafe { vmaxvq_u32(mask) != 0 }
    }

    #[inline(always)]
    fn select(mask: uint32x4_t, yes: Self, no: Self) -> Self {
        // SAFETY: NEON is part of 64-bit ARM.
        Self(unsafe { vbslq_f32(mask, yes.0, no.0) })
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
        // SAFETY: the array holds more than four words; NEON is part of 64-bit ARM.
        unsafe {
            let words = vorrq_u32(vcvtq_u32_f32(low.0), vshlq_n_u32::<16>(vcvtq_u32_f32(high.0)));
            vst1q_u32(dst.as_mut_ptr(), words);
        }
    }

    #[inline(always)]
    fn store_bytes(self, dst: &mut [u8]) {
        // SAFETY: NEON is part of 64-bit ARM.
        let packed = unsafe {
            let halves = vmovn_u32(vcvtq_u32_f32(self.0));
            vget_lane_u32::<0>(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(halves, halves))))
        };
        dst[..4].copy_from_slice(&packed.to_le_bytes());
    }
}
