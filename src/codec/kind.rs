//! How the weights of a batch become codes: parameters per lane, and one rule for each kind of levels.

use super::lanes::Lanes;
use super::reference;
use crate::layout::{Grouped, Levels};

/// What is chosen for the group of every lane; all numbers already rounded to their stored type.
#[derive(Clone, Copy)]
pub(crate) struct LaneParams<L: Lanes> {
    pub(crate) scale: L,
    pub(crate) offset: L,
    pub(crate) zero_point: L,
}

impl<L: Lanes> LaneParams<L> {
    /// What weights are divided by: infinity for a zero scale, so that every code becomes that of level zero.
    #[inline(always)]
    pub(crate) fn divisor(&self) -> L {
        L::select(self.scale.eq(L::splat(0.0)), L::splat(f32::INFINITY), self.scale)
    }
}

/// How weights of one kind of levels become codes.
pub(super) trait Kind {
    /// Whether the fit looks at every weight and not only at the range.
    const SEARCHES: bool = false;

    /// The codes of one weight per lane, as integers in f32.
    fn codes<L: Lanes>(coder: &Coder<L>, w: L) -> L;
}

/// Everything that the codes of a batch depend on.
pub(super) struct Coder<L: Lanes> {
    divisor: L,
    offset: L,
    zero: L,
    /// Least and greatest level, for codes that are clamped before they are rounded.
    least: L,
    greatest: L,
    thresholds: [f32; 16],
}

/// `q`, with an offset.
pub(super) struct Unsigned;
/// `q`, with an offset, both searched for.
pub(super) struct Searched;
/// `q` minus the code of level zero, whether that is fixed or the group's own.
pub(super) struct Signed;
/// `table[q]`.
pub(super) struct Table;

impl Kind for Unsigned {
    #[inline(always)]
    fn codes<L: Lanes>(coder: &Coder<L>, w: L) -> L {
        let t = (w - coder.offset) / coder.divisor;
        t.max(L::splat(0.0)).min(L::splat(15.0)).nearest_positive()
    }
}

impl Kind for Searched {
    const SEARCHES: bool = true;

    #[inline(always)]
    fn codes<L: Lanes>(coder: &Coder<L>, w: L) -> L {
        Unsigned::codes(coder, w)
    }
}

impl Kind for Signed {
    #[inline(always)]
    fn codes<L: Lanes>(coder: &Coder<L>, w: L) -> L {
        (w / coder.divisor).max(coder.least).min(coder.greatest).nearest() + coder.zero
    }
}

impl Kind for Table {
    #[inline(always)]
    fn codes<L: Lanes>(coder: &Coder<L>, w: L) -> L {
        (w / coder.divisor).count_above(&coder.thresholds)
    }
}

impl<L: Lanes> Coder<L> {
    /// What the parameters of a batch mean for its codes.
    #[inline(always)]
    pub(super) fn new(layout: &Grouped, params: &LaneParams<L>) -> Self {
        let zero = match layout.levels() {
            Levels::Signed => L::splat(f32::from(layout.zero_code(0))),
            _ => params.zero_point,
        };
        Self {
            divisor: params.divisor(),
            offset: params.offset,
            zero,
            least: L::splat(f32::from(reference::min_code(layout))) - zero,
            greatest: L::splat(f32::from(layout.max_code())) - zero,
            thresholds: thresholds(layout),
        }
    }
}

/// The fifteen thresholds between the levels of a table.
fn thresholds(layout: &Grouped) -> [f32; 16] {
    let mut thresholds = [f32::INFINITY; 16];
    if let Levels::Table(table) = layout.levels() {
        for (i, threshold) in thresholds[..15].iter_mut().enumerate() {
            *threshold = reference::threshold(table, i);
        }
    }
    thresholds
}
