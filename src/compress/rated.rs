//! One tensor at a rate that was asked for: in memory as a whole, its codes and scales chosen together.

use rayon::prelude::*;

use super::encode::{Misfit, make_finite, stored_index};
use super::{BLOCK_BYTES, Nonfinite, TensorReport, transposed};
use crate::artifact::Coding;
use crate::artifact::Writer;
use crate::artifact::writer::{Prepared, TensorWriter, Whole};
use crate::codec::{self, Planes};
use crate::coding;
use crate::error::{Error, Result};
use crate::fit::{self, Rate};
use crate::layout::{Float, Grouped};
use crate::measure::Distance;
use crate::source::Source;
use crate::tensor;

/// Weights of a matrix, those that were not finite replaced, and how many these were.
struct Loaded {
    weights: Vec<f32>,
    repaired: u64,
}

/// Writes a tensor at a rate; what it became is put into `done`.
pub(super) fn encode(
    source: &Source,
    index: usize,
    done: &mut TensorReport,
    rate: Rate,
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
    let quantized = quantize(&weights, rows, cols, rate.bits(), None)?;
    let smallest = fit::min_scale(layout.scale());
    if quantized.scales.iter().any(|scale| *scale != 0.0 && !(scale.is_finite() && scale.abs() >= smallest)) {
        return Ok(Err(Misfit::OutOfRange));
    }
    let scales = coding::encode_scales(&quantized.scales);
    let mut plane = crate::error::try_zeroed(rows * layout.scale().size(), || "a plane of scales".to_owned())?;
    quantized.scales.iter().enumerate().for_each(|(row, &scale)| layout.scale().store(&mut plane, row, scale));
    let codes = padded(quantized.codes, layout.code_stride(cols), cols)?;
    done.distance = Some(distance(layout, &weights, cols, &codes, &plane));
    done.repaired = repaired;
    let planes = vec![
        Prepared::new(codes, Some((Coding::Rows, quantized.stream))),
        Prepared::new(plane, (layout.scale() == Float::F32).then_some((Coding::Scales, scales))),
    ];
    done.stored_bytes = planes.iter().map(|plane| plane.stored.len() as u64).sum();
    let how = Whole { transposed: transposed(tensor, codec), rate: Some(rate) };
    let out = writer.whole(tensor.info().clone(), codec, how, planes)?;
    tick(tensor.info().bytes())?;
    Ok(Ok(out))
}

/// Reads all of a tensor.
fn load(
    source: &Source,
    index: usize,
    nonfinite: Nonfinite,
    tick: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<Result<Loaded, Misfit>> {
    let tensor = &source.tensors()[index];
    let dtype = tensor.info().dtype();
    let (rows, cols) = tensor.matrix();
    let elements = usize::try_from(tensor.info().elements()).map_err(|_| Error::invalid("the tensor is larger than memory"))?;
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
fn distance(layout: &Grouped, weights: &[f32], cols: usize, codes: &[u8], scales: &[u8]) -> Distance {
    let planes = Planes { codes, scales, addends: &[] };
    let rows = codec::rows_per_task(cols);
    let parts: Vec<Distance> = weights
        .par_chunks((rows * cols).max(1))
        .enumerate()
        .map_init(Vec::new, |decoded, (task, weights)| {
            decoded.resize(weights.len(), 0.0);
            let planes = planes.slice(layout, cols, task * rows, weights.len() / cols);
            codec::decode_rows(layout, &planes, cols, decoded);
            Distance::between(weights, decoded)
        })
        .collect();
    // Added in the order of the rows, so that the report does not depend on the number of threads.
    parts.iter().fold(Distance::default(), |mut all, part| {
        all.merge(part);
        all
    })
}

/// What a quantizer of a whole matrix gives.
struct Quantized {
    codes: Vec<u8>,
    scales: Vec<f32>,
    stream: Vec<u8>,
}

/// Nearest multiples of one step, the step halved in until the stream has the length that is asked for.
fn quantize(weights: &[f32], rows: usize, cols: usize, bits: f64, _: Option<&[f32]>) -> Result<Quantized> {
    let peak = weights.iter().fold(0.0_f32, |peak, w| peak.max(w.abs()));
    let wanted = bits * weights.len() as f64 / 8.0;
    let (mut low, mut high) = (peak / 127.0, peak);
    let mut best = None;
    for _ in 0..24 {
        let step = 0.5 * (low + high);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to levels")]
        let code = |w: &f32| if step > 0.0 { ((w / step).round().clamp(-127.0, 127.0) + 128.0) as u8 } else { 128 };
        let codes: Vec<u8> = weights.par_iter().map(code).collect();
        let stream = coding::encode(&codes, rows, cols)?;
        if stream.len() as f64 <= wanted {
            high = step;
            best = Some(Quantized { codes, scales: vec![step; rows], stream });
        } else {
            low = step;
            if best.is_none() {
                best = Some(Quantized { codes, scales: vec![step; rows], stream });
            }
        }
    }
    best.ok_or_else(|| Error::invalid("no step was tried"))
}
