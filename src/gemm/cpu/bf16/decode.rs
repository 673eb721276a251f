//! Weights as pairs of bf16, in tiles of 16 rows x 32 columns.
//!
//! Every value is the nearest bf16 to the f32 that the specification decodes: the product and the sum are rounded once
//! each, where a fused multiply-add gives another number they stay apart.

#![expect(unsafe_code, reason = "vector intrinsics are unsafe outside functions that enable them")]

use std::arch::x86_64::*;

use super::{CHUNK, Params, RUN, STEP};
use crate::gemm::Weights;
use crate::gemm::cpu::amx::{SIDE, WORDS};
use crate::gemm::cpu::nested;
use crate::layout::{Levels, ROW};

/// Decodes the columns `start ..+ len` of all rows of `weights`: tile `(row / 16, step)` is 16 rows of 16 words.
/// `start` is a multiple of [`RUN`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,f16c,fma")]
pub(super) fn decode(weights: &Weights<'_>, params: &Params, start: usize, len: usize, out: &mut [u32]) {
    match (weights.layout().levels(), weights.layout().bits()) {
        (Levels::Unsigned, _) => decode_as::<4, 0>(weights, params, start, len, out),
        (Levels::Signed, 4) => decode_as::<4, 1>(weights, params, start, len, out),
        (Levels::Signed | Levels::Bank(_), _) => decode_as::<8, 1>(weights, params, start, len, out),
        (Levels::ZeroPoint, _) => decode_as::<4, 2>(weights, params, start, len, out),
        (Levels::Table(_), _) => decode_as::<4, 3>(weights, params, start, len, out),
    }
}

/// `KIND` is 0 for unsigned levels, 1 for signed ones, 2 for zero points, 3 for a table.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,f16c,fma")]
fn decode_as<const BITS: usize, const KIND: u8>(
    weights: &Weights<'_>,
    params: &Params,
    start: usize,
    len: usize,
    out: &mut [u32],
) {
    let layout = weights.layout();
    let stride = layout.code_stride(weights.cols());
    let shift = if layout.group() == ROW { 31 } else { (layout.group() / 8).trailing_zeros() };
    let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    let index = _mm512_srlv_epi32(lanes, _mm512_set1_epi32(shift.cast_signed()));
    let zero = f32::from(layout.zero_code(0));
    let table = if let Levels::Table(table) = layout.levels() { *table } else { [0.0; 16] };
    // SAFETY: the table has sixteen numbers.
    let table = unsafe { _mm512_loadu_ps(table.as_ptr()) };
    let nested = BITS == 8 && layout.bank().is_some();
    let mut unpacked = [0; RUN];
    for (r, codes) in weights.planes().codes.chunks_exact(stride).enumerate() {
        // Codes from column `start` on.
        let codes = if nested {
            nested::levels(&weights.slice(r, 1), start..start + len, nested::BIAS, &mut unpacked, RUN);
            &unpacked[..len]
        } else {
            &codes[start * BITS / 8..]
        };
        let (scales, offsets, zero_points) = (params.scales(r), params.offsets_padded(r), params.zero_points(r));
        let tiles = &mut out[r / SIDE * (RUN / STEP * WORDS)..][..RUN / STEP * WORDS];
        for c in 0..len.div_ceil(CHUNK) {
            let at = c * CHUNK * BITS / 8;
            let bytes = &codes[at..codes.len().min(at + CHUNK * BITS / 8)];
            for line in 0..BITS / 4 {
                // The next run of this row is far from where the processor looks ahead.
                prefetch(codes, at + RUN * BITS / 8 + 64 * line);
            }
            let mut padded = [0; CHUNK];
            let bytes = if bytes.len() == CHUNK * BITS / 8 {
                bytes
            } else {
                padded[..bytes.len()].copy_from_slice(bytes);
                &padded[..CHUNK * BITS / 8]
            };
            let group = ((start + c * CHUNK) / 8) >> shift;
            let scale = spread(&scales[group..], index);
            let addend = match KIND {
                0 if !offsets.is_empty() => spread(&offsets[group..], index),
                1 if BITS == 4 => _mm512_mul_ps(_mm512_set1_ps(-zero), scale),
                2 => {
                    let zero_points = &zero_points[group..][..16];
                    // SAFETY: the slice holds sixteen numbers.
                    let zero_points = unsafe { _mm512_loadu_si512(zero_points.as_ptr().cast()) };
                    _mm512_cvtepi32_ps(_mm512_permutexvar_epi32(index, zero_points))
                }
                _ => _mm512_setzero_ps(),
            };
            let words = load::<BITS>(bytes);
            for t in 0..CHUNK / STEP {
                let even = weight::<BITS, KIND>(column::<BITS>(words, 2 * t), scale, addend, table);
                let odd = weight::<BITS, KIND>(column::<BITS>(words, 2 * t + 1), scale, addend, table);
                let pairs = _mm512_cvtne2ps_pbh(odd, even);
                let row = &mut tiles[(c * (CHUNK / STEP) + t) * WORDS + r % SIDE * SIDE..][..SIDE];
                // SAFETY: the slice holds sixteen words, and both are 512 bits.
                unsafe {
                    _mm512_storeu_si512(row.as_mut_ptr().cast(), std::mem::transmute::<__m512bh, __m512i>(pairs))
                };
            }
        }
    }
}

