//! Opening an artifact takes no more memory than its header warrants, whatever the header claims.

#![expect(unsafe_code, reason = "an allocator that counts is an allocator")]
#![cfg(unix)]

#[path = "support/format.rs"]
mod format;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use format::{Artifact, Delta, Entry};
use tenpak::artifact::ArtifactFile;
use tenpak::{DType, codecs};

/// The system's allocator, and how much of it is in use.
struct Counting;

static USED: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn grow(bytes: usize) {
    PEAK.fetch_max(USED.fetch_add(bytes, Ordering::Relaxed) + bytes, Ordering::Relaxed);
}

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        grow(layout.size());
        // SAFETY: the caller keeps the promises of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        USED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps the promises of `dealloc`.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Large blocks are moved by the page table, so the old and the new one never take memory together.
        USED.fetch_sub(layout.size(), Ordering::Relaxed);
        grow(size);
        // SAFETY: the caller keeps the promises of `realloc`.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One measurement at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// The most memory that opening these bytes takes at any moment, and whether they opened.
fn peak_of_opening(bytes: &[u8]) -> (usize, bool) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    let before = USED.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let opened = ArtifactFile::open(file.path());
    (PEAK.load(Ordering::Relaxed) - before, opened.is_ok())
}

/// Twice the header is promised for everything a model has; headers of long strings or of runs alone take more.
const PROMISED: usize = 2;
/// A string is in the parser's hands and in the header's at once.
const LONG_STRINGS: usize = 3;
/// A run takes more room as two numbers than as text.
const RUNS: usize = 6;

fn check(name: &str, file: &format::File, sound: bool, factor: usize) {
    let header = file.header.len();
    let (peak, opened) = peak_of_opening(&file.bytes());
    let bound = factor * header + (1 << 20);
    eprintln!("{name}: header {header}, peak {peak}, {:.2} x", peak as f64 / header as f64);
    assert_eq!(opened, sound, "{name}");
    assert!(peak <= bound, "{name}: opening took {peak} bytes, at most {bound} are promised");
}

/// An artifact of many tensors with names as models have them.
fn many(tensors: usize) -> Artifact {
    let codec = codecs::get("int4_g32_fp16_v1").unwrap();
    let entry = |i: usize| match i % 4 {
        0 => Entry::raw(&format!("model.layers.{i}.input_layernorm.weight"), DType::BF16, &[2], &[0; 4]),
        _ => Entry::encoded(&format!("model.layers.{i}.self_attn.q_proj.weight"), &[1, 32], false, codec, &[0.5; 32]),
    };
    Artifact::new((0..tensors).map(entry).collect())
}

#[test]
fn opening_takes_at_most_twice_the_header_and_a_megabyte() {
    let _alone = ALONE.lock();
    for tensors in [1, 1000, 5000, 20_000] {
        check(&format!("{tensors} tensors"), &many(tensors).file(), true, PROMISED);
    }
}

#[test]
fn a_hostile_header_takes_memory_in_proportion_to_its_length() {
    let _alone = ALONE.lock();
    let many_times = |text: &str, count: usize| vec![text; count].join(",");
    let small = || many(3).file();
    let shape = |dims: String| small().edit("\"shape\":[2]", &format!("\"shape\":[{dims}]"));
    check("dimensions", &shape(many_times("0", 5_000_000)), false, PROMISED);
    let plane = "{\"plane\":\"\",\"offset\":0,\"bytes\":0,\"crc32c\":\"\",\"blake3\":\"\"}"
        .replace("\"blake3\":\"\"", &format!("\"blake3\":\"{}\"", "0".repeat(64)));
    check(
        "planes",
        &small().edit("\"planes\":[", &format!("\"planes\":[{},", many_times(&plane, 50_000))),
        false,
        PROMISED,
    );
    let mut entries = Artifact::new(vec![Entry::raw("a", DType::U8, &[0; 8], &[]); 50_000]);
    check("one name again and again", &entries.file(), false, PROMISED);
    entries.tensors.iter_mut().for_each(|t| t.shape = vec![0; 16]);
    check("sixteen dimensions", &entries.file(), false, PROMISED);
    check("element counts", &shape((1_u64 << 60).to_string()), false, PROMISED);
    check("tensors that are not there", &small().edit("\"tensors\":[", "\"tensors\":[0,"), false, PROMISED);
    let source = format!("{{\"name\":\"\",\"bytes\":0,\"blake3\":\"{}\"}}", "0".repeat(64));
    check(
        "sources",
        &small().edit("\"sources\":[]", &format!("\"sources\":[{}]", many_times(&source, 70_000))),
        true,
        PROMISED,
    );
    check("nesting", &shape("[".repeat(5_000_000)), false, PROMISED);
    let name = |bytes: usize| small().edit("model.layers.0", &"n".repeat(bytes));
    check("a name of 5 MB", &name(5_000_000), false, LONG_STRINGS);
    check("a tool of 5 MB", &small().edit("a test", &"n".repeat(5_000_000)), true, LONG_STRINGS);
    let entry = |i: usize| (format!("{i:06}"), String::new());
    let mut metadata = many(1);
    metadata.metadata = (0..300_000).map(entry).collect();
    check("metadata", &metadata.file(), false, PROMISED);
    let file = |i: usize| format::Plane { name: format!("{i:06}.json"), ..format::Plane::default() };
    let mut files = many(1);
    files.files = (0..100_000).map(file).collect();
    check("files", &files.file(), false, PROMISED);
    let runs = |run: fn(i64) -> (i64, u64)| {
        let mut delta = many(1);
        let runs = (0..600_000).map(run).collect();
        delta.delta = Some(Delta { base: delta.identity(), result: delta.identity(), runs });
        delta.file()
    };
    check("runs of one tensor", &runs(|_| (0, 1)), false, RUNS);
    check("runs of nothing", &runs(|_| (-1, 0)), false, RUNS);
    check("runs", &runs(|i| (2 * i, 1)), false, RUNS);
}
