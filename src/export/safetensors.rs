//! Safetensors: one file, or a directory of shards with an index as Hugging Face lays it out.
//!
//! The library's own writer wants every tensor in memory, so the header is printed here. Wider elements come first, as
//! the library orders them, so that every tensor is aligned. A directory also gets the files that the artifact carries.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::{Files, Job};
use crate::artifact::{HEADER_FILE, config};
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::location;
use crate::output::{self, OutputDirectory, OutputFile};
use crate::source::INDEX;
use crate::tensor::{DType, TensorInfo};

/// Writes all tensors into one file.
pub(super) fn file(job: &mut Job<'_, '_>, target: &Path) -> Result<Files> {
    let all = ordered(job);
    let (out, bytes) = write(job, target, &all)?;
    out.commit(bytes)?;
    Ok(vec![(target.to_owned(), bytes)])
}

/// Writes `model.safetensors`, or shards and their index: a directory that is new appears as a whole, into one that exists
/// files are put one after another.
pub(super) fn directory(job: &mut Job<'_, '_>, target: &Path) -> Result<Files> {
    let is_url = location::url(target)?.is_some();
    if !is_url && target.join(HEADER_FILE).exists() {
        return Err(Error::invalid(format!(
            "output {} holds a compressed model; remove it or choose another name",
            target.display()
        )));
    }
    if !is_url && target.exists() {
        return into(job, target);
    }
    OutputDirectory::check(target, job.options.force, HEADER_FILE, job.artifact.inputs())?;
    std::fs::create_dir_all(location::beside(target)?).map_err(|e| Error::io(target, e))?;
    let out = OutputDirectory::create(target)?;
    let visible = |path: &Path| match path.strip_prefix(out.path()) {
        Ok(name) => target.join(name),
        Err(_) => path.to_owned(),
    };
    let files = into(job, out.path()).map_err(|error| match error {
        Error::Io { path, source } => Error::Io { path: visible(&path), source },
        other => other,
    })?;
    let files = files.into_iter().map(|(path, bytes)| (visible(&path), bytes)).collect();
    out.commit()?;
    Ok(files)
}

/// Writes a model into a directory that exists.
fn into(job: &mut Job<'_, '_>, target: &Path) -> Result<Files> {
    let shards = shards(job);
    let name = |i: usize| shard_name(i, shards.len());
    let index = target.join(INDEX);
    if !job.options.force {
        let attached = job.artifact.files().iter().map(|file| target.join(&*file.name));
        let names = (0..shards.len()).map(|i| target.join(name(i))).chain([index.clone()]).chain(attached);
        if let Some(found) = names.into_iter().find(|path| path.exists()) {
            return Err(output::exists(&found));
        }
    }
    let mut written = write_all(job, &shards, &index, |i| target.join(name(i)))?;
    written.extend(attached(job, target)?);
    // Nothing has its name before everything is written, so that no old shard stands beside a new one.
    let mut files = Files::new();
    for (out, bytes) in written {
        files.push((out.target().to_owned(), bytes));
        out.commit(bytes)?;
    }
    if shards.len() == 1 && index.exists() {
        // With --force over a sharded model: an index left behind would win over the new file.
        std::fs::remove_file(&index).map_err(|e| Error::io(&index, e))?;
    }
    Ok(files)
}

/// Writes the shards and, where there are several, their index; none has its name yet.
fn write_all(
    job: &mut Job<'_, '_>,
    shards: &[Vec<usize>],
    index: &Path,
    path: impl Fn(usize) -> PathBuf,
) -> Result<Vec<(OutputFile, u64)>> {
    let mut written = Vec::with_capacity(shards.len() + 1);
    let mut weight_map = Map::new();
    let mut total = 0;
    for (i, tensors) in shards.iter().enumerate() {
        let path = path(i);
        written.push(write(job, &path, tensors)?);
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        for &t in tensors {
            let entry = &job.artifact.tensors()[t];
            weight_map.insert(entry.info().name().to_owned(), Value::from(&*name));
            total += entry.info().elements() * job.dtype(entry).size();
        }
    }
    if shards.len() > 1 {
        let text = index_text(total, weight_map)?;
        let out = job.create(index, text.len() as u64)?;
        out.write_at(0, &text)?;
        written.push((out, text.len() as u64));
    }
    Ok(written)
}

