//! Products in bf16, [`Act::Bf16`](crate::gemm::Act::Bf16): activations and weights rounded to bf16, sums in f32.
//!
//! Machines that multiply pairs of bf16 in one instruction do so many times faster than f32; others have nothing to gain
//! here, and neither has a product with few rows of activations, which waits for memory. Weights are decoded a block at
//! a time (`decode`), each to the nearest bf16 of what the specification says, and multiplied with panels of 16 rows of
//! activations (`panels`). The order of columns within 128 is whatever costs a decoder least; both sides keep to it.
//!
//! The instructions take subnormal numbers as zero.

mod decode;
pub mod isa;
mod kernel;
mod panels;

use isa::Isa;
use panels::Panels;

use super::Product;
use super::int8::Params;
use super::tile::{self, Tile};
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
const MANY_FROM: usize = 5;

/// Computes the products that are faster here than in f32, and returns the others.
pub(super) fn take<'a>(products: Vec<Product<'a>>, small: bool) -> Vec<Product<'a>> {
    let Some(isa) = isa::best() else { return products };
    let pays = |product: &Product<'_>| product.m >= MANY_FROM && supports(product.weights.layout());
    let (many, others) = products.into_iter().partition(pays);
    multiply(isa, many, small);
    others
}

/// Whether the decoder here knows a layout: eight columns never straddle two groups.
fn supports(layout: &Grouped) -> bool {
    let group = layout.group();
    let levels = layout.bits() == 4 || layout.bank().is_some() || layout.levels() == Levels::Signed;
    levels && (group == ROW || (group.is_power_of_two() && group >= 8))
}

/// Computes all products.
fn multiply(isa: &Isa, products: Vec<Product<'_>>, small: bool) {
    let panels: Vec<Panels> = products.iter().map(|p| Panels::new(p.x, p.m, p.weights.cols(), small)).collect();
    let wanted = tile::wanted(small).div_ceil(products.len().max(1));
    let mut tasks = Vec::new();
    for (Product { weights, m, y, .. }, x) in products.into_iter().zip(&panels) {
        let (height, width) = size(weights.rows(), m, wanted);
        let tiles = Tile::cut(y, m, weights.rows(), height, width);
        tasks.extend(tiles.into_iter().map(|tile| (weights.slice(tile.n().start, tile.n().len()), x, tile)));
    }
    tile::each(tasks, small, |(weights, x, mut tile)| isa.tile(&weights, x, &mut tile));
}

/// Rows of activations and of weights of a task: whole panels, and so few that all threads have work.
fn size(n: usize, m: usize, wanted: usize) -> (usize, usize) {
    let (mut height, mut width) = (TILE.0.min(m.next_multiple_of(panels::LANES)), TILE.1);
    while m.div_ceil(height) * n.div_ceil(width) < wanted && width > 2 * panels::LANES {
        width /= 2;
    }
    while m.div_ceil(height) * n.div_ceil(width) < wanted && height > 2 * panels::LANES {
        height = height.div_ceil(2).next_multiple_of(panels::LANES);
    }
    (height, width)
}
