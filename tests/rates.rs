//! Any size that is asked for: what `ecu_v1` promises of sizes, and that planes on disk and in memory are the same.

mod support;

use std::fs;

use support::{Folder, Tensor, bits, codec, decode, open_source, pack, with};
use tenpak::artifact::{ArtifactFile, Coding, delta, verify};
use tenpak::codecs;
use tenpak::compress::{Nonfinite, Options, compress_as, frontier, plan};
use tenpak::export::{self, Conversion, To};
use tenpak::fit::{MaxLoss, Rate};
use tenpak::measure::Distance;
use tenpak::recipe::{MORE_BITS, Recipe, Request, Role};
use tenpak::{DType, Encoded};

const SHAPE: [u64; 2] = [160, 192];

/// Matrices of a model, one of them not a multiple of four wide, one transposed in spirit, and an embedding.
fn model() -> Vec<Tensor> {
    vec![
        Tensor::random("model.embed_tokens.weight", DType::F32, &[300, 64], 1),
        Tensor::random("model.layers.0.self_attn.q_proj.weight", DType::F32, &SHAPE, 2),
        Tensor::random("model.layers.0.mlp.up_proj.weight", DType::BF16, &[200, 183], 3),
        Tensor::random("model.layers.0.mlp.down_proj.weight", DType::F16, &[192, 160], 4),
        Tensor::random("model.norm.weight", DType::F32, &[192], 5),
    ]
}

fn at(rate: &str) -> Options {
    let recipe = Recipe::new(codec("ecu_v1")).target_bits(rate.parse().unwrap());
    Options::new(recipe, Nonfinite::Error, true)
}

#[test]
fn every_rate_is_met_from_below_and_more_bits_are_less_error() {
    let folder = Folder::new();
    let input = folder.checkpoint("model.safetensors", &model());
    let mut before = f64::INFINITY;
    for rate in ["2.5", "3", "3.77", "4.25", "5", "6"] {
        let report = pack(&input, &folder.path("a.tenpak"), &at(rate)).unwrap();
        let (mut noise, mut coded) = (0.0, 0);
        for t in report.tensors.iter().filter(|t| t.codec.id == "ecu_v1") {
            let asked = t.rate.unwrap().bytes(t.elements());
            assert!(t.stored_bytes <= asked, "{}: {} bytes at {rate} bits, asked for {asked}", t.name, t.stored_bytes);
            noise += t.distance.unwrap().noise;
            coded += 1;
        }
        assert_eq!(coded, 4, "{rate}");
        assert!(noise < before, "{rate} bits: {noise:e} of error, with fewer bits {before:e}");
        before = noise;
    }
}

#[test]
fn a_size_of_the_whole_output_is_not_exceeded_as_a_file_or_as_a_directory() {
    let folder = Folder::new();
    let input = folder.checkpoint("model.safetensors", &model());
    let whole = pack(&input, &folder.path("a.tenpak"), &at("6")).unwrap().file_bytes;
    for share in [6, 7, 8, 9] {
        let options = Options { target_bytes: Some(whole * share / 10), ..at("4") };
        for name in ["b.tenpak", "b-directory"] {
            let target = folder.path(name);
            let report = compress_as(&open_source(&input), &target, &options, u64::MAX, &mut |_| Ok(())).unwrap();
            assert!(report.file_bytes <= whole * share / 10, "{name}: {} of {whole}", report.file_bytes);
            let rates: Vec<_> = report.tensors.iter().filter_map(|t| t.rate).collect();
            assert!(rates.len() == 4 && rates[1..].iter().all(|rate| *rate == rates[1]), "{rates:?}");
            assert_eq!(rates[0], rates[1].plus(MORE_BITS), "the embedding has more");
        }
    }
    let none = Options { target_bytes: Some(1000), ..at("4") };
    let message = plan(&open_source(&input), &none).unwrap_err().to_string();
    assert!(message.contains("1000 bytes are asked for, but at 0.1 bits"), "{message}");
    let other = Options { target_bytes: Some(whole), ..with(codec("int8_sym_v1")) };
    let message = plan(&open_source(&input), &other).unwrap_err().to_string();
    assert!(message.contains("no tensor has a codec whose size is open"), "{message}");
}

