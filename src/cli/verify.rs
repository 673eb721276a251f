//! `tenpak verify`: reads all of an artifact and lists every damaged chunk.

use clap::Args;

use super::progress::Bar;
use super::report::thousands;
use super::{Context, Input, Outcome};
use crate::artifact::verify::verify;
use crate::compress::Progress;
use crate::error::Result;
use crate::report;

/// Check every byte of an artifact; exits 0 when it is sound, 1 when it is damaged, 2 when it cannot be read
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    input: Input,
}

pub(super) fn run(arguments: &Arguments, context: &mut Context<'_>) -> Result<Outcome> {
    let artifact = context.artifact(arguments.input.path()?)?;
    let total = artifact.header().content_bytes();
    let verified = {
        let bar = Bar::new(context.common, context.signals);
        verify(&artifact, |done| bar.step(Progress { done, total, tensor: "" }))?
    };
    let report = report::Verify::new(&artifact, verified);
    let outcome = if report.sound { Outcome::Done } else { Outcome::FoundWrong };
    if context.json() {
        context.print_json(&report);
        return Ok(outcome);
    }
    for p in &report.problems {
        let chunk = p.chunk.map_or_else(String::new, |chunk| format!(", chunk {chunk}"));
        let place = match (&p.tensor, p.plane, &p.file) {
            (Some(tensor), Some(plane), None) => format!(": tensor '{tensor}', plane {plane}"),
            (Some(tensor), Some(plane), Some(file)) => format!(" of {file}: tensor '{tensor}', plane {plane}"),
            (_, _, file) => format!(": file '{}'", file.as_deref().unwrap_or_default()),
        };
        context.line(format!("damaged at byte {}{place}{chunk}: {}", p.at, p.what));
    }
    let (chunks, bytes) = (thousands(report.chunks), thousands(report.bytes));
    if report.sound {
        context.line(format!("sound: {chunks} chunks, {bytes} bytes, identity {}", report.identity));
    } else {
        context.line(format!(
            "{} problems in {chunks} chunks, {bytes} bytes; fetch or write the file again",
            report.problems.len()
        ));
    }
    Ok(outcome)
}
