//! `tenpak delta`: what a variant has that its base does not.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use super::progress::Bar;
use super::report::thousands;
use super::{Context, Input, Outcome};
use crate::artifact::delta::delta;
use crate::error::Result;
use crate::report;
use crate::stats::Stats;

/// Store a variant checkpoint as its difference from a base artifact
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Artifact of the base model; its recipe is used for the variant
    #[arg(long)]
    base: PathBuf,
    #[command(flatten)]
    input: Input,
    /// The statistics that the base was made with, where it was
    #[arg(long, value_name = "FILE")]
    stats: Option<PathBuf>,
    /// Delta to write
    #[arg(long, short)]
    output: PathBuf,
    /// Also take a tensor for unchanged when no decoded weight moves by more than this
    #[arg(long, default_value_t = 0.0)]
    epsilon: f64,
    /// Replace an existing output
    #[arg(long)]
    force: bool,
}

pub(super) fn run(arguments: &Arguments, context: &mut Context<'_>) -> Result<Outcome> {
    let base = context.artifact(&arguments.base)?;
    let input = arguments.input.path()?;
    let variant = context.source(input)?;
    let stats = arguments.stats.as_deref().map(|path| Stats::open(path, &context.source_options())).transpose()?;
    let stats = stats.map(Arc::new);
    let made = {
        let bar = Bar::new(context.common, context.signals);
        let (output, force) = (&arguments.output, arguments.force);
        delta(&base, &variant, arguments.epsilon, stats, output, force, &mut |p| bar.step(p))?
    };
    if context.json() {
        let (base, output) = (&arguments.base, &arguments.output);
        context.print_json(&report::Delta::new(base, input, output, arguments.epsilon, &made));
        return Ok(Outcome::Done);
    }
    context.line(format!("{} tensors changed, {} unchanged", made.changed.len(), made.unchanged));
    for t in &made.changed {
        context.line(format!("  {} in {}, {} bytes", t.name, t.codec.id, thousands(t.stored_bytes)));
    }
    context.line(format!(
        "wrote {}: {} bytes, {:.1} % of the base",
        arguments.output.display(),
        thousands(made.file_bytes),
        100.0 * made.file_bytes as f64 / made.base_bytes as f64
    ));
    context.line(format!("result   {}", made.result));
    Ok(Outcome::Done)
}
