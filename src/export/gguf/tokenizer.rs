//! The tokenizer of a model, from its `tokenizer.json`: byte-level BPE as GPT-2 and its heirs have it, or BPE with byte
//! fallback as Llama 2 has it. Any other is left out, with a note: the file then has token numbers and no text.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value as Json;

use super::keys::Value;
use crate::artifact::ArtifactFile;
use crate::error::{Error, Result};

/// How text is cut before merges: part of the pattern of `tokenizer.json`, and GGUF's name for it.
const CUTS: &[(&str, &str)] = &[
    (r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+", "llama-bpe"),
    (r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+", "qwen2"),
];

/// Kinds of tokens.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

#[derive(Deserialize)]
struct Tokenizer {
    model: Model,
    #[serde(default)]
    added_tokens: Vec<Added>,
    pre_tokenizer: Option<Json>,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    vocab: Json,
    #[serde(default)]
    merges: Vec<Merge>,
    #[serde(default)]
    byte_fallback: bool,
    unk_token: Option<String>,
}

/// A merge in either notation of the library.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Text(String),
    Pair([String; 2]),
}

impl Merge {
    fn pair(&self) -> Option<(&str, &str)> {
        match self {
            Self::Text(text) => text.split_once(' '),
            Self::Pair([a, b]) => Some((a, b)),
        }
    }
}

#[derive(Deserialize)]
struct Added {
    id: usize,
    content: String,
    special: bool,
}

/// Adds the keys of the tokenizer, for a model of so many rows of embeddings.
///
/// # Errors
/// [`Error::Invalid`] for a file that cannot be read as one, those of reading it.
pub(super) fn keys(
    artifact: &ArtifactFile,
    rows: u64,
    keys: &mut Vec<(String, Value)>,
    notes: &mut Vec<String>,
) -> Result<()> {
    let own = |key: &str| format!("tokenizer.ggml.{key}");
    let none = |keys: &mut Vec<(String, Value)>, notes: &mut Vec<String>, why: &str| {
        keys.push((own("model"), Value::Text("none".to_owned())));
        notes.push(format!("the tokenizer is left out, so that the file takes token numbers only: {why}"));
        Ok(())
    };
    let Some(index) = artifact.header().files().iter().position(|file| &*file.name == "tokenizer.json") else {
        return none(keys, notes, "the model has no tokenizer.json");
    };
    let text = artifact.attached(index)?;
    let tokenizer: Tokenizer = serde_json::from_slice(&text)
        .map_err(|e| Error::invalid(format!("tokenizer.json of the model cannot be read: {e}")))?;
    let (Some("BPE"), Json::Object(vocab)) = (tokenizer.model.kind.as_deref(), &tokenizer.model.vocab) else {
        return none(keys, notes, "it is no BPE");
    };
    let pieces = tokenizer.model.byte_fallback;
    let cut = tokenizer.pre_tokenizer.as_ref().map(Json::to_string).unwrap_or_default();
    if !pieces && !cut.contains("ByteLevel") {
        return none(keys, notes, "it is neither byte-level nor has byte fallback");
    }
    let mut tokens: BTreeMap<usize, (&str, i32)> = BTreeMap::new();
    for (token, id) in vocab {
        let id = id.as_u64().and_then(|id| usize::try_from(id).ok());
        let id = id.ok_or_else(|| Error::invalid("tokenizer.json has a token without a number"))?;
        let is_byte = pieces && token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
        tokens.insert(id, (token, if is_byte { BYTE } else { NORMAL }));
    }
    for added in &tokenizer.added_tokens {
        let is_unknown = tokenizer.model.unk_token.as_ref() == Some(&added.content);
        let kind = if is_unknown {
            UNKNOWN
        } else if added.special {
            CONTROL
        } else {
            USER
        };
        tokens.insert(added.id, (&added.content, kind));
    }
    let most = tokens.last_key_value().map_or(0, |(id, _)| id + 1);
    let count = usize::try_from(rows).unwrap_or(0).max(most);
    if count > 1 << 24 {
        return Err(Error::invalid(format!("tokenizer.json has a token number of {most}")));
    }
    let (mut texts, mut kinds) = (Vec::with_capacity(count), Vec::with_capacity(count));
    for id in 0..count {
        let (text, kind) =
            tokens.get(&id).map_or_else(|| (format!("[PAD{id}]"), UNUSED), |(text, kind)| ((*text).to_owned(), *kind));
        texts.push(text);
        kinds.push(kind);
    }
    if pieces {
        // Of two neighbours those are merged first whose merge comes first.
        let mut scores = vec![0.0; count];
        for (rank, merge) in tokenizer.model.merges.iter().enumerate() {
            let id = merge.pair().and_then(|(a, b)| vocab.get(&format!("{a}{b}"))).and_then(Json::as_u64);
            if let Some(score) = id.and_then(|id| scores.get_mut(usize::try_from(id).unwrap_or(usize::MAX))) {
                #[expect(clippy::cast_precision_loss, reason = "fewer merges than a single counts")]
                let rank = rank as f32;
                *score = -rank;
            }
        }
        keys.push((own("model"), Value::Text("llama".to_owned())));
        keys.push((own("scores"), Value::F32s(scores)));
    } else {
        let known =
            CUTS.iter().find(|(pattern, _)| cut.contains(&pattern.replace('\\', "\\\\"))).map(|(_, name)| *name);
        let plain = cut.contains("\"use_regex\":true");
        let name = known.unwrap_or(if plain { "gpt-2" } else { "default" });
        if name == "default" {
            notes.push(
                "the tokenizer cuts text in a way that has no name here; the file says 'default', which may differ"
                    .to_owned(),
            );
        }
        let merges = tokenizer.model.merges.iter().filter_map(Merge::pair).map(|(a, b)| format!("{a} {b}")).collect();
        keys.push((own("model"), Value::Text("gpt2".to_owned())));
        keys.push((own("pre"), Value::Text(name.to_owned())));
        keys.push((own("merges"), Value::Texts(merges)));
    }
    keys.push((own("tokens"), Value::Texts(texts)));
    keys.push((own("token_type"), Value::I32s(kinds)));
    options(artifact, keys)
}

/// Adds what `tokenizer_config.json` says.
fn options(artifact: &ArtifactFile, keys: &mut Vec<(String, Value)>) -> Result<()> {
    #[derive(Deserialize)]
    struct Options {
        add_bos_token: Option<bool>,
        add_eos_token: Option<bool>,
        chat_template: Option<Json>,
    }
    let name = "tokenizer_config.json";
    let Some(index) = artifact.header().files().iter().position(|file| &*file.name == name) else { return Ok(()) };
    let options: Options = serde_json::from_slice(&artifact.attached(index)?)
        .map_err(|e| Error::invalid(format!("{name} of the model cannot be read: {e}")))?;
    for (key, value) in [("add_bos_token", options.add_bos_token), ("add_eos_token", options.add_eos_token)] {
        if let Some(value) = value {
            keys.push((format!("tokenizer.ggml.{key}"), Value::Bool(value)));
        }
    }
    if let Some(Json::String(template)) = options.chat_template {
        keys.push(("tokenizer.chat_template".to_owned(), Value::Text(template)));
    }
    Ok(())
}
