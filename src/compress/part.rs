//! A part of an artifact: some of the shards of a directory, written by one of many processes that need not know of each
//! other.
//!
//! Where shards are cut, and which of them a part has, follows from headers and options alone, so every process comes to
//! the same cut, and its shards are those of a single run but for the checksum of the header that all tensors share:
//! [`merge`](super::merge()) puts that in. A part lies in a directory of its own under the output and appears there whole
//! or not at all, so that a process that was killed is simply run again.
//!
//! Parts must come from the same weights: each records a digest of samples of them, see [`super::sample`], and the full
//! digest of those files that fall to it.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::form::{Directory, Foretold, Target};
use super::journal::Journal;
use super::manifest::{self, Job, Manifest, Read};
use super::{Begun, Options, Report, attach, begin, fill, inputs, origin, recorded, sample};
use crate::artifact::header::Header;
use crate::artifact::{HEADER_FILE, Identity, Provenance, SourceFile};
use crate::compress::{OnProgress, Progress};
use crate::error::{Error, Result};
use crate::export::To;
use crate::export::hf::{Cut, Plan};
use crate::file::InputFile;
use crate::location;
use crate::output::{OutputDirectory, preflight};
use crate::source::Source;

/// The most parts: what five digits can name.
const MOST: u32 = 99_999;

/// What the names of part directories begin with.
const PREFIX: &str = "part-";

/// Which of how many parts, from 1 on; as text `3/8`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    number: u32,
    of: u32,
}

impl Part {
    /// Part `number` of `of`.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is no such part.
    pub fn new(number: u32, of: u32) -> Result<Self> {
        if number == 0 || number > of || of > MOST {
            let wanted = format!("expected a number from 1 to how many there are, at most {MOST}, such as 3/8");
            return Err(Error::invalid(format!("there is no shard {number}/{of}, {wanted}")));
        }
        Ok(Self { number, of })
    }

    /// Which one, from 1 on.
    #[must_use]
    pub fn number(self) -> u32 {
        self.number
    }

    /// How many there are.
    #[must_use]
    pub fn of(self) -> u32 {
        self.of
    }

    /// Its directory in that of the artifact.
    #[must_use]
    pub fn directory(self) -> String {
        format!("{PREFIX}{:05}-of-{:05}", self.number, self.of)
    }

    /// What falls to this part of things in a row that take so many bytes: neighbours, of about the same sum for every
    /// part.
    fn share(self, bytes: &[u64]) -> Range<usize> {
        let total = bytes.iter().map(|&b| u128::from(b)).sum::<u128>().max(1);
        let mut before = 0;
        let owners: Vec<u128> = bytes
            .iter()
            .map(|&b| {
                let middle = 2 * before + u128::from(b);
                before += u128::from(b);
                (middle * u128::from(self.of) / (2 * total)).min(u128::from(self.of) - 1)
            })
            .collect();
        let first = |part: u32| owners.partition_point(|&owner| owner < u128::from(part));
        first(self.number - 1)..first(self.number)
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.number, self.of)
    }
}

impl FromStr for Part {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let wrong = || Error::invalid(format!("'{s}' is no shard, expected one such as 3/8: the third of eight"));
        let (number, of) = s.split_once('/').ok_or_else(wrong)?;
        Self::new(number.parse().map_err(|_| wrong())?, of.parse().map_err(|_| wrong())?)
    }
}

/// What a part has of an artifact that is foretold.
struct Own {
    /// Numbers of its shards, and of their tensors.
    shards: Range<usize>,
    tensors: Range<usize>,
    /// Whether the attached files lie with it: those of the first shard do.
    attaches: bool,
}

impl Own {
    fn of(part: Part, foretold: &Foretold) -> Self {
        let bytes = |shard: usize| {
            let tensors = foretold.cut.tensors(&(shard..shard + 1));
            foretold.tensors[tensors].iter().map(|t| t.source_bytes).sum()
        };
        let shards = part.share(&(0..foretold.cut.counts().len()).map(bytes).collect::<Vec<_>>());
        Self { tensors: foretold.cut.tensors(&shards), attaches: shards.contains(&0), shards }
    }
}

/// What [`compress_part`] would write.
///
/// # Errors
/// Those of [`compress_part`] that can be known without reading weights.
pub fn plan_part(
    source: &Source,
    target: Option<&Path>,
    options: &Options,
    max_shard_bytes: u64,
    part: Part,
) -> Result<Report> {
    check(target, options)?;
    let target = target.unwrap_or(Path::new(""));
    let directory = Directory::of(source, max_shard_bytes)?;
    let foretold = directory.foretell(source, options)?;
    let own = Own::of(part, &foretold);
    let sources = reads(source, &foretold.options, part, |_| Ok(Identity([0; 32])))?;
    let header = planned(source, &foretold, &own, &sources)?;
    let plan = Plan::part(&header, config(&directory, &own), &foretold.cut, own.shards.clone())?;
    let manifest = Manifest::new(
        part,
        job(source, &foretold, max_shard_bytes)?,
        directory.model,
        sources,
        own.shards.start,
        &foretold.cut.counts()[own.shards.clone()],
    );
    let tensors = foretold.tensors[own.tensors.clone()].to_vec();
    report(Report::new(tensors, &header, None), &plan, &manifest, part, &own, &foretold.cut, target)
}

