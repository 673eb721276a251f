//! compressed-tensors, `pack-quantized`: what llm-compressor and vLLM write.
//!
//! | tensor | dtype | shape |
//! |---|---|---|
//! | `weight_packed` | I32 | `[rows, ceil(cols * bits / 32)]`, low bits first, code = level + 2^(bits-1) |
//! | `weight_scale` | F16, BF16 or F32 | `[rows, groups]` |
//! | `weight_shape` | I64 or I32 | `[2]`: rows and columns |
//! | `weight_zero_point` (asymmetric) | I32, packed along the rows; I8 in old files | `[ceil(rows * bits / 32), groups]`, `[rows, groups]` |
//! | `weight_g_idx` (act order) | I32 | `[cols]`, the group of each column |

use std::sync::Arc;

use serde_json::Value;

use super::block::{Block, floats, unpack, unpack_along, words_along};
use super::parts::{self, FLOATS, Parts, check, sides, wrong};
use super::{Addends, Levels, Matrix, Packed, Scheme};
use crate::error::{Error, Result};
use crate::source::{Source, SourceTensor};
use crate::tensor::DType;

const FORMAT: &str = "pack-quantized";

/// Opens every matrix of a checkpoint.
pub(super) fn open(config: &Value, parts: &mut Parts<'_>) -> Result<()> {
    let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
    let groups: Vec<&Value> =
        config.get("config_groups").and_then(Value::as_object).map_or(Vec::new(), |groups| groups.values().collect());
    let own = text(config, "format").unwrap_or_default();
    if own != FORMAT && !groups.iter().any(|group| text(group, "format").as_deref() == Some(FORMAT)) {
        return Ok(());
    }
    if let Some(other) = groups.iter().filter_map(|group| text(group, "format")).find(|format| format != FORMAT) {
        return Err(Error::unsupported(format!(
            "the checkpoint has matrices in the formats {FORMAT} and {} of compressed-tensors, of which only the first is \
             read; quantize all of them alike",
            super::quoted(&other)
        )));
    }
    let weights: Vec<&Value> = groups.iter().filter_map(|group| group.get("weights")).collect();
    let numbers = |key: &str| weights.iter().filter_map(|w| w.get(key)?.as_i64()).collect::<Vec<_>>();
    let (bits, mut sizes) = (numbers("num_bits"), numbers("group_size"));
    if weights.iter().any(|w| text(w, "strategy").as_deref() != Some("group")) {
        sizes.push(-1);
    }
    for module in parts.modules(".weight_packed") {
        let (info, packed) = matrix(module, &bits, &sizes, parts)?;
        let ends = [".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx"];
        parts.put(module, &ends, info, packed);
    }
    Ok(())
}

/// A matrix whose parts agree.
fn matrix(module: &str, bits: &[i64], sizes: &[i64], parts: &Parts<'_>) -> Result<(crate::tensor::TensorInfo, Packed)> {
    let codes = parts.need(module, ".weight_packed")?;
    let [rows, words] = sides(codes, &[DType::I32])?;
    let shape = parts.need(module, ".weight_shape")?;
    check(shape, &[DType::I64, DType::I32], &[2])?;
    let cols = match numbers(parts.source, shape)?[..] {
        [own, cols] if u64::try_from(own) == Ok(rows) => u64::try_from(cols).ok().filter(|&cols| cols > 0),
        _ => None,
    };
    let cols = cols.ok_or_else(|| {
        wrong(module, format!("{module}.weight_shape does not say a matrix of {rows} rows, which weight_packed has"))
    })?;
    let fits = |bits: u32| cols.checked_mul(u64::from(bits)).is_some_and(|all| all.div_ceil(32) == words);
    let width = [4, 8].into_iter().find(|&width| fits(width) && bits.contains(&i64::from(width)));
    let bits = width.ok_or_else(|| {
        wrong(
            module,
            format!(
                "{words} words hold no row of {cols} codes of {bits:?} bits, as the config says; 4 and 8 bits are read"
            ),
        )
    })?;
    let scale = parts.need(module, ".weight_scale")?;
    let [own, groups] = sides(scale, FLOATS)?;
    if own != rows {
        return Err(wrong(module, format!("{own} rows of scales for {rows} rows of codes")));
    }
    let group = parts::group(module, cols, groups, sizes)?;
    let zeros = parts.find(module, ".weight_zero_point");
    if let Some(zeros) = zeros {
        match zeros.info().dtype() {
            DType::I8 => check(zeros, &[DType::I8], &[rows, groups])?,
            _ => check(zeros, &[DType::I32], &[(rows * u64::from(bits)).div_ceil(32), groups])?,
        }
    }
    let order = parts.find(module, ".weight_g_idx").map(|index| order(parts.source, index, cols, groups, group));
    let levels = if zeros.is_some() { Levels::ZeroPoint } else { Levels::Signed };
    let scheme = parts::scheme(bits, levels, group);
    let order = order.transpose()?.flatten();
    let schemes = if order.is_none() { vec![scheme] } else { Vec::new() };
    let matrix = PackQuantized {
        scheme,
        cols: usize::try_from(cols).map_err(|_| wrong(module, "a row is larger than memory"))?,
        codes: codes.clone(),
        scale: scale.clone(),
        zeros: zeros.cloned(),
        order: order.clone(),
    };
    let mut packed = Packed::new("compressed-tensors", &schemes, cols, Box::new(matrix));
    if order.is_some() {
        packed.why = super::ACT_ORDER.to_owned();
    }
    Ok((parts::logical(module, vec![rows, cols])?, packed))
}