#[test]
fn without_a_codec_linear_weights_get_four_and_a_half_bits() {
    let recipe = Request::default().recipe().unwrap();
    assert_eq!(recipe, at("4.5").recipe);
    let other = Request { codec: Some("int8_sym_v1"), ..Request::default() }.recipe().unwrap();
    assert_eq!(other, Recipe::new(codec("int8_sym_v1")));
}

/// Noise and signal of the tensors whose rate is open, as decoded weights have it.
fn measured(artifact: &ArtifactFile, tensors: &[Tensor]) -> (f64, f64) {
    let mut sums = (0.0, 0.0);
    for (index, entry) in artifact.tensors().iter().enumerate().filter(|(_, entry)| entry.rate().is_some()) {
        let source = tensors.iter().find(|t| t.name == entry.info().name()).unwrap().weights();
        for (w, d) in source.iter().zip(decode(artifact, index).unwrap()) {
            let (w, d) = (f64::from(*w), f64::from(d));
            sums = (sums.0 + (w - d) * (w - d), sums.1 + w * w);
        }
    }
    sums
}

fn losing(nmse: f64) -> Options {
    let recipe = Recipe::new(codec("ecu_v1")).max_loss(MaxLoss::new(nmse).unwrap());
    Options::new(recipe, Nonfinite::Error, true)
}

/// The model with matrices of different power, so that they want different rates.
fn uneven() -> Vec<Tensor> {
    let mut tensors = model();
    let name = tensors[2].name.clone();
    let weights: Vec<f32> = tensors[2].weights().iter().map(|w| w / 32.0).collect();
    tensors[2] = Tensor::of(&name, DType::F32, &[200, 183], &weights);
    tensors
}

#[test]
fn a_loss_that_is_asked_for_is_kept_and_nearly_used() {
    let folder = Folder::new();
    for tensors in [model(), uneven()] {
        let input = folder.checkpoint("model.safetensors", &tensors);
        for nmse in [3e-2, 2e-3, 4e-4] {
            let output = folder.path("a.tenpak");
            let report = pack(&input, &output, &losing(nmse)).unwrap();
            let artifact = ArtifactFile::open(&output).unwrap();
            let (noise, signal) = measured(&artifact, &tensors);
            assert!(noise <= nmse * signal, "{:e} is lost, at most {nmse:e} was asked for", noise / signal);
            assert!(noise >= 0.97 * nmse * signal, "{:e} is lost, {nmse:e} would do", noise / signal);
            // Within the model, a file of the same codecs at one rate is no smaller where it loses no more.
            let bits = report.tensors.iter().filter_map(|t| t.rate).map(Rate::bits).fold(0.0, f64::max);
            let even = pack(&input, &folder.path("b.tenpak"), &at(&format!("{bits:.3}"))).unwrap();
            assert!(
                report.file_bytes <= even.file_bytes,
                "{} bytes, at one rate {}",
                report.file_bytes,
                even.file_bytes
            );
            assert!(artifact.header().provenance().recipe.contains(&format!("max_loss = {nmse:e}\n")));
            assert!(report.tensors.iter().all(|t| t.distance.is_none_or(|d| d.nmse() <= nmse || t.rate.is_some())));
        }
    }
}

#[test]
fn a_loss_that_8_bit_codes_cannot_keep_is_refused_and_nothing_is_written() {
    let folder = Folder::new();
    let input = folder.checkpoint("model.safetensors", &model());
    let output = folder.path("a.tenpak");
    let int8 = losing(1e-9).recipe.role(Role::Embedding, codec("int8_sym_v1")).unwrap();
    let message = pack(&input, &output, &Options { recipe: int8, ..losing(1e-9) }).unwrap_err().to_string();
    assert!(message.contains("loses") && message.contains("at most 1e-9 is asked for; keep it raw"), "{message}");
    let raw = losing(1e-9).recipe.role(Role::Embedding, codec("raw_v1")).unwrap();
    let message = pack(&input, &output, &Options { recipe: raw, ..losing(1e-9) }).unwrap_err().to_string();
    assert!(message.contains("at most 1e-9 is asked for, but 8-bit codes lose"), "{message}");
    assert!(message.contains("keep 'model.layers.0."), "{message}");
    let none = Recipe::new(codec("int8_sym_v1")).max_loss(MaxLoss::new(0.5).unwrap());
    let message = pack(&input, &output, &Options { recipe: none, ..losing(0.5) }).unwrap_err().to_string();
    assert!(message.contains("no tensor has a codec whose size is open"), "{message}");
    assert!(!output.exists());
}

