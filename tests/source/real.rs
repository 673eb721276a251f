//! Models as others wrote them, from the folder that `TENPAK_SHARED` names (by default `../shared`).

use std::path::PathBuf;

use tenpak::source::Kind;

use crate::{ACCESSES, open_with};

#[test]
fn real_models_open_and_read_to_their_digest() {
    let shared = std::env::var_os("TENPAK_SHARED")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared"), PathBuf::from);
    let models = shared.join("data/models");
    if !models.is_dir() {
        eprintln!("not checked: there is no {}, set TENPAK_SHARED to check real models", models.display());
        return;
    }
    for (name, weights) in
        [("books5m", 5_000_000..7_000_000), ("stories260K", 260_032..300_000), ("tiny-books", 800_000..1_100_000)]
    {
        for access in ACCESSES {
            let source = open_with(&models.join(name), access).unwrap();
            assert_eq!(source.kind(), Kind::HuggingFace);
            assert_eq!(source.config().unwrap()["model_type"], "llama");
            let mut elements = 0;
            for (index, tensor) in source.tensors().iter().enumerate() {
                assert!(!tensor.transposed() && tensor.info().dtype().is_float());
                let bytes = source.read_rows(index, 0, tensor.matrix().0).unwrap();
                assert_eq!(bytes.len() as u64, tensor.info().bytes());
                elements += tensor.info().elements();
            }
            assert!(weights.contains(&elements), "{name} has {elements} weights");
            let bytes = std::fs::read(models.join(name).join("model.safetensors")).unwrap();
            assert_eq!(source.files()[0].digest().unwrap(), blake3::hash(&bytes));
        }
    }
}
