//! Encoding short groups, as many at once as there are lanes.
//!
//! A batch is one group per lane: the groups are transposed on the way in, so that range, scale, offset and codes of
//! all of them are plain lane arithmetic, and a group's codes are collected into its own words. Where rows lie without
//! gaps the whole matrix is one run of groups, read and written in place. Everything else (ragged last groups, groups
//! of rows that have one, what is left of a run) is gathered lane by lane, and scattered again.

use super::kind::{Coder, Kind, LaneParams};
use super::lanes::{Lanes, MAX_LANES, prefetch};
use super::{PlanesMut, Strides};
use crate::fit::{self, Fit, OutOfRange, lanes as fits};
use crate::layout::{Float, Grouped, Levels, store_bits};

/// The longest group that is batched.
pub(crate) const MAX_GROUP: usize = 128;

/// How many weights ahead of a batch are asked for: the next page, whose first line no hardware prefetcher fetches.
pub(super) const AHEAD: usize = 1024;

/// The codes of every lane's group, in words.
type Words = [[u32; MAX_LANES]; MAX_GROUP / 4];

/// What a matrix and its layout look like to a batch.
pub(super) struct Shape<'a> {
    pub(super) layout: &'a Grouped,
    fit: Fit,
    cols: usize,
    strides: Strides,
    /// Bytes of the codes of a full group.
    group_bytes: usize,
}

/// Encodes groups of at most [`MAX_GROUP`] weights.
///
/// # Errors
/// [`OutOfRange`] when a scale or offset does not fit its stored type.
#[inline(always)]
pub(super) fn groups<L: Lanes, K: Kind>(
    layout: &Grouped,
    fit: Fit,
    weights: &[f32],
    cols: usize,
    planes: &mut PlanesMut<'_>,
) -> Result<(), OutOfRange> {
    let group = layout.group();
    let (rows, full, ragged) = (weights.len() / cols, cols / group, cols % group);
    let group_bytes = group * layout.bits() as usize / 8;
    let shape = Shape { layout, fit, cols, strides: Strides::new(layout, cols), group_bytes };
    // An odd number of 4-bit zero points leaves a gap at the end of a row of them.
    let gapless = ragged == 0 && (layout.levels() != Levels::ZeroPoint || full.is_multiple_of(2));
    let done = if gapless { K::run::<L>(&shape, weights, planes)? } else { 0 };

    // Full groups first, then the ragged ones, so that the groups of a batch have one length.
    let whole = rows * full;
    let end = if ragged > 0 { whole + rows } else { whole };
    let mut gather = Gather { padded: [0.0; MAX_GROUP * MAX_LANES], place: [(0, 0); MAX_LANES], used: 0, len: 0 };
    let mut index = done;
    while index < end {
        let (stop, len) = if index < whole { (whole, group) } else { (end, ragged) };
        gather.used = 0;
        gather.len = len;
        while index < stop && gather.used < L::N {
            let place = if index < whole { (index / full, index % full) } else { (index - whole, full) };
            gather.push(&shape, weights, place);
            index += 1;
        }
        gather.flush::<L, K>(&shape, planes)?;
    }
    Ok(())
}

/// Encodes whole batches of a matrix without gaps in place; returns how many groups that were.
///
/// `group` is at most `LONGEST`. Where both are the same constant, the weights of a batch stay in registers.
#[inline(always)]
pub(super) fn run<L: Lanes, K: Kind, const LONGEST: usize>(
    shape: &Shape<'_>,
    group: usize,
    weights: &[f32],
    planes: &mut PlanesMut<'_>,
) -> Result<usize, OutOfRange> {
    let layout = shape.layout;
    let group_bytes = group * layout.bits() as usize / 8;
    let mut words = [[0; MAX_LANES]; MAX_GROUP / 4];
    let batches = weights.chunks_exact(L::N * group).zip(planes.codes.chunks_exact_mut(L::N * group_bytes));
    let mut first = 0;
    for (weights, codes) in batches {
        let mut columns = [L::splat(0.0); LONGEST];
        for (c, eight) in columns[..group].as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *eight = L::columns(&weights[8 * c..], group);
        }
        let params = encode_columns::<L, K>(shape, &columns[..group], &mut words, weights)?;
        store_floats(layout.scale(), params.scale, &mut planes.scales[first * layout.scale().size()..]);
        if let Some(float) = layout.offset() {
            store_floats(float, params.offset, &mut planes.addends[first * float.size()..]);
        } else if layout.levels() == Levels::ZeroPoint {
            let mut zero_points = [0; MAX_LANES];
            params.zero_point.store_bytes(&mut zero_points);
            for (lane, &zero_point) in zero_points[..L::N].iter().enumerate() {
                store_bits(layout.bits(), planes.addends, first + lane, zero_point);
            }
        }
        let words = &words[..group_bytes / 4];
        for (lane, codes) in codes.chunks_exact_mut(group_bytes).enumerate() {
            store_words(words, lane, codes);
        }
        first += L::N;
    }
    Ok(first)
}

