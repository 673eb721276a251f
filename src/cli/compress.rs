//! `tenpak compress`: a checkpoint into an artifact.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, ValueEnum};

use super::progress::Bar;
use super::report::{loss, pace, phrase, shape, table, thousands};
use super::{Context, Input, Outcome};
use crate::compress::{
    Options, Part, Progress, Quantized, Report, compress_as, compress_part, leftover, plan_as, plan_part,
};
use crate::error::{Error, Result};
use crate::export::MAX_SHARD_BYTES;
use crate::fit::outliers::Share;
use crate::fit::{MaxLoss, Rate};
use crate::location;
use crate::measure::Distance;
use crate::recipe::{Recipe, Request};
use crate::report::{self, Sizes};
use crate::stats::Stats;

/// Compress a checkpoint into an artifact
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    input: Input,
    /// Artifact to write: one file where the name ends in .tenpak, otherwise a Hugging Face directory
    #[arg(long, short, required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// Most bytes of one shard of a directory
    #[arg(long, default_value_t = MAX_SHARD_BYTES, value_name = "BYTES")]
    max_shard_size: u64,
    /// Write only what falls to process I of N, such as 3/8, into a part of the output; tenpak merge-index makes the
    /// directory whole when all N are there. The processes may run anywhere and in any order
    #[arg(long, value_name = "I/N", conflicts_with = "max_loss")]
    shard: Option<Part>,
    #[command(flatten)]
    choice: Choice,
    /// Statistics of the model's inputs, from `tenpak calibrate`
    #[arg(long, value_name = "FILE")]
    stats: Option<PathBuf>,
    /// What scales and codes are chosen by: the codec's own fit, least squared error, the same weighted by what flows in,
    /// least error of the layer's output, or column scales from the magnitudes of what flows in [default: with --stats gptq, or weighted without second moments; else codec]
    #[arg(long, value_parser = ["codec", "search", "weighted", "gptq", "awq"], value_name = "FIT", hide_possible_values = false)]
    fit: Option<String>,
    /// Entropy-code every plane that gets shorter by it: the same weights in a smaller file, decoded when it is opened
    /// instead of mapped
    #[arg(long)]
    coded: bool,
    /// What to do about NaN and infinities
    #[arg(long, value_parser = ["error", "zero", "clamp", "raw"], default_value = "error", value_name = "POLICY")]
    nonfinite: String,
    /// Print what would be written, to the byte (coded planes apart), from headers alone, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// Replace an existing output, and a journal of another run
    #[arg(long)]
    force: bool,
    /// Keep a journal of finished tensors beside the output (OUTPUT.journal), and go on with the one that a run with the same
    /// input and options has left when it was stopped, whatever stopped it; the output is the same, byte for byte
    #[arg(long)]
    resume: bool,
    /// Print every tensor, not only the sums per codec
    #[arg(long)]
    per_tensor: bool,
    /// Order of --per-tensor
    #[arg(long, value_enum, default_value_t = Sort::File)]
    sort: Sort,
}

