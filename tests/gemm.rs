//! Promises of products in f32: each instruction set stays within the bound of [`Act::F32`] for every layout and shape.

use proptest::prelude::*;
use tenpak::codecs;
use tenpak::gemm::cpu::float::isa::{self, Isa};
use tenpak::gemm::{Act, Matrix, Weights, cpu};
use tenpak::layout::Layout;

mod matrices;
use matrices::{HARD, Owned, Stream, assert_within, bits, extreme, layouts, ordinary, random, seed};

/// What results may be: the exact ones, and how far each may be off.
struct Expected {
    results: Vec<f32>,
    bounds: Vec<f64>,
}

impl Expected {
    fn new(owned: &Owned, x: &[f32], m: usize) -> Self {
        let mut results = vec![0.0; m * owned.rows];
        cpu::reference::multiply(&owned.weights(), x, m, Act::F32, &mut results);
        let mut bounds = Vec::new();
        let k = owned.cols as f64;
        for i in 0..m {
            let x = &x[i * owned.cols..][..owned.cols];
            let greatest = x.iter().fold(0.0, |max: f64, x| max.max(f64::from(x.abs())));
            for n in 0..owned.rows {
                let (magnitude, scale) = owned.magnitude(n, x);
                // Below the normal numbers, products are off by half the least number and not by a part of themselves.
                let underflow = k * f64::from(f32::from_bits(1)) * (1.0 + scale + greatest);
                bounds.push((k + 4.0) * f64::from(f32::EPSILON) * magnitude + underflow);
            }
        }
        Self { results, bounds }
    }

    fn check(&self, got: &[f32], what: &dyn Fn() -> String) {
        assert_within(got, &self.results, &self.bounds, what);
    }
}

fn product(isa: &Isa, weights: &Weights<'_>, x: &[f32], m: usize) -> Vec<f32> {
    let mut y = vec![f32::NAN; m * weights.rows()];
    isa.multiply(weights, x, m, &mut y).unwrap();
    y
}

const M: [usize; 11] = [0, 1, 2, 3, 4, 5, 8, 9, 15, 17, 33];

/// Checks every number of rows of activations on every instruction set.
fn check_everywhere(owned: &Owned, seed: u64, x: &[f32]) {
    let expected = Expected::new(owned, x, M[M.len() - 1]);
    for m in M {
        for isa in isa::available() {
            let got = product(isa, &owned.weights(), &x[..m * owned.cols], m);
            let what = || {
                let (layout, rows, cols) = (owned.layout, owned.rows, owned.cols);
                format!("TENPAK_SEED={seed}: {layout:?} on {isa:?} at m={m} n={rows} k={cols}")
            };
            expected.check(&got, &what);
        }
    }
}

#[test]
fn every_instruction_set_stays_within_the_bound_for_every_layout_and_shape() {
    let seed = seed();
    let mut stream = Stream(seed);
    let mut shapes: Vec<(usize, usize)> = Vec::new();
    for k in [1, 2, 7, 8, 9, 16, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 172, 255, 256, 257, 384, 520, 1000] {
        shapes.push((3, k));
    }
    for n in [1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 130] {
        shapes.push((n, 72));
    }
    for layout in layouts() {
        for &(n, k) in &shapes {
            let owned = Owned::new(layout, n, k, &mut stream, ordinary);
            let x = random(M[M.len() - 1] * k, &mut stream);
            check_everywhere(&owned, seed, &x);
        }
    }
}

#[test]
fn extreme_scales_and_activations_are_no_exception() {
    let seed = seed();
    let mut stream = Stream(seed);
    for layout in layouts() {
        for draw in HARD {
            let k = 8 + usize::try_from(stream.next() % 300).unwrap();
            let owned = Owned::new(layout, 5, k, &mut stream, extreme);
            let x: Vec<f32> = (0..M[M.len() - 1] * k).map(|_| draw(&mut stream)).collect();
            check_everywhere(&owned, seed, &x);
        }
    }
}

