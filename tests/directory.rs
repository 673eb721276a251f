//! What the directory form promises: it loses nothing, other readers open it, and what is wrong with it is told.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use support::{Folder, Tensor, bits, codec, decode, open_source, pack, refusal, with};
use tenpak::artifact::{ArtifactFile, delta, verify};
use tenpak::compress::{Nonfinite, Options, Report, compress_as, plan_as};
use tenpak::export::{self, Conversion, MAX_SHARD_BYTES, To, convert};
use tenpak::recipe::Recipe;
use tenpak::{DType, codecs, source};

const SAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-books");

/// The sample model, and the larger ones where they are.
fn models() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let shared = std::env::var_os("TENPAK_SHARED").map_or_else(|| root.join("../shared"), PathBuf::from);
    let larger = ["books5m", "stories260K"].map(|name| shared.join("data/models").join(name));
    let absent = |path: &PathBuf| {
        if !path.is_dir() {
            eprintln!("{} is absent: set TENPAK_SHARED to test with it", path.display());
        }
        path.is_dir()
    };
    [PathBuf::from(SAMPLE)].into_iter().chain(larger.into_iter().filter(absent)).collect()
}

fn recipe(id: &str) -> Options {
    Options::new(Recipe::new(codec(id)), Nonfinite::Error, false)
}

fn pack_as(input: &Path, output: &Path, options: &Options, max_shard_bytes: u64) -> tenpak::Result<Report> {
    compress_as(&open_source(input), output, options, max_shard_bytes, &mut |_| Ok(()))
}

fn to(to: To, max_shard_bytes: u64) -> Conversion {
    Conversion { to, force: false, max_shard_bytes, allow_requantize: false }
}

fn export(from: &Path, target: &Path, how: &Conversion) -> tenpak::Result<export::Exported> {
    convert(&ArtifactFile::open(from)?, target, how, &mut |_| Ok(()))
}

/// Every file of a directory.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let read = |entry: std::io::Result<fs::DirEntry>| {
        let path = entry.unwrap().path();
        (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(path).unwrap())
    };
    fs::read_dir(dir).unwrap().map(read).collect()
}

/// A raw tensor of every kind, matrices for a codec, an odd name, and one that is stored transposed.
fn zoo() -> Vec<Tensor> {
    vec![
        Tensor::random("model.embed.weight", DType::F16, &[40, 64], 1),
        Tensor::random("transformer.h.0.attn.c_attn.weight", DType::F32, &[64, 96], 2),
        Tensor::random("transformer.h.0.attn.c_attn.bias", DType::F32, &[96], 3),
        Tensor::random("weight", DType::BF16, &[3, 70], 4),
        Tensor::random("odd/näme \"quoted\"", DType::F32, &[5, 33], 5),
        Tensor::random("scalar", DType::F64, &[], 6),
        Tensor::random("bytes", DType::U8, &[7], 7),
        Tensor::random("empty", DType::I64, &[0, 3], 8),
        Tensor::random("mask", DType::Bool, &[3], 9),
        Tensor::random("stack.weight", DType::F32, &[2, 3, 64], 10),
    ]
}

fn zoo_model(folder: &Folder, name: &str) -> PathBuf {
    folder.write(&format!("{name}/config.json"), "{\"model_type\": \"gpt2\"}");
    folder.write(&format!("{name}/vocab.json"), "{}");
    folder.checkpoint(&format!("{name}/model.safetensors"), &zoo());
    folder.path(name)
}

