//! The scale and offset of least squared error for one group.
//!
//! The error as a function of scale and offset has many valleys: within one, the codes stay the same and the best
//! scale and offset are a least-squares line through (code, weight). So the search visits valleys:
//!
//! 1. A trial is a *span* (how many steps the range of the group covers, 8 to 17: fewer than 15 leaves codes unused
//!    but may meet the weights better, more clips the ends) and a *phase* (where in a step the range begins). Its codes
//!    give sums from which the error of the best line follows without a second pass: the explained part of the
//!    variance is `cov(code, weight)^2 / var(code)`.
//! 2. The two best trials alternate between codes and line until they settle.
//! 3. The lines are rounded to their stored type, and their neighbours there are tried, by the true error: codes by the
//!    rule of [`crate::codec::reference`], weights as decoded.
//! 4. minmax itself is what must be beaten, by more than the rounding of the error sums: so no group is ever worse.
//!
//! On random groups the result is within a thousandth of the best line over a grid of 8281 trials. Everything is f32
//! lane arithmetic in one order, one group per lane, so that any number of lanes gives the same bytes.

use std::hint::black_box;

use super::{Fit, OutOfRange, Params, lanes as fits, min_scale};
use crate::codec::batch::{MAX_GROUP, range};
use crate::codec::kind::LaneParams;
use crate::codec::lanes::{Lanes, array::Array};
use crate::layout::{Float, Grouped, Levels};

/// How many spans are tried: from 8 in thirds to 17.
const SPANS: u16 = 28;
/// Phases of each span, in steps.
const PHASES: [f32; 4] = [-0.375, -0.125, 0.125, 0.375];
/// Alternations of codes and line; nearly all lines have settled by then.
const SETTLE: usize = 3;
/// The last code.
const TOP: f32 = 15.0;
/// A part of minmax's error: sums of up to 128 squares in f32 are true to 2^-16 of themselves.
const CLEARLY_LESS: f32 = 0.9999;
/// Below it squares lose bits to underflow, so that no comparison of errors means anything.
const LEAST_ERROR: f32 = 1e-30;
/// Three quarters of a half's relative spacing: a step of this size always rounds to the neighbour.
const NEIGHBOUR: f32 = 0.75 / 1024.0;

/// The best parameters found for a group; never worse than those of minmax.
///
/// Groups that no codec has (other levels than sixteen with an offset, more than 128 weights) get those of minmax.
///
/// # Errors
/// [`OutOfRange`] when the scale or the offset of minmax does not fit its stored type.
pub fn params(layout: &Grouped, group: &[f32]) -> Result<Params, OutOfRange> {
    let searchable = matches!((layout.levels(), layout.bits(), layout.offset()), (Levels::Unsigned, 4, Some(_)));
    if !searchable || group.len() > MAX_GROUP || group.is_empty() {
        let (min, max) = super::min_max(group);
        return super::min_max_params(layout, min, max);
    }
    let mut columns = [Array::<1>::splat(0.0); MAX_GROUP];
    for (column, &w) in columns.iter_mut().zip(group) {
        *column = Array::splat(w);
    }
    let params = lanes(layout, &columns[..group.len()])?;
    let (mut scale, mut offset) = ([0.0], [0.0]);
    params.scale.store(&mut scale);
    params.offset.store(&mut offset);
    Ok(Params { scale: scale[0], offset: offset[0], ..Params::ZERO })
}

/// A line through (code, weight), and how much of the weights' variance it explains.
#[derive(Clone, Copy)]
struct Line<L: Lanes> {
    explained: L,
    slope: L,
    start: L,
}

/// What a line is made from, besides the sum of the weights.
#[derive(Clone, Copy)]
struct Sums<L: Lanes> {
    codes: L,
    squares: L,
    products: L,
}

impl<L: Lanes> Sums<L> {
    #[inline(always)]
    fn new() -> Self {
        let zero = L::splat(0.0);
        Self { codes: zero, squares: zero, products: zero }
    }

    #[inline(always)]
    fn add(&mut self, code: L, weight: L) {
        self.codes = self.codes + code;
        self.squares = self.squares + code * code;
        self.products = self.products + code * weight;
    }

    /// The line of least squares; no number where all codes are equal, which then compares as no better.
    #[inline(always)]
    fn line(&self, total: L, per: L) -> Line<L> {
        let mean = self.codes * per;
        let covariance = self.products - total * mean;
        let variance = self.squares - self.codes * mean;
        let slope = covariance / variance;
        Line { explained: covariance * slope, slope, start: (total - slope * self.codes) * per }
    }
}

impl<L: Lanes> Line<L> {
    /// The line that explains more.
    #[inline(always)]
    fn better(self, other: Self) -> Self {
        Self::select(other.explained.lt(self.explained), self, other)
    }

    #[inline(always)]
    fn select(mask: L::Mask, yes: Self, no: Self) -> Self {
        Self {
            explained: L::select(mask, yes.explained, no.explained),
            slope: L::select(mask, yes.slope, no.slope),
            start: L::select(mask, yes.start, no.start),
        }
    }
}

/// Weights of a group per lane, moved and scaled so that their range is -0.5..=0.5.
struct Normal<'a, L: Lanes> {
    weights: &'a [L],
    total: L,
    per: L,
}