#[test]
fn what_is_not_finite_stays_in_its_own_row() {
    let seed = seed();
    let mut stream = Stream(seed);
    for layout in layouts() {
        let owned = Owned::new(layout, 35, 200, &mut stream, ordinary);
        for (m, bad) in [(1, 0), (3, 1), (8, 7), (9, 4), (33, 20)] {
            for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let good = random(m * owned.cols, &mut stream);
                let mut x = good.clone();
                x[bad * owned.cols + usize::try_from(stream.next() % 200).unwrap()] = value;
                for isa in isa::available() {
                    let (want, got) = (product(isa, &owned.weights(), &good, m), product(isa, &owned.weights(), &x, m));
                    for (i, (want, got)) in want.chunks(35).zip(got.chunks(35)).enumerate() {
                        let what = format!("TENPAK_SEED={seed}: {layout:?} on {isa:?}, row {i} of {m} with {value}");
                        if i == bad {
                            assert!(got.iter().all(|y| !y.is_finite()), "{what}");
                        } else {
                            assert_eq!(want, got, "{what}");
                        }
                    }
                }
            }
        }
    }
}

fn pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let mut stream = Stream(seed());
    let pools = [1, 2, 3, 8, 64].map(pool);
    for layout in layouts() {
        for (m, n, k) in [(1, 700, 600), (7, 333, 520), (40, 75, 800), (600, 33, 300)] {
            let owned = Owned::new(layout, n, k, &mut stream, ordinary);
            let x = random(m * k, &mut stream);
            let alone = pools[0].install(|| product(isa::best(), &owned.weights(), &x, m));
            for pool in &pools[1..] {
                let got = pool.install(|| product(isa::best(), &owned.weights(), &x, m));
                assert_eq!(bits(&got), bits(&alone), "{layout:?} at m={m} n={n} k={k}");
            }
        }
    }
}

#[test]
fn grouped_products_are_those_of_each_matrix() {
    let mut stream = Stream(seed());
    let sizes: [&[usize]; 6] = [&[0], &[3], &[1, 0, 4], &[0, 0, 1], &[9, 1, 0, 40], &[2; 16]];
    for layout in layouts() {
        for sizes in sizes {
            for (rows, k) in [(1, 8), (37, 100), (130, 300)] {
                let owned = Owned::new(layout, rows * sizes.len(), k, &mut stream, ordinary);
                let ends: Vec<usize> =
                    sizes.iter().scan(0, |end, size| Some(*end + size).inspect(|e| *end = *e)).collect();
                let m = ends[ends.len() - 1];
                let x = random(m * k, &mut stream);
                let mut y = vec![f32::NAN; m * rows];
                let stack = owned.weights();
                cpu::multiply_grouped(&stack, &x, &ends, Act::F32, &mut y).unwrap();
                let mut want = Vec::new();
                for (e, (&end, &size)) in ends.iter().zip(sizes).enumerate() {
                    let x = &x[(end - size) * k..end * k];
                    want.extend(product(isa::best(), &stack.slice(e * rows, rows), x, size));
                }
                assert_eq!(bits(&y), bits(&want), "{layout:?}: {sizes:?} rows with {rows} x {k} each");
            }
        }
    }
}

#[test]
fn empty_products_are_zeros() {
    let mut stream = Stream(seed());
    for layout in layouts() {
        for (m, n, k) in [(0, 0, 0), (0, 5, 8), (3, 0, 8), (3, 5, 0), (20, 5, 0)] {
            let owned = Owned::new(layout, n, k, &mut stream, ordinary);
            let x = random(m * k, &mut stream);
            for isa in isa::available() {
                assert!(product(isa, &owned.weights(), &x, m).iter().all(|&y| y == 0.0));
            }
            let mut y = vec![f32::NAN; m * n];
            cpu::multiply(&owned.weights(), &x, m, Act::F32, &mut y).unwrap();
            assert!(y.iter().all(|&y| y == 0.0));
        }
    }
}

