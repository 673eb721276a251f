//! GGUF, versions 2 and 3: a file of llama.cpp and whatever is built on it, or several that are one model.
//!
//! Tensors of the architectures whose names [`crate::gguf`] knows are what they are on Hugging Face: they get their names
//! there, rows of queries and keys that were reordered for rotary embeddings their old order, stacks of experts are taken
//! apart, matrices turned back, and norms that the file has one added to lose it again. Config and tokenizer follow
//! from the keys of the file; where they do not, there is none, and a note says why. Tensors that are not known keep the
//! names of the file.

mod header;
mod keys;
mod kind;
mod split;
mod tokenizer;

use std::io::Write as _;
use std::path::Path;

use header::Tensor;
use keys::Keys;
use kind::{Blocks, Kind};
use rayon::prelude::*;
use split::Part;

use super::packed::{Addends, Block, Levels, Matrix, Packed};
use super::rows::{Order, Store};
use super::{Options, Source, SourceFile, SourceTensor, quoted, side};
use crate::artifact::config::CONFIG;
use crate::error::{Error, Result, try_zeroed};
use crate::file::{Access, InputFile};
use crate::gguf::{self, Theirs};
use crate::limits;
use crate::tensor::{DType, TensorInfo};

/// What divides frequencies of positions; a config says it in fewer words.
const FACTORS: &str = "rope_freqs.weight";

/// Opens the file at `path`, with the others of its model.
pub(super) fn open(path: &Path, options: &Options) -> Result<Source> {
    let parts = split::open(path, options)?;
    let keys = Keys::new(&parts[0].header.keys);
    let all: Vec<&Tensor> = parts.iter().flat_map(|part| &part.header.tensors).collect();
    let factors = parts.iter().find_map(|part| factors(part).transpose()).transpose()?;
    let mut notes = Vec::new();
    let config = keys::config(keys, &all, factors.as_deref());
    let config =
        config.map_err(|why| notes.push(format!("no config.json follows from the keys of the file: {why}"))).ok();
    // Names of a form of the model that nobody could load would help nobody.
    let kind = keys.kind().filter(|kind| config.is_some() || !(kind.norms_add_one || kind.turns("")));
    let mut model = Model { keys, kind, options, shifted: Vec::new(), config: config.is_some() };
    let mut tensors = Vec::with_capacity(all.len());
    for (number, part) in parts.iter().enumerate() {
        for tensor in &part.header.tensors {
            model.tensor(tensor, part, number, &mut tensors).map_err(|e| e.in_file(part.file.path()))?;
        }
    }
    let mut attached = Vec::new();
    if let Some(config) = &config {
        attached.push((CONFIG, config.clone()));
        match tokenizer::files(keys) {
            Ok(files) => attached.extend(files),
            Err(why) => notes.push(format!("no tokenizer.json follows from the keys of the file: {why}")),
        }
    }
    let attached = attached
        .into_iter()
        .map(|(name, content)| {
            let text = serde_json::to_vec_pretty(&content);
            let text = text.map_err(|e| Error::invalid(format!("{name} cannot be printed: {e}")))?;
            side::made(path, name, &text)
        })
        .collect::<Result<_>>()?;
    let metadata = keys.general().map(|(key, text)| (format!("gguf.{key}"), text.to_owned())).collect();
    let spool = spool(path, &model.shifted)?;
    let files = parts.into_iter().map(|part| SourceFile::new(part.file)).collect();
    let source = Source::new(super::Kind::Gguf, files, tensors);
    Source { attached, spool, config, metadata, notes, ..source }.finish(&options.limits).map_err(|e| e.in_file(path))
}

/// What divides the frequencies of positions, where a part says so.
fn factors(part: &Part) -> Result<Option<Vec<f32>>> {
    let plain = |tensor: &&Tensor| tensor.name == FACTORS && tensor.kind == Kind::Plain(DType::F32);
    let Some(tensor) = part.header.tensors.iter().find(plain).filter(|tensor| tensor.shape.len() == 1) else {
        return Ok(None);
    };
    singles(&part.file, tensor).map(Some)
}

