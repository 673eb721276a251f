//! AWQ in the form `gemm`: what AutoAWQ writes.
//!
//! | tensor | dtype | shape |
//! |---|---|---|
//! | `qweight` | I32 | `[cols, rows / 8]`: nibble *j* of a word holds row `8 w + ORDER[j]` |
//! | `qzeros` | I32 | `[groups, rows / 8]`, in the same order |
//! | `scales` | F16, BF16 or F32 | `[groups, rows]` |

use serde_json::Value;

use super::block::{Block, floats};
use super::parts::{self, FLOATS, Parts, check, sides, wrong};
use super::{Addends, Levels, Matrix, Packed, Scheme, quoted};
use crate::error::{Error, Result, try_zeroed};
use crate::source::{Source, SourceTensor};
use crate::tensor::{DType, TensorInfo};

/// Which nibble of a word holds a row of eight.
const PLACE: [u32; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Rows of a word.
const ROWS: u64 = 8;

/// Opens every matrix of a checkpoint.
pub(super) fn open(config: &Value, parts: &mut Parts<'_>) -> Result<()> {
    let modules = parts.modules(".qweight");
    if modules.is_empty() {
        return Ok(());
    }
    let version = config.get("version").and_then(Value::as_str).unwrap_or("gemm");
    if !version.eq_ignore_ascii_case("gemm") {
        return Err(Error::unsupported(format!(
            "the checkpoint is in the form {} of AWQ, expected gemm; save it so with AutoAWQ",
            quoted(version)
        )));
    }
    let number = |key: &str| config.get(key).and_then(Value::as_i64);
    if let Some(bits) = number("bits").or_else(|| number("w_bit")).filter(|&bits| bits != 4) {
        return Err(Error::unsupported(format!("the config says AWQ of {bits} bits, expected 4")));
    }
    let group: Vec<i64> = number("group_size").or_else(|| number("q_group_size")).into_iter().collect();
    let zero_point = config.get("zero_point").and_then(Value::as_bool).unwrap_or(true);
    let levels: &[Levels] = if zero_point { &[Levels::ZeroPoint] } else { &[Levels::Signed, Levels::ZeroPoint] };
    for module in modules {
        let (info, packed) = matrix(module, &group, levels, parts)?;
        parts.put(module, &[".qweight", ".qzeros", ".scales"], info, packed);
    }
    Ok(())
}

/// A matrix whose parts agree.
fn matrix(module: &str, group: &[i64], levels: &[Levels], parts: &Parts<'_>) -> Result<(TensorInfo, Packed)> {
    let codes = parts.need(module, ".qweight")?;
    let [cols, words] = sides(codes, &[DType::I32])?;
    let rows = words.checked_mul(ROWS).ok_or_else(|| wrong(module, "it is larger than memory"))?;
    let zeros = parts.need(module, ".qzeros")?;
    let [groups, _] = sides(zeros, &[DType::I32])?;
    check(zeros, &[DType::I32], &[groups, words])?;
    let scales = parts.need(module, ".scales")?;
    check(scales, FLOATS, &[groups, rows])?;
    let group = parts::group(module, cols, groups, group)?;
    let schemes: Vec<_> = levels.iter().map(|&levels| parts::scheme(4, levels, group)).collect();
    let matrix = Awq {
        scheme: schemes[0],
        cols: usize::try_from(cols).map_err(|_| wrong(module, "a row is larger than memory"))?,
        codes: codes.turned(),
        zeros: zeros.turned(),
        scales: scales.turned(),
    };
    Ok((parts::logical(module, vec![rows, cols])?, Packed::new("awq", &schemes, cols, Box::new(matrix))))
}

/// A matrix; codes and zero points as matrices of one row for eight of its own.
#[derive(Debug)]
struct Awq {
    scheme: Scheme,
    cols: usize,
    codes: SourceTensor,
    zeros: SourceTensor,
    scales: SourceTensor,
}

impl Matrix for Awq {
    fn block(&self, source: &Source, first: u64, rows: u64) -> Result<Block> {
        let codes = nibbles(source, &self.codes, first, rows)?;
        let addends = Addends::ZeroPoints(nibbles(source, &self.zeros, first, rows)?);
        let scales = floats(self.scales.info().dtype(), &source.stored(&self.scales, first, rows)?);
        let group = Block::group_of(&self.scheme, self.cols);
        Ok(Block { bits: 4, cols: self.cols, group, codes, scales, addends, order: None })
    }
}

/// The numbers of rows of which eight share a word, row by row.
fn nibbles(source: &Source, words: &SourceTensor, first: u64, rows: u64) -> Result<Vec<u8>> {
    let (from, until) = (first / ROWS, (first + rows).div_ceil(ROWS));
    let bytes = source.stored(words, from, until - from)?;
    let too_large = |_| Error::invalid("the rows are larger than memory");
    let cols = usize::try_from(words.matrix().1).map_err(too_large)?;
    let mut out = try_zeroed(usize::try_from(rows).map_err(too_large)? * cols, || "codes of a matrix".to_owned())?;
    let row_bytes = 4 * cols;
    for (row, out) in (first..).zip(out.chunks_mut(cols.max(1))) {
        let line = usize::try_from(row / ROWS - from).map_err(too_large)?;
        let shift = 4 * PLACE[usize::try_from(row % ROWS).map_err(too_large)?];
        for (out, word) in out.iter_mut().zip(bytes[line * row_bytes..][..row_bytes].as_chunks::<4>().0) {
            *out = u8::try_from(u32::from_le_bytes(*word) >> shift & 15).unwrap_or(0);
        }
    }
    Ok(out)
}
