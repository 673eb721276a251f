//! Full disks, limits of the length of files, and little memory.

use std::process::{Command, Stdio};

use tenpak::DType;

use crate::changed::remove;
use crate::format::{Artifact, Entry};
use crate::models::{contents, ended, hugging_face, run};
use crate::reached;
use crate::support::{Folder, Tensor};

/// Verbs that write, with their targets.
const RUNS: [(&str, &str); 5] = [
    ("compress model -o out.tenpak --codec int4_g32_fp16_v1 --force", "out.tenpak"),
    ("compress model -o out --codec int4_g32_fp16_v1 --force", "out"),
    ("export m.tenpak --to hf -o hf --force", "hf"),
    ("decompress m.tenpak -o flat.safetensors --force", "flat.safetensors"),
    ("decompress m.tenpak -o flat.npz --force", "flat.npz"),
];

/// The program under a limit that the shell sets.
fn limited(folder: &Folder, limit: &str, line: &str) -> std::process::Output {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{limit} && exec \"$0\" {line} --threads 1")]);
    command.arg(assert_cmd::cargo::cargo_bin!("tenpak")).current_dir(folder.path(""));
    command.env("MALLOC_ARENA_MAX", "1").stdin(Stdio::null()).output().unwrap()
}

#[test]
fn a_file_that_may_not_grow_is_an_error_and_leaves_the_old_target() {
    let folder = Folder::new();
    hugging_face(&folder, "model", 256, 1);
    run(&folder, "compress model -o m.tenpak --codec int4_g32_fp16_v1");
    let names = folder.names();
    let mut errors = 0;
    for (line, target) in RUNS {
        run(&folder, line);
        let path = folder.path(target);
        let new = contents(&path);
        // Blocks of 512 bytes, from nothing to about all.
        for blocks in [0, 1, 8, 32, 100] {
            match ended(line, &limited(&folder, &format!("ulimit -f {blocks}"), line)) {
                Ok(()) => assert!(new.values().all(|bytes| bytes.len() <= blocks * 512), "{line}, {blocks} blocks"),
                Err(message) => {
                    errors += 1;
                    assert!(message.contains("File too large"), "{line}, {blocks} blocks: {message}");
                }
            }
            assert!(contents(&path) == new, "{line}, {blocks} blocks: another target");
        }
        remove(&path);
        assert_eq!(folder.names(), names, "{line}: something is left");
    }
    reached("file size limit", RUNS.len() * 5, &format!("{errors} errors, SIGXFSZ among them"));
}

/// A file system of so many kilobytes in memory, gone with this value; `None` where mounting is not permitted.
struct Disk(Folder);

impl Disk {
    fn mount(kilobytes: u32) -> Option<Self> {
        let folder = Folder::new();
        let options = format!("size={kilobytes}k");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "none"]).arg(folder.path("")).output();
        mounted.is_ok_and(|output| output.status.success()).then(|| Self(folder))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        drop(Command::new("umount").arg(self.0.path("")).status());
    }
}

#[test]
fn a_full_disk_is_an_error_and_leaves_the_old_target() {
    let mut errors = 0;
    let inputs = Folder::new();
    hugging_face(&inputs, "model", 256, 1);
    run(&inputs, "compress model -o m.tenpak --codec int4_g32_fp16_v1");
    let sizes = [64, 96, 160, 192, 224, 260, 300];
    for kilobytes in sizes {
        let Some(disk) = Disk::mount(kilobytes) else {
            eprintln!("campaign full disk: NOT RUN, mounting a tmpfs is not permitted here");
            return;
        };
        let folder = &disk.0;
        for (line, target) in RUNS {
            let old = Tensor::random("old", DType::U8, &[9], 1);
            if target.ends_with(".safetensors") || target.ends_with(".tenpak") {
                folder.checkpoint(target, &[old]);
            }
            let before = contents(&folder.path(""));
            let from = |name: &str| inputs.path(name).display().to_string();
            let there = line.replace(" model ", &format!(" {} ", from("model")));
            let there = there.replace(" m.tenpak ", &format!(" {} ", from("m.tenpak")));
            match ended(line, &limited(folder, "true", &there)) {
                Ok(()) => {
                    run(&inputs, line);
                    assert!(contents(&folder.path(target)) == contents(&inputs.path(target)), "{line}, {kilobytes} kB");
                }
                Err(message) => {
                    errors += 1;
                    let said = message.contains("No space left") || message.contains("bytes are needed");
                    assert!(said, "{line}, {kilobytes} kB: {message}");
                    assert!(contents(&folder.path("")) == before, "{line}, {kilobytes} kB: something is left or lost");
                }
            }
            remove(&folder.path(target));
        }
    }
    assert!(errors > 0 && errors < sizes.len() * RUNS.len());
    reached("full disk", sizes.len() * RUNS.len(), &format!("{errors} errors, the others had room"));
}

