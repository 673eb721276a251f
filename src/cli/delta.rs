//! `tenpak delta`: what a variant has that its base does not.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use super::progress::Bar;
use super::report::thousands;
use super::{Context, Input, Outcome};
use crate::artifact::delta::{Mode, Request, create};
use crate::codecs;
use crate::difference::Model;
use crate::error::Result;
use crate::fit::Rate;
use crate::limits::Limits;
use crate::report;
use crate::stats::Stats;

/// Store a variant checkpoint as its difference from a base: an artifact or a checkpoint
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Artifact of the base model, whose recipe is then used for the variant; or its checkpoint
    #[arg(long)]
    base: PathBuf,
    #[command(flatten)]
    input: Input,
    /// Of an artifact the tensors that compress to something else; of a checkpoint what words differ in, or what weights do
    /// [default: changed for an artifact; for a checkpoint lossless, or quantized with --codec or --target-bits]
    #[arg(long, value_parser = ["changed", "lossless", "quantized"], hide_possible_values = false)]
    mode: Option<String>,
    /// Codec of quantized differences, see `tenpak codecs` [default: ecu_v1]
    #[arg(long, value_name = "ID")]
    codec: Option<String>,
    /// Bits per weight on disk of differences in ecu_v1, such as 1.5 [default: 4.5]
    #[arg(long, value_name = "BITS")]
    target_bits: Option<Rate>,
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
    let base = Model::open(&arguments.base, context.access(), &Limits::DEFAULT)?;
    let input = arguments.input.path()?;
    let variant = context.source(input)?;
    let stats = arguments.stats.as_deref().map(|path| Stats::open(path, &context.source_options())).transpose()?;
    let request = Request {
        mode: arguments.mode.as_deref().map(str::parse).transpose()?,
        codec: arguments.codec.as_deref().map(codecs::get).transpose()?,
        target_bits: arguments.target_bits,
        epsilon: arguments.epsilon,
        stats: stats.map(Arc::new),
    };
    let made = {
        let bar = Bar::new(context.common, context.signals);
        let (output, force) = (&arguments.output, arguments.force);
        create(&base, &variant, request, output, force, &mut |p| bar.step(p))?
    };
    let report = report::Delta::new(&arguments.base, input, &arguments.output, arguments.epsilon, &made);
    if context.json() {
        context.print_json(&report);
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
    context.line(format!(
        "variant  {} bytes, {:.2} times the delta; x {:.2} vs FP32, x {:.2} vs 16 bits",
        thousands(made.variant_bytes),
        made.variant_bytes as f64 / made.file_bytes as f64,
        report.total.x_vs_fp32,
        report.total.x_vs_16bit
    ));
    let said = |loss: &Option<report::Loss>, of_difference: Option<f64>| match loss {
        None if made.mode == Mode::Lossless => ", nothing lost".to_owned(),
        None => String::new(),
        Some(loss) => {
            let of = of_difference.map_or_else(String::new, |of| format!(", error {of:.3e} of the difference"));
            format!(", nMSE {:.3e}{of}", loss.nmse)
        }
    };
    context.line(format!(
        "delta    {} bytes{}",
        thousands(made.file_bytes),
        said(&report.loss, report.error_of_difference)
    ));
    let alone = &report.alone;
    context.line(format!("alone    {} bytes{}", thousands(alone.bytes), said(&alone.loss, alone.error_of_difference)));
    context.line(format!("result   {}", made.result));
    Ok(Outcome::Done)
}