/// Compresses what falls to a part of a directory at `target`, into a directory in it.
///
/// Only this part is replaced by [`Options::force`].
///
/// # Errors
/// Those of [`compress_as`](super::compress_as); [`Error::Invalid`] when a loss is asked for, which tensors share one
/// after the other, or when `target` is one file or holds what is no part.
pub fn compress_part(
    source: &Source,
    target: &Path,
    options: &Options,
    max_shard_bytes: u64,
    part: Part,
    on_progress: &mut OnProgress<'_>,
) -> Result<Report> {
    let target = &*location::resolved(target)?;
    check(Some(target), options)?;
    let home = target.join(part.directory());
    OutputDirectory::check(&home, options.force, manifest::NAME, inputs(source, options))?;
    let directory = Directory::of(source, max_shard_bytes)?;
    let foretold = directory.foretell(source, options)?;
    let own = Own::of(part, &foretold);
    let unknown = reads(source, &foretold.options, part, |_| Ok(Identity([0; 32])))?;
    let header = planned(source, &foretold, &own, &unknown)?;
    std::fs::create_dir_all(target).map_err(|e| Error::io(target, e))?;
    let job = job(source, &foretold, max_shard_bytes)?;
    let planned = foretold.tensors[own.tensors.clone()].to_vec();
    let mut begun = begin(source, &foretold.options, (target, Target::Part(part, max_shard_bytes)), &planned)?;
    preflight(&home, (2 * header.file_bytes()).saturating_sub(begun.writer.kept_bytes()))?;
    let total = planned.iter().map(|t| t.source_bytes).sum::<u64>();
    let stored = header.content_bytes() - header.attached_bytes();
    let tensors = fill(source, own.tensors.start, planned, &foretold.options, &mut begun, &mut |p| {
        on_progress(Progress { total: total + stored, ..p })
    })?;
    let Begun { mut writer, journal, notes } = begun;
    if own.attaches {
        attach(source, &mut writer)?;
    }
    let sources = reads(source, &foretold.options, part, |file| Ok(file.digest()?.into()))?;
    let provenance = Provenance { sources: digested(&sources), ..origin(&foretold.options) };
    let artifact = writer.reopen(source.metadata().clone(), provenance)?;
    let plan = Plan::part(artifact.header(), config(&directory, &own), &foretold.cut, own.shards.clone())?;
    let counts = &foretold.cut.counts()[own.shards.clone()];
    let manifest = Manifest::new(part, job, directory.model, sources, own.shards.start, counts);
    let identity = artifact.header().identity();
    let out = OutputDirectory::create(&home)?;
    if !own.shards.is_empty() {
        plan.fill(&artifact, &out, &mut |p| {
            on_progress(Progress { done: total + p.done, total: total + p.total, tensor: p.tensor })
        })?;
    }
    out.write(manifest::NAME, &manifest.print()?)?;
    let done = Report::new(tensors, artifact.header(), Some(identity));
    let mut report = report(done, &plan, &manifest, part, &own, &foretold.cut, target)?;
    out.commit()?;
    report.notes.extend(notes);
    report.notes.extend(journal.map(Journal::finish).unwrap_or_default());
    Ok(report)
}

/// Checks what can be known before the source is looked at.
fn check(target: Option<&Path>, options: &Options) -> Result<()> {
    if options.recipe.loss().is_some() {
        return Err(Error::invalid(
            "a loss is shared out to one tensor after the other, so no part can be written alone; ask for bits or a size",
        ));
    }
    let Some(target) = target else { return Ok(()) };
    location::refuse_url(target, "what processes write in parts")?;
    if To::of(target) == To::Tenpak {
        return Err(Error::invalid(format!(
            "output {} is one file, which cannot be written in parts; choose a directory, and convert it when it is whole",
            target.display()
        )));
    }
    if target.join(HEADER_FILE).exists() {
        let what = "holds a model that is whole; remove it or choose another name";
        return Err(Error::invalid(format!("output {} {what}", target.display())));
    }
    if target.exists() {
        parts_in(target)?;
    }
    Ok(())
}

/// The directories of parts in `dir`.
///
/// # Errors
/// [`Error::Invalid`] when there is anything else in it that is not of a process that was stopped.
pub(super) fn parts_in(dir: &Path) -> Result<Vec<PathBuf>> {
    let io = |e| Error::io(dir, e);
    let mut parts = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(".tenpak-") {
            continue;
        }
        if !name.starts_with(PREFIX) || !entry.path().is_dir() {
            let what = "which is no part of a model; parts lie in a directory of their own: move it away";
            return Err(Error::invalid(format!("{} has '{}', {what}", dir.display(), name.escape_debug())));
        }
        parts.push(entry.path());
    }
    parts.sort();
    Ok(parts)
}

