//! The error of every fallible function, grouped by who can put it right.
//!
//! Messages are one lower-case sentence without a full stop: what, where, found, expected, remedy. A parser knows
//! the byte, not the file; whoever opened the file adds its path with [`Error::in_file`].

use std::io;
use std::path::{Path, PathBuf};

/// The result of every fallible function in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The error of every fallible function in this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The caller asked for something impossible: fix the call.
    #[error("{0}")]
    Invalid(String),
    /// The file contradicts itself: fetch or write it again.
    #[error("corrupt file at byte {at}: {what}")]
    Corrupt {
        /// Where in the file the contradiction was seen.
        at: u64,
        /// What was found and what was expected.
        what: String,
    },
    /// The file is sound but newer than, or foreign to, this build: upgrade or convert.
    #[error("{0}")]
    Unsupported(String),
    /// A number in the file exceeds a cap of [`Limits`](crate::Limits): raise the cap if the file is trusted.
    #[error("limit exceeded: {what} is {got}, at most {limit} allowed")]
    Limit {
        /// The quantity.
        what: &'static str,
        /// The cap.
        limit: u64,
        /// What the file asks for.
        got: u64,
    },
    /// A weight is NaN or infinite.
    #[error(
        "tensor '{tensor}' has {count} non-finite weights, the first at index {index}; \
         repair them, or choose the policy zero, clamp or raw (--nonfinite, nonfinite=)"
    )]
    Nonfinite {
        /// Name of the tensor.
        tensor: String,
        /// Flat index of the first one, in stored order.
        index: u64,
        /// How many there are.
        count: u64,
    },
    /// Memory for a size that was read from a file was refused.
    #[error("out of memory: {bytes} bytes for {what}")]
    OutOfMemory {
        /// What the memory was for.
        what: String,
        /// How much was asked for.
        bytes: u64,
    },
    /// A graphics device cannot do what was asked of it.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The work was stopped from outside (Ctrl-C, SIGTERM, a callback) and left nothing behind.
    #[error("interrupted; nothing was written")]
    Interrupted,
    /// The operating system refused.
    #[error("{path}: {source}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Any of the above, in a file whose path is now known.
    #[error("{path}: {source}")]
    InFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<Error>,
    },
}

/// What is wrong with a graphics device; memory that it refuses is [`Error::OutOfMemory`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// There is no such device: install a driver or choose another one.
    #[error("{0}")]
    NotFound(String),
    /// It stopped working, in the middle of a call or before: call again, which opens it anew.
    #[error("device '{device}' was lost: {what}; the next call opens it anew")]
    Lost {
        /// The name of the device.
        device: String,
        /// What the driver said.
        what: String,
    },
    /// Its driver refused a call that is sound: a bug of the driver or of tenpak.
    #[error("device '{device}' failed: {what}; update its driver, and report this if it stays")]
    Failed {
        /// The name of the device.
        device: String,
        /// What the driver said.
        what: String,
    },
}

impl Error {
    /// A call that cannot be served.
    pub fn invalid(what: impl Into<String>) -> Self {
        Self::Invalid(what.into())
    }

    /// A file that contradicts itself at byte `at`.
    pub fn corrupt(at: u64, what: impl Into<String>) -> Self {
        Self::Corrupt { at, what: what.into() }
    }

    /// A file or request this build does not know.
    pub fn unsupported(what: impl Into<String>) -> Self {
        Self::Unsupported(what.into())
    }

    /// What the operating system said about `path`.
    pub fn io(path: impl AsRef<Path>, source: io::Error) -> Self {
        Self::Io { path: path.as_ref().to_owned(), source }
    }

    /// The same error, saying which file it is about; errors that already name a path stay as they are.
    #[must_use]
    pub fn in_file(self, path: impl AsRef<Path>) -> Self {
        match self {
            Self::Corrupt { .. } | Self::Unsupported(_) | Self::Limit { .. } | Self::Invalid(_) => {
                Self::InFile { path: path.as_ref().to_owned(), source: Box::new(self) }
            }
            other => other,
        }
    }

    /// The same error, its text cut to a length and without the control characters of a file that it quotes, which a
    /// terminal would obey.
    #[must_use]
    pub(crate) fn printable(self) -> Self {
        const MOST: usize = 1000;
        let plain = |text: String| {
            if text.len() <= MOST && !text.contains(char::is_control) {
                return text;
            }
            let cut = text.char_indices().nth(MOST).map_or(text.len(), |(at, _)| at);
            let escape = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
            let more = if cut < text.len() { "…" } else { "" };
            text[..cut].chars().map(escape).collect::<String>() + more
        };
        match self {
            Self::Invalid(what) => Self::Invalid(plain(what)),
            Self::Corrupt { at, what } => Self::Corrupt { at, what: plain(what) },
            Self::Unsupported(what) => Self::Unsupported(plain(what)),
            other => other,
        }
    }

    /// The error without the path that [`Error::in_file`] put around it.
    #[must_use]
    pub fn root(&self) -> &Self {
        match self {
            Self::InFile { source, .. } => source.root(),
            other => other,
        }
    }
}

/// A zeroed buffer whose size came from a file, or [`Error::OutOfMemory`].
pub(crate) fn try_zeroed(bytes: usize, what: impl FnOnce() -> String) -> Result<Vec<u8>> {
    let mut buffer = Vec::new();
    if buffer.try_reserve_exact(bytes).is_err() {
        return Err(Error::OutOfMemory { what: what(), bytes: bytes as u64 });
    }
    buffer.resize(bytes, 0);
    Ok(buffer)
}
