//! `tenpak export`: an artifact in another form, its weights as they are stored, or for another engine.

use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, ValueEnum};

use super::progress::Bar;
use super::report::thousands;
use super::{Context, Input, Outcome};
use crate::codecs;
use crate::error::Result;
use crate::export::{Conversion, MAX_SHARD_BYTES, To, convert, exporting, plan};
use crate::report;

/// Write an artifact in another form, its weights as they are stored, or as the checkpoint of another engine
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
    /// From a checkpoint instead of an artifact: codec of the linear weights, instead of the engine's first that fits
    #[arg(long, value_name = "ID")]
    codec: Option<String>,
    /// Quantize anew what the engine has no exact layout for, from its decoded weights
    #[arg(long)]
    allow_requantize: bool,
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
    /// A Hugging Face directory of decoded weights
    Safetensors,
    /// compressed-tensors, for vLLM, SGLang and transformers: symmetric codes, or zero points
    CompressedTensors,
    /// GPTQ, for GPTQModel, vLLM, SGLang and transformers: symmetric codes in groups of 32 or more
    Gptq,
    /// AWQ, for vLLM, SGLang and transformers: 4-bit codes with zero points, or symmetric
    Awq,
    /// MLX, for Apple machines: 4 or 8 bits in groups of 32, 64 or 128
    Mlx,
    /// GGUF, one file for llama.cpp: symmetric codes, or 4 bits with offsets, in groups of 32 or more
    Gguf,
    /// ONNX, a directory with a graph of MatMulNBits for each matrix: 4 or 8 bits, symmetric or with zero points
    Onnx,
}

pub(super) fn run(arguments: &Arguments, context: &mut Context<'_>) -> Result<Outcome> {
    let input = arguments.input.path()?;
    let how = Conversion {
        to: match arguments.to {
            Target::Hf => To::Hf,
            Target::Tenpak => To::Tenpak,
            Target::Safetensors => To::Safetensors,
            Target::CompressedTensors => To::CompressedTensors,
            Target::Gptq => To::Gptq,
            Target::Awq => To::Awq,
            Target::Mlx => To::Mlx,
            Target::Gguf => To::Gguf,
            Target::Onnx => To::Onnx,
        },
        force: arguments.force,
        max_shard_bytes: arguments.max_shard_size,
        allow_requantize: arguments.allow_requantize,
    };
    let start = Instant::now();
    let codec = arguments.codec.as_deref().map(codecs::get).transpose()?;
    let exporting = {
        let bar = Bar::new(context.common, context.signals);
        exporting(input, context.access(), &arguments.output, &how, codec, &mut |progress| bar.step(progress))?
    };
    let artifact = &exporting.artifact;
    let exported = if arguments.dry_run {
        plan(artifact, &arguments.output, &how)?
    } else {
        let bar = Bar::new(context.common, context.signals);
        convert(artifact, &arguments.output, &how, &mut |progress| bar.step(progress))?
    };
    let seconds = (!arguments.dry_run).then(|| start.elapsed().as_secs_f64());
    let report = report::Export::new(input, &arguments.output, how.to, artifact, exported, seconds);
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
