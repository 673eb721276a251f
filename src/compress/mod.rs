//! Checkpoint in, artifact out: streams every tensor of a source through its codec into a new file, or by way of one into a
//! directory.
//!
//! A tensor goes by in blocks of rows, each about [`BLOCK_BYTES`] of source: read, widened to f32, encoded, decoded
//! again for the error report, hashed and written, so memory does not grow with the model. Only a tensor of a codec whose
//! size is open is in memory as a whole, since what one weight costs depends on all the others.

mod allocate;
mod budget;
mod encode;
mod fitting;
mod forecast;
mod form;
mod import;
mod journal;
mod manifest;
mod merge;
mod part;
mod rated;
mod sample;
mod size;
mod whole;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::artifact::header::Header;
use crate::artifact::writer::{Whole, Written, planned};
use crate::artifact::{Identity, Provenance, SourceFile, Writer};
use crate::codec::Codec;
use crate::codec::extra::Extras;
use crate::codecs;
use crate::error::{Error, Result};
use crate::file::InputFile;
use crate::fit::{Method, Rate};
use crate::layout::Layout;
use crate::location;
use crate::measure::Distance;
use crate::output;
use crate::recipe::{Choice, Reason, Recipe};
use crate::source::{self, Source, SourceTensor};
use crate::stats::Stats;
use crate::tensor;
use budget::Budget;
pub(crate) use encode::encode_tensor;
pub use forecast::{Expected, Frontier, Point, frontier};
use form::Target;
pub use form::{compress_as, plan_as};
use journal::Journal;
pub use journal::leftover;
pub use merge::{Merged, merge};
pub use part::{Part, compress_part, plan_part};
pub(crate) use rated::padded;
use size::Settled;

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

/// What to do with matrices that another tool has quantized already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Quantized {
    /// Refuse the checkpoint: a recipe would quantize what is quantized.
    #[default]
    Refuse,
    /// Take over what a codec holds as it is, store everything else raw, and leave the recipe out of it.
    Keep,
    /// Quantize the decoded weights as the recipe says, but take over what its codec holds as it is.
    Anew,
}

impl Quantized {
    /// What a user wants who has asked for a codec, a rate or anything else of a recipe, or has not, and who allows
    /// quantizing again, or does not.
    #[must_use]
    pub fn wanted(asked: bool, allowed: bool) -> Self {
        match (asked, allowed) {
            (false, _) => Self::Keep,
            (true, true) => Self::Anew,
            (true, false) => Self::Refuse,
        }
    }
}

/// What a matrix was before: quantized by another tool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Imported {
    /// The format.
    pub format: &'static str,
    /// Whether its codes and scales are taken over as they are.
    pub taken_over: bool,
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
    /// The most bytes of the output; the recipe's rate is chosen so that it is filled.
    pub target_bytes: Option<u64>,
    /// Entropy-code every plane that gets shorter by it; needs a tensor at a time in memory.
    pub coded: bool,
    /// Replace an existing output.
    pub force: bool,
    /// Keep a journal of finished tensors beside the output, and go on with the one that a run that was stopped has left.
    pub resume: bool,
    /// What is known of the inputs of the weights, for the fits of the recipe that need it.
    pub stats: Option<Arc<Stats>>,
    /// What to do with matrices that are quantized already.
    pub quantized: Quantized,
}

impl Options {
    /// A recipe with nothing known of the inputs, at no size in particular.
    #[must_use]
    pub fn new(recipe: Recipe, nonfinite: Nonfinite, force: bool) -> Self {
        let quantized = Quantized::default();
        Self { recipe, nonfinite, target_bytes: None, coded: false, force, resume: false, stats: None, quantized }
    }

