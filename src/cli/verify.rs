//! `tenpak verify`: reads all of an artifact and lists every damaged chunk.

use clap::Args;
use serde::Serialize;

use super::progress::Bar;
use super::report::thousands;
use super::{Context, Input, Outcome};
use crate::artifact::verify::verify;
use crate::compress::Progress;
use crate::error::Result;

/// Check every byte of an artifact; exits 0 when it is sound, 1 when it is damaged, 2 when it cannot be read
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    input: Input,
}

#[derive(Serialize)]
struct Json {
    schema: &'static str,
    input: String,
    sound: bool,
    identity: String,
    chunks: u64,
    bytes: u64,
    problems: Vec<ProblemJson>,
}

#[derive(Serialize)]
struct ProblemJson {
    tensor: String,
    plane: &'static str,
    chunk: Option<u64>,
    at: u64,
    what: String,
}

pub(super) fn run(arguments: &Arguments, context: &mut Context<'_>) -> Result<Outcome> {
    let artifact = context.artifact(arguments.input.path()?)?;
    let total = artifact.tensors().iter().map(crate::artifact::Entry::stored_bytes).sum();
    let verified = {
        let bar = Bar::new(context.common, context.signals);
        verify(&artifact, |done| bar.step(Progress { done, total, tensor: "" }))?
    };
    let sound = verified.problems.is_empty();
    let outcome = if sound { Outcome::Done } else { Outcome::FoundWrong };
    let identity = artifact.header().identity().to_string();
    if context.json() {
        let problem = |p: crate::artifact::verify::Problem| ProblemJson {
            tensor: p.tensor,
            plane: p.plane,
            chunk: p.chunk,
            at: p.at,
            what: p.what,
        };
        context.print_json(&Json {
            schema: "tenpak.verify/1",
            input: artifact.file().path().display().to_string(),
            sound,
            identity,
            chunks: verified.chunks,
            bytes: verified.bytes,
            problems: verified.problems.into_iter().map(problem).collect(),
        });
        return Ok(outcome);
    }
    for p in &verified.problems {
        let chunk = p.chunk.map_or_else(String::new, |chunk| format!(", chunk {chunk}"));
        context.line(format!("damaged at byte {}: tensor '{}', plane {}{chunk}: {}", p.at, p.tensor, p.plane, p.what));
    }
    let (chunks, bytes) = (thousands(verified.chunks), thousands(verified.bytes));
    if sound {
        context.line(format!("sound: {chunks} chunks, {bytes} bytes, identity {identity}"));
    } else {
        context.line(format!(
            "{} problems in {chunks} chunks, {bytes} bytes; fetch or write the file again",
            verified.problems.len()
        ));
    }
    Ok(outcome)
}
