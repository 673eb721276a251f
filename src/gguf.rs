//! What GGUF calls the tensors of each architecture: tables of data, one line per model type of a `config.json`, for
//! whoever writes such a file and whoever reads one.

#![forbid(unsafe_code)]

/// Names of modules here and there.
pub(crate) type Names = &'static [(&'static str, &'static str)];

/// What is known of a model type.
pub(crate) struct Kind {
    /// `model_type` of the config.
    pub model: &'static str,
    /// The architecture in GGUF.
    pub name: &'static str,
    /// The class of the library that loads such a model.
    pub class: &'static str,
    /// What stands before the number of a layer, and tensors outside of layers.
    pub layers: &'static [&'static str],
    pub outer: Names,
    /// Tensors of a layer, and those of each of its experts.
    pub inner: &'static [Names],
    pub experts: Names,
    /// Whether rows of queries and keys are reordered.
    pub reorders: bool,
    /// Whether norms multiply by one more than their weight, which GGUF adds.
    pub norms_add_one: bool,
    /// What the engine does with the weights of the experts of a token: whether it makes their sum one.
    pub normalizes_experts: Option<bool>,
}

impl Kind {
    /// Whether a matrix of a layer lies in the file with its two dimensions swapped.
    pub fn turns(&self, part: &str) -> bool {
        self.name == "gpt2" && !part.ends_with("_norm")
    }

    /// What a tensor of the file is on Hugging Face, where it has a name in these tables.
    pub fn hugging_face(&self, name: &str) -> Option<Theirs> {
        let (module, end) = name.rsplit_once('.').filter(|(_, end)| matches!(*end, "weight" | "bias"))?;
        let theirs = |names: Names, own: &str| names.iter().find(|(_, known)| *known == own).map(|(theirs, _)| *theirs);
        let shifted = |own: &str| self.norms_add_one && end == "weight" && own.ends_with("_norm");
        if let Some(outer) = theirs(self.outer, module) {
            let name = format!("{outer}.{end}");
            return Some(Theirs { name, turned: false, shifted: shifted(module), stacked: false });
        }
        let (layer, part) = module.strip_prefix("blk.")?.split_once('.')?;
        let layer: u32 = layer.parse().ok()?;
        let full = |inner: &str| format!("{}{layer}.{inner}.{end}", self.layers[0]);
        if let Some(expert) = theirs(self.experts, part).filter(|_| end == "weight") {
            return Some(Theirs { name: full(expert), turned: false, shifted: false, stacked: true });
        }
        let inner = self.inner.iter().find_map(|names| theirs(names, part))?;
        let turned = end == "weight" && self.turns(part);
        Some(Theirs { name: full(inner), turned, shifted: shifted(part), stacked: false })
    }
}

/// A tensor of a file as a model has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Theirs {
    /// Its name; that of an expert has a star for its number.
    pub name: String,
    /// Whether its two dimensions are swapped in the file.
    pub turned: bool,
    /// Whether the file has one more than the model.
    pub shifted: bool,
    /// Whether it is a stack of the matrices of all experts.
    pub stacked: bool,
}

