//! What reading the checkpoints of other quantizers promises: codes and scales come in as they are, or not at all.

#[path = "support/gguf.rs"]
mod gguf;
mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use support::{Folder, Tensor, bits, codec, decode, open_source, refusal};
use tenpak::artifact::ArtifactFile;
use tenpak::compress::{self, Nonfinite, Options, Quantized, Report, compress};
use tenpak::export::{self, Conversion, MAX_SHARD_BYTES, To, convert, exporting};
use tenpak::file::Access;
use tenpak::recipe::{Recipe, Role};
use tenpak::{DType, Limits, codecs, difference, source, to_f32};

const SAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-books");

/// Formats, codecs that they hold, and the codecs that come back, where these are others.
const HELD: &[(To, &str, &str)] = &[
    (To::CompressedTensors, "int4_sym_g32_fp16_v1", ""),
    (To::CompressedTensors, "int4_sym_g128_fp16_v1", ""),
    (To::CompressedTensors, "int4_zp_g64_fp16_v1", ""),
    (To::CompressedTensors, "int8_sym_g32_fp16_v1", ""),
    (To::CompressedTensors, "int8_sym_v1", ""),
    (To::Gptq, "int4_sym_g64_fp16_v1", ""),
    (To::Gptq, "int4_zp_g128_fp16_v1", ""),
    (To::Gptq, "int8_sym_g128_fp16_v1", ""),
    (To::Awq, "int4_zp_g32_fp16_v1", ""),
    (To::Awq, "int4_sym_g128_fp16_v1", "int4_zp_g128_fp16_v1"),
    (To::Mlx, "int4_g32_fp16_v1", ""),
    (To::Mlx, "int4_g128_fp16_v1", ""),
    (To::Mlx, "int4_sym_g64_fp16_v1", ""),
    (To::Mlx, "int4_zp_g32_fp16_v1", ""),
    (To::Mlx, "int8_sym_g32_fp16_v1", ""),
    (To::Gguf, "int4_sym_g32_fp16_v1", ""),
    (To::Gguf, "int4_sym_g128_fp16_v1", "int4_sym_g32_fp16_v1"),
    (To::Gguf, "int4_g32_fp16_v1", ""),
    (To::Gguf, "int4_g128_fp16_v1", "int4_g32_fp16_v1"),
    (To::Gguf, "int8_sym_g32_fp16_v1", ""),
];

fn conversion(to: To, allow_requantize: bool) -> Conversion {
    Conversion { to, force: true, max_shard_bytes: MAX_SHARD_BYTES, allow_requantize }
}

/// The sample with linear weights in a codec, for an engine.
fn exported(folder: &Folder, id: &str, to: To) -> (ArtifactFile, PathBuf) {
    let path = folder.path(&format!("{id}.tenpak"));
    let recipe = Recipe::new(codec(id)).role(Role::Embedding, codec(codecs::RAW)).unwrap();
    compress(&open_source(Path::new(SAMPLE)), &path, &Options::new(recipe, Nonfinite::Error, true), &mut |_| Ok(()))
        .unwrap();
    let (artifact, out) = (ArtifactFile::open(&path).unwrap(), folder.path(&format!("{id}.{}", to.name())));
    convert(&artifact, &out, &conversion(to, false), &mut |_| Ok(())).unwrap();
    (artifact, out)
}

/// Name, dtype, shape and bytes of every tensor of a file, whose order in it is no promise.
fn tensors(path: &Path) -> BTreeMap<String, (String, Vec<u8>)> {
    let bytes = fs::read(path).unwrap();
    let data = 8 + usize::try_from(u64::from_le_bytes(*bytes.first_chunk().unwrap())).unwrap();
    let header: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&bytes[8..data]).unwrap();
    let own = |(name, value): (String, serde_json::Value)| {
        let [from, until] = [0, 1].map(|i| usize::try_from(value["data_offsets"][i].as_u64().unwrap()).unwrap());
        (name, (format!("{} {}", value["dtype"], value["shape"]), bytes[data + from..data + until].to_vec()))
    };
    header.into_iter().filter(|(name, _)| name != "__metadata__").map(own).collect()
}

