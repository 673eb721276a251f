//! Every call of the system that touches a run's files fails once, in each way: the target is the old one or the new one,
//! whole, nothing is left beside it, and the error is a message and an exit code.

#![cfg(target_arch = "x86_64")]

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::changed::remove;
use crate::models::{contents, ended, hugging_face, run, tenpak};
use crate::support::Folder;
use crate::{cases, reached};

/// Verbs with their targets, and whether the target is there before.
const RUNS: [(&str, &str, bool); 7] = [
    ("compress model -o out.tenpak --codec int4_g32_fp16_v1 --force", "out.tenpak", true),
    ("compress model -o out --codec int4_g32_fp16_v1 --force", "out", true),
    ("compress model -o new.tenpak --codec ecu_v1", "new.tenpak", false),
    ("materialize --base m.tenpak --delta d.tenpak -o back.tenpak --force", "back.tenpak", true),
    ("export m.tenpak --to hf -o hf --force", "hf", true),
    ("decompress m.tenpak -o flat.safetensors --force", "flat.safetensors", true),
    ("decompress m.tenpak -o shards --max-shard-size 100000", "shards", false),
];

/// Errors with their numbers; the last is none, but half of a read or write.
const FAULTS: [(&str, i32); 4] = [("ENOSPC", 28), ("EIO", 5), ("EINTR", 4), ("a short read or write", -1)];

/// The library that makes calls fail, if there is a compiler.
fn shim(folder: &Folder) -> Option<PathBuf> {
    let path = folder.path("faults.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/campaign/faults.c");
    let built = Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&path).arg(source).status();
    built.is_ok_and(|status| status.success()).then_some(path)
}

/// Runs a verb whose `number`-th call fails; how it ended, how many calls there were and which one failed.
fn faulty(shim: &Path, folder: &Folder, line: &str, number: usize, fault: i32) -> (Result<(), String>, usize, String) {
    let report = shim.with_file_name("report");
    let mut command = tenpak(&folder.path(""), line);
    command.env("LD_PRELOAD", shim).env("FAULT_FOLDER", folder.path("")).env("FAULT_REPORT", &report);
    command.env("FAULT_NUMBER", number.to_string()).env("FAULT_ERROR", fault.to_string());
    let output = command.output().unwrap();
    let ended = ended(&format!("{line}, call {number}, errno {fault}"), &output);
    let report = std::fs::read_to_string(report).unwrap();
    let (calls, name) = report.trim().split_once(' ').unwrap();
    (ended, calls.parse().unwrap(), name.to_owned())
}

#[test]
fn a_call_of_the_system_that_fails_leaves_the_old_target_or_the_new_one() {
    let (folder, built) = (Folder::new(), Folder::new());
    let Some(shim) = shim(&built) else {
        eprintln!("campaign faults: NOT RUN, there is no C compiler `cc`");
        return;
    };
    hugging_face(&folder, "model", 64, 1);
    hugging_face(&folder, "variant", 64, 9);
    run(&folder, "compress model -o m.tenpak --codec int4_g32_fp16_v1");
    run(&folder, "delta --base m.tenpak variant -o d.tenpak");
    let before = folder.names();

    // What each verb writes, and how many calls it makes.
    let mut all = Vec::new();
    let mut results = Vec::new();
    for (verb, (line, target, exists)) in RUNS.iter().enumerate() {
        let (ended, calls, name) = faulty(&shim, &folder, line, 0, 5);
        assert!(ended == Ok(()) && name == "none" && calls > 10, "{line}: {ended:?}, {calls} calls");
        let new = contents(&folder.path(target));
        // An older target, of the same kind.
        let old = exists.then(|| {
            remove(&folder.path(target));
            run(&folder, &line.replace("int4_g32", "int4_g16").replace("model", "variant"));
            contents(&folder.path(target))
        });
        remove(&folder.path(target));
        results.push((old.unwrap_or_default(), new));
        all.extend((1..=calls).flat_map(|call| FAULTS.map(|fault| (verb, call, fault))));
    }
    // In the short form, every verb with each of its calls once at most, in ways that take turns.
    let count = cases(220).min(all.len());
    let (mut errors, mut after, mut missed) = (0, 0, 0);
    for case in 0..count {
        let (verb, call, (kind, fault)) = all[case * all.len() / count];
        let (line, target, _) = RUNS[verb];
        let (old, new) = &results[verb];
        let path = folder.path(target);
        remove(&path);
        for (name, bytes) in old {
            let file = if name.as_os_str().is_empty() { target.into() } else { format!("{target}/{}", name.display()) };
            folder.write(&file, bytes);
        }
        let (ended, _, name) = faulty(&shim, &folder, line, call, fault);
        let what = format!("{line}: {kind} of call {call}, {name}");
        let found = contents(&path);
        match ended {
            Ok(()) => {
                missed += usize::from(name == "none");
                assert!(found == *new, "{what}: a success, but the target is not what it should be");
            }
            Err(message) => {
                errors += 1;
                assert_ne!(fault, -1, "{what}: half of a read or write is no failure, but: {message}");
                // The last calls open the directory and make the name in it durable, when the target is there.
                after += usize::from(found == *new && found != *old);
                assert!(
                    found == *old || (found == *new && ["fsync", "openat"].contains(&&*name)),
                    "{what}: {:?}, {message}",
                    found.keys()
                );
            }
        }
        remove(&path);
        assert_eq!(folder.names(), before, "{what}: something is left");
    }
    let figures = format!("{errors} errors, {after} of them after the rename, {missed} without a call to fail");
    reached("faults", count, &format!("{} calls of {} verbs; {figures}", all.len() / FAULTS.len(), RUNS.len()));
}
