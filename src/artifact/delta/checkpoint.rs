//! Deltas of checkpoints: what a fine-tuned model differs in from the model that it was made of.
//!
//! Base and variant are checkpoints, and what names either is the identity of the artifact that would hold all of its
//! tensors raw, sorted by name: names, dtypes, shapes and bytes decide, containers and shards do not. A tensor of the
//! variant that the base has too is a run, as in every delta. Another one is carried in one of three ways: where the base
//! has a tensor of the same name, dtype and shape, as the difference of their words, coded losslessly
//! ([`crate::coding::words`]), or, where a [`Recipe`] says so, as the difference of their weights in any codec; and as it
//! is where there is nothing to compare with or nothing is saved. [`materialize`] gives a checkpoint again, to which all
//! chunks, every lossless tensor by itself and the result as a whole are compared before it gets its name: lossless
//! tensors come back bit for bit, quantized ones as `round(base + difference)`, the sum in f32, rounded to nearest even
//! in the tensor's dtype and kept within its range. Both kinds may follow each other in a chain. A tensor goes by in
//! blocks; of what is coded the stream of one tensor is in memory, and in a codec of an open size the tensor itself.

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::{DeltaReport, MAX_CHAIN, Materialized, Mode, Runs};
use crate::artifact::coded::Coding;
use crate::artifact::entry::{Entry, takes_difference};
use crate::artifact::header::Delta;
use crate::artifact::identity::{self, Identity};
use crate::artifact::map::ArtifactFile;
use crate::artifact::writer::{Prepared, TensorWriter, Whole, Writer, Written};
use crate::codec::Codec;
use crate::codecs;
use crate::coding::words::{self, Counter, WordStream};
use crate::compress::{self, BLOCK_BYTES, Nonfinite, OnProgress, Options, Progress, TensorReport};
use crate::error::{Error, Result, try_zeroed};
use crate::export;
use crate::file::Block;
use crate::fit::{Fit, Rate};
use crate::layout::Layout;
use crate::measure::Distance;
use crate::output;
use crate::recipe::{Recipe, Role};
use crate::source::{self, Source};
use crate::tensor::{self, DType, TensorInfo};

/// A recipe for differences: every matrix and embedding in one codec, by default the one of any rate, the rest lossless.
///
/// # Errors
/// [`Error::Invalid`] for a codec that keeps bytes as they are, and for a rate of one that has a size of its own.
pub fn recipe(codec: Option<&'static Codec>, rate: Option<Rate>) -> Result<Recipe> {
    let codec = codec.map_or_else(|| codecs::get(codecs::ANY_RATE), Ok)?;
    codec.grouped()?;
    if rate.is_some() && codec.fit != Fit::Rate {
        return Err(Error::invalid(format!("codec {} has a size of its own; leave out the bits", codec.id)));
    }
    let recipe = Recipe::new(codec).role(Role::Embedding, codec)?.role(Role::Head, codec)?;
    Ok(rate.map_or_else(|| recipe.clone(), |rate| recipe.clone().target_bits(rate)))
}

/// A checkpoint whose tensors have been read and digested.
struct Checkpoint<'a> {
    source: &'a Source,
    /// The tensors as raw entries, by name.
    entries: Vec<Entry>,
    /// The number in the source of each.
    order: Vec<usize>,
}

impl<'a> Checkpoint<'a> {
    fn read(source: &'a Source, tick: &mut dyn FnMut(&str, u64) -> Result<()>) -> Result<Self> {
        let mut order: Vec<usize> = (0..source.tensors().len()).collect();
        order.sort_by_key(|&index| source.tensors()[index].info().name());
        let mut entries = Vec::with_capacity(order.len());
        for &index in &order {
            let info = source.tensors()[index].info();
            if let Some(packed) = source.tensors()[index].packed() {
                return Err(Error::invalid(format!(
                    "tensor '{}' is quantized as {}; a delta is made of the original checkpoints",
                    info.name(),
                    packed.format()
                )));
            }
            let mut hasher = blake3::Hasher::new();
            for part in blocks(info.bytes(), BLOCK_BYTES) {
                let bytes = source.read_bytes(index, part.start, part.end - part.start)?;
                hasher.update_rayon(&bytes);
                tick(info.name(), bytes.len() as u64)?;
            }
            entries.push(raw(info.clone(), hasher.finalize().into())?);
        }
        Ok(Self { source, entries, order })
    }

