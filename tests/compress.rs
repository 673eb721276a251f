//! What compression promises: which codec each tensor gets, what becomes of numbers that do not fit, and that a
//! checkpoint gives the same artifact in whatever form it comes.

mod support;

use std::path::Path;

use support::{Folder, Random, Tensor, bits, codec, decode, open_source, pack, refusal, with};
use tenpak::artifact::{ArtifactFile, verify};
use tenpak::compress::{Nonfinite, Options, Report, compress};
use tenpak::file::Access;
use tenpak::layout::{Float, Levels};
use tenpak::recipe::{Recipe, Role};
use tenpak::{Codec, DType, Error, Limits, codecs, export, source};

/// The codecs that round.
fn lossy() -> impl Iterator<Item = &'static Codec> {
    codecs::all().iter().filter(|codec| codec.grouped().is_ok())
}

/// Compresses one tensor alone and opens the result.
fn one(folder: &Folder, tensor: &Tensor, options: &Options) -> tenpak::Result<(Report, ArtifactFile)> {
    let input = folder.checkpoint("one.safetensors", std::slice::from_ref(tensor));
    let output = folder.path("one.tenpak");
    let report = pack(&input, &output, &Options { force: true, ..options.clone() })?;
    Ok((report, ArtifactFile::open(output)?))
}

/// The weights after a round trip through a codec, and how the tensor was stored.
fn round_trip(codec: &'static Codec, shape: &[u64], weights: &[f32]) -> (tenpak::compress::TensorReport, Vec<f32>) {
    let folder = Folder::new();
    let (report, artifact) = one(&folder, &Tensor::of("w", DType::F32, shape, weights), &with(codec)).unwrap();
    (report.tensors[0].clone(), decode(&artifact, 0).unwrap())
}

#[test]
fn a_weight_that_is_not_finite_is_refused_by_name_first_index_and_count() {
    let folder = Folder::new();
    for dtype in DType::ALL.iter().copied().filter(|dtype| dtype.is_float()) {
        // Of the two FP8 formats one has no infinities.
        let infinity = if dtype.size() == 1 { f32::NAN } else { f32::INFINITY };
        for codec in lossy() {
            let mut weights = vec![0.5; 3 * 200];
            for (at, bad) in [(599, f32::NAN), (205, -infinity), (202, infinity)] {
                weights[at] = bad;
            }
            let tensor = Tensor::of("model.w", dtype, &[3, 200], &weights);
            let Err(Error::Nonfinite { tensor, index, count }) = one(&folder, &tensor, &with(codec)) else { panic!() };
            assert_eq!((&*tensor, index, count), ("model.w", 202, 3), "{} of {dtype}", codec.id);
            assert_eq!(folder.names(), ["one.safetensors"]);
        }
    }
}

#[test]
fn weights_that_are_not_finite_are_counted_across_blocks() {
    let folder = Folder::new();
    let (rows, cols) = (3000, 1024);
    let mut tensor = Tensor::random("w", DType::F32, &[rows, cols], 1);
    for at in [5_usize, 1_500_000, 3_071_999] {
        tensor.bytes[4 * at..4 * at + 4].copy_from_slice(&f32::INFINITY.to_le_bytes());
    }
    let message = refusal(one(&folder, &tensor, &with(codec("int8_sym_v1"))), "nonfinite");
    assert!(message.contains("3 non-finite weights, the first at index 5;"), "{message}");
}

