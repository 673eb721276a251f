//! GPTQ: what GPTQModel, vLLM, SGLang and transformers load. Words of codes are ours, transposed.
//!
//! | tensor | dtype | shape |
//! |---|---|---|
//! | `qweight` | I32 | `[cols * bits / 32, rows]`, packed along the columns, low bits first |
//! | `qzeros` | I32 | `[groups, rows * bits / 32]`, packed along the rows: the zero point, less one in the format's first version |
//! | `scales` | F16 | `[groups, rows]` |
//! | `g_idx` | I32 | `[cols]`, the group of each column |

use serde_json::{Map, Value, json};

use super::{Format, Holds, Matrix, Scheme, pack};
use crate::layout::{Float, Grouped, Levels};
use crate::tensor::DType;

pub(in crate::export) struct Gptq;

/// Whether zero points are stored less one, as all engines read symmetric codes; others need the second version.
fn first_version(symmetric: bool) -> bool {
    symmetric
}

fn quantization(scheme: &Scheme, dense: &[String]) -> Value {
    // Modules that are not quantized, in the notation of GPTQModel, which vLLM shares.
    let escape = |module: &str| module.replace('.', "\\.");
    let dynamic: Map<String, Value> =
        dense.iter().filter(|module| *module != "lm_head").map(|m| (format!("-:^{}$", escape(m)), json!({}))).collect();
    let version = if first_version(scheme.symmetric) { "gptq" } else { "gptq_v2" };
    let mut config = json!({
        "quant_method": "gptq", "bits": scheme.bits, "group_size": scheme.group, "desc_act": false,
        "sym": scheme.symmetric, "lm_head": false, "checkpoint_format": version, "pack_dtype": "int32",
    });
    if !dynamic.is_empty() {
        config["dynamic"] = Value::Object(dynamic);
    }
    config
}

impl Holds for Gptq {
    fn name(&self) -> &'static str {
        "gptq"
    }

    fn refuses(&self, layout: &Grouped, rows: usize, cols: usize) -> Option<String> {
        let per_word = 32 / layout.bits().max(1) as usize;
        match (layout.bits(), layout.levels(), layout.scale()) {
            (4 | 8, Levels::Signed, Float::F16) | (4, Levels::ZeroPoint, Float::F16) if layout.group() >= 32 => {
                let whole = rows.is_multiple_of(per_word) && cols.is_multiple_of(per_word);
                (!whole).then(|| format!("{rows} x {cols} weights do not fill words of {per_word} on both sides"))
            }
            _ => Some(
                "only symmetric codes of 4 or 8 bits, or 4 bits with integer zero points, in groups of 32 or more with F16 \
                 scales have a place there"
                    .to_owned(),
            ),
        }
    }

    fn codecs(&self) -> &'static [&'static str] {
        &["int4_sym_g128_fp16_v1", "int4_sym_g64_fp16_v1", "int4_sym_g32_fp16_v1"]
    }
}

impl Format for Gptq {
    fn parts(&self, layout: &Grouped, rows: u64, cols: u64) -> Vec<(&'static str, DType, Vec<u64>)> {
        let bits = u64::from(layout.bits());
        let groups = cols / layout.group() as u64;
        vec![
            ("qweight", DType::I32, vec![cols * bits / 32, rows]),
            ("qzeros", DType::I32, vec![groups, rows * bits / 32]),
            ("scales", DType::F16, vec![groups, rows]),
            ("g_idx", DType::I32, vec![cols]),
        ]
    }

    fn fill(&self, matrix: &Matrix<'_>) -> Vec<Vec<u8>> {
        let (bits, groups) = (matrix.layout.bits(), matrix.groups());
        let mut words = Vec::with_capacity(matrix.codes().len());
        for w in 0..matrix.cols * bits as usize / 32 {
            for row in 0..matrix.rows {
                words.extend(matrix.word(row, w).to_le_bytes());
            }
        }
        let less = u8::from(first_version(matrix.layout.levels() == Levels::Signed));
        let zeros = (0..groups).flat_map(|group| (0..matrix.rows).map(move |row| matrix.zero_point(row, group) - less));
        let group = matrix.layout.group();
        let index = (0..matrix.cols).flat_map(|column| u32::try_from(column / group).unwrap_or(u32::MAX).to_le_bytes());
        vec![words, pack(bits, zeros), matrix.scales_by_group(), index.collect()]
    }

    fn config(&self, scheme: &Scheme, dense: &[String]) -> Vec<(&'static str, Value)> {
        vec![("quantization_config", quantization(scheme, dense))]
    }

    fn files(&self, scheme: &Scheme) -> Vec<(&'static str, Value)> {
        vec![("quantize_config.json", quantization(scheme, &[]))]
    }

    fn notes(&self, scheme: &Scheme) -> Vec<String> {
        if scheme.symmetric {
            return Vec::new();
        }
        vec!["zero points are in the second version of the format (gptq_v2), which vLLM and SGLang do not read; --to awq holds \
              the same codes for them"
            .to_owned()]
    }
}
