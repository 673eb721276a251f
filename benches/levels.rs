//! The banks of nested scales: what they lose and how fast they are found, and the program that made their levels.
//!
//! `cargo bench --bench levels` prints the error of every codec with a bank on matrices of known statistics, and the speed
//! of its search on one thread; files of safetensors that are named behind `--` are measured as well.
//!
//! `cargo bench --bench levels -- fit BITS FILE.safetensors …` makes the levels of a bank: from Gaussian and Student's t5
//! rows and the matrices of the files, whose errors, each relative to its energy, count 1, 1/2 and 1. As in Lloyd's
//! algorithm the search of the library assigns to every group sign, table and multiplier, and every level moves to the
//! centroid of its weights; what rounding to integers takes from a move is kept for the next one. The levels of this
//! repository are those of
//!
//! ```text
//! cargo bench --bench levels -- fit 4 tiny-books/model.safetensors stories260K/model.safetensors
//! cargo bench --bench levels -- fit 5 tiny-books/model.safetensors stories260K/model.safetensors
//! cargo bench --bench levels -- fit 6 tiny-books/model.safetensors stories260K/model.safetensors
//! ```

#![expect(clippy::print_stdout, reason = "the table is what it is run for")]
#![expect(clippy::cast_possible_truncation, reason = "levels are of eight bits, weights are singles")]

use std::time::Instant;

use rayon::prelude::*;
use tenpak::codec::{self, Planes, PlanesMut};
use tenpak::fit::Fit;
use tenpak::layout::{Bank, Float, Grouped, LEVELS, Layout, Levels};
use tenpak::{DType, codecs};

/// Rows of a matrix of known statistics that fits a bank, and their columns.
const ROWS: usize = 64;
const COLS: usize = 2048;
/// Of the rows of files one in so many fits a bank.
const SAMPLE: usize = 4;
/// Assignments of all groups, beginning with levels of so many kinds.
const ROUNDS: usize = 120;
const SEEDS: u64 = 3;

/// The splitmix64 generator.
struct Stream(u64);

impl Stream {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (((z ^ (z >> 31)) >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }

    fn t5(&mut self) -> f64 {
        let square = (0..5).map(|_| self.normal().powi(2)).sum::<f64>();
        self.normal() / (square / 5.0).sqrt()
    }
}

/// Rows of one length.
struct Matrix {
    name: String,
    cols: usize,
    weights: Vec<f32>,
}

impl Matrix {
    fn gaussian(rows: usize, seed: u64) -> Self {
        let mut stream = Stream(seed);
        let weights = (0..rows * COLS).map(|_| stream.normal() as f32).collect();
        Self { name: "gaussian".to_owned(), cols: COLS, weights }
    }

    fn t5(rows: usize, seed: u64) -> Self {
        let mut stream = Stream(seed);
        let weights = (0..rows * COLS).map(|_| stream.t5() as f32).collect();
        Self { name: "t5".to_owned(), cols: COLS, weights }
    }

