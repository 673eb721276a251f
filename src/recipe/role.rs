//! Role: what part of a model a tensor plays, read from its dtype, its shape and its name.
//!
//! Checkpoints name the same thing in many ways, so the names are tables of data. A name is split at dots and slashes
//! and a last segment `weight` (or Flax's `kernel`) is dropped, which leaves the path of the module. The first line that
//! applies decides:
//!
//! | what | role |
//! |---|---|
//! | integer or boolean dtype | `not_float` |
//! | at most one dimension, fewer than 1024 elements, or a name of `SMALL_ENDS` or a norm | `small` |
//! | four or more dimensions, or three outside a module of `EXPERTS` | `other` |
//! | the path ends in an entry of `ENDS`, tried from top to bottom | that entry's |
//! | a segment of the path is in `MODULES`, the innermost one counting | that entry's |
//! | anything else | `linear` |
//!
//! The innermost module decides because leaves are ambiguous: `c_proj` and `dense` belong to attention in one module
//! and to the feed-forward network in the next.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::tensor::TensorInfo;

macro_rules! roles {
    ($($variant:ident $name:literal $doc:literal),* $(,)?) => {
        /// What part of a model a tensor plays.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Role { $(#[doc = $doc] $variant),* }

        impl Role {
            /// Every role, in the order of reports.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The name in recipes and reports.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),* }
            }
        }
    };
}

roles! {
    Attention "attention" "A projection of attention: query, key, value, output, or several fused.",
    Mlp "mlp" "A projection of the feed-forward network, dense or of an expert.",
    Linear "linear" "Any other matrix.",
    Router "router" "The gate that sends a token to its experts: tiny, and sensitive to rounding.",
    Embedding "embedding" "A table looked up by token or position.",
    Head "head" "The projection to the vocabulary or to the classes.",
    Small "small" "Norms, biases, scales, vectors, scalars and whatever has fewer than 1024 elements.",
    Other "other" "A float tensor that is neither a matrix nor a stack of experts, such as a convolution.",
    NotFloat "not_float" "Integers and booleans.",
}

impl Role {
    /// The roles that a recipe can give a codec; tensors of the others are kept raw unless a rule or `all` says more.
    pub const WITH_CODEC: &[Self; 6] =
        &[Self::Attention, Self::Mlp, Self::Linear, Self::Router, Self::Embedding, Self::Head];

    /// Whether the tensors of this role are the matrices that a codec is meant for.
    #[must_use]
    pub const fn is_linear(self) -> bool {
        matches!(self, Self::Attention | Self::Mlp | Self::Linear)
    }

    /// The role of a tensor.
    #[must_use]
    pub fn of(info: &TensorInfo) -> Self {
        let dims = info.shape().len();
        let segments: Vec<&str> = info.name().split(['.', '/']).collect();
        if !info.dtype().is_float() {
            return Self::NotFloat;
        }
        if dims < 2 || info.elements() < SMALL_BELOW || is_small(&segments) {
            return Self::Small;
        }
        let path = match segments.split_last() {
            Some((&("weight" | "kernel"), module)) if !module.is_empty() => module,
            _ => &segments,
        };
        if dims > 3 || (dims == 3 && !path.iter().any(|segment| EXPERTS.contains(segment))) {
            return Self::Other;
        }
        let by_end = || ENDS.iter().find(|(_, ends)| ends.iter().any(|end| ends_in(path, end))).map(|(role, _)| *role);
        let by_module = || path.iter().rev().find_map(|segment| lookup(segment));
        by_end().or_else(by_module).unwrap_or(Self::Linear)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Role {
    type Err = Error;

    /// Reads the name of a role.
    fn from_str(s: &str) -> Result<Self> {
        Self::ALL.iter().copied().find(|role| role.name() == s).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|role| role.name()).collect();
            Error::invalid(format!("unknown role '{s}', expected one of {}", known.join(", ")))
        })
    }
}

/// Tensors with fewer elements are kept: what a codec would save is less than what its header entry costs.
const SMALL_BELOW: u64 = 1024;

/// Ends of names that no codec should touch, whatever their shape: addends, scales of checkpoints that are already
/// quantized, tables of angles, and the decay of state-space models.
const SMALL_ENDS: &[&str] =
    &["bias", "scale", "scales", "scale_inv", "zero_point", "absmax", "inv_freq", "cos_cached", "sin_cached", "A_log"];

