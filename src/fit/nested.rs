//! The scales of a row whose groups have a byte each: sign, table and multiplier of least squared error.

use super::{OutOfRange, Params, min_max, min_scale};
use crate::codec::reference::{code, weight};
use crate::layout::{Bank, Grouped};

/// The parameters of every group of a row, under the importances of its columns where there are some.
///
/// # Errors
/// [`OutOfRange`] when the row has no scale that can be stored.
///
/// # Panics
/// When the layout has no bank.
pub fn row(layout: &Grouped, weights: &[f32], importance: Option<&[f32]>) -> Result<Vec<Params>, OutOfRange> {
    let bank = layout.bank().expect("nested scales have a bank");
    let len = layout.group_len(weights.len()).max(1);
    let (min, max) = min_max(weights);
    let peak = if -min > max { -min } else { max };
    let row_scale = if weights.is_empty() || peak == 0.0 { 0.0 } else { peak / (127.0 * 28.0) };
    if row_scale != 0.0 && (row_scale < min_scale(layout.scale()) || !(row_scale * 127.0 * 255.0).is_finite()) {
        return Err(OutOfRange);
    }
    let ones = vec![1.0; weights.len()];
    let importance = importance.unwrap_or(&ones);
    let groups = weights.chunks(len).zip(importance.chunks(len));
    Ok(groups.map(|(weights, importance)| group(layout, bank, weights, importance, row_scale)).collect())
}

/// The best parameters of a group whose row has this scale.
fn group(layout: &Grouped, bank: &Bank, weights: &[f32], importance: &[f32], row_scale: f32) -> Params {
    let mut best = Params::nested(bank, 0, row_scale);
    let (min, max) = min_max(weights);
    let peak = if -min > max { -min } else { max };
    if peak == 0.0 {
        return best;
    }
    let mut least = error(layout, &best, weights, importance);
    for byte in 0..=u8::MAX {
        let params = Params::nested(bank, byte, row_scale);
        let reach = params.scale.abs() * 127.0;
        if reach > 0.7 * peak && reach < 1.6 * peak {
            let error = error(layout, &params, weights, importance);
            if error < least {
                (best, least) = (params, error);
            }
        }
    }
    best
}

/// The weighted squared error of a group, codes by the rule of the reference.
pub(super) fn error(layout: &Grouped, params: &Params, weights: &[f32], importance: &[f32]) -> f64 {
    let lost = |w: f32| f64::from(w) - f64::from(weight(layout, params, code(layout, params, w)));
    weights.iter().zip(importance).map(|(&w, &a)| f64::from(a) * lost(w) * lost(w)).sum()
}
