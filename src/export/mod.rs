//! Artifact out: decoded, as tensors of another format, or as it is in another form; one file per target, streamed.

pub(crate) mod card;
mod convert;
mod engine;
mod gguf;
pub(crate) mod hf;
mod json;
mod npz;
mod onnx;
mod safetensors;
mod spool;
mod through;

use std::path::{Path, PathBuf};

pub use convert::{Conversion, To, convert, plan};
use rayon::prelude::*;
use spool::Spool;
pub use through::{Exporting, exporting};

use crate::artifact::{ArtifactFile, Entry};
use crate::compress::{BLOCK_BYTES, OnProgress, Progress};
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::location::{self, Kind};
use crate::output::{self, OutputFile};
use crate::tensor::{DType, from_f32};

/// What stands before the data of a safetensors file of these tensors, and the length of the data.
pub(crate) fn safetensors_head<'a>(
    metadata: &std::collections::BTreeMap<String, String>,
    tensors: impl IntoIterator<Item = (&'a crate::tensor::TensorInfo, DType)>,
) -> Result<(Vec<u8>, u64)> {
    safetensors::head(metadata, tensors)
}

/// Refuses a target of another kind than safetensors, and a file that exists, before there is anything to write to it;
/// directories are looked into when they are written.
pub(crate) fn check_target(target: &Path, force: bool) -> Result<()> {
    let target = &*location::resolved(target)?;
    if !force && location::found(target)? == Some(Kind::File) {
        return Err(output::exists(target));
    }
    match target.extension().and_then(|e| e.to_str()) {
        None | Some("safetensors") => Ok(()),
        _ if target.is_dir() => Ok(()),
        Some(other) => Err(Error::invalid(format!(
            "output {} ends in .{other}, expected .safetensors, .tenpak, or a directory",
            target.display()
        ))),
    }
}

/// How to decompress.
#[derive(Debug, Clone)]
pub struct Options {
    /// Dtype of the floating-point tensors; `None` for that of the source.
    pub dtype: Option<DType>,
    /// Replace existing outputs.
    pub force: bool,
    /// Most bytes of one file of a directory.
    pub max_shard_bytes: u64,
}

/// Most bytes of one file of a directory, unless someone says otherwise.
pub const MAX_SHARD_BYTES: u64 = 5_000_000_000;

impl Default for Options {
    fn default() -> Self {
        Self { dtype: None, force: false, max_shard_bytes: MAX_SHARD_BYTES }
    }
}

/// Files that were written, with their lengths.
type Files = Vec<(PathBuf, u64)>;

/// What was written.
#[derive(Debug, Clone, Default)]
pub struct Exported {
    /// The files with their lengths.
    pub files: Vec<(PathBuf, u64)>,
    /// What a reader should know: dtypes that the target does not have, weights beyond the range of theirs.
    pub notes: Vec<String>,
}

/// Writes the tensors of an artifact as the name of `target` says: `.safetensors`, `.npz`, `.json` (a JSON bundle), or
/// a directory of safetensors shards where the name has no extension.
///
/// Tensors stored raw come back bit for bit; the others are decoded and rounded to their dtype.
///
/// # Errors
/// [`Error::Invalid`] for a delta, an unknown extension, an output that exists or a number that the target cannot hold;
/// [`Error::Corrupt`] when a chunk is damaged; [`Error::Io`]. No file is left half written.
pub fn decompress(
    artifact: &ArtifactFile,
    target: &Path,
    options: &Options,
    on_progress: &mut OnProgress<'_>,
) -> Result<Exported> {
    artifact.refuse_delta()?;
    if let Some(dtype) = options.dtype.filter(|d| !d.is_float()) {
        return Err(Error::invalid(format!("weights cannot be written as {dtype}, choose a float dtype")));
    }
    let target = &*location::resolved(target)?;
    output::refuse_input(target, artifact.inputs())?;
    let total = artifact.tensors().iter().map(|t| t.info().bytes()).sum();
    let mut job = Job { artifact, options, on_progress, done: 0, total, notes: Vec::new() };
    let files = match target.extension().and_then(|e| e.to_str()) {
        _ if target.is_dir() => safetensors::directory(&mut job, target),
        Some("safetensors") => safetensors::file(&mut job, target),
        Some("npz") => npz::file(&mut job, target),
        Some("json") => json::file(&mut job, target),
        None => safetensors::directory(&mut job, target),
        Some(other) => Err(Error::invalid(format!(
            "output {} ends in .{other}, expected .safetensors, .npz, .json, or a directory",
            target.display()
        ))),
    }?;
    Ok(Exported { files, notes: job.notes })
}

