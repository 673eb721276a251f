//! AWQ (`gemm`): what AutoAWQ, vLLM, SGLang and transformers load.
//!
//! | tensor | dtype | shape |
//! |---|---|---|
//! | `qweight` | I32 | `[cols, rows / 8]`: nibble *j* of a word holds row `8 w + ORDER[j]` |
//! | `qzeros` | I32 | `[groups, rows / 8]`, in the same order |
//! | `scales` | F16 | `[groups, rows]` |

use serde_json::{Value, json};

use super::{Format, Holds, Matrix, Scheme, pack};
use crate::layout::{Float, Grouped, Levels, load_bits};
use crate::tensor::DType;

pub(in crate::export) struct Awq;

/// Which of eight rows a nibble of a word is of.
const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

impl Holds for Awq {
    fn name(&self) -> &'static str {
        "awq"
    }

    fn refuses(&self, layout: &Grouped, rows: usize, _: usize) -> Option<String> {
        match (layout.bits(), layout.levels(), layout.scale()) {
            (4, Levels::Signed | Levels::ZeroPoint, Float::F16) if layout.group() >= 32 => {
                (!rows.is_multiple_of(8)).then(|| format!("{rows} rows do not fill words of 8"))
            }
            _ => Some(
                "only codes of 4 bits, symmetric or with integer zero points, in groups of 32 or more with F16 scales have a \
                 place there"
                    .to_owned(),
            ),
        }
    }

    fn codecs(&self) -> &'static [&'static str] {
        &["int4_zp_g128_fp16_v1", "int4_zp_g64_fp16_v1", "int4_zp_g32_fp16_v1"]
    }
}

impl Format for Awq {
    fn parts(&self, layout: &Grouped, rows: u64, cols: u64) -> Vec<(&'static str, DType, Vec<u64>)> {
        let groups = cols / layout.group() as u64;
        vec![
            ("qweight", DType::I32, vec![cols, rows / 8]),
            ("qzeros", DType::I32, vec![groups, rows / 8]),
            ("scales", DType::F16, vec![groups, rows]),
        ]
    }

    fn fill(&self, matrix: &Matrix<'_>) -> Vec<Vec<u8>> {
        let stride = matrix.layout.code_stride(matrix.cols);
        let code = |row: usize, column: usize| load_bits(4, &matrix.codes()[row * stride..][..stride], column);
        let ordered = || (0..matrix.rows).map(|n| n / 8 * 8 + ORDER[n % 8]);
        let codes = (0..matrix.cols).flat_map(|column| ordered().map(move |row| code(row, column)));
        let zeros = (0..matrix.groups()).flat_map(|group| ordered().map(move |row| matrix.zero_point(row, group)));
        vec![pack(4, codes), pack(4, zeros), matrix.scales_by_group()]
    }

    fn config(&self, scheme: &Scheme, dense: &[String]) -> Vec<(&'static str, Value)> {
        let dense = (!dense.is_empty()).then_some(dense);
        let config = json!({
            "quant_method": "awq", "version": "gemm", "bits": scheme.bits, "group_size": scheme.group,
            "zero_point": true, "modules_to_not_convert": dense,
        });
        vec![("quantization_config", config)]
    }
}