/// Writes the attached files; none has its name yet. The weights are no longer quantized, whatever a config says.
fn attached(job: &Job<'_, '_>, target: &Path) -> Result<Vec<(OutputFile, u64)>> {
    let mut written = Vec::new();
    for (index, file) in job.artifact.files().iter().enumerate() {
        let content = job.artifact.attached(index)?;
        let bytes = if *file.name == *config::CONFIG { &config::unquantized(&content) } else { &*content };
        let out = job.create(&target.join(&*file.name), bytes.len() as u64)?;
        out.write_at(0, bytes)?;
        written.push((out, bytes.len() as u64));
    }
    Ok(written)
}

/// The tensors, wider elements first.
fn ordered(job: &Job<'_, '_>) -> Vec<usize> {
    let mut order: Vec<usize> = (0..job.artifact.tensors().len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(job.dtype(&job.artifact.tensors()[i]).size()));
    order
}

/// The tensors in artifact order, split where a file would become too large.
fn shards(job: &Job<'_, '_>) -> Vec<Vec<usize>> {
    let mut shards: Vec<Vec<usize>> = vec![Vec::new()];
    let mut size = 0;
    for (i, entry) in job.artifact.tensors().iter().enumerate() {
        let bytes = entry.info().elements() * job.dtype(entry).size();
        if size > 0 && size + bytes > job.options.max_shard_bytes {
            shards.push(Vec::new());
            size = 0;
        }
        size += bytes;
        shards.last_mut().expect("there is always one").push(i);
    }
    let width = |&i: &usize| std::cmp::Reverse(job.dtype(&job.artifact.tensors()[i]).size());
    for shard in &mut shards {
        shard.sort_by_key(width);
    }
    shards
}

/// What stands before the data of a file whose tensors follow each other in this order, and the length of the data.
pub(super) fn head<'a>(
    metadata: &BTreeMap<String, String>,
    tensors: impl IntoIterator<Item = (&'a TensorInfo, DType)>,
) -> Result<(Vec<u8>, u64)> {
    let mut header = Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".to_owned(), json!(metadata));
    }
    let mut end = 0_u64;
    for (info, dtype) in tensors {
        let begin = end;
        end += info.elements() * dtype.size();
        let place = json!({"dtype": dtype.name(), "shape": info.shape(), "data_offsets": [begin, end]});
        header.insert(info.name().to_owned(), place);
    }
    let mut text = vec![0; 8];
    serde_json::to_writer(&mut text, &header)
        .map_err(|e| Error::invalid(format!("a header cannot be printed: {e}")))?;
    text.resize(text.len().next_multiple_of(8), b' ');
    let len = text.len() as u64 - 8;
    crate::limits::check("bytes of a safetensors header", Limits::DEFAULT.header_bytes, len)?;
    text[..8].copy_from_slice(&len.to_le_bytes());
    Ok((text, end))
}

/// The index of a model of several files, given its bytes of data and which tensor is where.
pub(super) fn index_text(total: u64, weight_map: Map<String, Value>) -> Result<Vec<u8>> {
    serde_json::to_vec_pretty(&json!({"metadata": {"total_size": total}, "weight_map": weight_map}))
        .map_err(|e| Error::invalid(format!("an index cannot be printed: {e}")))
}

/// The name of file number `i` of `count`.
pub(super) fn shard_name(i: usize, count: usize) -> String {
    match count {
        0 | 1 => "model.safetensors".to_owned(),
        n => format!("model-{:05}-of-{n:05}.safetensors", i + 1),
    }
}

/// Writes one file, to be committed with the length that is given.
fn write(job: &mut Job<'_, '_>, target: &Path, tensors: &[usize]) -> Result<(OutputFile, u64)> {
    let infos = tensors.iter().map(|&i| {
        let entry = &job.artifact.tensors()[i];
        (entry.info(), job.dtype(entry))
    });
    let (text, data) = head(job.artifact.header().metadata(), infos)?;
    let mut at = text.len() as u64;
    let out = job.create(target, at + data)?;
    out.write_at(0, &text)?;
    for &i in tensors {
        let dtype = job.dtype(&job.artifact.tensors()[i]);
        job.source_order(i, dtype, target, &mut |bytes| {
            out.write_at(at, bytes)?;
            at += bytes.len() as u64;
            Ok(())
        })?;
    }
    Ok((out, at))
}
