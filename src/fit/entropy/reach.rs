//! What lies beyond the codes: at a step they reach 127 of them, and a heavy tail or a fine step goes further.
//!
//! Three things can be done, and each costs squared error or bits, which are squared error too at the slope of a quantizer
//! at high rates. A row can have a longer step: it saves the bits of all its codes and loses at all of them. A weight
//! can be clipped, and lose what it lies beyond. Or what it lies beyond is stored beside the codes, as an outlier
//! ([`crate::codec::extra`]), for its bits. Per row the cheapest of all mixtures is taken.

#![expect(clippy::cast_possible_truncation, reason = "rounded to single precision on purpose")]

use std::borrow::Cow;

use half::f16;
use rayon::prelude::*;

use super::{Choice, Matrix};
use crate::codec::extra::{Extras, Outlier};
use crate::coding;

/// The greatest level, and steps beyond it the greatest weight that a code is near to.
pub(super) const END: f32 = 127.0;

/// Steps of rows, and the weights that take an outlier to reach.
#[derive(Debug)]
pub(super) struct Reach {
    pub scales: Vec<f32>,
    /// Places in the matrix, ascending.
    pub outliers: Vec<usize>,
}

/// Bits of the planes of so many outliers.
pub(super) fn outlier_bits(rows: usize, cols: usize, outliers: usize) -> f64 {
    if outliers == 0 {
        return 0.0;
    }
    let planes = Extras { column_scales: false, outliers: outliers as u64 }.plane_bytes(rows as u64, cols as u64);
    // What no file can hold is no outlier.
    planes.map_or(f64::INFINITY, |planes| 8.0 * planes.iter().map(|(_, bytes)| *bytes).sum::<u64>() as f64)
}

/// What is left of a number once an F16 stands for it; infinite where none can.
fn beyond_f16(x: f64) -> f64 {
    let stored = f16::from_f64(x);
    if stored.is_finite() { x - stored.to_f64() } else { f64::INFINITY }
}

/// Per row: cost and step where everything beyond the codes is clipped, and where some of it is an outlier.
struct Row {
    clipped: (f64, f32),
    stored: (f64, f32),
}

impl Matrix<'_> {
    /// What is done for the weights beyond 127 steps.
    pub(super) fn reach(&self, step: f32, choice: Choice) -> Reach {
        let width = if choice.trellis.is_some() { 2.0 } else { 1.0 };
        // Squared error per weight, in squares of the step, away from the ends, and what a bit of the whole is worth.
        let noise = width * width / 12.0;
        let bit = 2.0 * std::f64::consts::LN_2 * noise;
        let price = bit * (outlier_bits(self.rows, self.cols, 2) - outlier_bits(self.rows, self.cols, 1));
        let row = |row: &[f32]| {
            let most = row.iter().fold(0f32, |most, w| most.max(w.abs()));
            if most <= END * step {
                return Row { clipped: (0.0, step), stored: (0.0, step) };
            }
            let step = f64::from(step);
            let beyond: Vec<f64> = row.iter().map(|w| f64::from(w.abs()) / step).filter(|&x| x > 127.0).collect();
            let mut best = Row { clipped: (f64::INFINITY, 0.0), stored: (f64::INFINITY, 0.0) };
            for part in 0.. {
                let factor = coding::table::power(2 * part);
                let (mut clipped, mut stored) = (0.0, 0.0);
                for excess in beyond.iter().map(|x| x - 127.0 * factor).filter(|&x| x > 0.0) {
                    let lost = excess * excess;
                    clipped += lost;
                    stored += lost.min(price + (beyond_f16(excess * step) / step).powi(2));
                }
                let spread = factor * factor - 1.0 - 2.0 * std::f64::consts::LN_2 * (f64::from(part) / 32.0);
                let spread = noise * self.cols as f64 * spread;
                let scale = (step * factor).min(f64::from(f32::MAX / 128.0)) as f32;
                for (best, cost) in [(&mut best.clipped, clipped + spread), (&mut best.stored, stored + spread)] {
                    if cost < best.0 {
                        *best = (cost, scale);
                    }
                }
                if clipped == 0.0 || part == 4000 {
                    break;
                }
            }
            best
        };
        let rows: Vec<Row> = self.weights.par_chunks(self.cols).map(row).collect();
        let saved: f64 = rows.iter().map(|row| row.clipped.0 - row.stored.0).sum();
        let counts = outlier_bits(self.rows, self.cols, 1) - price / bit;
        if saved.is_nan() || saved <= bit * counts {
            return Reach { scales: rows.iter().map(|row| row.clipped.1).collect(), outliers: Vec::new() };
        }
        let scales: Vec<f32> = rows.iter().map(|row| row.stored.1).collect();
        let outliers = self.weights.par_chunks(self.cols).zip(&scales).enumerate().map(|(row, (weights, &scale))| {
            let excess = |w: f32| f64::from(w.abs()) - f64::from(END * scale);
            let pays = |w: f32| {
                excess(w) > 0.0 && {
                    let lost = |x: f64| (x / f64::from(step)).powi(2);
                    lost(excess(w)) > price + lost(beyond_f16(excess(w)))
                }
            };
            let places = weights.iter().enumerate().filter(|(_, w)| pays(**w)).map(|(i, _)| row * self.cols + i);
            places.collect::<Vec<_>>()
        });
        let outliers = outliers.collect::<Vec<_>>().concat();
        Reach { scales, outliers }
    }

    /// The matrix without what its outliers add.
    pub(super) fn within(&self, reach: &Reach) -> Matrix<'_> {
        let mut weights = Cow::Borrowed(&*self.weights);
        if !reach.outliers.is_empty() {
            let weights = weights.to_mut();
            for &place in &reach.outliers {
                let end = END * reach.scales[place / self.cols];
                weights[place] = weights[place].clamp(-end, end);
            }
        }
        Matrix { weights, rows: self.rows, cols: self.cols, importance: self.importance.clone() }
    }

    /// The outliers at these places, each adding what the matrix has over `base` there.
    pub(super) fn outliers(&self, places: &[usize], base: impl Fn(usize) -> f32) -> Vec<Outlier> {
        let outlier = |&place: &usize| Outlier {
            row: place / self.cols,
            column: place % self.cols,
            // What was within the range before scales were fitted may be a little beyond it.
            value: f16::from_f32((self.weights[place] - base(place)).clamp(f16::MIN.to_f32(), f16::MAX.to_f32())),
        };
        places.iter().map(outlier).collect()
    }
}