#[test]
fn a_variant_of_a_base_with_a_loss_shares_what_has_not_changed() {
    let folder = Folder::new();
    let input = folder.checkpoint("model.safetensors", &uneven());
    let [base, made] = ["base.tenpak", "v.delta"].map(|name| folder.path(name));
    pack(&input, &base, &losing(1e-3)).unwrap();
    let opened = ArtifactFile::open(&base).unwrap();
    let report = delta::delta(&opened, &open_source(&input), 0.0, None, &made, false, &mut |_| Ok(())).unwrap();
    assert_eq!((report.changed.len(), report.unchanged), (0, 5));
}

#[test]
fn a_plan_foretells_what_compress_writes() {
    let folder = Folder::new();
    let input = folder.checkpoint("model.safetensors", &uneven());
    let rates: Vec<Rate> = ["2.5", "3.3", "4.5", "6"].map(|rate| rate.parse().unwrap()).into();
    let planned = frontier(&open_source(&input), &at("3.3"), &rates, Ok, &mut |_| Ok(())).unwrap();
    assert_eq!(planned.points.len(), rates.len() + codecs::all().len() - 2);
    assert!(planned.tensors.len() == 3 && planned.tensors.iter().all(|t| t.rate == rates[1]));
    for point in &planned.points {
        let options = match point.rate {
            Some(rate) => at(&rate.to_string()),
            None => Options::new(Recipe::new(point.codec), Nonfinite::Error, true),
        };
        let report = pack(&input, &folder.path("a.tenpak"), &options).unwrap();
        let mut sums = Distance::default();
        report.tensors.iter().filter(|t| t.name.contains("_proj")).for_each(|t| sums.merge(&t.distance.unwrap()));
        let what = format!("{} at {:?}", point.codec.id, point.rate);
        let (size, loss) = (point.file_bytes as f64 / report.file_bytes as f64, point.nmse / sums.nmse());
        // Streams reach a rate from below, and the search for one ends within half a percent of these small matrices.
        assert!((1.0..1.01).contains(&size), "{what}: {size} of the size");
        if point.rate.is_none() {
            assert!(size == 1.0, "{what}");
        }
        assert!((0.93..1.07).contains(&loss), "{what}: {loss} of the loss");
    }
}

#[test]
fn a_coded_plane_reads_as_if_it_were_stored_as_it_is() {
    let folder = Folder::new();
    let tensors = model();
    let input = folder.checkpoint("model.safetensors", &tensors);
    let output = folder.path("a.tenpak");
    let report = pack(&input, &output, &at("4.25")).unwrap();
    let artifact = ArtifactFile::open(&output).unwrap();
    assert_eq!(verify::verify(&artifact, |_| Ok(())).unwrap().problems, []);
    for (index, entry) in artifact.tensors().iter().enumerate().filter(|(_, entry)| entry.is_coded()) {
        let (rows, cols) = entry.matrix();
        let [rows, cols] = [rows, cols].map(|n| usize::try_from(n).unwrap());
        let planes: Vec<Vec<u8>> = (0..2).map(|plane| artifact.plane(index, plane).unwrap().to_vec()).collect();
        for (plane, place) in planes.iter().zip(entry.planes()) {
            assert_eq!(*blake3::hash(plane).as_bytes(), place.blake3.0, "{}", entry.info().name());
            assert!(place.bytes < plane.len() as u64);
        }
        assert_eq!(entry.memory_bytes(), planes.iter().map(|plane| plane.len() as u64).sum::<u64>());
        assert_eq!(entry.memory_bytes(), report.tensors[index].memory_bytes);
        let encoded = Encoded::from_planes(entry.codec(), rows, cols, planes).unwrap();
        let all = decode(&artifact, index).unwrap();
        assert_eq!(bits(&all), bits(&encoded.decode()));
        // Rows from the middle of blocks.
        let mut part = vec![0.0; 7 * cols];
        artifact.decode_rows(index, 61, &mut part).unwrap();
        assert_eq!(bits(&part), bits(&all[61 * cols..68 * cols]));
    }
}

