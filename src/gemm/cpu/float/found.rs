//! Few rows of activations with codes of a bank as they are stored: byte permutations of AVX-512 VBMI find the levels.
//!
//! A level has at most eight significant bits, so the upper half of it as a number is all of it (a bfloat16), and two
//! permutations find the two bytes of that for 64 codes. Interleaved, they are pairs of levels in lanes of 32 bits, of
//! which a shift leaves the one and a mask the other as a number. No byte goes through memory, which is what unpacking a
//! row into the cache costs twice its arithmetic for ([`super::few`]).
//!
//! A block is a vector of words with eight codes each. What the shifts, the interleaving and the mask do to the columns
//! is done to the activations beforehand: step `4 * upper + 2 * odd + half` of a block holds, in lane `4 * q + p`, column
//! `32 * q + 16 * upper + 4 * p + 2 * half + odd`. So the lanes of four steps belong to sixteen columns each and share a
//! scale, and a vector of scales is a permutation of those of the row.

#![expect(unsafe_code, reason = "loads of vectors take pointers")]

use std::arch::x86_64::*;

use super::few::{Spread, SpreadRow};
use super::params;
use super::vector::Vector as _;
use crate::codec::lanes::Lanes as _;
use crate::codec::lanes::avx512::F32x16;
use crate::gemm::Weights;
use crate::gemm::cpu::nested;
use crate::gemm::cpu::tile::Tile;
use crate::layout::{Float, Grouped, LEVELS, Levels};

/// Columns of a block.
const WIDTH: usize = 128;
/// Bits of a vector chosen from two others: those of the second where the first is one, else those of the third.
const SELECT: i32 = 0xca;
/// Rows of weights that are multiplied side by side.
const SIDE: usize = 2;
/// Numbers of scales that are converted together, well before they are used: loading across what was just stored would
/// wait for the store.
const CONVERTED: usize = 2048;
/// The least numbers that may follow the first scale of a block, which is loaded as a vector.
const VECTOR: usize = 16;
/// How far ahead of a block the codes of its row are asked for, where they follow each other row by row.
const AHEAD: usize = 4096;

/// Whether these kernels know a layout.
pub(super) fn knows(layout: &Grouped) -> bool {
    layout.bank().is_some() && matches!((layout.bits(), layout.group()), (4 | 5, 16 | 32) | (6, 16))
}

/// The layout by which a [`Spread`] makes room: eight columns in a word where codes stay as they are.
pub(super) fn room(layout: &Grouped) -> Grouped {
    if knows(layout) {
        Grouped::new(4, Levels::Signed, layout.group(), Float::F32, None)
    } else {
        nested::plain(layout)
    }
}

/// The column of a block whose activation is in this lane of this step.
const fn column(step: usize, lane: usize) -> usize {
    32 * (lane / 4) + 16 * (step / 4) + 4 * (lane % 4) + 2 * (step % 2) + step / 2 % 2
}

/// Brings a row of activations into order.
pub(super) fn spread(x: &[f32], row: SpreadRow<'_>) {
    for (src, block) in x.chunks(WIDTH).zip(row.x.chunks_exact_mut(WIDTH)) {
        for (step, vector) in block.chunks_exact_mut(16).enumerate() {
            for (lane, x) in vector.iter_mut().enumerate() {
                *x = src.get(column(step, lane)).copied().unwrap_or(0.0);
            }
        }
    }
}

/// Fills a tile that has all rows of activations.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx2,f16c,fma")]
pub(super) fn multiply(weights: &Weights<'_>, spread: &Spread, tile: &mut Tile<'_>) {
    let layout = weights.layout();
    match (layout.high_bits(), layout.group()) {
        (0, 16) => rows::<0, 16>(weights, spread, tile),
        (0, _) => rows::<0, 32>(weights, spread, tile),
        (1, 16) => rows::<1, 16>(weights, spread, tile),
        (1, _) => rows::<1, 32>(weights, spread, tile),
        _ => rows::<2, 16>(weights, spread, tile),
    }
}

/// What the registers hold for all of a matrix.
#[derive(Clone, Copy)]
struct Tables {
    /// The lower and the upper byte of the upper half of each level.
    halves: [__m512i; 2],
    /// The number of the group of each lane, as the byte of scales for it.
    groups: __m512i,
    /// From which bit of two words on the high bits of the even and odd codes are taken.
    high: [__m512i; 2],
    /// The groups of the lanes of the lower and upper four steps.
    picks: [__m512i; 2],
}

