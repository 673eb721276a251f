//! The levels of rows of weights that are cheapest in error and bits together, along all paths of a trellis.
//!
//! For each row, `Σ weight · (x - level)² + price` is minimised over all paths by dynamic programming (Viterbi), where
//! the price of a level comes from a table per context. Sixteen rows advance together; every lane does what a single
//! row would, in single precision without contraction, so the choice is the same on every machine.

#![expect(clippy::cast_possible_truncation, reason = "levels and states fit a byte, targets are clamped first")]
#![cfg_attr(
    target_arch = "x86_64",
    expect(unsafe_code, reason = "functions that enable an instruction set are unsafe to call without it")
)]

use crate::coding::Trellis;

/// Rows that advance together.
pub(super) const LANES: usize = 16;
/// Far above any sum of costs, and still far from infinity.
const NEVER: f32 = 1e30;
/// After as many columns, what all paths have in common is taken off.
const REBASE: usize = 64;

type F = [f32; LANES];
type I = [i32; LANES];

/// The price of each code in one context. A code is only allowed in states of its parity; at index 0, which is no
/// level, stands the price of level zero in odd states.
pub(super) type Prices = [f32; 256];

/// What a search needs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Search<'a> {
    /// Prices per context.
    pub(super) prices: &'a [Prices],
    /// Contexts of the columns, relative to those of rows.
    pub(super) columns: &'a [i8],
    /// Weight of a squared error per column.
    pub(super) importance: &'a [f32],
    /// The machine.
    pub(super) trellis: Option<Trellis>,
}

/// Sixteen rows; lanes without a row of their own repeat another.
#[derive(Debug)]
pub(super) struct Set<'a> {
    /// Weights, in steps: by column, then lane.
    pub(super) targets: &'a [F],
    /// Contexts of the rows.
    pub(super) rows: I,
    /// What a squared error in steps of the row weighs.
    pub(super) weights: F,
}

/// The way back through one column: for each state which of its two predecessors won, and the level per residue.
#[derive(Debug, Default, Clone)]
pub(super) struct Trace {
    choices: Vec<[u32; LANES]>,
    levels: Vec<[u32; LANES]>,
}

/// For every state the two states before it, and the residue (modulo 4) of the level between.
#[derive(Debug)]
struct Steps {
    before: [[(u8, u8); 2]; 256],
}

impl Steps {
    fn new(trellis: Trellis) -> Self {
        let mut before = [[(0, 0); 2]; 256];
        let mut filled = [0; 256];
        for state in 0..trellis.states() {
            let state = state as u8;
            for second in [0, 2] {
                let residue = state & 1 | second;
                let next = usize::from(trellis.next(state, residue));
                before[next][filled[next]] = (state, residue);
                filled[next] += 1;
            }
        }
        Self { before }
    }
}

/// The two levels of a residue around each target, with the cheaper one's cost.
#[inline(always)]
fn nearest(search: &Search<'_>, contexts: &I, x: &F, floor: &I, weight: &F, residue: i32) -> (F, I) {
    let mut low = [0i32; LANES];
    let mut high = [0i32; LANES];
    for l in 0..LANES {
        let below = floor[l] - ((floor[l] - residue) & 3);
        // The least and greatest level of this residue that is a code.
        let least = -128 + if residue == 0 { 4 } else { residue };
        let most = 124 + residue;
        low[l] = if below < least {
            least
        } else if below > most {
            most
        } else {
            below
        };
        high[l] = if below + 4 < least {
            least
        } else if below + 4 > most {
            most
        } else {
            below + 4
        };
    }
    let mut price_low = [0f32; LANES];
    let mut price_high = [0f32; LANES];
    for l in 0..LANES {
        let prices = &search.prices[contexts[l] as usize];
        price_low[l] = prices[usize::from((low[l] + 128) as u8)];
        price_high[l] = prices[usize::from((high[l] + 128) as u8)];
    }
    let mut cost = [0f32; LANES];
    let mut level = [0i32; LANES];
    for l in 0..LANES {
        let (d, e) = (x[l] - low[l] as f32, x[l] - high[l] as f32);
        let (a, b) = (d * d * weight[l] + price_low[l], e * e * weight[l] + price_high[l]);
        cost[l] = if b < a { b } else { a };
        level[l] = if b < a { high[l] } else { low[l] };
    }
    (cost, level)
}

