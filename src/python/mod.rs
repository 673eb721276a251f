//! The module `tenpak._tenpak`: convert, let go of the GIL, call, convert. No logic.
//!
//! What depends on numpy dtypes and default values lives in `python/tenpak/__init__.py`; this module takes and gives
//! bytes, names and JSON. Long work runs on a thread of its own, so that the calling one can see Ctrl-C and call back.

mod artifact;
mod cache;
mod cuda;
mod device;
mod gemm;
mod run;

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use numpy::{PyReadonlyArray1, PyReadwriteArray1};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::artifact::{coded, delta as deltas};
use crate::compress as engine;
use crate::difference::Model;
use crate::error::{Error, Result};
use crate::export as exports;
use crate::file::Access;
use crate::fit::outliers::Share;
use crate::fit::{MaxLoss, Method, Rate};
use crate::layout::Plane;
use crate::recipe::Request;
use crate::report;
use crate::source::{self, Source};
use crate::stats::Stats;
use crate::tensor::{DType, to_f32};
use crate::{Encoded, Limits, codecs};
use artifact::PyArtifact;
use run::{guarded, interruptible, json};

/// Pairs of a name or pattern and a codec id.
type Pairs = Vec<(String, String)>;

fn open_source(path: &std::path::Path, mmap: bool) -> Result<Source> {
    source::open(path, &source::Options { access: access(mmap), limits: Limits::DEFAULT })
}

fn access(mmap: bool) -> Access {
    if mmap { Access::Map } else { Access::Read }
}

/// Runs the command line and gives its exit code.
#[pyfunction]
fn main(py: Python<'_>, argv: Vec<OsString>) -> PyResult<u8> {
    guarded(py, || Ok(crate::cli::run(argv)))
}

/// Compresses a checkpoint; the report as JSON.
#[pyfunction]
#[pyo3(signature = (
    source, output, codec, target_bits, target_size, max_loss, allocate, recipe, roles, rules, include, exclude, all,
    stats, fit, coded, outliers, nonfinite, allow_requantize, max_shard_size, shard, force, resume,
    threads, mmap, dry_run, progress
))]
#[expect(clippy::too_many_arguments, reason = "the keywords of the Python function, defaults given there")]
fn compress(
    py: Python<'_>,
    source: PathBuf,
    output: Option<PathBuf>,
    codec: Option<&str>,
    target_bits: Option<f64>,
    target_size: Option<u64>,
    max_loss: Option<f64>,
    allocate: Option<bool>,
    recipe: Option<&str>,
    roles: Pairs,
    rules: Pairs,
    include: Vec<String>,
    exclude: Vec<String>,
    all: bool,
    stats: Option<PathBuf>,
    fit: Option<&str>,
    coded: bool,
    outliers: Option<f64>,
    nonfinite: &str,
    allow_requantize: bool,
    max_shard_size: u64,
    shard: Option<(u32, u32)>,
    force: bool,
    resume: bool,
    threads: usize,
    mmap: bool,
    dry_run: bool,
    progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    let wishes = || -> Result<engine::Options> {
        let toml = recipe.map(|text| (text, None));
        let [roles, rules] = [&roles, &rules].map(|list| list.iter().map(|(name, id)| (&**name, &**id)).collect());
        if target_bits.is_some() && target_size.is_some() {
            return Err(Error::invalid("target_bits and target_size are both given, pass one of them"));
        }
        let outliers = outliers.map(Share::from_part).transpose()?;
        // A size says that some size is to be chosen, and so does any rate.
        let target_bits = target_bits.map(Rate::from_bits).transpose()?.or_else(|| target_size.map(|_| Rate::DEFAULT));
        let max_loss = max_loss.map(MaxLoss::new).transpose()?;
        let request = Request {
            codec,
            target_bits,
            max_loss,
            allocate,
            toml,
            roles,
            rules,
            include: &include,
            exclude: &exclude,
            all,
            fit,
            outliers,
        };
        let options = engine::Options::new(request.recipe()?, nonfinite.parse()?, force);
        let quantized = engine::Quantized::wanted(request.asks() || stats.is_some(), allow_requantize);
        Ok(engine::Options { target_bytes: target_size, coded, resume, quantized, ..options })
    };
    let wishes = wishes().map_err(|e| run::raise(py, e))?;
    let fit_asked = fit.is_some();
    interruptible(py, threads, progress, |on_progress| {
        let start = std::time::Instant::now();
        let opened = open_source(&source, mmap)?;
        let access = source::Options { access: access(mmap), limits: Limits::DEFAULT };
        let stats = stats.as_deref().map(|path| Stats::open(path, &access)).transpose()?;
        let quantized = wishes.quantized;
        let options = wishes.with_stats(stats, fit_asked, &opened)?.for_quantized(&opened, quantized)?;
        let most = max_shard_size;
        let part = shard.map(|(number, of)| engine::Part::new(number, of)).transpose()?;
        let report = match (output.as_deref(), part, dry_run) {
            (Some(output), None, false) => engine::compress_as(&opened, output, &options, most, on_progress)?,
            (Some(output), Some(part), false) => {
                engine::compress_part(&opened, output, &options, most, part, on_progress)?
            }
            (None, _, false) => return Err(Error::invalid("no output, pass one or dry_run=True")),
            (output, None, true) => engine::plan_as(&opened, output, &options, most)?,
            (output, Some(part), true) => engine::plan_part(&opened, output, &options, most, part)?,
        };
        let seconds = start.elapsed().as_secs_f64();
        json(&report::Compress::new(&source, output.as_deref(), &opened, &report, seconds))
    })
}

