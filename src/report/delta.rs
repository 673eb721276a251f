//! What a delta takes and loses, and what came of one.

use std::path::Path;

use serde::Serialize;

use super::{File, Loss, Sizes, Tensor, files};
use crate::artifact::delta::{DeltaReport, Materialized};
use crate::measure::Distance;

/// `tenpak.delta/1`
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct Delta {
    pub schema: &'static str,
    pub mode: &'static str,
    pub base: String,
    pub input: String,
    pub output: String,
    pub epsilon: f64,
    pub changed: Vec<Tensor>,
    pub unchanged: usize,
    pub file_bytes: u64,
    pub base_bytes: u64,
    pub variant_bytes: u64,
    pub total: Sizes,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<Loss>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_of_difference: Option<f64>,
    pub alone: Alone,
    pub result: String,
}

/// A variant compressed in the same way as its delta, without a base.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct Alone {
    pub bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<Loss>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_of_difference: Option<f64>,
}

impl Delta {
    /// The report of a run.
    #[must_use]
    pub fn new(base: &Path, input: &Path, output: &Path, epsilon: f64, report: &DeltaReport) -> Self {
        let of_difference = |distance: Option<&Distance>| {
            let moved = report.moved.filter(|&moved| moved > 0.0)?;
            Some(distance?.noise / moved)
        };
        Self {
            schema: "tenpak.delta/1",
            mode: report.mode.name(),
            base: base.display().to_string(),
            input: input.display().to_string(),
            output: output.display().to_string(),
            epsilon,
            changed: report.changed.iter().map(Tensor::from).collect(),
            unchanged: report.unchanged,
            file_bytes: report.file_bytes,
            base_bytes: report.base_bytes,
            variant_bytes: report.variant_bytes,
            total: Sizes::new(report.weights, report.file_bytes),
            loss: report.distance.as_ref().map(Loss::from),
            error_of_difference: of_difference(report.distance.as_ref()),
            alone: Alone {
                bytes: report.alone_bytes,
                loss: report.alone.as_ref().map(Loss::from),
                error_of_difference: of_difference(report.alone.as_ref()),
            },
            result: report.result.to_string(),
        }
    }
}

/// `tenpak.materialize/1`
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct Materialize {
    pub schema: &'static str,
    pub output: String,
    pub file_bytes: u64,
    pub files: Vec<File>,
    pub identity: String,
    pub tensors: usize,
}

impl Materialize {
    /// The report of a run.
    #[must_use]
    pub fn new(output: &Path, written: &Materialized) -> Self {
        Self {
            schema: "tenpak.materialize/1",
            output: output.display().to_string(),
            file_bytes: written.files.iter().map(|(_, bytes)| bytes).sum(),
            files: files(&written.files),
            identity: written.identity.to_string(),
            tensors: written.tensors,
        }
    }
}