    /// One in `sample` rows of the matrices of layers in a file.
    fn read(path: &str, sample: usize) -> Vec<Self> {
        let bytes = std::fs::read(path).expect("the file can be read");
        let file = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
        let mut found = Vec::new();
        for (name, tensor) in file.tensors() {
            let &[_, cols] = tensor.shape() else { continue };
            if !name.contains("layers") {
                continue;
            }
            let weights: Vec<f32> = match tensor.dtype() {
                safetensors::Dtype::F32 => {
                    tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
                }
                safetensors::Dtype::F16 => {
                    tensor.data().as_chunks::<2>().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect()
                }
                _ => continue,
            };
            let weights = weights.chunks(cols).step_by(sample).flatten().copied().collect();
            found.push(Self { name: name.clone(), cols, weights });
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        found
    }

    fn energy(&self) -> f64 {
        self.weights.iter().map(|&w| f64::from(w).powi(2)).sum()
    }
}

/// The planes of a matrix.
fn encode(layout: &Grouped, matrix: &Matrix) -> Vec<Vec<u8>> {
    let rows = (matrix.weights.len() / matrix.cols) as u64;
    let sizes = Layout::Grouped(*layout).plane_bytes(DType::F32, rows, matrix.cols as u64).expect("a small matrix");
    let mut planes: Vec<Vec<u8>> = sizes.iter().map(|(_, bytes)| vec![0; *bytes as usize]).collect();
    PlanesMut::new(layout, &mut planes)
        .chunks(layout, matrix.cols, rows as usize, 1)
        .into_par_iter()
        .zip(matrix.weights.par_chunks(matrix.cols))
        .for_each(|(mut planes, weights)| {
            codec::encode_rows(layout, Fit::Nested, weights, matrix.cols, &mut planes).expect("finite weights");
        });
    planes
}

/// What the groups of a bank ask of its levels.
#[derive(Clone)]
struct Sums {
    error: f64,
    products: [f64; LEVELS],
    squares: [f64; LEVELS],
}

impl Sums {
    const ZERO: Self = Self { error: 0.0, products: [0.0; LEVELS], squares: [0.0; LEVELS] };

