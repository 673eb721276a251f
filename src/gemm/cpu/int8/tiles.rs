//! Many rows of activations on AMX: a tile of 16 rows of weights and one panel in one instruction.
//!
//! Tiles hold the levels themselves, which fit a signed byte, and 8 to 32 columns, those that share all scales: then the
//! sums go through memory to be scaled. That scaling, three vector instructions for 16 sums, takes longer than the
//! multiplication, so it sets the pace: tiles are multiplied a pair ahead of it and the two overlap.

use super::lanes::Lanes;
use super::lanes::avx512::Vnni512 as Vectors;
use super::many::{RUN, group_range, transpose, unpack};
use super::panels::Panels;
use super::params::Params;
use crate::codec::lanes::avx512::F32x16;
use crate::gemm::Weights;
use crate::gemm::cpu::amx::{Amx, SIDE, Tiles, WORDS};
use crate::gemm::cpu::tile::Tile;
use crate::layout::{Levels, ROW};

/// The sums of a pair of tiles.
#[repr(align(64))]
struct Pair([[i32; WORDS]; 2]);

/// Multiplies `weights`, which are the rows `tile.n()`, with the rows `tile.m()` of activations; the tile starts with a
/// panel.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,f16c,fma")]
pub(super) fn multiply(weights: &Weights<'_>, x: &Panels, tile: &mut Tile<'_>) {
    let amx = Amx::int8().expect("the table of AMX is handed out only where it was detected");
    let mut tiles = amx.configure(u8::try_from(x.step).expect("at most 32"));
    let cols = weights.cols();
    let rows = weights.rows().next_multiple_of(SIDE);
    let (first_panel, panels) = (tile.m().start / SIDE, tile.m().len().div_ceil(SIDE));
    let mut params = Params::new(weights, weights.rows());
    params.load(weights);
    let mut codes = vec![0u8; rows * RUN];
    let mut totals = vec![0.0f32; panels * rows * SIDE];
    let group_len = if weights.layout().group() == ROW { usize::MAX } else { weights.layout().group() };
    for start in (0..cols).step_by(RUN) {
        let len = RUN.min(cols - start);
        unpack::<Vectors>(weights, start, len, 0, &mut codes);
        let levels = levels(weights, &params, start, &mut codes);
        let records = start / x.step..((start + len).div_ceil(x.step)).min(x.records);
        let groups = group_range(weights.layout(), start, len);
        // The groups of the run, and their scales and offsets by group and row.
        let first_group = start / group_len;
        let count = (start + len - 1) / group_len + 1 - first_group;
        let mut scales = vec![0.0; rows * count];
        let mut offsets = vec![0.0; rows * groups.len()];
        for r in 0..weights.rows() {
            let at = r / SIDE * SIDE;
            for g in 0..count {
                scales[at * count + g * SIDE + r % SIDE] = params.scales(r)[first_group + g];
            }
            for (i, g) in groups.clone().enumerate() {
                offsets[at * groups.len() + i * SIDE + r % SIDE] = params.offsets(r)[g];
            }
        }
        for p in 0..panels {
            let words = x.words(first_panel + p, records.start, records.len());
            let sums = x.sums(first_panel + p);
            let sums = if groups.is_empty() { &[] } else { &sums[groups.start * SIDE..][..groups.len() * SIDE] };
            for r in (0..rows).step_by(SIDE) {
                let block = Block {
                    levels: &levels[r * RUN..][..SIDE * RUN],
                    scales: &scales[r * count..][..SIDE * count],
                    offsets: &offsets[r * groups.len()..][..SIDE * groups.len()],
                    words,
                    sums,
                    step: x.step,
                    steps_shift: (group_len / x.step).ilog2(),
                };
                block.add(&mut tiles, &mut totals[(p * rows + r) * SIDE..][..WORDS]);
            }
        }
    }
    for (p, totals) in totals.chunks_exact(rows * SIDE).enumerate() {
        let m = tile.m().start + p * SIDE;
        transpose::<F32x16>(totals, SIDE, tile, m..tile.m().end.min(m + SIDE));
    }
}

