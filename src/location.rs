//! What a path names: a place of this machine, or an object of a store, by a URL; and the few questions asked of either.
//!
//! URLs travel as paths: `join`, `parent` and `file_name` work on their text. Only this module tells one from the other, and
//! nothing else may ask the system about a path that a user gave for reading. `file://` is a longer name of a local path.

#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::objects::Url;

/// Schemes of object stores, and of the one that is this machine.
const SCHEMES: [&str; 8] = ["s3", "gs", "az", "abfs", "abfss", "http", "https", "file"];

/// What a path names.
pub(crate) enum Location<'a> {
    /// A path of this machine.
    Local(Cow<'a, Path>),
    /// An object, or the beginning of the names of several.
    Remote(Url),
}

/// What lies at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Anything that is no directory.
    File,
    /// A directory, or names that go on behind a slash.
    Directory,
}

/// Tells what a path names.
///
/// # Errors
/// [`Error::Invalid`] for a URL of an unknown scheme, one that holds secrets, or any where this build reads none.
pub(crate) fn of(path: &Path) -> Result<Location<'_>> {
    let Some((scheme, rest)) = split(path) else { return Ok(Location::Local(Cow::Borrowed(path))) };
    match SCHEMES.iter().find(|known| scheme.eq_ignore_ascii_case(known)) {
        Some(&"file") => Ok(Location::Local(Cow::Owned(local(rest)?))),
        Some(scheme) => Url::parse(scheme, rest).map(Location::Remote),
        None => Err(Error::invalid(format!(
            "URLs of {scheme}:// are not known, expected one of {}",
            SCHEMES.map(|scheme| format!("{scheme}://")).join(", ")
        ))),
    }
}

/// The same path, of this machine where it was a URL of it.
///
/// # Errors
/// Those of [`of`].
pub(crate) fn resolved(path: &Path) -> Result<Cow<'_, Path>> {
    Ok(match of(path)? {
        Location::Local(local) => local,
        Location::Remote(_) => Cow::Borrowed(path),
    })
}

/// The URL that a path is, where it is one of an object store.
///
/// # Errors
/// Those of [`of`].
pub(crate) fn url(path: &Path) -> Result<Option<Url>> {
    Ok(match of(path)? {
        Location::Local(_) => None,
        Location::Remote(url) => Some(url),
    })
}

/// Refuses a URL of an object store where `what` is done with files that change under way.
///
/// # Errors
/// [`Error::Invalid`] for one, and those of [`of`].
pub(crate) fn refuse_url(path: &Path, what: &str) -> Result<()> {
    match url(path)? {
        Some(url) => Err(Error::invalid(format!(
            "{url}: {what} needs files that change under way, and objects do not; choose a directory of this machine and \
             copy what comes out of it"
        ))),
        None => Ok(()),
    }
}

/// What lies at a path.
///
/// # Errors
/// [`Error::Io`], also when there is nothing; those of [`of`].
pub(crate) fn kind(path: &Path) -> Result<Kind> {
    match of(path)? {
        Location::Local(path) => {
            let found = std::fs::metadata(&path).map_err(|e| Error::io(&path, e))?;
            Ok(if found.is_dir() { Kind::Directory } else { Kind::File })
        }
        Location::Remote(url) => {
            url.kind()?.ok_or_else(|| Error::io(path, std::io::Error::new(ErrorKind::NotFound, "nothing is there")))
        }
    }
}

