//! Engines: an artifact as the checkpoint of another quantization format, codes and scales exactly as they are.
//!
//! A [`Format`] says which layouts it holds without a change, which tensors stand for a module, and what a config says
//! of them. What it cannot hold is refused before anything is written, with every reason, unless requantizing is
//! allowed; embeddings, heads and whatever else these engines want in 16 bits are decoded. Files are those of a Hugging
//! Face directory: shards with their index, `config.json`, tokenizer, a card.

mod awq;
mod choose;
mod compressed_tensors;
mod gptq;
mod mlx;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Deref;
use std::path::Path;

pub(super) use awq::Awq;
pub(super) use choose::{Become, choose};
use choose::{check_fused, dense_modules, scheme, sides};
pub(super) use compressed_tensors::CompressedTensors;
pub(super) use gptq::Gptq;
pub(super) use mlx::Mlx;
use serde_json::{Map, Value};

use super::safetensors::{head, index_text, shard_name};
use super::{Exported, Files, Job, Options, card};
use crate::artifact::{ArtifactFile, config};
use crate::codec::Codec;
use crate::compress::OnProgress;
use crate::error::{Error, Result};
use crate::layout::{Grouped, Levels, load_bits};
use crate::output::{OutputDirectory, preflight, write_all_at};
use crate::source::INDEX;
use crate::tensor::{DType, TensorInfo};

/// The file by which a directory is known for one that may be replaced.
pub(super) const MARK: &str = config::CONFIG;

/// Which matrices another format holds.
pub(super) trait Holds: Sync {
    /// The name of the target.
    fn name(&self) -> &'static str;

    /// Why a matrix of this layout cannot be held as it is; groups are known to be whole.
    fn refuses(&self, layout: &Grouped, rows: usize, cols: usize) -> Option<String>;

    /// Whether matrices that the source holds as `[in, out]` have a place, as all others `[out, in]`.
    fn turns(&self) -> bool {
        false
    }

    /// The codecs to quantize anew with, the first that fits being taken.
    fn codecs(&self) -> &'static [&'static str];

    /// What happens to embeddings, heads and whatever else is quantized and no linear weight.
    fn others(&self) -> &'static str {
        "decoded, since engines read these in 16 or 32 bits"
    }
}

/// How another engine lays quantized matrices out, in a directory of safetensors.
pub(super) trait Format: Holds {
    /// The tensors that stand for a matrix: what follows the module's name, dtype and shape.
    fn parts(&self, layout: &Grouped, rows: u64, cols: u64) -> Vec<(&'static str, DType, Vec<u64>)>;

    /// Their bytes, little-endian, in the same order.
    fn fill(&self, matrix: &Matrix<'_>) -> Vec<Vec<u8>>;

    /// Fields of `config.json`, given what is common to all matrices and the modules that stay in 16 bits.
    fn config(&self, scheme: &Scheme, dense: &[String]) -> Vec<(&'static str, Value)>;

    /// Files beside `config.json`, by name.
    fn files(&self, _scheme: &Scheme) -> Vec<(&'static str, Value)> {
        Vec::new()
    }

    /// What a user should know.
    fn notes(&self, _scheme: &Scheme) -> Vec<String> {
        Vec::new()
    }

    /// Whether engines of this format fuse the projections of a layer, so that these must be quantized alike.
    fn fuses(&self) -> bool {
        true
    }
}

/// What all matrices of a checkpoint have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Scheme {
    pub bits: u32,
    /// Weights that share a scale; 0 for a whole row.
    pub group: usize,
    /// Whether the level zero is in the middle of the codes.
    pub symmetric: bool,
}

impl Scheme {
    fn of(layout: &Grouped) -> Self {
        Self { bits: layout.bits(), group: layout.group(), symmetric: layout.levels() == Levels::Signed }
    }
}

/// A matrix in memory, its planes as the layout says.
pub(super) struct Matrix<'a> {
    pub layout: &'a Grouped,
    pub rows: usize,
    pub cols: usize,
    planes: Vec<Vec<u8>>,
}

impl Matrix<'_> {
    /// The codes, rows of whole words.
    pub fn codes(&self) -> &[u8] {
        &self.planes[0]
    }

