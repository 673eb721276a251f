//! What writing in parts promises: the directory of one process, whoever wrote the parts, and nothing lost on the way.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use support::{Folder, Tensor, codec, open_source, refusal};
use tenpak::artifact::{ArtifactFile, verify};
use tenpak::compress::{Nonfinite, Options, Part, Report, compress_as, compress_part, merge, plan_as, plan_part};
use tenpak::fit::{MaxLoss, Rate};
use tenpak::recipe::Recipe;
use tenpak::{DType, Error, source};

const SAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-books");

fn recipe(id: &str) -> Options {
    Options::new(Recipe::new(codec(id)), Nonfinite::Error, false)
}

/// Tensors of an awkward kind: raw ones, one that is stored transposed, one that leaves its codec's range.
fn zoo(folder: &Folder) -> PathBuf {
    let mut tensors: Vec<_> =
        (0..6).map(|i| Tensor::random(&format!("h.{i}.mlp.c_fc.weight"), DType::F32, &[64, 32], i)).collect();
    let huge: Vec<f32> = tensors[3].weights().iter().map(|w| w * 1e9).collect();
    tensors[3] = Tensor::of(&tensors[3].name, DType::F32, &[64, 32], &huge);
    tensors.push(Tensor::random("wte.weight", DType::F16, &[40, 64], 7));
    tensors.push(Tensor::random("ids", DType::I64, &[5], 8));
    folder.write("zoo/config.json", "{\"model_type\": \"gpt2\"}");
    folder.write("zoo/vocab.json", "{}");
    folder.checkpoint("zoo/model.safetensors", &tensors);
    folder.path("zoo")
}

fn whole(input: &Path, output: &Path, options: &Options, most: u64) -> Report {
    compress_as(&open_source(input), output, options, most, &mut |_| Ok(())).unwrap()
}

fn part(input: &Path, output: &Path, options: &Options, most: u64, (i, n): (u32, u32)) -> tenpak::Result<Report> {
    compress_part(&open_source(input), output, options, most, Part::new(i, n)?, &mut |_| Ok(()))
}

fn put_together(dir: &Path) -> tenpak::Result<u32> {
    Ok(merge(dir, &mut |_| Ok(()))?.parts)
}

/// Every file below a directory.
fn contents(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(
                contents(&path).into_iter().map(|(name, b)| (Path::new(path.file_name().unwrap()).join(name), b)),
            );
        } else {
            all.insert(path.file_name().unwrap().into(), fs::read(&path).unwrap());
        }
    }
    all
}

fn first_shard(dir: &Path) -> PathBuf {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    names.into_iter().find(|path| path.extension().is_some_and(|e| e == "safetensors")).unwrap()
}

#[test]
fn any_number_of_parts_in_any_order_become_the_directory_of_one_process() {
    let folder = Folder::new();
    let open = Recipe::new(codec("ecu_v1")).target_bits(Rate::DEFAULT);
    let coded = Options { coded: true, ..recipe("int4_g32_fp16_v1") };
    let sized = Options { target_bytes: Some(190_000), ..Options::new(open, Nonfinite::Error, false) };
    let zoo = zoo(&folder);
    for (name, model, options, most) in [
        ("fixed", &*zoo, &recipe("int4_g8_fp16_v1"), 2000),
        ("one", &*zoo, &recipe("int4_g8_fp16_v1"), 1 << 30),
        ("coded", Path::new(SAMPLE), &coded, 40_000),
        ("size", Path::new(SAMPLE), &sized, 20_000),
    ] {
        let direct = folder.path(&format!("{name}-whole"));
        let expected = whole(model, &direct, options, most);
        // Of the larger model once is enough: it takes seconds to encode.
        let numbers = if model == zoo { &[1, 2, 3, 50][..] } else { &[3] };
        for &n in numbers {
            let dir = folder.path(&format!("{name}-{n}"));
            let mut tensors = 0;
            for i in (1..=n).rev() {
                tensors += part(model, &dir, options, most, (i, n)).unwrap().tensors.len();
            }
            assert_eq!(tensors, expected.tensors.len());
            assert_eq!(put_together(&dir).unwrap(), n);
            assert!(contents(&dir) == contents(&direct), "{name} in {n} parts");
            let artifact = ArtifactFile::open(&dir).unwrap();
            assert_eq!(artifact.header().identity(), expected.identity.unwrap());
            assert_eq!(verify::verify(&artifact, |_| Ok(())).unwrap().problems, []);
        }
    }
    assert!(folder.names().iter().all(|name| !name.starts_with('.')), "{:?}", folder.names());
}

