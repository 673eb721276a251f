//! Products with activations rounded to 8 bits, [`Act::Int8`](crate::gemm::Act::Int8): integer dot products.
//!
//! Levels and rounded activations are integers, so the products of the columns that share all scales are added up
//! without error, four of them in a lane of one instruction, and floats only see one sum for 8 to 32 columns:
//!
//! `y = Σ_g scale_g · Σ_b s_b · (level · x)_gb + offset_g · Σ_b s_b · x_gb`, with `s_b` the scale of a block of activations.
//!
//! Few rows of activations are multiplied lane by lane as codes are stored ([`few`]), many after unpacking ([`many`]).
//! A number that is not finite makes the scale of its block NaN, and so every result of its row.

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
pub(super) use many::transpose;
use panels::Panels;
pub(super) use params::Params;
use rayon::prelude::*;

use super::is_small;
use super::tile::{self, Tile};
use crate::gemm::{ACT_BLOCK, Weights};
use crate::layout::{Grouped, Levels, ROW};

/// Levels are codes.
const CODES: u8 = 0;
/// Levels are codes less the same number everywhere.
const SIGNED: u8 = 1;
/// Levels are codes less a number of their group.
const ZERO_POINTS: u8 = 2;

/// Rows of activations and of weights of a task with many of both.
const TILE: (usize, usize) = (512, 64);

/// Whether the kernels here know a layout: its levels are integers, and eight columns never straddle two groups.
#[must_use]
pub fn supports(layout: &Grouped) -> bool {
    let group = layout.group();
    let levels = match layout.levels() {
        Levels::Unsigned | Levels::ZeroPoint => layout.bits() == 4,
        Levels::Signed => true,
        Levels::Table(_) => false,
    };
    levels && (group == ROW || (group.is_power_of_two() && group >= 8))
}

/// Rounded activations, laid out.
enum Prepared {
    Few(Records),
    Many(Panels),
}

/// `y[m, n] = x̂[m, k] · w[n, k]ᵀ` with one instruction set.
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
    let prepared = prepare(isa, weights, x, m, small);
    tile::each(cut(isa, weights, y, m, small), small, |mut tile| {
        let part = weights.slice(tile.n().start, tile.n().len());
        match &prepared {
            Prepared::Few(x) => isa.few(&part, x, &mut tile),
            Prepared::Many(x) => isa.many(&part, x, &mut tile),
        }
    });
}

/// Rounds the activations and lays them out for the kernel that takes them.
fn prepare(isa: &Isa, weights: &Weights<'_>, x: &[f32], m: usize, small: bool) -> Prepared {
    let mut rounded = Rounded::new(m, weights.cols());
    let rows =
        rounded.codes.chunks_exact_mut(rounded.stride).zip(rounded.scales.chunks_exact_mut(rounded.stride / ACT_BLOCK));
    let tasks: Vec<_> = x.chunks_exact(weights.cols()).zip(rows).collect();
    let round = |(x, (codes, scales)): (&[f32], (&mut [i8], &mut [f32]))| isa.round_row(x, codes, scales);
    if small {
        tasks.into_iter().for_each(round);
    } else {
        tasks.into_par_iter().for_each(round);
    }
    if m < isa.many_from {
        Prepared::Few(isa.records(&rounded, weights.layout()))
    } else {
        Prepared::Many(Panels::new(&rounded, weights.layout(), isa.lanes, small))
    }
}

/// Tiles for all threads: whole panels of activations, and as many rows of weights as leave work for everyone.
fn cut<'a>(isa: &Isa, weights: &Weights<'_>, y: &'a mut [f32], m: usize, small: bool) -> Vec<Tile<'a>> {
    let n = weights.rows();
    let wanted = tile::wanted(small);
    if m < isa.many_from {
        return Tile::cut(y, m, n, m, n.div_ceil(wanted));
    }
    let (mut height, mut width) = (TILE.0.min(m.next_multiple_of(isa.lanes)), TILE.1.min(n));
    while m.div_ceil(height) * n.div_ceil(width) < wanted && width > 16 {
        width = width.div_ceil(2).next_multiple_of(4);
    }
    while m.div_ceil(height) * n.div_ceil(width) < wanted && height > isa.lanes {
        height = height.div_ceil(2).next_multiple_of(isa.lanes);
    }
    Tile::cut(y, m, n, height, width)
}
