//! Keys and names of a model in GGUF, read from its `config.json`; what each architecture calls its tensors is a table in
//! [`crate::gguf`].
//!
//! What the engine assumes of an architecture and the config contradicts is refused: logits would be other ones.

use serde::Deserialize;
use serde_json::Value as Json;

use super::keys::Value;
use crate::artifact::config;
use crate::error::{Error, Result};
use crate::gguf::{KNOWN, Kind};

/// The fields of a config that keys come from.
#[derive(Debug, Deserialize)]
struct Config {
    #[serde(alias = "n_positions")]
    max_position_embeddings: u32,
    #[serde(alias = "n_embd")]
    hidden_size: u32,
    #[serde(alias = "n_inner")]
    intermediate_size: Option<u32>,
    #[serde(alias = "n_layer")]
    num_hidden_layers: u32,
    #[serde(alias = "n_head")]
    num_attention_heads: u32,
    num_key_value_heads: Option<u32>,
    head_dim: Option<u32>,
    #[serde(alias = "layer_norm_epsilon")]
    rms_norm_eps: f32,
    vocab_size: u32,
    #[serde(alias = "num_local_experts")]
    num_experts: Option<u32>,
    num_experts_per_tok: Option<u32>,
    moe_intermediate_size: Option<u32>,
    shared_expert_intermediate_size: Option<u32>,
    norm_topk_prob: Option<bool>,
    query_pre_attn_scalar: Option<f32>,
    attn_logit_softcapping: Option<f32>,
    final_logit_softcapping: Option<f32>,
    rope_local_base_freq: Option<f32>,
    partial_rotary_factor: Option<f32>,
    layer_types: Option<Vec<String>>,
    original_max_position_embeddings: Option<u32>,
    rope_theta: Option<f32>,
    rope_scaling: Option<Rope>,
    rope_parameters: Option<Rope>,
    sliding_window: Option<u32>,
    use_sliding_window: Option<bool>,
    bos_token_id: Option<Json>,
    eos_token_id: Option<Json>,
}

/// How positions are turned, in the old and the new notation of transformers.
#[derive(Debug, Deserialize)]
struct Rope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f32>,
    factor: Option<f32>,
    low_freq_factor: Option<f32>,
    high_freq_factor: Option<f32>,
    original_max_position_embeddings: Option<f32>,
    /// Where kinds of layers have their own.
    full_attention: Option<Box<Rope>>,
    sliding_attention: Option<Box<Rope>>,
}

/// Where a tensor goes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Nowhere: it follows from the config.
    Nowhere,
    /// A tensor of its own.
    Own {
        name: String,
        /// How many heads its rows are reordered in.
        heads: Option<u64>,
        /// Whether one is added to its elements.
        adds_one: bool,
        /// Whether the source holds it as `[in, out]`.
        turned: bool,
    },
    /// One of the matrices of a stack.
    Expert { name: String, number: u32 },
}

/// An architecture.
pub(super) struct Architecture {
    config: Config,
    kind: &'static Kind,
}

impl Architecture {
    /// That of a config.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a config without the fields, an architecture or a scaling of positions that is not known here.
    pub fn of(text: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        struct Model {
            model_type: Option<String>,
        }
        let bad =
            |e: serde_json::Error| Error::invalid(format!("{}: {e}, which gguf takes a key from", config::CONFIG));
        let model = serde_json::from_slice::<Model>(text).map_err(bad)?.model_type.unwrap_or_default();
        let Some(kind) = KNOWN.iter().find(|kind| kind.model == model) else {
            let known: Vec<_> = KNOWN.iter().map(|kind| kind.model).collect();
            return Err(Error::invalid(format!(
                "model type '{}' has no table of names for gguf here, expected {}; convert the decoded weights \
                 (--to safetensors) with llama.cpp's own converter",
                model.escape_debug(),
                known.join(", ")
            )));
        };
        let config: Config = serde_json::from_slice(text).map_err(bad)?;
        let own = Self { config, kind };
        let scaling = own.rope().and_then(|rope| rope.rope_type.as_deref()).unwrap_or("default");
        if !matches!(scaling, "default" | "linear" | "llama3") {
            return Err(Error::invalid(format!(
                "positions are scaled by '{}', which is not expressed in gguf here; expected default, linear or llama3",
                scaling.escape_debug()
            )));
        }
        own.check()?;
        Ok(own)
    }

