//! Sixteen words of AVX-512 with VNNI: one instruction multiplies 64 bytes and adds them up in fours.
//!
//! Every value of these types lives in a function that enables F, BW and VNNI, which is what makes the intrinsics sound.

#![expect(unsafe_code, reason = "vector intrinsics are unsafe outside functions that enable them")]

use std::arch::x86_64::*;

use super::Lanes;
use crate::gemm::cpu::int8::few::Codes;
use crate::gemm::cpu::nested;
use crate::layout::Bank;

/// Sixteen words.
pub(in super::super) struct Vnni512;

impl Lanes for Vnni512 {
    const N: usize = 16;
    type Bytes = __m512i;
    type Ints = __m512i;
    type Floats = __m512;
    type Index = __m512i;

    #[inline(always)]
    fn prefetch(bytes: &[u8], ahead: usize) {
        // SAFETY: a prefetch of any address does nothing that a program can see.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().wrapping_add(ahead).cast()) }
    }

    #[inline(always)]
    fn nibbles(codes: &[u8]) -> [__m512i; 2] {
        let codes = &codes[..64];
        // SAFETY: the slice holds 64 bytes; only functions that enable AVX-512 name this type.
        unsafe {
            let low = _mm512_set1_epi8(15);
            let codes = _mm512_loadu_si512(codes.as_ptr().cast());
            [_mm512_and_si512(codes, low), _mm512_and_si512(_mm512_srli_epi32::<4>(codes), low)]
        }
    }

    #[inline(always)]
    fn octets(codes: &[u8]) -> [__m512i; 2] {
        let codes = &codes[..128];
        // SAFETY: the slice holds 128 bytes; only functions that enable AVX-512 name this type.
        unsafe {
            let low = _mm512_loadu_si512(codes.as_ptr().cast());
            let high = _mm512_loadu_si512(codes.as_ptr().add(64).cast());
            let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
            [_mm512_permutex2var_epi32(low, even, high), _mm512_permutex2var_epi32(low, odd, high)]
        }
    }

    #[inline(always)]
    fn load_bytes(words: &[u32]) -> __m512i {
        let words = &words[..16];
        // SAFETY: the slice holds sixteen words; only functions that enable AVX-512 name this type.
        unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }
    }

    #[inline(always)]
    fn load_ints(words: &[u32]) -> __m512i {
        Self::load_bytes(words)
    }

    #[inline(always)]
    fn load_floats(words: &[u32]) -> __m512 {
        // SAFETY: only functions that enable AVX-512 name this type.
        unsafe { _mm512_castsi512_ps(Self::load_bytes(words)) }
    }

    #[inline(always)]
    fn load(floats: &[f32]) -> __m512 {
        let floats = &floats[..16];
        // SAFETY: the slice holds sixteen numbers; only functions that enable AVX-512 name this type.
        unsafe { _mm512_loadu_ps(floats.as_ptr()) }
    }

    #[inline(always)]
    fn splat_bytes(bytes: [u8; 4]) -> __m512i {
        Self::splat_int(i32::from_le_bytes(bytes))
    }

    #[inline(always)]
    fn splat_int(x: i32) -> __m512i {
        // SAFETY: only functions that enable AVX-512 name this type.
        unsafe { _mm512_set1_epi32(x) }
    }

    #[inline(always)]
    fn splat(x: f32) -> __m512 {
        // SAFETY: only functions that enable AVX-512 name this type.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn dot<const BITS: u32>(sum: __m512i, codes: __m512i, x: __m512i) -> __m512i {
        // SAFETY: only functions that enable AVX-512 with VNNI name this type.
        unsafe { _mm512_dpbusd_epi32(sum, codes, x) }
    }

    #[inline(always)]
    fn times(a: __m512i, b: __m512i) -> __m512i {
        // The upper half of `a` is zero, so of the two products of each lane only the lower one is left.
        // SAFETY: only functions that enable AVX-512 name this type.
        unsafe { _mm512_madd_epi16(a, b) }
    }

    #[inline(always)]
    fn to_floats(x: __m512i) -> __m512 {
        // SAFETY: only functions that enable AVX-512 name this type.
        unsafe { _mm512_cvtepi32_ps(x) }
    }

    #[inline(always)]
    fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: only functions that enable AVX-512 name this type.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: only functions that enable AVX-512 name this type.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn sum(x: __m512) -> f32 {
        // SAFETY: only functions that enable AVX-512 name this type.
        unsafe { _mm512_reduce_add_ps(x) }
    }

    #[inline(always)]
    fn store(x: __m512, out: &mut [f32]) {
        let out = &mut out[..16];
        // SAFETY: the slice holds sixteen numbers; only functions that enable AVX-512 name this type.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), x) }
    }

    #[inline(always)]
    fn index(shift: u32) -> __m512i {
        // SAFETY: only functions that enable AVX-512 name this type.
        unsafe {
            let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            _mm512_srlv_epi32(lanes, _mm512_set1_epi32(shift.cast_signed()))
        }
    }

    #[inline(always)]
    fn spread(floats: &[f32], index: __m512i) -> __m512 {
        let floats = &floats[..16];
        // SAFETY: the slice holds sixteen numbers; only functions that enable AVX-512 name this type.
        unsafe { _mm512_permutexvar_ps(index, _mm512_loadu_ps(floats.as_ptr())) }
    }

    #[inline(always)]
    fn spread_ints(ints: &[i32], index: __m512i) -> __m512i {
        let ints = &ints[..16];
        // SAFETY: the slice holds sixteen numbers; only functions that enable AVX-512 name this type.
        unsafe { _mm512_permutexvar_epi32(index, _mm512_loadu_si512(ints.as_ptr().cast())) }
    }
}