/// The same, where there is anything.
///
/// # Errors
/// Those of [`kind`] but for that.
pub(crate) fn found(path: &Path) -> Result<Option<Kind>> {
    match kind(path) {
        Ok(kind) => Ok(Some(kind)),
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// The names in a directory, in no order; `None` where a store cannot list them.
///
/// # Errors
/// [`Error::Io`]; those of [`of`].
pub(crate) fn names(dir: &Path) -> Result<Option<Vec<String>>> {
    let mut names = Vec::new();
    match of(dir)? {
        Location::Local(dir) => {
            for entry in std::fs::read_dir(&dir).map_err(|e| Error::io(&dir, e))? {
                names.extend(entry.map_err(|e| Error::io(&dir, e))?.file_name().into_string().ok());
            }
        }
        Location::Remote(url) => match url.list()? {
            Some(found) => names.extend(found.into_iter().map(|(name, _)| name)),
            None => return Ok(None),
        },
    }
    Ok(Some(names))
}

/// How many bytes each file of these names in a directory has; one that is not there has none.
///
/// # Errors
/// Those of [`names`].
pub(crate) fn lengths(dir: &Path, names: &[&str]) -> Result<Vec<u64>> {
    match of(dir)? {
        Location::Local(dir) => {
            Ok(names.iter().map(|name| std::fs::metadata(dir.join(name)).map_or(0, |found| found.len())).collect())
        }
        Location::Remote(url) => match url.list()? {
            Some(found) => {
                let found: HashMap<_, _> = found.into_iter().collect();
                Ok(names.iter().map(|name| found.get(*name).copied().unwrap_or(0)).collect())
            }
            None => names.iter().map(|name| Ok(url.child(name)?.bytes()?.unwrap_or(0))).collect(),
        },
    }
}

/// The text of a small file.
///
/// # Errors
/// [`Error::Io`], also when it is no text; those of [`of`].
#[cfg(feature = "cli")]
pub(crate) fn text(path: &Path) -> Result<String> {
    let bytes = match of(path)? {
        // A pipe too.
        Location::Local(path) => std::fs::read(&path).map_err(|e| Error::io(&path, e))?,
        Location::Remote(_) => {
            let file = crate::file::InputFile::open(path, crate::file::Access::Read)?;
            crate::limits::check("bytes of a text", crate::Limits::DEFAULT.header_bytes, file.len())?;
            file.read(0, usize::try_from(file.len()).expect("below the limit"))?.to_vec()
        }
    };
    String::from_utf8(bytes).map_err(|e| Error::io(path, std::io::Error::new(ErrorKind::InvalidData, e)))
}

/// Where files can lie that go to a path in the end: beside it, or in the system's directory for such where it is a URL.
///
/// # Errors
/// Those of [`of`].
pub(crate) fn beside(target: &Path) -> Result<PathBuf> {
    Ok(match of(target)? {
        Location::Local(target) => crate::output::directory(&target).to_owned(),
        Location::Remote(_) => std::env::temp_dir(),
    })
}

/// Scheme and the rest behind its colon of what looks like a URL. Of known ones with a single slash too, which is what is
/// left of two where paths are tidied up.
fn split(path: &Path) -> Option<(&str, &str)> {
    let (scheme, rest) = path.to_str()?.split_once(':')?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "+-.".contains(c);
    let is_scheme =
        scheme.len() > 1 && scheme.starts_with(|c: char| c.is_ascii_alphabetic()) && scheme.chars().all(plain);
    let is_url = rest.starts_with("//") || (rest.starts_with('/') && SCHEMES.contains(&scheme));
    (is_scheme && is_url).then_some((scheme, rest))
}

/// The path that stands behind `file:`.
fn local(rest: &str) -> Result<PathBuf> {
    let path = match rest.strip_prefix("//") {
        Some(rest) => rest.strip_prefix("localhost").unwrap_or(rest),
        None => rest,
    };
    let wrong = |what: &str| Error::invalid(format!("file:{} {what}, expected file:///PATH", rest.escape_debug()));
    if !path.starts_with('/') {
        return Err(wrong("names another machine"));
    }
    let path = decoded(path).ok_or_else(|| wrong("has a % without two digits of a character behind it"))?;
    #[cfg(windows)]
    let path = match path.as_bytes() {
        [b'/', letter, b':', ..] if letter.is_ascii_alphabetic() => path[1..].to_owned(),
        _ => path,
    };
    Ok(PathBuf::from(path))
}

/// Text with `%20` and its like as what they stand for; `None` where they stand for nothing.
pub(crate) fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, others @ ..] = rest {
        rest = others;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digits = std::str::from_utf8(rest.get(..2)?).ok()?;
        bytes.push(u8::from_str_radix(digits, 16).ok().filter(|_| !digits.starts_with('+'))?);
        rest = &rest[2..];
    }
    String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_url_is_the_local_path() {
        let cases = [
            ("file:///a/b%20c", "/a/b c"),
            ("file://localhost/a", "/a"),
            ("file:/a", "/a"),
            ("FILE:///a%25", "/a%"),
            ("/a/b", "/a/b"),
            ("a:b/c", "a:b/c"),
            ("d/a:/c", "d/a:/c"),
        ];
        for (given, expected) in cases {
            assert_eq!(*resolved(Path::new(given)).unwrap(), *Path::new(expected), "{given}");
        }
        for (given, what) in [("file://host/a", "another machine"), ("file:///%zz", "%"), ("file:///%00", "%")] {
            let message = resolved(Path::new(given)).unwrap_err().to_string();
            assert!(message.contains(what), "{given}: {message}");
        }
    }

    #[test]
    fn an_unknown_scheme_is_refused_with_those_that_are_known() {
        let message = kind(Path::new("ftp://user:secret@host/x")).unwrap_err().to_string();
        assert!(message.contains("ftp://") && message.contains("s3://") && !message.contains("secret"), "{message}");
    }

    #[cfg(not(feature = "objects"))]
    #[test]
    fn a_url_says_how_to_get_a_build_that_reads_it() {
        for url in ["s3://bucket/model", "gs://b/m", "az://c/m", "https://host/m", "s3:/bucket/model"] {
            let message =
                crate::source::open(url.as_ref(), &crate::source::Options::default()).unwrap_err().to_string();
            assert!(message.contains("--features objects"), "{url}: {message}");
        }
    }
}
