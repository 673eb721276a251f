//! Deltas of checkpoints: what a fine-tuned model differs in from the model that it was made of.
//!
//! Base and variant are checkpoints, and what names either is the identity of the artifact that would hold all of its
//! tensors raw, sorted by name: names, dtypes, shapes and bytes decide, containers and shards do not. A tensor of the
//! variant that the base has too is a run, as in every delta. Another one is carried in one of three ways: where the base
//! has a tensor of the same name, dtype and shape, as the difference of their words, coded losslessly
//! ([`crate::coding::words`]), or, where a [`Recipe`] says so, as the difference of their weights in any codec; and as it
//! is where there is nothing to compare with or nothing is saved. [`super::chain::materialize`] gives a checkpoint again, to which all
//! chunks, every lossless tensor by itself and the result as a whole are compared before it gets its name: lossless
//! tensors come back bit for bit, quantized ones as `round(base + difference)`, the sum in f32, rounded to nearest even
//! in the tensor's dtype and kept within its range. Both kinds may follow each other in a chain. A tensor goes by in
//! blocks; of what is coded the stream of one tensor is in memory, and in a codec of an open size the tensor itself.

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::{DeltaReport, Mode, Runs};
use crate::artifact::coded::Coding;
use crate::artifact::entry::{Entry, takes_difference};
use crate::artifact::header::Delta;
use crate::artifact::identity::{self, Identity};
use crate::artifact::writer::{Prepared, TensorWriter, Whole, Writer, Written};
use crate::codec::Codec;
use crate::codecs;
use crate::coding::words::{self, Counter};
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
pub(super) struct Checkpoint<'a> {
    source: &'a Source,
    /// The tensors as raw entries, by name.
    pub(super) entries: Vec<Entry>,
    /// The number in the source of each.
    order: Vec<usize>,
}

impl<'a> Checkpoint<'a> {
    pub(super) fn read(source: &'a Source, tick: &mut dyn FnMut(&str, u64) -> Result<()>) -> Result<Self> {
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

    pub(super) fn identity(&self) -> Identity {
        identity::of(self.entries.iter())
    }

    fn find(&self, name: &str) -> Option<usize> {
        self.entries.binary_search_by_key(&name, |entry| entry.info().name()).ok()
    }

    /// Elements of tensor number `index` by name.
    pub(super) fn elements(&self, index: usize, range: &Range<u64>) -> Result<Block> {
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
pub(super) fn blocks(whole: u64, most: u64) -> impl Iterator<Item = Range<u64>> {
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
pub(super) fn zeros(count: u64) -> Result<Vec<f32>> {
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
pub(super) fn added(dtype: DType, base: &[u8], difference: &mut [f32]) -> Result<Vec<u8>> {
    let old = floats(dtype, base)?;
    difference.iter_mut().zip(&old).for_each(|(d, &old)| *d += old);
    let mut out = try_zeroed(base.len(), || "rows of a tensor".to_owned())?;
    tensor::from_f32(dtype, difference, &mut out)?;
    Ok(out)
}
