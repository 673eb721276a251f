//! The keys of a model by name, and what they say in the terms of a `config.json`.
//!
//! What a config cannot say as the file does is an error in words, and there is no config then: a model that loads and
//! computes something else is worse than none.

use std::collections::BTreeMap;

use serde_json::{Map, Number, Value as Json, json};

use super::FACTORS;
use super::header::{Tensor, Value};
use super::kind::Kind as Type;
use crate::gguf::{KNOWN, Kind};
use crate::tensor::DType;

/// What a key or the lack of one keeps from being said.
type Said<T> = Result<T, String>;

/// The keys of a file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Keys<'a> {
    all: &'a BTreeMap<String, Value>,
    pub architecture: &'a str,
}

impl<'a> Keys<'a> {
    pub fn new(all: &'a BTreeMap<String, Value>) -> Self {
        let architecture = match all.get("general.architecture") {
            Some(Value::Text(name)) => name.as_str(),
            _ => "",
        };
        Self { all, architecture }
    }

    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.all.get(key)
    }

    pub fn number(&self, key: &str) -> Option<u64> {
        match self.get(key) {
            Some(Value::Integer(n)) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    pub fn text(&self, key: &str) -> Option<&'a str> {
        match self.get(key) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.get(key) {
            Some(Value::Bool(yes)) => Some(*yes),
            _ => None,
        }
    }

    /// The short texts that say where a model comes from.
    pub fn general(&self) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.all.iter().filter(|(key, _)| key.starts_with("general.")).filter_map(|(key, value)| match value {
            Value::Text(text) => Some((key.as_str(), text.as_str())),
            _ => None,
        })
    }

    /// A number of the architecture.
    pub fn own(&self, key: &str) -> Option<u64> {
        self.number(&format!("{}.{key}", self.architecture))
    }

    fn float(&self, key: &str) -> Option<Json> {
        match self.get(&format!("{}.{key}", self.architecture)) {
            Some(Value::Float(f)) => Number::from_f64(*f).map(Json::Number),
            _ => None,
        }
    }

    fn need(&self, key: &str) -> Said<u64> {
        self.own(key).ok_or_else(|| format!("key {}.{key} is missing or no number", self.architecture))
    }

    fn need_float(&self, key: &str) -> Said<Json> {
        self.float(key).ok_or_else(|| format!("key {}.{key} is missing or no number", self.architecture))
    }

    /// What is known of the architecture; of several model types that share one that which has these keys.
    pub fn kind(&self) -> Option<&'static Kind> {
        let mut kinds = KNOWN.iter().filter(|kind| kind.name == self.architecture);
        let first = kinds.next()?;
        let wanted = match (self.own("expert_count"), self.own("attention.sliding_window")) {
            (Some(1..), _) => "mixtral",
            (_, Some(1..)) => "mistral",
            _ => first.model,
        };
        Some(kinds.find(|kind| kind.model == wanted).unwrap_or(first))
    }
}

