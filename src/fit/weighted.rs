//! The parameters of least weighted squared error for one group, for every kind of levels.
//!
//! What a layer loses when the weight of column *j* is off by *e* is, with inputs that do not depend on each other,
//! `E[x_j²] e²`: so every column has an importance. The error of a group as a function of its parameters has many
//! valleys; within one the codes stay the same, and the best parameters are those of a weighted least-squares line
//! through (level, weight). So, as in [`super::search`]:
//!
//! 1. Trials over the width of a step (and where it begins) give codes, whose sums give the error of the best line.
//! 2. The best trials alternate between codes and line until they settle.
//! 3. They and their neighbours are rounded to the stored type and judged by the true error: codes by the rule of
//!    [`crate::codec::reference`], weights as decoded, sums in f64.
//! 4. What the codec's own fit gives is what must be beaten, so that no group is ever worse.
//!
//! Sums run over eight lanes in a fixed order, so that the bytes do not depend on the machine.

use super::{Fit, OutOfRange, Params, min_max, min_scale, range_params};
use crate::codec::reference::{min_code, nearest, threshold};
use crate::layout::{Float, Grouped, Levels};

/// Numbers that are added side by side.
const LANES: usize = 8;
/// Lines that are settled after the trials.
const KEPT: usize = 3;
/// Alternations of codes and line.
const SETTLE: usize = 4;
/// A part of the importance of an average column that every column has: no text shows all that a column will see.
const FLOOR: f64 = 1e-3;
/// `1.5 * 2^23`: adding it rounds a small number to the nearest integer.
const ROUNDER: f32 = 12_582_912.0;

/// How much the columns of a matrix matter, relative to each other.
#[derive(Debug, Clone)]
pub struct Importance(Vec<f32>);

impl Importance {
    /// The importance of columns whose inputs have these mean squares, finite and not negative.
    #[must_use]
    pub fn new(mean_sq: &[f32]) -> Self {
        let sum: f64 = mean_sq.iter().map(|&x| f64::from(x)).sum();
        let mean = sum / mean_sq.len().max(1) as f64;
        if mean == 0.0 {
            return Self::uniform(mean_sq.len());
        }
        #[expect(clippy::cast_possible_truncation, reason = "relative to the mean, so at most the number of columns")]
        Self(mean_sq.iter().map(|&x| (f64::from(x) / mean + FLOOR) as f32).collect())
    }

    /// Columns that matter in these proportions.
    #[must_use]
    pub fn relative(columns: Vec<f32>) -> Self {
        Self(columns)
    }

    /// Columns that all matter alike: what is minimised is the squared error of the weights.
    #[must_use]
    pub fn uniform(cols: usize) -> Self {
        Self(vec![1.0; cols])
    }

    /// One number per column.
    #[must_use]
    pub fn columns(&self) -> &[f32] {
        &self.0
    }
}

/// The parameters of every group of a row.
///
/// # Errors
/// [`OutOfRange`] when the codec's own fit cannot store the parameters of a group.
///
/// # Panics
/// For [`Fit::Exact`], which has no groups.
pub fn row(fit: Fit, layout: &Grouped, weights: &[f32], importance: &Importance) -> Result<Vec<Params>, OutOfRange> {
    if fit == Fit::Nested {
        return super::nested::row(layout, weights, Some(importance.columns()));
    }
    let len = layout.group_len(weights.len()).max(1);
    let mut search = Search::new(layout);
    weights.chunks(len).zip(importance.0.chunks(len)).map(|(w, a)| search.params(fit, w, a)).collect()
}

/// The best parameters found for a group; their weighted error is never above that of the codec's own fit.
///
/// # Errors
/// [`OutOfRange`] when the codec's own fit cannot store its parameters.
///
/// # Panics
/// For [`Fit::Exact`], which has no groups.
pub fn params(fit: Fit, layout: &Grouped, weights: &[f32], importance: &[f32]) -> Result<Params, OutOfRange> {
    if fit == Fit::Nested {
        let params = super::nested::row(layout, weights, Some(importance))?;
        return Ok(params.first().copied().unwrap_or(Params::ZERO));
    }
    Search::new(layout).params(fit, weights, importance)
}

