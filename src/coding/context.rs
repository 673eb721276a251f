//! Which contexts a matrix gets: deviations of rows and columns, first context and shape.
//!
//! The deviations of rows and columns are a product model. Its fit needs only the sums of magnitudes per row and
//! column: a row gets the deviation at which the sum expected of its codes, given the columns, is the sum that it has, and so
//! in turn. Sums are integers, so no order of addition shows. Shape and first context are then those of the fewest
//! bits, counted on the histograms of the contexts.

#![expect(
    clippy::cast_possible_truncation,
    reason = "levels, contexts and lengths are small, and prices are rounded on purpose"
)]

use std::sync::OnceLock;

use rayon::prelude::*;

use super::head::{Contexts, LANES, deviations};
use super::table::{
    FINE, LEAST_BASE, LOG_TOTAL, MOST_BASE, MOST_CONTEXTS, Model, PER_OCTAVE, SHAPES, TOTAL, Table, half_mass, power,
};
use super::trellis::Trellis;

/// Fine steps in a context.
const STEP: i32 = FINE / PER_OCTAVE;
/// Deviations that the fit knows, in 1/64 octave above the least one.
const KNOWN: usize = (MOST_BASE - LEAST_BASE) as usize;
/// Below this deviation, in contexts above the least one, contexts do not differ any more.
const FLAT: i32 = 2 * PER_OCTAVE;
/// The shape that the product model assumes.
const ASSUMED: u8 = 5;

/// Logarithm to base 2, by a series in a fixed order: the bits do not depend on a library.
pub(crate) fn log2(x: f64) -> f64 {
    let bits = x.to_bits();
    let exponent = (bits >> 52) as i32 - 1023;
    let mantissa = f64::from_bits(bits & ((1 << 52) - 1) | 1023 << 52);
    let t = (mantissa - 1.0) / (mantissa + 1.0);
    let (square, mut term, mut sum) = (t * t, t, 0.0);
    for i in 0..16 {
        sum += term / f64::from(2 * i + 1);
        term *= square;
    }
    f64::from(exponent) + sum * (2.0 * std::f64::consts::LOG2_E)
}

/// The bits that a code of each frequency takes; that of a code without one is far above any other.
pub(crate) fn lengths() -> &'static [f32] {
    static LENGTHS: OnceLock<Vec<f32>> = OnceLock::new();
    LENGTHS.get_or_init(|| {
        let length = |f: u32| f64::from(LOG_TOTAL) - log2(f64::from(f));
        std::iter::once(1e6).chain((1..=TOTAL).map(|f| length(f) as f32)).collect()
    })
}

/// Bits of an escaped code beyond its escape.
pub(crate) const ESCAPED: f32 = 8.0;

/// Mean magnitude of levels by deviation, in 1/64 octave.
fn magnitudes() -> &'static [f64] {
    static MAGNITUDES: OnceLock<Vec<f64>> = OnceLock::new();
    MAGNITUDES.get_or_init(|| {
        let nu = SHAPES[usize::from(ASSUMED)];
        let mean = |i: usize| {
            let sigma = power(LEAST_BASE + i as i32);
            let beyond = |level: i32| 2.0 * (0.5 - half_mass(nu, (f64::from(level) + 0.5) / sigma));
            (0..127).map(beyond).take_while(|&mass| mass > 1e-7).sum()
        };
        (0..KNOWN).map(mean).collect()
    })
}

/// Sums of magnitudes per row and per column.
fn sums(codes: &[u8], cols: usize) -> (Vec<u64>, Vec<u64>) {
    let chunk = LANES * cols;
    let parts: Vec<(Vec<u64>, Vec<u64>)> = codes
        .par_chunks(chunk)
        .map(|codes| {
            let mut columns = vec![0u16; cols];
            let rows = codes.chunks_exact(cols).map(|row| {
                let mut sum = 0u64;
                for (piece, columns) in row.chunks(1 << 16).zip(columns.chunks_mut(1 << 16)) {
                    let mut part = 0u32;
                    for (&code, column) in piece.iter().zip(columns) {
                        let magnitude = code.abs_diff(128);
                        part += u32::from(magnitude);
                        *column += u16::from(magnitude);
                    }
                    sum += u64::from(part);
                }
                sum
            });
            (rows.collect(), columns.into_iter().map(u64::from).collect())
        })
        .collect();
    let mut rows = Vec::new();
    let mut columns = vec![0u64; cols];
    for (part, sums) in parts {
        rows.extend(part);
        for (column, sum) in columns.iter_mut().zip(sums) {
            *column += sum;
        }
    }
    (rows, columns)
}

