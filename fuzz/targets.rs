//! What is fuzzed: each function reads bytes of any content as one kind of file, entirely, and panics where a promise is
//! broken. libFuzzer calls them (`fuzz_targets/`), and so does a plain test with mutated files (`tests/fuzz.rs`).

use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tenpak::artifact::{ArtifactFile, delta, verify};
use tenpak::coding::{self, Stream};
use tenpak::compress::{Nonfinite, Options, compress};
use tenpak::recipe::Recipe;
use tenpak::source::{self, Source};
use tenpak::{DType, Error, Limits, codecs, to_f32};

/// A function to which any bytes may be given.
pub type Target = fn(&[u8]);

/// Every target, by the name of its corpus.
pub const TARGETS: [(&str, Target); 9] = [
    ("artifact", artifact),
    ("delta", materialize),
    ("safetensors", safetensors),
    ("index", index),
    ("gguf", gguf),
    ("npz", npz),
    ("bundle", bundle),
    ("coded", coded),
    ("round_trip", round_trip),
];

/// The most bytes of a tensor that is read as a whole.
const MOST: u64 = 1 << 22;

thread_local! {
    /// Where this thread keeps its files: in memory, where there is such a place.
    static FOLDER: TempDir =
        tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder for files");
}

fn path(name: &str) -> PathBuf {
    FOLDER.with(|folder| folder.path().join(name))
}

fn write(name: &str, bytes: &[u8]) -> PathBuf {
    let path = path(name);
    std::fs::write(&path, bytes).expect("a small file is written");
    path
}

/// An error has to be one that names a file's fault, in words that a terminal can show.
fn is_refusal(error: &Error) {
    let message = error.to_string();
    assert!(!message.contains(char::is_control) && message.len() < 8192, "{message:?}");
    let io = matches!(error.root(), Error::Interrupted | Error::Device(_));
    assert!(!io, "not an error of a file: {message}");
}

/// Gives an artifact the length and the checksums of its header, so that what lies behind them is reached.
fn sealed(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let len = bytes.len() as u64;
    if len >= 64 {
        let header = u64::from_le_bytes(bytes[16..24].try_into().expect("eight bytes"));
        bytes[24..32].copy_from_slice(&len.to_le_bytes());
        if let Some(start) = len.checked_sub(header).filter(|&start| start >= 64) {
            let start = usize::try_from(start).expect("inside the file");
            let checksum = crc32c::crc32c(&bytes[start..]);
            bytes[32..36].copy_from_slice(&checksum.to_le_bytes());
        }
        let checksum = crc32c::crc32c(&bytes[..60]);
        bytes[60..64].copy_from_slice(&checksum.to_le_bytes());
    }
    bytes
}

fn read_artifact(path: &Path) {
    let artifact = match ArtifactFile::open(path) {
        Ok(artifact) => artifact,
        Err(e) => return is_refusal(&e),
    };
    let elements = |(rows, cols): (u64, u64)| rows.checked_mul(cols).filter(|&count| count <= MOST);
    // What a stream stands for may be far larger than the file.
    if artifact.tensors().iter().any(|t| t.memory_bytes() > 8 * MOST) {
        return;
    }
    let problems = match verify::verify(&artifact, |_| Ok(())) {
        Ok(verified) => verified.problems,
        Err(e) => return is_refusal(&e),
    };
    for (index, entry) in artifact.tensors().iter().enumerate() {
        let Some(count) = elements(entry.matrix()) else { continue };
        let mut out = vec![0.0; usize::try_from(count).expect("small")];
        match artifact.decode_rows(index, 0, &mut out) {
            Ok(()) => {}
            Err(e) => {
                assert!(!problems.is_empty(), "verified, but not decoded: {e}");
                is_refusal(&e);
            }
        }
    }
}

/// An artifact: opened, verified, decoded.
pub fn artifact(bytes: &[u8]) {
    read_artifact(&write("m.tenpak", bytes));
    read_artifact(&write("m.tenpak", &sealed(bytes)));
}

/// The weights that deltas are made against.
fn base() -> ArtifactFile {
    let path = path("base.tenpak");
    if !path.exists() {
        let tensors: String =
            ["a", "b", "c"].iter().zip(0..).map(|(name, i)| format!(",\"{name}\":{}", tensor(4 * i))).collect();
        let file = header(&format!("{{{}}}", &tensors[1..]), &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
        let source = source::open(&write("base.safetensors", &file), &source::Options::default()).expect("sound");
        compress(&source, &path, &options(codecs::RAW), &mut |_| Ok(())).expect("sound");
    }
    ArtifactFile::open(&path).expect("sound")
}

/// A tensor of four bytes in a header.
fn tensor(at: usize) -> String {
    format!("{{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[{at},{}]}}", at + 4)
}

/// A safetensors file.
fn header(text: &str, data: &[u8]) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes(), data].concat()
}

fn options(codec: &str) -> Options {
    Options::new(Recipe::new(codecs::get(codec).expect("known")).all(true), Nonfinite::Raw, true)
}

