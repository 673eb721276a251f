//! Codes of least proxy loss: parameters by the weighted search, codes by LDLQ, then polished.
//!
//! The parameters of every group are fixed beforehand, by [`super::weighted`] with the diagonal of the second moment; so
//! the columns can be rounded in any order. What rounding to nearest gives with these parameters is calculated too, and
//! each row takes the better of the two: the proxy loss is never above that of rounding to nearest. Codes chosen in this
//! way are not those of the nearest levels; decoders do not care.

use rayon::prelude::*;

use super::hessian::{Hessian, PANEL, ldlq};
use super::polish::Polish;
use super::weighted::{self, Importance};
use super::{Fit, OutOfRange, Params};
use crate::codec::PlanesMut;
use crate::codec::reference::{self, min_code, threshold};
use crate::layout::{Grouped, Levels};

/// How a matrix is solved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Rounds of coordinate descent and refitted parameters after LDLQ; none leaves LDLQ's codes.
    pub polish: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { polish: 4 }
    }
}

/// A row as it is stored: parameters per group, and a code per weight.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The parameters of every group.
    pub params: Vec<Params>,
    /// The codes.
    pub codes: Vec<u8>,
    /// The proxy loss of the row, and that of rounding to nearest with the parameters of the weighted search.
    pub loss: f64,
    /// See `loss`.
    pub nearest: f64,
}

/// Solves rows of finite weights, in parallel; the result does not depend on how many there are.
///
/// # Errors
/// [`OutOfRange`] when the codec's own fit cannot store the parameters of a group.
///
/// # Panics
/// When the weights are not whole rows of the second moment's columns.
pub fn solve(
    layout: &Grouped,
    fit: Fit,
    hessian: &Hessian,
    importance: &Importance,
    weights: &[f32],
    options: &Options,
) -> Result<Vec<Row>, OutOfRange> {
    let panels: Vec<_> = weights
        .par_chunks(PANEL * hessian.cols().max(1))
        .map(|weights| panel(layout, fit, hessian, importance, weights, options))
        .collect::<Result<_, _>>()?;
    Ok(panels.into_iter().flatten().collect())
}

fn panel(
    layout: &Grouped,
    fit: Fit,
    hessian: &Hessian,
    importance: &Importance,
    weights: &[f32],
    options: &Options,
) -> Result<Vec<Row>, OutOfRange> {
    let cols = hessian.cols();
    let len = layout.group_len(cols).max(1);
    let levels = LevelFinder::new(layout);
    let mut rows = Vec::with_capacity(weights.len() / cols);
    for weights in weights.chunks(cols) {
        let params = weighted::row(fit, layout, weights, importance)?;
        let code = |(j, &w): (usize, &f32)| reference::code(layout, &params[j / len], w);
        let codes = weights.iter().enumerate().map(code).collect();
        rows.push(Row { params, codes, loss: 0.0, nearest: 0.0 });
    }
    let value =
        |row: &Row, column: usize, code: u8| f64::from(reference::weight(layout, &row.params[column / len], code));
    let nearest = ldlq(hessian, weights, |column, _, chosen| {
        for (row, chosen) in rows.iter().zip(chosen) {
            *chosen = value(row, column, row.codes[column]);
        }
    });
    let mut codes = vec![0; weights.len()];
    let solved = ldlq(hessian, weights, |column, adjusted, chosen| {
        for (r, (row, (&w, chosen))) in rows.iter().zip(adjusted.iter().zip(chosen)).enumerate() {
            let code = levels.code(&row.params[column / len], w);
            codes[r * cols + column] = code;
            *chosen = value(row, column, code);
        }
    });
    for (r, row) in rows.iter_mut().enumerate() {
        (row.loss, row.nearest) = (nearest[r], nearest[r]);
        if solved[r] < nearest[r] {
            row.loss = solved[r];
            row.codes.copy_from_slice(&codes[r * cols..][..cols]);
        }
    }
    if options.polish > 0 {
        Polish::new(layout, hessian, &levels).rows(weights, &mut rows, options.polish);
    }
    Ok(rows)
}

/// Finds the code whose level is nearest to a number, in f64.
#[derive(Debug)]
pub(super) struct LevelFinder<'a> {
    layout: &'a Grouped,
    least: f64,
    greatest: f64,
    thresholds: [f64; 15],
}

impl<'a> LevelFinder<'a> {
    pub(super) fn new(layout: &'a Grouped) -> Self {
        let thresholds = match layout.levels() {
            Levels::Table(table) => std::array::from_fn(|i| f64::from(threshold(table, i))),
            _ => [0.0; 15],
        };
        let (least, greatest) = (f64::from(min_code(layout)), f64::from(layout.max_code()));
        Self { layout, least, greatest, thresholds }
    }

    /// The code of a number; that of level zero where the scale is zero.
    pub(super) fn code(&self, params: &Params, w: f64) -> u8 {
        if params.scale == 0.0 {
            return self.layout.zero_code(params.zero_point);
        }
        let t = (w - f64::from(params.offset)) / f64::from(params.scale);
        match self.layout.levels() {
            Levels::Table(_) => return self.thresholds.iter().map(|&threshold| u8::from(t > threshold)).sum(),
            Levels::Bank(bank) => {
                let middle = |pair: &[i8]| 0.5 * (f64::from(pair[0]) + f64::from(pair[1]));
                return bank.table(params.zero_point).windows(2).map(|pair| u8::from(t > middle(pair))).sum();
            }
            _ => {}
        }
        let code = t + f64::from(self.layout.zero_code(params.zero_point));
        let code = if code > self.least { code } else { self.least };
        let code = if code < self.greatest { code } else { self.greatest };
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between the codes, as set above")]
        let code = (code + 0.5) as u8;
        code
    }
}

/// Writes solved rows into zeroed planes.
pub fn store(layout: &Grouped, rows: &[Row], cols: usize, planes: &mut PlanesMut<'_>) {
    for (r, row) in rows.iter().enumerate() {
        let mut place = planes.row(layout, cols, r);
        for (g, params) in row.params.iter().enumerate() {
            reference::store_params(layout, &mut place, g, params);
        }
        for (j, &code) in row.codes.iter().enumerate() {
            layout.store_code(place.codes, place.high_codes, j, code);
        }
    }
}

/// The weights that a row stands for.
#[must_use]
pub fn decode(layout: &Grouped, row: &Row) -> Vec<f32> {
    let len = layout.group_len(row.codes.len()).max(1);
    let weight = |(j, &code): (usize, &u8)| reference::weight(layout, &row.params[j / len], code);
    row.codes.iter().enumerate().map(weight).collect()
}
