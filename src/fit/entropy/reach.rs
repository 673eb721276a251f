//! What lies beyond the codes: at a step they reach 127 of them, and a heavy tail or a fine step goes further.
//!
//! Three things can be done, and each costs squared error or bits, which are squared error too at the slope of a quantizer
//! at high rates. A row can have a longer step: it saves the bits of all its codes and loses at all of them. A weight
//! can be clipped, and lose what it lies beyond. Or it goes on for a number of steps beyond its code, as an outlier
//! ([`crate::codec::extra`]), for the bits of that number ([`crate::coding::tail`]). Per row the cheapest of all mixtures is
//! taken.

#![expect(clippy::cast_possible_truncation, reason = "rounded to single precision on purpose")]

use std::borrow::Cow;

use half::f16;
use rayon::prelude::*;

use super::{Choice, Matrix, level};
use crate::codec::extra::{Extras, Outlier};
use crate::coding::context::log2;
use crate::coding::ends::{self, Codes};
use crate::coding::{self, head, tail};
use crate::layout::Plane;

/// The level that weights beyond the codes are clipped to: the greatest one that has a frequency in every state.
pub(super) fn end(choice: Choice) -> f32 {
    if choice.trellis.is_some() { 124.0 } else { 127.0 }
}

/// Steps of rows, and the weights that take an outlier to reach.
#[derive(Debug)]
pub(super) struct Reach {
    pub scales: Vec<f32>,
    /// Places in the matrix, ascending.
    pub outliers: Vec<usize>,
}

/// The planes of outliers as they lie on disk: counts, columns, values; nothing for one that is stored as it is.
pub type OutlierStreams = [Option<Vec<u8>>; 3];

/// The streams of the planes of outliers of these codes, given the step of a weight at a row and a column.
pub(super) fn streams(
    codes: &[u8],
    rows: usize,
    cols: usize,
    outliers: &[Outlier],
    step: impl Fn(usize, usize) -> f32,
) -> OutlierStreams {
    if outliers.is_empty() {
        return OutlierStreams::default();
    }
    let mut counts = vec![0u32; rows];
    outliers.iter().for_each(|outlier| counts[outlier.row] += 1);
    let columns: Option<Vec<u32>> = outliers.iter().map(|outlier| u32::try_from(outlier.column).ok()).collect();
    let number = |outlier: &Outlier| {
        let negative = codes[outlier.row * cols + outlier.column] < coding::table::ZERO;
        tail::steps(outlier.value, negative, step(outlier.row, outlier.column))
    };
    let steps: Option<Vec<u32>> = outliers.iter().map(number).collect();
    let matrix = Codes { plane: codes, stride: cols, cols };
    let streams = [
        ends::encode_counts(&counts),
        columns.and_then(|columns| ends::encode_columns(&matrix, &counts, &columns)),
        steps.map(|steps| tail::encode_steps(cols, &counts, &steps)),
    ];
    let extras = Extras { column_scales: false, outliers: outliers.len() as u64 };
    let plain = extras.plane_bytes(rows as u64, cols as u64).unwrap_or_default();
    let mut kept = streams
        .into_iter()
        .zip(plain)
        .map(|(stream, (_, plain))| stream.filter(|stream| crate::coding::is_worth(plain, stream.len() as u64)));
    std::array::from_fn(|_| kept.next().flatten())
}

/// Bytes of the planes of outliers on disk.
pub(super) fn stored_bytes(rows: usize, cols: usize, outliers: usize, streams: &OutlierStreams) -> u64 {
    let extras = Extras { column_scales: false, outliers: outliers as u64 };
    // What no file can hold is no outlier.
    let Ok(planes) = extras.plane_bytes(rows as u64, cols as u64) else { return u64::MAX };
    let bytes =
        |(i, (_, plain)): (usize, &(Plane, u64))| streams[i].as_ref().map_or(*plain, |stream| stream.len() as u64);
    planes.iter().enumerate().map(bytes).sum()
}

