//! Deltas: an artifact of the tensors that a variant does not share with its base.
//!
//! There are two kinds. What follows is about those of artifacts; those of 16-bit checkpoints, lossless or with quantized
//! differences, are in [`checkpoint`].
//!
//! A variant is compressed with the base's own recipe, tensor by tensor; those whose planes come out equal are dropped
//! again and cost two integers per run of them. [`materialize`] puts base and deltas together again and gives, byte for
//! byte, the file that compressing the variant directly would have given. Chains of deltas resolve to one list of
//! planes before anything is copied. Attached files are the variant's: the delta carries them all, and a chain gives
//! those of its last delta.

pub mod chain;
pub mod checkpoint;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::entry::Entry;
use super::header::Delta;
use super::identity::{self, Identity};
use super::map::ArtifactFile;
use super::writer::{TensorWriter, Writer, Written};
use crate::codec::Codec;
use crate::codecs;
use crate::compress::{self, OnProgress, Options, Progress, Quantized, TensorReport};
use crate::difference::Model;
use crate::error::{Error, Result};
use crate::export;
use crate::fit::Rate;
use crate::measure::Distance;
use crate::output;
use crate::recipe::Recipe;
use crate::source::Source;
use crate::stats::Stats;
use crate::tensor::DType;

/// The longest chain of deltas that is resolved.
pub const MAX_CHAIN: usize = 32;

/// How a delta says what a variant is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The tensors whose compressed form is not that of the base, an artifact.
    Changed,
    /// What the words of tensors differ in from those of the base, a checkpoint.
    Lossless,
    /// What the weights of matrices differ in from those of the base, a checkpoint, in a codec; anything else lossless.
    Quantized,
}

impl Mode {
    /// Every mode, with its name.
    pub const ALL: &[(&'static str, Self)] =
        &[("changed", Self::Changed), ("lossless", Self::Lossless), ("quantized", Self::Quantized)];

    /// The name in options and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, mode)| *mode == self).map_or("", |(name, _)| name)
    }
}

impl std::str::FromStr for Mode {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        Self::ALL.iter().find(|(name, _)| *name == s).map(|(_, mode)| *mode).ok_or_else(|| {
            Error::invalid(format!("unknown mode '{s}' of a delta, expected changed, lossless or quantized"))
        })
    }
}

/// What a delta came to.
#[derive(Debug, Clone)]
pub struct DeltaReport {
    /// How it says what the variant is.
    pub mode: Mode,
    /// The tensors stored in the delta.
    pub changed: Vec<TensorReport>,
    /// How many tensors are those of the base.
    pub unchanged: usize,
    /// Length of the delta.
    pub file_bytes: u64,
    /// Length of the base; of a checkpoint, of its tensors.
    pub base_bytes: u64,
    /// Bytes of the tensors of the variant, before anything is compressed.
    pub variant_bytes: u64,
    /// Weights of the variant.
    pub weights: u64,
    /// What the variant loses; `None` where that is nothing, or, with `epsilon`, not known.
    pub distance: Option<Distance>,
    /// Sum of the squares of what variant and base differ in, where both are checkpoints.
    pub moved: Option<f64>,
    /// Bytes of the tensors of the variant compressed in the same way without a base; lossless ones as their frequencies say.
    pub alone_bytes: u64,
    /// What the variant loses then.
    pub alone: Option<Distance>,
    /// Identity of the result.
    pub result: Identity,
}