#[test]
fn shards_are_cut_by_what_headers_foretell() {
    let folder = Folder::new();
    let zoo = zoo(&folder);
    let options = recipe("int4_g8_fp16_v1");
    let planned = plan_as(&open_source(&zoo), Some(&folder.path("d")), &options, 2000).unwrap();
    let done = whole(&zoo, &folder.path("d"), &options, 2000);
    let names = |report: &Report| -> Vec<_> { report.files.iter().map(|(path, _)| path.clone()).collect() };
    // One tensor takes a wider codec than planned, which moves no cut.
    assert_ne!(planned.tensors[3].codec.id, done.tensors[3].codec.id);
    assert_eq!(names(&planned), names(&done));
    for i in 1..=3 {
        let wanted = Part::new(i, 3).unwrap();
        let planned = plan_part(&open_source(&zoo), Some(&folder.path("p")), &options, 2000, wanted).unwrap();
        let done = part(&zoo, &folder.path("p"), &options, 2000, (i, 3)).unwrap();
        assert_eq!(names(&planned), names(&done));
        assert_eq!(done.part, Some(wanted));
        assert_eq!(done.file_bytes, done.files.iter().map(|(path, _)| fs::metadata(path).unwrap().len()).sum::<u64>());
    }
}

#[test]
fn a_part_that_was_stopped_is_run_again_and_nothing_else_is_touched() {
    let folder = Folder::new();
    let zoo = zoo(&folder);
    let (dir, options) = (folder.path("d"), recipe("int4_g8_v1"));
    part(&zoo, &dir, &options, 2000, (1, 2)).unwrap();
    let before = contents(&dir);
    let mut left = 3;
    let stopped = compress_part(&open_source(&zoo), &dir, &options, 2000, Part::new(2, 2).unwrap(), &mut |_| {
        left -= 1;
        if left == 0 { Err(Error::Interrupted) } else { Ok(()) }
    });
    assert!(matches!(stopped, Err(Error::Interrupted)));
    assert!(contents(&dir) == before);
    let message = refusal(put_together(&dir), "invalid");
    assert!(message.contains("1 of 2 parts are missing") && message.contains("--shard 2/2"), "{message}");
    // What a process that was killed leaves on a file system without nameless files.
    folder.write("d/.tenpak-abc.tmp/model.safetensors", "half");
    part(&zoo, &dir, &options, 2000, (2, 2)).unwrap();
    let again = part(&zoo, &dir, &options, 2000, (2, 2));
    assert!(refusal(again, "invalid").contains("exists; choose another name or pass --force"));
    part(&zoo, &dir, &Options { force: true, ..options.clone() }, 2000, (2, 2)).unwrap();
    put_together(&dir).unwrap();
    whole(&zoo, &folder.path("whole"), &options, 2000);
    assert!(contents(&dir) == contents(&folder.path("whole")));
    assert!(refusal(put_together(&dir), "invalid").contains("is whole"));
    let late = part(&zoo, &dir, &Options { force: true, ..options }, 2000, (2, 2));
    assert!(refusal(late, "invalid").contains("holds a model that is whole"));
}

#[test]
fn putting_together_can_be_stopped_and_started_again() {
    let folder = Folder::new();
    let zoo = zoo(&folder);
    let (dir, options) = (folder.path("d"), recipe("int4_g8_v1"));
    whole(&zoo, &folder.path("whole"), &options, 2000);
    for i in 1..=2 {
        part(&zoo, &dir, &options, 2000, (i, 2)).unwrap();
    }
    let stopped = merge(&dir, &mut |p| if p.done > 0 { Err(Error::Interrupted) } else { Ok(()) });
    assert!(matches!(stopped, Err(Error::Interrupted)));
    // A second name of a shard whose head was written already, as when the machine failed just before the last step.
    let shard = first_shard(&dir.join("part-00001-of-00002"));
    fs::copy(folder.path("whole").join(shard.file_name().unwrap()), &shard).unwrap();
    put_together(&dir).unwrap();
    assert!(contents(&dir) == contents(&folder.path("whole")));
}

