//! 64 columns in a register of AVX-512: with VBMI one permutation finds all levels, without it shuffles of sixteen.
//!
//! Every value of these types lives in a function that enables F, BW, VL and DQ, and VBMI where the type is [`Bytes`],
//! which is what makes the intrinsics sound.

#![expect(unsafe_code, reason = "vector intrinsics are unsafe outside functions that enable them")]

use std::arch::x86_64::*;

use super::{COLUMNS, Unpacker, each_16};
use crate::layout::LEVELS;

/// Bits of a vector chosen from two others: those of the second where the first is one, else those of the third.
const SELECT: i32 = 0xca;
/// The bits of either of the first two vectors that are ones of the third.
const EITHER_AND: i32 = 0xa8;

#[inline(always)]
fn prefetch(bytes: &[u8], ahead: usize) {
    // SAFETY: a prefetch of any address does nothing that a program can see.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().wrapping_add(ahead).cast()) }
}

/// From which bit of a word of 64 on the byte of each column is taken: `times * (column / per % wrap) + plus`, modulo 64.
const fn bits(times: u8, per: u8, wrap: u8, plus: i8) -> [u8; COLUMNS] {
    let mut bits = [0; COLUMNS];
    let mut c = 0;
    while c < 64 {
        bits[c as usize] = (times * (c / per % wrap)).wrapping_add_signed(plus) % 64;
        c += 1;
    }
    bits
}

/// Codes of 4 bits, eight in a word.
static CODES: [u8; COLUMNS] = bits(4, 1, 8, 0);
/// Scale bytes of 16 columns, moved down by a bit.
static SIXTEENS: [u8; COLUMNS] = bits(8, 16, 4, 1);
/// Scale bytes of 32 columns, moved down by a bit.
static THIRTY_TWOS: [u8; COLUMNS] = bits(8, 32, 2, 1);
/// One high bit of each column, moved up by four.
static ONES: [u8; COLUMNS] = bits(1, 1, 64, -4);
/// Two high bits of each column, 32 in a word, moved up by four.
static TWOS: [u8; COLUMNS] = bits(2, 1, 32, -4);

/// With VBMI: eight bytes at any bits of a word of 64, and a permutation by the low six bits of every byte.
#[derive(Clone, Copy)]
pub(super) struct Bytes {
    table: __m512i,
    /// Codes of 4 bits in the low half of a word of 64.
    codes: __m512i,
    /// Bytes of scales that are moved down by a bit, each for the columns of its group.
    scales: __m512i,
    /// One high bit of each column in bit 4 of a byte.
    ones: __m512i,
    /// Two high bits of each column in the bits 4 and 5 of a byte.
    twos: __m512i,
}

impl Unpacker for Bytes {
    #[inline(always)]
    fn new(table: &[u8; LEVELS], group: usize) -> Self {
        let scales = if group == 16 { &SIXTEENS } else { &THIRTY_TWOS };
        // SAFETY: the arrays hold 64 bytes; only functions that enable AVX-512 name this type.
        unsafe {
            Self {
                table: _mm512_loadu_si512(table.as_ptr().cast()),
                codes: _mm512_loadu_si512(CODES.as_ptr().cast()),
                scales: _mm512_loadu_si512(scales.as_ptr().cast()),
                ones: _mm512_loadu_si512(ONES.as_ptr().cast()),
                twos: _mm512_loadu_si512(TWOS.as_ptr().cast()),
            }
        }
    }

    #[inline(always)]
    fn unpack<const HIGH: usize, const GROUP: usize>(
        self,
        low: &[u8; 32],
        high: &[u8],
        scales: u32,
        out: &mut [u8; COLUMNS],
    ) {
        let high = &high[..8 * HIGH];
        // SAFETY: the arrays hold 32 and 64 bytes, the slice as many as are read; only functions that enable AVX-512 with
        // VBMI name this type.
        unsafe {
            let low = _mm512_cvtepu32_epi64(_mm256_loadu_si256(low.as_ptr().cast()));
            let mut index = _mm512_multishift_epi64_epi8(self.codes, low);
            let scales = _mm512_multishift_epi64_epi8(self.scales, _mm512_set1_epi64(i64::from(scales)));
            let nibble = _mm512_set1_epi8(15);
            if HIGH == 0 {
                index = _mm512_ternarylogic_epi32::<SELECT>(nibble, index, scales);
            } else if HIGH == 1 {
                let bits = _mm512_set1_epi64(high.as_ptr().cast::<i64>().read_unaligned());
                let bits = _mm512_multishift_epi64_epi8(self.ones, bits);
                index = _mm512_ternarylogic_epi32::<SELECT>(nibble, index, bits);
                index = _mm512_ternarylogic_epi32::<SELECT>(_mm512_set1_epi8(31), index, scales);
            } else {
                let bits = _mm512_castsi128_si512(_mm_loadu_si128(high.as_ptr().cast()));
                let bits = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 0, 0, 1, 1, 1, 1), bits);
                let bits = _mm512_multishift_epi64_epi8(self.twos, bits);
                index = _mm512_ternarylogic_epi32::<SELECT>(nibble, index, bits);
            }
            // The permutation does not look at the upper two bits of an index.
            _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_permutexvar_epi8(index, self.table));
        }
    }

    #[inline(always)]
    fn prefetch(bytes: &[u8], ahead: usize) {
        prefetch(bytes, ahead);
    }
}

