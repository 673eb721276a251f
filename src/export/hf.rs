//! The directory form of an artifact, written: what `transformers` and every safetensors reader opens.
//!
//! What stands in which shard is a [`Cut`], made from what headers foretell of every tensor's size: so it is the same
//! whether one process writes all shards or many write a part each. Within a shard wider elements come first, so that
//! every plane is aligned.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::Path;

use serde_json::{Map, Value};

use super::safetensors::{head, index_text, shard_name};
use super::{Files, card};
use crate::artifact::directory::{Stored, quantization_config, stored};
use crate::artifact::header::Header;
use crate::artifact::{ArtifactFile, CHUNK, Entry, HEADER_FILE, HEADER_SUM, config};
use crate::compress::{OnProgress, Progress};
use crate::error::{Error, Result};
use crate::file::{Access, InputFile};
use crate::output::OutputDirectory;
use crate::source::INDEX;

/// A shard: what stands before its data, and the planes that follow.
struct Shard {
    name: String,
    head: Vec<u8>,
    data: u64,
    planes: Vec<Stored>,
}

/// Which tensors lie in which shard: neighbours in the order of the artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cut {
    /// How many tensors each shard has.
    counts: Vec<usize>,
}

impl Cut {
    /// Cuts between two tensors where a shard would become larger than asked for, by the sizes that headers foretell.
    ///
    /// # Errors
    /// [`Error::Invalid`] when a codec cannot hold its tensor.
    pub fn of(tensors: &[Entry], max_shard_bytes: u64) -> Result<Self> {
        let (mut counts, mut size) = (vec![0], 0);
        for entry in tensors {
            let bytes = entry.foretold_bytes()?;
            if size > 0 && size + bytes > max_shard_bytes {
                counts.push(0);
                size = 0;
            }
            size += bytes;
            *counts.last_mut().expect("there is always one") += 1;
        }
        Ok(Self { counts })
    }

    /// Shards of so many tensors.
    pub fn from_counts(counts: Vec<usize>) -> Self {
        Self { counts }
    }

    /// How many tensors each shard has.
    pub fn counts(&self) -> &[usize] {
        &self.counts
    }

    /// The tensors of neighbouring shards.
    pub fn tensors(&self, shards: &Range<usize>) -> Range<usize> {
        let sum = |until: usize| self.counts[..until].iter().sum();
        sum(shards.start)..sum(shards.end)
    }
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
    /// The directory of an artifact, given the text of its config, what the model is called and where it is cut.
    ///
    /// # Errors
    /// [`Error::Invalid`] when names collide, or the config cannot say how weights are quantized.
    pub fn new(header: &Header, config: Option<&[u8]>, model: &str, cut: &Cut) -> Result<Self> {
        let mut plan = Self::part(header, config, cut, 0..cut.counts.len())?;
        let text = config::quantized(config, &quantization_config(header.tensors()))?.into_bytes();
        plan.texts.retain(|(name, _)| *name != config::CONFIG);
        plan.texts.insert(1, (config::CONFIG, text));
        plan.texts.insert(2, ("README.md", card::text(model, header).into_bytes()));
        if config.is_none() {
            plan.notes.push(
                "the source has no config.json, so the one written says only how weights are quantized; transformers \
                 needs the rest as well"
                    .to_owned(),
            );
        }
        Ok(plan)
    }

    /// Some of the shards of a directory that is cut like this, with a header of their own; `header` has their tensors.
    ///
    /// # Errors
    /// Those of [`Plan::new`].
    pub fn part(header: &Header, config: Option<&[u8]>, cut: &Cut, own: Range<usize>) -> Result<Self> {
        let mut text = Vec::new();
        header.print(&mut text).map_err(|e| Error::invalid(format!("the header cannot be printed: {e}")))?;
        let mut metadata: BTreeMap<String, String> = header.metadata().clone();
        metadata.entry("format".to_owned()).or_insert_with(|| "pt".to_owned());
        metadata.insert(HEADER_SUM.to_owned(), format!("{:08x}", crc32c::crc32c(&text)));
        let mut shards = Vec::with_capacity(own.len());
        for (number, planes) in own.clone().zip(split(header, &cut.counts[own.clone()])?) {
            let (head, data) = head(&metadata, planes.iter().map(|s| (&s.info, s.info.dtype())))?;
            shards.push(Shard { name: shard_name(number, cut.counts.len()), head, data, planes });
        }
        let mut texts = vec![(HEADER_FILE, text)];
        if let Some(config) = config {
            let config = config::quantized(Some(config), &quantization_config(header.tensors()))?;
            texts.push((config::CONFIG, config.into_bytes()));
        }
        if shards.len() > 1 {
            let mut weight_map = Map::new();
            for shard in &shards {
                let places = shard.planes.iter().map(|s| (s.info.name().to_owned(), Value::from(&*shard.name)));
                weight_map.extend(places);
            }
            texts.push((INDEX, index_text(shards.iter().map(|s| s.data).sum(), weight_map)?));
        }
        let copies = header.files().iter().enumerate().filter(|(_, f)| *f.name != *config::CONFIG);
        let copies = copies.map(|(i, f)| (i, f.name.to_string(), f.bytes)).collect();
        Ok(Self { shards, texts, copies, notes: Vec::new() })
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
        self.fill(artifact, &out, on_progress)?;
        let files = self.files().into_iter().map(|(name, bytes)| (target.join(name), bytes)).collect();
        out.commit()?;
        Ok(files)
    }

