//! What can multiply on this machine.

use serde::Serialize;

use crate::gemm::cpu;

/// `tenpak.devices/1`
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct Devices {
    pub schema: &'static str,
    pub cpu: Cpu,
    /// Nothing in a build that knows no graphics devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wgpu: Option<Vec<Adapter>>,
    /// Nothing in a build that knows no devices of NVIDIA's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cuda: Option<Cuda>,
}

/// NVIDIA's devices, and what is missing to multiply on them.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct Cuda {
    pub devices: Vec<CudaDevice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compiler: Option<String>,
    pub missing: Vec<String>,
}

/// A device of NVIDIA's.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct CudaDevice {
    pub device: String,
    pub name: String,
    pub capability: String,
    pub multiprocessors: usize,
    pub memory_bytes: u64,
    pub shared_bytes: u64,
}

/// The instruction sets for each arithmetic of products, the best one last.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct Cpu {
    pub threads: usize,
    pub float32: Vec<&'static str>,
    pub bfloat16: Vec<&'static str>,
    pub int8: Vec<&'static str>,
}

/// A graphics device.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "the schema documents the fields")]
pub struct Adapter {
    pub device: String,
    pub name: String,
    pub kind: &'static str,
    pub backend: &'static str,
    pub driver: String,
    pub float16: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subgroup_sizes: Option<[u32; 2]>,
    pub pipeline_cache: bool,
    pub binding_bytes: u64,
    pub workgroup_bytes: u32,
}

impl Devices {
    /// What there is, found by asking all drivers.
    #[must_use]
    pub fn new() -> Self {
        #[cfg(target_arch = "x86_64")]
        let bfloat16 = cpu::bf16::isa::available().into_iter().map(cpu::bf16::isa::Isa::name).collect();
        #[cfg(not(target_arch = "x86_64"))]
        let bfloat16 = Vec::new();
        let cpu = Cpu {
            threads: rayon::current_num_threads(),
            float32: cpu::float::isa::available().into_iter().map(cpu::float::isa::Isa::name).collect(),
            bfloat16,
            int8: cpu::int8::isa::available().into_iter().map(cpu::int8::isa::Isa::name).collect(),
        };
        #[cfg(feature = "wgpu")]
        let wgpu = Some(crate::gemm::wgpu::adapters().into_iter().map(Adapter::from).collect());
        #[cfg(not(feature = "wgpu"))]
        let wgpu = None;
        #[cfg(feature = "cuda")]
        let cuda = Some(Cuda::new());
        #[cfg(not(feature = "cuda"))]
        let cuda = None;
        Self { schema: "tenpak.devices/1", cpu, wgpu, cuda }
    }
}

impl Default for Devices {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(feature = "wgpu")]
impl From<crate::gemm::wgpu::Adapter> for Adapter {
    fn from(adapter: crate::gemm::wgpu::Adapter) -> Self {
        Self {
            device: format!("wgpu:{}", adapter.index),
            name: adapter.name,
            kind: adapter.kind,
            backend: adapter.backend,
            driver: adapter.driver,
            float16: adapter.f16,
            subgroup_sizes: adapter.subgroups.map(|(least, most)| [least, most]),
            pipeline_cache: adapter.pipeline_cache,
            binding_bytes: adapter.binding_bytes,
            workgroup_bytes: adapter.workgroup_bytes,
        }
    }
}

#[cfg(feature = "cuda")]
impl Cuda {
    fn new() -> Self {
        use crate::gemm::cuda;
        let mut missing = Vec::new();
        let mut found = |error: crate::Error| missing.push(error.to_string());
        let devices = cuda::devices().map_err(&mut found).unwrap_or_default();
        let compiler = cuda::nvrtc::version().map_err(&mut found).ok();
        let devices = devices.into_iter().map(|device| CudaDevice {
            device: format!("cuda:{}", device.index),
            name: device.name,
            capability: format!("{}.{}", device.capability.0, device.capability.1),
            multiprocessors: device.multiprocessors,
            memory_bytes: device.memory_bytes,
            shared_bytes: device.shared_bytes as u64,
        });
        let compiler = compiler.map(|(major, minor)| format!("NVRTC {major}.{minor}"));
        Self { devices: devices.collect(), compiler, missing }
    }
}
