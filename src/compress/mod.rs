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
mod options;
mod part;
mod rated;
mod report;
mod sample;
mod size;
mod whole;

use std::path::Path;

use crate::artifact::header::Header;
use crate::artifact::writer::{Whole, Written, planned};
use crate::artifact::{Identity, Provenance, SourceFile, Writer};
use crate::codec::Codec;
use crate::codec::extra::Extras;
use crate::codecs;
use crate::error::Result;
use crate::file::InputFile;
use crate::fit::{Method, Rate};
use crate::layout::Layout;
use crate::location;
use crate::output;
use crate::recipe::{Choice, Reason};
use crate::source::{self, Source, SourceTensor};
use crate::stats::Stats;
use budget::Budget;
pub(crate) use encode::encode_tensor;
pub use forecast::{Expected, Frontier, Point, frontier};
use form::Target;
pub use form::{compress_as, plan_as};
use journal::Journal;
pub use journal::leftover;
pub use merge::{Merged, merge};
pub use options::{Nonfinite, Options, Quantized};
pub use part::{Part, compress_part, plan_part};
pub(crate) use rated::padded;
pub use report::{Imported, Report, TensorReport};
use size::Settled;

/// Source bytes that are in memory at once.
pub const BLOCK_BYTES: u64 = 8 << 20;

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

/// What will be written, to the byte, from the source's headers alone.
///
/// A tensor whose scales turn out not to fit its codec, or that holds NaN, is what headers cannot tell; [`compress`] then
/// reports the codec that it took instead. Nor can they tell the length of coded planes: for them stands what was asked
/// for, or, with [`Options::coded`], what they take as they are.
///
/// # Errors
/// [`crate::Error::Invalid`] when a codec cannot hold a tensor.
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
/// [`crate::Error::Nonfinite`] by default policy, [`crate::Error::Invalid`] when the output exists or is an input, [`crate::Error::Io`],
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