#[test]
fn a_model_goes_to_a_directory_and_back_byte_for_byte() {
    for model in models() {
        for (id, shard) in [("int4_g32_fp16_v1", MAX_SHARD_BYTES), ("int4_zp_g64_fp16_v1", 300_000), ("int8_sym_v1", 1)]
        {
            let folder = Folder::new();
            let path = |name: &str| folder.path(name);
            let file = pack_as(&model, &path("m.tenpak"), &recipe(id), shard).unwrap();
            let direct = pack_as(&model, &path("direct"), &recipe(id), shard).unwrap();
            assert_eq!((file.identity, file.files.len()), (direct.identity, 0));
            export(&path("m.tenpak"), &path("exported"), &to(To::Hf, shard)).unwrap();
            for dir in ["direct", "exported"] {
                export(&path(dir), &path(&format!("{dir}.tenpak")), &to(To::Tenpak, shard)).unwrap();
                let same = fs::read(path("m.tenpak")).unwrap() == fs::read(path(&format!("{dir}.tenpak"))).unwrap();
                assert!(same, "{} {id} by way of {dir}", model.display());
                let artifact = ArtifactFile::open(path(dir)).unwrap();
                assert_eq!(verify::verify(&artifact, |_| Ok(())).unwrap().problems, []);
                let lengths = contents(&path(dir)).values().map(|bytes| bytes.len() as u64).sum::<u64>();
                assert_eq!(artifact.bytes(), lengths);
            }
            let (mut one, mut other) = (contents(&path("direct")), contents(&path("exported")));
            // The card is called after what it was made from.
            assert!(one.remove("README.md").is_some() && other.remove("README.md").is_some());
            assert!(one == other, "{} {id}", model.display());
            export(&path("direct"), &path("resharded"), &to(To::Hf, 200_000)).unwrap();
            export(&path("resharded"), &path("again.tenpak"), &to(To::Tenpak, shard)).unwrap();
            assert!(fs::read(path("m.tenpak")).unwrap() == fs::read(path("again.tenpak")).unwrap());
            assert!(folder.names().iter().all(|name| !name.starts_with('.')), "{:?}", folder.names());
        }
    }
}

#[test]
fn every_codec_and_kind_of_tensor_lies_in_shards_that_the_reference_reader_opens() {
    let folder = Folder::new();
    let input = zoo_model(&folder, "zoo");
    for wanted in codecs::all() {
        let dir = folder.path(wanted.id);
        pack_as(&input, &dir, &with(wanted), 2000).unwrap();
        let file = folder.path("m.tenpak");
        pack_as(&input, &file, &Options { force: true, ..with(wanted) }, 0).unwrap();
        let (whole, artifact) = (ArtifactFile::open(&file).unwrap(), ArtifactFile::open(&dir).unwrap());
        let files = contents(&dir);
        let shards: Vec<_> = files.iter().filter(|(name, _)| name.ends_with(".safetensors")).collect();
        assert!(shards.len() > 1, "{}", wanted.id);
        let index: serde_json::Value = serde_json::from_slice(&files["model.safetensors.index.json"]).unwrap();
        let mut found = BTreeMap::new();
        for (name, bytes) in &shards {
            let shard = safetensors::SafeTensors::deserialize(bytes).unwrap();
            let start = bytes.as_ptr() as usize
                + 8
                + usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
            for (tensor, view) in shard.tensors() {
                assert_eq!(index["weight_map"][&tensor], **name);
                let width = (view.dtype().bitsize() / 8).max(1);
                assert!((view.data().as_ptr() as usize - start).is_multiple_of(width), "{tensor} is not aligned");
                found.insert(tensor, (view.shape().to_vec(), view.data().to_vec()));
            }
        }
        assert_eq!(index["weight_map"].as_object().unwrap().len(), found.len());
        for (i, entry) in whole.tensors().iter().enumerate() {
            let own = entry.info().name();
            for (p, place) in entry.planes().iter().enumerate() {
                let base = if own == "weight" { own } else { own.strip_suffix(".weight").unwrap_or(own) };
                let name = match entry.codec().id {
                    codecs::RAW => own.to_owned(),
                    _ => format!("{base}.{}", place.plane.name()),
                };
                let (shape, data) = found.remove(&name).unwrap_or_else(|| panic!("no {name}"));
                assert_eq!(*artifact.plane(i, p).unwrap(), *whole.plane(i, p).unwrap(), "{name}");
                if place.coding.is_some() {
                    assert_eq!(shape, [data.len()], "{name}");
                    assert_eq!(data.len() as u64, place.bytes, "{name}");
                    continue;
                }
                assert_eq!(*data, *whole.plane(i, p).unwrap(), "{name}");
                if entry.codec().id != codecs::RAW {
                    assert_eq!(shape[0] as u64, entry.matrix().0, "{name}");
                }
            }
            assert_eq!(bits(&decode(&artifact, i).unwrap()), bits(&decode(&whole, i).unwrap()), "{own}");
        }
        assert!(found.is_empty(), "{:?}", found.keys());
        let config: serde_json::Value = serde_json::from_slice(&files["config.json"]).unwrap();
        let quantized = config["quantization_config"]["tensors"].as_object().unwrap();
        assert_eq!(config["model_type"], "gpt2");
        for entry in whole.tensors() {
            let told = quantized.get(entry.info().name());
            assert_eq!(told.is_some(), entry.codec().id != codecs::RAW);
            let Some(told) = told else { continue };
            assert_eq!(
                (told["codec"].as_str(), told["dtype"].as_str()),
                (Some(entry.codec().id), Some(entry.info().dtype().name()))
            );
            assert_eq!(told["shape"], serde_json::json!(entry.info().shape()));
            assert_eq!(told.get("transposed").is_some(), entry.transposed());
        }
        fs::remove_dir_all(&dir).unwrap();
    }
}

