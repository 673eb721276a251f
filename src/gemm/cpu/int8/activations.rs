//! Activations rounded to 8 bits, and the orders in which kernels read them; made once for every product.

use super::lanes::{Lanes, MAX_LANES};
use crate::gemm::ACT_BLOCK;
use crate::gemm::cpu::nested;
use crate::layout::{Grouped, Levels};

/// The widest run of columns that a kernel reads at once: codes are zero up to a multiple of it.
const PADDING: usize = 8 * MAX_LANES;

/// `1.5 * 2^23`: the lowest byte of a number of less than 128 added to it is its nearest integer, ties to even.
const ROUNDER: f32 = 12_582_912.0;

/// Activations as integers and one scale for each [`ACT_BLOCK`] columns of a row.
pub(super) struct Rounded {
    /// Rows.
    pub(super) m: usize,
    /// Columns.
    pub(super) cols: usize,
    /// Columns with padding.
    pub(super) stride: usize,
    /// `round(x / scale)`, rows of `stride`.
    pub(super) codes: Vec<i8>,
    /// `max|x| / 127`, or NaN for a block with a number that is not finite; rows of `stride / ACT_BLOCK`.
    pub(super) scales: Vec<f32>,
}

impl Rounded {
    /// Zeroed: to be filled row by row with [`round_row`].
    pub(super) fn new(m: usize, cols: usize) -> Self {
        let stride = cols.next_multiple_of(PADDING);
        Self { m, cols, stride, codes: vec![0; m * stride], scales: vec![0.0; m * stride / ACT_BLOCK] }
    }

    /// The codes of a row.
    pub(super) fn row(&self, i: usize) -> &[i8] {
        &self.codes[i * self.stride..][..self.stride]
    }

    /// The scales of a row.
    pub(super) fn row_scales(&self, i: usize) -> &[f32] {
        &self.scales[i * self.stride / ACT_BLOCK..][..self.stride / ACT_BLOCK]
    }

    /// The sums of the rounded activations of row `i` over each group: exact, rounded once.
    pub(super) fn group_sums(&self, i: usize, group: usize, sums: &mut [f32]) {
        let mut eights = self.row(i).as_chunks::<8>().0.iter();
        let mut scales = self.row_scales(i).iter().flat_map(|&scale| [f64::from(scale); ACT_BLOCK / 8]);
        for sum in sums {
            let mut exact = 0.0;
            for (eight, scale) in eights.by_ref().zip(scales.by_ref()).take(group.div_ceil(8)) {
                exact += scale * f64::from(eight.iter().map(|&x| i32::from(x)).sum::<i32>());
            }
            #[expect(clippy::cast_possible_truncation, reason = "the one rounding of a sum")]
            let rounded = exact as f32;
            *sum = rounded;
        }
    }
}

/// Rounds one row; what the codes and scales have beyond it stays as it is.
#[inline(always)]
pub(super) fn round_row(x: &[f32], codes: &mut [i8], scales: &mut [f32]) {
    for ((x, codes), scale) in x.chunks(ACT_BLOCK).zip(codes.chunks_mut(ACT_BLOCK)).zip(scales) {
        if let (Ok(x), Ok(codes)) = (x.try_into(), codes.try_into()) {
            *scale = round_block(x, codes);
        } else {
            let (mut padded, mut rounded) = ([0.0; ACT_BLOCK], [0; ACT_BLOCK]);
            padded[..x.len()].copy_from_slice(x);
            *scale = round_block(&padded, &mut rounded);
            codes.copy_from_slice(&rounded[..codes.len()]);
        }
    }
}

/// Rounds a block and returns its scale.
#[inline(always)]
fn round_block(x: &[f32; ACT_BLOCK], codes: &mut [i8; ACT_BLOCK]) -> f32 {
    // Magnitudes order as integers do, and NaN is above them all.
    let max = x.iter().fold(0, |max, v| (v.to_bits() & 0x7fff_ffff).max(max));
    let scale = if max < f32::INFINITY.to_bits() { f32::from_bits(max) / 127.0 } else { f32::NAN };
    if scale > 0.0 {
        for (code, v) in codes.iter_mut().zip(x) {
            *code = ((v / scale).clamp(-127.0, 127.0) + ROUNDER).to_bits().to_le_bytes()[0].cast_signed();
        }
    } else {
        codes.fill(0);
    }
    scale
}

