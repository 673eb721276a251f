//! Promises of `compress` with statistics: what is used, what is named, what is refused.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use support::{Folder, Random, Tensor, codec, open_source};
use tenpak::artifact::ArtifactFile;
use tenpak::artifact::delta::{delta, materialize};
use tenpak::compress::{Nonfinite, Options, Report, compress};
use tenpak::fit::Method;
use tenpak::recipe::Recipe;
use tenpak::source;
use tenpak::stats::Stats;
use tenpak::{DType, Error, report};

/// Weights of three matrices of so many columns.
fn model(cols: usize) -> Vec<Tensor> {
    let cols = cols as u64;
    ["a.weight", "b.weight", "c.weight"].map(|name| Tensor::random(name, DType::F32, &[70, cols], cols)).to_vec()
}

/// Statistics of `a` in full, of `b` its mean squares alone, of `c` nothing.
fn statistics(cols: usize, seed: u64) -> Vec<Tensor> {
    let mut random = Random(seed);
    let size = cols as u64;
    let x: Vec<Vec<f32>> = (0..3 * cols).map(|_| (0..cols).map(|_| random.weight() + 0.05).collect()).collect();
    let mean = |i: usize, j: usize| x.iter().map(|x| x[i] * x[j]).sum::<f32>() / x.len() as f32;
    let moment: Vec<f32> =
        (0..cols * cols).map(|at| mean((at / cols).min(at % cols), (at / cols).max(at % cols))).collect();
    let mean_sq: Vec<f32> = (0..cols).map(|j| moment[j * cols + j]).collect();
    let tokens =
        Tensor { name: "a.weight.tokens".into(), dtype: DType::I64, shape: vec![], bytes: 96_i64.to_le_bytes().into() };
    vec![
        tokens,
        Tensor::of("a.weight.mean_sq", DType::F32, &[size], &mean_sq),
        Tensor::of("a.weight.second_moment", DType::F32, &[size, size], &moment),
        Tensor::of("b.weight.mean_sq", DType::F32, &[size], &mean_sq),
    ]
}

struct Bench {
    folder: Folder,
    input: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let folder = Folder::new();
        let input = folder.checkpoint("model.safetensors", &model(40));
        folder.checkpoint("stats.safetensors", &statistics(40, 1));
        Self { folder, input }
    }

    fn options(&self, stats: Option<&str>, fit: Option<Method>) -> tenpak::Result<Options> {
        let recipe = Recipe::new(codec("int4_g16_fp16_v1")).all(true);
        let recipe = fit.map_or(recipe.clone(), |fit| recipe.fit(fit));
        let (path, how) = (stats.map(|name| self.folder.path(name)), source::Options::default());
        let stats = path.as_deref().map(|path| (path, &how));
        Options::new(recipe, Nonfinite::Error, true, stats, fit.is_some(), &open_source(&self.input))
    }

    fn pack(&self, input: &Path, output: &str, options: &Options) -> tenpak::Result<Report> {
        compress(&open_source(input), &self.folder.path(output), options, &mut |_| Ok(()))
    }

    fn methods(&self, stats: Option<&str>, fit: Option<Method>) -> (Vec<Method>, Vec<String>) {
        let report = self.pack(&self.input, "out.tenpak", &self.options(stats, fit).unwrap()).unwrap();
        let source = open_source(&self.input);
        let notes = report::Compress::new(&self.input, None, &source, &report, 0.0).notes;
        (report.tensors.iter().map(|t| t.method).collect(), notes)
    }
}

