//! The scale of a row, and sign, table and multiplier of each of its groups, of least squared error.
//!
//! A group is approximated well by some scales and badly by others in between, so that what matters of a row's scale is
//! which multiples of it groups find there. Trying all bytes of all groups for many row scales would take long; so
//!
//! 1. every group gets a curve: its least error over signs and tables at sixteen scales, which do not depend on the row's;
//! 2. a row scale is judged by the curves alone: of a group by the best of its scales that lies next to a multiple;
//! 3. the best row scales are tried truly, every group with its best multiples, all signs and all tables;
//! 4. the row scale of least squares for what was found is tried as well;
//! 5. [`plain`] is what must be beaten, by more than the rounding of the sums: so no row is ever worse.
//!
//! Errors are weighted with the importances of columns where there are some (see [`super::weighted`]). Everything is f32
//! lane arithmetic in one order, one group per lane, and sums over groups are f64 in the order of groups, so that any
//! number of lanes gives the same bytes.

use super::{OutOfRange, Params, min_max, min_scale};
use crate::codec::isa;
use crate::codec::lanes::{Lanes, MAX_LANES};
use crate::codec::reference::{code, weight};
use crate::layout::{Bank, Float, Grouped, LEVELS, ROW_SCALE_END};

/// The longest group.
const MAX_GROUP: usize = 32;
/// The level that the greatest weight of a group has at a scale of one unit.
const PEAK: f32 = 127.0;
/// Scales of a curve, in units: powers of the sixteenth root of two, from what clips a fifth to what wastes a third.
const SCALES: [f32; 16] = [
    0.805_245_2,
    0.840_896_4,
    0.878_126_1,
    0.917_004_05,
    0.957_603_3,
    1.0,
    1.044_273_8,
    1.090_507_7,
    1.138_788_6,
    1.189_207_1,
    1.241_857_8,
    1.296_839_6,
    1.354_255_5,
    std::f32::consts::SQRT_2,
    1.476_826_1,
    1.542_210_8,
];
/// How far a multiple may be from a scale of a curve to have its error: half of a step.
const NEAR: f32 = 0.0225;
/// Row scales that are judged by curves, and their ratio: the twenty-fourth root of two.
const TRIALS: i32 = 84;
const RATIO: f32 = 1.029_302_2;
/// The first of them, relative to the one that clips nothing.
const FIRST: f32 = 0.25;
/// Row scales that are tried.
const TRIED: usize = 3;
/// Multiples of a row scale that are tried for a group.
const KEPT: usize = 3;
/// A part of the error of [`plain`]: what sums of squares in f32 are true to.
const CLEARLY_LESS: f64 = 0.9999;

/// The parameters of every group of a row, under the importances of its columns where there are some; then they are not
/// worse than those that are found without.
///
/// # Errors
/// [`OutOfRange`] when the row has no scale that can be stored.
///
/// # Panics
/// When the layout has no bank.
pub fn row(layout: &Grouped, weights: &[f32], importance: Option<&[f32]>) -> Result<Vec<Params>, OutOfRange> {
    let found = isa::best().nested(layout, weights, importance)?;
    let Some(importance) = importance else { return Ok(found) };
    let own = isa::best().nested(layout, weights, None)?;
    let lost = |params: &[Params]| error(layout, params, weights, importance);
    Ok(if lost(&own) < lost(&found) { own } else { found })
}

/// The weighted squared error of a row, weights as decoded.
fn error(layout: &Grouped, params: &[Params], weights: &[f32], importance: &[f32]) -> f64 {
    let mut sum = 0.0;
    for ((params, weights), importance) in
        params.iter().zip(weights.chunks(layout.group())).zip(importance.chunks(layout.group()))
    {
        for (&w, &a) in weights.iter().zip(importance) {
            let lost = f64::from(w) - f64::from(weight(layout, params, code(layout, params, w)));
            sum += f64::from(a) * lost * lost;
        }
    }
    sum
}

/// What any search must beat: the first table, without a sign, and for each group the least multiple of the least row
/// scale at which the table clips nothing.
///
/// # Errors
/// [`OutOfRange`] when the row has no scale that can be stored.
///
/// # Panics
/// When the layout has no bank.
pub fn plain(layout: &Grouped, weights: &[f32]) -> Result<Vec<Params>, OutOfRange> {
    let bank = layout.bank().expect("nested scales have a bank");
    let scale = plain_scale(bank, weights)?;
    let groups = weights.chunks(layout.group_len(weights.len()).max(1));
    Ok(groups.map(|group| Params::nested(bank, plain_byte(bank, peak(group), scale), scale)).collect())
}

