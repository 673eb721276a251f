//! Promises of products on graphics devices: every layout and shape within the bound, by every path, and no call that
//! goes wrong takes the program with it.
//!
//! A device is needed: where there is none these tests fail, because a test that is passed over promises nothing. Mesa's
//! software driver will do. A driver's complaint about a call is an error of that call, so that any of them fails a test.

use std::future::Future;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Wake, Waker};

use half::f16;
use tenpak::codec::extra::Outlier;
use tenpak::gemm::cpu::reference;
use tenpak::gemm::wgpu::{self, G8GemmContext, G8Number, Options, Wgpu};
use tenpak::gemm::{Act, Backend, Matrix, Weights};
use tenpak::layout::{Layout, ROW};
use tenpak::{DeviceError, Encoded, Error, codecs};

mod matrices;
use matrices::{Draw, Owned, Stream, bits, extreme, layouts, ordinary, random, seed};

/// The default device with other options than the usual ones; kernels are not kept on disk.
fn open(options: Options) -> Wgpu {
    Wgpu::with(None, Options { pipelines: None, ..options }).unwrap_or_else(|e| panic!("{e}"))
}

/// A device that adds up by subgroups, one that does not, and one that has small bindings.
fn by_subgroups() -> &'static Wgpu {
    static DEVICE: OnceLock<Wgpu> = OnceLock::new();
    DEVICE.get_or_init(|| open(Options::default()))
}

fn by_workgroups() -> &'static Wgpu {
    static DEVICE: OnceLock<Wgpu> = OnceLock::new();
    DEVICE.get_or_init(|| open(Options { subgroups: false, half: false, ..Options::default() }))
}

fn paths() -> [(&'static str, &'static Wgpu); 2] {
    [("subgroups", by_subgroups()), ("workgroup memory", by_workgroups())]
}

/// One layout of each kind: kernels are compiled for every group size, but differ in nothing else.
fn kinds() -> Vec<Layout> {
    let mut kinds: Vec<Layout> = Vec::new();
    let kind = |layout: &Layout| {
        let Layout::Grouped(g) = layout else { panic!("a layout with codes") };
        (g.bits(), std::mem::discriminant(&g.levels()), g.scale(), g.offset(), g.group() == ROW, g.group() % 8)
    };
    for layout in layouts() {
        if kinds.iter().all(|other| kind(other) != kind(&layout)) {
            kinds.push(layout);
        }
    }
    kinds
}

/// What results may be: the exact ones, and how far each may be off.
struct Expected {
    results: Vec<f32>,
    bounds: Vec<f64>,
}

impl Expected {
    fn new(owned: &Owned, x: &[f32], m: usize, act: Act) -> Self {
        let x = reference::round_activations(act, x, owned.cols);
        let mut results = vec![0.0; m * owned.rows];
        reference::multiply(&owned.weights(), &x, m, Act::F32, &mut results);
        let mut bounds = Vec::new();
        let k = owned.cols as f64;
        for i in 0..m {
            let x = &x[i * owned.cols..][..owned.cols];
            let greatest = x.iter().fold(0.0, |max: f64, x| max.max(f64::from(x.abs())));
            for n in 0..owned.rows {
                let (magnitude, scale) = owned.magnitude(n, x);
                // Subnormal numbers may count as zero, wherever they come up.
                let lost = k * f64::from(f32::MIN_POSITIVE) * (1.0 + scale + greatest);
                let halves = match act {
                    Act::F16 => {
                        magnitude / 1024.0 + x.iter().map(|x| f64::from(x.abs())).sum::<f64>() / f64::from(1 << 24)
                    }
                    _ => 0.0,
                };
                bounds.push((k + 4.0) * f64::from(f32::EPSILON) * magnitude + halves + lost);
            }
        }
        Self { results, bounds }
    }

    fn check(&self, got: &[f32], what: &dyn Fn() -> String) {
        for (i, (&got, (&want, &bound))) in got.iter().zip(self.results.iter().zip(&self.bounds)).enumerate() {
            let off = (f64::from(got) - f64::from(want)).abs();
            assert!(off <= bound, "{}: result {i} is {got}, not {want} ± {bound:e}", what());
        }
    }
}

