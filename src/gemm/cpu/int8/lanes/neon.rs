//! Four words of NEON: widening products of bytes, added up in pairs.
//!
//! NEON is part of every 64-bit ARM, so the intrinsics are sound wherever this compiles.

#![expect(unsafe_code, reason = "vector intrinsics that read and write memory are unsafe")]

use std::arch::aarch64::*;

use super::Lanes;

/// Four words.
pub(in super::super) struct Neon;

impl Lanes for Neon {
    const N: usize = 4;
    const BIAS: u8 = 0;
    type Bytes = uint8x16_t;
    type Ints = int32x4_t;
    type Floats = float32x4_t;
    type Index = uint8x16_t;

    #[inline(always)]
    fn prefetch(_bytes: &[u8], _ahead: usize) {}

    #[inline(always)]
    fn nibbles(codes: &[u8]) -> [uint8x16_t; 2] {
        let codes = &codes[..16];
        // SAFETY: the slice holds 16 bytes; NEON is always there.
        unsafe {
            let codes = vld1q_u8(codes.as_ptr());
            [vandq_u8(codes, vdupq_n_u8(15)), vshrq_n_u8::<4>(codes)]
        }
    }

    #[inline(always)]
    fn octets(codes: &[u8]) -> [uint8x16_t; 2] {
        let codes = &codes[..32];
        // SAFETY: the slice holds 32 bytes; NEON is always there.
        unsafe {
            let low = vreinterpretq_u32_u8(vld1q_u8(codes.as_ptr()));
            let high = vreinterpretq_u32_u8(vld1q_u8(codes.as_ptr().add(16)));
            let (first, last) = (vuzp1q_u32(low, high), vuzp2q_u32(low, high));
            let flip = vdupq_n_u8(128);
            [veorq_u8(vreinterpretq_u8_u32(first), flip), veorq_u8(vreinterpretq_u8_u32(last), flip)]
        }
    }

    #[inline(always)]
    fn load_bytes(words: &[u32]) -> uint8x16_t {
        let words = &words[..4];
        // SAFETY: the slice holds four words; NEON is always there.
        unsafe { vreinterpretq_u8_u32(vld1q_u32(words.as_ptr())) }
    }

    #[inline(always)]
    fn load_ints(words: &[u32]) -> int32x4_t {
        // SAFETY: NEON is always there.
        unsafe { vreinterpretq_s32_u8(Self::load_bytes(words)) }
    }

    #[inline(always)]
    fn load_floats(words: &[u32]) -> float32x4_t {
        // SAFETY: NEON is always there.
        unsafe { vreinterpretq_f32_u8(Self::load_bytes(words)) }
    }

    #[inline(always)]
    fn load(floats: &[f32]) -> float32x4_t {
        let floats = &floats[..4];
        // SAFETY: the slice holds four numbers; NEON is always there.
        unsafe { vld1q_f32(floats.as_ptr()) }
    }

    #[inline(always)]
    fn splat_bytes(bytes: [u8; 4]) -> uint8x16_t {
        // SAFETY: NEON is always there.
        unsafe { vreinterpretq_u8_u32(vdupq_n_u32(u32::from_le_bytes(bytes))) }
    }

    #[inline(always)]
    fn splat_int(x: i32) -> int32x4_t {
        // SAFETY: NEON is always there.
        unsafe { vdupq_n_s32(x) }
    }

    #[inline(always)]
    fn splat(x: f32) -> float32x4_t {
        // SAFETY: NEON is always there.
        unsafe { vdupq_n_f32(x) }
    }

    #[inline(always)]
    fn dot<const BITS: u32>(sum: int32x4_t, codes: uint8x16_t, x: uint8x16_t) -> int32x4_t {
        // SAFETY: NEON is always there.
        unsafe {
            let (codes, x) = (vreinterpretq_s8_u8(codes), vreinterpretq_s8_u8(x));
            let low = vpaddlq_s16(vmull_s8(vget_low_s8(codes), vget_low_s8(x)));
            let high = vpaddlq_s16(vmull_high_s8(codes, x));
            vaddq_s32(sum, vpaddq_s32(low, high))
        }
    }

    #[inline(always)]
    fn times(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        // SAFETY: NEON is always there.
        unsafe { vmulq_s32(a, b) }
    }

    #[inline(always)]
    fn to_floats(x: int32x4_t) -> float32x4_t {
        // SAFETY: NEON is always there.
        unsafe { vcvtq_f32_s32(x) }
    }

    #[inline(always)]
    fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        // SAFETY: NEON is always there.
        unsafe { vmulq_f32(a, b) }
    }

    #[inline(always)]
    fn mul_add(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        // SAFETY: NEON is always there.
        unsafe { vfmaq_f32(c, a, b) }
    }

    #[inline(always)]
    fn sum(x: float32x4_t) -> f32 {
        // SAFETY: NEON is always there.
        unsafe { vaddvq_f32(x) }
    }

    #[inline(always)]
    fn store(x: float32x4_t, out: &mut [f32]) {
        let out = &mut out[..4];
        // SAFETY: the slice holds four numbers; NEON is always there.
        unsafe { vst1q_f32(out.as_mut_ptr(), x) }
    }

    #[inline(always)]
    fn index(shift: u32) -> uint8x16_t {
        let mut bytes = [0u8; 16];
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::try_from(4 * ((i / 4) >> shift) + i % 4).expect("less than 16");
        }
        // SAFETY: the array has 16 bytes; NEON is always there.
        unsafe { vld1q_u8(bytes.as_ptr()) }
    }

    #[inline(always)]
    fn spread(floats: &[f32], index: uint8x16_t) -> float32x4_t {
        // SAFETY: NEON is always there.
        unsafe { vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(Self::load(floats)), index)) }
    }

    #[inline(always)]
    fn spread_ints(ints: &[i32], index: uint8x16_t) -> int32x4_t {
        let ints = &ints[..4];
        // SAFETY: the slice holds four numbers; NEON is always there.
        unsafe { vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(vld1q_s32(ints.as_ptr())), index)) }
    }
}
