//! What a compression, or the merging of its parts, comes to.

use std::collections::BTreeSet;
use std::path::Path;

use serde::Serialize;

use super::{File, Loss, Sizes, Tensor, files};
use crate::compress::{Merged, Report, TensorReport};
use crate::fit::Method;
use crate::measure::Distance;
use crate::source::Source;

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
    pub fn new(output: &Path, merged: &Merged, seconds: f64) -> Self {
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
