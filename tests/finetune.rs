//! Deltas of checkpoints: lossless ones give back every bit, quantized ones what their codec says, and nothing that is
//! wrong with base, delta or chain ends in a file.

#[path = "support/format.rs"]
mod format;
mod support;

use std::fs;
use std::path::{Path, PathBuf};

use format::File;
use support::{Folder, Random, Tensor, bits, codec, open_source, refusal};
use tenpak::artifact::delta::{DeltaReport, MAX_CHAIN, Mode, Request, checkpoint, create, restore};
use tenpak::artifact::{ArtifactFile, verify};
use tenpak::difference::Model;
use tenpak::file::Access;
use tenpak::fit::Rate;
use tenpak::{DType, Limits, codecs, from_f32, to_f32};

const SHAPE: &[u64] = &[24, 96];

fn model(dtype: DType) -> Vec<Tensor> {
    let mut all: Vec<_> =
        (0..4).map(|i| Tensor::random(&format!("layers.{i}.mlp.up_proj.weight"), dtype, SHAPE, i)).collect();
    all.push(Tensor::random("layers.0.norm.weight", dtype, &[96], 9));
    all
}

/// The model after a few steps of training: every weight moves a little, one tensor stays.
fn tuned(model: &[Tensor], by: f32, seed: u64) -> Vec<Tensor> {
    let mut random = Random(seed);
    let tune = |(i, t): (usize, &Tensor)| {
        let weights: Vec<f32> = t.weights().iter().map(|w| w + by * random.weight()).collect();
        if i == 1 { t.clone() } else { Tensor::of(&t.name, t.dtype, &t.shape, &weights) }
    };
    model.iter().enumerate().map(tune).collect()
}

/// A folder of checkpoints and deltas of them.
struct Bench(Folder);

impl Bench {
    fn new(base: &[Tensor]) -> Self {
        let bench = Self(Folder::new());
        bench.0.checkpoint("base.safetensors", base);
        bench
    }

    fn model(&self, name: &str) -> Model {
        Model::open(&self.0.path(&format!("{name}.safetensors")), Access::Read, &Limits::DEFAULT).unwrap()
    }

    fn delta(&self, base: &str, name: &str, tensors: &[Tensor], request: Request) -> tenpak::Result<DeltaReport> {
        let variant = open_source(&self.0.checkpoint(&format!("{name}.safetensors"), tensors));
        let output = self.0.path(&format!("{name}.delta"));
        create(&self.model(base), &variant, request, &output, true, &mut |_| Ok(()))
    }

    fn open(&self, name: &str) -> ArtifactFile {
        ArtifactFile::open(self.0.path(&format!("{name}.delta"))).unwrap()
    }

    fn restore(&self, base: &str, deltas: &[&str]) -> tenpak::Result<Vec<Tensor>> {
        let deltas: Vec<_> = deltas.iter().map(|name| self.open(name)).collect();
        let output = self.0.path("restored.safetensors");
        restore(&self.model(base), &deltas, &output, false, &mut |_| Ok(()))?;
        let tensors = read(&output);
        fs::remove_file(output).unwrap();
        Ok(tensors)
    }

    /// Refuses to be there: neither an output nor anything hidden.
    fn left_nothing(&self) {
        assert!(self.0.names().iter().all(|name| !name.starts_with('.') && !name.starts_with("restored")));
    }
}