#[test]
fn parts_of_other_runs_are_told_by_what_differs() {
    let folder = Folder::new();
    let zoo = zoo(&folder);
    let options = recipe("int4_g8_v1");
    let mut variant: Vec<_> =
        (0..6).map(|i| Tensor::random(&format!("h.{i}.mlp.c_fc.weight"), DType::F32, &[64, 32], i + 1)).collect();
    variant.push(Tensor::random("wte.weight", DType::F16, &[40, 64], 7));
    variant.push(Tensor::random("ids", DType::I64, &[5], 8));
    folder.write("variant/config.json", "{\"model_type\": \"gpt2\"}");
    folder.write("variant/vocab.json", "{}");
    folder.checkpoint("variant/model.safetensors", &variant);
    let variant = folder.path("variant");
    let zeroed = Options { nonfinite: Nonfinite::Zero, ..options.clone() };
    let coded = Options { coded: true, ..options.clone() };
    for (model, other, most, n, says) in [
        (&variant, &options, 2000, 2, "another source or statistics than part 1/2"),
        (&zoo, &recipe("int4_g8_fp16_v1"), 2000, 2, "another recipe"),
        (&zoo, &zeroed, 2000, 2, "--nonfinite"),
        (&zoo, &coded, 2000, 2, "--coded"),
        (&zoo, &options, 4000, 2, "--max-shard-size"),
        (&zoo, &options, 2000, 3, "number of parts"),
    ] {
        let dir = folder.path("d");
        part(&zoo, &dir, &options, 2000, (1, 2)).unwrap();
        part(model, &dir, other, most, (2, n)).unwrap();
        let before = contents(&dir);
        let message = refusal(put_together(&dir), "invalid");
        assert!(message.contains(says), "{message}");
        assert!(contents(&dir) == before);
        fs::remove_dir_all(&dir).unwrap();
    }
}

#[test]
fn parts_that_are_not_what_they_say_are_refused() {
    let folder = Folder::new();
    let zoo = zoo(&folder);
    let options = recipe("int4_g8_v1");
    let dir = folder.path("d");
    let write = || {
        drop(fs::remove_dir_all(&dir));
        for i in 1..=2 {
            part(&zoo, &dir, &options, 2000, (i, 2)).unwrap();
        }
    };
    let second = dir.join("part-00002-of-00002");
    let refused = |kind: &str, says: &str| {
        let message = refusal(put_together(&dir), kind);
        assert!(message.contains(says), "{message}");
    };
    write();
    folder.write("d/notes.txt", "mine");
    refused("invalid", "'notes.txt', which is no part");
    assert!(refusal(part(&zoo, &dir, &options, 2000, (1, 2)), "invalid").contains("notes.txt"));
    write();
    fs::rename(&second, dir.join("part-copy")).unwrap();
    refused("invalid", "whose directory is part-00002-of-00002");
    write();
    fs::remove_file(second.join("part.json")).unwrap();
    refused("invalid", "has no part.json");
    write();
    fs::remove_file(second.join("tenpak.json")).unwrap();
    refused("corrupt", "tenpak.json is missing");
    write();
    let shard = first_shard(&second);
    fs::remove_file(&shard).unwrap();
    refused("invalid", "is missing");
    write();
    let mut bytes = fs::read(&shard).unwrap();
    bytes.push(0);
    fs::write(&shard, &bytes).unwrap();
    refusal(put_together(&dir), "corrupt");
    write();
    let text = fs::read_to_string(second.join("part.json")).unwrap();
    for (from, with, kind) in
        [("\"format\": 1", "\"format\": 2", "unsupported"), ("\"first_shard\": ", "\"first_shard\": 1", "corrupt")]
    {
        assert!(text.contains(from), "{text}");
        fs::write(second.join("part.json"), text.replacen(from, with, 1)).unwrap();
        refusal(put_together(&dir), kind);
    }
    // A head that is not the one the header asks for.
    write();
    let sound = fs::read(&shard).unwrap();
    let at = sound.windows(19).position(|w| w == b"tenpak_header_crc32").unwrap() + 24;
    let mut bytes = sound;
    bytes[at] = if bytes[at] == b'0' { b'1' } else { b'0' };
    fs::write(&shard, bytes).unwrap();
    refused("corrupt", "head is not that of this shard");
}

#[test]
fn what_cannot_be_written_in_parts_is_refused_before_any_work() {
    let folder = Folder::new();
    let zoo = zoo(&folder);
    let options = recipe("int4_g8_v1");
    let file = part(&zoo, &folder.path("m.tenpak"), &options, 2000, (1, 2));
    assert!(refusal(file, "invalid").contains("cannot be written in parts"));
    let loss = Recipe::new(codec("ecu_v1")).max_loss(MaxLoss::new(1e-3).unwrap());
    let loss = part(&zoo, &folder.path("d"), &Options::new(loss, Nonfinite::Error, false), 2000, (1, 2));
    assert!(refusal(loss, "invalid").contains("a loss is shared out"));
    assert!(!folder.path("d").exists());
    fs::create_dir(folder.path("empty")).unwrap();
    assert!(refusal(put_together(&folder.path("empty")), "invalid").contains("has no parts"));
    // A part is no checkpoint to compress again.
    part(&zoo, &folder.path("d"), &options, 2000, (1, 1)).unwrap();
    let again = source::open(&folder.path("d/part-00001-of-00001"), &source::Options::default());
    assert!(refusal(again, "unsupported").contains("compressed"));
}
