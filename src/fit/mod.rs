//! How an encoder chooses scale, offset and zero point of a group: quality only, never bytes.
//!
//! Whatever a fit chooses is stored, and the code of a weight is then the level nearest to it (see
//! [`crate::codec::reference`]), or, with [`gptq`], any code at all: bytes written with any fit decode by the same rule.

pub mod awq;
pub mod entropy;
pub mod gptq;
pub mod hessian;
pub(crate) mod lanes;
mod loss;
pub mod nested;
pub mod outliers;
pub mod polish;
mod rate;
pub mod search;
pub mod weighted;

pub use loss::MaxLoss;
pub use rate::Rate;

use crate::error::Error;
use crate::layout::{Bank, Float, Grouped, Levels};

/// A way to choose the parameters of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fit {
    /// Nothing to choose: the raw codec.
    Exact,
    /// `offset = min`, `scale = (max - min) / 15`.
    MinMax,
    /// `scale = max|w| / peak`; the peak is 127 for 8 bits, 1 for a table. Signed 4 bits reach from -8 to 7: there the
    /// scale takes the sign that puts the weight of greatest magnitude at -8, the long end (on books5m 18 % less squared
    /// error than a peak of 7.5). A group of one repeated weight gets that weight as its scale.
    AbsMax,
    /// The range widened to hold zero, `scale = (max - min) / 15`, `zero_point = round(-min / scale)`. A group of one
    /// repeated weight gets that weight as its scale.
    ZeroPoint,
    /// The scale and offset of least squared error; see [`search`].
    Search,
    /// Scales and codes together, for a number of bits on disk; where no rate is asked for, as [`Fit::AbsMax`].
    Rate,
    /// The scale of a row, and sign, table and multiplier of each group, of least squared error; see [`nested`].
    Nested,
}

impl Fit {
    /// The name in tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::MinMax => "minmax",
            Self::AbsMax => "absmax",
            Self::ZeroPoint => "minmax with zero",
            Self::Search => "mse search",
            Self::Rate => "rate",
            Self::Nested => "nested search",
        }
    }
}

/// What an encoder goes by when it chooses parameters and codes: the codec's own fit, or more than that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Method {
    /// The fit of the codec.
    #[default]
    Codec,
    /// The parameters of least squared error; see [`weighted`].
    Search,
    /// The parameters of least squared error weighted by the mean squares of the inputs; see [`weighted`].
    Weighted,
    /// Codes of least proxy loss under the second moment of the inputs; see [`gptq`].
    Gptq,
    /// Column scales from the magnitudes of the inputs; see [`awq`].
    Awq,
}

impl Method {
    /// Every method, with its name.
    pub const ALL: &[(&'static str, Self)] = &[
        ("codec", Self::Codec),
        ("search", Self::Search),
        ("weighted", Self::Weighted),
        ("gptq", Self::Gptq),
        ("awq", Self::Awq),
    ];

    /// The name in options, recipes and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, method)| *method == self).map_or("", |(name, _)| name)
    }

    /// Whether it needs statistics of the inputs.
    #[must_use]
    pub fn needs_stats(self) -> bool {
        matches!(self, Self::Weighted | Self::Gptq | Self::Awq)
    }
}

impl std::str::FromStr for Method {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self, Error> {
        Self::ALL
            .iter()
            .find(|(name, _)| *name == s)
            .map(|(_, method)| *method)
            .ok_or_else(|| Error::invalid(format!("unknown fit '{s}', expected codec, search, weighted, gptq or awq")))
    }
}

/// What is stored for a group, already rounded to its stored type.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Params {
    /// The multiplier.
    pub scale: f32,
    /// The addend; 0 where the layout has none.
    pub offset: f32,
    /// The integer zero point, or the scale byte of a bank; 0 where the layout has neither.
    pub zero_point: u8,
    /// The scale of the row, of which a bank's multiplier makes `scale`; 1 where the layout has none.
    pub row_scale: f32,
}

impl Params {
    /// What stands for nothing but zeros.
    pub const ZERO: Self = Self { scale: 0.0, offset: 0.0, zero_point: 0, row_scale: 1.0 };

    /// What a scale byte means in a row.
    #[must_use]
    pub fn nested(bank: &Bank, byte: u8, row_scale: f32) -> Self {
        Self { scale: bank.multiplier(byte) * row_scale, zero_point: byte, row_scale, ..Self::ZERO }
    }
}

/// A group whose scale or offset cannot be stored without becoming infinite or losing the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutOfRange;

/// The smallest stored scale that a fit accepts, in the stored type: below it the rounding of the scale itself would
/// add more than an eighth of a step of error, down to losing the group altogether.
///
/// For F16 that is 2^-18, a subnormal with seven significant bits; for F32 it is the smallest normal number.
#[must_use]
pub fn min_scale(float: Float) -> f32 {
    match float {
        Float::F16 => 1.0 / 262_144.0,
        Float::F32 => f32::MIN_POSITIVE,
    }
}

