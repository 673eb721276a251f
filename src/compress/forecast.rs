//! What a model will take and lose, before anything is written: from headers and a sample of the rows of each matrix.
//!
//! Sizes of codecs of a fixed size are exact; those at a rate are what is asked for, which streams reach from below within a
//! few thousandths, as far as 8-bit codes can use it. Losses are those of the samples; see [`Curve`].

use rayon::prelude::*;

use super::allocate::{Allocation, gradient};
use super::size::Settled;
use super::{OnProgress, Options, Progress, TensorReport, plan_settled, reports};
use crate::codec::Codec;
use crate::codec::extra::Extras;
use crate::codecs;
use crate::error::{Error, Result};
use crate::fit::entropy::{Curve, SAMPLE};
use crate::fit::{Fit, Rate};
use crate::layout::Layout;
use crate::measure::Distance;
use crate::recipe::{Choice, Recipe};
use crate::source::Source;
use crate::tensor;

/// Rows that are read in one go; a sample has about [`SAMPLE`] weights in several such runs.
const RUN: u64 = 16;

/// What a choice of codec, or of a rate, comes to.
#[derive(Debug, Clone)]
pub struct Point {
    /// The codec of the matrices.
    pub codec: &'static Codec,
    /// Its rate, where it leaves that open.
    pub rate: Option<Rate>,
    /// Length of the output.
    pub file_bytes: u64,
    /// Weights of the matrices.
    pub weights: u64,
    /// Bytes that they take on disk.
    pub bytes: u64,
    /// Bytes that they take in memory.
    pub memory_bytes: u64,
    /// Predicted squared error of the matrices over the sum of their squares.
    pub nmse: f64,
    /// Predicted mean KL divergence of the quantized model's next token from the source's, in nats: half the squared error
    /// times the mean squared gradient, summed over matrices with gradients. For the codecs' own fits; a fit that looks at
    /// statistics loses less. Nothing without gradients.
    pub kl: Option<f64>,
}

/// What is to be expected of one matrix.
#[derive(Debug, Clone)]
pub struct Expected {
    /// Name.
    pub name: String,
    /// Weights.
    pub weights: u64,
    /// Bits per weight on disk.
    pub rate: Rate,
    /// Predicted squared error over the sum of squares.
    pub nmse: f64,
}

/// Every codec and many rates on one model.
#[derive(Debug, Clone)]
pub struct Frontier {
    /// The rates that were asked for, then the codecs of a fixed size.
    pub points: Vec<Point>,
    /// The matrices at the rate of the options.
    pub tensors: Vec<Expected>,
}

/// Rows of a matrix.
struct Sample {
    rows: usize,
    cols: usize,
    weights: Vec<f32>,
}

/// Predicts sizes and losses of a model in a codec whose size is open at `rates`, and in all codecs of a fixed size; `choose`
/// narrows which tensors count.
///
/// # Errors
/// [`Error::Invalid`] when no tensor counts, whatever is wrong with the source, and whatever `on_progress` returns.
pub fn frontier(
    source: &Source,
    options: &Options,
    rates: &[Rate],
    choose: impl Fn(Recipe) -> Result<Recipe>,
    on_progress: &mut OnProgress<'_>,
) -> Result<Frontier> {
    let planned = reports(source, options, &[])?;
    let counts: Vec<_> = (0..planned.len()).map(|index| is_matrix(source, index, options)).collect();
    if !counts.contains(&true) {
        return Err(Error::invalid(
            "no tensor of this checkpoint counts as a linear weight, see tenpak compress --dry-run",
        ));
    }
    let fixed: Vec<_> = codecs::all().iter().filter(|c| c.layout != Layout::Raw && c.fit != Fit::Rate).collect();
    let recipes = fixed.iter().map(|codec| choose(Recipe::new(codec))).collect::<Result<Vec<_>>>()?;
    let total = planned.iter().map(|t| t.source_bytes).sum();
    let mut done = 0;
    let mut curves = Vec::new();
    let mut losses = vec![Sums::default(); fixed.len()];
    for (index, planned) in planned.iter().enumerate() {
        let mut curve = None;
        if let (true, Some(sample)) = (counts[index], sample(source, index)?) {
            let share = planned.elements() as f64 / sample.weights.len() as f64;
            let tensor = &source.tensors()[index];
            let loss = |recipe: &Recipe| sample.loss(recipe.choose(tensor.info(), tensor.matrix().1).codec);
            let (found, distances) = rayon::join(
                || Curve::of_sample(&sample.weights, sample.rows, sample.cols),
                || recipes.par_iter().map(loss).collect::<Result<Vec<_>>>(),
            );
            curve = Some(found?);
            for (sums, distance) in losses.iter_mut().zip(distances?) {
                sums.add(distance.noise * share, distance.signal * share, gradient(planned, options));
            }
        }
        curves.push(curve);
        done += planned.source_bytes;
        on_progress(Progress { done, total, tensor: &planned.name })?;
    }
    let allocation = Allocation::of(source, &curves, &planned, options);
    let at = |rate: Rate| {
        let recipe = options.recipe.clone().target_bits(rate);
        let rates = match &allocation {
            Some(allocation) => allocation.rates(rate),
            // Codes that have come to their ends take no more bits.
            None => curves
                .iter()
                .map(|curve| curve.as_ref().and_then(|curve| curve.most_rate()).map(|most| rate.min(most)))
                .collect(),
        };
        Settled { options: Options { recipe, ..options.clone() }, rates }
    };
    let mut points = Vec::new();
    for &rate in rates {
        let settled = at(rate);
        let mut sums = Sums::default();
        for (curve, tensor) in curves.iter().zip(settled.reports(source)?) {
            if let (Some(curve), Some(rate)) = (curve, tensor.rate) {
                sums.add(curve.noise(rate.bits()), curve.power(), gradient(&tensor, options));
                let beyond = Extras { column_scales: false, outliers: curve.outliers(rate.bits()) };
                let planes = beyond.plane_bytes(tensor.matrix.0, tensor.matrix.1)?;
                sums.beside += planes.iter().map(|(_, bytes)| bytes).sum::<u64>();
            }
        }
        points.push(point(source, &settled, &counts, (codecs::get(codecs::ANY_RATE)?, Some(rate)), &sums)?);
    }
    for ((codec, recipe), sums) in fixed.into_iter().zip(recipes).zip(losses) {
        let settled = Settled { options: Options { recipe, stats: None, ..options.clone() }, rates: Vec::new() };
        points.push(point(source, &settled, &counts, (codec, None), &sums)?);
    }
    let expected = |(tensor, curve): (TensorReport, &Option<Curve>)| {
        let (rate, curve) = (tensor.rate?, curve.as_ref()?);
        let nmse = if curve.power() > 0.0 { curve.noise(rate.bits()) / curve.power() } else { 0.0 };
        Some(Expected { weights: tensor.elements(), name: tensor.name, rate, nmse })
    };
    let tensors = at(options.recipe.rate()).reports(source)?.into_iter().zip(&curves).filter_map(expected).collect();
    Ok(Frontier { points, tensors })
}