/// The config of a model, of which a tensor may say how positions are scaled.
///
/// # Errors
/// Why there is none, in words.
pub(super) fn config(keys: Keys<'_>, tensors: &[&Tensor], factors: Option<&[f32]>) -> Said<Json> {
    let Some(kind) = keys.kind() else {
        return Err(format!("architecture '{}' has no table of names here", keys.architecture.escape_debug()));
    };
    let find = |name: &str| tensors.iter().find(|tensor| tensor.name == name);
    let embedding = find("token_embd.weight").ok_or("there is no token_embd.weight")?;
    let unknown = |tensor: &&&Tensor| kind.hugging_face(&tensor.name).is_none() && tensor.name != FACTORS;
    if let Some(tensor) = tensors.iter().find(unknown) {
        let name = tensor.name.escape_debug();
        return Err(format!("tensor '{name}' has no place in a model of type {}", kind.model));
    }
    if let Some(theirs) = tensors.iter().find(|tensor| {
        let own = kind.hugging_face(&tensor.name);
        let turned = own.as_ref().is_some_and(|own| own.turned) && !matches!(tensor.kind, Type::Plain(_));
        turned || (own.is_some_and(|own| own.shifted) && tensor.kind != Type::Plain(DType::F32))
    }) {
        let name = theirs.name.escape_debug();
        return Err(format!("tensor '{name}' is quantized, and a model of type {} has it in another form", kind.model));
    }
    let token = |name: &str| Json::from(keys.number(&format!("tokenizer.ggml.{name}_token_id")));
    let mut all = Map::new();
    let mut set = |key: &str, value: Json| all.insert(key.to_owned(), value);
    set("architectures", json!([kind.class]));
    set("model_type", kind.model.into());
    set("vocab_size", embedding.shape.first().copied().unwrap_or(0).into());
    set("tie_word_embeddings", find("output.weight").is_none().into());
    set("bos_token_id", token("bos"));
    set("eos_token_id", token("eos"));
    set("pad_token_id", token("padding"));
    let (hidden, heads, layers) =
        (keys.need("embedding_length")?, keys.need("attention.head_count")?, keys.need("block_count")?);
    if heads == 0 || !hidden.is_multiple_of(heads) && keys.own("attention.key_length").is_none() {
        return Err(format!("{heads} heads do not share {hidden} channels"));
    }
    let head = keys.own("attention.key_length").unwrap_or(hidden / heads);
    if kind.name == "gpt2" {
        set("n_positions", keys.need("context_length")?.into());
        set("n_embd", hidden.into());
        set("n_layer", layers.into());
        set("n_head", heads.into());
        set("n_inner", keys.need("feed_forward_length")?.into());
        set("layer_norm_epsilon", keys.need_float("attention.layer_norm_epsilon")?);
        return Ok(Json::Object(all));
    }
    set("max_position_embeddings", keys.need("context_length")?.into());
    set("hidden_size", hidden.into());
    set("num_hidden_layers", layers.into());
    set("num_attention_heads", heads.into());
    let groups = format!("{}.attention.head_count_kv", keys.architecture);
    set(
        "num_key_value_heads",
        match keys.get(&groups) {
            None => heads.into(),
            Some(_) => keys.need("attention.head_count_kv")?.into(),
        },
    );
    set("head_dim", head.into());
    set("intermediate_size", keys.need("feed_forward_length")?.into());
    set("rms_norm_eps", keys.need_float("attention.layer_norm_rms_epsilon")?);
    if matches!(kind.model, "llama" | "mistral" | "qwen3") {
        set("attention_bias", find("blk.0.attn_q.bias").is_some().into());
    }
    let window = Json::from(keys.own("attention.sliding_window"));
    match kind.model {
        "mistral" | "mixtral" | "phi3" => drop(set("sliding_window", window)),
        "gemma2" | "gemma3_text" => {
            set("sliding_window", keys.need("attention.sliding_window")?.into());
            // The largest models of either kind alone divide by another number.
            let largest = layers == if kind.model == "gemma2" { 46 } else { 62 };
            set("query_pre_attn_scalar", if largest { hidden / heads } else { head }.into());
            for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
                set(key, keys.float(key).unwrap_or(Json::Null));
            }
        }
        _ => {}
    }
    if let Some(normalizes) = kind.normalizes_experts {
        let count = if kind.model == "mixtral" { "num_local_experts" } else { "num_experts" };
        set(count, keys.need("expert_count")?.into());
        set("num_experts_per_tok", keys.need("expert_used_count")?.into());
        if kind.model != "mixtral" {
            set("moe_intermediate_size", keys.need("expert_feed_forward_length")?.into());
            set("norm_topk_prob", normalizes.into());
        }
        if let Some(shared) = keys.own("expert_shared_feed_forward_length") {
            set("shared_expert_intermediate_size", shared.into());
        }
    }
    if keys.own("rope.dimension_count").is_some_and(|turned| turned != head) {
        return Err("only a part of each head is turned by its position".to_owned());
    }
    let theta = keys.float("rope.freq_base").unwrap_or_else(|| json!(10000.0));
    let scaling = scaling(keys, factors, head, &theta)?;
    if kind.model == "gemma3_text" {
        let local = keys.float("rope.freq_base_swa").unwrap_or_else(|| json!(10000.0));
        let mut full = scaling.unwrap_or_else(|| json!({"rope_type": "default"}));
        full["rope_theta"] = theta;
        let sliding = json!({"rope_type": "default", "rope_theta": local});
        set("rope_parameters", json!({"full_attention": full, "sliding_attention": sliding}));
        return Ok(Json::Object(all));
    }
    set("rope_theta", theta);
    if kind.model == "phi3"
        && let Some(context) = keys.own("rope.scaling.original_context_length")
    {
        set("original_max_position_embeddings", context.into());
    }
    if let Some(scaling) = scaling {
        set("rope_scaling", scaling);
    }
    Ok(Json::Object(all))
}

/// How positions are scaled, where they are.
fn scaling(keys: Keys<'_>, factors: Option<&[f32]>, head: u64, theta: &Json) -> Said<Option<Json>> {
    if let Some(factors) = factors {
        let theta = theta.as_f64().unwrap_or(10000.0);
        return llama3(factors, head, theta).map(Some).ok_or_else(|| "no known rule gives its rope_freqs".to_owned());
    }
    match keys.text(&format!("{}.rope.scaling.type", keys.architecture)) {
        None | Some("none") => Ok(None),
        Some("linear") => Ok(Some(json!({"rope_type": "linear", "factor": keys.need_float("rope.scaling.factor")?}))),
        Some(other) => Err(format!("positions are scaled by '{}'", other.escape_debug())),
    }
}

/// The numbers of Llama 3's scaling that give these divisors of frequencies.
fn llama3(factors: &[f32], head: u64, theta: f64) -> Option<Json> {
    const LOW: f64 = 1.0;
    const HIGH: f64 = 4.0;
    let factor = factors.iter().copied().fold(1.0_f32, f32::max);
    let own = |i: usize, context: f64| {
        let turns = context / (std::f64::consts::TAU * theta.powf(2.0 * i as f64 / head as f64));
        let smooth = (turns - LOW) / (HIGH - LOW);
        if turns > HIGH {
            1.0
        } else if turns < LOW {
            f64::from(factor)
        } else {
            1.0 / ((1.0 - smooth) / f64::from(factor) + smooth)
        }
    };
    let close = |context: f64| {
        factors.iter().enumerate().all(|(i, &found)| (f64::from(found) / own(i, context) - 1.0).abs() < 1e-5)
    };
    // That of the models that there are first: others may give the same divisors.
    let context = std::iter::once(13).chain(4..=24).map(|log| 1_u64 << log).find(|&context| close(context as f64))?;
    (factors.len() as u64 == head / 2).then(|| {
        json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": LOW, "high_freq_factor": HIGH,
            "original_max_position_embeddings": context
        })
    })
}