fn product(matrix: &dyn Matrix, rows: usize, x: &[f32], m: usize, act: Act) -> Vec<f32> {
    let mut y = vec![f32::NAN; m * rows];
    matrix.multiply(x, m, act, &mut y).unwrap_or_else(|e| panic!("{e}"));
    y
}

/// Checks products with each of these numbers of rows of activations.
fn check(path: &str, device: &Wgpu, owned: &Owned, seed: u64, x: &[f32], ms: &[usize], act: Act) {
    let expected = Expected::new(owned, x, ms.iter().copied().max().unwrap(), act);
    let weights = owned.weights();
    let matrix = device.upload(&weights).unwrap_or_else(|e| panic!("{e}"));
    for &m in ms {
        let got = product(&matrix, owned.rows, &x[..m * owned.cols], m, act);
        expected.check(&got, &|| {
            let (layout, rows, cols) = (owned.layout, owned.rows, owned.cols);
            format!("TENPAK_SEED={seed}: {layout:?} by {path}, {act:?} at m={m} n={rows} k={cols}")
        });
    }
}

#[test]
fn the_software_driver_has_what_the_paths_need() {
    let adapter = by_subgroups().adapter();
    assert_eq!(Some(adapter), wgpu::adapters().get(adapter.index));
    if adapter.name.contains("llvmpipe") {
        // Else the tests of halves and subgroups would test their absence only.
        assert!(adapter.f16 && adapter.subgroups.is_some() && adapter.pipeline_cache, "{adapter:?}");
    }
}

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
    let numbers: [Draw; 4] = [
        |stream| if stream.next().is_multiple_of(3) { stream.normal() } else { 0.0 },
        |stream| if stream.next().is_multiple_of(2) { f32::from_bits(stream.bits() & 0x807f_ffff) } else { -0.0 },
        |stream| stream.normal() * [1e-30, 1e-3, 1.0, 1e5, 1e25][usize::try_from(stream.next() % 5).unwrap()],
        |_| 0.0,
    ];
    for layout in kinds() {
        for draw in numbers {
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

/// Decodes on a device whose results would be NaN if nothing wrote them.
fn decoded(device: &Wgpu, weights: &Weights<'_>) -> Vec<f32> {
    let mut out = vec![f32::NAN; weights.rows() * weights.cols()];
    device.upload(weights).unwrap().decode(&mut out).unwrap_or_else(|e| panic!("{e}"));
    out
}

fn reference_decode(weights: &Weights<'_>) -> Vec<f32> {
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

/// A matrix of a codec with column scales, outliers, or both.
fn with_extras(codec: &str, scaled: bool, outliers: bool, stream: &mut Stream) -> Encoded {
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
        }
    }
}

#[test]
fn matrices_larger_than_a_binding_give_the_bits_of_whole_ones() {
    let mut stream = Stream(seed());
    let small = open(Options { binding_bytes: Some(5_000), ..Options::default() });
    for layout in kinds().into_iter().step_by(3) {
        for (n, k) in [(300, 200), (37, 1000), (7, 72)] {
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

#[test]
fn wrong_sizes_are_refused() {
    let owned = Owned::new(codecs::get(codecs::DEFAULT_IN_MEMORY).unwrap().layout, 6, 40, &mut Stream(1), ordinary);
    let weights = owned.weights();
    let matrix = by_subgroups().upload(&weights).unwrap();
    let refused = |result: tenpak::Result<()>| assert!(matches!(result, Err(Error::Invalid(_))));
    let (x, mut y) = (vec![0.0; 200], vec![0.0; 200]);
    refused(matrix.multiply(&x[..79], 2, Act::F32, &mut y[..12]));
    refused(matrix.multiply(&x[..80], 2, Act::F32, &mut y[..13]));
    refused(matrix.multiply(&x[..80], usize::MAX, Act::F32, &mut y[..12]));
    refused(matrix.decode(&mut y[..199]));
    let mut batch = by_subgroups().batch().unwrap();
    refused(batch.multiply(&matrix, &x[..79], 2, Act::F32).map(drop));
    let mut batch = by_workgroups().batch().unwrap();
    refused(batch.multiply(&matrix, &x[..80], 2, Act::F32).map(drop));
}

/// Counts how often it is woken, and lets its thread go on.
struct Alarm(std::thread::Thread, AtomicUsize);

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        self.1.fetch_add(1, Ordering::SeqCst);
        self.0.unpark();
    }
}

/// An executor as small as can be.
fn run<T>(future: impl Future<Output = T>) -> T {
    let alarm = Arc::new(Alarm(std::thread::current(), AtomicUsize::new(0)));
    let waker = Waker::from(Arc::clone(&alarm));
    let mut future = pin!(future);
    loop {
        let woken = alarm.1.load(Ordering::SeqCst);
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return value;
        }
        while alarm.1.load(Ordering::SeqCst) == woken {
            std::thread::park();
        }
    }
}

#[test]
fn products_of_a_batch_are_those_of_single_calls_waited_for_and_awaited() {
    let mut stream = Stream(seed());
    let owned: Vec<_> = kinds().into_iter().map(|layout| Owned::new(layout, 70, 100, &mut stream, ordinary)).collect();
    let empty = Owned::new(kinds()[0], 0, 8, &mut stream, ordinary);
    let extras = with_extras("int4_g32_fp16_v1", true, true, &mut stream);
    let device = by_subgroups();
    let all = owned.iter().chain([&empty]).map(Owned::weights).chain([Weights::from(&extras)]);
    let matrices: Vec<_> = all.map(|weights| device.upload(&weights).unwrap()).collect();
    let ms = [1, 7, 40];
    let inputs: Vec<Vec<Vec<f32>>> =
        matrices.iter().map(|matrix| ms.map(|m| random(m * matrix.weights().cols(), &mut stream)).into()).collect();
    let mut want = Vec::new();
    for (matrix, inputs) in matrices.iter().zip(&inputs) {
        want.extend(ms.iter().zip(inputs).map(|(&m, x)| product(matrix, matrix.weights().rows(), x, m, Act::F32)));
    }
    let submit = || {
        let mut batch = device.batch().unwrap();
        for (matrix, inputs) in matrices.iter().zip(&inputs) {
            for (&m, x) in ms.iter().zip(inputs) {
                batch.multiply(matrix, x, m, Act::F32).unwrap();
            }
        }
        batch.submit().unwrap()
    };
    assert!(submit().wait().unwrap() == want);
    assert!(run(submit()).unwrap() == want);
    // Several at once, the last one first; one that nobody waits for.
    let (first, second) = (submit(), submit());
    drop(submit());
    assert!(run(second).unwrap() == want);
    assert!(first.wait().unwrap() == want);
    assert!(device.batch().unwrap().submit().unwrap().wait().unwrap().is_empty());
}

#[test]
fn many_threads_may_multiply_with_one_matrix() {
    let mut stream = Stream(seed());
    let owned = Owned::new(codecs::get("int4_g8_fp16_v1").unwrap().layout, 50, 96, &mut stream, ordinary);
    let weights = owned.weights();
    let matrix = by_subgroups().upload(&weights).unwrap();
    let inputs: Vec<_> = (1..12).map(|m| random(m * 96, &mut stream)).collect();
    let want: Vec<_> = inputs.iter().map(|x| product(&matrix, 50, x, x.len() / 96, Act::F32)).collect();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for (x, want) in inputs.iter().zip(&want) {
                    assert_eq!(bits(&product(&matrix, 50, x, x.len() / 96, Act::F32)), bits(want));
                }
            });
        }
    });
}

