//! One tensor with extra planes: in memory as a whole, since outliers and column scales are chosen for all of it at once.

use half::f16;
use rayon::prelude::*;

use super::encode::Misfit;
use super::fitting::Fitting;
use super::rated::{Loaded, load};
use super::{BLOCK_BYTES, Nonfinite, TensorReport, transposed};
use crate::artifact::Writer;
use crate::artifact::writer::{Prepared, TensorWriter, Whole};
use crate::codec::extra::{self, ExtraPlanes, Extras, Outlier};
use crate::codec::{self, Planes, PlanesMut};
use crate::error::{Error, Result, try_zeroed};
use crate::fit::{OutOfRange, awq, outliers};
use crate::measure::Distance;
use crate::source::Source;

/// Writes a tensor with the extra planes that its report plans; what it became is put into `done`.
pub(super) fn encode(
    source: &Source,
    index: usize,
    done: &mut TensorReport,
    fitting: &Fitting,
    nonfinite: Nonfinite,
    writer: &Writer,
    tick: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<Result<TensorWriter, Misfit>> {
    let tensor = &source.tensors()[index];
    let codec = done.codec;
    let layout = codec.grouped()?;
    let too_large = |_| Error::invalid(format!("tensor '{}' is larger than memory", done.name));
    // The second half of the work is quantizing.
    let Loaded { weights, rows, cols, repaired } = match load(source, index, nonfinite, &mut |bytes| tick(bytes / 2))? {
        Ok(loaded) => loaded,
        Err(misfit) => return Ok(Err(misfit)),
    };
    let wanted = usize::try_from(done.extras.outliers).map_err(too_large)?;
    let places = outliers::choose(&weights, cols, wanted, fitting.importance().map(|i| i.columns()));
    let chosen = match fitting {
        Fitting::Awq(inputs) => {
            let matrix = awq::Matrix { layout, fit: codec.fit, weights: &weights, cols, outliers: &places };
            match awq::choose(&matrix, inputs) {
                Ok(chosen) => Some(chosen),
                Err(OutOfRange) => return Ok(Err(Misfit::OutOfRange)),
            }
        }
        _ => None,
    };
    let column_scales = chosen.as_ref().and_then(|chosen| chosen.column_scales.as_deref());
    let own;
    let scaled = match (&chosen, fitting) {
        (Some(chosen), Fitting::Awq(inputs)) => {
            own = if chosen.searched {
                Fitting::Weighted(awq::scaled_importance(&inputs.importance, column_scales))
            } else {
                Fitting::Codec
            };
            &own
        }
        _ => fitting,
    };
    let mut fitted = weights.clone();
    awq::prepare(&mut fitted, cols, layout.group_len(cols).max(1), column_scales, &places);
    let mut planes = Vec::new();
    for (plane, bytes) in codec.layout.plane_bytes(tensor.info().dtype(), rows as u64, cols as u64)? {
        let bytes = usize::try_from(bytes).map_err(too_large)?;
        planes.push(try_zeroed(bytes, || format!("plane {}", plane.name()))?);
    }
    let source_bytes = tensor.info().bytes();
    let per_task = scaled.rows_per_task(cols);
    let block = (usize::try_from(BLOCK_BYTES / 4).unwrap_or(1) / cols.max(1) / per_task).max(1);
    let tasks: Vec<_> = PlanesMut::new(layout, &mut planes)
        .chunks(layout, cols, rows, per_task)
        .into_iter()
        .zip(fitted.chunks((per_task * cols).max(1)))
        .collect();
    let mut tasks = tasks.into_iter();
    let mut left = rows.div_ceil(per_task);
    let total = left.max(1) as u64;
    while left > 0 {
        // A signal is seen between two blocks.
        let some: Vec<_> = tasks.by_ref().take(block).collect();
        left -= some.len().min(left);
        let encoded: Result<(), OutOfRange> = some
            .into_par_iter()
            .try_for_each(|(mut planes, weights)| scaled.encode_rows(layout, codec.fit, weights, cols, &mut planes));
        if encoded == Err(OutOfRange) {
            return Ok(Err(Misfit::OutOfRange));
        }
        tick(source_bytes / 2 + (source_bytes - source_bytes / 2) * (total - left as u64) / total)?;
    }
    drop(tasks);
    let slices: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
    let mut decoded = fitted;
    let target = if let Fitting::Gptq(..) = scaled { Some(decoded.clone()) } else { None };
    codec::decode_planes(layout, &Planes::new(layout, &slices), cols, &mut decoded);
    let mut extra_planes = extra::planes(rows, cols, column_scales, &[])?;
    let extra_slices: Vec<&[u8]> = extra_planes.iter().map(Vec::as_slice).collect();
    ExtraPlanes::new(&extra_slices, rows, cols)?.apply(&mut decoded)?;
    // GPTQ has other columns make up for what the fitted matrix loses, which outliers must not change: they add what was
    // taken out. Otherwise they make up for the loss of their weight too.
    let base = |place: usize| target.as_ref().map_or(decoded[place], |target| target[place]);
    let mut beyond = false;
    let mut added = Vec::with_capacity(places.len());
    for &place in &places {
        let value = f16::from_f32(weights[place] - base(place));
        beyond |= !value.is_finite();
        added.push(Outlier { row: place / cols, column: place % cols, value });
    }
    if beyond {
        return Ok(Err(Misfit::OutOfRange));
    }
    for (&place, outlier) in places.iter().zip(&added) {
        decoded[place] += outlier.value.to_f32();
    }
    extra_planes = extra::planes(rows, cols, column_scales, &added)?;
    done.distance = Some(distance(&weights, &decoded));
    done.repaired = repaired;
    done.set_extras(Extras { column_scales: column_scales.is_some(), outliers: added.len() as u64 })?;
    planes.extend(extra_planes);
    let planes = planes.into_iter().map(|plane| Prepared::new(plane, None)).collect();
    let how = Whole { transposed: transposed(tensor, codec), rate: None, extras: done.extras };
    writer.whole(tensor.info().clone(), codec, how, planes).map(Ok)
}

/// How far decoded weights are from the original ones; summed in the order of the weights.
fn distance(weights: &[f32], decoded: &[f32]) -> Distance {
    const PART: usize = 1 << 16;
    let parts: Vec<Distance> =
        weights.par_chunks(PART).zip(decoded.par_chunks(PART)).map(|(a, b)| Distance::between(a, b)).collect();
    parts.iter().fold(Distance::default(), |mut all, part| {
        all.merge(part);
        all
    })
}
