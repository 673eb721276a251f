//! The second moment of a layer's inputs, factored, and rounding that makes use of it: LDLQ, which is GPTQ.
//!
//! A layer whose weights are off by the rows of *E* is off by `E x`, on average by `tr(E H Eᵀ)` with `H = E[x xᵀ]`: the
//! *proxy loss*. With `H = L Lᵀ`, *L* lower triangular, it is the sum over columns *p* of
//!
//! ```text
//! L[p,p]² · (w[p] + Σ_{k>p} (w[k] - ŵ[k]) · L[k,p] / L[p,p]  -  ŵ[p])²
//! ```
//!
//! for each row: so columns are rounded from the last to the first, each after its weights have been *adjusted* by what
//! the columns before have lost. This is GPTQ's update (Frantar et al., 2022) in the form of LDLQ (Chee et al., 2023),
//! from the factor of *H* itself, so that nothing is inverted. Columns go by falling `H[j,j]`, as with GPTQ's *act-order*:
//! those that come last correct the others, and can be corrected by none.
//!
//! Any quantizer can be plugged in: [`ldlq`] asks for the columns one by one. Everything is f64; the order of every sum
//! is fixed, whatever the number of threads.

use rayon::prelude::*;

use crate::error::{Error, Result};

/// Rows that go by together: their errors stay in the second-level cache while the factor streams by.
pub const PANEL: usize = 64;
/// Columns whose corrections of each other are made one by one, those of all others at once.
const BLOCK: usize = 32;
/// Columns of the factor that are eliminated at once.
const STEP: usize = 64;
/// How often the damping is raised tenfold before a matrix is given up.
const ATTEMPTS: u32 = 6;

/// A damped second moment and its factor; see the module.
#[derive(Debug, Clone)]
pub struct Hessian {
    cols: usize,
    /// The second moment as it was given, row by row.
    moment: Vec<f32>,
    /// What is added to its diagonal.
    ridge: f64,
    /// The column at each position, by rising importance: the last position is rounded first.
    order: Vec<usize>,
    /// The factor by positions, row by row, each column divided by its diagonal element; only what is below it counts.
    unit: Vec<f64>,
    /// The squares of the diagonal elements.
    pivots: Vec<f64>,
}

impl Hessian {
    /// Factors the second moment of `cols` inputs, row by row, after adding `damping` times the mean of its diagonal to
    /// the diagonal. Where the matrix is still not positive definite, the damping is raised.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the numbers are not `cols²`, not finite, negative on the diagonal, all zero there or not symmetric, or
    /// when `damping` is not a number from 0 up.
    pub fn new(moment: Vec<f32>, cols: usize, damping: f64) -> Result<Self> {
        if cols.checked_mul(cols) != Some(moment.len()) {
            return Err(Error::invalid(format!("a second moment of {} numbers for {cols} columns", moment.len())));
        }
        if !(damping >= 0.0 && damping.is_finite()) {
            return Err(Error::invalid(format!("damping is {damping}, expected a number from 0 up")));
        }
        if let Some(at) = moment.iter().position(|x| !x.is_finite()) {
            return Err(Error::invalid(format!("number {at} of a second moment is not finite")));
        }
        let diagonal: Vec<f64> = (0..cols).map(|j| f64::from(moment[j * cols + j])).collect();
        if let Some(j) = diagonal.iter().position(|&x| x < 0.0) {
            return Err(Error::invalid(format!("the second moment of column {j} is {}, below zero", diagonal[j])));
        }
        let mirrored = |&at: &usize| moment[at] == moment[(at % cols) * cols + at / cols];
        if let Some(at) = (0..moment.len()).find(|at| !mirrored(at)) {
            let (i, j) = (at / cols, at % cols);
            return Err(Error::invalid(format!("a second moment differs from its transpose at row {i}, column {j}")));
        }
        let mean = diagonal.iter().sum::<f64>() / cols.max(1) as f64;
        if mean == 0.0 {
            return Err(Error::invalid("a second moment whose diagonal is zero says nothing"));
        }
        let mut order: Vec<usize> = (0..cols).collect();
        order.sort_by(|&a, &b| diagonal[a].total_cmp(&diagonal[b]));
        // A matrix in f32 can be short of positive definite by its own rounding.
        let mut ridge = damping * mean;
        for _ in 0..ATTEMPTS {
            if let Some((unit, pivots)) = factor(&moment, &order, ridge) {
                return Ok(Self { cols, moment, ridge, order, unit, pivots });
            }
            ridge = (10.0 * ridge).max(1e-6 * mean);
        }
        Err(Error::invalid("a second moment is not positive semidefinite; it was not written by tenpak calibrate"))
    }

