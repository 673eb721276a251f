//! One table for each graphics device: products beside the device's own copy bandwidth and the CPU's products.
//!
//! `GB/s` are packed bytes of weights, `ratio` what they are of the bandwidth of copying on the device (read and written,
//! both counted), measured before. Each product is timed twice: `call` is one by itself, from activations in memory to
//! results in memory; `batch` is one of many in a submission, which is what the device itself takes. The CPU multiplies in
//! the same run, with all threads, in turns with the device, and the best of each is taken.
//!
//! A second table is attention over a quantized cache: 8 heads of keys and values of 128 channels, four heads of queries to
//! each, one token; `GB/s` are bytes of the cache, `--tokens=1024,16384` their number.
//!
//! `--megabytes=N` are the weights of a matrix, `--m=1,8,64,512` the rows of activations, `--device=N` one device instead
//! of all, `--act=float16` another arithmetic, `--no-subgroups` sums through workgroup memory, `--quick` small matrices; a
//! word that is no flag selects the codecs whose id contains it. Where there is no device, the table says so.

#![expect(clippy::print_stdout, reason = "the table is what this program is for")]

use std::hint::black_box;
use std::time::Instant;

use tenpak::attention::{Attend, KvCache, KvFormat, attend};
use tenpak::codec::Codec;
use tenpak::gemm::wgpu::{Options, Wgpu, adapters};
use tenpak::gemm::{Act, Matrix, Weights, cpu};
use tenpak::{Encoded, codecs};

#[path = "buffers/weights.rs"]
mod weights;
use weights::weights;

/// Columns of the matrices.
const COLS: usize = 4096;

/// Codecs that are measured where no word selects any: one of each kind.
const USUAL: [&str; 6] =
    ["int4_g8_fp16_v1", "int4_g32_fp16_v1", "int4_g128_fp16_v1", "int4_k16_v1", "nf4_g64_fp16_v1", "int8_sym_v1"];

