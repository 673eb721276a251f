//! What a journal promises: a run that was stopped goes on with what is whole, and gives the bytes of one that was not.

#![cfg(unix)]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use support::{Folder, Tensor, codec, open_source, refusal};
use tenpak::compress::{Nonfinite, Options, Part, Report, compress_as, compress_part, merge, plan_as};
use tenpak::fit::{MaxLoss, Rate};
use tenpak::recipe::Recipe;
use tenpak::{DType, Error};

const SAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-books");
const MOST: u64 = 6000;

fn recipe(id: &str) -> Options {
    Options { resume: true, ..Options::new(Recipe::new(codec(id)), Nonfinite::Error, false) }
}

/// Tensors of an awkward kind: raw ones, one that is stored transposed, one that leaves its codec's range.
fn zoo(folder: &Folder) -> PathBuf {
    let mut tensors: Vec<_> =
        (0..5).map(|i| Tensor::random(&format!("h.{i}.mlp.c_fc.weight"), DType::F32, &[64, 32], i)).collect();
    let huge: Vec<f32> = tensors[3].weights().iter().map(|w| w * 1e9).collect();
    tensors[3] = Tensor::of(&tensors[3].name, DType::F32, &[64, 32], &huge);
    tensors.push(Tensor::random("wte.weight", DType::F16, &[40, 64], 7));
    tensors.push(Tensor::random("ids", DType::I64, &[5], 8));
    folder.write("zoo/config.json", "{\"model_type\": \"gpt2\"}");
    folder.checkpoint("zoo/model.safetensors", &tensors);
    folder.path("zoo")
}

fn run(input: &Path, output: &Path, options: &Options) -> tenpak::Result<Report> {
    compress_as(&open_source(input), output, options, MOST, &mut |_| Ok(()))
}

/// Stops at the `steps`-th step.
fn stopped(input: &Path, output: &Path, options: &Options, steps: usize) -> tenpak::Result<Report> {
    let mut left = steps;
    compress_as(&open_source(input), output, options, MOST, &mut |_| {
        left -= 1;
        if left == 0 { Err(Error::Interrupted) } else { Ok(()) }
    })
}

/// Every file of an output, in one form or the other.
fn contents(path: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    if path.is_file() {
        return BTreeMap::from([(PathBuf::new(), fs::read(path).unwrap())]);
    }
    let file = |entry: fs::DirEntry| (PathBuf::from(entry.file_name()), fs::read(entry.path()).unwrap());
    fs::read_dir(path).unwrap().map(|entry| file(entry.unwrap())).collect()
}

fn put(folder: &Path, files: &BTreeMap<PathBuf, Vec<u8>>) {
    drop(fs::remove_dir_all(folder));
    fs::create_dir_all(folder).unwrap();
    files.iter().for_each(|(name, bytes)| fs::write(folder.join(name), bytes).unwrap());
}

/// A report without its notes, which say how often the run was stopped.
fn figures(report: &Report) -> String {
    format!("{:?}", Report { notes: Vec::new(), ..report.clone() })
}

fn taken(report: &Report) -> usize {
    let of = |note: &String| note.strip_suffix(" tensors were finished by a run that was stopped")?.parse().ok();
    report.notes.iter().find_map(of).unwrap_or(0)
}

#[test]
fn a_run_that_was_stopped_anywhere_gives_the_bytes_of_one_that_was_not() {
    let folder = Folder::new();
    let zoo = zoo(&folder);
    let open = Recipe::new(codec("ecu_v1"));
    let options = |recipe: Recipe| Options { resume: true, ..Options::new(recipe, Nonfinite::Error, false) };
    for (name, how) in [
        ("fixed", recipe("int4_g8_fp16_v1")),
        ("coded", Options { coded: true, ..recipe("int4_g8_fp16_v1") }),
        ("size", Options { target_bytes: Some(24_000), ..options(open.clone().target_bits(Rate::DEFAULT)) }),
        ("loss", options(open.max_loss(MaxLoss::new(1e-3).unwrap()))),
    ] {
        // Of those that take longer to encode one form is enough: the tensors do not know which it is.
        let quick = matches!(name, "fixed" | "coded");
        let (forms, stride): (&[&str], usize) = if quick { (&[".tenpak", ""], 1) } else { (&[".tenpak"], 9) };
        for form in forms {
            let output = folder.path(&format!("{name}{form}"));
            let journal = folder.path(&format!("{name}{form}.journal"));
            let direct = folder.path(&format!("direct-{name}{form}"));
            let plain = run(&zoo, &direct, &Options { resume: false, ..how.clone() }).unwrap();
            // A file without its directory's name, which is that of the output.
            let same = |report: &Report| {
                let said = figures(report).replace("/direct-", "/");
                assert_eq!(said, figures(&plain).replace("/direct-", "/"));
                assert!(contents(&output) == contents(&direct), "{name}{form}");
                assert!(!journal.exists());
            };
            same(&run(&zoo, &output, &how).unwrap());
            let mut most = 0;
            for steps in (1..).step_by(stride) {
                drop(fs::remove_dir_all(&output).or_else(|_| fs::remove_file(&output)));
                match stopped(&zoo, &output, &how, steps) {
                    Err(e) => assert!(matches!(e, Error::Interrupted), "{e}"),
                    Ok(done) => {
                        same(&done);
                        break;
                    }
                }
                assert!(!output.exists());
                let done = run(&zoo, &output, &how).unwrap();
                assert!(taken(&done) >= most);
                most = taken(&done);
                same(&done);
            }
            // The last step of a file is before the last tensor is kept.
            let all = plain.tensors.len() - usize::from(*form == ".tenpak");
            assert!(if quick { most == all } else { most > 0 }, "{most} of {all}");
        }
    }
    let names = folder.names();
    assert!(names.iter().all(|name| !name.starts_with('.') && !name.ends_with(".journal")), "{names:?}");
}