impl Tables {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
    fn new<const HIGH: usize, const GROUP: usize>(levels: &[i8; LEVELS]) -> Self {
        let (mut halves, mut high) = ([[0u8; 64]; 2], [[0u8; 64]; 2]);
        let (mut groups, mut picks) = ([0u8; 64], [[0u32; 16]; 2]);
        for (i, level) in levels.iter().enumerate() {
            let [_, _, lower, upper] = f32::from(*level).to_le_bytes();
            (halves[0][i], halves[1][i]) = (lower, upper);
        }
        for (i, byte) in (0u8..64).enumerate() {
            // Byte `i % 4` of lane `i / 4`, of which two share a word of 64 bits.
            groups[i] = if GROUP == 16 { byte / 8 } else { byte / 16 };
            for (odd, high) in (0u8..).zip(&mut high) {
                let bit = 32 * (byte / 4 % 2) + HIGH.to_le_bytes()[0] * (2 * (byte % 4) + odd);
                high[i] = bit.wrapping_sub(4) % 64;
            }
        }
        for (upper, picks) in (0u32..).zip(&mut picks) {
            for (lane, pick) in (0u32..).zip(picks) {
                *pick = if GROUP == 16 { 2 * (lane / 4) + upper } else { lane / 4 };
            }
        }
        let bytes = |bytes: &[u8; 64]| bytes.as_ptr().cast::<__m512i>();
        // SAFETY: all arrays hold 64 bytes.
        unsafe {
            Self {
                halves: [_mm512_loadu_si512(bytes(&halves[0])), _mm512_loadu_si512(bytes(&halves[1]))],
                groups: _mm512_loadu_si512(bytes(&groups)),
                high: [_mm512_loadu_si512(bytes(&high[0])), _mm512_loadu_si512(bytes(&high[1]))],
                picks: [_mm512_loadu_si512(picks[0].as_ptr().cast()), _mm512_loadu_si512(picks[1].as_ptr().cast())],
            }
        }
    }
}

/// A row of weights.
#[derive(Clone, Copy)]
struct Row<'a> {
    codes: &'a [u8],
    high: &'a [u8],
    bytes: &'a [u8],
    scales: &'a [f32],
}

/// The stored bytes of a block of a row, and its scales.
#[derive(Clone, Copy)]
struct Block<'a> {
    codes: &'a [u8; 64],
    /// `16 * HIGH` bytes.
    high: &'a [u8],
    /// A byte for each group.
    bytes: &'a [u8],
    /// [`VECTOR`] numbers, those of the block first.
    scales: &'a [f32],
}

const EMPTY: Block<'static> = Block { codes: &[0; 64], high: &[], bytes: &[], scales: &[] };

/// The bytes of levels of the even codes of a block, then of the odd ones.
type Found = [[__m512i; 2]; 2];

