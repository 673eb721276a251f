//! GGUF, versions 2 and 3: one file of llama.cpp and whatever is built on it.
//!
//! Tensors of the architectures whose names [`crate::gguf`] knows get their names on Hugging Face, and rows of queries and
//! keys that were reordered for rotary embeddings their old order; others, and those that the file has in another form than a
//! model (stacked experts, shifted norms, turned matrices), keep the names of the file. A config and a tokenizer the
//! file has only in keys of its own, which are not read.

mod header;
mod kind;

use std::path::Path;

use header::{Header, Value};
use kind::{Blocks, Kind};
use rayon::prelude::*;

use super::packed::{Addends, Block, Levels, Matrix, Packed};
use super::rows::{Order, Store};
use super::{Options, Source, SourceFile, SourceTensor, quoted};
use crate::error::{Error, Result, try_zeroed};
use crate::file::InputFile;
use crate::gguf;
use crate::tensor::{DType, TensorInfo};

/// Opens the file at `path`.
pub(super) fn open(path: &Path, options: &Options) -> Result<Source> {
    let file = InputFile::open(path, options.access)?;
    let tensors = read(&file, options).map_err(|e| e.in_file(path))?;
    let source = Source::new(super::Kind::Gguf, vec![SourceFile::new(file)], tensors);
    source.finish(&options.limits).map_err(|e| e.in_file(path))
}

/// The tensors of a file.
fn read(file: &InputFile, options: &Options) -> Result<Vec<SourceTensor>> {
    let header = Header::read(file, &options.limits)?;
    let number = |key: &str| match header.keys.get(key) {
        Some(Value::Integer(n)) => u64::try_from(*n).ok(),
        _ => None,
    };
    if number("split.count").is_some_and(|count| count > 1) {
        return Err(Error::unsupported(
            "the file is one of several parts of a model; put them together with llama-gguf-split --merge",
        ));
    }
    let architecture = match header.keys.get("general.architecture") {
        Some(Value::Text(name)) => name.as_str(),
        _ => "",
    };
    let known = gguf::KNOWN.iter().find(|kind| kind.name == architecture);
    let heads = |name: &str| -> Result<Option<u64>> {
        let part = name.strip_prefix("blk.").and_then(|rest| rest.split('.').nth(1)).unwrap_or_default();
        if !known.is_some_and(|kind| kind.reorders) || !matches!(part, "attn_q" | "attn_k") {
            return Ok(None);
        }
        let all = number(&format!("{architecture}.attention.head_count"));
        let own = number(&format!("{architecture}.attention.head_count_kv")).filter(|_| part == "attn_k").or(all);
        own.filter(|&heads| heads > 0).map(Some).ok_or_else(|| {
            let what = format!(
                "key {architecture}.attention.head_count is missing, which says how rows of {} lie",
                quoted(name)
            );
            Error::corrupt(0, what)
        })
    };
    header
        .tensors
        .iter()
        .map(|tensor| {
            let order = match heads(&tensor.name)? {
                Some(heads) => reordered(tensor, heads)?,
                None => Order::C,
            };
            let name = gguf::hugging_face(architecture, &tensor.name).unwrap_or_else(|| tensor.name.clone());
            let info = |dtype, shape| TensorInfo::within(&options.limits, name.clone(), dtype, shape);
            let place = |info| SourceTensor::new(info, Store::File(0), tensor.offset, order);
            let blocks = match tensor.kind {
                Kind::Plain(dtype) => return Ok(place(info(dtype, tensor.shape.clone())?)),
                Kind::Blocks(blocks) => blocks,
            };
            let logical = info(DType::F32, tensor.shape.clone())?;
            let (rows, cols) = logical.matrix();
            let bytes = place(info(DType::U8, vec![rows, tensor.row])?);
            let too_large = |_| Error::corrupt(tensor.offset, "a row is larger than memory");
            let matrix = Rows { blocks, cols: usize::try_from(cols).map_err(too_large)?, bytes: bytes.clone() };
            let packed = Packed::new(blocks.name, &[blocks.scheme], cols, Box::new(matrix));
            Ok(bytes.packed_as(logical, packed))
        })
        .collect()
}

/// The order of rows that lie by heads.
fn reordered(tensor: &header::Tensor, heads: u64) -> Result<Order> {
    let rows = tensor.shape.first().copied().unwrap_or(0);
    let half = rows / heads / 2;
    if tensor.shape.len() > 2 || half == 0 || half.checked_mul(2 * heads) != Some(rows) {
        return Err(Error::corrupt(
            tensor.offset,
            format!(
                "tensor {} of shape {:?} has no two halves of rows for each of {heads} heads",
                quoted(&tensor.name),
                tensor.shape
            ),
        ));
    }
    Ok(Order::Heads(half))
}

/// A quantized tensor; its blocks as a matrix of bytes.
#[derive(Debug)]
struct Rows {
    blocks: &'static Blocks,
    cols: usize,
    bytes: SourceTensor,
}

impl Matrix for Rows {
    fn block(&self, source: &Source, first: u64, rows: u64) -> Result<Block> {
        let Blocks { weights, bytes: size, scheme, .. } = *self.blocks;
        let bytes = source.stored(&self.bytes, first, rows)?;
        let (blocks, groups) = (bytes.len() / size, weights / scheme.group);
        let mut codes = try_zeroed(blocks * weights, || "codes of a matrix".to_owned())?;
        let (mut scales, mut offsets) = (vec![0.0; blocks * groups], vec![0.0; blocks * groups]);
        codes
            .par_chunks_mut(weights)
            .zip(scales.par_chunks_mut(groups))
            .zip(offsets.par_chunks_mut(groups))
            .zip(bytes.par_chunks(size))
            .for_each(|(((codes, scales), offsets), bytes)| self.blocks.read(bytes, codes, scales, offsets));
        let addends = match scheme.levels {
            Levels::Offset => Addends::Offsets(offsets),
            Levels::Table(table) => Addends::Table(table),
            _ => Addends::Middle,
        };
        Ok(Block { bits: scheme.bits, cols: self.cols, group: scheme.group, codes, scales, addends, order: None })
    }
}