#[test]
fn whatever_a_crash_leaves_is_continued_or_written_again() {
    let folder = Folder::new();
    let zoo = zoo(&folder);
    let (output, journal) = (folder.path("m.tenpak"), folder.path("m.tenpak.journal"));
    let options = recipe("int4_g8_fp16_v1");
    // The journal as a killed process leaves it, at every step, in the midst of a tensor too.
    let mut left = Vec::new();
    compress_as(&open_source(&zoo), &output, &options, MOST, &mut |_| {
        left.push(contents(&journal));
        Ok(())
    })
    .unwrap();
    let expected = contents(&output);
    let again = |files: &BTreeMap<PathBuf, Vec<u8>>| {
        put(&journal, files);
        drop(fs::remove_file(&output));
        let done = run(&zoo, &output, &options).unwrap();
        assert!(contents(&output) == expected && !journal.exists());
        taken(&done)
    };
    for files in &left {
        again(files);
    }
    let last = left.last().unwrap();
    let all = again(last);
    assert!(all >= 6);
    let (log, planes) = (Path::new("finished.log"), Path::new("planes"));
    // The log cut anywhere, or its tail other bytes: lines before that count.
    let lines: Vec<usize> = (0..last[log].len()).filter(|&at| last[log][at] == b'\n').collect();
    for at in (0..last[log].len()).step_by(131).chain(lines.iter().flat_map(|&at| [at, at + 1])) {
        let whole = lines.iter().filter(|&&end| end < at).count().saturating_sub(1);
        let mut torn = last.clone();
        torn.get_mut(log).unwrap().truncate(at);
        assert_eq!(again(&torn), whole, "cut at {at}");
        torn.get_mut(log).unwrap().extend([0; 100]);
        assert_eq!(again(&torn), whole, "zeros from {at}");
    }
    // Planes that never reached the disk, or changed there.
    let mut lost = last.clone();
    lost.get_mut(planes).unwrap().truncate(700);
    assert!(again(&lost) < all);
    for at in (64..last[planes].len()).step_by(1997) {
        let mut bad = last.clone();
        bad.get_mut(planes).unwrap()[at] ^= 1;
        // A byte of padding may be any.
        assert!(again(&bad) <= all);
    }
    let mut none = last.clone();
    none.remove(planes);
    assert_eq!(again(&none), 0);
    assert_eq!(again(&BTreeMap::new()), 0);
}

#[test]
fn a_journal_of_another_run_is_refused_by_what_differs() {
    let folder = Folder::new();
    let model = zoo(&folder);
    let output = folder.path("m.tenpak");
    let options = recipe("int4_g8_fp16_v1");
    stopped(&model, &output, &options, 6).unwrap_err();
    let log = folder.path("m.tenpak.journal/finished.log");
    let before = fs::read(&log).unwrap();
    let refused = |input: &Path, options: &Options, says: &str| {
        let message = refusal(run(input, &output, options), "invalid");
        assert!(message.contains(says) && message.contains("m.tenpak.journal"), "{message}");
        assert_eq!(fs::read(&log).unwrap(), before);
    };
    refused(&model, &recipe("int4_g8_v1"), "another recipe");
    refused(&model, &Options { coded: true, ..options.clone() }, "option --coded");
    refused(&model, &Options { nonfinite: Nonfinite::Zero, ..options.clone() }, "option --nonfinite");
    let file = model.join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    let time = fs::metadata(&file).unwrap().modified().unwrap();
    let set = |time| fs::File::options().write(true).open(&file).unwrap().set_modified(time).unwrap();
    // Other weights at the same time, and the same weights at another.
    let mut changed = bytes.clone();
    *changed.last_mut().unwrap() ^= 1;
    fs::write(&file, &changed).unwrap();
    set(time);
    refused(&model, &options, "another source");
    fs::write(&file, &bytes).unwrap();
    set(time + Duration::from_secs(1));
    refused(&model, &options, "length or time of an input file");
    set(time);
    // Another version writes other lines.
    let line = String::from_utf8(before.clone()).unwrap();
    let (first, rest) = line.split_once('\n').unwrap();
    let first = first[9..].replacen("\"tool\":\"tenpak ", "\"tool\":\"tenpak 9.", 1);
    let other = format!("{:08x} {first}\n{rest}", crc32c::crc32c(first.as_bytes()));
    fs::write(&log, other).unwrap();
    let message = refusal(run(&model, &output, &options), "invalid");
    assert!(message.contains("version of tenpak") && message.contains("--force"), "{message}");
    // Only who asks for it loses it.
    let plain = Options { resume: false, ..options.clone() };
    let done = run(&model, &output, &plain).unwrap();
    assert!(done.notes.iter().any(|note| note.contains("m.tenpak.journal") && note.contains("--resume")));
    assert!(log.exists());
    let done = run(&model, &output, &Options { force: true, ..options }).unwrap();
    assert!(done.notes.iter().any(|note| note.contains("was given up")), "{:?}", done.notes);
    assert!(!log.exists());
}

