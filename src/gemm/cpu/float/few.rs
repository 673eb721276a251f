//! Few rows of activations: the stored planes pass by once, and reading them is what takes the time.
//!
//! A block is a vector of words. Lane `l` of word vector `b` holds columns `(b * N + l) * C ..+ C` of a row, where `C`
//! is the number of codes in a word, so step `s` of a block multiplies the levels of the columns `s, C + s, 2C + s, …` of
//! the block; [`Spread`] has the activations in that order. All codes of a lane belong to one group, so after `C` steps
//! the sums of a block are multiplied by a vector of scales, one per lane, which a permutation takes from the scales of
//! the row. What is added in each group leaves the loop as a product with the sums of its activations.

use std::ops::Range;

use super::aligned::Aligned;
use super::params;
use super::vector::{Kind, Vector, with_kind};
use crate::codec::lanes::{Eight, MAX_LANES};
use crate::gemm::Weights;
use crate::gemm::cpu::nested;
use crate::gemm::cpu::tile::Tile;
use crate::layout::Grouped;

/// The most rows of activations that go this way.
pub(super) const MOST: usize = 8;

/// Activations in the order in which codes come out of words.
pub(super) struct Spread {
    /// Numbers in a row of `x`.
    pub(super) stride: usize,
    /// `[m][block][step][lane]`, zeros beyond the last column.
    pub(super) x: Aligned,
    /// Numbers in a row of `sums`, whole vectors.
    pub(super) groups: usize,
    /// `[m][group]`, the sum of the activations; empty where nothing is added.
    sums: Aligned,
    /// The group of the first lane of every block.
    first: Vec<usize>,
    /// `[block][lane]`, its group less that of the first lane.
    indices: Vec<u32>,
}

/// One row of a [`Spread`] that is still to be filled.
pub(super) struct SpreadRow<'a> {
    pub(super) x: &'a mut [f32],
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
        let (mut first, mut indices) = (Vec::with_capacity(blocks), Vec::with_capacity(blocks * lanes));
        // The group of the word at hand, and where the next one begins; there is none beyond the last column.
        let (mut own, mut next) = (0, group);
        for block in 0..blocks {
            for lane in 0..lanes {
                let column = (block * lanes + lane) * codes;
                if column >= next && next < cols {
                    (own, next) = (own + 1, next + group);
                }
                if lane == 0 {
                    first.push(own);
                }
                indices.push(u32::try_from(own - first[block]).expect("fewer than lanes"));
            }
        }
        Self { stride, x: Aligned::zeros(m * stride), groups, sums: Aligned::zeros(sums), first, indices }
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

/// Fills a tile that has all rows of activations.
#[inline(always)]
pub(super) fn multiply<V: Vector, E: Eight>(weights: &Weights<'_>, spread: &Spread, tile: &mut Tile<'_>) {
    let plain = nested::plain(weights.layout());
    with_kind!(V, &plain, kind => all_rows::<V, E, _>(kind, &plain, weights, spread, tile));
}

/// Numbers of scales or addends that are converted together, well before they are used: loading across what was just
/// stored would wait for the store.
const CONVERTED: usize = 2048;
/// The most rows of weights in a batch, a multiple of those that are multiplied side by side.
const BATCH: usize = 16;
/// Bytes of unpacked levels that stay in the first-level cache while they are used, if rows are not so long that even the
/// fewest are more.
const UNPACKED: usize = 16 << 10;
/// Activations that stay in the first-level cache while a batch goes by.
const CACHED: usize = 8192;

