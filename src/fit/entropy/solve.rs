//! Codes for a rate that lose least of a layer's output: LDLQ whose levels are chosen for their error and their bits.
//!
//! Columns are rounded one after the other, each making up for those before ([`crate::fit::hessian`]), with one step for
//! all of them, and a level is cheaper the more often its context has it: so columns that matter little fall to zero
//! where that saves bits. This excludes the trellis, which wants the columns of a row in the order of the row; which of
//! the two loses less depends on how much the inputs have in common, so both are computed and the better one is kept.
//!
//! A third one has a step per column, as WaterSIC has it: an error of the column at position *p* costs `L[p,p]²`
//! ([`crate::fit::hessian`]), and bits are the same whatever the step, so all columns should lose alike, with steps in
//! proportion to `1 / L[p,p]`. They stay with the matrix as column scales, and each is multiplied by the factor at which
//! its column, codes given, loses least. That costs 32 bits per column, which are counted: it is for matrices of many rows.

#![expect(clippy::cast_possible_truncation, reason = "clamped to the codes first")]

use std::borrow::Cow;

use super::rate::{aim, exponent_of, meet};
use super::reach::{self, Reach, end};
use super::{Choice, Matrix, Quantized, ROUNDS, level, prices};
use crate::codec::extra::Outlier;
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
    let choice = Choice::of(None);
    let flat = vec![1.0; cols];
    let mut best = trellis;
    let scales = column_steps(hessian);
    for (columns, spent) in [(&flat, 0.0), (&scales, 32.0 / rows.max(1) as f64)] {
        if target_bits <= spent {
            continue;
        }
        let stepped = Stepped::new(weights, rows, cols, columns, hessian, spent > 0.0);
        let aimed = match aim(&stepped.scaled, target_bits - spent, choice) {
            Ok(aimed) => aimed,
            // Columns of their own leave too few bits for codes.
            Err(_) if spent > 0.0 => continue,
            Err(e) => return Err(e),
        };
        let solved = meet(target_bits, exponent_of(aimed.step), |step| stepped.at(step, choice))?;
        if let Some((solved, _)) = solved
            && solved.weighted_error < best.weighted_error
        {
            best = solved;
        }
    }
    Ok(best)
}

/// Steps of columns in proportion to `1 / L[p,p]`, relative to that of a column of mean cost.
fn column_steps(hessian: &Hessian) -> Vec<f32> {
    let cols = hessian.cols();
    let mean = (0..cols).map(|p| hessian.pivot(p)).sum::<f64>() / cols.max(1) as f64;
    let mut steps = vec![1.0; cols];
    for (p, column) in hessian.order().enumerate() {
        steps[column] = (mean / hessian.pivot(p)).sqrt() as f32;
    }
    steps
}

/// The proxy loss of a quantized matrix.
fn loss(weights: &[f32], cols: usize, quantized: &Quantized, hessian: &Hessian) -> f64 {
    hessian.losses(&errors(weights, cols, quantized).collect::<Vec<_>>()).iter().sum()
}

/// What the weights of a quantized matrix are off by, row by row.
fn errors<'a>(weights: &'a [f32], cols: usize, quantized: &'a Quantized) -> impl Iterator<Item = f64> + 'a {
    let columns = quantized.column_scales.as_deref();
    let mut outliers = quantized.outliers.iter().peekable();
    weights.iter().zip(&quantized.codes).enumerate().map(move |(place, (&w, &code))| {
        let (row, column) = (place / cols, place % cols);
        let added = outliers.next_if(|o| (o.row, o.column) == (row, column)).map_or(0.0, |o| o.value.to_f64());
        f64::from(w) - value(code, quantized.scales[row], columns.map_or(1.0, |columns| columns[column])) - added
    })
}

/// The weight that a code stands for.
fn value(code: u8, scale: f32, column: f32) -> f64 {
    f64::from(level(code) * scale * column)
}

/// A matrix whose columns have steps of their own, in proportions that are given.
struct Stepped<'a> {
    weights: &'a [f32],
    columns: &'a [f32],
    hessian: &'a Hessian,
    /// The weights divided by the steps of their columns.
    scaled: Matrix<'a>,
    /// Whether the steps are kept with the matrix; else they are all one.
    own: bool,
}

impl<'a> Stepped<'a> {
    fn new(weights: &'a [f32], rows: usize, cols: usize, columns: &'a [f32], hessian: &'a Hessian, own: bool) -> Self {
        let mut scaled = Matrix::new(weights, rows, cols, None);
        if own {
            let divided = weights.chunks_exact(cols.max(1)).flat_map(|row| row.iter().zip(columns).map(|(w, s)| w / s));
            scaled.weights = Cow::Owned(divided.collect());
        }
        Self { weights, columns, hessian, scaled, own }
    }

