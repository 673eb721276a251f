//! What two models differ in.

use std::path::Path;

use serde::Serialize;

use super::Loss;
use crate::difference::{Difference, Differences, Side, Tensor};

/// `tenpak.diff/1`
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct Diff {
    pub schema: &'static str,
    pub first: String,
    pub second: String,
    pub same: bool,
    pub tensors: Vec<TensorRow>,
    pub metadata: Vec<String>,
}

/// A tensor in both models, or in one.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct TensorRow {
    pub name: String,
    pub status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first: Option<SideRow>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub second: Option<SideRow>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<Loss>,
}

/// A tensor in one model.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct SideRow {
    pub dtype: &'static str,
    pub shape: Vec<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub codec: Option<&'static str>,
}

impl From<&Side> for SideRow {
    fn from(side: &Side) -> Self {
        Self { dtype: side.info.dtype().name(), shape: side.info.shape().to_vec(), codec: side.codec }
    }
}

impl From<&Tensor> for TensorRow {
    fn from(tensor: &Tensor) -> Self {
        let (status, loss) = match &tensor.difference {
            Difference::Same if tensor.first != tensor.second => ("stored", None),
            Difference::Same => ("same", None),
            Difference::Values(distance) => ("values", Some(Loss::from(distance))),
            Difference::Bytes => ("values", None),
            Difference::Shape => ("shape", None),
            Difference::OnlyFirst => ("only_first", None),
            Difference::OnlySecond => ("only_second", None),
        };
        let named = tensor.first.as_ref().or(tensor.second.as_ref());
        Self {
            name: named.map_or_else(String::new, |side| side.info.name().to_owned()),
            status,
            first: tensor.first.as_ref().map(SideRow::from),
            second: tensor.second.as_ref().map(SideRow::from),
            loss,
        }
    }
}

impl Diff {
    /// The report of a comparison.
    #[must_use]
    pub fn new(first: &Path, second: &Path, found: &Differences) -> Self {
        Self {
            schema: "tenpak.diff/1",
            first: first.display().to_string(),
            second: second.display().to_string(),
            same: found.none(),
            tensors: found.tensors.iter().map(TensorRow::from).collect(),
            metadata: found.metadata.clone(),
        }
    }
}
