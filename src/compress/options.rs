//! What a caller decides: options, with what a checkpoint and statistics make of them.

use std::sync::Arc;

use crate::codecs;
use crate::error::{Error, Result};
use crate::fit::Method;
use crate::recipe::Recipe;
use crate::source::Source;
use crate::stats::Stats;

/// What to do about weights that are NaN or infinite in a tensor that is to be quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Nonfinite {
    /// Refuse the checkpoint, naming tensor, first index and count.
    #[default]
    Error,
    /// Store zero in their place.
    Zero,
    /// Store zero for NaN, and for an infinity the largest finite magnitude of its row, with its sign.
    Clamp,
    /// Store the whole tensor as it is, in `raw_v1`.
    Raw,
}

impl Nonfinite {
    /// Every choice, with its name.
    pub const ALL: &[(&'static str, Self)] =
        &[("error", Self::Error), ("zero", Self::Zero), ("clamp", Self::Clamp), ("raw", Self::Raw)];

    /// The name in options and provenance.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, choice)| *choice == self).map_or("", |(name, _)| name)
    }
}

impl std::str::FromStr for Nonfinite {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        Self::ALL.iter().find(|(name, _)| *name == s).map(|(_, choice)| *choice).ok_or_else(|| {
            Error::invalid(format!("unknown policy '{s}' for non-finite weights, expected error, zero, clamp or raw"))
        })
    }
}

/// What to do with matrices that another tool has quantized already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Quantized {
    /// Refuse the checkpoint: a recipe would quantize what is quantized.
    #[default]
    Refuse,
    /// Take over what a codec holds as it is, store everything else raw, and leave the recipe out of it.
    Keep,
    /// Quantize the decoded weights as the recipe says, but take over what its codec holds as it is.
    Anew,
}

impl Quantized {
    /// What a user wants who has asked for a codec, a rate or anything else of a recipe, or has not, and who allows
    /// quantizing again, or does not.
    #[must_use]
    pub fn wanted(asked: bool, allowed: bool) -> Self {
        match (asked, allowed) {
            (false, _) => Self::Keep,
            (true, true) => Self::Anew,
            (true, false) => Self::Refuse,
        }
    }
}

/// How to compress.
#[derive(Debug, Clone)]
pub struct Options {
    /// Which codec for which tensor.
    pub recipe: Recipe,
    /// What to do about NaN and infinities.
    pub nonfinite: Nonfinite,
    /// The most bytes of the output; the recipe's rate is chosen so that it is filled.
    pub target_bytes: Option<u64>,
    /// Entropy-code every plane that gets shorter by it; needs a tensor at a time in memory.
    pub coded: bool,
    /// Replace an existing output.
    pub force: bool,
    /// Keep a journal of finished tensors beside the output, and go on with the one that a run that was stopped has left.
    pub resume: bool,
    /// What is known of the inputs of the weights, for the fits of the recipe that need it.
    pub stats: Option<Arc<Stats>>,
    /// What to do with matrices that are quantized already.
    pub quantized: Quantized,
}

impl Options {
    /// A recipe with nothing known of the inputs, at no size in particular.
    #[must_use]
    pub fn new(recipe: Recipe, nonfinite: Nonfinite, force: bool) -> Self {
        let quantized = Quantized::default();
        Self { recipe, nonfinite, target_bytes: None, coded: false, force, resume: false, stats: None, quantized }
    }

    /// Says what to do with a checkpoint that is quantized already; where it is kept, the recipe becomes that of raw tensors.
    ///
    /// # Errors
    /// Never, unless the registry lacks a codec.
    pub fn for_quantized(self, source: &Source, quantized: Quantized) -> Result<Self> {
        if !source.is_quantized() || quantized != Quantized::Keep {
            return Ok(Self { quantized, ..self });
        }
        let recipe = Recipe::new(codecs::get(codecs::RAW)?).all(true);
        Ok(Self { recipe, stats: None, target_bytes: None, quantized, ..self })
    }

    /// Adds what is known of the inputs. It decides the fit where that is the codecs' own and none is asked for: `gptq`
    /// with second moments, `weighted` without; and with squared gradients the bits of a rate are dealt out by them, unless
    /// the recipe says otherwise. For `weighted` without statistics, the `activation_stats` of a JSON bundle
    /// serve.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the fit needs statistics and there are none, or has no use for those that are given.
    pub fn with_stats(self, given: Option<Stats>, fit_asked: bool, source: &Source) -> Result<Self> {
        let recipe = match &given {
            Some(stats) if !fit_asked && self.recipe.method() == Method::Codec => {
                self.recipe.fit(if stats.has_second_moments() { Method::Gptq } else { Method::Weighted })
            }
            _ => self.recipe,
        };
        let method = recipe.method();
        let gradients = given.as_ref().is_some_and(Stats::has_gradients);
        let recipe = match recipe.allocates() {
            None if gradients && recipe.takes_rate() => recipe.allocate(true),
            Some(true) if !gradients => {
                return Err(Error::invalid(
                    "bits are to be dealt out by what errors cost the model, but there are no squared gradients; make them \
                     with tenpak calibrate --fisher and pass the file with --stats",
                ));
            }
            _ => recipe,
        };
        let of_use = method.needs_stats() || recipe.allocates() == Some(true);
        if let (Some(stats), false) = (&given, of_use) {
            let (stats, fit) = (stats.name(), method.name());
            return Err(Error::invalid(format!("fit '{fit}' has no use for {stats}; leave out one of the two")));
        }
        let stats = match given {
            None if method == Method::Weighted => Stats::of_bundle(source)?,
            given => given,
        };
        if stats.is_none() && method.needs_stats() {
            return Err(Error::invalid(format!(
                "fit '{}' needs statistics of the model's inputs; make them with tenpak calibrate and pass them with --stats",
                method.name()
            )));
        }
        Ok(Self { recipe, stats: stats.map(Arc::new), ..self })
    }
}
