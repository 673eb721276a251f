//! Promises of outliers and of column scales from activations: held against brute force, against rounding to nearest, and
//! from a checkpoint to its artifact.

#![expect(clippy::cast_possible_truncation, reason = "weights are singles")]

mod support;

use std::collections::HashSet;
use std::sync::Arc;

use support::{Folder, Random, Tensor, codec, decode, open_source, refusal};
use tenpak::artifact::{ArtifactFile, delta, verify};
use tenpak::codec::extra::Extras;
use tenpak::compress::{Nonfinite, Options, Report, compress, plan};
use tenpak::fit::awq::{self, Inputs, Moment};
use tenpak::fit::outliers::{self, Share};
use tenpak::fit::weighted::Importance;
use tenpak::fit::{self, Method};
use tenpak::recipe::Recipe;
use tenpak::stats::Stats;
use tenpak::{Codec, DType, codecs, source};

#[test]
fn outliers_are_the_weights_of_greatest_saving_and_of_equal_ones_the_first() {
    let mut random = Random(3);
    for (rows, cols, count) in [(1, 1, 1), (4, 8, 5), (13, 21, 60), (7, 5, 35), (300, 1000, 1500)] {
        for equal in [false, true] {
            let weights: Vec<f32> =
                (0..rows * cols).map(|_| if equal { 0.25 * random.below(4) as f32 } else { random.weight() }).collect();
            let importance: Vec<f32> = (0..cols).map(|_| if equal { 1.0 } else { random.weight().abs() }).collect();
            for importance in [None, Some(&*importance)] {
                let saving = |i: usize| {
                    let cost = importance.map_or(1.0, |importance| f64::from(importance[i % cols]));
                    (f64::from(weights[i]) * f64::from(weights[i]) * cost) as f32
                };
                let mut order: Vec<usize> = (0..weights.len()).collect();
                order.sort_by(|&a, &b| saving(b).total_cmp(&saving(a)).then(a.cmp(&b)));
                let mut want = order[..count].to_vec();
                want.sort_unstable();
                assert_eq!(outliers::choose(&weights, cols, count, importance), want, "{rows} x {cols}, {equal}");
            }
        }
    }
    assert!(outliers::choose(&[1.0], 1, 0, None).is_empty());
}

#[test]
fn what_stands_for_an_outlier_is_in_the_range_of_the_weights_of_its_group_that_stay() {
    let mut random = Random(4);
    for (rows, cols, group) in [(3, 20, 8), (2, 7, 7), (5, 33, 16), (1, 4, 256)] {
        let weights: Vec<f32> = (0..rows * cols).map(|_| random.weight()).collect();
        let places: Vec<usize> = (0..weights.len()).filter(|_| random.below(3) == 0).collect();
        let out: HashSet<usize> = places.iter().copied().collect();
        let mut rest = weights.clone();
        outliers::take_out(&mut rest, cols, group, &places);
        for i in 0..weights.len() {
            let (row, column) = (i / cols * cols, i % cols);
            let first = row + column / group * group;
            let stay: Vec<f32> =
                (first..(first + group).min(row + cols)).filter(|j| !out.contains(j)).map(|j| weights[j]).collect();
            let (least, greatest) = fit::min_max(&stay);
            let want = match (out.contains(&i), stay.is_empty()) {
                (false, _) => weights[i],
                (true, true) => 0.0,
                (true, false) => weights[i].clamp(least, greatest),
            };
            assert_eq!(rest[i], want, "{rows} x {cols} in {group}: weight {i}");
        }
    }
}

#[test]
fn exponents_of_column_scales_are_powers_up_to_one_factor() {
    let mean_abs = [0.5_f32, 1.0, 2.0, 8.0, 0.0];
    for step in 0..=16 {
        let scales = awq::column_scales(&mean_abs, step);
        let alpha = f64::from(step) / 16.0;
        for (pair, scales) in mean_abs.windows(2).zip(scales.windows(2)).take(3) {
            let want = (f64::from(pair[1]) / f64::from(pair[0])).powf(alpha);
            let got = f64::from(scales[0]) / f64::from(scales[1]);
            assert!((got / want - 1.0).abs() < 1e-6, "alpha {alpha}: {got} is not {want}");
        }
        assert!(scales.iter().all(|s| s.is_finite() && *s > 0.0), "{scales:?}");
    }
    assert_eq!(awq::column_scales(&[0.0; 3], 9), [1.0; 3]);
}

