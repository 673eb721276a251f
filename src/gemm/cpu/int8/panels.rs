//! Rounded activations for the kernels of many rows: one row in each lane, four columns in each word.

use rayon::prelude::*;

use super::activations::{Rounded, zero};
use super::lanes::MAX_LANES;
use crate::gemm::ACT_BLOCK;
use crate::layout::{Grouped, ROW};

/// Activations in panels of as many rows as a vector has lanes. A panel is a row of records, one for each [`Panels::step`]
/// columns, which share all scales; a record is vectors of words:
///
/// | vector | lane `l` |
/// |---|---|
/// | `step / 4` of them | the codes of four columns of row `l` |
/// | scale | that of the columns |
/// | start | `-zero · Σ` of the columns' codes: what turns sums over codes into sums over levels |
pub(super) struct Panels {
    /// Rows of a panel.
    lanes: usize,
    /// Columns of a record.
    pub(super) step: usize,
    /// Records of a panel.
    pub(super) records: usize,
    /// Sums over the groups of each row, vector after vector; no groups where the layout has no offsets.
    sums: Vec<f32>,
    groups: usize,
    words: Vec<u32>,
    first: usize,
}

/// Columns that share all scales, whatever the group they are in.
pub(super) fn step(layout: &Grouped) -> usize {
    if layout.group() == ROW { ACT_BLOCK } else { layout.group().min(ACT_BLOCK) }
}

impl Panels {
    /// Lays out rounded activations for codes of a layout, in parallel unless that is `small` work.
    pub(super) fn new(x: &Rounded, layout: &Grouped, lanes: usize, small: bool) -> Self {
        let step = step(layout);
        let records = x.cols.div_ceil(ACT_BLOCK) * (ACT_BLOCK / step);
        let panels = x.m.div_ceil(lanes);
        let groups = if layout.offset().is_some() { layout.groups(x.cols) } else { 0 };
        let mut new = Self {
            lanes,
            step,
            records,
            sums: vec![0.0; panels * groups * lanes],
            groups,
            words: Vec::new(),
            first: 0,
        };
        let panel = records * new.record();
        new.words = vec![0; panels * panel + MAX_LANES];
        // Vectors that straddle two cache lines cost two loads.
        new.first = new.words.as_ptr().align_offset(4 * MAX_LANES).min(MAX_LANES);
        let words = new.words[new.first..][..panels * panel].chunks_mut(panel.max(1));
        let sums = new.sums.chunks_mut((groups * lanes).max(1)).map(Some).chain(std::iter::repeat_with(|| None));
        let fill = |(p, (words, sums)): (usize, (&mut [u32], Option<&mut [f32]>))| {
            let rows = p * lanes..x.m.min((p + 1) * lanes);
            fill_panel(x, rows.start, rows.len(), lanes, step, zero(layout), words);
            if let Some(sums) = sums {
                let mut row = vec![0.0; groups];
                for (l, i) in rows.enumerate() {
                    x.group_sums(i, layout.group_len(x.cols), &mut row);
                    for (vector, &sum) in sums.chunks_exact_mut(lanes).zip(&row) {
                        vector[l] = sum;
                    }
                }
            }
        };
        let tasks = words.zip(sums).enumerate();
        if small {
            tasks.for_each(fill);
        } else {
            tasks.collect::<Vec<_>>().into_par_iter().for_each(fill);
        }
        new
    }

    /// Words of a record.
    pub(super) fn record(&self) -> usize {
        (self.step / 4 + 2) * self.lanes
    }

    /// Records `first ..+ count` of panel `p`.
    pub(super) fn words(&self, p: usize, first: usize, count: usize) -> &[u32] {
        &self.words[self.first + (p * self.records + first) * self.record()..][..count * self.record()]
    }

    /// The sums over the groups of panel `p`.
    pub(super) fn sums(&self, p: usize) -> &[f32] {
        &self.sums[p * self.groups * self.lanes..][..self.groups * self.lanes]
    }
}

/// Writes the records of the rows `first ..+ count`; `words` is zeroed.
fn fill_panel(x: &Rounded, first: usize, count: usize, lanes: usize, step: usize, zero: i32, words: &mut [u32]) {
    let quads = step / 4;
    for (s, record) in words.chunks_exact_mut((quads + 2) * lanes).enumerate() {
        for l in 0..count {
            let codes = &x.row(first + l)[s * step..][..step];
            for (q, codes) in codes.as_chunks::<4>().0.iter().enumerate() {
                record[q * lanes + l] = u32::from_le_bytes(codes.map(i8::cast_unsigned));
            }
            record[quads * lanes + l] = x.row_scales(first + l)[s * step / ACT_BLOCK].to_bits();
            let sum: i32 = codes.iter().map(|&x| i32::from(x)).sum();
            record[(quads + 1) * lanes + l] = (-zero * sum).cast_unsigned();
        }
    }
}