/// Which codec for which tensor.
#[derive(Debug, Args)]
pub(super) struct Choice {
    /// Codec of the linear weights, see `tenpak codecs`, or a named recipe: awq_v10, awq_v60 [default: ecu_v1, at 4.5 bits
    /// where no size is asked for]
    #[arg(long, value_name = "ID", conflicts_with = "recipe")]
    codec: Option<String>,
    /// Bits per weight on disk of the tensors in ecu_v1, such as 4.25, embeddings and heads 1 more; in memory they take 8
    #[arg(long, value_name = "BITS")]
    target_bits: Option<Rate>,
    /// Size of the whole output, such as 4GiB or 900MB: the tensors in ecu_v1 get what the rest leaves
    #[arg(long, value_name = "SIZE", value_parser = bytes, conflicts_with = "target_bits")]
    target_size: Option<u64>,
    /// The most nMSE (squared error over squared weights) of the tensors in ecu_v1 together, such as 1e-3: the smallest file
    /// that keeps it
    #[arg(long, value_name = "NMSE", conflicts_with_all = ["target_bits", "target_size"])]
    max_loss: Option<MaxLoss>,
    /// Whether every tensor gets the same bits, or what its errors cost the model, by the squared gradients of --stats
    /// [default: gradients where there are any]
    #[arg(long, value_name = "HOW", value_parser = ["equal", "gradients"], hide_possible_values = false, conflicts_with = "max_loss")]
    allocate: Option<String>,
    /// TOML file of rules, or a named recipe, instead of --codec
    #[arg(long, value_name = "FILE")]
    recipe: Option<PathBuf>,
    /// Part of the weights with 4-bit codes to store by themselves, those that save most, such as 0.005
    #[arg(long, value_name = "PART")]
    outliers: Option<Share>,
    /// Another codec for a role: attention, mlp, linear, router, embedding, head
    #[arg(long, value_name = "ROLE=ID")]
    role: Vec<String>,
    /// Another codec for tensors that match a glob, or `re:` and a regular expression; the first rule that matches counts
    #[arg(long, value_name = "PATTERN=ID")]
    rule: Vec<String>,
    /// Quantize only tensors that match
    #[arg(long, value_name = "PATTERN")]
    include: Vec<String>,
    /// Keep tensors that match as they are
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<String>,
    /// Give every float tensor the codec, whatever its role
    #[arg(long)]
    all: bool,
    /// Where the checkpoint is quantized already: apply the choice above to its decoded weights, instead of refusing it. Without
    /// a choice such matrices are taken over as they are where a codec holds them, and decoded and kept raw elsewhere
    #[arg(long)]
    allow_requantize: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Sort {
    File,
    Name,
    Size,
    Loss,
}

impl Choice {
    /// The recipe, and the size that it is to be fitted to.
    /// What to do with a checkpoint that is quantized already comes third.
    pub fn recipe(&self, fit: Option<&str>) -> Result<(Recipe, Option<u64>, Quantized)> {
        let text = match &self.recipe {
            Some(path) => match path.to_str().filter(|name| Recipe::named(name).is_some()) {
                Some(name) if !path.exists() => Some(name.to_owned()),
                _ => Some(location::text(path)?),
            },
            None => None,
        };
        let request = Request {
            codec: self.codec.as_deref(),
            // A size says that some size is to be chosen, and so does any rate.
            target_bits: self.target_bits.or_else(|| self.target_size.map(|_| Rate::DEFAULT)),
            max_loss: self.max_loss,
            allocate: self.allocate.as_ref().map(|how| how == "gradients"),
            toml: text.as_deref().map(|text| (text, self.recipe.as_deref())),
            roles: split(&self.role, "--role", "attention=int4_g16_fp16_v1")?,
            rules: split(&self.rule, "--rule", "*.down_proj.weight=int8_sym_v1")?,
            include: &self.include,
            exclude: &self.exclude,
            all: self.all,
            fit,
            outliers: self.outliers,
        };
        let quantized = Quantized::wanted(request.asks(), self.allow_requantize);
        Ok((request.recipe()?, self.target_size, quantized))
    }
}

/// A number of bytes, with a unit of powers of 1000 or 1024.
fn bytes(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 9] = [
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("kB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
        ("B", 1),
    ];
    let text = text.trim();
    let unit = UNITS.iter().find_map(|(unit, size)| Some((text.strip_suffix(unit)?, *size)));
    let (number, size) = unit.unwrap_or((text, 1));
    let wrong = || format!("'{text}' is no size, expected one such as 4GiB, 900MB or 123456");
    if let Ok(whole) = number.trim().parse::<u64>() {
        return whole.checked_mul(size).filter(|bytes| *bytes < 1 << 62).ok_or_else(wrong);
    }
    let number: f64 = number.trim().parse().map_err(|_| wrong())?;
    let bytes = number * size as f64;
    if !(bytes >= 0.0 && bytes < (1_u64 << 62) as f64) {
        return Err(wrong());
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked above")]
    Ok(bytes as u64)
}

/// The two sides of the last equals sign of each pair; patterns may hold others.
fn split<'a>(pairs: &'a [String], option: &str, example: &str) -> Result<Vec<(&'a str, &'a str)>> {
    let wrong = |pair| Error::invalid(format!("{option} {pair}: expected the form {example}"));
    pairs.iter().map(|pair| pair.rsplit_once('=').ok_or_else(|| wrong(pair))).collect()
}

pub(super) fn run(arguments: &Arguments, context: &mut Context<'_>) -> Result<Outcome> {
    let input = arguments.input.path()?;
    let source = context.source(input)?;
    let (recipe, target_bytes, quantized) = arguments.choice.recipe(arguments.fit.as_deref())?;
    let quantized = match quantized {
        Quantized::Keep if arguments.stats.is_some() => Quantized::wanted(true, arguments.choice.allow_requantize),
        quantized => quantized,
    };
    let options = Options {
        target_bytes,
        coded: arguments.coded,
        resume: arguments.resume,
        ..Options::new(recipe, arguments.nonfinite.parse()?, arguments.force)
    };
    let access = context.source_options();
    let stats = arguments.stats.as_deref().map(|path| Stats::open(path, &access)).transpose()?;
    let options = options.with_stats(stats, arguments.fit.is_some(), &source)?.for_quantized(&source, quantized)?;
    let start = Instant::now();
    let most = arguments.max_shard_size;
    let report = match (&arguments.output, arguments.shard) {
        (Some(output), shard) if !arguments.dry_run => {
            // The report says so too, but at the end of what may be hours.
            if let Some(note) = leftover(output, shard).filter(|_| !arguments.resume) {
                context.warn(note);
            }
            let bar = Bar::new(context.common, context.signals);
            let step = &mut |progress: Progress<'_>| bar.step(progress);
            match shard {
                Some(part) => compress_part(&source, output, &options, most, part, step)?,
                None => compress_as(&source, output, &options, most, step)?,
            }
        }
        (output, Some(part)) => plan_part(&source, output.as_deref(), &options, most, part)?,
        (output, None) => plan_as(&source, output.as_deref(), &options, most)?,
    };
    let time = start.elapsed();
    let output = arguments.output.as_deref();
    let mut json = report::Compress::new(input, output, &source, &report, time.as_secs_f64());
    let order = order(&report, arguments.sort);
    if context.json() {
        json.tensors = order.iter().map(|&i| json.tensors[i].clone()).collect();
        context.print_json(&json);
        return Ok(Outcome::Done);
    }
    if arguments.per_tensor {
        context.line(per_tensor(&report, &order));
        context.line("");
    }
    context.line(per_codec(&report));
    context.line("");
    for note in &json.notes {
        context.line(format!("note: {note}"));
    }
    let verb = if json.dry_run { "would write" } else { "wrote" };
    let target = json.output.as_deref().unwrap_or("an artifact");
    context.line(format!("{verb} {target}: {} bytes, {}", thousands(json.file_bytes), phrase(&json.total)));
    if json.memory.bytes != json.tensors.iter().map(|t| t.stored_bytes).sum::<u64>() {
        context.line(format!("in memory {} bytes, {}", thousands(json.memory.bytes), phrase(&json.memory)));
    }
    if let [_, ..] = &*json.files {
        let name = |file: &report::File| file.path.rsplit(['/', '\\']).next().unwrap_or_default().to_owned();
        let names: Vec<_> = json.files.iter().map(name).collect();
        context.line(format!("{} files: {}", names.len(), names.join(", ")));
    } else if let [_, ..] = &*json.attached {
        let bytes = json.attached.iter().map(|file| file.bytes).sum();
        let names: Vec<_> = json.attached.iter().map(|file| &*file.name).collect();
        context.line(format!(
            "{} of these bytes are attached files, which the factors leave out: {}",
            thousands(bytes),
            names.join(", ")
        ));
    }
    if let Some(identity) = &json.identity {
        context.line(format!("from {} bytes in {}", thousands(json.source_bytes), pace(json.source_bytes, time)));
        context.line(format!("identity {identity}"));
    }
    Ok(Outcome::Done)
}

/// The tensors in the order asked for.
fn order(report: &Report, sort: Sort) -> Vec<usize> {
    let tensors = &report.tensors;
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    let nmse = |i: usize| tensors[i].distance.map_or(0.0, |d| d.nmse());
    match sort {
        Sort::File => {}
        Sort::Name => order.sort_by(|&a, &b| tensors[a].name.cmp(&tensors[b].name)),
        Sort::Size => order.sort_by_key(|&i| std::cmp::Reverse(tensors[i].stored_bytes)),
        Sort::Loss => order.sort_by(|&a, &b| nmse(b).total_cmp(&nmse(a))),
    }
    order
}

fn per_tensor(report: &Report, order: &[usize]) -> String {
    let rows = order.iter().map(|&i| {
        let t = &report.tensors[i];
        let sizes = Sizes::new(t.elements(), t.stored_bytes);
        let [nmse, snr, max] = loss(t.distance.as_ref());
        vec![
            t.name.clone(),
            t.codec.id.into(),
            t.reason.clone(),
            shape(&t.shape),
            thousands(t.stored_bytes),
            format!("{:.3}", sizes.bits_per_weight),
            format!("{:.3}", Sizes::new(t.elements(), t.memory_bytes).bits_per_weight),
            nmse,
            snr,
            max,
        ]
    });
    table(&["tensor", "codec", "why", "shape", "bytes", "bpw", "in memory", "nMSE", "SNR dB", "max error"], rows, 3)
}

fn per_codec(report: &Report) -> String {
    let mut sums: BTreeMap<&str, (u64, u64, u64, u64, Option<Distance>)> = BTreeMap::new();
    for t in &report.tensors {
        let (count, weights, bytes, memory, distance) = sums.entry(t.codec.id).or_default();
        *count += 1;
        *weights += t.elements();
        *bytes += t.stored_bytes;
        *memory += t.memory_bytes;
        if let Some(d) = &t.distance {
            distance.get_or_insert_default().merge(d);
        }
    }
    let rows = sums.into_iter().map(|(id, (count, weights, bytes, memory, distance))| {
        let [nmse, snr, max] = loss(distance.as_ref());
        vec![
            id.to_owned(),
            count.to_string(),
            thousands(weights),
            thousands(bytes),
            format!("{:.3}", Sizes::new(weights, bytes).bits_per_weight),
            format!("{:.3}", Sizes::new(weights, memory).bits_per_weight),
            nmse,
            snr,
            max,
        ]
    });
    table(&["codec", "tensors", "weights", "bytes", "bpw", "in memory", "nMSE", "SNR dB", "max error"], rows, 1)
}
