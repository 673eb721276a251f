//! MLX, affine: what mlx-lm writes.
//!
//! | tensor | dtype | shape |
//! |---|---|---|
//! | `weight` | U32 | `[…, cols * bits / 32]`, low bits first, across words |
//! | `scales`, `biases` | F16, BF16 or F32 | `[…, groups]` |
//!
//! `weight = scales * code + biases`. Where these are F32, which MLX itself does not choose, they may be those of codes
//! with zero points, and are then taken over as such.

use serde_json::Value;

use super::block::{Block, floats, unpack};
use super::parts::{self, FLOATS, Parts, check, wrong};
use super::{Addends, Levels, Matrix, Packed, Scheme, quoted};
use crate::error::{Error, Result};
use crate::source::{Source, SourceTensor};
use crate::tensor::{DType, TensorInfo};

/// Opens every matrix of a checkpoint.
pub(super) fn open(config: &Value, parts: &mut Parts<'_>) -> Result<()> {
    for module in parts.modules(".scales") {
        let Some(codes) = parts.find(module, ".weight").filter(|codes| codes.info().dtype() == DType::U32) else {
            continue;
        };
        // A module may have settings of its own.
        let own = config.get(module).filter(|own| own.is_object()).unwrap_or(config);
        let mode = own.get("mode").and_then(Value::as_str).unwrap_or("affine");
        if mode != "affine" {
            return Err(Error::unsupported(format!(
                "matrix {} is in the mode {} of MLX, expected affine",
                quoted(&format!("{module}.weight")),
                quoted(mode)
            )));
        }
        let number = |key: &str| {
            let value = own.get(key).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok());
            value.filter(|&n| n > 0).ok_or_else(|| wrong(module, format!("the config has no number '{key}' for it")))
        };
        let (bits, group) = (number("bits")?, number("group_size")?);
        let (info, packed) = matrix(module, codes, bits, group, parts)?;
        parts.put(module, &[".weight", ".scales", ".biases"], info, packed);
    }
    Ok(())
}

/// A matrix whose parts agree.
fn matrix(
    module: &str,
    codes: &SourceTensor,
    bits: usize,
    group: usize,
    parts: &Parts<'_>,
) -> Result<(TensorInfo, Packed)> {
    let (Some((&words, leading)), Some(bits)) =
        (codes.info().shape().split_last(), [2, 3, 4, 5, 6, 8].into_iter().find(|&width| width as usize == bits))
    else {
        return Err(wrong(module, format!("codes of {bits} bits, of MLX's 2, 3, 4, 5, 6 and 8 are read")));
    };
    let all = words.checked_mul(32).filter(|all| *all > 0 && all.is_multiple_of(bits.into()));
    let cols = all.map(|all| all / u64::from(bits)).ok_or_else(|| {
        wrong(module, format!("{words} words a row, expected some that whole codes of {bits} bits fill"))
    })?;
    if !cols.is_multiple_of(group as u64) {
        return Err(wrong(module, format!("groups of {group} do not divide its {cols} columns")));
    }
    let shape = |last: u64| leading.iter().copied().chain([last]).collect::<Vec<_>>();
    let scales = parts.need(module, ".scales")?;
    check(scales, FLOATS, &shape(cols / group as u64))?;
    let biases = parts.need(module, ".biases")?;
    check(biases, FLOATS, &shape(cols / group as u64))?;
    let levels: &[Levels] = match (scales.info().dtype(), biases.info().dtype()) {
        (DType::F32, DType::F32) => &[Levels::Signed, Levels::ZeroPoint, Levels::Offset],
        _ => &[Levels::Offset],
    };
    let schemes: Vec<_> = levels.iter().map(|&levels| parts::scheme(bits, levels, group)).collect();
    let matrix = Mlx {
        scheme: schemes[0],
        cols: usize::try_from(cols).map_err(|_| wrong(module, "a row is larger than memory"))?,
        codes: codes.clone(),
        scales: scales.clone(),
        biases: biases.clone(),
    };
    Ok((parts::logical(module, shape(cols))?, Packed::new("mlx", &schemes, cols, Box::new(matrix))))
}

/// A matrix.
#[derive(Debug)]
struct Mlx {
    scheme: Scheme,
    cols: usize,
    codes: SourceTensor,
    scales: SourceTensor,
    biases: SourceTensor,
}

impl Matrix for Mlx {
    fn block(&self, source: &Source, first: u64, rows: u64) -> Result<Block> {
        let count = usize::try_from(rows).map_err(|_| Error::invalid("the rows are larger than memory"))?;
        let bits = self.scheme.bits;
        let words = source.stored(&self.codes, first, rows)?;
        let codes = unpack(bits, &words, count, self.cols)?;
        let read =
            |part: &SourceTensor| -> Result<_> { Ok(floats(part.info().dtype(), &source.stored(part, first, rows)?)) };
        let (scales, offsets) = (read(&self.scales)?, Addends::Offsets(read(&self.biases)?));
        Ok(Block { bits, cols: self.cols, group: self.scheme.group, codes, scales, addends: offsets, order: None })
    }
}
