//! A directory that appears under its name whole or not at all.
//!
//! Its files are written into a hidden directory beside the target; [`OutputDirectory::commit`] makes them durable and
//! renames it, exchanging it with an older directory in one step where the system can. Whatever goes wrong before leaves
//! the target as it was and nothing beside it. A target that is a URL gets its files at the end, one after another, those
//! last by which programs find a model.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::{directory, exists, free_bytes, taken};
use crate::error::{Error, Result};
use crate::file::InputFile;
use crate::location::{self, Location};
use crate::objects::Url;

/// A directory under way to its name.
#[derive(Debug)]
pub struct OutputDirectory {
    target: PathBuf,
    temp: tempfile::TempDir,
    /// Where it goes, where that is a store.
    url: Option<Url>,
    replaces: bool,
}

impl OutputDirectory {
    /// Checks that a directory can be called `target`, before any work.
    ///
    /// `force` replaces an empty directory, or one that has a file called `mark` and so is of the same kind: nobody
    /// loses a home directory to a slip of the pen.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the target exists and may not be replaced, is no directory, holds one of `inputs`, or is a
    /// symbolic link that points to nothing; [`Error::Io`].
    pub fn check<'a>(
        target: &Path,
        force: bool,
        mark: &str,
        inputs: impl IntoIterator<Item = &'a InputFile>,
    ) -> Result<()> {
        let inputs: Vec<_> = inputs.into_iter().collect();
        super::refuse_input(target, inputs.iter().copied())?;
        let target = match location::of(target)? {
            Location::Local(target) => target,
            Location::Remote(url) => return url.check_directory(),
        };
        let target = &*target;
        match std::fs::metadata(target) {
            Ok(found) if !found.is_dir() => {
                return Err(Error::invalid(format!(
                    "output {} exists and is not a directory; choose another name, which ends in .tenpak for one file",
                    target.display()
                )));
            }
            Ok(_) if !force => return Err(exists(target)),
            Ok(_) => {}
            Err(_) if std::fs::symlink_metadata(target).is_ok_and(|found| found.is_symlink()) => {
                return Err(Error::invalid(format!(
                    "output {} is a symbolic link that points to nothing; remove it or choose another name",
                    target.display()
                )));
            }
            Err(_) => return Ok(()),
        }
        let home = std::fs::canonicalize(target).map_err(|e| Error::io(target, e))?;
        for input in inputs {
            let lies = |path: &Path| path.canonicalize().is_ok_and(|path| path.starts_with(&home));
            if lies(input.path()) || input.path().parent().is_some_and(lies) {
                return Err(Error::invalid(format!(
                    "output {} holds the input {}; writing it would destroy it, choose another name",
                    target.display(),
                    input.path().display()
                )));
            }
        }
        let mut entries = std::fs::read_dir(target).map_err(|e| Error::io(target, e))?;
        if entries.next().is_some() && !target.join(mark).is_file() {
            return Err(Error::invalid(format!(
                "output {} has files but no {mark}, so --force does not replace it; remove it or choose another name",
                target.display()
            )));
        }
        Ok(())
    }

    /// Starts a directory that will be called `target` and passed [`OutputDirectory::check`].
    ///
    /// # Errors
    /// [`Error::Io`] when the directory above it cannot be written.
    pub fn create(target: &Path) -> Result<Self> {
        let local = match location::of(target)? {
            Location::Local(local) => local,
            Location::Remote(url) => {
                let (target, temp) = (target.to_owned(), super::folder_beside(target)?);
                return Ok(Self { target, temp, url: Some(url), replaces: false });
            }
        };
        // A symbolic link keeps pointing; what it points to is replaced.
        let target = std::fs::canonicalize(&local).unwrap_or_else(|_| local.into_owned());
        let temp = super::folder_beside(&target)?;
        let replaces = target.is_dir();
        Ok(Self { target, temp, url: None, replaces })
    }

    /// Where the directory will be.
    #[must_use]
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Where its files are until then.
    pub(crate) fn path(&self) -> &Path {
        self.temp.path()
    }

    /// A new file in it.
    ///
    /// # Errors
    /// [`Error::Io`], also when there is one of this name.
    pub fn file(&self, name: &str) -> Result<File> {
        let path = self.temp.path().join(name);
        OpenOptions::new().write(true).create_new(true).open(path).map_err(|e| Error::io(self.target.join(name), e))
    }

    /// A new file in it, of these bytes.
    ///
    /// # Errors
    /// Those of [`OutputDirectory::file`].
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        self.file(name)?.write_all(bytes).map_err(|e| Error::io(self.target.join(name), e))
    }

    /// Takes a file of the same file system into it by a second name, of another one by a copy.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn link(&self, name: &str, from: &Path) -> Result<()> {
        let path = self.temp.path().join(name);
        if std::fs::hard_link(from, &path).is_err() {
            std::fs::copy(from, &path).map_err(|e| Error::io(self.target.join(name), e))?;
        }
        Ok(())
    }

    /// Writes over the beginning of a file in it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn rewrite(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let file = OpenOptions::new().write(true).open(self.temp.path().join(name));
        file.and_then(|file| super::write_all_at(&file, 0, bytes)).map_err(|e| Error::io(self.target.join(name), e))
    }

    /// Makes everything durable and gives the directory its name.
    ///
    /// # Errors
    /// [`Error::Io`] when the system refuses any step, [`Error::Invalid`] when someone else made the target meanwhile;
    /// the target is then as it was.
    pub fn commit(self) -> Result<()> {
        if let Some(url) = &self.url {
            return url.put_directory(self.temp.path());
        }
        let io = |e| Error::io(&self.target, e);
        for entry in std::fs::read_dir(self.temp.path()).map_err(io)? {
            File::open(entry.map_err(io)?.path()).and_then(|file| file.sync_all()).map_err(io)?;
        }
        set_mode(self.temp.path(), &self.target).map_err(io)?;
        #[cfg(unix)]
        File::open(self.temp.path()).and_then(|dir| dir.sync_all()).map_err(io)?;
        if self.replaces {
            replace(self.temp.path(), &self.target).map_err(io)?;
        } else {
            rename_new(self.temp.path(), &self.target).map_err(|e| taken(&self.target, e))?;
        }
        #[cfg(unix)]
        File::open(directory(&self.target)).and_then(|dir| dir.sync_all()).map_err(io)?;
        // What is left under the temporary name, if anything, is the older directory.
        Ok(())
    }
}

