//! What the verbs report, as the JSON that the command line prints and Python returns; `cli/schema.json` documents it.

mod codecs;
mod compress;
mod delta;
pub mod devices;
pub mod difference;
mod export;
mod plan;
mod verify;

use std::path::PathBuf;

use serde::Serialize;

pub use self::codecs::{CodecRow, Codecs};
pub use self::compress::{Attached, Compress, MergeIndex, Part};
pub use self::delta::{Alone, Delta, Materialize};
pub use self::export::{Decompress, Export};
pub use self::plan::{Expected, Plan, Point};
pub use self::verify::Verify;
use crate::artifact::Entry;
use crate::compress::TensorReport;
use crate::fit::{Method, Rate};
use crate::measure::Distance;

/// How large weights are: in bits each, and against 32 and 16 bits, never one factor without its base.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Sizes {
    /// Number of weights.
    pub weights: u64,
    /// Bytes that they take.
    pub bytes: u64,
    /// Bits of one on average.
    pub bits_per_weight: f64,
    /// How many times smaller than in FP32.
    pub x_vs_fp32: f64,
    /// How many times smaller than in FP16 or BF16.
    pub x_vs_16bit: f64,
}

impl Sizes {
    /// The sizes of `weights` weights in `bytes` bytes.
    #[must_use]
    pub fn new(weights: u64, bytes: u64) -> Self {
        let (w, b) = (weights as f64, (bytes as f64).max(1.0));
        let bits_per_weight = 8.0 * bytes as f64 / w.max(1.0);
        Self { weights, bytes, bits_per_weight, x_vs_fp32: 4.0 * w / b, x_vs_16bit: 2.0 * w / b }
    }
}

/// The loss of a tensor or of many.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Loss {
    /// Squared error over squared weights.
    pub nmse: f64,
    /// The same in dB; `null` where nothing was lost.
    pub snr_db: Option<f64>,
    /// Root of the mean squared error.
    pub rms: f64,
    /// Largest error.
    pub max: f64,
}

impl From<&Distance> for Loss {
    fn from(d: &Distance) -> Self {
        let snr = d.snr_db();
        Self { nmse: d.nmse(), snr_db: snr.is_finite().then_some(snr), rms: d.rms(), max: d.max }
    }
}

/// A tensor in a report.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct Tensor {
    pub name: String,
    pub dtype: &'static str,
    pub shape: Vec<u64>,
    pub codec: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fit: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub imported: Option<&'static str>,
    pub source_bytes: u64,
    pub stored_bytes: u64,
    pub bits_per_weight: f64,
    pub memory_bytes: u64,
    pub memory_bits_per_weight: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_bits: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<Loss>,
    #[serde(skip_serializing_if = "is_zero")]
    pub repaired: u64,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl From<&TensorReport> for Tensor {
    fn from(t: &TensorReport) -> Self {
        Self {
            name: t.name.clone(),
            dtype: t.dtype.name(),
            shape: t.shape.clone(),
            codec: t.codec.id,
            reason: Some(t.reason.clone()),
            fit: (t.method != Method::Codec).then(|| t.method.name()),
            imported: t.imported.map(|imported| imported.format),
            source_bytes: t.source_bytes,
            stored_bytes: t.stored_bytes,
            bits_per_weight: Sizes::new(t.elements(), t.stored_bytes).bits_per_weight,
            memory_bytes: t.memory_bytes,
            memory_bits_per_weight: Sizes::new(t.elements(), t.memory_bytes).bits_per_weight,
            target_bits: t.rate.map(Rate::bits),
            loss: t.distance.as_ref().map(Loss::from),
            repaired: t.repaired,
        }
    }
}

impl From<&Entry> for Tensor {
    fn from(entry: &Entry) -> Self {
        Self {
            name: entry.info().name().to_owned(),
            dtype: entry.info().dtype().name(),
            shape: entry.info().shape().to_vec(),
            codec: entry.codec().id,
            reason: None,
            fit: None,
            imported: None,
            source_bytes: entry.info().bytes(),
            stored_bytes: entry.stored_bytes(),
            bits_per_weight: entry.bits_per_weight(),
            memory_bytes: entry.memory_bytes(),
            memory_bits_per_weight: Sizes::new(entry.info().elements(), entry.memory_bytes()).bits_per_weight,
            target_bits: entry.rate().map(Rate::bits),
            loss: None,
            repaired: 0,
        }
    }
}

/// A file that was written.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct File {
    pub path: String,
    pub bytes: u64,
}

/// Files with their lengths, as reports name them.
fn files(files: &[(PathBuf, u64)]) -> Vec<File> {
    files.iter().map(|(path, bytes)| File { path: path.display().to_string(), bytes: *bytes }).collect()
}