/// Turns codes into levels in place: signed bytes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn levels<'a>(weights: &Weights<'_>, params: &Params, start: usize, codes: &'a mut [u8]) -> &'a [i8] {
    let layout = weights.layout();
    match layout.levels() {
        Levels::Signed if layout.bits() == 4 => {
            let zero = layout.zero_code(0);
            codes.iter_mut().for_each(|code| *code = code.wrapping_sub(zero));
        }
        Levels::ZeroPoint => {
            let group = if layout.group() == ROW { usize::MAX } else { layout.group() };
            for (r, codes) in codes.chunks_exact_mut(RUN).take(weights.rows()).enumerate() {
                let zero_points = &params.zero_points(r)[start / group..];
                for (codes, zero_point) in codes.chunks_mut(group.min(RUN)).zip(zero_points) {
                    let zero_point = zero_point.to_le_bytes()[0];
                    codes.iter_mut().for_each(|code| *code = code.wrapping_sub(zero_point));
                }
            }
        }
        // Codes of 8 bits and those of a bank are levels already.
        Levels::Unsigned | Levels::Signed | Levels::Table(_) | Levels::Bank(_) => {}
    }
    bytemuck::cast_slice(codes)
}

/// 16 rows of weights and one panel over a run of columns.
struct Block<'a> {
    levels: &'a [i8],
    /// By group and row.
    scales: &'a [f32],
    /// By group and row.
    offsets: &'a [f32],
    words: &'a [u32],
    sums: &'a [f32],
    step: usize,
    /// How many bits of the number of a record tell records of a group apart.
    steps_shift: u32,
}

impl Block<'_> {
    /// Adds the products to 16 rows of `totals`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,f16c,fma")]
    fn add(&self, tiles: &mut Tiles, totals: &mut [f32]) {
        let record = (self.step / 4 + 2) * SIDE;
        let count = self.words.len() / record;
        let mut sums = [Vectors::splat(0.0); SIDE];
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = Vectors::load(&totals[i * SIDE..]);
        }
        let mut pairs = [const { Pair([[0; WORDS]; 2]) }; 2];
        self.issue(tiles, 0, count, record, &mut pairs[0]);
        for s in (0..count).step_by(2) {
            let (even, odd) = pairs.split_at_mut(1);
            let (now, next) = if s / 2 % 2 == 0 { (&even[0], &mut odd[0]) } else { (&odd[0], &mut even[0]) };
            if s + 2 < count {
                self.issue(tiles, s + 2, count, record, next);
            }
            for (s, exact) in (s..count).zip(&now.0) {
                let scales = &self.scales[(s >> self.steps_shift) * SIDE..][..SIDE];
                let x_scale = Vectors::load_floats(&self.words[(s + 1) * record - 2 * SIDE..]);
                for (i, sum) in sums.iter_mut().enumerate() {
                    let exact = Vectors::load_ints(bytemuck::cast_slice(&exact[i * SIDE..][..SIDE]));
                    let scale = Vectors::mul(Vectors::splat(scales[i]), x_scale);
                    *sum = Vectors::mul_add(Vectors::to_floats(exact), scale, *sum);
                }
            }
        }
        for (offsets, x) in self.offsets.chunks_exact(SIDE).zip(self.sums.chunks_exact(SIDE)) {
            let x = Vectors::load(x);
            for (&offset, sum) in offsets.iter().zip(&mut sums) {
                *sum = Vectors::mul_add(Vectors::splat(offset), x, *sum);
            }
        }
        for (i, sum) in sums.into_iter().enumerate() {
            Vectors::store(sum, &mut totals[i * SIDE..]);
        }
    }

    /// Multiplies the tiles of records `s` and `s + 1`; the last one twice where there is no other.
    #[inline(always)]
    fn issue(&self, tiles: &mut Tiles, s: usize, count: usize, record: usize, pair: &mut Pair) {
        let both = [s, (s + 1).min(count - 1)];
        let levels = both.map(|s| &self.levels[s * self.step..]);
        tiles.multiply_levels(levels, RUN, both.map(|s| &self.words[s * record..][..record]), &mut pair.0);
    }
}
