//! Encode and decode of every codec, a matrix that stays in the second-level cache: for finding out what a change of
//! the code does. What a user gets from memory is measured by `sidebyside`.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use tenpak::codec::{decode_rows, encode_rows};
use tenpak::{codecs, layout};

mod buffers;
use buffers::{Buffers, weights};

const ROWS: usize = 32;
const COLS: usize = 2048;

fn codec(c: &mut Criterion) {
    let source = weights(ROWS * COLS);
    let mut out = vec![0.0; ROWS * COLS];
    for direction in ["encode", "decode"] {
        let mut group = c.benchmark_group(direction);
        group.throughput(Throughput::Bytes(4 * (ROWS * COLS) as u64));
        for codec in codecs::all() {
            let layout::Layout::Grouped(layout) = &codec.layout else { continue };
            let mut planes = Buffers::new(layout, ROWS, COLS);
            encode_rows(layout, codec.fit, &source, COLS, &mut planes.writable()).expect("ordinary weights");
            group.bench_function(BenchmarkId::from_parameter(codec.id), |b| {
                if direction == "encode" {
                    b.iter(|| encode_rows(layout, codec.fit, black_box(&source), COLS, &mut planes.writable()));
                } else {
                    b.iter(|| decode_rows(layout, black_box(&planes.readable()), COLS, &mut out));
                }
            });
        }
    }
}

criterion_group!(benches, codec);
criterion_main!(benches);