/// Writes the delta of a variant against a base.
///
/// With `epsilon` zero, a tensor is unchanged when its planes are. Otherwise it is also taken for unchanged when no
/// decoded weight differs from the base's decoded weight by more than `epsilon`. A base that was made with statistics
/// takes the same ones here.
///
/// # Errors
/// [`Error::Invalid`] when `epsilon` is negative or not a number, when the base is itself a delta, or when the output
/// exists or is an input; and those of [`compress::compress`].
pub fn delta(
    base: &ArtifactFile,
    variant: &Source,
    epsilon: f64,
    stats: Option<Arc<Stats>>,
    target: &Path,
    force: bool,
    on_progress: &mut OnProgress<'_>,
) -> Result<DeltaReport> {
    if !(epsilon >= 0.0 && epsilon.is_finite()) {
        return Err(Error::invalid(format!("epsilon is {epsilon}, expected a number from 0 up")));
    }
    refuse_delta(base)?;
    output::refuse_input(target, variant.inputs().chain(base.inputs()))?;
    let provenance = base.header().provenance();
    if provenance.recipe.is_empty() {
        return Err(Error::invalid(format!(
            "{} does not say which recipe made it, so a variant cannot be compressed alike; compress the base again",
            base.path().display()
        )));
    }
    let recipe = Recipe::from_toml(&provenance.recipe)?;
    if recipe.method().needs_stats() != stats.is_some() {
        let (fit, path) = (recipe.method().name(), base.path().display());
        return Err(Error::invalid(if stats.is_some() {
            format!("{path} was made without statistics (fit '{fit}'), so its variants are too; leave out --stats")
        } else {
            format!("{path} was made with statistics (fit '{fit}'); pass the same file with --stats, or nothing agrees")
        }));
    }
    // The recipe of a base that was taken over from another tool.
    let kept = recipe == Recipe::new(codecs::get(codecs::RAW)?).all(true);
    let quantized = if kept { Quantized::Keep } else { Quantized::Refuse };
    let options = Options { stats, quantized, ..Options::new(recipe, provenance.nonfinite.parse()?, force) };
    let mut planned = compress::plan(variant, &options)?;
    // A tensor of the base keeps its rate, whatever decided it.
    for tensor in planned.tensors.iter_mut().filter(|tensor| tensor.rate.is_some()) {
        let of_base = base.header().find(&tensor.name).and_then(|i| base.tensors()[i].rate());
        tensor.rate = of_base.or(tensor.rate);
    }
    let mut writer = Writer::create(target, force)?;
    writer.output().preflight(planned.file_bytes)?;
    let total = planned.tensors.iter().map(|t| t.source_bytes).sum();
    let mut done = 0;
    let mut runs = Runs::default();
    let mut result: Vec<Entry> = Vec::with_capacity(planned.tensors.len());
    let mut changed = Vec::new();
    let (mut alone, mut alone_bytes) = (None::<Distance>, 0);
    for (index, planned) in planned.tensors.into_iter().enumerate() {
        let (name, bytes) = (planned.name.clone(), planned.source_bytes);
        let mut tick = |part: u64| on_progress(Progress { done: done + part, total, tensor: &name });
        let in_base =
            base.header().find(&name).filter(|&i| base.tensors()[i].info() == variant.tensors()[index].info());
        let (report, tensor) = compress::encode_tensor(variant, index, planned, &options, &writer, &mut tick)?;
        done += bytes;
        alone_bytes += tensor.stored_bytes();
        if let Some(distance) = &report.distance {
            alone.get_or_insert_default().merge(distance);
        }
        let same = match in_base {
            Some(i) => is_unchanged(base, i, &writer, &tensor, epsilon)?.then_some(i),
            None => None,
        };
        if let Some(i) = same {
            runs.push(i64::try_from(i).expect("tensors are counted in 32 bits"));
            result.push(base.tensors()[i].clone());
        } else {
            runs.push(-1);
            result.push(writer.keep(tensor)?.clone());
            changed.push(report);
        }
    }
    let result = identity::of(result.iter());
    let provenance = compress::provenance(variant, &options, |file| Ok(file.digest()?.into()))?;
    compress::attach(variant, &mut writer)?;
    let unchanged = variant.tensors().len() - changed.len();
    let section = Delta { checkpoint: false, base: base.header().identity(), result, runs: runs.0 };
    let Written { file_bytes, .. } = writer.finish(variant.metadata().clone(), provenance, Some(section))?;
    Ok(DeltaReport {
        mode: Mode::Changed,
        changed,
        unchanged,
        file_bytes,
        base_bytes: base.bytes(),
        variant_bytes: total,
        weights: variant.tensors().iter().map(|tensor| tensor.info().elements()).sum(),
        distance: alone.filter(|_| epsilon == 0.0),
        moved: None,
        alone_bytes,
        alone,
        result,
    })
}

