//! Codes for a rate: the quantizer of codecs whose codes lie on disk in their entropy ([`crate::coding`]).
//!
//! One step serves the whole matrix, and the coder's contexts spend bits where deviations are large: for an entropy
//! coder that is where they belong, so scales per group would only cost. A code is chosen for its error *and* its bits,
//! `error² + λ · bits`, along a trellis, which gains about one decibel over rounding at equal bits. What lies beyond the
//! codes is in the module `reach`.

#![expect(
    clippy::cast_possible_truncation,
    reason = "clamped to the codes first, or rounded to single precision on purpose"
)]

mod curve;
pub(crate) mod rate;
mod reach;
mod solve;
mod viterbi;

use std::borrow::Cow;

use rayon::prelude::*;

pub use curve::{Curve, SAMPLE};
pub use rate::{quantize, quantize_with};
pub use reach::OutlierStreams;
pub use solve::solve;

use crate::codec::extra::Outlier;
use crate::coding::context::{self, lengths};
use crate::coding::head::Contexts;
use crate::coding::table::{Model, ZERO, escape_codes};
use crate::coding::{self, Trellis};
use crate::error::Result;
use viterbi::{LANES, Prices, Search, Set, Trace};

/// What a bit may cost in squared error at a step, in squares of the step that one quantizer has (the step without
/// a trellis, twice the step with one): the slope of error over bits that a uniform quantizer has at high rates.
const SLOPE: f64 = 0.09;

/// How codes are chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// The machine that codes follow, if any.
    pub trellis: Option<Trellis>,
    /// Price of a bit, in squares of a step; 0 takes the level nearest to each weight.
    pub lambda: f64,
}

impl Choice {
    /// The choice that is best on average for a machine.
    #[must_use]
    pub fn of(trellis: Option<Trellis>) -> Self {
        Self { trellis, lambda: if trellis.is_some() { 4.0 * SLOPE } else { SLOPE } }
    }
}

/// A quantized matrix.
#[derive(Debug, Clone)]
pub struct Quantized {
    /// One code per weight; its level is `code - 128`.
    pub codes: Vec<u8>,
    /// One scale per row, `weight = level * scale`: the step times the factor of least error.
    pub scales: Vec<f32>,
    /// Rows whose step is larger than the common one.
    pub stretched: usize,
    /// A factor on the weights of each column, where there are any.
    pub column_scales: Option<Vec<f32>>,
    /// What is added to single weights, in the order of rows and columns.
    pub outliers: Vec<Outlier>,
    /// Their planes as they lie on disk.
    pub outlier_streams: OutlierStreams,
    /// The codes as they lie on disk.
    pub stream: Vec<u8>,
    /// The scales as they lie on disk.
    pub scales_stream: Vec<u8>,
    /// Sum of squared errors.
    pub squared_error: f64,
    /// The same, each weighted by the importance of its column, where mean importance is one.
    pub weighted_error: f64,
    /// The common step.
    pub step: f32,
    /// How codes were chosen.
    pub choice: Choice,
}

impl Quantized {
    /// Bits on disk per weight, all planes counted.
    #[must_use]
    pub fn bits_per_weight(&self) -> f64 {
        8.0 * self.bytes() as f64 / self.codes.len().max(1) as f64
    }

    /// Bytes on disk, all planes counted.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let columns = self.column_scales.as_ref().map_or(0, |scales| 4 * scales.len());
        ((self.stream.len() + self.scales_stream.len() + columns) as u64).saturating_add(self.outlier_bytes())
    }

    /// Bytes of the planes of outliers on disk.
    fn outlier_bytes(&self) -> u64 {
        let (rows, weights) = (self.scales.len(), self.codes.len());
        reach::stored_bytes(rows, weights / rows.max(1), self.outliers.len(), &self.outlier_streams)
    }
}

/// A matrix of finite weights, with the importance of its columns scaled to a mean of one.
#[derive(Debug)]
struct Matrix<'a> {
    weights: Cow<'a, [f32]>,
    rows: usize,
    cols: usize,
    importance: Vec<f32>,
}

impl<'a> Matrix<'a> {
    fn new(weights: &'a [f32], rows: usize, cols: usize, importance: Option<&[f32]>) -> Self {
        assert_eq!(weights.len(), rows * cols, "weights do not fill the matrix");
        let flat = vec![1.0; cols];
        let importance = match importance {
            Some(importance) => {
                assert_eq!(importance.len(), cols, "one importance per column");
                let mean = importance.iter().map(|&i| f64::from(i)).sum::<f64>() / cols.max(1) as f64;
                if mean > 0.0 && mean.is_finite() {
                    importance.iter().map(|&i| (f64::from(i) / mean) as f32).collect()
                } else {
                    flat
                }
            }
            None => flat,
        };
        Self { weights: Cow::Borrowed(weights), rows, cols, importance }
    }

