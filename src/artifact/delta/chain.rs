//! Chains of deltas of checkpoints, put together: every part of a tensor goes through all of its differences at once.

use std::ops::Range;
use std::path::Path;

use super::checkpoint::{Checkpoint, added, blocks, zeros};
use super::{MAX_CHAIN, Materialized};
use crate::artifact::header::Delta;
use crate::artifact::identity::{self, Identity};
use crate::artifact::map::ArtifactFile;
use crate::artifact::writer::{Writer, Written};
use crate::codecs;
use crate::coding::words::{self, WordStream};
use crate::compress::{BLOCK_BYTES, OnProgress, Progress};
use crate::error::{Error, Result, try_zeroed};
use crate::export;
use crate::file::Block;
use crate::location;
use crate::output;
use crate::source::Source;
use crate::tensor::TensorInfo;

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
        Writer::nameless_in(&location::beside(target)?)?
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
    Words(Box<WordStream<'a>>, &'a ArtifactFile),
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
                    Layer::Words(Box::new(stream), delta)
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