/// What a delta is asked to be.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// How; unless that follows from the base and the rest.
    pub mode: Option<Mode>,
    /// Codec of quantized differences.
    pub codec: Option<&'static Codec>,
    /// Bits per weight of quantized differences in a codec of an open size.
    pub target_bits: Option<Rate>,
    /// Largest difference of a decoded weight that counts as none, where the base is an artifact.
    pub epsilon: f64,
    /// The statistics that the base was made with, where the base is an artifact that was.
    pub stats: Option<Arc<Stats>>,
}

/// Writes the delta of a variant against an artifact or a checkpoint.
///
/// # Errors
/// Those of [`delta`] and [`checkpoint::delta`]; [`Error::Invalid`] when the request and the base do not go together.
pub fn create(
    base: &Model,
    variant: &Source,
    request: Request,
    target: &Path,
    force: bool,
    on_progress: &mut OnProgress<'_>,
) -> Result<DeltaReport> {
    let Request { mode, codec, target_bits, epsilon, stats } = request;
    let quantizes = codec.is_some() || target_bits.is_some();
    let invalid = |what: &str| Err(Error::invalid(what));
    match (base, mode) {
        (Model::Artifact(_), None | Some(Mode::Changed)) if quantizes => invalid(
            "a delta of an artifact has the recipe of its base; leave out codec and bits, or pass the base's checkpoint",
        ),
        (Model::Artifact(base), None | Some(Mode::Changed)) => {
            delta(base, variant, epsilon, stats, target, force, on_progress)
        }
        (Model::Artifact(_), Some(mode)) => Err(Error::invalid(format!(
            "a delta of mode {} is of a checkpoint, but the base is an artifact; pass the base's checkpoint",
            mode.name()
        ))),
        (Model::Source(_), Some(Mode::Changed)) => {
            invalid("a delta of mode changed is of an artifact, but the base is a checkpoint; compress the base first")
        }
        (Model::Source(_), _) if epsilon != 0.0 || stats.is_some() => {
            invalid("epsilon and statistics are of deltas of artifacts, but the base is a checkpoint; leave them out")
        }
        (Model::Source(_), Some(Mode::Lossless)) if quantizes => {
            invalid("a lossless delta takes neither codec nor bits; leave them out or choose mode quantized")
        }
        (Model::Source(base), mode) => {
            let recipe = (quantizes || mode == Some(Mode::Quantized)).then(|| checkpoint::recipe(codec, target_bits));
            checkpoint::delta(base, variant, recipe.transpose()?, target, force, on_progress)
        }
    }
}

/// What was put together.
#[derive(Debug, Clone)]
pub struct Materialized {
    /// The files with their lengths.
    pub files: Vec<(PathBuf, u64)>,
    /// Identity of the result.
    pub identity: Identity,
    /// How many tensors it has.
    pub tensors: usize,
}

/// Writes what a base, an artifact or a checkpoint, and a chain of deltas stand for.
///
/// # Errors
/// Those of [`materialize`] and [`chain::materialize`].
pub fn restore(
    base: &Model,
    deltas: &[ArtifactFile],
    target: &Path,
    force: bool,
    on_progress: &mut OnProgress<'_>,
) -> Result<Materialized> {
    match base {
        Model::Artifact(base) => {
            let Written { file_bytes, header } = materialize(base, deltas, target, force, on_progress)?;
            let files = vec![(target.to_owned(), file_bytes)];
            Ok(Materialized { files, identity: header.identity(), tensors: header.tensors().len() })
        }
        Model::Source(base) => {
            let options = export::Options { force, ..export::Options::default() };
            chain::materialize(base, deltas, target, &options, on_progress)
        }
    }
}