#[track_caller]
fn assert_same_files(one: &Path, other: &Path, what: &str) {
    let (first, second) = (tensors(&one.join("model.safetensors")), tensors(&other.join("model.safetensors")));
    assert!(first.keys().eq(second.keys()), "{what}");
    for (name, tensor) in &first {
        assert!(tensor == &second[name], "{what} {name}");
    }
    assert!(fs::read(one.join("config.json")).unwrap() == fs::read(other.join("config.json")).unwrap(), "{what}");
}

/// What a checkpoint becomes without a wish.
fn imported(input: &Path, output: &Path) -> tenpak::Result<Report> {
    let source = open_source(input);
    let options = Options::new(Recipe::new(codec(codecs::DEFAULT)), Nonfinite::Error, true);
    let options = options.for_quantized(&source, Quantized::Keep)?;
    let planned = compress::plan(&source, &options)?;
    let written = compress(&source, output, &options, &mut |_| Ok(()))?;
    // What scales alone can tell, a plan cannot.
    if planned.tensors.iter().zip(&written.tensors).all(|(plan, made)| plan.codec == made.codec) {
        assert_eq!(planned.file_bytes, written.file_bytes);
    }
    Ok(written)
}

#[test]
fn codes_and_scales_come_back_as_they_went() {
    for &(to, id, back) in HELD {
        let folder = Folder::new();
        let (first, dir) = exported(&folder, id, to);
        let report = imported(&dir, &folder.path("back.tenpak")).unwrap();
        let second = ArtifactFile::open(folder.path("back.tenpak")).unwrap();
        let expected = if back.is_empty() { id } else { back };
        let mut taken = 0;
        for (i, entry) in first.tensors().iter().enumerate() {
            let j = second.header().find(entry.info().name()).expect("every name comes back");
            let other = &second.tensors()[j];
            assert_eq!(entry.info().shape(), other.info().shape());
            let told = report.tensors.iter().find(|t| t.name == entry.info().name()).unwrap();
            if entry.codec().id == codecs::RAW {
                let same = bits(&decode(&first, i).unwrap()) == bits(&decode(&second, j).unwrap());
                assert!(told.imported.is_none() && other.codec().id == codecs::RAW && same, "{}", entry.info().name());
                continue;
            }
            assert_eq!(other.codec().id, expected, "{to:?} {id} {}", told.reason);
            assert_eq!(told.imported.map(|i| i.taken_over), Some(true));
            assert!(bits(&decode(&first, i).unwrap()) == bits(&decode(&second, j).unwrap()), "{to:?} {id}");
            for plane in (0..entry.planes().len()).filter(|_| back.is_empty()) {
                let same = *first.plane(i, plane).unwrap() == *second.plane(j, plane).unwrap();
                assert!(same, "{to:?} {id} plane {plane}");
            }
            taken += 1;
        }
        assert_eq!(taken, 28);
        // And out again, as if nothing had been between.
        if back.is_empty() && to != To::Gguf {
            let again = folder.path("again");
            convert(&second, &again, &conversion(to, false), &mut |_| Ok(())).unwrap();
            assert_same_files(&dir, &again, &format!("{to:?} {id}"));
        }
    }
}

#[test]
fn a_source_gives_the_decoded_weights_by_rows_and_by_bytes() {
    for &(to, id, _) in HELD {
        let folder = Folder::new();
        let (artifact, dir) = exported(&folder, id, to);
        let source = open_source(&dir);
        assert!(source.is_quantized());
        for (index, tensor) in source.tensors().iter().enumerate().filter(|(_, t)| t.packed().is_some()).take(9) {
            let (rows, cols) = tensor.matrix();
            let mut expected = vec![0.0; usize::try_from(rows * cols).unwrap()];
            artifact.decode_rows(artifact.find(tensor.info().name()).unwrap(), 0, &mut expected).unwrap();
            let mut found = vec![0.0; expected.len()];
            to_f32(tensor.info().dtype(), &source.read_bytes(index, 0, tensor.info().bytes()).unwrap(), &mut found);
            // Offsets cancel to a zero of the other sign.
            let same = if to == To::Mlx { expected == found } else { bits(&expected) == bits(&found) };
            assert!(same, "{to:?} {id}");
            let whole = source.read_bytes(index, 0, tensor.info().bytes()).unwrap();
            // Words of eight rows, or of four, are cut anywhere.
            for (first, count) in [(1, 1), (3, 9), (rows - 5, 5), (rows, 0)] {
                let part = source.read_rows(index, first, count).unwrap();
                let at = |row: u64| usize::try_from(row * cols * 4).unwrap();
                assert!(*part == whole[at(first)..at(first + count)], "{to:?} {id}");
            }
            let part = source.read_bytes(index, 5, 4 * cols + 7).unwrap();
            assert!(*part == whole[5..usize::try_from(4 * cols).unwrap() + 12], "{to:?} {id}");
            assert!(
                source.read_rows(index, rows, 1).is_err() && source.read_bytes(index, 0, rows * cols * 4 + 1).is_err()
            );
        }
    }
}