/// Weights, and inputs of which some columns are many times larger than others.
fn problem(rows: usize, cols: usize, full: bool, seed: u64) -> (Vec<f32>, Inputs) {
    let mut random = Random(seed);
    let weights: Vec<f32> = (0..rows * cols).map(|_| random.weight()).collect();
    let sizes: Vec<f32> = (0..cols).map(|_| if random.below(16) == 0 { 12.0 } else { 1.0 }).collect();
    let vectors = 2 * cols;
    let x: Vec<Vec<f32>> = (0..vectors)
        .map(|_| {
            let common = random.weight();
            sizes.iter().map(|s| s * (common + random.weight())).collect()
        })
        .collect();
    let mean = |of: &dyn Fn(&[f32]) -> f32| x.iter().map(|x| of(x)).sum::<f32>() / vectors as f32;
    let mean_abs = (0..cols).map(|j| mean(&|x| x[j].abs())).collect();
    let mean_sq: Vec<f32> = (0..cols).map(|j| mean(&|x| x[j] * x[j])).collect();
    let moment = full.then(|| {
        let moment = (0..cols * cols).map(|at| mean(&|x| x[at / cols] * x[at % cols])).collect();
        Moment::new(moment, cols, 0.05)
    });
    (weights, Inputs { mean_abs, importance: Importance::new(&mean_sq), moment })
}

/// The codecs with 4-bit codes.
fn short() -> impl Iterator<Item = &'static Codec> {
    codecs::all().iter().filter(|codec| codec.grouped().is_ok_and(|layout| layout.bits() == 4))
}

#[test]
fn column_scales_never_lose_more_than_rounding_to_nearest_and_less_where_inputs_differ() {
    for full in [false, true] {
        let (mut chosen, mut nearest) = (0.0, 0.0);
        for (seed, codec) in (1..).zip(short()) {
            let (weights, inputs) = problem(24, 96, full, seed);
            let layout = codec.grouped().unwrap();
            for outliers in [Vec::new(), outliers::choose(&weights, 96, 12, Some(inputs.importance.columns()))] {
                let matrix = awq::Matrix { layout, fit: codec.fit, weights: &weights, cols: 96, outliers: &outliers };
                let found = awq::choose(&matrix, &inputs).unwrap();
                assert!(found.loss <= found.nearest, "{}: {} above {}", codec.id, found.loss, found.nearest);
                chosen += found.loss / found.nearest;
                nearest += 1.0;
            }
        }
        assert!(chosen < 0.8 * nearest, "{chosen} of {nearest}, full {full}");
    }
}

#[test]
fn inputs_that_are_alike_get_no_column_scales_from_their_magnitudes() {
    let (weights, mut inputs) = problem(16, 64, false, 5);
    inputs.mean_abs = vec![0.7; 64];
    let codec = codec("int4_g32_fp16_v1");
    let matrix =
        awq::Matrix { layout: codec.grouped().unwrap(), fit: codec.fit, weights: &weights, cols: 64, outliers: &[] };
    assert_eq!(awq::choose(&matrix, &inputs).unwrap().column_scales, None);
}

/// A checkpoint and its statistics in a folder.
struct Bench {
    folder: Folder,
    weights: Tensor,
}