#[test]
fn a_plan_of_a_directory_is_exact_to_the_byte() {
    let folder = Folder::new();
    for (name, model) in [("zoo", zoo_model(&folder, "zoo")), ("sample", PathBuf::from(SAMPLE))] {
        for shard in [MAX_SHARD_BYTES, 3000] {
            let dir = folder.path(&format!("{name}{shard}"));
            let planned = plan_as(&open_source(&model), Some(&dir), &recipe("int4_g8_v1"), shard).unwrap();
            assert!(!dir.exists());
            let done = pack_as(&model, &dir, &recipe("int4_g8_v1"), shard).unwrap();
            let on_disk: BTreeMap<_, _> =
                contents(&dir).into_iter().map(|(name, b)| (dir.join(name), b.len() as u64)).collect();
            assert_eq!(planned.files.iter().cloned().collect::<BTreeMap<_, _>>(), on_disk);
            assert_eq!((planned.file_bytes, planned.weight_bytes), (done.file_bytes, done.weight_bytes));
            assert_eq!(done.file_bytes, on_disk.values().sum::<u64>());
            let artifact = ArtifactFile::open(&dir).unwrap();
            assert_eq!((artifact.bytes(), artifact.weight_bytes()), (done.file_bytes, done.weight_bytes));
            let how = to(To::Hf, shard);
            let again = folder.path("again");
            let planned = export::plan(&artifact, &again, &how).unwrap();
            assert_eq!(planned.files, convert(&artifact, &again, &how, &mut |_| Ok(())).unwrap().files);
            fs::remove_dir_all(again).unwrap();
        }
    }
}

#[test]
fn a_tensor_that_changes_its_codec_on_the_way_is_stored_as_in_one_file() {
    let folder = Folder::new();
    let mut tensors: Vec<_> = (0..4).map(|i| Tensor::random(&format!("{i}.weight"), DType::F32, &[8, 64], i)).collect();
    let huge: Vec<f32> = tensors[1].weights().iter().map(|w| w * 1e9).collect();
    tensors[1] = Tensor::of("1.weight", DType::F32, &[8, 64], &huge);
    let input = folder.checkpoint("m.safetensors", &tensors);
    for (id, expected) in [("int4_g8_fp16_v1", "int4_g8_v1"), ("int4_g32_fp16_v1", codecs::RAW)] {
        let options = Options { force: true, ..with(codec(id)) };
        for shard in [MAX_SHARD_BYTES, 700] {
            pack(&input, &folder.path("m.tenpak"), &options).unwrap();
            let report = pack_as(&input, &folder.path("dir"), &options, shard).unwrap();
            assert_eq!(report.tensors[1].codec.id, expected);
            assert_eq!(report.notes.len(), 1, "a source without config.json: {:?}", report.notes);
            let forced = Conversion { force: true, ..to(To::Tenpak, 0) };
            export(&folder.path("dir"), &folder.path("back.tenpak"), &forced).unwrap();
            assert!(fs::read(folder.path("m.tenpak")).unwrap() == fs::read(folder.path("back.tenpak")).unwrap());
        }
    }
}