/// An artifact that has been a directory and come back byte for byte, then read from that directory without its header.
fn by_its_config(folder: &Folder, artifact: &ArtifactFile, max_shard_bytes: u64) -> ArtifactFile {
    let [directory, back, bare] = ["form", "back.tenpak", "bare.tenpak"].map(|name| folder.path(name));
    let to = |to| Conversion { to, force: true, max_shard_bytes, allow_requantize: false };
    export::convert(artifact, &directory, &to(To::Hf), &mut |_| Ok(())).unwrap();
    let form = ArtifactFile::open(&directory).unwrap();
    assert_eq!(verify::verify(&form, |_| Ok(())).unwrap().problems, []);
    export::convert(&form, &back, &to(To::Tenpak), &mut |_| Ok(())).unwrap();
    assert!(fs::read(artifact.path()).unwrap() == fs::read(&back).unwrap());

    // Without the header, the config alone says which planes are coded, and digests are computed.
    fs::remove_file(directory.join("tenpak.json")).unwrap();
    let form = ArtifactFile::open(&directory).unwrap();
    export::convert(&form, &bare, &to(To::Tenpak), &mut |_| Ok(())).unwrap();
    ArtifactFile::open(&bare).unwrap()
}

#[test]
fn what_an_artifact_is_does_not_depend_on_how_its_planes_are_coded() {
    let folder = Folder::new();
    let input = folder.checkpoint("model.safetensors", &model());
    let file = folder.path("a.tenpak");
    pack(&input, &file, &at("3.5")).unwrap();
    let artifact = ArtifactFile::open(&file).unwrap();
    let bare = by_its_config(&folder, &artifact, 40_000);
    for (index, entry) in bare.tensors().iter().enumerate() {
        let same = artifact.find(entry.info().name()).unwrap();
        assert!(entry.same_content(&artifact.tensors()[same]), "{}", entry.info().name());
        assert_eq!(bits(&decode(&bare, index).unwrap()), bits(&decode(&artifact, same).unwrap()));
    }
}

/// Matrices of which much lies beyond the codes at 8 bits: Gaussian, of heavy tails, transposed in spirit, and of odd width.
fn wide() -> Vec<Tensor> {
    let mut tensors = vec![
        Tensor::random("model.layers.0.self_attn.q_proj.weight", DType::F32, &[512, 512], 2),
        Tensor::random("model.layers.0.mlp.up_proj.weight", DType::F32, &[300, 183], 3),
    ];
    let name = "model.layers.0.mlp.down_proj.weight";
    let heavy: Vec<f32> = tensors[1].weights().iter().map(|w| w + 400.0 * w * w * w).collect();
    tensors.push(Tensor::of(name, DType::F32, &[300, 183], &heavy));
    tensors
}

