//! What deltas promise: a base and a delta give, byte for byte, what compressing the variant gives, and nothing that is
//! wrong with either ends in a file.

#[path = "support/format.rs"]
mod format;
mod support;

use std::fs;
use std::path::{Path, PathBuf};

use format::{Artifact, Delta, Entry};
use support::{Folder, Tensor, codec, decode, open_source, pack, refusal, with};
use tenpak::artifact::delta::{DeltaReport, MAX_CHAIN, delta, materialize};
use tenpak::artifact::{ArtifactFile, verify};
use tenpak::compress::Options;
use tenpak::{DType, codecs, export};

const SHAPE: &[u64] = &[24, 96];

fn model() -> Vec<Tensor> {
    (0..6).map(|i| Tensor::random(&format!("layers.{i}.weight"), DType::F32, SHAPE, i)).collect()
}

/// A model, compressed; and what is done to it.
struct Bench {
    folder: Folder,
    options: Options,
}

impl Bench {
    fn new(codec: &'static tenpak::Codec) -> Self {
        let bench = Self { folder: Folder::new(), options: with(codec) };
        bench.pack("base", &model());
        bench
    }

    fn pack(&self, name: &str, tensors: &[Tensor]) -> PathBuf {
        let input = self.folder.checkpoint(&format!("{name}.safetensors"), tensors);
        let output = self.folder.path(&format!("{name}.tenpak"));
        pack(&input, &output, &Options { force: true, ..self.options.clone() }).unwrap();
        output
    }

    fn open(&self, name: &str) -> ArtifactFile {
        ArtifactFile::open(self.folder.path(&format!("{name}.tenpak"))).unwrap()
    }

    fn delta(&self, base: &str, name: &str, tensors: &[Tensor], epsilon: f64) -> tenpak::Result<DeltaReport> {
        let input = self.folder.checkpoint(&format!("{name}.safetensors"), tensors);
        let output = self.folder.path(&format!("{name}.delta.tenpak"));
        delta(&self.open(base), &open_source(&input), epsilon, None, &output, true, &mut |_| Ok(()))
    }

    fn materialize(&self, base: &str, deltas: &[&str]) -> tenpak::Result<Vec<u8>> {
        let deltas: Vec<_> = deltas.iter().map(|name| self.open(&format!("{name}.delta"))).collect();
        let output = self.folder.path("materialized.tenpak");
        materialize(&self.open(base), &deltas, &output, true, &mut |_| Ok(()))?;
        let bytes = fs::read(&output).unwrap();
        fs::remove_file(output).unwrap();
        Ok(bytes)
    }

    /// Checks that a variant comes back as if it had been compressed, and gives the report of its delta.
    fn same(&self, name: &str, tensors: &[Tensor]) -> DeltaReport {
        let direct = fs::read(self.pack(name, tensors)).unwrap();
        let report = self.delta("base", name, tensors, 0.0).unwrap();
        assert!(self.materialize("base", &[name]).unwrap() == direct, "{name}");
        assert_eq!(report.result, self.open(name).header().identity(), "{name}");
        report
    }

    fn exists(&self, name: &str) -> bool {
        self.folder.names().iter().any(|found| found == name || found.starts_with('.'))
    }
}

#[test]
fn a_variant_comes_back_byte_for_byte_whatever_changed_in_it() {
    for codec in codecs::all() {
        let bench = Bench::new(codec);
        let base = model();
        assert!(bench.same("nothing", &base).changed.is_empty());

        let mut one = base.clone();
        one[2] = Tensor::random(&base[2].name, DType::F32, SHAPE, 99);
        let report = bench.same("one", &one);
        assert_eq!((report.changed.len(), report.unchanged), (1, 5));
        assert_eq!(report.changed[0].name, base[2].name);

        let mut more = base.clone();
        more.insert(3, Tensor::random("new", DType::F32, SHAPE, 98));
        more.push(Tensor::random("last", DType::I64, &[5], 97));
        assert_eq!(bench.same("more", &more).changed.len(), 2);

        let mut fewer = base.clone();
        fewer.drain(1..3);
        assert!(bench.same("fewer", &fewer).changed.is_empty());

        let mut reordered = base.clone();
        reordered.reverse();
        assert!(bench.same("reordered", &reordered).changed.is_empty());

        let mut reshaped = base.clone();
        reshaped[0].shape.reverse();
        assert_eq!(bench.same("reshaped", &reshaped).changed.len(), 1);

        let mut retyped = base.clone();
        retyped[5] = Tensor::of(&base[5].name, DType::F64, SHAPE, &base[5].weights());
        assert_eq!(bench.same("retyped", &retyped).changed.len(), 1);

        let mut renamed = base.clone();
        renamed[4].name = "renamed".to_owned();
        assert_eq!(bench.same("renamed", &renamed).changed.len(), 1);

        assert_eq!(bench.same("nothing left", &[]).unchanged, 0);
    }
}

