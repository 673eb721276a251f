//! GGUF: one file that llama.cpp and whatever is built on it load.
//!
//! Matrices keep their codes and scales: groups become blocks of 32, a scale that spans more is repeated. Rows of queries
//! and keys are reordered where the architecture asks for it, and the matrices of a layer's experts become one stack.
//! Everything else is decoded: vectors, positions and routers to F32, embeddings to their own dtype. All integers are
//! little-endian:
//!
//! | what | bytes |
//! |---|---|
//! | magic, version | `GGUF`, u32 3 |
//! | numbers of tensors and of keys | u64, u64 |
//! | keys | string, type (u32), value ([`Value`]) |
//! | tensors | name (string), dimensions (u32) and each of them, innermost first (u64), type (u32), offset in the data (u64) |
//! | data | from the next multiple of 32, each tensor on a multiple of 32 |

mod architecture;
mod blocks;
mod keys;
mod tokenizer;

use std::collections::BTreeMap;
use std::path::Path;

use architecture::{Architecture, Place};
use blocks::{BLOCK, blocks, reordered, turned};
use keys::Value;

use super::engine::{Become, Holds, choose, matrix};
use super::{Exported, Job, Options, card};
use crate::artifact::{ArtifactFile, Entry, config};
use crate::compress::OnProgress;
use crate::error::{Error, Result};
use crate::layout::{Float, Grouped, Levels};
use crate::output::OutputFile;
use crate::tensor::DType;

/// The target.
pub(super) struct Gguf;

/// What the data and every tensor in it begin on a multiple of.
const ALIGN: u64 = 32;

/// How a tensor lies in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Type {
    F32,
    F16,
    /// An F16 scale and 32 codes of 4 bits, level `code - 8`.
    Q4_0,
    /// An F16 scale, an F16 offset and 32 codes of 4 bits.
    Q4_1,
    /// An F16 scale and 32 levels.
    Q8_0,
    Bf16,
}

impl Type {
    fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q8_0 => 8,
            Self::Bf16 => 30,
        }
    }

    /// The number that says which type most weights have.
    fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q8_0 => 7,
            Self::Bf16 => 32,
        }
    }

    /// The type that holds a layout exactly.
    fn of(layout: &Grouped) -> Option<Self> {
        let (f16, whole) = (layout.scale() == Float::F16, layout.group() > 0 && layout.group().is_multiple_of(BLOCK));
        match (layout.bits(), layout.levels(), layout.offset()) {
            (4, Levels::Signed, None) if f16 && whole => Some(Self::Q4_0),
            (4, Levels::Unsigned, Some(Float::F16)) if f16 && whole => Some(Self::Q4_1),
            (8, Levels::Signed, None) if f16 && whole => Some(Self::Q8_0),
            _ => None,
        }
    }

    /// The type of decoded weights, of a tensor called `name`.
    fn dense(entry: &Entry, name: &str) -> (Self, DType) {
        let single = ["position_embd.", ".ffn_gate_inp", "_norm."].iter().any(|part| name.contains(part));
        match entry.info().dtype() {
            _ if single || entry.info().shape().len() < 2 => (Self::F32, DType::F32),
            DType::F16 => (Self::F16, DType::F16),
            DType::BF16 => (Self::Bf16, DType::BF16),
            _ => (Self::F32, DType::F32),
        }
    }

    /// Bytes of so many weights, whole blocks.
    fn bytes(self, weights: u64) -> u64 {
        match self {
            Self::F32 => 4 * weights,
            Self::F16 | Self::Bf16 => 2 * weights,
            Self::Q4_0 => weights / BLOCK as u64 * 18,
            Self::Q4_1 => weights / BLOCK as u64 * 20,
            Self::Q8_0 => weights / BLOCK as u64 * 34,
        }
    }
}