impl Bench {
    fn new(full: bool) -> Self {
        let folder = Folder::new();
        let (rows, cols) = (40, 80);
        let (weights, inputs) = problem(rows, cols, full, 9);
        let name = "model.layers.0.self_attn.q_proj.weight";
        let weights = Tensor::of(name, DType::F32, &[rows as u64, cols as u64], &weights);
        folder.checkpoint("model.safetensors", std::slice::from_ref(&weights));
        let size = [cols as u64];
        let mut stats = vec![
            Tensor::of(&format!("{name}.mean_sq"), DType::F32, &size, inputs.importance.columns()),
            Tensor::of(&format!("{name}.mean_abs"), DType::F32, &size, &inputs.mean_abs),
        ];
        if full {
            let moment: Vec<f32> = (0..cols * cols)
                .map(|at| if at % (cols + 1) == 0 { inputs.importance.columns()[at / cols] } else { 0.0 })
                .collect();
            stats.push(Tensor::of(&format!("{name}.second_moment"), DType::F32, &[size[0]; 2], &moment));
        }
        folder.checkpoint("stats.safetensors", &stats);
        Self { folder, weights }
    }

    fn options(&self, recipe: Recipe, stats: bool) -> tenpak::Result<Options> {
        let asked = recipe.method() != Method::Codec;
        let stats = stats.then(|| Stats::open(&self.folder.path("stats.safetensors"), &source::Options::default()));
        let source = open_source(&self.folder.path("model.safetensors"));
        Options::new(recipe, Nonfinite::Error, true).with_stats(stats.transpose()?, asked, &source)
    }

    fn pack(&self, recipe: Recipe, stats: bool) -> tenpak::Result<(Report, ArtifactFile)> {
        let options = self.options(recipe, stats)?;
        let source = open_source(&self.folder.path("model.safetensors"));
        let target = self.folder.path("out.tenpak");
        let report = compress(&source, &target, &options, &mut |_| Ok(()))?;
        Ok((report, ArtifactFile::open(target)?))
    }
}

fn share(part: f64) -> Share {
    Share::from_part(part).unwrap()
}

#[test]
fn outliers_come_back_as_half_precision_stores_them_and_the_rest_loses_less() {
    let bench = Bench::new(true);
    let weights = bench.weights.weights();
    for codec in short() {
        for (method, stats) in [
            (Method::Codec, false),
            (Method::Search, false),
            (Method::Weighted, true),
            (Method::Gptq, true),
            (Method::Awq, true),
        ] {
            let recipe = Recipe::new(codec).all(true).fit(method);
            let name = format!("{} {}", codec.id, method.name());
            let Ok((without, _)) = bench.pack(recipe.clone(), stats) else { continue };
            if without.tensors[0].codec != codec {
                continue; // Rows are shorter than a group.
            }
            let (report, artifact) = bench.pack(recipe.outliers(share(0.01)), stats).unwrap();
            let entry = &artifact.tensors()[0];
            assert_eq!(entry.extras().outliers, 32, "{name}");
            assert!(verify::verify(&artifact, |_| Ok(())).unwrap().problems.is_empty(), "{name}");
            let tensor = &report.tensors[0];
            assert_eq!((tensor.stored_bytes, tensor.memory_bytes), (entry.stored_bytes(), entry.memory_bytes()));
            let decoded = decode(&artifact, 0).unwrap();
            let places = outliers::choose(&weights, 80, 32, None);
            let loss = |decoded: &[f32], of: &dyn Fn(usize) -> bool| -> f64 {
                let off = |i: usize| f64::from(weights[i]) - f64::from(decoded[i]);
                (0..weights.len()).filter(|i| of(*i)).map(|i| off(i) * off(i)).sum()
            };
            if matches!(method, Method::Codec | Method::Search) {
                for &place in &places {
                    // Half a unit in the last place of what is added, which is at most twice the weight.
                    let bound = f64::from(weights[place].abs()) * 2.0_f64.powi(-10) + 1e-7;
                    assert!((f64::from(decoded[place]) - f64::from(weights[place])).abs() <= bound, "{name}: {place}");
                }
                let before = without.tensors[0].distance.unwrap().nmse();
                let after = tensor.distance.unwrap().nmse();
                assert!(after < before, "{name}: {after} is not below {before}");
            }
            assert!(loss(&decoded, &|_| true) < 1.0, "{name}");
        }
    }
}

