//! A file's bytes by range: by reading into memory of our own, or, where the caller asks for it, through windows of mapped
//! memory; and an object's, where the path is a URL, by asking its store for them.
//!
//! Either way a range goes away with the [`Block`] that holds it, so neither the address space nor the resident memory of
//! a process grows with the file. Ranges are checked against the length at opening. A file that another process cuts
//! short gives an error when it is read; mapped, it ends the process when a page beyond the end is touched, although the
//! length is looked at again before each window. That is why reading is the default.

#![expect(unsafe_code, reason = "mapping a file is unsafe: another process may change it")]

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use crate::error::{Error, Result};
use crate::location::{self, Location};
use crate::objects::Object;

/// How the bytes of a file are reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Access {
    /// Reads into memory of our own: one copy, safe against everything.
    #[default]
    Read,
    /// Windows of mapped memory: no copy, but whoever cuts the file short meanwhile ends the process, and whoever writes
    /// into it changes what was checked.
    Map,
}

/// A regular file or an object, open for reading by range.
#[derive(Debug)]
pub struct InputFile {
    path: PathBuf,
    bytes: Bytes,
    len: u64,
    access: Access,
    digest: Mutex<Digest>,
}

/// What bytes are asked of.
#[derive(Debug)]
enum Bytes {
    File(File),
    Object(Box<Object>),
}

/// The digest of what was seen of a file so far, from its start.
#[derive(Debug, Default)]
struct Digest {
    hasher: blake3::Hasher,
    until: u64,
}

/// A range of a file, in memory.
#[derive(Debug)]
pub enum Block {
    /// A window of the file.
    Map(memmap2::Mmap),
    /// A copy.
    Owned(Vec<u8>),
}

impl Deref for Block {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Map(map) => map,
            Self::Owned(bytes) => bytes,
        }
    }
}

impl InputFile {
    /// Opens a regular file, or an object where the path is a URL.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be opened, [`Error::Invalid`] when it is not a regular file, or an object is to be mapped.
    pub fn open(path: impl AsRef<Path>, access: Access) -> Result<Self> {
        let path = match location::of(path.as_ref())? {
            Location::Local(path) => path,
            Location::Remote(url) if access == Access::Map => {
                return Err(Error::invalid(format!(
                    "{url} is not on this machine and cannot be mapped; leave --mmap out"
                )));
            }
            Location::Remote(url) => {
                let (path, object) = (path.as_ref().to_owned(), url.open()?);
                let len = object.len();
                return Ok(Self {
                    path,
                    bytes: Bytes::Object(Box::new(object)),
                    len,
                    access,
                    digest: Mutex::default(),
                });
            }
        };
        let path = &*path;
        // Opening a pipe would block before its kind could be seen.
        let kind = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
        if !kind.is_file() {
            return Err(Error::invalid(format!("{} is not a regular file", path.display())));
        }
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        Self::from_file(path, file, access)
    }

    /// Takes a file that is already open, `path` serving messages only.
    pub(crate) fn from_file(path: &Path, file: File, access: Access) -> Result<Self> {
        let len = file.metadata().map_err(|e| Error::io(path, e))?.len();
        Ok(Self { path: path.to_owned(), bytes: Bytes::File(file), len, access, digest: Mutex::default() })
    }

    /// Where the file is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of the file when it was opened.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the file had no bytes when it was opened.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// When the file was last written, where the system knows; of an object nobody asks.
    ///
    /// # Errors
    /// [`Error::Io`] when the system refuses.
    pub fn modified(&self) -> Result<Option<std::time::SystemTime>> {
        match &self.bytes {
            Bytes::File(file) => Ok(file.metadata().map_err(|e| Error::io(&self.path, e))?.modified().ok()),
            Bytes::Object(_) => Ok(None),
        }
    }

