//! The bytes of every codec, pinned.
//!
//! A golden file holds what one fixed matrix becomes: the planes, and the bits of the weights they decode to (the first
//! and last of them, and the BLAKE3 of all). Files
//! can be created (`TENPAK_GOLDEN=create cargo test --test golden`, where there is none) and are never overwritten: what
//! was once written must decode to the same weights for ever, and what is written must stay the same under its id.

use std::fmt::Write as _;
use std::path::PathBuf;

use tenpak::{Codec, DType, Encoded, codecs};

const ROWS: usize = 3;
const COLS: usize = 172;

/// The matrix: one row of ties, zeros and constants, one of far and small ranges, one of ordinary weights.
fn matrix() -> Vec<f32> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        f32::from(u16::try_from(state >> 48).unwrap())
    };
    let mut weights = Vec::with_capacity(ROWS * COLS);
    for c in 0..COLS {
        weights.push(match (c / 32, c % 16) {
            (0, 0) => -7.5,
            (0, 15) => 7.5,
            (0, _) => 0.5 * ((c * 7) % 31) as f32 - 7.5,
            (1, _) => 0.0,
            (2, 0..8) => 0.375,
            (2, _) => -0.0,
            (3, _) => {
                if c % 8 == 3 {
                    -1.0
                } else {
                    0.0
                }
            }
            _ => f32::from(i16::try_from(c % 9).unwrap()) - 4.0,
        });
    }
    for c in 0..COLS {
        let x = next() / 65_536.0 - 0.5;
        weights.push(if c < 64 {
            1000.0 + x
        } else if c < 128 {
            x * 0.015_625
        } else {
            x * 20_000.0
        });
    }
    for _ in 0..COLS {
        let sum: f32 = (0..4).map(|_| next() / 65_536.0 - 0.5).sum();
        weights.push(sum * 0.0625);
    }
    weights
}

fn path(codec: &Codec) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{}.txt", codec.id))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

fn unhex(hex: &str) -> Vec<u8> {
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
}

/// What the golden file says: one line for each plane, and the bits of the first and last decoded weights with a
/// checksum of all.
fn describe(encoded: &Encoded) -> String {
    let mut text = String::new();
    for (plane, bytes) in encoded.planes() {
        let _ = writeln!(text, "{} {}", plane.name(), hex(bytes));
    }
    text + &weights_line(&encoded.decode())
}

fn weights_line(weights: &[f32]) -> String {
    let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
    let (first, last) = (hex(&bytes[..64]), hex(&bytes[bytes.len() - 64..]));
    format!("weights {first} .. {last} blake3 {}\n", blake3::hash(&bytes).to_hex())
}

#[test]
fn every_codec_writes_and_reads_its_golden_bytes() {
    let weights = matrix();
    let mut missing = Vec::new();
    for codec in codecs::all() {
        if codec.grouped().is_err() {
            continue;
        }
        let encoded = codec.encode(&weights, ROWS, COLS).unwrap();
        let got = describe(&encoded);
        let path = path(codec);
        let Ok(want) = std::fs::read_to_string(&path) else {
            if std::env::var("TENPAK_GOLDEN").is_ok_and(|value| value == "create") {
                std::fs::write(&path, got).unwrap();
            } else {
                missing.push(codec.id);
            }
            continue;
        };
        assert_eq!(got, want, "the bytes of {} changed: give it a new id", codec.id);

        let planes: Vec<Vec<u8>> = want
            .lines()
            .filter(|line| !line.starts_with("weights "))
            .map(|line| unhex(line.split_once(' ').unwrap().1))
            .collect();
        let stored = Encoded::from_planes(codec, ROWS, COLS, planes).unwrap();
        let decoded = weights_line(&stored.decode());
        assert!(want.ends_with(&decoded), "the stored bytes of {} decode to other weights: give it a new id", codec.id);
    }
    assert!(missing.is_empty(), "no golden file for {missing:?}: TENPAK_GOLDEN=create cargo test --test golden");
}

#[test]
fn the_raw_codec_keeps_the_bytes_of_every_dtype() {
    let raw = codecs::get(codecs::RAW).unwrap();
    for &dtype in DType::ALL {
        let sizes = raw.layout.plane_bytes(dtype, ROWS as u64, COLS as u64).unwrap();
        assert_eq!(sizes.len(), 1);
        assert_eq!(sizes[0].1, (ROWS * COLS) as u64 * dtype.size(), "{dtype}");
    }
}

#[test]
fn no_golden_file_is_without_a_codec() {
    for entry in std::fs::read_dir(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let id = name.strip_suffix(".txt").unwrap();
        assert!(codecs::get(id).is_ok(), "{name}: decoders stay for ever");
    }
}