#[test]
fn a_quantized_checkpoint_is_quantized_again_only_where_that_is_allowed() {
    let folder = Folder::new();
    let (_, dir) = exported(&folder, "int4_sym_g64_fp16_v1", To::Gptq);
    let source = open_source(&dir);
    let wish = |id: &str, quantized| {
        let options = Options::new(Recipe::new(codec(id)), Nonfinite::Error, true);
        let options = options.for_quantized(&source, quantized)?;
        compress(&source, &folder.path("x.tenpak"), &options, &mut |_| Ok(()))
    };
    let message = refusal(wish("int4_g8_fp16_v1", Quantized::Refuse), "invalid");
    for part in ["28 of 38 tensors", "as gptq", "--allow-requantize"] {
        assert!(message.contains(part), "{message}");
    }
    let report = wish("int4_g8_fp16_v1", Quantized::Anew).unwrap();
    let anew = report.tensors.iter().filter(|t| t.imported.is_some_and(|i| !i.taken_over) && t.distance.is_some());
    assert_eq!(anew.count(), 28);
    // The codec that holds it is no second quantization.
    let report = wish("int4_sym_g64_fp16_v1", Quantized::Anew).unwrap();
    assert_eq!(report.tensors.iter().filter(|t| t.imported.is_some_and(|i| i.taken_over)).count(), 28);
}

#[test]
fn a_checkpoint_goes_from_one_engine_to_another_exactly_or_not_at_all() {
    let folder = Folder::new();
    let (artifact, dir) = exported(&folder, "int4_sym_g64_fp16_v1", To::Gptq);
    for to in [To::CompressedTensors, To::Awq, To::Mlx] {
        let (direct, across) = (folder.path("direct"), folder.path("across"));
        convert(&artifact, &direct, &conversion(to, false), &mut |_| Ok(())).unwrap();
        let how = conversion(to, false);
        let exporting = exporting(&dir, Access::Map, &across, &how, None, &mut |_| Ok(())).unwrap();
        convert(&exporting.artifact, &across, &how, &mut |_| Ok(())).unwrap();
        assert_same_files(&direct, &across, to.name());
        fs::remove_dir_all(&direct).unwrap();
        fs::remove_dir_all(&across).unwrap();
    }
    let (_, dir) = exported(&folder, "int4_zp_g64_fp16_v1", To::Awq);
    let how = conversion(To::Gguf, false);
    let out = folder.path("m.gguf");
    let through = exporting(&dir, Access::Map, &out, &how, None, &mut |_| Ok(())).unwrap();
    let message = refusal(convert(&through.artifact, &out, &how, &mut |_| Ok(())), "invalid");
    assert!(message.contains("cannot be expressed exactly as gguf"), "{message}");
    let message =
        refusal(exporting(&dir, Access::Map, &out, &how, Some(codec("int4_g32_fp16_v1")), &mut |_| Ok(())), "invalid");
    assert!(message.contains("--allow-requantize"), "{message}");
}