/// The elements of a vector of singles.
fn singles(file: &InputFile, tensor: &Tensor) -> Result<Vec<f32>> {
    let len = usize::try_from(tensor.row).map_err(|_| Error::corrupt(tensor.offset, "a row is larger than memory"))?;
    let bytes = file.read(tensor.offset, len)?;
    Ok(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}

/// A temporary file of these bytes, where there are any.
fn spool(path: &Path, bytes: &[u8]) -> Result<Option<InputFile>> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let io = |e| Error::io(path, e);
    let mut file = tempfile::tempfile().map_err(io)?;
    file.write_all(bytes).map_err(io)?;
    InputFile::from_file(path, file, Access::Read).map(Some)
}

/// What the tensors of a model have in common.
struct Model<'a> {
    keys: Keys<'a>,
    kind: Option<&'static gguf::Kind>,
    options: &'a Options,
    /// Vectors that lost the one that the file has added: as they will lie in a temporary file.
    shifted: Vec<u8>,
    /// Whether there is a config.
    config: bool,
}

impl Model<'_> {
    /// Adds a tensor of the file to those of the model, one or those that it is a stack of.
    fn tensor(&mut self, tensor: &Tensor, part: &Part, number: usize, out: &mut Vec<SourceTensor>) -> Result<()> {
        if self.config && tensor.name == FACTORS {
            return Ok(());
        }
        let theirs = self.kind.and_then(|kind| kind.hugging_face(&tensor.name));
        let own = || Theirs { name: tensor.name.clone(), turned: false, shifted: false, stacked: false };
        let Theirs { name, turned, shifted, stacked } = theirs.unwrap_or_else(own);
        if let (true, [count, rows, _]) = (stacked, &*tensor.shape) {
            limits::check("tensors of a checkpoint", self.options.limits.tensors, *count)?;
            for expert in 0..*count {
                // Inside the file, as the whole stack is.
                let offset = tensor.offset + expert * rows * tensor.row;
                let one = Tensor { name: name.replacen('*', &expert.to_string(), 1), offset, ..tensor.clone() };
                out.push(self.place(&Tensor { shape: tensor.shape[1..].to_vec(), ..one }, number, Order::C)?);
            }
            return Ok(());
        }
        let mut one = Tensor { name: name.clone(), ..tensor.clone() };
        // A matrix of one row is a vector there.
        if tensor.name.ends_with(".ffn_gate_inp_shexp.weight") && one.shape.len() == 1 {
            one.shape.insert(0, 1);
        }
        if shifted && one.shape.len() == 1 && one.kind == Kind::Plain(DType::F32) {
            let offset = self.shifted.len() as u64;
            self.shifted.extend(singles(&part.file, tensor)?.into_iter().flat_map(|w| (w - 1.0).to_le_bytes()));
            let info = TensorInfo::within(&self.options.limits, name, DType::F32, one.shape)?;
            out.push(SourceTensor::new(info, Store::Spool, offset, Order::C));
            return Ok(());
        }
        let order = match self.heads(&tensor.name)? {
            Some(heads) => reordered(tensor, heads)?,
            None if turned && one.shape.len() == 2 => {
                one.shape.reverse();
                Order::Fortran
            }
            None => Order::C,
        };
        out.push(self.place(&one, number, order)?);
        Ok(())
    }

    /// How many heads the rows of a tensor of the file are reordered in.
    fn heads(&self, name: &str) -> Result<Option<u64>> {
        let part = name.strip_prefix("blk.").and_then(|rest| rest.split('.').nth(1)).unwrap_or_default();
        if !self.kind.is_some_and(|kind| kind.reorders) || !matches!(part, "attn_q" | "attn_k") {
            return Ok(None);
        }
        let all = self.keys.own("attention.head_count");
        let own = self.keys.own("attention.head_count_kv").filter(|_| part == "attn_k").or(all);
        own.filter(|&heads| heads > 0).map(Some).ok_or_else(|| {
            let what = format!(
                "key {}.attention.head_count is missing, which says how rows of {} lie",
                self.keys.architecture,
                quoted(name)
            );
            Error::corrupt(0, what)
        })
    }

    /// A tensor where the file has it.
    fn place(&self, tensor: &Tensor, number: usize, order: Order) -> Result<SourceTensor> {
        let info = |dtype, shape| TensorInfo::within(&self.options.limits, tensor.name.clone(), dtype, shape);
        let place = |info| SourceTensor::new(info, Store::File(number), tensor.offset, order);
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
    }
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
