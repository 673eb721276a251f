//! Column scales and outliers.

use std::sync::Arc;

use half::f16;
use tenpak::codec::extra::Outlier;
use tenpak::gemm::cpu::reference;
use tenpak::gemm::{Act, Matrix, Weights};
use tenpak::{Encoded, codecs};

use crate::decode::decoded;
use crate::expected::{by_subgroups, product};
use crate::matrices::{Stream, bits, random, seed};

/// A matrix of a codec with column scales, outliers, or both.
pub fn with_extras(codec: &str, scaled: bool, outliers: bool, stream: &mut Stream) -> Encoded {
    let (rows, cols) = (67, 172);
    let weights: Vec<f32> = (0..rows * cols).map(|_| 0.05 * stream.normal()).collect();
    let encoded = codecs::get(codec).unwrap().encode(&weights, rows, cols).unwrap();
    let scales: Vec<f32> = (0..cols).map(|_| 1.0 + 0.1 * stream.normal()).collect();
    let mut places = Vec::new();
    for row in (0..rows).filter(|_| outliers) {
        for column in (row % 5..cols).step_by(37) {
            places.push(Outlier { row, column, value: f16::from_f32(0.5 * stream.normal()) });
        }
    }
    encoded.with_extras(scaled.then_some(&scales), &places).unwrap()
}

/// Products with extra planes, and how far they may be off.
fn expected_with_extras(weights: &Weights<'_>, x: &[f32], m: usize) -> (Vec<f32>, Vec<f64>) {
    let (rows, cols) = (weights.rows(), weights.cols());
    let mut results = vec![0.0; m * rows];
    reference::multiply(weights, x, m, Act::F32, &mut results);
    let mut decoded = vec![0.0; rows * cols];
    weights.decode(&mut decoded).unwrap();
    let mut bounds = Vec::new();
    for x in x.chunks_exact(cols) {
        for row in decoded.chunks_exact(cols) {
            // Scales, offsets and outliers of these matrices are below 3 in sum, column scales below 2.
            let sum: f64 = x.iter().zip(row).map(|(x, w)| f64::from(x.abs()) * (f64::from(w.abs()) + 6.0)).sum();
            bounds.push((cols as f64 + 8.0) * f64::from(f32::EPSILON) * sum);
        }
    }
    (results, bounds)
}

#[test]
fn column_scales_and_outliers_are_applied_in_products_and_in_decoding() {
    let mut stream = Stream(seed());
    for codec in ["int4_g32_fp16_v1", "int8_sym_v1", "int6_k16_v1", "nf4_g64_fp16_v1"] {
        for (scaled, outliers) in [(true, false), (false, true), (true, true)] {
            let encoded = with_extras(codec, scaled, outliers, &mut stream);
            let weights = Weights::from(&encoded);
            let matrix = by_subgroups().upload(&weights).unwrap();
            let x = random(33 * weights.cols(), &mut stream);
            let (results, bounds) = expected_with_extras(&weights, &x, 33);
            for m in [1, 5, 33] {
                let got = product(&matrix, weights.rows(), &x[..m * weights.cols()], m, Act::F32);
                for ((got, want), bound) in got.iter().zip(&results).zip(&bounds) {
                    let off = (f64::from(*got) - f64::from(*want)).abs();
                    assert!(
                        off <= *bound,
                        "{codec}, scales {scaled}, outliers {outliers}: {got} is not {want} ± {bound:e}"
                    );
                }
            }
            assert_eq!(bits(&decoded(by_subgroups(), &weights)), bits(&encoded.decode()), "{codec}");
            // A matrix that is shared instead of borrowed gives the same.
            let y = product(&matrix, weights.rows(), &x, 33, Act::F32);
            let shared = by_subgroups().upload_shared(Arc::new(encoded)).unwrap();
            assert_eq!(bits(&product(&shared, 67, &x, 33, Act::F32)), bits(&y), "{codec}");
            let mut batch = by_subgroups().batch().unwrap();
            batch.multiply(&shared, &x, 33, Act::F32).unwrap();
            drop(shared);
            assert_eq!(bits(&batch.submit().unwrap().wait().unwrap()[0]), bits(&y), "{codec}");
        }
    }
}