impl Tables {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi")]
    fn find<const HIGH: usize, const GROUP: usize>(&self, block: Block<'_>) -> Found {
        let nibble = _mm512_set1_epi8(15);
        // SAFETY: the array holds 64 bytes.
        let codes = unsafe { _mm512_loadu_si512(block.codes.as_ptr().cast()) };
        let mut above = [_mm512_setzero_si512(); 2];
        if HIGH < 2 {
            // The table is in the upper bits of a scale byte, and the permutation does not look at bits 6 and 7.
            let bytes = if GROUP == 16 {
                i64::from_le_bytes(*block.bytes.first_chunk::<8>().expect("eight groups"))
            } else {
                i64::from(i32::from_le_bytes(*block.bytes.first_chunk::<4>().expect("four groups")))
            };
            let bytes = _mm512_permutexvar_epi8(self.groups, _mm512_set1_epi64(bytes));
            above = [_mm512_srli_epi32::<1>(bytes); 2];
        }
        if HIGH > 0 {
            let high = &block.high[..16 * HIGH];
            // SAFETY: the slice holds 16 bytes where one bit is high, and 32 where two are.
            let words = unsafe {
                if HIGH == 1 {
                    _mm512_cvtepu8_epi32(_mm_loadu_si128(high.as_ptr().cast()))
                } else {
                    _mm512_cvtepu16_epi32(_mm256_loadu_si256(high.as_ptr().cast()))
                }
            };
            let mask = _mm512_set1_epi8(16);
            for (above, places) in above.iter_mut().zip(self.high) {
                let bits = _mm512_multishift_epi64_epi8(places, words);
                *above = if HIGH == 1 { _mm512_ternarylogic_epi32::<SELECT>(mask, bits, *above) } else { bits };
            }
        }
        let codes = [codes, _mm512_srli_epi32::<4>(codes)];
        let mut found = [[nibble; 2]; 2];
        for ((found, codes), above) in found.iter_mut().zip(codes).zip(above) {
            let index = _mm512_ternarylogic_epi32::<SELECT>(nibble, codes, above);
            for (found, half) in found.iter_mut().zip(self.halves) {
                *found = _mm512_permutexvar_epi8(index, half);
            }
        }
        found
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx2,f16c,fma")]
fn rows<const HIGH: usize, const GROUP: usize>(weights: &Weights<'_>, spread: &Spread, tile: &mut Tile<'_>) {
    let bank = weights.layout().bank().expect("only codes of banks come here");
    let stride = spread.groups + VECTOR;
    let together = (CONVERTED / stride).next_multiple_of(SIDE).clamp(SIDE, 16);
    let mut batch = Batch {
        tables: Tables::new::<HIGH, GROUP>(bank.levels()),
        weights: *weights,
        scales: vec![0.0; together * stride],
        stride,
    };
    let n = tile.n();
    for first in n.clone().step_by(together) {
        batch.weights = weights.slice(first, together.min(n.end - first));
        let rows = batch.weights.rows();
        for (r, scales) in batch.scales.chunks_exact_mut(stride).enumerate().take(rows) {
            let row = params::row(batch.weights.planes(), rows, r);
            params::scales::<F32x16>(weights.layout(), &row, 0, &mut scales[..spread.groups]);
            // What the next batch converts.
            for at in (0..row.scales.len()).step_by(64) {
                F32x16::prefetch(row.scales, rows * row.scales.len() + at);
            }
        }
        for r in (0..rows).step_by(SIDE) {
            let at = first - n.start + r;
            let mut m = tile.m();
            while !m.is_empty() {
                m.start += match m.len() {
                    1 => batch.multiply::<HIGH, GROUP, 1>(spread, m.start, r, at, tile),
                    2 | 3 => batch.multiply::<HIGH, GROUP, 2>(spread, m.start, r, at, tile),
                    _ => batch.multiply::<HIGH, GROUP, 4>(spread, m.start, r, at, tile),
                };
            }
        }
    }
}

/// A few rows of weights with their scales as numbers.
struct Batch<'a> {
    tables: Tables,
    weights: Weights<'a>,
    scales: Vec<f32>,
    stride: usize,
}

impl Batch<'_> {
    /// Writes the results of `T` rows of activations from `i` on with the rows of weights `r` and `r + 1`, those `at` and
    /// `at + 1` of the tile, if there are two; returns `T`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx2,f16c,fma")]
    fn multiply<const HIGH: usize, const GROUP: usize, const T: usize>(
        &self,
        spread: &Spread,
        i: usize,
        r: usize,
        at: usize,
        tile: &mut Tile<'_>,
    ) -> usize {
        let planes = self.weights.planes();
        let (cols, layout, rows) = (self.weights.cols(), self.weights.layout(), self.weights.rows());
        let strides = (layout.code_stride(cols), layout.high_code_stride(cols), layout.scale_stride(cols));
        let groups = WIDTH / GROUP;
        let blank = Row { codes: &[], high: &[], bytes: &[], scales: &[] };
        let mut sides = [blank; SIDE];
        for (p, side) in sides.iter_mut().enumerate() {
            // The last row stands in for a missing one.
            let r = (r + p).min(rows - 1);
            *side = Row {
                codes: &planes.codes[r * strides.0..][..strides.0],
                high: &planes.high_codes[r * strides.1..][..strides.1],
                bytes: &planes.scales[r * strides.2..][..strides.2],
                scales: &self.scales[r * self.stride..][..self.stride],
            };
        }
        let mut x = [[].as_slice(); T];
        for (t, x) in x.iter_mut().enumerate() {
            *x = &spread.x[(i + t) * spread.stride..][..spread.stride];
        }
        let mut sums = [[_mm512_setzero_ps(); T]; SIDE];
        let whole = cols / WIDTH;
        for block in 0..whole {
            let mut blocks = [EMPTY; SIDE];
            for p in 0..SIDE {
                let side = sides[p];
                blocks[p] = Block {
                    codes: side.codes[64 * block..].first_chunk().expect("a whole block"),
                    high: &side.high[16 * HIGH * block..][..16 * HIGH],
                    bytes: &side.bytes[groups * block..][..groups],
                    scales: &side.scales[groups * block..][..VECTOR],
                };
                F32x16::prefetch(side.codes, 64 * block + AHEAD);
                if HIGH > 0 {
                    F32x16::prefetch(side.high, 16 * HIGH * block + AHEAD / 4 * HIGH);
                }
            }
            self.tables.add::<HIGH, GROUP, T>(&blocks, &x, block, &mut sums);
        }
        if cols > whole * WIDTH {
            let mut padded = [([0; 64], [0; 32], [0; 8]); SIDE];
            let mut blocks = [EMPTY; SIDE];
            for ((block, padded), side) in blocks.iter_mut().zip(&mut padded).zip(sides) {
                fill(&mut padded.0, &side.codes[64 * whole..]);
                fill(&mut padded.1, &side.high[16 * HIGH * whole..]);
                fill(&mut padded.2, &side.bytes[groups * whole..]);
                let scales = &side.scales[groups * whole..][..VECTOR];
                *block = Block { codes: &padded.0, high: &padded.1, bytes: &padded.2, scales };
            }
            self.tables.add::<HIGH, GROUP, T>(&blocks, &x, whole, &mut sums);
        }
        for (p, sums) in sums.iter().enumerate().take(rows - r) {
            for (t, sum) in sums.iter().enumerate() {
                tile.row(i + t)[at + p] = _mm512_reduce_add_ps(*sum);
            }
        }
        T
    }
}