/// Without VBMI: every sixteen columns are looked up in registers that hold sixteen levels for them.
#[derive(Clone, Copy)]
pub(super) struct Tables {
    /// All levels.
    table: __m512i,
    /// Sixteen levels four times over, those of code 0 first.
    quarters: [__m512i; 4],
}

impl Unpacker for Tables {
    #[inline(always)]
    fn new(table: &[u8; LEVELS], _group: usize) -> Self {
        // SAFETY: the array holds 64 bytes; only functions that enable AVX-512 name this type.
        unsafe {
            let table = _mm512_loadu_si512(table.as_ptr().cast());
            Self {
                table,
                quarters: [
                    _mm512_shuffle_i64x2::<0x00>(table, table),
                    _mm512_shuffle_i64x2::<0x55>(table, table),
                    _mm512_shuffle_i64x2::<0xaa>(table, table),
                    _mm512_shuffle_i64x2::<0xff>(table, table),
                ],
            }
        }
    }

    #[inline(always)]
    fn unpack<const HIGH: usize, const GROUP: usize>(
        self,
        low: &[u8; 32],
        high: &[u8],
        scales: u32,
        out: &mut [u8; COLUMNS],
    ) {
        let high = &high[..8 * HIGH];
        // SAFETY: the arrays hold 32 and 64 bytes, the slice as many as are read; only functions that enable AVX-512 name
        // this type.
        unsafe {
            let pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(low.as_ptr().cast()));
            let nibble = _mm512_set1_epi8(15);
            let codes = _mm512_ternarylogic_epi32::<EITHER_AND>(pairs, _mm512_slli_epi16::<4>(pairs), nibble);
            let levels = if HIGH == 2 {
                let fours = _mm512_cvtepu8_epi32(_mm_loadu_si128(high.as_ptr().cast()));
                let twos = _mm512_set1_epi32(0x000f_000f);
                let twos = _mm512_ternarylogic_epi32::<EITHER_AND>(fours, _mm512_slli_epi32::<12>(fours), twos);
                let ones = _mm512_set1_epi32(0x0303_0303);
                let ones = _mm512_ternarylogic_epi32::<EITHER_AND>(twos, _mm512_slli_epi32::<6>(twos), ones);
                let odd = _mm512_test_epi8_mask(ones, _mm512_set1_epi8(1));
                let upper = _mm512_test_epi8_mask(ones, _mm512_set1_epi8(2));
                let below = _mm512_shuffle_epi8(self.quarters[0], codes);
                let below = _mm512_mask_shuffle_epi8(below, odd, self.quarters[1], codes);
                let above = _mm512_shuffle_epi8(self.quarters[2], codes);
                let above = _mm512_mask_shuffle_epi8(above, odd, self.quarters[3], codes);
                _mm512_mask_blend_epi8(upper, below, above)
            } else {
                // Words 2q and 2q + 1 of 64 bits are the quarter q of the bank; bits 5 and 6 of a scale byte name one.
                let scales = _mm512_set1_epi64(i64::from(each_16::<GROUP>(scales)));
                let places = _mm512_setr_epi64(4, 4, 12, 12, 20, 20, 28, 28);
                let (halves, first) = (_mm512_setr_epi64(0, 1, 0, 1, 0, 1, 0, 1), if HIGH == 0 { 6 } else { 4 });
                let first = _mm512_and_si512(_mm512_srlv_epi64(scales, places), _mm512_set1_epi64(first));
                let first = _mm512_or_si512(first, halves);
                let levels = _mm512_shuffle_epi8(_mm512_permutexvar_epi64(first, self.table), codes);
                if HIGH == 0 {
                    levels
                } else {
                    let second = _mm512_or_si512(first, _mm512_set1_epi64(2));
                    let upper = _cvtu64_mask64(high.as_ptr().cast::<u64>().read_unaligned());
                    let second = _mm512_permutexvar_epi64(second, self.table);
                    _mm512_mask_shuffle_epi8(levels, upper, second, codes)
                }
            };
            _mm512_storeu_si512(out.as_mut_ptr().cast(), levels);
        }
    }

    #[inline(always)]
    fn prefetch(bytes: &[u8], ahead: usize) {
        prefetch(bytes, ahead);
    }
}
