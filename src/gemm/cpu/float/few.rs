//! Few rows of activations: the stored planes pass by once, and reading them is what takes the time.
//!
//! A block is a vector of words. Lane `l` of word vector `b` holds columns `(b * N + l) * C ..+ C` of a row, where `C`
//! is the number of codes in a word, so step `s` of a block multiplies the levels of the columns `s, C + s, 2C + s, …` of
//! the block; [`Spread`] has the activations in that order. All codes of a lane belong to one group, so after `C` steps
//! the sums of a block are multiplied by a vector of scales, one per lane, which a permutation takes from the scales of
//! the row. What is added in each group leaves the loop as a product with the sums of its activations.

use super::params;
use super::vector::{Kind, Vector, with_kind};
use crate::codec::Planes;
use crate::codec::lanes::{Eight, MAX_LANES};
use crate::gemm::Weights;
use crate::gemm::cpu::tile::Tile;
use crate::layout::Grouped;

/// The most rows of activations that go this way.
pub(super) const MOST: usize = 8;

/// Activations in the order in which codes come out of words.
pub(super) struct Spread {
    /// Numbers in a row of `x`.
    stride: usize,
    /// `[m][block][step][lane]`, zeros beyond the last column.
    x: Vec<f32>,
    /// Numbers in a row of `sums`, whole vectors.
    groups: usize,
    /// `[m][group]`, the sum of the activations; empty where nothing is added.
    sums: Vec<f32>,
    /// The group of the first lane of every block.
    first: Vec<u32>,
    /// `[block][lane]`, its group less that of the first lane.
    indices: Vec<u32>,
}

/// One row of a [`Spread`] that is still to be filled.
pub(super) struct SpreadRow<'a> {
    x: &'a mut [f32],
    sums: &'a mut [f32],
}

impl Spread {
    /// Room for `m` rows, for vectors of `lanes` numbers.
    pub(super) fn new(layout: &Grouped, cols: usize, m: usize, lanes: usize) -> Self {
        let codes = 32 / layout.bits() as usize;
        let blocks = cols.div_ceil(codes * lanes);
        let stride = blocks * codes * lanes;
        let groups = layout.groups(cols).next_multiple_of(lanes);
        let sums = if params::has_addends(layout) { m * groups } else { 0 };
        let group = layout.group_len(cols).max(1);
        let narrow = |group: usize| u32::try_from(group).expect("a row has fewer than 2^32 groups");
        let first_of = |block: usize| (block * lanes * codes / group).min(layout.groups(cols) - 1);
        let first = (0..blocks).map(|block| narrow(first_of(block))).collect();
        let index = |lane: usize| {
            // Lanes beyond the last column have no group: their activations are zeros.
            let own = (lane * codes / group).min(layout.groups(cols) - 1);
            narrow(own - first_of(lane / lanes))
        };
        let indices = (0..blocks * lanes).map(index).collect();
        Self { stride, x: vec![0.0; m * stride], groups, sums: vec![0.0; sums], first, indices }
    }

    /// The rows, each a task of its own.
    pub(super) fn rows(&mut self) -> Vec<SpreadRow<'_>> {
        let mut sums = self.sums.chunks_mut(self.groups.max(1));
        self.x.chunks_mut(self.stride.max(1)).map(|x| SpreadRow { x, sums: sums.next().unwrap_or_default() }).collect()
    }
}

/// Brings a row of activations into order.
#[inline(always)]
pub(super) fn spread<V: Vector>(layout: &Grouped, x: &[f32], row: SpreadRow<'_>) {
    let codes = 32 / layout.bits() as usize;
    let width = codes * V::N;
    for (src, block) in x.chunks(width).zip(row.x.chunks_exact_mut(width)) {
        // Eight numbers are read from the start of every lane, whatever it holds.
        let mut padded = [0.0; 8 * (MAX_LANES + 1)];
        padded[..src.len()].copy_from_slice(src);
        let columns = V::columns(&padded, codes);
        for (step, column) in block.chunks_exact_mut(V::N).zip(columns) {
            column.store(step);
        }
    }
    for (sum, group) in row.sums.iter_mut().zip(x.chunks(layout.group_len(x.len()).max(1))) {
        let (eights, rest) = group.as_chunks::<8>();
        let mut parts = [0.0; 8];
        for eight in eights {
            for (part, x) in parts.iter_mut().zip(eight) {
                *part += x;
            }
        }
        let [a, b, c, d, e, f, g, h] = parts;
        *sum = ((a + e) + (c + g)) + ((b + f) + (d + h));
        for x in rest {
            *sum += x;
        }
    }
}

/// Rows of weights that are multiplied side by side: they share the activations that are loaded.
const ROWS: usize = 2;

/// Fills a tile that has all rows of activations.
#[inline(always)]
pub(super) fn multiply<V: Vector, E: Eight>(weights: &Weights<'_>, spread: &Spread, tile: &mut Tile<'_>) {
    with_kind!(V, weights.layout(), kind => all_rows::<V, E, _>(kind, weights, spread, tile));
}

