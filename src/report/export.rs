//! What was written out of an artifact.

use std::path::Path;

use serde::Serialize;

use super::{File, files};
use crate::artifact::ArtifactFile;
use crate::export::{Exported, To};

/// `tenpak.decompress/1`
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct Decompress {
    pub schema: &'static str,
    pub input: String,
    pub files: Vec<File>,
    pub notes: Vec<String>,
    pub seconds: f64,
}

impl Decompress {
    /// The report of a run that took `seconds`.
    #[must_use]
    pub fn new(input: &Path, exported: Exported, seconds: f64) -> Self {
        Self {
            schema: "tenpak.decompress/1",
            input: input.display().to_string(),
            files: files(&exported.files),
            notes: exported.notes,
            seconds,
        }
    }
}

/// `tenpak.export/1`
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct Export {
    pub schema: &'static str,
    pub dry_run: bool,
    pub input: String,
    pub output: String,
    pub to: &'static str,
    pub bytes: u64,
    pub identity: String,
    pub files: Vec<File>,
    pub notes: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
}

impl Export {
    /// The report of a run that took `seconds`, or of a plan.
    #[must_use]
    pub fn new(
        input: &Path,
        output: &Path,
        to: To,
        artifact: &ArtifactFile,
        exported: Exported,
        seconds: Option<f64>,
    ) -> Self {
        Self {
            schema: "tenpak.export/1",
            dry_run: seconds.is_none(),
            input: input.display().to_string(),
            output: output.display().to_string(),
            to: to.name(),
            bytes: exported.files.iter().map(|(_, bytes)| bytes).sum(),
            identity: artifact.header().identity().to_string(),
            files: files(&exported.files),
            notes: exported.notes,
            seconds,
        }
    }
}