/// The tensors of a checkpoint, by name.
fn read(path: &Path) -> Vec<Tensor> {
    let source = open_source(path);
    let mut all: Vec<_> = (0..)
        .zip(source.tensors())
        .map(|(i, t)| Tensor {
            name: t.info().name().to_owned(),
            dtype: t.info().dtype(),
            shape: t.info().shape().to_vec(),
            bytes: source.read_bytes(i, 0, t.info().bytes()).unwrap().to_vec(),
        })
        .collect();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

fn by_name(tensors: &[Tensor]) -> Vec<Tensor> {
    let mut all = tensors.to_vec();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

fn lossless() -> Request {
    Request { mode: Some(Mode::Lossless), ..Request::default() }
}

fn quantized(id: &str, bits: Option<f64>) -> Request {
    let target_bits = bits.map(|bits| Rate::from_bits(bits).unwrap());
    Request { codec: Some(codec(id)), target_bits, ..Request::default() }
}

#[test]
fn lossless_gives_back_every_bit_of_every_dtype_whatever_changed() {
    let mut base: Vec<_> =
        DType::ALL.iter().map(|&d| Tensor::random(&format!("{d}.weight"), d, &[33, 70], 1)).collect();
    base.push(Tensor::random("scalar", DType::F16, &[], 2));
    base.push(Tensor::random("empty", DType::F16, &[0, 7], 2));
    base.push(Tensor::random("long", DType::BF16, &[70_000, 2], 3));
    let bench = Bench::new(&base);
    let mut variants = vec![base.clone(), Vec::new()];
    // Words of any kind, NaN and infinities among them; a few of them; and every one moved a little.
    variants.push(base.iter().map(|t| Tensor::noise(&t.name, t.dtype, &t.shape, 5)).collect());
    let mut few = base.clone();
    few.iter_mut()
        .filter(|t| t.dtype != DType::Bool)
        .for_each(|t| t.bytes.iter_mut().step_by(997).for_each(|b| *b ^= 1));
    variants.push(few);
    let float = |t: &Tensor| t.dtype.is_float() && !t.bytes.is_empty();
    variants.push(tuned(&base.iter().filter(|t| float(t)).cloned().collect::<Vec<_>>(), 0.01, 4));
    let mut other = base.clone();
    other[2].shape.reverse();
    other[3] = Tensor::random("new", DType::BF16, SHAPE, 8);
    other[0] = Tensor::of(&base[0].name, DType::F32, &base[0].shape, &base[0].weights());
    variants.push(other);
    for (i, variant) in variants.iter().enumerate() {
        let report = bench.delta("base", "variant", variant, lossless()).unwrap();
        assert_eq!(report.changed.len() + report.unchanged, variant.len());
        assert_eq!(verify::verify(&bench.open("variant"), |_| Ok(())).unwrap().problems, []);
        assert!(bench.restore("base", &["variant"]).unwrap() == by_name(variant), "variant {i}");
        assert!(report.distance.is_none() && report.alone.is_none(), "nothing is lost");
    }
}

#[test]
fn a_light_fine_tune_is_less_than_half_and_what_stayed_costs_nothing() {
    for dtype in [DType::BF16, DType::F16] {
        let base = vec![Tensor::random("w", dtype, &[512, 256], 1), Tensor::random("z", dtype, &[512, 256], 2)];
        let bench = Bench::new(&base);
        // A thousandth of the weights' spread, as a few hundred steps move them.
        let by = if dtype == DType::BF16 { 0.002 } else { 0.0005 };
        let mut variant = tuned(&base, by, 3);
        let report = bench.delta("base", "variant", &variant, lossless()).unwrap();
        assert_eq!(report.unchanged, 1);
        let changed = base[0].bytes.len() as u64;
        assert!(2 * report.file_bytes < changed, "{} bytes of {changed}", report.file_bytes);
        assert!(report.alone_bytes > 3 * report.file_bytes, "{} bytes alone", report.alone_bytes);
        // One word in 10,000 moved.
        variant = base.clone();
        variant[0].bytes.iter_mut().step_by(20_000).for_each(|b| *b ^= 1);
        let sparse = bench.delta("base", "variant", &variant, lossless()).unwrap();
        let empty = bench.delta("base", "same", &base, lossless()).unwrap();
        assert!(sparse.file_bytes < empty.file_bytes + 1200, "{} and {}", sparse.file_bytes, empty.file_bytes);
        assert!(bench.restore("base", &["variant"]).unwrap() == by_name(&variant));
    }
}

/// `round(base + difference)` of a delta's tensor, as the format says.
fn sum(base: &Tensor, delta: &ArtifactFile, index: usize) -> Vec<u8> {
    let mut sum = support::decode(delta, index).unwrap();
    let mut old = vec![0.0; sum.len()];
    to_f32(base.dtype, &base.bytes, &mut old);
    sum.iter_mut().zip(old).for_each(|(d, old)| *d += old);
    let mut bytes = vec![0; base.bytes.len()];
    from_f32(base.dtype, &sum, &mut bytes).unwrap();
    bytes
}

#[test]
fn quantized_differences_of_every_codec_come_back_as_they_were_measured() {
    for codec in codecs::all().iter().filter(|codec| codec.id != codecs::RAW) {
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let base = model(dtype);
            let variant = tuned(&base, 0.05, 6);
            let bench = Bench::new(&base);
            let report = bench.delta("base", "variant", &variant, quantized(codec.id, None)).unwrap();
            assert_eq!((report.mode, report.changed.len(), report.unchanged), (Mode::Quantized, 4, 1), "{}", codec.id);
            let delta = bench.open("variant");
            assert_eq!(verify::verify(&delta, |_| Ok(())).unwrap().problems, []);
            let restored = bench.restore("base", &["variant"]).unwrap();
            let (old, new) = (by_name(&base), by_name(&variant));
            let (mut noise, mut power) = (0.0, 0.0);
            for (i, t) in restored.iter().enumerate() {
                let own = delta.header().find(&t.name);
                match own.filter(|&own| delta.tensors()[own].is_difference()) {
                    Some(own) => assert!(t.bytes == sum(&old[i], &delta, own), "{} {}", codec.id, t.name),
                    None => assert!(t.bytes == new[i].bytes, "{} is lossless", t.name),
                }
                for (a, b) in t.weights().iter().zip(new[i].weights()) {
                    noise += (f64::from(*a) - f64::from(b)).powi(2);
                    power += f64::from(b).powi(2);
                }
            }
            let (own, alone) = (report.distance.unwrap(), report.alone.unwrap());
            assert!((own.nmse() - noise / power).abs() <= 1e-12 + 1e-9 * own.nmse(), "{} {noise}", codec.id);
            // Rounding to the dtype is no error of the codec's: it is that of a weight that had been trained to the sum.
            let rounding = if dtype == DType::F32 { 1.0 } else { 2.0 };
            assert!(own.noise < rounding * alone.noise, "{} {dtype}: {} and {}", codec.id, own.noise, alone.noise);
        }
    }
}

#[test]
fn more_bits_lose_less_and_the_report_says_what_the_file_holds() {
    let base = model(DType::F32);
    let variant = tuned(&base, 0.05, 6);
    let bench = Bench::new(&base);
    let mut before = (0, f64::INFINITY);
    for rate in [1.5, 3.0, 5.0] {
        let report = bench.delta("base", "variant", &variant, quantized("ecu_v1", Some(rate))).unwrap();
        let now = (report.file_bytes, report.distance.unwrap().noise);
        assert!(now.0 > before.0 && now.1 < before.1, "{rate}");
        before = now;
        assert_eq!(report.file_bytes, fs::metadata(bench.0.path("variant.delta")).unwrap().len());
        assert_eq!(report.variant_bytes, variant.iter().map(|t| t.bytes.len() as u64).sum::<u64>());
        assert!(report.moved.unwrap() > report.distance.unwrap().noise, "a delta is nearer than its base");
    }
}

#[test]
fn weights_whose_difference_is_not_finite_are_lossless() {
    let base = model(DType::F32);
    let mut variant = tuned(&base, 0.05, 6);
    variant[0].bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let bench = Bench::new(&base);
    bench.delta("base", "variant", &variant, quantized("int8_sym_v1", None)).unwrap();
    let restored = bench.restore("base", &["variant"]).unwrap();
    let first = restored.iter().find(|t| t.name == variant[0].name).unwrap();
    assert!(first.bytes == variant[0].bytes);
}

#[test]
fn chains_of_both_kinds_resolve_in_order_and_only_in_order() {
    let base = model(DType::BF16);
    let bench = Bench::new(&base);
    let requests = [lossless(), quantized("ecu_v1", Some(3.0)), lossless(), quantized("int4_g32_fp16_v1", None)];
    let (mut before, mut names, mut tensors) = ("base".to_owned(), Vec::new(), base);
    for (i, request) in requests.into_iter().enumerate() {
        let name = ["one", "two", "three", "four"][i];
        let mut variant = tuned(&tensors, 0.02, 10 + i as u64);
        variant[1] = Tensor::random(&variant[1].name, DType::BF16, SHAPE, 70 + i as u64);
        bench.delta(&before, name, &variant, request).unwrap();
        let direct = bench.restore(&before, &[name]).unwrap();
        // What a quantized delta gives is what the next one is made against.
        bench.0.checkpoint(&format!("{name}.safetensors"), &direct);
        names.push(name);
        assert!(bench.restore("base", &names).unwrap() == direct, "{name}");
        (before, tensors) = (name.to_owned(), direct);
    }
    for wrong in [&["two"][..], &["one", "three"], &["two", "one"], &["one", "one"]] {
        assert!(refusal(bench.restore("base", wrong), "invalid").contains("wrong base"), "{wrong:?}");
    }
    assert!(refusal(bench.restore("one", &["one"]), "invalid").contains("wrong base"));
    assert!(refusal(bench.restore("base", &[]), "invalid").contains("no delta"));
    bench.left_nothing();
}

#[test]
fn cycles_and_endless_chains_are_refused() {
    let base = model(DType::F16);
    let bench = Bench::new(&base);
    let variant = tuned(&base, 0.05, 1);
    bench.delta("base", "there", &variant, lossless()).unwrap();
    bench.delta("there", "back", &base, lossless()).unwrap();
    assert!(refusal(bench.restore("base", &["there", "back"]), "invalid").contains("leads back"));
    bench.delta("base", "same", &base, lossless()).unwrap();
    assert!(bench.restore("base", &["same"; MAX_CHAIN]).unwrap() == by_name(&base));
    assert!(refusal(bench.restore("base", &["same"; MAX_CHAIN + 1]), "invalid").contains("a chain of 33 deltas"));
    bench.left_nothing();
}

#[test]
fn bases_deltas_and_modes_that_do_not_go_together_are_refused() {
    let base = model(DType::F16);
    let bench = Bench::new(&base);
    let variant = tuned(&base, 0.05, 1);
    bench.delta("base", "variant", &variant, lossless()).unwrap();
    let packed = bench.0.path("base.tenpak");
    support::pack(&bench.0.path("base.safetensors"), &packed, &support::with(codec("int8_sym_v1"))).unwrap();
    let artifact = Model::open(&packed, Access::Read, &Limits::DEFAULT).unwrap();
    let source = open_source(&bench.0.path("variant.safetensors"));
    let out = bench.0.path("refused.tenpak");
    let make = |base: &Model, request: Request| create(base, &source, request, &out, false, &mut |_| Ok(()));
    let (checkpoint, epsilon) = (bench.model("base"), Request { epsilon: 1.0, ..Request::default() });
    let changed = Request { mode: Some(Mode::Changed), ..Request::default() };
    for (result, says) in [
        (make(&artifact, lossless()), "is of a checkpoint"),
        (make(&artifact, quantized("int8_sym_v1", None)), "has the recipe of its base"),
        (make(&checkpoint, changed), "is of an artifact"),
        (make(&checkpoint, epsilon), "epsilon and statistics"),
        (make(&checkpoint, Request { codec: Some(codec("int8_sym_v1")), ..lossless() }), "takes neither codec"),
        (make(&checkpoint, quantized("int8_sym_v1", Some(2.0))), "has a size of its own"),
        (make(&checkpoint, quantized(codecs::RAW, None)), "raw_v1"),
    ] {
        let message = refusal(result, "invalid");
        assert!(message.contains(says), "{message}");
    }
    let give =
        |base: &Model, delta: &ArtifactFile| restore(base, std::slice::from_ref(delta), &out, false, &mut |_| Ok(()));
    assert!(refusal(give(&artifact, &bench.open("variant")), "invalid").contains("against a checkpoint"));
    create(&artifact, &source, Request::default(), &bench.0.path("changed.delta"), true, &mut |_| Ok(())).unwrap();
    assert!(refusal(give(&checkpoint, &bench.open("changed")), "invalid").contains("against an artifact"));
    let whole = ArtifactFile::open(&packed).unwrap();
    assert!(refusal(give(&checkpoint, &whole), "invalid").contains("expected a delta"));
    assert!(!out.exists());
    // Neither kind of plane is read as if it were weights.
    let delta = bench.open("variant");
    refusal(delta.plane(0, 0), "invalid");
}

#[test]
fn outputs_that_exist_or_are_inputs_are_refused_and_interruptions_leave_nothing() {
    let base = model(DType::BF16);
    let bench = Bench::new(&base);
    let variant = tuned(&base, 0.05, 1);
    bench.delta("base", "variant", &variant, quantized("ecu_v1", Some(3.0))).unwrap();
    let (old, new) =
        (open_source(&bench.0.path("base.safetensors")), open_source(&bench.0.path("variant.safetensors")));
    for path in ["base.safetensors", "variant.safetensors"].map(|name| bench.0.path(name)) {
        let before = fs::read(&path).unwrap();
        refusal(checkpoint::delta(&old, &new, None, &path, true, &mut |_| Ok(())), "invalid");
        assert!(fs::read(&path).unwrap() == before);
    }
    let delta = bench.0.path("variant.delta");
    refusal(checkpoint::delta(&old, &new, None, &delta, false, &mut |_| Ok(())), "invalid");
    let deltas = [bench.open("variant")];
    let give = |to: &Path, force| restore(&bench.model("base"), &deltas, to, force, &mut |_| Ok(()));
    for path in ["base.safetensors", "variant.delta"].map(|name| bench.0.path(name)) {
        assert!(refusal(give(&path, true), "invalid").contains("is the input"));
    }
    assert!(refusal(give(&bench.0.path("variant.safetensors"), false), "invalid").contains("exists"));
    assert!(refusal(give(&bench.0.path("restored.npz"), false), "invalid").contains(".npz"));
    let stop_at = |n: usize| {
        let mut calls = 0;
        move |_: tenpak::compress::Progress<'_>| {
            calls += 1;
            if calls > n { Err(tenpak::Error::Interrupted) } else { Ok(()) }
        }
    };
    for n in 0..12 {
        let recipe = checkpoint::recipe(None, None).unwrap();
        let out = bench.0.path("restored.delta");
        refusal(checkpoint::delta(&old, &new, Some(recipe), &out, false, &mut stop_at(n)), "interrupted");
        let out = bench.0.path("restored.safetensors");
        refusal(restore(&bench.model("base"), &deltas, &out, false, &mut stop_at(n.min(9))), "interrupted");
        bench.left_nothing();
    }
    // As a directory, as a file over another one, and as an artifact: the same tensors.
    let expected = bench.restore("base", &["variant"]).unwrap();
    let folder = bench.0.path("folder");
    assert_eq!(give(&folder, false).unwrap().tensors, 5);
    assert!(read(&folder) == expected);
    give(&bench.0.path("variant.safetensors"), true).unwrap();
    assert!(read(&bench.0.path("variant.safetensors")) == expected);
    let artifact = bench.0.path("raw.tenpak");
    let identity = give(&artifact, false).unwrap().identity;
    let artifact = ArtifactFile::open(artifact).unwrap();
    assert_eq!(artifact.header().identity(), identity);
    assert!(artifact.tensors().iter().zip(&expected).all(|(e, t)| e.info().name() == t.name));
    assert!((0..5).all(|i| bits(&support::decode(&artifact, i).unwrap()) == bits(&expected[i].weights())));
}

