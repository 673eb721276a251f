//! Side files: what stands beside the weights of a Hugging Face model and is needed to use them.
//!
//! Settings and tokenizers, by an explicit list. Never a program (`*.py`), which would run where the model is loaded,
//! and never weights.

use std::io::Write as _;
use std::path::Path;

use super::directory::member;
use super::{Options, SourceFile};
use crate::artifact::config;
use crate::error::{Error, Result};
use crate::file::{Access, InputFile};
use crate::location;

/// Whole names.
const NAMES: &[&str] = &[
    "added_tokens.json",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
];

/// Further names that are asked for where a server lists nothing.
const ASKED: &[&str] = &["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"];

/// Beginnings and ends of names.
const PARTS: &[(&str, &str)] = &[
    ("chat_template.", "jinja"),
    ("chat_template.", "json"),
    ("chat_template.", "txt"),
    ("tokenizer", ".json"),
    ("", ".tiktoken"),
];

/// Whether a file of this name is one.
fn is_side_file(name: &str) -> bool {
    let fits = |(start, end): &(&str, &str)| {
        name.len() > end.len() && name.strip_suffix(end).is_some_and(|rest| rest.starts_with(start))
    };
    NAMES.contains(&name) || PARTS.iter().any(fits)
}

/// Opens the side files of a directory, by name.
///
/// # Errors
/// [`Error::Io`], [`Error::Invalid`] for a link out of the directory.
pub(crate) fn side_files(dir: &Path, options: &Options) -> Result<Vec<SourceFile>> {
    let asked = || NAMES.iter().chain(ASKED).map(|name| (*name).to_owned()).collect();
    let mut names: Vec<_> = location::names(dir)?.unwrap_or_else(asked);
    names.retain(|name| is_side_file(name));
    names.sort_unstable();
    let mut files = Vec::new();
    for name in names {
        let Some(path) = member(dir, &name)? else { continue };
        if !path.is_dir() {
            let file = InputFile::open(&path, options.access)?;
            files.push(SourceFile { name, file });
        }
    }
    Ok(files)
}

/// The side files of a checkpoint that another tool has quantized: what its config says of that is no longer so once its
/// matrices are read, and would have whoever loads the decoded weights look for others.
pub(super) fn unquantized(files: Vec<SourceFile>) -> Result<Vec<SourceFile>> {
    let edit = |own: SourceFile| -> Result<SourceFile> {
        if own.name != config::CONFIG {
            return Ok(own);
        }
        let len = usize::try_from(own.file.len()).map_err(|_| Error::invalid("config.json is larger than memory"))?;
        let text = config::unquantized(&own.file.read(0, len)?);
        made(own.file.path(), &own.name, &text)
    };
    files.into_iter().map(edit).collect()
}

/// A file that is in no directory, of a content that follows from what lies at `path`.
pub(super) fn made(path: &Path, name: &str, text: &[u8]) -> Result<SourceFile> {
    let io = |e| Error::io(path, e);
    let mut spool = tempfile::tempfile().map_err(io)?;
    spool.write_all(text).map_err(io)?;
    Ok(SourceFile { file: InputFile::from_file(path, spool, Access::Read)?, name: name.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::attached::ENDINGS;

    #[test]
    fn programs_and_weights_are_no_side_files() {
        for name in ["tokenizer.json", "tokenizer_config.json", "qwen.tiktoken", "chat_template.jinja", "config.json"] {
            assert!(is_side_file(name), "{name}");
            assert!(ENDINGS.iter().any(|ending| name.ends_with(ending)), "{name} cannot be attached");
        }
        for name in [
            "modeling_llama.py",
            "tokenization_x.py",
            "model.safetensors",
            "model.safetensors.index.json",
            "tokenizer.bin",
            "chat_template.py",
            ".tiktoken",
            "README.md",
            "config.json.bak",
            "tenpak.json",
        ] {
            assert!(!is_side_file(name), "{name}");
        }
        assert!(NAMES.iter().all(|name| ENDINGS.iter().any(|ending| name.ends_with(ending))));
    }
}
