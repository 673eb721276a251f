//! bitsandbytes: 4 bits (`nf4`, `fp4`) in blocks of the flat matrix, and 8 bits with a scale a row (LLM.int8).
//!
//! | tensor | dtype | what |
//! |---|---|---|
//! | `weight` | U8 | two codes a byte, the first one in the high bits |
//! | `weight.absmax` | F32, or U8 where scales are quantized too | one a block |
//! | `weight.quant_map` | F32 | the 16 levels |
//! | `weight.quant_state.bitsandbytes__nf4`, `…__fp4` | U8 | JSON: `blocksize`, `shape`; `nested_blocksize`, `nested_offset` |
//! | `weight.nested_absmax`, `weight.nested_quant_map` | F32 | scale = `map[absmax] * nested_absmax[block] + nested_offset` |
//!
//! and for 8 bits `weight` (I8), `SCB` (F32, one a row) and `weight_format`. There the scale is `SCB / 127`, rounded once.

use serde_json::Value;

use super::block::{Block, floats};
use super::parts::{self, Parts, check, sides, wrong};
use super::{Addends, Levels, Matrix, Packed};
use crate::error::{Error, Result, try_zeroed};
use crate::layout::{NF4, ROW};
use crate::source::{Source, SourceTensor};
use crate::tensor::{DType, TensorInfo};

/// Ends of the names of states, and what reports call them.
const STATES: [(&str, &str); 2] = [
    (".weight.quant_state.bitsandbytes__nf4", "bitsandbytes nf4"),
    (".weight.quant_state.bitsandbytes__fp4", "bitsandbytes fp4"),
];
/// Longer than any state.
const STATE_BYTES: u64 = 4096;

/// Opens every matrix of a checkpoint.
pub(super) fn open(parts: &mut Parts<'_>) -> Result<()> {
    for (end, format) in STATES {
        for module in parts.modules(end) {
            let (info, packed) = four_bits(module, end, format, parts)?;
            let own =
                [".weight", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map"];
            parts.put(module, &own, info, packed);
            parts.drop(module, end);
        }
    }
    for module in parts.modules(".SCB") {
        let codes = parts.need(module, ".weight")?;
        let [rows, cols] = sides(codes, &[DType::I8])?;
        let scales = parts.need(module, ".SCB")?;
        check(scales, &[DType::F32], &[rows])?;
        let scheme = parts::scheme(8, Levels::Signed, ROW);
        let cols_here = usize::try_from(cols).map_err(|_| wrong(module, "a row is larger than memory"))?;
        let matrix = EightBits { cols: cols_here, codes: codes.clone(), scales: scales.clone() };
        let packed = Packed::new("bitsandbytes int8", &[scheme], cols, Box::new(matrix));
        parts.put(module, &[".weight", ".SCB", ".weight_format"], parts::logical(module, vec![rows, cols])?, packed);
    }
    Ok(())
}

/// A matrix whose parts agree.
fn four_bits(module: &str, end: &str, format: &'static str, parts: &Parts<'_>) -> Result<(TensorInfo, Packed)> {
    let source = parts.source;
    let state = parts.need(module, end)?;
    if state.info().dtype() != DType::U8 || state.info().bytes() > STATE_BYTES {
        return Err(wrong(
            module,
            format!("its state is {} of {} bytes, expected JSON in U8", state.info().dtype(), state.info().bytes()),
        ));
    }
    let text = crate::source::rows::read_bytes(source.file_of(state), state, 0, state.info().bytes())?;
    let state: Value =
        serde_json::from_slice(&text).map_err(|e| wrong(module, format!("its state is no JSON: {e}")))?;
    let number = |key: &str| state.get(key).and_then(Value::as_u64).filter(|n| (1..1 << 32).contains(n));
    let need = |key: &str| number(key).ok_or_else(|| wrong(module, format!("its state has no number '{key}'")));
    let shape: Vec<u64> =
        state.get("shape").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_u64).collect();
    let &[rows, cols] = &shape[..] else {
        return Err(wrong(module, format!("its state says shape {shape:?}, expected a matrix")));
    };
    let info = parts::logical(module, shape.clone())?;
    let block = need("blocksize")?;
    let (codes, absmax) = (parts.need(module, ".weight")?, parts.need(module, ".weight.absmax")?);
    let bytes = info.elements().div_ceil(2);
    if codes.info().dtype() != DType::U8 || codes.info().bytes() != bytes || rows == 0 || cols == 0 {
        let (dtype, found) = (codes.info().dtype(), codes.info().bytes());
        return Err(wrong(
            module,
            format!("weight is {dtype} of {found} bytes, expected U8 of {bytes} for {rows} x {cols} codes"),
        ));
    }
    let blocks = info.elements().div_ceil(block);
    let nested = match absmax.info().dtype() {
        DType::U8 => {
            check(absmax, &[DType::U8], &[blocks])?;
            let (map, scales) =
                (parts.need(module, ".weight.nested_quant_map")?, parts.need(module, ".weight.nested_absmax")?);
            let per = need("nested_blocksize")?;
            check(map, &[DType::F32], &[256])?;
            check(scales, &[DType::F32], &[blocks.div_ceil(per)])?;
            let offset = state.get("nested_offset").and_then(Value::as_f64);
            let offset = offset.ok_or_else(|| wrong(module, "its state has no number 'nested_offset'"))?;
            #[expect(clippy::cast_possible_truncation, reason = "it was a single")]
            let offset = offset as f32;
            Some(Nested { map: floats(DType::F32, &source.stored(map, 0, 1)?), scales: scales.clone(), per, offset })
        }
        _ => {
            check(absmax, &[DType::F32], &[blocks])?;
            None
        }
    };
    let map = parts.need(module, ".weight.quant_map")?;
    check(map, &[DType::F32], &[16])?;
    let table = floats(DType::F32, &source.stored(map, 0, 1)?);
    let table: [f32; 16] = table.try_into().map_err(|_| wrong(module, "quant_map has no 16 levels"))?;
    let aligned = cols.is_multiple_of(block);
    let too_large = |_| wrong(module, "a row is larger than memory");
    let (group, cols_here) = (usize::try_from(block).map_err(too_large)?, usize::try_from(cols).map_err(too_large)?);
    let scheme = parts::scheme(4, Levels::Table(table), group);
    let matrix =
        FourBits { table, cols: cols_here, block, aligned, codes: codes.clone(), absmax: absmax.clone(), nested };
    let schemes = [scheme];
    let schemes = if aligned { &schemes[..] } else { &[] };
    let mut packed = Packed::new(format, schemes, cols, Box::new(matrix));
    if !aligned {
        packed.why = format!("its blocks of {block} do not divide rows of {cols}");
    } else if table != NF4 {
        "no codec has its 16 levels".clone_into(&mut packed.why);
    }
    Ok((info, packed))
}

