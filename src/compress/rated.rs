//! One tensor at a rate that was asked for: in memory as a whole, its codes and scales chosen together.

use rayon::prelude::*;

use super::encode::{Misfit, make_finite, stored_index};
use super::fitting::Fitting;
use super::{BLOCK_BYTES, Nonfinite, TensorReport, transposed};
use crate::artifact::Coding;
use crate::artifact::Writer;
use crate::artifact::writer::{Prepared, TensorWriter, Whole};
use crate::codec::extra::{self, ExtraPlanes, Extras};
use crate::codec::{self, Planes};
use crate::error::{Error, Result};
use crate::fit::{self, Rate};
use crate::layout::Grouped;
use crate::measure::Distance;
use crate::source::Source;
use crate::tensor;

/// Weights of a matrix, those that were not finite replaced, and how many these were.
pub(super) struct Loaded {
    pub weights: Vec<f32>,
    pub repaired: u64,
}

/// Writes a tensor at a rate; what it became is put into `done`.
pub(super) fn encode(
    source: &Source,
    index: usize,
    done: &mut TensorReport,
    (rate, fitting): (Rate, &Fitting),
    nonfinite: Nonfinite,
    writer: &Writer,
    tick: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<Result<TensorWriter, Misfit>> {
    let tensor = &source.tensors()[index];
    let codec = done.codec;
    let layout = codec.grouped()?;
    let (rows, cols) = tensor.matrix();
    let too_large = |_| Error::invalid(format!("tensor '{}' is larger than memory", done.name));
    let (rows, cols) = (usize::try_from(rows).map_err(too_large)?, usize::try_from(cols).map_err(too_large)?);
    // The second half of the work is quantizing.
    let Loaded { weights, repaired } = match load(source, index, nonfinite, &mut |bytes| tick(bytes / 2))? {
        Ok(loaded) => loaded,
        Err(misfit) => return Ok(Err(misfit)),
    };
    if weights.is_empty() {
        let planes = codec.layout.planes().iter().map(|_| Prepared::new(Vec::new(), None)).collect();
        let how = Whole { transposed: transposed(tensor, codec), rate: Some(rate), extras: done.extras };
        return writer.whole(tensor.info().clone(), codec, how, planes).map(Ok);
    }
    let quantized = match fitting.quantize(&weights, rows, cols, rate) {
        // A step that is too fine is no error of the caller's, who knows no steps.
        Err(Error::Invalid(_)) => return Ok(Err(Misfit::TooSmall(rate))),
        quantized => quantized?,
    };
    let smallest = fit::min_scale(layout.scale());
    if quantized.scales.iter().any(|scale| !(scale.is_finite() && *scale >= smallest)) {
        return Ok(Err(Misfit::OutOfRange));
    }
    let mut plane = crate::error::try_zeroed(rows * layout.scale().size(), || "a plane of scales".to_owned())?;
    quantized.scales.iter().enumerate().for_each(|(row, &scale)| layout.scale().store(&mut plane, row, scale));
    let codes = padded(quantized.codes, layout.code_stride(cols), cols)?;
    let extra = extra::planes(rows, cols, quantized.column_scales.as_deref(), &[])?;
    done.distance = Some(distance(layout, &weights, cols, [&codes, &plane], &extra)?);
    done.repaired = repaired;
    done.set_extras(Extras { column_scales: quantized.column_scales.is_some(), outliers: 0 })?;
    let mut planes = vec![
        Prepared::new(codes, Some((Coding::Rows, quantized.stream))),
        Prepared::new(plane, Some((Coding::Scales, quantized.scales_stream))),
    ];
    planes.extend(extra.into_iter().map(|plane| Prepared::new(plane, None)));
    done.stored_bytes = planes.iter().map(|plane| plane.stored.len() as u64).sum();
    let how = Whole { transposed: transposed(tensor, codec), rate: Some(rate), extras: done.extras };
    let out = writer.whole(tensor.info().clone(), codec, how, planes)?;
    tick(tensor.info().bytes())?;
    Ok(Ok(out))
}

/// Reads all of a tensor.
pub(super) fn load(
    source: &Source,
    index: usize,
    nonfinite: Nonfinite,
    tick: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<Result<Loaded, Misfit>> {
    let tensor = &source.tensors()[index];
    let dtype = tensor.info().dtype();
    let (rows, cols) = tensor.matrix();
    let elements =
        usize::try_from(tensor.info().elements()).map_err(|_| Error::invalid("the tensor is larger than memory"))?;
    let mut weights = Vec::new();
    if weights.try_reserve_exact(elements).is_err() {
        let what = format!("tensor '{}', which is quantized as a whole", tensor.info().name());
        return Err(Error::OutOfMemory { what, bytes: 4 * tensor.info().elements() });
    }
    weights.resize(elements, 0.0);
    if elements == 0 {
        return Ok(Ok(Loaded { weights, repaired: 0 }));
    }
    let width = usize::try_from(cols).expect("part of what was just allocated");
    let row_bytes = cols * dtype.size();
    let block = (BLOCK_BYTES / row_bytes).max(1);
    let mut first = 0;
    let mut rest = &mut *weights;
    while first < rows {
        let count = block.min(rows - first);
        let (head, tail) = rest.split_at_mut(usize::try_from(count).expect("inside the tensor") * width);
        tensor::to_f32(dtype, &source.read_rows(index, first, count)?, head);
        rest = tail;
        first += count;
        tick(first * row_bytes)?;
    }
    let mut count = 0;
    let mut lowest = u64::MAX;
    for (at, _) in (0..).zip(&weights).filter(|(_, w)| !w.is_finite()) {
        count += 1;
        lowest = lowest.min(stored_index(tensor, at));
    }
    if count > 0 {
        if matches!(nonfinite, Nonfinite::Error | Nonfinite::Raw) {
            return Ok(Err(Misfit::Nonfinite { index: lowest, count }));
        }
        make_finite(nonfinite, &mut weights, width);
    }
    Ok(Ok(Loaded { weights, repaired: count }))
}

/// Codes in rows of whole words.
fn padded(codes: Vec<u8>, stride: usize, cols: usize) -> Result<Vec<u8>> {
    if stride == cols {
        return Ok(codes);
    }
    let mut plane = crate::error::try_zeroed(codes.len() / cols * stride, || "a plane of codes".to_owned())?;
    for (row, codes) in plane.chunks_exact_mut(stride).zip(codes.chunks_exact(cols)) {
        row[..cols].copy_from_slice(codes);
    }
    Ok(plane)
}

/// How far the decoded weights are from the original ones.
fn distance(
    layout: &Grouped,
    weights: &[f32],
    cols: usize,
    planes: [&[u8]; 2],
    extra: &[Vec<u8>],
) -> Result<Distance> {
    let extra: Vec<&[u8]> = extra.iter().map(Vec::as_slice).collect();
    // Column scales are those of any row.
    let extra = ExtraPlanes::new(&extra, weights.len() / cols, cols)?;
    let planes = Planes::new(layout, &planes);
    let rows = codec::rows_per_task(cols);
    let parts: Vec<Distance> = weights
        .par_chunks((rows * cols).max(1))
        .enumerate()
        .map_init(Vec::new, |decoded, (task, weights)| {
            decoded.resize(weights.len(), 0.0);
            let planes = planes.slice(layout, cols, task * rows, weights.len() / cols);
            codec::decode_rows(layout, &planes, cols, decoded);
            extra.scale(decoded);
            Distance::between(weights, decoded)
        })
        .collect();
    // Added in the order of the rows, so that the report does not depend on the number of threads.
    Ok(parts.iter().fold(Distance::default(), |mut all, part| {
        all.merge(part);
        all
    }))
}
