//! `tenpak codecs`: the registry as a table.

use clap::Args;

use super::report::table;
use super::{Context, Outcome};
use crate::codecs;
use crate::fit::{Fit, Rate};
use crate::layout::ROW;
use crate::report::Codecs;

/// List the codecs of this build
#[derive(Debug, Args)]
pub(super) struct Arguments {}

pub(super) fn run(context: &mut Context<'_>) -> Outcome {
    let report = Codecs::new();
    if context.json() {
        context.print_json(&report);
        return Outcome::Done;
    }
    let dash = || "-".to_owned();
    let rows = report.codecs.into_iter().map(|c| {
        let any = codecs::get(c.id).is_ok_and(|codec| codec.fit == Fit::Rate);
        let bits = if any { Some(Rate::DEFAULT.bits()) } else { c.bits_per_weight };
        let factor = |base: f64| bits.map_or_else(dash, |bits| format!("{:.2}", base / bits));
        let group = match c.group {
            Some(ROW) => "row".to_owned(),
            Some(group) => group.to_string(),
            None => dash(),
        };
        vec![
            c.id.to_owned(),
            c.levels.to_owned(),
            group,
            c.scale.map_or_else(dash, str::to_owned),
            c.offset.map_or_else(dash, str::to_owned),
            c.fit.to_owned(),
            match bits {
                Some(bits) if any => format!("any ({bits:.3})"),
                Some(bits) => format!("{bits:.3}"),
                None => "source".to_owned(),
            },
            factor(32.0),
            factor(16.0),
            c.memory_bits_per_weight.map_or_else(|| "source".to_owned(), |bits| format!("{bits:.3}")),
        ]
    });
    let head =
        ["codec", "levels", "group", "scale", "offset", "fit", "bits/weight", "x vs FP32", "x vs 16-bit", "in memory"];
    context.line(table(&head, rows, 6));
    Outcome::Done
}
