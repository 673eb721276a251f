//! Checkpoint in, artifact out: streams every tensor of a source through its codec into a new file.
//!
//! A tensor goes by in blocks of rows, each about [`BLOCK_BYTES`] of source: read, widened to f32, encoded, decoded
//! again for the error report, hashed and written, so memory does not grow with the model.

use std::path::Path;

use rayon::prelude::*;

use crate::artifact::writer::{TensorWriter, Written, planned_bytes};
use crate::artifact::{Identity, Provenance, SourceFile, Writer};
use crate::codec::{self, Codec, PlanesMut};
use crate::codecs;
use crate::error::{Error, Result};
use crate::fit::OutOfRange;
use crate::layout::{Grouped, Layout};
use crate::measure::Distance;
use crate::output;
use crate::recipe::{Choice, Reason, Recipe};
use crate::source::{Source, SourceTensor};
use crate::tensor;

/// Source bytes that are in memory at once.
pub const BLOCK_BYTES: u64 = 8 << 20;

/// What to do about weights that are NaN or infinite in a tensor that is to be quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Nonfinite {
    /// Refuse the checkpoint, naming tensor, first index and count.
    #[default]
    Error,
    /// Store zero in their place.
    Zero,
    /// Store zero for NaN, and for an infinity the largest finite magnitude of its row, with its sign.
    Clamp,
    /// Store the whole tensor as it is, in `raw_v1`.
    Raw,
}

impl Nonfinite {
    /// Every choice, with its name.
    pub const ALL: &[(&'static str, Self)] =
        &[("error", Self::Error), ("zero", Self::Zero), ("clamp", Self::Clamp), ("raw", Self::Raw)];

    /// The name in options and provenance.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, choice)| *choice == self).map_or("", |(name, _)| name)
    }
}

impl std::str::FromStr for Nonfinite {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        Self::ALL.iter().find(|(name, _)| *name == s).map(|(_, choice)| *choice).ok_or_else(|| {
            Error::invalid(format!("unknown policy '{s}' for non-finite weights, expected error, zero, clamp or raw"))
        })
    }
}

/// How far the work is; given to a callback, which stops the work by returning an error.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// Source bytes done.
    pub done: u64,
    /// Source bytes in all.
    pub total: u64,
    /// The tensor under way.
    pub tensor: &'a str,
}

/// What is told about progress.
pub type OnProgress<'a> = dyn FnMut(Progress<'_>) -> Result<()> + Send + 'a;

/// How to compress.
#[derive(Debug, Clone)]
pub struct Options {
    /// Which codec for which tensor.
    pub recipe: Recipe,
    /// What to do about NaN and infinities.
    pub nonfinite: Nonfinite,
    /// Replace an existing output.
    pub force: bool,
}

/// What happened, or will happen, to one tensor.
#[derive(Debug, Clone)]
pub struct TensorReport {
    /// Name.
    pub name: String,
    /// Dtype of the source.
    pub dtype: tensor::DType,
    /// Shape in the source.
    pub shape: Vec<u64>,
    /// The codec it is stored with.
    pub codec: &'static Codec,
    /// Why that codec.
    pub reason: String,
    /// Whether it is not the one that was asked for: rows shorter than a group, scales out of range, non-finite weights.
    pub changed_codec: bool,
    /// Bytes in the source.
    pub source_bytes: u64,
    /// Bytes of its planes.
    pub stored_bytes: u64,
    /// Distance to the source, where the codec is lossy; `None` before it has been encoded.
    pub distance: Option<Distance>,
    /// Weights that were NaN or infinite and have been replaced.
    pub repaired: u64,
}

