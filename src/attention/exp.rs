//! Powers of e, the same on every machine: a C library's are not, and no compiler computes several of them at once.

/// `1.5 * 2^23`: adding it rounds to the nearest integer, which is then in the low bits.
const ROUNDER: f32 = 12_582_912.0;

/// ln 2 as a sum of two numbers, the first with so few bits that small multiples of it are exact.
const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];

/// Below it results count as zero: they would be subnormal.
const LEAST: f32 = -87.0;

/// e to the power of `x`, which is not positive, within two units of the last place; zero below -87.
///
/// With n the integer nearest to `x / ln 2` and r the rest, e^x = 2^n e^r, and e^r is its Taylor polynomial of degree 7.
#[inline]
pub(super) fn exp(x: f32) -> f32 {
    let inside = if x > LEAST { x } else { LEAST };
    let shifted = inside * std::f32::consts::LOG2_E + ROUNDER;
    let n = shifted - ROUNDER;
    let r = inside - n * LN_2[0] - n * LN_2[1];
    let mut power = 1.0 / 5040.0;
    for factor in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        power = power * r + factor;
    }
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    if x > LEAST { power * scale } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::{LEAST, exp};

    #[test]
    fn powers_are_within_two_units_of_the_last_place() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert!(exp(LEAST) == 0.0 && exp(-1e9) == 0.0 && exp(f32::NEG_INFINITY) == 0.0);
        let mut bits = 1e-9f32.to_bits();
        while f32::from_bits(bits) < -LEAST {
            let x = -f32::from_bits(bits);
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got - want).abs() <= 2.0 * f64::from(f32::EPSILON) * want, "{x}: {got} is not {want}");
            bits += 4_001;
        }
    }
}
