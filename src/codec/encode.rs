//! Encoding, as many groups at once as there are lanes.
//!
//! A batch is one group per lane: the groups are transposed on the way in, so that range, scale, offset and codes of
//! all of them are plain lane arithmetic, and a group's codes are collected into its own words. Whole rows are batched
//! together where they lie without gaps; ragged last groups are batched across rows. A scale per row is the one case
//! whose groups are too long for that: there the lanes go along the row.

#![expect(unsafe_code, reason = "the bounds of a batch are checked once, not at every load")]

use super::lanes::{Lanes, MAX_LANES, prefetch};
use super::{PlanesMut, Strides, reference};
use crate::fit::{self, Fit, OutOfRange, lanes as fits};
use crate::layout::{Float, Grouped, Levels, ROW, store_bits};

/// The longest group that is batched.
pub(crate) const MAX_GROUP: usize = 128;

/// Encodes consecutive rows of finite weights into zeroed planes: the same bytes as the reference.
///
/// # Errors
/// [`OutOfRange`] when a scale or offset does not fit its stored type.
#[inline(always)]
pub(super) fn encode<L: Lanes>(
    layout: &Grouped,
    fit: Fit,
    weights: &[f32],
    cols: usize,
    planes: &mut PlanesMut<'_>,
) -> Result<(), OutOfRange> {
    if cols == 0 {
        return Ok(());
    }
    match (layout.levels(), layout.bits(), layout.offset(), fit) {
        (Levels::Signed, 8, None, Fit::AbsMax) if layout.group() == ROW => rows::<L>(layout, weights, cols, planes),
        (Levels::Unsigned, 4, Some(_), Fit::MinMax) if batched(layout) => {
            groups::<L, Unsigned>(layout, fit, weights, cols, planes)
        }
        (Levels::Unsigned, 4, Some(_), Fit::Search) if batched(layout) => {
            groups::<L, Searched>(layout, fit, weights, cols, planes)
        }
        (Levels::Signed, 4 | 8, None, Fit::AbsMax) if batched(layout) => {
            groups::<L, Signed>(layout, fit, weights, cols, planes)
        }
        (Levels::ZeroPoint, 4, None, Fit::ZeroPoint) if batched(layout) => {
            groups::<L, Signed>(layout, fit, weights, cols, planes)
        }
        (Levels::Table(_), 4, None, Fit::AbsMax) if batched(layout) => {
            groups::<L, Table>(layout, fit, weights, cols, planes)
        }
        _ => reference_rows(layout, fit, weights, cols, planes),
    }
}

fn batched(layout: &Grouped) -> bool {
    layout.group() != ROW && layout.group() <= MAX_GROUP && layout.group().is_multiple_of(8)
}

/// The rows of a layout without a fast path.
pub(super) fn reference_rows(
    layout: &Grouped,
    fit: Fit,
    weights: &[f32],
    cols: usize,
    planes: &mut PlanesMut<'_>,
) -> Result<(), OutOfRange> {
    let strides = Strides::new(layout, cols);
    for (r, row) in weights.chunks_exact(cols.max(1)).enumerate() {
        let mut row_planes = PlanesMut {
            codes: &mut planes.codes[r * strides.codes..][..strides.codes],
            scales: &mut planes.scales[r * strides.scales..][..strides.scales],
            addends: &mut planes.addends[r * strides.addends..][..strides.addends],
        };
        reference::encode_row(layout, fit, row, &mut row_planes)?;
    }
    Ok(())
}

/// What is chosen for the group of every lane; all numbers already rounded to their stored type.
#[derive(Clone, Copy)]
pub(crate) struct LaneParams<L: Lanes> {
    pub(crate) scale: L,
    pub(crate) offset: L,
    pub(crate) zero_point: L,
}

impl<L: Lanes> LaneParams<L> {
    /// What weights are divided by: infinity for a zero scale, so that every code becomes that of level zero.
    #[inline(always)]
    pub(crate) fn divisor(&self) -> L {
        L::select(self.scale.eq(L::splat(0.0)), L::splat(f32::INFINITY), self.scale)
    }
}

/// How weights of one kind of levels become codes.
trait Kind {
    /// Whether the fit looks at every weight and not only at the range.
    const SEARCHES: bool = false;

    /// The codes of one weight per lane, as integers in f32.
    fn codes<L: Lanes>(coder: &Coder<L>, w: L) -> L;
}

/// Everything that the codes of a batch depend on.
struct Coder<L: Lanes> {
    divisor: L,
    offset: L,
    zero: L,
    /// Least and greatest level, for codes that are clamped before they are rounded.
    least: L,
    greatest: L,
    thresholds: [f32; 16],
}