/// Decodes an artifact into a checkpoint; the report as JSON.
#[pyfunction]
#[pyo3(signature = (artifact, output, dtype, max_shard_size, force, threads, progress))]
#[expect(clippy::too_many_arguments, reason = "the keywords of the Python function, defaults given there")]
fn decompress(
    py: Python<'_>,
    artifact: PathBuf,
    output: PathBuf,
    dtype: Option<&str>,
    max_shard_size: u64,
    force: bool,
    threads: usize,
    progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    let dtype = dtype.map(str::parse::<DType>).transpose().map_err(|e| run::raise(py, e))?;
    let options = exports::Options { dtype, force, max_shard_bytes: max_shard_size };
    interruptible(py, threads, progress, |on_progress| {
        let start = std::time::Instant::now();
        let opened = crate::artifact::ArtifactFile::open(&artifact)?;
        let exported = exports::decompress(&opened, &output, &options, on_progress)?;
        json(&report::Decompress::new(&artifact, exported, start.elapsed().as_secs_f64()))
    })
}

/// Writes an artifact in another form; the report as JSON.
#[pyfunction]
#[pyo3(signature = (artifact, output, to, codec, max_shard_size, allow_requantize, force, threads, dry_run, progress))]
#[expect(clippy::too_many_arguments, reason = "the keywords of the Python function, defaults given there")]
fn export(
    py: Python<'_>,
    artifact: PathBuf,
    output: PathBuf,
    to: &str,
    codec: Option<&str>,
    max_shard_size: u64,
    allow_requantize: bool,
    force: bool,
    threads: usize,
    dry_run: bool,
    progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    let to = to.parse::<exports::To>().map_err(|e| run::raise(py, e))?;
    let how = exports::Conversion { to, force, max_shard_bytes: max_shard_size, allow_requantize };
    let codec = codec.map(codecs::get).transpose().map_err(|e| run::raise(py, e))?;
    interruptible(py, threads, progress, |on_progress| {
        let start = std::time::Instant::now();
        let exporting = exports::exporting(&artifact, Access::default(), &output, &how, codec, on_progress)?;
        let opened = &exporting.artifact;
        let exported = if dry_run {
            exports::plan(opened, &output, &how)?
        } else {
            exports::convert(opened, &output, &how, on_progress)?
        };
        let seconds = (!dry_run).then(|| start.elapsed().as_secs_f64());
        json(&report::Export::new(&artifact, &output, to, opened, exported, seconds))
    })
}

/// Writes the delta of a variant against a base; the report as JSON.
#[pyfunction]
#[pyo3(signature = (base, variant, output, mode, codec, target_bits, epsilon, stats, force, threads, progress))]
#[expect(clippy::too_many_arguments, reason = "the keywords of the Python function, defaults given there")]
fn delta(
    py: Python<'_>,
    base: PathBuf,
    variant: PathBuf,
    output: PathBuf,
    mode: Option<&str>,
    codec: Option<&str>,
    target_bits: Option<f64>,
    epsilon: f64,
    stats: Option<PathBuf>,
    force: bool,
    threads: usize,
    progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    let request = || -> Result<deltas::Request> {
        let mode = mode.map(str::parse).transpose()?;
        let codec = codec.map(codecs::get).transpose()?;
        let target_bits = target_bits.map(Rate::from_bits).transpose()?;
        Ok(deltas::Request { mode, codec, target_bits, epsilon, stats: None })
    };
    let request = request().map_err(|e| run::raise(py, e))?;
    interruptible(py, threads, progress, |on_progress| {
        let opened = Model::open(&base, access(true), &Limits::DEFAULT)?;
        let variant_source = open_source(&variant, true)?;
        let options = source::Options { access: access(true), limits: Limits::DEFAULT };
        let stats = stats.as_deref().map(|path| Stats::open(path, &options)).transpose()?.map(Arc::new);
        let request = deltas::Request { stats, ..request };
        let made = deltas::create(&opened, &variant_source, request, &output, force, on_progress)?;
        json(&report::Delta::new(&base, &variant, &output, epsilon, &made))
    })
}