/// The text of the config where it lies with this part.
fn config<'a>(directory: &'a Directory, own: &Own) -> Option<&'a [u8]> {
    directory.config.as_deref().filter(|_| own.attaches)
}

/// The header of the part, all lengths right and all checksums zero.
fn planned(source: &Source, foretold: &Foretold, own: &Own, reads: &[Read]) -> Result<Header> {
    let attached = if own.attaches { source.attached() } else { &[] };
    let tensors = foretold.header.tensors()[own.tensors.clone()].iter();
    let tensors = tensors.map(|entry| (entry.info().clone(), entry.codec(), entry.how()));
    let files = attached.iter().map(|file| (file.name(), file.file().len()));
    let provenance = Provenance { sources: digested(reads), ..origin(&foretold.options) };
    crate::artifact::writer::planned(tensors, files, source.metadata(), &provenance)
}

/// The files that are read, with the digests of those that fall to this part.
fn reads(
    source: &Source,
    options: &Options,
    part: Part,
    digest: impl Fn(&InputFile) -> Result<Identity>,
) -> Result<Vec<Read>> {
    let files: Vec<_> = recorded(source, options).collect();
    let own = part.share(&files.iter().map(|file| file.file().len().max(1)).collect::<Vec<_>>());
    let read = |(index, file): (usize, &crate::source::SourceFile)| {
        let blake3 = own.contains(&index).then(|| digest(file.file())).transpose()?;
        Ok(Read { name: file.name().to_owned(), bytes: file.file().len(), blake3 })
    };
    files.into_iter().enumerate().map(read).collect()
}

/// Those files whose digests fall to this part.
fn digested(reads: &[Read]) -> Vec<SourceFile> {
    let known = |read: &Read| Some(SourceFile { name: read.name.clone(), bytes: read.bytes, blake3: read.blake3? });
    reads.iter().filter_map(known).collect()
}

/// What all parts agree in.
fn job(source: &Source, foretold: &Foretold, max_shard_bytes: u64) -> Result<Job> {
    let Provenance { tool, recipe, nonfinite, .. } = origin(&foretold.options);
    Ok(Job {
        tool,
        recipe,
        nonfinite,
        coded: foretold.options.coded,
        max_shard_bytes,
        source: sample::of(source, foretold.options.stats.as_deref())?,
        tensors: foretold.tensors.len() as u64,
        shards: foretold.cut.counts().len() as u64,
    })
}

/// The report of the part, with the figures of its directory.
fn report(
    mut report: Report,
    plan: &Plan,
    manifest: &Manifest,
    part: Part,
    own: &Own,
    cut: &Cut,
    target: &Path,
) -> Result<Report> {
    let home = target.join(part.directory());
    let text = manifest.print()?.len() as u64;
    let files = if own.shards.is_empty() { Vec::new() } else { plan.files() };
    let files = files.into_iter().chain([(manifest::NAME.to_owned(), text)]);
    report.files = files.map(|(name, bytes)| (home.join(name), bytes)).collect();
    report.file_bytes = report.files.iter().map(|(_, bytes)| bytes).sum();
    report.weight_bytes = if own.shards.is_empty() { 0 } else { plan.weight_bytes() };
    report.part = Some(part);
    let all = cut.counts().len();
    report.notes.push(if own.shards.is_empty() {
        let why = "a smaller --max-shard-size makes more of them";
        format!("nothing falls to part {part}: the model has {all} shards; {why}")
    } else {
        format!("part {part} has {} of {all} shards; tenpak merge-index puts all parts together", own.shards.len())
    });
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_share_everything_out_once_and_in_order() {
        for bytes in [vec![], vec![0], vec![7], vec![0, 0, 0], vec![5, 1, 1, 1, 9, 0, 3], vec![u64::MAX >> 2; 40]] {
            for of in 1..20 {
                let shares: Vec<_> = (1..=of).map(|number| Part::new(number, of).unwrap().share(&bytes)).collect();
                assert!(shares.iter().zip(shares.iter().skip(1)).all(|(a, b)| a.end == b.start), "{shares:?}");
                assert_eq!((shares[0].start, shares.last().unwrap().end), (0, bytes.len()), "{shares:?}");
            }
        }
    }

    #[test]
    fn a_part_is_read_as_it_is_printed() {
        assert_eq!("3/8".parse::<Part>().unwrap().to_string(), "3/8");
        assert_eq!("3/8".parse::<Part>().unwrap().directory(), "part-00003-of-00008");
        for wrong in ["", "3", "0/8", "9/8", "1/0", "-1/2", "1/100000", "a/b", "1/2/3"] {
            assert!(wrong.parse::<Part>().is_err(), "{wrong}");
        }
    }
}
