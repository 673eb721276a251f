//! The directory form of an artifact, written: what `transformers` and every safetensors reader opens.
//!
//! What stands in which shard follows from the header of the artifact alone, so every file's length is known before
//! anything is written. Within a shard wider elements come first, so that every plane is aligned.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use serde_json::{Map, Value};

use super::safetensors::{head, index_text, shard_name};
use super::{Files, card};
use crate::artifact::directory::{Stored, quantization_config, stored};
use crate::artifact::header::Header;
use crate::artifact::{ArtifactFile, CHUNK, HEADER_FILE, HEADER_SUM, config};
use crate::compress::{OnProgress, Progress};
use crate::error::{Error, Result};
use crate::output::OutputDirectory;
use crate::source::INDEX;

/// A shard: what stands before its data, and the planes that follow.
struct Shard {
    name: String,
    head: Vec<u8>,
    data: u64,
    planes: Vec<Stored>,
}

/// What a directory consists of.
pub(crate) struct Plan {
    shards: Vec<Shard>,
    /// Files that are written for the directory, by name.
    texts: Vec<(&'static str, Vec<u8>)>,
    /// Numbers, names and lengths of attached files that are copied.
    copies: Vec<(usize, String, u64)>,
    /// What a reader should know.
    pub notes: Vec<String>,
}

impl Plan {
    /// The directory of an artifact, given the text of its config and what the model is called.
    ///
    /// # Errors
    /// [`Error::Invalid`] when names collide, or the config cannot say how weights are quantized.
    pub fn new(header: &Header, config: Option<&[u8]>, model: &str, max_shard_bytes: u64) -> Result<Self> {
        let mut text = Vec::new();
        header.print(&mut text).map_err(|e| Error::invalid(format!("the header cannot be printed: {e}")))?;
        let mut metadata: BTreeMap<String, String> = header.metadata().clone();
        metadata.entry("format".to_owned()).or_insert_with(|| "pt".to_owned());
        metadata.insert(HEADER_SUM.to_owned(), format!("{:08x}", crc32c::crc32c(&text)));
        let parts = split(header, max_shard_bytes)?;
        let count = parts.len();
        let mut shards = Vec::with_capacity(count);
        for (i, planes) in parts.into_iter().enumerate() {
            let (head, data) = head(&metadata, planes.iter().map(|s| (&s.info, s.info.dtype())))?;
            shards.push(Shard { name: shard_name(i, count), head, data, planes });
        }
        let mut texts = vec![
            (HEADER_FILE, text),
            (config::CONFIG, config::quantized(config, &quantization_config(header.tensors()))?.into_bytes()),
            ("README.md", card::text(model, header).into_bytes()),
        ];
        if count > 1 {
            let mut weight_map = Map::new();
            for shard in &shards {
                let places = shard.planes.iter().map(|s| (s.info.name().to_owned(), Value::from(&*shard.name)));
                weight_map.extend(places);
            }
            texts.push((INDEX, index_text(shards.iter().map(|s| s.data).sum(), weight_map)?));
        }
        let notes = match config {
            Some(_) => Vec::new(),
            None => vec![
                "the source has no config.json, so the one written says only how weights are quantized; transformers \
                 needs the rest as well"
                    .to_owned(),
            ],
        };
        let copies = header.files().iter().enumerate().filter(|(_, f)| *f.name != *config::CONFIG);
        let copies = copies.map(|(i, f)| (i, f.name.to_string(), f.bytes)).collect();
        Ok(Self { shards, texts, copies, notes })
    }

    /// Names and lengths of all files, weights first.
    pub fn files(&self) -> Vec<(String, u64)> {
        let shards = self.shards.iter().map(|s| (s.name.clone(), s.head.len() as u64 + s.data));
        let texts = self.texts.iter().map(|(name, text)| ((*name).to_owned(), text.len() as u64));
        shards.chain(texts).chain(self.copies.iter().map(|(_, name, bytes)| (name.clone(), *bytes))).collect()
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files().iter().map(|(_, bytes)| bytes).sum()
    }

    /// Bytes of the files that weights and header take.
    pub fn weight_bytes(&self) -> u64 {
        let header = self.texts.iter().filter(|(name, _)| *name == HEADER_FILE).map(|(_, text)| text.len() as u64);
        self.shards.iter().map(|s| s.head.len() as u64 + s.data).chain(header).sum()
    }

    /// Writes the directory of the artifact that this is the plan of.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the artifact is damaged, [`Error::Io`], and whatever `on_progress` returns. Nothing is left
    /// behind.
    pub fn write(self, artifact: &ArtifactFile, target: &Path, on_progress: &mut OnProgress<'_>) -> Result<Files> {
        let out = OutputDirectory::create(target)?;
        let total = self.shards.iter().map(|s| s.data).sum();
        let mut done = 0;
        for shard in &self.shards {
            let mut file = Out::new(&out, &shard.name)?;
            file.write(&shard.head)?;
            for s in &shard.planes {
                let entry = &artifact.tensors()[s.tensor];
                let (tensor, bytes) = (entry.info().name(), entry.planes()[s.plane].bytes);
                let mut at = 0;
                while at < bytes {
                    let len = CHUNK.min(bytes - at);
                    file.write(&artifact.stored(s.tensor, s.plane, at, len)?)?;
                    at += len;
                    done += len;
                    on_progress(Progress { done, total, tensor })?;
                }
            }
        }
        for (name, text) in &self.texts {
            Out::new(&out, name)?.write(text)?;
        }
        for (index, name, _) in &self.copies {
            Out::new(&out, name)?.write(&artifact.attached(*index)?)?;
        }
        let files = self.files().into_iter().map(|(name, bytes)| (target.join(name), bytes)).collect();
        out.commit()?;
        Ok(files)
    }
}

/// A file of a directory under way.
struct Out<'a> {
    file: File,
    directory: &'a OutputDirectory,
    name: &'a str,
}

impl<'a> Out<'a> {
    fn new(directory: &'a OutputDirectory, name: &'a str) -> Result<Self> {
        Ok(Self { file: directory.file(name)?, directory, name })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(|e| Error::io(self.directory.target().join(self.name), e))
    }
}

/// The planes in artifact order, cut between two tensors where a shard would become too large; in each shard wider
/// elements first.
fn split(header: &Header, max_shard_bytes: u64) -> Result<Vec<Vec<Stored>>> {
    let mut shards: Vec<Vec<Stored>> = vec![Vec::new()];
    let (mut size, mut last) = (0, None);
    for s in stored(header.tensors())? {
        if last != Some(s.tensor) {
            let bytes = header.tensors()[s.tensor].stored_bytes();
            if size > 0 && size + bytes > max_shard_bytes {
                shards.push(Vec::new());
                size = 0;
            }
            size += bytes;
            last = Some(s.tensor);
        }
        shards.last_mut().expect("there is always one").push(s);
    }
    for shard in &mut shards {
        shard.sort_by_key(|s| std::cmp::Reverse(s.width));
    }
    Ok(shards)
}