#[test]
fn an_import_differs_in_no_weight_and_comes_back_as_plain_weights() {
    let folder = Folder::new();
    let (_, dir) = exported(&folder, "int4_zp_g128_fp16_v1", To::Gptq);
    let output = folder.path("m.tenpak");
    imported(&dir, &output).unwrap();
    let open = |path: &Path| difference::Model::open(path, Access::Map, &Limits::DEFAULT).unwrap();
    let found = difference::compare(&open(&dir), &open(&output), &mut |_| Ok(())).unwrap();
    assert!(found.tensors.iter().all(|t| t.difference == difference::Difference::Same));
    // Whoever loads the decoded weights is not told that they are codes.
    let plain = folder.path("plain");
    let options = export::Options::default();
    export::decompress(&ArtifactFile::open(&output).unwrap(), &plain, &options, &mut |_| Ok(())).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&fs::read(plain.join("config.json")).unwrap()).unwrap();
    assert!(config.get("quantization_config").is_none() && config["model_type"].is_string());
    assert!(!open_source(&plain).is_quantized());
}

/// A tensor of the bytes of its elements.
fn stored(name: &str, dtype: DType, shape: &[u64], bytes: impl IntoIterator<Item = u8>) -> Tensor {
    Tensor { name: name.to_owned(), dtype, shape: shape.to_vec(), bytes: bytes.into_iter().collect() }
}

fn ints(name: &str, shape: &[u64], numbers: impl IntoIterator<Item = u32>) -> Tensor {
    stored(name, DType::I32, shape, numbers.into_iter().flat_map(u32::to_le_bytes))
}

const ROWS: u32 = 8;
const COLS: u32 = 64;

/// Codes and zero points that differ everywhere, and powers of two for scales.
fn code(row: u32, col: u32) -> u32 {
    (row * 5 + col * 3) % 16
}

fn zero(row: u32, group: u32) -> u32 {
    1 + (row + 3 * group) % 14
}

fn scale(row: u32, group: u32) -> f32 {
    2.0_f32.powi(i32::try_from(group).unwrap() - i32::try_from(row).unwrap())
}

/// A matrix of GPTQ of 4 bits in two groups; `order` gives the group of each column.
fn gptq(order: impl Fn(u32) -> u32) -> Vec<Tensor> {
    let word = |numbers: &dyn Fn(u32) -> u32| (0..8).fold(0, |word, i| word | numbers(i) << (4 * i));
    let codes = (0..COLS / 8).flat_map(|w| (0..ROWS).map(move |row| word(&|i| code(row, 8 * w + i))));
    let zeros = (0..2).map(|group| word(&|row| zero(row, group) - 1));
    let scales: Vec<f32> = (0..2).flat_map(|group| (0..ROWS).map(move |row| scale(row, group))).collect();
    vec![
        ints("m.qweight", &[8, 8], codes.collect::<Vec<_>>()),
        ints("m.qzeros", &[2, 1], zeros.collect::<Vec<_>>()),
        Tensor::of("m.scales", DType::F16, &[2, 8], &scales),
        ints("m.g_idx", &[64], (0..COLS).map(order)),
    ]
}

const GPTQ: &str = r#"{"quantization_config":{"quant_method":"gptq","bits":4,"group_size":32,"sym":false}}"#;

fn model(folder: &Folder, config: &str, tensors: &[Tensor]) -> PathBuf {
    folder.write("m/config.json", config);
    folder.checkpoint("m/model.safetensors", tensors);
    folder.path("m")
}

#[test]
fn columns_in_another_order_than_their_groups_are_decoded() {
    let folder = Folder::new();
    let order = |col: u32| col * 7 % 64 / 32;
    let dir = model(&folder, GPTQ, &gptq(order));
    let report = imported(&dir, &folder.path("x.tenpak")).unwrap();
    assert!(report.tensors[0].reason.contains("act order"), "{}", report.tensors[0].reason);
    let expected = |row: u32, col: u32| {
        let group = order(col);
        f32::from(i8::try_from(code(row, col)).unwrap() - i8::try_from(zero(row, group)).unwrap()) * scale(row, group)
    };
    let expected: Vec<f32> = (0..ROWS).flat_map(|row| (0..COLS).map(move |col| expected(row, col))).collect();
    assert!(decode(&ArtifactFile::open(folder.path("x.tenpak")).unwrap(), 0).unwrap() == expected);
    let in_order = imported(&model(&folder, GPTQ, &gptq(|col| col / 32)), &folder.path("x.tenpak")).unwrap();
    assert_eq!(in_order.tensors[0].codec.id, "int4_zp_g32_fp16_v1");
}

