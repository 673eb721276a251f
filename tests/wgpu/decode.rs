//! Decoding gives the bits of the specification.

use tenpak::gemm::cpu::reference;
use tenpak::gemm::wgpu::Wgpu;
use tenpak::gemm::{Matrix, Weights};

use crate::expected::by_subgroups;
use crate::matrices::{Draw, Owned, Stream, bits, extreme, layouts, ordinary, seed};

/// The weights of a device, which would be NaN if nothing wrote them.
pub fn decoded(device: &Wgpu, weights: &Weights<'_>) -> Vec<f32> {
    let mut out = vec![f32::NAN; weights.rows() * weights.cols()];
    device.upload(weights).unwrap().decode(&mut out).unwrap_or_else(|e| panic!("{e}"));
    out
}

/// The weights of the specification.
pub fn reference_decode(weights: &Weights<'_>) -> Vec<f32> {
    let mut want = vec![f32::NAN; weights.rows() * weights.cols()];
    for (r, row) in want.chunks_exact_mut(weights.cols()).enumerate() {
        reference::decode_row(weights, r, row);
    }
    want
}

#[test]
fn a_matrix_decodes_to_the_bits_of_the_specification() {
    let seed = seed();
    let mut stream = Stream(seed);
    for layout in layouts() {
        for (n, k) in [(3, 1), (5, 7), (3, 100), (70, 130), (9, 1000)] {
            for draw in [ordinary as Draw, extreme] {
                let owned = Owned::new(layout, n, k, &mut stream, draw);
                let want = reference_decode(&owned.weights());
                let got = decoded(by_subgroups(), &owned.weights());
                assert_eq!(bits(&got), bits(&want), "TENPAK_SEED={seed}: {layout:?} n={n} k={k}");
            }
        }
    }
}

#[test]
fn subnormal_scales_decode_to_themselves_or_to_zero() {
    // Of F16 scales none is subnormal as f32, and the test above has some of them.
    let tiny: Draw = |stream| f32::from_bits(stream.bits() & 0x80ff_ffff);
    let mut stream = Stream(seed());
    for layout in layouts() {
        let owned = Owned::new(layout, 9, 200, &mut stream, tiny);
        let weights = owned.weights();
        let bound = 255.0 * 3.0 * f64::from(f32::MIN_POSITIVE);
        for (got, want) in decoded(by_subgroups(), &weights).iter().zip(reference_decode(&weights)) {
            let off = (f64::from(*got) - f64::from(want)).abs();
            assert!(off <= bound, "{layout:?}: {got} is not {want} ± {bound:e}");
        }
    }
}
