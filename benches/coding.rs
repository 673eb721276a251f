//! What coded planes cost: bits beside those of an ideal coder, error at given rates, and speed on one thread.
//!
//! `cargo bench --bench coding` takes matrices of known statistics; `cargo bench --bench coding -- FILE.safetensors` takes
//! those of a file besides; `cargo bench --bench coding -- files [BITS]` only decodes whole files. The *ideal* gives every row
//! and column the real-valued deviation that suits its codes best, and the shape that suits the matrix best, out of the same
//! family, and pays for neither.

#![expect(clippy::print_stdout, reason = "the table is what it is run for")]
#![expect(clippy::cast_possible_truncation, reason = "levels and deviations are small, weights are singles")]

use std::time::Instant;

use tenpak::artifact::ArtifactFile;
use tenpak::coding::{self, Stream, Trellis};
use tenpak::compress::{Nonfinite, Options, compress};
use tenpak::fit::entropy::{Choice, quantize, quantize_step, quantize_with};
use tenpak::recipe::Recipe;
use tenpak::source;

/// Deviations of the ideal coder are this many to an octave, from 2^-5 to 2^7.
const PER_OCTAVE: i32 = 32;

struct Matrix {
    name: String,
    rows: usize,
    cols: usize,
    weights: Vec<f32>,
}

