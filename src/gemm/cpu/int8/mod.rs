//! Products with activations rounded to 8 bits, [`Act::Int8`](crate::gemm::Act::Int8): integer dot products.
//!
//! Levels and rounded activations are integers, so the products of the columns that share all scales are added up
//! without error, four of them in a lane of one instruction, and floats only see one sum for 8 to 32 columns:
//!
//! `y = Σ_g scale_g · Σ_b s_b · (level · x)_gb + offset_g · Σ_b s_b · x_gb`, with `s_b` the scale of a block of activations.
//!
//! Few rows of activations are multiplied lane by lane as codes are stored (`few`), many after unpacking (`many`).
//! A number that is not finite makes the scale of its block NaN, and so every result of its row.
//!
//! Levels of a bank are bytes, and multiplied as those of 8-bit codes (the module `nested`).
//!
//! Levels of a table are no integers: there the product is one in f32 with the rounded activations.

mod activations;
mod few;
pub mod isa;
mod lanes;
mod many;
mod panels;
mod params;
#[cfg(target_arch = "x86_64")]
mod tiles;

use activations::{Records, Rounded};
use isa::Isa;
#[cfg(target_arch = "x86_64")]
pub(super) use many::transpose;
use panels::Panels;
#[cfg(target_arch = "x86_64")]
pub(super) use params::Params;

use super::Product;
use super::tile::{self, Tile};
use crate::gemm::ACT_BLOCK;
use crate::layout::{Grouped, Levels, ROW};

/// Levels are codes.
const CODES: u8 = 0;
/// Levels are codes less the same number everywhere.
const SIGNED: u8 = 1;
/// Levels are codes less a number of their group.
const ZERO_POINTS: u8 = 2;

/// Rows of activations and of weights of a task with many of both.
const TILE: (usize, usize) = (512, 64);

/// Rounded activations, laid out.
enum Prepared {
    Few(Records),
    Many(Panels),
}

/// Computes the products whose layouts the kernels here know, and returns the others.
pub(super) fn take<'a>(products: Vec<Product<'a>>, small: bool) -> Vec<Product<'a>> {
    let (known, others) = products.into_iter().partition(|product| supports(product.weights.layout()));
    multiply(isa::best(), known, small);
    others
}

/// Whether levels of a layout are integers, and eight columns never straddle two groups.
fn supports(layout: &Grouped) -> bool {
    let group = layout.group();
    let levels = match layout.levels() {
        Levels::Unsigned | Levels::ZeroPoint => layout.bits() == 4,
        Levels::Signed | Levels::Bank(_) => true,
        Levels::Table(_) => false,
    };
    levels && (group == ROW || (group.is_power_of_two() && group >= 8))
}

/// Computes all products.
fn multiply(isa: &Isa, products: Vec<Product<'_>>, small: bool) {
    let prepared: Vec<Prepared> = products.iter().map(|product| prepare(isa, product, small)).collect();
    let wanted = tile::wanted(small).div_ceil(products.len().max(1));
    let mut tasks = Vec::new();
    for (Product { weights, m, y, .. }, x) in products.into_iter().zip(&prepared) {
        let (height, width) = size(isa, weights.rows(), m, wanted);
        let tiles = Tile::cut(y, m, weights.rows(), height, width);
        tasks.extend(tiles.into_iter().map(|tile| (weights.slice(tile.n().start, tile.n().len()), x, tile)));
    }
    tile::each(tasks, small, |(weights, x, mut tile)| match x {
        Prepared::Few(x) => isa.few(&weights, x, &mut tile),
        Prepared::Many(x) => isa.many(&weights, x, &mut tile),
    });
}

/// Rounds the activations and lays them out for the kernel that takes them.
fn prepare(isa: &Isa, product: &Product<'_>, small: bool) -> Prepared {
    let (weights, m) = (&product.weights, product.m);
    let mut rounded = Rounded::new(m, weights.cols());
    let scales = rounded.scales.chunks_exact_mut(rounded.stride / ACT_BLOCK);
    let rows = rounded.codes.chunks_exact_mut(rounded.stride).zip(scales);
    let tasks: Vec<_> = product.x.chunks_exact(weights.cols()).zip(rows).collect();
    tile::each(tasks, small || m == 1, |(x, (codes, scales))| isa.round_row(x, codes, scales));
    if m < isa.many_from {
        Prepared::Few(isa.records(&rounded, weights.layout()))
    } else {
        Prepared::Many(Panels::new(&rounded, weights.layout(), isa.lanes, small))
    }
}

/// Rows of activations and of weights of a task: whole panels, and so few that all threads have work.
fn size(isa: &Isa, n: usize, m: usize, wanted: usize) -> (usize, usize) {
    if m < isa.many_from {
        return (m, n.div_ceil(wanted));
    }
    let (mut height, mut width) = (TILE.0.min(m.next_multiple_of(isa.lanes)), TILE.1.min(n));
    while m.div_ceil(height) * n.div_ceil(width) < wanted && width > 16 {
        width = width.div_ceil(2).next_multiple_of(16);
    }
    while m.div_ceil(height) * n.div_ceil(width) < wanted && height > isa.lanes {
        height = height.div_ceil(2).next_multiple_of(isa.lanes);
    }
    (height, width)
}
