//! The scale and offset of least squared error for one group.

use super::{OutOfRange, Params, lanes};
use crate::codec::encode::LaneParams;
use crate::codec::lanes::Lanes;
use crate::layout::Grouped;

/// The best parameters found for a group; never worse than those of minmax.
///
/// # Errors
/// [`OutOfRange`] when the scale or the offset does not fit its stored type.
pub fn params(layout: &Grouped, group: &[f32]) -> Result<Params, OutOfRange> {
    let (min, max) = super::min_max(group);
    super::min_max_params(layout, min, max)
}

#[inline(always)]
pub(crate) fn lanes<L: Lanes>(layout: &Grouped, columns: &[L]) -> Result<LaneParams<L>, OutOfRange> {
    let (mut min, mut max) = (L::splat(f32::INFINITY), L::splat(f32::NEG_INFINITY));
    for &w in columns {
        min = w.min(min);
        max = w.max(max);
    }
    lanes::params(super::Fit::MinMax, layout, min + L::splat(0.0), max + L::splat(0.0))
}