impl Holds for Gguf {
    fn name(&self) -> &'static str {
        "gguf"
    }

    fn refuses(&self, layout: &Grouped, _: usize, cols: usize) -> Option<String> {
        if Type::of(layout).is_none() {
            return Some(
                "only symmetric codes of 4 or 8 bits and 4-bit codes with offsets, in groups of 32 or more with F16 scales, have \
                 a place there (Q4_0, Q8_0, Q4_1)"
                    .to_owned(),
            );
        }
        (!cols.is_multiple_of(BLOCK)).then(|| format!("its {cols} columns do not fill blocks of {BLOCK}"))
    }

    fn turns(&self) -> bool {
        true
    }

    fn codecs(&self) -> &'static [&'static str] {
        &["int4_g32_fp16_v1"]
    }
}

/// A tensor of the file.
struct Out {
    name: String,
    dimensions: Vec<u64>,
    kind: Type,
    /// Heads whose rows are reordered.
    heads: Option<u64>,
    /// Whether one is added to the elements.
    adds_one: bool,
    /// Whether the source holds the matrix as `[in, out]`.
    turned: bool,
    from: From,
    bytes: u64,
}

/// Where a tensor comes from.
enum From {
    /// Tensors of the artifact, one or those of a stack.
    Entries(Vec<usize>),
    /// Numbers that follow from the config.
    Numbers(Vec<f32>),
}

/// What a file consists of.
pub(super) struct Plan {
    becomes: Vec<Become>,
    head: Vec<u8>,
    outs: Vec<Out>,
    pub notes: Vec<String>,
}

impl Plan {
    /// # Errors
    /// [`Error::Invalid`] for a model without a config, an architecture or a tensor that has no place in the format, and
    /// matrices that it cannot hold, with their reasons.
    pub fn new(artifact: &ArtifactFile, requantize: bool) -> Result<Self> {
        let text = card::config_index(artifact.header()).map(|index| artifact.attached(index)).transpose()?;
        let text = text.ok_or_else(|| {
            Error::invalid(format!(
                "{} has no {}, which gguf takes its keys from",
                artifact.path().display(),
                config::CONFIG
            ))
        })?;
        let architecture = Architecture::of(&text)?;
        let entries = artifact.tensors();
        let (becomes, mut notes) = choose(entries, &Gguf, requantize)?;
        let kind = |index: usize, name: &str| match &becomes[index] {
            Become::Dense => Type::dense(&entries[index], name).0,
            Become::Packed { layout, .. } => Type::of(layout).expect("layouts that are not held are refused"),
        };
        let (mut outs, mut stacks) = (Vec::new(), BTreeMap::new());
        for (index, entry) in entries.iter().enumerate() {
            let (name, heads, adds_one, turned) = match architecture.place(entry.info().name())? {
                Place::Nowhere => continue,
                Place::Own { name, heads, adds_one, turned } => (name, heads, adds_one, turned),
                Place::Expert { name, number } => {
                    let stack = stacks.entry(name.clone()).or_insert_with(|| {
                        outs.push(Out::new(name, kind(index, ""), entry, None, false, false));
                        (outs.len() - 1, vec![None; architecture.experts()])
                    });
                    stack.1[number as usize] = Some(index);
                    continue;
                }
            };
            let mut out = Out::new(name, kind(index, ""), entry, heads, adds_one, turned);
            out.kind = kind(index, &out.name);
            out.bytes = out.kind.bytes(entry.info().elements());
            out.from = From::Entries(vec![index]);
            outs.push(out);
        }
        for (at, stack) in stacks.into_values() {
            outs[at].stack(entries, &stack, |index| kind(index, ""))?;
        }
        if let Some(numbers) = architecture.rope_factors()? {
            let (count, name) = (numbers.len() as u64, "rope_freqs.weight".to_owned());
            let bytes = 4 * count;
            outs.push(Out {
                name,
                dimensions: vec![count],
                kind: Type::F32,
                heads: None,
                adds_one: false,
                turned: false,
                from: From::Numbers(numbers),
                bytes,
            });
        }
        let weights = |kind: Type| -> u64 {
            outs.iter().filter(|out| out.kind == kind).map(|out| out.dimensions.iter().product::<u64>()).sum()
        };
        let all = [Type::F32, Type::F16, Type::Bf16, Type::Q8_0, Type::Q4_0, Type::Q4_1];
        let most = all.into_iter().max_by_key(|&kind| weights(kind)).unwrap_or(Type::F32);
        let mut keys = architecture.keys(&card::model_name(Some(&text), artifact.path()))?;
        pass_through(artifact.header().metadata(), &mut keys);
        keys.push(("general.file_type".to_owned(), Value::U32(most.file_type())));
        keys.push(("general.quantization_version".to_owned(), Value::U32(2)));
        let rows = outs.iter().find(|out| out.name == "token_embd.weight").map_or(0, |out| out.dimensions[1]);
        tokenizer::keys(artifact, rows, &mut keys, &mut notes)?;
        let head = head(&keys, &outs);
        Ok(Self { becomes, head, outs, notes })
    }

