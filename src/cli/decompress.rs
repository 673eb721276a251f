//! `tenpak decompress`: an artifact back into a checkpoint.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;

use super::progress::Bar;
use super::report::thousands;
use super::{Context, Input, Outcome};
use crate::error::Result;
use crate::export::{Options, decompress};
use crate::report;

/// Decode an artifact into .safetensors, .npz, a JSON bundle (.json), or a directory of safetensors
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    input: Input,
    /// File or directory to write; the extension says what
    #[arg(long, short)]
    output: PathBuf,
    /// Dtype of the floating-point tensors, instead of that of the source: F32, F16, BF16, …
    #[arg(long)]
    dtype: Option<String>,
    /// Most bytes of one file of a directory
    #[arg(long, default_value_t = Options::default().max_shard_bytes, value_name = "BYTES")]
    max_shard_size: u64,
    /// Replace existing outputs
    #[arg(long)]
    force: bool,
}

pub(super) fn run(arguments: &Arguments, context: &mut Context<'_>) -> Result<Outcome> {
    let input = arguments.input.path()?;
    let artifact = context.artifact(input)?;
    let options = Options {
        dtype: arguments.dtype.as_deref().map(str::parse).transpose()?,
        force: arguments.force,
        max_shard_bytes: arguments.max_shard_size,
    };
    let start = Instant::now();
    let exported = {
        let bar = Bar::new(context.common, context.signals);
        decompress(&artifact, &arguments.output, &options, &mut |progress| bar.step(progress))?
    };
    let report = report::Decompress::new(input, exported, start.elapsed().as_secs_f64());
    if context.json() {
        context.print_json(&report);
        return Ok(Outcome::Done);
    }
    for note in &report.notes {
        context.line(format!("note: {note}"));
    }
    for file in &report.files {
        context.line(format!("wrote {}: {} bytes", file.path, thousands(file.bytes)));
    }
    Ok(Outcome::Done)
}