/// Whether a tensor that has just been encoded is the base's.
fn is_unchanged(
    base: &ArtifactFile,
    index: usize,
    writer: &Writer,
    tensor: &TensorWriter,
    epsilon: f64,
) -> Result<bool> {
    let entry = &base.tensors()[index];
    if tensor.same_as(entry) {
        return Ok(true);
    }
    // Raw doubles hold more than the comparison below sees.
    let doubles =
        entry.info().dtype() == DType::F64 && [tensor.codec(), entry.codec()].iter().any(|c| c.id == codecs::RAW);
    if epsilon == 0.0 || !entry.info().dtype().is_float() || doubles || tensor.transposed() != entry.transposed() {
        return Ok(false);
    }
    let (rows, cols) = entry.matrix();
    let width = usize::try_from(cols).map_err(|_| Error::invalid("a row is larger than memory"))?;
    let block = (compress::BLOCK_BYTES / 4 / cols.max(1)).max(1);
    let mut first = 0;
    while first < rows && cols > 0 {
        let count = block.min(rows - first);
        let weights = usize::try_from(count).expect("a block fits memory") * width;
        let (mut old, mut new) = (vec![0.0; weights], vec![0.0; weights]);
        base.decode_rows(index, first, &mut old)?;
        tensor.decode_rows(writer, first, &mut new)?;
        if old.iter().zip(&new).any(|(a, b)| !((f64::from(*a) - f64::from(*b)).abs() <= epsilon || a == b)) {
            return Ok(false);
        }
        first += count;
    }
    Ok(true)
}

/// The tensors of a result, as runs.
#[derive(Default)]
struct Runs(Vec<(i64, u64)>);

impl Runs {
    /// Adds tensor number `first` of the base, or with -1 the delta's next own.
    fn push(&mut self, first: i64) {
        if self.continues(first) {
            self.0.last_mut().expect("only a run is continued").1 += 1;
        } else {
            self.0.push((first, 1));
        }
    }

    /// Whether a tensor belongs to the last run.
    fn continues(&self, first: i64) -> bool {
        match self.0.last() {
            Some((-1, _)) => first == -1,
            Some(&(start, count)) => start >= 0 && start.checked_add_unsigned(count) == Some(first),
            None => false,
        }
    }
}

fn refuse_delta(base: &ArtifactFile) -> Result<()> {
    if base.header().delta().is_some() {
        return Err(Error::invalid(format!(
            "{} is a delta; a base is a whole artifact, materialize the delta first",
            base.path().display()
        )));
    }
    Ok(())
}

/// Writes the artifact that a base and a chain of deltas stand for, the first delta being that of the base.
///
/// # Errors
/// [`Error::Invalid`] when a delta's base is not what stands before it, the chain is empty, longer than [`MAX_CHAIN`] or
/// comes back to where it was; [`Error::Corrupt`] when a delta names tensors that are not there, a chunk is damaged,
/// or the result is not what the last delta promises. Everything but the damage is found before anything is written.
pub fn materialize(
    base: &ArtifactFile,
    deltas: &[ArtifactFile],
    target: &Path,
    force: bool,
    on_progress: &mut OnProgress<'_>,
) -> Result<Written> {
    refuse_delta(base)?;
    output::refuse_input(target, deltas.iter().chain([base]).flat_map(ArtifactFile::inputs))?;
    let last = check_length(deltas)?;
    let mut tensors: Vec<(&ArtifactFile, usize)> = (0..base.tensors().len()).map(|i| (base, i)).collect();
    let mut seen = vec![base.header().identity()];
    for delta in deltas {
        tensors = resolve(&tensors, seen[seen.len() - 1], delta).map_err(|e| e.in_file(delta.path()))?;
        let result = identity::of(tensors.iter().map(|(file, i)| &file.tensors()[*i]).collect::<Vec<_>>().into_iter());
        // A delta whose result is its own base changes nothing; anything earlier would be a cycle.
        if seen[seen.len() - 1] == result {
            continue;
        }
        refuse_cycle(&seen, result, delta)?;
        seen.push(result);
    }
    let mut writer = Writer::create(target, force)?;
    let total = tensors.iter().map(|(file, i)| file.tensors()[*i].stored_bytes()).sum();
    writer.output().preflight(total)?;
    let mut done = 0;
    for (file, index) in tensors {
        let tensor = file.tensors()[index].info().name();
        writer.copy(file, index, &mut |bytes| {
            done += bytes;
            on_progress(Progress { done, total, tensor })
        })?;
    }
    writer.attach_all(last)?;
    writer.finish(last.header().metadata().clone(), last.header().provenance().clone(), None)
}