struct Unsigned;
struct Searched;
struct Signed;
struct Table;

impl Kind for Unsigned {
    #[inline(always)]
    fn codes<L: Lanes>(coder: &Coder<L>, w: L) -> L {
        let t = (w - coder.offset) / coder.divisor;
        t.max(L::splat(0.0)).min(L::splat(15.0)).nearest_positive()
    }
}

impl Kind for Searched {
    const SEARCHES: bool = true;

    #[inline(always)]
    fn codes<L: Lanes>(coder: &Coder<L>, w: L) -> L {
        Unsigned::codes(coder, w)
    }
}

impl Kind for Signed {
    #[inline(always)]
    fn codes<L: Lanes>(coder: &Coder<L>, w: L) -> L {
        (w / coder.divisor).max(coder.least).min(coder.greatest).nearest() + coder.zero
    }
}

impl Kind for Table {
    #[inline(always)]
    fn codes<L: Lanes>(coder: &Coder<L>, w: L) -> L {
        (w / coder.divisor).count_above(&coder.thresholds)
    }
}

/// Where the groups of a batch lie: one per lane, the last one repeated where there are fewer.
struct Batch {
    /// Groups that are there.
    used: usize,
    /// Columns of each.
    len: usize,
    /// First weight.
    starts: [usize; MAX_LANES],
    /// First byte of the codes.
    code_at: [usize; MAX_LANES],
    /// Row, and group in the row.
    place: [(usize, usize); MAX_LANES],
    /// Whether the groups follow each other in every plane.
    contiguous: bool,
}

impl Batch {
    /// Loads the first `len` columns of the groups; `len` is a multiple of eight.
    #[inline(always)]
    fn load<L: Lanes>(&self, src: &[f32], len: usize, columns: &mut [L; MAX_GROUP]) {
        let last = self.starts[..L::N].iter().fold(0, |last, &start| if start > last { start } else { last });
        assert!(last + len <= src.len(), "a group ends inside the weights");
        for (c, eight) in columns[..len].as_chunks_mut::<8>().0.iter_mut().enumerate() {
            // SAFETY: `8 * c + 8 <= len`, and the assertion holds for the last of the starts.
            *eight = unsafe { L::columns(src, &self.starts, 8 * c) };
        }
    }
}

/// How many weights ahead of a batch are asked for: the next page, whose first line no hardware prefetcher fetches.
const AHEAD: usize = 1024;

/// Encodes groups of at most [`MAX_GROUP`] weights.
#[inline(always)]
fn groups<L: Lanes, K: Kind>(
    layout: &Grouped,
    fit: Fit,
    weights: &[f32],
    cols: usize,
    planes: &mut PlanesMut<'_>,
) -> Result<(), OutOfRange> {
    let group = layout.group();
    let (rows, full, ragged) = (weights.len() / cols, cols / group, cols % group);
    let strides = Strides::new(layout, cols);
    let group_bytes = group * layout.bits() as usize / 8;
    let mut columns = [L::splat(0.0); MAX_GROUP];
    let mut words = [[0; MAX_LANES]; MAX_GROUP / 4];
    let mut batch = Batch {
        used: 0,
        len: group,
        starts: [0; MAX_LANES],
        code_at: [0; MAX_LANES],
        place: [(0, 0); MAX_LANES],
        contiguous: ragged == 0,
    };

    let (mut row, mut g) = (0, 0);
    let mut left = rows * full;
    let mut first = 0;
    while left > 0 {
        batch.used = left.min(L::N);
        if batch.contiguous && layout.levels() != Levels::ZeroPoint {
            for lane in 0..L::N {
                let index = first + lane.min(batch.used - 1);
                batch.starts[lane] = index * group;
                batch.code_at[lane] = index * group_bytes;
                batch.place[lane] = (0, index);
            }
        } else {
            for lane in 0..L::N {
                batch.starts[lane] = row * cols + g * group;
                batch.code_at[lane] = row * strides.codes + g * group_bytes;
                batch.place[lane] = (row, g);
                if lane + 1 < batch.used {
                    g += 1;
                    (row, g) = if g == full { (row + 1, 0) } else { (row, g) };
                }
            }
            g += 1;
            (row, g) = if g == full { (row + 1, 0) } else { (row, g) };
        }
        for line in (0..L::N * group).step_by(16) {
            prefetch(weights, batch.starts[0] + AHEAD.max(L::N * group) + line);
        }
        batch.load(weights, group, &mut columns);
        encode_batch::<L, K>(layout, fit, &batch, &columns, &strides, &mut words, planes)?;
        first += batch.used;
        left -= batch.used;
    }

    if ragged > 0 {
        batch.len = ragged;
        batch.contiguous = false;
        let mut padded = [0.0; MAX_GROUP * MAX_LANES];
        for first in (0..rows).step_by(L::N) {
            batch.used = (rows - first).min(L::N);
            for lane in 0..L::N {
                let row = first + lane.min(batch.used - 1);
                batch.starts[lane] = lane * MAX_GROUP;
                batch.code_at[lane] = row * strides.codes + full * group_bytes;
                batch.place[lane] = (row, full);
                padded[lane * MAX_GROUP..][..ragged].copy_from_slice(&weights[row * cols + full * group..][..ragged]);
            }
            batch.load(&padded, group, &mut columns);
            encode_batch::<L, K>(layout, fit, &batch, &columns, &strides, &mut words, planes)?;
        }
    }
    Ok(())
}

