//! `tenpak plan`: what a model would take and lose, before anything is written.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;

use super::progress::Bar;
use super::report::{table, thousands};
use super::{Context, Input, Outcome};
use crate::codecs;
use crate::compress::{Nonfinite, Options, Quantized, frontier};
use crate::error::Result;
use crate::fit::Rate;
use crate::recipe::Recipe;
use crate::report;
use crate::stats::Stats;

/// Rates that are always shown, in thousandths of a bit.
const RATES: [u32; 12] = [2500, 3000, 3500, 4000, 4250, 4500, 5000, 5500, 6000, 6500, 7000, 8000];

/// Predict sizes and losses of a checkpoint at many rates and in every codec, and write nothing
///
/// Matrices are sampled, so figures of loss are predictions; sizes are those that `compress` gives: exact for codecs of a
/// fixed size, and for ecu_v1 what is asked for, which it reaches from below as far as 8-bit codes can use it.
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    input: Input,
    /// Bits per weight on disk for which every matrix is listed
    #[arg(long, value_name = "BITS")]
    target_bits: Option<Rate>,
    /// Statistics of `tenpak calibrate --fisher`: they predict the KL divergence and deal bits out to tensors
    #[arg(long, value_name = "FILE")]
    stats: Option<PathBuf>,
    /// Count only tensors that match
    #[arg(long, value_name = "PATTERN")]
    include: Vec<String>,
    /// Leave tensors out that match
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<String>,
}

pub(super) fn run(arguments: &Arguments, context: &mut Context<'_>) -> Result<Outcome> {
    let input = arguments.input.path()?;
    let source = context.source(input)?;
    let narrow = |recipe: Recipe| recipe.narrow(&arguments.include, &arguments.exclude);
    let recipe = narrow(Recipe::new(codecs::get(codecs::ANY_RATE)?))?;
    let recipe = recipe.target_bits(arguments.target_bits.unwrap_or(Rate::DEFAULT));
    let access = context.source_options();
    let stats = arguments.stats.as_deref().map(|path| Stats::open(path, &access)).transpose()?;
    // Nothing is written, so nothing is quantized again.
    let options = Options { quantized: Quantized::Anew, ..Options::new(recipe, Nonfinite::Zero, false) };
    let options = options.with_stats(stats, false, &source)?;
    let rates = RATES.iter().map(|&rate| Rate::from_thousandths(rate)).collect::<Result<Vec<_>>>()?;
    let start = Instant::now();
    let found = {
        let bar = Bar::new(context.common, context.signals);
        frontier(&source, &options, &rates, narrow, &mut |p| bar.step(p))?
    };
    let json = report::Plan::new(input, &found, start.elapsed().as_secs_f64());
    if context.json() {
        context.print_json(&json);
        return Ok(Outcome::Done);
    }
    let bits = |rate: Option<f64>| rate.map_or_else(|| "-".to_owned(), |rate| rate.to_string());
    let rows = json.points.iter().map(|p| {
        vec![
            p.codec.to_owned(),
            bits(p.target_bits),
            thousands(p.file_bytes),
            format!("{:.3}", p.matrices.bits_per_weight),
            format!("{:.3}", p.memory_bits_per_weight),
            format!("{:.3e}", p.nmse),
            p.kl.map_or_else(|| "-".to_owned(), |kl| format!("{kl:.3e}")),
        ]
    });
    context.line(table(&["codec", "asked", "file bytes", "bpw", "in memory", "nMSE", "KL"], rows, 1));
    context.line("");
    if arguments.target_bits.is_some() {
        let rows = json
            .tensors
            .iter()
            .map(|t| vec![t.name.clone(), thousands(t.weights), t.target_bits.to_string(), format!("{:.3e}", t.nmse)]);
        context.line(table(&["tensor", "weights", "bpw", "nMSE"], rows, 1));
        context.line("");
    }
    let weights = json.tensors.iter().map(|t| t.weights).sum();
    context.line(format!(
        "{} matrices of {} weights; nMSE and KL are predicted, from samples of their rows, in {:.1} s",
        json.tensors.len(),
        thousands(weights),
        json.seconds
    ));
    Ok(Outcome::Done)
}
