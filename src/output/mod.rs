//! A file that appears under its name whole or not at all.
//!
//! Bytes go to a nameless file in the target's directory (a hidden temporary one where the file system knows no
//! nameless ones); [`OutputFile::commit`] makes them durable and gives them the name in one step, replacing an older
//! file atomically. Whatever goes wrong before, and a signal or a crash too, leaves the target as it was. A target that is
//! a URL gets the bytes at the end, as an object that appears in one step.

mod tree;

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::location::{self, Location};
use crate::objects::Url;
pub use tree::OutputDirectory;
pub(crate) use tree::preflight;

/// A hidden folder beside `target`, gone with what it returns; that of a URL is in the system's directory for such.
///
/// # Errors
/// [`Error::Io`] when the directory above cannot be written.
pub(crate) fn folder_beside(target: &Path) -> Result<tempfile::TempDir> {
    let folder = tempfile::Builder::new().prefix(".tenpak-").suffix(".tmp").tempdir_in(location::beside(target)?);
    folder.map_err(|e| Error::io(target, e))
}

/// A file under way to its name.
#[derive(Debug)]
pub struct OutputFile {
    target: PathBuf,
    file: File,
    /// The name under which the file can be found, where it has one already.
    named: Option<tempfile::TempPath>,
    /// Where it goes, where that is a store.
    url: Option<Url>,
    force: bool,
}

impl OutputFile {
    /// Starts a file that will be called `target`; nothing is visible yet.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the target exists and `force` is not set, is not a regular file or is a symbolic link that
    /// points to nothing, or is a URL that is not written to; [`Error::Io`] when its directory cannot be written.
    pub fn create(target: &Path, force: bool) -> Result<Self> {
        let url = location::url(target)?;
        let target = Self::check(target, force)?;
        if url.is_some() {
            let spool = Self::nameless_in(&location::beside(&target)?)?;
            return Ok(Self { target, url, force, ..spool });
        }
        let dir = directory(&target);
        if let Some(file) = nameless(dir) {
            return Ok(Self { target, file, named: None, url: None, force });
        }
        let temp = tempfile::Builder::new()
            .prefix(".tenpak-")
            .suffix(".tmp")
            .tempfile_in(dir)
            .map_err(|e| Error::io(&target, e))?;
        let (file, path) = temp.into_parts();
        Ok(Self { target, file, named: Some(path), url: None, force })
    }

    /// Starts a file that will be called `target`, which passed [`OutputFile::check`], and until then is `path` in the same
    /// file system, open as `file`. It stays there when the work is given up.
    pub(crate) fn kept(target: PathBuf, force: bool, file: File, path: &Path) -> Result<Self> {
        let mut named = tempfile::TempPath::try_from_path(path).map_err(|e| Error::io(path, e))?;
        named.disable_cleanup(true);
        Ok(Self { target, file, named: Some(named), url: None, force })
    }

    /// Checks that a file can be called `target`, and says what that is behind a symbolic link.
    ///
    /// # Errors
    /// Those of [`OutputFile::create`] that concern the target.
    pub(crate) fn check(target: &Path, force: bool) -> Result<PathBuf> {
        let target = match location::of(target)? {
            Location::Local(target) => target,
            Location::Remote(url) => return url.check_file(force).map(|()| target.to_owned()),
        };
        let target = &*target;
        match std::fs::metadata(target) {
            Ok(found) if !found.is_file() => {
                return Err(Error::invalid(format!("output {} exists and is not a file", target.display())));
            }
            Ok(_) if !force => return Err(exists(target)),
            Ok(_) => {}
            // Left to the end of the run, this would be found only then.
            Err(_) if std::fs::symlink_metadata(target).is_ok_and(|found| found.is_symlink()) => {
                return Err(Error::invalid(format!(
                    "output {} is a symbolic link that points to nothing; remove it or choose another name",
                    target.display()
                )));
            }
            Err(_) => {}
        }
        // A symbolic link keeps pointing; what it points to is replaced.
        Ok(std::fs::canonicalize(target).unwrap_or_else(|_| target.to_owned()))
    }

    /// Starts a file in `dir` that never gets a name and is gone with its handle.
    ///
    /// # Errors
    /// [`Error::Io`] when the directory cannot be written.
    pub(crate) fn nameless_in(dir: &Path) -> Result<Self> {
        let file = nameless(dir).map_or_else(|| tempfile::tempfile_in(dir), Ok).map_err(|e| Error::io(dir, e))?;
        Ok(Self { target: dir.to_owned(), file, named: None, url: None, force: false })
    }

    /// The file itself, without a name.
    pub(crate) fn into_file(self) -> File {
        self.file
    }