/// Options of a run.
struct Plan {
    act: Act,
    bytes: usize,
    ms: Vec<usize>,
    repeats: usize,
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

/// Bytes a second that an adapter copies between buffers of its own, read and written.
fn copy_bandwidth(index: usize, bytes: u64) -> f64 {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let wanted = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
    let adapter = ready(instance.enumerate_adapters(wanted)).into_iter().nth(index).expect("it was listed");
    let opened = ready(adapter.request_device(&wgpu::DeviceDescriptor::default()));
    let (device, queue) = opened.expect("the device was opened before");
    let buffer = |usage| {
        device.create_buffer(&wgpu::BufferDescriptor { label: None, size: bytes, usage, mapped_at_creation: false })
    };
    let (from, to) = (buffer(wgpu::BufferUsages::COPY_SRC), buffer(wgpu::BufferUsages::COPY_DST));
    let mut best = f64::INFINITY;
    for _ in 0..6 {
        const COPIES: u32 = 8;
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        (0..COPIES).for_each(|_| encoder.copy_buffer_to_buffer(&from, 0, &to, 0, bytes));
        let commands = encoder.finish();
        let time = seconds(|| {
            queue.submit([commands]);
            device.poll(wgpu::PollType::wait_indefinitely()).expect("copies come to an end");
        });
        best = best.min(time / f64::from(COPIES));
    }
    2.0 * bytes as f64 / best
}

/// The value of a future that is there at once, as all of these are outside of a browser.
fn ready<T>(future: impl Future<Output = T>) -> T {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match std::pin::pin!(future).as_mut().poll(&mut context) {
        std::task::Poll::Ready(value) => value,
        std::task::Poll::Pending => panic!("a native device answers at once"),
    }
}

fn row(plan: &Plan, device: &Wgpu, bandwidth: f64, codec: &'static Codec, one: &Encoded, m: usize) {
    // A driver that computes on the processor would take minutes for many rows of activations.
    let most = if device.adapter().kind == "cpu" { 1e9 } else { 2e12 };
    let (packed, few) = (Weights::from(one).bytes(), (most / (2 * COLS * m) as f64).max(64.0));
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a number of rows")]
    let rows = (plan.bytes / packed).max(64).min(few as usize);
    let planes = one.planes().map(|(_, plane)| plane.repeat(rows)).collect();
    let encoded = Encoded::from_planes(codec, rows, COLS, planes).expect("planes of as many rows");
    let matrix = Weights::from(&encoded);
    let loaded = device.upload(&matrix).expect("the device has room");
    let (x, mut y) = (weights(m * COLS), vec![0.0; m * rows]);
    let (mut call, mut batch, mut on_cpu) = (f64::INFINITY, f64::INFINITY, f64::INFINITY);
    let times = if device.adapter().kind == "cpu" { 2 } else { 20 };
    for _ in 0..plan.repeats {
        call = call.min(seconds(|| loaded.multiply(black_box(&x), m, plan.act, &mut y).expect("sizes match")));
        let mut many = device.batch().expect("the device works");
        for _ in 0..times {
            many.multiply(&loaded, &x, m, plan.act).expect("sizes match");
        }
        let time = seconds(|| {
            black_box(many.submit().and_then(|pending| pending.wait()).expect("the device works"));
        });
        batch = batch.min(time / f64::from(times));
        on_cpu = on_cpu.min(seconds(|| {
            cpu::multiply(black_box(&matrix), &x, m, plan.act, &mut y).expect("sizes match");
        }));
    }
    let flops = 2.0 * (rows * COLS * m) as f64;
    let rate = matrix.bytes() as f64 / batch;
    println!(
        "{:<20} {rows:>7} {m:>5} {:>10.3} {:>10.3} {:>8.2} {:>6.3} {:>9.1} {:>9.1} {:>7.3}",
        codec.id,
        call * 1e3,
        batch * 1e3,
        rate / 1e9,
        rate / bandwidth,
        flops / batch / 1e9,
        flops / on_cpu / 1e9,
        on_cpu / batch,
    );
}

/// Attention of one token over a cache, on the device and on the processor.
fn attention(plan: &Plan, device: &Wgpu, bandwidth: f64, bits: u32, tokens: usize) {
    let format = KvFormat::new(8, 128, bits, bits).expect("a format");
    let mut cache = KvCache::new(format);
    let numbers = weights(tokens * format.token());
    cache.append(&numbers, &numbers).expect("ordinary numbers");
    let q = weights(4 * format.token());
    let (mut out, mut theirs) = (vec![0.0; q.len()], vec![0.0; q.len()]);
    let loaded = device.upload_cache(cache).expect("the device has room");
    let (mut call, mut batch, mut on_cpu) = (f64::INFINITY, f64::INFINITY, f64::INFINITY);
    let times = if device.adapter().kind == "cpu" { 2 } else { 20 };
    for _ in 0..plan.repeats {
        let options = Attend::default();
        call = call.min(seconds(|| loaded.attend(black_box(&q), 1, options, &mut out).expect("sizes match")));
        let mut many = device.batch().expect("the device works");
        for _ in 0..times {
            many.attend(&loaded, &q, 1, options).expect("sizes match");
        }
        let time = seconds(|| {
            black_box(many.submit().and_then(|pending| pending.wait()).expect("the device works"));
        });
        batch = batch.min(time / f64::from(times));
        on_cpu = on_cpu.min(seconds(|| {
            attend(loaded.tokens(), black_box(&q), 1, options, &mut theirs).expect("sizes match");
        }));
    }
    let rate = loaded.tokens().bytes() as f64 / batch;
    println!(
        "{:<20} {tokens:>7} {:>10.3} {:>10.3} {:>8.2} {:>6.3} {:>10.3} {:>7.3}",
        format!("{bits} bits"),
        call * 1e3,
        batch * 1e3,
        rate / 1e9,
        rate / bandwidth,
        on_cpu * 1e3,
        on_cpu / batch,
    );
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let flag = |name: &str| args.iter().any(|arg| arg == name);
    let value = |name: &str| args.iter().find_map(|arg| arg.strip_prefix(name));
    // `cargo test --benches` runs this without `--bench`, and wants only to know that it works.
    let quick = flag("--quick") || !flag("--bench");
    let megabytes = value("--megabytes=").map_or(if quick { 1 } else { 128 }, |n| n.parse().expect("a number"));
    let ms = value("--m=").unwrap_or(if quick { "1,16" } else { "1,4,8,64,512" });
    let plan = Plan {
        act: value("--act=").unwrap_or("float32").parse().expect("the name of an arithmetic"),
        bytes: megabytes << 20,
        ms: ms.split(',').map(|n| n.parse().expect("numbers")).collect(),
        repeats: if quick { 2 } else { 5 },
    };
    let tokens = value("--tokens=").unwrap_or(if quick { "100" } else { "1024,16384" });
    let tokens: Vec<usize> = tokens.split(',').map(|n| n.parse().expect("numbers")).collect();
    let words: Vec<&String> = args.iter().filter(|arg| !arg.starts_with('-')).collect();
    let chosen = |codec: &&Codec| match &words[..] {
        [] => USUAL[..if quick { 2 } else { USUAL.len() }].contains(&codec.id),
        words => codec.grouped().is_ok() && words.iter().any(|word| codec.id.contains(word.as_str())),
    };
    let only: Option<usize> = value("--device=").map(|n| n.parse().expect("a number"));
    let found = adapters();
    if found.is_empty() {
        println!("no graphics device was found; install a Vulkan driver, e.g. mesa-vulkan-drivers");
    }
    for adapter in found.iter().filter(|adapter| only.is_none_or(|only| only == adapter.index)) {
        let options = Options { subgroups: !flag("--no-subgroups"), ..Options::default() };
        let device = match Wgpu::with(Some(adapter.index), options) {
            Ok(device) => device,
            Err(e) => {
                println!("wgpu:{}: {e}", adapter.index);
                continue;
            }
        };
        let bandwidth = copy_bandwidth(adapter.index, if quick { 1 << 20 } else { 64 << 20 });
        println!(
            "wgpu:{} {} ({}, {}), {}; copies {:.1} GB/s; {COLS} columns, {}, {} CPU threads",
            adapter.index,
            adapter.name,
            adapter.backend,
            adapter.kind,
            adapter.driver,
            bandwidth / 1e9,
            plan.act.name(),
            rayon::current_num_threads(),
        );
        println!(
            "codec                   rows     m    call ms   batch ms     GB/s  ratio   GFLOP/s       CPU   x CPU"
        );
        for codec in codecs::all().iter().filter(chosen) {
            // One row encoded many times over is as good as a matrix: nothing depends on what the codes are.
            let one = codec.encode(&weights(COLS), 1, COLS).expect("ordinary weights");
            for &m in &plan.ms {
                row(&plan, &device, bandwidth, codec, &one, m);
            }
        }
        println!("\nattention             tokens    call ms   batch ms     GB/s  ratio     CPU ms   x CPU");
        for bits in [4, 8] {
            for &count in &tokens {
                attention(&plan, &device, bandwidth, bits, count);
            }
        }
    }
}