/// The weighted squared error of a group under parameters, weights as decoded.
#[must_use]
pub fn error(layout: &Grouped, params: &Params, weights: &[f32], importance: &[f32]) -> f64 {
    Search::new(layout).error(params, weights, importance)
}

/// What is stored for a group, before it is rounded; `offset` and `zero` count only where the layout has them.
#[derive(Clone, Copy)]
struct Line {
    /// The part of the weighted squares that the line explains.
    explained: f32,
    scale: f32,
    offset: f32,
    zero: f32,
}

const NONE: Line = Line { explained: 0.0, scale: 0.0, offset: 0.0, zero: 0.0 };

/// Weighted sums over a group, given its codes.
#[derive(Clone, Copy)]
struct Sums {
    levels: f32,
    squares: f32,
    products: f32,
}

/// How levels look to the loops below: an affine grid, or a table.
#[derive(Clone, Copy)]
enum Grid {
    /// Integers from the first to the second.
    Integers(f32, f32),
    Table(&'static [f32; 16], [f32; 15]),
    /// Not searched here: see [`super::nested`].
    Bank,
}

/// A search and the memory that it reuses from group to group.
struct Search<'a> {
    layout: &'a Grouped,
    /// Weights, importances and their products, filled up with zeros to whole lanes.
    w: Vec<f32>,
    a: Vec<f32>,
    aw: Vec<f32>,
    /// Sums of importances and products.
    total: f32,
    moment: f32,
}

impl<'a> Search<'a> {
    fn new(layout: &'a Grouped) -> Self {
        Self { layout, w: Vec::new(), a: Vec::new(), aw: Vec::new(), total: 0.0, moment: 0.0 }
    }

    fn params(&mut self, fit: Fit, weights: &[f32], importance: &[f32]) -> Result<Params, OutOfRange> {
        let (min, max) = min_max(weights);
        let mut best = range_params(fit, self.layout, min, max)?;
        // One value takes no search: every fit stores it as well as its type can.
        if min == max || weights.is_empty() {
            return Ok(best);
        }
        let mut least = self.error(&best, weights, importance);
        if fit == Fit::Search {
            let own = super::search::params(self.layout, weights)?;
            let error = self.error(&own, weights, importance);
            if error < least {
                (best, least) = (own, error);
            }
        }
        self.load(weights, importance);
        for line in self.lines(min, max) {
            if line.explained > 0.0 {
                self.store(&line, weights, importance, &mut best, &mut least);
            }
        }
        Ok(best)
    }

    /// Takes a group, importances scaled to at most one.
    fn load(&mut self, weights: &[f32], importance: &[f32]) {
        let peak = importance.iter().fold(0.0_f32, |peak, &a| if a > peak { a } else { peak });
        let factor = if peak > 0.0 { 1.0 / peak } else { 0.0 };
        let padded = weights.len().next_multiple_of(LANES);
        for buffer in [&mut self.w, &mut self.a, &mut self.aw] {
            buffer.clear();
            buffer.resize(padded, 0.0);
        }
        for (j, (&w, &a)) in weights.iter().zip(importance).enumerate() {
            let a = if factor > 0.0 && factor.is_finite() { a * factor } else { 1.0 };
            (self.w[j], self.a[j], self.aw[j]) = (w, a, a * w);
        }
        let (mut total, mut moment) = ([0.0; LANES], [0.0; LANES]);
        for (a, aw) in self.a.as_chunks::<LANES>().0.iter().zip(self.aw.as_chunks::<LANES>().0) {
            for i in 0..LANES {
                total[i] += a[i];
                moment[i] += aw[i];
            }
        }
        (self.total, self.moment) = (add(&total), add(&moment));
    }

    /// Whether a line has an offset of its own.
    fn free(&self) -> bool {
        self.layout.offset().is_some()
    }

    fn grid(&self) -> Grid {
        let top = f32::from(self.layout.max_code());
        match self.layout.levels() {
            Levels::Unsigned | Levels::ZeroPoint => Grid::Integers(0.0, top),
            Levels::Signed => {
                let zero = f32::from(self.layout.zero_code(0));
                Grid::Integers(f32::from(min_code(self.layout)) - zero, top - zero)
            }
            Levels::Table(table) => Grid::Table(table, std::array::from_fn(|i| threshold(table, i))),
            Levels::Bank(_) => Grid::Bank,
        }
    }

