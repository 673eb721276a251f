//! Products and rows of encoded matrices in memory that Python holds.
//!
//! These calls run once for every layer and token, so memory comes as addresses, which costs a tenth of making array
//! objects. Two places call them, `python/tenpak/_matmul.py` for numpy and `python/tenpak/torch/_ops.py` for PyTorch;
//! they check what stands behind the addresses, and hold it for the length of the call.

#![expect(unsafe_code, reason = "memory whose address and length the caller vouches for")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

use pyo3::prelude::*;

use super::artifact::fill;
use super::run;
use crate::Encoded;
use crate::codecs;
use crate::error::{Error, Result};
use crate::gemm::cpu::team::OpenMp;
use crate::gemm::{Act, Weights, cpu};
use crate::tensor::{DType, to_f32};

/// Address and bytes of an array.
pub(super) type Memory = (usize, usize);

/// The bytes of an array.
///
/// # Safety
/// The array exists, unchanged, for as long as the slice is used.
pub(super) unsafe fn bytes<'a>((address, len): Memory) -> &'a [u8] {
    if len == 0 {
        return &[];
    }
    // SAFETY: the caller vouches for the address and the length.
    unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(address), len) }
}

/// The bytes of an array that is written.
///
/// # Safety
/// The array exists for as long as the slice is used, and nobody else uses it.
pub(super) unsafe fn bytes_mut<'a>((address, len): Memory) -> &'a mut [u8] {
    if len == 0 {
        return &mut [];
    }
    // SAFETY: the caller vouches for the address and the length.
    unsafe { std::slice::from_raw_parts_mut(std::ptr::with_exposed_provenance_mut(address), len) }
}

/// The OpenMP library of this process, once Python has found one, and the process: a forked child has none of its threads,
/// and waiting for them would never end.
static OPENMP: OnceLock<(u32, OpenMp)> = OnceLock::new();

/// Lets products run on the threads of the OpenMP library with these functions; see [`crate::gemm::cpu::team`].
///
/// The addresses are those of `GOMP_parallel` and `omp_get_max_threads`, from `python/tenpak/torch/_threads.py`. The
/// first library stays: a second call changes nothing.
#[pyfunction]
pub(super) fn use_openmp(parallel: usize, max_threads: usize) {
    let [parallel, max_threads] = [parallel, max_threads].map(std::ptr::with_exposed_provenance);
    // SAFETY: the caller named above looks the functions up in a library that it never unloads.
    if let Some(library) = unsafe { OpenMp::new(parallel, max_threads) } {
        OPENMP.get_or_init(|| (std::process::id(), library));
    }
}

/// Runs `work` without the GIL: here where it is small, on the OpenMP library's threads where there is one, in the pool
/// otherwise.
pub(super) fn computed(py: Python<'_>, small: bool, work: impl FnOnce() -> Result<()> + Send) -> PyResult<()> {
    let run = || match OPENMP.get() {
        _ if small => work(),
        Some((process, library)) if *process == std::process::id() => library.install(work),
        _ => run::pool(0)?.install(work),
    };
    match py.detach(|| catch_unwind(AssertUnwindSafe(run))) {
        Ok(result) => result.map_err(|e| run::raise(py, e)),
        Err(panic) => Err(run::panicked(py, panic.as_ref())),
    }
}

/// Numbers as f32: those of the array itself where they are, converted otherwise.
pub(super) fn with_floats<T>(dtype: DType, bytes: &[u8], work: impl FnOnce(&[f32]) -> T) -> T {
    match bytemuck::try_cast_slice(bytes) {
        Ok(floats) if dtype == DType::F32 && cfg!(target_endian = "little") => work(floats),
        _ => {
            let mut floats = vec![0.0; bytes.len() / usize::try_from(dtype.size()).expect("at most 8")];
            to_f32(dtype, bytes, &mut floats);
            work(&floats)
        }
    }
}

