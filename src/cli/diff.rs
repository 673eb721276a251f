//! `tenpak diff`: two models, tensor by tensor.

use std::path::PathBuf;

use clap::Args;

use super::progress::Bar;
use super::report::{loss, plain, shape, table};
use super::{Context, Outcome};
use crate::difference::{Difference, Model, Side, Tensor, compare};
use crate::error::Result;
use crate::limits::Limits;
use crate::report::difference::{Diff, TensorRow};

/// Compare two models, artifacts or checkpoints, tensor by tensor; exits 0 when they are the same, 1 when they differ
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Artifact or checkpoint whose weights distances are relative to
    first: PathBuf,
    /// Artifact or checkpoint to compare with it
    second: PathBuf,
    /// List tensors that are the same too
    #[arg(long)]
    all: bool,
}

pub(super) fn run(arguments: &Arguments, context: &mut Context<'_>) -> Result<Outcome> {
    let open = |path| Model::open(path, context.access(), &Limits::DEFAULT);
    let (first, second) = (open(&arguments.first)?, open(&arguments.second)?);
    let found = {
        let bar = Bar::new(context.common, context.signals);
        compare(&first, &second, &mut |progress| bar.step(progress))?
    };
    let report = Diff::new(&arguments.first, &arguments.second, &found);
    let outcome = if report.same { Outcome::Done } else { Outcome::FoundWrong };
    if context.json() {
        context.print_json(&report);
        return Ok(outcome);
    }
    let rows: Vec<(&Tensor, &TensorRow)> = found.tensors.iter().zip(&report.tensors).collect();
    let same = rows.iter().filter(|(_, row)| row.status == "same").count();
    let listed = rows.iter().filter(|(_, row)| arguments.all || row.status != "same").map(|(tensor, row)| {
        let distance = if let Difference::Values(distance) = &tensor.difference { Some(distance) } else { None };
        let both = |of: fn(&Side) -> String| match (tensor.first.as_ref().map(of), tensor.second.as_ref().map(of)) {
            (Some(a), Some(b)) if a == b => a,
            (a, b) => format!("{} > {}", a.unwrap_or_else(|| "-".into()), b.unwrap_or_else(|| "-".into())),
        };
        let stored =
            both(|side| side.codec.filter(|id| *id != "raw_v1").unwrap_or(side.info.dtype().name()).to_owned());
        let mut cells = vec![plain(&row.name), row.status.to_owned(), stored, both(|side| shape(side.info.shape()))];
        cells.extend(loss(distance));
        cells
    });
    let listed: Vec<_> = listed.collect();
    if !listed.is_empty() {
        context.line(table(&["tensor", "differs in", "stored as", "shape", "nMSE", "SNR dB", "max error"], listed, 4));
    }
    if !found.metadata.is_empty() {
        context.line(format!("metadata that differ: {}", plain(&found.metadata.join(", "))));
    }
    context.line(format!("{same} of {} tensors are the same", rows.len()));
    Ok(outcome)
}
