//! `tenpak delta`: what a variant has that its base does not.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::progress::Bar;
use super::report::{TensorJson, thousands};
use super::{Context, Input, Outcome};
use crate::artifact::delta::delta;
use crate::error::Result;

/// Store a variant checkpoint as its difference from a base artifact
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Artifact of the base model; its recipe is used for the variant
    #[arg(long)]
    base: PathBuf,
    #[command(flatten)]
    input: Input,
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

#[derive(Serialize)]
struct Json<'a> {
    schema: &'static str,
    base: String,
    input: String,
    output: String,
    epsilon: f64,
    changed: Vec<TensorJson<'a>>,
    unchanged: usize,
    file_bytes: u64,
    base_bytes: u64,
    result: String,
}

pub(super) fn run(arguments: &Arguments, context: &mut Context<'_>) -> Result<Outcome> {
    let base = context.artifact(&arguments.base)?;
    let input = arguments.input.path()?;
    let variant = context.source(input)?;
    let report = {
        let bar = Bar::new(context.common, context.signals);
        delta(&base, &variant, arguments.epsilon, &arguments.output, arguments.force, &mut |p| bar.step(p))?
    };
    if context.json() {
        context.print_json(&Json {
            schema: "tenpak.delta/1",
            base: arguments.base.display().to_string(),
            input: input.display().to_string(),
            output: arguments.output.display().to_string(),
            epsilon: arguments.epsilon,
            changed: report.changed.iter().map(TensorJson::from).collect(),
            unchanged: report.unchanged,
            file_bytes: report.file_bytes,
            base_bytes: report.base_bytes,
            result: report.result.to_string(),
        });
        return Ok(Outcome::Done);
    }
    context.line(format!("{} tensors changed, {} unchanged", report.changed.len(), report.unchanged));
    for t in &report.changed {
        context.line(format!("  {} in {}, {} bytes", t.name, t.codec.id, thousands(t.stored_bytes)));
    }
    context.line(format!(
        "wrote {}: {} bytes, {:.1} % of the base",
        arguments.output.display(),
        thousands(report.file_bytes),
        100.0 * report.file_bytes as f64 / report.base_bytes as f64
    ));
    context.line(format!("result   {}", report.result));
    Ok(Outcome::Done)
}
