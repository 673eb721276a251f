//! A journal of finished tensors, so that a run that was stopped goes on where it stood.
//!
//! It is a directory beside the output, `OUTPUT.journal`, with two files: [`PLANES`], which is the artifact under way, and
//! [`LOG`], whose first line says which run this is and each further line what became of one tensor, in order. A line is
//! the CRC32C of its text, a space, and the text. The planes of a tensor are made durable before its line is written, and
//! the line before the next tensor begins; so whatever a crash leaves behind its last whole line is written again. What
//! lines say is believed where the planes have the checksums that they name.
//!
//! Tensors are encoded one after the other and depend on nothing that is not in the journal, so the output has the bytes of
//! a run that was not stopped. When it is complete the planes become the output, or are copied into its directory, and the
//! journal goes.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::form::Target;
use super::manifest::Job;
use super::part::Part;
use super::{Imported, Options, Quantized, TensorReport, origin, recorded, sample};
use crate::artifact::entry::Entry;
use crate::artifact::writer::{Writer, whole_tensors};
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::location::{self, Location};
use crate::measure::Distance;
use crate::output::{OutputFile, directory, write_all_at};
use crate::source::{Source, SourceFile};

/// The artifact under way.
const PLANES: &str = "planes";
/// What is finished.
const LOG: &str = "finished.log";
/// The only format there is.
const FORMAT: u64 = 1;
/// Characters of a checksum and the space behind it.
const CHECKSUM: usize = 9;

/// Which run a journal is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Run {
    format: u64,
    job: Job,
    target: String,
    requantize: bool,
    files: Vec<Stamp>,
}

/// A file that is read, as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stamp {
    name: String,
    bytes: u64,
    /// Nanoseconds since 1970, where the system knows.
    modified: Option<u64>,
}

/// What became of a tensor.
#[derive(Debug, Serialize, Deserialize)]
struct Finished {
    entry: Entry,
    most_noise: Option<f64>,
    reason: String,
    changed_codec: bool,
    method: String,
    method_reason: Option<String>,
    stored_bytes: u64,
    memory_bytes: u64,
    /// Weights, signal, noise and the largest difference.
    distance: Option<(u64, f64, f64, f64)>,
    repaired: u64,
    taken_over: Option<bool>,
}

/// The format of a log, whatever else its first line says.
#[derive(Deserialize)]
struct Format {
    format: u64,
}

impl Run {
    fn of(source: &Source, options: &Options, target: Target) -> Result<Self> {
        let stamp = |file: &SourceFile| -> Result<Stamp> {
            let since = file.file().modified()?.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
            let modified = since.and_then(|since| u64::try_from(since.as_nanos()).ok());
            Ok(Stamp { name: file.name().to_owned(), bytes: file.file().len(), modified })
        };
        let origin = origin(options);
        let (target, max_shard_bytes) = match target {
            Target::File => ("file".to_owned(), 0),
            Target::Directory(most) => ("directory".to_owned(), most),
            Target::Part(part, most) => (format!("part {part}"), most),
        };
        Ok(Self {
            format: FORMAT,
            job: Job {
                tool: origin.tool,
                recipe: origin.recipe,
                nonfinite: origin.nonfinite,
                coded: options.coded,
                max_shard_bytes,
                source: sample::of(source, options.stats.as_deref())?,
                tensors: source.tensors().len() as u64,
                shards: 0,
            },
            target,
            requantize: options.quantized == Quantized::Anew,
            files: recorded(source, options).map(stamp).collect::<Result<_>>()?,
        })
    }

    /// What the first thing is called in which two runs differ.
    fn differs(&self, other: &Self) -> Option<&'static str> {
        let rest = [
            ("form of the output", self.target == other.target),
            ("option --allow-requantize", self.requantize == other.requantize),
            ("length or time of an input file", self.files == other.files),
        ];
        self.job.differs(&other.job).or_else(|| rest.into_iter().find(|(_, same)| !same).map(|(what, _)| what))
    }
}

impl Finished {
    fn new(entry: &Entry, report: &TensorReport) -> Self {
        Self {
            entry: entry.clone(),
            most_noise: report.most_noise,
            reason: report.reason.clone(),
            changed_codec: report.changed_codec,
            method: report.method.name().to_owned(),
            method_reason: report.method_reason.clone(),
            stored_bytes: report.stored_bytes,
            memory_bytes: report.memory_bytes,
            distance: report.distance.map(|d| (d.weights, d.signal, d.noise, d.max)),
            repaired: report.repaired,
            taken_over: report.imported.map(|imported| imported.taken_over),
        }
    }

    /// Whether this is about the tensor.
    fn is_of(&self, planned: &TensorReport) -> bool {
        let info = self.entry.info();
        info.name() == planned.name
            && info.dtype() == planned.dtype
            && info.shape() == planned.shape
            && self.taken_over.is_some() == planned.imported.is_some()
    }