/// Puts a base and its deltas together; the report as JSON.
#[pyfunction]
#[pyo3(signature = (base, deltas, output, force, threads, progress))]
fn materialize(
    py: Python<'_>,
    base: PathBuf,
    deltas: Vec<PathBuf>,
    output: PathBuf,
    force: bool,
    threads: usize,
    progress: Option<Py<PyAny>>,
) -> PyResult<String> {
    interruptible(py, threads, progress, |on_progress| {
        let opened = Model::open(&base, access(true), &Limits::DEFAULT)?;
        let chain = deltas.iter().map(crate::artifact::ArtifactFile::open).collect::<Result<Vec<_>>>()?;
        let written = deltas::restore(&opened, &chain, &output, force, on_progress)?;
        json(&report::Materialize::new(&output, &written))
    })
}

/// Puts the parts of a directory together; the report as JSON.
#[pyfunction]
fn merge_index(py: Python<'_>, directory: PathBuf) -> PyResult<String> {
    interruptible(py, 0, None, |on_progress| {
        let start = std::time::Instant::now();
        let merged = engine::merge(&directory, on_progress)?;
        json(&report::MergeIndex::new(&directory, &merged, start.elapsed().as_secs_f64()))
    })
}

/// The bytes of a plane of a matrix, given its stream.
#[pyfunction]
fn decode_plane<'py>(
    py: Python<'py>,
    codec: &str,
    plane: &str,
    rows: usize,
    cols: usize,
    stream: PyReadonlyArray1<'_, u8>,
) -> PyResult<Bound<'py, PyBytes>> {
    let stream = stream.as_slice()?;
    let bytes = guarded(py, || coded::decode(codecs::get(codec)?, plane, rows, cols, stream))?;
    Ok(PyBytes::new(py, &bytes))
}

/// The bytes of a plane of outliers of a matrix, given all of its planes as they are stored: name, coding, bytes.
#[pyfunction]
fn decode_outliers<'py>(
    py: Python<'py>,
    codec: &str,
    plane: &str,
    rows: u64,
    cols: u64,
    outliers: u64,
    planes: Vec<(String, Option<String>, PyReadonlyArray1<'_, u8>)>,
) -> PyResult<Bound<'py, PyBytes>> {
    let planes: Vec<(&str, Option<&str>, &[u8])> = planes
        .iter()
        .map(|(name, coding, bytes)| Ok((&**name, coding.as_deref(), bytes.as_slice()?)))
        .collect::<PyResult<_>>()?;
    let bytes = guarded(py, || coded::decode_outliers(codecs::get(codec)?, plane, [rows, cols, outliers], &planes))?;
    Ok(PyBytes::new(py, &bytes))
}

/// The registry as JSON.
#[pyfunction]
fn codecs_json(py: Python<'_>) -> PyResult<String> {
    guarded(py, || json(&report::Codecs::new()))
}

/// A matrix in a codec.
#[pyclass(frozen, module = "tenpak._tenpak", name = "Matrix")]
struct PyMatrix(Encoded);

#[pymethods]
impl PyMatrix {
    /// The id of the codec.
    #[getter]
    fn codec(&self) -> &'static str {
        self.0.codec().id
    }

    /// Number of rows.
    #[getter]
    fn rows(&self) -> usize {
        self.0.rows()
    }

    /// Number of columns.
    #[getter]
    fn cols(&self) -> usize {
        self.0.cols()
    }

    /// Bytes of all planes.
    #[getter]
    fn stored_bytes(&self) -> usize {
        self.0.planes().map(|(_, plane)| plane.len()).sum()
    }

    /// Name, numpy dtype of the elements and bytes of each plane.
    fn planes<'py>(&self, py: Python<'py>) -> Vec<(&'static str, &'static str, Bound<'py, PyBytes>)> {
        let layout = &self.0.codec().layout;
        let dtype = |kind| match self.0.extras().elements(kind, self.0.rows() as u64, self.0.cols() as u64) {
            Some((dtype, _)) => dtype.name(),
            None => artifact::plane_dtype(layout, kind),
        };
        let plane = |(kind, bytes): (Plane, &[u8])| (kind.name(), dtype(kind), PyBytes::new(py, bytes));
        self.0.planes().map(plane).collect()
    }

    /// `y = x · wᵀ` with arrays of `dtype` at addresses that the caller holds; see [`gemm::multiply`].
    fn multiply(
        &self,
        py: Python<'_>,
        places: ((usize, usize), (usize, usize)),
        dtype: &str,
        m: usize,
        act: &str,
        ends: Option<Vec<usize>>,
    ) -> PyResult<()> {
        gemm::multiply_encoded(py, &self.0, places, dtype, m, act, ends.as_deref())
    }

    /// Decodes into the bytes of an array of `dtype`.
    fn decode_into(&self, py: Python<'_>, dtype: &str, mut out: PyReadwriteArray1<'_, u8>) -> PyResult<()> {
        let out = out.as_slice_mut()?;
        interruptible(py, 0, None, |_| {
            artifact::fill(dtype.parse()?, out, |weights| {
                self.0.decode_into(weights);
                Ok(())
            })
        })
    }
}

