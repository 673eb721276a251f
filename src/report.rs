//! What the verbs report, as the JSON that the command line prints and Python returns; `cli/schema.json` documents it.

pub mod devices;
pub mod difference;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::artifact::delta::{DeltaReport, Materialized};
use crate::artifact::verify::{Problem, Verified};
use crate::artifact::{ArtifactFile, Entry};
use crate::codec::Codec;
use crate::compress::{self, Report, TensorReport};
use crate::export::{Exported, To};
use crate::fit::{Fit, Method, Rate};
use crate::layout::{Float, Grouped, Layout, Levels};
use crate::measure::Distance;
use crate::source::Source;

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

/// `tenpak.compress/1`
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct Compress {
    pub schema: &'static str,
    pub dry_run: bool,
    pub input: String,
    pub output: Option<String>,
    pub file_bytes: u64,
    pub source_bytes: u64,
    pub total: Sizes,
    pub memory: Sizes,
    pub attached: Vec<Attached>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<File>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<Loss>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub part: Option<Part>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    pub notes: Vec<String>,
    pub tensors: Vec<Tensor>,
}

/// Which of how many parts.
#[derive(Debug, Clone, Copy, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct Part {
    pub number: u32,
    pub of: u32,
}

/// A file that an artifact carries besides weights.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct Attached {
    pub name: String,
    pub bytes: u64,
}

impl Compress {
    /// The report of a run that took `seconds`, or of a plan.
    #[must_use]
    pub fn new(input: &Path, output: Option<&Path>, source: &Source, report: &Report, seconds: f64) -> Self {
        let mut notes = notes(report, source);
        notes.extend_from_slice(&report.notes);
        let elements = report.tensors.iter().map(TensorReport::elements).sum();
        let mut all = Distance::default();
        let mut lossy = report.tensors.iter().filter_map(|t| t.distance.as_ref()).peekable();
        let any = lossy.peek().is_some();
        lossy.for_each(|d| all.merge(d));
        Self {
            schema: "tenpak.compress/1",
            dry_run: report.identity.is_none(),
            input: input.display().to_string(),
            output: output.map(|p| p.display().to_string()),
            file_bytes: report.file_bytes,
            source_bytes: source.files().iter().map(|f| f.file().len()).sum(),
            total: Sizes::new(elements, report.weight_bytes),
            memory: Sizes::new(elements, report.tensors.iter().map(|t| t.memory_bytes).sum()),
            attached: report
                .attached
                .iter()
                .map(|(name, bytes)| Attached { name: name.clone(), bytes: *bytes })
                .collect(),
            loss: any.then(|| Loss::from(&all)),
            identity: report.identity.map(|i| i.to_string()),
            part: report.part.map(|part| Part { number: part.number(), of: part.of() }),
            seconds: report.identity.map(|_| seconds),
            files: files(&report.files),
            notes,
            tensors: report.tensors.iter().map(Tensor::from).collect(),
        }
    }
}

/// From which share on a tensor that is larger or smaller than asked for is told of.
const OFF: f64 = 0.02;

/// What a reader must know: codecs that were changed, weights that were repaired, input that was not used.
fn notes(report: &Report, source: &Source) -> Vec<String> {
    let mut notes = source.notes().to_vec();
    for t in &report.tensors {
        if t.changed_codec {
            notes.push(format!("{} is stored in {}: {}", t.name, t.codec.id, t.reason));
        }
        if let Some(rate) = t.rate
            && t.distance.is_some()
            && (t.stored_bytes as f64 / rate.bytes(t.elements()).max(1) as f64 - 1.0).abs() > OFF
        {
            let bits = Sizes::new(t.elements(), t.stored_bytes).bits_per_weight;
            notes.push(format!("{} takes {bits:.3} bits per weight instead of {rate}", t.name));
        }
        if t.repaired > 0 {
            notes.push(format!("{}: {} weights that were not finite have been replaced", t.name, t.repaired));
        }
    }
    let formats: BTreeSet<_> = report.tensors.iter().filter_map(|t| Some(t.imported?.format)).collect();
    for format in formats {
        let of = || report.tensors.iter().filter_map(|t| t.imported).filter(|imported| imported.format == format);
        let (all, taken) = (of().count(), of().filter(|imported| imported.taken_over).count());
        notes.push(format!("{taken} of {all} matrices in {format} are taken over as they are"));
    }
    let rates = || report.tensors.iter().filter_map(|t| t.rate);
    if let (Some(least), Some(most)) = (rates().min(), rates().max())
        && least < most
    {
        notes.push(format!("tensors of an open size have from {least} to {most} bits per weight"));
    }
    for (_, method) in Method::ALL.iter().filter(|(_, method)| *method != Method::Codec) {
        let count = report.tensors.iter().filter(|t| t.method == *method).count();
        if count > 0 {
            notes.push(format!("{count} tensors were fitted by '{}' instead of by their codec's fit", method.name()));
        }
    }
    for t in &report.tensors {
        if let Some(reason) = &t.method_reason {
            let method = if t.method == Method::Codec { "its codec's fit" } else { t.method.name() };
            notes.push(format!("{} is fitted by {method}: {reason}", t.name));
        }
    }
    if report.identity.is_none() && report.tensors.iter().any(|t| t.rate.is_some()) {
        notes.push(
            "sizes of coded tensors are those asked for; what they come to is known when they are encoded".to_owned(),
        );
    }
    let stats = source.activation_stats().len();
    if stats > 0 && report.tensors.iter().all(|t| t.method != Method::Weighted) {
        notes.push(format!("activation_stats of {stats} tensors were read and not used; --fit weighted uses them"));
    }
    notes
}

