//! Eight words of AVX2, with or without its VNNI instruction.
//!
//! Without it, bytes are multiplied into sums of two of 16 bits, which 4-bit codes cannot overflow (`2 · 15 · 127`), nor
//! magnitudes of 8-bit levels (`2 · 128 · 127`), whose signs the activations take over. Every value of these types lives in a function that enables AVX2 and FMA, and
//! AVX-VNNI where the type says so, which is what makes the intrinsics sound.

#![expect(unsafe_code, reason = "vector intrinsics are unsafe outside functions that enable them")]

use std::arch::x86_64::*;

use super::Lanes;

/// Eight words.
pub(in super::super) struct Avx<const VNNI: bool>;

impl<const VNNI: bool> Lanes for Avx<VNNI> {
    const N: usize = 8;
    const BIAS: u8 = if VNNI { 128 } else { 0 };
    type Bytes = __m256i;
    type Ints = __m256i;
    type Floats = __m256;
    type Index = __m256i;

    #[inline(always)]
    fn prefetch(bytes: &[u8], ahead: usize) {
        // SAFETY: a prefetch of any address does nothing that a program can see.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().wrapping_add(ahead).cast()) }
    }

    #[inline(always)]
    fn nibbles(codes: &[u8]) -> [__m256i; 2] {
        let codes = &codes[..32];
        // SAFETY: the slice holds 32 bytes; only functions that enable AVX2 name this type.
        unsafe {
            let low = _mm256_set1_epi8(15);
            let codes = _mm256_loadu_si256(codes.as_ptr().cast());
            [_mm256_and_si256(codes, low), _mm256_and_si256(_mm256_srli_epi32::<4>(codes), low)]
        }
    }

    #[inline(always)]
    fn octets(codes: &[u8]) -> [__m256i; 2] {
        let codes = &codes[..64];
        // SAFETY: the slice holds 64 bytes; only functions that enable AVX2 name this type.
        unsafe {
            let low = _mm256_loadu_ps(codes.as_ptr().cast());
            let high = _mm256_loadu_ps(codes.as_ptr().add(32).cast());
            // Halves are shuffled each by itself; quarters are put in order afterwards.
            let even = _mm256_castps_si256(_mm256_shuffle_ps::<0x88>(low, high));
            let odd = _mm256_castps_si256(_mm256_shuffle_ps::<0xdd>(low, high));
            let codes = [_mm256_permute4x64_epi64::<0xd8>(even), _mm256_permute4x64_epi64::<0xd8>(odd)];
            if VNNI {
                return codes;
            }
            let flip = _mm256_set1_epi8(i8::MIN);
            [_mm256_xor_si256(codes[0], flip), _mm256_xor_si256(codes[1], flip)]
        }
    }

    #[inline(always)]
    fn load_bytes(words: &[u32]) -> __m256i {
        let words = &words[..8];
        // SAFETY: the slice holds eight words; only functions that enable AVX2 name this type.
        unsafe { _mm256_loadu_si256(words.as_ptr().cast()) }
    }

    #[inline(always)]
    fn load_ints(words: &[u32]) -> __m256i {
        Self::load_bytes(words)
    }

    #[inline(always)]
    fn load_floats(words: &[u32]) -> __m256 {
        // SAFETY: only functions that enable AVX2 name this type.
        unsafe { _mm256_castsi256_ps(Self::load_bytes(words)) }
    }

    #[inline(always)]
    fn load(floats: &[f32]) -> __m256 {
        let floats = &floats[..8];
        // SAFETY: the slice holds eight numbers; only functions that enable AVX2 name this type.
        unsafe { _mm256_loadu_ps(floats.as_ptr()) }
    }

    #[inline(always)]
    fn splat_bytes(bytes: [u8; 4]) -> __m256i {
        Self::splat_int(i32::from_le_bytes(bytes))
    }

    #[inline(always)]
    fn splat_int(x: i32) -> __m256i {
        // SAFETY: only functions that enable AVX2 name this type.
        unsafe { _mm256_set1_epi32(x) }
    }

    #[inline(always)]
    fn splat(x: f32) -> __m256 {
        // SAFETY: only functions that enable AVX2 name this type.
        unsafe { _mm256_set1_ps(x) }
    }

    #[inline(always)]
    fn dot<const BITS: u32>(sum: __m256i, codes: __m256i, x: __m256i) -> __m256i {
        // SAFETY: only functions that enable AVX2, and AVX-VNNI if `VNNI`, name this type.
        unsafe {
            if VNNI {
                return _mm256_dpbusd_avx_epi32(sum, codes, x);
            }
            if BITS == 4 {
                let pairs = _mm256_maddubs_epi16(codes, x);
                return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
            }
            // The magnitude of a level, 128 at most, without sign, times the activation with the level's sign.
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
            _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }

    #[inline(always)]
    fn times(a: __m256i, b: __m256i) -> __m256i {
        // The upper half of `a` is zero, so of the two products of each lane only the lower one is left.
        // SAFETY: only functions that enable AVX2 name this type.
        unsafe { _mm256_madd_epi16(a, b) }
    }

    #[inline(always)]
    fn to_floats(x: __m256i) -> __m256 {
        // SAFETY: only functions that enable AVX2 name this type.
        unsafe { _mm256_cvtepi32_ps(x) }
    }

    #[inline(always)]
    fn mul(a: __m256, b: __m256) -> __m256 {
        // SAFETY: only functions that enable AVX2 name this type.
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    fn mul_add(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: only functions that enable FMA name this type.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn sum(x: __m256) -> f32 {
        // SAFETY: only functions that enable AVX2 name this type.
        unsafe {
            let fours = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let twos = _mm_add_ps(fours, _mm_movehl_ps(fours, fours));
            _mm_cvtss_f32(_mm_add_ss(twos, _mm_movehdup_ps(twos)))
        }
    }

    #[inline(always)]
    fn store(x: __m256, out: &mut [f32]) {
        let out = &mut out[..8];
        // SAFETY: the slice holds eight numbers; only functions that enable AVX2 name this type.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), x) }
    }

    #[inline(always)]
    fn index(shift: u32) -> __m256i {
        // SAFETY: only functions that enable AVX2 name this type.
        unsafe {
            let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            _mm256_srlv_epi32(lanes, _mm256_set1_epi32(shift.cast_signed()))
        }
    }

    #[inline(always)]
    fn spread(floats: &[f32], index: __m256i) -> __m256 {
        // SAFETY: only functions that enable AVX2 name this type.
        unsafe { _mm256_permutevar8x32_ps(Self::load(floats), index) }
    }

    #[inline(always)]
    fn spread_ints(ints: &[i32], index: __m256i) -> __m256i {
        let ints = &ints[..8];
        // SAFETY: the slice holds eight numbers; only functions that enable AVX2 name this type.
        unsafe { _mm256_permutevar8x32_epi32(_mm256_loadu_si256(ints.as_ptr().cast()), index) }
    }
}
