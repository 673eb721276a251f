//! The fits that need only the range of a group, for one group per lane.
//!
//! Operation for operation those of [`super`], with branches turned into selections, so that every lane rounds as the
//! scalar code does.

use super::{Fit, OutOfRange, min_scale};
use crate::codec::kind::LaneParams;
use crate::codec::lanes::Lanes;
use crate::layout::{Float, Grouped, Levels};

#[inline(always)]
fn round<L: Lanes>(float: Float, x: L) -> L {
    if float == Float::F16 { x.round_f16() } else { x }
}

/// Rounds a scale to its stored type; the mask tells where it may be stored.
#[inline(always)]
fn store_scale<L: Lanes>(float: Float, scale: L) -> (L, L::Mask) {
    let stored = round(float, scale);
    let abs = stored.abs();
    let above = L::or(L::splat(min_scale(float)).lt(abs), abs.eq(L::splat(min_scale(float))));
    let fits = L::and(abs.lt(L::splat(f32::INFINITY)), above);
    (stored, L::or(scale.eq(L::splat(0.0)), fits))
}

/// The parameters of [`super::min_max_params`]; the mask tells where they may be stored.
#[inline(always)]
pub(crate) fn min_max_params<L: Lanes>(layout: &Grouped, min: L, max: L) -> (LaneParams<L>, L::Mask) {
    let float = layout.offset().unwrap_or(Float::F32);
    let (scale, good) = store_scale(layout.scale(), (max - min) / L::splat(f32::from(layout.max_code())));
    let offset = round(float, min);
    let least = L::splat(min_scale(float));
    let zero = L::splat(0.0);
    let nonzero = L::or(scale.lt(zero), zero.lt(scale));
    let abs = offset.abs();
    let kept = L::or(offset.eq(min), L::or(least.lt(abs), least.eq(abs)));
    let good = L::and(good, L::and(abs.lt(L::splat(f32::INFINITY)), L::or(nonzero, kept)));
    (LaneParams { scale, offset, zero_point: zero }, good)
}

#[inline(always)]
fn abs_max_params<L: Lanes>(layout: &Grouped, min: L, max: L) -> (LaneParams<L>, L::Mask) {
    let peak = super::peak(layout);
    let down = L::splat(0.0) - min;
    let abs = down.max(max);
    let ranged = abs / L::splat(peak);
    // The long end is negative: where the greatest magnitude is, the scale is positive.
    let ranged = if peak < 0.0 { L::select(down.lt(max), ranged, abs / L::splat(-peak)) } else { ranged };
    let (scale, good) = store_scale(layout.scale(), L::select(min.eq(max), abs, ranged));
    (LaneParams { scale, offset: L::splat(0.0), zero_point: L::splat(0.0) }, good)
}

#[inline(always)]
fn zero_point_params<L: Lanes>(layout: &Grouped, min: L, max: L) -> (LaneParams<L>, L::Mask) {
    let zero = L::splat(0.0);
    let top = L::splat(f32::from(layout.max_code()));
    let constant = min.eq(max);
    let negative = L::select(min.lt(zero), L::splat(1.0), zero);
    let magnitude = min.abs();
    let (min, max) = (min.min(zero), max.max(zero));
    let (scale, good) = store_scale(layout.scale(), L::select(constant, magnitude, (max - min) / top));
    // Zero over zero is no number, which `max` turns into zero.
    let ranged = ((zero - min) / scale).max(zero).min(top).nearest_positive();
    (LaneParams { scale, offset: zero, zero_point: L::select(constant, negative, ranged) }, good)
}

/// The parameters that `fit` chooses for groups of these ranges: those of [`super::range_params`], lane by lane.
///
/// # Errors
/// [`OutOfRange`] when a parameter of any lane does not fit its stored type.
#[inline(always)]
pub(crate) fn params<L: Lanes>(fit: Fit, layout: &Grouped, min: L, max: L) -> Result<LaneParams<L>, OutOfRange> {
    let (params, good) = match (fit, layout.levels()) {
        (Fit::AbsMax, _) => abs_max_params(layout, min, max),
        (Fit::ZeroPoint, Levels::ZeroPoint) => zero_point_params(layout, min, max),
        _ => min_max_params(layout, min, max),
    };
    if L::any(L::eq(L::select(good, L::splat(0.0), L::splat(1.0)), L::splat(1.0))) {
        Err(OutOfRange)
    } else {
        Ok(params)
    }
}
