//! Recipes as TOML: what a user writes and what an artifact keeps.
//!
//! | key | value | when missing |
//! |---|---|---|
//! | `codec` | id | refused |
//! | `target_bits` | bits per weight on disk of codecs that leave them open | 4.5 |
//! | `allocate` | boolean: whether tensors get these bits by what their errors cost the model | where statistics say |
//! | `max_loss` | the most nMSE that they may have together, instead of bits | no bound |
//! | `all` | boolean | `false` |
//! | `fit` | `codec`, `search`, `weighted`, `gptq` or `awq` | `codec` |
//! | `outliers` | part of the weights of tensors with 4-bit codes that are stored by themselves, such as 0.005 | none |
//! | `include`, `exclude` | array of patterns | everything, nothing |
//! | `roles.attention`, `.mlp`, `.linear`, `.router`, `.embedding`, `.head` | id, or a table of `codec` and `more_bits`: bits beyond the recipe's, of a codec that leaves them open | see [`Recipe::new`] |
//! | `[[rule]]` with `match`, `codec` and, where the codec leaves it open, `target_bits` | pattern, id, bits | no rules |
//!
//! What is printed spells out every role, so that it keeps its meaning when a later build has other defaults, and is
//! printed here rather than by a library, so that equal recipes are equal bytes for ever.

use toml::{Table, Value};

use super::pattern::Pattern;
use super::role::Role;
use super::{Assigned, Recipe, Rule};
use crate::codec::Codec;
use crate::codecs;
use crate::error::{Error, Result};
use crate::fit::outliers::Share;
use crate::fit::{Fit, MaxLoss, Method, Rate};

const KEYS: &[&str] =
    &["codec", "target_bits", "allocate", "max_loss", "all", "include", "exclude", "roles", "rule", "fit", "outliers"];
const ROLE_KEYS: &[&str] = &["codec", "more_bits"];
const RULE_KEYS: &[&str] = &["match", "codec", "target_bits"];

impl Recipe {
    /// Reads a recipe.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the key when the text is not TOML, `codec` is missing, a key or a role is unknown, a
    /// value has the wrong type or a pattern is not well formed; [`Error::Unsupported`] when this build does not know
    /// a codec.
    pub fn from_toml(text: &str) -> Result<Self> {
        let table: Table = text.parse().map_err(|error| not_toml(text, &error))?;
        refuse_unknown(&table, KEYS, "")?;
        let mut recipe = Self::new(codec(&table, "codec", "")?);
        if let Some(value) = table.get("all") {
            recipe.all = value.as_bool().ok_or_else(|| wrong_type("all", value, "true or false"))?;
        }
        if let Some(value) = table.get("allocate") {
            recipe.allocate = Some(value.as_bool().ok_or_else(|| wrong_type("allocate", value, "true or false"))?);
        }
        if let Some(value) = table.get("fit") {
            let name = value.as_str().ok_or_else(|| wrong_type("fit", value, "the name of a fit"))?;
            recipe.method = name.parse().map_err(|error| at("fit", error))?;
        }
        if let Some(value) = table.get("outliers") {
            let part = value.as_float().ok_or_else(|| wrong_type("outliers", value, "a part such as 0.005"))?;
            recipe.outliers = Some(Share::from_part(part).map_err(|error| at("outliers", error))?);
        }
        recipe.include = patterns(&table, "include")?;
        if table.contains_key("include") && recipe.include.is_empty() {
            return Err(Error::invalid(
                "recipe key 'include' is empty, which would keep every tensor raw; remove it to include everything",
            ));
        }
        recipe.exclude = patterns(&table, "exclude")?;
        if let Some(value) = table.get("roles") {
            let roles = value.as_table().ok_or_else(|| wrong_type("roles", value, "a table"))?;
            for name in roles.keys() {
                let role: Role = name.parse().map_err(|error| at("roles", error))?;
                let Assigned { codec, more } = assigned(roles, name)?;
                recipe = recipe.role_with(role, codec, more).map_err(|error| at("roles", error))?;
            }
        }
        recipe.rules = rules(&table)?;
        if let Some(rate) = rate(&table, "")? {
            recipe.rate = rate;
        }
        if let Some(value) = table.get("max_loss") {
            let nmse = value.as_float().ok_or_else(|| wrong_type("max_loss", value, "an nMSE such as 1e-3"))?;
            recipe.loss = Some(MaxLoss::new(nmse).map_err(|error| at("max_loss", error))?);
        }
        let given = |key: &&str| table.contains_key(*key);
        match ["target_bits", "max_loss"].into_iter().filter(given).collect::<Vec<_>>()[..] {
            [_, _] => Err(Error::invalid("recipe keys 'target_bits' and 'max_loss' exclude each other, remove one")),
            [key] if !recipe.takes_rate() => Err(Error::invalid(format!(
                "recipe key '{key}' has no effect: no codec of the recipe leaves its size open, as ecu_v1 does"
            ))),
            _ => Ok(recipe),
        }
    }