#[test]
fn the_order_and_the_container_of_a_base_do_not_matter_and_a_changed_bit_does() {
    let base = model(DType::BF16);
    let bench = Bench::new(&base);
    let variant = tuned(&base, 0.05, 1);
    bench.delta("base", "variant", &variant, lossless()).unwrap();
    let mut reversed = base.clone();
    reversed.reverse();
    bench.0.checkpoint("reversed.safetensors", &reversed);
    assert!(bench.restore("reversed", &["variant"]).unwrap() == by_name(&variant));
    let edits: [fn(&mut Vec<Tensor>); 4] =
        [|t| t[4].bytes[3] ^= 1, |t| t[4].name.push('x'), |t| drop(t.pop()), |t| t[4].dtype = DType::F16];
    for edit in edits {
        let mut other = base.clone();
        edit(&mut other);
        bench.0.checkpoint("other.safetensors", &other);
        assert!(refusal(bench.restore("other", &["variant"]), "invalid").contains("wrong base"));
        bench.left_nothing();
    }
}

#[test]
fn the_same_bytes_whatever_the_number_of_threads() {
    let base = model(DType::BF16);
    let bench = Bench::new(&base);
    let variant = tuned(&base, 0.05, 1);
    for request in [lossless(), quantized("ecu_v1", Some(2.0))] {
        let mut files = Vec::new();
        for threads in [1, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| bench.delta("base", "variant", &variant, request.clone())).unwrap();
            files.push(fs::read(bench.0.path("variant.delta")).unwrap());
        }
        assert!(files[0] == files[1]);
    }
}

