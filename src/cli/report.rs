//! The pieces that text reports share: figures and tables.

use std::time::Duration;

use comfy_table::{CellAlignment, Table, presets};

use crate::measure::Distance;
use crate::report::Sizes;

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

/// Sizes as one phrase.
pub(super) fn phrase(sizes: &Sizes) -> String {
    format!(
        "{:.3} bits/weight, {:.2}x smaller than FP32, {:.2}x than 16-bit",
        sizes.bits_per_weight, sizes.x_vs_fp32, sizes.x_vs_16bit
    )
}

/// Seconds and the rate at which `bytes` went by.
pub(super) fn pace(bytes: u64, time: Duration) -> String {
    let seconds = time.as_secs_f64();
    format!("{seconds:.2} s, {:.2} GB/s of source", bytes as f64 / 1e9 / seconds.max(1e-9))
}