    /// The length of the file.
    pub fn bytes(&self) -> u64 {
        self.outs.iter().fold(self.head.len() as u64, |at, out| at.next_multiple_of(ALIGN) + out.bytes)
    }

    /// Writes the file.
    pub fn write(
        mut self,
        artifact: &ArtifactFile,
        target: &Path,
        force: bool,
        on_progress: &mut OnProgress<'_>,
    ) -> Result<Exported> {
        let bytes = self.bytes();
        let out = OutputFile::create(target, force)?;
        out.preflight(bytes)?;
        out.write_at(0, &self.head)?;
        let total = artifact.tensors().iter().map(|entry| entry.info().bytes()).sum();
        let options = Options::default();
        let mut notes = std::mem::take(&mut self.notes);
        let mut job = Job { artifact, options: &options, on_progress, done: 0, total, notes: Vec::new() };
        let mut at = self.head.len() as u64;
        for tensor in &self.outs {
            at = at.next_multiple_of(ALIGN);
            match &tensor.from {
                From::Numbers(numbers) => {
                    let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
                    out.write_at(at, &bytes)?;
                }
                From::Entries(indices) => {
                    let bytes = tensor.bytes / indices.len() as u64;
                    for (place, &index) in (0..).zip(indices) {
                        self.tensor(tensor, index, &mut job, target, &out, at + place * bytes)?;
                    }
                }
            }
            at += tensor.bytes;
        }
        notes.append(&mut job.notes);
        out.commit(bytes)?;
        Ok(Exported { files: vec![(target.to_owned(), bytes)], notes })
    }

    fn tensor(
        &self,
        tensor: &Out,
        index: usize,
        job: &mut Job<'_, '_>,
        target: &Path,
        out: &OutputFile,
        at: u64,
    ) -> Result<()> {
        let entry = &job.artifact.tensors()[index];
        let rows = entry.matrix().0;
        match &self.becomes[index] {
            Become::Packed { layout, anew, .. } => {
                let matrix = matrix(job.artifact, index, layout, *anew)?;
                out.write_at(at, &reordered(blocks(&matrix, tensor.kind), rows, tensor.heads))?;
                job.tick(entry, entry.info().bytes())
            }
            Become::Dense => {
                let dtype = Type::dense(entry, &tensor.name).1;
                if tensor.heads.is_some() || tensor.adds_one || (tensor.turned && !entry.transposed()) {
                    let mut all = Vec::new();
                    job.source_order(index, dtype, target, &mut |bytes| {
                        all.extend_from_slice(bytes);
                        Ok(())
                    })?;
                    if tensor.adds_one {
                        all = all
                            .as_chunks()
                            .0
                            .iter()
                            .flat_map(|w| (f32::from_le_bytes(*w) + 1.0).to_le_bytes())
                            .collect();
                    }
                    if tensor.turned {
                        all = turned(&all, entry.info().shape(), dtype);
                    }
                    return out
                        .write_at(at, &reordered(all, tensor.dimensions.last().copied().unwrap_or(1), tensor.heads));
                }
                if entry.transposed() {
                    let mut at = at;
                    return job.matrix_order(index, dtype, &mut |bytes| {
                        out.write_at(at, bytes)?;
                        at += bytes.len() as u64;
                        Ok(())
                    });
                }
                let mut at = at;
                job.source_order(index, dtype, target, &mut |bytes| {
                    out.write_at(at, bytes)?;
                    at += bytes.len() as u64;
                    Ok(())
                })
            }
        }
    }
}