/// The codes of every lane's group, in words.
type Words = [[u32; MAX_LANES]; MAX_GROUP / 4];

/// Encodes one batch, whose weights are in `columns`.
#[inline(always)]
fn encode_batch<L: Lanes, K: Kind>(
    layout: &Grouped,
    fit: Fit,
    batch: &Batch,
    columns: &[L; MAX_GROUP],
    strides: &Strides,
    words: &mut Words,
    planes: &mut PlanesMut<'_>,
) -> Result<(), OutOfRange> {
    let columns = &columns[..batch.len];
    let params = if K::SEARCHES {
        fit::search::lanes(layout, columns)?
    } else {
        let (mut min, mut max) = (L::splat(f32::INFINITY), L::splat(f32::NEG_INFINITY));
        for &w in columns {
            min = w.min(min);
            max = w.max(max);
        }
        fits::params(fit, layout, min + L::splat(0.0), max + L::splat(0.0))?
    };
    store_params(layout, batch, &params, strides, planes);

    let zero = params.zero_point
        + L::splat(match layout.levels() {
            Levels::Signed => f32::from(layout.zero_code(0)),
            _ => 0.0,
        });
    let coder = Coder {
        divisor: params.divisor(),
        offset: params.offset,
        zero,
        least: L::splat(f32::from(reference::min_code(layout))) - zero,
        greatest: L::splat(f32::from(layout.max_code())) - zero,
        thresholds: thresholds(layout),
    };
    if layout.bits() == 4 {
        for (at, weights) in columns.chunks(8).enumerate() {
            let (mut low, mut high) = (L::splat(0.0), L::splat(0.0));
            if let Ok(weights) = <&[L; 8]>::try_from(weights) {
                for j in (0..4).rev() {
                    low = low * L::splat(16.0) + K::codes(&coder, weights[j]);
                    high = high * L::splat(16.0) + K::codes(&coder, weights[j + 4]);
                }
            } else {
                for (j, &w) in weights.iter().enumerate().rev() {
                    let half = if j < 4 { &mut low } else { &mut high };
                    *half = *half * L::splat(16.0) + K::codes(&coder, w);
                }
            }
            L::store_words(low, high, &mut words[at]);
        }
    } else {
        for (at, weights) in columns.chunks(4).enumerate() {
            let (mut low, mut high) = (L::splat(0.0), L::splat(0.0));
            for (j, &w) in weights.iter().enumerate().rev() {
                let half = if j < 2 { &mut low } else { &mut high };
                *half = *half * L::splat(256.0) + K::codes(&coder, w);
            }
            L::store_words(low, high, &mut words[at]);
        }
    }
    place(&words[..(batch.len * layout.bits() as usize).div_ceil(32)], batch, planes.codes);
    Ok(())
}

