//! Many rows of activations: codes are unpacked once and multiplied with panels of activations.
//!
//! A lane belongs to a row of activations, so a word of weights, four columns of a row, is the same in all lanes, and
//! the sums of a lane are a result's own. The loops, from the outside: columns, in runs that keep a pair of panels in
//! the first-level cache; panels; rows of weights, a few at a time, whose sums stay in registers. Results wait in a
//! scratch of `rows of weights x rows of activations` in the second-level cache, and are transposed at the end.

use std::ops::Range;

use super::few::lanes_shift;
use super::lanes::Lanes;
use super::panels::Panels;
use super::params::Params;
use super::{CODES, SIGNED, ZERO_POINTS};
use crate::codec::lanes::Lanes as Transposer;
use crate::gemm::Weights;
use crate::gemm::cpu::nested;
use crate::gemm::cpu::tile::Tile;
use crate::layout::{Grouped, ROW};

/// Columns of a run: two panels of them have 16 KiB of codes.
pub(super) const RUN: usize = 512;

/// Multiplies `weights`, which are the rows `tile.n()`, with the rows `tile.m()` of activations; the tile starts with a
/// panel.
#[inline(always)]
pub(super) fn multiply<L, T, const BITS: u32, const KIND: u8, const ROWS: usize, const PANELS: usize>(
    weights: &Weights<'_>,
    x: &Panels,
    tile: &mut Tile<'_>,
) where
    L: Lanes,
    T: Transposer,
{
    let cols = weights.cols();
    let rows = weights.rows().next_multiple_of(ROWS);
    let (first_panel, panels) = (tile.m().start / L::N, tile.m().len().div_ceil(L::N));
    let width = panels * L::N;
    let mut params = Params::new(weights, rows);
    params.load(weights);
    // Rows that fill up the last few have scale zero.
    let mut codes = vec![0; rows * RUN];
    let mut totals = vec![0.0f32; rows * width];
    for start in (0..cols).step_by(RUN) {
        let len = RUN.min(cols - start);
        unpack::<L>(weights, start, len, L::BIAS, &mut codes);
        let records = start / x.step..((start + len).div_ceil(x.step)).min(x.records);
        let groups = group_range(weights.layout(), start, len);
        for p in (0..panels).step_by(PANELS) {
            let block = Block {
                x,
                params: &params,
                codes: &codes,
                records: records.clone(),
                groups: groups.clone(),
                shift: lanes_shift(weights),
            };
            for r in (0..rows).step_by(ROWS) {
                let totals = &mut totals[r * width + p * L::N..];
                if p + PANELS <= panels {
                    block.add::<L, BITS, KIND, ROWS, PANELS>(r, first_panel + p, totals, width);
                } else {
                    for (i, p) in (p..panels).enumerate() {
                        block.add::<L, BITS, KIND, ROWS, 1>(r, first_panel + p, &mut totals[i * L::N..], width);
                    }
                }
            }
        }
    }
    transpose::<T>(&totals, width, tile, tile.m());
}

/// The groups whose first column is one of `start ..+ len`.
pub(super) fn group_range(layout: &Grouped, start: usize, len: usize) -> Range<usize> {
    if layout.offset().is_none() {
        0..0
    } else if layout.group() == ROW {
        0..usize::from(start == 0)
    } else {
        start.div_ceil(layout.group())..(start + len).div_ceil(layout.group())
    }
}

/// Codes of the columns `start ..+ len` of every row as bytes, in rows of [`RUN`]; those of 8 bits and levels of a bank as
/// levels plus `bias`, which is zero or [`nested::BIAS`].
#[inline(always)]
pub(super) fn unpack<L: Lanes>(weights: &Weights<'_>, start: usize, len: usize, bias: u8, codes: &mut [u8]) {
    if weights.layout().bank().is_some() {
        return nested::levels(weights, start..start + len, bias, codes, RUN);
    }
    let (bits, stride) = (weights.layout().bits() as usize, weights.layout().code_stride(weights.cols()));
    let bytes = start * bits / 8..((start + len) * bits).div_ceil(8);
    for (packed, codes) in weights.planes().codes.chunks_exact(stride).zip(codes.chunks_exact_mut(RUN)) {
        let packed = &packed[bytes.clone()];
        // The next run of this row is far from where the processor looks ahead.
        for line in (0..packed.len()).step_by(64) {
            L::prefetch(packed, packed.len() + line);
        }
        if bits == 8 {
            let flip = nested::BIAS - bias;
            for (code, packed) in codes.iter_mut().zip(packed) {
                *code = packed ^ flip;
            }
        } else {
            for (codes, packed) in codes.as_chunks_mut::<2>().0.iter_mut().zip(packed) {
                *codes = [packed & 15, packed >> 4];
            }
        }
    }
}

/// A run of columns: what all rows of weights and panels of activations share.
struct Block<'a> {
    x: &'a Panels,
    params: &'a Params,
    codes: &'a [u8],
    records: Range<usize>,
    groups: Range<usize>,
    shift: u32,
}

