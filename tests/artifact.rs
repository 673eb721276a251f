//! What an artifact promises: it decodes to what its codec says, raw tensors come back bit for bit, the same inputs give
//! the same bytes, and its file appears whole or not at all.

mod support;

use std::fs;

use support::{Folder, Tensor, bits, codec, decode, open_source, pack, refusal, with};
use tenpak::artifact::{ArtifactFile, delta, verify};
use tenpak::compress::{compress, plan};
use tenpak::export;
use tenpak::file::Access;
use tenpak::{DType, Limits, codecs};

/// Shapes of every kind: a scalar, vectors, ragged last groups, stacks, and no elements at all.
const SHAPES: &[&[u64]] = &[
    &[],
    &[1],
    &[7],
    &[131],
    &[1, 1],
    &[3, 5],
    &[2, 8],
    &[5, 129],
    &[2, 3, 33],
    &[2, 1, 2, 40],
    &[64, 257],
    &[0],
    &[4, 0],
    &[0, 4],
    &[2, 0, 3],
];

/// A tensor of every shape and dtype.
fn zoo() -> Vec<Tensor> {
    let mut tensors = Vec::new();
    for &dtype in DType::ALL {
        for shape in SHAPES {
            let name = format!("{}.{shape:?}", dtype.name());
            tensors.push(Tensor::random(&name, dtype, shape, tensors.len() as u64));
        }
    }
    tensors
}

const ACCESSES: [Access; 2] = [Access::Map, Access::Read];

#[test]
fn every_codec_decodes_to_what_it_encoded_in_every_shape_and_dtype() {
    let folder = Folder::new();
    let tensors = zoo();
    let input = folder.checkpoint("model.safetensors", &tensors);
    for wanted in codecs::all() {
        let output = folder.path(wanted.id);
        let report = pack(&input, &output, &with(wanted)).unwrap();
        for access in ACCESSES {
            let artifact = ArtifactFile::open_with(&output, access, &Limits::DEFAULT).unwrap();
            assert_eq!(artifact.tensors().len(), tensors.len());
            for (index, (tensor, report)) in tensors.iter().zip(&report.tensors).enumerate() {
                let entry = &artifact.tensors()[index];
                let what = format!("{} of {}", wanted.id, tensor.name);
                let info = entry.info();
                assert_eq!((info.name(), info.dtype(), info.shape()), (&*tensor.name, tensor.dtype, &*tensor.shape));
                assert_eq!(entry.codec(), report.codec, "{what}");
                let (rows, cols) = tensor.matrix();
                if report.codec.id == codecs::RAW {
                    assert_eq!(*artifact.plane(index, 0).unwrap(), *tensor.bytes, "{what}");
                    assert_eq!(bits(&decode(&artifact, index).unwrap()), bits(&tensor.weights()), "{what}");
                    continue;
                }
                let encoded = if report.rate.is_some() {
                    // Codes are chosen for a rate: what is stored decodes as the layout says.
                    let planes = (0..2).map(|plane| artifact.plane(index, plane).unwrap().to_vec()).collect();
                    tenpak::Encoded::from_planes(report.codec, rows, cols, planes).unwrap()
                } else {
                    report.codec.encode(&tensor.weights(), rows, cols).unwrap()
                };
                for (place, (plane, bytes)) in encoded.planes().enumerate() {
                    assert_eq!(entry.planes()[place].plane, plane, "{what}");
                    assert_eq!(*artifact.plane(index, place).unwrap(), *bytes, "{what}, plane {}", plane.name());
                }
                assert_eq!(bits(&decode(&artifact, index).unwrap()), bits(&encoded.decode()), "{what}");
            }
            assert_eq!(verify::verify(&artifact, |_| Ok(())).unwrap().problems, []);
        }
    }
}

