//! GGUF: one file that llama.cpp and whatever is built on it load.
//!
//! Matrices keep their codes and scales: groups become blocks of 32, a scale that spans more is repeated. Rows of queries
//! and keys are reordered where the architecture asks for it. Everything else is decoded: vectors to F32, embeddings to
//! their own dtype. All integers are little-endian:
//!
//! | what | bytes |
//! |---|---|
//! | magic, version | `GGUF`, u32 3 |
//! | numbers of tensors and of keys | u64, u64 |
//! | keys | string, type (u32), value ([`Value`]) |
//! | tensors | name (string), dimensions (u32) and each of them, innermost first (u64), type (u32), offset in the data (u64) |
//! | data | from the next multiple of 32, each tensor on a multiple of 32 |

mod architecture;
mod keys;
mod tokenizer;

use std::path::Path;

use architecture::Architecture;
use keys::Value;

use super::engine::{Become, Holds, Matrix, choose, matrix};
use super::{Exported, Job, Options, card};
use crate::artifact::{ArtifactFile, Entry, config};
use crate::compress::OnProgress;
use crate::error::{Error, Result};
use crate::layout::{Float, Grouped, Levels};
use crate::output::OutputFile;
use crate::tensor::DType;

/// The target.
pub(super) struct Gguf;

/// Weights of a block.
const BLOCK: usize = 32;
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

    /// The type of decoded weights.
    fn dense(entry: &Entry) -> (Self, DType) {
        match entry.info().dtype() {
            _ if entry.info().shape().len() < 2 => (Self::F32, DType::F32),
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
    from: From,
    bytes: u64,
}

/// Where a tensor comes from.
enum From {
    /// Tensor of the artifact.
    Entry(usize),
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
        let mut outs = Vec::new();
        for (index, entry) in entries.iter().enumerate() {
            let Some((name, heads)) = architecture.tensor(entry.info().name())? else { continue };
            let kind = match &becomes[index] {
                Become::Dense => Type::dense(entry).0,
                Become::Packed { layout, .. } => Type::of(layout).expect("layouts that are not held are refused"),
            };
            let dimensions = entry.info().shape().iter().rev().copied().collect();
            let bytes = kind.bytes(entry.info().elements());
            outs.push(Out { name, dimensions, kind, heads, from: From::Entry(index), bytes });
        }
        if let Some(numbers) = architecture.rope_factors()? {
            let (count, name) = (numbers.len() as u64, "rope_freqs.weight".to_owned());
            let bytes = 4 * count;
            outs.push(Out {
                name,
                dimensions: vec![count],
                kind: Type::F32,
                heads: None,
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
                From::Entry(index) => self.tensor(tensor, *index, &mut job, target, &out, at)?,
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
                let dtype = Type::dense(entry).1;
                if tensor.heads.is_some() {
                    let mut all = Vec::new();
                    job.source_order(index, dtype, target, &mut |bytes| {
                        all.extend_from_slice(bytes);
                        Ok(())
                    })?;
                    return out.write_at(at, &reordered(all, entry.info().shape()[0], tensor.heads));
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

/// The blocks of a matrix, row after row.
fn blocks(matrix: &Matrix<'_>, kind: Type) -> Vec<u8> {
    let layout = matrix.layout;
    let (stride, groups) = (layout.code_stride(matrix.cols), layout.groups(matrix.cols));
    let mut out = Vec::with_capacity(usize::try_from(kind.bytes((matrix.rows * matrix.cols) as u64)).unwrap_or(0));
    for row in 0..matrix.rows {
        let codes = &matrix.codes()[row * stride..][..stride];
        for block in 0..matrix.cols / BLOCK {
            let group = row * groups + block * BLOCK / layout.group();
            out.extend_from_slice(&matrix.scales()[2 * group..][..2]);
            if kind == Type::Q4_1 {
                out.extend_from_slice(&matrix.offsets()[2 * group..][..2]);
            }
            if kind == Type::Q8_0 {
                // Levels, in two's complement.
                out.extend(codes[block * BLOCK..][..BLOCK].iter().map(|code| code ^ 0x80));
            } else {
                // The first half of the block lies in the low bits, the second in the high ones; ours alternate.
                let pairs = &codes[block * BLOCK / 2..][..BLOCK / 2];
                let code = |i: usize| pairs[i / 2] >> (4 * (i % 2)) & 15;
                out.extend((0..BLOCK / 2).map(|i| code(i) | code(i + BLOCK / 2) << 4));
            }
        }
    }
    out
}

/// Rows of heads in the order of rotary embeddings that turn neighbours: row `2 j + t` of a head is row `t * half + j`.
fn reordered(bytes: Vec<u8>, rows: u64, heads: Option<u64>) -> Vec<u8> {
    let Some(heads) = heads else { return bytes };
    let (rows, heads) = (usize::try_from(rows).unwrap_or(1), usize::try_from(heads).unwrap_or(1));
    let (width, half) = (bytes.len() / rows.max(1), rows / heads / 2);
    let mut out = Vec::with_capacity(bytes.len());
    for head in 0..heads {
        for j in 0..half {
            for t in 0..2 {
                out.extend_from_slice(&bytes[(head * 2 * half + t * half + j) * width..][..width]);
            }
        }
    }
    out
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
