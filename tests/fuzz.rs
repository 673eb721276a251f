//! The functions that `fuzz/` gives to libFuzzer, on sound files, on what fuzzing has found, and on mutations of both.
//!
//! `TENPAK_CAMPAIGN` says how many mutations there are, `TENPAK_CORPUS` a folder to write the sound files to, for libFuzzer
//! to begin with.

#![cfg(unix)]

#[path = "support/format.rs"]
mod format;
mod support;
#[path = "../fuzz/targets.rs"]
mod targets;

use std::io::{Cursor, Write as _};
use std::path::Path;
use std::time::Instant;

use format::{Artifact, Delta, Entry, Plane};
use rayon::prelude::*;
use support::{Random, Tensor, codec, safetensors};
use targets::TARGETS;
use tenpak::{DType, codecs};

/// Sound files, and files that were found, of a target.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    let mut seeds = match target {
        "artifact" => artifacts(),
        "delta" => vec![delta()],
        "safetensors" => vec![safetensors(&[
            Tensor::random("a.weight", DType::F32, &[3, 5], 1),
            Tensor::random("b", DType::BF16, &[2], 2),
        ])],
        "index" => {
            let shards = [("a", "one"), ("b", "one"), ("c", "two"), ("d", "two")];
            let map: Vec<_> = shards.iter().map(|(name, shard)| format!("\"{name}\":\"{shard}.safetensors\"")).collect();
            vec![format!("{{\"metadata\":{{\"total_size\":16}},\"weight_map\":{{{}}}}}", map.join(",")).into_bytes()]
        }
        "gguf" => vec![gguf()],
        "npz" => vec![array(), archive(zip::CompressionMethod::Stored), archive(zip::CompressionMethod::Deflated)],
        "bundle" => vec![
            br#"{"tensors":[{"name":"a","dtype":"F16","shape":[2,2],"data":[1,-2.5e1,0.125,3]}],"activation_stats":{"a":[1,2]}}"#
                .to_vec(),
        ],
        "coded" => coded(),
        "round_trip" => (0..u8::try_from(codecs::all().len()).unwrap())
            .map(|id| [&[id, id % 3, 130][..], &Tensor::random("w", DType::F32, &[3, 131], 1).bytes].concat())
            .collect(),
        other => panic!("no seeds of {other}"),
    };
    let found = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/found").join(target);
    let entries = std::fs::read_dir(found).into_iter().flatten();
    seeds.extend(entries.map(|entry| std::fs::read(entry.unwrap().path()).unwrap()));
    seeds
}

fn artifacts() -> Vec<Vec<u8>> {
    let weights = |rows, cols| Tensor::random("w", DType::F32, &[rows, cols], 3).weights();
    let encoded = |id, rows, cols| Entry::encoded(id, &[rows, cols], false, codec(id), &weights(rows, cols));
    let codes: Vec<u8> = (0..60 * 21_usize).map(|i| [126, 127, 128, 129][i * i % 7 % 4]).collect();
    let outliers = [(0, 3, 7.5), (0, 11, -2.0), (2, 0, 0.125)];
    let scales: Vec<f32> = (1..=12).map(|i| i as f32 * 0.25).collect();
    let mut several = Artifact::new(vec![
        encoded("int4_g8_fp16_v1", 3, 21),
        encoded("int5_k16_v1", 2, 40),
        Entry::raw("r", DType::I32, &[3], &[7; 12]),
        Entry::encoded("t", &[16, 4], true, codec("int8_sym_v1"), &weights(16, 4)),
        Entry::raw("e", DType::F32, &[0, 4], &[]),
    ]);
    several.metadata.push(("format".to_owned(), "pt".to_owned()));
    several.files.push(Plane { name: "config.json".to_owned(), bytes: b"{\"a\": 1}".to_vec(), ..Plane::default() });
    let coded = Artifact::new(vec![Entry::coded("coded", [60, 21], &codes, 0.5)]);
    let extra = Artifact::new(vec![Entry::extra("e", [3, 12], codec("int4_g8_fp16_v1"), &scales, &outliers)]);
    [several, coded, extra].map(|artifact| artifact.bytes()).into()
}

/// A delta of the base that `fuzz/targets.rs` makes.
fn delta() -> Vec<u8> {
    let raw = |name, bytes: &[u8]| Entry::raw(name, DType::U8, &[4], bytes);
    let base = [raw("a", &[1, 2, 3, 4]), raw("b", &[5, 6, 7, 8]), raw("c", &[9, 10, 11, 12])];
    let mut delta = Artifact::new(vec![raw("b", &[0; 4])]);
    let result = Artifact::identity_of([&base[0], &delta.tensors[0], &base[2]].into_iter());
    let base = Artifact::identity_of(base.iter());
    delta.delta = Some(Delta { base, result, runs: vec![(0, 1), (-1, 1), (2, 1)] });
    delta.bytes()
}