#[inline(always)]
fn all_rows<V: Vector, E: Eight, K: Kind<V>>(kind: K, weights: &Weights<'_>, spread: &Spread, tile: &mut Tile<'_>) {
    let layout = weights.layout();
    let (m, n) = (tile.m(), tile.n());
    // Every vector of scales is read in whole, the last one may start at the last group.
    let stride = spread.groups + V::N;
    let mut scales = vec![0.0; ROWS * stride];
    let mut addends = vec![0.0; if spread.sums.is_empty() { 0 } else { ROWS * spread.groups }];
    for first in n.clone().step_by(ROWS) {
        // The last row may be taken twice.
        let rows: [Planes<'_>; ROWS] =
            [*weights.slice(first, 1).planes(), *weights.slice((first + 1).min(n.end - 1), 1).planes()];
        for (r, row) in rows.iter().enumerate() {
            let scales = &mut scales[r * stride..][..spread.groups];
            params::scales::<V>(layout, row, 0, scales);
            if !addends.is_empty() {
                let addends = &mut addends[r * spread.groups..][..spread.groups];
                params::addends::<V, E>(layout, row, 0, scales, addends);
            }
        }
        let addends = addends.split_at(addends.len() / ROWS);
        let scales = scales.split_at(stride);
        let pair = Pair {
            codes: [rows[0].codes, rows[1].codes],
            scales: [scales.0, scales.1],
            addends: [addends.0, addends.1],
        };
        let mut i = m.start;
        while i < m.end {
            i += match m.end - i {
                1 => pair.multiply::<V, K, 1>(kind, spread, i, first, tile),
                2 | 3 => pair.multiply::<V, K, 2>(kind, spread, i, first, tile),
                _ => pair.multiply::<V, K, 4>(kind, spread, i, first, tile),
            };
        }
    }
}

/// Rows of weights, ready to be multiplied.
struct Pair<'a> {
    codes: [&'a [u8]; ROWS],
    scales: [&'a [f32]; ROWS],
    addends: [&'a [f32]; ROWS],
}

impl Pair<'_> {
    /// Writes the results of `T` rows of activations from `i` on with row `n` of the weights and the next one, where
    /// the tile has it; returns `T`.
    #[inline(always)]
    fn multiply<V: Vector, K: Kind<V>, const T: usize>(
        &self,
        kind: K,
        spread: &Spread,
        i: usize,
        n: usize,
        tile: &mut Tile<'_>,
    ) -> usize {
        let sums = self.sums::<V, K, T>(kind, spread, i);
        let at = n - tile.n().start;
        for t in 0..T {
            let results = &mut tile.row(i + t)[at..];
            results[0] = sums[0][t].sum();
            if let Some(second) = results.get_mut(1) {
                *second = sums[1][t].sum();
            }
        }
        T
    }

    #[inline(always)]
    fn sums<V: Vector, K: Kind<V>, const T: usize>(&self, kind: K, spread: &Spread, i: usize) -> [[V; T]; ROWS] {
        let width = K::CODES * V::N;
        let mut x = [[].as_slice(); T];
        for (t, x) in x.iter_mut().enumerate() {
            *x = &spread.x[(i + t) * spread.stride..][..spread.stride];
        }
        let mut sums = [[V::splat(0.0); T]; ROWS];
        let whole = self.codes[0].len() / (4 * V::N);
        for block in 0..spread.first.len() {
            let mut words = [kind.prepare(V::words(&[0; 4 * MAX_LANES])); ROWS];
            for r in 0..ROWS {
                let codes = &self.codes[r][block * 4 * V::N..];
                words[r] = if block < whole {
                    V::words(codes)
                } else {
                    let mut padded = [0; 4 * MAX_LANES];
                    padded[..codes.len()].copy_from_slice(codes);
                    V::words(&padded)
                };
                words[r] = kind.prepare(words[r]);
            }
            let mut parts = [[V::splat(0.0); T]; ROWS];
            let mut numbers = [[].as_slice(); T];
            for t in 0..T {
                numbers[t] = &x[t][block * width..][..width];
            }
            for step in 0..K::CODES {
                let index = u32::try_from(step).expect("fewer than 32");
                let levels = [kind.level(words[0], index), kind.level(words[1], index)];
                for t in 0..T {
                    let x = V::load(&numbers[t][step * V::N..]);
                    parts[0][t] = parts[0][t].add_product(levels[0], x);
                    parts[1][t] = parts[1][t].add_product(levels[1], x);
                }
            }
            let first = spread.first[block] as usize;
            let indices = &spread.indices[block * V::N..][..V::N];
            for r in 0..ROWS {
                let scales = V::pick(&self.scales[r][first..], indices);
                for t in 0..T {
                    sums[r][t] = sums[r][t].add_product(scales, parts[r][t]);
                }
            }
        }
        for (r, addends) in self.addends.iter().enumerate() {
            for (g, addends) in addends.chunks_exact(V::N).enumerate() {
                let addends = V::load(addends);
                for t in 0..T {
                    let x = V::load(&spread.sums[(i + t) * spread.groups + g * V::N..]);
                    sums[r][t] = sums[r][t].add_product(addends, x);
                }
            }
        }
        sums
    }
}