/// The least row scale that clips nothing; zero for a row of zeros.
fn plain_scale(bank: &Bank, weights: &[f32]) -> Result<f32, OutOfRange> {
    let top = multiplier(bank, bank.max_magnitude());
    let scale = peak(weights) / (reach(bank) * top);
    if scale == 0.0 {
        return if peak(weights) == 0.0 { Ok(0.0) } else { Err(OutOfRange) };
    }
    if storable(scale) { Ok(scale) } else { Err(OutOfRange) }
}

/// Whether a row scale can be stored and loses no bits.
fn storable(scale: f32) -> bool {
    scale >= min_scale(Float::F32) && scale < ROW_SCALE_END
}

/// The least magnitude whose multiple reaches a peak.
fn plain_byte(bank: &Bank, peak: f32, scale: f32) -> u8 {
    let reaches = |&magnitude: &u8| multiplier(bank, magnitude) * scale * reach(bank) >= peak;
    (0..bank.max_magnitude()).find(reaches).unwrap_or(bank.max_magnitude())
}

/// The magnitude that the first table has on both sides.
fn reach(bank: &Bank) -> f32 {
    let table = bank.table(0);
    let (least, greatest) = (f32::from(table[0]), f32::from(table[table.len() - 1]));
    if -least < greatest { -least } else { greatest }
}

fn peak(weights: &[f32]) -> f32 {
    let (min, max) = min_max(weights);
    if -min > max { -min } else { max.max(0.0) }
}

fn multiplier(bank: &Bank, magnitude: u8) -> f32 {
    bank.multiplier(magnitude)
}

/// A bank as loops want it: per table its levels and the middles between them.
struct Tables {
    bits: u32,
    levels: [f32; LEVELS],
    middles: [f32; LEVELS],
    knee: f32,
    step: f32,
    top: f32,
}

impl Tables {
    fn new(bank: &Bank) -> Self {
        let levels = bank.levels().map(f32::from);
        let middles = std::array::from_fn(|i| if i + 1 < LEVELS { 0.5 * (levels[i] + levels[i + 1]) } else { 0.0 });
        let top = multiplier(bank, bank.max_magnitude());
        let (knee, step) = (f32::from(bank.knee()), f32::from(bank.step()));
        Self { bits: bank.bits(), levels, middles, knee, step, top }
    }

    /// Levels of a table, and the middles above all but the last.
    #[inline(always)]
    fn table(&self, table: usize) -> (&[f32], &[f32]) {
        let (first, len) = (table << self.bits, 1 << self.bits);
        (&self.levels[first..][..len], &self.middles[first..][..len - 1])
    }

    /// The multiplier next to a number.
    #[inline(always)]
    fn nearest<L: Lanes>(&self, x: L) -> L {
        let (knee, step) = (L::splat(self.knee), L::splat(self.step));
        let x = x.min(L::splat(self.top));
        let far = knee + ((x - knee) / step).round() * step;
        L::select(x.lt(knee), x.round(), far).max(L::splat(1.0)).min(L::splat(self.top))
    }
}

/// What was chosen for the group of every lane.
#[derive(Clone, Copy)]
struct Choice<L: Lanes> {
    error: L,
    multiplier: L,
    /// Twice the table, and one for a negative sign.
    kind: L,
}

/// A group of every lane: groups of one row and of one length.
struct Batch<L: Lanes> {
    /// Groups among the lanes.
    used: usize,
    weights: [L; MAX_GROUP],
    importance: [L; MAX_GROUP],
    len: usize,
    /// The greatest magnitude, and one where that is zero.
    peak: L,
    /// The error of nothing but zeros.
    energy: L,
    curve: [L; SCALES.len()],
}

impl<L: Lanes> Batch<L> {
    #[inline(always)]
    fn new(weights: &[f32], factor: f32, importance: Option<&[f32]>, len: usize) -> Self {
        let zero = L::splat(0.0);
        let used = weights.len() / len;
        let mut batch = Self {
            used,
            weights: [zero; MAX_GROUP],
            importance: [L::splat(1.0); MAX_GROUP],
            len,
            peak: zero,
            energy: zero,
            curve: [zero; SCALES.len()],
        };
        for j in 0..len {
            batch.weights[j] = gather::<L>(weights, len, j) * L::splat(factor);
            if let Some(importance) = importance {
                batch.importance[j] = gather(importance, len, j);
            }
            let w = batch.weights[j];
            batch.peak = w.abs().max(batch.peak);
            batch.energy = batch.energy + batch.importance[j] * (w * w);
        }
        batch.peak = L::select(batch.peak.eq(zero), L::splat(1.0), batch.peak);
        batch
    }