/// Runs the search over one set and writes the codes of each lane into a row of `out`.
#[inline(always)]
fn run(search: &Search<'_>, set: &Set<'_>, trace: &mut Trace, out: &mut [&mut [u8]]) {
    let Some(trellis) = search.trellis else { return scalar(search, set, out) };
    let steps = Steps::new(trellis);
    let states = trellis.states();
    let words = states.div_ceil(32);
    let top = search.prices.len() as i32 - 1;
    trace.choices.clear();
    trace.levels.clear();
    let mut costs = [[NEVER; LANES]; 256];
    costs[0] = [0.0; LANES];
    let mut next = [[0f32; LANES]; 256];
    for (col, targets) in set.targets.iter().enumerate() {
        let mut x = [0f32; LANES];
        let mut floor = [0i32; LANES];
        let mut contexts = [0i32; LANES];
        let mut weight = [0f32; LANES];
        let (column, importance) = (i32::from(search.columns[col]), search.importance[col]);
        for l in 0..LANES {
            x[l] = targets[l];
            floor[l] = x[l].clamp(-200.0, 200.0).floor() as i32;
            contexts[l] = (set.rows[l] + column).clamp(0, top);
            weight[l] = set.weights[l] * importance;
        }
        let (c0, n0) = nearest(search, &contexts, &x, &floor, &weight, 0);
        let (mut c1, mut n1) = nearest(search, &contexts, &x, &floor, &weight, 1);
        let (c2, n2) = nearest(search, &contexts, &x, &floor, &weight, 2);
        let (c3, n3) = nearest(search, &contexts, &x, &floor, &weight, 3);
        let mut packed = [0u32; LANES];
        for l in 0..LANES {
            // Level zero in odd states moves the machine as residue 1 does.
            let zero = x[l] * x[l] * weight[l] + search.prices[contexts[l] as usize][0];
            n1[l] = if zero < c1[l] { 0 } else { n1[l] };
            c1[l] = if zero < c1[l] { zero } else { c1[l] };
        }
        for l in 0..LANES {
            let byte = [n0[l], n1[l], n2[l], n3[l]];
            packed[l] = (byte[0] & 255) as u32
                | ((byte[1] & 255) as u32) << 8
                | ((byte[2] & 255) as u32) << 16
                | ((byte[3] & 255) as u32) << 24;
        }
        trace.levels.push(packed);
        let costs_of = [c0, c1, c2, c3];
        for word in 0..words {
            let mut choice = [0u32; LANES];
            for bit in 0..states.min(32) {
                let to = word * 32 + bit;
                let [(from_a, residue_a), (from_b, residue_b)] = steps.before[to];
                let (a, b) = (&costs[usize::from(from_a)], &costs[usize::from(from_b)]);
                let (ra, rb) = (&costs_of[usize::from(residue_a & 3)], &costs_of[usize::from(residue_b & 3)]);
                let to = &mut next[to];
                for l in 0..LANES {
                    let (ca, cb) = (a[l] + ra[l], b[l] + rb[l]);
                    to[l] = if cb < ca { cb } else { ca };
                    choice[l] |= if cb < ca { 1u32 << bit } else { 0 };
                }
            }
            trace.choices.push(choice);
        }
        if col % REBASE == REBASE - 1 {
            let mut least = next[0];
            for costs in &next[1..states] {
                for l in 0..LANES {
                    least[l] = if costs[l] < least[l] { costs[l] } else { least[l] };
                }
            }
            for costs in &mut next[..states] {
                for l in 0..LANES {
                    costs[l] -= least[l];
                }
            }
        }
        costs[..states].copy_from_slice(&next[..states]);
    }
    for (lane, row) in out.iter_mut().enumerate() {
        let mut state = 0;
        for other in 1..states {
            if costs[other][lane] < costs[state][lane] {
                state = other;
            }
        }
        for (col, code) in row.iter_mut().enumerate().rev() {
            let choice = trace.choices[col * words + state / 32][lane] >> (state % 32) & 1;
            let (before, residue) = steps.before[state][choice as usize];
            let level = trace.levels[col][lane] >> (8 * u32::from(residue)) & 255;
            *code = (level as u8).wrapping_add(128);
            state = usize::from(before);
        }
    }
}