#[test]
fn the_policies_for_weights_that_are_not_finite_do_what_their_names_say() {
    let folder = Folder::new();
    let weights = [f32::NAN, 2.0, f32::INFINITY, -3.0, f32::NEG_INFINITY, 0.5, 0.0, 1.0].repeat(16);
    let tensor = Tensor::of("w", DType::F32, &[1, 128], &weights);
    let replaced = |infinity: f32| {
        let one = |w: &f32| if w.is_nan() { 0.0 } else { w.clamp(-infinity, infinity) };
        weights.iter().map(one).collect::<Vec<f32>>()
    };
    for codec in lossy() {
        let zeroed: Vec<f32> = weights.iter().map(|w| if w.is_finite() { *w } else { 0.0 }).collect();
        for (nonfinite, expected) in [(Nonfinite::Zero, zeroed), (Nonfinite::Clamp, replaced(3.0))] {
            let repaired = Tensor::of("w", DType::F32, &[1, 128], &expected);
            let (_, expected) = one(&folder, &repaired, &with(codec)).unwrap();
            let expected = decode(&expected, 0).unwrap();
            let (report, artifact) = one(&folder, &tensor, &Options { nonfinite, ..with(codec) }).unwrap();
            assert_eq!(bits(&decode(&artifact, 0).unwrap()), bits(&expected), "{} {nonfinite:?}", codec.id);
            assert_eq!(report.tensors[0].repaired, 48);
            assert_eq!(artifact.header().provenance().nonfinite, nonfinite.name());
        }
        let options = Options { nonfinite: Nonfinite::Raw, ..with(codec) };
        let (report, artifact) = one(&folder, &tensor, &options).unwrap();
        assert_eq!(*artifact.plane(0, 0).unwrap(), *tensor.bytes);
        assert_eq!((report.tensors[0].codec.id, report.tensors[0].repaired), (codecs::RAW, 0));
        assert!(report.tensors[0].reason.contains("weight 0 is not finite"), "{}", report.tensors[0].reason);
    }
}

#[test]
fn a_tensor_that_is_kept_raw_may_hold_anything() {
    let folder = Folder::new();
    let tensor = Tensor::noise("w", DType::F32, &[8, 64], 9);
    let (_, artifact) = one(&folder, &tensor, &with(codec(codecs::RAW))).unwrap();
    assert_eq!(*artifact.plane(0, 0).unwrap(), *tensor.bytes);
}

#[test]
fn scales_that_leave_their_type_give_the_wider_twin_and_nothing_becomes_infinite_or_vanishes() {
    for codec in lossy() {
        let group = codec.grouped().unwrap();
        for magnitude in [1e9_f32, 1e-9] {
            let weights: Vec<f32> = (0..256).map(|i: u16| magnitude * (f32::from(i % 13) - 5.0)).collect();
            let (report, decoded) = round_trip(codec, &[1, 256], &weights);
            let expected = if group.scale() == Float::F16 { codecs::wider(codec) } else { codec };
            assert_eq!(report.codec.id, expected.id, "{} at {magnitude:e}", codec.id);
            if expected != codec {
                let says = format!("{} instead of {}: a scale or offset leaves", expected.id, codec.id);
                assert!(report.reason.contains(&says), "{}", report.reason);
            }
            for (w, d) in weights.iter().zip(&decoded) {
                assert!((w - d).abs() <= 2.0 * magnitude, "{}: {w} became {d}", codec.id);
            }
            assert!(decoded.iter().any(|d| *d != 0.0), "{} lost its weights", codec.id);
        }
    }
}

#[test]
fn a_group_of_one_repeated_weight_decodes_exactly() {
    // Numbers of F16, so that every codec can store them; one of each size and sign in groups of its own. Levels of banks
    // are few products of integers, and one of them is nearest.
    for codec in lossy().filter(|codec| codec.grouped().unwrap().bank().is_none()) {
        for value in [1.0, -1.0, 0.5, -0.09375, 1024.0, -65504.0, 6.103_515_6e-5] {
            let (report, decoded) = round_trip(codec, &[2, 300], &[value; 600]);
            assert_eq!(bits(&decoded), bits(&[value; 600]), "{} of {value}", codec.id);
            assert_eq!(report.distance.map(|d| d.noise), Some(0.0));
        }
    }
}

#[test]
fn zeros_of_either_sign_decode_to_zero_beside_any_neighbours() {
    for codec in lossy() {
        let (_, decoded) = round_trip(codec, &[2, 260], &[0.0; 520]);
        assert!(decoded.iter().all(|d| *d == 0.0), "{}", codec.id);
        let (_, decoded) = round_trip(codec, &[2, 260], &[-0.0; 520]);
        assert!(decoded.iter().all(|d| *d == 0.0), "{}", codec.id);
        // Whether a zero is negative never changes a byte of the artifact.
        let folder = Folder::new();
        let planes = |zero: f32| {
            let weights: Vec<f32> = (0..260_u16).map(|i| if i % 3 == 0 { zero } else { f32::from(i) - 99.0 }).collect();
            let (_, artifact) = one(&folder, &Tensor::of("w", DType::F32, &[2, 130], &weights), &with(codec)).unwrap();
            artifact.header().identity()
        };
        assert_eq!(planes(0.0), planes(-0.0), "{}", codec.id);
    }
}

