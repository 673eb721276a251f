//! What GGUF calls the parts of a model: tables of names, for whoever writes such a file and whoever reads one.

#![forbid(unsafe_code)]

/// `model_type` of a config, the architecture's name in GGUF, and whether rows of queries and keys are reordered.
pub(crate) const ARCHITECTURES: &[(&str, &str, bool)] =
    &[("llama", "llama", true), ("mistral", "llama", true), ("qwen2", "qwen2", false), ("qwen3", "qwen3", false)];

/// Tensors outside of layers.
pub(crate) const OUTER: &[(&str, &str)] =
    &[("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];

/// Tensors of a layer.
pub(crate) const INNER: &[(&str, &str)] = &[
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// The name of a tensor on Hugging Face, where it has one in these tables.
pub(crate) fn hugging_face(name: &str) -> Option<String> {
    let (module, end) = name.rsplit_once('.').filter(|(_, end)| matches!(*end, "weight" | "bias"))?;
    if let Some((outer, _)) = OUTER.iter().find(|(_, own)| *own == module) {
        return Some(format!("{outer}.{end}"));
    }
    let (layer, part) = module.strip_prefix("blk.")?.split_once('.')?;
    let layer: u32 = layer.parse().ok()?;
    let (inner, _) = INNER.iter().find(|(_, own)| *own == part)?;
    Some(format!("model.layers.{layer}.{inner}.{end}"))
}
