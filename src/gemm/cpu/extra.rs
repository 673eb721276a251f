//! What outliers add to products: sparse rows times activations, after the kernels.
//!
//! One row of activations reads every outlier once, as it is stored; more of them share the numbers that it is made of.

use std::sync::{Mutex, PoisonError};

use super::tile;
use crate::codec::extra::ExtraPlanes;
use crate::error::Result;
use crate::gemm::Weights;

/// Rows of weights that a task takes beside one row of activations.
const ROWS: usize = 512;

/// One row of activations, the outliers that it meets, and the results.
struct Task<'a> {
    extra: ExtraPlanes<'a>,
    x: &'a [f32],
    y: &'a mut [f32],
}

/// Adds what outliers add to `y[m, n]`.
pub(in crate::gemm) fn add(weights: &Weights<'_>, x: &[f32], m: usize, y: &mut [f32], small: bool) -> Result<()> {
    add_matrix(*weights.extra(), weights.rows(), weights.cols(), x, m, y, small)
}

/// The same for a stack of matrices, as [`super::multiply_grouped`].
pub(super) fn add_grouped(stack: &Weights<'_>, x: &[f32], ends: &[usize], y: &mut [f32], small: bool) -> Result<()> {
    let (rows, cols) = (stack.rows() / ends.len(), stack.cols());
    if !stack.extra().has_outliers() || rows == 0 {
        return Ok(());
    }
    let (mut first, mut rest) = (0, y);
    for (extra, &end) in stack.extra().chunks(stack.rows(), rows).into_iter().zip(ends) {
        let (part, tail) = rest.split_at_mut((end - first) * rows);
        add_matrix(extra, rows, cols, &x[first * cols..end * cols], end - first, part, small)?;
        (first, rest) = (end, tail);
    }
    Ok(())
}

fn add_matrix(
    extra: ExtraPlanes<'_>,
    rows: usize,
    cols: usize,
    x: &[f32],
    m: usize,
    y: &mut [f32],
    small: bool,
) -> Result<()> {
    if !extra.has_outliers() || x.is_empty() || y.is_empty() {
        return Ok(());
    }
    if m > 1 {
        if let Some(sparse) = extra.sparse()? {
            let tasks = x.chunks_exact(cols).zip(y.chunks_exact_mut(rows)).collect();
            tile::each(tasks, small, |(x, y)| sparse.add_products(x, y));
        }
        return Ok(());
    }
    let parts = extra.chunks(rows, ROWS).into_iter().zip(y.chunks_mut(ROWS));
    let failed = Mutex::new(None);
    tile::each(parts.map(|(extra, y)| Task { extra, x, y }).collect(), small, |task: Task<'_>| {
        if let Err(e) = task.extra.add_products(task.x, task.y) {
            *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(e);
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}