#[test]
fn sizes_that_are_absurd_are_errors_in_little_memory() {
    let folder = Folder::new();
    let mut files = Vec::new();
    // Coded planes whose matrices claim to be enormous, in a file of a few hundred bytes.
    let codes: Vec<u8> = (0..64 * 40_usize).map(|i| [126, 127, 128, 129][i * i % 7 % 4]).collect();
    for (number, shape) in [[1 << 14, 1 << 17], [1 << 20, 1 << 12], [64, 1 << 28], [1 << 30, 4]].into_iter().enumerate()
    {
        let mut entry = Entry::coded("w", [64, 40], &codes, 0.5);
        entry.shape = shape.to_vec();
        // A longer stream, so that it may be one of a larger plane.
        entry.planes.iter_mut().for_each(|plane| plane.bytes.resize(1 << 16, 0x55));
        let name = format!("{number}.tenpak");
        folder.write(&name, Artifact::new(vec![entry]).bytes());
        files.push(name);
    }
    // Files with holes: a header as long as allowed, of nothing.
    let mut header = ((64_u64 << 20) - 8).to_le_bytes().to_vec();
    header.push(b'{');
    let path = folder.write("h.safetensors", header);
    std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(1 << 40).unwrap();
    files.push("h.safetensors".to_owned());
    // An array and a GGUF that say they are as long as memory.
    let npy = "{'descr': '<f4', 'fortran_order': True, 'shape': (1048576, 1048576), }";
    let mut array = b"\x93NUMPY\x01\0".to_vec();
    array.extend(u16::try_from(npy.len() + 1).unwrap().to_le_bytes());
    array.extend(format!("{npy}\n").bytes());
    folder.write("a.npy", array);
    files.push("a.npy".to_owned());
    for (number, counts) in
        [[1 << 40, 0], [0, 1 << 40], [u64::MAX, u64::MAX], [1 << 20, 1 << 20]].into_iter().enumerate()
    {
        let mut gguf = b"GGUF\x03\0\0\0".to_vec();
        counts.iter().for_each(|count| gguf.extend(count.to_le_bytes()));
        gguf.extend([0xff; 64]);
        folder.write(&format!("{number}.gguf"), gguf);
        files.push(format!("{number}.gguf"));
    }
    let mut count = 0;
    for name in &files {
        let verbs: &[&str] = if name.ends_with(".tenpak") {
            &["inspect IN", "verify IN", "decompress IN -o out.safetensors", "export IN --to hf -o out"]
        } else {
            &["compress IN -o out.tenpak", "plan IN --target-bits 4"]
        };
        for verb in verbs {
            let line = verb.replace("IN", name);
            let ended = ended(&line, &limited(&folder, "ulimit -v 98304", &line));
            // A header may be sound; what it speaks of is not.
            assert!(ended.is_err() || line.starts_with("inspect"), "{line}");
            assert!(!folder.names().iter().any(|name| name.starts_with("out") || name.starts_with('.')), "{line}");
            count += 1;
        }
    }
    reached("absurd sizes", count, "96 MiB of address space, an error each");
}