    /// Where the file will be.
    #[must_use]
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Refuses to start when the file system has less than `bytes` to give.
    ///
    /// # Errors
    /// [`Error::Io`] with the figures.
    pub fn preflight(&self, bytes: u64) -> Result<()> {
        preflight(&self.target, bytes)
    }

    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        write_all_at(&self.file, offset, bytes).map_err(|e| Error::io(&self.target, e))
    }

    /// Reads back what was written at `offset`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        read_exact_at(&self.file, offset, out).map_err(|e| Error::io(&self.target, e))
    }

    /// Makes what was written so far durable.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|e| Error::io(&self.target, e))
    }

    /// The file as a stream, for writers that need one.
    pub fn stream(&self) -> &File {
        &self.file
    }

    /// Gives the file its final length, makes it durable, and gives it its name.
    ///
    /// # Errors
    /// [`Error::Io`] when the system refuses any step, [`Error::Invalid`] when someone else made the target meanwhile;
    /// the target is then as it was.
    pub fn commit(self, len: u64) -> Result<()> {
        let Self { target, file, named, url, force } = self;
        let io = |e| Error::io(&target, e);
        file.set_len(len).map_err(io)?;
        if let Some(url) = url {
            return url.put(&file, len, force);
        }
        set_mode(&file, &target).map_err(io)?;
        file.sync_all().map_err(io)?;
        match named {
            Some(temp) if force => temp.persist(&target).map_err(|e| io(e.error))?,
            Some(temp) => temp.persist_noclobber(&target).map_err(|e| taken(&target, e.error))?,
            None => link(&file, &target, force)?,
        }
        #[cfg(unix)]
        File::open(directory(&target)).and_then(|dir| dir.sync_all()).map_err(io)?;
        Ok(())
    }
}

/// The error of an output that exists.
pub(crate) fn exists(target: &Path) -> Error {
    Error::invalid(format!("output {} exists; choose another name or pass --force", target.display()))
}

fn taken(target: &Path, e: io::Error) -> Error {
    if e.kind() == io::ErrorKind::AlreadyExists { exists(target) } else { Error::io(target, e) }
}

/// The directory of a file.
pub(crate) fn directory(target: &Path) -> &Path {
    target.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Refuses an output that is one of the inputs, under whatever name.
///
/// # Errors
/// [`Error::Invalid`] naming both.
pub fn refuse_input<'a>(target: &Path, inputs: impl IntoIterator<Item = &'a crate::file::InputFile>) -> Result<()> {
    for input in inputs {
        if input.lies_at(target)? {
            return Err(Error::invalid(format!(
                "output {} is the input {}; writing it would destroy it, choose another name",
                target.display(),
                input.path().display()
            )));
        }
    }
    Ok(())
}

#[cfg(unix)]
pub(crate) fn write_all_at(file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(unix)]
pub(crate) fn read_exact_at(file: &File, offset: u64, out: &mut [u8]) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, offset)
}

#[cfg(not(unix))]
pub(crate) fn read_exact_at(mut file: &File, offset: u64, out: &mut [u8]) -> io::Result<()> {
    use std::io::{Read, Seek, SeekFrom};
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(out)
}

#[cfg(not(unix))]
pub(crate) fn write_all_at(mut file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    use std::io::{Seek, SeekFrom, Write};
    file.seek(SeekFrom::Start(offset))?;
    file.write_all(bytes)
}

/// A file without a name in `dir`, where the system has such; it vanishes with its handle.
#[cfg(target_os = "linux")]
fn nameless(dir: &Path) -> Option<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = rustix::fs::OFlags::TMPFILE.bits().cast_signed();
    OpenOptions::new().read(true).write(true).mode(0o666).custom_flags(flags).open(dir).ok()
}

#[cfg(not(target_os = "linux"))]
fn nameless(_: &Path) -> Option<File> {
    None
}

/// Gives a nameless file its name; over an existing one by way of a temporary name, since a link never replaces.
#[cfg(target_os = "linux")]
fn link(file: &File, target: &Path, force: bool) -> Result<()> {
    use std::os::fd::AsRawFd;

    use rustix::fs::{AtFlags, CWD, linkat};

    let this = format!("/proc/self/fd/{}", file.as_raw_fd());
    let link_to = |name: &Path| linkat(CWD, &this, CWD, name, AtFlags::SYMLINK_FOLLOW).map_err(io::Error::from);
    match link_to(target) {
        Err(e) if force && e.kind() == io::ErrorKind::AlreadyExists => {
            let temp = tempfile::Builder::new()
                .prefix(".tenpak-")
                .suffix(".tmp")
                .make_in(directory(target), link_to)
                .map_err(|e| Error::io(target, e))?;
            temp.into_temp_path().persist(target).map_err(|e| Error::io(target, e.error))
        }
        other => other.map_err(|e| taken(target, e)),
    }
}

#[cfg(not(target_os = "linux"))]
fn link(_: &File, target: &Path, _: bool) -> Result<()> {
    Err(Error::unsupported(format!("{}: this system has no nameless files", target.display())))
}

/// The permissions of the file that is replaced; those of a new one come from the umask.
#[cfg(unix)]
fn set_mode(file: &File, target: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    match std::fs::metadata(target) {
        Ok(old) => file.set_permissions(old.permissions()),
        // A named temporary file is private; a nameless one already has the umask applied.
        Err(_) if file.metadata()?.permissions().mode() & 0o777 == 0o600 => {
            file.set_permissions(std::fs::Permissions::from_mode(0o666 & !umask()))
        }
        Err(_) => Ok(()),
    }
}

/// The permissions that new files do not get.
#[cfg(unix)]
fn umask() -> u32 {
    let umask = rustix::process::umask(rustix::fs::Mode::empty());
    rustix::process::umask(umask);
    umask.bits()
}

#[cfg(not(unix))]
fn set_mode(_: &File, _: &Path) -> io::Result<()> {
    Ok(())
}

#[cfg(unix)]
fn free_bytes(dir: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(dir).ok()?;
    stat.f_bavail.checked_mul(stat.f_frsize)
}

#[cfg(not(unix))]
fn free_bytes(_: &Path) -> Option<u64> {
    None
}