/// A file that can be printed again with other bytes.
fn printed(path: &Path) -> File {
    let bytes = fs::read(path).unwrap();
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let start = bytes.len() - usize::try_from(number(16)).unwrap();
    File {
        magic: bytes[..8].try_into().unwrap(),
        version: 1,
        flags: u32::from_le_bytes(bytes[12..16].try_into().unwrap()),
        header_bytes: number(16),
        file_bytes: None,
        header_crc32c: None,
        reserved: [0; 24],
        preamble_crc32c: None,
        body: bytes[64..start].to_vec(),
        header: bytes[start..].to_vec(),
    }
}

#[test]
fn hostile_streams_with_correct_checksums_are_refused_and_leave_nothing() {
    let base = model(DType::BF16);
    let bench = Bench::new(&base);
    bench.delta("base", "variant", &tuned(&base, 0.05, 1), lossless()).unwrap();
    let path: PathBuf = bench.0.path("variant.delta");
    let (sound, delta) = (printed(&path), bench.open("variant"));
    assert_eq!(sound.bytes(), fs::read(&path).unwrap());
    let plane = delta.tensors()[0].planes()[0].clone();
    let (start, len) = (usize::try_from(plane.offset).unwrap() - 64, usize::try_from(plane.bytes).unwrap());
    let crc = |bytes: &[u8]| format!("{:08x}", crc32c::crc32c(bytes));
    let old = crc(&sound.body[start..start + len]);
    let mut random = Random(5);
    for round in 0..400 {
        let mut bad = sound.clone();
        // Mostly the head, of which every byte decides about what follows.
        let at = start + if round % 4 == 0 { random.below(len) } else { random.below(len.min(120)) };
        bad.body[at] ^= 1 << random.below(8);
        let bad = bad.clone().edit(&old, &crc(&bad.body[start..start + len]));
        bench.0.write("bad.delta", bad.bytes());
        let message = refusal(bench.restore("base", &["bad"]), "corrupt");
        assert!(message.contains("bad.delta") && message.contains("layers.0"), "{message}");
    }
    bench.left_nothing();
}