/// Least and greatest weight of a group, a negative zero counted as zero so that order never shows.
#[must_use]
pub fn min_max(group: &[f32]) -> (f32, f32) {
    let mut min = f32::INFINITY;
    let mut max = f32::NEG_INFINITY;
    for &w in group {
        min = if w < min { w } else { min };
        max = if w > max { w } else { max };
    }
    (min + 0.0, max + 0.0)
}

/// Rounds a scale to its stored type, or refuses it.
fn store_scale(float: Float, scale: f32) -> Result<f32, OutOfRange> {
    let stored = float.round(scale);
    if scale == 0.0 || (stored.is_finite() && stored.abs() >= min_scale(float)) { Ok(stored) } else { Err(OutOfRange) }
}

/// Parameters of minmax and of the start of the search, from the range of a group.
///
/// # Errors
/// [`OutOfRange`] when the scale or the offset does not fit its stored type.
pub fn min_max_params(layout: &Grouped, min: f32, max: f32) -> Result<Params, OutOfRange> {
    let float = layout.offset().unwrap_or(Float::F32);
    let scale = store_scale(layout.scale(), (max - min) / f32::from(layout.max_code()))?;
    let offset = float.round(min);
    // A constant group lives in its offset alone, which must then not vanish.
    let lost = scale == 0.0 && offset != min && offset.abs() < min_scale(float);
    if !offset.is_finite() || lost {
        return Err(OutOfRange);
    }
    Ok(Params { scale, offset, ..Params::ZERO })
}

/// The level at which [`Fit::AbsMax`] puts the greatest magnitude; negative where that is the longer end.
fn peak(layout: &Grouped) -> f32 {
    match layout.levels() {
        Levels::Table(_) => 1.0,
        Levels::Bank(_) => 127.0,
        _ if layout.bits() == 8 => 127.0,
        _ => -8.0,
    }
}

/// Parameters of the symmetric and table codecs, from the range of a group.
///
/// # Errors
/// [`OutOfRange`] when the scale does not fit its stored type.
pub fn abs_max_params(layout: &Grouped, min: f32, max: f32) -> Result<Params, OutOfRange> {
    let peak = peak(layout);
    let (down, up) = (0.0 - min, max);
    let abs = if down > up { down } else { up };
    let scale = if min == max {
        abs
    } else if peak < 0.0 && down >= up {
        abs / -peak
    } else {
        abs / peak
    };
    Ok(Params { scale: store_scale(layout.scale(), scale)?, ..Params::ZERO })
}

/// Parameters of the integer-zero-point codecs, from the range of a group.
///
/// # Errors
/// [`OutOfRange`] when the scale does not fit its stored type.
pub fn zero_point_params(layout: &Grouped, min: f32, max: f32) -> Result<Params, OutOfRange> {
    if min == max {
        let scale = store_scale(layout.scale(), min.abs())?;
        return Ok(Params { scale, zero_point: u8::from(min < 0.0), ..Params::ZERO });
    }
    let (min, max) = (if min < 0.0 { min } else { 0.0 }, if max > 0.0 { max } else { 0.0 });
    let top = f32::from(layout.max_code());
    let scale = store_scale(layout.scale(), (max - min) / top)?;
    let zero = crate::codec::reference::nearest((0.0 - min) / scale).clamp(0.0, top);
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to the codes above")]
    let zero_point = zero as u8;
    Ok(Params { scale, zero_point, ..Params::ZERO })
}

/// The parameters that `fit` chooses for a group of this range; for [`Fit::Search`] those where the search starts.
///
/// # Errors
/// [`OutOfRange`] when a parameter does not fit its stored type.
///
/// # Panics
/// For [`Fit::Exact`], which has no groups, and [`Fit::Nested`], whose groups are not chosen by their range.
pub fn range_params(fit: Fit, layout: &Grouped, min: f32, max: f32) -> Result<Params, OutOfRange> {
    match fit {
        Fit::MinMax | Fit::Search => min_max_params(layout, min, max),
        Fit::AbsMax | Fit::Rate => abs_max_params(layout, min, max),
        Fit::ZeroPoint => zero_point_params(layout, min, max),
        Fit::Exact => panic!("the raw codec has no groups"),
        Fit::Nested => panic!("the groups of a row are chosen together"),
    }
}

/// The parameters that `fit` chooses for one group.
///
/// # Errors
/// [`OutOfRange`] when a parameter does not fit its stored type.
///
/// # Panics
/// For [`Fit::Exact`], which has no groups.
pub fn params(fit: Fit, layout: &Grouped, group: &[f32]) -> Result<Params, OutOfRange> {
    if fit == Fit::Search {
        return search::params(layout, group);
    }
    if fit == Fit::Nested {
        let params = nested::row(layout, group, None)?;
        return Ok(params.first().copied().unwrap_or(Params::ZERO));
    }
    let (min, max) = min_max(group);
    range_params(fit, layout, min, max)
}