    /// The squared error of the nearest levels of a table at a scale.
    #[inline(always)]
    fn error<const WEIGHTED: bool>(&self, tables: &Tables, table: usize, scale: L) -> L {
        let (levels, middles) = tables.table(table);
        let factor = L::splat(1.0) / scale;
        let mut sums = [L::splat(0.0); 4];
        let fours = self.weights[..self.len].chunks(4).zip(self.importance[..self.len].chunks(4));
        for (weights, importance) in fours {
            let mut t = [L::splat(0.0); 4];
            for (t, &w) in t.iter_mut().zip(weights) {
                *t = w * factor;
            }
            let mut nearest = [L::splat(levels[0]); 4];
            for (&middle, &level) in middles.iter().zip(&levels[1..]) {
                let (middle, level) = (L::splat(middle), L::splat(level));
                for i in 0..4 {
                    nearest[i] = L::select(middle.lt(t[i]), level, nearest[i]);
                }
            }
            for i in 0..weights.len() {
                let lost = t[i] - nearest[i];
                sums[i] = sums[i] + if WEIGHTED { importance[i] * (lost * lost) } else { lost * lost };
            }
        }
        ((sums[0] + sums[2]) + (sums[1] + sums[3])) * (scale * scale)
    }

    /// The least error over tables and signs at a scale.
    #[inline(always)]
    fn least<const WEIGHTED: bool>(&self, tables: &Tables, scale: L) -> (L, L) {
        let (mut least, mut kind) = (L::splat(f32::INFINITY), L::splat(0.0));
        let mut number = 0.0;
        for table in 0..LEVELS >> tables.bits {
            for scale in [scale, L::splat(0.0) - scale] {
                let error = self.error::<WEIGHTED>(tables, table, scale);
                let better = error.lt(least);
                least = L::select(better, error, least);
                kind = L::select(better, L::splat(number), kind);
                number += 1.0;
            }
        }
        (least, kind)
    }

    #[inline(always)]
    fn unit(&self) -> L {
        self.peak / L::splat(PEAK)
    }

    #[inline(always)]
    fn draw<const WEIGHTED: bool>(&mut self, tables: &Tables) {
        let unit = self.unit();
        for (k, &scale) in SCALES.iter().enumerate() {
            self.curve[k] = self.least::<WEIGHTED>(tables, unit * L::splat(scale)).0;
        }
    }

    /// The error that the curve promises for a row scale.
    #[inline(always)]
    fn promise(&self, tables: &Tables, scale: f32) -> L {
        let wanted = self.unit() * L::splat(1.0 / scale);
        let mut least = self.energy;
        for (&step, &error) in SCALES.iter().zip(&self.curve) {
            let x = wanted * L::splat(step);
            let near = (tables.nearest(x) - x).abs().lt(x * L::splat(NEAR));
            least = L::select(near, error.min(least), least);
        }
        // Beyond the greatest multiple the peak is clipped, below the least one the levels are too far apart.
        let last = SCALES.len() - 1;
        let (high, low) = (wanted * L::splat(SCALES[0]), wanted * L::splat(SCALES[last]));
        let lost = self.peak - L::splat(PEAK * tables.top * scale);
        let clipped = L::splat(tables.top).lt(high);
        least = L::select(clipped, (self.curve[0] + lost * lost).min(self.energy), least);
        let coarse = (self.curve[last] / (low * low)).min(self.energy);
        L::select(low.lt(L::splat(1.0)), coarse, least)
    }