#[test]
fn thousands_of_products_leave_no_buffers_behind() {
    let mut stream = Stream(seed());
    let device = open(Options::default());
    let owned = Owned::new(codecs::get("int4_g32_fp16_v1").unwrap().layout, 40, 64, &mut stream, ordinary);
    let weights = owned.weights();
    let matrix = device.upload(&weights).unwrap();
    let x = random(40 * 64, &mut stream);
    let sizes = [1, 2, 7, 9, 20, 40];
    let round = || {
        for m in sizes {
            product(&matrix, 40, &x[..m * 64], m, Act::F32);
        }
    };
    round();
    let before = device.usage();
    assert!(before.busy == 0 && before.made == before.idle as u64, "{before:?}");
    for _ in 0..200 {
        round();
    }
    assert_eq!(device.usage(), before);
    // Shapes that never come again fill no more than a fixed room.
    for cols in (8..400).step_by(8) {
        let owned = Owned::new(codecs::get("int8_sym_v1").unwrap().layout, cols, cols, &mut stream, ordinary);
        let weights = owned.weights();
        let matrix = device.upload(&weights).unwrap();
        product(&matrix, cols, &random(cols, &mut stream), 1, Act::F32);
        assert!(matrix.multiply(&[0.0], 1, Act::F32, &mut [0.0]).is_err());
    }
    let after = device.usage();
    assert!(after.busy == 0 && after.idle < 20 && after.bytes < 1 << 20, "{after:?}");
    // What is in use when it is dropped is not kept.
    let mut batch = device.batch().unwrap();
    batch.multiply(&matrix, &x[..64], 1, Act::F32).unwrap();
    assert_eq!(device.usage().busy, 1);
    drop(batch);
    assert_eq!((device.usage().busy, device.usage().idle), (0, after.idle - 1));
}

