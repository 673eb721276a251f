//! What a user asks for, by flags or keywords, made into a recipe: a codec or a text, then what is changed in it.

use std::path::Path;

use super::Recipe;
use crate::codecs;
use crate::error::{Error, Result};
use crate::fit::outliers::Share;
use crate::fit::{MaxLoss, Rate};

/// The wishes of a user, ids and roles still being names.
#[derive(Debug, Clone, Default)]
pub struct Request<'a> {
    /// Id of the codec or name of a recipe ([`Recipe::named`]), of no effect beside `toml`; `None` for the usual one.
    pub codec: Option<&'a str>,
    /// Bits per weight on disk of codecs that leave them open; `None` leaves it to `toml`.
    pub target_bits: Option<Rate>,
    /// The most that tensors in such codecs may lose together; `None` leaves it to `toml`.
    pub max_loss: Option<MaxLoss>,
    /// Whether bits are dealt out by what errors cost the model; `None` leaves it to `toml`, and then to the statistics.
    pub allocate: Option<bool>,
    /// A recipe as TOML or its name, and the file that it was read from, where there is one.
    pub toml: Option<(&'a str, Option<&'a Path>)>,
    /// Roles and the ids of their codecs.
    pub roles: Vec<(&'a str, &'a str)>,
    /// Patterns and the ids of their codecs, behind the rules of `toml`.
    pub rules: Vec<(&'a str, &'a str)>,
    /// Patterns of the tensors to quantize.
    pub include: &'a [String],
    /// Patterns of the tensors to keep as they are.
    pub exclude: &'a [String],
    /// Whether every float tensor gets the codec; `false` leaves it to `toml`.
    pub all: bool,
    /// Name of a fit; without one it is left to `toml`.
    pub fit: Option<&'a str>,
    /// Which part of the weights are outliers; without one it is left to `toml`.
    pub outliers: Option<Share>,
}

impl Request<'_> {
    /// Whether anything is asked for, so that the recipe is not the usual one.
    #[must_use]
    pub fn asks(&self) -> bool {
        let one = self.codec.is_some() || self.toml.is_some() || self.fit.is_some() || self.outliers.is_some();
        let rate = self.target_bits.is_some() || self.max_loss.is_some() || self.allocate.is_some();
        let lists =
            self.roles.is_empty() && self.rules.is_empty() && self.include.is_empty() && self.exclude.is_empty();
        one || rate || !lists || self.all
    }

    /// The recipe that does what is asked for.
    ///
    /// # Errors
    /// Those of [`Recipe::from_toml`], in the file that it was read from, of [`codecs::get`], [`Recipe::role`] and
    /// [`Recipe::rule`].
    pub fn recipe(&self) -> Result<Recipe> {
        let named = self.toml.map_or(self.codec, |(text, _)| Some(text.trim())).and_then(Recipe::named);
        let mut recipe = match (named, self.toml) {
            (Some(recipe), _) => recipe,
            (None, Some((text, None))) => Recipe::from_toml(text)?,
            (None, Some((text, Some(path)))) => Recipe::from_toml(text).map_err(|e| e.in_file(path))?,
            (None, None) => Recipe::new(codecs::get(self.codec.unwrap_or(codecs::DEFAULT))?),
        };
        for (role, id) in &self.roles {
            recipe = recipe.role(role.parse()?, codecs::get(id)?)?;
        }
        for (pattern, id) in &self.rules {
            recipe = recipe.rule(pattern, codecs::get(id)?)?;
        }
        if let Some(rate) = self.target_bits {
            recipe = recipe.target_bits(rate);
            if !recipe.takes_rate() {
                return Err(Error::invalid(format!(
                    "{rate} bits per weight are asked for, but no codec of the recipe leaves its size open; use {}",
                    codecs::ANY_RATE
                )));
            }
        }
        if let Some(loss) = self.max_loss {
            if self.target_bits.is_some() {
                return Err(Error::invalid("a loss and a size are both asked for, leave out one of the two"));
            }
            recipe = recipe.max_loss(loss);
            if !recipe.takes_rate() {
                return Err(Error::invalid(format!(
                    "a loss of at most {loss} is asked for, but no codec of the recipe leaves its size open; use {}",
                    codecs::ANY_RATE
                )));
            }
        }
        if let Some(allocate) = self.allocate {
            recipe = recipe.allocate(allocate);
        }
        recipe = recipe.narrow(self.include, self.exclude)?;
        if let Some(fit) = self.fit {
            recipe = recipe.fit(fit.parse()?);
        }
        if let Some(share) = self.outliers {
            recipe = recipe.outliers(share);
        }
        Ok(if self.all { recipe.all(true) } else { recipe })
    }
}

impl Recipe {
    /// The recipe with these patterns included and excluded.
    ///
    /// # Errors
    /// Those of [`Recipe::include`].
    pub fn narrow(mut self, include: &[String], exclude: &[String]) -> Result<Self> {
        for pattern in include {
            self = self.include(pattern)?;
        }
        for pattern in exclude {
            self = self.exclude(pattern)?;
        }
        Ok(self)
    }
}