    fn identity(&self) -> Identity {
        identity::of(self.entries.iter())
    }

    fn find(&self, name: &str) -> Option<usize> {
        self.entries.binary_search_by_key(&name, |entry| entry.info().name()).ok()
    }

    /// Elements of tensor number `index` by name.
    fn elements(&self, index: usize, range: &Range<u64>) -> Result<Block> {
        let size = self.entries[index].info().dtype().size();
        self.source.read_bytes(self.order[index], range.start * size, (range.end - range.start) * size)
    }
}

/// The entry of a tensor that is kept as it is.
fn raw(info: TensorInfo, digest: Identity) -> Result<Entry> {
    let mut entry = Entry::unplaced(info, codecs::get(codecs::RAW)?, false)?;
    entry.planes_mut()[0].blake3 = digest;
    Ok(entry)
}

/// Parts of a whole, each of at most `most`.
fn blocks(whole: u64, most: u64) -> impl Iterator<Item = Range<u64>> {
    (0..whole.div_ceil(most)).map(move |i| i * most..((i + 1) * most).min(whole))
}

/// Writes the delta of a checkpoint against another: lossless, or with the differences of some tensors in a codec.
///
/// # Errors
/// [`Error::Invalid`] when the output exists or is an input, or when a checkpoint is quantized already; those of
/// [`compress::compress`].
pub fn delta(
    base: &Source,
    variant: &Source,
    recipe: Option<Recipe>,
    target: &Path,
    force: bool,
    on_progress: &mut OnProgress<'_>,
) -> Result<DeltaReport> {
    output::refuse_input(target, variant.inputs().chain(base.inputs()))?;
    let mut writer = Writer::create(target, force)?;
    let bytes = |source: &Source| source.tensors().iter().map(|t| t.info().bytes()).sum::<u64>();
    let (base_bytes, variant_bytes) = (bytes(base), bytes(variant));
    let (mut done, total) = (0, base_bytes + 2 * variant_bytes);
    let mut tick = |tensor: &str, bytes: u64| {
        done += bytes;
        on_progress(Progress { done: done.min(total), total, tensor })
    };
    let base = Checkpoint::read(base, &mut tick)?;
    let variant = Checkpoint::read(variant, &mut tick)?;
    let lossless = Recipe::new(codecs::get(codecs::RAW)?).all(true);
    let options = Options::new(recipe.clone().unwrap_or(lossless), Nonfinite::Error, force);
    let folder = output::folder_beside(target)?;
    let mut job = Job {
        base: &base,
        variant: &variant,
        options: &options,
        quantizes: recipe.is_some(),
        planned: if recipe.is_some() { compress::plan(variant.source, &options)?.tensors } else { Vec::new() },
        folder: folder.path().to_owned(),
        distance: Distance::default(),
        moved: 0.0,
        alone: Distance::default(),
        alone_bytes: 0,
    };
    let (mut runs, mut result, mut changed) = (Runs::default(), Vec::new(), Vec::new());
    for (index, entry) in variant.entries.iter().enumerate() {
        let name = entry.info().name();
        let partner = base.find(name).filter(|&i| base.entries[i].info() == entry.info());
        let same = partner.filter(|&i| base.entries[i].same_content(entry));
        let alive = &mut || tick(name, 0);
        job.alone(index, &writer, alive)?;
        if let Some(i) = same {
            job.count_same(index)?;
            runs.push(i64::try_from(i).expect("tensors are counted in 32 bits"));
            result.push(entry.clone());
        } else {
            runs.push(-1);
            let (report, tensor, digest) = job.tensor(index, partner, &writer, alive)?;
            writer.keep(tensor)?;
            result.push(raw(entry.info().clone(), digest)?);
            changed.push(report);
        }
        tick(name, entry.info().bytes())?;
    }
    let Job { distance, moved, alone, alone_bytes, .. } = job;
    let result = identity::of(result.iter());
    let provenance = compress::provenance(variant.source, &options, |file| Ok(file.digest()?.into()))?;
    compress::attach(variant.source, &mut writer)?;
    let section = Delta { checkpoint: true, base: base.identity(), result, runs: runs.0 };
    let unchanged = variant.entries.len() - changed.len();
    let Written { file_bytes, .. } = writer.finish(variant.source.metadata().clone(), provenance, Some(section))?;
    let weights = variant.entries.iter().map(|entry| entry.info().elements()).sum();
    let (mode, lossy) = if recipe.is_some() { (Mode::Quantized, true) } else { (Mode::Lossless, false) };
    Ok(DeltaReport {
        mode,
        changed,
        unchanged,
        file_bytes,
        base_bytes,
        variant_bytes,
        weights,
        distance: lossy.then_some(distance),
        moved: Some(moved),
        alone_bytes,
        alone: lossy.then_some(alone),
        result,
    })
}