#[test]
fn a_lost_device_is_an_error_and_the_next_call_works() {
    let mut stream = Stream(seed());
    let device = open(Options::default());
    let owned = Owned::new(codecs::get("int5_k16_v1").unwrap().layout, 30, 96, &mut stream, ordinary);
    let weights = owned.weights();
    let matrix = device.upload(&weights).unwrap();
    let x = random(9 * 96, &mut stream);
    let want = product(&matrix, 30, &x, 9, Act::F32);
    let lost = |result: tenpak::Result<()>| match result {
        Err(Error::Device(DeviceError::Lost { device, .. })) => assert_eq!(device, by_subgroups().adapter().name),
        other => panic!("expected a lost device, not {other:?}"),
    };
    for round in 0..3 {
        // In the middle of a call, waited for and awaited, and before one.
        let mut batch = device.batch().unwrap();
        batch.multiply(&matrix, &x, 9, Act::F32).unwrap();
        match round {
            0 => device.lose_device(),
            1 => {
                device.lose_device();
                lost(batch.submit().and_then(run).map(drop));
            }
            _ => {
                // What was submitted before comes to its end, one way or the other.
                let pending = batch.submit().unwrap();
                device.lose_device();
                match pending.wait() {
                    Ok(results) => assert_eq!(bits(&results[0]), bits(&want)),
                    other => lost(other.map(drop)),
                }
            }
        }
        let mut y = vec![f32::NAN; 9 * 30];
        if let Err(e) = matrix.multiply(&x, 9, Act::F32, &mut y) {
            lost(Err(e));
        }
        assert_eq!(bits(&product(&matrix, 30, &x, 9, Act::F32)), bits(&want), "the next call");
        assert_eq!(bits(&decoded(&device, &weights)), bits(&reference_decode(&weights)));
    }
}

/// Checks a product of arrays as they come against the specification.
fn check_g8<T: G8Number + Into<f64>>(context: &G8GemmContext, number: impl Fn(f32) -> T, stream: &mut Stream) {
    for (m, n, k) in [(1, 17, 64), (9, 40, 100), (0, 3, 8), (2, 3, 0)] {
        let groups = usize::div_ceil(k, 8);
        let codes: Vec<u8> = (0..n * groups * 4).map(|_| stream.next().to_le_bytes()[0]).collect();
        let scales: Vec<T> = (0..n * groups).map(|_| number(0.01 * stream.normal())).collect();
        let offsets: Vec<T> = (0..n * groups).map(|_| number(0.01 * stream.normal())).collect();
        let x = random(m * k, stream);
        let y = context.gemm(&x, &codes, &scales, &offsets, m, n, k).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(y.len(), m * n);
        for (at, &got) in y.iter().enumerate() {
            let (mut want, mut sum) = (0.0, 0.0);
            for j in 0..k {
                let (row, x) = (at % n, f64::from(x[at / n * k + j]));
                let code = codes[row * groups * 4 + j / 2] >> (j % 2 * 4) & 15;
                let (scale, offset) = (scales[row * groups + j / 8].into(), offsets[row * groups + j / 8].into());
                want += x * (f64::from(code) * scale + offset);
                sum += x.abs() * ((f64::from(code) * scale).abs() + offset.abs());
            }
            let bound = (k as f64 + 4.0) * f64::from(f32::EPSILON) * sum;
            assert!((f64::from(got) - want).abs() <= bound, "m={m} n={n} k={k}: {got} is not {want} ± {bound:e}");
        }
        if n * groups > 0 {
            assert!(matches!(context.gemm(&x, &codes[1..], &scales, &offsets, m, n, k), Err(Error::Invalid(_))));
            assert!(matches!(context.gemm(&x, &codes, &scales[1..], &offsets, m, n, k), Err(Error::Invalid(_))));
        }
    }
}