const OUTER: Names = &[("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];

const ATTENTION: Names = &[
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
];

const NORM_AFTER: Names = &[("post_attention_layernorm", "ffn_norm")];

/// Norms of both sides of each part, as Gemma has them since its second version.
const NORMS_AROUND: Names = &[
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
];

const MLP: Names = &[("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down")];

const FUSED: Names = &[
    ("input_layernorm", "attn_norm"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.o_proj", "attn_output"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

const GPT2: Names = &[
    ("ln_1", "attn_norm"),
    ("attn.c_attn", "attn_qkv"),
    ("attn.c_proj", "attn_output"),
    ("ln_2", "ffn_norm"),
    ("mlp.c_fc", "ffn_up"),
    ("mlp.c_proj", "ffn_down"),
];

const GPT2_OUTER: Names = &[
    ("transformer.wte", "token_embd"),
    ("wte", "token_embd"),
    ("transformer.wpe", "position_embd"),
    ("wpe", "position_embd"),
    ("transformer.ln_f", "output_norm"),
    ("ln_f", "output_norm"),
    ("lm_head", "output"),
];

const MIXTRAL: Names = &[("block_sparse_moe.gate", "ffn_gate_inp")];

const MIXTRAL_EXPERTS: Names = &[
    ("block_sparse_moe.experts.*.w1", "ffn_gate_exps"),
    ("block_sparse_moe.experts.*.w2", "ffn_down_exps"),
    ("block_sparse_moe.experts.*.w3", "ffn_up_exps"),
];

const QWEN_MOE: Names = &[
    ("mlp.gate", "ffn_gate_inp"),
    ("mlp.shared_expert_gate", "ffn_gate_inp_shexp"),
    ("mlp.shared_expert.gate_proj", "ffn_gate_shexp"),
    ("mlp.shared_expert.up_proj", "ffn_up_shexp"),
    ("mlp.shared_expert.down_proj", "ffn_down_shexp"),
];

const QWEN_EXPERTS: Names = &[
    ("mlp.experts.*.gate_proj", "ffn_gate_exps"),
    ("mlp.experts.*.up_proj", "ffn_up_exps"),
    ("mlp.experts.*.down_proj", "ffn_down_exps"),
];

/// What most model types have in common.
const LLAMA: Kind = Kind {
    model: "llama",
    name: "llama",
    class: "LlamaForCausalLM",
    layers: &["model.layers."],
    outer: OUTER,
    inner: &[ATTENTION, NORM_AFTER, MLP],
    experts: &[],
    reorders: true,
    norms_add_one: false,
    normalizes_experts: None,
};

const GEMMA2: Kind = Kind {
    model: "gemma2",
    name: "gemma2",
    class: "Gemma2ForCausalLM",
    inner: &[ATTENTION, NORMS_AROUND, MLP],
    reorders: false,
    norms_add_one: true,
    ..LLAMA
};

/// Every model type that has a place.
pub(crate) const KNOWN: &[Kind] = &[
    LLAMA,
    Kind { model: "mistral", class: "MistralForCausalLM", ..LLAMA },
    Kind {
        model: "mixtral",
        class: "MixtralForCausalLM",
        inner: &[ATTENTION, NORM_AFTER, MIXTRAL],
        experts: MIXTRAL_EXPERTS,
        normalizes_experts: Some(true),
        ..LLAMA
    },
    Kind { model: "qwen2", class: "Qwen2ForCausalLM", name: "qwen2", reorders: false, ..LLAMA },
    Kind { model: "qwen3", class: "Qwen3ForCausalLM", name: "qwen3", reorders: false, ..LLAMA },
    Kind {
        model: "qwen2_moe",
        class: "Qwen2MoeForCausalLM",
        name: "qwen2moe",
        inner: &[ATTENTION, NORM_AFTER, QWEN_MOE],
        experts: QWEN_EXPERTS,
        reorders: false,
        normalizes_experts: Some(false),
        ..LLAMA
    },
    Kind {
        model: "qwen3_moe",
        class: "Qwen3MoeForCausalLM",
        name: "qwen3moe",
        inner: &[ATTENTION, NORM_AFTER, QWEN_MOE],
        experts: QWEN_EXPERTS,
        reorders: false,
        normalizes_experts: Some(true),
        ..LLAMA
    },
    Kind { model: "gemma", class: "GemmaForCausalLM", name: "gemma", reorders: false, norms_add_one: true, ..LLAMA },
    GEMMA2,
    Kind { model: "gemma3_text", class: "Gemma3ForCausalLM", name: "gemma3", ..GEMMA2 },
    Kind { model: "phi3", class: "Phi3ForCausalLM", name: "phi3", inner: &[FUSED], reorders: false, ..LLAMA },
    Kind {
        model: "gpt2",
        class: "GPT2LMHeadModel",
        name: "gpt2",
        layers: &["transformer.h.", "h."],
        outer: GPT2_OUTER,
        inner: &[GPT2],
        reorders: false,
        ..LLAMA
    },
];
