//! The product written to be read: decoded weights, added up in f64. What every kernel is tested against.

use crate::codec::{Planes, reference};
use crate::gemm::{ACT_BLOCK, Act, Weights};

/// `y[m, n] = x[m, k] · w[n, k]ᵀ`, rounded once.
///
/// # Panics
/// When `x` is not `m * k` or `y` not `m * n` numbers: a bug of the caller.
pub fn multiply(weights: &Weights<'_>, x: &[f32], m: usize, act: Act, y: &mut [f32]) {
    let (rows, cols) = (weights.rows(), weights.cols());
    assert!(x.len() == m * cols && y.len() == m * rows, "sizes were checked");
    let mut scaled = x.to_vec();
    weights.extra().scale(&mut scaled);
    let scaled = round_activations(act, &scaled, cols);
    let outliers = weights.extra().rows();
    let mut row = vec![0.0; cols];
    for n in 0..rows {
        decode_base_row(weights, n, &mut row);
        if act == Act::Bf16 {
            row = round_bf16(&row);
        }
        for i in 0..m {
            let dot = |x: &[f32], row: &[f32]| -> f64 {
                x[i * cols..][..cols].iter().zip(row).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
            };
            let mut sum = dot(&scaled, &row);
            if let Some(outliers) = &outliers {
                let mut added = vec![0.0; cols];
                outliers.add(n, &mut added).expect("outliers were checked");
                sum += dot(x, &added);
            }
            #[expect(clippy::cast_possible_truncation, reason = "the one rounding of a result")]
            let sum = sum as f32;
            y[i * rows + n] = sum;
        }
    }
}

/// Row `n` as the specification decodes it.
///
/// # Panics
/// When an outlier lies beyond its row.
pub fn decode_row(weights: &Weights<'_>, n: usize, out: &mut [f32]) {
    decode_base_row(weights, n, out);
    weights.slice(n, 1).extra().apply(out).expect("outliers were checked");
}

/// The same of the codec's planes alone.
fn decode_base_row(weights: &Weights<'_>, n: usize, out: &mut [f32]) {
    let row: Planes<'_> = *weights.base().slice(n, 1).planes();
    reference::decode_row(weights.layout(), &row, out);
}

/// The activations that a product multiplies with, given what arithmetic it uses.
#[must_use]
pub fn round_activations(act: Act, x: &[f32], cols: usize) -> Vec<f32> {
    match act {
        Act::F32 => x.to_vec(),
        Act::Bf16 => round_bf16(x),
        Act::F16 => x.iter().map(|&v| half::f16::from_f32(v).to_f32()).collect(),
        Act::Int8 => {
            let mut rounded = x.to_vec();
            for block in rounded.chunks_mut(cols.max(1)).flat_map(|row| row.chunks_mut(ACT_BLOCK)) {
                let max = block.iter().fold(0.0f32, |max, v| max.max(v.abs()));
                let scale = if block.iter().all(|v| v.is_finite()) { max / 127.0 } else { f32::NAN };
                for v in block {
                    *v = int8(*v, scale) * scale;
                }
            }
            rounded
        }
    }
}

/// The integer nearest to `v / scale`, ties to even; zero where the scale is zero.
#[must_use]
pub fn int8(v: f32, scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { (v / scale).round_ties_even().clamp(-127.0, 127.0) }
}

fn round_bf16(x: &[f32]) -> Vec<f32> {
    x.iter().map(|&v| half::bf16::from_f32(v).to_f32()).collect()
}