    /// Refuses what the engine computes in another way.
    fn check(&self) -> Result<()> {
        let (config, name) = (&self.config, self.kind.name);
        let other = |what: String| Err(Error::invalid(format!("{}: {what}", config::CONFIG)));
        if let Some(normalizes) = self.kind.normalizes_experts {
            let own = config.norm_topk_prob.unwrap_or(self.kind.model == "mixtral");
            if own != normalizes {
                let all = format!("and gguf's architecture {name} always has {normalizes}");
                return other(format!("norm_topk_prob is {own}, {all}"));
            }
            if config.num_experts.is_none() || config.num_experts_per_tok.is_none() {
                return other("the number of experts is missing, which gguf takes a key from".to_owned());
            }
        }
        if config.partial_rotary_factor.is_some_and(|part| part < 1.0) {
            return other("only a part of each head is turned, which is not expressed in gguf here".to_owned());
        }
        let Some(pattern) = self.pattern() else { return Ok(()) };
        let scalar = config.query_pre_attn_scalar.unwrap_or(256.0);
        // The largest models of either kind alone divide by another number.
        let (layers, divided) = if name == "gemma2" { (46, "gemma2") } else { (62, "gemma3") };
        let wanted = match config.num_hidden_layers == layers {
            true => f64::from(config.hidden_size) / f64::from(config.num_attention_heads),
            false => f64::from(self.head()),
        };
        if (f64::from(scalar) - wanted).abs() > 1e-6 {
            return other(format!("query_pre_attn_scalar is {scalar}, and gguf's architecture {divided} has {wanted}"));
        }
        let expected =
            |layer: usize| if (layer + 1).is_multiple_of(pattern) { "full_attention" } else { "sliding_attention" };
        let types = config.layer_types.iter().flatten().enumerate();
        if let Some((layer, found)) = types.into_iter().find(|(layer, found)| *found != expected(*layer)) {
            let found = found.escape_debug();
            return other(format!("layer {layer} has {found}, and gguf's architecture {name} has {}", expected(layer)));
        }
        if name == "gemma2" && (config.attn_logit_softcapping.is_none() || config.final_logit_softcapping.is_none()) {
            return other("a softcapping is missing, and gguf's architecture gemma2 always has both".to_owned());
        }
        Ok(())
    }

    /// One layer of so many sees everything, where the others see a window.
    fn pattern(&self) -> Option<usize> {
        match self.kind.name {
            "gemma2" => Some(2),
            "gemma3" => Some(6),
            _ => None,
        }
    }

    /// How many experts each layer has.
    pub fn experts(&self) -> usize {
        if self.kind.experts.is_empty() { 0 } else { self.config.num_experts.unwrap_or(0) as usize }
    }

    fn rope(&self) -> Option<&Rope> {
        let given = self.config.rope_parameters.as_ref().or(self.config.rope_scaling.as_ref())?;
        Some(given.full_attention.as_deref().unwrap_or(given))
    }

    fn theta(&self) -> f32 {
        let inner = self.rope().and_then(|rope| rope.rope_theta);
        inner.or(self.config.rope_theta).unwrap_or(10_000.0)
    }

    fn head(&self) -> u32 {
        self.config.head_dim.unwrap_or(self.config.hidden_size / self.config.num_attention_heads.max(1))
    }

