//! `tenpak codecs`: the registry as a table.

use clap::Args;
use serde::Serialize;

use super::report::table;
use super::{Context, Outcome};
use crate::codec::Codec;
use crate::codecs;
use crate::layout::{Float, Layout, Levels, ROW};

/// List the codecs of this build
#[derive(Debug, Args)]
pub(super) struct Arguments {}

#[derive(Serialize)]
struct Json {
    schema: &'static str,
    codecs: Vec<CodecJson>,
}

#[derive(Serialize)]
struct CodecJson {
    id: &'static str,
    levels: &'static str,
    bits: Option<u32>,
    /// 0 for a whole row.
    group: Option<usize>,
    scale: Option<&'static str>,
    offset: Option<&'static str>,
    fit: String,
    bits_per_weight: Option<f64>,
}

pub(super) fn run(context: &mut Context<'_>) -> Outcome {
    let described: Vec<CodecJson> = codecs::all().iter().map(describe).collect();
    if context.json() {
        context.print_json(&Json { schema: "tenpak.codecs/1", codecs: described });
        return Outcome::Done;
    }
    let dash = || "-".to_owned();
    let rows = described.into_iter().map(|c| {
        let factor = |base: f64| c.bits_per_weight.map_or_else(dash, |bits| format!("{:.2}", base / bits));
        let group = match c.group {
            Some(ROW) => "row".to_owned(),
            Some(group) => group.to_string(),
            None => dash(),
        };
        vec![
            c.id.to_owned(),
            c.levels.to_owned(),
            group,
            c.scale.map_or_else(dash, str::to_owned),
            c.offset.map_or_else(dash, str::to_owned),
            c.fit.clone(),
            c.bits_per_weight.map_or_else(|| "source".to_owned(), |bits| format!("{bits:.3}")),
            factor(32.0),
            factor(16.0),
        ]
    });
    let head = ["codec", "levels", "group", "scale", "offset", "fit", "bits/weight", "x vs FP32", "x vs 16-bit"];
    context.line(table(&head, rows, 6));
    Outcome::Done
}

fn describe(codec: &Codec) -> CodecJson {
    let name = |f: Float| if f == Float::F16 { "F16" } else { "F32" };
    let (levels, grouped) = match &codec.layout {
        Layout::Raw => ("as stored", None),
        Layout::Grouped(g) => {
            let levels = match g.levels() {
                Levels::Unsigned => "unsigned",
                Levels::Signed => "signed",
                Levels::ZeroPoint => "zero point",
                Levels::Table(_) => "table",
            };
            (levels, Some(g))
        }
    };
    CodecJson {
        id: codec.id,
        levels,
        bits: grouped.map(crate::layout::Grouped::bits),
        group: grouped.map(crate::layout::Grouped::group),
        scale: grouped.map(|g| name(g.scale())),
        offset: grouped.and_then(|g| g.offset()).map(name),
        fit: codec.fit.name().to_owned(),
        bits_per_weight: codec.layout.bits_per_weight(),
    }
}
