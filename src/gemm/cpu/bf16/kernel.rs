//! The loops of a product in bf16: runs of columns, pairs of panels, rows of weights.
//!
//! A lane belongs to a row of activations and a row of a tile to a row of weights, so weights are the left factor,
//! decoded without being transposed, and the results are transposed once at the end.

#![expect(unsafe_code, reason = "vector intrinsics are unsafe outside functions that enable them")]

use std::arch::x86_64::*;

use super::panels::Panels;
use super::{CHUNK, Params, RUN, STEP, decode};
use crate::codec::lanes::avx512::F32x16;
use crate::gemm::Weights;
use crate::gemm::cpu::amx::{Amx, SIDE, Tiles, WORDS};
use crate::gemm::cpu::int8::transpose;
use crate::gemm::cpu::tile::Tile;

/// Rows of weights that are multiplied at once: two tiles.
const ROWS: usize = 2 * SIDE;

/// Adds the products of 32 rows of weights and one or two panels to sums, 32 vectors for each panel.
trait Multiplier {
    /// As many panels as there are in `b`, over `steps` of 32 columns.
    fn add<const PANELS: usize>(
        &mut self,
        steps: usize,
        a: [&[u32]; 2],
        b: [&[u32]; PANELS],
        sums: [&mut [f32]; PANELS],
    );
}

impl Multiplier for Tiles {
    #[inline(always)]
    fn add<const PANELS: usize>(
        &mut self,
        steps: usize,
        a: [&[u32]; 2],
        b: [&[u32]; PANELS],
        sums: [&mut [f32]; PANELS],
    ) {
        self.add_bf16(steps, a, b, sums);
    }
}

/// Pairs of bf16 in vectors of AVX-512.
struct Vectors;

impl Multiplier for Vectors {
    #[inline(always)]
    fn add<const PANELS: usize>(
        &mut self,
        steps: usize,
        a: [&[u32]; 2],
        b: [&[u32]; PANELS],
        mut sums: [&mut [f32]; PANELS],
    ) {
        for r in (0..ROWS).step_by(4) {
            let a = &a[r / SIDE][r % SIDE * SIDE..];
            // SAFETY: this type is used only in functions that enable AVX-512 with BF16; the slices of sixteen words are
            // checked where they are made.
            unsafe {
                let mut totals = [[_mm512_setzero_ps(); PANELS]; 4];
                for s in 0..steps {
                    for p in 0..SIDE {
                        for (j, b) in b.iter().enumerate() {
                            let x = _mm512_loadu_si512(b[s * WORDS + p * SIDE..][..SIDE].as_ptr().cast());
                            for (i, totals) in totals.iter_mut().enumerate() {
                                let w = _mm512_set1_epi32(a[s * WORDS + i * SIDE + p].cast_signed());
                                let [w, x] = [w, x].map(|v| std::mem::transmute::<__m512i, __m512bh>(v));
                                totals[j] = _mm512_dpbf16_ps(totals[j], w, x);
                            }
                        }
                    }
                }
                for (i, totals) in totals.into_iter().enumerate() {
                    for (sums, total) in sums.iter_mut().zip(totals) {
                        let sums = &mut sums[(r + i) * SIDE..][..SIDE];
                        let total = _mm512_add_ps(total, _mm512_loadu_ps(sums.as_ptr()));
                        _mm512_storeu_ps(sums.as_mut_ptr(), total);
                    }
                }
            }
        }
    }
}

/// With tiles of AMX.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,f16c,fma")]
pub(super) fn amx(weights: &Weights<'_>, x: &Panels, tile: &mut Tile<'_>) {
    let amx = Amx::bf16().expect("the table of AMX is handed out only where it was detected");
    multiply(&mut amx.configure(64), weights, x, tile);
}

/// With vectors of AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,f16c,fma")]
pub(super) fn avx512(weights: &Weights<'_>, x: &Panels, tile: &mut Tile<'_>) {
    multiply(&mut Vectors, weights, x, tile);
}

/// Multiplies `weights`, which are the rows `tile.n()`, with the rows `tile.m()` of activations.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,f16c,fma")]
fn multiply(multiplier: &mut impl Multiplier, weights: &Weights<'_>, x: &Panels, tile: &mut Tile<'_>) {
    let cols = weights.cols();
    let rows = weights.rows().next_multiple_of(ROWS);
    let (first_panel, panels) = (tile.m().start / SIDE, tile.m().len().div_ceil(SIDE));
    let mut params = Params::new(weights, weights.rows());
    params.load(weights);
    let part = RUN / STEP * WORDS;
    // Rows that fill up the last tile stay zero.
    let mut decoded = vec![0u32; rows / SIDE * part];
    let mut totals = vec![0.0f32; panels * rows * SIDE];
    for start in (0..cols).step_by(RUN) {
        let len = RUN.min(cols - start);
        let steps = len.div_ceil(CHUNK) * (CHUNK / STEP);
        decode::decode(weights, &params, start, len, &mut decoded);
        for (pair, totals) in totals.chunks_mut(2 * rows * SIDE).enumerate() {
            let p = first_panel + 2 * pair;
            let (first, second) = totals.split_at_mut(rows * SIDE);
            for r in (0..rows).step_by(ROWS) {
                let (low, high) = decoded[r / SIDE * part..][..2 * part].split_at(part);
                let first = &mut first[r * SIDE..][..ROWS * SIDE];
                if second.is_empty() {
                    multiplier.add(steps, [low, high], [x.words(p, start)], [first]);
                } else {
                    let b = [x.words(p, start), x.words(p + 1, start)];
                    multiplier.add(steps, [low, high], b, [first, &mut second[r * SIDE..][..ROWS * SIDE]]);
                }
            }
        }
    }
    for (p, totals) in totals.chunks_exact(rows * SIDE).enumerate() {
        let m = tile.m().start + p * SIDE;
        transpose::<F32x16>(totals, SIDE, tile, m..tile.m().end.min(m + SIDE));
    }
}