    /// The best choice among the multiples of a row scale that the curve finds best.
    #[inline(always)]
    fn choose<const WEIGHTED: bool>(&self, tables: &Tables, scale: f32) -> Choice<L> {
        let wanted = self.unit() * L::splat(1.0 / scale);
        let infinite = L::splat(f32::INFINITY);
        let mut kept = [(infinite, tables.nearest(wanted)); KEPT];
        for (&step, &error) in SCALES.iter().zip(&self.curve) {
            let x = wanted * L::splat(step);
            let mut multiplier = tables.nearest(x);
            let near = (multiplier - x).abs().lt(x * L::splat(NEAR));
            let mut error = L::select(near, error, infinite);
            for place in &mut kept {
                let better = error.lt(place.0);
                let moved = (L::select(better, place.0, error), L::select(better, place.1, multiplier));
                *place = (L::select(better, error, place.0), L::select(better, multiplier, place.1));
                (error, multiplier) = moved;
            }
        }
        let zero = L::splat(0.0);
        let mut best = Choice { error: self.energy, multiplier: zero, kind: zero };
        for (_, multiplier) in kept {
            let (error, kind) = self.least::<WEIGHTED>(tables, multiplier * L::splat(scale));
            let better = error.lt(best.error);
            best.error = L::select(better, error, best.error);
            best.multiplier = L::select(better, multiplier, best.multiplier);
            best.kind = L::select(better, kind, best.kind);
        }
        best
    }
}

/// Column `j` of groups that lie one after the other, zeros where there are none.
#[inline(always)]
fn gather<L: Lanes>(weights: &[f32], len: usize, j: usize) -> L {
    let mut lanes = [0.0; MAX_LANES];
    for (lane, group) in lanes[..L::N].iter_mut().zip(weights.chunks_exact(len)) {
        *lane = group[j];
    }
    L::load(&lanes)
}

/// Choices for all groups of a row.
struct Row<'a, L: Lanes> {
    bank: &'static Bank,
    tables: &'a Tables,
    batches: &'a [Batch<L>],
}

/// Scale bytes of a row with its scale, and their error.
struct Found {
    error: f64,
    scale: f32,
    bytes: Vec<u8>,
}

impl<L: Lanes> Row<'_, L> {
    #[inline(always)]
    fn promise(&self, scale: f32) -> f64 {
        let mut sum = 0.0;
        for batch in self.batches {
            sum += total(batch.promise(self.tables, scale), batch.used);
        }
        sum
    }

    #[inline(always)]
    fn choose<const WEIGHTED: bool>(&self, scale: f32) -> Found {
        let mut found = Found { error: 0.0, scale, bytes: Vec::new() };
        for batch in self.batches {
            let choice = batch.choose::<WEIGHTED>(self.tables, scale);
            found.error += total(choice.error, batch.used);
            let (mut multipliers, mut kinds) = ([0.0; MAX_LANES], [0.0; MAX_LANES]);
            choice.multiplier.store(&mut multipliers);
            choice.kind.store(&mut kinds);
            for (&multiplier, &kind) in multipliers.iter().zip(&kinds).take(batch.used) {
                found.bytes.push(self.byte(multiplier, kind));
            }
        }
        found
    }

    fn byte(&self, multiplier: f32, kind: f32) -> u8 {
        let tables = self.tables;
        let magnitude =
            if multiplier > tables.knee { tables.knee + (multiplier - tables.knee) / tables.step } else { multiplier };
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "integers of at most 7 bits")]
        let (magnitude, kind) = (magnitude as u8, kind as u8);
        if magnitude == 0 { 0 } else { self.bank.byte(kind % 2 == 1, kind / 2, magnitude) }
    }

    /// The error of [`plain`].
    #[inline(always)]
    fn plain<const WEIGHTED: bool>(&self, scale: f32) -> Found {
        let mut found = Found { error: 0.0, scale, bytes: Vec::new() };
        for batch in self.batches {
            let (mut peaks, mut multipliers) = ([0.0; MAX_LANES], [0.0; MAX_LANES]);
            batch.peak.store(&mut peaks);
            let (mut energies, first) = ([0.0; MAX_LANES], found.bytes.len());
            batch.energy.store(&mut energies);
            for lane in 0..batch.used {
                let byte = plain_byte(self.bank, if energies[lane] == 0.0 { 0.0 } else { peaks[lane] }, scale);
                multipliers[lane] = multiplier(self.bank, byte);
                found.bytes.push(byte);
            }
            let scales = L::load(&multipliers) * L::splat(scale);
            let none = scales.eq(L::splat(0.0));
            let error = batch.error::<WEIGHTED>(self.tables, 0, L::select(none, L::splat(1.0), scales));
            found.error += total(L::select(none, batch.energy, error), batch.used);
            debug_assert_eq!(found.bytes.len(), first + batch.used);
        }
        found
    }

    /// The row scale of least squares for the levels that were found, in f64 in the order of weights.
    fn refit(&self, found: &Found, weights: &[f32], normal: f32, importance: Option<&[f32]>, len: usize) -> f32 {
        let (mut products, mut squares) = (0.0, 0.0);
        for (g, (group, &byte)) in weights.chunks(len).zip(&found.bytes).enumerate() {
            let multiplier = self.bank.multiplier(byte);
            if multiplier == 0.0 {
                continue;
            }
            let factor = 1.0 / (multiplier * found.scale);
            let (levels, middles) = self.tables.table(usize::from(self.bank.high(byte)) >> self.bank.bits());
            let (mut product, mut square) = (0.0_f32, 0.0_f32);
            for (j, &w) in group.iter().enumerate() {
                let w = w * normal;
                let level = levels[count_above(middles, w * factor)];
                let importance = importance.map_or(1.0, |a| a[g * len + j]);
                product += importance * (w * level);
                square += importance * (level * level);
            }
            products += f64::from(product) * f64::from(multiplier);
            squares += f64::from(square) * f64::from(multiplier) * f64::from(multiplier);
        }
        #[expect(clippy::cast_possible_truncation, reason = "rounded to the stored type")]
        let scale = (products / squares) as f32;
        scale
    }
}

