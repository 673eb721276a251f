//! Compiled kernels on disk: what can be made again, so that a missing or a damaged file costs no more than time.
//!
//! A file holds the digest of the data and the data, and appears whole or not at all.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Bytes of the digest at the beginning of a file.
pub(super) const DIGEST: usize = 32;

/// Digest and data of a file that is sound.
pub(super) fn read(path: &Path) -> Option<([u8; DIGEST], Vec<u8>)> {
    let mut bytes = fs::read(path).ok()?;
    let digest = *bytes.first_chunk::<DIGEST>()?;
    bytes.drain(..DIGEST);
    (*blake3::hash(&bytes).as_bytes() == digest).then_some((digest, bytes))
}

/// Writes data with their digest.
pub(super) fn write(path: &Path, digest: &[u8], data: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(digest)?;
    file.write_all(data)?;
    file.persist(path)?;
    Ok(())
}

/// The user's folder for what can be made again, by the customs of the system; nothing where the user has no home.
pub(super) fn usual_folder() -> Option<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).filter(|value| value != OsStr::new("")).map(PathBuf::from);
    let caches = if cfg!(windows) {
        folder("LOCALAPPDATA")
    } else if cfg!(target_os = "macos") {
        folder("HOME").map(|home| home.join("Library/Caches"))
    } else {
        folder("XDG_CACHE_HOME").or_else(|| folder("HOME").map(|home| home.join(".cache")))
    };
    caches.map(|caches| caches.join("tenpak"))
}