    /// The report of the tensor.
    fn report(self, planned: &TensorReport) -> Result<TensorReport> {
        let Self { entry, method, distance, taken_over, .. } = self;
        let imported = planned.imported.zip(taken_over);
        Ok(TensorReport {
            name: planned.name.clone(),
            dtype: planned.dtype,
            shape: planned.shape.clone(),
            matrix: planned.matrix,
            codec: entry.codec(),
            rate: entry.rate(),
            extras: entry.extras(),
            most_noise: self.most_noise,
            reason: self.reason,
            changed_codec: self.changed_codec,
            method: method.parse()?,
            method_reason: self.method_reason,
            source_bytes: planned.source_bytes,
            stored_bytes: self.stored_bytes,
            memory_bytes: self.memory_bytes,
            distance: distance.map(|(weights, signal, noise, max)| Distance { weights, signal, noise, max }),
            repaired: self.repaired,
            imported: imported.map(|(imported, taken_over)| Imported { taken_over, ..imported }),
        })
    }
}

/// The journal of a run under way.
#[derive(Debug)]
pub(super) struct Journal {
    dir: PathBuf,
    /// Locked, so that no other process works with the journal.
    log: File,
    /// Bytes of its whole lines.
    len: u64,
    finished: VecDeque<Finished>,
    /// Whether there is anything in it that is worth keeping.
    of_use: bool,
    notes: Vec<String>,
}

impl Journal {
    /// Opens the journal of an output, or begins one, and the artifact under way with what is finished of it.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it is of another run and `force` is not set, which begins anew, or when another process works
    /// with it; [`Error::Io`].
    pub fn open(
        source: &Source,
        options: &Options,
        (output, target): (&Path, Target),
        planned: &[TensorReport],
    ) -> Result<(Self, Writer)> {
        location::refuse_url(output, "a journal, as --resume keeps it,")?;
        let home = match target {
            Target::File => OutputFile::check(output, options.force)?,
            Target::Directory(_) | Target::Part(..) => output.to_owned(),
        };
        let dir = place(output, target);
        let run = Run::of(source, options, target)?;
        let (log, planes) = files(&dir)?;
        let mut journal = Self { dir, log, len: 0, finished: VecDeque::new(), of_use: true, notes: Vec::new() };
        let found = journal.read(&run, planned, options.force)?;
        let sound = whole_tensors(&planes, &found.iter().map(|(one, _)| one.entry.clone()).collect::<Vec<_>>())?;
        if sound < found.len() {
            let what = "are written again: their planes in the journal are not whole";
            journal.notes.push(format!("{} finished tensors {what}", found.len() - sound));
        }
        let io = |e| Error::io(journal.dir.join(LOG), e);
        if let Some((_, end)) = found[..sound].last() {
            journal.len = *end;
            journal.notes.push(format!("{sound} tensors were finished by a run that was stopped"));
            journal.log.set_len(journal.len).map_err(io)?;
        } else {
            journal.log.set_len(0).map_err(io)?;
            planes.set_len(0).map_err(|e| Error::io(journal.dir.join(PLANES), e))?;
            journal.of_use = false;
            journal.len = 0;
            journal.append(&run)?;
            sync_directory(&journal.dir)?;
            sync_directory(directory(&journal.dir))?;
        }
        journal.finished = found.into_iter().take(sound).map(|(one, _)| one).collect();
        let entries = journal.finished.iter().map(|one| one.entry.clone()).collect();
        let out = OutputFile::kept(home, options.force, planes, &journal.dir.join(PLANES))?;
        Ok((journal, Writer::resumed(out, entries)))
    }

    /// What whole lines say is finished, and where each of them ends; nothing when the journal has to begin anew.
    fn read(&mut self, run: &Run, planned: &[TensorReport], force: bool) -> Result<Vec<(Finished, u64)>> {
        let path = self.dir.join(LOG);
        let io = |e| Error::io(&path, e);
        let mut log = &self.log;
        log.seek(SeekFrom::Start(0)).map_err(io)?;
        let mut lines = BufReader::new(log);
        let mut text = Vec::new();
        let mut end = 0;
        let mut next = |end: &mut u64| -> Result<Option<Vec<u8>>> {
            text.clear();
            let most = Limits::DEFAULT.header_bytes;
            let len = lines.by_ref().take(most).read_until(b'\n', &mut text).map_err(io)?;
            *end += len as u64;
            Ok(content(&text).map(<[u8]>::to_vec))
        };
        let Some(first) = next(&mut end)? else { return Ok(Vec::new()) };
        let known = match serde_json::from_slice(&first) {
            Ok(Format { format: FORMAT }) => serde_json::from_slice::<Run>(&first).ok(),
            _ => None,
        };
        let differs = match known {
            Some(known) => known.differs(run),
            None => Some("version of tenpak"),
        };
        if let Some(what) = differs {
            if !force {
                return Err(Error::invalid(format!(
                    "journal {} is of a run with another {what}; repeat that run, remove the journal, or pass --force to begin \
                     anew",
                    self.dir.display()
                )));
            }
            self.notes.push(format!("a journal of a run with another {what} was given up"));
            return Ok(Vec::new());
        }
        let mut found = Vec::new();
        for tensor in planned {
            let Some(line) = next(&mut end)? else { break };
            match serde_json::from_slice::<Finished>(&line) {
                Ok(one) if one.is_of(tensor) => found.push((one, end)),
                _ => break,
            }
        }
        Ok(found)
    }

