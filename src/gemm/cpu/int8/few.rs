//! Few rows of activations: every code is loaded once, multiplied with all rows and forgotten.
//!
//! A product of this kind waits for memory, so what counts is instructions per byte. Eight columns share a lane, and a
//! group of every layout holds whole eights: two instructions give sums of eight products that have one scale, and
//! one multiplication and one fused addition take care of it. For 64 bytes of 4-bit codes that makes about 14 vector
//! instructions where floats take 45.

use super::activations::Records;
use super::lanes::{Lanes, MAX_LANES};
use super::params::Params;
use super::{CODES, SIGNED, ZERO_POINTS};
use crate::gemm::Weights;
use crate::gemm::cpu::nested;
use crate::gemm::cpu::tile::Tile;
use crate::layout::ROW;

/// How far ahead codes are asked for: the processor's own prefetching stops at the end of a page. Rows follow each other.
const AHEAD: usize = 4096;

/// Multiplies `weights`, which are the rows `tile.n()`, with all rows of activations.
#[inline(always)]
pub(super) fn multiply<L: Lanes, C: Codes<L>, const KIND: u8>(
    source: C,
    weights: &Weights<'_>,
    x: &Records,
    tile: &mut Tile<'_>,
) {
    let (rows, nested) = (tile.m(), C::BITS == 8 && weights.layout().bank().is_some());
    let layout = if nested { nested::plain(weights.layout()) } else { *weights.layout() };
    let stride = layout.code_stride(weights.cols());
    // A row of levels of a bank.
    let mut unpacked = vec![0; if nested { stride } else { 0 }];
    let batch = Params::batch(weights);
    let mut params = Params::new(weights, batch);
    let shift = lanes_shift(weights);
    for first in (0..weights.rows()).step_by(batch) {
        let part = weights.slice(first, batch.min(weights.rows() - first));
        params.load(&part);
        for r in 0..part.rows() {
            let codes = if nested {
                nested::levels(&part.slice(r, 1), 0..part.cols(), nested::BIAS, &mut unpacked, stride);
                &unpacked
            } else {
                &part.planes().codes[r * stride..][..stride]
            };
            let row = Row {
                source,
                codes,
                scales: params.scales(r),
                bytes: params.bytes(r),
                zero_points: params.zero_points(r),
                shift,
            };
            let mut i = rows.start;
            while i < rows.end {
                let mut sums = [0.0; 4];
                let count = match rows.end - i {
                    1 => row.times::<L, KIND, 1>(x, i, &mut sums),
                    2 => row.times::<L, KIND, 2>(x, i, &mut sums),
                    3 => row.times::<L, KIND, 3>(x, i, &mut sums),
                    _ => row.times::<L, KIND, 4>(x, i, &mut sums),
                };
                let offsets = params.offsets(r);
                for (i, &sum) in (i..).zip(&sums[..count]) {
                    tile.row(i)[first + r] = sum + offset_part::<L>(offsets, &x.sums[i * offsets.len()..]);
                }
                i += count;
            }
        }
    }
}

/// How many bits of the number of a lane, eight columns wide, tell columns of a group apart.
pub(super) fn lanes_shift(weights: &Weights<'_>) -> u32 {
    match weights.layout().group() {
        ROW => 31,
        group => (group / 8).trailing_zeros(),
    }
}

/// `Σ offset · (sum of the activations of the group)`
#[inline(always)]
fn offset_part<L: Lanes>(offsets: &[f32], sums: &[f32]) -> f32 {
    let mut total = L::splat(0.0);
    let whole = offsets.len() - offsets.len() % L::N;
    for g in (0..whole).step_by(L::N) {
        let index = L::index(0);
        total = L::mul_add(L::spread(&offsets[g..], index), L::spread(&sums[g..], index), total);
    }
    let rest = offsets[whole..].iter().zip(&sums[whole..]).map(|(offset, sum)| offset * sum);
    L::sum(total) + rest.sum::<f32>()
}

/// How codes come out of memory.
pub(super) trait Codes<L: Lanes>: Copy {
    /// Bits of a code in memory.
    const BITS: u32;
    /// Bits of what [`Codes::load`] makes of it, as [`Lanes::dot`] counts them.
    const LEVEL_BITS: u32;

