//! `tenpak inspect`: what an artifact says about itself; reads its header only.

use std::collections::BTreeMap;

use clap::Args;
use serde::Serialize;

use super::report::{phrase, plain, shape, table, thousands};
use super::{Context, Input, Outcome};
use crate::artifact::header::Delta;
use crate::artifact::{ArtifactFile, AttachedFile, Coding, Entry, PlaneEntry, Provenance};
use crate::error::Result;
use crate::report::{Sizes, Tensor};

/// Show the header of an artifact: sizes, tensors, where it came from
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    input: Input,
    /// Show one tensor with its planes
    #[arg(long, value_name = "NAME")]
    tensor: Option<String>,
}

#[derive(Serialize)]
struct Json<'a> {
    schema: &'static str,
    input: String,
    file_bytes: u64,
    identity: String,
    total: Sizes,
    memory: Sizes,
    metadata: &'a BTreeMap<String, String>,
    provenance: &'a Provenance,
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: Option<&'a Delta>,
    tensors: Vec<WithPlanes>,
    attached: Vec<AttachedJson>,
}

#[derive(Serialize)]
struct AttachedJson {
    name: String,
    offset: u64,
    bytes: u64,
    chunks: usize,
    blake3: String,
}

impl From<&AttachedFile> for AttachedJson {
    fn from(file: &AttachedFile) -> Self {
        Self {
            name: file.name.to_string(),
            offset: file.offset,
            bytes: file.bytes,
            chunks: file.crc32c.len(),
            blake3: file.blake3.to_string(),
        }
    }
}

#[derive(Serialize)]
struct WithPlanes {
    #[serde(flatten)]
    tensor: Tensor,
    transposed: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    difference: bool,
    planes: Vec<PlaneJson>,
}

#[derive(Serialize)]
struct PlaneJson {
    plane: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    coding: Option<&'static str>,
    offset: u64,
    bytes: u64,
    memory_bytes: u64,
    chunks: usize,
    blake3: String,
}

pub(super) fn run(arguments: &Arguments, context: &mut Context<'_>) -> Result<Outcome> {
    let artifact = context.artifact(arguments.input.path()?)?;
    let shown: Vec<&Entry> = match &arguments.tensor {
        Some(name) => vec![&artifact.tensors()[artifact.find(name)?]],
        None => artifact.tensors().iter().collect(),
    };
    let elements = artifact.tensors().iter().map(|t| t.info().elements()).sum();
    let total = Sizes::new(elements, artifact.weight_bytes());
    let memory = Sizes::new(elements, artifact.tensors().iter().map(Entry::memory_bytes).sum());
    let header = artifact.header();
    if context.json() {
        context.print_json(&Json {
            schema: "tenpak.inspect/1",
            input: artifact.path().display().to_string(),
            file_bytes: artifact.bytes(),
            identity: header.identity().to_string(),
            total,
            memory,
            metadata: header.metadata(),
            provenance: header.provenance(),
            delta: header.delta(),
            tensors: shown.into_iter().map(with_planes).collect(),
            attached: artifact.files().iter().map(AttachedJson::from).collect(),
        });
        return Ok(Outcome::Done);
    }
    if arguments.tensor.is_some() {
        one(shown[0], context);
        return Ok(Outcome::Done);
    }
    let rows = shown.iter().map(|t| {
        vec![
            t.info().name().to_owned(),
            t.codec().id.to_owned(),
            t.info().dtype().to_string(),
            shape(t.info().shape()),
            thousands(t.stored_bytes()),
            format!("{:.3}", t.bits_per_weight()),
            format!("{:.3}", Sizes::new(t.info().elements(), t.memory_bytes()).bits_per_weight),
        ]
    });
    context.line(table(&["tensor", "codec", "dtype", "shape", "bytes", "bpw", "in memory"], rows, 3));
    context.line("");
    summary(&artifact, &total, &memory, context);
    Ok(Outcome::Done)
}

fn with_planes(entry: &Entry) -> WithPlanes {
    let plane = |(index, p): (usize, &PlaneEntry)| PlaneJson {
        plane: p.plane.name(),
        coding: p.coding.map(Coding::id),
        offset: p.offset,
        bytes: p.bytes,
        memory_bytes: entry.plain_bytes(index),
        chunks: p.crc32c.len(),
        blake3: p.blake3.to_string(),
    };
    WithPlanes {
        tensor: entry.into(),
        transposed: entry.transposed(),
        difference: entry.is_difference(),
        planes: entry.planes().iter().enumerate().map(plane).collect(),
    }
}

fn one(entry: &Entry, context: &mut Context<'_>) {
    let (rows, cols) = entry.matrix();
    let transposed = if entry.transposed() { ", transposed from the source" } else { "" };
    context.line(entry.info().name());
    context.line(format!("source  {} {}", entry.info().dtype(), shape(entry.info().shape())));
    context.line(format!("matrix  {rows} x {cols}{transposed}"));
    let memory = Sizes::new(entry.info().elements(), entry.memory_bytes()).bits_per_weight;
    let sizes = format!("{:.3} bits/weight, {memory:.3} in memory", entry.bits_per_weight());
    let asked = entry.rate().map_or_else(String::new, |rate| format!(", {rate} asked for"));
    context.line(format!("codec   {}, {sizes}{asked}", entry.codec().id));
    let rows = entry.planes().iter().enumerate().map(|(index, p)| {
        vec![
            p.plane.name().to_owned(),
            p.coding.map_or("-", Coding::id).to_owned(),
            thousands(p.offset),
            thousands(p.bytes),
            thousands(entry.plain_bytes(index)),
            p.crc32c.len().to_string(),
            p.blake3.to_string(),
        ]
    });
    context.line(table(&["plane", "coding", "offset", "bytes", "in memory", "chunks", "blake3"], rows, 2));
}

fn summary(artifact: &ArtifactFile, total: &Sizes, memory: &Sizes, context: &mut Context<'_>) {
    let header = artifact.header();
    let provenance = header.provenance();
    context.line(format!("{} tensors, {} weights", header.tensors().len(), thousands(total.weights)));
    context.line(format!("{} bytes, {}", thousands(total.bytes), phrase(total)));
    context.line(format!("{} bytes in memory, {}", thousands(memory.bytes), phrase(memory)));
    for file in artifact.files() {
        context.line(format!("file     {}, {} bytes, blake3 {}", file.name, thousands(file.bytes), file.blake3));
    }
    if let Some(delta) = header.delta() {
        let of = if delta.checkpoint { "checkpoint" } else { "base" };
        context.line(format!("delta    of {of} {}, giving {}", delta.base, delta.result));
    }
    context.line(format!("identity {}", header.identity()));
    for source in &provenance.sources {
        let name = plain(&source.name);
        context.line(format!("source   {name}, {} bytes, blake3 {}", thousands(source.bytes), source.blake3));
    }
    context.line(format!("made by  {}", plain(&provenance.tool)));
}
