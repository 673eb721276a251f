//! Distributions: how often each code is expected in a context, as integers that every machine computes alike.
//!
//! A context is a deviation σ, in steps. Its codes follow Student's t with an even number of degrees of freedom: then
//! the distribution function is algebraic, so sums, products, quotients and one square root in a stated order give
//! the same bits everywhere, and from heavy tails (2) to nearly a Gaussian (128) one byte says which.

#![expect(clippy::cast_possible_truncation, reason = "levels, contexts and frequencies are small by construction")]

use super::trellis::Trellis;

/// Frequencies of a context sum to `2^LOG_TOTAL`.
pub(crate) const LOG_TOTAL: u32 = 12;
pub(crate) const TOTAL: u32 = 1 << LOG_TOTAL;
/// Contexts are 1/8 of an octave apart; the first one lies on a grid of 1/64.
pub(crate) const PER_OCTAVE: i32 = 8;
pub(crate) const FINE: i32 = 64;
/// The most contexts of a matrix.
pub(crate) const MOST_CONTEXTS: usize = 96;
/// The first context lies from `2^-6` to `2^7` steps.
pub(crate) const LEAST_BASE: i32 = -6 * FINE;
pub(crate) const MOST_BASE: i32 = 7 * FINE;
/// Degrees of freedom by shape.
pub(crate) const SHAPES: [u32; 10] = [2, 4, 6, 8, 12, 16, 24, 32, 64, 128];
/// Codes rarer than this in the model share an escape.
const RARE: f64 = 1.0 / 8192.0;
/// Up to this deviation odd states may take the level zero, which then has half the room of its neighbours.
const ZERO_BELOW: f64 = 1.5;

/// What decides the frequencies of all contexts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Model {
    /// Index into [`SHAPES`].
    pub(crate) shape: u8,
    /// Logarithm of the first context's deviation, in 1/64 octave.
    pub(crate) base: i16,
    /// Number of contexts.
    pub(crate) contexts: u8,
    /// The machine that the codes follow.
    pub(crate) trellis: Option<Trellis>,
    /// Whether the last levels stand for all that lies beyond them too.
    pub(crate) ends: bool,
}

/// `2^(exponent / 64)`, by products of constants in a fixed order.
pub(crate) fn power(exponent: i32) -> f64 {
    const ROOTS: [f64; 6] = [
        1.010_889_286_051_700_5,
        1.021_897_148_654_116_7,
        1.044_273_782_427_413_8,
        1.090_507_732_665_257_7,
        1.189_207_115_002_721,
        std::f64::consts::SQRT_2,
    ];
    let mut value = 1.0;
    for (bit, root) in ROOTS.iter().enumerate() {
        if exponent >> bit & 1 == 1 {
            value *= root;
        }
    }
    let octave = exponent >> 6;
    for _ in 0..octave.unsigned_abs() {
        value *= if octave < 0 { 0.5 } else { 2.0 };
    }
    value
}

/// `(2 i - 1) / (2 i)`, from i = 1 on.
const ODD_OVER_EVEN: [f64; 63] = {
    let mut quotients = [0.0; 63];
    let mut i = 0;
    while i < quotients.len() {
        quotients[i] = (2 * i + 1) as f64 / (2 * i + 2) as f64;
        i += 1;
    }
    quotients
};

/// The probability below `x >= 0` minus one half, for Student's t of even `nu`.
pub(crate) fn half_mass(nu: u32, x: f64) -> f64 {
    let square = x * x;
    let n = f64::from(nu);
    let ratio = n / (n + square);
    let (mut term, mut sum) = (1.0, 1.0);
    for quotient in &ODD_OVER_EVEN[..(nu / 2 - 1) as usize] {
        term *= ratio * quotient;
        // Terms fall, so none of those behind one that changes nothing would.
        if sum + term == sum {
            break;
        }
        sum += term;
    }
    0.5 * (x / (n + square).sqrt()) * sum
}

/// Frequencies of one context.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    /// By code; zero where the code needs the escape.
    pub(crate) freq: [u16; 256],
    /// Sum of the frequencies before, by code.
    pub(crate) start: [u16; 256],
}

impl Table {
    /// The codes of the alphabet and the upper end of each one's room, from `upper(i)`.
    pub(super) fn build(escapes: &[u8], codes: &[u8], ends: &[f64], outside: f64) -> Self {
        let mut table = Self { freq: [0; 256], start: [0; 256] };
        let symbols = escapes.len() + codes.len();
        let mut before = 0u32;
        let mut i = 0;
        let mut put = |code: u8, end: f64| {
            i += 1;
            let room = TOTAL - u32::try_from(symbols - i).unwrap_or(0);
            let end = ((end * f64::from(TOTAL) + 0.5).floor() as u32).min(room).max(before + 1);
            table.freq[usize::from(code)] = (end - before) as u16;
            table.start[usize::from(code)] = before as u16;
            before = end;
        };
        for (j, &code) in escapes.iter().enumerate() {
            put(code, outside * (j + 1) as f64 / escapes.len() as f64);
        }
        for (&code, &end) in codes.iter().zip(ends) {
            put(code, end);
        }
        table
    }