/// Asks for the cache line that is `ahead` bytes after the start of `bytes`, which may lie beyond all memory.
#[inline(always)]
fn prefetch(bytes: &[u8], ahead: usize) {
    // SAFETY: a prefetch of any address does nothing that a program can see.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().wrapping_add(ahead).cast()) }
}

/// For every lane the number that the index names.
#[inline]
#[target_feature(enable = "avx512f")]
fn spread(floats: &[f32], index: __m512i) -> __m512 {
    let floats = &floats[..16];
    // SAFETY: the slice holds sixteen numbers.
    _mm512_permutexvar_ps(index, unsafe { _mm512_loadu_ps(floats.as_ptr()) })
}

/// The codes of a chunk: all eight of each word twice for 4 bits, the first four and the last four of each eight, as
/// signed levels, for 8.
#[inline]
#[target_feature(enable = "avx512f")]
fn load<const BITS: usize>(bytes: &[u8]) -> [__m512i; 2] {
    let bytes = &bytes[..CHUNK * BITS / 8];
    // SAFETY: the slice holds 64 bytes.
    let low = unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) };
    if BITS == 4 {
        return [low, low];
    }
    // SAFETY: the slice holds 128 bytes.
    let high = unsafe { _mm512_loadu_si512(bytes.as_ptr().add(64).cast()) };
    // Signed levels: a sum with a multiple of a scale could leave the range of f32.
    let flip = _mm512_set1_epi8(i8::MIN);
    let (low, high) = (_mm512_xor_si512(low, flip), _mm512_xor_si512(high, flip));
    let first = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    let last = _mm512_add_epi32(first, _mm512_set1_epi32(1));
    [_mm512_permutex2var_epi32(low, first, high), _mm512_permutex2var_epi32(low, last, high)]
}

/// Column `j` of each eight; for 4 bits a code with what lies above it still there, for 8 a level.
#[inline]
#[target_feature(enable = "avx512f")]
fn column<const BITS: usize>(words: [__m512i; 2], j: usize) -> __m512i {
    let (word, place) = if BITS == 4 { (words[0], j) } else { (words[j / 4], 3 - j % 4) };
    let bits = _mm512_set1_epi32(u32::try_from(place * BITS).expect("less than 32").cast_signed());
    if BITS == 4 { _mm512_srlv_epi32(word, bits) } else { _mm512_srai_epi32::<24>(_mm512_sllv_epi32(word, bits)) }
}

/// The weights of codes.
#[inline]
#[target_feature(enable = "avx512f")]
fn weight<const BITS: usize, const KIND: u8>(codes: __m512i, scale: __m512, addend: __m512, table: __m512) -> __m512 {
    if KIND == 3 {
        // A permutation looks at four bits of an index.
        return _mm512_mul_ps(_mm512_permutexvar_ps(codes, table), scale);
    }
    if BITS == 8 {
        return _mm512_mul_ps(_mm512_cvtepi32_ps(codes), scale);
    }
    let codes = _mm512_cvtepi32_ps(_mm512_and_si512(codes, _mm512_set1_epi32(15)));
    match KIND {
        0 => _mm512_add_ps(_mm512_mul_ps(codes, scale), addend),
        // A scale times a power of two is exact, so this is the one rounding of (code - zero) · scale.
        1 => _mm512_fmadd_ps(codes, scale, addend),
        _ => _mm512_mul_ps(_mm512_sub_ps(codes, addend), scale),
    }
}
