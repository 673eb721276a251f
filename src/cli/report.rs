//! The pieces that reports share: figures as text, tables, and tensors and sizes as JSON.

use std::time::Duration;

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::artifact::Entry;
use crate::compress::TensorReport;
use crate::measure::Distance;

/// A table without lines; the first column to the left, figures to the right.
pub(super) fn table(head: &[&str], rows: impl IntoIterator<Item = Vec<String>>, left: usize) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(head.to_vec());
    for row in rows {
        table.add_row(row);
    }
    for (i, column) in table.column_iter_mut().enumerate() {
        column.set_cell_alignment(if i < left { CellAlignment::Left } else { CellAlignment::Right });
        column.set_padding((0, 2));
    }
    table.lines().map(|line| line.trim_end().to_owned()).collect::<Vec<_>>().join("\n")
}

/// An integer with its thousands apart.
pub(super) fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Text of a file without control characters, which a terminal would obey.
pub(super) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() }).collect()
}

/// A shape as people write it.
pub(super) fn shape(dims: &[u64]) -> String {
    if dims.is_empty() { "scalar".into() } else { dims.iter().map(u64::to_string).collect::<Vec<_>>().join("x") }
}

/// nMSE, SNR and largest error of a distance; dashes where nothing was lost or measured.
pub(super) fn loss(distance: Option<&Distance>) -> [String; 3] {
    match distance {
        Some(d) if d.noise > 0.0 => {
            [format!("{:.3e}", d.nmse()), format!("{:.2}", d.snr_db()), format!("{:.3e}", d.max)]
        }
        Some(_) => ["0".into(), "exact".into(), "0".into()],
        None => ["-".into(), "-".into(), "-".into()],
    }
}

/// A dtype without its opinion on width: bytes against FP32 and against 16 bits, as factors.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Sizes {
    pub weights: u64,
    pub bytes: u64,
    pub bits_per_weight: f64,
    pub x_vs_fp32: f64,
    pub x_vs_16bit: f64,
}

impl Sizes {
    pub fn new(weights: u64, bytes: u64) -> Self {
        let (w, b) = (weights as f64, (bytes as f64).max(1.0));
        Self {
            weights,
            bytes,
            bits_per_weight: 8.0 * bytes as f64 / w.max(1.0),
            x_vs_fp32: 4.0 * w / b,
            x_vs_16bit: 2.0 * w / b,
        }
    }

    /// The factors as one phrase.
    pub fn phrase(&self) -> String {
        format!(
            "{:.3} bits/weight, {:.2}x smaller than FP32, {:.2}x than 16-bit",
            self.bits_per_weight, self.x_vs_fp32, self.x_vs_16bit
        )
    }
}

/// The loss of a tensor or of many.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Loss {
    pub nmse: f64,
    /// `null` where nothing was lost.
    pub snr_db: Option<f64>,
    pub rms: f64,
    pub max: f64,
}

impl From<&Distance> for Loss {
    fn from(d: &Distance) -> Self {
        let snr = d.snr_db();
        Self { nmse: d.nmse(), snr_db: snr.is_finite().then_some(snr), rms: d.rms(), max: d.max }
    }
}

/// A tensor in a report.
#[derive(Debug, Serialize)]
pub(super) struct TensorJson<'a> {
    pub name: &'a str,
    pub dtype: &'static str,
    pub shape: &'a [u64],
    pub codec: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'a str>,
    pub source_bytes: u64,
    pub stored_bytes: u64,
    pub bits_per_weight: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<Loss>,
    #[serde(skip_serializing_if = "is_zero")]
    pub repaired: u64,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl<'a> From<&'a TensorReport> for TensorJson<'a> {
    fn from(t: &'a TensorReport) -> Self {
        Self {
            name: &t.name,
            dtype: t.dtype.name(),
            shape: &t.shape,
            codec: t.codec.id,
            reason: Some(&t.reason),
            source_bytes: t.source_bytes,
            stored_bytes: t.stored_bytes,
            bits_per_weight: Sizes::new(t.elements(), t.stored_bytes).bits_per_weight,
            loss: t.distance.as_ref().map(Loss::from),
            repaired: t.repaired,
        }
    }
}

impl<'a> From<&'a Entry> for TensorJson<'a> {
    fn from(entry: &'a Entry) -> Self {
        Self {
            name: entry.info().name(),
            dtype: entry.info().dtype().name(),
            shape: entry.info().shape(),
            codec: entry.codec().id,
            reason: None,
            source_bytes: entry.info().bytes(),
            stored_bytes: entry.stored_bytes(),
            bits_per_weight: entry.bits_per_weight(),
            loss: None,
            repaired: 0,
        }
    }
}

/// Seconds and the rate at which `bytes` went by.
pub(super) fn pace(bytes: u64, time: Duration) -> String {
    let seconds = time.as_secs_f64();
    format!("{seconds:.2} s, {:.2} GB/s of source", bytes as f64 / 1e9 / seconds.max(1e-9))
}
