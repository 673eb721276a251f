//! Which weights are stored `[in, out]`: those of `transformers`' Conv1D, which GPT-2 and its relatives use for linears.
//!
//! Groups of a codec run along the input dimension, so such a weight is transposed on its way in. The name alone does
//! not tell: GPT-BigCode has the same names on ordinary `[out, in]` linears. `model_type` decides; without it, the bias
//! does, which is as long as the output dimension.

use std::collections::HashMap;

use serde_json::Value;

use super::SourceTensor;

/// Model families whose linears are Conv1D.
const FAMILIES: [&str; 4] = ["gpt2", "openai-gpt", "imagegpt", "decision_transformer"];

/// The modules of those families that are Conv1D.
const MODULES: [&str; 4] = ["c_attn", "c_proj", "c_fc", "q_attn"];

/// The numbers of the tensors that are stored `[in, out]`.
pub(super) fn transposed(config: Option<&Value>, tensors: &[SourceTensor]) -> Vec<usize> {
    let candidates = || tensors.iter().enumerate().filter(|(_, t)| t.info().shape().len() == 2 && is_module(t));
    let family = config.and_then(|c| c.get("model_type")).and_then(Value::as_str);
    let conv1d = match family {
        Some(family) => FAMILIES.contains(&family),
        None => candidates().next().is_some() && biases_agree(candidates().map(|(_, t)| t), tensors),
    };
    if conv1d { candidates().map(|(index, _)| index).collect() } else { Vec::new() }
}

/// Whether the last part but one of the name is a Conv1D module, and the last one `weight`.
fn is_module(tensor: &SourceTensor) -> bool {
    let name = tensor.info().name();
    name.strip_suffix(".weight").is_some_and(|path| MODULES.contains(&path.rsplit('.').next().unwrap_or(path)))
}

/// Whether some bias is as long as the second of two different dimensions, and none as long as the first.
fn biases_agree<'a>(candidates: impl Iterator<Item = &'a SourceTensor>, tensors: &[SourceTensor]) -> bool {
    let vectors: HashMap<&str, u64> = tensors
        .iter()
        .filter(|t| t.info().shape().len() == 1)
        .map(|t| (t.info().name(), t.info().shape()[0]))
        .collect();
    let mut seen = false;
    for weight in candidates {
        let name = weight.info().name();
        let (first, second) = (weight.info().shape()[0], weight.info().shape()[1]);
        let bias = vectors.get(format!("{}bias", &name[..name.len() - "weight".len()]).as_str());
        match bias {
            Some(&len) if first != second && len == second => seen = true,
            Some(&len) if first != second && len == first => return false,
            _ => {}
        }
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::super::rows::{Order, Store};
    use super::*;
    use crate::tensor::{DType, TensorInfo};

    fn tensors(list: &[(&str, &[u64])]) -> Vec<SourceTensor> {
        list.iter()
            .map(|(name, shape)| {
                let info = TensorInfo::new(*name, DType::F32, shape.to_vec()).unwrap();
                SourceTensor::new(info, Store::Spool, 0, Order::C)
            })
            .collect()
    }

    const BLOCK: &[(&str, &[u64])] = &[
        ("wte.weight", &[50, 4]),
        ("h.0.attn.c_attn.weight", &[4, 12]),
        ("h.0.attn.c_attn.bias", &[12]),
        ("h.0.attn.c_proj.weight", &[4, 4]),
        ("h.0.attn.c_proj.bias", &[4]),
        ("h.0.mlp.xc_fc.weight", &[4, 16]),
    ];

    #[test]
    fn families_with_conv1d_are_transposed_and_only_their_modules() {
        for family in FAMILIES {
            let config = serde_json::json!({ "model_type": family });
            assert_eq!(transposed(Some(&config), &tensors(BLOCK)), [1, 3], "{family}");
        }
    }

    #[test]
    fn other_families_with_the_same_names_are_not_transposed() {
        let config = serde_json::json!({ "model_type": "gpt_bigcode" });
        assert!(transposed(Some(&config), &tensors(BLOCK)).is_empty());
    }

    #[test]
    fn without_a_model_type_the_bias_decides_for_the_whole_model() {
        assert_eq!(transposed(None, &tensors(BLOCK)), [1, 3]);
        assert_eq!(transposed(Some(&serde_json::json!({})), &tensors(BLOCK)), [1, 3]);
        let linear = tensors(&[("a.c_fc.weight", &[16, 4]), ("a.c_fc.bias", &[16]), ("a.c_proj.weight", &[4, 16])]);
        assert!(transposed(None, &linear).is_empty());
        let square = tensors(&[("a.c_fc.weight", &[4, 4]), ("a.c_fc.bias", &[4])]);
        assert!(transposed(None, &square).is_empty(), "a square weight says nothing");
        let without_bias = tensors(&[("c_fc.weight", &[4, 16])]);
        assert!(transposed(None, &without_bias).is_empty());
        let contradictory = tensors(&[
            ("a.c_fc.weight", &[4, 16]),
            ("a.c_fc.bias", &[16]),
            ("b.c_fc.weight", &[16, 4]),
            ("b.c_fc.bias", &[16]),
        ]);
        assert!(transposed(None, &contradictory).is_empty());
    }
}