#[test]
fn a_ragged_last_group_is_fitted_to_its_own_weights() {
    let mut random = Random(4);
    // Scales of banks are multiples of the row's.
    let of_groups = |codec: &&Codec| codec.grouped().is_ok_and(|g| g.group() > 0 && g.bank().is_none());
    for codec in lossy().filter(|codec| of_groups(codec)) {
        let layout = codec.grouped().unwrap();
        let cols = layout.group() + 3;
        let mut weights: Vec<f32> = (0..cols).map(|_| random.weight() * 1000.0).collect();
        weights[layout.group()..].copy_from_slice(&[0.01, 0.02, 0.025]);
        let (_, decoded) = round_trip(codec, &[1, cols as u64], &weights);
        // A step of the group's own range, and the rounding of its scale.
        let step = if matches!(layout.levels(), Levels::Table(_)) { 0.16 } else { 1.0 / 7.0 } * 0.025 * 1.01;
        for (w, d) in weights.iter().zip(&decoded).skip(layout.group()) {
            assert!((w - d).abs() <= step, "{}: {w} became {d}", codec.id);
        }
    }
}

#[test]
fn a_recipe_is_respected_and_kept_in_the_artifact() {
    let folder = Folder::new();
    let names =
        ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"];
    let mut tensors: Vec<_> = names.iter().map(|name| Tensor::random(name, DType::BF16, &[32, 64], 1)).collect();
    tensors.push(Tensor::random("model.norm.weight", DType::BF16, &[64], 2));
    let input = folder.checkpoint("model.safetensors", &tensors);
    let output = folder.path("model.tenpak");
    let recipe = Recipe::new(codec("int4_g8_v1"))
        .rule("*.up_proj.weight", codec("nf4_g64_fp16_v1"))
        .unwrap()
        .role(Role::Attention, codec("int4_zp_g32_fp16_v1"))
        .unwrap();
    let options = Options::new(recipe.clone(), Nonfinite::Error, false);
    let report = pack(&input, &output, &options).unwrap();
    let artifact = ArtifactFile::open(&output).unwrap();
    for (tensor, report) in tensors.iter().zip(&report.tensors) {
        let info = tenpak::TensorInfo::new(&*tensor.name, tensor.dtype, tensor.shape.clone()).unwrap();
        let choice = recipe.choose(&info, 64);
        assert_eq!((report.codec, &report.reason), (choice.codec, &choice.reason.to_string()));
        assert_eq!(artifact.tensors()[artifact.find(&tensor.name).unwrap()].codec(), choice.codec);
    }
    assert_eq!(Recipe::from_toml(&artifact.header().provenance().recipe).unwrap(), recipe);
}

/// A directory of a GPT-2 with one block.
fn gpt2(folder: &Folder) -> (std::path::PathBuf, Vec<Tensor>) {
    let tensors = vec![
        Tensor::random("h.0.attn.c_attn.weight", DType::F32, &[40, 120], 1),
        Tensor::random("h.0.attn.c_attn.bias", DType::F32, &[120], 2),
        Tensor::random("h.0.mlp.c_fc.weight", DType::F16, &[40, 160], 3),
        Tensor::random("wte.weight", DType::F32, &[50, 40], 4),
    ];
    folder.write("gpt2/config.json", r#"{"model_type": "gpt2"}"#);
    folder.checkpoint("gpt2/model.safetensors", &tensors);
    (folder.path("gpt2"), tensors)
}

fn transpose(weights: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..cols).flat_map(|c| (0..rows).map(move |r| weights[r * cols + c])).collect()
}