/// A batch that is put together lane by lane.
struct Gather {
    /// The weights of each lane, [`MAX_GROUP`] apart.
    padded: [f32; MAX_GROUP * MAX_LANES],
    /// Row, and group in the row.
    place: [(usize, usize); MAX_LANES],
    /// Lanes in use.
    used: usize,
    /// Weights of each group.
    len: usize,
}

impl Gather {
    #[inline(always)]
    fn push(&mut self, shape: &Shape<'_>, weights: &[f32], (row, g): (usize, usize)) {
        let start = row * shape.cols + g * shape.layout.group();
        self.padded[self.used * MAX_GROUP..][..self.len].copy_from_slice(&weights[start..][..self.len]);
        self.place[self.used] = (row, g);
        self.used += 1;
    }

    /// Encodes the groups that are there.
    #[inline(always)]
    fn flush<L: Lanes, K: Kind>(&mut self, shape: &Shape<'_>, planes: &mut PlanesMut<'_>) -> Result<(), OutOfRange> {
        // Lanes without a group repeat the first, so that they can fail no check of their own.
        for lane in self.used..L::N {
            self.padded.copy_within(..self.len, lane * MAX_GROUP);
        }
        let Shape { layout, strides, group_bytes, .. } = shape;
        let mut columns = [L::splat(0.0); MAX_GROUP];
        for (c, eight) in columns.as_chunks_mut::<8>().0.iter_mut().take(self.len.div_ceil(8)).enumerate() {
            *eight = L::columns(&self.padded[8 * c..], MAX_GROUP);
        }
        let mut words = [[0; MAX_LANES]; MAX_GROUP / 4];
        let params = encode_columns::<L, K>(shape, &columns[..self.len], &mut words, &[])?;
        let words = &words[..(self.len * layout.bits() as usize).div_ceil(32)];

        let (mut scales, mut addends) = ([0; 4 * MAX_LANES], [0; 4 * MAX_LANES]);
        let size = layout.scale().size();
        store_floats(layout.scale(), params.scale, &mut scales);
        if let Some(float) = layout.offset() {
            store_floats(float, params.offset, &mut addends);
        } else {
            params.zero_point.store_bytes(&mut addends);
        }
        for (lane, &(row, g)) in self.place[..self.used].iter().enumerate() {
            planes.scales[row * strides.scales + g * size..][..size].copy_from_slice(&scales[lane * size..][..size]);
            let row_addends = &mut planes.addends[row * strides.addends..][..strides.addends];
            if let Some(float) = layout.offset() {
                let size = float.size();
                row_addends[g * size..][..size].copy_from_slice(&addends[lane * size..][..size]);
            } else if layout.levels() == Levels::ZeroPoint {
                store_bits(layout.bits(), row_addends, g, addends[lane]);
            }
            store_words(words, lane, &mut planes.codes[row * strides.codes + g * group_bytes..][..4 * words.len()]);
        }
        Ok(())
    }
}

