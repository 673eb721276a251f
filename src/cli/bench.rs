//! `tenpak bench`: every codec on a checkpoint.

use clap::Args;
use serde::Serialize;

use super::progress::Bar;
use super::report::{loss, table};
use super::{Context, Input, Outcome};
use crate::bench::{Row, bench};
use crate::codecs;
use crate::error::Result;
use crate::gemm;
use crate::layout::Layout;
use crate::report::{Loss, Sizes};

/// Measure codecs on the linear weights of a checkpoint: bits/weight, sizes, loss, speed
#[derive(Debug, Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    input: Input,
    /// Codecs to measure; all of them when not given
    #[arg(long = "codec", value_name = "ID")]
    codecs: Vec<String>,
    /// Measure only tensors that match
    #[arg(long, value_name = "PATTERN")]
    include: Vec<String>,
    /// Leave tensors out that match
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<String>,
    /// Have a device decode and multiply the same weights: cpu, wgpu, wgpu:N, cuda or cuda:N, see `tenpak devices`
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
}

#[derive(Serialize)]
struct Json {
    schema: &'static str,
    input: String,
    threads: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<String>,
    codecs: Vec<RowJson>,
}

#[derive(Serialize)]
struct RowJson {
    codec: &'static str,
    tensors: usize,
    left_out: Vec<String>,
    size: Sizes,
    loss: Loss,
    encode_seconds: f64,
    encode_gb_per_s: f64,
    decode_seconds: f64,
    decode_gb_per_s: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<DeviceJson>,
}

#[derive(Serialize)]
struct DeviceJson {
    decode_seconds: f64,
    decode_gb_per_s: f64,
    product_seconds: f64,
    product_gb_per_s: f64,
}

pub(super) fn run(arguments: &Arguments, context: &mut Context<'_>) -> Result<Outcome> {
    let input = arguments.input.path()?;
    let device = arguments.device.as_deref().map(gemm::backend).transpose()?;
    let source = context.source(input)?;
    let measured = if arguments.codecs.is_empty() {
        codecs::all().iter().filter(|c| c.layout != Layout::Raw).collect()
    } else {
        arguments.codecs.iter().map(|id| codecs::get(id)).collect::<Result<Vec<_>>>()?
    };
    let narrow = |recipe: crate::recipe::Recipe| recipe.narrow(&arguments.include, &arguments.exclude);
    let rows = {
        let bar = Bar::new(context.common, context.signals);
        bench(&source, &measured, narrow, device.as_deref(), &mut |p| bar.step(p))?
    };
    let threads = rayon::current_num_threads();
    if context.json() {
        context.print_json(&Json {
            schema: "tenpak.bench/1",
            input: input.display().to_string(),
            threads,
            device: arguments.device.clone(),
            codecs: rows.iter().map(json).collect(),
        });
        return Ok(Outcome::Done);
    }
    let mut head = vec![
        "codec",
        "tensors",
        "bpw",
        "x vs FP32",
        "x vs 16-bit",
        "nMSE",
        "SNR dB",
        "max error",
        "encode GB/s",
        "decode GB/s",
    ];
    if device.is_some() {
        head.extend(["on device", "x · w"]);
    }
    let body = rows.iter().map(|row| {
        let json = json(row);
        let [nmse, snr, max] = loss(Some(&row.distance));
        let mut cells = vec![
            row.codec.id.to_owned(),
            row.tensors.to_string(),
            format!("{:.3}", json.size.bits_per_weight),
            format!("{:.2}", json.size.x_vs_fp32),
            format!("{:.2}", json.size.x_vs_16bit),
            nmse,
            snr,
            max,
            format!("{:.2}", json.encode_gb_per_s),
            format!("{:.2}", json.decode_gb_per_s),
        ];
        if let Some(device) = &json.device {
            cells.extend([device.decode_gb_per_s, device.product_gb_per_s].map(|rate| format!("{rate:.2}")));
        }
        cells
    });
    context.line(table(&head, body, 1));
    context.line("");
    for row in rows.iter().filter(|row| !row.left_out.is_empty()) {
        context.line(format!(
            "note: {}: {} tensors left out, their rows are shorter than the group or they are too small: {}",
            row.codec.id,
            row.left_out.len(),
            row.left_out.join(", ")
        ));
    }
    context
        .line(format!("{threads} threads; bpw are those of the planes; GB/s are of f32 weights, in and out of memory"));
    if let Some(name) = &arguments.device {
        context.line(format!(
            "on device: GB/s that {name} decodes, counted in the same way; x · w: GB/s of planes as it multiplies one row of \
             activations with them, in memory before and after"
        ));
    }
    Ok(Outcome::Done)
}

fn json(row: &Row) -> RowJson {
    let size = Sizes::new(row.weights, row.bytes);
    let rate = |seconds: f64| 4.0 * row.weights as f64 / 1e9 / seconds.max(1e-9);
    let (encode, decode) = (row.encode.as_secs_f64(), row.decode.as_secs_f64());
    RowJson {
        codec: row.codec.id,
        tensors: row.tensors,
        left_out: row.left_out.clone(),
        size,
        loss: Loss::from(&row.distance),
        encode_seconds: encode,
        encode_gb_per_s: rate(encode),
        decode_seconds: decode,
        decode_gb_per_s: rate(decode),
        device: row.device.map(|done| {
            let (decode, product) = (done.decode.as_secs_f64(), done.product.as_secs_f64());
            DeviceJson {
                decode_seconds: decode,
                decode_gb_per_s: rate(decode),
                product_seconds: product,
                product_gb_per_s: done.bytes as f64 / 1e9 / product.max(1e-9),
            }
        }),
    }
}