/// 4-bit codes of a bank, whose levels a permutation of VBMI finds. Every value lives in a function that enables it too.
#[derive(Clone, Copy)]
pub(in super::super) struct Found {
    /// The levels plus [`nested::BIAS`].
    table: __m512i,
    /// Which scale byte belongs to each byte of codes.
    bytes: __m512i,
}

impl Found {
    /// For groups of which the number of a lane, eight columns wide, has `shift` bits fewer.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    pub(in super::super) fn new(bank: &Bank, shift: u32) -> Self {
        let table = bank.levels().map(|level| level.cast_unsigned() ^ nested::BIAS);
        let mut bytes = [0u8; 64];
        for (i, byte) in (0u8..).zip(&mut bytes) {
            *byte = (i / 4).checked_shr(shift).unwrap_or(0);
        }
        // SAFETY: both arrays hold 64 bytes.
        unsafe {
            Self { table: _mm512_loadu_si512(table.as_ptr().cast()), bytes: _mm512_loadu_si512(bytes.as_ptr().cast()) }
        }
    }
}

impl Codes<Vnni512> for Found {
    const BITS: u32 = 4;
    const LEVEL_BITS: u32 = 8;

    #[inline(always)]
    fn load(self, codes: &[u8], bytes: &[u8]) -> [__m512i; 2] {
        // Bits of a vector chosen from two others: those of the second where the first is one, else those of the third.
        const SELECT: i32 = 0xca;
        let (codes, bytes) = (&codes[..64], &bytes[..16]);
        // SAFETY: the slices hold 64 and 16 bytes; only functions that enable AVX-512 with VBMI name this type.
        unsafe {
            let nibble = _mm512_set1_epi8(15);
            let codes = _mm512_loadu_si512(codes.as_ptr().cast());
            let bytes = _mm512_castsi128_si512(_mm_loadu_si128(bytes.as_ptr().cast()));
            // The table is in the bits 5 and 6 of a scale byte, and the permutation does not look at bits 6 and 7.
            let tables = _mm512_srli_epi32::<1>(_mm512_permutexvar_epi8(self.bytes, bytes));
            let even = _mm512_ternarylogic_epi32::<SELECT>(nibble, codes, tables);
            let odd = _mm512_ternarylogic_epi32::<SELECT>(nibble, _mm512_srli_epi32::<4>(codes), tables);
            [_mm512_permutexvar_epi8(even, self.table), _mm512_permutexvar_epi8(odd, self.table)]
        }
    }
}