/// All numbers of a short tensor of integers.
pub(super) fn numbers(source: &Source, tensor: &SourceTensor) -> Result<Vec<i64>> {
    let bytes = source.stored(tensor, 0, tensor.matrix().0)?;
    Ok(match tensor.info().dtype() {
        DType::I64 => bytes.as_chunks::<8>().0.iter().map(|n| i64::from_le_bytes(*n)).collect(),
        _ => bytes.as_chunks::<4>().0.iter().map(|n| i64::from(i32::from_le_bytes(*n))).collect(),
    })
}

/// The group of each column, unless that is what their order says.
pub(super) fn order(
    source: &Source,
    index: &SourceTensor,
    cols: u64,
    groups: u64,
    group: usize,
) -> Result<Option<Arc<[u32]>>> {
    check(index, &[DType::I32, DType::I64], &[cols])?;
    let numbers = numbers(source, index)?;
    if numbers.iter().all(|&n| n == -1) {
        // Not used, says compressed-tensors.
        return Ok(None);
    }
    if let Some(at) = numbers.iter().position(|&n| u64::try_from(n).is_ok_and(|n| n >= groups) || n < 0) {
        return Err(Error::invalid(format!(
            "tensor {} puts column {at} into group {}, expected one of {groups} groups; quantize the model anew",
            super::quoted(index.info().name()),
            numbers[at]
        )));
    }
    let group = if group == crate::layout::ROW { numbers.len() } else { group };
    let plain = numbers.iter().enumerate().all(|(at, &n)| usize::try_from(n) == Ok(at / group));
    let order = numbers.iter().map(|&n| u32::try_from(n).unwrap_or(u32::MAX)).collect();
    Ok((!plain).then_some(order))
}

/// A matrix.
#[derive(Debug)]
struct PackQuantized {
    scheme: Scheme,
    cols: usize,
    codes: SourceTensor,
    scale: SourceTensor,
    zeros: Option<SourceTensor>,
    order: Option<Arc<[u32]>>,
}

impl Matrix for PackQuantized {
    fn block(&self, source: &Source, first: u64, rows: u64) -> Result<Block> {
        let count = usize::try_from(rows).map_err(|_| Error::invalid("the rows are larger than memory"))?;
        let bits = self.scheme.bits;
        let words = source.stored(&self.codes, first, rows)?;
        let codes = unpack(bits, &words, count, self.cols)?;
        let scales = floats(self.scale.info().dtype(), &source.stored(&self.scale, first, rows)?);
        let addends = match &self.zeros {
            None => Addends::Middle,
            Some(zeros) => Addends::ZeroPoints(self.zero_points(source, zeros, first, rows)?),
        };
        let group = Block::group_of(&self.scheme, self.cols);
        Ok(Block { bits, cols: self.cols, group, codes, scales, addends, order: self.order.clone() })
    }
}

impl PackQuantized {
    /// Zero points as codes, `[rows][groups]`.
    fn zero_points(&self, source: &Source, zeros: &SourceTensor, first: u64, rows: u64) -> Result<Vec<u8>> {
        let bits = self.scheme.bits;
        if zeros.info().dtype() == DType::I8 {
            let middle = 1_u8 << (bits - 1);
            let most = u8::MAX >> (8 - bits);
            let bytes = source.stored(zeros, first, rows)?;
            let codes: Vec<u8> = bytes.iter().map(|zero| zero.wrapping_add(middle)).collect();
            return match codes.iter().all(|&code| code <= most) {
                true => Ok(codes),
                false => Err(Error::unsupported(format!("a zero point is beyond the codes of {bits} bits"))),
            };
        }
        let (from, many) = words_along(bits, first, rows);
        let words = source.stored(zeros, from, many)?;
        let groups = usize::try_from(zeros.matrix().1).unwrap_or(usize::MAX);
        Ok(unpack_along(bits, &words, (first, rows), groups))
    }
}
