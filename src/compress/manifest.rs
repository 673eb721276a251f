//! The manifest of a part: what all parts of one artifact have in common, and what this one has.
//!
//! It lies as [`NAME`] in the directory of the part, beside the shards and a header of their own. Everything in it but
//! digests follows from headers, options and the number of the part, so no part needs to know another.

use std::marker::PhantomData;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::part::Part;
use crate::artifact::Identity;
use crate::error::{Error, Result};
use crate::file::{Access, InputFile};
use crate::limits::Limits;
use crate::source;

/// The file.
pub(super) const NAME: &str = "part.json";

/// The only format there is.
const FORMAT: u64 = 1;

/// What all parts of one artifact agree in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Job {
    /// Name and version of the program.
    pub tool: String,
    /// The recipe, as TOML, its rate settled.
    pub recipe: String,
    pub nonfinite: String,
    pub coded: bool,
    pub max_shard_bytes: u64,
    /// Digest of what identifies source and statistics; see [`super::sample`].
    pub source: Identity,
    /// Tensors and shards in all.
    pub tensors: u64,
    pub shards: u64,
}

impl Job {
    /// What the first thing is called in which two jobs differ.
    pub fn differs(&self, other: &Self) -> Option<&'static str> {
        let shards = self.max_shard_bytes == other.max_shard_bytes && self.shards == other.shards;
        let differ = [
            ("version of tenpak", self.tool == other.tool),
            ("source or statistics", self.source == other.source && self.tensors == other.tensors),
            ("recipe", self.recipe == other.recipe),
            ("option --nonfinite", self.nonfinite == other.nonfinite),
            ("option --coded", self.coded == other.coded),
            ("option --max-shard-size", shards),
        ];
        differ.into_iter().find(|(_, same)| !same).map(|(what, _)| what)
    }
}

/// A file that provenance names; its digest is in the manifest of one part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Read {
    pub name: String,
    pub bytes: u64,
    pub blake3: Option<Identity>,
}

/// A part as its directory says it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    format: u64,
    pub part: u32,
    pub of: u32,
    pub job: Job,
    /// What the model is called.
    pub model: String,
    pub sources: Vec<Read>,
    /// The number of the first shard, from zero, and how many tensors each shard has.
    pub first_shard: u64,
    pub shards: Vec<u64>,
}

impl Manifest {
    pub fn new(part: Part, job: Job, model: String, sources: Vec<Read>, first_shard: usize, counts: &[usize]) -> Self {
        let shards = counts.iter().map(|&count| count as u64).collect();
        let (number, of) = (part.number(), part.of());
        Self { format: FORMAT, part: number, of, job, model, sources, first_shard: first_shard as u64, shards }
    }

    /// The text of the file.
    pub fn print(&self) -> Result<Vec<u8>> {
        serde_json::to_vec_pretty(self).map_err(|e| Error::invalid(format!("a manifest cannot be printed: {e}")))
    }

    /// Reads the manifest in a directory; nothing where there is none.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Limit`], [`Error::Io`]; [`Error::Unsupported`] for a format of another version.
    pub fn read(dir: &Path, limits: &Limits) -> Result<Option<Self>> {
        #[derive(Deserialize)]
        struct Format {
            format: u64,
        }
        let Some(path) = source::member(dir, NAME)? else { return Ok(None) };
        let file = InputFile::open(path, Access::Read)?;
        let what = "bytes of a manifest";
        let Format { format } = source::parse_file(&file, what, limits.header_bytes, limits, PhantomData)?;
        if format != FORMAT {
            let known = format!("this build reads format {FORMAT}; upgrade tenpak");
            let what = format!("format {format} of {NAME} is not known, {known}");
            return Err(Error::unsupported(what).in_file(file.path()));
        }
        source::parse_file(&file, what, limits.header_bytes, limits, PhantomData).map(Some)
    }
}
