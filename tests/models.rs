//! Real models through every codec: compress, verify, decompress, and the figures that come out.
//!
//! `cargo test --release --test models -- --nocapture` prints the table. The sample model is in the repository; the
//! others are looked for in `TENPAK_SHARED`.

#![expect(clippy::print_stdout, reason = "the table is what the test shows")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use tenpak::artifact::ArtifactFile;
use tenpak::artifact::verify::verify;
use tenpak::compress::{Nonfinite, Options, compress, plan};
use tenpak::measure::Distance;
use tenpak::recipe::Recipe;
use tenpak::source::{self, Source};
use tenpak::{Result, codecs, export, to_f32};

fn models() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let shared = std::env::var_os("TENPAK_SHARED").map_or_else(|| root.join("../shared"), PathBuf::from);
    let mut models = vec![root.join("tests/data/tiny-books")];
    for name in ["books5m", "stories260K"] {
        let path = shared.join("data/models").join(name);
        if path.is_dir() {
            models.push(path);
        } else {
            eprintln!("{} is absent: set TENPAK_SHARED to test with it", path.display());
        }
    }
    models
}

fn open(path: &Path) -> Source {
    source::open(path, &source::Options::default()).unwrap()
}

fn options(id: &str) -> Options {
    Options {
        recipe: Recipe::new(codecs::get(id).unwrap()),
        nonfinite: Nonfinite::Error,
        target_bytes: None,
        force: false,
    }
}

/// Every tensor of a checkpoint as f32, by name.
fn weights(source: &Source) -> BTreeMap<String, Vec<f32>> {
    let read = |i: usize| {
        let info = source.tensors()[i].info();
        let mut out = vec![0.0; usize::try_from(info.elements()).unwrap()];
        to_f32(info.dtype(), &source.read_bytes(i, 0, info.bytes()).unwrap(), &mut out);
        (info.name().to_owned(), out)
    };
    (0..source.tensors().len()).map(read).collect()
}

#[test]
fn every_codec_stores_real_models_and_gives_them_back_as_it_reported() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    for model in models() {
        let name = model.file_name().unwrap().to_string_lossy().into_owned();
        let source = open(&model);
        let original = weights(&source);
        println!("\n{name:22} {:>10} {:>8} {:>8} {:>8} {:>10}", "bytes", "bpw", "x FP32", "x 16bit", "nMSE");
        for codec in codecs::all() {
            let options = options(codec.id);
            let target = dir.path().join(format!("{name}-{}.tenpak", codec.id));
            let planned = plan(&source, &options)?;
            let report = compress(&source, &target, &options, &mut |_| Ok(()))?;
            assert_eq!(report.file_bytes, std::fs::metadata(&target).unwrap().len(), "{name} {}", codec.id);
            // The length of what is coded is only known when it is; a rate is never exceeded.
            let off = report.file_bytes.abs_diff(planned.file_bytes);
            let most = if codec.fit == tenpak::fit::Fit::Rate { planned.file_bytes / 100 } else { 0 };
            assert!(off <= most, "{name} {}: the plan was not exact", codec.id);

            let artifact = ArtifactFile::open(&target)?;
            assert_eq!(verify(&artifact, |_| Ok(()))?.problems, [], "{name} {}", codec.id);

            let decoded = dir.path().join(format!("{name}-{}.safetensors", codec.id));
            let f32s = export::Options { dtype: Some(tenpak::DType::F32), ..export::Options::default() };
            export::decompress(&artifact, &decoded, &f32s, &mut |_| Ok(()))?;
            let decoded = weights(&open(&decoded));
            let mut lossy = Distance::default();
            for tensor in &report.tensors {
                let distance = Distance::between(&original[&tensor.name], &decoded[&tensor.name]);
                match &tensor.distance {
                    None => assert_eq!(distance.noise, 0.0, "{name} {}: {} is not exact", codec.id, tensor.name),
                    Some(reported) => {
                        // The same numbers summed in another order: f64 sums of n terms agree to n roundings.
                        let slack = f64::EPSILON * distance.weights as f64 * distance.noise;
                        let off = (reported.noise - distance.noise).abs();
                        assert!(
                            off <= slack,
                            "{name} {}: {} reported {reported:?}, is {distance:?}",
                            codec.id,
                            tensor.name
                        );
                        if tensor.codec == codec {
                            lossy.merge(reported);
                        }
                    }
                }
            }
            let elements: u64 = report.tensors.iter().map(|t| t.elements()).sum();
            let (weights, bytes) = (elements as f64, report.file_bytes as f64);
            println!(
                "{:22} {bytes:>10} {:>8.3} {:>8.2} {:>8.2} {:>10.3e}",
                codec.id,
                8.0 * bytes / weights,
                4.0 * weights / bytes,
                2.0 * weights / bytes,
                lossy.nmse()
            );
        }
    }
    Ok(())
}

#[test]
fn a_sharded_copy_has_the_same_identity() -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    for model in models() {
        let whole = dir.path().join("whole.tenpak");
        let force = |id| Options { force: true, ..options(id) };
        compress(&open(&model), &whole, &force("raw_v1"), &mut |_| Ok(()))?;
        let shards = dir.path().join(format!("{}-shards", model.file_name().unwrap().to_string_lossy()));
        let small = export::Options { max_shard_bytes: 300_000, ..export::Options::default() };
        let exported = export::decompress(&ArtifactFile::open(&whole)?, &shards, &small, &mut |_| Ok(()))?;
        assert!(exported.files.len() > 3, "{} files are no sharded model", exported.files.len());
        for id in ["raw_v1", "int4_g8_fp16_v1"] {
            let from_whole = compress(&open(&model), &dir.path().join("a"), &force(id), &mut |_| Ok(()))?;
            let from_shards = compress(&open(&shards), &dir.path().join("b"), &force(id), &mut |_| Ok(()))?;
            let names =
                |report: &tenpak::compress::Report| report.tensors.iter().map(|t| t.name.clone()).collect::<Vec<_>>();
            // The identity covers the order of the tensors, which shards keep.
            assert_eq!(names(&from_whole), names(&from_shards));
            assert_eq!(from_whole.identity, from_shards.identity, "{} {id}", model.display());
        }
    }
    Ok(())
}
