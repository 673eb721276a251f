//! Products stay within their bounds.

use tenpak::Error;
use tenpak::codecs;
use tenpak::gemm::wgpu::Options;
use tenpak::gemm::{Act, Backend, Matrix};

use crate::decode::{decoded, reference_decode};
use crate::expected::{Expected, by_subgroups, by_units, by_workgroups, check, kinds, open, paths, product};
use crate::matrices::{HARD, Owned, Stream, bits, extreme, layouts, ordinary, random, seed};

#[test]
fn products_stay_within_the_bound_for_every_layout_and_shape() {
    let seed = seed();
    let mut stream = Stream(seed);
    let mut shapes: Vec<(usize, usize)> = Vec::new();
    for k in [1, 2, 7, 8, 9, 31, 32, 33, 65, 100, 129, 172, 255, 257, 520, 1000] {
        shapes.push((3, k));
    }
    for n in [1, 2, 15, 16, 17, 33, 63, 64, 65, 130] {
        shapes.push((n, 72));
    }
    for layout in layouts() {
        for &(n, k) in &shapes {
            let owned = Owned::new(layout, n, k, &mut stream, ordinary);
            let x = random(33 * k, &mut stream);
            check("subgroups", by_subgroups(), &owned, seed, &x, &[1, 2, 4, 5, 8, 9, 31, 33], Act::F32);
        }
    }
    for layout in kinds() {
        for (n, k) in [(3, 9), (65, 100), (17, 520)] {
            let owned = Owned::new(layout, n, k, &mut stream, ordinary);
            let x = random(33 * k, &mut stream);
            check("workgroup memory", by_workgroups(), &owned, seed, &x, &[1, 7, 8, 33], Act::F32);
        }
    }
}

#[test]
fn products_on_matrix_units_stay_within_the_bound() {
    let seed = seed();
    let mut stream = Stream(seed);
    // What reads weights is the same text for all kernels; compiling loops for every kind would take a minute.
    for (number, layout) in kinds().into_iter().step_by(3).enumerate() {
        // A tile, less than one and more than one of either side, with a last column that fills no quad or fragment.
        for (n, k, ms) in [(67, 100, &[9, 33][..]), (5, 37, &[32])] {
            let owned = Owned::new(layout, n, k, &mut stream, ordinary);
            let x = random(ms[ms.len() - 1] * k, &mut stream);
            let (size, act) = ([8, 16][number % 2], [Act::F32, Act::F16][number / 2 % 2]);
            check(&format!("units of {size}"), by_units(size), &owned, seed, &x, ms, act);
        }
    }
    // Several tiles of both sides.
    let owned = Owned::new(codecs::get("int4_g32_fp16_v1").unwrap().layout, 140, 129, &mut stream, ordinary);
    let x = random(70 * 129, &mut stream);
    for size in [8, 16] {
        check(&format!("units of {size}"), by_units(size), &owned, seed, &x, &[70], Act::F16);
    }
}

#[test]
fn more_rows_than_a_workgroup_takes_are_no_exception() {
    let seed = seed();
    let mut stream = Stream(seed);
    for id in ["int4_g8_v1", "int5_k16_v1", "ecu_v1"] {
        for (m, n, k) in [(1, 2000, 300), (6, 1000, 300), (100, 300, 130), (200, 70, 40)] {
            let owned = Owned::new(codecs::get(id).unwrap().layout, n, k, &mut stream, ordinary);
            let x = random(m * k, &mut stream);
            for (path, device) in paths() {
                check(path, device, &owned, seed, &x, &[m], Act::F32);
            }
        }
    }
}

#[test]
fn rounded_activations_are_those_of_the_reference() {
    let seed = seed();
    let mut stream = Stream(seed);
    for layout in kinds() {
        for act in [Act::Bf16, Act::Int8, Act::F16] {
            let owned = Owned::new(layout, 35, 172, &mut stream, ordinary);
            let x = random(33 * 172, &mut stream);
            check("subgroups", by_subgroups(), &owned, seed, &x, &[1, 6, 33], act);
        }
        // Without halves, activations are rounded all the same.
        let owned = Owned::new(layout, 5, 100, &mut stream, ordinary);
        let x = random(9 * 100, &mut stream);
        check("workgroup memory", by_workgroups(), &owned, seed, &x, &[1, 9], Act::F16);
    }
}