/// What many matrices lose.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    noise: f64,
    power: f64,
    /// Squared error times mean squared gradient, of the matrices that have one.
    cost: Option<f64>,
    /// Bytes in memory of what lies beyond the codes.
    beside: u64,
}

impl Sums {
    fn add(&mut self, noise: f64, power: f64, gradient: Option<f64>) {
        self.noise += noise;
        self.power += power;
        if let Some(gradient) = gradient {
            self.cost = Some(self.cost.unwrap_or(0.0) + gradient * noise);
        }
    }
}

/// The curve of a tensor; nothing where it has no weights.
pub(super) fn curve(source: &Source, index: usize) -> Result<Option<Curve>> {
    let of = |sample: Sample| Curve::of_sample(&sample.weights, sample.rows, sample.cols);
    sample(source, index)?.map(of).transpose()
}

/// Whether the rate of a tensor is the recipe's to choose.
pub(super) fn is_open(source: &Source, index: usize, options: &Options) -> bool {
    let choice = chosen(source, index, options);
    choice.rate.is_some() && options.recipe.is_open(&choice.reason)
}

/// Whether a tensor has the recipe's rate itself, as matrices do, and embeddings and heads do not.
fn is_matrix(source: &Source, index: usize, options: &Options) -> bool {
    let choice = chosen(source, index, options);
    choice.rate.is_some() && options.recipe.is_common(&choice.reason)
}

fn chosen(source: &Source, index: usize, options: &Options) -> Choice {
    let tensor = &source.tensors()[index];
    options.recipe.choose(tensor.info(), tensor.matrix().1)
}

/// The sizes of the tensors that count.
fn point(
    source: &Source,
    settled: &Settled,
    counts: &[bool],
    (codec, rate): (&'static Codec, Option<Rate>),
    sums: &Sums,
) -> Result<Point> {
    let report = plan_settled(source, settled)?;
    let (mut weights, mut bytes, mut memory_bytes) = (0, 0, sums.beside);
    for (tensor, _) in report.tensors.iter().zip(counts).filter(|(_, counts)| **counts) {
        weights += tensor.elements();
        bytes += tensor.stored_bytes;
        memory_bytes += tensor.memory_bytes;
    }
    let nmse = if sums.noise > 0.0 { sums.noise / sums.power } else { 0.0 };
    let kl = sums.cost.map(|cost| cost / 2.0);
    Ok(Point { codec, rate, file_bytes: report.file_bytes, weights, bytes, memory_bytes, nmse, kl })
}

impl Sample {
    /// What the sample loses in a codec of a fixed size.
    fn loss(&self, codec: &'static Codec) -> Result<Distance> {
        let rows = self.weights.len() / self.cols;
        let encoded = codec.encode(&self.weights, rows, self.cols)?;
        Ok(Distance::between(&self.weights, &encoded.decode()))
    }
}

/// A sample of the rows of a tensor, weights that are not finite taken for zero; nothing where there are no weights.
fn sample(source: &Source, index: usize) -> Result<Option<Sample>> {
    let tensor = &source.tensors()[index];
    let dtype = tensor.info().dtype();
    let (rows, cols) = tensor.matrix();
    if rows == 0 || cols == 0 {
        return Ok(None);
    }
    let too_large = |_| Error::invalid("a row is larger than memory");
    let runs = (SAMPLE as u64).div_ceil(cols).div_ceil(RUN);
    let mut weights = Vec::new();
    let mut take = |first: u64, count: u64| -> Result<()> {
        let bytes = source.read_rows(index, first, count)?;
        let start = weights.len();
        weights.resize(start + usize::try_from(count * cols).map_err(too_large)?, 0.0);
        tensor::to_f32(dtype, &bytes, &mut weights[start..]);
        Ok(())
    };
    if runs * RUN >= rows {
        take(0, rows)?;
    } else {
        let free = rows - runs * RUN;
        (0..runs).try_for_each(|run| take(run * RUN + free * (2 * run + 1) / (2 * runs), RUN))?;
    }
    weights.iter_mut().filter(|w| !w.is_finite()).for_each(|w| *w = 0.0);
    let (rows, cols) = (usize::try_from(rows).map_err(too_large)?, usize::try_from(cols).map_err(too_large)?);
    Ok(Some(Sample { rows, cols, weights }))
}