    /// The same into a directory under way.
    pub fn fill(&self, artifact: &ArtifactFile, out: &OutputDirectory, on_progress: &mut OnProgress<'_>) -> Result<()> {
        let total = self.shards.iter().map(|s| s.data).sum();
        let mut done = 0;
        for shard in &self.shards {
            let mut file = Out::new(out, &shard.name)?;
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
            Out::new(out, name)?.write(text)?;
        }
        self.copy(out, |index| Ok(artifact.attached(index)?.to_vec()))
    }

    /// Writes the directory with shards that are there already but for the checksum of the header in them, each in the
    /// directory that `home` gives; `own` is the checksum that it may still have.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when a shard is not what the header says, [`Error::Io`], and whatever `on_progress` returns.
    pub fn assemble<'a>(
        &self,
        out: &OutputDirectory,
        home: impl Fn(usize) -> (&'a Path, &'a str),
        attached: impl Fn(usize) -> Result<Vec<u8>>,
        on_progress: &mut OnProgress<'_>,
    ) -> Result<()> {
        let total = self.shards.iter().map(|s| s.data).sum();
        let mut done = 0;
        for (number, shard) in self.shards.iter().enumerate() {
            let (dir, own) = home(number);
            shard.check(&dir.join(&shard.name), own)?;
            let tensor = &*shard.name;
            on_progress(Progress { done, total, tensor })?;
            out.link(&shard.name, &dir.join(&shard.name))?;
            done += shard.data;
        }
        for (name, text) in &self.texts {
            Out::new(out, name)?.write(text)?;
        }
        self.copy(out, attached)?;
        for shard in &self.shards {
            out.rewrite(&shard.name, &shard.head)?;
        }
        Ok(())
    }

    fn copy(&self, out: &OutputDirectory, attached: impl Fn(usize) -> Result<Vec<u8>>) -> Result<()> {
        for (index, name, _) in &self.copies {
            Out::new(out, name)?.write(&attached(*index)?)?;
        }
        Ok(())
    }
}

impl Shard {
    /// Checks that a file has the length and the head of this shard, the checksum of the header apart, which may be `own`.
    fn check(&self, path: &Path, own: &str) -> Result<()> {
        let file = InputFile::open(path, Access::Read)?;
        let expected = self.head.len() as u64 + self.data;
        if file.len() != expected {
            let what = format!("it has {} bytes, expected {expected}; write the part again", file.len());
            return Err(Error::corrupt(0, what).in_file(path));
        }
        let found = file.read(0, self.head.len())?;
        let key = format!("\"{HEADER_SUM}\":\"");
        let at = self.head.windows(key.len()).position(|w| w == key.as_bytes()).expect("every head has it") + key.len();
        let sum = at..at + own.len();
        let known = found[sum.clone()] == *own.as_bytes() || found[sum.clone()] == self.head[sum.clone()];
        if !known || found[..at] != self.head[..at] || found[sum.end..] != self.head[sum.end..] {
            let what = "its head is not that of this shard; write the part again";
            return Err(Error::corrupt(0, what).in_file(path));
        }
        Ok(())
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

/// The planes of shards of so many tensors each, in artifact order; in each shard wider elements first.
fn split(header: &Header, counts: &[usize]) -> Result<Vec<Vec<Stored>>> {
    let mut planes = stored(header.tensors())?.into_iter().peekable();
    let mut shards = Vec::with_capacity(counts.len());
    let mut end = 0;
    for count in counts {
        end += count;
        let mut shard: Vec<Stored> = std::iter::from_fn(|| planes.next_if(|s| s.tensor < end)).collect();
        shard.sort_by_key(|s| std::cmp::Reverse(s.width));
        shards.push(shard);
    }
    Ok(shards)
}
