//! Dividing a product among threads: rectangles of the results, which belong to one task each.
//!
//! Results are `m x n`, row by row, and a task that owns some of the columns owns a piece of every row, which no slice
//! of Rust describes. A [`Tile`] does: [`Tile::cut`] makes them, and makes them disjoint.

#![expect(unsafe_code, reason = "pieces of rows of an array whose other columns belong to other threads")]

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use super::team::{self, OpenMp};

/// Some rows and columns of the results of a product, of which no other task has any.
#[derive(Debug)]
pub(super) struct Tile<'a> {
    start: *mut f32,
    /// Results in a whole row.
    stride: usize,
    m: Range<usize>,
    n: Range<usize>,
    owner: PhantomData<&'a mut [f32]>,
}

// SAFETY: a tile is a set of exclusive references to numbers, and those can be sent.
unsafe impl Send for Tile<'_> {}

impl<'a> Tile<'a> {
    /// The `m x n` results in tiles of at most `height x width`, those of the same columns one after the other.
    ///
    /// # Panics
    /// When `y` is not `m * n` numbers, or a tile would be empty: bugs of the caller.
    pub(super) fn cut(y: &'a mut [f32], m: usize, n: usize, height: usize, width: usize) -> Vec<Self> {
        assert!(m.checked_mul(n) == Some(y.len()) && height > 0 && width > 0, "sizes were checked");
        let start = y.as_mut_ptr();
        let mut tiles = Vec::with_capacity(n.div_ceil(width) * m.div_ceil(height));
        for first in (0..n).step_by(width) {
            for top in (0..m).step_by(height) {
                let (bottom, end) = (m.min(top + height), n.min(first + width));
                tiles.push(Self { start, stride: n, m: top..bottom, n: first..end, owner: PhantomData });
            }
        }
        tiles
    }

    /// The rows of results: rows of activations.
    pub(super) fn m(&self) -> Range<usize> {
        self.m.clone()
    }

    /// The columns of results: rows of weights.
    pub(super) fn n(&self) -> Range<usize> {
        self.n.clone()
    }

    /// The results of row `i` of activations with the columns of this tile.
    pub(super) fn row(&mut self, i: usize) -> &mut [f32] {
        assert!(self.m.contains(&i), "row {i} of a tile of {:?}", self.m);
        // SAFETY: `cut` checked that row `i` and these columns lie in the array that the tiles borrow, and gave them to
        // no other tile; the borrow of this one lasts as long as the slice.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(i * self.stride + self.n.start), self.n.len()) }
    }
}

/// Runs every task, on the threads of the current team or pool if there is enough to do: `small` work stays on this
/// thread and never looks for others.
pub(super) fn each<T: Send>(tasks: Vec<T>, small: bool, work: impl Fn(T) + Send + Sync) {
    if small || tasks.len() < 2 {
        tasks.into_iter().for_each(work);
    } else if let Some(team) = team::current() {
        let tasks = Mutex::new(tasks.into_iter());
        // The lock is held for the taking only: the guard is gone before `work` begins.
        let next = || tasks.lock().unwrap_or_else(PoisonError::into_inner).next();
        team.run(|| {
            while let Some(task) = next() {
                work(task);
            }
        });
    } else {
        tasks.into_par_iter().with_max_len(1).for_each(work);
    }
}

/// Tasks that a large product is divided into: several for each thread, so that none waits long for the last one.
pub(super) fn wanted(small: bool) -> usize {
    if small { 1 } else { 4 * team::current().map_or_else(rayon::current_num_threads, OpenMp::threads) }
}
