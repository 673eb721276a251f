//! What a matrix loses at every rate, from a sample of its rows: before anything is written, and in a fraction of the time.
//!
//! The sample is quantized at a few steps as the whole would be. What a stream takes besides its codes is scaled: deviations
//! of rows and columns are counted in the sample, and every row of the whole has one. Between the steps error falls by about
//! the same factor per bit, so its logarithm is interpolated.

use super::rate::{LOG_STATES, exp2};
use super::{Choice, Matrix, Quantized, step_of};
use crate::coding::context::log2;
use crate::coding::{Trellis, head};
use crate::error::Result;
use crate::fit::Rate;

/// Weights of a sample, about.
pub const SAMPLE: usize = 1 << 16;

/// Rates near which a sample is quantized: with a trellis, and, where too much lies beyond its codes, without one. The last
/// lies beyond the greatest rate, so that all of these are known.
const RATES: [(f64, bool); 8] =
    [(1.5, true), (2.75, true), (4.25, true), (5.5, true), (6.6, true), (7.2, false), (8.0, false), (9.0, false)];

/// Squared error over bits of a matrix.
#[derive(Debug, Clone)]
pub struct Curve {
    weights: f64,
    power: f64,
    /// Bits per weight, rising, and the logarithm of squared error over power, falling.
    points: Vec<(f64, f64)>,
    /// Bits per weight, rising, and how many of the weights lie beyond the codes.
    beyond: Vec<(f64, f64)>,
}

impl Curve {
    /// The curve of a matrix of `rows` rows, of which `sample` has some, whole ones of `cols` finite weights.
    ///
    /// # Errors
    /// None that finite weights give.
    ///
    /// # Panics
    /// When the sample does not consist of whole rows.
    pub fn of_sample(sample: &[f32], rows: usize, cols: usize) -> Result<Self> {
        let weights = (rows * cols) as f64;
        let part: f64 = sample.iter().map(|&w| f64::from(w) * f64::from(w)).sum();
        let power = if sample.is_empty() { 0.0 } else { part * (weights / sample.len() as f64) };
        let mut curve = Self { weights, power, points: Vec::new(), beyond: Vec::new() };
        if part == 0.0 {
            return Ok(curve);
        }
        let here = sample.len() / cols;
        let matrix = Matrix::new(sample, here, cols, None);
        let deviation = log2((part / sample.len() as f64).sqrt());
        let at_rate = |(rate, trellis): (f64, bool)| {
            let choice = Choice::of(Trellis::new(LOG_STATES).filter(|_| trellis));
            let exponent = deviation + 2.05 - f64::from(u8::from(trellis)) - rate;
            #[expect(clippy::cast_possible_truncation, reason = "a step is a single")]
            let step = (exp2(exponent) as f32).clamp(f32::MIN_POSITIVE, f32::MAX / 128.0);
            step_of(&matrix, step, choice)
        };
        for tried in RATES.into_iter().map(at_rate) {
            let tried = tried?;
            let bits = whole_bits(&tried, here, cols, rows)?;
            curve.beyond.push((bits, tried.outliers.len() as f64 / sample.len() as f64));
            if tried.squared_error > 0.0 {
                curve.points.push((bits, log2(tried.squared_error / part)));
            }
        }
        // More bits that lose no less are never taken.
        curve.points.sort_by(|a, b| a.0.total_cmp(&b.0));
        curve.beyond.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut least = f64::INFINITY;
        curve.points.retain(|&(_, loss)| {
            let less = loss < least;
            least = least.min(loss);
            less
        });
        Ok(curve)
    }

    /// Weights of the whole matrix.
    #[must_use]
    pub fn weights(&self) -> f64 {
        self.weights
    }

    /// Sum of their squares, as far as the sample tells.
    #[must_use]
    pub fn power(&self) -> f64 {
        self.power
    }

    /// Bits beyond which codes gain nothing.
    #[must_use]
    pub fn most_bits(&self) -> f64 {
        self.points.last().map_or(0.0, |(bits, _)| *bits)
    }

    /// The same as a rate, where it is one.
    #[must_use]
    pub fn most_rate(&self) -> Option<Rate> {
        Rate::from_bits(self.most_bits().min(Rate::MOST.bits())).ok()
    }

    /// About how many weights lie beyond the codes at a number of bits per weight.
    #[must_use]
    pub fn outliers(&self, bits: f64) -> u64 {
        let next = self.beyond.partition_point(|&(at, _)| at <= bits);
        let part = match (next.checked_sub(1).map(|last| self.beyond[last]), self.beyond.get(next)) {
            (Some((b0, n0)), Some(&(b1, n1))) => n0 + (n1 - n0) * ((bits - b0) / (b1 - b0)),
            (Some((_, part)), None) | (None, Some(&(_, part))) => part,
            (None, None) => 0.0,
        };
        (part * self.weights) as u64
    }