    /// The code that stands for `code` in even or odd states: itself, or its escape.
    pub(crate) fn symbol(&self, code: u8, trellis: bool, odd: bool) -> u8 {
        let plain = self.freq[usize::from(code)] != 0 && code >= escape_codes(trellis);
        match (plain, trellis) {
            (true, _) => code,
            (false, false) => 0,
            // Level zero is allowed everywhere, and moves the machine as residue 1 does.
            (false, true) if odd && code == ZERO => 1,
            (false, true) => code & 3,
        }
    }
}

/// The code of level zero.
pub(crate) const ZERO: u8 = 128;

/// Codes below this are escapes.
pub(crate) fn escape_codes(trellis: bool) -> u8 {
    if trellis { 4 } else { 1 }
}

/// Whether an escape may stand for a code: it moves the trellis as the code does.
pub(crate) fn escapes(escape: u8, code: u8, trellis: bool) -> bool {
    code != 0 && (!trellis || code & 3 == escape || (escape == 1 && code == ZERO))
}

impl Model {
    /// Which quantizers there are: one, or that of even and that of odd states.
    pub(crate) fn quantizers(&self) -> usize {
        if self.trellis.is_some() { 2 } else { 1 }
    }

    /// The deviation of a context, in steps.
    pub(crate) fn deviation(&self, context: usize) -> f64 {
        power(i32::from(self.base) + context as i32 * (FINE / PER_OCTAVE))
    }

    /// The frequencies of a context in even (0) or odd (1) states.
    pub(crate) fn table(&self, quantizer: usize, context: usize) -> Table {
        let nu = SHAPES[usize::from(self.shape)];
        let sigma = self.deviation(context);
        // Levels `first, first + spacing, …`, each with room up to half way to the next.
        let (first, spacing, most, escapes): (i32, i32, i32, &[u8]) = match (&self.trellis, quantizer) {
            (None, _) => (0, 1, 127, &[0]),
            (Some(_), 0) => (0, 2, 124, &[0, 2]),
            (Some(_), _) => (1, 2, 123, &[1, 3]),
        };
        let half = 0.5 * f64::from(spacing);
        // Half masses at the upper ends of levels at or above zero.
        let mut levels = Vec::with_capacity(128);
        let mut masses = Vec::with_capacity(128);
        let mut level = first;
        if first == 1 && sigma < ZERO_BELOW {
            levels.push(0);
            masses.push(half_mass(nu, 0.5 / sigma));
        }
        let mut below = masses.last().copied().unwrap_or(0.0);
        while level <= most {
            let mass = half_mass(nu, (f64::from(level) + half) / sigma);
            if levels.len() > 1 && mass - below < RARE {
                break;
            }
            levels.push(level);
            masses.push(mass);
            below = mass;
            level += spacing;
        }
        // What lies beyond was clipped to the last level, if that is here.
        if self.ends && level > most {
            masses.pop();
            masses.push(0.5);
            below = 0.5;
        }
        let inside = below;
        let outside = 1.0 - 2.0 * inside;
        // From the lowest level up; the end of a negative level is the mirrored end of the next smaller one.
        let mut codes = Vec::with_capacity(256);
        let mut ends = Vec::with_capacity(256);
        for (i, &level) in levels.iter().enumerate().rev() {
            if level != 0 {
                codes.push((128 - level) as u8);
                ends.push(outside + (inside - if i == 0 { 0.0 } else { masses[i - 1] }));
            }
        }
        for (&level, &mass) in levels.iter().zip(&masses) {
            codes.push((128 + level) as u8);
            ends.push(outside + (inside + mass));
        }
        Table::build(escapes, &codes, &ends, outside)
    }

    /// The tables of all contexts, those of even states first.
    pub(crate) fn tables(&self) -> Vec<Table> {
        let contexts = usize::from(self.contexts);
        (0..self.quantizers() * contexts).map(|i| self.table(i / contexts, i % contexts)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_sum_to_the_total_and_every_context_has_an_escape() {
        for trellis in [None, Trellis::new(3)] {
            for shape in 0..SHAPES.len() {
                for (base, ends) in (LEAST_BASE..=MOST_BASE).step_by(37).zip([false, true].into_iter().cycle()) {
                    let (shape, base) = (shape as u8, base as i16);
                    let model = Model { shape, base, contexts: 1, trellis, ends };
                    for (q, table) in model.tables().iter().enumerate() {
                        let sum: u32 = table.freq.iter().map(|&f| u32::from(f)).sum();
                        assert_eq!(sum, TOTAL, "{model:?}");
                        assert!(table.freq.iter().all(|&f| u32::from(f) < TOTAL));
                        for code in 0..=255u8 {
                            let symbol = table.symbol(code, trellis.is_some(), q == 1);
                            let allowed = trellis.is_none() || usize::from(code & 1) == q || code == ZERO;
                            assert!(!allowed || table.freq[usize::from(symbol)] > 0, "{model:?} {q} {code}");
                        }
                    }
                }
            }
        }
    }
}