/// Pseudo-random numbers of a standard Gaussian.
fn gaussian(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    let one = |_| (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
    (0..count).map(one).collect()
}

/// Rows and columns with log-normal deviations of this spread; Student's t with `nu` degrees of freedom, or a Gaussian.
fn synthetic(rows: usize, cols: usize, spread: f64, nu: Option<usize>) -> Matrix {
    let (z, r, c) = (gaussian(rows * cols, 11), gaussian(rows, 12), gaussian(cols, 13));
    let divisors: Vec<f64> = match nu {
        Some(nu) => gaussian(rows * cols * nu, 14)
            .chunks_exact(nu)
            .map(|g| (g.iter().map(|x| x * x).sum::<f64>() / nu as f64).sqrt())
            .collect(),
        None => vec![1.0; rows * cols],
    };
    let weights = z.iter().zip(divisors).enumerate();
    let weights = weights.map(|(i, (z, d))| (z / d * (spread * (r[i / cols] + c[i % cols])).exp()) as f32).collect();
    let name = nu.map_or("gaussian".into(), |nu| format!("t{nu}"));
    Matrix { name: format!("{name}, spread {spread}"), rows, cols, weights }
}

/// The matrices of a file in single precision.
fn from_file(path: &str) -> Vec<Matrix> {
    let bytes = std::fs::read(path).expect("the file can be read");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let mut found = Vec::new();
    for (name, tensor) in file.tensors() {
        if let (safetensors::Dtype::F32, &[rows, cols]) = (tensor.dtype(), tensor.shape()) {
            let numbers = tensor.data().chunks_exact(4);
            let weights = numbers.map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))).collect();
            found.push(Matrix { name, rows, cols, weights });
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

fn square(weights: &[f32]) -> f64 {
    weights.iter().map(|&w| f64::from(w) * f64::from(w)).sum()
}

/// Bits of levels by magnitude, for each deviation.
fn lengths(nu: u32) -> Vec<[f32; 128]> {
    let half = |x: f64| {
        let n = f64::from(nu);
        let ratio = n / (n + x * x);
        let (mut term, mut sum) = (1.0, 1.0);
        for i in 1..nu / 2 {
            term *= ratio * f64::from(2 * i - 1) / f64::from(2 * i);
            sum += term;
        }
        0.5 * x / (n + x * x).sqrt() * sum
    };
    let one = |exponent: i32| {
        let sigma = 2f64.powf(f64::from(exponent) / f64::from(PER_OCTAVE));
        let mut before = 0.0;
        std::array::from_fn(|level| {
            let end = half((level as f64 + 0.5) / sigma);
            let mass: f64 = if level == 0 { 2.0 * end } else { end - before };
            before = end;
            -mass.max(1e-9).log2() as f32
        })
    };
    (-5 * PER_OCTAVE..=7 * PER_OCTAVE).map(one).collect()
}

/// The deviation near `from` that has the least cost, and that cost.
fn descend(from: i32, cost: impl Fn(i32) -> f64) -> (i32, f64) {
    let (mut x, mut least) = (from, cost(from));
    for step in [8, -8, 2, -2, 1, -1] {
        loop {
            let next = cost(x + step);
            if next >= least {
                break;
            }
            (x, least) = (x + step, next);
        }
    }
    (x, least)
}

/// Bits of the ideal coder.
fn ideal(codes: &[u8], rows: usize, cols: usize) -> f64 {
    let magnitude: Vec<usize> = codes.iter().map(|&code| usize::from(code.abs_diff(128))).collect();
    let mean = |row: &[usize]| row.iter().sum::<usize>() as f64 / cols as f64 + 0.05;
    let start = |row: &[usize]| ((mean(row).log2() + 0.25) * f64::from(PER_OCTAVE)).round() as i32;
    let start: Vec<i32> = magnitude.chunks_exact(cols).map(start).collect();
    let mut best = f64::INFINITY;
    for nu in [2, 4, 6, 8, 12, 24, 128] {
        let lengths = lengths(nu);
        let top = lengths.len() as i32 - 1;
        let length = |at: i32, level: usize| f64::from(lengths[(at + 5 * PER_OCTAVE).clamp(0, top) as usize][level]);
        let (mut row, mut col) = (start.clone(), vec![0; cols]);
        let mut total = f64::INFINITY;
        loop {
            let mut sum = 0.0;
            for (row, levels) in row.iter_mut().zip(magnitude.chunks_exact(cols)) {
                let cost = |x| levels.iter().zip(&col).map(|(&level, c)| length(x + c, level)).sum::<f64>();
                let found = descend(*row, cost);
                *row = found.0;
                sum += found.1;
            }
            let settled = sum > total * 0.9995;
            total = total.min(sum);
            if settled {
                break;
            }
            for (c, col) in col.iter_mut().enumerate() {
                *col = descend(*col, |x| (0..rows).map(|r| length(x + row[r], magnitude[r * cols + c])).sum()).0;
            }
        }
        best = best.min(total);
    }
    best
}

/// Bits of an ideal coder without contexts.
fn order_zero(codes: &[u8]) -> f64 {
    let mut counts = [0u32; 256];
    for &code in codes {
        counts[usize::from(code)] += 1;
    }
    let bits = |&n: &u32| if n == 0 { 0.0 } else { f64::from(n) * (codes.len() as f64 / f64::from(n)).log2() };
    counts.iter().map(bits).sum()
}

fn bits(matrices: &[Matrix]) {
    println!("bits per weight of one step, rounded; then the error of a trellis at the bits of ours\n");
    println!("| matrix | rows x cols | order 0 | ideal | ours | over | nMSE rounded | nMSE trellis |");
    println!("|---|---|---|---|---|---|---|---|");
    let (mut worst, mut sums) = (0f64, [0.0; 2]);
    for Matrix { name, rows, cols, weights } in matrices {
        let power = square(weights);
        for rate in [3.0, 4.0, 4.25, 4.5, 5.0] {
            // The step whose codes have about this entropy.
            let mut step = (power / weights.len() as f64).sqrt() * 2f64.powf(2.05 - rate);
            for _ in 0..4 {
                let code = |&w: &f32| ((f64::from(w) / step).round().clamp(-127.0, 127.0) + 128.0) as u8;
                let codes: Vec<u8> = weights.iter().map(code).collect();
                step *= 2f64.powf(order_zero(&codes) / codes.len() as f64 - rate);
            }
            let choice = Choice { trellis: None, lambda: 0.0 };
            let plain = quantize_step(weights, *rows, *cols, step as f32, choice, None).expect("finite weights");
            let n = weights.len() as f64;
            let (zero, ideal) = (order_zero(&plain.codes) / n, ideal(&plain.codes, *rows, *cols) / n);
            let ours = plain.stream.len() as f64 * 8.0 / n;
            let trellis =
                quantize(weights, *rows, *cols, plain.bits_per_weight(), None).expect("such bits are possible");
            let over = 100.0 * (ours / ideal - 1.0);
            worst = worst.max(over);
            sums = [sums[0] + ideal * n, sums[1] + ours * n];
            println!(
                "| {name} | {rows} x {cols} | {zero:.3} | {ideal:.3} | {ours:.3} | {over:.2} % | {:.3e} | {:.3e} |",
                plain.squared_error / power,
                trellis.squared_error / power
            );
        }
    }
    println!("\nworst {worst:.2} % over the ideal, in all {:.2} %\n", 100.0 * (sums[1] / sums[0] - 1.0));
}

fn rates() {
    let Matrix { rows, cols, weights, .. } = synthetic(2048, 2048, 0.0, None);
    println!("error of an iid Gaussian {rows} x {cols}, everything counted\n");
    println!("| asked | bits | nMSE | over the bound | trellis | rounded at equal bits |");
    println!("|---|---|---|---|---|---|");
    let power = square(&weights);
    for rate in [2.0, 3.0, 3.5, 4.0, 4.25, 4.5, 5.0, 6.0, 6.5, 7.0] {
        let q = quantize(&weights, rows, cols, rate, None).expect("such bits are possible");
        let plain = Choice { trellis: None, lambda: 0.0 };
        let plain = quantize_with(&weights, rows, cols, rate, plain, None).expect("such bits are possible");
        let (bits, error) = (q.bits_per_weight(), q.squared_error / power);
        println!(
            "| {rate} | {bits:.4} | {error:.4e} | {:.2} dB | {} | {:.4e} |",
            10.0 * (error * 4f64.powf(bits)).log10(),
            q.choice.trellis.map_or("none".into(), |trellis| format!("{} states", trellis.states())),
            plain.squared_error / power
        );
    }
}

/// Least time of some runs, in nanoseconds per code.
fn time(codes: usize, mut run: impl FnMut()) -> f64 {
    let once = |_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    (0..30).map(once).fold(f64::INFINITY, f64::min) * 1e9 / codes as f64
}

fn speeds() {
    println!(
        "\nspeed on one thread\n\n| trellis | bits | decode, 10^9 codes/s | encode, 10^6 codes/s | quantize a step, 10^6 weights/s |"
    );
    println!("|---|---|---|---|---|");
    let Matrix { rows, cols, weights, .. } = synthetic(1024, 2048, 0.3, None);
    let mut out = vec![0; rows * cols];
    for (trellis, step) in [(None, 0.25), (Trellis::new(5), 0.125)] {
        let choice = Choice::of(trellis);
        let start = Instant::now();
        let q = quantize_step(&weights, rows, cols, step, choice, None).expect("finite weights");
        let quantized = (rows * cols) as f64 / start.elapsed().as_secs_f64() / 1e6;
        let decode = time(rows * cols, || {
            let stream = Stream::open(&q.stream, rows, cols).expect("a stream");
            stream.decode_all(&mut out).expect("a stream");
        });
        assert_eq!(out, q.codes, "codes come back");
        let encode = time(rows * cols, || {
            coding::encode_following(&q.codes, rows, cols, trellis).expect("codes");
        });
        let name = trellis.map_or("none".into(), |trellis| format!("{} states", trellis.states()));
        let bits = q.bits_per_weight();
        println!("| {name} | {bits:.3} | {:.2} | {:.0} | {quantized:.0} |", 1.0 / decode, 1e3 / encode);
    }
}

/// Bytes of f32 weights a second out of whole files; at high rates weights go on beyond the codes, as outliers.
fn files(only: Option<&str>) {
    println!("\nwhole files, one tensor, one thread: GB of f32 weights a second\n");
    println!("| matrix | bits | outliers | compress | decode_rows | planes |");
    println!("|---|---|---|---|---|---|");
    let folder = tempfile::tempdir().expect("a temporary directory");
    let [input, output] = ["m.safetensors", "m.tenpak"].map(|name| folder.path().join(name));
    for nu in [None, Some(5)] {
        let Matrix { name, rows, cols, weights } = synthetic(2048, 2048, 0.0, nu);
        let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![rows, cols], &bytes);
        safetensors::serialize_to_file([("w", view.expect("a matrix"))], None, &input).expect("a file");
        for rate in ["4.5", "6", "6.5", "7", "8"].into_iter().filter(|rate| only.is_none_or(|only| only == *rate)) {
            let codec = tenpak::codecs::get("ecu_v1").expect("a codec");
            let recipe = Recipe::new(codec).target_bits(rate.parse().expect("a rate"));
            let options = Options::new(recipe, Nonfinite::Error, true);
            let source = source::open(&input, &source::Options::default()).expect("a checkpoint");
            let start = Instant::now();
            compress(&source, &output, &options, &mut |_| Ok(())).expect("an artifact");
            let encode = bytes.len() as f64 / start.elapsed().as_secs_f64() / 1e9;
            let artifact = ArtifactFile::open(&output).expect("an artifact");
            let mut out = vec![0.0; rows * cols];
            // Nanoseconds of a byte.
            let decode = time(bytes.len(), || artifact.decode_rows(0, 0, &mut out).expect("weights"));
            let planes = time(bytes.len(), || drop(artifact.planes(0).expect("planes")));
            let outliers = artifact.tensors()[0].extras().outliers as f64 / weights.len() as f64;
            println!(
                "| {name} | {rate} | {:.2} % | {encode:.3} | {:.2} | {:.2} |",
                100.0 * outliers,
                1.0 / decode,
                1.0 / planes
            );
        }
    }
}

fn main() {
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    if args.first().is_some_and(|arg| arg == "files") {
        return one.install(|| files(args.get(1).map(String::as_str)));
    }
    let mut matrices = vec![
        synthetic(512, 512, 0.0, None),
        synthetic(768, 768, 0.3, None),
        synthetic(512, 512, 0.5, None),
        synthetic(512, 512, 0.0, Some(5)),
        synthetic(768, 768, 0.3, Some(5)),
        synthetic(128, 256, 0.0, None),
    ];
    for path in &args {
        matrices.extend(from_file(path));
    }
    bits(&matrices);
    rates();
    one.install(|| {
        speeds();
        files(None);
    });
}
