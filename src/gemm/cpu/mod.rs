//! The CPU: stored order is multiplied as it is, so loading costs nothing and planes may be those of a mapped file.
//!
//! [`mod@reference`] says what a product is, [`float`] computes it in f32. Codes of nested scales are unpacked on the way
//! (`nested`), a little at a time.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
pub mod bf16;
pub(super) mod extra;
pub mod float;
pub mod int8;
mod nested;
pub mod reference;
pub mod team;
mod tile;

use std::sync::{Mutex, PoisonError};

use super::{Act, Backend, Matrix, Weights, check_sizes};
use crate::codec;
use crate::error::{Error, Result};

/// The processor that this program runs on.
#[derive(Debug, Clone, Copy)]
pub struct Cpu;

impl Backend for Cpu {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn load<'a>(&self, weights: &Weights<'a>) -> Result<Box<dyn Matrix + 'a>> {
        Ok(Box::new(*weights))
    }
}

impl Matrix for Weights<'_> {
    fn multiply(&self, x: &[f32], m: usize, act: Act, y: &mut [f32]) -> Result<()> {
        multiply(self, x, m, act, y)
    }

    fn decode(&self, out: &mut [f32]) -> Result<()> {
        if self.rows().checked_mul(self.cols()) != Some(out.len()) {
            return Err(Error::invalid(format!(
                "{} numbers for a {} x {} matrix",
                out.len(),
                self.rows(),
                self.cols()
            )));
        }
        if is_small(self.rows(), self.cols(), 1) {
            codec::decode_rows(self.layout(), self.planes(), self.cols(), out);
            return self.extra().apply(out);
        }
        codec::decode_matrix(self.layout(), self.planes(), self.extra(), self.cols(), out)
    }
}

/// `y[m, n] = x[m, k] · w[n, k]ᵀ`, in parallel on the threads of the current pool; overwrites `y`.
///
/// # Errors
/// [`Error::Invalid`] when `x` is not `m * k` or `y` not `m * n` numbers.
pub fn multiply(weights: &Weights<'_>, x: &[f32], m: usize, act: Act, y: &mut [f32]) -> Result<()> {
    check_sizes(weights, x.len(), m, y.len())?;
    let small = is_small(weights.rows(), weights.cols(), m);
    let scaled = scaled(weights, x);
    run(Product::list(weights.base(), scaled.as_deref().unwrap_or(x), m, y), act, small);
    extra::add(weights, x, m, y, small)
}

/// Activations times column scales; nothing where there are none.
fn scaled(weights: &Weights<'_>, x: &[f32]) -> Option<Vec<f32>> {
    weights.extra().column_scales()?;
    let mut scaled = x.to_vec();
    weights.extra().scale(&mut scaled);
    Some(scaled)
}

/// One matrix and what it is multiplied with; none of its sizes is zero.
struct Product<'a> {
    weights: Weights<'a>,
    x: &'a [f32],
    m: usize,
    y: &'a mut [f32],
}

impl<'a> Product<'a> {
    /// A product by itself, or none where there is nothing to multiply: then all results are zero.
    fn list(weights: Weights<'a>, x: &'a [f32], m: usize, y: &'a mut [f32]) -> Vec<Self> {
        if x.is_empty() || y.is_empty() {
            y.fill(0.0);
            return Vec::new();
        }
        vec![Self { weights, x, m, y }]
    }
}

/// Computes products in the arithmetic that is asked for; `small` ones without looking for other threads.
fn run(products: Vec<Product<'_>>, act: Act, small: bool) {
    match act {
        Act::F32 => float::multiply(float::isa::best(), products, small),
        #[cfg(target_arch = "x86_64")]
        Act::Bf16 => rounded(bf16::take(products, small), act, small),
        #[cfg(not(target_arch = "x86_64"))]
        Act::Bf16 => rounded(products, act, small),
        Act::Int8 => rounded(int8::take(products, small), act, small),
        Act::F16 => rounded(products, act, small),
    }
}