#[test]
fn a_codec_holds_every_float_tensor_whose_rows_are_not_shorter_than_its_group() {
    let folder = Folder::new();
    let input = folder.checkpoint("model.safetensors", &zoo());
    for wanted in codecs::all() {
        let report = plan(&open_source(&input), &with(wanted)).unwrap();
        for t in &report.tensors {
            let cols = t.shape.last().copied().unwrap_or(1);
            let group = wanted.grouped().map_or(0, tenpak::layout::Grouped::group) as u64;
            // From groups of 256 on a shorter row is a group by itself.
            let expected = match (t.dtype.is_float(), cols >= group || group >= 256) {
                (false, _) => codecs::RAW,
                (true, true) => wanted.id,
                (true, false) => codecs::INT8_ROW,
            };
            assert_eq!(t.codec.id, expected, "{} of {}", wanted.id, t.name);
        }
    }
}

#[test]
fn raw_tensors_come_back_bit_for_bit_in_every_dtype_nan_payloads_included() {
    let folder = Folder::new();
    let shape = [9, 71];
    let tensors: Vec<_> =
        DType::ALL.iter().map(|&dtype| Tensor::noise(dtype.name(), dtype, &shape, dtype.size())).collect();
    let input = folder.checkpoint("model.safetensors", &tensors);
    let output = folder.path("model.tenpak");
    pack(&input, &output, &with(codec(codecs::RAW))).unwrap();
    for access in ACCESSES {
        let artifact = ArtifactFile::open_with(&output, access, &Limits::DEFAULT).unwrap();
        for (index, tensor) in tensors.iter().enumerate() {
            assert_eq!(*artifact.plane(index, 0).unwrap(), *tensor.bytes, "{}", tensor.name);
        }
        let back = folder.path("back.safetensors");
        let options = export::Options { force: true, ..export::Options::default() };
        export::decompress(&artifact, &back, &options, &mut |_| Ok(())).unwrap();
        let source = open_source(&back);
        for (index, found) in source.tensors().iter().enumerate() {
            let tensor = tensors.iter().find(|t| t.name == found.info().name()).unwrap();
            assert_eq!(found.info().dtype(), tensor.dtype);
            assert_eq!(*source.read_bytes(index, 0, found.info().bytes()).unwrap(), *tensor.bytes, "{}", tensor.name);
        }
    }
}

#[test]
fn the_same_inputs_give_the_same_bytes_at_any_number_of_threads_and_with_any_access() {
    let folder = Folder::new();
    // Each of several tasks, and a last one that is shorter.
    let tensors =
        [Tensor::random("a", DType::F32, &[300, 257], 1), Tensor::random("b", DType::BF16, &[2, 3, 20_001], 2)];
    let input = folder.checkpoint("model.safetensors", &tensors);
    for wanted in codecs::all() {
        let mut first: Option<Vec<u8>> = None;
        for threads in [1, 2, 3] {
            for access in ACCESSES {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let output = folder.path(&format!("{}.{threads}.{access:?}", wanted.id));
                let options = tenpak::source::Options { access, limits: Limits::DEFAULT };
                let source = tenpak::source::open(&input, &options).unwrap();
                pool.install(|| compress(&source, &output, &with(wanted), &mut |_| Ok(()))).unwrap();
                let bytes = fs::read(&output).unwrap();
                let first = first.get_or_insert_with(|| bytes.clone());
                assert!(*first == bytes, "{} at {threads} threads with {access:?}", wanted.id);
            }
        }
    }
}

#[test]
fn a_plan_predicts_the_length_of_the_file_and_of_every_tensor_to_the_byte() {
    let folder = Folder::new();
    let input = folder.checkpoint("model.safetensors", &zoo());
    // The length of what is coded is only known when it is.
    for wanted in codecs::all().iter().filter(|codec| codec.fit != tenpak::fit::Fit::Rate) {
        let output = folder.path(wanted.id);
        let planned = plan(&open_source(&input), &with(wanted)).unwrap();
        let done = pack(&input, &output, &with(wanted)).unwrap();
        assert_eq!(planned.file_bytes, fs::metadata(&output).unwrap().len(), "{}", wanted.id);
        assert_eq!(planned.file_bytes, done.file_bytes, "{}", wanted.id);
        for (planned, done) in planned.tensors.iter().zip(&done.tensors) {
            assert_eq!(planned.stored_bytes, done.stored_bytes, "{} of {}", wanted.id, done.name);
            assert_eq!(planned.reason, done.reason, "{} of {}", wanted.id, done.name);
        }
    }
}

