//! CUDA devices: products by tensor cores, on the planes as they are stored.
//!
//! [`Cuda`] opens a device and takes matrices there; [`Raw`] multiplies with memory that is on the device already, on
//! any stream, for PyTorch. Kernels are those of `cuda/`, compiled when first needed by NVRTC for the device at hand, and
//! kept on disk; neither a toolkit nor a GPU is needed to build or to compile them.
//!
//! A product may take columns in any order if weights and activations take the same one. `dequant.cuh` chooses an order
//! in which stored words are what a lane of a tensor core holds, so that nothing is rearranged on load, and a matrix that
//! PyTorch has put on a device is not there twice.
//!
//! | kernel | when | weights become |
//! |---|---|---|
//! | `decode.cu` | – | f32, bit for bit the specification |
//! | `exact.cu` | [`Act::F32`](super::Act), [`Act::Int8`](super::Act), scales of groups in 32 bits | f32 |
//! | `gemv.cu`, `gemm.cu`, `wgmma.cu` | otherwise | halves, one rounding from the specification |
//! | `outliers.cu` | behind the others, for [`Raw`] | added as they are, in f32 |
//!
//! Caches of keys and values have kernels of their own, for those who hold their memory:
//!
//! | kernel | what it does |
//! |---|---|
//! | `append.cu` | adds tokens, and quantizes the blocks that they make whole, bytes as on a processor |
//! | `attend.cu`, `merge.cu` | attention of few queries, by tensor cores, codes read once |
//! | `recall.cu` | keys and values as numbers, those of the specification |
//!
//! Weights beyond the range of halves, 65504, become infinite in the last two, and those below 2^-14 are off by up to 2^-25.
//! Activations are brought into that range row by row. Sums have the same order whenever the same device is asked for the
//! same product.

pub mod cache;
pub mod device;
pub mod driver;
mod launch;
mod matrix;
pub mod nvrtc;
pub mod plan;
mod raw;
pub mod source;

use std::sync::Arc;

use super::{Backend, Matrix, Weights};
use crate::error::{Error, Result};

pub use device::Device;
pub use driver::Described;
pub use matrix::Loaded;
pub use raw::{Arguments, Raw};

/// A CUDA device as a backend; clones share it.
#[derive(Debug, Clone)]
pub struct Cuda {
    device: Arc<Device>,
}

impl Cuda {
    /// Opens the device with the number `index`.
    ///
    /// # Errors
    /// [`DeviceError::NotFound`](crate::DeviceError) when there is no driver, no such device, or it is too old.
    pub fn new(index: usize) -> Result<Self> {
        Ok(Self { device: Arc::new(Device::open(index)?) })
    }

    /// Opens the device that a name means: `cuda` or `cuda:N`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another name, and as [`Cuda::new`].
    pub fn named(name: &str) -> Result<Self> {
        let unknown =
            || Error::invalid(format!("unknown device '{name}', expected cuda or cuda:N; `tenpak devices` lists them"));
        let rest = name.strip_prefix("cuda").ok_or_else(unknown)?;
        let index = match rest.strip_prefix(':') {
            Some(number) => number.parse().map_err(|_| unknown())?,
            None if rest.is_empty() => 0,
            None => return Err(unknown()),
        };
        Self::new(index)
    }

    /// The device, as its driver describes it.
    #[must_use]
    pub fn described(&self) -> &Described {
        self.device.described()
    }

    /// Takes a matrix: its planes are copied.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Device`].
    pub fn upload<'a>(&self, weights: &Weights<'a>) -> Result<Loaded<'a>> {
        Loaded::new(&self.device, weights)
    }
}

impl Backend for Cuda {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn load<'a>(&self, weights: &Weights<'a>) -> Result<Box<dyn Matrix + 'a>> {
        Ok(Box::new(self.upload(weights)?))
    }
}

/// The devices that the driver shows, in the order of `cuda:N`.
///
/// # Errors
/// [`DeviceError::NotFound`](crate::DeviceError) where there is no driver, with what to do.
pub fn devices() -> Result<Vec<Described>> {
    (0..driver::devices()?).map(driver::describe).collect()
}