impl TensorReport {
    /// Elements of the tensor.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

/// What a run did, or, before anything was written, will do.
#[derive(Debug, Clone)]
pub struct Report {
    /// One line per tensor, in stored order.
    pub tensors: Vec<TensorReport>,
    /// Length of the artifact.
    pub file_bytes: u64,
    /// Identity of the artifact; `None` for a plan.
    pub identity: Option<Identity>,
}

/// What will be written, to the byte, from the source's headers alone.
///
/// A tensor whose scales turn out not to fit its codec, or that holds NaN, is the only thing headers cannot tell;
/// [`compress`] then reports the codec that it took instead.
///
/// # Errors
/// [`Error::Invalid`] when a codec cannot hold a tensor.
pub fn plan(source: &Source, options: &Options) -> Result<Report> {
    let tensors = source
        .tensors()
        .iter()
        .map(|t| {
            let Choice { codec, reason } = options.recipe.choose(t.info(), t.matrix().1);
            let changed = matches!(reason, Reason::ShortRows { .. });
            report(t, codec, reason.to_string(), changed)
        })
        .collect::<Result<Vec<_>>>()?;
    let unknown = |_: &_| Ok(Identity([0; 32]));
    let file_bytes = planned_bytes(
        tensors.iter().zip(source.tensors()).map(|(r, t)| (t.info().clone(), r.codec, transposed(t, r.codec))),
        source.metadata(),
        &provenance(source, options, unknown)?,
    )?;
    Ok(Report { tensors, file_bytes, identity: None })
}

/// Compresses a source into an artifact at `target`.
///
/// # Errors
/// [`Error::Nonfinite`] by default policy, [`Error::Invalid`] when the output exists or is an input, [`Error::Io`],
/// whatever is wrong with the source, and whatever `on_progress` returns. Nothing is left behind.
pub fn compress(source: &Source, target: &Path, options: &Options, on_progress: &mut OnProgress<'_>) -> Result<Report> {
    output::refuse_input(target, source.files().iter().map(crate::source::SourceFile::file))?;
    let planned = plan(source, options)?;
    let mut writer = Writer::create(target, options.force)?;
    writer.output().preflight(planned.file_bytes)?;
    let total = planned.tensors.iter().map(|t| t.source_bytes).sum();
    let mut done = 0;
    let mut tensors = Vec::with_capacity(planned.tensors.len());
    for (index, planned) in planned.tensors.into_iter().enumerate() {
        let name = planned.name.clone();
        let bytes = planned.source_bytes;
        let mut tick = |part: u64| on_progress(Progress { done: done + part, total, tensor: &name });
        let (report, tensor) = encode_tensor(source, index, planned, options.nonfinite, &writer, &mut tick)?;
        writer.keep(tensor)?;
        tensors.push(report);
        done += bytes;
    }
    let provenance = provenance(source, options, |file| Ok(file.digest()?.into()))?;
    let Written { file_bytes, header } = writer.finish(source.metadata().clone(), provenance, None)?;
    Ok(Report { tensors, file_bytes, identity: Some(header.identity()) })
}

/// Raw tensors keep the source's order.
fn transposed(tensor: &SourceTensor, codec: &Codec) -> bool {
    tensor.transposed() && codec.layout != Layout::Raw
}

fn report(tensor: &SourceTensor, codec: &'static Codec, reason: String, changed_codec: bool) -> Result<TensorReport> {
    let info = tensor.info();
    let (rows, cols) = tensor.matrix();
    let stored_bytes = codec.layout.plane_bytes(info.dtype(), rows, cols)?.iter().map(|(_, bytes)| bytes).sum();
    Ok(TensorReport {
        name: info.name().to_owned(),
        dtype: info.dtype(),
        shape: info.shape().to_vec(),
        codec,
        reason,
        changed_codec,
        source_bytes: info.bytes(),
        stored_bytes,
        distance: None,
        repaired: 0,
    })
}

/// Where the content comes from; the recipe as text re-creates the same choices.
pub(crate) fn provenance(
    source: &Source,
    options: &Options,
    digest: impl Fn(&crate::file::InputFile) -> Result<Identity>,
) -> Result<Provenance> {
    let file = |f: &crate::source::SourceFile| {
        Ok(SourceFile { name: f.name().to_owned(), bytes: f.file().len(), blake3: digest(f.file())? })
    };
    Ok(Provenance {
        tool: concat!("tenpak ", env!("CARGO_PKG_VERSION")).to_owned(),
        recipe: options.recipe.to_toml(),
        nonfinite: options.nonfinite.name().to_owned(),
        sources: source.files().iter().map(file).collect::<Result<_>>()?,
    })
}

/// Why a tensor could not be stored with the codec it was meant for.
enum Misfit {
    OutOfRange,
    Nonfinite { index: u64, count: u64 },
}

/// Writes one tensor with the first codec of its line that can hold it: the planned one, its wider twin, raw.
///
/// The tensor is complete but not kept, so that the caller may still drop it.
pub(crate) fn encode_tensor(
    source: &Source,
    index: usize,
    mut report: TensorReport,
    nonfinite: Nonfinite,
    writer: &Writer,
    tick: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<(TensorReport, TensorWriter)> {
    let tensor = &source.tensors()[index];
    loop {
        let codec = report.codec;
        let mut out = writer.tensor(tensor.info().clone(), codec, transposed(tensor, codec))?;
        let Layout::Grouped(layout) = &codec.layout else {
            copy_raw(source, index, writer, &mut out, tick)?;
            return Ok((report, out));
        };
        let mut job = Job { source, index, layout, codec, nonfinite, distance: Distance::default(), repaired: 0 };
        let (fallback, why) = match job.run(writer, &mut out, tick)? {
            None => {
                report.distance = Some(job.distance);
                report.repaired = job.repaired;
                return Ok((report, out));
            }
            Some(Misfit::Nonfinite { index, count }) if nonfinite == Nonfinite::Error => {
                return Err(Error::Nonfinite { tensor: report.name, index, count });
            }
            Some(Misfit::Nonfinite { index, .. }) => {
                (codecs::get(codecs::RAW)?, format!("weight {index} is not finite and --nonfinite is raw"))
            }
            Some(Misfit::OutOfRange) => {
                (codecs::wider(codec), "a scale or offset leaves the range of its stored type".to_owned())
            }
        };
        let reason = format!("{} instead of {}: {why}", fallback.id, codec.id);
        report = self::report(tensor, fallback, reason, true)?;
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
        let block_rows = (BLOCK_BYTES / row_bytes).max(1);
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
        let task_rows = codec::rows_per_task(cols);
        let element = usize::try_from(dtype.size()).expect("at most 8");
        let tasks: Vec<Task> = PlanesMut::new(planes)
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
            match self.nonfinite {
                Nonfinite::Error | Nonfinite::Raw => return task,
                Nonfinite::Zero => repair(&mut scratch.weights, cols, |_, _| 0.0),
                Nonfinite::Clamp => {
                    repair(&mut scratch.weights, cols, |w, peak| if w.is_nan() { 0.0 } else { peak.copysign(w) })
                }
            }
        }
        let encoded = codec::encode_rows(self.layout, self.codec.fit, &scratch.weights, cols, planes);
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
        let tensor = &self.source.tensors()[self.index];
        let (rows, cols) = tensor.matrix();
        if tensor.transposed() { (index % cols) * rows + index / cols } else { index }
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