#[test]
fn parts_that_do_not_fit_are_refused_by_name() {
    let without = |name: &str| gptq(|col| col / 32).into_iter().filter(|t| t.name != name).collect::<Vec<_>>();
    let with = |tensor: Tensor| {
        let mut all = without(&tensor.name);
        all.push(tensor);
        all
    };
    let cases: Vec<(&str, Vec<Tensor>, &[&str])> = vec![
        (GPTQ, without("m.qzeros"), &["'m.qzeros' is missing", "'m.weight'", "fetch"]),
        (GPTQ, without("m.scales"), &["'m.scales' is missing"]),
        (GPTQ, with(ints("m.scales", &[2, 8], 0..16)), &["'m.scales' is I32", "expected F16 or BF16 or F32"]),
        (GPTQ, with(Tensor::of("m.scales", DType::F16, &[1, 8], &[1.0; 8])), &["'m.scales'", "[1, 8]", "[2, 8]"]),
        (GPTQ, with(Tensor::of("m.qweight", DType::F32, &[8, 8], &[1.0; 64])), &["'m.qweight'", "a matrix of I32"]),
        (
            GPTQ,
            with(ints("m.g_idx", &[64], (0..64).map(|c| c / 16))),
            &["'m.g_idx'", "column 32", "group 2", "2 groups"],
        ),
        (GPTQ, with(ints("m.g_idx", &[63], 0..63)), &["'m.g_idx'", "[63]", "[64]"]),
        (GPTQ, with(ints("m.qzeros", &[2, 5], 0..10)), &["'m.weight'", "2, 3, 4 or 8 bits"]),
        (
            r#"{"quantization_config":{"quant_method":"gptq","bits":4,"group_size":16}}"#,
            without(""),
            &["64 columns", "2 groups", "[16]"],
        ),
        (
            r#"{"quantization_config":{"quant_method":"gptq","checkpoint_format":"marlin"}}"#,
            without(""),
            &["'marlin'", "gptq_v2"],
        ),
        (
            r#"{"quantization_config":{"quant_method":"awq","version":"gemv"}}"#,
            without(""),
            &["'gemv'", "expected gemm"],
        ),
        (
            r#"{"quantization_config":{"quant_method":"awq","group_size":4}}"#,
            without("m.g_idx"),
            &["'m.qzeros'", "[2, 8]"],
        ),
        (
            r#"{"quantization":{"group_size":24,"bits":4}}"#,
            vec![
                stored("m.weight", DType::U32, &[8, 8], [0; 256]),
                Tensor::of("m.scales", DType::F16, &[8, 2], &[1.0; 16]),
            ],
            &["groups of 24", "64 columns"],
        ),
        (
            r#"{"quantization":{"group_size":32,"bits":4}}"#,
            vec![
                stored("m.weight", DType::U32, &[8, 8], [0; 256]),
                Tensor::of("m.scales", DType::F16, &[8, 2], &[1.0; 16]),
            ],
            &["'m.biases' is missing"],
        ),
        (
            r#"{"quantization_config":{"quant_method":"compressed-tensors","format":"pack-quantized","config_groups":
                {"a":{"weights":{"num_bits":4,"group_size":32,"strategy":"group"}}}}}"#,
            vec![
                ints("m.weight_packed", &[8, 8], 0..64),
                Tensor::of("m.weight_scale", DType::BF16, &[8, 2], &[1.0; 16]),
                ints("m.weight_shape", &[2], [9, 64]),
            ],
            &["m.weight_shape", "8 rows"],
        ),
        (
            r#"{"quantization_config":{"quant_method":"bitsandbytes"}}"#,
            vec![
                stored("m.weight", DType::U8, &[32, 1], [0; 32]),
                stored("m.weight.quant_state.bitsandbytes__nf4", DType::U8, &[2], *b"{]"),
            ],
            &["'m.weight'", "no JSON"],
        ),
        (
            r#"{"quantization_config":{"quant_method":"bitsandbytes"}}"#,
            vec![
                stored("m.weight", DType::U8, &[32, 1], [0; 32]),
                stored("m.weight.absmax", DType::F32, &[1], [0; 4]),
                stored(
                    "m.weight.quant_state.bitsandbytes__nf4",
                    DType::U8,
                    &[32],
                    *br#"{"shape":[8,9],"blocksize": 64 }"#,
                ),
            ],
            &["32 bytes", "U8 of 36"],
        ),
    ];
    for (config, tensors, parts) in cases {
        let folder = Folder::new();
        let dir = model(&folder, config, &tensors);
        let error = source::open(&dir, &source::Options::default())
            .err()
            .unwrap_or_else(|| panic!("{config} must be refused for {parts:?}"));
        let message = error.to_string();
        assert!(!message.contains(char::is_control) && !message.ends_with('.'), "{message}");
        for part in parts {
            assert!(message.contains(part), "'{part}' is not in: {message}");
        }
    }
}

