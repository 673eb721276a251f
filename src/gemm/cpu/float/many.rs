//! Many rows of activations: weights are decoded a panel at a time and used for all of them.
//!
//! A panel is two vectors of rows of weights by [`DEPTH`] columns, `[column][row]`: sums of the results of all its rows
//! with several rows of activations stay in registers while the columns go by, and every number of a panel is a lane of
//! a vector, so nothing is ever added across lanes. Words of codes of as many rows as there are lanes are transposed
//! before they are decoded, which moves an eighth of what transposing weights would. Activations are [`Packed`] in
//! strips, `[column][row]` too.
//!
//! A result is the sum of its products column by column within a panel, then of the panels, whatever the tiles are.

use super::aligned::Aligned;
use super::params;
use super::vector::{Kind, Vector, with_kind};
use crate::codec::lanes::{Eight, MAX_LANES};
use crate::gemm::Weights;
use crate::gemm::cpu::nested;
use crate::gemm::cpu::tile::Tile;

/// Columns of a panel: two vectors of them stay in the first-level cache beside a strip of activations.
const DEPTH: usize = 256;

/// Activations in strips of a few rows.
pub(super) struct Packed {
    /// Rows of a strip.
    height: usize,
    strips: usize,
    /// `[panel of columns][strip][column][row]`, zeros beyond the last row.
    x: Aligned,
}

impl Packed {
    /// Room for `m` rows in strips of at most `most` rows.
    pub(super) fn new(cols: usize, m: usize, most: usize) -> Self {
        // A step of a strip costs as much as its rows, missing ones too, and one more.
        let heights = (2..=most).step_by(2);
        let height = heights.min_by_key(|&height| m.div_ceil(height) * (height + 1)).unwrap_or(2);
        let strips = m.div_ceil(height);
        Self { height, strips, x: Aligned::zeros(strips * height * cols) }
    }

    /// Rows of a strip.
    pub(super) fn height(&self) -> usize {
        self.height
    }

    /// The panels of columns, each a task of its own.
    pub(super) fn panels(&mut self) -> impl Iterator<Item = PackedPanel<'_>> {
        let (height, panel) = (self.height, self.strips * self.height * DEPTH);
        self.x.chunks_mut(panel.max(1)).enumerate().map(move |(p, x)| PackedPanel { height, start: p * DEPTH, x })
    }
}

/// Some columns of [`Packed`] activations that are still to be filled.
pub(super) struct PackedPanel<'a> {
    height: usize,
    start: usize,
    x: &'a mut [f32],
}

/// Packs the columns of a panel, eight of them at a time: transposed in registers, because numbers that are written one
/// by one cost more than many products of theirs.
#[inline(always)]
pub(super) fn pack<V: Vector>(x: &[f32], cols: usize, panel: PackedPanel<'_>) {
    let PackedPanel { height, start, x: out } = panel;
    let depth = DEPTH.min(cols - start);
    // `[row][column]`, of which rows that are missing stay zero, and `[column][row]`.
    let (mut eights, mut packed) = ([0.0; 8 * MAX_LANES], [0.0; 9 * MAX_LANES]);
    for (rows, strip) in x.chunks(height * cols).zip(out.chunks_exact_mut(height * depth)) {
        if rows.len() < height * cols {
            eights.fill(0.0);
        }
        for (column, out) in (start..start + depth).step_by(8).zip(strip.chunks_mut(8 * height)) {
            for (eight, row) in eights.as_chunks_mut::<8>().0.iter_mut().zip(rows.chunks_exact(cols)) {
                match row[column..].first_chunk::<8>() {
                    Some(numbers) => *eight = *numbers,
                    None => eight[..cols - column].copy_from_slice(&row[column..]),
                }
            }
            // A vector may reach into the first rows of the next column, which are written after it.
            for lane in (0..height).step_by(V::N).rev() {
                for (j, numbers) in V::columns(&eights[8 * lane..], 8).into_iter().enumerate() {
                    numbers.store(&mut packed[j * height + lane..]);
                }
            }
            let (end, whole) = (out.len(), out.len() / V::N * V::N);
            for at in (0..whole).step_by(V::N) {
                V::load(&packed[at..]).store(&mut out[at..]);
            }
            out[whole..].copy_from_slice(&packed[whole..end]);
        }
    }
}