    fn add(&mut self, other: &Self, weight: f64) {
        self.error += weight * other.error;
        for i in 0..LEVELS {
            self.products[i] += weight * other.products[i];
            self.squares[i] += weight * other.squares[i];
        }
    }
}

/// Encodes a matrix and sums up over its weights, in their order.
fn sums(layout: &Grouped, bank: &Bank, matrix: &Matrix) -> Sums {
    let planes = encode(layout, matrix);
    let slices: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
    let planes = Planes::new(layout, &slices);
    let mut sums = Sums::ZERO;
    for (r, weights) in matrix.weights.chunks(matrix.cols).enumerate() {
        let row = planes.slice(layout, matrix.cols, r, 1);
        let row_scale = f64::from(Float::F32.load(row.row_scales, 0));
        for (j, &w) in weights.iter().enumerate() {
            let byte = row.scales[j / layout.group()];
            let scale = f64::from(bank.multiplier(byte)) * row_scale;
            let index = usize::from(bank.high(byte) | layout.load_code(row.codes, row.high_codes, j));
            sums.error += (f64::from(w) - scale * f64::from(bank.levels()[index])).powi(2);
            sums.products[index] += f64::from(w) * scale;
            sums.squares[index] += scale * scale;
        }
    }
    sums
}

/// A bank with these levels, rounded.
fn bank(like: &Bank, levels: &[f64; LEVELS]) -> &'static Bank {
    let mut rounded = levels.map(|level| level.round().clamp(-127.0, 127.0) as i8);
    let tables = rounded.chunks_mut(1 << like.bits());
    for table in tables {
        for i in 1..table.len() {
            table[i] = table[i].max(table[i - 1].saturating_add(1));
        }
    }
    Box::leak(Box::new(Bank::new(like.bits(), like.knee(), like.step(), rounded)))
}

/// Levels to begin with: every table denser in the middle than the one before, and not symmetric.
fn start(bits: u32, seed: u64) -> [f64; LEVELS] {
    let (mut stream, len) = (Stream(seed), 1 << bits);
    let mut levels = [0.0; LEVELS];
    for (t, table) in levels.chunks_mut(len).enumerate() {
        let (bend, shift) = (0.7 + 0.35 * t as f64 + 0.2 * stream.uniform(), 0.12 * (stream.uniform() - 0.3));
        for (i, level) in table.iter_mut().enumerate() {
            let x = (2 * i + 1) as f64 / len as f64 - 1.0;
            *level = 127.0 * ((bend * x).sinh() / bend.sinh() + shift * (1.0 - x * x));
        }
    }
    levels
}

/// Makes the levels of a bank.
fn fit(bits: u32, files: &[String]) {
    let like = codecs::all().iter().filter_map(|c| c.grouped().ok()?.bank()).find(|b| b.bits() == bits);
    let like = like.expect("banks of 4, 5 and 6 bits");
    let groups: &[usize] = if bits == 6 { &[16] } else { &[16, 32] };
    let real: Vec<Matrix> = files.iter().flat_map(|file| Matrix::read(file, SAMPLE)).collect();
    let sources =
        [(1.0, vec![Matrix::gaussian(ROWS, 1)]), (0.5, vec![Matrix::t5(ROWS, 2)]), (1.0, real)].map(|(weight, all)| {
            let energy: f64 = all.iter().map(Matrix::energy).sum();
            (if energy > 0.0 { weight / energy } else { 0.0 }, all)
        });
    let mut best = (f64::INFINITY, like);
    for seed in 0..SEEDS {
        let mut levels = start(bits, seed);
        for round in 0..ROUNDS {
            let bank = bank(like, &levels);
            let mut all = Sums::ZERO;
            for &group in groups {
                let layout = Grouped::new(bits, Levels::Bank(bank), group, Float::F32, None);
                for (weight, matrices) in &sources {
                    for matrix in matrices {
                        all.add(&sums(&layout, bank, matrix), *weight / (2.5 * groups.len() as f64));
                    }
                }
            }
            if all.error < best.0 {
                best = (all.error, bank);
            }
            if round % 10 == 0 || round + 1 == ROUNDS {
                println!("seed {seed} round {round}: {:.4e}", all.error);
            }
            for (i, level) in levels.iter_mut().enumerate() {
                if all.squares[i] > 0.0 {
                    *level += 1.2 * (all.products[i] / all.squares[i] - f64::from(bank.levels()[i]));
                }
            }
            let greatest = levels.iter().fold(0.0_f64, |max, level| max.max(level.abs()));
            levels.iter_mut().for_each(|level| *level *= 127.0 / greatest);
            levels.chunks_mut(1 << bits).for_each(|table| table.sort_by(f64::total_cmp));
        }
    }
    println!("{:.4e}: {:?}", best.0, best.1.levels());
}

/// Prints error and speed of every codec with a bank.
fn measure(files: &[String]) {
    let mut sets = vec![vec![Matrix::gaussian(COLS, 11)], vec![Matrix::t5(COLS, 12)]];
    sets.extend(files.iter().map(|file| Matrix::read(file, 1)));
    let names = ["gaussian", "t5"].into_iter().chain(files.iter().map(String::as_str)).collect::<Vec<_>>();
    println!("nMSE of 2048 x 2048 weights, and Mweights/s of the search on one thread\n");
    println!("| codec | bits | {} | Mweights/s |", names.join(" | "));
    println!("|---|---|{}---|", "---|".repeat(names.len()));
    for codec in codecs::all() {
        let Ok(layout) = codec.grouped() else { continue };
        let Some(bank) = layout.bank() else { continue };
        let losses = sets.iter().map(|set| {
            let error: f64 = set.iter().map(|matrix| sums(layout, bank, matrix).error).sum();
            format!("{:.3e}", error / set.iter().map(Matrix::energy).sum::<f64>())
        });
        let losses = losses.collect::<Vec<_>>().join(" | ");
        let matrix = Matrix::gaussian(128, 13);
        let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
        let mut seconds = f64::INFINITY;
        for _ in 0..3 {
            let start = Instant::now();
            one.install(|| std::hint::black_box(encode(layout, &matrix)));
            seconds = seconds.min(start.elapsed().as_secs_f64());
        }
        let speed = matrix.weights.len() as f64 / seconds / 1e6;
        let bits = layout_bits(&codec.layout);
        println!("| `{}` | {bits} | {losses} | {speed:.1} |", codec.id);
    }
}

fn layout_bits(layout: &Layout) -> f64 {
    layout.bits_per_weight().unwrap_or_default()
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    match args.first().map(String::as_str) {
        Some("fit") => fit(args[1].parse().expect("the bits of a code"), &args[2..]),
        _ => measure(&args),
    }
}
