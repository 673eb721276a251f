//! Every rule of the format, broken once in a file whose checksums are correct, and the error that says so.

#![cfg(unix)]

#[path = "support/damage.rs"]
mod damage;
#[path = "support/format.rs"]
mod format;
mod support;

use std::collections::HashSet;

use damage::{Outcome, Probe};
use format::{Artifact, Delta, Entry, File, Plane};
use support::Tensor;
use tenpak::artifact::ArtifactFile;
use tenpak::{DType, Limits, codecs};

/// An encoded, a raw and a transposed tensor; rows of the first have unused bits.
fn sample() -> Artifact {
    let encoded = |name: &str, shape: &[u64], transposed, id: &str| {
        let weights = Tensor::random(name, DType::F32, shape, 3).weights();
        Entry::encoded(name, shape, transposed, codecs::get(id).unwrap(), &weights)
    };
    let mut artifact = Artifact::new(vec![
        encoded("w", &[3, 21], false, "int4_g8_fp16_v1"),
        Entry::raw("r", DType::I32, &[3], &[7; 12]),
        encoded("t", &[16, 4], true, "int8_sym_v1"),
        encoded("z", &[2, 70], false, "int4_zp_g32_fp16_v1"),
    ]);
    artifact.metadata.push(("format".to_owned(), "pt".to_owned()));
    artifact.files = vec![attached("config.json", b"{\"vocab_size\": 5}"), attached("tokenizer.json", &[b' '; 70])];
    artifact
}

fn attached(name: &str, bytes: &[u8]) -> Plane {
    Plane { name: name.to_owned(), bytes: bytes.to_vec(), ..Plane::default() }
}

