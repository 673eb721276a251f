//! The specification of every grouped codec, written to be read: one weight at a time, nothing clever.
//!
//! 1. The fit chooses scale, offset and zero point; they are rounded to their stored type.
//! 2. The code is the one whose level is nearest to `t = (w - offset) / scale`, in f32, true division, ties to the
//!    lower code, clamped to the codes of the layout.
//! 3. Where the scale is zero, the code is the one of level zero.
//!
//! The fit of nested scales chooses those of a whole row together; the codes then follow from 2 with the levels of each
//! group's table.
//!
//! No reciprocal and no fused multiply-add, so every backend and every thread count writes the same bytes. The fast
//! paths of [`crate::codec`] are tested against this module byte for byte.

use super::lanes::array::Array;
use super::{Planes, PlanesMut};
use crate::fit::{self, Fit, OutOfRange, Params};
use crate::layout::{Float, Grouped, Levels, load_bits, store_bits};

/// The integer nearest to `t`, ties to the lower one.
#[must_use]
pub fn nearest(t: f32) -> f32 {
    let even = t.round_ties_even();
    if t - even == -0.5 { even - 1.0 } else { even }
}

/// The lowest code that an encoder writes: 8-bit signed codes use -127..=127, as every other tool does.
#[must_use]
pub fn min_code(layout: &Grouped) -> u8 {
    u8::from(layout.bits() == 8 && layout.levels() == Levels::Signed)
}

/// The threshold above which a table's code `i + 1` is nearer than code `i`: the greatest f32 that is not above the
/// middle of the two levels, which f32 itself may not be able to hold.
#[must_use]
pub fn threshold(table: &[f32; 16], i: usize) -> f32 {
    let middle = f64::midpoint(f64::from(table[i]), f64::from(table[i + 1]));
    #[expect(clippy::cast_possible_truncation, reason = "rounds to nearest, which the next line corrects")]
    let nearest = middle as f32;
    if f64::from(nearest) > middle { nearest.next_down() } else { nearest }
}

/// The code of one weight.
#[must_use]
pub fn code(layout: &Grouped, params: &Params, w: f32) -> u8 {
    if params.scale == 0.0 {
        return layout.zero_code(params.zero_point);
    }
    let t = (w - params.offset) / params.scale;
    let zero = match layout.levels() {
        Levels::Table(table) => {
            let above = (0..15).filter(|&i| t > threshold(table, i)).count();
            return u8::try_from(above).expect("at most 15");
        }
        Levels::Bank(bank) => {
            // Levels are small integers, so their middles are exact.
            let middle = |pair: &[i8]| 0.5 * (f32::from(pair[0]) + f32::from(pair[1]));
            let above = bank.table(params.zero_point).windows(2).filter(|pair| t > middle(pair)).count();
            return u8::try_from(above).expect("at most 63");
        }
        _ => layout.zero_code(params.zero_point),
    };
    let code = (nearest(t) + f32::from(zero)).clamp(f32::from(min_code(layout)), f32::from(layout.max_code()));
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to the codes above")]
    let code = code as u8;
    code
}

/// Encodes one row of finite weights.
///
/// # Errors
/// [`OutOfRange`] when a group's scale or offset does not fit its stored type.
pub fn encode_row(layout: &Grouped, fit: Fit, weights: &[f32], row: &mut PlanesMut<'_>) -> Result<(), OutOfRange> {
    let len = layout.group_len(weights.len()).max(1);
    let params: Vec<Params> = match fit {
        Fit::Nested => fit::nested::lanes::<Array<1>>(layout, weights, None)?,
        _ => weights.chunks(len).map(|group| fit::params(fit, layout, group)).collect::<Result<_, _>>()?,
    };
    store_row(layout, &params, weights, row);
    Ok(())
}

/// Stores parameters of a row, and the codes of the nearest levels.
pub fn store_row(layout: &Grouped, params: &[Params], weights: &[f32], row: &mut PlanesMut<'_>) {
    let len = layout.group_len(weights.len()).max(1);
    for (g, (params, group)) in params.iter().zip(weights.chunks(len)).enumerate() {
        store_params(layout, row, g, params);
        for (j, &w) in group.iter().enumerate() {
            layout.store_code(row.codes, row.high_codes, g * len + j, code(layout, params, w));
        }
    }
}

/// Stores the parameters of group `g` of a row.
pub fn store_params(layout: &Grouped, row: &mut PlanesMut<'_>, g: usize, params: &Params) {
    if layout.bank().is_some() {
        row.scales[g] = params.zero_point;
        layout.scale().store(row.row_scales, 0, params.row_scale);
        return;
    }
    layout.scale().store(row.scales, g, params.scale);
    if let Some(float) = layout.offset() {
        float.store(row.addends, g, params.offset);
    } else if layout.levels() == Levels::ZeroPoint {
        store_bits(layout.bits(), row.addends, g, params.zero_point);
    }
}

/// The stored parameters of group `g` of a row.
#[must_use]
pub fn load_params(layout: &Grouped, row: &Planes<'_>, g: usize) -> Params {
    if let Some(bank) = layout.bank() {
        return Params::nested(bank, row.scales[g], layout.scale().load(row.row_scales, 0));
    }
    Params {
        scale: layout.scale().load(row.scales, g),
        offset: layout.offset().map_or(0.0, |float: Float| float.load(row.addends, g)),
        zero_point: if layout.levels() == Levels::ZeroPoint { load_bits(layout.bits(), row.addends, g) } else { 0 },
        row_scale: 1.0,
    }
}

/// The weight that a code stands for.
#[must_use]
pub fn weight(layout: &Grouped, params: &Params, code: u8) -> f32 {
    let level = layout.level(code, params.zero_point);
    match layout.offset() {
        Some(_) => level * params.scale + params.offset,
        None => level * params.scale,
    }
}

/// Decodes one row.
pub fn decode_row(layout: &Grouped, row: &Planes<'_>, out: &mut [f32]) {
    let len = layout.group_len(out.len()).max(1);
    for (g, group) in out.chunks_mut(len).enumerate() {
        let params = load_params(layout, row, g);
        for (j, w) in group.iter_mut().enumerate() {
            *w = weight(layout, &params, layout.load_code(row.codes, row.high_codes, g * len + j));
        }
    }
}
