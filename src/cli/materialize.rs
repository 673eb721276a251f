//! `tenpak materialize`: base and deltas put together again.

use std::path::PathBuf;

use clap::Args;

use super::progress::Bar;
use super::report::thousands;
use super::{Context, Outcome};
use crate::artifact::delta::materialize;
use crate::error::Result;
use crate::report;

/// Put a base artifact and a chain of deltas together into one artifact
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Artifact that the first delta was made against
    #[arg(long)]
    base: PathBuf,
    /// Deltas, the first being that of the base
    #[arg(long = "delta", required = true, value_name = "DELTA")]
    deltas: Vec<PathBuf>,
    /// Artifact to write
    #[arg(long, short)]
    output: PathBuf,
    /// Replace an existing output
    #[arg(long)]
    force: bool,
}

pub(super) fn run(arguments: &Arguments, context: &mut Context<'_>) -> Result<Outcome> {
    let base = context.artifact(&arguments.base)?;
    let deltas = arguments.deltas.iter().map(|path| context.artifact(path)).collect::<Result<Vec<_>>>()?;
    let written = {
        let bar = Bar::new(context.common, context.signals);
        materialize(&base, &deltas, &arguments.output, arguments.force, &mut |p| bar.step(p))?
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