/// How many of the ascending middles are less.
#[inline(always)]
pub(crate) fn count_above(middles: &[f32], t: f32) -> usize {
    middles.iter().map(|&middle| usize::from(t > middle)).sum()
}

/// The sum over the first lanes, in their order.
#[inline(always)]
fn total<L: Lanes>(values: L, used: usize) -> f64 {
    let mut lanes = [0.0; MAX_LANES];
    values.store(&mut lanes);
    lanes[..used].iter().fold(0.0, |sum, &x| sum + f64::from(x))
}

/// [`row`], so many groups at a time as there are lanes.
#[inline(always)]
pub(crate) fn lanes<L: Lanes>(
    layout: &Grouped,
    weights: &[f32],
    importance: Option<&[f32]>,
) -> Result<Vec<Params>, OutOfRange> {
    match importance {
        None => search::<L, false>(layout, weights, None),
        Some(_) => search::<L, true>(layout, weights, importance),
    }
}

#[inline(always)]
fn search<L: Lanes, const WEIGHTED: bool>(
    layout: &Grouped,
    weights: &[f32],
    importance: Option<&[f32]>,
) -> Result<Vec<Params>, OutOfRange> {
    let bank = layout.bank().expect("nested scales have a bank");
    let len = layout.group_len(weights.len()).max(1);
    let start = plain_scale(bank, weights)?;
    if start == 0.0 {
        return Ok(vec![Params::nested(bank, 0, 0.0); weights.len().div_ceil(len)]);
    }
    // By a power of two, so that nothing is rounded and no square leaves the range of f32.
    let size = f32::from_bits(peak(weights).to_bits() & f32::INFINITY.to_bits());
    let (factor, start) = (1.0 / size, start / size);
    let tables = Tables::new(bank);
    let whole = weights.len() - weights.len() % len;
    let mut batches: Vec<Batch<L>> = Vec::with_capacity(weights.len().div_ceil(len * L::N) + 1);
    let mut first = 0;
    while first < weights.len() {
        let end = if first < whole { whole.min(first + len * L::N) } else { weights.len() };
        let part = importance.map(|importance| &importance[first..end]);
        let mut batch = Batch::new(&weights[first..end], factor, part, if first < whole { len } else { end - first });
        batch.draw::<WEIGHTED>(&tables);
        batches.push(batch);
        first = end;
    }
    let row = Row { bank, tables: &tables, batches: &batches };
    let fits = |scale: f32| storable(scale * size);

    let mut tried = [(f64::INFINITY, start); TRIED];
    let mut scale = start * FIRST;
    for _ in 0..TRIALS {
        if fits(scale) {
            let mut candidate = (row.promise(scale), scale);
            for place in &mut tried {
                if candidate.0 < place.0 {
                    std::mem::swap(&mut candidate, place);
                }
            }
        }
        scale *= RATIO;
    }
    let mut best = row.plain::<WEIGHTED>(start);
    best.error *= CLEARLY_LESS;
    for (_, scale) in tried {
        let found = row.choose::<WEIGHTED>(scale);
        if found.error < best.error {
            best = found;
        }
    }
    let scale = row.refit(&best, weights, factor, importance, len);
    if fits(scale) {
        let found = row.choose::<WEIGHTED>(scale);
        if found.error < best.error {
            best = found;
        }
    }
    Ok(best.bytes.iter().map(|&byte| Params::nested(bank, byte, best.scale * size)).collect())
}