/// What a level is less than its code, where all groups have the same; one where it is a number of the group.
pub(super) fn zero(layout: &Grouped) -> i32 {
    match layout.levels() {
        Levels::Unsigned | Levels::Table(_) => 0,
        Levels::Signed => i32::from(layout.zero_code(0)),
        Levels::Bank(_) => i32::from(nested::BIAS),
        Levels::ZeroPoint => 1,
    }
}

/// Rows of activations for the kernel of few rows, in tiles of [`ROWS`]. A tile has for each `8 N` columns and row a
/// record, which is vectors of `N` words:
///
/// | vector | lane `l` |
/// |---|---|
/// | first, second | the columns `8l ..+ 8` that [`Lanes::nibbles`] or [`Lanes::octets`] puts there |
/// | scale | that of the columns |
/// | start | `-zero · Σ` of the columns' codes: what turns sums over codes into sums over levels |
pub(super) struct Records {
    words: Vec<u32>,
    first: usize,
    row: usize,
    /// Sums over groups, in rows of `groups`; empty where the layout has no offsets.
    pub(super) sums: Vec<f32>,
}

/// Rows of activations that are multiplied at once.
pub(super) const ROWS: usize = 4;

impl Records {
    /// Lays out the rows for vectors of `L` and codes of the layout.
    #[inline(always)]
    pub(super) fn new<L: Lanes>(x: &Rounded, layout: &Grouped) -> Self {
        let row = x.cols.div_ceil(8 * L::N) * 4 * L::N;
        // Vectors that straddle two cache lines cost two loads.
        let mut words = vec![0; x.m * row + MAX_LANES];
        let first = words.as_ptr().align_offset(4 * MAX_LANES).min(MAX_LANES);
        let zero = zero(layout);
        for i in 0..x.m {
            let tile = i / ROWS * ROWS;
            let rows = ROWS.min(x.m - tile);
            let records = words[first + tile * row..][..rows * row].chunks_exact_mut(4 * L::N);
            let columns = x.row(i).chunks_exact(8 * L::N).zip(x.row_scales(i).chunks(8 * L::N / ACT_BLOCK));
            for (record, (codes, scales)) in records.skip(i - tile).step_by(rows).zip(columns) {
                let (bytes, floats) = record.split_at_mut(2 * L::N);
                let (even, odd) = bytes.split_at_mut(L::N);
                let (scale, start) = floats.split_at_mut(L::N);
                for (l, x) in codes.as_chunks::<8>().0.iter().enumerate() {
                    let [a, b, c, d, e, f, g, h] = x.map(i8::cast_unsigned);
                    let (first, second) =
                        if layout.bits() == 4 { ([a, c, e, g], [b, d, f, h]) } else { ([a, b, c, d], [e, f, g, h]) };
                    even[l] = u32::from_le_bytes(first);
                    odd[l] = u32::from_le_bytes(second);
                    scale[l] = scales[8 * l / ACT_BLOCK].to_bits();
                    start[l] = (-zero * x.iter().map(|&x| i32::from(x)).sum::<i32>()).cast_unsigned();
                }
            }
        }
        let groups = if layout.offset().is_some() { layout.groups(x.cols) } else { 0 };
        let mut sums = vec![0.0; x.m * groups];
        for (i, sums) in sums.chunks_exact_mut(groups.max(1)).enumerate() {
            x.group_sums(i, layout.group_len(x.cols), sums);
        }
        Self { words, first, row, sums }
    }

    /// The records of the tile of `count` rows that row `first` starts.
    pub(super) fn tile(&self, first: usize, count: usize) -> &[u32] {
        &self.words[self.first + first * self.row..][..count * self.row]
    }
}
