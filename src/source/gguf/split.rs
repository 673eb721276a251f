//! A model in several files, as llama-gguf-split cuts it: `NAME-00001-of-00003.gguf` and so on. The first has the keys of
//! the model, each has its own tensors and says which part of how many it is.

use std::path::{Path, PathBuf};

use super::header::Header;
use super::keys::Keys;
use crate::error::{Error, Result};
use crate::file::InputFile;
use crate::source::Options;

/// A file and its header.
pub(super) struct Part {
    pub file: InputFile,
    pub header: Header,
}

impl Part {
    fn open(path: &Path, options: &Options) -> Result<Self> {
        let file = InputFile::open(path, options.access)?;
        let header = Header::read(&file, &options.limits).map_err(|e| e.in_file(path))?;
        Ok(Self { file, header })
    }

    /// How many parts the model has.
    fn count(&self) -> u64 {
        Keys::new(&self.header.keys).number("split.count").unwrap_or(1).max(1)
    }
}

/// All parts of the model that the file at `path` belongs to, in order: often only that.
///
/// # Errors
/// [`Error::Invalid`] when the name does not say where the others are, or one of them is not that part; [`Error::Io`] when
/// one is missing, and whatever is wrong with one.
pub(super) fn open(path: &Path, options: &Options) -> Result<Vec<Part>> {
    let given = Part::open(path, options)?;
    let count = given.count();
    if count == 1 {
        return Ok(vec![given]);
    }
    let total = Keys::new(&given.header.keys).number("split.tensors.count");
    let (dir, stem) = stem(path, count).ok_or_else(|| {
        Error::invalid(format!(
            "the file is one of {count} parts of a model, expected a name that ends in -00001-of-{count:05}.gguf, so that the \
             others are found: rename it, or put the parts together with llama-gguf-split --merge"
        ))
        .in_file(path)
    })?;
    // Names have five digits, so there are not more than those of them that exist.
    let mut parts = Vec::new();
    for number in 1..=count {
        let path = dir.join(format!("{stem}-{number:05}-of-{count:05}.gguf"));
        let part = Part::open(&path, options)?;
        let keys = Keys::new(&part.header.keys);
        let (no, of) = (keys.number("split.no"), part.count());
        if no != Some(number - 1) || of != count || keys.number("split.tensors.count") != total {
            let no = no.map_or("no part".to_owned(), |no| format!("part {} of {of}", no.saturating_add(1)));
            let what =
                format!("the file is {no} of a model, expected part {number} of {count} of the same; fetch it again");
            return Err(Error::invalid(what).in_file(path));
        }
        parts.push(part);
    }
    let found: u64 = parts.iter().map(|part| part.header.tensors.len() as u64).sum();
    if let Some(total) = total.filter(|&total| total != found) {
        let what = format!("the {count} parts of the model have {found} tensors, expected {total}; fetch them again");
        return Err(Error::invalid(what).in_file(path));
    }
    Ok(parts)
}

/// Where the parts lie, and what their names begin with.
fn stem(path: &Path, count: u64) -> Option<(PathBuf, String)> {
    let stem = path.file_name()?.to_str()?.strip_suffix(&format!("-of-{count:05}.gguf"))?;
    let (stem, number) = stem.rsplit_once('-')?;
    let digits = number.len() == 5 && number.bytes().all(|digit| digit.is_ascii_digit());
    digits.then(|| (path.parent().unwrap_or(Path::new("")).to_owned(), stem.to_owned()))
}
