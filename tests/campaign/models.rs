//! Models, and the program run on them in a folder of its own.

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::support::{Folder, Tensor};
use tenpak::DType;

/// The program with its arguments, one thread, in a folder.
pub fn tenpak(folder: &Path, line: &str) -> Command {
    let mut command = Command::new(assert_cmd::cargo::cargo_bin!("tenpak"));
    command.current_dir(folder).args(line.split(' ')).args(["--threads", "1"]);
    command
}

/// Runs the program to its end, in success.
pub fn run(folder: &Folder, line: &str) -> Output {
    let output = tenpak(&folder.path(""), line).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// Whether a run came to an end: `Ok` in success, `Err` with the message of an error that it said in one line.
pub fn ended(line: &str, output: &Output) -> Result<(), String> {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.signal(), None, "{line} was ended by a signal: {said}");
    match output.status.code() {
        Some(0) => Ok(()),
        Some(1 | 2) => {
            let [message] = said.lines().filter(|line| line.starts_with("tenpak: ")).collect::<Vec<_>>()[..] else {
                // Of damage that verify finds, its report tells.
                assert!(line.starts_with("verify"), "{line} gave no message, or two: {said}");
                return Err(said);
            };
            assert!(!said.contains("panicked") && !message.contains("internal error"), "{line}: {said}");
            Err(message.to_owned())
        }
        other => panic!("{line} exited with {other:?}: {said}"),
    }
}

/// Every file below a path, with its bytes; of a file its own, under an empty name. Nothing where there is nothing.
pub fn contents(path: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    fn walk(root: &Path, path: &Path, all: &mut BTreeMap<PathBuf, Vec<u8>>) {
        if path.is_dir() {
            std::fs::read_dir(path).unwrap().for_each(|entry| walk(root, &entry.unwrap().path(), all));
        } else if path.exists() {
            all.insert(path.strip_prefix(root).unwrap().to_owned(), std::fs::read(path).unwrap());
        }
    }
    let mut all = BTreeMap::new();
    walk(path, path, &mut all);
    all
}

/// Weights of a small model: two matrices that are encoded and a vector that is not.
pub fn tensors(rows: u64, seed: u64) -> Vec<Tensor> {
    vec![
        Tensor::random("model.layers.0.mlp.up_proj.weight", DType::F32, &[rows, 128], seed),
        Tensor::random("model.layers.0.mlp.down_proj.weight", DType::F32, &[128, 64], seed + 1),
        Tensor::random("model.norm.weight", DType::F32, &[64], seed + 2),
    ]
}

/// A Hugging Face directory `name` of these weights.
pub fn hugging_face(folder: &Folder, name: &str, rows: u64, seed: u64) {
    folder.write(&format!("{name}/config.json"), r#"{"model_type":"llama","architectures":["LlamaForCausalLM"]}"#);
    folder.checkpoint(&format!("{name}/model.safetensors"), &tensors(rows, seed));
}
