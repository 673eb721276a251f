//! What reading a checkpoint promises, on files built by hand: right values, and an error for whatever is hostile.

mod build;
mod bundle;
mod damage;
mod directory;
mod numpy;
mod real;
mod safetensors;

use std::path::Path;

use tenpak::file::Access;
use tenpak::source::{Options, Source, open};
use tenpak::{Limits, Result};

/// Both ways to reach a file's bytes.
const ACCESSES: [Access; 2] = [Access::Map, Access::Read];

/// Opens with default limits.
fn open_with(path: &Path, access: Access) -> Result<Source> {
    open(path, &Options { access, limits: Limits::DEFAULT })
}

/// Opens with default options.
fn open_default(path: &Path) -> Result<Source> {
    open(path, &Options::default())
}

/// The message of the error that opening `path` must end in; it names the path.
fn refusal(path: &Path) -> String {
    let error = open_default(path).expect_err("this must be refused");
    let message = error.to_string();
    assert!(!message.contains('\n'), "one line: {message}");
    message
}

/// Asserts that opening `path` fails with a message that contains every one of `parts`.
#[track_caller]
fn assert_refused(path: &Path, parts: &[&str]) {
    let message = refusal(path);
    for part in parts {
        assert!(message.contains(part), "'{part}' is not in: {message}");
    }
}

/// All rows of a tensor.
fn read_all(source: &Source, name: &str) -> Vec<u8> {
    let index = source.tensors().iter().position(|t| t.info().name() == name).expect("the tensor is there");
    source.read_rows(index, 0, source.tensors()[index].matrix().0).unwrap().to_vec()
}