#[test]
fn what_lies_beyond_the_codes_is_coded_too_and_read_in_any_part() {
    let folder = Folder::new();
    let tensors = wide();
    let input = folder.checkpoint("model.safetensors", &tensors);
    let file = folder.path("a.tenpak");
    let report = pack(&input, &file, &at("8")).unwrap();
    let artifact = ArtifactFile::open(&file).unwrap();
    assert_eq!(verify::verify(&artifact, |_| Ok(())).unwrap().problems, []);
    for (index, (entry, t)) in artifact.tensors().iter().zip(&report.tensors).enumerate() {
        let codings: Vec<_> = entry.planes().iter().map(|place| place.coding.map_or("-", Coding::id)).collect();
        assert_eq!(codings, ["rows_v2", "scales_v1", "counts_v1", "columns_v1", "tails_v1"], "{}", t.name);
        assert!(t.stored_bytes <= t.rate.unwrap().bytes(t.elements()), "{}: {} bytes", t.name, t.stored_bytes);
        let all = decode(&artifact, index).unwrap();
        let source = tensors.iter().find(|tensor| tensor.name == t.name).unwrap().weights();
        let error: f64 = source.iter().zip(&all).map(|(w, d)| (f64::from(*w) - f64::from(*d)).powi(2)).sum();
        let distance = t.distance.unwrap();
        assert!((error - distance.noise).abs() <= 1e-9 * error, "{}: {error:e}, told {:e}", t.name, distance.noise);
        // What an entropy-coded uniform quantizer loses in theory is 2.17e-5 for a Gaussian; small matrices pay for contexts.
        let most = if t.name.contains("q_proj") { 2.3e-5 } else { 2.6e-5 };
        assert!(distance.nmse() <= most, "{}: {:e}", t.name, distance.nmse());
        let cols = usize::try_from(entry.matrix().1).unwrap();
        let mut part = vec![0.0; 7 * cols];
        artifact.decode_rows(index, 201, &mut part).unwrap();
        assert_eq!(bits(&part), bits(&all[201 * cols..208 * cols]));
    }
    let bare = by_its_config(&folder, &artifact, 400_000);
    assert!(bare.tensors().iter().all(|entry| {
        let same = artifact.find(entry.info().name()).unwrap();
        entry.same_content(&artifact.tensors()[same])
    }));
}

#[test]
fn any_byte_of_coded_outliers_changed_is_found_or_gives_numbers() {
    // Checksums made right, as by someone who means harm: streams say what they say, and none of it is a panic.
    let folder = Folder::new();
    let input = folder.checkpoint("model.safetensors", &[Tensor::random("a.q_proj.weight", DType::F32, &[96, 128], 7)]);
    let [file, directory] = ["a.tenpak", "a"].map(|name| folder.path(name));
    pack(&input, &file, &at("8")).unwrap();
    let artifact = ArtifactFile::open(&file).unwrap();
    let to = Conversion { to: To::Hf, force: true, max_shard_bytes: u64::MAX, allow_requantize: false };
    export::convert(&artifact, &directory, &to, &mut |_| Ok(())).unwrap();
    fs::remove_file(directory.join("tenpak.json")).unwrap();
    let shard = directory.join("model.safetensors");
    let sound = fs::read(&shard).unwrap();
    let mut refused = 0;
    for plane in ["a.q_proj.outlier_counts", "a.q_proj.outlier_columns", "a.q_proj.outlier_values"] {
        let stream = safetensors::SafeTensors::deserialize(&sound).unwrap().tensor(plane).unwrap().data();
        let first = stream.as_ptr().addr() - sound.as_ptr().addr();
        let last = first + stream.len();
        for at in (first..last).step_by(1 + (last - first) / 24) {
            for change in [1, 0x90] {
                let mut bytes = sound.clone();
                bytes[at] ^= change;
                fs::write(&shard, &bytes).unwrap();
                // Without a header nothing but the streams themselves can be wrong.
                match ArtifactFile::open(&directory).and_then(|form| decode(&form, 0)) {
                    Ok(weights) => assert!(weights.iter().all(|w| w.is_finite())),
                    Err(e) => {
                        assert!(matches!(e.root(), tenpak::Error::Corrupt { .. }), "{e}");
                        refused += 1;
                    }
                }
            }
        }
    }
    assert!(refused > 0);
}

#[test]
fn a_variant_is_compressed_at_the_rates_of_its_base() {
    let folder = Folder::new();
    let input = folder.checkpoint("model.safetensors", &model());
    let [base, made, result] = ["base.tenpak", "v.delta", "result.tenpak"].map(|name| folder.path(name));
    let whole = pack(&input, &base, &at("5")).unwrap().file_bytes;
    // A rate that a size gave, which no recipe of the variant could know.
    pack(&input, &base, &Options { target_bytes: Some(whole * 9 / 10), ..at("5") }).unwrap();
    let opened = ArtifactFile::open(&base).unwrap();
    let mut variant = model();
    variant[2] = Tensor::random(&variant[2].name, DType::BF16, &[200, 183], 33);
    let variant = folder.checkpoint("variant.safetensors", &variant);
    let report = delta::delta(&opened, &open_source(&variant), 0.0, None, &made, false, &mut |_| Ok(())).unwrap();
    assert_eq!((report.changed.len(), report.unchanged), (1, 4));
    let chain = [ArtifactFile::open(&made).unwrap()];
    delta::materialize(&opened, &chain, &result, false, &mut |_| Ok(())).unwrap();
    let result = ArtifactFile::open(&result).unwrap();
    assert_eq!(verify::verify(&result, |_| Ok(())).unwrap().problems, []);
    assert_eq!(result.tensors()[2].rate(), opened.tensors()[2].rate());
    assert_eq!(result.header().identity(), report.result);
}