#[test]
fn wrong_sizes_are_refused() {
    let owned = Owned::new(codecs::get(codecs::DEFAULT_IN_MEMORY).unwrap().layout, 6, 40, &mut Stream(1), ordinary);
    let weights = owned.weights();
    let refused = |result: tenpak::Result<()>| assert!(matches!(result, Err(tenpak::Error::Invalid(_))));
    let (x, mut y) = (vec![0.0; 200], vec![0.0; 200]);
    refused(cpu::multiply(&weights, &x[..79], 2, Act::F32, &mut y[..12]));
    refused(cpu::multiply(&weights, &x[..80], 2, Act::F32, &mut y[..13]));
    refused(cpu::multiply(&weights, &x[..80], usize::MAX, Act::F32, &mut y[..12]));
    refused(isa::best().multiply(&weights, &x[..80], 3, &mut y[..12]));
    refused(cpu::multiply_grouped(&weights, &x[..80], &[], Act::F32, &mut y[..12]));
    refused(cpu::multiply_grouped(&weights, &x[..80], &[2, 1], Act::F32, &mut y[..6]));
    refused(cpu::multiply_grouped(&weights, &x[..80], &[1, 1, 1, 2], Act::F32, &mut y[..2]));
    refused(cpu::multiply_grouped(&weights, &x[..80], &[1, 2], Act::F32, &mut y[..7]));
    refused(cpu::decode_rows(&weights, &[6], &mut y[..40]));
    refused(cpu::decode_rows(&weights, &[5], &mut y[..41]));
    refused(weights.decode(&mut y[..199]));
    let codes = &owned.planes[0];
    assert!(Weights::new(&owned.layout, 6, 40, &[codes]).is_err(), "a plane is missing");
    assert!(Weights::new(&owned.layout, 6, 40, &[codes, codes, codes]).is_err(), "planes have lengths");
    assert!(Weights::new(&Layout::Raw, 6, 40, &[codes]).is_err(), "nothing multiplies raw bytes");
}

#[test]
fn a_matrix_decodes_to_the_codec_s_bits() {
    let mut stream = Stream(seed());
    for layout in layouts() {
        for (n, k) in [(3, 100), (300, 600)] {
            let owned = Owned::new(layout, n, k, &mut stream, ordinary);
            let weights = owned.weights();
            let mut want = vec![f32::NAN; n * k];
            for (r, row) in want.chunks_exact_mut(k).enumerate() {
                cpu::reference::decode_row(&weights, r, row);
            }
            let mut got = vec![f32::NAN; n * k];
            weights.decode(&mut got).unwrap();
            assert_eq!(bits(&got), bits(&want), "{layout:?}");
            let ids: Vec<usize> = (0..n).map(|_| usize::try_from(stream.next() % n as u64).unwrap()).collect();
            cpu::decode_rows(&weights, &ids, &mut got).unwrap();
            for (&id, row) in ids.iter().zip(got.chunks_exact(k)) {
                assert_eq!(bits(row), bits(&want[id * k..][..k]), "{layout:?}: row {id}");
            }
        }
    }
}

/// Run by the next test in a process in which nothing else has looked for threads.
#[test]
#[ignore = "needs a process of its own"]
fn small_products_alone() {
    let mut stream = Stream(2);
    for layout in layouts() {
        let owned = Owned::new(layout, 64, 100, &mut stream, ordinary);
        for m in [1, 9, 20] {
            let (x, mut y) = (random(m * 100, &mut stream), vec![0.0; m * 64]);
            assert!(cpu::is_small(64, 100, m));
            cpu::multiply(&owned.weights(), &x, m, Act::F32, &mut y).unwrap();
        }
        let (x, mut y) = (random(400, &mut stream), vec![0.0; 128]);
        cpu::multiply_grouped(&owned.weights(), &x, &[1, 4], Act::F32, &mut y).unwrap();
        owned.weights().decode(&mut vec![0.0; 6400]).unwrap();
        cpu::decode_rows(&owned.weights(), &[1, 1, 7], &mut vec![0.0; 300]).unwrap();
    }
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global().expect("nobody has started the global pool");
}

#[test]
fn small_products_start_no_threads() {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "small_products_alone"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

/// Fewer on ARM, which the continuous integration emulates.
const CASES: u32 = if cfg!(target_arch = "aarch64") { 50 } else { 300 };

proptest! {
    #![proptest_config(ProptestConfig::with_cases(CASES))]

    #[test]
    fn any_shape_stays_within_the_bound(
        layout in 0usize..1000,
        m in 0usize..40,
        n in 0usize..150,
        k in 0usize..700,
        seed in any::<u64>(),
    ) {
        let layouts = layouts();
        let mut stream = Stream(seed);
        let owned = Owned::new(layouts[layout % layouts.len()], n, k, &mut stream, ordinary);
        let x = random(m * k, &mut stream);
        let expected = Expected::new(&owned, &x, m);
        for isa in isa::available() {
            expected.check(&product(isa, &owned.weights(), &x, m), &|| format!("{:?} on {isa:?}", owned.layout));
        }
    }
}
