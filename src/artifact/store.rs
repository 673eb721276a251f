//! Where the bytes of an artifact lie: in one file, or in the shards and files of a directory.

use std::path::{Path, PathBuf};

use super::attached::AttachedFile;
use super::header::Header;
use crate::error::{Error, Result};
use crate::file::{Block, InputFile};

/// The most planes that a tensor has.
pub(super) const PLANES: usize = 4 + 4;

/// Where a plane of a directory begins.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Place {
    /// Number of the shard.
    pub shard: u32,
    /// Byte in it.
    pub offset: u64,
}

/// The content of an attached file of a directory.
#[derive(Debug)]
pub(super) enum Content {
    /// The file itself.
    File(Box<InputFile>),
    /// What stands in the file without what the directory form has put there.
    Restored { path: PathBuf, bytes: Vec<u8> },
}

/// The shards and files of a directory.
#[derive(Debug)]
pub(super) struct Directory {
    pub path: PathBuf,
    pub shards: Vec<InputFile>,
    /// Per tensor, its planes.
    pub places: Box<[[Place; PLANES]]>,
    /// In the order of the header.
    pub attached: Vec<Content>,
    /// Bytes of the files that weights and header take.
    pub weight_bytes: u64,
    /// Bytes of all files.
    pub bytes: u64,
}

/// Where the bytes lie.
#[derive(Debug)]
pub(super) enum Store {
    /// At the offsets of the header.
    File(Box<InputFile>),
    /// Elsewhere.
    Directory(Directory),
}

impl Store {
    pub fn path(&self) -> &Path {
        match self {
            Self::File(file) => file.path(),
            Self::Directory(directory) => &directory.path,
        }
    }

    /// The files that are read.
    pub fn files(&self) -> impl Iterator<Item = &InputFile> {
        let (shards, attached) = match self {
            Self::File(file) => (std::slice::from_ref(&**file), [].as_slice()),
            Self::Directory(directory) => (&*directory.shards, &*directory.attached),
        };
        let attached = attached.iter().filter_map(|content| match content {
            Content::File(file) => Some(&**file),
            Content::Restored { .. } => None,
        });
        shards.iter().chain(attached)
    }

    /// Bytes of everything, and of that what weights and header take.
    pub fn bytes(&self, header: &Header) -> (u64, u64) {
        match self {
            Self::File(file) => (file.len(), file.len() - header.attached_room()),
            Self::Directory(directory) => (directory.bytes, directory.weight_bytes),
        }
    }

    /// The file that holds a plane, and where the plane begins in it.
    pub fn plane(&self, header: &Header, tensor: usize, plane: usize) -> (&InputFile, u64) {
        match self {
            Self::File(file) => (file, header.tensors()[tensor].planes()[plane].offset),
            Self::Directory(directory) => {
                let Place { shard, offset } = directory.places[tensor][plane];
                (&directory.shards[shard as usize], offset)
            }
        }
    }

    /// An attached file, not checked, and where it begins.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it has another length than the header says, [`Error::Io`].
    pub fn attached(&self, index: usize, entry: &AttachedFile) -> Result<(&Path, u64, Block)> {
        let len = usize::try_from(entry.bytes).map_err(|_| Error::invalid("the file is larger than memory"))?;
        let (path, found) = match self {
            Self::File(file) => return Ok((file.path(), entry.offset, file.read(entry.offset, len)?)),
            Self::Directory(directory) => match &directory.attached[index] {
                Content::File(file) if file.len() == entry.bytes => return Ok((file.path(), 0, file.read(0, len)?)),
                Content::File(file) => (file.path(), file.len()),
                Content::Restored { path, bytes } if bytes.len() == len => {
                    return Ok((path, 0, Block::Owned(bytes.clone())));
                }
                Content::Restored { path, bytes } => (&**path, bytes.len() as u64),
            },
        };
        let what = format!("it has {found} bytes of its own, {} lists {}; {CHANGED}", super::HEADER_FILE, entry.bytes);
        Err(Error::corrupt(0, what).in_file(path))
    }
}

/// What to do about an attached file of a directory that is not what it was.
pub(super) const CHANGED: &str =
    "it was changed or damaged since: restore it, or remove tenpak.json to have the directory read as it now is";