    /// Where a tensor goes.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a tensor that has no place.
    pub fn place(&self, name: &str) -> Result<Place> {
        let gpt2 = self.kind.name == "gpt2";
        // Frequencies of positions and masks follow from the config.
        if name.ends_with("rotary_emb.inv_freq")
            || (gpt2 && (name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias")))
        {
            return Ok(Place::Nowhere);
        }
        let none = || {
            let (name, own) = (name.escape_debug(), self.kind.name);
            Error::invalid(format!("tensor '{name}' has no place in gguf's architecture {own}"))
        };
        let (module, end) = name.rsplit_once('.').ok_or_else(none)?;
        if !matches!(end, "weight" | "bias") {
            return Err(none());
        }
        let adds_one = |own: &str| self.kind.norms_add_one && end == "weight" && own.ends_with("_norm");
        if let Some((_, own)) = self.kind.outer.iter().find(|(outer, _)| *outer == module) {
            let name = format!("{own}.{end}");
            return Ok(Place::Own { name, heads: None, adds_one: adds_one(own), turned: false });
        }
        let rest = self.kind.layers.iter().find_map(|prefix| module.strip_prefix(prefix)).ok_or_else(none)?;
        let (layer, part) = rest.split_once('.').ok_or_else(none)?;
        let layer: u32 = layer.parse().map_err(|_| none())?;
        if let Some((part, number)) = starred(part)
            && let Some((_, own)) = self.kind.experts.iter().find(|(expert, _)| *expert == part)
        {
            if end != "weight" || number as usize >= self.experts() {
                return Err(none());
            }
            return Ok(Place::Expert { name: format!("blk.{layer}.{own}.{end}"), number });
        }
        let (_, own) =
            self.kind.inner.iter().flat_map(|names| *names).find(|(inner, _)| *inner == part).ok_or_else(none)?;
        let heads = match *own {
            "attn_q" if self.kind.reorders => Some(self.config.num_attention_heads),
            "attn_k" if self.kind.reorders => Some(self.kv_heads()),
            _ => None,
        };
        let turned = end == "weight" && self.kind.turns(own);
        let name = format!("blk.{layer}.{own}.{end}");
        Ok(Place::Own { name, heads: heads.map(u64::from), adds_one: adds_one(own), turned })
    }

    fn feed_forward(&self) -> Result<u32> {
        match self.config.intermediate_size {
            Some(width) => Ok(width),
            None if self.kind.name == "gpt2" => Ok(self.config.hidden_size.saturating_mul(4)),
            None => {
                let what = "missing field `intermediate_size`, which gguf takes a key from";
                Err(Error::invalid(format!("{}: {what}", config::CONFIG)))
            }
        }
    }

    fn kv_heads(&self) -> u32 {
        self.config.num_key_value_heads.unwrap_or(self.config.num_attention_heads)
    }

    /// What divides the frequencies of positions, where the config asks for Llama 3's scaling.
    ///
    /// # Errors
    /// [`Error::Invalid`] when a field of it is missing.
    pub fn rope_factors(&self) -> Result<Option<Vec<f32>>> {
        let Some(rope) = self.rope().filter(|rope| rope.rope_type.as_deref() == Some("llama3")) else {
            return Ok(None);
        };
        let need = |field: Option<f32>, name: &str| {
            field.ok_or_else(|| Error::invalid(format!("{}: scaling of positions without '{name}'", config::CONFIG)))
        };
        let factor = need(rope.factor, "factor")?;
        let low = need(rope.low_freq_factor, "low_freq_factor")?;
        let high = need(rope.high_freq_factor, "high_freq_factor")?;
        let context = need(rope.original_max_position_embeddings, "original_max_position_embeddings")?;
        let (head, theta) = (self.head(), f64::from(self.theta()));
        let one = |i: u32| {
            let wavelength = std::f64::consts::TAU * theta.powf(f64::from(2 * i) / f64::from(head));
            let turns = f64::from(context) / wavelength;
            let smooth = (turns - f64::from(low)) / f64::from(high - low);
            let factor = f64::from(factor);
            #[expect(clippy::cast_possible_truncation, reason = "the file has singles")]
            let divisor = if turns > f64::from(high) {
                1.0
            } else if turns < f64::from(low) {
                factor
            } else {
                1.0 / ((1.0 - smooth) / factor + smooth)
            } as f32;
            divisor
        };
        Ok(Some((0..head / 2).map(one).collect()))
    }

    /// The keys of the model.
    ///
    /// # Errors
    /// [`Error::Invalid`] when a token's number does not fit.
    pub fn keys(&self, model: &str) -> Result<Vec<(String, Value)>> {
        let config = &self.config;
        let own = |key: &str| format!("{}.{key}", self.kind.name);
        let epsilon = if self.kind.name == "gpt2" { "layer_norm_epsilon" } else { "layer_norm_rms_epsilon" };
        let mut keys = vec![
            ("general.architecture".to_owned(), Value::Text(self.kind.name.to_owned())),
            ("general.name".to_owned(), Value::Text(model.to_owned())),
            (own("context_length"), Value::U32(config.max_position_embeddings)),
            (own("embedding_length"), Value::U32(config.hidden_size)),
            (own("block_count"), Value::U32(config.num_hidden_layers)),
            (own("feed_forward_length"), Value::U32(self.feed_forward()?)),
            (own("attention.head_count"), Value::U32(config.num_attention_heads)),
            (own("attention.head_count_kv"), Value::U32(self.kv_heads())),
            (own(&format!("attention.{epsilon}")), Value::F32(config.rms_norm_eps)),
            (own("attention.key_length"), Value::U32(self.head())),
            (own("attention.value_length"), Value::U32(self.head())),
        ];
        if self.kind.name != "gpt2" {
            keys.push((own("rope.dimension_count"), Value::U32(self.head())));
            keys.push((own("rope.freq_base"), Value::F32(self.theta())));
        }
        keys.push((own("vocab_size"), Value::U32(config.vocab_size)));
        if !self.kind.experts.is_empty() {
            for (key, number) in [
                ("expert_count", config.num_experts),
                ("expert_used_count", config.num_experts_per_tok),
                ("expert_feed_forward_length", config.moe_intermediate_size),
                ("expert_shared_feed_forward_length", config.shared_expert_intermediate_size),
            ] {
                keys.extend(number.map(|number| (own(key), Value::U32(number))));
            }
        }
        if self.pattern().is_some() {
            let sliding = config.rope_parameters.as_ref().and_then(|rope| rope.sliding_attention.as_ref());
            let local = sliding.and_then(|rope| rope.rope_theta).or(config.rope_local_base_freq);
            for (key, number) in [
                ("attn_logit_softcapping", config.attn_logit_softcapping),
                ("final_logit_softcapping", config.final_logit_softcapping),
                ("rope.freq_base_swa", local),
            ] {
                keys.extend(number.map(|number| (own(key), Value::F32(number))));
            }
        }
        if self.kind.name == "phi3" {
            let context = config.original_max_position_embeddings.unwrap_or(config.max_position_embeddings);
            keys.push((own("rope.scaling.original_context_length"), Value::U32(context)));
        }
        if let Some(rope) = self.rope().filter(|rope| rope.rope_type.as_deref() == Some("linear")) {
            keys.push((own("rope.scaling.type"), Value::Text("linear".to_owned())));
            keys.push((own("rope.scaling.factor"), Value::F32(rope.factor.unwrap_or(1.0))));
        }
        if let Some(window) = config.sliding_window.filter(|_| config.use_sliding_window != Some(false)) {
            keys.push((own("attention.sliding_window"), Value::U32(window)));
        }
        for (key, id) in [("bos", &config.bos_token_id), ("eos", &config.eos_token_id)] {
            // Of several ends the first is the one of the text.
            let id =
                id.as_ref().and_then(|id| id.as_array().map_or(Some(id), |ids| ids.first())).and_then(Json::as_u64);
            if let Some(id) = id {
                let id = u32::try_from(id).map_err(|_| Error::invalid(format!("token {id} is beyond 32 bits")))?;
                keys.push((format!("tokenizer.ggml.{key}_token_id"), Value::U32(id)));
            }
        }
        Ok(keys)
    }
}

/// A name with a star for the number in it, and the number.
fn starred(part: &str) -> Option<(String, u32)> {
    let mut found = None;
    let segments: Vec<&str> = part
        .split('.')
        .map(|segment| match segment.parse() {
            Ok(number) if found.is_none() => {
                found = Some(number);
                "*"
            }
            _ => segment,
        })
        .collect();
    found.map(|number| (segments.join("."), number))
}