#[test]
fn every_tensor_gets_the_best_fit_that_its_statistics_allow_and_the_report_names_those_that_lack_some() {
    let bench = Bench::new();
    let (methods, notes) = bench.methods(Some("stats.safetensors"), None);
    assert_eq!(methods, [Method::Gptq, Method::Weighted, Method::Codec]);
    assert!(notes.iter().any(|n| n.starts_with("b.weight is fitted by weighted: no second moment in ")), "{notes:?}");
    assert!(
        notes.iter().any(|n| n.starts_with("c.weight is fitted by its codec's fit: no statistics in ")),
        "{notes:?}"
    );

    let (methods, _) = bench.methods(Some("stats.safetensors"), Some(Method::Weighted));
    assert_eq!(methods, [Method::Weighted, Method::Weighted, Method::Codec]);
    assert_eq!(
        bench.methods(None, Some(Method::Search)),
        (vec![Method::Search; 3], vec!["3 tensors were fitted by 'search' instead of by their codec's fit".to_owned()])
    );
    assert_eq!(bench.methods(None, None), (vec![Method::Codec; 3], vec![]));
}

#[test]
fn the_search_without_statistics_lowers_the_squared_error_of_every_tensor() {
    let bench = Bench::new();
    let nmse = |fit| {
        let report = bench.pack(&bench.input, "out.tenpak", &bench.options(None, fit).unwrap()).unwrap();
        report.tensors.iter().map(|t| t.distance.unwrap().nmse()).collect::<Vec<_>>()
    };
    let (own, searched) = (nmse(None), nmse(Some(Method::Search)));
    assert!(own.iter().zip(&searched).all(|(own, searched)| searched < own), "{own:?} {searched:?}");
}

#[test]
fn the_artifact_says_which_statistics_made_it_and_is_the_same_at_any_number_of_threads() {
    let bench = Bench::new();
    let options = bench.options(Some("stats.safetensors"), None).unwrap();
    let [one, four] = [1, 4].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| bench.pack(&bench.input, "out.tenpak", &options)).unwrap();
        fs::read(bench.folder.path("out.tenpak")).unwrap()
    });
    assert!(one == four);
    let artifact = ArtifactFile::open(bench.folder.path("out.tenpak")).unwrap();
    let provenance = artifact.header().provenance();
    let recipe = Recipe::from_toml(&provenance.recipe).unwrap();
    assert_eq!(recipe.method(), Method::Gptq);
    assert_eq!(
        provenance.sources.iter().map(|s| &*s.name).collect::<Vec<_>>(),
        ["model.safetensors", "stats.safetensors"]
    );
    let digest = blake3::hash(&fs::read(bench.folder.path("stats.safetensors")).unwrap());
    assert_eq!(provenance.sources[1].blake3.to_string(), digest.to_string());
}

#[test]
fn statistics_of_another_shape_and_files_of_another_kind_are_refused_by_name() {
    let bench = Bench::new();
    let refusal = |name: &str, tensors: &[Tensor]| {
        bench.folder.checkpoint(name, tensors);
        let packed = bench.options(Some(name), None).and_then(|o| bench.pack(&bench.input, "refused.tenpak", &o));
        assert!(!bench.folder.path("refused.tenpak").exists());
        packed.unwrap_err().to_string()
    };
    let wrong = refusal("short.safetensors", &statistics(39, 1));
    assert!(wrong.contains("statistics of 39 inputs for 'a.weight', which has 40"), "{wrong}");
    let mut all = statistics(40, 1);
    all[1] = Tensor::of("a.weight.mean_sq", DType::F32, &[40], &[[1.0; 39].as_slice(), &[-1.0]].concat());
    assert!(refusal("negative.safetensors", &all).contains("number 39 of tensor 'a.weight.mean_sq' is -1"));
    all[1] = Tensor::of("a.weight.mean_sq", DType::F16, &[40], &[1.0; 40]);
    assert!(refusal("half.safetensors", &all).contains("'a.weight.mean_sq' is F16 of shape [40]"));
    all.remove(1);
    assert!(refusal("lacking.safetensors", &all).contains("no 'a.weight.mean_sq'"));
    let foreign = refusal("foreign.safetensors", &model(40));
    assert!(foreign.contains("'a.weight' is no statistic"), "{foreign}");
    let mut all = statistics(40, 1);
    all[2] = Tensor::random("a.weight.second_moment", DType::F32, &[40, 40], 3);
    assert!(refusal("lopsided.safetensors", &all).contains("the second moment of 'a.weight'"));
}

