//! One table: products with every codec beside the read bandwidth and a dense f32 product of the same run.
//!
//! Reading and multiplying take turns, and the best of each is compared, because only a ratio means anything on a machine
//! that is shared. Few rows of activations are bound by memory: `ratio` is packed bytes a second over the read bandwidth.
//! Weights are as large as `--megabytes` (256) says, `--cache` makes them 1; `--m=1,8,512` are the rows of activations,
//! `--threads=1,2` the threads, `--avx2` and so on another instruction set than the best for f32, `--act=int8` and so on
//! another arithmetic, `--quick` small matrices; a word that is no flag selects the codecs whose id contains it.

#![expect(clippy::print_stdout, reason = "the table is what this program is for")]

use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;
use tenpak::codec::Codec;
use tenpak::gemm::cpu::float::isa::{self, Isa};
use tenpak::gemm::{Act, Weights, cpu};
use tenpak::{Encoded, codecs};

#[path = "buffers/weights.rs"]
mod weights;
use weights::weights;

/// A goal of the design: packed bytes over read bandwidth with one row of activations.
const GOAL: f64 = 0.85;

/// Columns of the matrices.
const COLS: usize = 4096;

/// Seconds that `work` takes.
fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

/// Adds up all bytes as words, with every thread of the pool, as fast as memory gives them.
fn read(weights: &Weights<'_>) -> u64 {
    // Four streams at once, because one does not keep memory busy.
    let part = |bytes: &[u8]| {
        let mut sums = [0u64; 32];
        let (first, second) = bytes.split_at(bytes.len() / 2);
        let ((a, b), (c, d)) = (first.split_at(first.len() / 2), second.split_at(second.len() / 2));
        let lines = a.as_chunks::<64>().0.iter().zip(b.as_chunks::<64>().0);
        for ((a, b), (c, d)) in lines.zip(c.as_chunks::<64>().0.iter().zip(d.as_chunks::<64>().0)) {
            for (sums, line) in sums.as_chunks_mut::<8>().0.iter_mut().zip([a, b, c, d]) {
                for (sum, bytes) in sums.iter_mut().zip(line.as_chunks::<8>().0) {
                    *sum = sum.wrapping_add(u64::from_le_bytes(*bytes));
                }
            }
        }
        sums.iter().fold(0u64, |a, b| a.wrapping_add(*b))
    };
    let planes = weights.planes();
    let sum = |plane: &[u8]| plane.par_chunks(1 << 17).map(part).reduce(|| 0, u64::wrapping_add);
    [planes.codes, planes.high_codes, planes.scales, planes.addends, planes.row_scales]
        .into_iter()
        .map(sum)
        .fold(0, u64::wrapping_add)
}

/// Options of a run.
struct Plan {
    isa: &'static Isa,
    act: Act,
    bytes: usize,
    repeats: usize,
}

fn row(plan: &Plan, codec: &'static Codec, encoded: &Encoded, m: usize) {
    let matrix = Weights::from(encoded);
    let x = weights(m * COLS);
    let mut y = vec![1.0; m * matrix.rows()];
    let (mut reading, mut time) = (f64::INFINITY, f64::INFINITY);
    let rounds = if m > 8 { 1 } else { (plan.bytes.min(1 << 20) / matrix.bytes()).max(1) };
    let start = Instant::now();
    for repeat in 0.. {
        if repeat >= plan.repeats && (plan.repeats < 5 || start.elapsed().as_secs_f64() > 1.0) {
            break;
        }
        reading = reading.min(seconds(|| {
            (0..rounds).for_each(|_| {
                black_box(read(black_box(&matrix)));
            });
        }));
        time = time.min(seconds(|| {
            (0..rounds).for_each(|_| {
                let result = match plan.act {
                    Act::F32 => plan.isa.multiply(black_box(&matrix), &x, m, &mut y),
                    act => cpu::multiply(black_box(&matrix), &x, m, act, &mut y),
                };
                result.expect("sizes match");
            });
        }));
    }
    let bandwidth = (rounds * matrix.bytes()) as f64 / reading / 1e9;
    let packed = (rounds * matrix.bytes()) as f64 / time / 1e9;
    let flops = 2.0 * (rounds * matrix.rows() * COLS * m) as f64 / time / 1e9;
    let ratio = packed / bandwidth;
    println!(
        "{:<22} {:>8} {m:>5} {:>7} {packed:>9.2} {bandwidth:>9.2} {ratio:>6.2} {flops:>9.1}  {}",
        codec.id,
        if plan.act == Act::F32 { plan.isa.name() } else { plan.act.name() },
        rayon::current_num_threads(),
        match m {
            1 if ratio >= GOAL => "yes",
            1 => "NO",
            _ => "",
        },
    );
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let flag = |name: &str| args.iter().any(|arg| arg == name);
    let numbers = |name: &str, default: &[usize]| {
        let given = args.iter().find_map(|arg| arg.strip_prefix(name));
        given.map_or(default.to_vec(), |list| list.split(',').map(|n| n.parse().expect("a number")).collect())
    };
    // `cargo test --benches` runs this without `--bench`, and wants only to know that it works.
    let quick = flag("--quick") || !flag("--bench");
    let asked = |isa: &&Isa| args.iter().any(|arg| arg.strip_prefix("--") == Some(isa.name()));
    let isa = isa::available().into_iter().find(asked).unwrap_or(isa::best());
    let megabytes = if quick || flag("--cache") { 1 } else { 256 };
    let bytes = numbers("--megabytes=", &[megabytes])[0] << 20;
    let act = args.iter().find_map(|arg| arg.strip_prefix("--act=")).unwrap_or("float32");
    let act = act.parse().expect("float32, bfloat16 or int8");
    let plan = Plan { isa, act, bytes, repeats: if quick { 2 } else { 5 } };
    let wanted: Vec<&String> = args.iter().filter(|arg| !arg.starts_with('-')).collect();
    println!("{} MiB of weights with {COLS} columns; GB/s of weights and of reading in the same run", bytes >> 20);
    println!("codec                       isa     m threads      GB/s      read  ratio   GFLOP/s  met");
    for codec in codecs::all().iter().filter(|codec| codec.grouped().is_ok()) {
        if !wanted.is_empty() && !wanted.iter().any(|word| codec.id.contains(word.as_str())) {
            continue;
        }
        // One row encoded many times over is as good as a matrix: nothing depends on what the codes are.
        let one = codec.encode(&weights(COLS), 1, COLS).expect("ordinary weights");
        let rows = (bytes / Weights::from(&one).bytes()).max(64);
        let planes = one.planes().map(|(_, plane)| plane.repeat(rows)).collect();
        let encoded = Encoded::from_planes(codec, rows, COLS, planes).expect("planes of as many rows");
        for threads in numbers("--threads=", &[1, 2]) {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
            for m in numbers("--m=", if quick { &[1, 16] } else { &[1, 8] }) {
                pool.install(|| row(&plan, codec, &encoded, m));
            }
        }
    }
}