/// Encodes a matrix given as the bytes of an array of `dtype`, with column scales and a part of outliers where asked for.
#[pyfunction]
#[pyo3(signature = (bytes, dtype, rows, cols, codec, column_scales, outliers))]
#[expect(clippy::too_many_arguments, reason = "the keywords of the Python function, defaults given there")]
fn encode(
    py: Python<'_>,
    bytes: PyReadonlyArray1<'_, u8>,
    dtype: &str,
    rows: usize,
    cols: usize,
    codec: &str,
    column_scales: Option<Vec<f32>>,
    outliers: Option<f64>,
) -> PyResult<PyMatrix> {
    let bytes = bytes.as_slice()?;
    interruptible(py, 0, None, |_| {
        let dtype: DType = dtype.parse()?;
        let codec = codecs::get(codec)?;
        let extra = column_scales.is_some() || outliers.is_some();
        let outliers = outliers.map(Share::from_part).transpose()?;
        let encode = |weights: &[f32]| match extra {
            false => codec.encode(weights, rows, cols),
            true => codec.encode_with(weights, rows, cols, column_scales.as_deref(), outliers),
        };
        if dtype == DType::F32
            && cfg!(target_endian = "little")
            && let Ok(weights) = bytemuck::try_cast_slice(bytes)
        {
            return encode(weights);
        }
        let mut weights = vec![0.0; rows * cols];
        to_f32(dtype, bytes, &mut weights);
        encode(&weights)
    })
    .map(PyMatrix)
}

#[pymodule]
fn _tenpak(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("DEFAULT_CODEC", codecs::DEFAULT)?;
    module.add("DEFAULT_CODEC_IN_MEMORY", codecs::DEFAULT_IN_MEMORY)?;
    module.add("FITS", Method::ALL.iter().map(|(name, fit)| (*name, fit.needs_stats())).collect::<Vec<_>>())?;
    module.add_class::<PyArtifact>()?;
    module.add_class::<artifact::PyEntry>()?;
    module.add_class::<PyMatrix>()?;
    module.add_class::<device::DeviceMatrix>()?;
    module.add_class::<cuda::CudaDevice>()?;
    module.add_function(wrap_pyfunction!(main, module)?)?;
    module.add_function(wrap_pyfunction!(compress, module)?)?;
    module.add_function(wrap_pyfunction!(decompress, module)?)?;
    module.add_function(wrap_pyfunction!(delta, module)?)?;
    module.add_function(wrap_pyfunction!(export, module)?)?;
    module.add_function(wrap_pyfunction!(materialize, module)?)?;
    module.add_function(wrap_pyfunction!(merge_index, module)?)?;
    module.add_function(wrap_pyfunction!(codecs_json, module)?)?;
    module.add_function(wrap_pyfunction!(decode_plane, module)?)?;
    module.add_function(wrap_pyfunction!(decode_outliers, module)?)?;
    module.add_function(wrap_pyfunction!(encode, module)?)?;
    module.add_function(wrap_pyfunction!(gemm::multiply, module)?)?;
    module.add_function(wrap_pyfunction!(gemm::decode_rows, module)?)?;
    module.add_function(wrap_pyfunction!(gemm::use_openmp, module)?)?;
    module.add_function(wrap_pyfunction!(cuda::cuda_use_compiler, module)?)?;
    module.add_function(wrap_pyfunction!(cuda::cuda_compile, module)?)?;
    module.add_function(wrap_pyfunction!(cuda::cuda_plan, module)?)?;
    module.add_function(wrap_pyfunction!(cuda::cuda_devices, module)?)?;
    module.add_function(wrap_pyfunction!(cache::cuda_cache_plan, module)?)?;
    module.add_function(wrap_pyfunction!(cache::cuda_kv_append, module)?)?;
    module.add_function(wrap_pyfunction!(cache::cuda_kv_attend, module)?)?;
    module.add_function(wrap_pyfunction!(cache::cuda_kv_attend_bytes, module)?)?;
    module.add_function(wrap_pyfunction!(cache::cuda_kv_recall, module)?)?;
    module.add_function(wrap_pyfunction!(cache::kv_append, module)?)?;
    module.add_function(wrap_pyfunction!(cache::kv_attend, module)?)?;
    module.add_function(wrap_pyfunction!(cache::kv_recall, module)?)?;
    Ok(())
}
