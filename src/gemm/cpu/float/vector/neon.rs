//! Four lanes of NEON.

#![expect(unsafe_code, reason = "vector intrinsics are unsafe outside functions that enable them")]

use std::arch::aarch64::*;

use super::Vector;
use crate::codec::lanes::neon::F32x4;

impl Vector for F32x4 {
    type Words = uint32x4_t;
    type Table = uint8x16x4_t;
    const TABLES: bool = false;
    const REGISTERS: usize = 32;
    const HEIGHT: usize = 8;

    #[inline(always)]
    fn add_product(self, a: Self, b: Self) -> Self {
        // SAFETY: NEON is part of 64-bit ARM.
        Self(unsafe { vfmaq_f32(self.0, a.0, b.0) })
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: NEON is part of 64-bit ARM.
        unsafe { vaddvq_f32(self.0) }
    }

    #[inline(always)]
    fn pick(src: &[f32], indices: &[u32]) -> Self {
        let src = &src[..4];
        let lanes: [f32; 4] = [0, 1, 2, 3].map(|lane| src[indices[lane] as usize]);
        // SAFETY: the array holds four numbers; NEON is part of 64-bit ARM.
        Self(unsafe { vld1q_f32(lanes.as_ptr()) })
    }

    #[inline(always)]
    fn words(src: &[u8]) -> uint32x4_t {
        let src = &src[..16];
        // SAFETY: the slice holds sixteen bytes; NEON is part of 64-bit ARM.
        unsafe { vreinterpretq_u32_u8(vld1q_u8(src.as_ptr())) }
    }

    #[inline(always)]
    fn bits(self) -> uint32x4_t {
        // SAFETY: NEON is part of 64-bit ARM.
        unsafe { vreinterpretq_u32_f32(self.0) }
    }

    #[inline(always)]
    fn flip(words: uint32x4_t, mask: u32) -> uint32x4_t {
        // SAFETY: NEON is part of 64-bit ARM.
        unsafe { veorq_u32(words, vdupq_n_u32(mask)) }
    }

    #[inline(always)]
    fn unsigned(words: uint32x4_t, bits: u32, shift: u32) -> Self {
        // SAFETY: NEON is part of 64-bit ARM.
        Self(unsafe {
            let codes = vshlq_u32(words, vdupq_n_s32(-shift.cast_signed()));
            vcvtq_f32_u32(vandq_u32(codes, vdupq_n_u32((1 << bits) - 1)))
        })
    }

    #[inline(always)]
    fn signed(words: uint32x4_t, bits: u32, shift: u32) -> Self {
        // SAFETY: NEON is part of 64-bit ARM.
        Self(unsafe {
            let above = vshlq_u32(words, vdupq_n_s32((32 - bits - shift).cast_signed()));
            vcvtq_f32_s32(vshlq_s32(vreinterpretq_s32_u32(above), vdupq_n_s32(bits.cast_signed() - 32)))
        })
    }

    #[inline(always)]
    fn table(levels: &[f32; 16]) -> uint8x16x4_t {
        let bytes = levels.as_ptr().cast::<u8>();
        // SAFETY: the array holds 64 bytes; NEON is part of 64-bit ARM.
        unsafe { vld1q_u8_x4(bytes) }
    }

    #[inline(always)]
    fn lookup(words: uint32x4_t, table: uint8x16x4_t, shift: u32) -> Self {
        // SAFETY: NEON is part of 64-bit ARM.
        Self(unsafe {
            let codes = vshlq_u32(words, vdupq_n_s32(-shift.cast_signed()));
            let codes = vandq_u32(codes, vdupq_n_u32(15));
            // The four bytes of number `q` of the table are bytes 4q..4q+4.
            let bytes = vmlaq_n_u32(vdupq_n_u32(0x0302_0100), codes, 0x0404_0404);
            vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(bytes)))
        })
    }
}