    /// Squared error at a number of bits per weight.
    #[must_use]
    pub fn noise(&self, bits: f64) -> f64 {
        let loss = match self.points[..] {
            [] => return 0.0,
            // Below the first step six decibels per bit, as ever; beyond the last one nothing is gained.
            [(first, loss), ..] if bits < first => (loss + 2.0 * (first - bits)).min(0.0),
            [.., (last, loss)] if bits >= last => loss,
            _ => {
                let next = self.points.partition_point(|&(at, _)| at <= bits);
                let ((b0, l0), (b1, l1)) = (self.points[next - 1], self.points[next]);
                l0 + (l1 - l0) * ((bits - b0) / (b1 - b0))
            }
        };
        self.power * exp2(loss)
    }

    /// The least bits per weight whose squared error is at most `noise`; infinite where none are enough.
    #[must_use]
    pub fn bits(&self, noise: f64) -> f64 {
        if self.points.is_empty() || noise >= self.power {
            return 0.0;
        }
        let wanted = log2(noise / self.power);
        match self.points[..] {
            [(first, loss), ..] if wanted > loss => (first - (wanted - loss) / 2.0).max(0.0),
            [.., (_, loss)] if wanted < loss => f64::INFINITY,
            _ => {
                let next = self.points.partition_point(|&(_, loss)| loss > wanted);
                if next == 0 {
                    return self.points[0].0;
                }
                let ((b0, l0), (b1, l1)) = (self.points[next - 1], self.points[next]);
                b0 + (b1 - b0) * ((wanted - l0) / (l1 - l0))
            }
        }
    }
}

/// Bits per weight of the whole matrix, given those of a sample of its rows.
fn whole_bits(sample: &Quantized, here: usize, cols: usize, rows: usize) -> Result<f64> {
    let (_, spans) = head::read(&sample.stream, here, cols)?;
    let start = spans.first().map_or(sample.stream.len(), |span| span.at) as f64;
    let ends: usize = spans.iter().map(|span| 4 * span.lanes()).sum();
    let codes = sample.stream.len() as f64 - start - ends as f64;
    let blocks = rows.div_ceil(head::rows_per_block(cols));
    let index = 8.0 * spans.len() as f64;
    let deviations = (start - index) * ((rows + cols) as f64 / (here + cols) as f64);
    let ends = blocks * 4 * head::LANES.min(rows);
    let scales = sample.scales_stream.len() as f64 * if sample.stretched > 0 { rows as f64 / here as f64 } else { 1.0 };
    let bytes = codes * (rows as f64 / here as f64) + deviations + (8 * blocks + ends) as f64 + scales;
    let outliers = sample.outlier_bytes() as f64 * (rows as f64 / here as f64);
    Ok(8.0 * (bytes + outliers) / (rows * cols) as f64)
}

#[cfg(test)]
mod tests {
    use super::Curve;

    fn matrix(rows: usize, cols: usize) -> Vec<f32> {
        let mut state = 7u64;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        // Sums of four are near enough to a Gaussian; columns differ in deviation.
        (0..rows * cols).map(|i| (0..4).map(|_| uniform()).sum::<f32>() * (1.0 + (i % cols % 3) as f32)).collect()
    }

    #[test]
    fn a_sample_tells_what_the_whole_loses() {
        let (rows, cols) = (384, 256);
        let weights = matrix(rows, cols);
        let curve = Curve::of_sample(&weights[..64 * cols], rows, cols).unwrap();
        for bits in [2.5, 3.5, 4.5, 6.0, 8.0] {
            let real = crate::fit::entropy::quantize(&weights, rows, cols, bits, None).unwrap();
            let ratio = curve.noise(real.bits_per_weight()) / real.squared_error;
            assert!((0.93..1.07).contains(&ratio), "{bits} bits: {ratio} of the error");
            let outliers = curve.outliers(real.bits_per_weight()) as f64 / (rows * cols) as f64;
            let found = real.outliers.len() as f64 / (rows * cols) as f64;
            assert!((outliers - found).abs() < 0.005, "{bits} bits: {outliers} of the weights, {found} are beyond");
            let back = curve.bits(curve.noise(bits));
            assert!((back - bits).abs() < 1e-9, "{back} is not {bits}");
        }
        assert_eq!(curve.bits(curve.power()), 0.0);
        assert_eq!(curve.bits(0.0), f64::INFINITY);
        let nothing = Curve::of_sample(&[0.0; 512], 9, 256).unwrap();
        assert_eq!((nothing.noise(3.0), nothing.bits(1e-9)), (0.0, 0.0));
    }
}
