//! Column scales from activations: AWQ (Lin et al., 2023).
//!
//! The inputs of some columns are many times larger than those of others, and an error of a weight counts with them. So
//! the matrix is multiplied with `s_j = mean|x_j|^alpha` before it is quantized and divided after: the columns that matter
//! get the finer part of their group's grid. `alpha` goes over a grid from 0 to 1; the one of least proxy loss is kept,
//! under the full second moment of the inputs where it is known and its diagonal otherwise. The range of every group is
//! searched as [`super::weighted`] does, which holds AWQ's clip search, a range shrunk step by step, as a special case.
//!
//! The divisor stays with the matrix as its plane `column_scales`, so nothing is folded into other layers and any
//! architecture can have it. What rounding to nearest gives is calculated too, and what is taken never loses more.
//!
//! Powers are products of repeated square roots, since those are the same on every machine.

use rayon::prelude::*;

use super::weighted::{self, Importance};
use super::{Fit, OutOfRange, Params, params};
use crate::codec::reference;
use crate::layout::Grouped;

/// Steps of `alpha` from 0 to 1: a power of two, each being a square root.
const STEPS: u32 = 16;
/// The fewest rows that `alpha` is chosen by, where there are more: then one in so many as there are steps, so that all steps
/// together take as long as quantizing the matrix once.
const LEAST_ROWS: usize = 64;
/// The least mean of a column relative to that of all: no text shows all that a column will see.
const FLOOR: f64 = 1e-4;
/// Rows whose losses are calculated together.
const PANEL: usize = 8;

/// What is known of the inputs of a matrix.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// Mean magnitude of each column's input.
    pub mean_abs: Vec<f32>,
    /// How much an error in each column costs.
    pub importance: Importance,
    /// The second moment, row by row, with its damping.
    pub moment: Option<Moment>,
}

/// A second moment, damped, that is multiplied and not factored.
#[derive(Debug, Clone)]
pub struct Moment {
    cols: usize,
    moment: Vec<f32>,
    ridge: f64,
}

impl Moment {
    /// The second moment of `cols` inputs, `damping` times the mean of its diagonal added to the diagonal.
    ///
    /// # Panics
    /// When the numbers are not `cols²`.
    #[must_use]
    pub fn new(moment: Vec<f32>, cols: usize, damping: f64) -> Self {
        assert_eq!(moment.len(), cols * cols, "a second moment of other columns");
        let trace: f64 = (0..cols).map(|j| f64::from(moment[j * cols + j])).sum();
        Self { cols, moment, ridge: damping * trace / cols.max(1) as f64 }
    }

    /// The proxy loss `e H eᵀ` of all rows of errors together, at most [`PANEL`] of them.
    fn loss(&self, errors: &[f64]) -> f64 {
        let rows = errors.len() / self.cols.max(1);
        let mut panel = vec![[0.0; PANEL]; self.cols];
        for (r, row) in errors.chunks_exact(self.cols).enumerate() {
            for (panel, e) in panel.iter_mut().zip(row) {
                panel[r] = *e;
            }
        }
        let mut losses = [0.0; PANEL];
        for (j, row) in self.moment.chunks_exact(self.cols).enumerate() {
            let mut sums = [0.0; PANEL];
            for (&h, e) in row.iter().zip(&panel) {
                let h = f64::from(h);
                for r in 0..PANEL {
                    sums[r] += h * e[r];
                }
            }
            for r in 0..PANEL {
                losses[r] += panel[j][r] * (sums[r] + self.ridge * panel[j][r]);
            }
        }
        losses[..rows].iter().sum()
    }
}

/// A matrix to be scaled.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    /// What its codec's planes mean.
    pub layout: &'a Grouped,
    /// The codec's own fit.
    pub fit: Fit,
    /// Finite weights, row by row.
    pub weights: &'a [f32],
    /// Columns.
    pub cols: usize,
    /// The places of weights that are stored by themselves, ascending.
    pub outliers: &'a [usize],
}

/// How a matrix is quantized.
#[derive(Debug, Clone, PartialEq)]
pub struct Chosen {
    /// What decoded weights are multiplied with, one per column; nothing where that is one.
    pub column_scales: Option<Vec<f32>>,
    /// Whether the parameters of groups are searched; else they are those of the codec's own fit.
    pub searched: bool,
    /// The proxy loss, and that of rounding to nearest with the codec's own fit.
    pub loss: f64,
    /// See `loss`.
    pub nearest: f64,
}

/// Column scales for an exponent of `step / 16`, the same up to a factor as `mean_abs^-alpha`.
#[must_use]
pub fn column_scales(mean_abs: &[f32], step: u32) -> Vec<f32> {
    let mean = mean_abs.iter().map(|&m| f64::from(m)).sum::<f64>() / mean_abs.len().max(1) as f64;
    if mean == 0.0 || step == 0 {
        return vec![1.0; mean_abs.len()];
    }
    let power = |m: &f32| {
        let m = f64::from(*m) / mean;
        let (mut root, mut power) = (if m > FLOOR { m } else { FLOOR }, 1.0);
        let mut bit = STEPS;
        while bit > 0 {
            if step & bit != 0 {
                power *= root;
            }
            root = root.sqrt();
            bit /= 2;
        }
        power
    };
    let powers: Vec<f64> = mean_abs.iter().map(power).collect();
    let (least, greatest) = powers
        .iter()
        .fold((f64::INFINITY, 0.0), |(a, b): (f64, f64), &p| (if p < a { p } else { a }, if p > b { p } else { b }));
    // As AWQ has it: the extremes are as far above one as below.
    let middle = (least * greatest).sqrt();
    #[expect(clippy::cast_possible_truncation, reason = "rounded to what is stored")]
    powers.iter().map(|p| (middle / p) as f32).collect()
}