impl<L: Lanes> Normal<'_, L> {
    /// The lines of all phases of one span; codes past the ends are clipped where a span can have them.
    #[inline(always)]
    fn trial<const CLIP: bool>(&self, span: f32) -> [Line<L>; PHASES.len()] {
        let span = L::splat(span);
        let mut sums = [Sums::new(); PHASES.len()];
        for &weight in self.weights {
            let t = weight * span;
            for (sums, phase) in sums.iter_mut().zip(PHASES) {
                let t = t + L::splat(0.5 * TOP + phase);
                let t = if CLIP { t.max(L::splat(0.0)).min(L::splat(TOP)) } else { t };
                sums.add(t.round(), weight);
            }
        }
        let mut lines = [sums[0].line(self.total, self.per); PHASES.len()];
        for (line, sums) in lines.iter_mut().zip(&sums) {
            *line = sums.line(self.total, self.per);
        }
        lines
    }

    /// The line through the codes that a line gives.
    #[inline(always)]
    fn again(&self, line: &Line<L>) -> Line<L> {
        let factor = L::splat(1.0) / line.slope;
        let start = line.start * factor;
        let mut sums = Sums::new();
        for &weight in self.weights {
            let t = (weight * factor - start).max(L::splat(0.0)).min(L::splat(TOP));
            sums.add(t.round(), weight);
        }
        sums.line(self.total, self.per)
    }

    /// The two best lines of all trials, settled.
    #[inline(always)]
    fn lines(&self) -> [Line<L>; 2] {
        let none = Line { explained: L::splat(0.0), slope: L::splat(1.0), start: L::splat(0.0) };
        let (mut first, mut second) = (none, none);
        for span in 0..SPANS {
            let span = 8.0 + f32::from(span) / 3.0;
            let lines = if span > TOP { self.trial::<true>(span) } else { self.trial::<false>(span) };
            for line in lines {
                second = line.better(second);
                let ahead = first.explained.lt(line.explained);
                second = Line::select(ahead, first, second);
                first = Line::select(ahead, line, first);
            }
        }
        let mut lines = [first, second];
        for line in &mut lines {
            for _ in 0..SETTLE {
                *line = self.again(line).better(*line);
            }
        }
        lines
    }
}

/// The best stored parameters so far, and their error.
struct Best<'a, L: Lanes> {
    layout: &'a Grouped,
    weights: &'a [L],
    params: LaneParams<L>,
    error: L,
}

impl<L: Lanes> Best<'_, L> {
    /// The squared error of parameters, and the scale of least error for their codes and offset.
    #[inline(always)]
    fn error(&self, params: &LaneParams<L>) -> (L, L) {
        let zero = L::splat(0.0);
        let divisor = params.divisor();
        let (mut error, mut products, mut squares) = (zero, zero, zero);
        for &w in self.weights {
            let above = w - params.offset;
            let code = (above / divisor).max(zero).min(L::splat(TOP)).nearest_positive();
            let lost = w - (code * params.scale + params.offset);
            error = error + lost * lost;
            products = products + above * code;
            squares = squares + code * code;
        }
        (error, products / squares)
    }

    /// Tries parameters, rounding them first; returns the scale of least error for their codes and offset.
    #[inline(always)]
    fn attempt(&mut self, scale: L, offset: L) -> L {
        let params = LaneParams {
            scale: round(self.layout.scale(), scale),
            offset: round(self.layout.offset().unwrap_or(Float::F32), offset),
            zero_point: L::splat(0.0),
        };
        let (error, refit) = self.error(&params);
        let infinite = L::splat(f32::INFINITY);
        // Minmax's own limit, and one ulp more of it: the search has no business at the edge.
        let storable = L::splat(min_scale(self.layout.scale())).lt(params.scale);
        let finite = L::and(params.scale.lt(infinite), params.offset.abs().lt(infinite));
        let better = L::and(L::and(storable, finite), error.lt(self.error));
        self.error = L::select(better, error, self.error);
        self.params.scale = L::select(better, params.scale, self.params.scale);
        self.params.offset = L::select(better, params.offset, self.params.offset);
        refit
    }
}

#[inline(always)]
fn round<L: Lanes>(float: Float, x: L) -> L {
    if float == Float::F16 { x.round_f16() } else { x }
}

/// The best parameters found for the group of every lane.
///
/// # Errors
/// [`OutOfRange`] when minmax refuses any of the groups.
#[inline(always)]
pub(crate) fn lanes<L: Lanes>(layout: &Grouped, weights: &[L]) -> Result<LaneParams<L>, OutOfRange> {
    let (min, max) = range(weights);
    let params = fits::params(Fit::MinMax, layout, min, max)?;
    // The compiler would otherwise unroll every loop below into hundreds of kilobytes.
    let weights = black_box(weights);

    let width = max - min;
    let factor = L::splat(1.0) / width;
    let mut normal = [L::splat(0.0); MAX_GROUP];
    let mut total = L::splat(0.0);
    let mut count = 0.0;
    for (normal, &w) in normal.iter_mut().zip(weights) {
        *normal = (w - min) * factor - L::splat(0.5);
        total = total + *normal;
        count += 1.0;
    }
    let per = L::splat(1.0 / count);
    let lines = Normal { weights: &normal[..weights.len()], total, per }.lines();

    let mut best = Best { layout, weights, params, error: L::splat(0.0) };
    let (start, _) = best.error(&params);
    // Zero where nothing may be compared: nothing is then better.
    best.error = L::select(L::splat(LEAST_ERROR).lt(start), start * L::splat(CLEARLY_LESS), L::splat(0.0));
    for line in black_box(&lines[..]) {
        let scale = line.slope * width;
        let offset = (line.start + L::splat(0.5)) * width + min;
        for &step in black_box(&[0.0, -NEIGHBOUR, NEIGHBOUR][..]) {
            let offset = offset + offset * L::splat(step);
            let refit = best.attempt(scale, offset);
            best.attempt(refit, offset);
        }
    }
    for step in [-NEIGHBOUR, NEIGHBOUR] {
        let LaneParams { scale, offset, .. } = best.params;
        best.attempt(scale + scale * L::splat(step), offset);
    }
    Ok(best.params)
}
