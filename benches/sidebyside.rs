//! One table: every codec beside memcpy of the same buffer in the same run.
//!
//! Copy and codec take turns, and the best of each is compared, because only a ratio means anything on a machine that
//! is shared. `--quick` uses small buffers, `--cache` one that fits the second-level cache; a word that is no flag
//! selects the codecs whose id contains it, `--avx2` and so on another instruction set than the best.

#![expect(clippy::print_stdout, reason = "the table is what this program is for")]

use std::hint::black_box;
use std::time::Instant;

use tenpak::codec::Codec;
use tenpak::codec::isa::{self, Isa};
use tenpak::codecs;
use tenpak::fit::Fit;
use tenpak::layout::Grouped;

mod buffers;
use buffers::{Buffers, weights};

/// A goal of the design: throughput of the uncompressed side over that of memcpy.
const GOAL: f64 = 0.6;
/// A goal of the design for searching fits, in weights per second and core.
const SEARCH_GOAL: f64 = 40e6;

/// What is measured.
struct Plan {
    rows: usize,
    cols: usize,
    repeats: usize,
    threads: &'static [usize],
}

/// One thread's part of a matrix.
struct Part {
    source: Vec<f32>,
    out: Vec<f32>,
    planes: Buffers,
}

/// Runs `work` on every part at once and returns the seconds it took, the best of `repeats`.
fn best(parts: &mut [Part], repeats: usize, rounds: usize, work: impl Fn(&mut Part) + Sync) -> f64 {
    let once = |parts: &mut [Part]| {
        let start = Instant::now();
        if let [part] = parts {
            (0..rounds).for_each(|_| work(part));
        } else {
            std::thread::scope(|scope| {
                for part in parts {
                    scope.spawn(|| (0..rounds).for_each(|_| work(part)));
                }
            });
        }
        start.elapsed().as_secs_f64() / rounds as f64
    };
    (0..repeats).map(|_| once(parts)).fold(f64::INFINITY, f64::min)
}

fn row(isa: &Isa, plan: &Plan, rounds: usize, codec: &Codec, layout: &Grouped, parts: &mut [Part]) {
    let count = (plan.rows * plan.cols * parts.len()) as f64;
    for direction in ["encode", "decode"] {
        let (mut copy, mut time) = (f64::INFINITY, f64::INFINITY);
        let searches = matches!(codec.fit, Fit::Search | Fit::Nested) && direction == "encode";
        let repeats = if searches { 2 } else { plan.repeats };
        for _ in 0..repeats {
            copy = copy.min(best(parts, 1, rounds, |part| {
                part.out.copy_from_slice(black_box(&part.source));
            }));
            time = time.min(best(parts, 1, if searches { 1 } else { rounds }, |part| {
                if direction == "encode" {
                    let planes = &mut part.planes.writable();
                    let result = isa.encode_rows(layout, codec.fit, black_box(&part.source), plan.cols, planes);
                    assert!(result.is_ok(), "ordinary weights");
                } else {
                    isa.decode_rows(layout, black_box(&part.planes.readable()), plan.cols, &mut part.out);
                }
            }));
        }
        let ratio = copy / time;
        let met = if searches { count / time / parts.len() as f64 >= SEARCH_GOAL } else { ratio >= GOAL };
        println!(
            "{:<22} {direction}  {:>7}  {:>7.2}  {:>7.2}  {ratio:>6.2}  {:>6}  {:>9.0}  {}",
            codec.id,
            parts.len(),
            4.0 * count / time / 1e9,
            4.0 * count / copy / 1e9,
            if searches { "40 M/s".into() } else { format!("{GOAL:.2}") },
            count / time / 1e6,
            if met { "yes" } else { "NO" },
        );
    }
    // The relative squared error of what was just decoded, for the fits that are judged by it.
    if let (Some(part), Fit::Search | Fit::Nested | Fit::MinMax) = (parts.first(), codec.fit) {
        let power: f64 = part.source.iter().map(|&w| f64::from(w).powi(2)).sum();
        let error: f64 = part.source.iter().zip(&part.out).map(|(&w, &v)| (f64::from(w) - f64::from(v)).powi(2)).sum();
        println!("{:<22} nMSE    {:.3e}", codec.id, error / power);
    }
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    // Any instruction set of this machine by its name, as in `--avx2`; otherwise the best one.
    let asked = |isa: &&Isa| args.iter().any(|arg| arg.strip_prefix("--") == Some(isa.name()));
    let isa = isa::available().into_iter().find(asked).unwrap_or(isa::best());
    let flag = |name: &str| args.iter().any(|arg| arg == name);
    // `cargo test --benches` runs this without `--bench`, and wants only to know that it works.
    let quick = flag("--quick") || !flag("--bench");
    let plan = match (quick, flag("--cache")) {
        (true, _) => Plan { rows: 64, cols: 4096, repeats: 3, threads: &[1, 2] },
        (false, true) => Plan { rows: 16, cols: 4096, repeats: 9, threads: &[1] },
        (false, false) => Plan { rows: 16_384, cols: 4096, repeats: 5, threads: &[1, 2] },
    };
    let wanted: Vec<&String> = args.iter().filter(|arg| !arg.starts_with('-')).collect();
    let mebibytes = plan.rows * plan.cols / 262_144;
    println!("{} rows x {} cols of f32 a thread, {mebibytes} MiB; instruction set {:?}", plan.rows, plan.cols, isa);
    println!("codec                  way     threads     GB/s   memcpy   ratio    goal  M weights  met");
    let rounds = if quick { 1 } else { (64 / mebibytes.max(1)).clamp(1, 50) };
    for &threads in plan.threads {
        let weights = weights(plan.rows * plan.cols);
        let mut sources: Vec<(Vec<f32>, Vec<f32>)> =
            (0..threads).map(|_| (weights.clone(), vec![1.0; weights.len()])).collect();
        for codec in codecs::all() {
            let Ok(layout) = codec.grouped() else { continue };
            if !wanted.is_empty() && !wanted.iter().any(|word| codec.id.contains(word.as_str())) {
                continue;
            }
            let mut parts: Vec<Part> = sources
                .drain(..)
                .map(|(source, out)| Part { source, out, planes: Buffers::new(layout, plan.rows, plan.cols) })
                .collect();
            row(isa, &plan, rounds, codec, layout, &mut parts);
            sources.extend(parts.into_iter().map(|part| (part.source, part.out)));
        }
    }
}