#[test]
fn the_linears_of_a_gpt2_are_stored_as_their_transpose_and_come_back_turned() {
    let folder = Folder::new();
    let (input, tensors) = gpt2(&folder);
    for codec in lossy() {
        let output = folder.path(codec.id);
        pack(&input, &output, &with(codec)).unwrap();
        let artifact = ArtifactFile::open(&output).unwrap();
        let back = folder.path(&format!("{}.safetensors", codec.id));
        export::decompress(&artifact, &back, &export::Options::default(), &mut |_| Ok(())).unwrap();
        let back = open_source(&back);
        for (index, tensor) in tensors.iter().enumerate() {
            let entry = &artifact.tensors()[index];
            let (rows, cols) = tensor.matrix();
            let conv1d = tensor.name.contains(".c_") && tensor.shape.len() == 2;
            assert_eq!(entry.transposed(), conv1d, "{}", tensor.name);
            let decoded = decode(&artifact, index).unwrap();
            let turned = if conv1d {
                let matrix = transpose(&tensor.weights(), rows, cols);
                let turned = Tensor::of("w", tensor.dtype, &[cols as u64, rows as u64], &matrix);
                let expected = decode(&one(&folder, &turned, &with(codec)).unwrap().1, 0).unwrap();
                assert_eq!(bits(&decoded), bits(&expected), "{} of {}", codec.id, tensor.name);
                transpose(&decoded, cols, rows)
            } else {
                decoded
            };
            let at = back.tensors().iter().position(|t| t.info().name() == tensor.name).unwrap();
            assert_eq!(back.tensors()[at].info().shape(), tensor.shape);
            let found = back.read_bytes(at, 0, back.tensors()[at].info().bytes()).unwrap();
            let expected = Tensor::of(&tensor.name, tensor.dtype, &tensor.shape, &turned);
            assert!(*found == *expected.bytes, "{} of {}", codec.id, tensor.name);
        }
    }
}

#[test]
fn a_transposed_weight_that_is_not_finite_is_named_by_its_place_in_the_checkpoint() {
    let folder = Folder::new();
    let (input, mut tensors) = gpt2(&folder);
    // In the matrix, column 7 of the tensor comes before column 90.
    for (row, column) in [(2, 90), (30, 7)] {
        let at = 4 * (row * 120 + column);
        tensors[0].bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    }
    folder.checkpoint("gpt2/model.safetensors", &tensors);
    let Err(Error::Nonfinite { tensor, index, count }) =
        pack(&input, &folder.path("out.tenpak"), &with(codec("int4_g8_v1")))
    else {
        panic!()
    };
    assert_eq!((&*tensor, index, count), ("h.0.attn.c_attn.weight", 2 * 120 + 90, 2));
}

/// Name, dtype, shape, codec and planes of every tensor, in the order of names.
fn content(path: &Path) -> Vec<String> {
    let artifact = ArtifactFile::open(path).unwrap();
    let entry = |e: &tenpak::artifact::Entry| {
        let planes: Vec<_> = e.planes().iter().map(|p| p.blake3.to_string()).collect();
        format!("{} {} {:?} {} {planes:?}", e.info().name(), e.info().dtype(), e.info().shape(), e.codec().id)
    };
    let mut all: Vec<_> = artifact.tensors().iter().map(entry).collect();
    all.sort();
    all
}

#[test]
fn shards_give_the_same_tensors_as_one_file() {
    let folder = Folder::new();
    let tensors: Vec<_> = ["a", "b", "c"].map(|name| Tensor::random(name, DType::BF16, &[32, 65], 7)).to_vec();
    let single = folder.checkpoint("single/model.safetensors", &tensors);
    folder.checkpoint("shards/model-00001-of-00002.safetensors", &tensors[..2]);
    folder.checkpoint("shards/model-00002-of-00002.safetensors", &tensors[2..]);
    folder.write(
        "shards/model.safetensors.index.json",
        r#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors",
            "c": "model-00002-of-00002.safetensors"}}"#,
    );
    let [one, many] = ["one.tenpak", "many.tenpak"].map(|name| folder.path(name));
    pack(&single, &one, &with(codec("int4_g16_v1"))).unwrap();
    pack(&folder.path("shards"), &many, &with(codec("int4_g16_v1"))).unwrap();
    assert_eq!(content(&one), content(&many));
    assert_eq!(ArtifactFile::open(many).unwrap().header().provenance().sources.len(), 2);
}