#[test]
fn extreme_scales_and_activations_are_no_exception() {
    let seed = seed();
    let mut stream = Stream(seed);
    for layout in kinds() {
        for draw in HARD {
            let k = 8 + usize::try_from(stream.next() % 300).unwrap();
            let owned = Owned::new(layout, 5, k, &mut stream, extreme);
            let x: Vec<f32> = (0..33 * k).map(|_| draw(&mut stream)).collect();
            for (path, device) in paths() {
                check(path, device, &owned, seed, &x, &[1, 8, 33], Act::F32);
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_in_its_own_row_and_in_its_own_call() {
    let seed = seed();
    let mut stream = Stream(seed);
    for layout in kinds() {
        let owned = Owned::new(layout, 35, 200, &mut stream, ordinary);
        let weights = owned.weights();
        for (path, device) in paths() {
            let matrix = device.upload(&weights).unwrap();
            for (m, bad) in [(1, 0), (6, 1), (8, 7), (33, 20)] {
                for value in [f32::NAN, f32::NEG_INFINITY] {
                    let good = random(m * owned.cols, &mut stream);
                    let want = product(&matrix, 35, &good, m, Act::F32);
                    // All buffers of this size are full of what is not finite afterwards.
                    let all_bad = product(&matrix, 35, &vec![value; m * owned.cols], m, Act::F32);
                    assert!(all_bad.iter().all(|y| !y.is_finite()));
                    assert_eq!(bits(&product(&matrix, 35, &good, m, Act::F32)), bits(&want), "the same call again");
                    let mut x = good.clone();
                    x[bad * owned.cols + usize::try_from(stream.next() % 200).unwrap()] = value;
                    let got = product(&matrix, 35, &x, m, Act::F32);
                    for (i, (want, got)) in want.chunks(35).zip(got.chunks(35)).enumerate() {
                        let what = format!("TENPAK_SEED={seed}: {layout:?} by {path}, row {i} of {m} with {value}");
                        if i == bad {
                            assert!(got.iter().all(|y| !y.is_finite()), "{what}");
                        } else {
                            assert_eq!(bits(want), bits(got), "{what}");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn matrices_larger_than_a_binding_give_the_bits_of_whole_ones() {
    let mut stream = Stream(seed());
    let small = open(Options { binding_bytes: Some(5_000), ..Options::default() });
    for layout in kinds().into_iter().step_by(3) {
        for (n, k) in [(300, 200), (37, 1100), (7, 72)] {
            let owned = Owned::new(layout, n, k, &mut stream, ordinary);
            let weights = owned.weights();
            let (divided, whole) = (small.upload(&weights).unwrap(), by_subgroups().upload(&weights).unwrap());
            for m in [1, 40] {
                let x = random(m * k, &mut stream);
                // Activations are divided too, and fewer rows of them go to another kernel: that has a bound of its own.
                let (got, want) = (product(&divided, n, &x, m, Act::F32), product(&whole, n, &x, m, Act::F32));
                let expected = Expected::new(&owned, &x, m, Act::F32);
                expected.check(&got, &|| format!("{layout:?}, divided, at m={m} n={n} k={k}"));
                if m == 1 {
                    assert_eq!(bits(&got), bits(&want), "{layout:?} at n={n} k={k}");
                }
            }
            assert_eq!(bits(&decoded(&small, &weights)), bits(&reference_decode(&weights)), "{layout:?}");
        }
    }
    let owned = Owned::new(codecs::get("int8_sym_v1").unwrap().layout, 2, 6_000, &mut stream, ordinary);
    let refused = small.upload(&owned.weights());
    assert!(matches!(refused, Err(Error::Unsupported(_))), "a row that does not fit");
    let owned = Owned::new(codecs::get("int4_g32_fp16_v1").unwrap().layout, 2, 2_000, &mut stream, ordinary);
    let weights = owned.weights();
    let refused = small.upload(&weights).unwrap().multiply(&random(2_000, &mut stream), 1, Act::F32, &mut [0.0; 2]);
    assert!(matches!(refused, Err(Error::Unsupported(_))), "activations of a row that do not fit");
}

#[test]
fn empty_products_are_zeros() {
    let mut stream = Stream(seed());
    for layout in layouts() {
        for (m, n, k) in [(0, 0, 0), (0, 5, 8), (3, 0, 8), (3, 5, 0), (20, 5, 0)] {
            let owned = Owned::new(layout, n, k, &mut stream, ordinary);
            let weights = owned.weights();
            let matrix = by_subgroups().load(&weights).unwrap();
            let x = random(m * k, &mut stream);
            assert!(product(&*matrix, n, &x, m, Act::F32).iter().all(|&y| y == 0.0));
            matrix.decode(&mut vec![f32::NAN; n * k]).unwrap();
        }
    }
}