    /// Columns.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The columns in the order in which they are rounded: the most important first.
    pub fn order(&self) -> impl Iterator<Item = usize> {
        self.order.iter().rev().copied()
    }

    /// Row `j` of the second moment, to whose element `j` belongs the damping as well.
    #[must_use]
    pub fn row(&self, j: usize) -> &[f32] {
        &self.moment[j * self.cols..][..self.cols]
    }

    /// What is added to the diagonal.
    #[must_use]
    pub fn ridge(&self) -> f64 {
        self.ridge
    }

    /// Element `j` of the damped diagonal.
    #[must_use]
    pub fn diagonal(&self, j: usize) -> f64 {
        f64::from(self.moment[j * self.cols + j]) + self.ridge
    }

    /// The square of the factor's diagonal element for a column that stands at position `p` of [`Hessian::order`].
    #[must_use]
    pub fn pivot(&self, p: usize) -> f64 {
        self.pivots[self.cols - 1 - p]
    }

    /// The proxy loss of every row of errors.
    ///
    /// # Panics
    /// When the errors are not whole rows.
    #[must_use]
    pub fn losses(&self, errors: &[f64]) -> Vec<f64> {
        assert!(errors.len().is_multiple_of(self.cols.max(1)), "errors are not whole rows");
        errors
            .par_chunks(self.cols.max(1))
            .map(|e| (0..self.cols).map(|j| e[j] * (self.product(j, e) + self.ridge * e[j])).sum())
            .collect()
    }

    fn product(&self, j: usize, e: &[f64]) -> f64 {
        self.row(j).iter().zip(e).map(|(&h, &e)| f64::from(h) * e).sum()
    }
}

/// `L / diag(L)` and `diag(L)²` for `L Lᵀ` = the matrix by positions, or nothing where that is not positive definite.
fn factor(moment: &[f32], order: &[usize], ridge: f64) -> Option<(Vec<f64>, Vec<f64>)> {
    let n = order.len();
    let mut a = vec![0.0; n * n];
    a.par_chunks_mut(n.max(1)).enumerate().for_each(|(i, row)| {
        for j in 0..=i {
            row[j] = f64::from(moment[order[i] * n + order[j]]);
        }
        row[i] += ridge;
    });
    let mut pivots = vec![0.0; n];
    for first in (0..n).step_by(STEP) {
        let last = (first + STEP).min(n);
        let (above, below) = a.split_at_mut(last * n);
        // The corner: row by row, columns unit from the start, with their pivots apart.
        for i in first..last {
            let (before, row) = above.split_at_mut(i * n);
            eliminate(&mut row[first..=i], |k| &before[(first + k) * n + first..], &pivots[first..i]);
            let pivot = row[i];
            if !(pivot > 0.0 && pivot.is_finite()) {
                return None;
            }
            pivots[i] = pivot;
        }
        let corner = &above[first * n..];
        let pivots = &pivots[first..last];
        below.par_chunks_mut(n).for_each(|row| {
            eliminate(&mut row[first..last], |k| &corner[k * n + first..], pivots);
        });
        // The rest of the matrix loses what these columns explain; products row by row from a transposed panel.
        let (rest, width) = (n - last, last - first);
        let mut panel = vec![0.0; width * rest];
        for (i, row) in below.chunks(n).enumerate() {
            for k in 0..width {
                panel[k * rest + i] = row[first + k] * pivots[k];
            }
        }
        below.par_chunks_mut(n).enumerate().for_each(|(i, row)| {
            let (done, open) = row.split_at_mut(last);
            let open = &mut open[..=i];
            for k in (0..width).step_by(4) {
                if k + 4 <= width {
                    let f: [f64; 4] = std::array::from_fn(|x| done[first + k + x]);
                    let p: [&[f64]; 4] = std::array::from_fn(|x| &panel[(k + x) * rest..][..=i]);
                    for j in 0..=i {
                        open[j] -= (f[0] * p[0][j] + f[1] * p[1][j]) + (f[2] * p[2][j] + f[3] * p[3][j]);
                    }
                } else {
                    for k in k..width {
                        let f = done[first + k];
                        for (open, p) in open.iter_mut().zip(&panel[k * rest..]) {
                            *open -= f * p;
                        }
                    }
                }
            }
        });
    }
    Some((a, pivots))
}