#[test]
fn tensors_that_did_not_change_cost_a_few_bytes() {
    let bench = Bench::new(codec("int4_g8_fp16_v1"));
    let report = bench.delta("base", "same", &model(), 0.0).unwrap();
    assert_eq!((report.changed.len(), report.unchanged), (0, 6));
    let empty = bench.pack("empty", &[]);
    let overhead = report.file_bytes - fs::metadata(empty).unwrap().len();
    // Two digests, their names and one run.
    assert!(overhead < 256, "{overhead} bytes");
    // Every other tensor changed: no run is longer than one.
    let mut variant = model();
    variant.iter_mut().step_by(2).for_each(|t| *t = Tensor::random(&t.name, DType::F32, SHAPE, 77));
    bench.delta("base", "half", &variant, 0.0).unwrap();
    let delta = bench.open("half.delta");
    assert_eq!(delta.header().delta().unwrap().runs, [(-1, 1), (1, 1), (-1, 1), (3, 1), (-1, 1), (5, 1)]);
    assert_eq!(verify::verify(&delta, |_| Ok(())).unwrap().problems, []);
}

#[test]
fn epsilon_takes_for_unchanged_what_decodes_within_it() {
    for codec in [codec("int8_sym_v1"), codec("int4_g8_v1"), codec(codecs::RAW)] {
        let bench = Bench::new(codec);
        let mut variant = model();
        let moved: Vec<f32> = variant[1].weights().iter().map(|w| w * 1.01).collect();
        variant[1] = Tensor::of(&variant[1].name, DType::F32, SHAPE, &moved);
        let direct = ArtifactFile::open(bench.pack("variant", &variant)).unwrap();
        let (old, new) = (decode(&bench.open("base"), 1).unwrap(), decode(&direct, 1).unwrap());
        let most = old.iter().zip(&new).map(|(a, b)| (f64::from(*a) - f64::from(*b)).abs()).fold(0.0, f64::max);
        for (epsilon, unchanged) in [(0.0, 5), (most * 0.999, 5), (most, 6), (1e9, 6)] {
            let report = bench.delta("base", "variant", &variant, epsilon).unwrap();
            assert_eq!(report.unchanged, unchanged, "{} at {epsilon}", codec.id);
            let is_direct = report.result == direct.header().identity();
            assert_eq!(is_direct, unchanged == 5, "what is taken for unchanged is another result");
            let result = bench.materialize("base", &["variant"]).unwrap();
            assert_eq!(result == fs::read(direct.path()).unwrap(), is_direct);
        }
        for epsilon in [-1.0, f64::NAN, f64::INFINITY] {
            let message = refusal(bench.delta("base", "refused", &variant, epsilon), "invalid");
            assert!(message.contains("epsilon is"), "{message}");
        }
    }
}

#[test]
fn epsilon_never_takes_raw_doubles_or_integers_for_unchanged() {
    let bench = Bench::new(codec(codecs::RAW));
    let doubles = |x: f64| Tensor { bytes: x.to_le_bytes().repeat(4), ..Tensor::random("d", DType::F64, &[4], 1) };
    let integers = |x: u8| Tensor { bytes: vec![x; 4], ..Tensor::random("i", DType::U8, &[4], 1) };
    bench.pack("base", &[doubles(1.0), integers(1)]);
    // As singles both doubles are one number, yet they differ by far more than epsilon.
    let report = bench.delta("base", "variant", &[doubles(1.0 + 1e-9), integers(2)], 1e-12).unwrap();
    assert_eq!(report.changed.len(), 2);
}

