//! Codes for a rate that lose least of a layer's output: LDLQ whose levels are chosen for their error and their bits.
//!
//! Columns are rounded one after the other, each making up for those before ([`crate::fit::hessian`]), with one step for
//! all of them, and a level is cheaper the more often its context has it: so columns that matter little fall to zero
//! where that saves bits. This excludes the trellis, which wants the columns of a row in the order of the row; which of
//! the two loses less depends on how much the inputs have in common, so both are computed and the better one is kept.

#![expect(clippy::cast_possible_truncation, reason = "clamped to the codes first")]

use super::rate::{aim, exponent_of, meet};
use super::{Choice, Matrix, Quantized, ROUNDS, prices};
use crate::coding::{self, context};
use crate::error::Result;
use crate::fit::hessian::{Hessian, ldlq};

/// Quantizes a matrix so that it takes at most `target_bits` per weight on disk, and nearly that, for the least proxy loss:
/// in [`Quantized::weighted_error`], never above that of [`super::quantize`] with the same importance.
///
/// # Errors
/// [`crate::Error::Invalid`] when no step gives that few bits.
///
/// # Panics
/// When weights, importance and second moment do not have the size of the matrix.
pub fn solve(
    weights: &[f32],
    rows: usize,
    cols: usize,
    target_bits: f64,
    hessian: &Hessian,
    importance: &[f32],
) -> Result<Quantized> {
    assert_eq!(hessian.cols(), cols, "a second moment of other columns");
    let mut trellis = super::quantize(weights, rows, cols, target_bits, Some(importance))?;
    trellis.weighted_error = loss(weights, cols, &trellis, hessian);
    let matrix = Matrix::new(weights, rows, cols, None);
    let choice = Choice::of(None);
    let start = exponent_of(aim(&matrix, target_bits, choice)?.step);
    let solved = meet(target_bits, start, |step| step_of(&matrix, hessian, step, choice))?;
    Ok(match solved {
        Some((solved, _)) if solved.weighted_error < trellis.weighted_error => solved,
        _ => trellis,
    })
}

/// The proxy loss of a quantized matrix.
fn loss(weights: &[f32], cols: usize, quantized: &Quantized, hessian: &Hessian) -> f64 {
    let rows = weights.chunks_exact(cols).zip(quantized.codes.chunks_exact(cols)).zip(&quantized.scales);
    let errors: Vec<f64> = rows
        .flat_map(|((weights, codes), &scale)| {
            weights.iter().zip(codes).map(move |(&w, &code)| f64::from(w) - value(code, scale))
        })
        .collect();
    hessian.losses(&errors).iter().sum()
}

/// The weight that a code stands for.
fn value(code: u8, scale: f32) -> f64 {
    f64::from(f32::from(i16::from(code) - 128) * scale)
}

fn step_of(matrix: &Matrix<'_>, hessian: &Hessian, step: f32, choice: Choice) -> Result<Quantized> {
    let (rows, cols) = (matrix.rows, matrix.cols);
    let scales = matrix.scales(step, choice);
    let mut codes = matrix.round(&scales);
    let mut contexts = context::fit(&codes, rows, cols, None);
    let mean = (0..cols).map(|p| hessian.pivot(p)).sum::<f64>() / cols.max(1) as f64;
    let mut weighted_error = 0.0;
    for _ in 0..ROUNDS {
        let prices = prices(&contexts.model, choice.lambda);
        let mut position = 0;
        let losses = ldlq(hessian, matrix.weights, |column, adjusted, chosen| {
            let weight = hessian.pivot(position) / mean;
            position += 1;
            for (row, (&w, chosen)) in adjusted.iter().zip(chosen).enumerate() {
                let scale = f64::from(scales[row]);
                let relative = scale / f64::from(step);
                let price = &prices[contexts.at(row, column)];
                let code = cheapest(w / scale, weight * relative * relative, price);
                codes[row * cols + column] = code;
                *chosen = value(code, scales[row]);
            }
        });
        weighted_error = losses.iter().sum();
        contexts = context::fit(&codes, rows, cols, None);
    }
    let stream = coding::write(&codes, cols, &contexts)?;
    let (squared_error, _) = matrix.errors(&codes, &scales);
    let scales_stream = coding::encode_scales(&scales);
    let stretched = scales.iter().filter(|&&scale| scale != step).count();
    Ok(Quantized { codes, scales, stretched, stream, scales_stream, squared_error, weighted_error, step, choice })
}

/// Of the level nearest to `target`, the one before it on the way to zero, and zero, the code of least
/// `weight · error² + price`.
fn cheapest(target: f64, weight: f64, prices: &[f32; 256]) -> u8 {
    let nearest = target.round_ties_even().clamp(-127.0, 127.0) as i16;
    let mut best = (f64::INFINITY, coding::table::ZERO);
    for level in [nearest, nearest - nearest.signum(), 0] {
        let code = (level + 128) as u8;
        let error = target - f64::from(level);
        let cost = weight * error * error + f64::from(prices[usize::from(code)]);
        if cost < best.0 {
            best = (cost, code);
        }
    }
    best.1
}