#[test]
fn a_zero_point_that_readers_understand_differently_is_refused() {
    let folder = Folder::new();
    let mut tensors = gptq(|col| col / 32);
    tensors[1] = ints("m.qzeros", &[2, 1], [u32::MAX, 0]);
    let message = refusal(imported(&model(&folder, GPTQ, &tensors), &folder.path("x.tenpak")), "unsupported");
    assert!(
        message.contains("'m.weight'") && message.contains("stored as 15") && message.contains("gptq_v2"),
        "{message}"
    );
    let second = GPTQ.replace("\"bits\"", "\"checkpoint_format\":\"gptq_v2\",\"bits\"");
    imported(&model(&folder, &second, &tensors), &folder.path("x.tenpak")).unwrap();
}

#[test]
fn scales_that_no_codec_holds_are_found_when_they_are_read() {
    let folder = Folder::new();
    let mut tensors = gptq(|col| col / 32);
    tensors[2] = Tensor::of("m.scales", DType::F32, &[2, 8], &[0.1; 16]);
    let report = imported(&model(&folder, GPTQ, &tensors), &folder.path("x.tenpak"));
    let report = report.unwrap();
    assert_eq!(report.tensors[0].codec.id, codecs::RAW);
    assert!(report.tensors[0].reason.contains("a scale is no number of the type"), "{}", report.tensors[0].reason);
    tensors[2] = Tensor::of("m.scales", DType::F16, &[2, 8], &[f32::NAN; 16]);
    let message = refusal(imported(&model(&folder, GPTQ, &tensors), &folder.path("x.tenpak")), "nonfinite");
    assert!(message.contains("'m.weight' has 512 non-finite weights"), "{message}");
}

