//! `Artifact` and `Entry`: an open artifact and what it says of a tensor.

#![expect(unsafe_code, reason = "an array over memory that a Python object keeps alive")]

use std::path::PathBuf;
use std::sync::Arc;

use numpy::{PyArray1, PyArrayMethods, PyReadwriteArray1};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::access;
use super::run::{guarded, interruptible, json};
use crate::artifact::verify::verify;
use crate::artifact::{ArtifactFile, Entry};
use crate::compress::Progress;
use crate::error::Result;
use crate::export;
use crate::file::Block;
use crate::layout::{Float, Layout, Plane};
use crate::report;
use crate::tensor::{DType, from_f32};
use crate::{Error, Limits};

/// What an artifact says of a tensor.
#[pyclass(frozen, module = "tenpak._tenpak", name = "Entry")]
pub(super) struct PyEntry(Arc<ArtifactFile>, usize);

impl PyEntry {
    fn entry(&self) -> &Entry {
        &self.0.tensors()[self.1]
    }
}

#[pymethods]
impl PyEntry {
    /// Name of the tensor.
    #[getter]
    fn name(&self) -> &str {
        self.entry().info().name()
    }

    /// Dtype of the source, as safetensors names it.
    #[getter]
    fn dtype(&self) -> &'static str {
        self.entry().info().dtype().name()
    }

    /// Shape in the source.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, pyo3::types::PyTuple>> {
        pyo3::types::PyTuple::new(py, self.entry().info().shape())
    }

    /// Id of the codec.
    #[getter]
    fn codec(&self) -> &'static str {
        self.entry().codec().id
    }

    /// Whether the stored matrix is the transpose of the source tensor.
    #[getter]
    fn transposed(&self) -> bool {
        self.entry().transposed()
    }

    /// Rows of the stored matrix.
    #[getter]
    fn rows(&self) -> u64 {
        self.entry().matrix().0
    }

    /// Columns of the stored matrix.
    #[getter]
    fn cols(&self) -> u64 {
        self.entry().matrix().1
    }

    /// Bytes of all planes in the file.
    #[getter]
    fn stored_bytes(&self) -> u64 {
        self.entry().stored_bytes()
    }

    /// Bytes of all planes in memory.
    #[getter]
    fn memory_bytes(&self) -> u64 {
        self.entry().memory_bytes()
    }

    /// Ids of the codings of planes that are not stored as they are.
    #[getter]
    fn coding(&self) -> std::collections::BTreeMap<&'static str, &'static str> {
        let planes = self.entry().planes().iter();
        planes.filter_map(|place| Some((place.plane.name(), place.coding?.id()))).collect()
    }

    /// Whether columns have scales: a plane `column_scales`.
    #[getter]
    fn column_scales(&self) -> bool {
        self.entry().extras().column_scales
    }

    /// How many weights are outliers, which have planes of their own.
    #[getter]
    fn outliers(&self) -> u64 {
        self.entry().extras().outliers
    }

    /// Bits of a weight on average in the file, everything in the planes counted.
    #[getter]
    fn bits_per_weight(&self) -> f64 {
        self.entry().bits_per_weight()
    }

    fn __repr__(&self) -> String {
        let entry = self.entry();
        let (name, shape) = (entry.info().name(), entry.info().shape());
        format!("Entry({name:?}, {}, {shape:?}, codec={:?})", entry.info().dtype(), entry.codec().id)
    }
}

/// Memory of a plane, kept alive by the arrays that look into it.
#[pyclass(frozen)]
struct PyBlock(Block);

/// Name of a plane, dtype of its numbers, and its bytes.
type PlaneView<'py> = (&'static str, &'static str, Bound<'py, PyArray1<u8>>);

/// An artifact, open for reading.
#[pyclass(frozen, module = "tenpak._tenpak", name = "Artifact")]
pub(super) struct PyArtifact(Arc<ArtifactFile>);

#[pymethods]
impl PyArtifact {
    #[new]
    #[pyo3(signature = (path, mmap))]
    fn new(py: Python<'_>, path: PathBuf, mmap: bool) -> PyResult<Self> {
        let file = guarded(py, || ArtifactFile::open_with(path, access(mmap), &Limits::DEFAULT))?;
        Ok(Self(Arc::new(file)))
    }

    /// Where the file is.
    #[getter]
    fn path(&self) -> PathBuf {
        self.0.path().to_owned()
    }

    /// Length of the file, or of all files of the directory.
    #[getter]
    fn file_bytes(&self) -> u64 {
        self.0.bytes()
    }

    /// BLAKE3-256 of the logical content, in hex.
    #[getter]
    fn identity(&self) -> String {
        self.0.header().identity().to_string()
    }

