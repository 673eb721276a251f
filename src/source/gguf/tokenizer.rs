//! The tokenizer of a model as files of transformers: `tokenizer.json` and `tokenizer_config.json`.
//!
//! Byte-level BPE has its merges in the file, and a name for the way in which text is cut before. The tokenizer of Llama 2
//! has scores instead of merges: of two neighbours those become one first whose token has the highest score, so every way
//! of putting a token together of two others is a merge, in the order of scores.

use std::collections::HashMap;

use serde_json::{Map, Value as Json, json};

use super::header::Value;
use super::keys::Keys;

/// Kinds of tokens.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER: i32 = 4;
const UNUSED: i32 = 5;

/// The most bytes of a token that scores put together: all its ways of being put together are tried. Those of Gemma have
/// up to 93.
const LONGEST: usize = 128;

/// What GGUF calls a way of cutting text, and the pattern of a piece.
const CUTS: &[(&str, &str)] = &[
    (
        "llama-bpe",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    (
        "qwen2",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
];

/// The files, by name.
///
/// # Errors
/// Why there are none, in words.
pub(super) fn files(keys: Keys<'_>) -> Result<Vec<(&'static str, Json)>, String> {
    let own = |key: &str| keys.get(&format!("tokenizer.ggml.{key}"));
    let model = keys.text("tokenizer.ggml.model").unwrap_or("none");
    let (Some(Value::Texts(tokens)), "gpt2" | "llama") = (own("tokens"), model) else {
        return Err(format!("its tokenizer is of the kind '{}'", model.escape_debug()));
    };
    let kinds = match own("token_type") {
        Some(Value::Integers(kinds)) if kinds.len() == tokens.len() => kinds.clone(),
        None => vec![NORMAL; tokens.len()],
        Some(_) => return Err("its tokens and their kinds differ in number".to_owned()),
    };
    let all = || tokens.iter().zip(&kinds).enumerate();
    let mut vocab = Map::new();
    for (id, (token, &kind)) in all() {
        if kind != UNUSED && vocab.insert(token.clone(), id.into()).is_some() {
            return Err(format!("token '{}' occurs twice", token.escape_debug()));
        }
    }
    let added: Vec<Json> = all()
        .filter(|(_, (_, kind))| matches!(**kind, UNKNOWN | CONTROL | USER))
        .map(|(id, (token, &kind))| {
            json!({
                "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": kind != USER
            })
        })
        .collect();
    let token = |name: &str| {
        let id = keys.number(&format!("tokenizer.ggml.{name}_token_id"))?;
        Some((id, tokens.get(usize::try_from(id).ok()?)?))
    };
    let unknown = all().find(|(_, (_, kind))| **kind == UNKNOWN).map(|(_, (token, _))| token);
    let mut tokenizer = if model == "gpt2" {
        let Some(Value::Texts(merges)) = own("merges") else { return Err("its tokenizer has no merges".to_owned()) };
        let cut = keys.text("tokenizer.ggml.pre").unwrap_or("gpt-2");
        byte_level(cut, merges)?
    } else {
        let scores = match own("scores") {
            Some(Value::Floats(scores)) if scores.len() == tokens.len() => scores,
            _ => return Err("its tokens and their scores differ in number".to_owned()),
        };
        let ids: HashMap<&str, usize> =
            all().filter(|(_, (_, kind))| **kind == NORMAL).map(|(id, (token, _))| (token.as_str(), id)).collect();
        if let Some(longest) = ids.keys().map(|token| token.len()).max().filter(|&longest| longest > LONGEST) {
            return Err(format!("a token of its tokenizer has {longest} bytes"));
        }
        let prefix = keys.bool("tokenizer.ggml.add_space_prefix").unwrap_or(true);
        pieces(&ids, scores, unknown.map(String::as_str), prefix)
    };
    let adds = |name: &str| keys.bool(&format!("tokenizer.ggml.add_{name}_token"));
    // Llama's adds the beginning unless told otherwise.
    let (add_bos, add_eos) = (adds("bos").unwrap_or(model == "llama"), adds("eos").unwrap_or(false));
    let (bos, eos) = (token("bos").filter(|_| add_bos), token("eos").filter(|_| add_eos));
    if bos.is_some() || eos.is_some() {
        tokenizer["post_processor"] = around(bos, eos);
    }
    tokenizer["version"] = "1.0".into();
    tokenizer["truncation"] = Json::Null;
    tokenizer["padding"] = Json::Null;
    tokenizer["added_tokens"] = added.into();
    tokenizer["model"]["vocab"] = Json::Object(vocab);
    let mut config = Map::new();
    config.insert("tokenizer_class".to_owned(), "PreTrainedTokenizerFast".into());
    config.insert("clean_up_tokenization_spaces".to_owned(), false.into());
    config.insert("add_bos_token".to_owned(), add_bos.into());
    config.insert("add_eos_token".to_owned(), add_eos.into());
    for (key, name) in [("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")] {
        if let Some((_, text)) = token(name) {
            config.insert(key.to_owned(), text.as_str().into());
        }
    }
    if let Some(unknown) = unknown {
        config.insert("unk_token".to_owned(), unknown.as_str().into());
    }
    if let Some(context) = keys.own("context_length") {
        config.insert("model_max_length".to_owned(), context.into());
    }
    if let Some(template) = keys.text("tokenizer.chat_template") {
        config.insert("chat_template".to_owned(), template.into());
    }
    Ok(vec![("tokenizer.json", tokenizer), ("tokenizer_config.json", Json::Object(config))])
}

/// Byte-level BPE, without its vocabulary.
fn byte_level(cut: &str, merges: &[String]) -> Result<Json, String> {
    let level =
        |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    let pattern = CUTS.iter().find(|(name, _)| *name == cut).map(|(_, pattern)| *pattern);
    let cuts = match (cut, pattern) {
        ("gpt-2", _) => level(true),
        (_, Some(pattern)) => {
            let split =
                json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
            json!({"type": "Sequence", "pretokenizers": [split, level(false)]})
        }
        _ => return Err(format!("its tokenizer cuts text in the way '{}'", cut.escape_debug())),
    };
    let pairs: Option<Vec<Json>> =
        merges.iter().map(|merge| merge.split_once(' ').map(|(a, b)| json!([a, b]))).collect();
    let normalizer = if cut == "qwen2" { json!({"type": "NFC"}) } else { Json::Null };
    Ok(json!({
        "normalizer": normalizer,
        "pre_tokenizer": cuts,
        "post_processor": level(true),
        "decoder": level(true),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            // Pieces that are tokens as they are.
            "ignore_merges": cut == "llama-bpe",
            "merges": pairs.ok_or("one of its merges is no pair")?
        }
    }))
}

/// BPE with byte fallback, without its vocabulary.
fn pieces(ids: &HashMap<&str, usize>, scores: &[f32], unknown: Option<&str>, prefix: bool) -> Json {
    let mut merges = Vec::new();
    for (&token, &id) in ids {
        for (at, _) in token.char_indices().skip(1) {
            let (a, b) = token.split_at(at);
            if ids.contains_key(a) && ids.contains_key(b) {
                merges.push((scores[id], a, b));
            }
        }
    }
    // Of the same score the longer parts first, then by text, so that the order is one.
    merges.sort_by(|(s, a, b), (t, c, d)| {
        t.total_cmp(s).then(c.len().cmp(&a.len())).then(d.len().cmp(&b.len())).then(a.cmp(c)).then(b.cmp(d))
    });
    let merges: Vec<Json> = merges.into_iter().map(|(_, a, b)| json!([a, b])).collect();
    let space = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let normalizers = if prefix { vec![json!({"type": "Prepend", "prepend": "▁"}), space] } else { vec![space] };
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    json!({
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "merges": merges
        }
    })
}

/// What stands before and behind every text.
fn around(bos: Option<(u64, &String)>, eos: Option<(u64, &String)>) -> Json {
    let special = |(_, token): (u64, &String), part: u8| json!({"SpecialToken": {"id": token, "type_id": part}});
    let text = |name: &str, part: u8| {
        let text = json!({"Sequence": {"id": name, "type_id": part}});
        bos.map(|bos| special(bos, part)).into_iter().chain([text]).chain(eos.map(|eos| special(eos, part)))
    };
    let mut tokens = Map::new();
    for (id, token) in [bos, eos].into_iter().flatten() {
        tokens.insert(token.clone(), json!({"id": token, "ids": [id], "tokens": [token]}));
    }
    json!({
        "type": "TemplateProcessing",
        "single": text("A", 0).collect::<Vec<_>>(),
        "pair": text("A", 0).chain(text("B", 1)).collect::<Vec<_>>(),
        "special_tokens": tokens
    })
}
