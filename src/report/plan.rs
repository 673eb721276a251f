//! What choices of codec or rate are expected to come to.

use std::path::Path;

use serde::Serialize;

use super::Sizes;
use crate::compress;
use crate::fit::Rate;

/// `tenpak.plan/1`
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct Plan {
    pub schema: &'static str,
    pub input: String,
    pub points: Vec<Point>,
    pub tensors: Vec<Expected>,
    pub seconds: f64,
}

/// What a choice of codec or rate is expected to come to.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct Point {
    pub codec: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_bits: Option<f64>,
    pub file_bytes: u64,
    pub matrices: Sizes,
    pub memory_bits_per_weight: f64,
    pub nmse: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl: Option<f64>,
}

/// What is expected of a matrix.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct Expected {
    pub name: String,
    pub weights: u64,
    pub target_bits: f64,
    pub nmse: f64,
}

impl Plan {
    /// The report of a prediction that took `seconds`.
    #[must_use]
    pub fn new(input: &Path, found: &compress::Frontier, seconds: f64) -> Self {
        let point = |p: &compress::Point| Point {
            codec: p.codec.id,
            target_bits: p.rate.map(Rate::bits),
            file_bytes: p.file_bytes,
            matrices: Sizes::new(p.weights, p.bytes),
            memory_bits_per_weight: Sizes::new(p.weights, p.memory_bytes).bits_per_weight,
            nmse: p.nmse,
            kl: p.kl,
        };
        let expected = |t: &compress::Expected| Expected {
            name: t.name.clone(),
            weights: t.weights,
            target_bits: t.rate.bits(),
            nmse: t.nmse,
        };
        Self {
            schema: "tenpak.plan/1",
            input: input.display().to_string(),
            points: found.points.iter().map(point).collect(),
            tensors: found.tensors.iter().map(expected).collect(),
            seconds,
        }
    }
}
