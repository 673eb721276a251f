//! Sixteen columns in a register of NEON, whose table lookup finds all levels.
//!
//! NEON is part of every 64-bit ARM, so the intrinsics are sound wherever this compiles.

#![expect(unsafe_code, reason = "vector intrinsics that read and write memory are unsafe")]

use std::arch::aarch64::*;

use super::{COLUMNS, Unpacker, each_16};
use crate::layout::LEVELS;

/// All levels.
#[derive(Clone, Copy)]
pub(super) struct Tables(uint8x16x4_t);

impl Unpacker for Tables {
    #[inline(always)]
    fn new(table: &[u8; LEVELS], _group: usize) -> Self {
        // SAFETY: the array holds 64 bytes; NEON is always there.
        Self(unsafe { vld1q_u8_x4(table.as_ptr()) })
    }

    #[inline(always)]
    fn unpack<const HIGH: usize, const GROUP: usize>(
        self,
        low: &[u8; 32],
        high: &[u8],
        scales: u32,
        out: &mut [u8; COLUMNS],
    ) {
        let scales = each_16::<GROUP>(scales).to_le_bytes();
        let quarters = out.as_chunks_mut::<16>().0.iter_mut().zip(low.as_chunks::<8>().0);
        for (q, ((out, low), scale)) in quarters.zip(scales).enumerate() {
            let high = &high[2 * HIGH * q..][..2 * HIGH];
            // SAFETY: the arrays hold eight and sixteen bytes; NEON is always there.
            unsafe {
                let pairs = vld1_u8(low.as_ptr());
                let (even, odd) = (vand_u8(pairs, vdup_n_u8(15)), vshr_n_u8::<4>(pairs));
                let mut index = vcombine_u8(vzip1_u8(even, odd), vzip2_u8(even, odd));
                if HIGH == 1 {
                    let bits = vcombine_u8(vdup_n_u8(high[0]), vdup_n_u8(high[1]));
                    let each = vcombine_u8(vcreate_u8(0x8040_2010_0804_0201), vcreate_u8(0x8040_2010_0804_0201));
                    index = vorrq_u8(index, vandq_u8(vtstq_u8(bits, each), vdupq_n_u8(16)));
                } else if HIGH == 2 {
                    let bytes = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
                    let places = vcombine_u8(vcreate_u8(0x0101_0101_0000_0000), vcreate_u8(0x0303_0303_0202_0202));
                    let fours = vqtbl1q_u8(vreinterpretq_u8_u32(vdupq_n_u32(bytes)), places);
                    // By 4, 2, 0 and -2 bits, over and over.
                    let shifts = vreinterpretq_s8_u32(vdupq_n_u32(0xfe00_0204));
                    index = vorrq_u8(index, vandq_u8(vshlq_u8(fours, shifts), vdupq_n_u8(0x30)));
                }
                let table = scale >> 1 & (0x30 << HIGH & 0x30);
                index = vorrq_u8(index, vdupq_n_u8(table));
                vst1q_u8(out.as_mut_ptr(), vqtbl4q_u8(self.0, index));
            }
        }
    }
}
