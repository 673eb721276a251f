//! The step that gives a rate.

#![expect(clippy::cast_possible_truncation, reason = "a step is a single, and exponents are small")]

use std::borrow::Cow;

use rayon::prelude::*;

use super::reach::end;
use super::viterbi::LANES;
use super::{Choice, Matrix, Quantized, step_of};
use crate::coding::Trellis;
use crate::coding::context::log2;
use crate::error::{Error, Result};

/// A search that meets the rate this closely from below ends.
const CLOSE: f64 = 0.0015;
/// Beyond this many bits no more of them are left over than here: there a hundredth of a bit is worth as much as anywhere.
const CLOSEST: f64 = 5.0;
/// The most steps that a search tries.
const TRIES: usize = 10;
/// Logarithm of the number of states.
pub(super) const LOG_STATES: u8 = 5;

/// `2^x`, by a series in a fixed order.
pub(crate) fn exp2(x: f64) -> f64 {
    let whole = x.floor();
    let y = (x - whole) * std::f64::consts::LN_2;
    let (mut term, mut sum) = (1.0, 1.0);
    for i in 1..24 {
        term *= y / f64::from(i);
        sum += term;
    }
    let scale = if whole < 0.0 { 0.5 } else { 2.0 };
    for _ in 0..whole.abs().min(2000.0) as i32 {
        sum *= scale;
    }
    sum
}

/// The exponent of a step.
pub(super) fn exponent_of(step: f32) -> f64 {
    log2(f64::from(step))
}

/// Quantizes a matrix so that it takes at most `target_bits` per weight on disk, and nearly that.
///
/// # Errors
/// [`Error::Invalid`] when no step gives that few bits.
///
/// # Panics
/// When weights or importance do not have the size of the matrix.
pub fn quantize(
    weights: &[f32],
    rows: usize,
    cols: usize,
    target_bits: f64,
    importance: Option<&[f32]>,
) -> Result<Quantized> {
    let matrix = Matrix::new(weights, rows, cols, importance);
    let (plain, trellis) = (Choice::of(None), Choice::of(Trellis::new(LOG_STATES)));
    // An outlier takes 32 bits in memory and slows products down: where levels without a trellis, which reach twice as far
    // at equal bits, need fewer of them, they are worth the fifth of a bit that they cost.
    let most = weights.len() / MOST_STORED;
    if let Some(exponent) = start(&matrix, target_bits, trellis) {
        let reached = f64::from(end(trellis)) * exp2(exponent);
        if matrix.weights.par_iter().filter(|w| f64::from(w.abs()) > reached).count() > most {
            return aim(&matrix, target_bits, plain);
        }
    }
    let mut chosen = aim(&matrix, target_bits, trellis)?;
    if chosen.stretched > rows / 16 || chosen.outliers.len() > most / 8 {
        let other = aim(&matrix, target_bits, plain)?;
        if other.weighted_error < chosen.weighted_error || chosen.outliers.len() > most {
            chosen = other;
        }
    }
    Ok(chosen)
}

/// The same with levels chosen in one way.
///
/// # Errors
/// [`Error::Invalid`] when no step gives that few bits.
///
/// # Panics
/// When weights or importance do not have the size of the matrix.
pub fn quantize_with(
    weights: &[f32],
    rows: usize,
    cols: usize,
    target_bits: f64,
    choice: Choice,
    importance: Option<&[f32]>,
) -> Result<Quantized> {
    aim(&Matrix::new(weights, rows, cols, importance), target_bits, choice)
}

/// One weight of so many may be an outlier with a trellis.
const MOST_STORED: usize = 64;

/// Of a matrix with more weights, a sample of about half as many says where the search starts.
const LARGE: usize = 1 << 21;

/// The exponent of the step at which a Gaussian has so many bits; nothing for zeros.
fn start(matrix: &Matrix<'_>, target: f64, choice: Choice) -> Option<f64> {
    let power: f64 = matrix.weights.iter().map(|&w| f64::from(w) * f64::from(w)).sum();
    let deviation = (power / matrix.weights.len().max(1) as f64).sqrt();
    // It has log2(deviation / step) + 2.05 bits.
    let states = if choice.trellis.is_some() { 1.0 } else { 0.0 };
    (deviation > 0.0).then(|| log2(deviation) + 2.05 - states - target)
}

pub(super) fn aim(matrix: &Matrix<'_>, target: f64, choice: Choice) -> Result<Quantized> {
    let Some(mut start) = start(matrix, target, choice) else { return step_of(matrix, 1.0, choice) };
    let chunk = LANES * matrix.cols;
    let every = (2 * matrix.weights.len() / LARGE).min(matrix.weights.len() / chunk);
    if matrix.weights.len() > LARGE && every > 1 {
        let weights: Vec<f32> = matrix.weights.chunks_exact(chunk).step_by(every).flatten().copied().collect();
        if weights.iter().any(|&w| w != 0.0) {
            let rows = weights.len() / matrix.cols;
            let sample = Matrix {
                weights: Cow::Borrowed(&weights),
                rows,
                cols: matrix.cols,
                importance: matrix.importance.clone(),
            };
            if let Some((_, exponent)) = meet(target, start, |step| step_of(&sample, step, choice))? {
                start = exponent;
            }
        }
    }
    match meet(target, start, |step| step_of(matrix, step, choice))? {
        Some((met, _)) => Ok(met),
        None => Err(Error::invalid(format!("no step gives {target} bits per weight; ask for more"))),
    }
}

/// Tries steps from `2^exponent` on; gives the best one that keeps the rate, and its exponent.
pub(super) fn meet(
    target: f64,
    mut exponent: f64,
    quantize: impl Fn(f32) -> Result<Quantized>,
) -> Result<Option<(Quantized, f64)>> {
    let slack = CLOSE * target.min(CLOSEST * CLOSEST / target);
    // Exponents and bits of the nearest steps tried on both sides.
    let mut low: Option<(f64, f64)> = None;
    let mut high: Option<(f64, f64)> = None;
    let mut best: Option<(Quantized, f64)> = None;
    for _ in 0..TRIES {
        let step = (exp2(exponent) as f32).clamp(f32::MIN_POSITIVE, f32::MAX / 128.0);
        let tried = quantize(step)?;
        let bits = tried.bits_per_weight();
        if bits <= target {
            // Where rows have steps of their own already, a smaller common one no longer gives more bits.
            if let (None, Some((before, had))) = (low, high)
                && bits - had < 0.01 * (before - exponent)
            {
                break;
            }
            high = Some((exponent, bits));
            if best.as_ref().is_none_or(|(best, _)| tried.weighted_error <= best.weighted_error) {
                best = Some((tried, exponent));
            }
            if bits >= target - slack {
                break;
            }
        } else {
            low = Some((exponent, bits));
        }
        let aim = target - slack / 2.0;
        exponent = match (low, high) {
            (Some((e0, b0)), Some((e1, b1))) => {
                let part = if b0 > b1 { ((b0 - aim) / (b0 - b1)).clamp(0.05, 0.95) } else { 0.5 };
                e0 + (e1 - e0) * part
            }
            _ => exponent + (bits - aim),
        };
    }
    Ok(best)
}
