//! Promises of products with rounded activations: every instruction set, every codec, every shape.

use tenpak::codec::{self, Codec, Encoded};
use tenpak::codecs;
#[cfg(target_arch = "x86_64")]
use tenpak::gemm::cpu::bf16;
use tenpak::gemm::cpu::{int8, is_small, reference};
use tenpak::gemm::{Act, Weights};
use tenpak::layout::Grouped;

mod stream;
use stream::Stream;

/// What rows of both sides are divided by: every pair of these numbers, with few columns.
const M: [usize; 13] = [1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 33, 64, 100];
const N: [usize; 8] = [1, 3, 15, 16, 17, 64, 65, 130];
/// What columns are divided by, each with a few rows of both sides: kernels divide columns in the same way for all rows
/// of the kernel for few rows of activations, and for all of that for many.
const K: [usize; 15] = [1, 7, 8, 31, 32, 33, 64, 100, 128, 129, 172, 255, 256, 513, 1000];

/// A kernel: an arithmetic on an instruction set.
#[derive(Debug)]
enum Kernel {
    Int8(&'static int8::isa::Isa),
    #[cfg(target_arch = "x86_64")]
    Bf16(&'static bf16::isa::Isa),
}

impl Kernel {
    fn available() -> Vec<Self> {
        let found = int8::isa::available().into_iter().map(Self::Int8);
        #[cfg(target_arch = "x86_64")]
        let found = found.chain(bf16::isa::available().into_iter().map(Self::Bf16));
        found.collect()
    }

    fn act(&self) -> Act {
        match self {
            Self::Int8(_) => Act::Int8,
            #[cfg(target_arch = "x86_64")]
            Self::Bf16(_) => Act::Bf16,
        }
    }

    fn supports(&self, layout: &Grouped) -> bool {
        match self {
            Self::Int8(isa) => isa.supports(layout),
            #[cfg(target_arch = "x86_64")]
            Self::Bf16(isa) => isa.supports(layout),
        }
    }

    fn multiply(&self, weights: &Weights<'_>, x: &[f32], m: usize) -> Vec<f32> {
        let mut y = vec![f32::NAN; m * weights.rows()];
        match self {
            Self::Int8(isa) => isa.multiply(weights, x, m, &mut y).unwrap(),
            #[cfg(target_arch = "x86_64")]
            Self::Bf16(isa) => isa.multiply(weights, x, m, &mut y).unwrap(),
        }
        y
    }
}

/// A codec of every layout: products know nothing else of it.
fn grouped() -> Vec<(&'static Codec, &'static Grouped)> {
    let mut found: Vec<(&Codec, &Grouped)> = Vec::new();
    for codec in codecs::all() {
        if let Ok(layout) = codec.grouped()
            && found.iter().all(|(_, other)| *other != layout)
        {
            found.push((codec, layout));
        }
    }
    found
}

fn normal(stream: &mut Stream, count: usize, deviation: f32) -> Vec<f32> {
    (0..count).map(|_| deviation * stream.normal()).collect()
}

/// Products as the reference computes them, and how far from them a result may be.
struct Expected {
    rows: usize,
    y: Vec<f32>,
    bound: Vec<f64>,
}

impl Expected {
    fn new(act: Act, weights: &Weights<'_>, x: &[f32], m: usize) -> Self {
        let (rows, cols) = (weights.rows(), weights.cols());
        let mut y = vec![f32::NAN; m * rows];
        reference::multiply(weights, x, m, act, &mut y);
        let x = reference::round_activations(act, x, cols);
        let mut bound = vec![0.0; m * rows];
        let largest = x.iter().fold(0.0, |max, &x| f64::from(x).abs().max(max));
        for n in 0..rows {
            let magnitudes = magnitudes(weights, n);
            for i in 0..m {
                let terms = x[i * cols..][..cols].iter().zip(&magnitudes).map(|(&x, w)| f64::from(x).abs() * w);
                // One rounding for each product and each addition, of the kernel's and of the reference's numbers, and
                // for each result as many as there are scales: all of at most eps / 2. Weights that bf16 rounds are up
                // to 2^-8 larger, and subnormal numbers may count as zero.
                let sum = terms.sum::<f64>();
                let lost = cols as f64 * f64::from(f32::MIN_POSITIVE) * (1.0 + largest);
                bound[i * rows + n] = (2 * cols + 4) as f64 * f64::from(f32::EPSILON) * 1.01 * sum + lost;
            }
        }
        Self { rows, y, bound }
    }

    fn check(&self, what: &str, n: usize, got: &[f32]) {
        for (at, &got) in got.iter().enumerate() {
            let index = at / n * self.rows + at % n;
            let (want, bound) = (self.y[index], self.bound[index]);
            let error = (f64::from(got) - f64::from(want)).abs();
            assert!(error <= bound, "{what}: result {at} is {got}, not {want} ± {bound:e}");
        }
    }
}

/// `|scale · level| + |offset|` of a row of weights.
fn magnitudes(weights: &Weights<'_>, n: usize) -> Vec<f64> {
    let (layout, cols) = (weights.layout(), weights.cols());
    let row = weights.slice(n, 1);
    let magnitude = |i: usize| {
        let params = codec::reference::load_params(layout, row.planes(), i / layout.group_len(cols));
        let level = layout.level(layout.load_code(row.planes().codes, row.planes().high_codes, i), params.zero_point);
        f64::from(params.scale * level).abs() + f64::from(params.offset).abs()
    };
    (0..cols).map(magnitude).collect()
}

/// Checks the products of the first rows of a matrix with the first rows of activations, for many numbers of both.
fn check_shapes(encoded: &Encoded, x: &[f32], m: &[usize], n: &[usize]) {
    let weights = Weights::from(encoded);
    let cols = weights.cols();
    let expected = [Act::Int8, Act::Bf16].map(|act| Expected::new(act, &weights, x, x.len() / cols));
    for kernel in Kernel::available().iter().filter(|kernel| kernel.supports(weights.layout())) {
        let expected = &expected[usize::from(kernel.act() == Act::Bf16)];
        for &m in m {
            for &n in n {
                let what = format!("{} on {kernel:?}, m={m} n={n} k={cols}", encoded.codec().id);
                let part = weights.slice(0, n);
                expected.check(&what, n, &kernel.multiply(&part, &x[..m * cols], m));
            }
        }
    }
}

#[test]
fn every_codec_on_every_instruction_set_at_every_shape() {
    let mut stream = Stream(11);
    for (codec, _) in grouped() {
        let mut check = |k: usize, m: &[usize], n: &[usize]| {
            let (most, rows) = (m[m.len() - 1], n[n.len() - 1]);
            let weights = normal(&mut stream, rows * k, 0.05);
            let x = normal(&mut stream, most * k, 1.0);
            check_shapes(&codec.encode(&weights, rows, k).unwrap(), &x, m, n);
        };
        check(72, &M, &N);
        for k in K {
            check(k, &[1, 2, 3, 4, 9, 33], &[1, 3, 17]);
        }
    }
}

#[test]
fn planes_of_any_bytes_and_activations_of_any_size_are_no_exception() {
    let mut stream = Stream(12);
    for (codec, _) in grouped() {
        for k in [33, 128, 172, 520] {
            let zero = codec.encode(&vec![0.0; 40 * k], 40, k).unwrap();
            let planes = zero.planes().map(|(plane, bytes)| {
                let mut bytes = bytes.to_vec();
                let floats = matches!(plane.name(), "scales" | "row_scales" | "offsets");
                // No float of these has all bits of its exponent set.
                bytes.iter_mut().for_each(|b| *b = stream.next().to_le_bytes()[0] & if floats { 0xbb } else { 0xff });
                bytes
            });
            let encoded = Encoded::from_planes(codec, 40, k, planes.collect()).unwrap();
            // Blocks of zeroes, of one outlier, and of magnitudes down to subnormal ones.
            let x: Vec<f32> = (0..40 * k)
                .map(|i| match i / 32 % 5 {
                    0 => 0.0,
                    1 if i % 32 == 7 => 1e6,
                    2 => 1e-36 * stream.normal(),
                    3 => f32::from_bits(stream.bits() % 300),
                    _ => stream.normal(),
                })
                .collect();
            check_shapes(&encoded, &x, &[1, 2, 4, 7, 40], &[1, 40]);
        }
    }
}

#[test]
fn one_number_that_is_not_finite_spoils_its_row_and_no_other() {
    let mut stream = Stream(13);
    let (n, k) = (19, 172);
    for (codec, layout) in grouped() {
        let encoded = codec.encode(&normal(&mut stream, n * k, 0.05), n, k).unwrap();
        let weights = Weights::from(&encoded);
        for kernel in Kernel::available().iter().filter(|kernel| kernel.supports(layout)) {
            for m in [1, 3, 8, 20] {
                for (bad, at) in [(f32::NAN, 0), (f32::INFINITY, 171), (f32::NEG_INFINITY, 40)] {
                    let mut x = normal(&mut stream, m * k, 1.0);
                    let good = kernel.multiply(&weights, &x, m);
                    let row = m / 2;
                    x[row * k + at] = bad;
                    for (i, (y, good)) in kernel.multiply(&weights, &x, m).iter().zip(&good).enumerate() {
                        if i / n == row {
                            assert!(!y.is_finite(), "{} on {kernel:?}: {y} in the row of {bad}", codec.id);
                        } else {
                            assert_eq!(y.to_bits(), good.to_bits(), "{} on {kernel:?}: row {}", codec.id, i / n);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let mut stream = Stream(14);
    let pools = [1, 2, 3, 64].map(|threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap());
    let n = 300;
    for (codec, layout) in grouped() {
        // As few columns as make work that is divided among threads.
        for (k, ms) in [(600, [1, 8]), (72, [40, 150])] {
            let encoded = codec.encode(&normal(&mut stream, n * k, 0.05), n, k).unwrap();
            let x = normal(&mut stream, ms[1] * k, 1.0);
            for kernel in Kernel::available().iter().filter(|kernel| kernel.supports(layout)) {
                for m in ms {
                    assert!(!is_small(n, k, m));
                    let on = |pool: &rayon::ThreadPool| {
                        pool.install(|| kernel.multiply(&Weights::from(&encoded), &x[..m * k], m))
                    };
                    let one: Vec<u32> = on(&pools[0]).iter().map(|y| y.to_bits()).collect();
                    for pool in &pools[1..] {
                        let many: Vec<u32> = on(pool).iter().map(|y| y.to_bits()).collect();
                        let threads = pool.current_num_threads();
                        assert!(one == many, "{} on {kernel:?}, m={m}, {threads} threads", codec.id);
                    }
                }
            }
        }
    }
}
