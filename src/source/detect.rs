//! What kind of checkpoint a path is, told by its first bytes, and by its extension only where they say nothing.
//!
//! Kinds that are not read are recognised all the same, so that the error can say how to convert them.

use std::path::Path;

use crate::error::{Error, Result};
use crate::file::{Access, InputFile};
use crate::location::{self, Kind};

use super::{Options, Source, bundle, directory, gguf, npy, npz, safetensors};

/// The first bytes of an artifact of this crate.
const ARTIFACT: &[u8] = b"\x89TNPK\r\n\x1a";

/// Opens whatever is at `path`.
pub(super) fn open(path: &Path, options: &Options) -> Result<Source> {
    let path = &*location::resolved(path)?;
    if location::kind(path)? == Kind::Directory {
        return directory::open(path, options);
    }
    let file = InputFile::open(path, Access::Read)?;
    if file.is_empty() {
        return Err(Error::invalid("the file is empty, expected a checkpoint").in_file(path));
    }
    let start = file.read(0, usize::try_from(file.len().min(64)).expect("at most 64"))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    drop(file);
    match recognise(&start, &name).map_err(|e| e.in_file(path))? {
        Found::Safetensors => safetensors::open(path, options),
        Found::Npy => npy::open(path, options),
        Found::Zip => npz::open(path, options),
        Found::Json => bundle::open(path, options),
        Found::Gguf => gguf::open(path, options),
    }
}

/// What is read.
#[derive(Debug, PartialEq)]
enum Found {
    Safetensors,
    Npy,
    Zip,
    Json,
    Gguf,
}

/// Tells a file by its first bytes and its name.
fn recognise(start: &[u8], name: &str) -> Result<Found> {
    let lower = name.to_lowercase();
    let extension = lower.rsplit_once('.').map_or("", |(_, extension)| extension);
    // Before the pickles: a header of 640 bytes begins like one.
    let length_then_brace = start.get(5..9) == Some(b"\0\0\0{");
    if length_then_brace {
        return Ok(Found::Safetensors);
    }
    if start.starts_with(ARTIFACT) {
        return Err(Error::unsupported(
            "this is a compressed tenpak artifact, not a checkpoint: run tenpak decompress on it first",
        ));
    }
    if start.starts_with(b"\x93NUMPY") {
        return Ok(Found::Npy);
    }
    if start.starts_with(b"PK\x03\x04") || start.starts_with(b"PK\x05\x06") {
        // PyTorch puts its pickles into archives too.
        return foreign_weights(name).map_or(Ok(Found::Zip), Err);
    }
    if start.starts_with(b"\x89HDF\r\n\x1a\n") {
        return Err(hdf5(name));
    }
    if start.starts_with(b"GGUF") {
        return Ok(Found::Gguf);
    }
    if start.starts_with(b"version https://git-lfs") {
        return Err(Error::invalid("this is a Git LFS pointer instead of the file: run git lfs pull"));
    }
    if let [0x80, 2..=5, ..] = start {
        return Err(pickle(name));
    }
    match extension {
        "safetensors" => return Ok(Found::Safetensors),
        "json" if lower.ends_with(".index.json") => {
            return Err(Error::invalid("this is the index of a model of several files: give its directory instead"));
        }
        "json" => return Ok(Found::Json),
        _ => {}
    }
    if let Some(error) = foreign_weights(name) {
        return Err(error);
    }
    if start.trim_ascii_start().first() == Some(&b'{') {
        return Ok(Found::Json);
    }
    Err(Error::unsupported(
        "this is no known checkpoint: expected a model directory, .safetensors, .gguf, .npz, .npy or a JSON bundle",
    ))
}

/// The error of a file name that means weights of a kind that is not read.
pub(super) fn foreign_weights(name: &str) -> Option<Error> {
    match name.rsplit_once('.')?.1.to_lowercase().as_str() {
        "bin" | "pt" | "pth" | "ckpt" | "pkl" | "pickle" => Some(pickle(name)),
        "h5" | "hdf5" | "keras" => Some(hdf5(name)),
        "gguf" => Some(Error::invalid(
            "weights in GGUF are read from one file that begins with these letters; give that file itself, complete",
        )),
        _ => None,
    }
}

/// The error of a pickle.
pub(super) fn pickle(name: &str) -> Error {
    let name = pasteable(name, "model.bin");
    Error::unsupported(format!(
        "{name} is a Python pickle, which can run any program when it is read; convert it where you trust it: python -c \
         \"import torch; from safetensors.torch import save_file; w = torch.load('{name}', map_location='cpu', \
         weights_only=True); save_file({{k: v.clone().contiguous() for k, v in w.items()}}, 'model.safetensors')\""
    ))
}

fn hdf5(name: &str) -> Error {
    let name = pasteable(name, "model.h5");
    Error::unsupported(format!(
        "{name} is an HDF5 file, which is not read; convert it: python -c \"import h5py; from safetensors.numpy import \
         save_file; w = {{}}; h5py.File('{name}').visititems(lambda n, o: w.update({{n: o[()]}}) if isinstance(o, \
         h5py.Dataset) else None); save_file(w, 'model.safetensors')\""
    ))
}

/// The name, unless a shell would take it for something else.
fn pasteable<'a>(name: &'a str, instead: &'a str) -> &'a str {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if name.chars().all(plain) { name } else { instead }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_safetensors_file_whose_length_looks_like_a_pickle_is_read() {
        assert_eq!(recognise(b"\x80\x02\0\0\0\0\0\0{\"a\":", "weights").unwrap(), Found::Safetensors);
    }

    #[test]
    fn kinds_that_are_not_read_say_how_to_convert_them() {
        let cases: &[(&[u8], &str, &str)] = &[
            (b"\x80\x02}q\0", "x", "save_file"),
            (b"whatever", "pytorch_model.bin", "save_file"),
            (b"whatever", "a.pth", "save_file"),
            (b"\x89HDF\r\n\x1a\n", "weights", "h5py"),
            (b"whatever", "model.h5", "h5py"),
            (b"\x89TNPK\r\n\x1a\x01", "x", "decompress"),
            (b"version https://git-lfs.github.com/spec/v1", "model.safetensors", "git lfs pull"),
            (b"{\"weight_map\":{}}", "model.safetensors.index.json", "directory"),
            (b"hello", "x.txt", "no known checkpoint"),
        ];
        for (start, name, remedy) in cases {
            let message = recognise(start, name).unwrap_err().to_string();
            assert!(message.contains(remedy), "{name}: {message}");
        }
    }
}
