//! Matrices that another tool has quantized: taken over as they are, or decoded and stored raw.

use rayon::prelude::*;

use super::encode::Misfit;
use super::{BLOCK_BYTES, Imported, Nonfinite, Options, Quantized, TensorReport, report};
use crate::artifact::Writer;
use crate::artifact::writer::TensorWriter;
use crate::codec::Codec;
use crate::codec::extra::Extras;
use crate::codecs;
use crate::error::{Error, Result};
use crate::fit::Method;
use crate::source::{Source, SourceTensor, Unheld};

/// Refuses a quantized checkpoint where nobody has said what to do with it.
///
/// # Errors
/// [`Error::Invalid`].
pub(super) fn check(source: &Source, options: &Options) -> Result<()> {
    let mut packed = source.tensors().iter().filter_map(|tensor| Some((tensor, tensor.packed()?)));
    match (packed.next(), options.quantized) {
        (Some((tensor, first)), Quantized::Refuse) => Err(Error::invalid(format!(
            "{} of {} tensors are quantized already, such as '{}' as {}, and would be quantized again; choose no codec to \
             take them over as they are, or pass --allow-requantize to quantize their decoded weights",
            1 + packed.count(),
            source.tensors().len(),
            tensor.info().name(),
            first.format()
        ))),
        _ => Ok(()),
    }
}

/// What will become of a tensor of a quantized checkpoint that is kept; nothing where the recipe decides.
pub(super) fn planned(source: &Source, tensor: &SourceTensor, options: &Options) -> Result<Option<TensorReport>> {
    if options.quantized != Quantized::Keep || !source.is_quantized() {
        return Ok(None);
    }
    let raw = codecs::get(codecs::RAW)?;
    let Some(packed) = tensor.packed() else {
        return report(tensor, raw, None, "not quantized in the checkpoint".to_owned(), false).map(Some);
    };
    Ok(Some(match packed.codecs().first() {
        Some(codec) => taken_over(report(tensor, codec, None, String::new(), false)?, packed.format()),
        None => {
            let reason = format!("decoded from {}: {}", packed.format(), packed.why());
            report(tensor, raw, None, reason, true)?
        }
    }))
}

/// A matrix whose codec holds it as it is need not be quantized anew, where nothing but the codec was asked for.
pub(super) fn unless_changed(tensor: &SourceTensor, planned: TensorReport) -> TensorReport {
    match tensor.packed() {
        Some(packed)
            if packed.codecs().contains(&planned.codec)
                && planned.method == Method::Codec
                && planned.extras == Extras::NONE =>
        {
            taken_over(planned, packed.format())
        }
        _ => planned,
    }
}

fn taken_over(report: TensorReport, format: &'static str) -> TensorReport {
    let imported = Some(Imported { format, taken_over: true });
    TensorReport { reason: format!("taken over from {format}"), imported, ..report }
}

/// Writes the planes of a matrix as they are, or gives the reason why the codec does not hold them.
pub(super) fn encode(
    source: &Source,
    index: usize,
    codec: &'static Codec,
    writer: &Writer,
    tick: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<Result<TensorWriter, Misfit>> {
    let tensor = &source.tensors()[index];
    let mut out = writer.tensor(tensor.info().clone(), codec, false)?;
    let (rows, cols) = tensor.matrix();
    let row_bytes = cols * tensor.info().dtype().size();
    let step = (BLOCK_BYTES / row_bytes.max(1)).max(1);
    let mut first = 0;
    while first < rows {
        let count = step.min(rows - first);
        match source.read_planes(index, codec, first, count)? {
            Ok(planes) => out.write_planes(writer, &planes)?,
            Err(Unheld::Inexact(why)) => return Ok(Err(Misfit::Inexact(why))),
            Err(Unheld::Nonfinite { index: at, count }) => {
                let rest = nonfinite(source, index, first + step)?;
                return Ok(Err(Misfit::Nonfinite { index: at, count: count + rest }));
            }
        }
        first += count;
        tick(first * row_bytes)?;
    }
    Ok(Ok(out))
}

/// How many weights from a row on are not finite.
fn nonfinite(source: &Source, index: usize, first: u64) -> Result<u64> {
    let tensor = &source.tensors()[index];
    let (rows, cols) = tensor.matrix();
    let step = (BLOCK_BYTES / (4 * cols).max(1)).max(1);
    let (mut first, mut count) = (first, 0);
    while first < rows {
        let some = step.min(rows - first);
        let bytes = source.read_rows(index, first, some)?;
        let odd = |weight: &&[u8; 4]| !f32::from_le_bytes(**weight).is_finite();
        count += bytes.as_chunks::<4>().0.par_iter().filter(odd).count() as u64;
        first += some;
    }
    Ok(count)
}

/// What a matrix is stored with whose codec does not hold it as it is.
pub(super) fn next(tensor: &SourceTensor, codec: &'static Codec, options: &Options, why: &str) -> Result<TensorReport> {
    let raw = codecs::get(codecs::RAW)?;
    let packed = tensor.packed().ok_or_else(|| Error::invalid("the tensor is not quantized"))?;
    let at = packed.codecs().iter().position(|known| *known == codec);
    let next = at.and_then(|at| packed.codecs().get(at + 1)).filter(|_| options.quantized == Quantized::Keep);
    let reason = |next: &Codec| format!("{} instead of {}: {why}", next.id, codec.id);
    Ok(match next {
        Some(next) => {
            let reason = reason(next);
            TensorReport { reason, ..taken_over(report(tensor, next, None, String::new(), true)?, packed.format()) }
        }
        None if options.quantized == Quantized::Keep => report(tensor, raw, None, reason(raw), true)?,
        // Quantized anew, by the codec's own fit.
        None => report(tensor, codec, None, format!("quantized anew: {why}"), true)?,
    })
}

/// What becomes of a matrix with weights that are not finite: as it is decoded, since codes cannot be repaired.
pub(super) fn decoded(tensor: &SourceTensor, index: u64, nonfinite: Nonfinite) -> Result<TensorReport> {
    let raw = codecs::get(codecs::RAW)?;
    let reason =
        format!("weight {index} is not finite, and codes are not repaired where --nonfinite is {}", nonfinite.name());
    report(tensor, raw, None, reason, true)
}
