//! Graphics devices: products by compute shaders, over Vulkan, Metal or Direct3D 12.
//!
//! [`Wgpu`] opens a device, [`Wgpu::upload`] takes a matrix there, once, as its planes are stored; the [`Loaded`] matrix
//! multiplies. Many products in one submission, and results that are awaited, go by [`Wgpu::batch`]. Shaders are
//! specialised by the constants of a layout (`shaders/weights.wgsl` reads weights, for all of them), so that a new codec
//! needs none of its own:
//!
//! | kernel | rows of activations | how |
//! |---|---|---|
//! | `decode.wgsl` | – | bit for bit the specification, but for subnormal numbers, which drivers may take for zero |
//! | `gemv.wgsl` | 1 to 8 | every weight is read once; sums by subgroups where there are any, of whatever size |
//! | `gemm.wgsl` | more | tiles of 32 x 64 results, 4 x 4 for each thread |
//! | `units.wgsl` | more | the same tiles on matrix units, where the device has some; not yet run on hardware |
//! | `attend.wgsl` | queries | attention over a quantized [cache](crate::attention), runs of tokens at once, which `attention_merge.wgsl` merges |
//!
//! Products are within the bounds of [`Act`](super::Act), with one difference: subnormal numbers may count as zero.
//! Column scales and outliers are applied on the processor, before and after. Sums are added up in the same order
//! whenever the same device is asked for the same product; another device gives other bits within the same bound.
//!
//! A device may be lost at any time: its driver is updated, it hangs, it is unplugged. Then a call gives
//! [`DeviceError::Lost`](crate::DeviceError), and the next one opens the device anew, also for matrices that were taken before.

mod adapter;
mod cache;
mod device;
mod flight;
mod g8;
mod kernel;
mod matrix;
mod planes;
mod pool;
mod record;
mod store;
mod units;
mod wait;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use super::{Backend, Matrix, Weights};
use crate::attention::KvCache;
use crate::codec::Encoded;
use crate::error::{Error, Result};
use device::Device;
use matrix::Source;

pub use adapter::{Adapter, adapters};
pub use cache::LoadedCache;
pub use g8::{G8GemmContext, G8Number};
pub use matrix::{Batch, Loaded, Pending};
pub use pool::Usage;
pub use units::MatrixUnits;

/// How a device is used; the default uses all that it has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Whether kernels add up by subgroups where the device has them.
    pub subgroups: bool,
    /// Whether kernels compute with halves where that is asked for by [`Act::F16`](super::Act::F16) and the device can.
    pub half: bool,
    /// How products with many rows of activations use matrix units.
    pub units: MatrixUnits,
    /// The largest part of a buffer that a kernel sees, in bytes; nothing for what the device can.
    pub binding_bytes: Option<u64>,
    /// The folder where compiled kernels are kept; nothing for none. By default `tenpak` in the user's folder for caches.
    pub pipelines: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            subgroups: true,
            half: true,
            units: MatrixUnits::default(),
            binding_bytes: None,
            pipelines: super::kept::usual_folder(),
        }
    }
}

#[derive(Debug)]
struct Shared {
    adapter: wgpu::Adapter,
    described: Adapter,
    options: Options,
    /// The device that is in use; another one when it was lost.
    current: Mutex<Option<Arc<Device>>>,
}

/// A graphics device as a backend; clones share it.
#[derive(Debug, Clone)]
pub struct Wgpu {
    shared: Arc<Shared>,
}

impl Wgpu {
    /// Opens the device that is most likely to be fast; one that computes on the processor, which [`cpu`](super::cpu)
    /// does faster, where there is no other.
    ///
    /// # Errors
    /// [`DeviceError::NotFound`](crate::DeviceError) when there is none, [`Error::Device`] when its driver refuses.
    pub fn new() -> Result<Self> {
        Self::with(None, Options::default())
    }

    /// Opens the device with the number `index` of [`adapters`], or the one that is most likely to be fast.
    ///
    /// # Errors
    /// As [`Wgpu::new`].
    pub fn with(index: Option<usize>, options: Options) -> Result<Self> {
        let (adapter, described) = adapter::choose(index)?;
        let opened = Self { shared: Arc::new(Shared { adapter, described, options, current: Mutex::default() }) };
        opened.device()?;
        Ok(opened)
    }

    /// Opens the device that a name means: `wgpu` or `wgpu:N`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another name, and as [`Wgpu::new`].
    pub fn named(name: &str) -> Result<Self> {
        let index = match name.strip_prefix("wgpu") {
            Some("") => None,
            Some(rest) => Some(rest.strip_prefix(':').and_then(|n| n.parse().ok()).ok_or_else(|| unknown(name))?),
            None => return Err(unknown(name)),
        };
        Self::with(index, Options::default())
    }

    /// The device, as its driver describes it.
    #[must_use]
    pub fn adapter(&self) -> &Adapter {
        &self.shared.described
    }

    /// Takes a matrix: its planes are uploaded.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Device`], and [`Error::Unsupported`] when not even a row fits the device.
    pub fn upload<'a>(&self, weights: &Weights<'a>) -> Result<Loaded<'a>> {
        Loaded::new(self, Source::Borrowed(*weights))
    }

    /// The same with a matrix that is shared, for those who cannot say how long its planes live.
    ///
    /// # Errors
    /// As [`Wgpu::upload`].
    pub fn upload_shared(&self, encoded: Arc<Encoded>) -> Result<Loaded<'static>> {
        Loaded::new(self, Source::Owned(encoded))
    }

    /// Takes a cache of keys and values, which may be empty: its planes are uploaded, and later its new tokens.
    ///
    /// # Errors
    /// As [`LoadedCache::attend`].
    pub fn upload_cache(&self, cache: KvCache) -> Result<LoadedCache> {
        LoadedCache::new(self, cache)
    }

    /// Products, and attention, that are submitted together.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn batch<'a>(&self) -> Result<Batch<'a>> {
        Batch::new(self)
    }

    /// What calls hold of the memory of the device, and have held since it was opened; matrices are not counted.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let current = self.shared.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.as_ref().map_or(Usage::default(), |device| device.pool.usage())
    }

    /// Takes the device away as a driver may do at any time, so that programs can test that they survive it.
    pub fn lose_device(&self) {
        let current = self.shared.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = current.as_ref() {
            device.lose();
        }
    }

    /// The device, opened anew when it was lost.
    fn device(&self) -> Result<Arc<Device>> {
        let Shared { adapter, described, options, current } = &*self.shared;
        let mut current = current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = current.as_ref().filter(|device| !device.is_lost()) {
            return Ok(Arc::clone(device));
        }
        // What is left of it goes first, so that its memory is free.
        *current = None;
        let device = Device::open(adapter, described, options)?;
        *current = Some(Arc::clone(&device));
        Ok(device)
    }

    /// Whether both are the same device.
    fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }
}

fn unknown(name: &str) -> Error {
    Error::invalid(format!("unknown device '{name}', expected wgpu or wgpu:N; `tenpak devices` lists them"))
}

impl Backend for Wgpu {
    fn name(&self) -> &'static str {
        "wgpu"
    }

    fn load<'a>(&self, weights: &Weights<'a>) -> Result<Box<dyn Matrix + 'a>> {
        Ok(Box::new(self.upload(weights)?))
    }
}