/// A GGUF file of these keys and tensors: name, dimensions innermost first, type, offset.
fn gguf_file(keys: &[(&str, u32, Vec<u8>)], tensors: &[(&str, &[u64], u32, u64)], data: usize) -> Vec<u8> {
    let keys: Vec<_> = keys.iter().map(|(key, kind, value)| (*key, *kind, value.as_slice())).collect();
    gguf::gguf(&keys, tensors, data)
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

#[test]
fn hostile_headers_of_gguf_are_refused_for_what_is_wrong_with_them() {
    let sound: (&str, &[u64], u32, u64) = ("a", &[32, 2], 2, 0);
    let list = |of: u32, count: u64| [&of.to_le_bytes()[..], &count.to_le_bytes()].concat();
    let deep = |levels: usize| list(9, 1).repeat(levels);
    let mut many = gguf_file(&[], &[], 0);
    many[8..16].fill(0xff);
    let mut keys = gguf_file(&[], &[], 0);
    keys[16..24].fill(0xff);
    let mut first_version = gguf_file(&[], &[], 0);
    first_version[4] = 1;
    let mut big_endian = gguf_file(&[], &[], 0);
    big_endian[4..8].copy_from_slice(&[0, 0, 0, 3]);
    let cases: Vec<(Vec<u8>, &str, &str)> = vec![
        (many, "limit", "tensors of a GGUF file"),
        (keys, "limit", "keys of a GGUF file"),
        (first_version, "unsupported", "version 1"),
        (big_endian, "unsupported", "big-endian"),
        (gguf_file(&[("k", 8, u64::MAX.to_le_bytes().to_vec())], &[], 0), "limit", "bytes of a GGUF header"),
        (gguf_file(&[("k", 8, (1_u64 << 20).to_le_bytes().to_vec())], &[], 0), "corrupt", "cut off"),
        (gguf_file(&[("k", 9, list(0, u64::MAX))], &[], 0), "limit", "bytes of a GGUF header"),
        (gguf_file(&[("k", 9, list(8, u64::MAX))], &[], 0), "limit", "bytes of a GGUF header"),
        (gguf_file(&[("k", 9, deep(9))], &[], 64), "corrupt", "deeper than 4"),
        (gguf_file(&[("k", 77, vec![])], &[], 64), "corrupt", "unknown type 77"),
        (gguf_file(&[("k", 4, vec![0; 4]), ("k", 4, vec![0; 4])], &[], 0), "corrupt", "'k' occurs twice"),
        (gguf_file(&[("general.alignment", 4, vec![24, 0, 0, 0])], &[], 0), "corrupt", "a power of two"),
        (gguf_file(&[("split.count", 2, vec![3, 0])], &[], 0), "invalid", "llama-gguf-split --merge"),
        (gguf_file(&[], &[("a", &[32, 2], 999, 0)], 36), "unsupported", "'a' has type 999"),
        (gguf_file(&[], &[("a", &[33, 2], 2, 0)], 36), "corrupt", "no whole blocks"),
        (gguf_file(&[], &[("a", &[1; 9], 0, 0)], 36), "limit", "dimensions of a tensor"),
        (gguf_file(&[], &[sound], 35), "corrupt", "ends beyond"),
        (gguf_file(&[], &[("a", &[1 << 40, 1 << 40], 0, 0)], 36), "corrupt", "ends beyond"),
        (gguf_file(&[], &[("a", &[32, 1 << 62], 2, 0)], 36), "corrupt", "ends beyond"),
        (gguf_file(&[], &[sound, ("b", &[32, 2], 2, 0)], 100), "corrupt", "overlaps"),
        (gguf_file(&[], &[sound, ("b", &[32, 2], 2, 36)], 100), "corrupt", "expected a multiple of 32"),
        (gguf_file(&[], &[sound, ("b", &[32, 2], 2, 128)], 200), "corrupt", "is not where that one ends"),
        (gguf_file(&[], &[sound, ("a", &[32, 2], 2, 64)], 100), "invalid", "occurs twice"),
        (
            gguf_file(&[("general.architecture", 8, string("llama"))], &[("blk.0.attn_q.weight", &[32, 2], 2, 0)], 36),
            "corrupt",
            "llama.attention.head_count is missing",
        ),
        (
            gguf_file(
                &[("general.architecture", 8, string("llama")), ("llama.attention.head_count", 4, vec![3, 0, 0, 0])],
                &[("blk.0.attn_q.weight", &[32, 8], 2, 0)],
                144,
            ),
            "corrupt",
            "3 heads",
        ),
    ];
    let folder = Folder::new();
    for (bytes, kind, part) in cases {
        let path = folder.write("m.gguf", &bytes);
        let message = refusal(source::open(&path, &source::Options::default()), kind);
        assert!(message.contains(part), "'{part}' is not in: {message}");
    }
}

#[test]
fn damage_anywhere_in_a_gguf_file_ends_in_a_result_or_an_error() {
    let keys = [
        ("general.architecture", 8, string("llama")),
        ("llama.attention.head_count", 4, vec![2, 0, 0, 0]),
        ("l", 9, [&8_u32.to_le_bytes()[..], &1_u64.to_le_bytes(), &string("x")].concat()),
    ];
    let tensors: [(&str, &[u64], u32, u64); 3] =
        [("blk.0.attn_q.weight", &[32, 8], 2, 0), ("blk.0.attn_q.bias", &[8], 0, 160), ("b", &[256], 12, 192)];
    let whole = gguf_file(&keys, &tensors, 192 + 144);
    let folder = Folder::new();
    damaged(&folder, &whole, &[1, 16, 128]);
    let source = open_source(&folder.write("m.gguf", &whole));
    let names: Vec<_> = source.tensors().iter().map(|t| t.info().name()).collect();
    assert_eq!(names, ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias", "b"]);
    assert!(source.notes()[0].contains("there is no token_embd.weight"), "{:?}", source.notes());
}

#[test]
fn damage_to_config_tokenizer_and_experts_of_a_gguf_file_ends_in_a_result_or_an_error() {
    let number = |n: u32| n.to_le_bytes().to_vec();
    let list = |kind: u32, elements: &[Vec<u8>]| {
        [&kind.to_le_bytes()[..], &(elements.len() as u64).to_le_bytes(), &elements.concat()].concat()
    };
    let scores = [0.0, -1.0, -2.0, -3.0].map(|score: f32| score.to_le_bytes().to_vec());
    let keys = [
        ("general.architecture", 8, string("llama")),
        ("llama.block_count", 4, number(1)),
        ("llama.context_length", 4, number(64)),
        ("llama.embedding_length", 4, number(32)),
        ("llama.feed_forward_length", 4, number(8)),
        ("llama.attention.head_count", 4, number(2)),
        ("llama.attention.layer_norm_rms_epsilon", 6, 1e-5_f32.to_le_bytes().to_vec()),
        ("llama.expert_count", 4, number(2)),
        ("llama.expert_used_count", 4, number(1)),
        ("tokenizer.ggml.model", 8, string("llama")),
        ("tokenizer.ggml.tokens", 9, list(8, &["<unk>", "a", "b", "ab"].map(string))),
        ("tokenizer.ggml.scores", 9, list(6, &scores)),
        ("tokenizer.ggml.token_type", 9, list(5, &[2, 1, 1, 1].map(number))),
        ("tokenizer.ggml.bos_token_id", 4, number(1)),
    ];
    let tensors: [(&str, &[u64], u32, u64); 2] =
        [("token_embd.weight", &[32, 4], 2, 0), ("blk.0.ffn_gate_exps.weight", &[32, 8, 2], 2, 96)];
    let whole = gguf_file(&keys, &tensors, 96 + 288);
    let folder = Folder::new();
    damaged(&folder, &whole, &[1, 128]);
    let source = open_source(&folder.write("m.gguf", &whole));
    let names: Vec<_> = source.tensors().iter().map(|t| (t.info().name(), t.info().shape().to_vec())).collect();
    let expert = |number| format!("model.layers.0.block_sparse_moe.experts.{number}.w1.weight");
    let [first, second] = [expert(0), expert(1)];
    assert_eq!(names, [("model.embed_tokens.weight", vec![4, 32]), (&*first, vec![8, 32]), (&*second, vec![8, 32])]);
    assert_eq!(source.config().unwrap()["model_type"], "mixtral");
    assert_eq!(source.config().unwrap()["rms_norm_eps"], 1e-5);
    let files: Vec<_> = source.attached().iter().map(tenpak::source::SourceFile::name).collect();
    assert_eq!(files, ["config.json", "tokenizer.json", "tokenizer_config.json"]);
    assert_eq!(source.notes(), [""; 0]);
}

/// Opens and reads a file with every byte changed by each of these, made zero, made ones, and cut off anywhere.
fn damaged(folder: &Folder, whole: &[u8], changes: &[u8]) {
    let mut opened = 0;
    let read = |bytes: &[u8]| {
        let path = folder.write("m.gguf", bytes);
        let Ok(source) = source::open(&path, &source::Options::default()) else { return 0 };
        for (index, tensor) in source.tensors().iter().enumerate() {
            if let Ok(block) = source.read_rows(index, 0, tensor.matrix().0) {
                assert_eq!(block.len() as u64, tensor.info().bytes());
            }
        }
        1
    };
    for at in 0..whole.len() {
        for &change in changes.iter().chain(&[whole[at], !whole[at]]) {
            let mut damaged = whole.to_vec();
            damaged[at] ^= change;
            opened += read(&damaged);
        }
        assert_eq!(read(&whole[..at]), 0, "cut off at {at}");
    }
    assert!(opened > 0);
}