#[test]
fn what_is_planned_is_what_is_written() {
    let bench = Bench::new(false);
    let source = open_source(&bench.folder.path("model.safetensors"));
    for (method, stats) in [(Method::Codec, false), (Method::Weighted, true), (Method::Awq, true)] {
        let recipe = Recipe::new(codec("int4_g16_fp16_v1")).fit(method).outliers(share(0.005));
        let options = bench.options(recipe.clone(), stats).unwrap();
        let planned = plan(&source, &options).unwrap();
        let (report, artifact) = bench.pack(recipe, stats).unwrap();
        assert_eq!(artifact.tensors()[0].extras(), Extras { column_scales: method == Method::Awq, outliers: 16 });
        assert_eq!(
            (planned.file_bytes, planned.tensors[0].stored_bytes),
            (report.file_bytes, report.tensors[0].stored_bytes)
        );
    }
}

#[test]
fn the_same_input_gives_the_same_bytes_on_any_number_of_threads() {
    let bench = Bench::new(true);
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let recipe = Recipe::new(codec("int4_g32_fp16_v1")).fit(Method::Awq).outliers(share(0.02));
        pool.install(|| bench.pack(recipe, true)).unwrap();
        std::fs::read(bench.folder.path("out.tenpak")).unwrap()
    };
    assert_eq!(on(1), on(3));
}

#[test]
fn a_recipe_with_a_name_says_all_of_it_and_wants_statistics() {
    let bench = Bench::new(false);
    for (name, attention, mlp) in
        [("awq_v10", "int4_g256_fp16_v1", "int4_g2048_fp16_v1"), ("awq_v60", "int4_g512_fp16_v1", "int4_g4096_fp16_v1")]
    {
        let recipe = Recipe::named(name).unwrap();
        assert_eq!(Recipe::from_toml(&recipe.to_toml()).unwrap(), recipe);
        for part in [attention, mlp, "fit = \"awq\"", "outliers = 0.005"] {
            assert!(recipe.to_toml().contains(part), "{}", recipe.to_toml());
        }
        let refused = refusal(bench.pack(recipe.clone(), false), "invalid");
        assert!(refused.contains("needs statistics") && refused.contains("--stats"), "{refused}");
        let (report, artifact) = bench.pack(recipe, true).unwrap();
        // Rows of 80 are one group.
        assert_eq!((report.tensors[0].codec.id, report.tensors[0].changed_codec), (attention, false));
        assert_eq!(artifact.tensors()[0].extras(), Extras { column_scales: true, outliers: 16 });
    }
    assert_eq!(Recipe::named("awq_v11"), None);
}

#[test]
fn a_variant_is_compressed_as_its_base_was_and_materializes() {
    let bench = Bench::new(false);
    let recipe = Recipe::new(codec("int4_g16_fp16_v1")).fit(Method::Awq).outliers(share(0.01));
    let (_, base) = bench.pack(recipe, true).unwrap();
    let source = open_source(&bench.folder.path("model.safetensors"));
    let stats =
        || Some(Arc::new(Stats::open(&bench.folder.path("stats.safetensors"), &source::Options::default()).unwrap()));
    let target = bench.folder.path("same.tenpak");
    let same = delta::delta(&base, &source, 0.0, stats(), &target, true, &mut |_| Ok(())).unwrap();
    assert_eq!((same.unchanged, same.changed.len()), (1, 0));
    let mut weights = bench.weights.weights();
    weights[7] += 1.0;
    let changed = Tensor::of(&bench.weights.name, DType::F32, &bench.weights.shape, &weights);
    bench.folder.checkpoint("variant.safetensors", std::slice::from_ref(&changed));
    let variant = open_source(&bench.folder.path("variant.safetensors"));
    let target = bench.folder.path("delta.tenpak");
    delta::delta(&base, &variant, 0.0, stats(), &target, true, &mut |_| Ok(())).unwrap();
    let result = bench.folder.path("result.tenpak");
    let opened = [ArtifactFile::open(&target).unwrap()];
    delta::materialize(&base, &opened, &result, true, &mut |_| Ok(())).unwrap();
    let result = ArtifactFile::open(result).unwrap();
    assert!(verify::verify(&result, |_| Ok(())).unwrap().problems.is_empty());
    assert_eq!(decode(&result, 0).unwrap(), decode(&opened[0], 0).unwrap());
}