    /// Eight columns in each lane, of `N * BITS` bytes; `bytes` are the scale bytes of a nested layout from the group of
    /// the first of these columns on.
    fn load(self, codes: &[u8], bytes: &[u8]) -> [L::Bytes; 2];
}

/// Codes as they are stored, or levels of a bank that are unpacked already.
#[derive(Clone, Copy)]
pub(super) struct Stored<const BITS: u32>;

impl<L: Lanes, const BITS: u32> Codes<L> for Stored<BITS> {
    const BITS: u32 = BITS;
    const LEVEL_BITS: u32 = BITS;

    #[inline(always)]
    fn load(self, codes: &[u8], _bytes: &[u8]) -> [L::Bytes; 2] {
        if BITS == 4 { L::nibbles(codes) } else { L::octets(codes) }
    }
}

/// A row of weights.
struct Row<'a, C> {
    source: C,
    codes: &'a [u8],
    scales: &'a [f32],
    bytes: &'a [u8],
    zero_points: &'a [i32],
    shift: u32,
}

impl<C> Row<'_, C> {
    /// The product with rows `first ..+ M` of activations, without offsets; returns `M`.
    #[inline(always)]
    fn times<L: Lanes, const KIND: u8, const M: usize>(&self, x: &Records, first: usize, sums: &mut [f32; 4]) -> usize
    where
        C: Codes<L>,
    {
        let index = L::index(self.shift);
        let mut totals = [L::splat(0.0); M];
        let step = L::N * C::BITS as usize;
        let codes = self.codes.chunks_exact(step);
        let rest = codes.remainder();
        let mut records = x.tile(first, M).chunks_exact(M * 4 * L::N);
        for (c, (codes, records)) in codes.zip(&mut records).enumerate() {
            self.chunk::<L, KIND, M>(c, codes, records, index, &mut totals);
        }
        if let Some(records) = records.next() {
            let mut padded = [0; 8 * MAX_LANES];
            padded[..rest.len()].copy_from_slice(rest);
            self.chunk::<L, KIND, M>(self.codes.len() / step, &padded[..step], records, index, &mut totals);
        }
        for (sum, total) in sums.iter_mut().zip(totals) {
            *sum = L::sum(total);
        }
        M
    }

    /// Adds the products of the columns `8 N c ..+ 8 N`.
    #[inline(always)]
    fn chunk<L: Lanes, const KIND: u8, const M: usize>(
        &self,
        c: usize,
        codes: &[u8],
        records: &[u32],
        index: L::Index,
        totals: &mut [L::Floats; M],
    ) where
        C: Codes<L>,
    {
        for line in (0..codes.len()).step_by(64) {
            L::prefetch(codes, AHEAD + line);
        }
        let group = (c * L::N) >> self.shift;
        let [first, second] = self.source.load(codes, self.bytes.get(group..).unwrap_or_default());
        let scales = L::spread(&self.scales[group..], index);
        let zero_points =
            if KIND == ZERO_POINTS { L::spread_ints(&self.zero_points[group..], index) } else { L::splat_int(0) };
        for (record, total) in records.chunks_exact(4 * L::N).zip(totals) {
            let start = match KIND {
                CODES => L::splat_int(0),
                SIGNED if C::LEVEL_BITS == 8 && L::BIAS == 0 => L::splat_int(0),
                SIGNED => L::load_ints(&record[3 * L::N..]),
                _ => L::times(zero_points, L::load_ints(&record[3 * L::N..])),
            };
            let (x, y) = (L::load_bytes(record), L::load_bytes(&record[L::N..]));
            let sum = if C::LEVEL_BITS == 4 {
                L::dot::<4>(L::dot::<4>(start, first, x), second, y)
            } else {
                L::dot::<8>(L::dot::<8>(start, first, x), second, y)
            };
            let scale = L::mul(scales, L::load_floats(&record[2 * L::N..]));
            *total = L::mul_add(L::to_floats(sum), scale, *total);
        }
    }
}
