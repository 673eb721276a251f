//! The two forms of an artifact: one file where the output ends in `.tenpak`, otherwise a Hugging Face directory.
//!
//! Which shard holds what, and so the header of a shard, depends on the codec of every tensor, and one may change its
//! codec while it is encoded. So the directory is made from a finished artifact, a nameless file beside the target: the
//! way that [`export::convert`](crate::export::convert) goes, and with the same bytes.

use std::path::Path;

use super::journal::Journal;
use super::part::Part;
use super::{Begun, Options, Report, TensorReport, attach, begin, fill, plan, planned_header, provenance, size};
use crate::artifact::HEADER_FILE;
use crate::artifact::header::Header;
use crate::compress::{OnProgress, Progress};
use crate::error::{Error, Result};
use crate::export::hf::{self, Cut};
use crate::export::{To, card};
use crate::location;
use crate::output::{self, OutputDirectory, preflight};
use crate::source::{Kind, Source};

/// What an artifact is to become.
#[derive(Debug, Clone, Copy)]
pub(super) enum Target {
    /// One file.
    File,
    /// A directory, with the most bytes of a shard.
    Directory(u64),
    /// A part of a directory, with the same.
    Part(Part, u64),
}

/// What will be written at `target`, or, without one, as one file; see [`plan`].
///
/// # Errors
/// Those of [`plan`], and those of [`compress_as`] that can be known without reading weights.
pub fn plan_as(source: &Source, target: Option<&Path>, options: &Options, max_shard_bytes: u64) -> Result<Report> {
    let Some(target) = target.filter(|target| To::of(target) == To::Hf) else { return plan(source, options) };
    let directory = Directory::of(source, max_shard_bytes)?;
    let Foretold { tensors, header, cut, .. } = directory.foretell(source, options)?;
    Ok(directory.report(Report::new(tensors, &header, None), &directory.plan(&header, &cut)?, target))
}

/// Compresses a source into the form that the name of `target` asks for.
///
/// # Errors
/// Those of [`compress`](super::compress); [`Error::Invalid`] when the names of planes collide in a directory, or the
/// output is a directory that may not be replaced. Nothing is left behind.
pub fn compress_as(
    source: &Source,
    target: &Path,
    options: &Options,
    max_shard_bytes: u64,
    on_progress: &mut OnProgress<'_>,
) -> Result<Report> {
    let target = &*location::resolved(target)?;
    if To::of(target) == To::Tenpak {
        return super::compress(source, target, options, on_progress);
    }
    OutputDirectory::check(target, options.force, HEADER_FILE, super::inputs(source, options))?;
    let directory = Directory::of(source, max_shard_bytes)?;
    let Foretold { options, tensors, header, cut } = directory.foretell(source, options)?;
    let mut begun = begin(source, &options, (target, Target::Directory(max_shard_bytes)), &tensors)?;
    let bytes = header.file_bytes() + directory.plan(&header, &cut)?.bytes();
    preflight(target, bytes.saturating_sub(begun.writer.kept_bytes()))?;
    let total = tensors.iter().map(|t| t.source_bytes).sum::<u64>();
    let stored = header.content_bytes() - header.attached_bytes();
    let tensors =
        fill(source, 0, tensors, &options, &mut begun, &mut |p| on_progress(Progress { total: total + stored, ..p }))?;
    let Begun { mut writer, journal, notes } = begun;
    attach(source, &mut writer)?;
    let provenance = provenance(source, &options, |file| Ok(file.digest()?.into()))?;
    let artifact = writer.reopen(source.metadata().clone(), provenance)?;
    // The rates that a loss asks for are known only now.
    let cut = if options.recipe.loss().is_some() { Cut::of(artifact.tensors(), max_shard_bytes)? } else { cut };
    let plan = directory.plan(artifact.header(), &cut)?;
    let identity = artifact.header().identity();
    let mut report = directory.report(Report::new(tensors, artifact.header(), Some(identity)), &plan, target);
    plan.write(&artifact, target, &mut |p| {
        on_progress(Progress { done: total + p.done, total: total + p.total, tensor: p.tensor })
    })?;
    report.notes.extend(notes);
    report.notes.extend(journal.map(Journal::finish).unwrap_or_default());
    Ok(report)
}

/// What a directory will be, from headers alone.
pub(super) struct Foretold {
    /// Options that ask for no size.
    pub options: Options,
    pub tensors: Vec<TensorReport>,
    pub header: Header,
    pub cut: Cut,
}

/// What a directory takes from its source.
pub(super) struct Directory {
    pub config: Option<Vec<u8>>,
    pub model: String,
    max_shard_bytes: u64,
}

impl Directory {
    pub fn of(source: &Source, max_shard_bytes: u64) -> Result<Self> {
        let config = source.attached().iter().find(|f| f.name() == crate::artifact::config::CONFIG);
        let config = match config {
            Some(found) => {
                let len = usize::try_from(found.file().len());
                let len = len.map_err(|_| Error::invalid("config.json is larger than memory"))?;
                Some(found.file().read(0, len)?.to_vec())
            }
            None => None,
        };
        let first = source.files().first().map(|f| f.file().path());
        let path = match source.kind() {
            Kind::HuggingFace => first.map(output::directory),
            _ => first,
        };
        let model = card::model_name(config.as_deref(), path.unwrap_or(Path::new("model")));
        Ok(Self { config, model, max_shard_bytes })
    }

    pub fn foretell(&self, source: &Source, options: &Options) -> Result<Foretold> {
        let cut = |header: &Header| Cut::of(header.tensors(), self.max_shard_bytes);
        let settled = size::settled(source, options, |header| Ok(self.plan(header, &cut(header)?)?.bytes()))?;
        let tensors = settled.reports(source)?;
        let header = planned_header(source, &settled.options, &tensors)?;
        Ok(Foretold { options: settled.options, tensors, cut: cut(&header)?, header })
    }

    fn plan(&self, header: &Header, cut: &Cut) -> Result<hf::Plan> {
        hf::Plan::new(header, self.config.as_deref(), &self.model, cut)
    }

    /// The report of the artifact, with the figures of the directory.
    fn report(&self, mut report: Report, plan: &hf::Plan, target: &Path) -> Report {
        report.file_bytes = plan.bytes();
        report.weight_bytes = plan.weight_bytes();
        report.files = plan.files().into_iter().map(|(name, bytes)| (target.join(name), bytes)).collect();
        report.notes.extend_from_slice(&plan.notes);
        report
    }
}
