//! Promises of bits that are dealt out by what errors cost the model.

mod support;

use std::fs;

use support::{Folder, Tensor, codec, open_source};
use tenpak::DType;
use tenpak::artifact::ArtifactFile;
use tenpak::artifact::delta::delta;
use tenpak::compress::{Nonfinite, Options, Report, compress, frontier, plan};
use tenpak::fit::{Method, Rate};
use tenpak::recipe::Recipe;
use tenpak::source;
use tenpak::stats::Stats;

/// Squared gradients of the weights of each matrix, on average.
const GRADIENTS: [(&str, f64); 3] = [
    ("model.layers.0.self_attn.v_proj.weight", 9.0),
    ("model.layers.0.mlp.up_proj.weight", 1.0),
    ("model.layers.0.mlp.down_proj.weight", 0.25),
];

struct Bench(Folder);

impl Bench {
    fn new() -> Self {
        let folder = Folder::new();
        let shapes: [[u64; 2]; 3] = [[96, 160], [160, 128], [128, 192]];
        let weights = GRADIENTS.iter().zip(shapes).zip(1..);
        let mut tensors: Vec<_> =
            weights.map(|(((name, _), shape), seed)| Tensor::random(name, DType::F32, &shape, seed)).collect();
        let statistics: Vec<_> = GRADIENTS
            .iter()
            .zip(&tensors)
            .flat_map(|((name, gradient), tensor)| {
                let sum = gradient * tensor.weights().len() as f64;
                let cols = tensor.shape[1];
                let ones = vec![1.0; usize::try_from(cols).unwrap()];
                let fisher = format!("{name}.fisher");
                [
                    Tensor { name: fisher, dtype: DType::F64, shape: vec![], bytes: sum.to_le_bytes().into() },
                    Tensor::of(&format!("{name}.mean_sq"), DType::F32, &[cols], &ones),
                ]
            })
            .collect();
        tensors.push(Tensor::random("model.embed_tokens.weight", DType::F32, &[200, 64], 9));
        folder.checkpoint("model.safetensors", &tensors);
        folder.checkpoint("stats.safetensors", &statistics);
        folder.checkpoint("plain.safetensors", &statistics[1..2]);
        Self(folder)
    }

    fn options(&self, recipe: Recipe, stats: &str) -> tenpak::Result<Options> {
        let stats = Stats::open(&self.0.path(stats), &source::Options::default())?;
        let source = open_source(&self.0.path("model.safetensors"));
        Options::new(recipe, Nonfinite::Error, true).with_stats(Some(stats), true, &source)
    }

    fn pack(&self, options: &Options) -> Report {
        let source = open_source(&self.0.path("model.safetensors"));
        compress(&source, &self.0.path("a.tenpak"), options, &mut |_| Ok(())).unwrap()
    }
}

fn at(rate: &str) -> Recipe {
    Recipe::new(codec("ecu_v1")).target_bits(rate.parse().unwrap())
}

/// Rates of the matrices, bits that they take in all, and what their errors cost.
fn figures(report: &Report) -> (Vec<f64>, f64, f64) {
    let of = |name: &str| report.tensors.iter().find(|t| t.name == name).unwrap();
    let rates = GRADIENTS.iter().map(|(name, _)| of(name).rate.unwrap().bits()).collect();
    let weights: u64 = GRADIENTS.iter().map(|(name, _)| of(name).elements()).sum();
    let bytes: u64 = GRADIENTS.iter().map(|(name, _)| of(name).stored_bytes).sum();
    let cost = GRADIENTS.iter().map(|(name, gradient)| gradient * of(name).distance.unwrap().noise).sum();
    (rates, bytes as f64 * 8.0 / weights as f64, cost)
}