    /// What goes on for whole steps where the codes end.
    fn outliers(&self, reach: &Reach, columns: &[f32], choice: Choice) -> Vec<Outlier> {
        let outlier = |&place: &usize| {
            let (row, column) = (place / self.scaled.cols, place % self.scaled.cols);
            let (weight, step) = (self.weights[place], reach.scales[row] * columns[column]);
            let beyond = weight - weight.signum() * (end(choice) * step);
            Some(Outlier { row, column, value: reach::whole(beyond, weight < 0.0, step)? })
        };
        reach.outliers.iter().filter_map(outlier).collect()
    }

    /// Quantizes with a given common step.
    fn at(&self, step: f32, choice: Choice) -> Result<Quantized> {
        let (matrix, hessian) = (&self.scaled, self.hessian);
        let (rows, cols) = (matrix.rows, matrix.cols);
        let reach = matrix.reach(step, choice);
        let mut codes = matrix.within(&reach, choice).round(&reach.scales);
        // Other columns make up for what these weights lose, which outliers must not change: they add what was taken out.
        let mut outliers = self.outliers(&reach, self.columns, choice);
        let mut target = Cow::Borrowed(self.weights);
        for outlier in &outliers {
            target.to_mut()[outlier.row * cols + outlier.column] -= outlier.value.to_f32();
        }
        let scales = &reach.scales;
        let mut contexts = context::fit(&codes, rows, cols, None);
        let cost = |p: usize, column: usize| hessian.pivot(p) * f64::from(self.columns[column]).powi(2);
        let order: Vec<usize> = hessian.order().collect();
        let mean = order.iter().enumerate().map(|(p, &column)| cost(p, column)).sum::<f64>() / cols.max(1) as f64;
        let mut weighted_error = 0.0;
        let mut columns = self.columns.to_vec();
        for _ in 0..ROUNDS {
            let prices = prices(&contexts.model, choice.lambda);
            let mut position = 0;
            let losses = ldlq(hessian, &target, |column, adjusted, chosen| {
                let weight = cost(position, column) / mean;
                position += 1;
                let own = f64::from(self.columns[column]);
                for (row, &w) in adjusted.iter().enumerate() {
                    let scale = f64::from(scales[row]);
                    let relative = scale / f64::from(step);
                    let price = &prices[contexts.at(row, column)];
                    codes[row * cols + column] = cheapest(w / (scale * own), weight * relative * relative, price);
                }
                let code = |row: usize| codes[row * cols + column];
                if self.own {
                    let (mut cross, mut power) = (0.0, 0.0);
                    for (row, &w) in adjusted.iter().enumerate() {
                        let value = value(code(row), scales[row], self.columns[column]);
                        cross += w * value;
                        power += value * value;
                    }
                    let factor = if cross > 0.0 && power > 0.0 { cross / power } else { 1.0 };
                    columns[column] = (own * factor) as f32;
                }
                for (row, chosen) in chosen.iter_mut().enumerate() {
                    *chosen = value(code(row), scales[row], columns[column]);
                }
            });
            weighted_error = losses.iter().sum();
            contexts = context::fit(&codes, rows, cols, None);
        }
        let stream = coding::write(&codes, cols, &contexts)?;
        let scales_stream = coding::encode_scales(scales);
        let stretched = scales.iter().filter(|&&scale| scale != step).count();
        // Steps of columns are others by now, and so little that the numbers of steps stay.
        if self.own {
            for outlier in &mut outliers {
                let (row, column) = (outlier.row, outlier.column);
                let was = coding::tail::steps(
                    outlier.value,
                    outlier.value.is_sign_negative(),
                    scales[row] * self.columns[column],
                );
                let step = scales[row] * columns[column];
                outlier.value =
                    was.map_or(outlier.value, |n| coding::tail::value(n, outlier.value.is_sign_negative(), step));
            }
        }
        let step_at = |row: usize, column: usize| if self.own { scales[row] * columns[column] } else { scales[row] };
        let outlier_streams = reach::streams(&codes, rows, cols, &outliers, step_at);
        let column_scales = self.own.then_some(columns);
        let scales = reach.scales;
        let mut out = Quantized {
            codes,
            scales,
            stretched,
            stream,
            scales_stream,
            column_scales,
            outliers,
            outlier_streams,
            squared_error: 0.0,
            weighted_error,
            step,
            choice,
        };
        out.squared_error = errors(self.weights, cols, &out).map(|e| e * e).sum();
        if !out.outliers.is_empty() {
            // They are rounded.
            out.weighted_error = loss(self.weights, cols, &out, hessian);
        }
        Ok(out)
    }
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
