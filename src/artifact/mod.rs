//! The artifact: one file that holds a compressed model and proves that it is whole.
//!
//! `FORMAT.md` beside this file is normative and stands below. [`header`] is the only parser and the only printer;
//! [`writer`] streams planes into a new file, [`map`] reads them back, [`verify`] checks all of it, [`delta`] stores
//! only what differs from a base.
//!
#![doc = include_str!("FORMAT.md")]

pub mod delta;
pub mod header;
pub mod map;
pub mod verify;
pub mod writer;

pub use header::{Entry, Header, Identity, PlaneEntry, Provenance, SourceFile};
pub use map::ArtifactFile;
pub use writer::Writer;
