//! Products in bf16, [`Act::Bf16`](crate::gemm::Act::Bf16): activations and weights rounded to bf16, sums in f32.
//!
//! Machines that multiply pairs of bf16 in one instruction do so many times faster than f32; others have nothing to gain
//! here, and neither has a product with few rows of activations, which waits for memory. Weights are decoded a block at
//! a time ([`decode`]), each to the nearest bf16 of what the specification says, and multiplied with panels of 16 rows of
//! activations ([`panels`]). The order of columns within 128 is whatever costs a decoder least; both sides keep to it.
//!
//! The instructions take subnormal numbers as zero.

mod decode;
pub mod isa;
mod kernel;
mod panels;

use isa::Isa;
use panels::Panels;

use super::int8::Params;
use super::tile::{self, Tile};
use crate::gemm::Weights;
use crate::gemm::cpu::is_small;
use crate::layout::{Grouped, Levels, ROW};

/// Columns whose order is a decoder's own affair.
const CHUNK: usize = 128;
/// Columns of a tile: 16 pairs.
const STEP: usize = 32;
/// Columns of a run: two panels of them fit the first-level cache, the weights of a task the second-level one.
const RUN: usize = 512;
/// Rows of activations and of weights of a task with many of both.
const TILE: (usize, usize) = (512, 256);

/// From how many rows of activations on decoding to bf16 pays.
pub const MANY_FROM: usize = 5;

/// Whether the decoder here knows a layout: eight columns never straddle two groups.
#[must_use]
pub fn supports(layout: &Grouped) -> bool {
    let group = layout.group();
    let levels = layout.bits() == 4 || layout.levels() == Levels::Signed;
    levels && (group == ROW || (group.is_power_of_two() && group >= 8))
}

/// `y[m, n] = x[m, k] · w[n, k]ᵀ`, both rounded, with one instruction set.
///
/// # Panics
/// When a size is wrong or the layout is not supported: bugs of the caller.
pub fn multiply(isa: &Isa, weights: &Weights<'_>, x: &[f32], m: usize, y: &mut [f32]) {
    let (rows, cols) = (weights.rows(), weights.cols());
    assert!(x.len() == m * cols && y.len() == m * rows && supports(weights.layout()), "the caller checks");
    if cols == 0 || y.is_empty() {
        return y.fill(0.0);
    }
    let small = is_small(rows, cols, m);
    let panels = Panels::new(x, m, cols, small);
    tile::each(cut(y, m, rows, small), small, |mut tile| {
        isa.multiply(&weights.slice(tile.n().start, tile.n().len()), &panels, &mut tile);
    });
}

/// Tiles for all threads: whole panels of activations, and as many rows of weights as leave work for everyone.
fn cut(y: &mut [f32], m: usize, n: usize, small: bool) -> Vec<Tile<'_>> {
    let wanted = tile::wanted(small);
    let (mut height, mut width) = (TILE.0.min(m.next_multiple_of(panels::LANES)), TILE.1);
    while m.div_ceil(height) * n.div_ceil(width) < wanted && width > 2 * panels::LANES {
        width /= 2;
    }
    while m.div_ceil(height) * n.div_ceil(width) < wanted && height > 2 * panels::LANES {
        height = height.div_ceil(2).next_multiple_of(panels::LANES);
    }
    Tile::cut(y, m, n, height, width)
}