/// The last delta of a chain that is not too long.
fn check_length(deltas: &[ArtifactFile]) -> Result<&ArtifactFile> {
    let last = deltas.last().ok_or_else(|| Error::invalid("no delta to materialize, pass at least one"))?;
    if deltas.len() > MAX_CHAIN {
        return Err(Error::invalid(format!(
            "a chain of {} deltas, at most {MAX_CHAIN} are resolved; materialize part of it first",
            deltas.len()
        )));
    }
    Ok(last)
}

/// Refuses a result that the chain has already passed.
fn refuse_cycle(seen: &[Identity], result: Identity, delta: &ArtifactFile) -> Result<()> {
    if seen.contains(&result) {
        return Err(Error::invalid(format!(
            "{} leads back to {result}, which the chain has already passed",
            delta.path().display()
        )));
    }
    Ok(())
}

/// What makes an artifact a delta, of a checkpoint or of an artifact as it is asked for.
fn section(delta: &ArtifactFile, checkpoint: bool) -> Result<&Delta> {
    let section = delta.header().delta().ok_or_else(|| {
        Error::invalid("this is a whole artifact, expected a delta; pass the base first and deltas after it")
    })?;
    if section.checkpoint != checkpoint {
        let (made, given) = if checkpoint { ("an artifact", "a checkpoint") } else { ("a checkpoint", "an artifact") };
        return Err(Error::invalid(format!("wrong base: the delta was made against {made}, but {given} was given")));
    }
    Ok(section)
}

/// First and end of a run, in the delta's list of tensors or in the base's, given how many are used and found so far.
fn run((first, count): (i64, u64), used: usize, own: usize, base: usize, found: usize) -> Result<(usize, usize)> {
    let bad = |what: String| Error::corrupt(0, format!("delta: {what}"));
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    let list = if first == -1 { own } else { base };
    let from = usize::try_from(first).unwrap_or(used);
    let end = from
        .checked_add(count)
        .filter(|&end| end <= list)
        .ok_or_else(|| bad(format!("a run of {count} tensors from {from}, but there are {list}")))?;
    if (found + count) as u64 > crate::Limits::DEFAULT.tensors {
        return Err(bad("more tensors than an artifact may hold".into()));
    }
    Ok((from, end))
}

/// The tensors that a delta makes of those of its base.
fn resolve<'a>(
    base: &[(&'a ArtifactFile, usize)],
    base_identity: Identity,
    delta: &'a ArtifactFile,
) -> Result<Vec<(&'a ArtifactFile, usize)>> {
    let section = section(delta, false)?;
    if section.base != base_identity {
        return Err(Error::invalid(format!(
            "wrong base: the delta was made against {}, but {base_identity} was given",
            section.base
        )));
    }
    let bad = |what: String| Error::corrupt(0, format!("delta: {what}"));
    // What holds of runs whatever the base was checked when the delta was opened.
    let mut own = 0;
    let mut result: Vec<(&ArtifactFile, usize)> = Vec::new();
    for &(first, count) in &section.runs {
        let (from, end) = run((first, count), own, delta.tensors().len(), base.len(), result.len())?;
        if first == -1 {
            result.extend((from..end).map(|i| (delta, i)));
            own = end;
        } else {
            result.extend_from_slice(&base[from..end]);
        }
    }
    let mut names = HashSet::with_capacity(result.len());
    if let Some(twice) =
        result.iter().map(|(file, i)| file.tensors()[*i].info().name()).find(|name| !names.insert(*name))
    {
        return Err(bad(format!("tensor '{twice}' occurs twice in the result")));
    }
    let entries: Vec<_> = result.iter().map(|(file, i)| &file.tensors()[*i]).collect();
    let found = identity::of(entries.into_iter());
    if found != section.result {
        return Err(bad(format!("the result is {found}, expected {}", section.result)));
    }
    Ok(result)
}
