//! Caps on what a file may ask for, in one value that the caller may change.

use crate::error::{Error, Result};

/// The most that a header may claim before it is refused, checked before anything is allocated for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of a header (of an artifact, of a safetensors file, of an index).
    pub header_bytes: u64,
    /// Tensors in one file.
    pub tensors: u64,
    /// Dimensions of a tensor.
    pub dims: u64,
    /// Bytes of a tensor's name; at least one.
    pub name_bytes: u64,
    /// Entries of free text that an artifact carries over.
    pub metadata: u64,
    /// Files that an artifact carries besides weights.
    pub files: u64,
    /// Bytes of one of them.
    pub file_bytes: u64,
    /// Nesting of JSON arrays and objects.
    pub json_depth: u64,
}

impl Limits {
    /// Room for every checkpoint that exists: 64 MiB of header, 2^20 tensors, 8 dimensions, names of 1024 bytes,
    /// 4096 texts, 64 files of 256 MiB.
    pub const DEFAULT: Self = Self {
        header_bytes: 64 << 20,
        tensors: 1 << 20,
        dims: 8,
        name_bytes: 1024,
        metadata: 4096,
        files: 64,
        file_bytes: 256 << 20,
        json_depth: 64,
    };
}

impl Default for Limits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Refuses `got` above `limit`.
pub(crate) fn check(what: &'static str, limit: u64, got: u64) -> Result<()> {
    if got > limit { Err(Error::Limit { what, limit, got }) } else { Ok(()) }
}