#[test]
fn chains_resolve_in_order_and_only_in_order() {
    let bench = Bench::new(codec("int4_g16_fp16_v1"));
    let mut variant = model();
    let mut names = Vec::new();
    let mut base = "base".to_owned();
    for (i, name) in ["one", "two", "three"].iter().enumerate() {
        variant[i] = Tensor::random(&variant[i].name, DType::F32, SHAPE, 50);
        bench.pack(name, &variant);
        bench.delta(&base, name, &variant, 0.0).unwrap();
        (*name).clone_into(&mut base);
        names.push(*name);
        let direct = fs::read(bench.folder.path(&format!("{name}.tenpak"))).unwrap();
        assert!(bench.materialize("base", &names).unwrap() == direct, "{name}");
    }
    for wrong in [["two", "one", "three"], ["one", "three", "two"], ["one", "one", "two"]] {
        assert!(refusal(bench.materialize("base", &wrong), "invalid").contains("wrong base"));
    }
    assert!(refusal(bench.materialize("base", &["two"]), "invalid").contains("wrong base"));
    assert!(refusal(bench.materialize("two", &["one"]), "invalid").contains("wrong base"));
    assert!(refusal(bench.materialize("base", &[]), "invalid").contains("no delta"));
    assert!(!bench.exists("materialized.tenpak"));
}

#[test]
fn a_cycle_and_an_endless_chain_are_refused() {
    let bench = Bench::new(codec("int4_g16_fp16_v1"));
    let mut variant = model();
    variant[0] = Tensor::random(&variant[0].name, DType::F32, SHAPE, 50);
    bench.pack("there", &variant);
    bench.delta("base", "there", &variant, 0.0).unwrap();
    bench.delta("there", "back", &model(), 0.0).unwrap();
    assert!(refusal(bench.materialize("base", &["there", "back"]), "invalid").contains("leads back"));

    bench.delta("base", "same", &model(), 0.0).unwrap();
    bench.materialize("base", &["same"; MAX_CHAIN]).unwrap();
    let message = refusal(bench.materialize("base", &["same"; MAX_CHAIN + 1]), "invalid");
    assert!(message.contains("a chain of 33 deltas, at most 32"), "{message}");
    assert!(!bench.exists("materialized.tenpak"));
}

#[test]
fn a_delta_is_no_base_and_no_model_and_a_model_is_no_delta() {
    let bench = Bench::new(codec("int4_g16_fp16_v1"));
    bench.delta("base", "same", &model(), 0.0).unwrap();
    assert!(refusal(bench.delta("same.delta", "other", &model(), 0.0), "invalid").contains("is a delta"));
    assert!(refusal(bench.materialize("same.delta", &["same"]), "invalid").contains("is a delta"));
    let output = bench.folder.path("out.safetensors");
    let result = export::decompress(&bench.open("same.delta"), &output, &export::Options::default(), &mut |_| Ok(()));
    assert!(refusal(result, "invalid").contains("materialize"));
    fs::copy(bench.folder.path("base.tenpak"), bench.folder.path("whole.delta.tenpak")).unwrap();
    assert!(refusal(bench.materialize("base", &["whole"]), "invalid").contains("expected a delta"));
    assert!(!bench.exists("out.safetensors") && !bench.exists("other.delta.tenpak"));
}

/// Changes one byte of a file.
fn damage(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 0x10;
    fs::write(path, bytes).unwrap();
}

#[test]
fn damage_of_base_or_delta_leaves_no_output() {
    for damaged in ["base.tenpak", "variant.delta.tenpak"] {
        let bench = Bench::new(codec("int4_g16_fp16_v1"));
        let mut variant = model();
        variant[0] = Tensor::random(&variant[0].name, DType::F32, SHAPE, 50);
        bench.delta("base", "variant", &variant, 0.0).unwrap();
        let path = bench.folder.path(damaged);
        // The last plane before the header, which the result needs from either file.
        let artifact = ArtifactFile::open(&path).unwrap();
        let last = artifact.tensors().last().unwrap().planes().last().unwrap();
        damage(&path, usize::try_from(last.offset).unwrap());
        let message = refusal(bench.materialize("base", &["variant"]), "corrupt");
        assert!(message.contains(damaged) && message.contains("chunk 0"), "{message}");
        assert!(!bench.exists("materialized.tenpak"));
    }
}