/// Refuses to start when the file system of `target` has less than `bytes` to give.
///
/// # Errors
/// [`Error::Io`] with the figures.
pub(crate) fn preflight(target: &Path, bytes: u64) -> Result<()> {
    match free_bytes(&location::beside(target)?) {
        Some(free) if free < bytes => Err(Error::io(
            target,
            io::Error::new(
                io::ErrorKind::StorageFull,
                format!("{bytes} bytes are needed, {free} are free; make room or choose another directory"),
            ),
        )),
        _ => Ok(()),
    }
}

/// Gives a directory a name that nothing has.
fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            // A file system that does not know the flag.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {}
            other => return other.map_err(io::Error::from),
        }
    }
    if to.exists() {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    std::fs::rename(from, to)
}

/// Puts a directory in the place of another, which ends up under the first one's name.
fn replace(from: &Path, to: &Path) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        match renameat_with(CWD, from, CWD, to, RenameFlags::EXCHANGE) {
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {}
            other => return other.map_err(io::Error::from),
        }
    }
    let aside = from.with_extension("old");
    std::fs::rename(to, &aside)?;
    if let Err(e) = std::fs::rename(from, to) {
        std::fs::rename(&aside, to)?;
        return Err(e);
    }
    std::fs::rename(aside, from)
}

/// The permissions of the directory that is replaced; those of a new one come from the umask.
#[cfg(unix)]
fn set_mode(temp: &Path, target: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let permissions = match std::fs::metadata(target) {
        Ok(old) => old.permissions(),
        Err(_) => std::fs::Permissions::from_mode(0o777 & !super::umask()),
    };
    std::fs::set_permissions(temp, permissions)
}

#[cfg(not(unix))]
fn set_mode(_: &Path, _: &Path) -> io::Result<()> {
    Ok(())
}