    /// The recipe as text: complete, and the same for equal recipes.
    #[must_use]
    pub fn to_toml(&self) -> String {
        let mut out = format!("codec = {}\n", quoted(self.codec.id));
        if self.takes_rate() {
            out += &match self.loss {
                Some(loss) => format!("max_loss = {loss}\n"),
                None => format!("target_bits = {}\n", self.rate),
            };
        }
        if let (true, None, Some(allocate)) = (self.takes_rate(), self.loss, self.allocate) {
            out += &format!("allocate = {allocate}\n");
        }
        out += &format!("all = {}\n", self.all);
        // Left out where it is the default, as it was before there was another.
        if self.method != Method::Codec {
            out += &format!("fit = {}\n", quoted(self.method.name()));
        }
        if let Some(share) = self.outliers {
            out += &format!("outliers = {share}\n");
        }
        for (key, patterns) in [("include", &self.include), ("exclude", &self.exclude)] {
            if !patterns.is_empty() {
                let texts: Vec<_> = patterns.iter().map(|pattern| quoted(pattern.text())).collect();
                out += &format!("{key} = [{}]\n", texts.join(", "));
            }
        }
        out += "\n[roles]\n";
        for (role, Assigned { codec, more }) in Role::WITH_CODEC.iter().zip(self.roles) {
            let codec = quoted(codec.id);
            out += &match more {
                0 => format!("{role} = {codec}\n"),
                _ => format!("{role} = {{ codec = {codec}, more_bits = {} }}\n", f64::from(more) / 1000.0),
            };
        }
        for rule in &self.rules {
            out += &format!("\n[[rule]]\nmatch = {}\ncodec = {}\n", quoted(rule.pattern.text()), quoted(rule.codec.id));
            if let Some(rate) = rule.rate {
                out += &format!("target_bits = {rate}\n");
            }
        }
        out
    }
}

/// What a role gets: the id of a codec, or a table of it and more bits.
fn assigned(roles: &Table, name: &str) -> Result<Assigned> {
    let Some(table) = roles[name].as_table() else { return Ok(Assigned::new(codec(roles, name, "roles.")?)) };
    let place = format!("roles.{name}.");
    refuse_unknown(table, ROLE_KEYS, &place)?;
    let codec = codec(table, "codec", &place)?;
    let Some(bits) = number(table, "more_bits", &place)? else { return Ok(Assigned::new(codec)) };
    if codec.fit != Fit::Rate {
        return Err(no_effect(&format!("{place}more_bits"), codec));
    }
    if !(0.0..=8.0).contains(&bits) {
        return Err(Error::invalid(format!("recipe key '{place}more_bits' is {bits}, expected 0 to 8")));
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "from 0 to 8000, checked above")]
    Ok(Assigned { codec, more: (bits * 1000.0 + 0.5) as u32 })
}

/// The rules, in order.
fn rules(table: &Table) -> Result<Vec<Rule>> {
    let Some(value) = table.get("rule") else { return Ok(Vec::new()) };
    let expected = "an array of tables, each under [[rule]]";
    let values = value.as_array().ok_or_else(|| wrong_type("rule", value, expected))?;
    let rule = |(index, value): (usize, &Value)| {
        let place = format!("rule {}: ", index + 1);
        let table = value.as_table().ok_or_else(|| wrong_type("rule", value, expected))?;
        refuse_unknown(table, RULE_KEYS, &place)?;
        let key = format!("{place}match");
        let pattern = string(table, "match", &place, "a pattern such as '*.down_proj.weight'")?;
        let (codec, rate) = (codec(table, "codec", &place)?, rate(table, &place)?);
        if rate.is_some() && codec.fit != Fit::Rate {
            return Err(no_effect(&format!("{place}target_bits"), codec));
        }
        Ok(Rule { pattern: Pattern::new(pattern).map_err(|error| at(&key, error))?, codec, rate })
    };
    values.iter().enumerate().map(rule).collect()
}

