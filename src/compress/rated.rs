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
use crate::coding::context::log2;
use crate::error::{Error, Result};
use crate::fit::entropy::Quantized;
use crate::fit::{self, Rate};
use crate::layout::{Grouped, Plane};
use crate::measure::Distance;
use crate::source::Source;
use crate::tensor;

/// Weights of a matrix, those that were not finite replaced, and how many these were.
pub(super) struct Loaded {
    pub weights: Vec<f32>,
    pub rows: usize,
    pub cols: usize,
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
    // The second half of the work is quantizing.
    let Loaded { weights, rows, cols, repaired } = match load(source, index, nonfinite, &mut |bytes| tick(bytes / 2))? {
        Ok(loaded) => loaded,
        Err(misfit) => return Ok(Err(misfit)),
    };
    if weights.is_empty() {
        let planes = codec.layout.planes().iter().map(|_| Prepared::new(Vec::new(), None)).collect();
        let how = Whole { transposed: transposed(tensor, codec), rate: Some(rate), extras: done.extras };
        return writer.whole(tensor.info().clone(), codec, how, planes).map(Ok);
    }
    let quantize = |rate: Rate| match fitting.quantize(&weights, rows, cols, rate) {
        // A step that is too fine is no error of the caller's, who knows no steps.
        Err(Error::Invalid(_)) => Ok(None),
        quantized => quantized.map(Some),
    };
    let (quantized, rate) = match done.most_noise {
        None => (quantize(rate)?, rate),
        Some(most) => within(most, rate, quantize)?,
    };
    let Some(quantized) = quantized else { return Ok(Err(Misfit::TooSmall(rate))) };
    done.rate = Some(rate);
    let smallest = fit::min_scale(layout.scale());
    if quantized.scales.iter().any(|scale| !(scale.is_finite() && *scale >= smallest)) {
        return Ok(Err(Misfit::OutOfRange));
    }
    let mut plane = crate::error::try_zeroed(rows * layout.scale().size(), || "a plane of scales".to_owned())?;
    quantized.scales.iter().enumerate().for_each(|(row, &scale)| layout.scale().store(&mut plane, row, scale));
    let codes = padded(quantized.codes, layout.code_stride(cols), cols)?;
    let extra = extra::planes(rows, cols, quantized.column_scales.as_deref(), &quantized.outliers)?;
    done.distance = Some(distance(layout, &weights, cols, [&codes, &plane], &extra)?);
    done.repaired = repaired;
    done.set_extras(Extras {
        column_scales: quantized.column_scales.is_some(),
        outliers: quantized.outliers.len() as u64,
    })?;
    let mut planes = vec![
        Prepared::new(codes, Some((Coding::of_rows(&quantized.stream), quantized.stream))),
        Prepared::new(plane, Some((Coding::Scales, quantized.scales_stream))),
    ];
    let mut streams = [Coding::Counts, Coding::Columns, Coding::Tails].into_iter().zip(quantized.outlier_streams);
    for (&kind, plane) in done.extras.planes().iter().zip(extra) {
        let stream = if kind == Plane::ColumnScales { None } else { streams.next() };
        planes.push(Prepared::new(plane, stream.and_then(|(coding, stream)| Some((coding, stream?)))));
    }
    done.stored_bytes = planes.iter().map(|plane| plane.stored.len() as u64).sum();
    let how = Whole { transposed: transposed(tensor, codec), rate: Some(rate), extras: done.extras };
    let out = writer.whole(tensor.info().clone(), codec, how, planes)?;
    tick(tensor.info().bytes())?;
    Ok(Ok(out))
}

/// A search for a loss ends at a rate that wastes no more of it than this.
const CLOSE: f64 = 0.01;
/// The most rates that it tries.
const TRIES: usize = 10;