#[test]
fn a_directory_is_an_artifact_to_every_reader() {
    let folder = Folder::new();
    let input = zoo_model(&folder, "zoo");
    let options = with(codec("int4_g8_v1"));
    let path = |name: &str| folder.path(name);
    pack(&input, &path("m.tenpak"), &options).unwrap();
    pack_as(&input, &path("dir"), &options, 2000).unwrap();
    let base = ArtifactFile::open(path("dir")).unwrap();
    assert_eq!(*base.read_file("config.json").unwrap(), *b"{\"model_type\": \"gpt2\"}");
    export::decompress(&base, &path("back.npz"), &export::Options::default(), &mut |_| Ok(())).unwrap();
    export::decompress(&base, &path("back"), &export::Options::default(), &mut |_| Ok(())).unwrap();
    assert_eq!(fs::read(path("back/config.json")).unwrap(), b"{\"model_type\": \"gpt2\"}");
    let force = export::Options { force: true, ..export::Options::default() };
    let over = export::decompress(&base, &path("dir"), &force, &mut |_| Ok(()));
    assert!(refusal(over, "invalid").contains("holds a compressed model"));

    let mut variant = zoo();
    variant[0] = Tensor::random("model.embed.weight", DType::F16, &[40, 64], 77);
    fs::create_dir(path("variant")).unwrap();
    for file in ["config.json", "vocab.json"] {
        fs::copy(input.join(file), path("variant").join(file)).unwrap();
    }
    let variant = folder.checkpoint("variant/model.safetensors", &variant);
    let variant = variant.parent().unwrap();
    pack(variant, &path("direct.tenpak"), &options).unwrap();
    let made =
        delta::delta(&base, &open_source(variant), 0.0, None, &path("d.tenpak"), false, &mut |_| Ok(())).unwrap();
    assert_eq!(made.changed.len(), 1);
    let chain = [ArtifactFile::open(path("d.tenpak")).unwrap()];
    delta::materialize(&base, &chain, &path("made.tenpak"), false, &mut |_| Ok(())).unwrap();
    assert!(fs::read(path("made.tenpak")).unwrap() == fs::read(path("direct.tenpak")).unwrap());
    let of_delta = convert(&chain[0], &path("x"), &to(To::Hf, 0), &mut |_| Ok(()));
    assert!(refusal(of_delta, "invalid").contains("materialize"));
}

#[test]
fn a_directory_without_its_header_is_read_through_its_config() {
    let folder = Folder::new();
    let input = zoo_model(&folder, "zoo");
    pack_as(&input, &folder.path("dir"), &with(codec("int4_zp_g32_fp16_v1")), 2000).unwrap();
    let described = ArtifactFile::open(folder.path("dir")).unwrap();
    let name = |a: &ArtifactFile, i: usize| a.tensors()[i].info().name().to_owned();
    let all = |a: &ArtifactFile| -> BTreeMap<String, Vec<u32>> {
        (0..a.tensors().len()).map(|i| (name(a, i), bits(&decode(a, i).unwrap()))).collect()
    };
    let expected = all(&described);
    fs::remove_file(folder.path("dir/tenpak.json")).unwrap();
    let found = ArtifactFile::open(folder.path("dir")).unwrap();
    assert_eq!(all(&found), expected);
    assert_eq!(verify::verify(&found, |_| Ok(())).unwrap().problems, []);
    assert_eq!(*found.read_file("config.json").unwrap(), *b"{\"model_type\": \"gpt2\"}");
    let variant =
        delta::delta(&found, &open_source(&input), 0.0, None, &folder.path("d.tenpak"), false, &mut |_| Ok(()));
    assert!(refusal(variant, "invalid").contains("does not say which recipe made it"));
    let (file, dir) = (folder.path("m.tenpak"), folder.path("again"));
    convert(&found, &file, &to(To::Tenpak, 0), &mut |_| Ok(())).unwrap();
    assert_eq!(all(&ArtifactFile::open(&file).unwrap()), expected);
    convert(&found, &dir, &to(To::Hf, MAX_SHARD_BYTES), &mut |_| Ok(())).unwrap();
    assert_eq!(ArtifactFile::open(&dir).unwrap().header(), ArtifactFile::open(&file).unwrap().header());

    let config = fs::read_to_string(folder.path("dir/config.json")).unwrap();
    for (from, with, kind, says) in [
        ("\"format\": 1", "\"format\": 2", "unsupported", "format 2 of quantization_config"),
        ("\"tenpak\"", "\"gptq\"", "invalid", "run tenpak compress"),
        ("int4_zp_g32_fp16_v1", "int4_zp_g64_fp16_v1", "corrupt", "expected F16 of"),
        ("int4_zp_g32_fp16_v1", "int3_v9", "unsupported", "unknown codec"),
        ("\"BF16\"", "\"I32\"", "invalid", "takes floats only"),
        ("[3, 70]", "[4, 70]", "corrupt", "expected U8 of [4, "),
        ("[3, 70]", "[1099511627776, 1048576]", "corrupt", "expected U8 of [1099511627776, "),
        ("[3, 70]", "[1099511627776, 4294967296]", "invalid", "larger than 2^63"),
        ("[3, 70]", "[1, 1, 1, 1, 1, 1, 1, 1, 1]", "limit", "dimensions of a tensor"),
        ("\"weight\": {", "\"\\u001b[2J\": {", "invalid", "control character"),
        ("\"BF16\"", "\"\\u001b\"", "unsupported", "unknown dtype"),
        ("\"weight\": {", "\"other.weight\": {", "corrupt", "tensor 'other.codes' is missing"),
    ] {
        assert!(config.contains(from), "{from} is not in {config}");
        folder.write("dir/config.json", config.replacen(from, with, 1));
        let message = refusal(ArtifactFile::open(folder.path("dir")), kind);
        assert!(message.contains(says), "{from}: {message}");
    }
}

