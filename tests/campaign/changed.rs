//! Files that another process cuts short, replaces or writes into while they are read: an error or the old weights,
//! never the end of the process and never other weights.

use std::fs::OpenOptions;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use tenpak::artifact::{ArtifactFile, verify};
use tenpak::file::Access;
use tenpak::source::{self, Options};
use tenpak::{DType, Limits};

use crate::models::{contents, ended, run, tenpak};
use crate::support::{Folder, Random, Tensor, codec, decode, kind, pack, with};
use crate::{cases, reached};

/// Bytes of a chunk that has a checksum.
const CHUNK: u64 = 4 << 20;

fn cut(path: &Path, len: u64) {
    OpenOptions::new().write(true).open(path).unwrap().set_len(len).unwrap();
}

/// An artifact of one raw tensor of three chunks, the last of them short.
fn three_chunks(folder: &Folder) -> (std::path::PathBuf, Vec<f32>) {
    let tensor = Tensor::random("w", DType::U8, &[2 * CHUNK / 1024 + 7, 1024], 5);
    let input = folder.checkpoint("m.safetensors", std::slice::from_ref(&tensor));
    let output = folder.path("m.tenpak");
    pack(&input, &output, &with(codec("raw_v1"))).unwrap();
    (output, tensor.weights())
}

#[test]
fn a_file_cut_short_under_a_reader_is_an_error() {
    let folder = Folder::new();
    let (path, weights) = three_chunks(&folder);
    let whole = std::fs::read(&path).unwrap();
    let mut random = Random(1);
    let lengths: Vec<_> =
        [0, 1, 64, CHUNK, 2 * CHUNK + 63].into_iter().chain((0..8).map(|_| random.bits() % CHUNK)).collect();
    for &len in &lengths {
        // The length is looked at before a window is mapped, so that this way is an error too unless it happens later.
        for access in [Access::Read, Access::Map] {
            std::fs::write(&path, &whole).unwrap();
            let artifact = ArtifactFile::open_with(&path, access, &Limits::DEFAULT).unwrap();
            let mut row = vec![0.0; 1024];
            artifact.decode_rows(0, 0, &mut row).unwrap();
            assert!(row == weights[..1024]);
            cut(&path, len);
            let refused = decode(&artifact, 0).unwrap_err();
            assert_eq!(kind(&refused), "io", "{refused}");
            assert!(refused.to_string().contains("became shorter while it was read"), "{refused}");
            assert_eq!(kind(&verify::verify(&artifact, |_| Ok(())).unwrap_err()), "io");
        }
    }
    let source = folder.checkpoint("s.safetensors", &[Tensor::random("w", DType::F32, &[64, 64], 3)]);
    let opened = source::open(&source, &Options::default()).unwrap();
    cut(&source, 9000);
    assert_eq!(kind(&opened.read_rows(0, 0, 64).unwrap_err()), "io");
    assert_eq!(kind(&opened.files()[0].digest().unwrap_err()), "io");
    assert_eq!(opened.read_rows(0, 0, 1).unwrap().len(), 256);
}

#[test]
fn a_file_that_is_replaced_is_read_to_its_end_as_it_was() {
    let folder = Folder::new();
    let (path, weights) = three_chunks(&folder);
    for access in [Access::Read, Access::Map] {
        let artifact = ArtifactFile::open_with(&path, access, &Limits::DEFAULT).unwrap();
        let other = folder.write("other", std::fs::read(&path).unwrap());
        let new = folder.write("new", b"something else");
        std::fs::rename(&new, &path).unwrap();
        assert!(decode(&artifact, 0).unwrap() == weights);
        std::fs::rename(&other, &path).unwrap();
    }
}