#[test]
fn with_gradients_the_same_bits_cost_the_model_less() {
    let bench = Bench::new();
    for rate in ["3", "4.25"] {
        let asked: Rate = rate.parse().unwrap();
        let (equal, _, even) = figures(
            &bench.pack(&bench.options(at(rate).allocate(false).fit(Method::Weighted), "stats.safetensors").unwrap()),
        );
        assert!(equal.iter().all(|&bits| bits == asked.bits()), "{equal:?}");
        let (rates, bits, cost) = figures(&bench.pack(&bench.options(at(rate), "stats.safetensors").unwrap()));
        assert!(bits <= asked.bits() && bits > 0.99 * asked.bits(), "{bits} bits for {rate}");
        assert!(rates.is_sorted_by(|a, b| a > b), "{rates:?}");
        assert!(cost < 0.8 * even, "{cost} where equal bits cost {even}");
        // Where a bit buys as much everywhere, four times the gradient is worth one bit more.
        assert!((rates[1] - rates[2] - 1.0).abs() < 0.2, "{rates:?}");
    }
}

#[test]
fn what_was_dealt_out_is_kept_in_the_artifact_and_shared_by_variants() {
    let bench = Bench::new();
    let options = bench.options(at("4"), "stats.safetensors").unwrap();
    let [one, four] = [1, 4].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let report = pool.install(|| bench.pack(&options));
        (figures(&report).0, fs::read(bench.0.path("a.tenpak")).unwrap())
    });
    assert!(one == four);
    let artifact = ArtifactFile::open(bench.0.path("a.tenpak")).unwrap();
    let stored = GRADIENTS.map(|(name, _)| artifact.tensors()[artifact.find(name).unwrap()].rate().unwrap().bits());
    assert_eq!(stored.to_vec(), one.0);
    let recipe = Recipe::from_toml(&artifact.header().provenance().recipe).unwrap();
    assert_eq!((recipe.allocates(), &recipe), (Some(true), &options.recipe));
    let variant = open_source(&bench.0.path("model.safetensors"));
    let made = delta(&artifact, &variant, 0.0, None, &bench.0.path("v.delta"), false, &mut |_| Ok(())).unwrap();
    assert_eq!((made.changed.len(), made.unchanged), (0, 4));
}

#[test]
fn a_size_that_is_dealt_out_is_not_exceeded_and_plans_foretell_it() {
    let bench = Bench::new();
    let source = open_source(&bench.0.path("model.safetensors"));
    let options = bench.options(at("4"), "stats.safetensors").unwrap();
    let whole = bench.pack(&options).file_bytes;
    let sized = Options { target_bytes: Some(whole * 9 / 10), ..options.clone() };
    let planned = plan(&source, &sized).unwrap();
    let report = bench.pack(&sized);
    assert!(report.file_bytes <= whole * 9 / 10 && report.file_bytes > whole * 17 / 20);
    let rates = |report: &Report| report.tensors.iter().map(|t| t.rate).collect::<Vec<_>>();
    assert_eq!(rates(&planned), rates(&report));

    let rate: Rate = "4".parse().unwrap();
    let found = frontier(&source, &options, &[rate], Ok, &mut |_| Ok(())).unwrap();
    let (rates, _, cost) = figures(&bench.pack(&options));
    let foretold = GRADIENTS.map(|(name, _)| found.tensors.iter().find(|t| t.name == name).unwrap().rate.bits());
    assert_eq!(foretold.to_vec(), rates);
    let kl = found.points[0].kl.unwrap();
    assert!((0.93..1.07).contains(&(kl / (0.5 * cost))), "{kl} where errors cost {}", 0.5 * cost);
    assert!(found.points.iter().all(|point| point.kl.is_some()));
}

#[test]
fn gradients_that_are_asked_for_and_missing_are_an_error_that_says_how_to_get_them() {
    let bench = Bench::new();
    let message = bench.options(at("4").allocate(true).fit(Method::Weighted), "plain.safetensors").unwrap_err();
    assert!(message.to_string().contains("make them with tenpak calibrate --fisher"), "{message}");
    let recipe = bench.options(at("4").fit(Method::Weighted), "plain.safetensors").unwrap().recipe;
    assert_eq!(recipe.allocates(), None);
    // Statistics whose gradients nothing takes are of no use to a codec's own fit.
    let fixed = bench.options(Recipe::new(codec("int8_sym_v1")), "stats.safetensors").unwrap_err();
    assert!(fixed.to_string().contains("fit 'codec' has no use for"), "{fixed}");
    let text = "codec = \"ecu_v1\"\ntarget_bits = 4\nallocate = \"yes\"\n";
    assert!(Recipe::from_toml(text).unwrap_err().to_string().contains("'allocate' is of type string"));
}
