//! Products on NVIDIA's devices with memory and streams of PyTorch, for Python; and plans and kernels for those who only
//! want to look at them, which needs no device.
//!
//! `python/tenpak/torch/_cuda.py` is the one place that calls the device; it checks what stands behind the addresses.

#![expect(unsafe_code, reason = "memory whose address and length the caller vouches for")]

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use serde_json::{Value, json};

use super::gemm::computed;
use crate::codecs;
use crate::error::Result;
use crate::gemm::cuda::plan::{Hardware, Problem, Product, Step};
use crate::gemm::cuda::source::{Kernel, Variant};
use crate::gemm::cuda::{Arguments, Raw, nvrtc};
use crate::tensor::DType;

/// Rows, columns and matrices of a stack.
type Shape = (usize, usize, usize);
/// Address and bytes of a plane on a device; zeros for what there is not.
type Place = (u64, usize);

/// A device of NVIDIA's, which multiplies with addresses of its memory.
#[pyclass(frozen, name = "CudaDevice", module = "tenpak._tenpak")]
pub(super) struct CudaDevice(pub(super) Raw);

fn arguments<'a>(
    codec: &'a str,
    (rows, cols, experts): Shape,
    planes: &'a [Place],
    extra: [Place; 4],
) -> Arguments<'a> {
    Arguments { codec, rows, cols, experts, planes, extra }
}

#[pymethods]
impl CudaDevice {
    /// Opens the device with the number `index`.
    #[new]
    fn new(py: Python<'_>, index: usize) -> PyResult<Self> {
        let mut opened = None;
        computed(py, false, || {
            opened = Some(Raw::open(index)?);
            Ok(())
        })?;
        Ok(Self(opened.expect("set above")))
    }

    /// Bytes of workspace of a product with activations at `x`; its kernels are compiled where they are not yet.
    #[expect(clippy::too_many_arguments, reason = "the parameters of a kernel")]
    fn prepare(
        &self,
        py: Python<'_>,
        codec: &str,
        shape: Shape,
        planes: Vec<Place>,
        extra: [Place; 4],
        m: usize,
        dtype: &str,
        exact: bool,
        x: u64,
    ) -> PyResult<usize> {
        let mut bytes = 0;
        computed(py, true, || {
            let of = arguments(codec, shape, &planes, extra);
            bytes = self.0.product(&of, m, dtype.parse()?, exact, x)?.workspace_bytes();
            Ok(())
        })?;
        Ok(bytes)
    }

    /// Launches a product on a stream: `places` are the addresses of x, ends, y and workspace.
    #[expect(clippy::too_many_arguments, reason = "the parameters of a kernel")]
    fn multiply(
        &self,
        py: Python<'_>,
        codec: &str,
        shape: Shape,
        planes: Vec<Place>,
        extra: [Place; 4],
        m: usize,
        dtype: &str,
        exact: bool,
        places: (u64, u64, u64, u64),
        stream: u64,
    ) -> PyResult<()> {
        let (x, ends, y, workspace) = places;
        computed(py, true, || {
            let of = arguments(codec, shape, &planes, extra);
            let product = self.0.product(&of, m, dtype.parse()?, exact, x)?;
            // SAFETY: the caller holds tensors at these addresses until the stream has come past.
            unsafe { self.0.launch(&product, x, ends, y, workspace, stream) }
        })
    }

    /// Launches decoding of `count` rows, those with the numbers at `ids` or all, to `out`.
    #[expect(clippy::too_many_arguments, reason = "the parameters of a kernel")]
    fn decode(
        &self,
        py: Python<'_>,
        codec: &str,
        shape: Shape,
        planes: Vec<Place>,
        extra: [Place; 4],
        ids: u64,
        count: usize,
        dtype: &str,
        out: u64,
        stream: u64,
    ) -> PyResult<()> {
        computed(py, true, || {
            let of = arguments(codec, shape, &planes, extra);
            // SAFETY: the caller holds tensors at these addresses until the stream has come past.
            unsafe { self.0.decode(&of, ids, count, dtype.parse()?, out, stream) }
        })
    }
}

/// Says where NVRTC is; without effect once it is loaded.
#[pyfunction]
pub(super) fn cuda_use_compiler(path: PathBuf) {
    nvrtc::set_path(&path);
}

/// Compiles a text for an architecture: machine code, and what the compiler said.
#[pyfunction]
pub(super) fn cuda_compile<'py>(
    py: Python<'py>,
    name: &str,
    text: &str,
    architecture: &str,
    options: Vec<String>,
) -> PyResult<(Bound<'py, PyBytes>, String)> {
    let mut compiled = None;
    computed(py, false, || {
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        compiled = Some(nvrtc::compile(name, text, architecture, &options)?);
        Ok(())
    })?;
    let compiled = compiled.expect("set above");
    Ok((PyBytes::new(py, &compiled.cubin), compiled.log))
}

/// How a product would be computed on a device with so many multiprocessors and bytes of shared memory, with instructions
/// of Hopper or without, as JSON.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "what a plan depends on")]
pub(super) fn cuda_plan(
    py: Python<'_>,
    codec: &str,
    shape: Shape,
    m: usize,
    dtype: &str,
    exact: bool,
    aligned: bool,
    outliers: bool,
    multiprocessors: usize,
    shared_bytes: usize,
    wgmma: bool,
) -> PyResult<String> {
    let mut plan = Value::Null;
    computed(py, true, || {
        let layout = *codecs::get(codec)?.grouped()?;
        let ((rows, cols, experts), numbers): (_, DType) = (shape, dtype.parse()?);
        let problem = Problem {
            layout,
            rows: rows / experts.max(1),
            cols,
            experts: experts.max(1),
            m,
            numbers,
            exact,
            aligned,
            outliers,
        };
        let product = Product::new(&problem, Hardware { multiprocessors, shared_bytes, wgmma })?;
        let decode = Variant::new(Kernel::Decode, &layout, numbers, aligned && cols.is_multiple_of(32), &[])?;
        let workspace = product.workspace;
        plan = json!({
            "prepare": product.prepare.as_ref().map(step_json),
            "multiply": step_json(&product.multiply),
            "outliers": product.outliers.as_ref().map(step_json),
            "decode": variant_json(&decode),
            "tile_rows": product.tile_rows,
            "shares": product.shares(),
            "workspace": {
                "inverses": workspace.inverses,
                "partial": workspace.partial,
                "counters": workspace.counters,
                "bytes": workspace.bytes,
            },
        });
        Ok(())
    })?;
    Ok(plan.to_string())
}

pub(super) fn step_json(step: &Step) -> Value {
    let mut json = variant_json(&step.variant);
    json["grid"] = json!(step.grid);
    json["threads"] = json!(step.threads);
    json["shared"] = json!(step.shared);
    json
}

fn variant_json(variant: &Variant) -> Value {
    let definitions: serde_json::Map<_, _> =
        variant.definitions().into_iter().map(|(name, value)| (name.to_owned(), json!(value))).collect();
    json!({ "kernel": variant.kernel().name(), "definitions": definitions, "text": variant.text() })
}

/// The devices that the driver shows, as JSON; an error where there is no driver.
#[pyfunction]
pub(super) fn cuda_devices(py: Python<'_>) -> PyResult<String> {
    let mut found = Value::Null;
    computed(py, true, || -> Result<()> {
        let devices = crate::gemm::cuda::devices()?;
        found =
            devices.iter().map(|d| json!({ "name": d.name, "capability": [d.capability.0, d.capability.1] })).collect();
        Ok(())
    })?;
    Ok(found.to_string())
}