/// A rule that is broken, the kind of error and what its message says.
type Case = (&'static str, Vec<u8>, fn(String) -> Outcome, String);

struct Cases(Vec<Case>);

impl Cases {
    fn add(&mut self, name: &'static str, bytes: Vec<u8>, kind: fn(String) -> Outcome, says: impl Into<String>) {
        self.0.push((name, bytes, kind, says.into()));
    }

    /// The content is changed, and everything that follows from it.
    fn content(
        &mut self,
        name: &'static str,
        kind: fn(String) -> Outcome,
        says: impl Into<String>,
        change: impl Fn(&mut Artifact),
    ) {
        let mut artifact = sample();
        change(&mut artifact);
        self.add(name, artifact.bytes(), kind, says);
    }

    /// The text of the header is changed, and the checksum of the header.
    fn text(&mut self, name: &'static str, says: &str, from: &str, to: &str) {
        self.add(name, sample().file().edit(from, to).bytes(), Outcome::Corrupt, says);
    }

    fn file(&mut self, name: &'static str, kind: fn(String) -> Outcome, says: &str, change: impl Fn(&mut File)) {
        let mut file = sample().file();
        change(&mut file);
        self.add(name, file.bytes(), kind, says);
    }
}

fn preambles(cases: &mut Cases) {
    use Outcome::{Corrupt, Limit, Unsupported};
    cases.file("magic of another format", Corrupt, "not a tenpak artifact", |f| f.magic = *b"GGUF\x03\0\0\0");
    cases.file("magic after a newline conversion", Corrupt, "magic", |f| f.magic = *b"\x89TNPK\n\x1a\0");
    cases.file("wrong preamble checksum", Corrupt, "preamble checksum is 00000001", |f| f.preamble_crc32c = Some(1));
    cases.file("version 0", Unsupported, "version 0 is not known, this build reads version 1", |f| f.version = 0);
    cases.file("version 2", Unsupported, "version 2 is not known, this build reads version 1", |f| f.version = 2);
    cases.file("highest version", Unsupported, "version 4294967295", |f| f.version = u32::MAX);
    cases.file("unknown flag", Unsupported, "features 0x10, this build knows 0xf", |f| f.flags = 16);
    cases.file("every flag", Unsupported, "features 0xfffffff0", |f| f.flags = u32::MAX);
    cases.file("flag of coded planes without one", Corrupt, "coded planes and the planes contradict", |f| f.flags = 2);
    cases.file("flag of extra planes without one", Corrupt, "extra planes and the planes contradict", |f| f.flags = 4);
    cases.file(
        "flag of a delta of a checkpoint without one",
        Corrupt,
        "deltas of checkpoints and the delta section",
        |f| {
            f.flags = 8;
        },
    );
    cases.file("first reserved byte", Corrupt, "reserved bytes", |f| f.reserved[0] = 1);
    cases.file("last reserved byte", Corrupt, "reserved bytes", |f| f.reserved[23] = 1);
    cases.file("file length too small", Corrupt, "trailing data", |f| f.file_bytes = Some(64));
    cases.file("file length too large", Corrupt, "truncated", |f| f.file_bytes = Some(1 << 40));
    cases.file("greatest file length", Corrupt, "truncated", |f| f.file_bytes = Some(u64::MAX));
    cases.file("header longer than the file", Corrupt, "in a file of", |f| f.header_bytes = 60_000);
    cases.file("header over the limit", Limit, "bytes of the header is 67108865", |f| f.header_bytes = (64 << 20) + 1);
    cases.file("greatest header length", Limit, "bytes of the header", |f| f.header_bytes = u64::MAX);
    cases.file("header that begins late", Corrupt, "header checksum", |f| f.header_bytes -= 1);
    cases.file("header that begins early", Corrupt, "header checksum", |f| f.header_bytes += 1);
    cases.file("no header", Corrupt, "header checksum", |f| f.header_bytes = 0);
    cases.file("wrong header checksum", Corrupt, "header checksum is", |f| f.header_crc32c = Some(0));
    cases.file("delta flag without a section", Corrupt, "contradict", |f| f.flags = 1);
    cases.file("empty body", Corrupt, "beyond the header", |f| f.body.clear());
    cases.file("a page behind the planes", Corrupt, "it begins at byte", |f| f.body.extend([0; 64]));
    cases.file("a byte behind the planes", Corrupt, "it begins at byte", |f| f.body.push(0));
    cases.file("header of no bytes, correctly", Corrupt, "header: EOF", |f| *f = f.clone().header(""));
    let delta = Delta { base: sample().identity(), result: sample().identity(), runs: vec![(-1, 4)] };
    let mut section = sample();
    section.delta = Some(delta);
    let mut file = section.file();
    file.flags = 0;
    cases.add("delta section without the flag", file.bytes(), Corrupt, "contradict");
}

/// A matrix whose planes are both coded.
fn coded_sample() -> Artifact {
    let codes: Vec<u8> = (0..64 * 40_usize).map(|i| [126, 127, 128, 129][i * i % 7 % 4]).collect();
    Artifact::new(vec![Entry::coded("c", [64, 40], &codes, 0.5)])
}

fn codings(cases: &mut Cases) {
    use Outcome::{Corrupt, Unsupported};
    let mut case = |name, kind: fn(String) -> Outcome, says: &str, change: &dyn Fn(&mut Artifact)| {
        let mut artifact = coded_sample();
        change(&mut artifact);
        cases.add(name, artifact.bytes(), kind, says);
    };
    case("unknown coding", Unsupported, "unknown coding 'zip'", &|a| {
        a.tensors[0].planes[0].coding = Some("zip".into())
    });
    case("coding of another plane", Corrupt, "coding scales_v1, which a plane of ecu_v1 does not take", &|a| {
        a.tensors[0].planes[0].coding = Some("scales_v1".into());
    });
    case("coding of a codec that has none", Corrupt, "which a plane of int4_g8_v1 does not take", &|a| {
        a.tensors[0].codec = "int4_g8_v1".into();
        a.tensors[0].rate = None;
    });
    case("coding of a raw tensor", Corrupt, "which a plane of raw_v1 does not take", &|a| {
        let mut raw = Entry::raw("r", DType::U8, &[9], &[1; 9]);
        raw.planes[0].coding = Some("rows_v1".into());
        a.tensors[0] = raw;
    });
    case("a stream as long as its plane", Corrupt, "2560 coded bytes of a plane of 2560, expected fewer", &|a| {
        a.tensors[0].planes[0].bytes.resize(2560, 0);
    });
    case("a short stream of a plane without end", Corrupt, "expected more", &|a| a.tensors[0].shape = vec![1 << 30; 2]);
    case("a plane beyond 63 bits", Corrupt, "larger than 2^63 bytes", &|a| a.tensors[0].shape = vec![1 << 40; 2]);
    case("a rate of no bits", Corrupt, "0 bits per weight, expected 0.1 to 8", &|a| a.tensors[0].rate = Some(0));
    case("a rate beyond what codes take", Corrupt, "8.001 bits per weight", &|a| a.tensors[0].rate = Some(8001));
    case("a rate of a codec with a size of its own", Corrupt, "which codec raw_v1 does not take", &|a| {
        let raw = Entry::raw("r", DType::U8, &[9], &[1; 9]);
        a.tensors.push(Entry { rate: Some(4000), ..raw });
    });
    let mut file = coded_sample().file();
    file.flags = 0;
    cases.add("coded planes without the flag", file.bytes(), Corrupt, "contradict");
}

/// What is said of a header that is not printed as it would be.
const NOT_CANONICAL: &str = "not in canonical form";

/// A matrix with column scales and outliers.
fn extra_sample() -> Artifact {
    let scales: Vec<f32> = (1..=12).map(|i| i as f32 * 0.25).collect();
    let outliers = [(0, 3, 7.5), (0, 11, -2.0), (2, 0, 0.125)];
    let codec = codecs::get("int4_g8_fp16_v1").unwrap();
    Artifact::new(vec![Entry::extra("e", [3, 12], codec, &scales, &outliers)])
}

fn extras(cases: &mut Cases) {
    use Outcome::Corrupt;
    let mut case = |name, says: &str, change: &dyn Fn(&mut Artifact)| {
        let mut artifact = extra_sample();
        change(&mut artifact);
        cases.add(name, artifact.bytes(), Corrupt, says);
    };
    let drop = |a: &mut Artifact, name: &str| a.tensors[0].planes.retain(|p| p.name != name);
    case("column scales without a plane", "has planes", &|a| drop(a, "column_scales"));
    case("a plane of column scales that is not told", "has planes", &|a| a.tensors[0].column_scales = false);
    case("outliers without counts", "has planes", &|a| drop(a, "outlier_counts"));
    case("outliers without columns", "has planes", &|a| drop(a, "outlier_columns"));
    case("outliers that are not told", "has planes", &|a| a.tensors[0].outliers = 0);
    case("one outlier too many", "has planes", &|a| a.tensors[0].outliers = 4);
    case("extra planes in another order", "has planes", &|a| a.tensors[0].planes.swap(3, 4));
    case("more outliers than weights", "37 outliers of 36 weights", &|a| a.tensors[0].outliers = 37);
    case("outliers without end", "outliers of", &|a| a.tensors[0].outliers = u64::MAX);
    case("outliers in rows beyond 32 bits", "more than 32 bits count", &|a| a.tensors[0].shape = vec![1, 1 << 33]);
    case("column scales of a raw tensor", "codec raw_v1 stores bytes as they are", &|a| {
        a.tensors.push(Entry { column_scales: true, ..Entry::raw("r", DType::F32, &[1], &[0; 4]) });
    });
    case("outliers of a raw tensor", "codec raw_v1 stores bytes as they are", &|a| {
        a.tensors.push(Entry { outliers: 1, ..Entry::raw("r", DType::F32, &[1], &[0; 4]) });
    });
    case("a coding of column scales", "which a plane of int4_g8_fp16_v1 does not take", &|a| {
        a.tensors[0].planes[3].coding = Some("scales_v1".into());
    });
    let sample = extra_sample();
    let mut add = |name, says: &str, from: &str, to: &str| {
        cases.add(name, sample.file().edit(from, to).bytes(), Corrupt, says);
    };
    add("column scales that are false", "has planes", "\"column_scales\":true", "\"column_scales\":false");
    add("column scales that are a number", "invalid type", "\"column_scales\":true", "\"column_scales\":1");
    add(
        "outliers in front of column scales",
        NOT_CANONICAL,
        "\"column_scales\":true,\"outliers\":3",
        "\"outliers\":3,\"column_scales\":true",
    );
    add("a negative number of outliers", "invalid value", "\"outliers\":3", "\"outliers\":-3");
    let mut file = extra_sample().file();
    file.flags = 0;
    cases.add("extra planes without the flag", file.bytes(), Corrupt, "contradict");
    let plain = Entry { column_scales: false, outliers: 0, ..extra_sample().tensors[0].clone() };
    let plain = Entry { planes: plain.planes[..3].to_vec(), ..plain };
    let mut artifact = extra_sample();
    artifact.identity = Some(Artifact::identity_of([plain].iter()));
    cases.add("identity without extra planes", artifact.bytes(), Corrupt, "identity is");
}

#[test]
fn extra_planes_that_break_a_rule_are_damage() {
    let probe = Probe::new();
    assert_eq!(probe.read(&extra_sample().bytes()), Outcome::Sound);
    let damaged = |says: &str, plane: usize, at: usize, bytes: &[u8]| {
        let mut artifact = extra_sample();
        artifact.tensors[0].planes[plane].bytes[at..at + bytes.len()].copy_from_slice(bytes);
        match probe.read(&artifact.bytes()) {
            Outcome::Damaged(what) | Outcome::Corrupt(what) => {
                assert!(what.contains(says), "{what} does not say {says}");
            }
            other => panic!("{says}: {other:?}"),
        }
    };
    damaged("a value is 0", 3, 8, &0_f32.to_le_bytes());
    damaged("a value is -0", 3, 8, &(-0_f32).to_le_bytes());
    damaged("a value is NaN", 3, 0, &f32::NAN.to_le_bytes());
    damaged("a value is inf", 3, 44, &f32::INFINITY.to_le_bytes());
    damaged("do not add up", 4, 0, &1_u32.to_le_bytes());
    damaged("do not add up", 4, 8, &u32::MAX.to_le_bytes());
    damaged("column 12 of row 0", 5, 2, &12_u16.to_le_bytes());
    damaged("column 65535 of row 2", 5, 4, &u16::MAX.to_le_bytes());
    damaged("ascending", 5, 2, &3_u16.to_le_bytes());
    damaged("ascending", 5, 2, &2_u16.to_le_bytes());
    damaged("a value is inf", 6, 4, &0x7c00_u16.to_le_bytes());
    damaged("a value is NaN", 6, 0, &0x7e00_u16.to_le_bytes());
}

#[test]
fn a_stream_that_does_not_hold_its_plane_is_damage() {
    let probe = Probe::new();
    assert_eq!(probe.read(&coded_sample().bytes()), Outcome::Sound);
    let damaged = |says: &str, change: &dyn Fn(&mut Entry)| {
        let mut artifact = coded_sample();
        change(&mut artifact.tensors[0]);
        match probe.read(&artifact.bytes()) {
            Outcome::Corrupt(what) | Outcome::Damaged(what) => assert!(what.contains(says), "{what}"),
            other => panic!("{says}: {other:?}"),
        }
    };
    damaged("digest is", &|e| e.planes[0].blake3 = Some("0".repeat(64)));
    damaged("digest is", &|e| e.planes[1].blake3 = Some("0".repeat(64)));
    damaged("bytes", &|e| assert!(e.planes[0].bytes.pop().is_some()));
    damaged("bytes", &|e| e.planes[0].bytes.push(0));
    damaged("bytes", &|e| e.planes[1].bytes.push(0));
    damaged("stream of 5 bytes", &|e| e.planes[0].bytes.truncate(5));
    damaged("words", &|e| e.shape = vec![40, 64]);
    damaged("a value is inf", &|e| e.planes[1].bytes[1..].copy_from_slice(&f32::INFINITY.to_le_bytes()));
    damaged("words", &|e| e.shape = vec![1 << 10, 1 << 12]);
}

fn names(cases: &mut Cases) {
    use Outcome::{Corrupt, Limit};
    cases.content("empty name", Corrupt, "empty name", |a| a.tensors[0].name.clear());
    cases.content("name over the limit", Limit, "1025, at most 1024", |a| a.tensors[0].name = "n".repeat(1025));
    cases.content("newline in a name", Corrupt, "control character", |a| a.tensors[0].name = "a\nb".into());
    cases.content("escape in a name", Corrupt, "control character", |a| a.tensors[0].name = "\u{1b}[2J".into());
    cases.content("NUL in a name", Corrupt, "control character", |a| a.tensors[0].name = "a\0".into());
    cases.content("C1 control in a name", Corrupt, "control character", |a| a.tensors[0].name = "\u{9b}".into());
    cases.content("name twice", Corrupt, "'w' occurs twice", |a| a.tensors[1].name = "w".into());
    let mut bytes = sample().file();
    let at = bytes.header.windows(10).position(|w| w == b"\"name\":\"w\"").unwrap();
    bytes.header[at + 8] = 0xff;
    cases.add("name that is not UTF-8", bytes.bytes(), Corrupt, "header:");
}

fn shapes(cases: &mut Cases) {
    use Outcome::{Corrupt, Limit, Unsupported};
    let unknown = |id: &str| format!("unknown codec '{id}', this build of tenpak {} knows", env!("CARGO_PKG_VERSION"));
    cases.content("unknown codec", Unsupported, unknown("int3_v1"), |a| a.tensors[0].codec = "int3_v1".into());
    let known: Vec<_> = codecs::all().iter().map(|c| c.id).collect();
    cases.content("codec of a later version", Unsupported, known.join(", "), |a| a.tensors[0].codec = "raw_v2".into());
    cases.content("empty codec", Unsupported, unknown(""), |a| a.tensors[0].codec.clear());
    cases.content("escapes in a codec", Unsupported, "\\u{1b}[2J", |a| a.tensors[0].codec = "\u{1b}[2J".into());
    cases.content("endless codec", Unsupported, "…", |a| a.tensors[0].codec = "x".repeat(1 << 20));
    cases.content("unknown dtype", Unsupported, "unknown dtype 'F4'", |a| a.tensors[0].dtype = "F4".into());
    cases.content("dtype in lower case", Unsupported, "unknown dtype 'f32'", |a| a.tensors[0].dtype = "f32".into());
    cases.content("nine dimensions", Limit, "dimensions of a tensor is 9, at most 8", |a| {
        a.tensors[1].shape = vec![3, 1, 1, 1, 1, 1, 1, 1, 1];
    });
    cases.content("a product of 2^66", Corrupt, "larger than 2^63 bytes", |a| a.tensors[1].shape = vec![1 << 33; 2]);
    cases.content("a product that wraps to 12 bytes", Corrupt, "larger than 2^63", |a| {
        a.tensors[1].shape = vec![3, 1 << 32, 1 << 32];
    });
    cases.content("overflow behind a zero", Corrupt, "larger than 2^63", |a| a.tensors[1].shape = vec![0, u64::MAX, 2]);
    cases.content("2^60 elements declared", Corrupt, "too large", |a| {
        a.tensors[1].shape = vec![1 << 60];
        a.tensors[1].planes[0].len = Some(1 << 62);
    });
    cases.content("2^60 bytes declared in rows", Corrupt, "digits of checksums", |a| {
        a.tensors[1].dtype = "U8".into();
        a.tensors[1].shape = vec![1 << 30, 1 << 30];
        a.tensors[1].planes[0].len = Some(1 << 60);
    });
    cases.content("rows of 2^60 weights", Corrupt, "too large", |a| a.tensors[0].shape = vec![1, 1 << 60]);
    cases.content("a row more than stored", Corrupt, "has planes", |a| a.tensors[0].shape = vec![4, 21]);
    cases.content("a row less than stored", Corrupt, "has planes", |a| a.tensors[0].shape = vec![2, 21]);
    cases.content("another codec's planes", Corrupt, "has planes", |a| a.tensors[0].codec = "int4_g8_v1".into());
    cases.content("integers in a lossy codec", Corrupt, "takes floats only", |a| a.tensors[0].dtype = "I32".into());
    cases.content("booleans in a lossy codec", Corrupt, "takes floats only", |a| a.tensors[0].dtype = "BOOL".into());
    cases.content("transposed raw", Corrupt, "transposed", |a| {
        a.tensors[1].shape = vec![3, 1];
        a.tensors[1].transposed = true;
    });
    cases.content("transposed vector", Corrupt, "transposed", |a| a.tensors[2].shape = vec![64]);
    cases.content("transposed stack", Corrupt, "transposed", |a| a.tensors[2].shape = vec![2, 8, 4]);
    cases.content("transposed, but not stored so", Corrupt, "has planes", |a| a.tensors[2].transposed = false);
}

fn planes(cases: &mut Cases) {
    use Outcome::{Corrupt, Damaged};
    cases.content("missing plane", Corrupt, "has planes", |a| drop(a.tensors[0].planes.pop()));
    cases.content("no planes", Corrupt, "has planes", |a| a.tensors[0].planes.clear());
    cases.content("extra plane", Corrupt, "has planes", |a| {
        let again = a.tensors[0].planes[2].clone();
        a.tensors[0].planes.push(again);
    });
    cases.content("planes in another order", Corrupt, "has planes", |a| a.tensors[0].planes.swap(1, 2));
    cases.content("unknown plane", Corrupt, "has planes", |a| a.tensors[0].planes[0].name = "outliers".into());
    cases.content("many planes", Corrupt, "at most 16", |a| {
        let plane = a.tensors[1].planes[0].clone();
        a.tensors[0].planes = vec![plane; 10_000];
    });
    cases.content("plane too long", Corrupt, "has planes", |a| a.tensors[0].planes[0].bytes.push(0));
    cases.content("plane too short", Corrupt, "has planes", |a| a.tensors[0].planes[0].bytes.truncate(35));
    cases.content("length other than the shape's", Corrupt, "has planes", |a| {
        a.tensors[1].planes[0].len = Some(1 << 50)
    });
    for (name, offset) in [("planes overlap", 64), ("a hole before a plane", 192), ("plane not aligned", 129)] {
        cases.content(name, Corrupt, "expected 128", |a| a.tensors[0].planes[1].offset = Some(offset));
    }
    cases.content("plane inside the preamble", Corrupt, "expected 64", |a| a.tensors[0].planes[0].offset = Some(0));
    cases.content("plane beyond the file", Corrupt, "expected 256", |a| a.tensors[1].planes[0].offset = Some(1 << 40));
    cases.content("greatest offset", Corrupt, "expected", |a| a.tensors[1].planes[0].offset = Some(u64::MAX));
    let crc = |a: &mut Artifact, text: &str| a.tensors[1].planes[0].crc32c = Some(text.to_owned());
    cases.content("no checksums", Corrupt, "0 digits of checksums, expected 8", |a| crc(a, ""));
    cases.content("half a checksum", Corrupt, "4 digits of checksums", |a| crc(a, "0123"));
    cases.content("a checksum too many", Corrupt, "16 digits of checksums", |a| crc(a, "0123456789abcdef"));
    cases.content("checksum that is not hex", Corrupt, "hex digits", |a| crc(a, "0123456g"));
    cases.content("checksum with a sign", Corrupt, "canonical", |a| crc(a, "+0000000"));
    cases.content("checksum in upper case", Corrupt, "canonical", |a| crc(a, "ABCDEF01"));
    cases.content("checksum of other characters", Corrupt, "hex digits", |a| crc(a, "éééé"));
    cases.content("wrong checksum", Corrupt, "chunk 0: checksum is", |a| crc(a, "00000000"));
    let digest = |a: &mut Artifact, text: String| a.tensors[1].planes[0].blake3 = Some(text);
    cases.content("digest that is not hex", Corrupt, "not a digest", |a| digest(a, "g".repeat(64)));
    cases.content("digest too short", Corrupt, "not a digest", |a| digest(a, "0".repeat(63)));
    cases.content("digest in upper case", Corrupt, "canonical", |a| digest(a, "A".repeat(64)));
    cases.content("digest of something else", Damaged, "digest is", |a| digest(a, "0".repeat(64)));
    cases.content("wrong identity", Corrupt, "the tensors give", |a| a.identity = Some("0".repeat(64)));
    cases.content("identity that is not hex", Corrupt, "not a digest", |a| a.identity = Some("identity".into()));
    let f16 = |a: &mut Artifact, plane: usize, bits: u16| {
        a.tensors[0].planes[plane].bytes[2..4].copy_from_slice(&bits.to_le_bytes());
    };
    cases.content("scale that is NaN", Corrupt, "a value is NaN", |a| f16(a, 1, 0x7e00));
    cases.content("scale that is infinite", Corrupt, "a value is inf", |a| f16(a, 1, 0x7c00));
    cases.content("offset that is infinite", Corrupt, "a value is -inf", |a| f16(a, 2, 0xfc00));
    cases.content("wide scale that is NaN", Corrupt, "a value is NaN", |a| {
        a.tensors[2].planes[1].bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    cases
        .content("unused bits of codes", Corrupt, "unused bits of row 0", |a| a.tensors[0].planes[0].bytes[10] |= 0xf0);
    cases.content("unused bytes of codes", Corrupt, "unused bits of row 2", |a| a.tensors[0].planes[0].bytes[35] = 1);
    cases.content("unused bits of zero points", Corrupt, "unused bits of row 1", |a| {
        a.tensors[3].planes[2].bytes[3] |= 0x80;
    });
    for (name, at) in [("first byte of padding", 36), ("last byte of padding", 63)] {
        cases.file(name, Damaged, "padding", |f| f.body[at] = 1);
    }
    cases.file("padding behind the last plane", Damaged, "padding behind the plane", |f| {
        // Two files of one and of two units stand behind it.
        let end = f.body.len() - 3 * 64;
        f.body[end - 1] = 1;
    });
}

fn files(cases: &mut Cases) {
    use Outcome::{Corrupt, Damaged, Limit};
    const NAMES: &[(&str, &str)] = &[
        ("a file called nothing", ""),
        ("a file called like an ending", ".json"),
        ("a file above the directory", "../config.json"),
        ("a file below the directory", "a/config.json"),
        ("a file of another root", "/config.json"),
        ("a file with a backslash", "a\\config.json"),
        ("a file of another drive", "c:config.json"),
        ("the directory itself", "."),
        ("the directory above", ".."),
        ("a program", "modeling.py"),
        ("weights", "model.safetensors"),
        ("an index of weights", "model.safetensors.index.json"),
        ("the header of a directory", "tenpak.json"),
        ("a newline in a file's name", "a\n.json"),
        ("a C1 control in a file's name", "\u{9b}.json"),
    ];
    for &(case, name) in NAMES {
        cases.content(case, Corrupt, "expected one plain name", move |a| a.files[0].name = name.to_owned());
    }
    cases.content("a file's name over the limit", Limit, "256, at most 255", |a| {
        a.files[0].name = format!("{}.json", "n".repeat(251));
    });
    cases.content("a file twice", Corrupt, "expected names in order", |a| a.files[1].name = "config.json".into());
    cases.content("files not sorted", Corrupt, "expected names in order", |a| a.files.swap(0, 1));
    cases.content("too many files", Corrupt, "more than 64 attached files", |a| {
        a.files = (0..65).map(|i| attached(&format!("{i:02}.json"), b"")).collect();
    });
    cases.content("a file of 2^50 bytes", Corrupt, "digits of checksums", |a| a.files[1].len = Some(1 << 50));
    cases.content("a file one byte longer", Corrupt, "beyond the header", |a| {
        a.files[1].len = Some(129);
    });
    cases.content("a file over the limit", Limit, "bytes of an attached file is 268435457", |a| {
        a.files[1].len = Some((256 << 20) + 1);
        a.files[1].crc32c = Some("0".repeat(65 * 8));
    });
    cases.content("a file over a plane", Corrupt, "file 'config.json' at byte 64", |a| a.files[0].offset = Some(64));
    cases.content("a hole before a file", Corrupt, "file 'tokenizer.json' at byte", |a| {
        a.files[1].offset = Some(1 << 20);
    });
    cases.content("greatest offset of a file", Corrupt, "expected", |a| a.files[1].offset = Some(u64::MAX));
    cases.content("a file without its checksum", Corrupt, "0 digits of checksums", |a| {
        a.files[0].crc32c = Some(String::new());
    });
    cases.content("a file's checksum in upper case", Corrupt, "canonical", |a| {
        a.files[0].crc32c = Some("ABCDEF01".into());
    });
    cases.content("a file's wrong checksum", Corrupt, "file 'config.json': checksum is", |a| {
        a.files[0].crc32c = Some("00000000".into());
    });
    cases.content("a file's wrong digest", Corrupt, "file 'config.json': digest is", |a| {
        a.files[0].blake3 = Some("0".repeat(64));
    });
    cases.file("padding behind a file", Damaged, "padding behind the file", |f| *f.body.last_mut().unwrap() = 1);
    let empty = sample();
    let mut file = Artifact { files: Vec::new(), ..empty }.file();
    let end = file.header.len() - 1;
    file.header.splice(end..end, *b",\"files\":[]");
    let header = file.header.clone();
    cases.add("no files, said so", file.header(header).bytes(), Corrupt, "canonical");
}

fn texts(cases: &mut Cases) {
    cases.text("white space", NOT_CANONICAL, ",\"identity\"", ", \"identity\"");
    cases.text("newline before", NOT_CANONICAL, "{\"metadata\"", "\n{\"metadata\"");
    cases.text(
        "fields in another order",
        NOT_CANONICAL,
        "\"dtype\":\"F32\",\"shape\":[3,21]",
        "\"shape\":[3,21],\"dtype\":\"F32\"",
    );
    cases.text("characters escaped for nothing", NOT_CANONICAL, "\"name\":\"w\"", "\"name\":\"\\u0077\"");
    cases.text("slash escaped for nothing", NOT_CANONICAL, "a test", "a\\/test");
    cases.text("half a surrogate pair", "header", "a test", "\\ud800");
    cases.text("control character as it is", "control character", "a test", "a\ttest");
    cases.text("key twice", "duplicate field `dtype`", "\"dtype\":\"F32\",", "\"dtype\":\"F32\",\"dtype\":\"F32\",");
    cases.text("tensors twice", "duplicate field `tensors`", "\"tensors\":", "\"tensors\":[],\"tensors\":");
    cases.text("metadata key twice", NOT_CANONICAL, "{\"format\":", "{\"format\":\"pt\",\"format\":");
    cases.text("metadata keys not sorted", NOT_CANONICAL, "{\"format\":", "{\"z\":\"\",\"format\":");
    cases.text("empty metadata", NOT_CANONICAL, "\"metadata\":{\"format\":\"pt\"}", "\"metadata\":{}");
    cases.text("leading zero", "number", "[3,21]", "[03,21]");
    cases.text("plus sign", "expected value", "[3,21]", "[+3,21]");
    cases.text("negative dimension", "invalid value", "[3,21]", "[-3,21]");
    cases.text("negative zero", "header", "[3,21]", "[-0,21]");
    cases.text("exponent", "floating point", "[3,21]", "[3e0,21]");
    cases.text("fraction", "floating point", "[3,21]", "[3.0,21]");
    cases.text("number beyond 64 bits", "floating point", "[3,21]", "[18446744073709551616,21]");
    cases.text("endless number", "number out of range", "[3,21]", &format!("[{},21]", "9".repeat(5000)));
    cases.text("NaN", "expected", "[3,21]", "[NaN,21]");
    cases.text("unknown field", "unknown field `x`", "\"codec\":", "\"x\":0,\"codec\":");
    cases.text("unknown field at the top", "unknown field `x`", "\"identity\":", "\"x\":{},\"identity\":");
    cases.text("unknown field of provenance", "unknown field `time`", "\"tool\":", "\"time\":0,\"tool\":");
    cases.text("missing field", "missing field `dtype`", "\"dtype\":\"F32\",", "");
    cases.text("missing provenance field", "missing field `tool`", "\"tool\":\"a test\",", "");
    cases.text("transposed is false", NOT_CANONICAL, "\"shape\":[3,21],", "\"shape\":[3,21],\"transposed\":false,");
    cases.text("transposed is a number", "invalid type", "\"transposed\":true", "\"transposed\":1");
    cases.text("delta is null", NOT_CANONICAL, "\"identity\":", "\"delta\":null,\"identity\":");
    cases.text("tensors are an object", "an array of tensors", "\"tensors\":[", "\"tensors\":{");
    cases.text("deep arrays", "header", "[3,21]", &"[".repeat(200_000));
    cases.text("deep objects", "header", "\"tool\":\"a test\"", &"{\"tool\":".repeat(100_000));
    cases.text("endless shape", "at most 16", "[3,21]", &format!("[{}1]", "1,".repeat(1 << 20)));
    let head = sample().file();
    for (name, says, behind) in
        [("newline behind", NOT_CANONICAL, "\n"), ("a second object", "trailing characters", "{}")]
    {
        let text = [&*head.header, behind.as_bytes()].concat();
        cases.add(name, head.clone().header(text).bytes(), Outcome::Corrupt, says);
    }
    for (name, text) in [("an array", "[]"), ("a string", "\"\""), ("null", "null"), ("an empty object", "{}")] {
        cases.add(name, head.clone().header(text).bytes(), Outcome::Corrupt, "header:");
    }
}

#[test]
fn every_broken_rule_has_its_error() {
    assert_eq!(Probe::new().read(&sample().bytes()), Outcome::Sound);
    let mut cases = Cases(Vec::new());
    preambles(&mut cases);
    codings(&mut cases);
    extras(&mut cases);
    names(&mut cases);
    shapes(&mut cases);
    planes(&mut cases);
    files(&mut cases);
    texts(&mut cases);
    let names: HashSet<_> = cases.0.iter().map(|(name, ..)| *name).collect();
    assert!(names.len() == cases.0.len() && names.len() >= 60);
    let probe = Probe::new();
    let mut wrong = Vec::new();
    for (name, bytes, kind, says) in &cases.0 {
        let outcome = probe.read(bytes);
        let (Outcome::Corrupt(found) | Outcome::Unsupported(found) | Outcome::Limit(found) | Outcome::Damaged(found)) =
            &outcome
        else {
            wrong.push(format!("{name}: {outcome:?}"));
            continue;
        };
        if kind(found.clone()) != outcome || !found.contains(says) {
            wrong.push(format!("{name}: {outcome:?}, expected {:?}", kind(says.clone())));
        }
    }
    assert!(wrong.is_empty(), "{} of {} cases:\n{}", wrong.len(), cases.0.len(), wrong.join("\n"));
    eprintln!("{} named headers refused", cases.0.len());
}

#[test]
fn the_caller_decides_how_many_tensors_there_may_be() {
    let limits = Limits { tensors: 3, ..Limits::DEFAULT };
    let outcome = Probe::new().read_within(&sample().bytes(), &limits);
    assert!(
        matches!(&outcome, Outcome::Limit(what) if what.contains("number of tensors is 4, at most 3")),
        "{outcome:?}"
    );
}

#[test]
fn a_damaged_header_says_which_file_it_is() {
    let folder = support::Folder::new();
    let path = folder.write("model.tenpak", sample().file().edit("[3,21]", "[3,22]").bytes());
    let message = support::refusal(ArtifactFile::open(&path), "corrupt");
    assert!(message.starts_with(path.to_str().unwrap()), "{message}");
}

#[test]
fn inspect_prints_no_control_character_of_a_file() {
    let folder = support::Folder::new();
    let path = folder.write("model.tenpak", sample().file().edit("a test", "\\u001b[2Jtest").bytes());
    let inspect = std::process::Command::new(assert_cmd::cargo::cargo_bin!("tenpak")).arg("inspect").arg(path).output();
    let printed = String::from_utf8(inspect.unwrap().stdout).unwrap();
    assert!(printed.contains("made by  \\u{1b}[2Jtest"), "{printed}");
    assert!(!printed.contains(|c: char| c.is_control() && c != '\n'), "{printed:?}");
}