/// For each sum of `count` magnitudes, the context above `center` that expects it, given the contexts of the other side.
fn solve(sums: &[u64], others: &[i8], grid: &[f64], center: i32) -> Vec<i8> {
    let mut histogram = [0u32; 256];
    for &other in others {
        histogram[(i32::from(other) + 128) as usize] += 1;
    }
    let top = grid.len() as i32 - 1;
    let expected: Vec<f64> = (0..=top)
        .map(|x| {
            let term = |(i, &n): (usize, &u32)| f64::from(n) * grid[(x + i as i32 - 128).clamp(0, top) as usize];
            histogram.iter().enumerate().filter(|(_, n)| **n != 0).map(term).sum()
        })
        .collect();
    // The usual context is cheap to say: another one has to save more than it costs.
    let dead = (0.5 + 140.0 / others.len().max(1) as f64).min(1.0);
    let place = |&sum: &u64| {
        let sum = sum as f64;
        let above = expected.partition_point(|&e| e <= sum).clamp(1, expected.len() - 1);
        let (low, high) = (expected[above - 1], expected[above]);
        let part = if high > low { ((sum - low) / (high - low)).clamp(0.0, 1.0) } else { 0.0 };
        let x = f64::from(above as i32 - 1 - center) + part;
        let x = if x.abs() <= dead { 0.0 } else { (x + 0.5).floor() };
        x.clamp(-127.0, 127.0) as i8
    };
    sums.iter().map(place).collect()
}

/// How often each code stands in each context, as its table is asked: by quantizer, context and code.
pub(crate) fn count(contexts: &Contexts, codes: &[u8], cols: usize) -> Vec<u64> {
    let model = &contexts.model;
    let number = usize::from(model.contexts);
    let size = model.quantizers() * number * 256;
    let chunk = head_chunk(cols);
    let one = |(i, codes): (usize, &[u8])| {
        let mut counts = vec![0u32; size];
        for (r, row) in codes.chunks_exact(cols).enumerate() {
            let mut state = 0;
            let base = i32::from(contexts.center) + i32::from(contexts.rows[i * (chunk / cols) + r]);
            let top = i32::from(model.contexts) - 1;
            for (&code, &col) in row.iter().zip(&contexts.cols) {
                let context = (base + i32::from(col)).clamp(0, top) as usize;
                counts[(usize::from(state & 1) * number + context) << 8 | usize::from(code)] += 1;
                if let Some(trellis) = model.trellis {
                    state = trellis.next(state, code);
                }
            }
        }
        counts
    };
    let parts: Vec<Vec<u32>> = codes.par_chunks(chunk).enumerate().map(one).collect();
    let mut counts = vec![0u64; size];
    for part in parts {
        for (count, n) in counts.iter_mut().zip(part) {
            *count += u64::from(n);
        }
    }
    counts
}

fn head_chunk(cols: usize) -> usize {
    super::head::rows_per_block(cols) * cols
}

/// Bits of the codes of these histograms under a model.
pub(crate) fn bits(model: &Model, counts: &[u64]) -> f64 {
    let number = usize::from(model.contexts);
    let mut bits = 0.0;
    for (i, counts) in counts.chunks_exact(256).enumerate() {
        if counts.iter().any(|&n| n != 0) {
            bits += table_bits(&model.table(i / number, i % number), model.trellis.is_some(), i >= number, counts);
        }
    }
    bits
}

fn table_bits(table: &Table, trellis: bool, odd: bool, counts: &[u64]) -> f64 {
    let lengths = lengths();
    let mut bits = 0.0;
    for (code, &n) in counts.iter().enumerate().filter(|(_, n)| **n != 0) {
        let symbol = table.symbol(code as u8, trellis, odd);
        let escaped = if usize::from(symbol) == code { 0.0 } else { ESCAPED };
        bits += n as f64 * f64::from(lengths[usize::from(table.freq[usize::from(symbol)])] + escaped);
    }
    bits
}