    /// Whether this is what lies at a path, under whatever name.
    ///
    /// # Errors
    /// [`Error::Io`] when the system refuses; [`Error::Invalid`] for a URL that cannot be read.
    pub fn lies_at(&self, path: &Path) -> Result<bool> {
        match (location::of(path)?, &self.bytes) {
            (Location::Local(path), Bytes::File(file)) => {
                let Ok(found) = std::fs::metadata(&path) else { return Ok(false) };
                let own = file.metadata().map_err(|e| Error::io(&self.path, e))?;
                Ok(same_file(&found, &own, &path, &self.path))
            }
            (Location::Remote(url), Bytes::Object(object)) => Ok(url == *object.url()),
            _ => Ok(false),
        }
    }

    /// The bytes from `offset` on.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when the range leaves the file, [`Error::Io`] when it shrank or cannot be read,
    /// [`Error::OutOfMemory`] when there is no room for a copy.
    pub fn read(&self, offset: u64, len: usize) -> Result<Block> {
        self.check(offset, len)?;
        let file = match &self.bytes {
            Bytes::File(file) if self.access == Access::Map && len > 0 => file,
            Bytes::File(file) => return self.copy(file, offset, len).map(Block::Owned),
            Bytes::Object(object) => {
                let mut bytes = crate::error::try_zeroed(len, || format!("a part of {}", self.path.display()))?;
                object.read_into(offset, &mut bytes)?;
                return Ok(Block::Owned(bytes));
            }
        };
        if file.metadata().map_err(|e| Error::io(&self.path, e))?.len() < offset + len as u64 {
            return Err(self.shrank());
        }
        // SAFETY: the window lies inside the file as of the line above. A writer that changes the bytes meanwhile
        // changes what is read, never memory of ours: they are only ever read as plain numbers.
        let map = unsafe { memmap2::MmapOptions::new().offset(offset).len(len).map(file) };
        Ok(Block::Map(map.map_err(|e| Error::io(&self.path, e))?))
    }

    /// How its bytes are reached.
    #[must_use]
    pub fn access(&self) -> Access {
        self.access
    }

    /// Copies the bytes from `offset` on into `out`.
    ///
    /// # Errors
    /// Those of [`InputFile::read`].
    pub fn read_into(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        self.check(offset, out.len())?;
        match &self.bytes {
            Bytes::File(file) => self.read_at(file, offset, out),
            Bytes::Object(object) => object.read_into(offset, out),
        }
    }

    fn check(&self, offset: u64, len: usize) -> Result<()> {
        if offset.checked_add(len as u64).is_none_or(|end| end > self.len) {
            return Err(Error::corrupt(
                offset,
                format!("{len} bytes are wanted here, but the file has {} in all", self.len),
            )
            .in_file(&self.path));
        }
        Ok(())
    }

    /// The bytes of a range that lies in the file as it was opened, in memory that only the system has written.
    #[cfg(unix)]
    fn copy(&self, file: &File, offset: u64, len: usize) -> Result<Vec<u8>> {
        use rustix::buffer::spare_capacity;

        let mut bytes = Vec::new();
        if bytes.try_reserve_exact(len).is_err() {
            let what = format!("a part of {}", self.path.display());
            return Err(Error::OutOfMemory { what, bytes: len as u64 });
        }
        while bytes.len() < len {
            let at = offset + bytes.len() as u64;
            match rustix::io::pread(file, spare_capacity(&mut bytes), at) {
                Ok(0) => return Err(self.shrank()),
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(Error::io(&self.path, e.into())),
            }
        }
        // An allocator may have given more room than was asked for.
        bytes.truncate(len);
        Ok(bytes)
    }

    #[cfg(not(unix))]
    fn copy(&self, file: &File, offset: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = crate::error::try_zeroed(len, || format!("a part of {}", self.path.display()))?;
        self.read_at(file, offset, &mut bytes)?;
        Ok(bytes)
    }

    #[cfg(unix)]
    fn read_at(&self, file: &File, offset: u64, out: &mut [u8]) -> Result<()> {
        use std::os::unix::fs::FileExt;
        file.read_exact_at(out, offset).map_err(|e| self.read_error(e))
    }