#[test]
fn damage_in_a_shard_is_found_and_told_with_the_name_of_the_shard() {
    let folder = Folder::new();
    pack_as(&zoo_model(&folder, "zoo"), &folder.path("dir"), &with(codec("int4_g8_v1")), 2000).unwrap();
    let shard = folder.path("dir/model-00001-of-00003.safetensors");
    let sound = fs::read(&shard).unwrap_or_else(|e| panic!("{e}: {:?}", contents(&folder.path("dir")).keys()));
    let data = 8 + usize::try_from(u64::from_le_bytes(sound[..8].try_into().unwrap())).unwrap();
    for at in (data..sound.len()).step_by(97) {
        let mut bytes = sound.clone();
        bytes[at] ^= 4;
        fs::write(&shard, bytes).unwrap();
        let artifact = ArtifactFile::open(folder.path("dir")).unwrap();
        let problems = verify::verify(&artifact, |_| Ok(())).unwrap().problems;
        assert_eq!(problems.len(), 1, "byte {at}");
        assert_eq!(problems[0].file.as_deref(), Some("model-00001-of-00003.safetensors"));
        assert!(problems[0].at <= at as u64 && problems[0].at >= data as u64, "{problems:?}");
        let index = artifact.find(problems[0].tensor.as_deref().unwrap()).unwrap();
        assert!(refusal(decode(&artifact, index), "corrupt").contains("model-00001"));
    }
}

#[test]
fn a_file_that_is_missing_cut_off_or_changed_is_refused_or_reported() {
    let folder = Folder::new();
    let dir = folder.path("dir");
    pack_as(&zoo_model(&folder, "zoo"), &dir, &with(codec("int4_g8_v1")), 2000).unwrap();
    let sound = contents(&dir);
    for (name, bytes) in &sound {
        if name == "README.md" {
            continue;
        }
        let path = dir.join(name);
        fs::remove_file(&path).unwrap();
        let gone = ArtifactFile::open(&dir);
        match &**name {
            // Without it the directory is read in another way.
            "tenpak.json" => drop(gone.unwrap()),
            _ => assert!(
                refusal(gone, if name.starts_with("model") { "invalid" } else { "corrupt" })
                    .contains(name.split('-').next().unwrap()),
                "{name}"
            ),
        }
        for len in [0, bytes.len() / 2, bytes.len() - 1] {
            fs::write(&path, &bytes[..len]).unwrap();
            let Ok(artifact) = ArtifactFile::open(&dir) else { continue };
            let problems = verify::verify(&artifact, |_| Ok(())).unwrap().problems;
            assert_eq!(problems.len(), 1, "{name} cut off at {len}");
            assert_eq!(problems[0].file.as_deref(), Some(&**name));
            let message =
                refusal(convert(&artifact, &folder.path("x.tenpak"), &to(To::Tenpak, 0), &mut |_| Ok(())), "corrupt");
            assert!(message.contains("was changed or damaged"), "{message}");
        }
        fs::write(&path, bytes).unwrap();
    }
    // A text that no checksum of a plane covers.
    let header = String::from_utf8(sound["tenpak.json"].clone()).unwrap();
    fs::write(dir.join("tenpak.json"), header.replacen("tenpak 0", "tenpak 1", 1)).unwrap();
    assert!(refusal(ArtifactFile::open(&dir), "corrupt").contains("the shards say"));
    fs::write(dir.join("tenpak.json"), header.replacen("\"tool\"", " \"tool\"", 1)).unwrap();
    assert!(refusal(ArtifactFile::open(&dir), "corrupt").contains("canonical"));
    assert_eq!(folder.names(), ["dir", "zoo"]);
}

