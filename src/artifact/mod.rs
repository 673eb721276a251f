//! The artifact: one file that holds a compressed model and proves that it is whole.
//!
//! `FORMAT.md` beside this file is normative and stands below. [`header`] is the only parser and the only printer;
//! [`writer`] streams planes into a new file, [`map`] reads them back, [`verify`] checks all of it, [`delta`] stores
//! only what differs from a base. A plane may be coded in the file ([`Coding`]): whoever reads it gets the same bytes. The same content may lie in a directory instead of a file; see [`ArtifactFile::open`].
//!
#![doc = include_str!("FORMAT.md")]

pub mod attached;
mod checksum;
pub(crate) mod coded;
pub(crate) mod config;
pub mod delta;
pub(crate) mod directory;
pub(crate) mod entry;
pub mod header;
mod identity;
pub mod map;
mod outliers;
mod preamble;
mod store;
mod text;
pub mod verify;
pub mod writer;

pub use attached::AttachedFile;
pub use coded::Coding;
pub use entry::{ALIGN, CHUNK, Entry, PlaneEntry};
pub use header::{Header, Provenance, SourceFile};
pub use identity::Identity;
pub use map::ArtifactFile;
pub use preamble::{FLAG_CHECKPOINT, FLAG_CODED, FLAG_DELTA, MAGIC, VERSION};
pub use writer::Writer;

/// The header of the directory form, as a file of its own.
pub const HEADER_FILE: &str = crate::source::HEADER_FILE;
/// The key under which shards keep its CRC32C.
pub(crate) const HEADER_SUM: &str = "tenpak_header_crc32c";