#[test]
fn a_fit_and_statistics_that_do_not_go_together_are_refused() {
    let bench = Bench::new();
    let refusal = |stats, fit| bench.options(stats, Some(fit)).unwrap_err().to_string();
    assert!(refusal(None, Method::Gptq).contains("--stats"));
    assert!(refusal(None, Method::Weighted).contains("--stats"));
    for fit in [Method::Codec, Method::Search] {
        assert!(refusal(Some("stats.safetensors"), fit).contains("no use for"));
    }
    let output = bench.folder.path("stats.safetensors");
    let options = bench.options(Some("stats.safetensors"), None).unwrap();
    let result = compress(&open_source(&bench.input), &output, &options, &mut |_| Ok(()));
    assert!(matches!(result, Err(Error::Invalid(why)) if why.contains("is the input")));
}

#[test]
fn activation_stats_of_a_bundle_weigh_columns_where_that_is_asked_for() {
    let bench = Bench::new();
    let weights: Vec<f32> = (0..64_u16).map(|i| (f32::from(i) * 0.7).sin()).collect();
    let stats: Vec<f32> = (0..16_u8).map(|i| if i == 3 { 100.0 } else { 0.1 }).collect();
    let text = format!(
        r#"{{"tensors":[{{"name":"w","shape":[4,16],"data":{weights:?}}}],"activation_stats":{{"w":{stats:?}}}}}"#
    );
    let bundle = bench.folder.write("bundle.json", text);
    let recipe = Recipe::new(codec("int4_g16_v1")).all(true);
    let pack = |method| {
        let source = open_source(&bundle);
        let options = Options::new(recipe.clone().fit(method), Nonfinite::Error, true, None, true, &source).unwrap();
        let report = compress(&source, &bench.folder.path("out.tenpak"), &options, &mut |_| Ok(())).unwrap();
        let decoded = support::decode(&ArtifactFile::open(bench.folder.path("out.tenpak")).unwrap(), 0).unwrap();
        let lost = |j: usize| (0..4).map(|r| (weights[r * 16 + j] - decoded[r * 16 + j]).powi(2)).sum::<f32>();
        (report.tensors[0].method, lost(3))
    };
    let ((own, plain), (weighted, best)) = (pack(Method::Codec), pack(Method::Weighted));
    assert_eq!((own, weighted), (Method::Codec, Method::Weighted));
    assert!(best < 0.1 * plain, "the column that matters loses {best}, without statistics {plain}");
}

#[test]
fn a_variant_of_a_base_with_statistics_takes_the_same_ones_and_comes_back_byte_for_byte() {
    let bench = Bench::new();
    let options = bench.options(Some("stats.safetensors"), None).unwrap();
    bench.pack(&bench.input, "base.tenpak", &options).unwrap();
    let mut variant = model(40);
    variant[1] = Tensor::random("b.weight", DType::F32, &[70, 40], 99);
    let input = bench.folder.checkpoint("variant.safetensors", &variant);
    bench.pack(&input, "direct.tenpak", &options).unwrap();
    let base = ArtifactFile::open(bench.folder.path("base.tenpak")).unwrap();
    let path = bench.folder.path("d.tenpak");
    let made = |stats| delta(&base, &open_source(&input), 0.0, stats, &path, true, &mut |_| Ok(()));
    assert!(made(None).unwrap_err().to_string().contains("--stats"));
    let stats = Stats::open(&bench.folder.path("stats.safetensors"), &source::Options::default()).unwrap();
    let report = made(Some(Arc::new(stats))).unwrap();
    assert_eq!(report.changed.iter().map(|t| &*t.name).collect::<Vec<_>>(), ["b.weight"]);
    let deltas = [ArtifactFile::open(&path).unwrap()];
    materialize(&base, &deltas, &bench.folder.path("again.tenpak"), true, &mut |_| Ok(())).unwrap();
    let [direct, again] = ["direct.tenpak", "again.tenpak"].map(|name| fs::read(bench.folder.path(name)).unwrap());
    assert!(direct == again);
}
