//! compressed-tensors, `pack-quantized`: what vLLM, SGLang and transformers load. Words of codes are ours, bit for bit.
//!
//! | tensor | dtype | shape |
//! |---|---|---|
//! | `weight_packed` | I32 | `[rows, ceil(cols * bits / 32)]`, low bits first |
//! | `weight_scale` | as stored | `[rows, groups]` |
//! | `weight_zero_point` (zero points) | I32 | `[ceil(rows * bits / 32), groups]`, packed along the rows |
//! | `weight_shape` | I64 | `[2]` |

use serde_json::{Value, json};

use super::{Format, Holds, Matrix, Scheme, pack};
use crate::layout::{Grouped, Levels};
use crate::tensor::DType;

pub(in crate::export) struct CompressedTensors;

impl Holds for CompressedTensors {
    fn name(&self) -> &'static str {
        "compressed-tensors"
    }

    fn refuses(&self, layout: &Grouped, _: usize, _: usize) -> Option<String> {
        match (layout.bits(), layout.levels()) {
            (4 | 8, Levels::Signed) | (4, Levels::ZeroPoint) => None,
            _ => Some(
                "only symmetric codes of 4 or 8 bits and codes with integer zero points have a place there".to_owned(),
            ),
        }
    }

    fn codecs(&self) -> &'static [&'static str] {
        &["int4_sym_g128_fp16_v1", "int4_sym_g64_fp16_v1", "int4_sym_g32_fp16_v1"]
    }
}

impl Format for CompressedTensors {
    fn parts(&self, layout: &Grouped, rows: u64, cols: u64) -> Vec<(&'static str, DType, Vec<u64>)> {
        let bits = u64::from(layout.bits());
        let groups = if layout.group() == 0 { 1 } else { cols / layout.group() as u64 };
        let mut parts = vec![
            ("weight_packed", DType::I32, vec![rows, (cols * bits).div_ceil(32)]),
            ("weight_scale", layout.scale().dtype(), vec![rows, groups]),
            ("weight_shape", DType::I64, vec![2]),
        ];
        if layout.levels() == Levels::ZeroPoint {
            parts.push(("weight_zero_point", DType::I32, vec![(rows * bits).div_ceil(32), groups]));
        }
        parts
    }

    fn fill(&self, matrix: &Matrix<'_>) -> Vec<Vec<u8>> {
        let shape = [matrix.rows, matrix.cols].map(|side| side as u64);
        let shape = shape.iter().flat_map(|side| side.to_le_bytes()).collect();
        let mut parts = vec![matrix.codes().to_vec(), matrix.scales().to_vec(), shape];
        if matrix.layout.levels() == Levels::ZeroPoint {
            let (bits, groups) = (matrix.layout.bits(), matrix.groups());
            let per_word = 32 / bits as usize;
            let mut words = Vec::new();
            for first in (0..matrix.rows).step_by(per_word) {
                let rows = first..(first + per_word).min(matrix.rows);
                for group in 0..groups {
                    words.extend(pack(bits, rows.clone().map(|row| matrix.zero_point(row, group))));
                }
            }
            parts.push(words);
        }
        parts
    }

    fn config(&self, scheme: &Scheme, dense: &[String]) -> Vec<(&'static str, Value)> {
        let (strategy, group) = if scheme.group == 0 { ("channel", None) } else { ("group", Some(scheme.group)) };
        let weights = json!({
            "num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "strategy": strategy,
            "group_size": group, "dynamic": false,
        });
        let config = json!({
            "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "ignore": dense, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        });
        vec![("quantization_config", config)]
    }

    fn notes(&self, scheme: &Scheme) -> Vec<String> {
        if scheme.symmetric {
            return Vec::new();
        }
        vec![
            "transformers with compressed-tensors 0.19 and 0.20 fails to load zero points; vLLM and older versions do, and \
             --to awq holds the same codes"
                .to_owned(),
        ]
    }
}