#[test]
fn a_matrix_too_small_for_its_rate_is_stored_otherwise_and_says_so() {
    let folder = Folder::new();
    let input = folder.checkpoint(
        "model.safetensors",
        &[Tensor::random("model.layers.0.self_attn.q_proj.weight", DType::F32, &[8, 8], 1)],
    );
    let options = Options { recipe: at("3").recipe.all(true), ..at("3") };
    let report = pack(&input, &folder.path("a.tenpak"), &options).unwrap();
    assert_eq!((report.tensors[0].codec.id, report.tensors[0].changed_codec), ("int8_sym_v1", true));
    assert!(report.tensors[0].reason.contains("no step gives 3 bits"), "{}", report.tensors[0].reason);
}

#[test]
fn recipes_say_rates_and_refuse_those_that_decide_nothing() {
    let text = "codec = \"ecu_v1\"\ntarget_bits = 4\n\n[[rule]]\nmatch = \"*.down_proj.*\"\ncodec = \"ecu_v1\"\ntarget_bits = 5.5\n";
    let recipe = Recipe::from_toml(text).unwrap();
    let rate = |name: &str| recipe.choose(&tenpak::TensorInfo::new(name, DType::F32, vec![64, 64]).unwrap(), 64).rate;
    assert_eq!(rate("a.q_proj.weight"), Some("4".parse().unwrap()));
    assert_eq!(rate("a.down_proj.weight"), Some("5.5".parse().unwrap()));
    assert_eq!(rate("model.embed_tokens.weight"), Some("5".parse().unwrap()));
    assert_eq!(Recipe::from_toml(&recipe.to_toml()).unwrap(), recipe);
    assert!(recipe.to_toml().contains("target_bits = 4\n"), "{}", recipe.to_toml());
    let bounded = Recipe::from_toml("codec = \"ecu_v1\"\nmax_loss = 2.5e-4\n").unwrap();
    assert_eq!((Recipe::from_toml(&bounded.to_toml()).unwrap(), bounded.loss().unwrap().nmse()), (bounded, 2.5e-4));
    let spelled = Recipe::new(codec("ecu_v1")).to_toml();
    assert!(spelled.contains(&format!("target_bits = {}\n", Rate::DEFAULT)), "{spelled}");
    for (text, says) in [
        ("codec = \"raw_v1\"\ntarget_bits = 4\n", "no codec of the recipe leaves its size open"),
        ("codec = \"ecu_v1\"\ntarget_bits = \"4\"\n", "of type string, expected a number of bits"),
        ("codec = \"ecu_v1\"\ntarget_bits = 9\n", "9 bits per weight, expected 0.1 to 8"),
        ("codec = \"raw_v1\"\nmax_loss = 1e-3\n", "'max_loss' has no effect: no codec of the recipe"),
        ("codec = \"ecu_v1\"\nmax_loss = 1.5\n", "a loss of 1.5, expected an nMSE above 0 and below 1"),
        ("codec = \"ecu_v1\"\nmax_loss = 1e-3\ntarget_bits = 4\n", "exclude each other"),
        (
            "codec = \"ecu_v1\"\n[[rule]]\nmatch = \"a\"\ncodec = \"int4_g8_v1\"\ntarget_bits = 4\n",
            "rule 1: target_bits",
        ),
    ] {
        let message = Recipe::from_toml(text).unwrap_err().to_string();
        assert!(message.contains(says), "{message}");
    }
}