/// The weights that are quantized where columns have scales, outliers replaced.
pub fn prepare(weights: &mut [f32], cols: usize, group: usize, column_scales: Option<&[f32]>, outliers: &[usize]) {
    if let Some(scales) = column_scales {
        for row in weights.chunks_exact_mut(cols.max(1)) {
            row.iter_mut().zip(scales).for_each(|(w, scale)| *w /= scale);
        }
    }
    super::outliers::take_out(weights, cols, group, outliers);
}

/// The importance of columns whose weights were divided by these scales.
#[must_use]
pub fn scaled_importance(importance: &Importance, column_scales: Option<&[f32]>) -> Importance {
    match column_scales {
        Some(scales) => {
            let columns: Vec<f32> = importance.columns().iter().zip(scales).map(|(i, s)| i * s * s).collect();
            Importance::relative(columns)
        }
        None => importance.clone(),
    }
}

/// Finds the column scales of least proxy loss.
///
/// # Errors
/// [`OutOfRange`] when the codec's own fit cannot store the parameters of a group.
///
/// # Panics
/// When the weights are not whole rows, or inputs are of other columns.
pub fn choose(matrix: &Matrix<'_>, inputs: &Inputs) -> Result<Chosen, OutOfRange> {
    let cols = matrix.cols;
    assert!(matrix.weights.len().is_multiple_of(cols.max(1)), "weights are not whole rows");
    assert!(inputs.mean_abs.len() == cols && inputs.importance.columns().len() == cols, "inputs of other columns");
    let rows = matrix.weights.len() / cols.max(1);
    if rows == 0 || cols == 0 {
        return Ok(Chosen { column_scales: None, searched: false, loss: 0.0, nearest: 0.0 });
    }
    let sample = (rows / STEPS as usize).max(LEAST_ROWS).min(rows);
    // Evenly spread over the matrix.
    let sampled: Vec<usize> = (0..sample).map(|i| i * rows / sample).collect();
    let mut best: Option<(f64, u32)> = None;
    for step in 0..=STEPS {
        let scales = (step > 0).then(|| column_scales(&inputs.mean_abs, step));
        // A scale that a type cannot hold rules an exponent out, not the matrix.
        let Ok(loss) = loss(matrix, inputs, &sampled, scales.as_deref(), true) else { continue };
        if best.is_none_or(|(least, _)| loss < least) {
            best = Some((loss, step));
        }
    }
    let all: Vec<usize> = (0..rows).collect();
    let nearest = loss(matrix, inputs, &all, None, false)?;
    let mut chosen = Chosen { column_scales: None, searched: false, loss: nearest, nearest };
    for step in best.map(|(_, step)| step).into_iter().filter(|&step| step > 0).chain([0]) {
        let scales = (step > 0).then(|| column_scales(&inputs.mean_abs, step));
        match loss(matrix, inputs, &all, scales.as_deref(), true) {
            Ok(loss) if loss < chosen.loss => {
                chosen = Chosen { column_scales: scales, searched: true, loss, nearest };
            }
            _ => {}
        }
    }
    Ok(chosen)
}

/// The proxy loss of some rows that are quantized with column scales.
fn loss(
    matrix: &Matrix<'_>,
    inputs: &Inputs,
    rows: &[usize],
    column_scales: Option<&[f32]>,
    searched: bool,
) -> Result<f64, OutOfRange> {
    let importance = scaled_importance(&inputs.importance, column_scales);
    let losses: Vec<f64> = rows
        .par_chunks(PANEL)
        .map(|rows| {
            let mut errors = Vec::with_capacity(rows.len() * matrix.cols);
            for &row in rows {
                row_errors(matrix, row, column_scales, searched.then_some(&importance), &mut errors)?;
            }
            Ok(match &inputs.moment {
                Some(moment) => moment.loss(&errors),
                None => {
                    let costs = inputs.importance.columns().iter().cycle();
                    errors.iter().zip(costs).map(|(e, &cost)| f64::from(cost) * e * e).sum()
                }
            })
        })
        .collect::<Result<_, _>>()?;
    Ok(losses.iter().sum())
}

/// Adds the errors of a quantized row.
fn row_errors(
    matrix: &Matrix<'_>,
    row: usize,
    column_scales: Option<&[f32]>,
    importance: Option<&Importance>,
    errors: &mut Vec<f64>,
) -> Result<(), OutOfRange> {
    let (layout, cols) = (matrix.layout, matrix.cols);
    let len = layout.group_len(cols).max(1);
    let start = row * cols;
    let original = &matrix.weights[start..][..cols];
    let from = matrix.outliers.partition_point(|&place| place < start);
    let until = matrix.outliers.partition_point(|&place| place < start + cols);
    let outliers: Vec<usize> = matrix.outliers[from..until].iter().map(|place| place - start).collect();
    let mut weights = original.to_vec();
    prepare(&mut weights, cols, len, column_scales, &outliers);
    let params: Vec<Params> = match importance {
        Some(importance) => weighted::row(matrix.fit, layout, &weights, importance)?,
        None => weights.chunks(len).map(|group| params(matrix.fit, layout, group)).collect::<Result<_, _>>()?,
    };
    let mut outliers = outliers.into_iter().peekable();
    for (j, (&w, &original)) in weights.iter().zip(original).enumerate() {
        if outliers.next_if_eq(&j).is_some() {
            errors.push(0.0);
            continue;
        }
        let params = &params[j / len];
        let decoded = reference::weight(layout, params, reference::code(layout, params, w));
        let decoded = column_scales.map_or(decoded, |scales| decoded * scales[j]);
        errors.push(f64::from(original) - f64::from(decoded));
    }
    Ok(())
}
