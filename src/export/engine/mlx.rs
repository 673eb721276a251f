//! MLX, affine: what mlx-lm loads on Apple machines. Words of codes are ours, bit for bit.
//!
//! `weight = scales * code + biases`, so symmetric codes and zero points become offsets.
//!
//! | tensor | dtype | shape |
//! |---|---|---|
//! | `weight` | U32 | `[rows, cols * bits / 32]`, low bits first |
//! | `scales` | F16, or F32 where an offset needs it | `[rows, groups]` |
//! | `biases` | as `scales` | `[rows, groups]` |

use serde_json::{Value, json};

use super::{Format, Holds, Matrix, Scheme};
use crate::layout::{Grouped, Levels};
use crate::tensor::DType;

pub(in crate::export) struct Mlx;

/// The dtype in which scales and offsets are exact: a scale times a zero point takes more than an F16.
fn parameters(layout: &Grouped) -> DType {
    match layout.levels() {
        Levels::Unsigned => layout.scale().dtype(),
        _ => DType::F32,
    }
}

impl Holds for Mlx {
    fn name(&self) -> &'static str {
        "mlx"
    }

    fn refuses(&self, layout: &Grouped, _: usize, _: usize) -> Option<String> {
        let offset = layout.offset().is_none_or(|offset| offset == layout.scale());
        match (layout.bits(), layout.levels(), layout.group()) {
            (4 | 8, Levels::Unsigned | Levels::Signed | Levels::ZeroPoint, 32 | 64 | 128) if offset => None,
            _ => Some("only codes of 4 or 8 bits with scales and offsets or zero points, in groups of 32, 64 or 128, have a place there".to_owned()),
        }
    }

    fn codecs(&self) -> &'static [&'static str] {
        &["int4_g32_fp16_v1"]
    }
}

impl Format for Mlx {
    fn parts(&self, layout: &Grouped, rows: u64, cols: u64) -> Vec<(&'static str, DType, Vec<u64>)> {
        let groups = cols / layout.group() as u64;
        let dtype = parameters(layout);
        vec![
            ("weight", DType::U32, vec![rows, cols * u64::from(layout.bits()) / 32]),
            ("scales", dtype, vec![rows, groups]),
            ("biases", dtype, vec![rows, groups]),
        ]
    }

    fn fill(&self, matrix: &Matrix<'_>) -> Vec<Vec<u8>> {
        let layout = matrix.layout;
        if layout.levels() == Levels::Unsigned {
            return vec![matrix.codes().to_vec(), matrix.scales().to_vec(), matrix.offsets().to_vec()];
        }
        let (mut scales, mut biases) = (Vec::new(), Vec::new());
        for row in 0..matrix.rows {
            for group in 0..matrix.groups() {
                let scale = layout.scale().load(matrix.scales(), row * matrix.groups() + group);
                scales.extend(scale.to_le_bytes());
                biases.extend((-scale * f32::from(matrix.zero_point(row, group))).to_le_bytes());
            }
        }
        vec![matrix.codes().to_vec(), scales, biases]
    }

    fn config(&self, scheme: &Scheme, _: &[String]) -> Vec<(&'static str, Value)> {
        let value = json!({"group_size": scheme.group, "bits": scheme.bits, "mode": "affine"});
        vec![("quantization", value.clone()), ("quantization_config", value)]
    }

    fn fuses(&self) -> bool {
        false
    }
}
