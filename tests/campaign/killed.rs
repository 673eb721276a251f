//! `kill -9` at random times: the target is the old one or the new one, whole, and the next run succeeds.

use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::changed::remove;
use crate::models::{contents, hugging_face, run, tenpak};
use crate::support::{Folder, Random};
use crate::{cases, reached};

/// Everything that the runs below read.
fn models() -> Folder {
    let folder = Folder::new();
    hugging_face(&folder, "model", 512, 1);
    hugging_face(&folder, "variant", 512, 9);
    run(&folder, "compress model -o m.tenpak --codec int4_g32_fp16_v1");
    run(&folder, "delta --base m.tenpak variant -o d.tenpak");
    folder
}

/// A verb, its target, whether the target is there before, and what prepares a run.
const RUNS: [(&str, &str, bool, &[&str]); 7] = [
    ("compress model -o out.tenpak --codec int4_g32_fp16_v1 --force", "out.tenpak", true, &[]),
    ("compress model -o out --codec int4_g32_fp16_v1 --force", "out", true, &[]),
    ("compress model -o new.tenpak --codec int8_sym_v1 --force", "new.tenpak", false, &[]),
    ("materialize --base m.tenpak --delta d.tenpak -o back.tenpak --force", "back.tenpak", true, &[]),
    ("export m.tenpak --to hf -o hf --force", "hf", true, &[]),
    ("decompress m.tenpak -o flat.safetensors --force", "flat.safetensors", true, &[]),
    (
        "merge-index parts",
        "parts",
        false,
        &[
            "compress model -o parts --codec int4_g32_fp16_v1 --shard 1/2",
            "compress model -o parts --codec int4_g32_fp16_v1 --shard 2/2",
        ],
    ),
];

#[test]
fn a_run_that_is_killed_leaves_the_old_target_or_the_new_one() {
    let folder = models();
    let mut random = Random(7);
    let (count, mut replaced, mut kept) = (cases(21), 0, 0);
    let prepared: Vec<_> = RUNS
        .iter()
        .map(|(line, target, exists, before)| {
            before.iter().for_each(|line| drop(run(&folder, line)));
            let parts = contents(&folder.path(target));
            let start = Instant::now();
            run(&folder, line);
            let (took, new) = (start.elapsed(), contents(&folder.path(target)));
            remove(&folder.path(target));
            // An older target has other weights.
            let old = if *exists {
                run(&folder, &line.replace("int4_g32", "int4_g16").replace("model", "variant"));
                let old = contents(&folder.path(target));
                remove(&folder.path(target));
                old
            } else {
                parts
            };
            (took, old, new)
        })
        .collect();
    for case in 0..count {
        let (line, target, ..) = RUNS[case % RUNS.len()];
        let (took, old, new) = &prepared[case % RUNS.len()];
        let path = folder.path(target);
        remove(&path);
        for (name, bytes) in old {
            let whole =
                if name.as_os_str().is_empty() { target.into() } else { format!("{target}/{}", name.display()) };
            folder.write(&whole, bytes);
        }
        let mut child = tenpak(&folder.path(""), line).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(took.mul_f64(1.2 * random.below(1000) as f64 / 1000.0) + Duration::from_micros(200));
        child.kill().unwrap();
        child.wait().unwrap();
        let found = contents(&path);
        if found == *new {
            replaced += 1;
        } else {
            kept += 1;
            assert!(found == *old, "{line}: neither the old target nor the new one: {:?}", found.keys());
        }
        // Parts that have been put together are no parts any more.
        if !(found == *new && line.starts_with("merge-index")) {
            run(&folder, line);
        }
        assert!(contents(&path) == *new, "{line}: the run after the one that was killed gave something else");
        // What a killed run leaves is hidden, and no run takes it for anything.
        for name in folder.names().iter().filter(|name| name.starts_with('.')) {
            assert!(name.starts_with(".tenpak-") && name.ends_with(".tmp"), "{name}");
            remove(&folder.path(name));
        }
    }
    reached("kill -9", count, &format!("{kept} times the old target, {replaced} times the new one"));
}