#[test]
fn reading_an_artifact_and_writing_what_was_read_gives_the_same_file() {
    let folder = Folder::new();
    let input = folder.checkpoint("model.safetensors", &zoo());
    for wanted in codecs::all() {
        let [output, nothing, again] = ["", ".delta", ".again"].map(|end| folder.path(&format!("{}{end}", wanted.id)));
        pack(&input, &output, &with(wanted)).unwrap();
        let base = ArtifactFile::open(&output).unwrap();
        delta::delta(&base, &open_source(&input), 0.0, None, &nothing, false, &mut |_| Ok(())).unwrap();
        let chain = [ArtifactFile::open(&nothing).unwrap()];
        assert!(chain[0].tensors().is_empty());
        delta::materialize(&base, &chain, &again, false, &mut |_| Ok(())).unwrap();
        assert!(fs::read(&output).unwrap() == fs::read(&again).unwrap(), "{}", wanted.id);
    }
}

#[test]
fn a_checkpoint_without_tensors_makes_a_sound_artifact() {
    let folder = Folder::new();
    let input = folder.checkpoint("model.safetensors", &[]);
    let output = folder.path("model.tenpak");
    let planned = plan(&open_source(&input), &with(codec(codecs::RAW))).unwrap();
    let report = pack(&input, &output, &with(codec(codecs::RAW))).unwrap();
    assert_eq!(planned.file_bytes, report.file_bytes);
    let artifact = ArtifactFile::open(&output).unwrap();
    assert_eq!((artifact.tensors().len(), artifact.header().identity()), (0, report.identity.unwrap()));
}

#[test]
fn a_tensor_of_several_chunks_is_checked_chunk_by_chunk() {
    let folder = Folder::new();
    let chunk = tenpak::artifact::CHUNK;
    let tensor = Tensor::random("w", DType::U8, &[2 * chunk + 100], 5);
    let input = folder.checkpoint("model.safetensors", std::slice::from_ref(&tensor));
    let output = folder.path("model.tenpak");
    pack(&input, &output, &with(codec(codecs::RAW))).unwrap();
    let sound = fs::read(&output).unwrap();
    for damaged in 0..3 {
        let mut bytes = sound.clone();
        bytes[64 + usize::try_from(chunk * damaged).unwrap()] ^= 1;
        fs::write(&output, &bytes).unwrap();
        let artifact = ArtifactFile::open(&output).unwrap();
        let problems = verify::verify(&artifact, |_| Ok(())).unwrap().problems;
        assert_eq!(problems.iter().map(|p| p.chunk).collect::<Vec<_>>(), [Some(damaged)]);
        assert_eq!(problems[0].at, 64 + chunk * damaged);
        assert!(refusal(artifact.plane(0, 0), "corrupt").contains(&format!("chunk {damaged}")));
    }
}

/// A checkpoint whose last tensor cannot be quantized.
fn with_nan_at_the_end() -> Vec<Tensor> {
    let mut tensors = vec![Tensor::random("a", DType::F32, &[32, 64], 1), Tensor::random("b", DType::F32, &[4, 64], 2)];
    tensors[1].bytes[40..44].copy_from_slice(&f32::NAN.to_le_bytes());
    tensors
}

#[test]
fn a_failed_run_leaves_no_file_and_an_older_output_as_it_was() {
    let folder = Folder::new();
    let input = folder.checkpoint("model.safetensors", &with_nan_at_the_end());
    let output = folder.path("model.tenpak");
    let mut options = with(codec("int4_g8_v1"));
    let message = refusal(pack(&input, &output, &options), "nonfinite");
    assert!(message.contains("'b' has 1 non-finite weights, the first at index 10"), "{message}");
    assert_eq!(folder.names(), ["model.safetensors"]);

    fs::write(&output, "older").unwrap();
    assert!(refusal(pack(&input, &output, &options), "invalid").contains("--force"));
    options.force = true;
    refusal(pack(&input, &output, &options), "nonfinite");
    assert_eq!(fs::read(&output).unwrap(), b"older");
    assert_eq!(folder.names(), ["model.safetensors", "model.tenpak"]);
}

