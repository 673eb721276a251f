//! A Hugging Face model directory: which of its files hold the weights, and that they are its own.
//!
//! An index is a list of file names written by whoever made the model. A name is therefore one plain component, and a
//! link is followed only within the directory or, as the Hugging Face cache needs it, within the `models--*` entry that
//! holds both the directory's `snapshots/` and its `blobs/`.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io::ErrorKind;
use std::marker::PhantomData;
use std::path::{Component, Path, PathBuf};

use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor};

use crate::error::{Error, Result};
use crate::file::{Access, InputFile};
use crate::limits::{self, Limits};
use crate::location;

use super::json::{self, Failure, once};
use super::{Kind, Options, Source, SourceFile, compressed, detect, duplicate, quoted, safetensors, side_files};

/// The index of a model of several files.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// What only the directory form of an artifact has.
pub(crate) const HEADER_FILE: &str = "tenpak.json";

/// The model in one file.
const SINGLE: &str = "model.safetensors";

/// More than any `config.json` needs: it becomes a tree in memory, many times its length.
const CONFIG_BYTES: u64 = 4 << 20;

/// Opens the model in `dir`.
pub(super) fn open(dir: &Path, options: &Options) -> Result<Source> {
    let limits = &options.limits;
    if member(dir, HEADER_FILE)?.is_some() {
        return Err(compressed().in_file(dir));
    }
    let mut source = open_shards(dir, options)?;
    source.config = read_config(dir, limits)?;
    source.attached = side_files(dir, options)?;
    source.finish(limits).map_err(|e| e.in_file(dir))
}

/// Opens the safetensors files of `dir`, whatever their tensors mean.
///
/// # Errors
/// [`Error::Io`], [`Error::Corrupt`] when a file contradicts itself or the index, [`Error::Invalid`] when files are missing.
pub(crate) fn open_shards(dir: &Path, options: &Options) -> Result<Source> {
    let limits = &options.limits;
    Ok(match member(dir, INDEX)? {
        Some(index) => open_indexed(dir, &index, options)?,
        None => {
            let name = single_file(dir)?;
            let path = member(dir, &name)?.ok_or_else(|| Error::io(dir.join(&name), ErrorKind::NotFound.into()))?;
            let file = InputFile::open(&path, options.access)?;
            let header = safetensors::read_header(&file, 0, limits).map_err(|e| e.in_file(&path))?;
            let mut source = Source::new(Kind::HuggingFace, vec![SourceFile::new(file)], header.tensors);
            source.metadata = header.metadata;
            source
        }
    })
}

/// The name of the one file that holds the weights of a directory without an index.
fn single_file(dir: &Path) -> Result<String> {
    // A server that lists nothing is asked for the usual name.
    let mut names = location::names(dir)?.unwrap_or_else(|| vec![SINGLE.to_owned()]);
    if names.iter().any(|name| name == SINGLE) {
        return Ok(SINGLE.to_owned());
    }
    names.sort();
    let mut weights = names.iter().filter(|name| name.ends_with(".safetensors"));
    match (weights.next(), weights.count()) {
        (Some(name), 0) => Ok(name.clone()),
        (Some(name), others) => Err(Error::invalid(format!(
            "the directory has {} .safetensors files but no {INDEX} that says which tensor is where; give one of them, \
             such as {}, or fetch the index",
            others + 1,
            quoted(name)
        ))
        .in_file(dir)),
        (None, _) => match names.iter().find_map(|name| detect::foreign_weights(name)) {
            Some(error) => Err(error.in_file(dir)),
            None => Err(Error::invalid(format!(
                "the directory has no weights: looked for {INDEX}, {SINGLE} and any one *.safetensors"
            ))
            .in_file(dir)),
        },
    }
}

/// Opens the shards that the index at `path` names.
fn open_indexed(dir: &Path, path: &Path, options: &Options) -> Result<Source> {
    let limits = &options.limits;
    let shard_of = read_index(path, limits)?;
    if shard_of.is_empty() {
        return Err(Error::invalid("the index names no tensors, expected at least one: fetch it again").in_file(path));
    }
    let mut counts = BTreeMap::<&str, usize>::new();
    for shard in shard_of.values() {
        *counts.entry(shard).or_default() += 1;
    }
    let mut source = Source::new(Kind::HuggingFace, Vec::new(), Vec::new());
    for (number, (&shard, &count)) in counts.iter().enumerate() {
        let Some(shard_path) = member(dir, shard).map_err(|e| e.in_file(path))? else {
            return Err(Error::invalid(format!(
                "shard {} is missing, which holds {count} of the model's {} tensors: fetch it",
                quoted(shard),
                shard_of.len()
            ))
            .in_file(path));
        };
        let file = InputFile::open(&shard_path, options.access)?;
        let header = safetensors::read_header(&file, number, limits).map_err(|e| e.in_file(&shard_path))?;
        for tensor in &header.tensors {
            let name = tensor.info().name();
            let expected = match shard_of.get(name) {
                Some(expected) if expected == shard => continue,
                Some(expected) => format!("the index puts it in {}", quoted(expected)),
                None => "the index does not name it".to_owned(),
            };
            let what = format!("tensor {} is in this shard, but {expected}: fetch both again", quoted(name));
            return Err(Error::corrupt(0, what).in_file(&shard_path));
        }
        if header.tensors.len() < count {
            let there: std::collections::HashSet<_> = header.tensors.iter().map(|t| t.info().name()).collect();
            let absent = shard_of.iter().filter(|(name, s)| *s == shard && !there.contains(name.as_str()));
            let first = absent.map(|(name, _)| name).min().expect("fewer are there than the index names");
            let what = format!(
                "tensor {} is not in this shard, where the index puts it, nor are {} others: fetch both again",
                quoted(first),
                count - header.tensors.len() - 1
            );
            return Err(Error::corrupt(0, what).in_file(&shard_path));
        }
        source.files.push(SourceFile::new(file));
        source.tensors.extend(header.tensors);
        for (key, value) in header.metadata {
            source.metadata.entry(key).or_insert(value);
        }
    }
    Ok(source)
}