/// `y = x · wᵀ`; with `ends`, rows `ends[e-1]..ends[e]` of `x` with matrix `e` of a stack.
///
/// `x` and `y` are arrays of `dtype`, of `m x cols` and `m x rows` (rows of one matrix) numbers.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "one call for each layer, nothing wrapped in an object")]
pub(super) fn multiply(
    py: Python<'_>,
    codec: &str,
    rows: usize,
    cols: usize,
    planes: Vec<Memory>,
    x: Memory,
    y: Memory,
    dtype: &str,
    m: usize,
    act: &str,
    ends: Option<Vec<usize>>,
) -> PyResult<()> {
    computed(py, cpu::is_small(rows, cols, m), || {
        // SAFETY: the callers named above pass the memory of arrays that they hold for the length of this call.
        let planes: Vec<&[u8]> = planes.into_iter().map(|plane| unsafe { bytes(plane) }).collect();
        let weights = Weights::new(&codecs::get(codec)?.layout, rows, cols, &planes)?;
        // SAFETY: as above; `y` is an array that the caller has just made.
        let (x, y) = unsafe { (bytes(x), bytes_mut(y)) };
        product(&weights, x, y, dtype.parse()?, m, act.parse()?, ends.as_deref())
    })
}

/// The same with a matrix that is an object.
pub(super) fn multiply_encoded(
    py: Python<'_>,
    encoded: &Encoded,
    (x, y): (Memory, Memory),
    dtype: &str,
    m: usize,
    act: &str,
    ends: Option<&[usize]>,
) -> PyResult<()> {
    computed(py, cpu::is_small(encoded.rows(), encoded.cols(), m), || {
        // SAFETY: `_matmul.py` holds `x` for the length of this call and has just made `y`.
        let (x, y) = unsafe { (bytes(x), bytes_mut(y)) };
        product(&encoded.into(), x, y, dtype.parse()?, m, act.parse()?, ends)
    })
}

/// One product, or one for each matrix of a stack.
fn product(
    weights: &Weights<'_>,
    x: &[u8],
    y: &mut [u8],
    dtype: DType,
    m: usize,
    act: Act,
    ends: Option<&[usize]>,
) -> Result<()> {
    with_floats(dtype, x, |x| {
        fill(dtype, y, |y| match ends {
            None => cpu::multiply(weights, x, m, act, y),
            Some(ends) => cpu::multiply_grouped(weights, x, ends, act, y),
        })
    })
}

/// Decodes rows `ids` (i64) of a matrix, or all of them without `ids`, into an array of `dtype`.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "one call for each layer, nothing wrapped in an object")]
pub(super) fn decode_rows(
    py: Python<'_>,
    codec: &str,
    rows: usize,
    cols: usize,
    planes: Vec<Memory>,
    ids: Option<Memory>,
    out: Memory,
    dtype: &str,
) -> PyResult<()> {
    computed(py, cpu::is_small(ids.map_or(rows, |ids| ids.1 / 8), cols, 1), || {
        let dtype: DType = dtype.parse()?;
        // SAFETY: the callers named above pass the memory of arrays that they hold for the length of this call.
        let planes: Vec<&[u8]> = planes.into_iter().map(|plane| unsafe { bytes(plane) }).collect();
        let weights = Weights::new(&codecs::get(codec)?.layout, rows, cols, &planes)?;
        // SAFETY: as above; `out` is an array that the caller has just made.
        let (ids, out) = unsafe { (ids.map(|ids| bytes(ids)), bytes_mut(out)) };
        fill(dtype, out, |out| match ids {
            None => crate::gemm::Matrix::decode(&weights, out),
            Some(ids) => {
                let ids = ids.as_chunks::<8>().0.iter().map(|id| i64::from_le_bytes(*id));
                let ids =
                    ids.map(|id| usize::try_from(id).map_err(|_| Error::invalid(format!("row {id} is negative"))));
                cpu::decode_rows(&weights, &ids.collect::<Result<Vec<_>>>()?, out)
            }
        })
    })
}