#[test]
fn headers_that_make_no_sense_are_refused() {
    let base = model(DType::BF16);
    let bench = Bench::new(&base);
    let variant = tuned(&base, 0.05, 1);
    bench.delta("base", "lossless", &variant, lossless()).unwrap();
    bench.delta("base", "quantized", &variant, quantized("int8_sym_v1", None)).unwrap();
    let file = |name: &str| printed(&bench.0.path(&format!("{name}.delta")));
    let open = |file: &File| ArtifactFile::open(bench.0.write("bad.delta", file.bytes()));
    let flags = |flags: u32| File { flags, ..file("lossless") };
    for (says, bad) in [
        ("contradict", flags(3)),
        ("contradict", flags(10)),
        (
            "is a difference, but this is no delta",
            File { flags: 3, ..file("lossless").edit("\"checkpoint\":true,", "") },
        ),
        (
            "is a difference, but this is no delta",
            File { flags: 1, ..file("quantized").edit("\"checkpoint\":true,", "") },
        ),
        ("stands for weights", file("quantized").edit(",\"difference\":true", "")),
        ("is a difference of BF16 in raw_v1", file("lossless").edit("\"raw_v1\"", "\"raw_v1\",\"difference\":true")),
        ("is a difference of F64", file("quantized").edit("BF16", "F64")),
        ("behind a greater name", file("lossless").edit("layers.0", "layers.9")),
    ] {
        let message = refusal(open(&bad), "corrupt");
        assert!(message.contains(says), "{says}: {message}");
    }
    // What only the base shows: a difference of a tensor that it does not have, or has otherwise.
    for (name, from, to) in [
        ("lossless", "layers.0.mlp", "layers.0.mlq"),
        ("quantized", "[24,96]", "[48,48]"),
        ("quantized", "BF16", "F16"),
    ] {
        let bad = file(name).edit(from, to);
        let Ok(opened) = open(&bad) else { continue };
        drop(opened);
        refusal(bench.restore("base", &["bad"]), "corrupt");
    }
    bench.left_nothing();
}

