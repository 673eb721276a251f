//! Recipe: which codec for which tensor, and why.
//!
//! A recipe is written once, by flags or as TOML, and stored with what it made, so that the same choices can be made
//! again later. One order of precedence answers every question; the first line that applies decides:
//!
//! | tensor | codec |
//! |---|---|
//! | integers and booleans | `raw_v1` |
//! | matches a pattern of `exclude` | `raw_v1` |
//! | there are patterns of `include` and it matches none | `raw_v1` |
//! | matches the pattern of a rule, the first one counting | the rule's |
//! | `all` is set | the recipe's |
//! | its [`Role`] has a codec | the role's; by default the recipe's for matrices, and for embeddings and heads what is said below |
//! | anything else: routers, norms, biases, vectors, convolutions | `raw_v1` |
//!
//! A codec whose size is open, such as `ecu_v1`, gets the rate of the rule that decided, or else the recipe's and what the role
//! gets more than others.
//!
//! Embeddings and heads get `int8_sym_v1` beside a codec of a fixed size, and [`MORE_BITS`] more than matrices beside one whose
//! size is open: on a model whose head is its embedding, 0.75 to 1.5 more lose least for the same file, a quarter less than none.
//!
//! Last of all, whoever decided: a codec whose group is longer than a row of the tensor gives way to `int8_sym_v1`,
//! since a group may not span rows. Not so from groups of 256 on, which are as good as a row: there the row is the group.
//!
//! A pattern is a glob for the whole name, whose `*` crosses dots and slashes, or `re:` and a regular expression that
//! must match from the first character on, but not up to the last.
//!
//! ```
//! use tenpak::recipe::{Recipe, Role};
//! use tenpak::{DType, TensorInfo, codecs};
//!
//! let recipe = Recipe::new(codecs::get("int4_g16_fp16_v1")?)
//!     .rule("*.down_proj.weight", codecs::get("int8_sym_v1")?)?
//!     .exclude("re:.*vision")?;
//! let info = TensorInfo::new("model.layers.0.self_attn.q_proj.weight", DType::BF16, vec![2048, 2048])?;
//! assert_eq!(Role::of(&info), Role::Attention);
//! assert_eq!(recipe.choose(&info, 2048).codec.id, "int4_g16_fp16_v1");
//! # Ok::<(), tenpak::Error>(())
//! ```

mod pattern;
mod request;
mod role;
mod text;

use std::fmt;

use crate::codec::Codec;
use crate::codec::extra::Extras;
use crate::codecs;
use crate::error::{Error, Result};
use crate::fit::outliers::Share;
use crate::fit::{Fit, MaxLoss, Method, Rate};
use crate::layout::Layout;
use crate::tensor::{DType, TensorInfo};

use pattern::Pattern;
pub use request::Request;
pub use role::Role;

/// From this group on a shorter row is a group by itself.
const ROW_GROUP: usize = 256;

/// Recipes that have a name: the codecs of attention and of the MLP.
const NAMED: &[(&str, &str, &str)] =
    &[("awq_v10", "int4_g256_fp16_v1", "int4_g2048_fp16_v1"), ("awq_v60", "int4_g512_fp16_v1", "int4_g4096_fp16_v1")];

/// What embeddings and heads get by default beyond the rate of matrices, in thousandths of a bit.
pub const MORE_BITS: u32 = 1000;

/// Which codec for which tensor; equal recipes make equal choices.
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    codec: &'static Codec,
    /// Of the codecs that leave it open.
    rate: Rate,
    /// What decides that rate instead.
    loss: Option<MaxLoss>,
    /// Whether that rate is the mean of rates that differ; unsaid, where statistics can tell them apart.
    allocate: Option<bool>,
    all: bool,
    include: Vec<Pattern>,
    exclude: Vec<Pattern>,
    /// In the order of [`Role::WITH_CODEC`].
    roles: [Assigned; Role::WITH_CODEC.len()],
    rules: Vec<Rule>,
    method: Method,
    outliers: Option<Share>,
}