#[test]
fn an_output_that_is_an_input_is_refused_under_every_name() {
    let folder = Folder::new();
    let input = folder.checkpoint("model.safetensors", &[Tensor::random("a", DType::F32, &[8, 16], 1)]);
    let mut options = with(codec(codecs::RAW));
    options.force = true;
    let before = fs::read(&input).unwrap();
    fs::hard_link(&input, folder.path("hard")).unwrap();
    let mut names = vec!["model.safetensors", "hard"];
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("model.safetensors", folder.path("soft")).unwrap();
        names.push("soft");
    }
    for name in names {
        let message = refusal(pack(&input, &folder.path(name), &options), "invalid");
        assert!(message.contains("is the input"), "{message}");
    }
    assert_eq!(fs::read(&input).unwrap(), before);

    let output = folder.path("model.tenpak");
    pack(&input, &output, &options).unwrap();
    let before = fs::read(&output).unwrap();
    let artifact = ArtifactFile::open(&output).unwrap();
    let force = export::Options { force: true, ..export::Options::default() };
    let linked = folder.path("copy.safetensors");
    fs::hard_link(&output, &linked).unwrap();
    refusal(export::decompress(&artifact, &linked, &force, &mut |_| Ok(())), "invalid");
    refusal(delta::delta(&artifact, &open_source(&input), 0.0, None, &output, true, &mut |_| Ok(())), "invalid");
    assert_eq!(fs::read(&output).unwrap(), before);
}

#[cfg(unix)]
mod unix {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_new_file_follows_the_umask_and_a_replaced_one_keeps_its_mode() {
        let folder = Folder::new();
        let input = folder.checkpoint("model.safetensors", &[Tensor::random("a", DType::F32, &[8, 16], 1)]);
        let output = folder.path("model.tenpak");
        let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        let mut options = with(codec(codecs::RAW));
        pack(&input, &output, &options).unwrap();
        assert_eq!(mode(&output), mode(&input), "both were made under one umask");
        options.force = true;
        for kept in [0o640, 0o600, 0o444] {
            fs::set_permissions(&output, fs::Permissions::from_mode(kept)).unwrap();
            pack(&input, &output, &options).unwrap();
            assert_eq!(mode(&output), kept);
        }
    }

    #[test]
    fn a_symbolic_link_keeps_pointing_and_what_it_points_to_is_replaced() {
        let folder = Folder::new();
        let input = folder.checkpoint("model.safetensors", &[Tensor::random("a", DType::F32, &[8, 16], 1)]);
        let [real, link] = ["real.tenpak", "link.tenpak"].map(|name| folder.path(name));
        let mut options = with(codec(codecs::RAW));
        fs::write(&real, "older").unwrap();
        symlink("real.tenpak", &link).unwrap();
        refusal(pack(&input, &link, &options), "invalid");
        options.force = true;
        pack(&input, &link, &options).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert!(fs::symlink_metadata(&real).unwrap().is_file());
        ArtifactFile::open(&real).unwrap();
    }

    #[test]
    fn a_link_to_nothing_is_refused_before_any_work() {
        let folder = Folder::new();
        let input = folder.checkpoint("model.safetensors", &with_nan_at_the_end());
        let link = folder.path("link.tenpak");
        symlink("nowhere/real.tenpak", &link).unwrap();
        let mut options = with(codec("int4_g8_v1"));
        for force in [false, true] {
            options.force = force;
            let message = refusal(pack(&input, &link, &options), "invalid");
            assert!(message.contains("points to nothing"), "{message}");
        }
        assert_eq!(fs::read_link(&link).unwrap(), std::path::Path::new("nowhere/real.tenpak"));
    }