/// `tenpak.merge-index/1`
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct MergeIndex {
    pub schema: &'static str,
    pub output: String,
    pub parts: u32,
    pub file_bytes: u64,
    pub total: Sizes,
    pub files: Vec<File>,
    pub identity: String,
    pub notes: Vec<String>,
    pub seconds: f64,
}

impl MergeIndex {
    /// The report of a run that took `seconds`.
    #[must_use]
    pub fn new(output: &Path, merged: &compress::Merged, seconds: f64) -> Self {
        let elements = merged.header.tensors().iter().map(|entry| entry.info().elements()).sum();
        Self {
            schema: "tenpak.merge-index/1",
            output: output.display().to_string(),
            parts: merged.parts,
            file_bytes: merged.files.iter().map(|(_, bytes)| bytes).sum(),
            total: Sizes::new(elements, merged.weight_bytes),
            files: files(&merged.files),
            identity: merged.header.identity().to_string(),
            notes: merged.notes.clone(),
            seconds,
        }
    }
}

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

/// A file that was written.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct File {
    pub path: String,
    pub bytes: u64,
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

/// Files with their lengths, as reports name them.
fn files(files: &[(PathBuf, u64)]) -> Vec<File> {
    files.iter().map(|(path, bytes)| File { path: path.display().to_string(), bytes: *bytes }).collect()
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

/// `tenpak.codecs/1`
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct Codecs {
    pub schema: &'static str,
    pub codecs: Vec<CodecRow>,
}

/// A codec, described.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct CodecRow {
    pub id: &'static str,
    pub levels: &'static str,
    pub bits: Option<u32>,
    pub group: Option<usize>,
    pub scale: Option<&'static str>,
    pub offset: Option<&'static str>,
    pub fit: &'static str,
    pub bits_per_weight: Option<f64>,
    pub memory_bits_per_weight: Option<f64>,
}

impl Codecs {
    /// The registry.
    #[must_use]
    pub fn new() -> Self {
        Self { schema: "tenpak.codecs/1", codecs: crate::codecs::all().iter().map(CodecRow::from).collect() }
    }
}

impl Default for Codecs {
    fn default() -> Self {
        Self::new()
    }
}

impl From<&Codec> for CodecRow {
    fn from(codec: &Codec) -> Self {
        let name = |f: Float| if f == Float::F16 { "F16" } else { "F32" };
        let (levels, grouped) = match &codec.layout {
            Layout::Raw => ("as stored", None),
            Layout::Grouped(g) => {
                let levels = match g.levels() {
                    Levels::Unsigned => "unsigned",
                    Levels::Signed => "signed",
                    Levels::ZeroPoint => "zero point",
                    Levels::Table(_) => "table",
                    Levels::Bank(_) => "bank",
                };
                (levels, Some(g))
            }
        };
        Self {
            id: codec.id,
            levels,
            bits: grouped.map(Grouped::bits),
            group: grouped.map(Grouped::group),
            scale: grouped.map(|g| if g.bank().is_some() { "U8" } else { name(g.scale()) }),
            offset: grouped.and_then(|g| g.offset()).map(name),
            fit: codec.fit.name(),
            bits_per_weight: codec.layout.bits_per_weight().filter(|_| codec.fit != Fit::Rate),
            memory_bits_per_weight: codec.layout.bits_per_weight(),
        }
    }
}