    /// What became of the next tensor, where the journal knows.
    pub fn next(&mut self, planned: &TensorReport) -> Result<Option<TensorReport>> {
        self.finished.pop_front().map(|one| one.report(planned)).transpose()
    }

    /// Takes note of the tensor that a writer has just kept.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn note(&mut self, writer: &Writer, entry: &Entry, report: &TensorReport) -> Result<()> {
        writer.output().sync()?;
        self.append(&Finished::new(entry, report))?;
        self.of_use = true;
        Ok(())
    }

    fn append(&mut self, content: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string(content);
        let text = text.map_err(|e| Error::invalid(format!("a line of the journal cannot be printed: {e}")))?;
        let line = format!("{:08x} {text}\n", crc32c::crc32c(text.as_bytes()));
        let io = |e| Error::io(self.dir.join(LOG), e);
        write_all_at(&self.log, self.len, line.as_bytes()).map_err(io)?;
        self.log.sync_data().map_err(io)?;
        self.len += line.len() as u64;
        Ok(())
    }

    /// Removes the journal of an output that is complete, and gives what a reader should know.
    pub fn finish(mut self) -> Vec<String> {
        let mut notes = std::mem::take(&mut self.notes);
        self.of_use = true;
        let dir = self.dir.clone();
        drop(self);
        if let Err(e) = std::fs::remove_dir_all(&dir) {
            notes.push(format!("{} is of no use any more and cannot be removed: {e}", dir.display()));
        }
        notes
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        // A child of this process that has not called exec yet would hold the lock as well.
        drop(self.log.unlock());
        if !self.of_use {
            // Nothing is lost where it stays: the next run begins anew.
            drop(std::fs::remove_dir_all(&self.dir));
        }
    }
}

/// The text of a whole line.
fn content(line: &[u8]) -> Option<&[u8]> {
    let line = line.strip_suffix(b"\n")?;
    let (checksum, text) = line.split_at_checked(CHECKSUM)?;
    let expected = format!("{:08x} ", crc32c::crc32c(text));
    (checksum == expected.as_bytes()).then_some(text)
}

/// Where the journal of an output lies.
fn place(output: &Path, target: Target) -> PathBuf {
    let mut name = output.file_name().map_or_else(|| OsString::from("output"), ToOwned::to_owned);
    if let Target::Part(part, _) = target {
        name.push(".");
        name.push(Part::directory(part));
    }
    name.push(".journal");
    directory(output).join(name)
}

/// Log and planes, made where there are none; the log locked.
fn files(dir: &Path) -> Result<(File, File)> {
    match std::fs::create_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && dir.is_dir() => {
            if dir.read_dir().map_err(|e| Error::io(dir, e))?.next().is_some() && !dir.join(LOG).is_file() {
                let what = "has files but no log, so it is no journal: move it away";
                return Err(Error::invalid(format!("{} {what}", dir.display())));
            }
        }
        made => made.map_err(|e| Error::io(dir, e))?,
    }
    let open = |name: &str| {
        let path = dir.join(name);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        file.map_err(|e| Error::io(path, e))
    };
    let log = open(LOG)?;
    if let Err(TryLockError::WouldBlock) = log.try_lock() {
        let what = "is in use by another process; wait for it, or stop it";
        return Err(Error::invalid(format!("journal {} {what}", dir.display())));
    }
    Ok((log, open(PLANES)?))
}

#[cfg(unix)]
fn sync_directory(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|e| Error::io(dir, e))
}

#[cfg(not(unix))]
fn sync_directory(_: &Path) -> Result<()> {
    Ok(())
}

/// Says that there is a journal of an output that nobody asked to use.
#[must_use]
pub fn leftover(output: &Path, part: Option<Part>) -> Option<String> {
    let Ok(Location::Local(output)) = location::of(output) else { return None };
    let dir = place(&output, part.map_or(Target::File, |part| Target::Part(part, 0)));
    let what = "holds what a run that was stopped had finished; --resume goes on with it, otherwise remove it";
    dir.join(LOG).is_file().then(|| format!("{} {what}", dir.display()))
}
