//! The registry of codecs.

use serde::Serialize;

use crate::codec::Codec;
use crate::fit::Fit;
use crate::layout::{Float, Grouped, Layout, Levels};

/// `tenpak.codecs/1`
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct Codecs {
    pub schema: &'static str,
    pub codecs: Vec<CodecRow>,
}

/// A codec, described.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct CodecRow {
    pub id: &'static str,
    pub levels: &'static str,
    pub bits: Option<u32>,
    pub group: Option<usize>,
    pub scale: Option<&'static str>,
    pub offset: Option<&'static str>,
    pub fit: &'static str,
    pub bits_per_weight: Option<f64>,
    pub memory_bits_per_weight: Option<f64>,
}

impl Codecs {
    /// The registry.
    #[must_use]
    pub fn new() -> Self {
        Self { schema: "tenpak.codecs/1", codecs: crate::codecs::all().iter().map(CodecRow::from).collect() }
    }
}

impl Default for Codecs {
    fn default() -> Self {
        Self::new()
    }
}

impl From<&Codec> for CodecRow {
    fn from(codec: &Codec) -> Self {
        let name = |f: Float| if f == Float::F16 { "F16" } else { "F32" };
        let (levels, grouped) = match &codec.layout {
            Layout::Raw => ("as stored", None),
            Layout::Grouped(g) => {
                let levels = match g.levels() {
                    Levels::Unsigned => "unsigned",
                    Levels::Signed => "signed",
                    Levels::ZeroPoint => "zero point",
                    Levels::Table(_) => "table",
                    Levels::Bank(_) => "bank",
                };
                (levels, Some(g))
            }
        };
        Self {
            id: codec.id,
            levels,
            bits: grouped.map(Grouped::bits),
            group: grouped.map(Grouped::group),
            scale: grouped.map(|g| if g.bank().is_some() { "U8" } else { name(g.scale()) }),
            offset: grouped.and_then(|g| g.offset()).map(name),
            fit: codec.fit.name(),
            bits_per_weight: codec.layout.bits_per_weight().filter(|_| codec.fit != Fit::Rate),
            memory_bits_per_weight: codec.layout.bits_per_weight(),
        }
    }
}