#[test]
fn names_that_collide_are_refused_before_anything_is_written() {
    let folder = Folder::new();
    let matrix = |name: &str| Tensor::random(name, DType::F32, &[4, 64], 1);
    let raw = |name: &str| Tensor::random(name, DType::U8, &[4], 1);
    let long = format!("{}.weight", "n".repeat(1017));
    for (tensors, says) in [
        (vec![matrix("a.weight"), raw("a.codes")], "would both be stored as 'a.codes'"),
        (vec![matrix("a.weight"), matrix("a")], "tensors 'a.weight' and 'a' would both be stored as 'a.codes'"),
        (vec![matrix("a"), matrix("a.codes.weight"), raw("a.codes.codes"), raw("a.codes")], "would both be stored"),
        (vec![matrix(&long[..1020])], "bytes of a tensor name is 1026"),
    ] {
        let input = folder.checkpoint("m.safetensors", &tensors);
        let refused = pack_as(&input, &folder.path("dir"), &with(codec("int4_g8_v1")), 1 << 30).unwrap_err();
        assert!(refused.to_string().contains(says), "{refused}");
        let planned = plan_as(&open_source(&input), Some(&folder.path("dir")), &with(codec("int4_g8_v1")), 1 << 30);
        assert!(planned.is_err());
        pack(&input, &folder.path("m.tenpak"), &Options { force: true, ..with(codec("int4_g8_v1")) }).unwrap();
        assert!(export(&folder.path("m.tenpak"), &folder.path("dir"), &to(To::Hf, 1 << 30)).is_err());
        assert_eq!(folder.names(), ["m.safetensors", "m.tenpak"]);
    }
}

#[test]
fn what_is_not_compressed_and_what_already_is_are_refused_with_the_remedy() {
    let folder = Folder::new();
    let message = refusal(ArtifactFile::open(SAMPLE), "invalid");
    assert!(message.contains("is not compressed") && message.contains("run tenpak compress"), "{message}");
    fs::create_dir(folder.path("empty")).unwrap();
    assert!(refusal(ArtifactFile::open(folder.path("empty")), "invalid").contains("is not compressed"));
    let input = zoo_model(&folder, "zoo");
    pack_as(&input, &folder.path("dir"), &with(codec("int4_g8_v1")), 1 << 30).unwrap();
    let open = |name: &str| source::open(&folder.path(name), &source::Options::default());
    for _ in 0..2 {
        for name in ["dir", "dir/model.safetensors"] {
            let message = refusal(open(name), "unsupported");
            assert!(message.contains("tenpak directory") && message.contains("tenpak decompress"), "{message}");
        }
        drop(fs::remove_file(folder.path("dir/tenpak.json")));
    }
}

#[test]
fn a_config_that_says_that_the_source_was_quantized_comes_back_as_it_was() {
    let folder = Folder::new();
    let config = "{\"a\": 1, \"quantization_config\": {\"quant_method\": \"fp8\"},\n \"z\": 2}\n";
    let input = zoo_model(&folder, "zoo");
    folder.write("zoo/config.json", config);
    pack_as(&input, &folder.path("dir"), &with(codec("int4_g8_v1")), 1 << 30).unwrap();
    let written: serde_json::Value =
        serde_json::from_slice(&fs::read(folder.path("dir/config.json")).unwrap()).unwrap();
    assert_eq!(written["quantization_config"]["quant_method"], "tenpak");
    assert_eq!(written["source_quantization_config"]["quant_method"], "fp8");
    let artifact = ArtifactFile::open(folder.path("dir")).unwrap();
    assert_eq!(*artifact.read_file("config.json").unwrap(), *config.as_bytes());
}

