//! `tenpak merge-index`: the parts of a directory into the directory.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;

use super::progress::Bar;
use super::report::{phrase, thousands};
use super::{Context, Outcome};
use crate::compress::merge;
use crate::error::Result;
use crate::report;

/// Put the parts that `tenpak compress --shard` wrote together: the directory that one process would have written
///
/// Shards are not read, only their heads are, so this takes seconds; `tenpak verify` checks every byte.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Directory of the parts; it takes their place
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

pub(super) fn run(arguments: &Arguments, context: &mut Context<'_>) -> Result<Outcome> {
    let start = Instant::now();
    let merged = {
        let bar = Bar::new(context.common, context.signals);
        merge(&arguments.directory, &mut |progress| bar.step(progress))?
    };
    let json = report::MergeIndex::new(&arguments.directory, &merged, start.elapsed().as_secs_f64());
    if context.json() {
        context.print_json(&json);
        return Ok(Outcome::Done);
    }
    for note in &json.notes {
        context.line(format!("note: {note}"));
    }
    let bytes = thousands(json.file_bytes);
    context.line(format!(
        "put {} parts together in {}: {bytes} bytes, {}",
        json.parts,
        json.output,
        phrase(&json.total)
    ));
    context.line(format!("identity {}", json.identity));
    Ok(Outcome::Done)
}