/// Chooses the parameters of a batch and collects its codes.
#[inline(always)]
fn encode_columns<L: Lanes, K: Kind>(
    shape: &Shape<'_>,
    columns: &[L],
    words: &mut Words,
    weights: &[f32],
) -> Result<LaneParams<L>, OutOfRange> {
    let layout = shape.layout;
    let params = if K::SEARCHES {
        fit::search::lanes(layout, columns)?
    } else {
        let (min, max) = range(columns);
        fits::params(shape.fit, layout, min, max)?
    };
    let coder = Coder::new(layout, &params);
    // Powers of the number of codes add up to a half word in f32 without rounding.
    if layout.bits() == 4 {
        let (eights, rest) = columns.as_chunks::<8>();
        for (c, (w, word)) in eights.iter().zip(words.iter_mut()).enumerate() {
            fetch_ahead::<L>(weights, columns.len(), 8 * c, 8);
            let low = pair::<L, K>(&coder, w[0], w[1], 16.0) + pair::<L, K>(&coder, w[2], w[3], 16.0) * L::splat(256.0);
            let high =
                pair::<L, K>(&coder, w[4], w[5], 16.0) + pair::<L, K>(&coder, w[6], w[7], 16.0) * L::splat(256.0);
            L::store_words(low, high, word);
        }
        if !rest.is_empty() {
            let mut halves = [L::splat(0.0); 2];
            for (j, &w) in rest.iter().enumerate().rev() {
                halves[j / 4] = halves[j / 4] * L::splat(16.0) + K::codes(&coder, w);
            }
            L::store_words(halves[0], halves[1], &mut words[eights.len()]);
        }
    } else {
        let (fours, rest) = columns.as_chunks::<4>();
        for (c, (w, word)) in fours.iter().zip(words.iter_mut()).enumerate() {
            fetch_ahead::<L>(weights, columns.len(), 4 * c, 4);
            L::store_words(pair::<L, K>(&coder, w[0], w[1], 256.0), pair::<L, K>(&coder, w[2], w[3], 256.0), word);
        }
        if !rest.is_empty() {
            let mut halves = [L::splat(0.0); 2];
            for (j, &w) in rest.iter().enumerate().rev() {
                halves[j / 2] = halves[j / 2] * L::splat(256.0) + K::codes(&coder, w);
            }
            L::store_words(halves[0], halves[1], &mut words[fours.len()]);
        }
    }
    Ok(params)
}

/// Asks for a part of the next batch: as much as `columns` columns hold, while those of this batch become codes. Asking
/// while a batch is loaded would fill the buffers that its own loads wait in.
#[inline(always)]
fn fetch_ahead<L: Lanes>(weights: &[f32], group: usize, column: usize, columns: usize) {
    for line in (0..columns * L::N).step_by(16) {
        prefetch(weights, AHEAD.max(L::N * group) + column * L::N + line);
    }
}

/// The codes of two weights in one number; a closure would not be inlined into the instruction set of its caller.
#[inline(always)]
fn pair<L: Lanes, K: Kind>(coder: &Coder<L>, low: L, high: L, base: f32) -> L {
    K::codes(coder, low) + K::codes(coder, high) * L::splat(base)
}

/// Least and greatest weight of every lane's group, a negative zero counted as zero.
#[inline(always)]
pub(crate) fn range<L: Lanes>(columns: &[L]) -> (L, L) {
    // Four of each, because one would wait for itself at every column.
    let (mut min, mut max) = ([columns[0]; 4], [columns[0]; 4]);
    let (fours, rest) = columns.as_chunks::<4>();
    for four in fours {
        for i in 0..4 {
            min[i] = four[i].min(min[i]);
            max[i] = four[i].max(max[i]);
        }
    }
    for &w in rest {
        min[0] = w.min(min[0]);
        max[0] = w.max(max[0]);
    }
    let zero = L::splat(0.0);
    (min[0].min(min[1]).min(min[2].min(min[3])) + zero, max[0].max(max[1]).max(max[2].max(max[3])) + zero)
}

/// Writes a parameter of every lane, one after the other.
#[inline(always)]
fn store_floats<L: Lanes>(float: Float, values: L, plane: &mut [u8]) {
    if float == Float::F16 {
        values.store_f16(plane);
    } else {
        let mut lanes = [0.0; MAX_LANES];
        values.store(&mut lanes);
        for (to, x) in plane.as_chunks_mut::<4>().0[..L::N].iter_mut().zip(lanes) {
            *to = x.to_le_bytes();
        }
    }
}

/// Writes the words of one lane's group.
#[inline(always)]
fn store_words(words: &[[u32; MAX_LANES]], lane: usize, codes: &mut [u8]) {
    for (to, word) in codes.as_chunks_mut::<4>().0.iter_mut().zip(words) {
        *to = word[lane].to_le_bytes();
    }
}
