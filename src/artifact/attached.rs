//! Attached files: what a model needs beside its weights (config, tokenizer), carried byte for byte.
//!
//! A name is one plain component with one of a few endings, so that a reader who writes the files out can be made to
//! write neither outside its directory, nor a program, nor weights.

use std::fmt;

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::checksum::{chunks, from_hex, to_hex};
use super::identity::Identity;
use crate::error::{Error, Result};
use crate::limits::{self, Limits};

/// The endings that a name may have.
pub const ENDINGS: &[&str] = &[".jinja", ".json", ".model", ".tiktoken", ".txt"];

/// The longest name, in bytes: what file systems take.
pub const NAME_BYTES: u64 = 255;

/// One file that an artifact carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachedFile {
    /// Its name, without a directory.
    pub name: Box<str>,
    /// Where it begins.
    pub offset: u64,
    /// Its length.
    pub bytes: u64,
    /// CRC32C of each chunk.
    pub crc32c: Box<[u32]>,
    /// BLAKE3-256 of all of it.
    pub blake3: Identity,
}

impl AttachedFile {
    /// A file whose place and checksums are not known yet.
    pub(super) fn unplaced(name: &str, bytes: u64) -> Self {
        Self { name: name.into(), offset: 0, bytes, crc32c: vec![0; chunks(bytes)].into(), blake3: Identity([0; 32]) }
    }
}

/// Checks number, names, order and lengths of files.
///
/// # Errors
/// [`Error::Limit`] for too many or too long ones, [`Error::Invalid`] for the rest.
pub(super) fn check(files: &[AttachedFile], limits: &Limits) -> Result<()> {
    limits::check("number of attached files", limits.files, files.len() as u64)?;
    for file in files {
        check_name(&file.name)?;
        limits::check("bytes of an attached file", limits.file_bytes, file.bytes)?;
    }
    for pair in files.windows(2) {
        let [first, second] = [&pair[0].name, &pair[1].name];
        if first.as_bytes() >= second.as_bytes() {
            return Err(Error::invalid(format!("file '{second}' stands behind '{first}', expected names in order")));
        }
    }
    Ok(())
}

fn check_name(name: &str) -> Result<()> {
    if name.len() as u64 > NAME_BYTES {
        let what = "bytes of the name of an attached file";
        return Err(Error::Limit { what, limit: NAME_BYTES, got: name.len() as u64 });
    }
    let reserved = name == super::HEADER_FILE || name.ends_with(".safetensors.index.json");
    let plain = !name.contains(|c: char| c.is_control() || "/\\:".contains(c));
    if reserved || !plain || !ENDINGS.iter().any(|ending| name.len() > ending.len() && name.ends_with(ending)) {
        return Err(Error::invalid(format!(
            "a file is called '{name}', expected one plain name that ends in {} and is not of the weights",
            ENDINGS.join(", ")
        )));
    }
    Ok(())
}

/// A file as it stands in JSON.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileJson {
    name: Box<str>,
    offset: u64,
    bytes: u64,
    crc32c: String,
    blake3: Identity,
}

impl Serialize for AttachedFile {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        FileJson {
            name: self.name.clone(),
            offset: self.offset,
            bytes: self.bytes,
            crc32c: to_hex(&self.crc32c),
            blake3: self.blake3,
        }
        .serialize(s)
    }
}

impl<'de> Deserialize<'de> for AttachedFile {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let FileJson { name, offset, bytes, crc32c, blake3 } = FileJson::deserialize(d)?;
        let crcs = from_hex(&crc32c, bytes).ok_or_else(|| {
            serde::de::Error::custom(format!(
                "file '{name}' has {} digits of checksums, expected {} hex digits",
                crc32c.len(),
                chunks(bytes).saturating_mul(8)
            ))
        })?;
        Ok(Self { name, offset, bytes, crc32c: crcs, blake3 })
    }
}

/// Reads at most as many files as the default limits allow, so that a hostile list takes no memory.
pub(super) fn files<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<AttachedFile>, D::Error> {
    struct Files;
    impl<'de> Visitor<'de> for Files {
        type Value = Vec<AttachedFile>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an array of files")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            let mut all = Vec::new();
            while let Some(file) = seq.next_element()? {
                if all.len() as u64 == Limits::DEFAULT.files {
                    return Err(serde::de::Error::custom(format!(
                        "limit exceeded: more than {} attached files",
                        Limits::DEFAULT.files
                    )));
                }
                all.push(file);
            }
            Ok(all)
        }
    }
    d.deserialize_seq(Files)
}