#[test]
fn golden_deltas_give_what_they_gave_and_are_made_as_they_were() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/deltas");
    let at = |name: &str| folder.join(name);
    for (name, request) in [("lossless", lossless()), ("quantized", quantized("ecu_v1", Some(3.0)))] {
        let (golden, out) = (at(&format!("{name}.tenpak")), at(&format!("{name}.safetensors")));
        if std::env::var("TENPAK_GOLDEN").is_ok_and(|v| v == "create") && !golden.exists() {
            let base = model(DType::BF16);
            let variant = tuned(&base, 0.05, 1);
            let bench = Bench::new(&base);
            bench.delta("base", "variant", &variant, request.clone()).unwrap();
            bench.restore("base", &["variant"]).unwrap();
            fs::create_dir_all(&folder).unwrap();
            fs::copy(bench.0.path("base.safetensors"), at("base.safetensors")).unwrap();
            fs::copy(bench.0.path("variant.safetensors"), at("lossless.safetensors")).unwrap();
            fs::copy(bench.0.path("variant.delta"), &golden).unwrap();
            restore(&bench.model("base"), &[bench.open("variant")], &out, true, &mut |_| Ok(())).unwrap();
        }
        let (delta, base) = (ArtifactFile::open(&golden).unwrap(), at("base.safetensors"));
        let (target, folder) = (Folder::new(), Folder::new());
        let base = Model::open(&base, Access::Read, &Limits::DEFAULT).unwrap();
        let restored = target.path("restored.safetensors");
        restore(&base, std::slice::from_ref(&delta), &restored, false, &mut |_| Ok(())).unwrap();
        assert!(read(&restored) == read(&out), "{name}");
        // The version of the program stands in the file; everything else is as it was.
        let again = folder.path("again.tenpak");
        create(&base, &open_source(&at("lossless.safetensors")), request, &again, false, &mut |_| Ok(())).unwrap();
        assert_eq!(ArtifactFile::open(again).unwrap().tensors(), delta.tensors(), "{name}");
    }
}
