//! Compiled kernels on disk, where the driver gives them out: compiling them again takes longer than most products.
//!
//! The driver checks by itself that data are of its own version, so that a wrong file costs no more than compiling.

#![expect(unsafe_code, reason = "the driver trusts data of its own, and wgpu says so")]

use std::path::{Path, PathBuf};

use wgpu::{AdapterInfo, PipelineCache, PipelineCacheDescriptor};

use crate::gemm::kept::{DIGEST, read, write};

/// Kernels of one device on disk.
#[derive(Debug)]
pub(super) struct Store {
    cache: PipelineCache,
    path: PathBuf,
    /// Digest of what the file holds.
    held: std::sync::Mutex<Option<[u8; DIGEST]>>,
}

impl Store {
    /// The kernels of a device in a folder; nothing where the device keeps none.
    pub fn open(device: &wgpu::Device, info: &AdapterInfo, folder: &Path) -> Option<Self> {
        let key = wgpu::util::pipeline_cache_key(info)?;
        // Drivers of several versions may take turns.
        let version = blake3::hash(format!("{} {} {}", info.name, info.driver, info.driver_info).as_bytes());
        let path = folder.join(format!("{key}_{}", &version.to_hex()[..16]));
        let (held, data) = read(&path).unzip();
        let descriptor = PipelineCacheDescriptor { label: Some("tenpak"), data: data.as_deref(), fallback: true };
        // SAFETY: the digest says that the data are what `save` wrote, which came from `PipelineCache::get_data`.
        let cache = unsafe { device.create_pipeline_cache(&descriptor) };
        Some(Self { cache, path, held: held.into() })
    }

    /// What pipelines are compiled with.
    pub fn cache(&self) -> &PipelineCache {
        &self.cache
    }

    /// Takes notice of a new kernel: they are written when there are 1, 2, 4, 8 … of them, and the rest at the end.
    pub fn note(&self, kernels: usize) {
        if kernels.is_power_of_two() {
            self.save();
        }
    }

    /// Writes what the file does not hold yet. Where that is not possible, kernels are compiled again next time.
    fn save(&self) {
        let Some(data) = self.cache.get_data() else { return };
        let digest = *blake3::hash(&data).as_bytes();
        let mut held = self.held.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if *held != Some(digest) && write(&self.path, &digest, &data).is_ok() {
            *held = Some(digest);
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.save();
    }
}
