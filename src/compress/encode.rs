//! One tensor through its codec, block by block, into an artifact under way.

use rayon::prelude::*;

use super::fitting::Fitting;
use super::{BLOCK_BYTES, Nonfinite, Options, TensorReport, import, rated, report, transposed, whole};
use crate::artifact::Writer;
use crate::artifact::writer::TensorWriter;
use crate::codec::extra::Extras;
use crate::codec::{self, Codec, PlanesMut};
use crate::codecs;
use crate::error::{Error, Result};
use crate::fit::{OutOfRange, Rate};
use crate::layout::{Grouped, Layout};
use crate::measure::Distance;
use crate::source::{Source, SourceTensor};
use crate::tensor;

/// Why a tensor could not be stored with the codec it was meant for.
pub(super) enum Misfit {
    OutOfRange,
    Nonfinite {
        index: u64,
        count: u64,
    },
    /// Too few weights for what a stream takes beside them.
    TooSmall(Rate),
    /// Codes that are to be taken over would decode to other weights.
    Inexact(&'static str),
}

/// Writes one tensor with the first codec of its line that can hold it: the planned one, its wider twin, raw.
///
/// The tensor is complete but not kept, so that the caller may still drop it.
pub(crate) fn encode_tensor(
    source: &Source,
    index: usize,
    planned: TensorReport,
    options: &Options,
    writer: &Writer,
    tick: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<(TensorReport, TensorWriter)> {
    let tensor = &source.tensors()[index];
    let nonfinite = options.nonfinite;
    let mut done = planned;
    let mut fitting = None;
    loop {
        let codec = done.codec;
        if done.imported.is_some_and(|imported| imported.taken_over) {
            match import::encode(source, index, codec, writer, tick)? {
                Ok(out) => return Ok((done, out)),
                Err(Misfit::Nonfinite { index, count }) if nonfinite == Nonfinite::Error => {
                    return Err(Error::Nonfinite { tensor: done.name, index, count });
                }
                Err(Misfit::Nonfinite { index, .. }) => done = import::decoded(tensor, index, nonfinite)?,
                Err(Misfit::Inexact(why)) => done = import::next(tensor, codec, options, why)?,
                Err(Misfit::OutOfRange | Misfit::TooSmall(_)) => unreachable!("nothing is quantized"),
            }
            continue;
        }
        let fitting = match &mut fitting {
            Some(fitting) => fitting,
            none => {
                let (name, cols) = (tensor.info().name(), tensor.matrix().1);
                let cols = usize::try_from(cols).map_err(|_| Error::invalid("a row is larger than memory"))?;
                none.insert(Fitting::new(done.method, options.stats.as_deref(), name, cols)?)
            }
        };
        let misfit = if let Some(rate) = done.rate {
            match rated::encode(source, index, &mut done, (rate, fitting), nonfinite, writer, tick)? {
                Ok(out) => return Ok((done, out)),
                Err(misfit) => misfit,
            }
        } else if done.extras != Extras::NONE {
            match whole::encode(source, index, &mut done, fitting, nonfinite, writer, tick)? {
                Ok(out) => return Ok((done, out)),
                Err(misfit) => misfit,
            }
        } else {
            let mut out = writer.tensor(tensor.info().clone(), codec, transposed(tensor, codec))?;
            let Layout::Grouped(layout) = &codec.layout else {
                copy_raw(source, index, writer, &mut out, tick)?;
                return Ok((done, out));
            };
            let mut job =
                Job { source, index, layout, codec, nonfinite, fitting, distance: Distance::default(), repaired: 0 };
            let Some(misfit) = job.run(writer, &mut out, tick)? else {
                done.distance = Some(job.distance);
                done.repaired = job.repaired;
                return Ok((done, out));
            };
            misfit
        };
        let (fallback, why) = match misfit {
            Misfit::Nonfinite { index, count } if nonfinite == Nonfinite::Error => {
                return Err(Error::Nonfinite { tensor: done.name, index, count });
            }
            Misfit::Nonfinite { index, .. } => {
                (codecs::get(codecs::RAW)?, format!("weight {index} is not finite and --nonfinite is raw"))
            }
            Misfit::TooSmall(rate) => {
                (codecs::get(codecs::INT8_ROW)?, format!("no step gives {rate} bits a weight, it has too few for that"))
            }
            Misfit::Inexact(_) => unreachable!("nothing is taken over"),
            Misfit::OutOfRange => {
                (codecs::wider(codec), "a scale or offset leaves the range of its stored type".to_owned())
            }
        };
        let reason = format!("{} instead of {}: {why}", fallback.id, codec.id);
        let (method, method_reason) = (done.method, done.method_reason.take());
        done = report(tensor, fallback, None, reason, true)?;
        if fallback.layout != Layout::Raw {
            (done.method, done.method_reason) = (method, method_reason);
        }
    }
}

/// Copies a tensor as it is, in the source's order.
fn copy_raw(
    source: &Source,
    index: usize,
    writer: &Writer,
    out: &mut TensorWriter,
    tick: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<()> {
    let bytes = source.tensors()[index].info().bytes();
    let mut at = 0;
    while at < bytes {
        let n = BLOCK_BYTES.min(bytes - at);
        out.write(writer, 0, &source.read_bytes(index, at, n)?)?;
        at += n;
        tick(at)?;
    }
    Ok(())
}

/// One attempt to encode one tensor with one codec.
struct Job<'a> {
    source: &'a Source,
    index: usize,
    layout: &'a Grouped,
    codec: &'static Codec,
    nonfinite: Nonfinite,
    fitting: &'a Fitting,
    distance: Distance,
    repaired: u64,
}

/// What one task found in its rows.
#[derive(Default)]
struct Task {
    distance: Distance,
    /// Flat index in the source of the first weight that is not finite, and how many there are.
    nonfinite: Option<(u64, u64)>,
    out_of_range: bool,
}

/// Memory that a thread reuses from task to task.
#[derive(Default)]
struct Scratch {
    weights: Vec<f32>,
    decoded: Vec<f32>,
}

impl Job<'_> {
    fn run(
        &mut self,
        writer: &Writer,
        out: &mut TensorWriter,
        tick: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<Option<Misfit>> {
        let tensor = &self.source.tensors()[self.index];
        let (rows, cols) = tensor.matrix();
        if rows == 0 || cols == 0 {
            return Ok(None);
        }
        let row_bytes = cols * tensor.info().dtype().size();
        let cols = usize::try_from(cols).map_err(|_| Error::invalid("a row is larger than memory"))?;
        let block_rows = self.fitting.block_rows((BLOCK_BYTES / row_bytes).max(1));
        let new_planes = || vec![Vec::new(); self.codec.layout.planes().len()];
        let (mut full, mut empty): (Vec<Vec<u8>>, Vec<Vec<u8>>) = (new_planes(), new_planes());
        let mut found = None;
        let mut first = 0;
        while first < rows {
            let count = block_rows.min(rows - first);
            // One block is written while the next one is encoded.
            let (written, block) =
                rayon::join(|| out.write_planes(writer, &full), || self.encode_block(first, count, cols, &mut empty));
            written?;
            let block = block?;
            if let Some((index, n)) = block.nonfinite {
                match self.nonfinite {
                    Nonfinite::Raw => return Ok(Some(Misfit::Nonfinite { index, count: n })),
                    Nonfinite::Error => {
                        let (first, before) = found.unwrap_or((index, 0));
                        found = Some((first.min(index), before + n));
                    }
                    Nonfinite::Zero | Nonfinite::Clamp => self.repaired += n,
                }
            }
            if block.out_of_range && found.is_none() {
                return Ok(Some(Misfit::OutOfRange));
            }
            self.distance.merge(&block.distance);
            std::mem::swap(&mut full, &mut empty);
            if found.is_some() {
                // Nothing more is written; the rest is read for the count alone.
                full.iter_mut().for_each(Vec::clear);
            }
            first += count;
            tick(first * row_bytes)?;
        }
        if found.is_none() {
            out.write_planes(writer, &full)?;
        }
        Ok(found.map(|(index, count)| Misfit::Nonfinite { index, count }))
    }

    /// Reads `count` rows from `first` on and encodes them into `planes`, in parallel.
    fn encode_block(&self, first: u64, count: u64, cols: usize, planes: &mut [Vec<u8>]) -> Result<Task> {
        let bytes = self.source.read_rows(self.index, first, count)?;
        let dtype = self.source.tensors()[self.index].info().dtype();
        for (plane, (_, len)) in planes.iter_mut().zip(self.codec.layout.plane_bytes(dtype, count, cols as u64)?) {
            plane.clear();
            plane.resize(usize::try_from(len).expect("a block fits memory"), 0);
        }
        let rows = usize::try_from(count).expect("a block fits memory");
        let task_rows = self.fitting.rows_per_task(cols);
        let element = usize::try_from(dtype.size()).expect("at most 8");
        let tasks: Vec<Task> = PlanesMut::new(self.layout, planes)
            .chunks(self.layout, cols, rows, task_rows)
            .into_par_iter()
            .zip(bytes.par_chunks(task_rows * cols * element))
            .enumerate()
            .map_init(Scratch::default, |scratch, (task, (mut planes, bytes))| {
                scratch.weights.resize(bytes.len() / element, 0.0);
                tensor::to_f32(dtype, bytes, &mut scratch.weights);
                let start = (first + (task * task_rows) as u64) * cols as u64;
                self.encode_rows(scratch, start, cols, &mut planes)
            })
            .collect();
        // Folded in the order of the rows, so that the report does not depend on the number of threads.
        Ok(tasks.into_iter().fold(Task::default(), |mut all, task| {
            all.distance.merge(&task.distance);
            all.out_of_range |= task.out_of_range;
            all.nonfinite = match (all.nonfinite, task.nonfinite) {
                (Some((first, a)), Some((second, b))) => Some((first.min(second), a + b)),
                (a, b) => a.or(b),
            };
            all
        }))
    }

    /// Encodes the rows of one task, `start` being the flat index of their first weight.
    fn encode_rows(&self, scratch: &mut Scratch, start: u64, cols: usize, planes: &mut PlanesMut<'_>) -> Task {
        let mut task = Task::default();
        let bad = scratch.weights.iter().filter(|w| !w.is_finite()).count();
        if bad > 0 {
            // The first of the matrix need not be the first of the source.
            let at =
                (start..).zip(&scratch.weights).filter(|(_, w)| !w.is_finite()).map(|(at, _)| self.stored_index(at));
            task.nonfinite = Some((at.min().unwrap_or_default(), bad as u64));
            if matches!(self.nonfinite, Nonfinite::Error | Nonfinite::Raw) {
                return task;
            }
            make_finite(self.nonfinite, &mut scratch.weights, cols);
        }
        let encoded = self.fitting.encode_rows(self.layout, self.codec.fit, &scratch.weights, cols, planes);
        if encoded == Err(OutOfRange) {
            task.out_of_range = true;
            return task;
        }
        scratch.decoded.resize(scratch.weights.len(), 0.0);
        codec::decode_rows(self.layout, &planes.as_planes(), cols, &mut scratch.decoded);
        task.distance = Distance::between(&scratch.weights, &scratch.decoded);
        task
    }

    /// The flat index in the source of a weight of the matrix.
    fn stored_index(&self, index: u64) -> u64 {
        stored_index(&self.source.tensors()[self.index], index)
    }
}

/// The flat index in the source of a weight of the matrix.
pub(super) fn stored_index(tensor: &SourceTensor, index: u64) -> u64 {
    let (rows, cols) = tensor.matrix();
    if tensor.transposed() { (index % cols) * rows + index / cols } else { index }
}

/// Puts numbers in the place of weights that are not finite, as the policy says.
pub(super) fn make_finite(nonfinite: Nonfinite, weights: &mut [f32], cols: usize) {
    match nonfinite {
        Nonfinite::Error | Nonfinite::Raw => {}
        Nonfinite::Zero => repair(weights, cols, |_, _| 0.0),
        Nonfinite::Clamp => repair(weights, cols, |w, peak| if w.is_nan() { 0.0 } else { peak.copysign(w) }),
    }
}

/// Replaces weights that are not finite, given the largest finite magnitude of their row.
fn repair(weights: &mut [f32], cols: usize, replace: impl Fn(f32, f32) -> f32) {
    for row in weights.chunks_mut(cols) {
        let peak = row.iter().filter(|w| w.is_finite()).fold(0.0_f32, |peak, w| peak.max(w.abs()));
        for w in row.iter_mut().filter(|w| !w.is_finite()) {
            *w = replace(*w, peak);
        }
    }
}