/// What outliers cost in bits, about, given what all weights beyond the codes lie beyond them, in steps: each, and all
/// together besides.
fn about(rows: usize, cols: usize, (number, sum): (f64, f64)) -> (f64, f64) {
    if number == 0.0 {
        return (32.0, 32.0 * rows as f64);
    }
    // A geometric distribution, and the decisions of places; a count per row; lengths of blocks.
    let each = log2(1.0 + sum / number) + 2.0;
    let counts = rows as f64 * 0.5 * log2(1.0 + 17.0 * number / rows as f64);
    (each, counts + 200.0 * rows.div_ceil(head::rows_per_block(cols)) as f64)
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
        let end = end(choice);
        let limit = f64::from(end);
        let excess = |row: &[f32]| {
            let excess = row.iter().map(|w| f64::from(w.abs()) / f64::from(step) - limit).filter(|&x| x > 0.75);
            excess.fold((0.0, 0.0), |(number, sum), x| (number + 1.0, sum + x))
        };
        let rows: Vec<(f64, f64)> = self.weights.par_chunks(self.cols).map(excess).collect();
        let beyond = rows.iter().fold((0.0, 0.0), |all, row| (all.0 + row.0, all.1 + row.1));
        let (each, together) = about(self.rows, self.cols, beyond);
        // A whole number of steps loses what a level does.
        let price = bit * each + 1.0 / 12.0;
        let row = |row: &[f32]| {
            let most = row.iter().fold(0f32, |most, w| most.max(w.abs()));
            if most <= end * step {
                return Row { clipped: (0.0, step), stored: (0.0, step) };
            }
            let step = f64::from(step);
            let beyond: Vec<f64> = row.iter().map(|w| f64::from(w.abs()) / step).filter(|&x| x > limit).collect();
            let mut best = Row { clipped: (f64::INFINITY, 0.0), stored: (f64::INFINITY, 0.0) };
            for part in 0.. {
                let factor = coding::table::power(2 * part);
                let (mut clipped, mut stored) = (0.0, 0.0);
                for excess in beyond.iter().map(|x| x - limit * factor).filter(|&x| x > 0.0) {
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
        if saved.is_nan() || saved <= bit * together {
            return Reach { scales: rows.iter().map(|row| row.clipped.1).collect(), outliers: Vec::new() };
        }
        let scales: Vec<f32> = rows.iter().map(|row| row.stored.1).collect();
        let outliers = self.weights.par_chunks(self.cols).zip(&scales).enumerate().map(|(row, (weights, &scale))| {
            let excess = |w: f32| f64::from(w.abs()) - f64::from(end * scale);
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
    pub(super) fn within(&self, reach: &Reach, choice: Choice) -> Matrix<'_> {
        let mut weights = Cow::Borrowed(&*self.weights);
        if !reach.outliers.is_empty() {
            let weights = weights.to_mut();
            for &place in &reach.outliers {
                let end = end(choice) * reach.scales[place / self.cols];
                weights[place] = weights[place].clamp(-end, end);
            }
        }
        Matrix { weights, rows: self.rows, cols: self.cols, importance: self.importance.clone() }
    }

    /// The outliers at these places, each adding whole steps to its code as long as that brings it nearer.
    pub(super) fn outliers(&self, places: &[usize], codes: &[u8], scales: &[f32]) -> Vec<Outlier> {
        let outlier = |&place: &usize| {
            let (row, column) = (place / self.cols, place % self.cols);
            let beyond = self.weights[place] - level(codes[place]) * scales[row];
            Some(Outlier { row, column, value: whole(beyond, codes[place] < coding::table::ZERO, scales[row])? })
        };
        places.iter().filter_map(outlier).collect()
    }
}

/// The whole number of steps nearest to what a weight lies beyond its code, as it is stored; nothing for none.
pub(super) fn whole(beyond: f32, negative: bool, step: f32) -> Option<f16> {
    let beyond = if negative { -beyond } else { beyond };
    let steps = (f64::from(beyond) / f64::from(step)).round_ties_even();
    if steps.is_nan() || steps < 1.0 {
        return None;
    }
    let value = tail::value(steps.min(f64::from(u32::MAX)) as u32, negative, step);
    // What was within the range before scales were fitted may be a little beyond it.
    Some(f16::from_f32(value.to_f32().clamp(f16::MIN.to_f32(), f16::MAX.to_f32())))
}