#[test]
fn what_is_written_into_a_chunk_before_it_was_seen_is_corrupt() {
    use std::os::unix::fs::FileExt;
    let folder = Folder::new();
    let (path, weights) = three_chunks(&folder);
    let artifact = ArtifactFile::open(&path).unwrap();
    let mut rows = vec![0.0; 1024];
    artifact.decode_rows(0, 4096, &mut rows).unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[1; 9], 64 + 2 * CHUNK + 5).unwrap();
    // The chunk in the middle has been seen; the last one has not, by whichever range that touches it.
    artifact.decode_rows(0, 4097, &mut rows).unwrap();
    assert!(rows == weights[4097 * 1024..4098 * 1024]);
    for (first, count) in [(8192, 1), (8198, 1), (8191, 2), (8192, 7), (0, 8199)] {
        let refused = artifact.decode_rows(0, first, &mut vec![0.0; count * 1024]).unwrap_err();
        assert!(refused.to_string().contains("chunk 2: checksum is"), "{refused}");
    }
}

/// One run while its input is cut short or replaced after `delay`; what became of it.
fn disturbed(folder: &Folder, line: &str, input: &Path, delay: Duration, change: impl Fn(&Path)) -> Result<(), String> {
    let mut child = tenpak(&folder.path(""), line).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    while start.elapsed() < delay && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_micros(300));
    }
    change(input);
    ended(line, &child.wait_with_output().unwrap())
}

#[test]
fn inputs_that_shrink_or_are_replaced_meanwhile_end_a_run_in_an_error_or_in_its_result() {
    let folder = Folder::new();
    let tensors: Vec<_> =
        (0..6).map(|i| Tensor::random(&format!("layers.{i}.up_proj.weight"), DType::F32, &[512, 512], i)).collect();
    let source = folder.checkpoint("m.safetensors", &tensors);
    run(&folder, "compress m.safetensors -o m.tenpak --codec int8_sym_v1");
    let inputs = [
        ("m.safetensors", std::fs::read(source).unwrap()),
        ("m.tenpak", contents(&folder.path("m.tenpak"))[Path::new("")].clone()),
    ];
    let lines = [
        ("compress m.safetensors -o out.tenpak --codec int4_g32_fp16_v1", 0, "out.tenpak"),
        ("decompress m.tenpak -o out.safetensors", 1, "out.safetensors"),
        ("export m.tenpak --to hf -o out", 1, "out"),
        ("verify m.tenpak", 1, "none"),
    ];
    let mut random = Random(3);
    let (mut errors, count) = (0, cases(12));
    let expected: Vec<_> = lines
        .map(|(line, _, target)| {
            let start = Instant::now();
            run(&folder, line);
            let took = start.elapsed();
            let result = contents(&folder.path(target));
            remove(&folder.path(target));
            (took, result)
        })
        .into();
    for case in 0..count {
        let ((line, input, target), (took, result)) = (lines[case % lines.len()], &expected[case % lines.len()]);
        let (name, bytes) = &inputs[input];
        let path = folder.write(name, bytes);
        let delay = took.mul_f64(1.1 * random.below(1000) as f64 / 1000.0);
        let len = random.below(bytes.len()) as u64;
        let ended = disturbed(&folder, line, &path, delay, |path| {
            if case % 5 == 4 {
                std::fs::rename(folder.write("new", b"something else"), path).unwrap();
            } else {
                cut(path, len);
            }
        });
        // Nothing, or what an undisturbed run writes.
        let found = contents(&folder.path(target));
        match ended {
            Ok(()) => assert!(found == *result, "{line} gave another result, cut to {len} after {delay:?}"),
            Err(message) => {
                errors += 1;
                assert!(found.is_empty(), "{line} left an output behind an error: {message}");
            }
        }
        assert!(folder.names().iter().all(|name| !name.starts_with('.')), "{:?}", folder.names());
        remove(&folder.path(target));
    }
    reached("changed inputs", count, &format!("{errors} ended in an error, the others in their result"));
}

/// Removes a file or directory, if it is there.
pub fn remove(path: &Path) {
    drop(std::fs::remove_file(path));
    drop(std::fs::remove_dir_all(path));
}