    #[cfg(windows)]
    fn read_at(&self, file: &File, mut offset: u64, mut out: &mut [u8]) -> Result<()> {
        use std::os::windows::fs::FileExt;
        while !out.is_empty() {
            let n = file.seek_read(out, offset).map_err(|e| self.read_error(e))?;
            if n == 0 {
                return Err(self.shrank());
            }
            out = &mut out[n..];
            offset += n as u64;
        }
        Ok(())
    }

    fn read_error(&self, e: io::Error) -> Error {
        if e.kind() == io::ErrorKind::UnexpectedEof { self.shrank() } else { Error::io(&self.path, e) }
    }

    fn shrank(&self) -> Error {
        Error::io(&self.path, io::Error::other("the file became shorter while it was read"))
    }

    /// Notes bytes that were read, so that [`InputFile::digest`] need not read them again when they come in order.
    pub(crate) fn observe(&self, offset: u64, bytes: &[u8]) {
        let mut digest = self.digest.lock().expect("no holder of the lock panics");
        if digest.until == offset {
            digest.hasher.update_rayon(bytes);
            digest.until += bytes.len() as u64;
        }
    }

    /// BLAKE3 of the whole file; reads what was not observed in order.
    ///
    /// # Errors
    /// Those of [`InputFile::read`].
    pub(crate) fn digest(&self) -> Result<blake3::Hash> {
        const STEP: u64 = 8 << 20;
        loop {
            let until = self.digest.lock().expect("no holder of the lock panics").until;
            if until >= self.len {
                break;
            }
            let len = usize::try_from(STEP.min(self.len - until)).expect("a step is small");
            self.observe(until, &self.read(until, len)?);
        }
        Ok(self.digest.lock().expect("no holder of the lock panics").hasher.finalize())
    }

    /// The file as a stream from its start, for containers that must be read in order.
    pub(crate) fn stream(&self) -> Result<Stream<'_>> {
        match &self.bytes {
            Bytes::File(file) => {
                let mut stream = file;
                stream.seek(SeekFrom::Start(0)).map_err(|e| Error::io(&self.path, e))?;
                Ok(Stream::File(stream))
            }
            Bytes::Object(_) => Ok(Stream::Object { file: self, at: 0, window: Vec::new(), start: 0 }),
        }
    }
}

#[cfg(unix)]
fn same_file(a: &std::fs::Metadata, b: &std::fs::Metadata, _: &Path, _: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

#[cfg(not(unix))]
fn same_file(_: &std::fs::Metadata, _: &std::fs::Metadata, a: &Path, b: &Path) -> bool {
    match (std::fs::canonicalize(a), std::fs::canonicalize(b)) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}

/// A file or object as a stream.
#[derive(Debug)]
pub(crate) enum Stream<'a> {
    /// The file itself.
    File(&'a File),
    /// Windows of an object.
    Object { file: &'a InputFile, at: u64, window: Vec<u8>, start: u64 },
}

impl Read for Stream<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        const WINDOW: u64 = 1 << 20;
        let (file, at, window, start) = match self {
            Self::File(file) => return file.read(out),
            Self::Object { file, at, window, start } => (file, at, window, start),
        };
        if *at >= file.len {
            return Ok(0);
        }
        if !(*start..*start + window.len() as u64).contains(at) {
            *start = *at / WINDOW * WINDOW;
            let len = usize::try_from(WINDOW.min(file.len - *start)).expect("a window is small");
            window.clear();
            window.extend_from_slice(&file.read(*start, len).map_err(io::Error::other)?);
        }
        let rest = &window[usize::try_from(*at - *start).expect("inside the window")..];
        let n = rest.len().min(out.len());
        out[..n].copy_from_slice(&rest[..n]);
        *at += n as u64;
        Ok(n)
    }
}

impl Seek for Stream<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let (file, at) = match self {
            Self::File(file) => return file.seek(to),
            Self::Object { file, at, .. } => (file, at),
        };
        let place = match to {
            SeekFrom::Start(place) => Some(place),
            SeekFrom::End(by) => file.len.checked_add_signed(by),
            SeekFrom::Current(by) => at.checked_add_signed(by),
        };
        *at = place.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(*at)
    }
}
