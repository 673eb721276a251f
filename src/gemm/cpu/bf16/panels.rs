//! Activations in bf16: one row in each lane, a pair of columns in each word.

use rayon::prelude::*;

use super::{CHUNK, STEP};
use crate::codec::isa;

/// Rows of a panel.
pub(super) const LANES: usize = 16;

/// Panels of 16 rows, for each [`STEP`] columns 16 vectors of one pair of columns, in the order of [`pair`].
pub(super) struct Panels {
    panel: usize,
    words: Vec<u32>,
    first: usize,
}

/// The columns of a chunk that word `p` of step `t` holds: what [`super::decode`] finds easiest to put side by side.
///
/// A word of eight 4-bit codes is in one lane of sixteen, so one shift gives column `j` of each eight: the lanes of
/// `j = 2t`, then those of `j = 2t + 1`, two by two.
fn pair(t: usize, p: usize) -> [usize; 2] {
    let (j, lane) = (2 * t + p / 8, 2 * (p % 8));
    [8 * lane + j, 8 * (lane + 1) + j]
}

impl Panels {
    /// Rounds and lays out `m` rows, in parallel unless that is `small` work.
    pub(super) fn new(x: &[f32], m: usize, cols: usize, small: bool) -> Self {
        let chunks = cols.div_ceil(CHUNK);
        let panel = chunks * CHUNK / 2 * LANES;
        let panels = m.div_ceil(LANES);
        let mut words = vec![0; panels * panel + LANES];
        // Vectors that straddle two cache lines cost two loads.
        let first = words.as_ptr().align_offset(4 * LANES).min(LANES);
        let fill = |(rows, words): (&[f32], &mut [u32])| {
            let mut bytes = vec![0; 2 * chunks * CHUNK];
            for (l, row) in rows.chunks_exact(cols).enumerate() {
                isa::best().f32_to_bf16(row, &mut bytes[..2 * cols]);
                let halves = bytes.as_chunks::<2>().0;
                for (halves, words) in halves.chunks_exact(CHUNK).zip(words.chunks_exact_mut(CHUNK / 2 * LANES)) {
                    for (i, vector) in words.chunks_exact_mut(LANES).enumerate() {
                        let [a, b] = pair(i / (STEP / 2), i % (STEP / 2)).map(|column| halves[column]);
                        vector[l] = u32::from_le_bytes([a[0], a[1], b[0], b[1]]);
                    }
                }
            }
        };
        let tasks = x.chunks(LANES * cols).zip(words[first..][..panels * panel].chunks_exact_mut(panel));
        if small {
            tasks.for_each(fill);
        } else {
            tasks.collect::<Vec<_>>().into_par_iter().for_each(fill);
        }
        Self { panel, words, first }
    }

    /// The words of panel `p` from column `start` on, a multiple of [`CHUNK`].
    pub(super) fn words(&self, p: usize, start: usize) -> &[u32] {
        &self.words[self.first + p * self.panel..][..self.panel][start / 2 * LANES..]
    }
}