/// Asked between two blocks whether the work goes on.
type Alive<'a> = &'a mut dyn FnMut() -> Result<()>;

/// One run of [`delta`].
struct Job<'a> {
    base: &'a Checkpoint<'a>,
    variant: &'a Checkpoint<'a>,
    options: &'a Options,
    quantizes: bool,
    /// What becomes of the variant's tensors without a base, where some are quantized.
    planned: Vec<TensorReport>,
    /// Where differences lie that are being quantized.
    folder: PathBuf,
    distance: Distance,
    moved: f64,
    alone: Distance,
    alone_bytes: u64,
}

impl Job<'_> {
    /// Writes a tensor of the variant; gives the digest of what it will be.
    fn tensor(
        &mut self,
        index: usize,
        partner: Option<usize>,
        writer: &Writer,
        alive: Alive<'_>,
    ) -> Result<(TensorReport, TensorWriter, Identity)> {
        let entry = &self.variant.entries[index];
        if let (Some(i), true) = (partner, self.quantizes && takes_difference(entry.info().dtype()))
            && let Some(done) = self.quantized(index, i, writer, alive)?
        {
            return Ok(done);
        }
        if let Some(i) = partner {
            self.count_moved(index, i)?;
        } else {
            self.count_same(index)?;
        }
        let digest = entry.planes()[0].blake3;
        let (tensor, reason) = match partner.map(|i| self.lossless(index, i, writer, alive)).transpose()?.flatten() {
            Some(tensor) => (tensor, "difference of words"),
            None => (
                self.copied(index, writer, alive)?,
                if partner.is_some() { "nothing saved" } else { "not in the base" },
            ),
        };
        let source = self.variant.order[index];
        let mut report = compress::raw_report(self.variant.source, source, reason.to_owned())?;
        report.stored_bytes = tensor.stored_bytes();
        Ok((report, tensor, digest))
    }

    /// A tensor as it is.
    fn copied(&self, index: usize, writer: &Writer, alive: Alive<'_>) -> Result<TensorWriter> {
        let info = self.variant.entries[index].info();
        let mut out = writer.tensor(info.clone(), codecs::get(codecs::RAW)?, false)?;
        for part in blocks(info.elements(), BLOCK_BYTES) {
            out.write(writer, 0, &self.variant.elements(index, &part)?)?;
            alive()?;
        }
        Ok(out)
    }

    /// A tensor as what its words differ from those of the base, where that is shorter.
    fn lossless(
        &self,
        index: usize,
        partner: usize,
        writer: &Writer,
        alive: Alive<'_>,
    ) -> Result<Option<TensorWriter>> {
        let entry = &self.variant.entries[index];
        let info = entry.info();
        if !words::is_width(info.dtype().size()) || info.elements() == 0 {
            return Ok(None);
        }
        let mut counter = Counter::new(usize::try_from(info.dtype().size()).expect("at most 8"));
        for part in blocks(info.elements(), words::BLOCK as u64) {
            counter.add(&self.base.elements(partner, &part)?, &self.variant.elements(index, &part)?);
            alive()?;
        }
        let tables = counter.tables();
        let mut coded = Vec::new();
        for part in blocks(info.elements(), words::BLOCK as u64) {
            coded.push(tables.encode(&self.base.elements(partner, &part)?, &self.variant.elements(index, &part)?));
            alive()?;
        }
        let stored = tables.stream(&coded);
        if stored.len() as u64 > info.bytes() - info.bytes() / 64 {
            return Ok(None);
        }
        let plane = Prepared { coding: Some(Coding::Words), stored, blake3: entry.planes()[0].blake3 };
        writer.whole(info.clone(), codecs::get(codecs::RAW)?, Whole::default(), vec![plane]).map(Some)
    }

    /// A tensor as the difference of weights in the codec of the recipe, unless that keeps it raw, or weights are not finite.
    fn quantized(
        &mut self,
        index: usize,
        partner: usize,
        writer: &Writer,
        alive: Alive<'_>,
    ) -> Result<Option<(TensorReport, TensorWriter, Identity)>> {
        let info = self.variant.entries[index].info().clone();
        if self.options.recipe.choose(&info, info.matrix().1).codec.layout == Layout::Raw || info.elements() == 0 {
            return Ok(None);
        }
        let path = self.folder.join("difference.safetensors");
        if !self.write_difference(index, partner, &path)? {
            return Ok(None);
        }
        let difference = source::open(&path, &source::Options::default())?;
        let planned = compress::plan(&difference, self.options)?.tensors.remove(0);
        let (mut report, tensor) =
            compress::encode_tensor(&difference, 0, planned, self.options, writer, &mut |_| alive())?;
        drop(difference);
        std::fs::remove_file(&path).map_err(|e| Error::io(&path, e))?;
        if tensor.codec().layout == Layout::Raw {
            return Ok(None);
        }
        let tensor = tensor.into_difference(info.dtype())?;
        (report.dtype, report.source_bytes) = (info.dtype(), info.bytes());
        report.stored_bytes = tensor.stored_bytes();
        let mut hasher = blake3::Hasher::new();
        let (mut distance, mut moved) = (Distance::default(), 0.0);
        let (rows, cols) = info.matrix();
        for part in blocks(rows, (BLOCK_BYTES / 4 / cols).max(1)) {
            let range = part.start * cols..part.end * cols;
            let (old, new) = (self.base.elements(partner, &range)?, self.variant.elements(index, &range)?);
            let mut decoded = zeros(range.end - range.start)?;
            tensor.decode_rows(writer, part.start, &mut decoded)?;
            let sum = added(info.dtype(), &old, &mut decoded)?;
            hasher.update_rayon(&sum);
            let [old, new, sum] = [&*old, &*new, &*sum].map(|bytes| floats(info.dtype(), bytes));
            let (old, new, sum) = (old?, new?, sum?);
            distance.merge(&Distance::between(&new, &sum));
            moved += Distance::between(&new, &old).noise;
            alive()?;
        }
        self.distance.merge(&distance);
        self.moved += moved;
        Ok(Some((report, tensor, hasher.finalize().into())))
    }

    /// Writes what a tensor differs in as a checkpoint of one tensor in F32; says whether all of it is finite.
    fn write_difference(&self, index: usize, partner: usize, path: &Path) -> Result<bool> {
        use std::io::Write as _;
        let info = self.variant.entries[index].info();
        let (head, _) = export::safetensors_head(&std::collections::BTreeMap::new(), [(info, DType::F32)])?;
        let io = |e| Error::io(path, e);
        let mut file = std::fs::File::create(path).map_err(io)?;
        file.write_all(&head).map_err(io)?;
        for part in blocks(info.elements(), BLOCK_BYTES / 4) {
            let old = floats(info.dtype(), &self.base.elements(partner, &part)?)?;
            let new = floats(info.dtype(), &self.variant.elements(index, &part)?)?;
            let mut bytes = Vec::with_capacity(4 * new.len());
            for (new, old) in new.iter().zip(&old) {
                let difference = new - old;
                if !difference.is_finite() {
                    return Ok(false);
                }
                bytes.extend(difference.to_le_bytes());
            }
            file.write_all(&bytes).map_err(io)?;
        }
        Ok(true)
    }

    /// What the variant's tensor takes and loses without the base.
    fn alone(&mut self, index: usize, writer: &Writer, alive: Alive<'_>) -> Result<()> {
        let info = self.variant.entries[index].info();
        let source = self.variant.order[index];
        if let Some(planned) = self.planned.get(source)
            && planned.codec.layout != Layout::Raw
            && info.elements() > 0
            && takes_difference(info.dtype())
        {
            let (from, planned) = (self.variant.source, planned.clone());
            match compress::encode_tensor(from, source, planned, self.options, writer, &mut |_| alive()) {
                Ok((TensorReport { distance: Some(distance), .. }, tensor)) => {
                    self.alone_bytes += tensor.stored_bytes();
                    self.alone.merge(&distance);
                    return Ok(());
                }
                // Kept as it is, as in the delta.
                Ok(_) | Err(Error::Nonfinite { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        let size = info.dtype().size();
        let mut counter = words::is_width(size).then(|| Counter::new(usize::try_from(size).expect("at most 8")));
        for part in blocks(info.elements(), words::BLOCK as u64) {
            let bytes = self.variant.elements(index, &part)?;
            alive()?;
            if let Some(counter) = &mut counter {
                counter.add(&vec![0; bytes.len()], &bytes);
            }
            if let Ok(weights) = finite(info.dtype(), &bytes) {
                self.alone.merge(&Distance::between(&weights, &weights));
            }
        }
        self.alone_bytes += counter.map_or(info.bytes(), |counter| counter.bytes().min(info.bytes()));
        Ok(())
    }

    /// Counts a tensor that comes back as it is; nothing moved.
    fn count_same(&mut self, index: usize) -> Result<()> {
        let info = self.variant.entries[index].info();
        for part in blocks(info.elements(), BLOCK_BYTES / 4) {
            if let Ok(weights) = finite(info.dtype(), &self.variant.elements(index, &part)?) {
                self.distance.merge(&Distance::between(&weights, &weights));
            }
        }
        Ok(())
    }

    /// Counts a tensor that comes back as it is, and how far it moved.
    fn count_moved(&mut self, index: usize, partner: usize) -> Result<()> {
        self.count_same(index)?;
        let info = self.variant.entries[index].info();
        for part in blocks(info.elements(), BLOCK_BYTES / 4) {
            let (old, new) = (self.base.elements(partner, &part)?, self.variant.elements(index, &part)?);
            if let (Ok(old), Ok(new)) = (finite(info.dtype(), &old), finite(info.dtype(), &new)) {
                self.moved += Distance::between(&new, &old).noise;
            }
        }
        Ok(())
    }
}

/// So many floats.
fn zeros(count: u64) -> Result<Vec<f32>> {
    let count = usize::try_from(count).map_err(|_| Error::invalid("a row is larger than memory"))?;
    let mut floats = Vec::new();
    if floats.try_reserve_exact(count).is_err() {
        return Err(Error::OutOfMemory { what: "rows of a tensor".to_owned(), bytes: 4 * count as u64 });
    }
    floats.resize(count, 0.0);
    Ok(floats)
}

/// Elements of a floating-point dtype of 32 bits or less, as f32.
///
/// # Errors
/// [`Error::Invalid`] for any other dtype.
fn floats(dtype: DType, bytes: &[u8]) -> Result<Vec<f32>> {
    if !dtype.is_float() || dtype == DType::F64 {
        return Err(Error::invalid(format!("{dtype} is not compared")));
    }
    let mut out = zeros(bytes.len() as u64 / dtype.size())?;
    tensor::to_f32(dtype, bytes, &mut out);
    Ok(out)
}

/// The same with zero for what is not finite: what distances are made of.
fn finite(dtype: DType, bytes: &[u8]) -> Result<Vec<f32>> {
    let mut weights = floats(dtype, bytes)?;
    weights.iter_mut().filter(|w| !w.is_finite()).for_each(|w| *w = 0.0);
    Ok(weights)
}

/// The base's elements with a difference added: what a quantized tensor is.
fn added(dtype: DType, base: &[u8], difference: &mut [f32]) -> Result<Vec<u8>> {
    let old = floats(dtype, base)?;
    difference.iter_mut().zip(&old).for_each(|(d, &old)| *d += old);
    let mut out = try_zeroed(base.len(), || "rows of a tensor".to_owned())?;
    tensor::from_f32(dtype, difference, &mut out)?;
    Ok(out)
}

/// Writes the checkpoint that another one and a chain of deltas stand for: in one file where the name of `target` ends in
/// `.safetensors`, in a raw artifact where it ends in `.tenpak`, and else in a directory.
///
/// What is written lies in a nameless file beside the target until all of it has been checked.
///
/// # Errors
/// Those of [`super::materialize`]; also [`Error::Corrupt`] when a difference is of a tensor that is not there.
pub fn materialize(
    base: &Source,
    deltas: &[ArtifactFile],
    target: &Path,
    options: &export::Options,
    on_progress: &mut OnProgress<'_>,
) -> Result<Materialized> {
    output::refuse_input(target, deltas.iter().flat_map(ArtifactFile::inputs).chain(base.inputs()))?;
    let sections = sections(deltas)?;
    let is_artifact = target.extension().is_some_and(|e| e == "tenpak");
    let mut writer = if is_artifact {
        Writer::create(target, options.force)?
    } else {
        export::check_target(target, options.force)?;
        Writer::nameless_in(output::directory(target))?
    };
    let base_bytes: u64 = base.tensors().iter().map(|t| t.info().bytes()).sum();
    let (mut done, mut total) = (0, 2 * base_bytes);
    let base = Checkpoint::read(base, &mut |tensor, bytes| {
        done += bytes;
        on_progress(Progress { done, total, tensor })
    })?;
    if base.identity() != sections[0].base {
        let (path, identity) = (deltas[0].path(), base.identity());
        return Err(wrong_base(sections[0].base, identity).in_file(path));
    }
    let mut items: Vec<Item> =
        (0..base.entries.len()).map(|i| Item { start: Start::Base(i), steps: Vec::new() }).collect();
    for (number, delta) in deltas.iter().enumerate() {
        let all = Files { base: &base, deltas };
        items = resolve(&all, &items, number, sections[number]).map_err(|e| e.in_file(delta.path()))?;
    }
    let all = Files { base: &base, deltas };
    let result_bytes: u64 = items.iter().map(|item| all.info(item).bytes()).sum();
    writer.output().preflight(if is_artifact { result_bytes } else { 2 * result_bytes })?;
    total = base_bytes + result_bytes;
    let mut entries = Vec::with_capacity(items.len());
    for item in &items {
        let info = all.info(item).clone();
        let mut out = writer.tensor(info.clone(), codecs::get(codecs::RAW)?, false)?;
        let streams = all.streams(item)?;
        let layers = all.layers(item, &streams)?;
        for part in blocks(info.elements(), BLOCK_BYTES / 4) {
            let bytes = all.read(item, &layers, layers.len(), &part)?;
            out.write(&writer, 0, &bytes)?;
            done += bytes.len() as u64;
            on_progress(Progress { done: done.min(total), total, tensor: info.name() })?;
        }
        let entry = writer.keep(out)?;
        if let Some((delta, expected)) = all.promised(item)
            && entry.planes()[0].blake3 != expected
        {
            let what = format!("tensor '{}' does not come to its digest; fetch or write the delta again", info.name());
            return Err(Error::corrupt(0, what).in_file(delta.path()));
        }
        entries.push(entry.clone());
    }
    let last = deltas.last().expect("a chain is not empty");
    let (found, expected) = (identity::of(entries.iter()), sections[sections.len() - 1].result);
    if found != expected {
        return Err(
            Error::corrupt(0, format!("delta: the result is {found}, expected {expected}")).in_file(last.path())
        );
    }
    writer.attach_all(last)?;
    let (metadata, provenance) = (last.header().metadata().clone(), last.header().provenance().clone());
    let tensors = items.len();
    if is_artifact {
        let Written { file_bytes, .. } = writer.finish(metadata, provenance, None)?;
        return Ok(Materialized { files: vec![(target.to_owned(), file_bytes)], identity: found, tensors });
    }
    let artifact = writer.reopen(metadata, provenance)?;
    let written = export::decompress(&artifact, target, options, &mut |progress| {
        on_progress(Progress { done: total, total, tensor: progress.tensor })
    })?;
    Ok(Materialized { files: written.files, identity: found, tensors })
}

fn wrong_base(expected: Identity, found: Identity) -> Error {
    Error::invalid(format!("wrong base: the delta was made against {expected}, but {found} was given"))
}

/// The delta sections of a chain, each of which begins where the one before ends.
fn sections(deltas: &[ArtifactFile]) -> Result<Vec<&Delta>> {
    super::check_length(deltas)?;
    let mut sections: Vec<&Delta> = Vec::with_capacity(deltas.len().min(MAX_CHAIN));
    let mut seen: Vec<Identity> = Vec::new();
    for delta in deltas {
        let section = super::section(delta, true).map_err(|e| e.in_file(delta.path()))?;
        match sections.last() {
            Some(before) if before.result != section.base => {
                return Err(wrong_base(section.base, before.result).in_file(delta.path()));
            }
            Some(_) => {}
            None => seen.push(section.base),
        }
        if section.base != section.result {
            super::refuse_cycle(&seen, section.result, delta)?;
            seen.push(section.result);
        }
        sections.push(section);
    }
    Ok(sections)
}

/// What a tensor is before differences.
#[derive(Debug, Clone, Copy)]
enum Start {
    /// Tensor of the base, by name.
    Base(usize),
    /// Tensor of a delta.
    Own(usize, usize),
}

/// A tensor of a result: where it begins, and the deltas and tensors of them that change it.
#[derive(Debug, Clone)]
struct Item {
    start: Start,
    steps: Vec<(usize, usize)>,
}

/// The tensors that a delta makes of those of its base.
fn resolve(all: &Files<'_>, base: &[Item], number: usize, section: &Delta) -> Result<Vec<Item>> {
    let delta = &all.deltas[number];
    let bad = |what: String| Error::corrupt(0, format!("delta: {what}"));
    let mut own = 0;
    let mut result: Vec<Item> = Vec::new();
    for &run in &section.runs {
        let (from, end) = super::run(run, own, delta.tensors().len(), base.len(), result.len())?;
        if run.0 != -1 {
            result.extend_from_slice(&base[from..end]);
            continue;
        }
        own = end;
        for index in from..end {
            let entry = &delta.tensors()[index];
            if !entry.needs_base() {
                result.push(Item { start: Start::Own(number, index), steps: Vec::new() });
                continue;
            }
            let name = entry.info().name();
            let of = base.binary_search_by_key(&name, |item| all.info(item).name()).ok();
            let of = of.filter(|&i| all.info(&base[i]) == entry.info());
            let mut item = match of {
                Some(i) => base[i].clone(),
                None => return Err(bad(format!("tensor '{name}' is a difference, but the base has none like it"))),
            };
            item.steps.push((number, index));
            result.push(item);
        }
    }
    if let Some(pair) = result.windows(2).find(|pair| all.info(&pair[0]).name() >= all.info(&pair[1]).name()) {
        let name = all.info(&pair[1]).name();
        return Err(bad(format!("tensor '{name}' stands behind a greater name, or twice, in the result")));
    }
    Ok(result)
}

/// Everything that a result is made of.
struct Files<'a> {
    base: &'a Checkpoint<'a>,
    deltas: &'a [ArtifactFile],
}

/// One step of an item, open for reading.
enum Layer<'a> {
    Words(WordStream<'a>, &'a ArtifactFile),
    Difference(&'a ArtifactFile, usize),
}

impl Files<'_> {
    fn info(&self, item: &Item) -> &TensorInfo {
        match item.start {
            Start::Base(index) => self.base.entries[index].info(),
            Start::Own(delta, index) => self.deltas[delta].tensors()[index].info(),
        }
    }

    /// The digest that the last delta of a tensor promises, where it is not known only together with all others.
    fn promised(&self, item: &Item) -> Option<(&ArtifactFile, Identity)> {
        let (delta, index) = match (item.steps.last(), item.start) {
            (Some(&step), _) => step,
            (None, Start::Own(delta, index)) => (delta, index),
            (None, Start::Base(_)) => return None,
        };
        let entry = &self.deltas[delta].tensors()[index];
        (!entry.is_difference()).then(|| (&self.deltas[delta], entry.planes()[0].blake3))
    }

    /// The streams of the lossless steps of a tensor, checked.
    fn streams(&self, item: &Item) -> Result<Vec<Option<Block>>> {
        let stream = |&(delta, index): &(usize, usize)| {
            let delta: &ArtifactFile = &self.deltas[delta];
            let entry = &delta.tensors()[index];
            (!entry.is_difference()).then(|| delta.stored(index, 0, 0, entry.planes()[0].bytes)).transpose()
        };
        item.steps.iter().map(stream).collect()
    }

    fn layers<'s>(&'s self, item: &Item, streams: &'s [Option<Block>]) -> Result<Vec<Layer<'s>>> {
        let info = self.info(item);
        let elements =
            usize::try_from(info.elements()).map_err(|_| Error::invalid("a tensor is larger than memory"))?;
        let width = usize::try_from(info.dtype().size()).expect("at most 8");
        let steps = item.steps.iter().zip(streams);
        let layer = |(&(delta, index), stream): (&(usize, usize), &'s Option<Block>)| {
            let delta = &self.deltas[delta];
            Ok(match stream {
                None => Layer::Difference(delta, index),
                Some(stream) => {
                    let stream = WordStream::open(stream, elements, width).map_err(|e| in_tensor(delta, info, e))?;
                    Layer::Words(stream, delta)
                }
            })
        };
        steps.map(layer).collect()
    }

    /// Elements of a tensor after so many of its steps.
    fn read(&self, item: &Item, layers: &[Layer<'_>], steps: usize, range: &Range<u64>) -> Result<Vec<u8>> {
        let info = self.info(item);
        let (size, cols) = (info.dtype().size(), info.matrix().1);
        let Some(layer) = steps.checked_sub(1).map(|i| &layers[i]) else {
            return Ok(match item.start {
                Start::Base(index) => self.base.elements(index, range)?.to_vec(),
                Start::Own(delta, index) => {
                    let (start, bytes) = (range.start * size, (range.end - range.start) * size);
                    self.deltas[delta].range(index, 0, start, bytes)?.to_vec()
                }
            });
        };
        // Whole blocks, or whole rows, that hold the range.
        let unit = if let Layer::Words(..) = layer { words::BLOCK as u64 } else { cols };
        let wide = range.start / unit * unit..range.end.next_multiple_of(unit).min(info.elements());
        let before = self.read(item, layers, steps - 1, &wide)?;
        let mut out = match layer {
            Layer::Words(stream, delta) => {
                let mut out = try_zeroed(before.len(), || "a part of a tensor".to_owned())?;
                let block = words::BLOCK * usize::try_from(size).expect("at most 8");
                let first = usize::try_from(wide.start / unit).expect("inside memory");
                for (i, (out, before)) in out.chunks_mut(block).zip(before.chunks(block)).enumerate() {
                    stream.decode(first + i, before, out).map_err(|e| in_tensor(delta, info, e))?;
                }
                out
            }
            Layer::Difference(delta, index) => {
                let mut difference = zeros(wide.end - wide.start)?;
                delta.decode_rows(*index, wide.start / unit, &mut difference)?;
                added(info.dtype(), &before, &mut difference)?
            }
        };
        let at = |element: u64| usize::try_from((element - wide.start) * size).expect("inside memory");
        out.truncate(at(range.end));
        out.drain(..at(range.start));
        Ok(out)
    }
}

/// The error of a stream as one of the delta.
fn in_tensor(delta: &ArtifactFile, info: &TensorInfo, error: Error) -> Error {
    let Error::Corrupt { at, what } = error else { return error };
    let what = format!("tensor '{}', byte {at} of its stream: {what}; fetch or write the delta again", info.name());
    Error::corrupt(at, what).in_file(delta.path())
}