/// Computes products with rounded activations in f32.
fn rounded(products: Vec<Product<'_>>, act: Act, small: bool) {
    let rounded: Vec<Vec<f32>> =
        products.iter().map(|p| reference::round_activations(act, p.x, p.weights.cols())).collect();
    let products = products.into_iter().zip(&rounded).map(|(p, x)| Product { x, ..p });
    float::multiply(float::isa::best(), products.collect(), small);
}

/// Whether a product is so small that waking other threads costs more than they save.
#[must_use]
pub fn is_small(rows: usize, cols: usize, m: usize) -> bool {
    rows.saturating_mul(cols).saturating_mul(m.max(1)) < 1 << 17
}

/// Decodes the rows `ids`, in that order: what an embedding needs.
///
/// # Errors
/// [`Error::Invalid`] when there is no such row or `out` does not hold as many.
pub fn decode_rows(weights: &Weights<'_>, ids: &[usize], out: &mut [f32]) -> Result<()> {
    let (rows, cols) = (weights.rows(), weights.cols());
    if ids.len().checked_mul(cols) != Some(out.len()) {
        return Err(Error::invalid(format!("{} numbers for {} rows of {cols}", out.len(), ids.len())));
    }
    if let Some(id) = ids.iter().find(|&&id| id >= rows) {
        return Err(Error::invalid(format!("row {id} of a matrix of {rows} rows")));
    }
    if cols > 0 {
        let per_task = codec::rows_per_task(cols);
        let (base, outliers, failed) = (weights.base(), weights.extra().rows(), Mutex::new(None));
        let scales = weights.extra().column_scales();
        let tasks: Vec<_> = out.chunks_mut(per_task * cols).zip(ids.chunks(per_task)).collect();
        tile::each(tasks, is_small(ids.len(), cols, 1), |(rows, ids)| {
            for (row, &id) in rows.chunks_exact_mut(cols).zip(ids) {
                codec::decode_rows(base.layout(), base.slice(id, 1).planes(), cols, row);
                for (w, scale) in row.iter_mut().zip(scales.iter().flatten()) {
                    *w *= scale;
                }
                if let Some(Err(e)) = outliers.as_ref().map(|outliers| outliers.add(id, row)) {
                    *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(e);
                }
            }
        });
        if let Some(e) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(e);
        }
    }
    Ok(())
}

/// Many products in one call: rows `ends[e-1]..ends[e]` of `x` with matrix `e` of a stack of matrices of the same shape,
/// as a mixture of experts wants them; a batch of matrices where the ends are evenly spaced.
///
/// `stack` holds `ends.len()` matrices one below the other.
///
/// # Errors
/// [`Error::Invalid`] when the ends do not ascend to `m`, the stack does not divide into as many matrices, or `x` is not
/// `m * k` or `y` not `m * n` numbers, with `n` the rows of one matrix.
pub fn multiply_grouped(stack: &Weights<'_>, x: &[f32], ends: &[usize], act: Act, y: &mut [f32]) -> Result<()> {
    let m = ends.last().copied().unwrap_or(0);
    if ends.is_empty() || !stack.rows().is_multiple_of(ends.len()) || !ends.is_sorted() {
        return Err(Error::invalid(format!(
            "a stack of {} rows for {} groups that end at {ends:?}, expected ascending ends and whole matrices",
            stack.rows(),
            ends.len()
        )));
    }
    let (rows, cols) = (stack.rows() / ends.len(), stack.cols());
    check_sizes(&stack.base().slice(0, rows), x.len(), m, y.len())?;
    let small = is_small(stack.rows(), cols, m);
    let mut parts = Vec::with_capacity(ends.len());
    let scaled = scaled(stack, x);
    let (base, scaled) = (stack.base(), scaled.as_deref().unwrap_or(x));
    let (mut first, mut rest) = (0, &mut *y);
    for (e, &end) in ends.iter().enumerate() {
        let (part, tail) = rest.split_at_mut((end - first) * rows);
        if end > first {
            parts.extend(Product::list(
                base.slice(e * rows, rows),
                &scaled[first * cols..end * cols],
                end - first,
                part,
            ));
        }
        (first, rest) = (end, tail);
    }
    run(parts, act, small);
    extra::add_grouped(stack, x, ends, y, small)
}