/// Turns elements of a row into those of the unit factor, given the rows of the corner; where the row is one of the
/// corner itself, its last element becomes its pivot.
fn eliminate<'a>(row: &mut [f64], corner: impl Fn(usize) -> &'a [f64], pivots: &[f64]) {
    for j in 0..row.len() {
        let unit = if j < pivots.len() { Some(corner(j)) } else { None };
        let mut sum = row[j];
        for k in 0..j {
            // In a corner's own row, the other factor of the last element is the row itself.
            let other = unit.map_or(row[k], |unit| unit[k]);
            sum -= row[k] * pivots[k] * other;
        }
        row[j] = if unit.is_some() { sum / pivots[j] } else { sum };
    }
}

/// Errors and adjustments of some rows.
struct Panel {
    rows: usize,
    /// What each position has lost, [`PANEL`] rows apart.
    errors: Vec<f64>,
    /// What the errors of other blocks add to the positions of this block.
    added: Vec<f64>,
}

/// Rounds the columns of a matrix one by one, each adjusted by what the columns before it have lost.
///
/// For every column, in the order of [`Hessian::order`], `quantize` is given its number, the adjusted weights of all rows,
/// and the place for what they are rounded to. Returns the proxy loss of every row.
///
/// # Panics
/// When `weights` are not whole rows.
pub fn ldlq(hessian: &Hessian, weights: &[f32], mut quantize: impl FnMut(usize, &[f64], &mut [f64])) -> Vec<f64> {
    let n = hessian.cols;
    assert!(n > 0 && weights.len().is_multiple_of(n), "weights are not whole rows");
    let rows = weights.len() / n;
    let mut panels: Vec<Panel> = (0..rows)
        .step_by(PANEL)
        .map(|first| Panel {
            rows: PANEL.min(rows - first),
            errors: vec![0.0; n * PANEL],
            added: vec![0.0; BLOCK * PANEL],
        })
        .collect();
    let mut losses = vec![0.0; rows];
    let (mut adjusted, mut chosen) = (vec![0.0; rows], vec![0.0; rows]);
    let mut end = n;
    while end > 0 {
        let start = end.saturating_sub(BLOCK);
        panels.par_iter_mut().for_each(|panel| panel.gather(&hessian.unit, n, start, end));
        for p in (start..end).rev() {
            let column = hessian.order[p];
            for (panel, (adjusted, weights)) in
                panels.iter().zip(adjusted.chunks_mut(PANEL).zip(weights.chunks(PANEL * n)))
            {
                let added = &panel.added[(p - start) * PANEL..];
                for (r, adjusted) in adjusted.iter_mut().enumerate() {
                    *adjusted = f64::from(weights[r * n + column]) + added[r];
                }
            }
            quantize(column, &adjusted, &mut chosen);
            for (panel, (first, weights)) in
                panels.iter_mut().zip((0..rows).step_by(PANEL).zip(weights.chunks(PANEL * n)))
            {
                for r in 0..panel.rows {
                    let off = adjusted[first + r] - chosen[first + r];
                    losses[first + r] += hessian.pivots[p] * off * off;
                    panel.errors[p * PANEL + r] = f64::from(weights[r * n + column]) - chosen[first + r];
                }
                panel.spread(&hessian.unit[p * n..][start..p], p);
            }
        }
        end = start;
    }
    losses
}

impl Panel {
    /// Sums up what the positions from `end` on add to those of the block from `start` to `end`.
    fn gather(&mut self, unit: &[f64], n: usize, start: usize, end: usize) {
        self.added.fill(0.0);
        let errors = &self.errors;
        for (four, added) in self.added.chunks_mut(4 * PANEL).enumerate().take((end - start).div_ceil(4)) {
            let first = start + 4 * four;
            let width = (end - first).min(4);
            for r in (0..self.rows).step_by(8) {
                let mut sums = [[0.0; 8]; 4];
                for k in end..n {
                    let e: &[f64; 8] = errors[k * PANEL + r..].first_chunk().expect("panels are padded");
                    let row = &unit[k * n + first..];
                    if width == 4 {
                        let f: &[f64; 4] = row.first_chunk().expect("a row goes on to its diagonal");
                        for x in 0..4 {
                            for i in 0..8 {
                                sums[x][i] += e[i] * f[x];
                            }
                        }
                    } else {
                        for x in 0..width {
                            for i in 0..8 {
                                sums[x][i] += e[i] * row[x];
                            }
                        }
                    }
                }
                for x in 0..width {
                    added[x * PANEL + r..][..8].copy_from_slice(&sums[x]);
                }
            }
        }
    }

    /// Adds the errors of position `p` to what the positions before it in its block are adjusted by.
    fn spread(&mut self, unit: &[f64], p: usize) {
        let errors = &self.errors[p * PANEL..][..PANEL];
        for (added, factor) in self.added.chunks_mut(PANEL).zip(unit) {
            for (added, e) in added.iter_mut().zip(errors) {
                *added += e * factor;
            }
        }
    }
}