    /// Word `w` of row `row` of the codes.
    fn word(&self, row: usize, w: usize) -> u32 {
        let at = row * self.layout.code_stride(self.cols) + 4 * w;
        u32::from_le_bytes(*self.codes()[at..].first_chunk().expect("rows are whole words"))
    }

    /// The scales, `[row][group]`.
    pub fn scales(&self) -> &[u8] {
        &self.planes[1]
    }

    /// What is added in each group, `[row][group]`, where the layout has it.
    pub fn offsets(&self) -> &[u8] {
        &self.planes[2]
    }

    fn groups(&self) -> usize {
        self.layout.groups(self.cols)
    }

    /// The zero point of a group, or the code of level zero.
    fn zero_point(&self, row: usize, group: usize) -> u8 {
        if self.layout.levels() == Levels::ZeroPoint {
            let stride = self.layout.zero_point_stride(self.cols);
            load_bits(self.layout.bits(), &self.planes[2][row * stride..][..stride], group)
        } else {
            1 << (self.layout.bits() - 1)
        }
    }

    /// The scales, `[group][row]`.
    fn scales_by_group(&self) -> Vec<u8> {
        let (size, groups) = (self.layout.scale().size(), self.groups());
        let mut out = Vec::with_capacity(self.scales().len());
        for group in 0..groups {
            for row in 0..self.rows {
                out.extend_from_slice(&self.scales()[(row * groups + group) * size..][..size]);
            }
        }
        out
    }
}

/// Words of `32 / bits` numbers, low bits first, one after the other.
fn pack(bits: u32, numbers: impl IntoIterator<Item = u8>) -> Vec<u8> {
    let (mut out, mut word, mut at) = (Vec::new(), 0u32, 0);
    for number in numbers {
        word |= u32::from(number) << at;
        at += bits;
        if at == 32 {
            out.extend(word.to_le_bytes());
            (word, at) = (0, 0);
        }
    }
    if at > 0 {
        out.extend(word.to_le_bytes());
    }
    out
}

/// A tensor of a shard.
struct Out {
    info: TensorInfo,
    entry: usize,
}

struct Shard {
    name: String,
    head: Vec<u8>,
    data: u64,
    outs: Vec<Out>,
}

/// What a directory consists of.
pub(super) struct Plan<'f> {
    format: &'f dyn Format,
    becomes: Vec<Become>,
    shards: Vec<Shard>,
    texts: Vec<(String, Vec<u8>)>,
    /// Numbers, names and lengths of attached files that are copied.
    copies: Vec<(usize, String, u64)>,
    pub notes: Vec<String>,
}

impl<'f> Plan<'f> {
    /// # Errors
    /// [`Error::Invalid`] for matrices that the format cannot hold, with their reasons.
    pub fn new(
        artifact: &ArtifactFile,
        format: &'f dyn Format,
        requantize: bool,
        max_shard_bytes: u64,
    ) -> Result<Self> {
        let entries = artifact.tensors();
        let (becomes, mut notes) = choose(entries, format, requantize)?;
        let scheme = scheme(entries, &becomes, format)?;
        if format.fuses() {
            check_fused(entries, &becomes)?;
        }
        let shards = shards(artifact, &becomes, format, max_shard_bytes)?;
        let dense = dense_modules(entries, &becomes);
        let mut texts = Vec::new();
        let text = card::config_index(artifact.header()).map(|index| artifact.attached(index)).transpose()?;
        let mut fields = match &text {
            Some(text) => object(&config::unquantized(text))?,
            None => {
                notes.push(format!(
                    "the source has no {}, so the one written says only how weights are quantized; {} needs the rest as well",
                    config::CONFIG,
                    format.name()
                ));
                Map::new()
            }
        };
        fields.extend(format.config(&scheme, &dense).into_iter().map(|(key, value)| (key.to_owned(), value)));
        texts.push((config::CONFIG.to_owned(), pretty(&Value::Object(fields))?));
        for (name, value) in format.files(&scheme) {
            texts.push((name.to_owned(), pretty(&value)?));
        }
        let model = card::model_name(text.as_deref(), artifact.path());
        texts.push(("README.md".to_owned(), card::of_engine(&model, artifact.header(), format.name()).into_bytes()));
        if shards.len() > 1 {
            let places = shards
                .iter()
                .flat_map(|shard| shard.outs.iter().map(|out| (out.info.name().to_owned(), Value::from(&*shard.name))));
            texts.push((INDEX.to_owned(), index_text(shards.iter().map(|s| s.data).sum(), places.collect())?));
        }
        notes.extend(format.notes(&scheme));
        let files = artifact.header().files().iter().enumerate();
        let kept = files.filter(|(_, file)| texts.iter().all(|(name, _)| *name != *file.name));
        let copies = kept.map(|(i, file)| (i, file.name.to_string(), file.bytes)).collect();
        Ok(Self { format, becomes, shards, texts, copies, notes })
    }