impl Out {
    /// A tensor of the artifact that comes from nowhere yet.
    fn new(name: String, kind: Type, entry: &Entry, heads: Option<u64>, adds_one: bool, turned: bool) -> Self {
        let mut dimensions: Vec<u64> = entry.info().shape().iter().rev().copied().collect();
        if turned {
            dimensions.reverse();
        }
        // A matrix of one row is a vector there.
        if name.ends_with(".ffn_gate_inp_shexp.weight") {
            dimensions.truncate(1);
        }
        Self { name, dimensions, kind, heads, adds_one, turned, from: From::Entries(Vec::new()), bytes: 0 }
    }

    /// Makes this the stack of these tensors, one per expert.
    fn stack(&mut self, entries: &[Entry], stack: &[Option<usize>], kind: impl Fn(usize) -> Type) -> Result<()> {
        let mut indices = Vec::with_capacity(stack.len());
        for (number, index) in stack.iter().enumerate() {
            let what = || format!("expert {number} of '{}'", self.name);
            let index = index.ok_or_else(|| Error::invalid(format!("{} is missing", what())))?;
            let shape = entries[index].info().shape();
            if kind(index) != self.kind || !shape.iter().rev().eq(&self.dimensions) {
                let codec = entries[index].codec().id;
                return Err(Error::invalid(format!(
                    "{} is {shape:?} in {codec}, which is not what the others are; gguf has one stack of them: compress all \
                     with one codec",
                    what()
                )));
            }
            indices.push(index);
        }
        self.bytes = indices.iter().map(|&index| self.kind.bytes(entries[index].info().elements())).sum();
        self.dimensions.push(indices.len() as u64);
        self.from = From::Entries(indices);
        Ok(())
    }
}

/// Adds what the file that the model came from says of it: author, license and whatever else is a text.
fn pass_through(metadata: &BTreeMap<String, String>, keys: &mut Vec<(String, Value)>) {
    for (key, text) in metadata {
        let Some(key) = key.strip_prefix("gguf.").filter(|key| key.starts_with("general.")) else { continue };
        let value = Value::Text(text.clone());
        match keys.iter_mut().find(|(known, _)| known == key) {
            Some((known, own)) if known == "general.name" => *own = value,
            Some(_) => {}
            None => keys.push((key.to_owned(), value)),
        }
    }
}

/// Everything before the data.
fn head(keys: &[(String, Value)], outs: &[Out]) -> Vec<u8> {
    let mut head = b"GGUF".to_vec();
    head.extend(3u32.to_le_bytes());
    head.extend((outs.len() as u64).to_le_bytes());
    head.extend((keys.len() as u64).to_le_bytes());
    for (key, value) in keys {
        keys::string(&mut head, key);
        value.write(&mut head);
    }
    let mut offset = 0u64;
    for out in outs {
        keys::string(&mut head, &out.name);
        head.extend(u32::try_from(out.dimensions.len()).unwrap_or(u32::MAX).to_le_bytes());
        head.extend(out.dimensions.iter().flat_map(|side| side.to_le_bytes()));
        head.extend(out.kind.id().to_le_bytes());
        offset = offset.next_multiple_of(ALIGN);
        head.extend(offset.to_le_bytes());
        offset += out.bytes;
    }
    head.resize(head.len().next_multiple_of(usize::try_from(ALIGN).expect("small")), 0);
    head
}