    /// Says what to do with a checkpoint that is quantized already; where it is kept, the recipe becomes that of raw tensors.
    ///
    /// # Errors
    /// Never, unless the registry lacks a codec.
    pub fn for_quantized(self, source: &Source, quantized: Quantized) -> Result<Self> {
        if !source.is_quantized() || quantized != Quantized::Keep {
            return Ok(Self { quantized, ..self });
        }
        let recipe = Recipe::new(codecs::get(codecs::RAW)?).all(true);
        Ok(Self { recipe, stats: None, target_bytes: None, quantized, ..self })
    }

    /// Adds what is known of the inputs. It decides the fit where that is the codecs' own and none is asked for: `gptq`
    /// with second moments, `weighted` without; and with squared gradients the bits of a rate are dealt out by them, unless
    /// the recipe says otherwise. For `weighted` without statistics, the `activation_stats` of a JSON bundle
    /// serve.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the fit needs statistics and there are none, or has no use for those that are given.
    pub fn with_stats(self, given: Option<Stats>, fit_asked: bool, source: &Source) -> Result<Self> {
        let recipe = match &given {
            Some(stats) if !fit_asked && self.recipe.method() == Method::Codec => {
                self.recipe.fit(if stats.has_second_moments() { Method::Gptq } else { Method::Weighted })
            }
            _ => self.recipe,
        };
        let method = recipe.method();
        let gradients = given.as_ref().is_some_and(Stats::has_gradients);
        let recipe = match recipe.allocates() {
            None if gradients && recipe.takes_rate() => recipe.allocate(true),
            Some(true) if !gradients => {
                return Err(Error::invalid(
                    "bits are to be dealt out by what errors cost the model, but there are no squared gradients; make them \
                     with tenpak calibrate --fisher and pass the file with --stats",
                ));
            }
            _ => recipe,
        };
        let of_use = method.needs_stats() || recipe.allocates() == Some(true);
        if let (Some(stats), false) = (&given, of_use) {
            let (stats, fit) = (stats.name(), method.name());
            return Err(Error::invalid(format!("fit '{fit}' has no use for {stats}; leave out one of the two")));
        }
        let stats = match given {
            None if method == Method::Weighted => Stats::of_bundle(source)?,
            given => given,
        };
        if stats.is_none() && method.needs_stats() {
            return Err(Error::invalid(format!(
                "fit '{}' needs statistics of the model's inputs; make them with tenpak calibrate and pass them with --stats",
                method.name()
            )));
        }
        Ok(Self { recipe, stats: stats.map(Arc::new), ..self })
    }
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
    /// Rows and columns of the matrix as a codec sees it.
    pub matrix: (u64, u64),
    /// The codec it is stored with.
    pub codec: &'static Codec,
    /// Bits per weight on disk that were asked for, where the codec leaves them open.
    pub rate: Option<Rate>,
    /// Which planes there are beside the codec's.
    pub extras: Extras,
    /// The most squared error that it may have, where a loss was asked for: the rate is then the least that keeps it.
    pub most_noise: Option<f64>,
    /// Why that codec.
    pub reason: String,
    /// Whether it is not the one that was asked for: rows shorter than a group, scales out of range, non-finite weights.
    pub changed_codec: bool,
    /// How its scales and codes are chosen.
    pub method: Method,
    /// Why that is not what was asked for.
    pub method_reason: Option<String>,
    /// Bytes in the source.
    pub source_bytes: u64,
    /// Bytes of its planes in the file.
    pub stored_bytes: u64,
    /// Bytes of its planes in memory.
    pub memory_bytes: u64,
    /// Distance to the source, where the codec is lossy; `None` before it has been encoded.
    pub distance: Option<Distance>,
    /// Weights that were NaN or infinite and have been replaced.
    pub repaired: u64,
    /// How it was quantized before, where it was.
    pub imported: Option<Imported>,
}