/// Quantizes at about the least rate that keeps the squared error below `most`, or at the greatest where none does.
fn within(
    most: f64,
    start: Rate,
    quantize: impl Fn(Rate) -> Result<Option<Quantized>>,
) -> Result<(Option<Quantized>, Rate)> {
    let (mut rate, mut best) = (start, None);
    // Thousandths of rates that lose too much, and of the least one that does not.
    let (mut low, mut high) = (Rate::LEAST.thousandths() - 1, Rate::MOST.thousandths() + 1);
    for _ in 0..TRIES {
        let at = rate.thousandths();
        let tried = quantize(rate)?;
        // One bit more is a quarter of the error.
        let mut next = at + 250;
        if let Some(tried) = tried {
            let error = tried.squared_error;
            if error > 0.0 {
                let bits = 0.5 * log2(error / (most * (1.0 - CLOSE / 2.0)));
                #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the rates, clamped")]
                let wanted = (f64::from(at) + 1000.0 * bits).round().clamp(0.0, 10_000.0) as u32;
                next = if error > most { wanted.max(at + 1) } else { wanted.min(at - 1) };
            } else {
                next = 0;
            }
            if error <= most {
                high = at;
                best = Some((tried, rate));
                if error >= most * (1.0 - CLOSE) {
                    break;
                }
            } else {
                low = low.max(at);
                if rate == Rate::MOST {
                    return Ok((Some(tried), rate));
                }
            }
        } else {
            low = low.max(at);
        }
        if high - low <= 1 {
            break;
        }
        let last = Rate::MOST.thousandths();
        next = if next <= low || next >= high { low.midpoint(high) } else { next };
        rate = Rate::from_thousandths(next.clamp(low + 1, high - 1).min(last))?;
    }
    match best {
        Some((best, rate)) => Ok((Some(best), rate)),
        None => Ok((quantize(Rate::MOST)?, Rate::MOST)),
    }
}

/// The sum of the squares of a tensor's finite weights.
pub(super) fn power(source: &Source, index: usize) -> Result<f64> {
    let tensor = &source.tensors()[index];
    let dtype = tensor.info().dtype();
    let (rows, cols) = tensor.matrix();
    let block = (BLOCK_BYTES / (cols * dtype.size()).max(1)).max(1);
    let (mut first, mut power, mut weights) = (0, 0.0, Vec::new());
    while first < rows && cols > 0 {
        let count = block.min(rows - first);
        let bytes = source.read_rows(index, first, count)?;
        weights.resize(bytes.len() / usize::try_from(dtype.size()).expect("at most 8"), 0.0);
        tensor::to_f32(dtype, &bytes, &mut weights);
        weights.iter_mut().filter(|w| !w.is_finite()).for_each(|w| *w = 0.0);
        power += Distance::between(&weights, &weights).signal;
        first += count;
    }
    Ok(power)
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
    let in_memory = |number: u64| {
        let name = tensor.info().name();
        usize::try_from(number).map_err(|_| Error::invalid(format!("tensor '{name}' is larger than memory")))
    };
    let (height, width) = (in_memory(rows)?, in_memory(cols)?);
    let elements = in_memory(tensor.info().elements())?;
    let mut weights = Vec::new();
    if weights.try_reserve_exact(elements).is_err() {
        let what = format!("tensor '{}', which is quantized as a whole", tensor.info().name());
        return Err(Error::OutOfMemory { what, bytes: 4 * tensor.info().elements() });
    }
    weights.resize(elements, 0.0);
    if elements == 0 {
        return Ok(Ok(Loaded { weights, rows: height, cols: width, repaired: 0 }));
    }
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
    Ok(Ok(Loaded { weights, rows: height, cols: width, repaired: count }))
}

/// Codes in rows of whole words.
pub(crate) fn padded(codes: Vec<u8>, stride: usize, cols: usize) -> Result<Vec<u8>> {
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
fn distance(layout: &Grouped, weights: &[f32], cols: usize, planes: [&[u8]; 2], extra: &[Vec<u8>]) -> Result<Distance> {
    let extra: Vec<&[u8]> = extra.iter().map(Vec::as_slice).collect();
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
            extra.slice(task * rows, weights.len() / cols).apply(decoded)?;
            Ok(Distance::between(weights, decoded))
        })
        .collect::<Result<_>>()?;
    // Added in the order of the rows, so that the report does not depend on the number of threads.
    Ok(parts.iter().fold(Distance::default(), |mut all, part| {
        all.merge(part);
        all
    }))
}
