//! GPTQ: what AutoGPTQ and GPTQModel write, and AutoRound in its packing.
//!
//! | tensor | dtype | shape |
//! |---|---|---|
//! | `qweight` | I32 | `[cols * bits / 32, rows]`, packed along the columns, low bits first, across words |
//! | `qzeros` | I32 | `[groups, rows * bits / 32]`, packed along the rows: zero points, less one in the first version |
//! | `scales` | F16, BF16 or F32 | `[groups, rows]` |
//! | `g_idx`, not in all files | I32 | `[cols]`, the group of each column |
//!
//! `checkpoint_format` says which version it is: `gptq` is the first one, `gptq_v2` stores zero points as they are. A stored
//! zero point that is the greatest code stands for none in the first version: some readers make it 0, others carry.

use std::sync::Arc;

use serde_json::Value;

use super::block::{Block, floats, unpack, unpack_along, words_along};
use super::compressed_tensors::order;
use super::parts::{self, FLOATS, Parts, check, sides, wrong};
use super::{ACT_ORDER, Addends, Levels, Matrix, Packed, Scheme, quoted};
use crate::error::{Error, Result};
use crate::source::{Source, SourceTensor};
use crate::tensor::{DType, TensorInfo};

/// What the config says of all matrices; `dynamic` may say otherwise of some, so that shapes decide.
struct Said {
    format: &'static str,
    first_version: bool,
    symmetric: bool,
    group: Vec<i64>,
}

/// Opens every matrix of a checkpoint.
pub(super) fn open(config: &Value, parts: &mut Parts<'_>) -> Result<()> {
    let modules = parts.modules(".qweight");
    if modules.is_empty() {
        return Ok(());
    }
    let version = ["checkpoint_format", "packing_format"].iter().find_map(|key| config.get(*key)?.as_str());
    let first_version = match version.unwrap_or("gptq") {
        "gptq" | "auto_round:auto_gptq" => true,
        "gptq_v2" => false,
        other => {
            return Err(Error::unsupported(format!(
                "the checkpoint is in the form {} of GPTQ, expected gptq or gptq_v2; save it as one of these with GPTQModel",
                quoted(other)
            )));
        }
    };
    let number = |key: &str| config.get(key).and_then(Value::as_i64);
    let mut group: Vec<i64> = number("group_size").into_iter().collect();
    let dynamic = config.get("dynamic").and_then(Value::as_object).into_iter().flat_map(serde_json::Map::values);
    group.extend(dynamic.filter_map(|own| own.get("group_size")?.as_i64()));
    let said = Said {
        format: if first_version { "gptq" } else { "gptq_v2" },
        first_version,
        symmetric: config.get("sym").and_then(Value::as_bool).unwrap_or(true),
        group,
    };
    for module in modules {
        let (info, packed) = matrix(module, &said, parts)?;
        parts.put(module, &[".qweight", ".qzeros", ".scales", ".g_idx"], info, packed);
    }
    Ok(())
}

/// A matrix whose parts agree.
fn matrix(module: &str, said: &Said, parts: &Parts<'_>) -> Result<(TensorInfo, Packed)> {
    let codes = parts.need(module, ".qweight")?;
    let [words, rows] = sides(codes, &[DType::I32])?;
    let zeros = parts.need(module, ".qzeros")?;
    let [groups, zero_words] = sides(zeros, &[DType::I32])?;
    let bits = [2, 3, 4, 8].into_iter().find(|&bits: &u32| rows.checked_mul(bits.into()) == zero_words.checked_mul(32));
    let bits = bits.ok_or_else(|| {
        let what = format!(
            "{zero_words} words of qzeros hold no zero points of {rows} rows in 2, 3, 4 or 8 bits, which are read"
        );
        wrong(module, what)
    })?;
    let all = words.checked_mul(32).filter(|all| all.is_multiple_of(bits.into()));
    let cols = all.map(|all| all / u64::from(bits));
    let cols =
        cols.ok_or_else(|| wrong(module, format!("{words} words a column are no whole codes of {bits} bits")))?;
    let scales = parts.need(module, ".scales")?;
    check(scales, FLOATS, &[groups, rows])?;
    let group = parts::group(module, cols, groups, &said.group)?;
    let order = match parts.find(module, ".g_idx") {
        Some(index) => order(parts.source, index, cols, groups, group)?,
        None => None,
    };
    let levels: &[Levels] = if said.symmetric { &[Levels::Signed, Levels::ZeroPoint] } else { &[Levels::ZeroPoint] };
    let all: Vec<_> = levels.iter().map(|&levels| parts::scheme(bits, levels, group)).collect();
    let matrix = Gptq {
        scheme: all[0],
        cols: usize::try_from(cols).map_err(|_| wrong(module, "a row is larger than memory"))?,
        less: said.first_version,
        codes: codes.turned(),
        zeros: zeros.turned(),
        scales: scales.turned(),
        order: order.clone(),
    };
    let schemes = if order.is_none() { &all[..] } else { &[] };
    let mut packed = Packed::new(said.format, schemes, cols, Box::new(matrix));
    if order.is_some() {
        packed.why = ACT_ORDER.to_owned();
    }
    Ok((parts::logical(module, vec![rows, cols])?, packed))
}

/// A matrix; its parts as matrices of one row for each of its own, or for each word of them.
#[derive(Debug)]
struct Gptq {
    scheme: Scheme,
    cols: usize,
    less: bool,
    codes: SourceTensor,
    zeros: SourceTensor,
    scales: SourceTensor,
    order: Option<Arc<[u32]>>,
}

impl Matrix for Gptq {
    fn block(&self, source: &Source, first: u64, rows: u64) -> Result<Block> {
        let count = usize::try_from(rows).map_err(|_| Error::invalid("the rows are larger than memory"))?;
        let bits = self.scheme.bits;
        let words = source.stored(&self.codes, first, rows)?;
        let codes = unpack(bits, &words, count, self.cols)?;
        let scales = floats(self.scales.info().dtype(), &source.stored(&self.scales, first, rows)?);
        let (from, many) = words_along(bits, first, rows);
        let words = source.stored(&self.zeros, from, many)?;
        let groups = usize::try_from(self.zeros.matrix().1).unwrap_or(usize::MAX);
        let mut zeros = unpack_along(bits, &words, (first, rows), groups);
        if self.less {
            let most = u8::MAX >> (8 - bits);
            if zeros.contains(&most) {
                return Err(Error::unsupported(format!(
                    "a zero point is stored as {most}, which readers of the first version of GPTQ understand differently; \
                     save the checkpoint as gptq_v2 with the tool that wrote it"
                )));
            }
            zeros.iter_mut().for_each(|zero| *zero += 1);
        }
        let group = Block::group_of(&self.scheme, self.cols);
        let addends = Addends::ZeroPoints(zeros);
        Ok(Block { bits, cols: self.cols, group, codes, scales, addends, order: self.order.clone() })
    }
}