/// Writes the words of every lane's group, which follow each other in its plane.
#[inline(always)]
fn place(words: &[[u32; MAX_LANES]], batch: &Batch, codes: &mut [u8]) {
    if let ([words], true) = (words, batch.contiguous) {
        let bytes = &mut codes[batch.code_at[0]..][..4 * batch.used];
        for (to, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(words) {
            *to = word.to_le_bytes();
        }
    } else {
        for (lane, &start) in batch.code_at[..batch.used].iter().enumerate() {
            let bytes = &mut codes[start..][..4 * words.len()];
            for (to, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(words) {
                *to = word[lane].to_le_bytes();
            }
        }
    }
}

/// Writes the parameters of every lane's group.
#[inline(always)]
fn store_params<L: Lanes>(
    layout: &Grouped,
    batch: &Batch,
    params: &LaneParams<L>,
    strides: &Strides,
    planes: &mut PlanesMut<'_>,
) {
    store_floats(layout.scale(), batch, params.scale, strides.scales, planes.scales);
    if let Some(float) = layout.offset() {
        store_floats(float, batch, params.offset, strides.addends, planes.addends);
    } else if layout.levels() == Levels::ZeroPoint {
        let mut zero_points = [0; MAX_LANES];
        params.zero_point.store_bytes(&mut zero_points);
        for (&zero_point, &(row, g)) in zero_points[..batch.used].iter().zip(&batch.place) {
            store_bits(layout.bits(), &mut planes.addends[row * strides.addends..], g, zero_point);
        }
    }
}

#[inline(always)]
fn store_floats<L: Lanes>(float: Float, batch: &Batch, values: L, stride: usize, plane: &mut [u8]) {
    let size = float.size();
    let mut bytes = [0; 4 * MAX_LANES];
    if float == Float::F16 {
        values.store_f16(&mut bytes);
    } else {
        let mut lanes = [0.0; MAX_LANES];
        values.store(&mut lanes);
        for (to, x) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(lanes) {
            *to = x.to_le_bytes();
        }
    }
    if batch.contiguous {
        let (row, g) = batch.place[0];
        plane[row * stride + g * size..][..batch.used * size].copy_from_slice(&bytes[..batch.used * size]);
    } else {
        for (bytes, &(row, g)) in bytes.chunks_exact(size).zip(&batch.place[..batch.used]) {
            plane[row * stride + g * size..][..size].copy_from_slice(bytes);
        }
    }
}

/// The fifteen thresholds between the levels of a table.
fn thresholds(layout: &Grouped) -> [f32; 16] {
    let mut thresholds = [f32::INFINITY; 16];
    if let Levels::Table(table) = layout.levels() {
        for (i, threshold) in thresholds[..15].iter_mut().enumerate() {
            *threshold = reference::threshold(table, i);
        }
    }
    thresholds
}

/// Encodes rows that have one scale each, signed 8-bit codes, lanes along the row.
#[inline(always)]
fn rows<L: Lanes>(
    layout: &Grouped,
    weights: &[f32],
    cols: usize,
    planes: &mut PlanesMut<'_>,
) -> Result<(), OutOfRange> {
    let stride = layout.code_stride(cols);
    for (r, row) in weights.chunks_exact(cols).enumerate() {
        let (min, max) = min_max::<L>(row);
        let params = fit::range_params(Fit::AbsMax, layout, min, max)?;
        layout.scale().store(planes.scales, r, params.scale);
        let codes = &mut planes.codes[r * stride..][..cols];
        let divisor = if params.scale == 0.0 { f32::INFINITY } else { params.scale };
        let (vectors, tail) = (row.chunks_exact(L::N), row.chunks_exact(L::N).remainder());
        for (weights, codes) in vectors.zip(codes.chunks_exact_mut(L::N)) {
            let t = (L::load(weights) / L::splat(divisor)).max(L::splat(-127.0)).min(L::splat(127.0));
            (t.nearest() + L::splat(128.0)).store_bytes(codes);
        }
        let done = cols - tail.len();
        for (&w, code) in tail.iter().zip(&mut codes[done..]) {
            *code = reference::code(layout, &params, w);
        }
    }
    Ok(())
}

/// Least and greatest weight, a negative zero counted as zero.
#[inline(always)]
fn min_max<L: Lanes>(row: &[f32]) -> (f32, f32) {
    let mut min = [L::splat(f32::INFINITY); 4];
    let mut max = [L::splat(f32::NEG_INFINITY); 4];
    let mut chunks = row.chunks_exact(4 * L::N);
    for chunk in &mut chunks {
        for line in (0..4 * L::N).step_by(16) {
            prefetch(chunk, AHEAD + line);
        }
        for (i, weights) in chunk.chunks_exact(L::N).enumerate() {
            let w = L::load(weights);
            min[i] = w.min(min[i]);
            max[i] = w.max(max[i]);
        }
    }
    let mut ends = [0.0; 8 * MAX_LANES];
    for i in 0..4 {
        min[i].store(&mut ends[2 * i * L::N..]);
        max[i].store(&mut ends[(2 * i + 1) * L::N..]);
    }
    let (mut least, mut greatest) = fit::min_max(chunks.remainder());
    for pair in ends[..8 * L::N].chunks_exact(2 * L::N) {
        for lane in 0..L::N {
            least = if pair[lane] < least { pair[lane] } else { least };
            greatest = if pair[lane + L::N] > greatest { pair[lane + L::N] } else { greatest };
        }
    }
    (least + 0.0, greatest + 0.0)
}