#[test]
fn a_base_is_checked_where_epsilon_needs_its_weights() {
    let bench = Bench::new(codec("int4_g16_fp16_v1"));
    let mut variant = model();
    variant[0] = Tensor::random(&variant[0].name, DType::F32, SHAPE, 50);
    damage(&bench.folder.path("base.tenpak"), 64);
    refusal(bench.delta("base", "variant", &variant, 1.0), "corrupt");
    assert!(!bench.exists("variant.delta.tenpak"));
}

/// A base of four bytes, and a delta of one tensor with these runs; `result` names what they give.
fn hostile(folder: &Folder, runs: &[(i64, u64)], result: &[usize]) -> tenpak::Result<()> {
    let all: Vec<_> = ["a", "b", "c", "d", "own"]
        .iter()
        .map(|name| Entry::raw(name, DType::U8, &[1], &name.as_bytes()[..1]))
        .collect();
    let base = Artifact::new(all[..4].to_vec());
    let mut delta = Artifact::new(all[4..].to_vec());
    let result = Artifact::identity_of(result.iter().map(|&i| &all[i]));
    delta.delta = Some(Delta { base: base.identity(), result, runs: runs.to_vec() });
    let base = ArtifactFile::open(folder.write("base.tenpak", base.bytes())).unwrap();
    let delta = ArtifactFile::open(folder.write("delta.tenpak", delta.bytes()))?;
    let output = folder.path("out.tenpak");
    let result = materialize(&base, &[delta], &output, true, &mut |_| panic!("something was written"));
    assert!(!output.exists());
    result.map(drop)
}

/// What the error says, the runs, and which of the tensors they stand for.
type Case = (&'static str, &'static [(i64, u64)], &'static [usize]);

#[test]
fn runs_that_make_no_sense_are_refused_before_anything_is_written() {
    let folder = Folder::new();
    let cases: &[Case] = &[
        ("a run of 1 tensors from 4, but there are 4", &[(4, 1), (-1, 1)], &[4]),
        ("a run of 5 tensors from 0", &[(0, 5), (-1, 1)], &[0, 1, 2, 3, 4]),
        ("a run of 2 tensors from 3", &[(3, 2), (-1, 1)], &[3, 4]),
        ("a run of 18446744073709551615 tensors from 0", &[(0, u64::MAX), (-1, 1)], &[0, 1, 2, 3, 4]),
        ("a run of 18446744073709551615 tensors", &[(i64::MAX, u64::MAX), (-1, 1)], &[4]),
        ("an empty run from 0", &[(0, 0), (-1, 1)], &[4]),
        ("an empty run from 0", &[(-1, 1), (0, 0)], &[4]),
        ("a run from -2", &[(-2, 1), (-1, 1)], &[4]),
        ("a run from -9223372036854775808", &[(i64::MIN, 1), (-1, 1)], &[4]),
        ("its runs use more than its 1 tensors", &[(-1, 2)], &[4]),
        ("its runs leave 1 of its 1 tensors out", &[(0, 4)], &[0, 1, 2, 3]),
        ("its runs leave 1 of its 1 tensors out", &[], &[]),
        ("continues the one before it", &[(-1, 1), (-1, 1)], &[4, 4]),
        ("continues the one before it", &[(0, 1), (1, 3), (-1, 1)], &[0, 1, 2, 3, 4]),
        ("'a' occurs twice", &[(0, 1), (-1, 1), (0, 2)], &[0, 4, 0, 1]),
        ("its runs use more than its 1 tensors", &[(-1, 1), (0, 1), (-1, 1)], &[4, 0, 4]),
        ("the result is", &[(0, 4), (-1, 1)], &[0, 1, 2, 4]),
        ("the result is", &[(-1, 1), (0, 4)], &[0, 1, 2, 3, 4]),
    ];
    for (says, runs, result) in cases {
        let message = refusal(hostile(&folder, runs, result), "corrupt");
        assert!(message.contains(says), "{runs:?}: {message}");
        assert!(message.contains("delta.tenpak"), "{message}");
    }
    let many: Vec<_> = (0..300_000).map(|i| (i % 2 * 2, 2)).collect();
    refusal(hostile(&folder, &many, &[]), "corrupt");
}
