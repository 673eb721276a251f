//! What is wrong with an artifact.

use serde::Serialize;

use crate::artifact::ArtifactFile;
use crate::artifact::verify::{Problem, Verified};

/// `tenpak.verify/1`
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct Verify {
    pub schema: &'static str,
    pub input: String,
    pub sound: bool,
    pub identity: String,
    pub chunks: u64,
    pub bytes: u64,
    pub problems: Vec<Problem>,
}

impl Verify {
    /// What was found in an artifact.
    #[must_use]
    pub fn new(artifact: &ArtifactFile, verified: Verified) -> Self {
        Self {
            schema: "tenpak.verify/1",
            input: artifact.path().display().to_string(),
            sound: verified.problems.is_empty(),
            identity: artifact.header().identity().to_string(),
            chunks: verified.chunks,
            bytes: verified.bytes,
            problems: verified.problems,
        }
    }
}