#[test]
fn a_directory_appears_whole_or_not_at_all_and_only_its_like_is_replaced() {
    let folder = Folder::new();
    let input = zoo_model(&folder, "zoo");
    let dir = folder.path("dir");
    let options = with(codec("int4_g8_v1"));
    let force = Options { force: true, ..options.clone() };
    pack_as(&input, &dir, &options, 2000).unwrap();
    let before = contents(&dir);
    assert!(refusal(pack_as(&input, &dir, &options, 2000), "invalid").contains("exists"));

    let mut steps = 0;
    let source = open_source(&input);
    compress_as(&source, &folder.path("counted"), &options, 2000, &mut |_| {
        steps += 1;
        Ok(())
    })
    .unwrap();
    fs::remove_dir_all(folder.path("counted")).unwrap();
    for stop in 0..steps {
        let mut step = 0;
        let stopped = compress_as(&source, &dir, &force, 2000, &mut |_| {
            step += 1;
            if step > stop { Err(tenpak::Error::Interrupted) } else { Ok(()) }
        });
        refusal(
            stopped.map_err(|e| {
                if matches!(e, tenpak::Error::Interrupted) { tenpak::Error::invalid("stopped") } else { e }
            }),
            "invalid",
        );
        assert!(contents(&dir) == before, "stopped at step {stop}");
        assert_eq!(folder.names(), ["dir", "zoo"]);
    }
    pack_as(&input, &dir, &force, 1 << 30).unwrap();
    assert!(dir.join("model.safetensors").exists() && !dir.join("model.safetensors.index.json").exists());
    assert_eq!(folder.names(), ["dir", "zoo"]);

    folder.write("home/letter.txt", "dear");
    let message = refusal(pack_as(&input, &folder.path("home"), &force, 1), "invalid");
    assert!(message.contains("has files but no tenpak.json"), "{message}");
    let onto_source = refusal(pack_as(&input, &input, &force, 1), "invalid");
    assert!(onto_source.contains("holds the input"), "{onto_source}");
    let onto_itself = convert(
        &ArtifactFile::open(&dir).unwrap(),
        &dir,
        &Conversion { force: true, ..to(To::Hf, 1) },
        &mut |_| Ok(()),
    );
    assert!(refusal(onto_itself, "invalid").contains("holds the input"));
    folder.write("file", "a file");
    assert!(refusal(pack_as(&input, &folder.path("file"), &force, 1), "invalid").contains("is not a directory"));
    fs::create_dir(folder.path("empty")).unwrap();
    pack_as(&input, &folder.path("empty"), &force, 1 << 30).unwrap();
    assert!(refusal(pack_as(&input, &folder.path("no/such/dir"), &force, 1), "io").contains("no/such"));
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&dir), mode(&input), "both were made under one umask");
        assert_eq!(mode(&dir.join("tenpak.json")), mode(&input.join("model.safetensors")));
        std::os::unix::fs::symlink("empty", folder.path("link")).unwrap();
        pack_as(&input, &folder.path("link"), &force, 2000).unwrap();
        assert!(fs::symlink_metadata(folder.path("link")).unwrap().is_symlink());
        assert!(folder.path("empty/model.safetensors.index.json").exists());
    }
}

#[test]
fn the_card_says_what_was_done_and_how_to_load_it() {
    let folder = Folder::new();
    pack_as(Path::new(SAMPLE), &folder.path("dir"), &recipe("int4_g32_fp16_v1"), 1 << 30).unwrap();
    let card = fs::read_to_string(folder.path("dir/README.md")).unwrap();
    let artifact = ArtifactFile::open(folder.path("dir")).unwrap();
    for line in [
        "base_model: \"tiny-books\"",
        "base_model_relation: quantized",
        "library_name: transformers",
        "| codec | tensors | weights | bytes | bits/weight | x vs FP32 | x vs F16 |",
        "| int4_g32_fp16_v1 | 28 | 786432 | 491520 | 5.000 | 6.40 | 3.20 |",
        "import tenpak",
        "codec = \"int4_g32_fp16_v1\"",
        &artifact.header().identity().to_string(),
    ] {
        assert!(card.contains(line), "{line} is not in\n{card}");
    }
    let input = zoo_model(&folder, "zoo");
    for (name, expected) in [("org/model", "org/model"), ("/home/me/secret/model/", "model"), ("", "zoo")] {
        folder.write("zoo/config.json", format!("{{\"_name_or_path\": \"{name}\"}}"));
        let force = Options { force: true, ..with(codec("int4_g8_v1")) };
        pack_as(&input, &folder.path("named"), &force, 1 << 30).unwrap();
        let card = fs::read_to_string(folder.path("named/README.md")).unwrap();
        assert!(card.contains(&format!("base_model: \"{expected}\"\n")), "{card}");
    }
}