/// Decodes one tensor into the little-endian bytes of an array of its source's shape, in C order.
///
/// With the dtype of the source, a raw tensor comes back bit for bit; otherwise weights are rounded to `dtype`.
///
/// # Errors
/// [`Error::Invalid`] when `out` does not have the size of the array or `dtype` cannot hold weights; those of
/// [`ArtifactFile::decode_rows`].
pub fn decode_into(
    artifact: &ArtifactFile,
    index: usize,
    dtype: DType,
    out: &mut [u8],
    on_progress: &mut OnProgress<'_>,
) -> Result<()> {
    let entry = &artifact.tensors()[index];
    let expected = entry.info().elements() * dtype.size();
    if out.len() as u64 != expected {
        return Err(Error::invalid(format!(
            "{} bytes for tensor '{}' of shape {:?} in {dtype}, expected {expected}",
            out.len(),
            entry.info().name(),
            entry.info().shape()
        )));
    }
    let options = Options::default();
    let total = entry.info().bytes();
    let mut job = Job { artifact, options: &options, on_progress, done: 0, total, notes: Vec::new() };
    let mut at = 0;
    job.source_order(index, dtype, artifact.path(), &mut |bytes| {
        out[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
        Ok(())
    })
}

/// One run of [`decompress`].
struct Job<'a, 'p> {
    artifact: &'a ArtifactFile,
    options: &'a Options,
    on_progress: &'a mut OnProgress<'p>,
    done: u64,
    total: u64,
    /// What a reader should know.
    notes: Vec<String>,
}

impl Job<'_, '_> {
    /// The dtype in which a tensor is written.
    fn dtype(&self, entry: &Entry) -> DType {
        let own = entry.info().dtype();
        self.options.dtype.filter(|_| own.is_float()).unwrap_or(own)
    }

    fn create(&self, target: &Path, bytes: u64) -> Result<OutputFile> {
        let out = OutputFile::create(target, self.options.force)?;
        out.preflight(bytes)?;
        Ok(out)
    }

    /// Gives the elements of a tensor to `sink` as little-endian `dtype`, in the order of the matrix, in blocks.
    fn matrix_order(&mut self, index: usize, dtype: DType, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let artifact = self.artifact;
        let entry = &artifact.tensors()[index];
        if entry.codec().layout == Layout::Raw && dtype == entry.info().dtype() {
            let bytes = entry.info().bytes();
            let mut at = 0;
            while at < bytes {
                let n = BLOCK_BYTES.min(bytes - at);
                sink(&artifact.range(index, 0, at, n)?)?;
                at += n;
                self.tick(entry, n)?;
            }
            return Ok(());
        }
        let (rows, cols) = entry.matrix();
        self.decoded_blocks(
            index,
            dtype,
            |_, weights, job| {
                match bytemuck::try_cast_slice(weights) {
                    Ok(bytes) if dtype == DType::F32 && cfg!(target_endian = "little") => sink(bytes)?,
                    _ => sink(&rounded(dtype, weights)?)?,
                }
                job.tick(entry, (weights.len() as u64) * entry.info().dtype().size())
            },
            rows,
            cols,
        )
    }

    /// Gives the elements of a tensor to `sink` as little-endian `dtype`, in the order of the source tensor, in blocks.
    ///
    /// A transposed matrix larger than [`TRANSPOSE_BYTES`] goes through a nameless file beside `target`.
    fn source_order(
        &mut self,
        index: usize,
        dtype: DType,
        target: &Path,
        sink: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let artifact = self.artifact;
        let entry = &artifact.tensors()[index];
        if !entry.transposed() {
            return self.matrix_order(index, dtype, sink);
        }
        let (rows, cols) = entry.matrix();
        let element = dtype.size();
        let bytes = rows * cols * element;
        let mut spool = Spool::new(bytes, TRANSPOSE_BYTES, target)?;
        self.decoded_blocks(
            index,
            dtype,
            |first, weights, job| {
                let bytes = rounded(dtype, weights)?;
                let element = usize::try_from(element).expect("at most 8");
                let width = usize::try_from(cols).expect("a block fits memory");
                let count = weights.len() / width;
                let mut column = vec![0; count * element];
                for c in 0..width {
                    for r in 0..count {
                        let from = (r * width + c) * element;
                        column[r * element..][..element].copy_from_slice(&bytes[from..from + element]);
                    }
                    spool.write_at((c as u64 * rows + first) * element as u64, &column)?;
                }
                job.tick(entry, (weights.len() as u64) * entry.info().dtype().size())
            },
            rows,
            cols,
        )?;
        spool.drain(bytes, sink)
    }

    /// Decodes a tensor in blocks of rows and gives them to `take`, with the number of the first row; notes weights that
    /// `dtype` can only hold as its greatest number.
    fn decoded_blocks(
        &mut self,
        index: usize,
        dtype: DType,
        mut take: impl FnMut(u64, &[f32], &mut Self) -> Result<()>,
        rows: u64,
        cols: u64,
    ) -> Result<()> {
        let block = (BLOCK_BYTES / 4 / cols.max(1)).max(1);
        let width = usize::try_from(cols).map_err(|_| Error::invalid("a row is larger than memory"))?;
        let mut weights = Vec::new();
        let mut beyond = 0;
        let mut first = 0;
        while first < rows && cols > 0 {
            let count = block.min(rows - first);
            weights.resize(usize::try_from(count).expect("a block fits memory") * width, 0.0);
            self.artifact.decode_rows(index, first, &mut weights)?;
            beyond += weights.par_chunks(PART).map(|w| count_beyond(dtype, w)).sum::<usize>();
            take(first, &weights, self)?;
            first += count;
        }
        if beyond > 0 {
            let name = self.artifact.tensors()[index].info().name();
            self.notes.push(format!(
                "{name}: {beyond} weights are beyond the range of {dtype} and were written as its greatest number"
            ));
        }
        Ok(())
    }

    fn tick(&mut self, entry: &Entry, bytes: u64) -> Result<()> {
        self.done += bytes;
        (self.on_progress)(Progress { done: self.done, total: self.total, tensor: entry.info().name() })
    }
}

/// Bytes of a transposed tensor up to which it is turned around in memory.
const TRANSPOSE_BYTES: u64 = 64 << 20;

/// Weights that one task takes.
const PART: usize = 1 << 16;

/// How many finite weights round to more than the greatest number of a dtype.
fn count_beyond(dtype: DType, weights: &[f32]) -> usize {
    let Some(max) = dtype.max() else { return 0 };
    weights.iter().filter(|w| w.is_finite() && w.abs() > max).count()
}

/// Weights as little-endian bytes, in parallel.
fn rounded(dtype: DType, weights: &[f32]) -> Result<Vec<u8>> {
    let element = usize::try_from(dtype.size()).expect("at most 8");
    let mut bytes = vec![0; weights.len() * element];
    bytes
        .par_chunks_mut(PART * element)
        .zip(weights.par_chunks(PART))
        .try_for_each(|(bytes, weights)| from_f32(dtype, weights, bytes))?;
    Ok(bytes)
}