impl TensorReport {
    /// Elements of the tensor.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Says which planes there are beside the codec's, in sizes too.
    fn set_extras(&mut self, extras: Extras) -> Result<()> {
        let bytes = |extras: Extras| -> Result<u64> {
            Ok(extras.plane_bytes(self.matrix.0, self.matrix.1)?.iter().map(|(_, bytes)| bytes).sum())
        };
        let (before, after) = (bytes(self.extras)?, bytes(extras)?);
        self.extras = extras;
        self.stored_bytes = self.stored_bytes - before + after;
        self.memory_bytes = self.memory_bytes - before + after;
        Ok(())
    }
}

/// What a run did, or, before anything was written, will do.
#[derive(Debug, Clone)]
pub struct Report {
    /// One line per tensor, in stored order.
    pub tensors: Vec<TensorReport>,
    /// Length of the artifact.
    pub file_bytes: u64,
    /// Bytes of it that weights and header take, attached files left out.
    pub weight_bytes: u64,
    /// Names and lengths of the attached files.
    pub attached: Vec<(String, u64)>,
    /// The files of a directory, with their lengths; empty where the artifact is one file.
    pub files: Vec<(PathBuf, u64)>,
    /// What a reader should know.
    pub notes: Vec<String>,
    /// Identity of the artifact; `None` for a plan.
    pub identity: Option<Identity>,
    /// Which part of an artifact this is, where it is not all of it.
    pub part: Option<Part>,
}

impl Report {
    fn new(tensors: Vec<TensorReport>, header: &Header, identity: Option<Identity>) -> Self {
        let file_bytes = header.file_bytes();
        Self {
            tensors,
            file_bytes,
            weight_bytes: file_bytes - header.attached_room(),
            attached: header.files().iter().map(|f| (f.name.to_string(), f.bytes)).collect(),
            files: Vec::new(),
            notes: Vec::new(),
            identity,
            part: None,
        }
    }
}

/// What will be written, to the byte, from the source's headers alone.
///
/// A tensor whose scales turn out not to fit its codec, or that holds NaN, is what headers cannot tell; [`compress`] then
/// reports the codec that it took instead. Nor can they tell the length of coded planes: for them stands what was asked
/// for, or, with [`Options::coded`], what they take as they are.
///
/// # Errors
/// [`Error::Invalid`] when a codec cannot hold a tensor.
pub fn plan(source: &Source, options: &Options) -> Result<Report> {
    plan_settled(source, &size::settled(source, options, |header| Ok(header.file_bytes()))?)
}

/// The same for options that ask for no size.
fn plan_settled(source: &Source, settled: &Settled) -> Result<Report> {
    let tensors = settled.reports(source)?;
    let header = planned_header(source, &settled.options, &tensors)?;
    Ok(Report::new(tensors, &header, None))
}

/// What will happen to each tensor, those with an entry in `rates` having that one.
fn reports(source: &Source, options: &Options, rates: &[Option<Rate>]) -> Result<Vec<TensorReport>> {
    import::check(source, options)?;
    source
        .tensors()
        .iter()
        .enumerate()
        .map(|(index, t)| {
            if let Some(report) = import::planned(source, t, options)? {
                return Ok(report);
            }
            let Choice { codec, rate, reason } = options.recipe.choose(t.info(), t.matrix().1);
            let rate = rate.map(|rate| rates.get(index).copied().flatten().unwrap_or(rate));
            let changed = matches!(reason, Reason::ShortRows { .. });
            let mut report = report(t, codec, rate, reason.to_string(), changed)?;
            if codec.layout != Layout::Raw {
                let (name, cols) = (t.info().name(), t.matrix().1);
                (report.method, report.method_reason) =
                    fitting::method(options.recipe.method(), codec, options.stats.as_deref(), name, cols)?;
                report.set_extras(options.recipe.extras(codec, report.method, t.info().elements()))?;
            }
            Ok(import::unless_changed(t, report))
        })
        .collect()
}

/// The report of a tensor that is kept as it is.
pub(crate) fn raw_report(source: &Source, index: usize, reason: String) -> Result<TensorReport> {
    report(&source.tensors()[index], codecs::get(codecs::RAW)?, None, reason, false)
}