    /// Names and lengths of all files, weights first.
    pub fn files(&self) -> Vec<(String, u64)> {
        let shards = self.shards.iter().map(|s| (s.name.clone(), s.head.len() as u64 + s.data));
        let texts = self.texts.iter().map(|(name, text)| (name.clone(), text.len() as u64));
        shards.chain(texts).chain(self.copies.iter().map(|(_, name, bytes)| (name.clone(), *bytes))).collect()
    }

    /// Writes the directory.
    pub fn write(
        mut self,
        artifact: &ArtifactFile,
        target: &Path,
        on_progress: &mut OnProgress<'_>,
    ) -> Result<Exported> {
        let files = self.files();
        preflight(target, files.iter().map(|(_, bytes)| bytes).sum())?;
        let out = OutputDirectory::create(target)?;
        let total = artifact.tensors().iter().map(|entry| entry.info().bytes()).sum();
        let mut notes = std::mem::take(&mut self.notes);
        let options = Options::default();
        let mut job = Job { artifact, options: &options, on_progress, done: 0, total, notes: Vec::new() };
        for shard in &self.shards {
            self.shard(shard, &mut job, target, &out.file(&shard.name)?)?;
        }
        notes.append(&mut job.notes);
        let write = |name: &str, bytes: &[u8]| {
            write_all_at(&out.file(name)?, 0, bytes).map_err(|e| Error::io(target.join(name), e))
        };
        for (name, text) in &self.texts {
            write(name, text)?;
        }
        for (index, name, _) in &self.copies {
            write(name, &artifact.attached(*index)?)?;
        }
        let files: Files = files.into_iter().map(|(name, bytes)| (target.join(name), bytes)).collect();
        out.commit()?;
        Ok(Exported { files, notes })
    }

    fn shard(&self, shard: &Shard, job: &mut Job<'_, '_>, target: &Path, file: &File) -> Result<()> {
        let io = |e| Error::io(target.join(&shard.name), e);
        write_all_at(file, 0, &shard.head).map_err(io)?;
        // Where the tensors of each entry begin, in the order of its parts.
        let mut places: BTreeMap<usize, Vec<(&str, u64)>> = BTreeMap::new();
        let mut at = shard.head.len() as u64;
        for out in &shard.outs {
            places.entry(out.entry).or_default().push((out.info.name(), at));
            at += out.info.bytes();
        }
        for (index, places) in places {
            let entry = &job.artifact.tensors()[index];
            match &self.becomes[index] {
                Become::Dense => {
                    let mut at = places[0].1;
                    job.source_order(index, entry.info().dtype(), target, &mut |bytes| {
                        write_all_at(file, at, bytes).map_err(io)?;
                        at += bytes.len() as u64;
                        Ok(())
                    })?;
                }
                Become::Packed { module, layout, anew } => {
                    let matrix = matrix(job.artifact, index, layout, *anew)?;
                    let (rows, cols) = entry.matrix();
                    let parts = self.format.parts(layout, rows, cols);
                    for ((suffix, ..), bytes) in parts.into_iter().zip(self.format.fill(&matrix)) {
                        let name = format!("{module}.{suffix}");
                        let place = places.iter().find(|(own, _)| *own == name);
                        let (_, at) = place.expect("parts are the tensors of the shard");
                        write_all_at(file, *at, &bytes).map_err(io)?;
                    }
                    job.tick(entry, entry.info().bytes())?;
                }
            }
        }
        Ok(())
    }
}

