//! `tenpak materialize`: base and deltas put together again.

use std::path::PathBuf;

use clap::Args;

use super::progress::Bar;
use super::report::thousands;
use super::{Context, Outcome};
use crate::artifact::delta::restore;
use crate::difference::Model;
use crate::error::Result;
use crate::limits::Limits;
use crate::report;

/// Put a base and a chain of deltas together: an artifact from an artifact, a checkpoint from a checkpoint
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Artifact or checkpoint that the first delta was made against
    #[arg(long)]
    base: PathBuf,
    /// Deltas, the first being that of the base
    #[arg(long = "delta", required = true, value_name = "DELTA")]
    deltas: Vec<PathBuf>,
    /// Artifact to write; of a checkpoint one file where the name ends in .safetensors, otherwise a directory, or with .tenpak
    /// an artifact of raw tensors
    #[arg(long, short)]
    output: PathBuf,
    /// Replace an existing output
    #[arg(long)]
    force: bool,
}

pub(super) fn run(arguments: &Arguments, context: &mut Context<'_>) -> Result<Outcome> {
    let base = Model::open(&arguments.base, context.access(), &Limits::DEFAULT)?;
    let deltas = arguments.deltas.iter().map(|path| context.artifact(path)).collect::<Result<Vec<_>>>()?;
    let written = {
        let bar = Bar::new(context.common, context.signals);
        restore(&base, &deltas, &arguments.output, arguments.force, &mut |p| bar.step(p))?
    };
    let report = report::Materialize::new(&arguments.output, &written);
    if context.json() {
        context.print_json(&report);
        return Ok(Outcome::Done);
    }
    context.line(format!("wrote {}: {} bytes", report.output, thousands(report.file_bytes)));
    context.line(format!("identity {}", report.identity));
    Ok(Outcome::Done)
}
