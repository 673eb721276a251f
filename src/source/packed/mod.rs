//! Matrices that another tool has quantized: one logical tensor each, named as the model names it, instead of the
//! tensors of codes and parameters that the checkpoint holds.
//!
//! Its dtype is F32 and its weights are what the format's formula gives in single precision, one rounding for each
//! product and one for the sum, whatever the dtype of the parameters:
//!
//! | levels | weight |
//! |---|---|
//! | signed | `(code - 2^(bits-1)) * scale` |
//! | zero point | `(code - zero_point) * scale` |
//! | offset | `code * scale + offset` |
//! | table | `table[code] * scale` |
//!
//! A codec of the registry whose layout has the same levels may hold such a matrix as it is. Headers say which ones come
//! into question; whether scales fit their stored type only the scales say, so each block of rows that is taken over is
//! decoded again and compared.
//!
//! | `quant_method` of the config | read |
//! |---|---|
//! | `compressed-tensors` | format `pack-quantized`, 4 and 8 bits |
//! | `gptq` | both versions, 2, 3, 4 and 8 bits; `auto-round` in that packing |
//! | `awq` | version `gemm`; `auto-round` in that packing |
//! | `bitsandbytes` | `nf4` and `fp4`, with scales quantized or not; LLM.int8 |
//! | none, but `quantization` with `group_size` | MLX, affine, 2, 3, 4, 5, 6 and 8 bits |

mod awq;
mod bitsandbytes;
mod block;
mod compressed_tensors;
mod gptq;
mod mlx;
mod parts;

use std::fmt;
use std::sync::Arc;

pub(super) use block::{Addends, Block};
use parts::Parts;
use serde_json::Value;

use super::{Source, SourceTensor, quoted};
use crate::codec::Codec;
use crate::codecs;
use crate::error::{Error, Result};
use crate::fit::Fit;
use crate::layout::{self, Float, Grouped, Layout, ROW};
use crate::tensor::{DType, TensorInfo};

/// Why no codec holds a matrix whose columns were quantized in another order.
const ACT_ORDER: &str = "its columns are not in the order of their groups (act order)";

/// How codes become levels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Levels {
    /// `code - 2^(bits-1)`
    Signed,
    /// `code - zero_point`
    ZeroPoint,
    /// `code`, and an offset is added.
    Offset,
    /// `table[code]`
    Table([f32; 16]),
}

/// What is common to all groups of a matrix.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Scheme {
    pub bits: u32,
    pub levels: Levels,
    /// Columns that share parameters; [`ROW`] for all of them.
    pub group: usize,
}

/// A matrix of another tool, opened.
pub(super) trait Matrix: fmt::Debug + Send + Sync {
    /// Codes and parameters of `rows` rows from `first` on.
    fn block(&self, source: &Source, first: u64, rows: u64) -> Result<Block>;
}

/// How a tensor is quantized already.
#[derive(Debug)]
pub struct Packed {
    format: &'static str,
    codecs: Vec<&'static Codec>,
    why: String,
    matrix: Box<dyn Matrix>,
}

/// Why a codec does not hold rows of a matrix as they are.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Unheld {
    /// Other weights would come back.
    Inexact(&'static str),
    /// Weights are NaN or infinite: the first one's place in the matrix, and how many.
    Nonfinite { index: u64, count: u64 },
}

impl Packed {
    /// A matrix that some of `schemes` describe, the first one that the registry has a codec for being the best.
    pub(super) fn new(format: &'static str, schemes: &[Scheme], cols: u64, matrix: Box<dyn Matrix>) -> Self {
        let mut codecs: Vec<&'static Codec> = Vec::new();
        for codec in schemes.iter().flat_map(|scheme| candidates(scheme, cols)) {
            if !codecs.iter().any(|known| known.layout == codec.layout) {
                codecs.push(codec);
            }
        }
        let why = schemes.first().map_or_else(String::new, |Scheme { bits, levels, group }| {
            let levels = match levels {
                Levels::Signed => "symmetric codes",
                Levels::ZeroPoint => "codes with zero points",
                Levels::Offset => "codes with offsets",
                Levels::Table(_) => "codes of a table",
            };
            let group = if *group == ROW { "one group a row".to_owned() } else { format!("groups of {group}") };
            format!("no codec holds {levels} of {bits} bits in {group}")
        });
        Self { format, codecs, why, matrix }
    }

