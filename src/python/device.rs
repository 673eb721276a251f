//! Matrices that a backend of another device has taken, for Python.
//!
//! Data enter as addresses, for the reasons that `gemm.rs` gives, and an object that keeps their memory.

#![expect(unsafe_code, reason = "memory whose address and length the caller vouches for")]

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::prelude::*;

use super::artifact::fill;
use super::gemm::{Memory, bytes, bytes_mut, computed, with_floats};
use crate::codecs;
use crate::error::{Error, Result};
use crate::gemm::{Backend, Matrix, Weights, backend};
use crate::tensor::DType;

/// A backend and the process that opened it: a forked child has none of its threads.
type Opened = (u32, Arc<dyn Backend>);

/// The backends that are in use, by the name that was asked for.
static BACKENDS: Mutex<Option<HashMap<String, Opened>>> = Mutex::new(None);

/// The backend of a name, opened once in a process.
fn opened(name: &str) -> Result<Arc<dyn Backend>> {
    let process = std::process::id();
    let mut backends = BACKENDS.lock().unwrap_or_else(PoisonError::into_inner);
    let backends = backends.get_or_insert_default();
    match backends.get(name) {
        Some((opener, backend)) if *opener == process => Ok(Arc::clone(backend)),
        // What the driver has in memory is its parent's: it must not be touched, not even to drop it.
        Some(_) => Err(forked(&format!("device '{name}' was opened"))),
        None => {
            let fresh: Arc<dyn Backend> = backend(name)?.into();
            backends.insert(name.to_owned(), (process, Arc::clone(&fresh)));
            Ok(fresh)
        }
    }
}

fn forked(what: &str) -> Error {
    Error::unsupported(format!(
        "{what} before this process was forked, and drivers do not survive that; start the process with multiprocessing's \
         'spawn', or multiply on the CPU"
    ))
}

/// A matrix on a device, and what keeps its planes in memory: they are uploaded again when the device is lost.
#[pyclass(frozen, name = "DeviceMatrix", module = "tenpak._tenpak")]
pub(super) struct DeviceMatrix {
    // Dropped before its planes.
    matrix: Box<dyn Matrix>,
    process: u32,
    _planes: Py<PyAny>,
}

#[pymethods]
impl DeviceMatrix {
    /// Takes the planes at `places` to a device; `planes` keeps their memory.
    #[new]
    fn new(
        py: Python<'_>,
        device: &str,
        codec: &str,
        shape: (usize, usize),
        places: Vec<Memory>,
        planes: Py<PyAny>,
    ) -> PyResult<Self> {
        let mut matrix = None;
        computed(py, true, || {
            // SAFETY: `planes` holds the memory, unchanged, for as long as the matrix lives.
            let places: Vec<&'static [u8]> = places.into_iter().map(|place| unsafe { bytes(place) }).collect();
            let weights = Weights::new(&codecs::get(codec)?.layout, shape.0, shape.1, &places)?;
            matrix = Some(opened(device)?.load(&weights)?);
            Ok(())
        })?;
        Ok(Self { matrix: matrix.expect("set above"), process: std::process::id(), _planes: planes })
    }

    /// `y = x · wᵀ`; `x` and `y` are arrays of `dtype`, of `m x cols` and `m x rows` numbers.
    fn multiply(&self, py: Python<'_>, x: Memory, y: Memory, dtype: &str, m: usize, act: &str) -> PyResult<()> {
        computed(py, true, || {
            if self.process != std::process::id() {
                return Err(forked("the matrix was taken to a device"));
            }
            let (dtype, act): (DType, _) = (dtype.parse()?, act.parse()?);
            // SAFETY: the caller holds `x` for the length of this call and has just made `y`.
            let (x, y) = unsafe { (bytes(x), bytes_mut(y)) };
            with_floats(dtype, x, |x| fill(dtype, y, |y| self.matrix.multiply(x, m, act, y)))
        })
    }
}
