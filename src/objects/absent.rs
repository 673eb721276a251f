//! What URLs are to a build without the feature: none of them is ever had, so there is nothing to do with one.

use std::fmt;
use std::fs::File;
use std::path::Path;

use crate::error::{Error, Result};
use crate::location::Kind;

/// No URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Url {}

/// No object.
#[derive(Debug)]
pub(crate) enum Object {}

impl fmt::Display for Url {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {}
    }
}

impl Url {
    pub fn parse(scheme: &str, _: &str) -> Result<Self> {
        Err(Error::unsupported(format!(
            "this build of tenpak knows no URLs of {scheme}://; build one that does, by cargo install --features objects or \
             maturin build --features python,objects, or copy the files to a local directory"
        )))
    }

    pub fn child(&self, _: &str) -> Result<Self> {
        match *self {}
    }

    pub fn kind(&self) -> Result<Option<Kind>> {
        match *self {}
    }

    pub fn bytes(&self) -> Result<Option<u64>> {
        match *self {}
    }

    pub fn list(&self) -> Result<Option<Vec<(String, u64)>>> {
        match *self {}
    }

    pub fn open(&self) -> Result<Object> {
        match *self {}
    }

    pub fn check_file(&self, _: bool) -> Result<()> {
        match *self {}
    }

    pub fn check_directory(&self) -> Result<()> {
        match *self {}
    }

    pub fn put(&self, _: &File, _: u64, _: bool) -> Result<()> {
        match *self {}
    }

    pub fn put_directory(&self, _: &Path) -> Result<()> {
        match *self {}
    }
}

impl Object {
    pub fn url(&self) -> &Url {
        match *self {}
    }

    pub fn len(&self) -> u64 {
        match *self {}
    }

    pub fn read_into(&self, _: u64, _: &mut [u8]) -> Result<()> {
        match *self {}
    }
}