/// Modules whose three-dimensional parameters are one matrix per expert.
const EXPERTS: &[&str] = &["experts", "moe", "block_sparse_moe"];

/// Ends of module paths, in runs of whole segments; `^` asks for the whole path. The first that fits decides.
const ENDS: &[(Role, &[&str])] = &[
    (
        Role::Router,
        &[
            "router",
            "router.classifier",
            "router.layer",
            "shared_expert_gate",
            "mlp.gate",
            "mlp.gate.wg",
            "ffn.gate",
            "feed_forward.gate",
            "block_sparse_moe.gate",
            "moe.gate",
            "moe_block.gate",
        ],
    ),
    (
        Role::Head,
        &[
            "lm_head",
            "lm_head.linear",
            "embed_out",
            "output_layer",
            "^output",
            "language_model.output",
            "^head",
            "shared_head.head",
            "cls.predictions.decoder",
            "^score",
            "^classifier",
        ],
    ),
    (
        Role::Embedding,
        &[
            "embed_tokens",
            "embed_tokens_per_layer",
            "embed_positions",
            "embed_in",
            "wte",
            "wpe",
            "tok_embeddings",
            "word_embeddings",
            "position_embeddings",
            "token_type_embeddings",
            "token_embedding",
            "position_embedding",
            "positional_embedding",
            "relative_attention_bias",
            "embeddings",
            "embedding",
            "^embed",
            "^emb",
            "^shared",
            "model.shared",
        ],
    ),
    (Role::Attention, &["attention.output.dense"]),
    (Role::Mlp, &["output.dense"]),
];

/// Modules and projections whose name alone tells the role; the innermost one of a path counts.
const MODULES: &[(Role, &[&str])] = &[
    (
        Role::Attention,
        &[
            "attn",
            "attention",
            "att",
            "self_attn",
            "self_attention",
            "cross_attn",
            "cross_attention",
            "encoder_attn",
            "linear_attn",
            "SelfAttention",
            "EncDecAttention",
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "qkv_proj",
            "q_a_proj",
            "q_b_proj",
            "kv_a_proj_with_mqa",
            "kv_b_proj",
            "c_attn",
            "query_key_value",
            "Wqkv",
            "wqkv",
            "wq",
            "wk",
            "wv",
            "wo",
        ],
    ),
    (
        Role::Mlp,
        &[
            "mlp",
            "ffn",
            "feed_forward",
            "intermediate",
            "DenseReluDense",
            "experts",
            "shared_expert",
            "shared_experts",
            "block_sparse_moe",
            "moe",
            "gate_proj",
            "up_proj",
            "down_proj",
            "gate_up_proj",
            "c_fc",
            "fc1",
            "fc2",
            "fc_in",
            "fc_out",
            "w1",
            "w2",
            "w3",
            "dense_h_to_4h",
            "dense_4h_to_h",
        ],
    ),
];

/// Whether the parameter or its module is a norm, or the parameter ends in one of [`SMALL_ENDS`]. Modules further out
/// do not count: the projection inside an adaptive norm is a matrix like any other.
fn is_small(segments: &[&str]) -> bool {
    let parameter = segments.last().copied().unwrap_or_default();
    let listed =
        |end: &&str| parameter.strip_suffix(*end).is_some_and(|before| before.is_empty() || before.ends_with('_'));
    SMALL_ENDS.iter().any(listed) || segments.iter().rev().take(2).any(|segment| is_norm(segment))
}

/// Whether a segment names a norm: `input_layernorm`, `q_norm`, `ln_f`, `ln1`.
fn is_norm(segment: &str) -> bool {
    let after_ln = segment.strip_prefix("ln").map(|rest| rest.starts_with(|c: char| c == '_' || c.is_ascii_digit()));
    after_ln.unwrap_or(false) || segment.to_ascii_lowercase().contains("norm")
}

/// Whether `path` ends in the dotted run `end`, or is all of it when it starts with `^`.
fn ends_in(path: &[&str], end: &str) -> bool {
    let (whole, run) = end.strip_prefix('^').map_or((false, end), |run| (true, run));
    let mut left = path.iter().rev();
    run.rsplit('.').all(|segment| left.next() == Some(&segment)) && (!whole || left.next().is_none())
}

/// The role that a segment tells by itself.
fn lookup(segment: &str) -> Option<Role> {
    MODULES.iter().find(|(_, names)| names.contains(&segment)).map(|(role, _)| *role)
}
