//! Encoding, as many groups at once as there are lanes.
//!
//! Groups that share a row are encoded in batches of one group per lane (see [`super::batch`]). A scale per row is the
//! one case whose groups are too long for that: there the lanes go along the row.

use super::batch::{AHEAD, MAX_GROUP, groups};
use super::kind::{Searched, Signed, Table, Unsigned};
use super::lanes::{Lanes, MAX_LANES, prefetch};
use super::{PlanesMut, reference};
use crate::fit::{self, Fit, OutOfRange};
use crate::layout::{Grouped, Levels, ROW};

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
        (Levels::Signed, 4 | 8, None, Fit::AbsMax) | (Levels::ZeroPoint, 4, None, Fit::ZeroPoint)
            if batched(layout) =>
        {
            groups::<L, Signed>(layout, fit, weights, cols, planes)
        }
        (Levels::Table(_), 4, None, Fit::AbsMax) if batched(layout) => {
            groups::<L, Table>(layout, fit, weights, cols, planes)
        }
        (Levels::Bank(_), _, _, Fit::Nested) => {
            for (r, row) in weights.chunks_exact(cols).enumerate() {
                let params = fit::nested::lanes::<L>(layout, row, None)?;
                reference::store_row(layout, &params, row, &mut planes.row(layout, cols, r));
            }
            Ok(())
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
    for (r, row) in weights.chunks_exact(cols.max(1)).enumerate() {
        reference::encode_row(layout, fit, row, &mut planes.row(layout, cols, r))?;
    }
    Ok(())
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