/// Fills a tile.
#[inline(always)]
pub(super) fn multiply<V: Vector, E: Eight>(weights: &Weights<'_>, packed: &Packed, tile: &mut Tile<'_>) {
    let cols = weights.cols();
    let width = 2 * V::N;
    let mut decoder = Decoder::new::<V>(weights);
    let mut panel = Aligned::zeros(width * DEPTH);
    let (height, m) = (packed.height, tile.m());
    for start in (0..cols).step_by(DEPTH) {
        let depth = DEPTH.min(cols - start);
        let strips = &packed.x[start * packed.strips * height..][m.start * depth..];
        for at in (0..tile.n().len()).step_by(width) {
            let rows = width.min(tile.n().len() - at);
            decoder.panel::<V, E>(weights, tile.n().start + at, rows, start, depth, &mut panel);
            let panel = &panel[..depth * width];
            for (i, strip) in m.clone().step_by(height).zip(strips.chunks_exact(depth * height)) {
                let rows = height.min(m.end - i);
                let target = Target { tile, first_row: i, rows, at, add: start > 0 };
                match height {
                    2 => block::<V, 2>(strip, panel, target),
                    4 => block::<V, 4>(strip, panel, target),
                    6 if V::HEIGHT >= 6 => block::<V, 6>(strip, panel, target),
                    8 if V::HEIGHT >= 8 => block::<V, 8>(strip, panel, target),
                    10 if V::HEIGHT >= 10 => block::<V, 10>(strip, panel, target),
                    12 if V::HEIGHT >= 12 => block::<V, 12>(strip, panel, target),
                    14 if V::HEIGHT >= 14 => block::<V, 14>(strip, panel, target),
                    _ => unreachable!("strips are even and at most as high as the registers allow"),
                }
            }
        }
    }
}

/// Where the sums of a block go.
struct Target<'t, 'a> {
    tile: &'t mut Tile<'a>,
    first_row: usize,
    rows: usize,
    /// The first column, counted from that of the tile.
    at: usize,
    /// Whether there are sums of earlier columns.
    add: bool,
}

/// Products of `H` rows of activations with two vectors of rows of weights.
#[inline(always)]
fn block<V: Vector, const H: usize>(strip: &[f32], panel: &[f32], target: Target<'_, '_>) {
    let mut sums = [[V::splat(0.0); 2]; H];
    for (x, w) in strip.as_chunks::<H>().0.iter().zip(panel.chunks_exact(2 * V::N)) {
        let (low, high) = (V::load(w), V::load(&w[V::N..]));
        for (sums, &x) in sums.iter_mut().zip(x) {
            let x = V::splat(x);
            sums[0] = sums[0].add_product(low, x);
            sums[1] = sums[1].add_product(high, x);
        }
    }
    for (i, sums) in sums.into_iter().take(target.rows).enumerate() {
        let results = &mut target.tile.row(target.first_row + i)[target.at..];
        if results.len() >= 2 * V::N {
            for (sum, results) in sums.into_iter().zip(results.chunks_exact_mut(V::N)) {
                if target.add { (V::load(results) + sum).store(results) } else { sum.store(results) }
            }
        } else {
            let mut lanes = [0.0; 2 * MAX_LANES];
            sums[0].store(&mut lanes);
            sums[1].store(&mut lanes[V::N..]);
            for (result, sum) in results.iter_mut().zip(lanes) {
                *result = if target.add { *result + sum } else { sum };
            }
        }
    }
}

/// Decodes panels; has room for the parameters of one.
struct Decoder {
    /// Groups of a row in a panel, at most, rounded up to whole vectors.
    stride: usize,
    /// `[row][group]`
    scales: Aligned,
    addends: Aligned,
    /// `[group][row]`
    scales_across: Aligned,
    addends_across: Aligned,
    /// Codes of 8 bits in place of those of a bank, `[row][column]`.
    unpacked: Vec<u8>,
}

impl Decoder {
    fn new<V: Vector>(weights: &Weights<'_>) -> Self {
        // One more than fits, because a panel may begin inside a group, and another, because it begins at an even one.
        let groups = DEPTH / weights.layout().group_len(weights.cols()).max(1) + 3;
        let stride = groups.next_multiple_of(16);
        let room = || Aligned::zeros(stride * V::N);
        let unpacked = vec![0; if weights.layout().bank().is_some() { V::N * DEPTH } else { 0 }];
        Self { stride, scales: room(), addends: room(), scales_across: room(), addends_across: room(), unpacked }
    }

