//! 32 columns in a register of AVX2, whose shuffle finds sixteen levels in each half: those of the table that the scale
//! byte of its columns names.
//!
//! Every value of this type lives in a function that enables AVX2, which is what makes the intrinsics sound.

#![expect(unsafe_code, reason = "vector intrinsics are unsafe outside functions that enable them")]

use std::arch::x86_64::*;

use super::{COLUMNS, Unpacker, each_16};
use crate::layout::LEVELS;

/// Levels in memory, to be loaded sixteen at a time.
#[derive(Clone, Copy)]
pub(super) struct Tables([u8; LEVELS]);

impl Tables {
    /// The sixteen levels from each place on.
    #[inline(always)]
    fn both(&self, first: usize, second: usize) -> __m256i {
        let (first, second) = (&self.0[first..][..16], &self.0[second..][..16]);
        // SAFETY: both slices hold sixteen bytes; only functions that enable AVX2 name this type.
        unsafe { _mm256_loadu2_m128i(second.as_ptr().cast(), first.as_ptr().cast()) }
    }

    #[inline(always)]
    fn half<const HIGH: usize>(&self, low: &[u8], high: &[u8], scales: u32, out: &mut [u8]) {
        let (low, high, out) = (&low[..16], &high[..4 * HIGH], &mut out[..32]);
        let place = |byte: u32| (byte >> 1 & (0x30 << HIGH & 0x30)) as usize;
        let (first, second) = (place(scales), place(scales >> 8));
        // SAFETY: the slices hold 16 and 32 bytes, and as many as are read; only functions that enable AVX2 name this type.
        unsafe {
            let pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128(low.as_ptr().cast()));
            let codes = _mm256_or_si256(pairs, _mm256_slli_epi16::<4>(pairs));
            let codes = _mm256_and_si256(codes, _mm256_set1_epi8(15));
            let mut levels = _mm256_shuffle_epi8(self.both(first, second), codes);
            if HIGH == 1 {
                let bits = _mm256_set1_epi32(high.as_ptr().cast::<i32>().read_unaligned());
                let bytes = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
                let bits = _mm256_shuffle_epi8(bits, bytes);
                let each = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64.cast_signed());
                let upper = _mm256_cmpeq_epi8(_mm256_and_si256(bits, each), each);
                let above = _mm256_shuffle_epi8(self.both(first + 16, second + 16), codes);
                levels = _mm256_blendv_epi8(levels, above, upper);
            } else if HIGH == 2 {
                let fours = _mm256_cvtepu8_epi32(_mm_loadl_epi64(high.as_ptr().cast()));
                let twos = _mm256_or_si256(fours, _mm256_slli_epi32::<12>(fours));
                let twos = _mm256_and_si256(twos, _mm256_set1_epi32(0x000f_000f));
                // A blend looks at the highest bit of a byte.
                let upper = _mm256_or_si256(_mm256_slli_epi32::<6>(twos), _mm256_slli_epi32::<12>(twos));
                let odd = _mm256_slli_epi32::<1>(upper);
                let second = _mm256_shuffle_epi8(self.both(16, 16), codes);
                let third = _mm256_shuffle_epi8(self.both(32, 32), codes);
                let fourth = _mm256_shuffle_epi8(self.both(48, 48), codes);
                let below = _mm256_blendv_epi8(levels, second, odd);
                levels = _mm256_blendv_epi8(below, _mm256_blendv_epi8(third, fourth, odd), upper);
            }
            _mm256_storeu_si256(out.as_mut_ptr().cast(), levels);
        }
    }
}

impl Unpacker for Tables {
    #[inline(always)]
    fn new(table: &[u8; LEVELS], _group: usize) -> Self {
        Self(*table)
    }

    #[inline(always)]
    fn unpack<const HIGH: usize, const GROUP: usize>(
        self,
        low: &[u8; 32],
        high: &[u8],
        scales: u32,
        out: &mut [u8; COLUMNS],
    ) {
        let scales = each_16::<GROUP>(scales);
        self.half::<HIGH>(low, high, scales, out);
        self.half::<HIGH>(&low[16..], &high[4 * HIGH..], scales >> 16, &mut out[32..]);
    }

    #[inline(always)]
    fn prefetch(bytes: &[u8], ahead: usize) {
        // SAFETY: a prefetch of any address does nothing that a program can see.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().wrapping_add(ahead).cast()) }
    }
}