fn gguf() -> Vec<u8> {
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    let text = |out: &mut Vec<u8>, text: &str| {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    };
    let numbers = |out: &mut Vec<u8>, all: &[u64]| all.iter().for_each(|n| out.extend(n.to_le_bytes()));
    numbers(&mut out, &[2, 3]);
    text(&mut out, "general.architecture");
    out.extend(8_u32.to_le_bytes());
    text(&mut out, "llama");
    text(&mut out, "llama.attention.head_count");
    out.extend([4_u32, 1].map(u32::to_le_bytes).concat());
    text(&mut out, "tokens");
    out.extend([9_u32, 8].map(u32::to_le_bytes).concat());
    numbers(&mut out, &[2, 1]);
    out.push(b'a');
    numbers(&mut out, &[1]);
    out.push(b'b');
    for (name, kind, offset) in [("blk.0.attn_q.weight", 2_u32, 0), ("output_norm.weight", 0, 64)] {
        text(&mut out, name);
        out.extend(2_u32.to_le_bytes());
        numbers(&mut out, &[32, 2]);
        out.extend(kind.to_le_bytes());
        numbers(&mut out, &[offset]);
    }
    out.resize(out.len().next_multiple_of(32) + 64 + 256, 1);
    out
}

fn array() -> Vec<u8> {
    let mut header = "{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3), }".to_owned();
    header.extend(std::iter::repeat_n(' ', 117 - header.len()));
    header.push('\n');
    let mut file = b"\x93NUMPY\x01\x00\x76\x00".to_vec();
    file.extend(header.into_bytes());
    file.extend([0x3f; 24]);
    file
}

fn archive(method: zip::CompressionMethod) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for name in ["a.npy", "b.npy"] {
        writer.start_file(name, zip::write::SimpleFileOptions::default().compression_method(method)).unwrap();
        writer.write_all(&array()).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

fn coded() -> Vec<Vec<u8>> {
    let shaped =
        |rows: u16, cols: u16, stream: Vec<u8>| [&rows.to_le_bytes(), &cols.to_le_bytes(), &stream[..]].concat();
    let codes: Vec<u8> = (0..60 * 21_usize).map(|i| [126, 127, 128, 129][i * i % 7 % 4]).collect();
    let scales: Vec<f32> = (0..60).map(|i| 0.25 + (i % 5) as f32).collect();
    vec![
        shaped(60, 21, tenpak::coding::encode(&codes, 60, 21).unwrap()),
        shaped(60, 21, tenpak::coding::encode_scales(&scales)),
    ]
}

/// Numbers at which arithmetic goes wrong.
const EDGES: [u64; 10] = [0, 1, 63, 64, 1 << 20, 1 << 31, 1 << 60, (1 << 63) - 1, 1 << 63, u64::MAX];

/// Changes something, of one kind or another.
fn mutate(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let at = random.below(bytes.len().max(1));
    let end = (at + 1 + random.below(16)).min(bytes.len());
    match random.below(9) {
        _ if bytes.is_empty() => bytes.push(b'{'),
        0 => bytes[at] ^= 1 << random.below(8),
        1 => bytes[at] = random.bits().to_le_bytes()[0],
        2 => drop(bytes.drain(at..end)),
        3 => {
            let again = bytes[at..end].to_vec();
            bytes.splice(at..at, again);
        }
        4 => {
            let edge = EDGES[random.below(EDGES.len())].to_le_bytes();
            let len = [2, 4, 8][random.below(3)].min(bytes.len() - at);
            bytes[at..at + len].copy_from_slice(&edge[..len]);
        }
        5 => {
            // A number in a text.
            if let Some(from) = bytes[at..].iter().position(u8::is_ascii_digit).map(|n| at + n) {
                let until = bytes[from..].iter().position(|b| !b.is_ascii_digit()).map_or(bytes.len(), |n| from + n);
                bytes.splice(from..until, EDGES[random.below(EDGES.len())].to_string().into_bytes());
            }
        }
        6 => bytes.truncate(at),
        7 => bytes.insert(at, b"{}[],:\"\\ -e.0\xff"[random.below(14)]),
        _ if other.is_empty() => {}
        _ => {
            let from = random.below(other.len());
            let piece = other[from..(from + 1 + random.below(40)).min(other.len())].to_vec();
            bytes.splice(at..at, piece);
        }
    }
}

#[test]
fn sound_files_and_files_that_were_found_are_read() {
    for (name, target) in TARGETS {
        for (number, seed) in seeds(name).iter().enumerate() {
            target(seed);
            if let Some(folder) = std::env::var_os("TENPAK_CORPUS") {
                let folder = Path::new(&folder).join(name);
                std::fs::create_dir_all(&folder).unwrap();
                std::fs::write(folder.join(number.to_string()), seed).unwrap();
            }
        }
    }
}

#[test]
fn mutations_of_every_kind_of_file_end_in_a_result_or_an_error() {
    let start = Instant::now();
    let rounds = std::env::var("TENPAK_CAMPAIGN").map_or(9 * 800, |count| count.parse().unwrap());
    let each = rounds / TARGETS.len();
    let tasks = 4;
    let all: Vec<_> = TARGETS.iter().flat_map(|&target| (0..tasks).map(move |task| (target, task))).collect();
    all.par_iter().for_each(|&((name, target), task)| {
        let seeds = seeds(name);
        let mut random = Random(task as u64);
        for round in 0..each / tasks {
            let mut bytes = seeds[random.below(seeds.len())].clone();
            let other = seeds[random.below(seeds.len())].clone();
            for _ in 0..=random.below(4) {
                mutate(&mut bytes, &other, &mut random);
            }
            let run = std::panic::catch_unwind(|| target(&bytes));
            assert!(run.is_ok(), "target {name}, task {task}, round {round}: {:?}", String::from_utf8_lossy(&bytes));
        }
    });
    let cases = each / tasks * tasks * TARGETS.len();
    eprintln!("campaign mutations: {cases} cases, 0 failures; {} targets, {:?}", TARGETS.len(), start.elapsed());
}