/// The patterns of an array; none when the key is missing.
fn patterns(table: &Table, key: &str) -> Result<Vec<Pattern>> {
    let Some(value) = table.get(key) else { return Ok(Vec::new()) };
    let expected = "an array of patterns";
    let values = value.as_array().ok_or_else(|| wrong_type(key, value, expected))?;
    let pattern = |value: &Value| {
        let text = value.as_str().ok_or_else(|| wrong_type(key, value, expected))?;
        Pattern::new(text).map_err(|error| at(key, error))
    };
    values.iter().map(pattern).collect()
}

/// The codec whose id stands under `key`; `place` says which table this is.
fn codec(table: &Table, key: &str, place: &str) -> Result<&'static Codec> {
    let id = string(table, key, place, "a codec id such as 'int4_g16_fp16_v1'")?;
    codecs::get(id).map_err(|error| at(&format!("{place}{key}"), error))
}

/// The rate of a table; none when the key is missing.
fn rate(table: &Table, place: &str) -> Result<Option<Rate>> {
    let key = "target_bits";
    let rate = |bits| Rate::from_bits(bits).map_err(|error| at(&format!("{place}{key}"), error));
    number(table, key, place)?.map(rate).transpose()
}

/// The number of bits under `key`; none when it is missing.
fn number(table: &Table, key: &str, place: &str) -> Result<Option<f64>> {
    let Some(value) = table.get(key) else { return Ok(None) };
    #[expect(clippy::cast_precision_loss, reason = "far beyond what is accepted where precision is lost")]
    let bits = value.as_float().or_else(|| value.as_integer().map(|bits| bits as f64));
    bits.map(Some)
        .ok_or_else(|| wrong_type(&format!("{place}{key}"), value, "a number of bits per weight such as 4.25"))
}

/// Bits are asked for of a codec that has its own.
fn no_effect(key: &str, codec: &Codec) -> Error {
    Error::invalid(format!("recipe key '{key}' has no effect: codec {} has a size of its own, use ecu_v1", codec.id))
}

/// The string under `key`.
fn string<'t>(table: &'t Table, key: &str, place: &str, expected: &str) -> Result<&'t str> {
    let key_path = format!("{place}{key}");
    let value = table
        .get(key)
        .ok_or_else(|| Error::invalid(format!("recipe key '{key_path}' is missing, set it to {expected}")))?;
    value.as_str().ok_or_else(|| wrong_type(&key_path, value, expected))
}

fn refuse_unknown(table: &Table, known: &[&str], place: &str) -> Result<()> {
    match table.keys().find(|key| !known.contains(&key.as_str())) {
        Some(key) => Err(Error::invalid(format!(
            "unknown recipe key '{place}{}', expected one of {}",
            key.escape_debug(),
            known.join(", ")
        ))),
        None => Ok(()),
    }
}

fn wrong_type(key: &str, value: &Value, expected: &str) -> Error {
    Error::invalid(format!("recipe key '{key}' is of type {}, expected {expected}", value.type_str()))
}

/// The same error, saying which key it is about.
fn at(key: &str, error: Error) -> Error {
    match error {
        Error::Unsupported(what) => Error::Unsupported(format!("recipe key '{key}': {what}")),
        other => Error::invalid(format!("recipe key '{key}': {other}")),
    }
}

fn not_toml(text: &str, error: &toml::de::Error) -> Error {
    let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
    let line = before.matches('\n').count() + 1;
    Error::invalid(format!(
        "the recipe is not TOML: line {line}: {}",
        error.message().lines().collect::<Vec<_>>().join(", ")
    ))
}

/// A TOML basic string; neither patterns nor ids have control characters.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}
