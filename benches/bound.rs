//! How far every codec is from what no code can beat: `cargo bench --bench bound`, on matrices of independent weights.
//!
//! A matrix of 2048 x 2048 is compressed by every codec of the registry and every fit that needs no statistics, and by
//! those whose size is open at several rates. `bpw` is what the matrix takes on disk. The bound at R bits is
//! `2^(-2R)` for a Gaussian, its rate-distortion function; for Student's t with five degrees of freedom it is Shannon's lower
//! bound, `2^(2h) / (2πe) · 2^(-2R)` with the differential entropy `h` at unit variance, which is 0.41 dB lower. A
//! distance of 6.02 dB is a bit. Times are those of a whole `compress` on all threads, writing included. With an argument, only
//! codecs whose id has it: `cargo bench --bench bound -- ecu`.

#![expect(clippy::print_stdout, reason = "the table is what it is run for")]
#![expect(clippy::cast_possible_truncation, reason = "weights are singles")]

use std::path::Path;
use std::time::Instant;

use tenpak::codecs;
use tenpak::compress::{Nonfinite, Options, compress};
use tenpak::fit::{Fit, Method, Rate};
use tenpak::layout::Layout;
use tenpak::recipe::Recipe;

const SIDE: usize = 2048;
const RATES: [f64; 9] = [3.0, 3.5, 4.0, 4.25, 4.5, 5.0, 6.0, 7.0, 8.0];

/// Pseudo-random numbers of a standard Gaussian.
fn gaussian(count: usize, seed: u64) -> impl Iterator<Item = f64> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    (0..count).map(move |_| (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos())
}

/// Student's t with five degrees of freedom.
fn student() -> Vec<f32> {
    let mut squares = gaussian(SIDE * SIDE * 5, 2);
    let one = |z: f64| {
        let sum: f64 = squares.by_ref().take(5).map(|g| g * g).sum();
        (z / (sum / 5.0).sqrt()) as f32
    };
    gaussian(SIDE * SIDE, 1).map(one).collect()
}

/// The bound of Student's t over that of a Gaussian of the same variance.
fn student_bound() -> f64 {
    // h = 3 (ψ(3) - ψ(5/2)) + ln(√5 B(5/2, 1/2)) at variance 5/3.
    let digammas = 1.5 - (2.0 + 2.0 / 3.0 - 2.0 * std::f64::consts::LN_2);
    let beta = 3.0 * std::f64::consts::PI / 8.0;
    let entropy = 3.0 * digammas + (5f64.sqrt() * beta).ln() - 0.5 * (5.0f64 / 3.0).ln();
    let of_gaussian = 0.5 * (std::f64::consts::TAU * std::f64::consts::E).ln();
    (2.0 * (entropy - of_gaussian)).exp()
}

/// Writes a checkpoint of one matrix.
fn checkpoint(path: &Path, weights: &[f32]) {
    let header =
        format!("{{\"w\":{{\"dtype\":\"F32\",\"shape\":[{SIDE},{SIDE}],\"data_offsets\":[0,{}]}}}}", 4 * weights.len());
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(weights.iter().flat_map(|w| w.to_le_bytes()));
    std::fs::write(path, bytes).expect("a temporary file can be written");
}

fn main() {
    let wanted = std::env::args().skip(1).find(|arg| !arg.starts_with("--")).unwrap_or_default();
    let folder = tempfile::tempdir().expect("a temporary directory");
    let (input, output) = (folder.path().join("w.safetensors"), folder.path().join("w.tenpak"));
    println!("{SIDE} x {SIDE} independent weights, {} threads\n", rayon::current_num_threads());
    println!("| weights | codec | fit | bpw | nMSE | above the bound, dB | bits | s per 10^6 weights |");
    println!("|---|---|---|---|---|---|---|---|");
    let gauss: Vec<f32> = gaussian(SIDE * SIDE, 1).map(|z| z as f32).collect();
    for (name, weights, bound) in [("Gaussian", gauss, 1.0), ("t5", student(), student_bound())] {
        checkpoint(&input, &weights);
        let source = tenpak::source::open(&input, &Default::default()).expect("a checkpoint");
        for codec in codecs::all().iter().filter(|codec| codec.layout != Layout::Raw && codec.id.contains(&wanted)) {
            let open = codec.fit == Fit::Rate;
            for rate in if open { RATES.map(Some).to_vec() } else { vec![None] } {
                for (fit, method) in Method::ALL.iter().filter(|(_, method)| !method.needs_stats()) {
                    if open && *method != Method::Codec {
                        continue;
                    }
                    let mut recipe = Recipe::new(codec).fit(*method);
                    if let Some(rate) = rate {
                        recipe = recipe.target_bits(Rate::from_bits(rate).expect("a rate"));
                    }
                    let options = Options::new(recipe, Nonfinite::Error, true);
                    let start = Instant::now();
                    let report = compress(&source, &output, &options, &mut |_| Ok(())).expect("finite weights");
                    let seconds = start.elapsed().as_secs_f64();
                    let tensor = &report.tensors[0];
                    let bits = 8.0 * tensor.stored_bytes as f64 / weights.len() as f64;
                    let nmse = tensor.distance.expect("a lossy codec").nmse();
                    let above = 10.0 * (nmse / (bound * 4f64.powf(-bits))).log10();
                    println!(
                        "| {name} | {} | {fit} | {bits:.3} | {nmse:.3e} | {above:.2} | {:.3} | {:.3} |",
                        codec.id,
                        above / (20.0 * 2f64.log10()),
                        seconds * 1e6 / weights.len() as f64
                    );
                }
            }
        }
    }
}
