//! Every codec on a real checkpoint: bytes, loss and speed, measured in memory.
//!
//! Only the tensors that a default recipe would give the codec are measured: the linear weights, so that embeddings and
//! norms do not blur what a codec costs. A tensor goes by in blocks, each read and widened once and then encoded and
//! decoded by every codec; only encoding and decoding are timed. A codec whose size is open is measured at its usual rate,
//! with the bytes that it takes on disk.
//!
//! On a device the same blocks are taken there, and then decoded and multiplied with one row of activations; each is
//! called once before it is timed, because a device compiles what it is first asked for. Timed is a whole call, from
//! activations in memory to results in memory.

use std::time::{Duration, Instant};

use rayon::prelude::*;

use crate::codec::{Codec, Encoded};
use crate::coding;
use crate::compress::{BLOCK_BYTES, OnProgress, Progress, padded};
use crate::error::{Error, Result};
use crate::fit::{Fit, Rate, entropy};
use crate::gemm::{Act, Backend, Weights};
use crate::measure::Distance;
use crate::recipe::{Reason, Recipe};
use crate::source::Source;
use crate::tensor::to_f32;

/// How one codec did on a checkpoint.
#[derive(Debug, Clone)]
pub struct Row {
    /// The codec.
    pub codec: &'static Codec,
    /// Tensors that were measured.
    pub tensors: usize,
    /// Linear weights that were left out, because their rows are shorter than the group or they are too small for a rate.
    pub left_out: Vec<String>,
    /// Weights that were measured.
    pub weights: u64,
    /// Bytes of their planes.
    pub bytes: u64,
    /// Loss over all of them.
    pub distance: Distance,
    /// Time spent encoding.
    pub encode: Duration,
    /// Time spent decoding to f32.
    pub decode: Duration,
    /// What a device did with the same weights, where one was asked for.
    pub device: Option<OnDevice>,
}

/// How a device did on the weights of a row.
#[derive(Debug, Clone, Copy, Default)]
pub struct OnDevice {
    /// Bytes of the planes in memory, which a product reads.
    pub bytes: u64,
    /// Time spent decoding to f32.
    pub decode: Duration,
    /// Time spent multiplying with one row of activations.
    pub product: Duration,
}

/// Measures `codecs` on the linear weights of a source, with `choose` narrowing which tensors count, and on `device` as
/// well where there is one.
///
/// # Errors
/// [`Error::Invalid`] for the raw codec or when no tensor counts, [`Error::Nonfinite`], whatever is wrong with the
/// source or the device, and whatever `on_progress` returns.
pub fn bench(
    source: &Source,
    codecs: &[&'static Codec],
    choose: impl Fn(Recipe) -> Result<Recipe>,
    device: Option<&dyn Backend>,
    on_progress: &mut OnProgress<'_>,
) -> Result<Vec<Row>> {
    let new_row = |&codec: &&'static Codec| Row {
        codec,
        tensors: 0,
        left_out: Vec::new(),
        weights: 0,
        bytes: 0,
        distance: Distance::default(),
        encode: Duration::ZERO,
        decode: Duration::ZERO,
        device: device.map(|_| OnDevice::default()),
    };
    let mut rows: Vec<Row> = codecs.iter().map(new_row).collect();
    let recipes = codecs.iter().map(|codec| choose(Recipe::new(codec))).collect::<Result<Vec<_>>>()?;
    let total = source.tensors().iter().map(|t| t.info().bytes()).sum();
    let mut done = 0;
    for (index, tensor) in source.tensors().iter().enumerate() {
        let name = tensor.info().name();
        let mut counting = Vec::new();
        for (i, recipe) in recipes.iter().enumerate() {
            let choice = recipe.choose(tensor.info(), tensor.matrix().1);
            match choice.reason {
                Reason::ShortRows { wanted, .. } if wanted == codecs[i] => rows[i].left_out.push(name.to_owned()),
                Reason::Role(role) if choice.codec == codecs[i] && role.is_linear() => counting.push(i),
                _ => {}
            }
        }
        if !counting.is_empty() {
            measure(source, index, &counting, device, &mut rows)?;
        }
        done += tensor.info().bytes();
        on_progress(Progress { done, total, tensor: name })?;
    }
    if rows.iter().all(|row| row.tensors == 0) {
        return Err(Error::invalid(
            "no tensor of this checkpoint counts as a linear weight, see tenpak compress --dry-run",
        ));
    }
    Ok(rows)
}