#[inline(always)]
fn all_rows<V: Vector, E: Eight, K: Kind<V>>(
    kind: K,
    plain: &Grouped,
    weights: &Weights<'_>,
    spread: &Spread,
    tile: &mut Tile<'_>,
) {
    let n = tile.n();
    // Every vector of scales is read in whole, the last one may start at the last group.
    let stride = spread.groups + V::N;
    let code_stride = plain.code_stride(weights.cols());
    let nested = K::BITS == 8 && weights.layout().bank().is_some();
    let most = if nested { UNPACKED / code_stride.max(1) / 4 * 4 } else { BATCH };
    let rows = (CONVERTED / stride).next_multiple_of(4).min(most).clamp(4, BATCH);
    let mut batch = Batch {
        weights: weights.slice(n.start, 0),
        code_stride,
        unpacked: vec![0; if nested { rows * code_stride } else { 0 }],
        spread,
        stride,
        scales: vec![0.0; rows * stride],
        addends: vec![0.0; if spread.sums.is_empty() { 0 } else { rows * spread.groups }],
    };
    for first in n.clone().step_by(rows) {
        batch.weights = weights.slice(first, rows.min(n.end - first));
        batch.convert::<V, E>();
        if nested {
            nested::levels(&batch.weights, 0..weights.cols(), nested::BIAS, &mut batch.unpacked, code_stride);
        }
        let m = tile.m();
        let mut i = m.start;
        while i < m.end {
            // As many rows side by side as the registers hold sums of.
            let left = m.end - i;
            i += if V::REGISTERS >= 32 {
                match left {
                    1 => batch.multiply::<V, K, 4, 1>(kind, i, first, tile),
                    2 | 3 => batch.multiply::<V, K, 4, 2>(kind, i, first, tile),
                    _ => batch.multiply::<V, K, 2, 4>(kind, i, first, tile),
                }
            } else {
                match left {
                    1 => batch.multiply::<V, K, 2, 1>(kind, i, first, tile),
                    2 | 3 => batch.multiply::<V, K, 2, 2>(kind, i, first, tile),
                    _ => batch.multiply::<V, K, 1, 4>(kind, i, first, tile),
                }
            };
        }
    }
}

/// A few rows of weights with their parameters converted.
struct Batch<'a> {
    weights: Weights<'a>,
    code_stride: usize,
    /// Codes of 8 bits in place of those of a bank.
    unpacked: Vec<u8>,
    spread: &'a Spread,
    /// Numbers in a row of `scales`, zeros after the last group.
    stride: usize,
    scales: Vec<f32>,
    addends: Vec<f32>,
}