    /// The name of the format that the matrix is quantized in.
    #[must_use]
    pub fn format(&self) -> &'static str {
        self.format
    }

    /// The codecs that may hold the matrix as it is, the best one first; which one does is known once its scales are read.
    #[must_use]
    pub fn codecs(&self) -> &[&'static Codec] {
        &self.codecs
    }

    /// Why there is no such codec.
    pub(crate) fn why(&self) -> &str {
        &self.why
    }

    /// The weights of whole rows, row by row, little-endian F32.
    pub(super) fn rows(&self, source: &Source, info: &TensorInfo, first: u64, rows: u64) -> Result<Vec<u8>> {
        let weights = self.weights(source, info, first, rows)?;
        let mut bytes =
            crate::error::try_zeroed(4 * weights.len(), || format!("rows of tensor {}", quoted(info.name())))?;
        crate::tensor::from_f32(DType::F32, &weights, &mut bytes)?;
        Ok(bytes)
    }

    /// The same for a range of bytes, whole weights or not.
    pub(super) fn bytes(&self, source: &Source, info: &TensorInfo, start: u64, bytes: u64) -> Result<Vec<u8>> {
        let (name, all) = (quoted(info.name()), info.bytes());
        if start.checked_add(bytes).is_none_or(|end| end > all) {
            return Err(Error::invalid(format!(
                "bytes {start} to {start}+{bytes} are wanted of tensor {name}, which has {all}"
            )));
        }
        if bytes == 0 {
            return Ok(Vec::new());
        }
        let row = info.matrix().1 * info.dtype().size();
        let first = start / row;
        let mut rows = self.rows(source, info, first, (start + bytes).div_ceil(row) - first)?;
        let too_large = |_| Error::invalid("the range exceeds the address space");
        let (skip, len) =
            (usize::try_from(start - first * row).map_err(too_large)?, usize::try_from(bytes).map_err(too_large)?);
        rows.truncate(skip + len);
        rows.drain(..skip);
        Ok(rows)
    }

    fn weights(&self, source: &Source, info: &TensorInfo, first: u64, rows: u64) -> Result<Vec<f32>> {
        check_rows(info, first, rows)?;
        let block = self.matrix.block(source, first, rows).map_err(|e| in_tensor(e, info))?;
        block.weights()
    }

    /// The planes of whole rows in one of the [`Packed::codecs`], or why that codec does not hold them.
    pub(super) fn planes(
        &self,
        source: &Source,
        info: &TensorInfo,
        codec: &'static Codec,
        (first, rows): (u64, u64),
    ) -> Result<Result<Vec<Vec<u8>>, Unheld>> {
        check_rows(info, first, rows)?;
        let block = self.matrix.block(source, first, rows).map_err(|e| in_tensor(e, info))?;
        let weights = block.weights()?;
        let odd = || weights.iter().enumerate().filter(|(_, w)| !w.is_finite());
        if let Some((at, _)) = odd().next() {
            let index = first * info.matrix().1 + at as u64;
            return Ok(Err(Unheld::Nonfinite { index, count: odd().count() as u64 }));
        }
        block.planes(codec, &weights)
    }
}

fn check_rows(info: &TensorInfo, first: u64, rows: u64) -> Result<()> {
    let (all, _) = info.matrix();
    if first.checked_add(rows).is_none_or(|end| end > all) {
        let name = quoted(info.name());
        return Err(Error::invalid(format!(
            "{rows} rows from row {first} on are wanted of tensor {name}, which has {all}"
        )));
    }
    Ok(())
}