#[test]
fn one_process_at_a_time_works_with_a_journal_and_nothing_else_is_taken_for_one() {
    let folder = Folder::new();
    let zoo = zoo(&folder);
    let output = folder.path("m.tenpak");
    let options = recipe("int4_g8_v1");
    let mut seen = 0;
    compress_as(&open_source(&zoo), &output, &options, MOST, &mut |_| {
        seen += 1;
        assert!(refusal(run(&zoo, &output, &options), "invalid").contains("in use by another process"));
        Ok(())
    })
    .unwrap();
    assert!(seen > 0);
    assert!(refusal(run(&zoo, &output, &options), "invalid").contains("exists"));
    folder.write("d.journal/diary.txt", "mine");
    assert!(refusal(run(&zoo, &folder.path("d"), &options), "invalid").contains("no journal"));
    // A plan neither needs nor makes one; a run that ends before its first tensor leaves none.
    plan_as(&open_source(&zoo), Some(&folder.path("p")), &options, MOST).unwrap();
    stopped(&zoo, &folder.path("p"), &options, 1).unwrap_err();
    assert!(!folder.path("p.journal").exists());
}

#[test]
fn a_part_goes_on_too() {
    let folder = Folder::new();
    let zoo = zoo(&folder);
    let (dir, whole, options) = (folder.path("d"), folder.path("whole"), recipe("int4_g8_v1"));
    run(&zoo, &whole, &options).unwrap();
    for number in 1..=2 {
        let part = Part::new(number, 2).unwrap();
        let mut left = 3;
        let stop = compress_part(&open_source(&zoo), &dir, &options, MOST, part, &mut |_| {
            left -= 1;
            if left == 0 { Err(Error::Interrupted) } else { Ok(()) }
        });
        assert!(matches!(stop, Err(Error::Interrupted)));
        assert!(folder.path(&format!("d.part-0000{number}-of-00002.journal")).exists());
        let done = compress_part(&open_source(&zoo), &dir, &options, MOST, part, &mut |_| Ok(())).unwrap();
        assert!(taken(&done) > 0);
    }
    merge(&dir, &mut |_| Ok(())).unwrap();
    assert!(contents(&dir) == contents(&whole));
    assert!(folder.names().iter().all(|name| !name.ends_with(".journal")));
}

#[test]
fn a_process_that_was_killed_is_continued() {
    let folder = Folder::new();
    let output = folder.path("m.tenpak");
    let tenpak = |output: &str| {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("tenpak"));
        command.current_dir(folder.path("")).args(["compress", SAMPLE, "-o", output, "--quiet", "--threads", "1"]);
        command
    };
    assert!(tenpak("direct.tenpak").status().unwrap().success());
    let log = folder.path("m.tenpak.journal/finished.log");
    let lines = || fs::read(&log).map_or(0, |text| text.iter().filter(|&&byte| byte == b'\n').count());
    let mut wanted = 3;
    while !output.exists() {
        let before = lines();
        let mut child = tenpak("m.tenpak").arg("--resume").spawn().unwrap();
        let patience = Instant::now();
        while child.try_wait().unwrap().is_none() && (lines() < wanted || before >= wanted) {
            assert!(patience.elapsed() < Duration::from_secs(300), "the process comes to no end");
            std::thread::sleep(Duration::from_millis(2));
        }
        // SIGKILL, unless it was quicker.
        child.kill().unwrap();
        child.wait().unwrap();
        wanted += 5;
    }
    assert!(fs::read(&output).unwrap() == fs::read(folder.path("direct.tenpak")).unwrap());
    let said = tenpak("m.tenpak").arg("--resume").output().unwrap();
    assert_eq!(said.status.code(), Some(2));
}