/// Without a trellis every level is allowed, and weights are chosen alone.
#[inline(always)]
fn scalar(search: &Search<'_>, set: &Set<'_>, out: &mut [&mut [u8]]) {
    let top = search.prices.len() as i32 - 1;
    for (lane, row) in out.iter_mut().enumerate() {
        for (col, code) in row.iter_mut().enumerate() {
            let x = set.targets[col][lane];
            let weight = set.weights[lane] * search.importance[col];
            let prices = &search.prices[(set.rows[lane] + i32::from(search.columns[col])).clamp(0, top) as usize];
            let floor = x.clamp(-200.0, 200.0).floor() as i32;
            let mut best = (f32::INFINITY, 0);
            // The two levels around the weight, and the next one toward zero.
            for level in [floor, floor + 1, if floor < 0 { floor + 2 } else { floor - 1 }, 0] {
                let level = level.clamp(-127, 127);
                let error = x - level as f32;
                let cost = error * error * weight + prices[usize::from((level + 128) as u8)];
                if cost < best.0 {
                    best = (cost, level);
                }
            }
            *code = (best.1 + 128) as u8;
        }
    }
}

/// Runs the search with the best instructions of this machine.
pub(super) fn search(search: &Search<'_>, set: &Set<'_>, trace: &mut Trace, out: &mut [&mut [u8]]) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl") {
            // SAFETY: both features were detected on the line above.
            return unsafe { x86::avx512(search, set, trace, out) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the feature was detected on the line above.
            return unsafe { x86::avx2(search, set, trace, out) };
        }
    }
    run(search, set, trace, out);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Search, Set, Trace, run};

    #[target_feature(enable = "avx512f,avx512vl")]
    pub(super) fn avx512(search: &Search<'_>, set: &Set<'_>, trace: &mut Trace, out: &mut [&mut [u8]]) {
        run(search, set, trace, out);
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn avx2(search: &Search<'_>, set: &Set<'_>, trace: &mut Trace, out: &mut [&mut [u8]]) {
        run(search, set, trace, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Prices that rise with the level, not evenly.
    fn prices(scale: f32) -> Vec<Prices> {
        (0..3u8)
            .map(|context| {
                let mut prices = [0f32; 256];
                for (code, price) in prices.iter_mut().enumerate() {
                    let level = (code as f32 - 128.0).abs();
                    *price = scale * (1.0 + level * (1.5 + f32::from(context)) + (code % 7) as f32 / 8.0);
                }
                prices[0] = scale * 2.5;
                prices
            })
            .collect()
    }

    fn target(lane: usize, col: usize) -> f32 {
        ((lane * 37 + col * 101 + lane * col * 13) % 97) as f32 / 8.0 - 6.0
    }

    fn cost(search: &Search<'_>, set: &Set<'_>, lane: usize, col: usize, level: i32, odd: bool) -> f32 {
        let context = (set.rows[lane] + i32::from(search.columns[col])).clamp(0, search.prices.len() as i32 - 1);
        let index = if odd && level == 0 { 0 } else { (level + 128) as usize };
        let error = set.targets[col][lane] - level as f32;
        error * error * (set.weights[lane] * search.importance[col]) + search.prices[context as usize][index]
    }

    /// The least cost over all paths from a state on, by trying every one.
    fn exhaustive(search: &Search<'_>, set: &Set<'_>, lane: usize, col: usize, state: u8, reach: i32) -> f32 {
        if col == set.targets.len() {
            return 0.0;
        }
        let trellis = search.trellis.expect("a trellis");
        let floor = set.targets[col][lane].floor() as i32;
        let mut best = f32::INFINITY;
        for level in (floor - reach + 1..=floor + reach).chain([0]) {
            let odd = state & 1 == 1;
            if (level & 1 == 1) == odd || (odd && level == 0) {
                let next = trellis.next(state, (level + 128) as u8);
                let rest = exhaustive(search, set, lane, col + 1, next, reach);
                best = best.min(cost(search, set, lane, col, level, odd) + rest);
            }
        }
        best
    }

    #[test]
    fn no_path_is_cheaper_than_the_one_found() {
        const COLS: usize = 4;
        let importance = [1.0, 0.5, 2.0, 1.0];
        let targets: Vec<F> = (0..COLS).map(|col| std::array::from_fn(|lane| target(lane, col))).collect();
        let rows = std::array::from_fn(|lane| lane as i32 % 4);
        let weights = std::array::from_fn(|lane| 1.0 + lane as f32 / 8.0);
        // Without prices, farther levels are in the trial too: they never pay.
        for (scale, reach) in [(0.0, 6), (0.3, 4)] {
            let prices = prices(scale);
            for log_states in 2..=8 {
                let trellis = Trellis::new(log_states);
                let search = Search { prices: &prices, columns: &[0, -1, 1, 0], importance: &importance, trellis };
                let set = Set { targets: &targets, rows, weights };
                let mut codes = [0u8; LANES * COLS];
                let mut out: Vec<&mut [u8]> = codes.chunks_exact_mut(COLS).collect();
                super::search(&search, &set, &mut Trace::default(), &mut out);
                for (lane, codes) in codes.chunks_exact(COLS).enumerate() {
                    let (mut state, mut found) = (0u8, 0.0);
                    for (col, &code) in codes.iter().enumerate() {
                        let level = i32::from(code) - 128;
                        assert!(level & 1 == i32::from(state & 1) || level == 0, "the path is one");
                        found += cost(&search, &set, lane, col, level, state & 1 == 1);
                        state = trellis.expect("a trellis").next(state, code);
                    }
                    let best = exhaustive(&search, &set, lane, 0, 0, reach);
                    // Both sums have fewer than eight terms, in another order.
                    assert!(found <= best * (1.0 + 8.0 * f32::EPSILON), "{found} where {best} is possible");
                }
            }
        }
    }

    #[test]
    fn without_a_trellis_no_weight_costs_more_than_rounded() {
        let prices = prices(0.4);
        let importance = vec![1.0; 50];
        let columns = vec![0; 50];
        let targets: Vec<F> = (0..50).map(|col| std::array::from_fn(|lane| 1.7 * target(lane, col))).collect();
        let search = Search { prices: &prices, columns: &columns, importance: &importance, trellis: None };
        let set = Set { targets: &targets, rows: [1; LANES], weights: [1.0; LANES] };
        let mut codes = vec![0u8; LANES * 50];
        let mut out: Vec<&mut [u8]> = codes.chunks_exact_mut(50).collect();
        super::search(&search, &set, &mut Trace::default(), &mut out);
        for (i, &code) in codes.iter().enumerate() {
            let (lane, col) = (i / 50, i % 50);
            let rounded = targets[col][lane].round() as i32;
            let [found, plain] = [i32::from(code) - 128, rounded].map(|n| cost(&search, &set, lane, col, n, false));
            assert!(found <= plain, "{found} where rounding costs {plain}");
        }
    }

    #[test]
    fn every_instruction_set_finds_the_same_codes() {
        let prices = prices(0.3);
        let cols = 200;
        let (importance, columns) = (vec![1.25; cols], vec![1; cols]);
        let targets: Vec<F> = (0..cols).map(|col| std::array::from_fn(|lane| 3.1 * target(lane, col))).collect();
        for trellis in [None, Trellis::new(3), Trellis::new(6)] {
            let search = Search { prices: &prices, columns: &columns, importance: &importance, trellis };
            let set = Set { targets: &targets, rows: [0; LANES], weights: [1.0; LANES] };
            let codes = |f: fn(&Search<'_>, &Set<'_>, &mut Trace, &mut [&mut [u8]])| {
                let mut codes = vec![0u8; LANES * cols];
                let mut out: Vec<&mut [u8]> = codes.chunks_exact_mut(cols).collect();
                f(&search, &set, &mut Trace::default(), &mut out);
                codes
            };
            assert_eq!(codes(run), codes(super::search));
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") {
                // SAFETY: the feature was detected on the line above.
                assert_eq!(codes(run), codes(|a, b, c, d| unsafe { x86::avx2(a, b, c, d) }));
            }
        }
    }
}