/// The header of the artifact, all lengths right and all checksums zero.
fn planned_header(source: &Source, options: &Options, tensors: &[TensorReport]) -> Result<Header> {
    let unknown = |_: &_| Ok(Identity([0; 32]));
    planned(
        tensors.iter().zip(source.tensors()).map(|(r, t)| {
            let how = Whole { transposed: transposed(t, r.codec), rate: r.rate, extras: r.extras };
            (t.info().clone(), r.codec, how)
        }),
        source.attached().iter().map(|f| (f.name(), f.file().len())),
        source.metadata(),
        &provenance(source, options, unknown)?,
    )
}

/// Compresses a source into an artifact at `target`.
///
/// # Errors
/// [`Error::Nonfinite`] by default policy, [`Error::Invalid`] when the output exists or is an input, [`Error::Io`],
/// whatever is wrong with the source, and whatever `on_progress` returns. Nothing is left behind, unless
/// [`Options::resume`] asks for a journal, which is gone once the output is complete.
pub fn compress(source: &Source, target: &Path, options: &Options, on_progress: &mut OnProgress<'_>) -> Result<Report> {
    let target = &*location::resolved(target)?;
    output::refuse_input(target, inputs(source, options))?;
    let settled = size::settled(source, options, |header| Ok(header.file_bytes()))?;
    let planned = plan_settled(source, &settled)?;
    let options = &settled.options;
    let mut begun = begin(source, options, (target, Target::File), &planned.tensors)?;
    let writer = &mut begun.writer;
    writer.output().preflight(planned.file_bytes.saturating_sub(writer.kept_bytes()))?;
    let tensors = fill(source, 0, planned.tensors, options, &mut begun, on_progress)?;
    let Begun { mut writer, journal, notes } = begun;
    attach(source, &mut writer)?;
    let provenance = provenance(source, options, |file| Ok(file.digest()?.into()))?;
    let Written { header, .. } = writer.finish(source.metadata().clone(), provenance, None)?;
    let mut report = Report::new(tensors, &header, Some(header.identity()));
    report.notes.extend(notes);
    report.notes.extend(journal.map(Journal::finish).unwrap_or_default());
    Ok(report)
}

/// An artifact under way, or what a journal has of it.
struct Begun {
    writer: Writer,
    journal: Option<Journal>,
    notes: Vec<String>,
}

/// Starts an artifact, with a journal where one is asked for.
fn begin(source: &Source, options: &Options, to: (&Path, Target), planned: &[TensorReport]) -> Result<Begun> {
    if options.resume {
        let (journal, writer) = Journal::open(source, options, to, planned)?;
        return Ok(Begun { writer, journal: Some(journal), notes: Vec::new() });
    }
    let (writer, part) = match to {
        (target, Target::File) => (Writer::create(target, options.force)?, None),
        (target, Target::Directory(_)) => (Writer::nameless_in(&location::beside(target)?)?, None),
        (target, Target::Part(part, _)) => (Writer::nameless_in(target)?, Some(part)),
    };
    Ok(Begun { writer, journal: None, notes: leftover(to.0, part).into_iter().collect() })
}

/// Every file that is read.
fn inputs<'a>(source: &'a Source, options: &'a Options) -> impl Iterator<Item = &'a InputFile> {
    source.inputs().chain(options.stats.as_deref().and_then(Stats::file).map(source::SourceFile::file))
}

