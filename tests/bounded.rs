//! Memory does not grow with the model: a checkpoint eight times as large as the address space that a process may have
//! is compressed and decompressed, and gives the same bytes as without a cap.
//!
//! `TENPAK_CAMPAIGN` says of how many megabytes.

#![cfg(target_os = "linux")]

mod support;

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::Path;
use std::process::Command;

use support::{Folder, Random};

/// Address space of a process with one thread and 8 MiB blocks: its code and libraries, three stacks, a window of the
/// source, the planes of a block, and what the allocator keeps.
const CAP_KIB: u64 = 96 << 10;

/// Bytes of the checkpoint.
fn checkpoint_bytes() -> u64 {
    std::env::var("TENPAK_CAMPAIGN").map_or(8 * CAP_KIB * 1024, |megabytes| megabytes.parse::<u64>().unwrap() << 20)
}

/// Writes a checkpoint of one tensor that repeats a megabyte of random weights, and some small ones.
fn write_checkpoint(path: &Path) {
    let mut random = Random(1);
    let pattern: Vec<u8> = (0..1 << 18).flat_map(|_| random.weight().to_le_bytes()).collect();
    let megabytes = checkpoint_bytes() >> 20;
    let (rows, bytes) = (megabytes * 64, megabytes << 20);
    let mut header = format!(
        "{{\"w\":{{\"dtype\":\"F32\",\"shape\":[{rows},4096],\"data_offsets\":[0,{bytes}]}},\
          \"norm\":{{\"dtype\":\"F32\",\"shape\":[1024],\"data_offsets\":[{bytes},{}]}}}}",
        bytes + 4096
    );
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    let mut file = BufWriter::new(File::create(path).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    for _ in 0..megabytes {
        file.write_all(&pattern).unwrap();
    }
    file.write_all(&pattern[..4096]).unwrap();
    file.flush().unwrap();
}

/// Runs a command line, under a cap of the address space where one is given.
fn run(folder: &Folder, line: &str, cap: Option<u64>) {
    let limit = cap.map_or_else(String::new, |kib| format!("ulimit -v {kib} && "));
    let output = Command::new("sh")
        .args(["-c", &format!("{limit}exec \"$0\" {line} --threads 1")])
        .arg(assert_cmd::cargo::cargo_bin!("tenpak"))
        .current_dir(folder.path(""))
        // Otherwise glibc reserves 64 MiB of address space, never used, for each thread that allocates.
        .env("MALLOC_ARENA_MAX", "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Whether two files hold the same bytes.
fn same(a: &Path, b: &Path) -> bool {
    let mut files = [a, b].map(|path| File::open(path).unwrap());
    let lengths = [0, 1].map(|i| files[i].metadata().unwrap().len());
    let mut buffers = [vec![0; 1 << 20], vec![0; 1 << 20]];
    let mut left = lengths[0];
    while left > 0 {
        let n = usize::try_from(left.min(1 << 20)).unwrap();
        for (file, buffer) in files.iter_mut().zip(&mut buffers) {
            file.read_exact(&mut buffer[..n]).unwrap();
        }
        if buffers[0][..n] != buffers[1][..n] {
            return false;
        }
        left -= n as u64;
    }
    lengths[0] == lengths[1]
}

#[test]
fn a_checkpoint_larger_than_the_address_space_is_compressed_and_decompressed() {
    let folder = Folder::new();
    write_checkpoint(&folder.path("m.safetensors"));
    for (name, options) in [("map", " --mmap"), ("read", "")] {
        run(
            &folder,
            &format!("compress m.safetensors --codec int4_g32_fp16_v1 -o {name}.tenpak{options}"),
            Some(CAP_KIB),
        );
    }
    run(&folder, "compress m.safetensors --codec int4_g32_fp16_v1 -o free.tenpak", None);
    for capped in ["map.tenpak", "read.tenpak"] {
        assert!(same(&folder.path(capped), &folder.path("free.tenpak")), "{capped}");
    }
    run(&folder, "compress m.safetensors --codec int4_g32_fp16_v1 -o directory", Some(CAP_KIB));
    run(&folder, "export directory --to tenpak -o back.tenpak", Some(CAP_KIB));
    assert!(same(&folder.path("back.tenpak"), &folder.path("free.tenpak")));
    for used in ["back.tenpak", "free.tenpak"] {
        std::fs::remove_file(folder.path(used)).unwrap();
    }
    // Without its header, all of it is read for its checksums when it is opened.
    run(&folder, "verify directory", Some(CAP_KIB));
    std::fs::remove_file(folder.path("directory/tenpak.json")).unwrap();
    run(&folder, "verify directory", Some(CAP_KIB));
    std::fs::remove_dir_all(folder.path("directory")).unwrap();
    std::fs::remove_file(folder.path("m.safetensors")).unwrap();
    run(&folder, "verify map.tenpak", Some(CAP_KIB));
    run(&folder, "decompress map.tenpak -o capped.safetensors", Some(CAP_KIB));
    run(&folder, "decompress read.tenpak -o free.safetensors", None);
    assert!(same(&folder.path("capped.safetensors"), &folder.path("free.safetensors")));
    eprintln!(
        "campaign memory cap: {} cases, 0 failures; megabytes of a checkpoint with {} of address space, equal to without",
        checkpoint_bytes() >> 20,
        CAP_KIB >> 10
    );
}