impl Batch<'_> {
    #[inline(always)]
    fn convert<V: Vector, E: Eight>(&mut self) {
        let (rows, groups, planes) = (self.weights.rows(), self.spread.groups, *self.weights.planes());
        for r in 0..rows {
            let row = params::row(&planes, rows, r);
            let scales = &mut self.scales[r * self.stride..][..groups];
            params::scales::<V>(self.weights.layout(), &row, 0, scales);
            // What the next batch converts.
            for plane in [row.scales, row.addends] {
                for at in (0..plane.len()).step_by(64) {
                    V::prefetch(plane, rows * plane.len() + at);
                }
            }
            if !self.addends.is_empty() {
                let addends = &mut self.addends[r * groups..][..groups];
                params::addends::<V, E>(self.weights.layout(), &row, 0, scales, addends);
            }
        }
    }

    /// Writes the results of `T` rows of activations from `i` on with all rows of the batch, of which the first is row
    /// `n`; returns `T`.
    #[inline(always)]
    fn multiply<V: Vector, K: Kind<V>, const R: usize, const T: usize>(
        &self,
        kind: K,
        i: usize,
        n: usize,
        tile: &mut Tile<'_>,
    ) -> usize {
        let spread = self.spread;
        let width = K::CODES * V::N;
        let rows = self.weights.rows();
        let mut x = [[].as_slice(); T];
        for (t, x) in x.iter_mut().enumerate() {
            *x = &spread.x[(i + t) * spread.stride..][..spread.stride];
        }
        // `[row][t][lane]`, between the activations of one cacheful and the next.
        let mut totals = [0.0; BATCH * 4 * MAX_LANES];
        let (blocks, step) = (spread.first.len(), CACHED / (T * width));
        for start in (0..blocks).step_by(step) {
            let end = blocks.min(start + step);
            for (r, totals) in (0..rows).step_by(R).zip(totals.chunks_exact_mut(R * T * V::N)) {
                let mut sums = [[V::splat(0.0); T]; R];
                for p in 0..R {
                    for t in 0..T {
                        sums[p][t] = V::load(&totals[(p * T + t) * V::N..]);
                    }
                }
                self.blocks::<V, K, R, T>(kind, r, &x, start..end, &mut sums);
                if end < blocks {
                    for p in 0..R {
                        for t in 0..T {
                            sums[p][t].store(&mut totals[(p * T + t) * V::N..]);
                        }
                    }
                    continue;
                }
                self.add_addends::<V, R, T>(r, i, &mut sums);
                let at = n - tile.n().start + r;
                for (p, sums) in sums.iter().enumerate().take(rows - r) {
                    for (t, sum) in sums.iter().enumerate() {
                        tile.row(i + t)[at + p] = sum.sum();
                    }
                }
            }
        }
        T
    }

    /// Adds what leaves the loop over codes: addends of groups times sums of activations.
    #[inline(always)]
    fn add_addends<V: Vector, const R: usize, const T: usize>(&self, r: usize, i: usize, sums: &mut [[V; T]; R]) {
        let groups = self.spread.groups;
        if self.addends.is_empty() {
            return;
        }
        let mut addends = [[].as_slice(); R];
        for (p, addends) in addends.iter_mut().enumerate() {
            *addends = &self.addends[(r + p).min(self.weights.rows() - 1) * groups..][..groups];
        }
        let mut x = [[].as_slice(); T];
        for (t, x) in x.iter_mut().enumerate() {
            *x = &self.spread.sums[(i + t) * groups..][..groups];
        }
        for g in (0..groups).step_by(V::N) {
            let mut vectors = [V::splat(0.0); T];
            for t in 0..T {
                vectors[t] = V::load(&x[t][g..]);
            }
            for p in 0..R {
                let addends = V::load(&addends[p][g..]);
                for t in 0..T {
                    sums[p][t] = sums[p][t].add_product(addends, vectors[t]);
                }
            }
        }
    }

    /// Adds the products of some blocks of `R` rows of weights from `r` on; the last row stands in for missing ones.
    #[inline(always)]
    fn blocks<V: Vector, K: Kind<V>, const R: usize, const T: usize>(
        &self,
        kind: K,
        r: usize,
        x: &[&[f32]; T],
        blocks: Range<usize>,
        sums: &mut [[V; T]; R],
    ) {
        let bytes = 4 * V::N;
        let whole = self.code_stride / bytes;
        let mut codes = [[].as_slice(); R];
        let mut scales = [[].as_slice(); R];
        let all = if K::BITS == 8 && !self.unpacked.is_empty() { &self.unpacked } else { self.weights.planes().codes };
        for p in 0..R {
            let r = (r + p).min(self.weights.rows() - 1);
            codes[p] = &all[r * self.code_stride..][..self.code_stride];
            scales[p] = &self.scales[r * self.stride..][..self.stride];
        }
        let mut words = [V::words(&[0; 4 * MAX_LANES]); R];
        for block in blocks.start..blocks.end.min(whole) {
            for (words, codes) in words.iter_mut().zip(codes) {
                *words = V::words(&codes[block * bytes..]);
                // The rows that are next.
                V::prefetch(codes, block * bytes + R * codes.len());
            }
            self.block::<V, K, R, T>(kind, words, block, &scales, x, sums);
        }
        if blocks.end > whole {
            for (words, codes) in words.iter_mut().zip(codes) {
                let rest = &codes[whole * bytes..];
                let mut padded = [0; 4 * MAX_LANES];
                padded[..rest.len()].copy_from_slice(rest);
                *words = V::words(&padded);
            }
            self.block::<V, K, R, T>(kind, words, whole, &scales, x, sums);
        }
    }

    /// Adds the products of a block.
    #[inline(always)]
    fn block<V: Vector, K: Kind<V>, const R: usize, const T: usize>(
        &self,
        kind: K,
        mut words: [V::Words; R],
        block: usize,
        scales: &[&[f32]; R],
        x: &[&[f32]; T],
        sums: &mut [[V; T]; R],
    ) {
        let width = K::CODES * V::N;
        for words in &mut words {
            *words = kind.prepare(*words);
        }
        let mut parts = [[V::splat(0.0); T]; R];
        let mut numbers = [[].as_slice(); T];
        for t in 0..T {
            numbers[t] = &x[t][block * width..][..width];
        }
        for step in 0..K::CODES {
            let index = u32::try_from(step).expect("fewer than 32");
            let mut x = [V::splat(0.0); T];
            for t in 0..T {
                x[t] = V::load(&numbers[t][step * V::N..]);
            }
            for r in 0..R {
                let level = kind.level(words[r], index);
                for t in 0..T {
                    parts[r][t] = parts[r][t].add_product(level, x[t]);
                }
            }
        }
        let first = self.spread.first[block];
        let indices = &self.spread.indices[block * V::N..][..V::N];
        for r in 0..R {
            let scales = V::pick(&scales[r][first..], indices);
            for t in 0..T {
                sums[r][t] = sums[r][t].add_product(scales, parts[r][t]);
            }
        }
    }
}