/// Writes tensors of a source from number `first` on, as they are planned, and gives what became of each.
fn fill(
    source: &Source,
    first: usize,
    planned: Vec<TensorReport>,
    options: &Options,
    Begun { writer, journal, .. }: &mut Begun,
    on_progress: &mut OnProgress<'_>,
) -> Result<Vec<TensorReport>> {
    let total = planned.iter().map(|t| t.source_bytes).sum();
    let mut done = 0;
    let mut tensors = Vec::with_capacity(planned.len());
    let mut budget = Budget::new(source, &planned, options)?;
    for (index, mut planned) in (first..).zip(planned) {
        if let Some(budget) = &budget {
            budget.tell(index, &mut planned)?;
        }
        let name = planned.name.clone();
        let bytes = planned.source_bytes;
        let mut tick = |part: u64| on_progress(Progress { done: done + part, total, tensor: &name });
        let report = match journal.as_mut().map(|journal| journal.next(&planned)).transpose()?.flatten() {
            Some(report) => {
                tick(bytes)?;
                report
            }
            None => {
                let (mut report, mut tensor) = encode_tensor(source, index, planned, options, writer, &mut tick)?;
                if options.coded {
                    tensor = writer.coded(tensor)?;
                    report.stored_bytes = tensor.stored_bytes();
                }
                let entry = writer.keep(tensor)?.clone();
                if let Some(journal) = journal {
                    journal.note(writer, &entry, &report)?;
                }
                report
            }
        };
        if let Some(budget) = &mut budget {
            budget.spend(index, &report)?;
        }
        tensors.push(report);
        done += bytes;
    }
    budget.map_or(Ok(()), |budget| budget.check())?;
    Ok(tensors)
}

/// Attaches the files that a source carries along.
pub(crate) fn attach(source: &Source, writer: &mut Writer) -> Result<()> {
    for attached in source.attached() {
        let file = attached.file();
        writer.attach(attached.name(), file.len(), |at, len| file.read(at, len))?;
    }
    Ok(())
}

/// Raw tensors keep the source's order.
fn transposed(tensor: &SourceTensor, codec: &Codec) -> bool {
    tensor.transposed() && codec.layout != Layout::Raw
}

fn report(
    tensor: &SourceTensor,
    codec: &'static Codec,
    rate: Option<Rate>,
    reason: String,
    changed_codec: bool,
) -> Result<TensorReport> {
    let info = tensor.info();
    let (rows, cols) = tensor.matrix();
    let memory_bytes = codec.layout.plane_bytes(info.dtype(), rows, cols)?.iter().map(|(_, bytes)| bytes).sum();
    let stored_bytes = rate.map_or(memory_bytes, |rate| rate.bytes(info.elements()).min(memory_bytes));
    Ok(TensorReport {
        name: info.name().to_owned(),
        dtype: info.dtype(),
        shape: info.shape().to_vec(),
        matrix: (rows, cols),
        codec,
        rate,
        extras: Extras::NONE,
        most_noise: None,
        reason,
        changed_codec,
        method: Method::Codec,
        method_reason: None,
        source_bytes: info.bytes(),
        stored_bytes,
        memory_bytes,
        distance: None,
        repaired: 0,
        imported: tensor.packed().map(|packed| Imported { format: packed.format(), taken_over: false }),
    })
}

/// Where the content comes from; the recipe as text re-creates the same choices.
pub(crate) fn provenance(
    source: &Source,
    options: &Options,
    digest: impl Fn(&InputFile) -> Result<Identity>,
) -> Result<Provenance> {
    let file = |f: &source::SourceFile| {
        Ok(SourceFile { name: f.name().to_owned(), bytes: f.file().len(), blake3: digest(f.file())? })
    };
    Ok(Provenance { sources: recorded(source, options).map(file).collect::<Result<_>>()?, ..origin(options) })
}

/// What provenance says apart from files.
fn origin(options: &Options) -> Provenance {
    Provenance {
        tool: concat!("tenpak ", env!("CARGO_PKG_VERSION")).to_owned(),
        recipe: options.recipe.to_toml(),
        nonfinite: options.nonfinite.name().to_owned(),
        sources: Vec::new(),
    }
}

/// The files that provenance names.
fn recorded<'a>(source: &'a Source, options: &'a Options) -> impl Iterator<Item = &'a source::SourceFile> {
    source.files().iter().chain(options.stats.as_deref().and_then(Stats::file))
}