/// A delta: materialized on a base; what comes out is sound.
pub fn materialize(bytes: &[u8]) {
    let base = base();
    for bytes in [bytes.to_vec(), sealed(bytes)] {
        let delta = match ArtifactFile::open(write("delta.tenpak", &bytes)) {
            Ok(delta) => delta,
            Err(e) => return is_refusal(&e),
        };
        let out = path("out.tenpak");
        match delta::materialize(&base, &[delta], &out, true, &mut |_| Ok(())) {
            Ok(_) => {
                let made = ArtifactFile::open(&out).expect("what was written opens");
                assert!(verify::verify(&made, |_| Ok(())).expect("it is read").problems.is_empty());
                std::fs::remove_file(out).expect("it is there");
            }
            Err(e) => {
                is_refusal(&e);
                assert!(!out.exists(), "an output beside an error: {e}");
            }
        }
    }
}

fn read_source(path: &Path) {
    let read = |source: &Source| {
        for (index, tensor) in source.tensors().iter().enumerate() {
            let (rows, _) = tensor.matrix();
            if tensor.info().bytes() <= MOST {
                match source.read_rows(index, 0, rows) {
                    Ok(block) => assert_eq!(block.len() as u64, tensor.info().bytes()),
                    Err(e) => is_refusal(&e),
                }
            }
        }
    };
    let limits = Limits { header_bytes: 1 << 20, ..Limits::DEFAULT };
    match source::open(path, &source::Options { limits, ..source::Options::default() }) {
        Ok(source) => read(&source),
        Err(e) => is_refusal(&e),
    }
}

/// A safetensors file; what ours reads, the reference reads, and the other way round but for what we do not read.
pub fn safetensors(bytes: &[u8]) {
    read_source(&write("m.safetensors", bytes));
}

/// An index beside two shards.
pub fn index(bytes: &[u8]) {
    let folder = path("model");
    if !folder.exists() {
        std::fs::create_dir(&folder).expect("a folder");
        for (shard, names) in [("one", ["a", "b"]), ("two", ["c", "d"])] {
            let text = format!("{{\"{}\":{},\"{}\":{}}}", names[0], tensor(0), names[1], tensor(4));
            write(&format!("model/{shard}.safetensors"), &header(&text, &[7; 8]));
        }
    }
    write("model/model.safetensors.index.json", bytes);
    read_source(&folder);
}

/// A GGUF file.
pub fn gguf(bytes: &[u8]) {
    read_source(&write("m.gguf", bytes));
}

/// An archive of arrays, and one array.
pub fn npz(bytes: &[u8]) {
    read_source(&write("m.npz", bytes));
    read_source(&write("m.npy", bytes));
}

/// A JSON bundle.
pub fn bundle(bytes: &[u8]) {
    read_source(&write("m.json", bytes));
}

/// Codes and scales in their entropy: a shape of two bytes each, and the stream.
pub fn coded(bytes: &[u8]) {
    let Some((shape, stream)) = bytes.split_first_chunk::<4>() else { return };
    let [rows, cols] = [[shape[0], shape[1]], [shape[2], shape[3]]].map(|n| usize::from(u16::from_le_bytes(n)) % 700);
    match Stream::open(stream, rows, cols) {
        Ok(opened) => {
            let mut out = vec![0; rows * cols];
            // Any code may come out, but no panic and no other memory.
            if let Err(e) = opened.decode_all(&mut out) {
                is_refusal(&e);
            }
        }
        Err(e) => is_refusal(&e),
    }
    match coding::decode_scales(stream, rows) {
        Ok(scales) => assert_eq!(scales.len(), rows),
        Err(e) => is_refusal(&e),
    }
}

/// Weights of any bits through a codec, a file and back: what is read is what was encoded, and raw weights are themselves.
pub fn round_trip(bytes: &[u8]) {
    let Some(([codec, dtype, cols], data)) = bytes.split_first_chunk::<3>() else { return };
    let all = codecs::all();
    let codec = &all[usize::from(*codec) % all.len()];
    let dtype = [DType::F32, DType::F16, DType::BF16][usize::from(*dtype) % 3];
    let (size, cols) = (usize::try_from(dtype.size()).expect("small"), usize::from(*cols) + 1);
    let rows = (data.len() / size / cols).min(64);
    if rows == 0 {
        return;
    }
    let data = &data[..rows * cols * size];
    let text = format!(
        "{{\"w\":{{\"dtype\":\"{}\",\"shape\":[{rows},{cols}],\"data_offsets\":[0,{}]}}}}",
        dtype.name(),
        data.len()
    );
    let source = source::open(&write("w.safetensors", &header(&text, data)), &source::Options::default());
    let out = path("w.tenpak");
    let report =
        compress(&source.expect("sound"), &out, &options(codec.id), &mut |_| Ok(())).expect("weights of any bits");
    let artifact = ArtifactFile::open(&out).expect("what was written opens");
    assert!(verify::verify(&artifact, |_| Ok(())).expect("it is read").problems.is_empty());
    assert_eq!(artifact.tensors().len(), report.tensors.len());
    let mut decoded = vec![0.0; rows * cols];
    artifact.decode_rows(0, 0, &mut decoded).expect("sound");
    if artifact.tensors()[0].codec().id == codecs::RAW {
        let mut weights = vec![0.0; rows * cols];
        to_f32(dtype, data, &mut weights);
        assert!(weights.iter().zip(&decoded).all(|(a, b)| a.to_bits() == b.to_bits()));
    } else {
        assert!(decoded.iter().all(|weight| weight.is_finite()), "{} gave a weight that is not finite", codec.id);
    }
}