    /// The line of least error for the codes that `t = w * factor + start` rounds to; `zero` is taken from every level.
    fn line(&self, grid: &Grid, factor: f32, start: f32, zero: f32) -> Line {
        let sums = match *grid {
            Grid::Integers(least, greatest) => self.sums(|w| {
                let t = w * factor + start;
                let t = if t > least { t } else { least };
                let t = if t < greatest { t } else { greatest };
                (t + ROUNDER) - ROUNDER - zero
            }),
            Grid::Bank => return NONE,
            Grid::Table(table, ref thresholds) => self.sums(|w| {
                let t = w * factor + start;
                let mut level = table[0];
                for i in 0..15 {
                    level = if t > thresholds[i] { table[i + 1] } else { level };
                }
                level
            }),
        };
        if self.free() {
            let mean = sums.levels / self.total;
            let covariance = sums.products - self.moment * mean;
            let variance = sums.squares - sums.levels * mean;
            let scale = covariance / variance;
            let offset = (self.moment - scale * sums.levels) / self.total;
            checked(Line { explained: covariance * scale, scale, offset, zero })
        } else {
            let scale = sums.products / sums.squares;
            checked(Line { explained: sums.products * scale, scale, offset: 0.0, zero })
        }
    }

    /// Weighted sums of levels, their squares, and their products with the weights.
    #[inline(always)]
    fn sums(&self, level: impl Fn(f32) -> f32) -> Sums {
        let (mut levels, mut squares, mut products) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        let (w, a, aw) = (self.w.as_chunks::<LANES>().0, self.a.as_chunks::<LANES>().0, self.aw.as_chunks::<LANES>().0);
        for ((w, a), aw) in w.iter().zip(a).zip(aw) {
            for i in 0..LANES {
                let level = level(w[i]);
                let weighted = a[i] * level;
                levels[i] += weighted;
                squares[i] += weighted * level;
                products[i] += aw[i] * level;
            }
        }
        Sums { levels: add(&levels), squares: add(&squares), products: add(&products) }
    }

    /// The best lines of all trials, settled.
    fn lines(&self, min: f32, max: f32) -> [Line; KEPT] {
        let grid = self.grid();
        let mut kept = [NONE; KEPT];
        let mut keep = |line: Line| {
            let mut line = line;
            for place in &mut kept {
                if line.explained > place.explained {
                    std::mem::swap(&mut line, place);
                }
            }
        };
        let top = f32::from(self.layout.max_code());
        match self.layout.levels() {
            Levels::Unsigned => {
                // A span is how many steps the range covers: what exceeds the codes is clipped at either end.
                for span in spans(top) {
                    let factor = span / (max - min);
                    let excess = if span > top { span - top } else { 0.0 };
                    for phase in [-0.375, -0.125, 0.125, 0.375, -0.5 * excess - 0.375, 0.5 * excess + 0.375] {
                        keep(self.line(&grid, factor, 0.5 * (top - span) + phase - factor * min, 0.0));
                    }
                }
            }
            Levels::ZeroPoint => {
                for span in spans(top) {
                    let factor = span / (max - min);
                    let middle = nearest(0.5 * (top - span) - factor * min);
                    for step in [-1.0, 0.0, 1.0] {
                        let zero = (middle + step).clamp(0.0, top);
                        keep(self.line(&grid, factor, zero, zero));
                    }
                }
            }
            Levels::Signed | Levels::Table(_) | Levels::Bank(_) => {
                let abs = if -min > max { -min } else { max };
                let end = match grid {
                    Grid::Integers(_, greatest) => greatest,
                    Grid::Table(..) | Grid::Bank => 1.0,
                };
                for trial in (0..TRIALS).map(f32::from) {
                    let part = if self.layout.bits() == 8 { 0.88 + 0.01 * trial } else { 0.72 + 0.04 * trial };
                    for factor in [part * end / abs, -part * end / abs] {
                        keep(self.line(&grid, factor, 0.0, 0.0));
                    }
                }
            }
        }
        for line in &mut kept {
            for _ in 0..SETTLE {
                if line.explained == 0.0 {
                    break;
                }
                let factor = 1.0 / line.scale;
                let next = self.line(&grid, factor, line.zero - line.offset * factor, line.zero);
                if next.explained <= line.explained {
                    break;
                }
                *line = next;
            }
        }
        kept
    }