#[test]
fn a_json_bundle_gives_what_the_same_safetensors_give_and_its_statistics_change_nothing() {
    let folder = Folder::new();
    let weights: Vec<f32> = (0..64_u16).map(|i| f32::from(i) / 8.0 - 3.0).collect();
    let tensor = Tensor::of("w", DType::F32, &[4, 16], &weights);
    let single = folder.checkpoint("model.safetensors", std::slice::from_ref(&tensor));
    let bundle = |stats: &str| format!(r#"{{"tensors":[{{"name":"w","shape":[4,16],"data":{weights:?}}}]{stats}}}"#);
    let plain = folder.write("plain.json", bundle(""));
    let stats = folder.write("stats.json", bundle(&format!(r#","activation_stats":{{"w":{:?}}}"#, vec![0.5; 16])));
    assert_eq!(open_source(&stats).activation_stats()["w"], [0.5; 16]);
    let mut contents = [single, plain, stats].map(|input| {
        let output = input.with_extension("tenpak");
        pack(&input, &output, &Options { force: true, ..with(codec("int4_g8_fp16_v1")) }).unwrap();
        content(&output)
    });
    assert!(contents.iter().all(|c| c.len() == 1));
    contents.rotate_left(1);
    assert!(contents[0] == contents[1] && contents[1] == contents[2]);
}

#[test]
fn an_error_of_the_callback_stops_the_work_and_leaves_nothing() {
    let folder = Folder::new();
    let tensors: Vec<_> = ["a", "b", "c"].map(|name| Tensor::random(name, DType::F32, &[16, 16], 7)).to_vec();
    let input = folder.checkpoint("model.safetensors", &tensors);
    for stop in 0..3 {
        let mut calls = 0;
        let result = compress(&open_source(&input), &folder.path("out.tenpak"), &with(codec("int4_g8_v1")), &mut |p| {
            assert!(p.done <= p.total && p.tensor == tensors[calls].name);
            calls += 1;
            if calls > stop { Err(Error::Interrupted) } else { Ok(()) }
        });
        assert_eq!(support::kind(&result.unwrap_err()), "interrupted");
        assert_eq!(folder.names(), ["model.safetensors"]);
    }
}

#[test]
fn the_digest_of_each_source_is_that_of_its_file_however_it_was_read() {
    let folder = Folder::new();
    let (gpt2, tensors) = gpt2(&folder);
    let single = folder.checkpoint("single.safetensors", &tensors);
    let bundle = folder.write("bundle.json", r#"{"tensors":[{"name":"w","shape":[2],"data":[1,2]}]}"#);
    for (input, file) in [(&gpt2, &gpt2.join("model.safetensors")), (&single, &single), (&bundle, &bundle)] {
        let bytes = std::fs::read(file).unwrap();
        for access in [Access::Map, Access::Read] {
            // In the codec, and raw; tensors that are read twice because they do not fit their codec.
            for codec in codecs::all() {
                let source = source::open(input, &source::Options { access, limits: Limits::DEFAULT }).unwrap();
                let output = folder.path("out.tenpak");
                compress(&source, &output, &Options { force: true, ..with(codec) }, &mut |_| Ok(())).unwrap();
                let artifact = ArtifactFile::open(&output).unwrap();
                let [recorded] = &*artifact.header().provenance().sources else { panic!() };
                assert_eq!(recorded.blake3.0, *blake3::hash(&bytes).as_bytes(), "{} with {access:?}", codec.id);
                assert_eq!(recorded.bytes, bytes.len() as u64);
                assert_eq!(*recorded.name, *file.file_name().unwrap().to_str().unwrap());
            }
        }
    }
}

#[test]
fn coded_planes_are_the_same_artifact_in_fewer_bytes() {
    let folder = Folder::new();
    let input = folder.checkpoint("in.safetensors", &[Tensor::random("w", DType::F32, &[300, 1020], 3)]);
    for codec in lossy() {
        let (plain, coded) = (folder.path("plain.tenpak"), folder.path("coded.tenpak"));
        let options = Options { force: true, ..with(codec) };
        let before = pack(&input, &plain, &options).unwrap();
        let after = pack(&input, &coded, &Options { coded: true, ..options }).unwrap();
        assert_eq!(before.identity, after.identity, "{}", codec.id);
        assert!(after.tensors[0].stored_bytes <= before.tensors[0].stored_bytes, "{}", codec.id);
        assert_eq!(after.tensors[0].memory_bytes, before.tensors[0].memory_bytes);
        let (a, b) = (ArtifactFile::open(&plain).unwrap(), ArtifactFile::open(&coded).unwrap());
        assert!(verify::verify(&b, |_| Ok(())).unwrap().problems.is_empty(), "{}", codec.id);
        assert_eq!(bits(&decode(&a, 0).unwrap()), bits(&decode(&b, 0).unwrap()), "{}", codec.id);
        let stored = b.tensors()[0].planes().iter().map(|plane| plane.bytes).sum::<u64>();
        assert_eq!(stored, after.tensors[0].stored_bytes);
        // Codes of uniform weights between the least and the greatest of their group are nearly equally likely.
        if codec.id == "int4_sym_g128_fp16_v1" {
            assert!(b.tensors()[0].planes().iter().any(|plane| plane.coding.is_some()));
        }
    }
}