/// Copies the bytes that there are.
fn fill(to: &mut [u8], from: &[u8]) {
    to[..from.len()].copy_from_slice(from);
}

impl Tables {
    /// Adds the products of a block.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx2,f16c,fma")]
    fn add<const HIGH: usize, const GROUP: usize, const T: usize>(
        &self,
        blocks: &[Block<'_>; SIDE],
        x: &[&[f32]; T],
        block: usize,
        sums: &mut [[__m512; T]; SIDE],
    ) {
        // `[odd][side]`
        let mut found = [[[_mm512_setzero_si512(); 2]; SIDE]; 2];
        for p in 0..SIDE {
            [found[0][p], found[1][p]] = self.find::<HIGH, GROUP>(blocks[p]);
        }
        let mut numbers = [[].as_slice(); T];
        for t in 0..T {
            numbers[t] = &x[t][block * WIDTH..][..WIDTH];
        }
        let mut parts = [[_mm512_setzero_ps(); T]; SIDE];
        for upper in 0..2 {
            for (odd, found) in found.iter().enumerate() {
                let mut pairs = [_mm512_setzero_si512(); SIDE];
                for p in 0..SIDE {
                    let [low, high] = found[p];
                    pairs[p] =
                        if upper == 0 { _mm512_unpacklo_epi8(low, high) } else { _mm512_unpackhi_epi8(low, high) };
                }
                for half in 0..2 {
                    let step = 4 * upper + 2 * odd + half;
                    let mut x = [_mm512_setzero_ps(); T];
                    for t in 0..T {
                        x[t] = F32x16::load(&numbers[t][16 * step..]).0;
                    }
                    for p in 0..SIDE {
                        let level = _mm512_castsi512_ps(if half == 0 {
                            _mm512_slli_epi32::<16>(pairs[p])
                        } else {
                            _mm512_and_si512(pairs[p], _mm512_set1_epi32(0xffff_0000_u32.cast_signed()))
                        });
                        for t in 0..T {
                            parts[p][t] = _mm512_fmadd_ps(level, x[t], parts[p][t]);
                        }
                    }
                }
            }
            // Groups of 32 columns have the same scale for all steps.
            if upper == 1 || GROUP == 16 {
                for p in 0..SIDE {
                    let scales = F32x16::load(blocks[p].scales).0;
                    let scales = _mm512_permutexvar_ps(self.picks[upper], scales);
                    for t in 0..T {
                        sums[p][t] = _mm512_fmadd_ps(scales, parts[p][t], sums[p][t]);
                        parts[p][t] = _mm512_setzero_ps();
                    }
                }
            }
        }
    }
}