/// The model of the fewest bits near `model`, in shape and first context.
pub(crate) fn refine(mut model: Model, counts: &[u64]) -> Model {
    let mut best = bits(&model, counts);
    let attempt = |model: &mut Model, best: &mut f64, shape: i32, base: i32| {
        let (Ok(shape), Ok(base)) = (u8::try_from(shape), i16::try_from(base)) else { return false };
        if usize::from(shape) >= SHAPES.len() || !(LEAST_BASE..=MOST_BASE).contains(&i32::from(base)) {
            return false;
        }
        let other = Model { shape, base, ..*model };
        let bits = bits(&other, counts);
        let better = bits < *best;
        if better {
            (*model, *best) = (other, bits);
        }
        better
    };
    // With lighter tails the same mean magnitude is a larger deviation.
    const LARGER: [i32; 10] = [-44, -18, -10, -6, -2, 0, 2, 3, 5, 6];
    for direction in [1, -1] {
        loop {
            let (shape, base) = (i32::from(model.shape), i32::from(model.base));
            let next = shape + direction;
            if !(0..10).contains(&next) {
                break;
            }
            let moved = base + LARGER[next as usize] - LARGER[shape as usize];
            if !attempt(&mut model, &mut best, next, moved) {
                break;
            }
        }
    }
    for step in [3, 1] {
        for direction in [step, -step] {
            loop {
                let (shape, base) = (i32::from(model.shape), i32::from(model.base));
                if !attempt(&mut model, &mut best, shape, base + direction) {
                    break;
                }
            }
        }
    }
    model
}

/// The product model of rows and columns, each as far as it is asked for.
fn product(codes: &[u8], rows: usize, cols: usize, trellis: Option<Trellis>, sides: [bool; 2]) -> Contexts {
    let (row_sums, col_sums) = sums(codes, cols);
    let mean = row_sums.iter().sum::<u64>() as f64 / codes.len() as f64;
    let known = magnitudes();
    let fine = known.partition_point(|&m| m < mean).min(KNOWN - 1) as i32;
    let (phase, center) = (fine % STEP, fine / STEP);
    let grid: Vec<f64> = known.iter().skip(phase as usize).step_by(STEP as usize).copied().collect();
    let mut row = vec![0i8; rows];
    let mut col = vec![0i8; cols];
    for _ in 0..3 {
        if sides[0] {
            row = solve(&row_sums, &col, &grid, center);
        }
        if sides[1] {
            col = solve(&col_sums, &row, &grid, center);
        }
    }
    let range = |values: &[i8]| {
        let ends = values.iter().fold((i8::MAX, i8::MIN), |(low, high), &v| (low.min(v), high.max(v)));
        (i32::from(ends.0), i32::from(ends.1))
    };
    let ((low_row, high_row), (low_col, high_col)) = (range(&row), range(&col));
    let top = grid.len() as i32 - 1;
    let high = (center + high_row + high_col).clamp(0, top).max(FLAT);
    let low = (center + low_row + low_col).clamp(FLAT, high).max(high - MOST_CONTEXTS as i32 + 1);
    let model = Model {
        shape: ASSUMED,
        base: (LEAST_BASE + phase + low * STEP) as i16,
        contexts: (high - low + 1) as u8,
        trellis,
        ends: false,
    };
    // A centre outside the contexts is moved inside, and the rows with it.
    let inside = (center - low).clamp(0, high - low);
    let moved = center - low - inside;
    if moved != 0 {
        for value in &mut row {
            *value = (i32::from(*value) + moved).clamp(-127, 127) as i8;
        }
    }
    Contexts { model, center: inside as u8, rows: row, cols: col }
}

/// Up to this size of a matrix it is tried whether deviations are worth their bytes; beyond, they cost too little to ask.
const SMALL: usize = 1 << 18;

/// Of how many codes more than one has to be at an end for the last levels to be tried for all that was clipped to them.
const ENDS: u64 = 4096;

/// The contexts of a matrix of codes.
pub(crate) fn fit(codes: &[u8], rows: usize, cols: usize, trellis: Option<Trellis>) -> Contexts {
    let refined = |mut contexts: Contexts| {
        let counts = count(&contexts, codes, cols);
        let plain = refine(contexts.model, &counts);
        let at_ends: u64 = counts.chunks_exact(256).flat_map(|n| n[1..=5].iter().chain(&n[251..])).sum();
        contexts.model = plain;
        if at_ends > codes.len() as u64 / ENDS {
            let ends = refine(Model { ends: true, ..plain }, &counts);
            if bits(&ends, &counts) < bits(&plain, &counts) {
                contexts.model = ends;
            }
        }
        let size = bits(&contexts.model, &counts) + 8.0 * deviations(&contexts).1.len() as f64;
        (size, contexts)
    };
    let whole = product(codes, rows, cols, trellis, [true, true]);
    let vary = deviations(&whole).0;
    let mut best = refined(whole);
    if codes.len() <= SMALL {
        for sides in [[true, false], [false, true], [false, false]] {
            if (0..2).any(|i| vary[i] && !sides[i]) && (0..2).all(|i| vary[i] || !sides[i]) {
                let other = refined(product(codes, rows, cols, trellis, sides));
                if other.0 < best.0 {
                    best = other;
                }
            }
        }
    }
    best.1
}