    #[test]
    fn a_directory_or_a_device_is_no_output() {
        let folder = Folder::new();
        let input = folder.checkpoint("model.safetensors", &[]);
        let mut options = with(codec(codecs::RAW));
        options.force = true;
        fs::create_dir(folder.path("dir.tenpak")).unwrap();
        for path in [folder.path("dir.tenpak"), "/dev/null".into()] {
            assert!(refusal(pack(&input, &path, &options), "invalid").contains("is not a file"));
        }
        refusal(pack(&input, &folder.path("no/such/dir.tenpak"), &options), "io");
    }
}

mod attached {
    use std::path::{Path, PathBuf};

    use super::*;

    /// A Hugging Face directory with side files, and files that are none.
    fn model(folder: &Folder, name: &str, tensors: &[Tensor]) -> PathBuf {
        for (file, content) in [
            ("config.json", "{\"model_type\": \"llama\", \"quantization_config\": {\"quant_method\": \"fp8\"}}"),
            ("tokenizer.json", "{}"),
            ("tokenizer.model", ""),
            ("chat_template.jinja", "{{ messages }}"),
            ("modeling_llama.py", "import os"),
            ("README.md", "# a model"),
            ("nested/tokenizer.json", "{}"),
        ] {
            folder.write(&format!("{name}/{file}"), content);
        }
        folder.checkpoint(&format!("{name}/model.safetensors"), tensors);
        folder.path(name)
    }

    fn tensors(seed: u64) -> Vec<Tensor> {
        (0..3).map(|i| Tensor::random(&format!("{i}.weight"), DType::F16, &[9, 64], seed + i)).collect()
    }

    const CARRIED: [&str; 4] = ["chat_template.jinja", "config.json", "tokenizer.json", "tokenizer.model"];

    fn names(artifact: &ArtifactFile) -> Vec<&str> {
        artifact.files().iter().map(|file| &*file.name).collect()
    }

    #[test]
    fn settings_and_tokenizer_of_a_model_are_carried_byte_for_byte_and_nothing_else_is() {
        let folder = Folder::new();
        let input = model(&folder, "m", &tensors(1));
        let output = folder.path("m.tenpak");
        let options = with(codec("int4_g8_v1"));
        let planned = plan(&open_source(&input), &options).unwrap();
        let report = pack(&input, &output, &options).unwrap();
        assert_eq!(planned.file_bytes, fs::metadata(&output).unwrap().len());
        assert_eq!(report.file_bytes - report.weight_bytes, 128 + 64 + 64, "three files that are not empty");
        let artifact = ArtifactFile::open(&output).unwrap();
        assert_eq!(names(&artifact), CARRIED);
        for name in CARRIED {
            assert_eq!(*artifact.read_file(name).unwrap(), *fs::read(input.join(name)).unwrap(), "{name}");
        }
        assert!(refusal(artifact.read_file("README.md"), "invalid").contains("has no file 'README.md'"));
        let alone = folder.path("alone.tenpak");
        let alone = pack(&input.join("model.safetensors"), &alone, &options).unwrap();
        assert!(alone.attached.is_empty());
        assert_eq!(alone.identity, report.identity, "files are no part of the identity");
    }

    #[test]
    fn a_directory_of_decoded_weights_has_them_too_and_no_claim_that_it_is_quantized() {
        let folder = Folder::new();
        let input = model(&folder, "m", &tensors(1));
        pack(&input, &folder.path("m.tenpak"), &with(codec(codecs::RAW))).unwrap();
        let artifact = ArtifactFile::open(folder.path("m.tenpak")).unwrap();
        let back = folder.path("back");
        let exported = export::decompress(&artifact, &back, &export::Options::default(), &mut |_| Ok(())).unwrap();
        assert_eq!(exported.files.len(), 5);
        for name in CARRIED.iter().filter(|name| **name != "config.json") {
            assert_eq!(fs::read(back.join(name)).unwrap(), fs::read(input.join(name)).unwrap(), "{name}");
        }
        assert_eq!(fs::read_to_string(back.join("config.json")).unwrap(), "{\"model_type\": \"llama\"}");
        fs::remove_file(back.join("model.safetensors")).unwrap();
        let again = export::decompress(&artifact, &back, &export::Options::default(), &mut |_| Ok(()));
        assert!(refusal(again, "invalid").contains("exists"));
    }