    /// Squared error of codes with outliers, plain and weighted, summed row by row.
    fn errors(&self, codes: &[u8], scales: &[f32], outliers: &[Outlier]) -> (f64, f64) {
        let rows: Vec<(f64, f64)> = (0..self.rows)
            .into_par_iter()
            .map(|row| {
                let at = row * self.cols..(row + 1) * self.cols;
                let first = outliers.partition_point(|outlier| outlier.row < row);
                let mut own = outliers[first..].iter().take_while(|outlier| outlier.row == row).peekable();
                let (mut plain, mut weighted) = (0.0, 0.0);
                let codes = self.weights[at.clone()].iter().zip(&codes[at]).zip(&self.importance);
                for (column, ((&w, &code), &importance)) in codes.enumerate() {
                    let added = own.next_if(|outlier| outlier.column == column).map_or(0.0, |o| o.value.to_f32());
                    let error = f64::from(w) - f64::from(level(code) * scales[row] + added);
                    plain += error * error;
                    weighted += error * error * f64::from(importance);
                }
                (plain, weighted)
            })
            .collect();
        rows.iter().fold((0.0, 0.0), |sum, row| (sum.0 + row.0, sum.1 + row.1))
    }

    /// The factor on all scales at which the squared error is least, given the codes.
    fn gain(&self, codes: &[u8], scales: &[f32]) -> f64 {
        let rows: Vec<(f64, f64)> = (0..self.rows)
            .into_par_iter()
            .map(|row| {
                let at = row * self.cols..(row + 1) * self.cols;
                let (mut cross, mut power) = (0.0, 0.0);
                for ((&w, &code), &importance) in self.weights[at.clone()].iter().zip(&codes[at]).zip(&self.importance)
                {
                    let value = f64::from(level(code) * scales[row]);
                    cross += f64::from(w) * value * f64::from(importance);
                    power += value * value * f64::from(importance);
                }
                (cross, power)
            })
            .collect();
        let (cross, power) = rows.iter().fold((0.0, 0.0), |sum, row| (sum.0 + row.0, sum.1 + row.1));
        if power > 0.0 && cross > 0.0 { cross / power } else { 1.0 }
    }

    /// The nearest level of each weight.
    fn round(&self, scales: &[f32]) -> Vec<u8> {
        let mut codes = vec![0; self.weights.len()];
        let rows = codes.par_chunks_mut(self.cols).zip(self.weights.par_chunks(self.cols)).zip(scales);
        rows.for_each(|((codes, weights), &scale)| {
            for (code, w) in codes.iter_mut().zip(weights) {
                *code = ((w / scale).clamp(-127.0, 127.0).round_ties_even() as i16 + 128) as u8;
            }
        });
        codes
    }

    /// The cheapest codes at the prices of a model.
    fn search(&self, scales: &[f32], step: f32, contexts: &Contexts, choice: Choice) -> Vec<u8> {
        let prices = prices(&contexts.model, choice.lambda);
        let search =
            Search { prices: &prices, columns: &contexts.cols, importance: &self.importance, trellis: choice.trellis };
        let mut codes = vec![0; self.weights.len()];
        codes.par_chunks_mut(LANES * self.cols).enumerate().for_each_init(
            || (Trace::default(), Vec::new()),
            |(trace, targets), (i, codes)| {
                let first = i * LANES;
                let lanes = codes.len() / self.cols;
                targets.clear();
                targets.resize(self.cols, [0f32; LANES]);
                let mut set = Set { targets: &[], rows: [0; LANES], weights: [1.0; LANES] };
                for lane in 0..LANES {
                    let row = first + lane.min(lanes - 1);
                    let scale = scales[row];
                    set.rows[lane] = i32::from(contexts.center) + i32::from(contexts.rows[row]);
                    set.weights[lane] = (scale / step) * (scale / step);
                    for (target, w) in targets.iter_mut().zip(&self.weights[row * self.cols..][..self.cols]) {
                        target[lane] = w / scale;
                    }
                }
                set.targets = targets;
                let mut rows: Vec<&mut [u8]> = codes.chunks_exact_mut(self.cols).collect();
                viterbi::search(&search, &set, trace, &mut rows);
            },
        );
        codes
    }
}

/// The level of a code.
fn level(code: u8) -> f32 {
    f32::from(i16::from(code) - 128)
}

