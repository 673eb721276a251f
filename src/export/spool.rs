//! Bytes written out of order and read back in order: in memory, or in a nameless file where they are many.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result, try_zeroed};
use crate::location;
use crate::output::{read_exact_at, write_all_at};

/// Room for a known number of bytes.
pub(super) enum Spool {
    Memory(Vec<u8>),
    File { file: File, beside: PathBuf },
}

impl Spool {
    /// Room for `bytes` bytes, in a file in the directory of `beside` when they are more than `in_memory`.
    pub fn new(bytes: u64, in_memory: u64, beside: &Path) -> Result<Self> {
        if bytes <= in_memory {
            let len = usize::try_from(bytes).expect("small enough for memory");
            return Ok(Self::Memory(try_zeroed(len, || "a transposed tensor".to_owned())?));
        }
        let file = tempfile::tempfile_in(location::beside(beside)?).map_err(|e| Error::io(beside, e))?;
        Ok(Self::File { file, beside: beside.to_owned() })
    }

    /// Puts bytes at `offset`.
    pub fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        match self {
            Self::Memory(all) => {
                let at = usize::try_from(offset).expect("inside memory");
                all[at..at + bytes.len()].copy_from_slice(bytes);
                Ok(())
            }
            Self::File { file, beside } => write_all_at(file, offset, bytes).map_err(|e| Error::io(&*beside, e)),
        }
    }

    /// Gives the first `bytes` bytes to `sink`, in order.
    pub fn drain(self, bytes: u64, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        const STEP: u64 = 8 << 20;
        match self {
            Self::Memory(all) => sink(&all),
            Self::File { file, beside } => {
                let mut buffer = Vec::new();
                let mut at = 0;
                while at < bytes {
                    let n = STEP.min(bytes - at);
                    buffer.resize(usize::try_from(n).expect("a step is small"), 0);
                    read_exact_at(&file, at, &mut buffer).map_err(|e| Error::io(&beside, e))?;
                    sink(&buffer)?;
                    at += n;
                }
                Ok(())
            }
        }
    }
}