/// What the tensors of a role get.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Assigned {
    codec: &'static Codec,
    /// Thousandths of a bit beyond the recipe's rate, of a codec that leaves its size open.
    more: u32,
}

impl Assigned {
    const fn new(codec: &'static Codec) -> Self {
        Self { codec, more: 0 }
    }
}

/// A codec for the tensors that match.
#[derive(Debug, Clone, PartialEq)]
struct Rule {
    pattern: Pattern,
    codec: &'static Codec,
    rate: Option<Rate>,
}

/// The codec of a tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// What the tensor is stored with.
    pub codec: &'static Codec,
    /// Bits per weight on disk, where the codec leaves them open.
    pub rate: Option<Rate>,
    /// What decided.
    pub reason: Reason,
}

/// What decided the codec of a tensor.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Reason {
    /// The elements are not floats, and only floats may be rounded.
    NotFloat(DType),
    /// The name matches a pattern of `exclude`.
    Excluded {
        /// The pattern.
        pattern: String,
    },
    /// The name matches no pattern of `include`.
    NotIncluded,
    /// The name matches a rule.
    Rule {
        /// Position of the rule in the recipe, from 0.
        index: usize,
        /// Its pattern.
        pattern: String,
    },
    /// The recipe gives every float tensor the same codec.
    All,
    /// The part that the tensor plays.
    Role(Role),
    /// The rows are shorter than the group of the codec that was asked for.
    ShortRows {
        /// The codec that was asked for.
        wanted: &'static Codec,
        /// Its group.
        group: usize,
        /// Columns of the tensor as a matrix.
        cols: u64,
    },
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFloat(dtype) => write!(f, "{dtype} is not a float dtype"),
            Self::Excluded { pattern } => write!(f, "excluded by '{pattern}'"),
            Self::NotIncluded => f.write_str("not included"),
            Self::Rule { index, pattern } => write!(f, "rule {} '{pattern}'", index + 1),
            Self::All => f.write_str("all tensors"),
            Self::Role(role) => write!(f, "role {role}"),
            Self::ShortRows { wanted, group, cols } => {
                write!(f, "rows of {cols} are shorter than the group of {group} of {}", wanted.id)
            }
        }
    }
}

impl Recipe {
    /// The defaults around one codec: matrices get it, embeddings and heads get `int8_sym_v1` or more bits of it, the rest is
    /// kept raw.
    #[must_use]
    pub fn new(codec: &'static Codec) -> Self {
        let roles = Role::WITH_CODEC.map(|role| match role {
            Role::Attention | Role::Mlp | Role::Linear => Assigned::new(codec),
            Role::Embedding | Role::Head if codec.fit == Fit::Rate => Assigned { codec, more: MORE_BITS },
            Role::Embedding | Role::Head => Assigned::new(registered(codecs::INT8_ROW)),
            _ => Assigned::new(registered(codecs::RAW)),
        });
        Self {
            codec,
            rate: Rate::DEFAULT,
            loss: None,
            allocate: None,
            all: false,
            include: Vec::new(),
            exclude: Vec::new(),
            roles,
            rules: Vec::new(),
            method: Method::Codec,
            outliers: None,
        }
    }