#[test]
fn arrays_of_groups_of_eight_are_multiplied_as_they_come() {
    let mut stream = Stream(seed());
    for context in [G8GemmContext::new().unwrap(), run(G8GemmContext::new_async()).unwrap()] {
        check_g8(&context, |number| number, &mut stream);
        check_g8(&context, f16::from_f32, &mut stream);
    }
}

#[test]
fn compiled_kernels_are_kept_and_a_damaged_file_does_no_harm() {
    let folder = tempfile::tempdir().unwrap();
    let options = Options { pipelines: Some(folder.path().join("kept")), ..Options::default() };
    let owned = Owned::new(layouts()[0], 20, 64, &mut Stream(3), ordinary);
    let weights = owned.weights();
    let x = random(64, &mut Stream(4));
    let once = || {
        let device = Wgpu::with(None, options.clone()).unwrap();
        let matrix = device.upload(&weights).unwrap();
        product(&matrix, 20, &x, 1, Act::F32)
    };
    let files = || -> Vec<_> {
        let found = std::fs::read_dir(folder.path().join("kept")).into_iter().flatten();
        found.map(|entry| entry.unwrap().path()).collect()
    };
    let want = once();
    if !by_subgroups().adapter().pipeline_cache || by_subgroups().adapter().backend != "vulkan" {
        assert!(files().is_empty());
        return;
    }
    let [file] = &files()[..] else { panic!("one file, not {:?}", files()) };
    let sound = std::fs::read(file).unwrap();
    assert!(sound.len() > 32);
    assert_eq!(once(), want, "with the file");
    for damaged in [&sound[..20], &sound[..sound.len() - 1], &[], &[0; 100][..]] {
        std::fs::write(file, damaged).unwrap();
        assert_eq!(once(), want, "with a damaged file");
        assert_eq!(std::fs::read(file).unwrap().len(), sound.len(), "which is written again");
    }
}

#[test]
fn names_choose_devices_and_wrong_ones_say_what_there_is() {
    let adapter = by_subgroups().adapter();
    assert_eq!(Wgpu::named("wgpu").unwrap().adapter(), adapter);
    assert_eq!(Wgpu::named(&format!("wgpu:{}", adapter.index)).unwrap().adapter(), adapter);
    assert_eq!(tenpak::gemm::backend("wgpu").unwrap().name(), "wgpu");
    assert_eq!(tenpak::gemm::backend("cpu").unwrap().name(), "cpu");
    let said = Wgpu::named("wgpu:99").unwrap_err().to_string();
    assert!(said.contains("wgpu:99") && said.contains(&adapter.name), "{said}");
    for name in ["wgpu:", "wgpu:x", "wgpu0", "vulkan", ""] {
        assert!(matches!(tenpak::gemm::backend(name), Err(Error::Invalid(_))), "{name}");
    }
    let names: Vec<_> = tenpak::gemm::available().iter().map(|backend| backend.name()).collect();
    assert_eq!(names, ["cpu", "wgpu"]);
}

/// Layouts are what shaders are specialised by; this one is none of the registry.
#[test]
fn the_raw_layout_is_refused() {
    assert!(Weights::new(&Layout::Raw, 1, 1, &[&[0; 4]]).is_err());
}