impl Block<'_> {
    /// Adds the products of rows `r ..+ ROWS` of weights and panels `p ..+ PANELS` to rows of `totals`, `width` apart.
    #[inline(always)]
    fn add<L: Lanes, const BITS: u32, const KIND: u8, const ROWS: usize, const PANELS: usize>(
        &self,
        r: usize,
        p: usize,
        totals: &mut [f32],
        width: usize,
    ) {
        let (step, count) = (self.x.step, self.records.len());
        let mut codes: [&[u8]; ROWS] = [&[]; ROWS];
        let mut scales: [&[f32]; ROWS] = [&[]; ROWS];
        let mut zero_points: [&[i32]; ROWS] = [&[]; ROWS];
        let mut panels: [&[u32]; PANELS] = [&[]; PANELS];
        let mut sums = [[L::splat(0.0); PANELS]; ROWS];
        for i in 0..ROWS {
            codes[i] = &self.codes[(r + i) * RUN..][..count * step];
            scales[i] = self.params.scales(r + i);
            zero_points[i] = self.params.zero_points(r + i);
            for j in 0..PANELS {
                sums[i][j] = L::load(&totals[i * width + j * L::N..]);
            }
        }
        for (j, panel) in panels.iter_mut().enumerate() {
            *panel = self.x.words(p + j, self.records.start, count);
        }
        let record = self.x.record();
        for s in 0..count {
            // Eight columns are a lane of the kernel for few rows; its shift tells the group.
            let group = ((self.records.start + s) * (step / 8)) >> self.shift;
            let mut exact = [[L::splat_int(0); PANELS]; ROWS];
            let mut vectors: [&[u32]; PANELS] = [&[]; PANELS];
            for j in 0..PANELS {
                vectors[j] = &panels[j][s * record..][..record];
            }
            if KIND != CODES && (KIND != SIGNED || BITS != 8 || L::BIAS != 0) {
                for j in 0..PANELS {
                    let start = L::load_ints(&vectors[j][record - L::N..]);
                    for i in 0..ROWS {
                        exact[i][j] = match KIND {
                            SIGNED => start,
                            ZERO_POINTS => L::times(L::splat_int(zero_points[i][group]), start),
                            _ => unreachable!("three kinds of levels"),
                        };
                    }
                }
            }
            for q in (0..step).step_by(8) {
                let mut x = [[L::splat_bytes([0; 4]); 2]; PANELS];
                for j in 0..PANELS {
                    let vectors = &vectors[j][q / 4 * L::N..][..2 * L::N];
                    x[j] = [L::load_bytes(vectors), L::load_bytes(&vectors[L::N..])];
                }
                for i in 0..ROWS {
                    let [a, b, c, d, e, f, g, h] = codes[i][s * step + q..].as_chunks::<8>().0[0];
                    let (first, second) = (L::splat_bytes([a, b, c, d]), L::splat_bytes([e, f, g, h]));
                    for j in 0..PANELS {
                        exact[i][j] = L::dot::<BITS>(exact[i][j], first, x[j][0]);
                        exact[i][j] = L::dot::<BITS>(exact[i][j], second, x[j][1]);
                    }
                }
            }
            for j in 0..PANELS {
                let x_scale = L::load_floats(&vectors[j][record - 2 * L::N..]);
                for i in 0..ROWS {
                    let scale = L::mul(L::splat(scales[i][group]), x_scale);
                    sums[i][j] = L::mul_add(L::to_floats(exact[i][j]), scale, sums[i][j]);
                }
            }
        }
        for g in self.groups.clone() {
            for (i, sums) in sums.iter_mut().enumerate() {
                let offset = L::splat(self.params.offsets(r + i)[g]);
                for (j, sum) in sums.iter_mut().enumerate() {
                    *sum = L::mul_add(offset, L::load(&self.x.sums(p + j)[g * L::N..]), *sum);
                }
            }
        }
        for i in 0..ROWS {
            for j in 0..PANELS {
                L::store(sums[i][j], &mut totals[i * width + j * L::N..]);
            }
        }
    }
}

/// Writes the columns of `totals`, whose rows are `width` apart, as the rows `m` of a tile.
#[inline(always)]
pub(in super::super) fn transpose<T: Transposer>(totals: &[f32], width: usize, tile: &mut Tile<'_>, m: Range<usize>) {
    let n = tile.n().len();
    for r in (0..n).step_by(T::N) {
        for i in (0..m.len()).step_by(8) {
            let totals = &totals[r * width + i..];
            if r + T::N <= n && i + 8 <= m.len() {
                for (j, column) in T::columns(totals, width).into_iter().enumerate() {
                    column.store(&mut tile.row(m.start + i + j)[r..]);
                }
            } else {
                for j in 0..8.min(m.len() - i) {
                    for (k, y) in tile.row(m.start + i + j)[r..].iter_mut().take(T::N).enumerate() {
                        *y = totals[k * width + j];
                    }
                }
            }
        }
    }
}