/// Runs one tensor through the codecs numbered in `counting`.
fn measure(
    source: &Source,
    index: usize,
    counting: &[usize],
    device: Option<&dyn Backend>,
    rows: &mut [Row],
) -> Result<()> {
    let tensor = &source.tensors()[index];
    let (height, cols) = tensor.matrix();
    let dtype = tensor.info().dtype();
    let width = usize::try_from(cols).map_err(|_| Error::invalid("a row is larger than memory"))?;
    let block = (BLOCK_BYTES / 4 / cols.max(1)).max(1);
    let any_rate = |i: &usize| rows[*i].codec.fit == Fit::Rate;
    let (rated, counting): (Vec<usize>, Vec<usize>) = counting.iter().partition(|i| any_rate(i));
    // What one weight costs depends on all the others, so that there is only one block for these.
    let mut whole = Vec::new();
    let mut first = 0;
    while first < height {
        let count = usize::try_from(block.min(height - first)).expect("a block fits memory");
        let bytes = source.read_rows(index, first, count as u64)?;
        let mut weights = vec![0.0; count * width];
        to_f32(dtype, &bytes, &mut weights);
        if !rated.is_empty() {
            whole.extend_from_slice(&weights);
        }
        let mut decoded = vec![0.0; weights.len()];
        for &i in &counting {
            let start = Instant::now();
            let encoded = rows[i].codec.encode(&weights, count, width).map_err(|e| match e {
                Error::Nonfinite { index, count, .. } => {
                    Error::Nonfinite { tensor: tensor.info().name().to_owned(), index: first * cols + index, count }
                }
                Error::Invalid(what) => Error::invalid(format!("tensor '{}': {what}", tensor.info().name())),
                other => other,
            })?;
            let middle = Instant::now();
            encoded.decode_into(&mut decoded);
            let end = Instant::now();
            let bytes = encoded.planes().map(|(_, plane)| plane.len() as u64).sum();
            rows[i].take(bytes, [middle - start, end - middle], &weights, &decoded);
            rows[i].run(device, &encoded, &mut decoded)?;
        }
        first += count as u64;
    }
    for &i in &rated {
        let height = whole.len() / width.max(1);
        if let Some((at, _)) = whole.iter().enumerate().find(|(_, w)| !w.is_finite()) {
            let count = whole.iter().filter(|w| !w.is_finite()).count() as u64;
            return Err(Error::Nonfinite { tensor: tensor.info().name().to_owned(), index: at as u64, count });
        }
        let start = Instant::now();
        let quantized = match entropy::quantize(&whole, height, width, Rate::DEFAULT.bits(), None) {
            Err(Error::Invalid(_)) => {
                rows[i].left_out.push(tensor.info().name().to_owned());
                continue;
            }
            quantized => quantized?,
        };
        let middle = Instant::now();
        let mut codes = vec![0; whole.len()];
        coding::Stream::open(&quantized.stream, height, width)?.decode_all(&mut codes)?;
        let stride = rows[i].codec.grouped()?.code_stride(width);
        let scales = quantized.scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        let planes = vec![padded(codes, stride, width)?, scales];
        let encoded =
            Encoded::from_planes(rows[i].codec, height, width, planes)?.with_extras(None, &quantized.outliers)?;
        let mut decoded = vec![0.0; whole.len()];
        encoded.decode_into(&mut decoded);
        let end = Instant::now();
        rows[i].take(quantized.bytes(), [middle - start, end - middle], &whole, &decoded);
        rows[i].run(device, &encoded, &mut decoded)?;
        rows[i].count(tensor.info().elements());
    }
    for &i in &counting {
        rows[i].count(tensor.info().elements());
    }
    Ok(())
}

impl Row {
    /// Adds a run of weights and what became of them.
    fn take(&mut self, bytes: u64, [encode, decode]: [Duration; 2], weights: &[f32], decoded: &[f32]) {
        self.encode += encode;
        self.decode += decode;
        self.bytes += bytes;
        let part = 1 << 16;
        let parts: Vec<_> =
            weights.par_chunks(part).zip(decoded.par_chunks(part)).map(|(w, d)| Distance::between(w, d)).collect();
        parts.iter().for_each(|d| self.distance.merge(d));
    }

    /// Has a device decode and multiply what was encoded.
    fn run(&mut self, device: Option<&dyn Backend>, encoded: &Encoded, decoded: &mut [f32]) -> Result<()> {
        let (Some(device), Some(done)) = (device, &mut self.device) else { return Ok(()) };
        let weights = Weights::from(encoded);
        let matrix = device.load(&weights)?;
        let (x, mut y) = (vec![1.0; weights.cols()], vec![0.0; weights.rows()]);
        let time = |work: &mut dyn FnMut() -> Result<()>| -> Result<Duration> {
            work()?;
            let start = Instant::now();
            work()?;
            Ok(start.elapsed())
        };
        done.bytes += weights.bytes() as u64;
        done.decode += time(&mut || matrix.decode(decoded))?;
        done.product += time(&mut || matrix.multiply(&x, 1, Act::F32, &mut y))?;
        Ok(())
    }

    /// Adds a tensor of so many weights.
    fn count(&mut self, weights: u64) {
        self.tensors += 1;
        self.weights += weights;
    }
}