/// Cuts the tensors into shards, those of an entry together; in each wider elements come first.
fn shards(artifact: &ArtifactFile, becomes: &[Become], format: &dyn Format, max_bytes: u64) -> Result<Vec<Shard>> {
    let mut parts: Vec<Vec<Out>> = vec![Vec::new()];
    let mut size = 0;
    for (index, (entry, become_)) in artifact.tensors().iter().zip(becomes).enumerate() {
        let infos = match become_ {
            Become::Dense => vec![entry.info().clone()],
            Become::Packed { module, layout, .. } => {
                let (rows, cols) = entry.matrix();
                let infos = format.parts(layout, rows, cols).into_iter();
                infos
                    .map(|(suffix, dtype, shape)| TensorInfo::new(format!("{module}.{suffix}"), dtype, shape))
                    .collect::<Result<_>>()?
            }
        };
        let bytes: u64 = infos.iter().map(TensorInfo::bytes).sum();
        if size > 0 && size + bytes > max_bytes {
            parts.push(Vec::new());
            size = 0;
        }
        size += bytes;
        let last = parts.last_mut().expect("there is always one");
        last.extend(infos.into_iter().map(|info| Out { info, entry: index }));
    }
    let mut names = BTreeSet::new();
    for out in parts.iter().flatten() {
        if !names.insert(out.info.name()) {
            return Err(Error::invalid(format!("two tensors would be called '{}'; rename one", out.info.name())));
        }
    }
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let count = parts.len();
    let shard = |(i, mut outs): (usize, Vec<Out>)| {
        outs.sort_by_key(|out| std::cmp::Reverse(out.info.dtype().size()));
        let (head, data) = head(&metadata, outs.iter().map(|out| (&out.info, out.info.dtype())))?;
        Ok(Shard { name: shard_name(i, count), head, data, outs })
    };
    parts.into_iter().enumerate().map(shard).collect()
}

/// Reads a matrix, or quantizes it anew.
pub(super) fn matrix<'l>(
    artifact: &ArtifactFile,
    index: usize,
    layout: &'l Grouped,
    anew: Option<&'static Codec>,
) -> Result<Matrix<'l>> {
    let entry = &artifact.tensors()[index];
    let (rows, cols) = sides(entry)?;
    let planes = match anew {
        None => {
            let planes = (0..entry.codec().layout.planes().len())
                .map(|plane| Ok(artifact.plane(index, plane)?.deref().to_vec()));
            planes.collect::<Result<_>>()?
        }
        Some(codec) => {
            let mut weights = Vec::new();
            if weights.try_reserve_exact(rows * cols).is_err() {
                let what = format!("the weights of '{}'", entry.info().name());
                return Err(Error::OutOfMemory { what, bytes: 4 * entry.info().elements() });
            }
            weights.resize(rows * cols, 0.0);
            artifact.decode_rows(index, 0, &mut weights)?;
            codec.encode(&weights, rows, cols)?.planes().map(|(_, plane)| plane.to_vec()).collect()
        }
    };
    Ok(Matrix { layout, rows, cols, planes })
}

/// The object that a JSON text is.
fn object(text: &[u8]) -> Result<Map<String, Value>> {
    serde_json::from_slice(text).map_err(|e| Error::invalid(format!("{} is no JSON object: {e}", config::CONFIG)))
}

/// A JSON text for people.
pub(super) fn pretty(value: &Value) -> Result<Vec<u8>> {
    let mut text =
        serde_json::to_vec_pretty(value).map_err(|e| Error::invalid(format!("JSON cannot be printed: {e}")))?;
    text.push(b'\n');
    Ok(text)
}