/// Prices of all codes in all contexts, `lambda` per bit.
fn prices(model: &Model, lambda: f64) -> Vec<Prices> {
    let (tables, number, trellis) = (model.tables(), usize::from(model.contexts), model.trellis.is_some());
    let price = |code: u8, odd: bool, context: usize| {
        let table = &tables[if odd { number } else { 0 } + context];
        let symbol = table.symbol(code, trellis, odd);
        let escaped = if symbol < escape_codes(trellis) { context::ESCAPED } else { 0.0 };
        (lambda * f64::from(lengths()[usize::from(table.freq[usize::from(symbol)])] + escaped)) as f32
    };
    // A code at the end that is no outlier has to say so, which makes it as dear as the level before it.
    let spacing = if trellis { 2 } else { 1 };
    let ends: &[u8] = match (model.ends, trellis) {
        (false, _) => &[],
        (true, false) => &[127],
        (true, true) => &[123, 124],
    };
    (0..number)
        .map(|context| {
            let mut prices = [0f32; 256];
            for code in 1..=255u8 {
                prices[usize::from(code)] = price(code, trellis && code & 1 == 1, context);
            }
            for &end in ends {
                for (end, before) in [(ZERO - end, ZERO - end + spacing), (ZERO + end, ZERO + end - spacing)] {
                    prices[usize::from(end)] = prices[usize::from(end)].max(prices[usize::from(before)]);
                }
            }
            prices[0] = if trellis { price(ZERO, true, context) } else { 0.0 };
            prices
        })
        .collect()
}

/// Quantizes with a given common step.
///
/// # Errors
/// None that finite weights give.
///
/// # Panics
/// When weights or importance do not have the size of the matrix, or the step is not above zero and finite.
pub fn quantize_step(
    weights: &[f32],
    rows: usize,
    cols: usize,
    step: f32,
    choice: Choice,
    importance: Option<&[f32]>,
) -> Result<Quantized> {
    step_of(&Matrix::new(weights, rows, cols, importance), step, choice)
}

/// How often model and codes are fitted to each other.
const ROUNDS: usize = 2;

fn step_of(matrix: &Matrix<'_>, step: f32, choice: Choice) -> Result<Quantized> {
    assert!(step > 0.0 && step.is_finite(), "a step of {step}");
    let (rows, cols) = (matrix.rows, matrix.cols);
    if matrix.weights.is_empty() {
        let scales = vec![step; rows];
        let scales_stream = coding::encode_scales(&scales);
        let (codes, stream) = (Vec::new(), Vec::new());
        return Ok(Quantized {
            codes,
            scales,
            stretched: 0,
            column_scales: None,
            outliers: Vec::new(),
            outlier_streams: OutlierStreams::default(),
            stream,
            scales_stream,
            squared_error: 0.0,
            weighted_error: 0.0,
            step,
            choice,
        });
    }
    let reach = matrix.reach(step, choice);
    let within = matrix.within(&reach, choice);
    let scales = reach.scales;
    let mut codes = within.round(&scales);
    let mut contexts = context::fit(&codes, rows, cols, None);
    contexts.model.trellis = choice.trellis;
    if choice.trellis.is_some() || choice.lambda > 0.0 {
        for _ in 0..ROUNDS {
            codes = within.search(&scales, step, &contexts, choice);
            if choice.trellis.is_none() {
                // Zero is cheaper than the end only for codes that stop there.
                reach
                    .outliers
                    .iter()
                    .for_each(|&place| codes[place] = if matrix.weights[place] < 0.0 { 1 } else { 255 });
            }
            contexts = context::fit(&codes, rows, cols, choice.trellis);
        }
    }
    let stream = coding::write(&codes, cols, &contexts)?;
    let gain = within.gain(&codes, &scales);
    let stretched = scales.iter().filter(|&&scale| scale != step).count();
    let scales: Vec<f32> = scales.iter().map(|&scale| (f64::from(scale) * gain) as f32).collect();
    // They make up for the loss of their weight too.
    let outliers = matrix.outliers(&reach.outliers, &codes, &scales);
    let outlier_streams = reach::streams(&codes, rows, cols, &outliers, |row, _| scales[row]);
    let (squared_error, weighted_error) = matrix.errors(&codes, &scales, &outliers);
    let scales_stream = coding::encode_scales(&scales);
    let column_scales = None;
    Ok(Quantized {
        codes,
        scales,
        stretched,
        column_scales,
        outliers,
        outlier_streams,
        stream,
        scales_stream,
        squared_error,
        weighted_error,
        step,
        choice,
    })
}