    /// Decodes `depth` columns from `start` on of `rows` rows from `first` on; rows that are missing become zeros.
    #[inline(always)]
    fn panel<V: Vector, E: Eight>(
        &mut self,
        weights: &Weights<'_>,
        first: usize,
        rows: usize,
        start: usize,
        depth: usize,
        panel: &mut [f32],
    ) {
        for half in 0..2 {
            let skipped = half * V::N;
            let held = V::N.min(rows.saturating_sub(skipped));
            let part = weights.slice(first + skipped.min(rows), held);
            let first_group = self.parameters::<V, E>(&part, start, depth);
            let plain = nested::plain(weights.layout());
            with_kind!(V, &plain, kind => {
                self.half::<V, _>(kind, &part, first_group, start, depth, &mut panel[skipped..]);
            });
        }
    }

    /// Transposes the parameters of the groups of a panel; returns the first of them.
    #[inline(always)]
    fn parameters<V: Vector, E: Eight>(&mut self, part: &Weights<'_>, start: usize, depth: usize) -> usize {
        let layout = part.layout();
        let group = layout.group_len(part.cols()).max(1);
        // Even, because zero points come two in a byte.
        let first = start / group / 2 * 2;
        let count = (start + depth).div_ceil(group) - first;
        let padded = count.next_multiple_of(16);
        self.scales.fill(0.0);
        for r in 0..part.rows() {
            // To the end of the plane, so that whole vectors can be read: what follows a row is not looked at.
            let mut row = params::row(part.planes(), part.rows(), r);
            row.scales = &part.planes().scales[r * row.scales.len()..];
            row.addends = &part.planes().addends[r * row.addends.len()..];
            let scales = &mut self.scales[r * self.stride..][..padded];
            params::scales::<V>(layout, &row, first, scales);
            if params::has_addends(layout) {
                let addends = &mut self.addends[r * self.stride..][..padded];
                params::addends::<V, E>(layout, &row, first, scales, addends);
            }
        }
        across::<V>(&self.scales, self.stride, count, &mut self.scales_across);
        if params::has_addends(layout) {
            for addends in self.addends.chunks_exact_mut(self.stride).skip(part.rows()) {
                addends.fill(0.0);
            }
            across::<V>(&self.addends, self.stride, count, &mut self.addends_across);
        }
        first
    }

    #[inline(always)]
    fn half<V: Vector, K: Kind<V>>(
        &mut self,
        kind: K,
        part: &Weights<'_>,
        first_group: usize,
        start: usize,
        depth: usize,
        panel: &mut [f32],
    ) {
        let group = part.layout().group_len(part.cols()).max(1);
        // Codes, from which column on they are there, and the bytes of a row.
        let (codes, origin, row_bytes) = if K::BITS == 8 && part.layout().bank().is_some() {
            nested::levels(part, start..start + depth, nested::BIAS, &mut self.unpacked, DEPTH);
            (&self.unpacked[..part.rows() * DEPTH], start, DEPTH)
        } else {
            (part.planes().codes, 0, part.layout().code_stride(part.cols()))
        };
        let mut out = panel.chunks_mut(2 * V::N);
        for column in (start..start + depth).step_by(8 * K::CODES) {
            let at = (column - origin) / K::CODES * 4;
            let mut words = [0.0; 8 * MAX_LANES];
            for (words, codes) in words.as_chunks_mut::<8>().0.iter_mut().zip(codes.chunks(row_bytes)) {
                if let Some(codes) = codes[at..].first_chunk::<32>() {
                    for (word, codes) in words.iter_mut().zip(codes.as_chunks::<4>().0) {
                        *word = f32::from_bits(u32::from_le_bytes(*codes));
                    }
                } else {
                    for (word, codes) in words.iter_mut().zip(codes[at..].as_chunks::<4>().0) {
                        *word = f32::from_bits(u32::from_le_bytes(*codes));
                    }
                }
            }
            for (j, words) in V::columns(&words[..8 * V::N], 8).into_iter().enumerate() {
                let words = kind.prepare(words.bits());
                let column = column + j * K::CODES;
                if column >= start + depth {
                    break;
                }
                let g = (column / group - first_group) * V::N;
                let (scales, addends) = (V::load(&self.scales_across[g..]), V::load(&self.addends_across[g..]));
                for step in 0..K::CODES {
                    let index = u32::try_from(step).expect("fewer than 32");
                    let weights = addends.add_product(kind.level(words, index), scales);
                    let Some(out) = out.next() else { return };
                    weights.store(out);
                }
            }
        }
    }
}

/// Transposes the first `count` numbers of every lane's row.
#[inline(always)]
fn across<V: Vector>(rows: &[f32], stride: usize, count: usize, out: &mut [f32]) {
    for (first, out) in (0..count).step_by(8).zip(out.chunks_mut(8 * V::N)) {
        for (column, out) in V::columns(&rows[first..], stride).into_iter().zip(out.chunks_exact_mut(V::N)) {
            column.store(out);
        }
    }
}