/// Says which tensor an error of the data is about.
fn in_tensor(error: Error, info: &TensorInfo) -> Error {
    match error {
        Error::Unsupported(what) => Error::Unsupported(format!("tensor {}: {what}", quoted(info.name()))),
        other => other,
    }
}

/// The codecs that hold codes of this scheme where scales fit their type: that of its group first, then those with the
/// fewest scales, repeated, then the narrowest.
fn candidates(scheme: &Scheme, cols: u64) -> Vec<&'static Codec> {
    let fits = |own: &Grouped| {
        let levels = match (scheme.levels, own.levels(), own.offset()) {
            (Levels::Signed, layout::Levels::Signed, None) => scheme.bits == own.bits(),
            (Levels::ZeroPoint, layout::Levels::ZeroPoint, None) => scheme.bits <= own.bits(),
            (Levels::Offset, layout::Levels::Unsigned, Some(_)) => scheme.bits <= own.bits(),
            (Levels::Table(table), layout::Levels::Table(known), None) => scheme.bits == 4 && table == *known,
            _ => false,
        };
        let whole = scheme.group == ROW || scheme.group as u64 >= cols;
        levels
            && match own.group() {
                ROW => whole,
                group => whole || scheme.group.is_multiple_of(group),
            }
    };
    // A group as long as a row has one scale, whatever its length.
    let length = |layout: &Grouped| if layout.group() == ROW { u64::MAX } else { (layout.group() as u64).min(cols) };
    let mut found: Vec<(&'static Codec, &'static Grouped)> = codecs::all()
        .iter()
        .filter(|codec| codec.fit != Fit::Rate)
        .filter_map(|codec| match &codec.layout {
            Layout::Grouped(layout) if fits(layout) => Some((codec, layout)),
            _ => None,
        })
        .collect();
    let narrow = |layout: &Grouped| layout.scale() == Float::F16;
    let other = |layout: &Grouped| layout.group() != scheme.group;
    found
        .sort_by_key(|(_, layout)| (other(layout), std::cmp::Reverse(length(layout)), !narrow(layout), layout.group()));
    found.into_iter().map(|(codec, _)| codec).collect()
}

/// Puts logical tensors in the place of those that quantized matrices consist of, as the config says.
///
/// # Errors
/// [`Error::Invalid`] when a part is missing or does not fit the others, [`Error::Unsupported`] for what a format has
/// and is not read.
pub(super) fn understand(source: &mut Source) -> Result<()> {
    let Some(config) = source.config.clone() else { return Ok(()) };
    let quantization = config.get("quantization_config").unwrap_or(&Value::Null);
    let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or_default();
    let mut parts = Parts::new(source);
    match method {
        "compressed-tensors" => compressed_tensors::open(quantization, &mut parts)?,
        "gptq" => gptq::open(quantization, &mut parts)?,
        "awq" => awq::open(quantization, &mut parts)?,
        "bitsandbytes" => bitsandbytes::open(&mut parts)?,
        "auto-round" | "intel/auto-round" => match quantization.get("packing_format").and_then(Value::as_str) {
            Some("auto_round:auto_awq") => awq::open(quantization, &mut parts)?,
            _ => gptq::open(quantization, &mut parts)?,
        },
        // MLX names no method.
        "" => match config.get("quantization").or(Some(quantization)).filter(|own| own.get("group_size").is_some()) {
            Some(own) => mlx::open(own, &mut parts)?,
            None => return Ok(()),
        },
        _ => return Ok(()),
    }
    let understood = parts.understood();
    understood.apply(source);
    Ok(())
}

impl SourceTensor {
    /// A logical tensor in the place of the one that holds its codes.
    pub(super) fn packed_as(&self, info: TensorInfo, packed: Packed) -> Self {
        Self { info, place: self.place, transposed: false, packed: Some(Arc::new(packed)) }
    }
}
