//! Coordinate descent on the proxy loss, from codes that are good already.
//!
//! With the gradient `g = E H` of a row at hand, the loss as a function of one weight is a parabola, whose least point is
//! `ŵ[j] + g[j] / H[j,j]`: the best code is that of the nearest level. In the same way the scale and the offset of a group
//! are moved to where the loss is least for its codes, and rounded to their stored type. A change is made only where the
//! loss falls, so that it never rises.

use super::gptq::{LevelFinder, Row};
use super::hessian::Hessian;
use super::{Params, min_scale};
use crate::codec::reference::weight;
use crate::layout::{Grouped, Levels};

/// A part of a row's loss: what is gained must exceed it, so that rounding errors change nothing for ever.
const LEAST_GAIN: f64 = 1e-9;

/// What polishing needs to know of a matrix.
pub(super) struct Polish<'a> {
    layout: &'a Grouped,
    hessian: &'a Hessian,
    levels: &'a LevelFinder<'a>,
    order: Vec<usize>,
}

/// A row under way.
struct State {
    /// Weights as they would be decoded.
    decoded: Vec<f64>,
    /// `E H`.
    gradient: Vec<f64>,
    loss: f64,
}

impl<'a> Polish<'a> {
    pub(super) fn new(layout: &'a Grouped, hessian: &'a Hessian, levels: &'a LevelFinder<'a>) -> Self {
        Self { layout, hessian, levels, order: hessian.order().collect() }
    }

    /// Polishes rows, in at most so many rounds.
    pub(super) fn rows(&self, weights: &[f32], rows: &mut [Row], rounds: usize) {
        let cols = self.hessian.cols();
        let len = self.layout.group_len(cols).max(1);
        for (row, weights) in rows.iter_mut().zip(weights.chunks(cols)) {
            let decode = |(j, &code): (usize, &u8)| f64::from(weight(self.layout, &row.params[j / len], code));
            let decoded: Vec<f64> = row.codes.iter().enumerate().map(decode).collect();
            let mut state = State { gradient: vec![0.0; cols], decoded, loss: row.loss };
            for (j, &w) in weights.iter().enumerate() {
                let error = f64::from(w) - state.decoded[j];
                state.add(self.hessian, j, error);
            }
            for _ in 0..rounds {
                let before = state.loss;
                self.codes(row, &mut state, len);
                self.params(row, &mut state, len);
                if before - state.loss <= 1e-4 * before {
                    break;
                }
            }
            row.loss = state.loss;
        }
    }

    /// Moves every code to where the loss is least.
    fn codes(&self, row: &mut Row, state: &mut State, len: usize) {
        for &j in &self.order {
            let (params, diagonal) = (&row.params[j / len], self.hessian.diagonal(j));
            let code = self.levels.code(params, state.decoded[j] + state.gradient[j] / diagonal);
            if code == row.codes[j] {
                continue;
            }
            let moved = f64::from(weight(self.layout, params, code)) - state.decoded[j];
            let gain = moved * (2.0 * state.gradient[j] - moved * diagonal);
            if gain > LEAST_GAIN * state.loss {
                row.codes[j] = code;
                state.decoded[j] += moved;
                state.loss -= gain;
                state.add(self.hessian, j, -moved);
            }
        }
    }

    /// Moves the parameters of every group to where the loss is least.
    fn params(&self, row: &mut Row, state: &mut State, len: usize) {
        for (g, params) in row.params.iter_mut().enumerate() {
            let first = g * len;
            let codes = &row.codes[first..(first + len).min(self.hessian.cols())];
            for refit in self.refits(params, codes, state, first) {
                let moved: Vec<f64> = codes
                    .iter()
                    .zip(&state.decoded[first..])
                    .map(|(&code, decoded)| f64::from(weight(self.layout, &refit, code)) - decoded)
                    .collect();
                let slope: f64 = moved.iter().zip(&state.gradient[first..]).map(|(m, g)| m * g).sum();
                let gain = 2.0 * slope - self.square(&moved, first);
                if gain > LEAST_GAIN * state.loss {
                    *params = refit;
                    state.loss -= gain;
                    for (j, moved) in moved.iter().enumerate().filter(|(_, moved)| **moved != 0.0) {
                        state.decoded[first + j] += moved;
                        state.add(self.hessian, first + j, -moved);
                    }
                }
            }
        }
    }

    /// Parameters near those of least loss for the codes of a group: the scale alone, then scale and offset.
    fn refits(&self, params: &Params, codes: &[u8], state: &State, first: usize) -> Vec<Params> {
        let levels: Vec<f64> = codes.iter().map(|&c| f64::from(self.layout.level(c, params.zero_point))).collect();
        let ones = vec![1.0; codes.len()];
        let along =
            |direction: &[f64]| -> f64 { direction.iter().zip(&state.gradient[first..]).map(|(d, g)| d * g).sum() };
        let (slope, square) = (along(&levels), self.square(&levels, first));
        if params.scale == 0.0 || square <= 0.0 {
            return Vec::new();
        }
        let mut found = Vec::new();
        let scale_type = self.layout.scale();
        let mut push = |scale: f64, offset: f64| {
            #[expect(clippy::cast_possible_truncation, reason = "rounded to the stored type anyway")]
            let scale = scale_type.round((f64::from(params.scale) + scale) as f32);
            #[expect(clippy::cast_possible_truncation, reason = "rounded to the stored type anyway")]
            let offset = self.layout.offset().map_or(0.0, |t| t.round((f64::from(params.offset) + offset) as f32));
            let refit = Params { scale, offset, ..*params };
            let storable = scale.is_finite() && scale.abs() > min_scale(scale_type) && offset.is_finite();
            if storable && refit != *params {
                found.push(refit);
            }
        };
        if self.layout.offset().is_some() && self.layout.levels() == Levels::Unsigned {
            let (lift, plain) = (along(&ones), self.square(&ones, first));
            let mixed = self.form(&levels, &ones, first);
            let determinant = square * plain - mixed * mixed;
            if determinant > 1e-9 * square * plain {
                let scale = (slope * plain - lift * mixed) / determinant;
                push(scale, (lift * square - slope * mixed) / determinant);
            }
            push(0.0, lift / plain);
        }
        push(slope / square, 0.0);
        found
    }

    /// `dᵀ H d` over the columns of a group.
    fn square(&self, direction: &[f64], first: usize) -> f64 {
        self.form(direction, direction, first)
    }

    /// `aᵀ H b` over the columns of a group.
    fn form(&self, a: &[f64], b: &[f64], first: usize) -> f64 {
        let mut sum = 0.0;
        for (i, a) in a.iter().enumerate().filter(|(_, a)| **a != 0.0) {
            let row = &self.hessian.row(first + i)[first..];
            let product: f64 = b.iter().zip(row).map(|(b, &h)| b * f64::from(h)).sum();
            sum += a * (product + self.hessian.ridge() * b[i]);
        }
        sum
    }
}

impl State {
    /// Adds an error at column `j` to the gradient.
    fn add(&mut self, hessian: &Hessian, j: usize, error: f64) {
        for (g, &h) in self.gradient.iter_mut().zip(hessian.row(j)) {
            *g += error * f64::from(h);
        }
        self.gradient[j] += error * hessian.ridge();
    }
}
