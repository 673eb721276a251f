//! `tenpak export`: an artifact in another form, its weights as they are stored.

use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, ValueEnum};

use super::progress::Bar;
use super::report::thousands;
use super::{Context, Input, Outcome};
use crate::error::Result;
use crate::export::{Conversion, MAX_SHARD_BYTES, To, convert, plan};
use crate::report;

/// Write an artifact in another form, its weights as they are stored
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    input: Input,
    /// Form to write
    #[arg(long, value_enum)]
    to: Target,
    /// Directory or file to write
    #[arg(long, short)]
    output: PathBuf,
    /// Most bytes of one shard of a directory
    #[arg(long, default_value_t = MAX_SHARD_BYTES, value_name = "BYTES")]
    max_shard_size: u64,
    /// Print what would be written, to the byte, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// Replace an existing output
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Target {
    /// A Hugging Face directory: safetensors shards, config.json, tokenizer, model card
    Hf,
    /// One .tenpak file
    Tenpak,
}

pub(super) fn run(arguments: &Arguments, context: &mut Context<'_>) -> Result<Outcome> {
    let input = arguments.input.path()?;
    let artifact = context.artifact(input)?;
    let how = Conversion {
        to: match arguments.to {
            Target::Hf => To::Hf,
            Target::Tenpak => To::Tenpak,
        },
        force: arguments.force,
        max_shard_bytes: arguments.max_shard_size,
    };
    let start = Instant::now();
    let exported = if arguments.dry_run {
        plan(&artifact, &arguments.output, &how)?
    } else {
        let bar = Bar::new(context.common, context.signals);
        convert(&artifact, &arguments.output, &how, &mut |progress| bar.step(progress))?
    };
    let seconds = (!arguments.dry_run).then(|| start.elapsed().as_secs_f64());
    let report = report::Export::new(input, &arguments.output, how.to, &artifact, exported, seconds);
    if context.json() {
        context.print_json(&report);
        return Ok(Outcome::Done);
    }
    for note in &report.notes {
        context.line(format!("note: {note}"));
    }
    let verb = if report.dry_run { "would write" } else { "wrote" };
    for file in &report.files {
        context.line(format!("{verb} {}: {} bytes", file.path, thousands(file.bytes)));
    }
    context.line(format!("identity {}", report.identity));
    Ok(Outcome::Done)
}