    /// Rounds a line and its neighbours to the stored type, and takes the best of them.
    fn store(&self, line: &Line, weights: &[f32], importance: &[f32], best: &mut Params, least: &mut f64) {
        let scale_type = self.layout.scale();
        let stored = scale_type.round(line.scale);
        for scale in around(scale_type, stored) {
            // Minmax's own limit: at the edge of the type the search has no business.
            if !(scale.is_finite() && scale.abs() > min_scale(scale_type)) {
                continue;
            }
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an integer among the codes")]
            let zero_point = line.zero as u8;
            let Some(float) = self.layout.offset() else {
                self.attempt(Params { scale, zero_point, ..Params::ZERO }, weights, importance, best, least);
                continue;
            };
            let offset = float.round(line.offset);
            for offset in around(float, offset) {
                if offset.is_finite() {
                    self.attempt(
                        Params { scale, offset, zero_point, ..Params::ZERO },
                        weights,
                        importance,
                        best,
                        least,
                    );
                }
            }
        }
    }

    fn attempt(&self, params: Params, weights: &[f32], importance: &[f32], best: &mut Params, least: &mut f64) {
        let error = self.error(&params, weights, importance);
        if error < *least {
            (*best, *least) = (params, error);
        }
    }

    /// The weighted squared error of a group, codes by the rule of the reference.
    fn error(&self, params: &Params, weights: &[f32], importance: &[f32]) -> f64 {
        let levels: Vec<f32> = match self.grid() {
            Grid::Integers(least, greatest) if params.scale != 0.0 => {
                let zero = f32::from(params.zero_point);
                let zeroed = |w: f32| {
                    let t = (w - params.offset) / params.scale;
                    let t = if t > least - zero { t } else { least - zero };
                    let t = if t < greatest - zero { t } else { greatest - zero };
                    let even = (t + ROUNDER) - ROUNDER;
                    if t - even == -0.5 { even - 1.0 } else { even }
                };
                weights.iter().map(|&w| zeroed(w)).collect()
            }
            _ => {
                let code = |w| crate::codec::reference::code(self.layout, params, w);
                weights.iter().map(|&w| self.layout.level(code(w), params.zero_point)).collect()
            }
        };
        let mut sums = [0.0; LANES];
        for (i, ((&w, &a), level)) in weights.iter().zip(importance).zip(levels).enumerate() {
            let lost = f64::from(w) - f64::from(level * params.scale + params.offset);
            sums[i % LANES] += f64::from(a) * lost * lost;
        }
        sums.iter().sum()
    }
}

/// Trials of the codecs that have a scale alone.
const TRIALS: u8 = 18;

/// The widths that are tried where there is an offset: from half the codes to a third more than there are.
fn spans(top: f32) -> impl Iterator<Item = f32> {
    (0..26_u8).map(move |i| top * (0.52 + 0.03 * f32::from(i)))
}

/// A line that can be compared; one whose codes are all equal explains nothing.
fn checked(line: Line) -> Line {
    let sound = line.explained.is_finite() && line.scale.is_finite() && line.offset.is_finite() && line.scale != 0.0;
    if sound { line } else { NONE }
}

/// The sum of lanes, in a fixed order.
fn add(lanes: &[f32; LANES]) -> f32 {
    let [a, b, c, d, e, f, g, h] = *lanes;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

/// A number of a stored type and its neighbours there, where rounding to the type is coarse enough to matter.
fn around(float: Float, x: f32) -> impl Iterator<Item = f32> {
    let bits = half::f16::from_f32(x).to_bits();
    let steps: &[i16] = if float == Float::F16 { &[1, -1] } else { &[] };
    std::iter::once(x)
        .chain(steps.iter().map(move |&step| half::f16::from_bits(bits.wrapping_add_signed(step)).to_f32()))
}