/// The `config.json` of a directory, where there is one.
pub(super) fn read_config(dir: &Path, limits: &Limits) -> Result<Option<serde_json::Value>> {
    let Some(path) = member(dir, "config.json")? else { return Ok(None) };
    let file = InputFile::open(path, Access::Read)?;
    let most = CONFIG_BYTES.min(limits.header_bytes);
    json::parse_file(&file, "bytes of config.json", most, limits, PhantomData).map(Some)
}

/// The path of the file `name` of `dir`, or `None` where there is none.
pub(crate) fn member(dir: &Path, name: &str) -> Result<Option<PathBuf>> {
    let mut components = Path::new(name).components();
    let plain = matches!((components.next(), components.next()), (Some(Component::Normal(c)), None) if c == name);
    if !plain || name.contains(['/', '\\']) || name.chars().any(char::is_control) {
        return Err(Error::invalid(format!(
            "the file name {} is not one plain name; files of a model lie in its directory",
            quoted(name)
        )));
    }
    if let Some(url) = location::url(dir)? {
        let url = url.child(name)?;
        return Ok(url.bytes()?.map(|_| PathBuf::from(url.to_string())));
    }
    let path = dir.join(name);
    let kind = match std::fs::symlink_metadata(&path) {
        Ok(metadata) => metadata.file_type(),
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(path, e)),
    };
    if kind.is_symlink() {
        let target = std::fs::canonicalize(&path).map_err(|e| Error::io(&path, e))?;
        let home = std::fs::canonicalize(dir).map_err(|e| Error::io(dir, e))?;
        let entry = cache_entry(&home);
        if !target.starts_with(&home) && !entry.is_some_and(|entry| target.starts_with(entry)) {
            return Err(Error::invalid(format!(
                "the link leads to {}, outside the model's directory: copy the file there",
                target.display()
            ))
            .in_file(path));
        }
    }
    Ok(Some(path))
}

/// The Hugging Face cache entry that the model directory `home` is a snapshot of.
fn cache_entry(home: &Path) -> Option<&Path> {
    home.ancestors().skip(1).find(|entry| {
        entry.file_name().is_some_and(|name| name.to_string_lossy().starts_with("models--"))
            && home.starts_with(entry.join("snapshots"))
            && entry.join("blobs").is_dir()
    })
}

/// Which shard each tensor is in, by the index at `path`.
fn read_index(path: &Path, limits: &Limits) -> Result<HashMap<String, String>> {
    let file = InputFile::open(path, Access::Read)?;
    limits::check("bytes of an index", limits.header_bytes, file.len()).map_err(|e| e.in_file(path))?;
    let mut failure = Failure::default();
    let result = json::parse(file.stream()?, limits, Index { failure: &mut failure, limits });
    let map = failure.or(result, |e| json::lift_at(e, &file)).map_err(|e| e.in_file(path))?;
    map.ok_or_else(|| Error::corrupt(0, "the index has no 'weight_map'").in_file(path))
}

/// Reads the index's outer object.
struct Index<'a> {
    failure: &'a mut Failure,
    limits: &'a Limits,
}

impl<'de> DeserializeSeed<'de> for Index<'_> {
    type Value = Option<HashMap<String, String>>;

    fn deserialize<D: serde::Deserializer<'de>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Index<'_> {
    type Value = Option<HashMap<String, String>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with a 'weight_map'")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = None;
        while let Some(field) = map.next_key::<String>()? {
            if field == "weight_map" {
                let seed = WeightMap { failure: &mut *self.failure, limits: self.limits };
                once(&mut found, "weight_map", map.next_value_seed(seed)?)?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }
}

/// Reads the object from tensor names to shard names.
struct WeightMap<'a> {
    failure: &'a mut Failure,
    limits: &'a Limits,
}

impl<'de> DeserializeSeed<'de> for WeightMap<'_> {
    type Value = HashMap<String, String>;

    fn deserialize<D: serde::Deserializer<'de>>(self, json: D) -> Result<Self::Value, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for WeightMap<'_> {
    type Value = HashMap<String, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object from tensor names to file names")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut shards = HashMap::new();
        while let Some((name, shard)) = map.next_entry::<String, String>()? {
            let count = shards.len() as u64 + 1;
            if let Err(e) = limits::check("tensors of an index", self.limits.tensors, count) {
                return Err(self.failure.stop(e));
            }
            if shards.contains_key(&name) {
                return Err(self.failure.stop(duplicate(&name)));
            }
            shards.insert(name, shard);
        }
        Ok(shards)
    }
}
