//! What GGUF calls the parts of a model, read from its `config.json`.
//!
//! Names of tensors are tables of [`crate::gguf`], shared by the architectures that differ in a few of their lines only.

use serde::Deserialize;
use serde_json::Value as Json;

use super::keys::Value;
use crate::artifact::config;
use crate::error::{Error, Result};
use crate::gguf::{ARCHITECTURES, INNER, OUTER};

/// The fields of a config that keys come from.
#[derive(Debug, Deserialize)]
struct Config {
    max_position_embeddings: u32,
    hidden_size: u32,
    intermediate_size: u32,
    num_hidden_layers: u32,
    num_attention_heads: u32,
    num_key_value_heads: Option<u32>,
    head_dim: Option<u32>,
    rms_norm_eps: f32,
    vocab_size: u32,
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
}

/// An architecture.
pub(super) struct Architecture {
    config: Config,
    name: &'static str,
    reorders: bool,
}

impl Architecture {
    /// That of a config.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a config without the fields, an architecture or a scaling of positions that is not known here.
    pub fn of(text: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        struct Kind {
            model_type: Option<String>,
        }
        let bad =
            |e: serde_json::Error| Error::invalid(format!("{}: {e}, which gguf takes a key from", config::CONFIG));
        let kind = serde_json::from_slice::<Kind>(text).map_err(bad)?.model_type.unwrap_or_default();
        let Some((_, name, reorders)) = ARCHITECTURES.iter().find(|(model, ..)| *model == kind) else {
            let known: Vec<_> = ARCHITECTURES.iter().map(|(model, ..)| *model).collect();
            return Err(Error::invalid(format!(
                "model type '{}' has no table of names for gguf here, expected {}; convert the decoded weights \
                 (--to safetensors) with llama.cpp's own converter",
                kind.escape_debug(),
                known.join(", ")
            )));
        };
        let config: Config = serde_json::from_slice(text).map_err(bad)?;
        let own = Self { config, name, reorders: *reorders };
        let kind = own.rope().and_then(|rope| rope.rope_type.as_deref()).unwrap_or("default");
        if !matches!(kind, "default" | "linear" | "llama3") {
            return Err(Error::invalid(format!(
                "positions are scaled by '{}', which is not expressed in gguf here; expected default, linear or llama3",
                kind.escape_debug()
            )));
        }
        Ok(own)
    }

    fn rope(&self) -> Option<&Rope> {
        self.config.rope_parameters.as_ref().or(self.config.rope_scaling.as_ref())
    }

    fn theta(&self) -> f32 {
        let inner = self.rope().and_then(|rope| rope.rope_theta);
        inner.or(self.config.rope_theta).unwrap_or(10_000.0)
    }

    fn head(&self) -> u32 {
        self.config.head_dim.unwrap_or(self.config.hidden_size / self.config.num_attention_heads.max(1))
    }

    /// The name of a tensor, and how many heads its rows are reordered in; nothing for what has no place and needs none.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a tensor that has no place.
    pub fn tensor(&self, name: &str) -> Result<Option<(String, Option<u64>)>> {
        // Frequencies of positions follow from the config.
        if name.ends_with("rotary_emb.inv_freq") {
            return Ok(None);
        }
        let none = || {
            Error::invalid(format!(
                "tensor '{}' has no place in gguf's architecture {}",
                name.escape_debug(),
                self.name
            ))
        };
        let (module, end) = name.rsplit_once('.').ok_or_else(none)?;
        if !matches!(end, "weight" | "bias") {
            return Err(none());
        }
        if let Some((_, own)) = OUTER.iter().find(|(outer, _)| *outer == module) {
            return Ok(Some((format!("{own}.{end}"), None)));
        }
        let (layer, part) =
            module.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')).ok_or_else(none)?;
        let layer: u32 = layer.parse().map_err(|_| none())?;
        let (_, own) = INNER.iter().find(|(inner, _)| *inner == part).ok_or_else(none)?;
        let heads = match *own {
            "attn_q" if self.reorders => Some(self.config.num_attention_heads),
            "attn_k" if self.reorders => Some(self.kv_heads()),
            _ => None,
        };
        Ok(Some((format!("blk.{layer}.{own}.{end}"), heads.map(u64::from))))
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
        let own = |key: &str| format!("{}.{key}", self.name);
        let mut keys = vec![
            ("general.architecture".to_owned(), Value::Text(self.name.to_owned())),
            ("general.name".to_owned(), Value::Text(model.to_owned())),
            (own("context_length"), Value::U32(config.max_position_embeddings)),
            (own("embedding_length"), Value::U32(config.hidden_size)),
            (own("block_count"), Value::U32(config.num_hidden_layers)),
            (own("feed_forward_length"), Value::U32(config.intermediate_size)),
            (own("attention.head_count"), Value::U32(config.num_attention_heads)),
            (own("attention.head_count_kv"), Value::U32(self.kv_heads())),
            (own("attention.layer_norm_rms_epsilon"), Value::F32(config.rms_norm_eps)),
            (own("attention.key_length"), Value::U32(self.head())),
            (own("attention.value_length"), Value::U32(self.head())),
            (own("rope.dimension_count"), Value::U32(self.head())),
            (own("rope.freq_base"), Value::F32(self.theta())),
            (own("vocab_size"), Value::U32(config.vocab_size)),
        ];
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
