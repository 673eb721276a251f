//! Adapters: what graphics devices there are, and which one a name means.

use wgpu::{Backends, DeviceType, Features, InstanceDescriptor};

use super::wait::block_on;
use crate::error::{DeviceError, Error, Result};

/// What kernels need of any adapter; the least that WebGPU promises is as much.
const THREADS: u32 = 256;
const WORKGROUP_BYTES: u32 = 16 << 10;
const STORAGE_BUFFERS: u32 = 8;
pub(super) const WORKGROUPS: u32 = 65_535;

/// A graphics device of this machine, as its driver describes it.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Adapter {
    /// The N of `wgpu:N`.
    pub index: usize,
    /// The name that the driver gives it.
    pub name: String,
    /// What it is: `discrete`, `integrated`, `virtual`, `cpu` or `other`.
    pub kind: &'static str,
    /// The interface that it is reached by: `vulkan`, `metal` or `dx12`.
    pub backend: &'static str,
    /// Name and version of the driver.
    pub driver: String,
    /// Whether shaders compute with halves.
    pub f16: bool,
    /// The least and the greatest number of threads of a subgroup; nothing where shaders cannot use them.
    pub subgroups: Option<(u32, u32)>,
    /// Whether compiled kernels can be kept on disk.
    pub pipeline_cache: bool,
    /// The largest part of a buffer that a kernel sees, in bytes; larger matrices are divided.
    pub binding_bytes: u64,
    /// Memory that the threads of a workgroup share, in bytes.
    pub workgroup_bytes: u32,
}

impl Adapter {
    fn new(index: usize, adapter: &wgpu::Adapter) -> Self {
        let (info, features, limits) = (adapter.get_info(), adapter.features(), adapter.limits());
        let kind = match info.device_type {
            DeviceType::DiscreteGpu => "discrete",
            DeviceType::IntegratedGpu => "integrated",
            DeviceType::VirtualGpu => "virtual",
            DeviceType::Cpu => "cpu",
            DeviceType::Other => "other",
        };
        Self {
            index,
            name: info.name,
            kind,
            backend: info.backend.to_str(),
            driver: [info.driver, info.driver_info].join(" ").trim().to_owned(),
            f16: features.contains(Features::SHADER_F16),
            subgroups: features
                .contains(Features::SUBGROUP)
                .then_some((info.subgroup_min_size, info.subgroup_max_size)),
            pipeline_cache: features.contains(Features::PIPELINE_CACHE),
            binding_bytes: limits.max_storage_buffer_binding_size,
            workgroup_bytes: limits.max_compute_workgroup_storage_size,
        }
    }

    /// How willingly it is taken where none is asked for.
    fn rank(&self) -> u8 {
        match self.kind {
            "discrete" => 4,
            "integrated" => 3,
            "virtual" => 2,
            "other" => 1,
            _ => 0,
        }
    }
}

/// The adapters of this machine, in the order of `wgpu:N`.
#[must_use]
pub fn adapters() -> Vec<Adapter> {
    enumerate().iter().enumerate().map(|(index, adapter)| Adapter::new(index, adapter)).collect()
}

fn enumerate() -> Vec<wgpu::Adapter> {
    let mut descriptor = InstanceDescriptor::new_without_display_handle();
    descriptor.backends = Backends::VULKAN | Backends::METAL | Backends::DX12;
    // No layers of the drivers' developers: wgpu itself checks calls before they reach a driver.
    descriptor.flags = wgpu::InstanceFlags::empty();
    block_on(wgpu::Instance::new(descriptor).enumerate_adapters(Backends::all()))
}

/// The adapter with a number, or the one that is most likely to be fast.
///
/// # Errors
/// [`DeviceError::NotFound`] when there is none, or it cannot run the kernels.
pub(super) fn choose(index: Option<usize>) -> Result<(wgpu::Adapter, Adapter)> {
    let mut found: Vec<_> =
        enumerate().into_iter().enumerate().map(|(i, adapter)| (Adapter::new(i, &adapter), adapter)).collect();
    let not_found = |what: String| Error::Device(DeviceError::NotFound(what));
    if found.is_empty() {
        return Err(not_found(
            "no graphics device was found, expected one of Vulkan, Metal or Direct3D 12; install its Vulkan driver, or \
             a software one such as Debian's mesa-vulkan-drivers"
                .to_owned(),
        ));
    }
    let at = match index {
        // The first of the best.
        None => (0..found.len()).rev().max_by_key(|&i| found[i].0.rank()).unwrap_or(0),
        Some(index) if index < found.len() => index,
        Some(index) => {
            let names: Vec<_> =
                found.iter().map(|(a, _)| format!("wgpu:{} ({}, {})", a.index, a.name, a.backend)).collect();
            return Err(not_found(format!("there is no device wgpu:{index}, expected {}", names.join(" or "))));
        }
    };
    let (described, adapter) = found.swap_remove(at);
    let limits = adapter.limits();
    let needs = [
        ("threads of a workgroup", limits.max_compute_invocations_per_workgroup, THREADS),
        ("bytes of workgroup memory", limits.max_compute_workgroup_storage_size, WORKGROUP_BYTES),
        ("storage buffers", limits.max_storage_buffers_per_shader_stage, STORAGE_BUFFERS),
        ("workgroups of a dispatch", limits.max_compute_workgroups_per_dimension, WORKGROUPS),
    ];
    if let Some((what, has, needed)) = needs.iter().find(|(_, has, needed)| has < needed) {
        let name = &described.name;
        return Err(not_found(format!("device '{name}' has {has} {what}, expected at least {needed}; choose another")));
    }
    Ok((adapter, described))
}