    /// Metadata, provenance and delta section, as JSON.
    fn header_json(&self, py: Python<'_>) -> PyResult<String> {
        let header = self.0.header();
        guarded(py, || json(&(header.metadata(), header.provenance(), header.delta())))
    }

    /// The names of the tensors, in stored order.
    fn names(&self) -> Vec<String> {
        self.0.tensors().iter().map(|t| t.info().name().to_owned()).collect()
    }

    /// The names of the attached files.
    fn file_names(&self) -> Vec<String> {
        self.0.files().iter().map(|file| file.name.to_string()).collect()
    }

    /// The bytes of an attached file, checked.
    fn read_file<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyBytes>> {
        let content = guarded(py, || self.0.read_file(name))?;
        Ok(PyBytes::new(py, &content))
    }

    /// What the artifact says of a tensor; `None` when it has none of this name.
    fn entry(&self, name: &str) -> Option<PyEntry> {
        self.0.header().find(name).map(|index| PyEntry(Arc::clone(&self.0), index))
    }

    /// Decodes a tensor into the bytes of an array of `dtype`.
    fn decode_into(&self, py: Python<'_>, name: &str, dtype: &str, mut out: PyReadwriteArray1<'_, u8>) -> PyResult<()> {
        let out = out.as_slice_mut()?;
        interruptible(py, 0, None, |on_progress| {
            export::decode_into(&self.0, self.0.find(name)?, dtype.parse()?, out, on_progress)
        })
    }

    /// Name, dtype of the numbers and bytes of each plane; the arrays own what was read, or look into the file
    /// where it is mapped and the plane is not coded.
    fn planes<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Vec<PlaneView<'py>>> {
        let (index, blocks) = guarded(py, || {
            let index = self.0.find(name)?;
            Ok((index, self.0.planes(index)?))
        })?;
        let entry = &self.0.tensors()[index];
        blocks
            .into_iter()
            .zip(entry.planes())
            .map(|(block, plane)| {
                let owner = Bound::new(py, PyBlock(block))?;
                let view = numpy::ndarray::aview1(&owner.get().0);
                // SAFETY: the memory belongs to `owner`, which is frozen and which the array keeps alive as its base;
                // nobody writes to it, and the array is made read-only on the next line.
                let array = unsafe { PyArray1::borrow_from_array(&view, owner.clone().into_any()) };
                array.readwrite().make_nonwriteable();
                let dtype = match plane.plane {
                    Plane::Data => entry.info().dtype().name(),
                    kind => match entry.extras().elements(kind, entry.matrix().0, entry.matrix().1) {
                        Some((dtype, _)) => dtype.name(),
                        None => plane_dtype(&entry.codec().layout, kind),
                    },
                };
                Ok((plane.plane.name(), dtype, array))
            })
            .collect()
    }

    /// Reads everything and gives the report as JSON.
    #[pyo3(signature = (threads, progress))]
    fn verify_json(&self, py: Python<'_>, threads: usize, progress: Option<Py<PyAny>>) -> PyResult<String> {
        interruptible(py, threads, progress, |on_progress| {
            let total = self.0.header().content_bytes();
            let verified = verify(&self.0, |done| on_progress(Progress { done, total, tensor: "" }))?;
            json(&report::Verify::new(&self.0, verified))
        })
    }
}

/// The dtype of the numbers in a plane of codes, scales or addends.
pub(super) fn plane_dtype(layout: &Layout, plane: Plane) -> &'static str {
    let float = |f: Float| if f == Float::F16 { "F16" } else { "F32" };
    match (layout, plane) {
        (Layout::Grouped(g), Plane::Scales) if g.bank().is_some() => "U8",
        (Layout::Grouped(g), Plane::Scales | Plane::RowScales) => float(g.scale()),
        (Layout::Grouped(g), Plane::Offsets) => g.offset().map_or("U8", float),
        _ => "U8",
    }
}

/// Fills the bytes of an array of `dtype` with the weights that `decode` gives.
pub(super) fn fill(dtype: DType, out: &mut [u8], decode: impl FnOnce(&mut [f32]) -> Result<()>) -> Result<()> {
    if dtype == DType::F32
        && cfg!(target_endian = "little")
        && let Ok(weights) = bytemuck::try_cast_slice_mut(out)
    {
        return decode(weights);
    }
    let element = usize::try_from(dtype.size()).map_err(|_| Error::invalid("an element larger than memory"))?;
    let mut weights = vec![0.0; out.len() / element];
    decode(&mut weights)?;
    from_f32(dtype, &weights, out)
}