/// Scales that are quantized too.
#[derive(Debug)]
struct Nested {
    map: Vec<f32>,
    scales: SourceTensor,
    per: u64,
    offset: f32,
}

/// A matrix of 4-bit codes.
#[derive(Debug)]
struct FourBits {
    table: [f32; 16],
    cols: usize,
    block: u64,
    /// Whether blocks do not cross rows.
    aligned: bool,
    codes: SourceTensor,
    absmax: SourceTensor,
    nested: Option<Nested>,
}

impl Matrix for FourBits {
    fn block(&self, source: &Source, first: u64, rows: u64) -> Result<Block> {
        let cols = self.cols as u64;
        let (from, until) = (first * cols, (first + rows) * cols);
        let count = usize::try_from(until - from).map_err(|_| Error::invalid("the rows are larger than memory"))?;
        let bytes = range(source, &self.codes, from / 2, until.div_ceil(2))?;
        let mut codes = try_zeroed(count, || "codes of a matrix".to_owned())?;
        for (at, code) in (from..).zip(&mut codes) {
            let byte = bytes[usize::try_from(at / 2 - from / 2).unwrap_or(usize::MAX)];
            *code = if at % 2 == 0 { byte >> 4 } else { byte & 15 };
        }
        let (low, high) = (from / self.block, until.div_ceil(self.block));
        let scales = self.scales(source, low, high.max(low))?;
        let (group, scales) = match self.aligned {
            true => (usize::try_from(self.block).unwrap_or(usize::MAX), scales),
            false => {
                let of = |at: u64| scales[usize::try_from(at / self.block - low).unwrap_or(usize::MAX)];
                (1, (from..until).map(of).collect())
            }
        };
        Ok(Block { bits: 4, cols: self.cols, group, codes, scales, addends: Addends::Table(self.table), order: None })
    }
}

impl FourBits {
    /// The scales of blocks.
    fn scales(&self, source: &Source, from: u64, until: u64) -> Result<Vec<f32>> {
        let Some(nested) = &self.nested else {
            return Ok(floats(DType::F32, &range(source, &self.absmax, 4 * from, 4 * until)?));
        };
        let codes = range(source, &self.absmax, from, until)?;
        let first = from / nested.per;
        let scales = floats(DType::F32, &range(source, &nested.scales, 4 * first, 4 * until.div_ceil(nested.per))?);
        let scale = |(at, &code): (u64, &u8)| {
            let outer = scales[usize::try_from(at / nested.per - first).unwrap_or(usize::MAX)];
            nested.map[usize::from(code)] * outer + nested.offset
        };
        Ok((from..).zip(codes.iter()).map(scale).collect())
    }
}

/// Bytes of a part.
fn range(source: &Source, part: &SourceTensor, from: u64, until: u64) -> Result<crate::file::Block> {
    crate::source::rows::read_bytes(source.file_of(part), part, from, until - from)
}

/// A matrix of 8-bit levels.
#[derive(Debug)]
struct EightBits {
    cols: usize,
    codes: SourceTensor,
    scales: SourceTensor,
}

impl Matrix for EightBits {
    fn block(&self, source: &Source, first: u64, rows: u64) -> Result<Block> {
        let levels = source.stored(&self.codes, first, rows)?;
        // Levels in two's complement.
        let codes = levels.iter().map(|level| level ^ 0x80).collect();
        let scales = floats(DType::F32, &range(source, &self.scales, 4 * first, 4 * (first + rows))?);
        let scales = scales.into_iter().map(|scale| scale / 127.0).collect();
        Ok(Block { bits: 8, cols: self.cols, group: self.cols, codes, scales, addends: Addends::Middle, order: None })
    }
}