    #[test]
    fn a_delta_carries_the_files_of_the_variant() {
        let folder = Folder::new();
        let base = model(&folder, "base", &tensors(1));
        let variant = model(&folder, "variant", &tensors(2));
        folder.write("variant/tokenizer.json", "{\"another\": 1}");
        let options = with(codec("int4_g8_v1"));
        let path = |name: &str| folder.path(name);
        pack(&base, &path("base.tenpak"), &options).unwrap();
        pack(&variant, &path("direct.tenpak"), &options).unwrap();
        let base = ArtifactFile::open(path("base.tenpak")).unwrap();
        delta::delta(&base, &open_source(&variant), 0.0, None, &path("delta.tenpak"), false, &mut |_| Ok(())).unwrap();
        let made = [ArtifactFile::open(path("delta.tenpak")).unwrap()];
        assert_eq!(*made[0].read_file("tokenizer.json").unwrap(), *b"{\"another\": 1}");
        delta::materialize(&base, &made, &path("made.tenpak"), false, &mut |_| Ok(())).unwrap();
        assert!(fs::read(path("made.tenpak")).unwrap() == fs::read(path("direct.tenpak")).unwrap());
    }

    fn damaged(path: &Path, offset: u64) -> ArtifactFile {
        let mut bytes = fs::read(path).unwrap();
        bytes[usize::try_from(offset).unwrap()] ^= 1;
        fs::write(path, bytes).unwrap();
        ArtifactFile::open(path).unwrap()
    }

    #[test]
    fn damage_is_found_and_told_by_the_name_of_the_file() {
        let folder = Folder::new();
        let output = folder.path("m.tenpak");
        pack(&model(&folder, "m", &tensors(1)), &output, &with(codec("int4_g8_v1"))).unwrap();
        let place = ArtifactFile::open(&output).unwrap().files()[2].clone();
        let artifact = damaged(&output, place.offset + 1);
        let problems = verify::verify(&artifact, |_| Ok(())).unwrap().problems;
        assert_eq!(problems.len(), 1);
        let found = (problems[0].file.as_deref(), problems[0].tensor.as_deref(), problems[0].chunk, problems[0].at);
        assert_eq!(found, (Some("tokenizer.json"), None, Some(0), place.offset));
        let message = refusal(artifact.read_file("tokenizer.json"), "corrupt");
        assert!(message.contains("file 'tokenizer.json': checksum is"), "{message}");
        artifact.read_file("config.json").unwrap();
        let to = folder.path("back");
        refusal(export::decompress(&artifact, &to, &export::Options::default(), &mut |_| Ok(())), "corrupt");
        assert!(!to.exists());
    }

    #[cfg(unix)]
    #[test]
    fn a_link_out_of_the_model_is_refused() {
        let folder = Folder::new();
        let input = model(&folder, "m", &tensors(1));
        let secret = folder.write("secret.json", "{}");
        std::os::unix::fs::symlink(secret, input.join("generation_config.json")).unwrap();
        let result = tenpak::source::open(&input, &tenpak::source::Options::default());
        assert!(refusal(result, "invalid").contains("outside the model's directory"));
        fs::remove_file(input.join("generation_config.json")).unwrap();
        std::os::unix::fs::symlink("tokenizer.json", input.join("generation_config.json")).unwrap();
        assert_eq!(open_source(&input).attached().len(), 5);
    }

    #[test]
    fn an_output_that_is_an_attached_file_is_refused() {
        let folder = Folder::new();
        let input = model(&folder, "m", &tensors(1));
        let mut options = with(codec(codecs::RAW));
        options.force = true;
        assert!(refusal(pack(&input, &input.join("tokenizer.json"), &options), "invalid").contains("is the input"));
    }
}