    /// A recipe that has a name.
    ///
    /// | name | attention and other linear layers | MLP | outliers | fit |
    /// |---|---|---|---|---|
    /// | `awq_v10` | `int4_g256_fp16_v1` | `int4_g2048_fp16_v1` | 0.5 % | `awq` |
    /// | `awq_v60` | `int4_g512_fp16_v1` | `int4_g4096_fp16_v1` | 0.5 % | `awq` |
    ///
    /// They are for large models and need statistics.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        let (_, attention, mlp) = NAMED.iter().find(|(known, ..)| *known == name)?;
        let recipe = Self::new(registered(attention)).role(Role::Mlp, registered(mlp)).expect("a role with a codec");
        let share = Share::from_part(0.005).expect("a share");
        Some(recipe.fit(Method::Awq).outliers(share))
    }

    /// Stores this part of the weights of every tensor with 4-bit codes by themselves; see [`crate::fit::outliers`].
    #[must_use]
    pub fn outliers(mut self, share: Share) -> Self {
        self.outliers = Some(share);
        self
    }

    /// Which planes a tensor of so many weights gets beside its codec's, as far as can be known before it is read.
    #[must_use]
    pub fn extras(&self, codec: &Codec, method: Method, weights: u64) -> Extras {
        match &codec.layout {
            Layout::Grouped(layout) if layout.bits() <= 4 && weights > 0 => Extras {
                column_scales: method == Method::Awq,
                outliers: self.outliers.map_or(0, |share| share.of(weights)),
            },
            _ => Extras::NONE,
        }
    }

    /// Adds a rule after those there are: tensors that match get `codec`.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the pattern is empty, has control characters or is not well formed.
    pub fn rule(mut self, pattern: &str, codec: &'static Codec) -> Result<Self> {
        self.rules.push(Rule { pattern: Pattern::new(pattern)?, codec, rate: None });
        Ok(self)
    }

    /// Bits per weight on disk of the codecs that leave them open, where no rule says otherwise.
    #[must_use]
    pub fn target_bits(mut self, rate: Rate) -> Self {
        (self.rate, self.loss) = (rate, None);
        self
    }

    /// Deals the bits of the recipe's rate out to tensors by what their errors cost the model, which takes statistics with
    /// squared gradients.
    #[must_use]
    pub fn allocate(mut self, allocate: bool) -> Self {
        self.allocate = Some(allocate);
        self
    }

    /// Whether the recipe's rate is dealt out; nothing where it does not say.
    #[must_use]
    pub fn allocates(&self) -> Option<bool> {
        if self.loss.is_none() { self.allocate } else { Some(false) }
    }

    /// The most that tensors may lose together whose rate is the recipe's: instead of a rate, the least one that keeps it.
    #[must_use]
    pub fn max_loss(mut self, loss: MaxLoss) -> Self {
        self.loss = Some(loss);
        self
    }

    /// The most that tensors may lose together whose rate is the recipe's, where that was asked for.
    #[must_use]
    pub fn loss(&self) -> Option<MaxLoss> {
        self.loss
    }

    /// Bits per weight on disk of the codecs that leave them open, where no rule says otherwise.
    #[must_use]
    pub fn rate(&self) -> Rate {
        self.rate
    }

    /// Whether the recipe's own rate may decide anything.
    #[must_use]
    pub fn takes_rate(&self) -> bool {
        let rules = self.rules.iter().filter(|rule| rule.rate.is_none()).map(|rule| rule.codec);
        rules.chain(self.roles.map(|role| role.codec)).chain([self.codec]).any(|codec| codec.fit == Fit::Rate)
    }

    /// Keeps raw what matches neither this pattern nor another one that was included.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the pattern is empty, has control characters or is not well formed.
    pub fn include(mut self, pattern: &str) -> Result<Self> {
        self.include.push(Pattern::new(pattern)?);
        Ok(self)
    }

    /// Keeps raw what matches this pattern.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the pattern is empty, has control characters or is not well formed.
    pub fn exclude(mut self, pattern: &str) -> Result<Self> {
        self.exclude.push(Pattern::new(pattern)?);
        Ok(self)
    }

    /// Gives the tensors of a role another codec.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the role is not one of [`Role::WITH_CODEC`].
    pub fn role(self, role: Role, codec: &'static Codec) -> Result<Self> {
        self.role_with(role, codec, 0)
    }

    /// The same, with so many thousandths of a bit more than the recipe's rate.
    fn role_with(mut self, role: Role, codec: &'static Codec, more: u32) -> Result<Self> {
        let Some(at) = Role::WITH_CODEC.iter().position(|&known| known == role) else {
            let known: Vec<_> = Role::WITH_CODEC.iter().map(|role| role.name()).collect();
            return Err(Error::invalid(format!(
                "role '{role}' takes no codec, expected one of {}; write a rule for its tensors instead",
                known.join(", ")
            )));
        };
        self.roles[at] = Assigned { codec, more };
        Ok(self)
    }

    /// Whether every float tensor gets the recipe's codec, whatever its role.
    #[must_use]
    pub fn all(mut self, all: bool) -> Self {
        self.all = all;
        self
    }

    /// Chooses scales and codes by another method than the codecs' own fits.
    #[must_use]
    pub fn fit(mut self, method: Method) -> Self {
        self.method = method;
        self
    }

    /// How scales and codes are chosen.
    #[must_use]
    pub fn method(&self) -> Method {
        self.method
    }

    /// Whether the rate of a tensor follows from the recipe's own, and is not that of a rule.
    #[must_use]
    pub fn is_open(&self, reason: &Reason) -> bool {
        !matches!(reason, Reason::Rule { index, .. } if self.rules[*index].rate.is_some())
    }

    /// Whether the rate of a tensor is the recipe's own and nothing more.
    #[must_use]
    pub fn is_common(&self, reason: &Reason) -> bool {
        let more = |role: &Role| self.assigned(*role).is_some_and(|role| role.more > 0);
        self.is_open(reason) && !matches!(reason, Reason::Role(role) if more(role))
    }

    /// The codec of a tensor whose matrix has `cols` columns, which is not its last dimension when it is stored
    /// transposed.
    #[must_use]
    pub fn choose(&self, info: &TensorInfo, cols: u64) -> Choice {
        let (codec, reason) = self.decide(info);
        match &codec.layout {
            Layout::Grouped(layout) if layout.group() as u64 > cols && layout.group() < ROW_GROUP => Choice {
                codec: registered(codecs::INT8_ROW),
                rate: None,
                reason: Reason::ShortRows { wanted: codec, group: layout.group(), cols },
            },
            _ => {
                let rate = match &reason {
                    Reason::Rule { index, .. } => self.rules[*index].rate.unwrap_or(self.rate),
                    Reason::Role(role) => self.assigned(*role).map_or(self.rate, |role| self.rate.plus(role.more)),
                    _ => self.rate,
                };
                Choice { codec, rate: (codec.fit == Fit::Rate).then_some(rate), reason }
            }
        }
    }

    /// The order of precedence, without regard to the length of the rows.
    fn decide(&self, info: &TensorInfo) -> (&'static Codec, Reason) {
        let raw = registered(codecs::RAW);
        let name = info.name();
        if !info.dtype().is_float() {
            return (raw, Reason::NotFloat(info.dtype()));
        }
        if let Some(pattern) = self.exclude.iter().find(|pattern| pattern.matches(name)) {
            return (raw, Reason::Excluded { pattern: pattern.text().to_owned() });
        }
        if !self.include.is_empty() && !self.include.iter().any(|pattern| pattern.matches(name)) {
            return (raw, Reason::NotIncluded);
        }
        if let Some((index, rule)) = self.rules.iter().enumerate().find(|(_, rule)| rule.pattern.matches(name)) {
            return (rule.codec, Reason::Rule { index, pattern: rule.pattern.text().to_owned() });
        }
        if self.all {
            return (self.codec, Reason::All);
        }
        let role = Role::of(info);
        (self.assigned(role).map_or(raw, |role| role.codec), Reason::Role(role))
    }

    /// What the recipe says of a role.
    fn assigned(&self, role: Role) -> Option<Assigned> {
        Role::WITH_CODEC.iter().position(|&known| known == role).map(|at| self.roles[at])
    }
}

/// The codec of an id that the registry itself names.
fn registered(id: &'static str) -> &'static Codec {
    codecs::get(id).expect("the registry names only ids that it has")
}
