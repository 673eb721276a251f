//! Kernels: shaders specialised by the constants of a layout, compiled when first needed and then kept.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use wgpu::{
    BindGroupLayout, BindGroupLayoutDescriptor, BindGroupLayoutEntry, BindingType, BufferBindingType, ComputePipeline,
    ComputePipelineDescriptor, PipelineCompilationOptions, PipelineLayout, PipelineLayoutDescriptor, ShaderModule,
    ShaderModuleDescriptor, ShaderSource, ShaderStages,
};

use super::adapter::WORKGROUPS;
use super::device::Device;
use super::store::Store;
use super::units::{self, Units};
use crate::error::Result;

/// Most rows of activations for which every weight is read once.
pub(super) const FEW: usize = 8;

/// Threads of a workgroup of [`Kernel::Few`].
const THREADS: u32 = 256;
/// Least number of threads that share a pair of rows there.
const LANES: u32 = 32;

/// A kernel, as far as its text and its shape go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kernel {
    /// Weights as f32.
    Decode,
    /// Products with so many rows of activations at most: 1, 4 or 8.
    Few(u32),
    /// Products with any number of rows.
    Many,
    /// The same on matrix units of a size, or on loops in their place.
    Units { size: u32, native: bool },
    /// Attention, so many queries at once: 1, 4 or 8.
    Attend(u32),
    /// One result of those of several runs of attention.
    Merge,
}

/// What tells one pipeline from another.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    kernel: Kernel,
    half: bool,
    constants: Vec<(&'static str, u32)>,
}

/// The kernels of a device.
#[derive(Debug)]
pub(super) struct Kernels {
    matrix: BindGroupLayout,
    call: BindGroupLayout,
    cache: BindGroupLayout,
    products: PipelineLayout,
    attention: PipelineLayout,
    /// The greatest number of threads of a subgroup, where kernels may use subgroups.
    subgroup: Option<u32>,
    units: Units,
    /// By their text.
    modules: Mutex<HashMap<String, ShaderModule>>,
    pipelines: Mutex<HashMap<Key, Arc<ComputePipeline>>>,
    store: Option<Store>,
}

const WEIGHTS: &str = include_str!("shaders/weights.wgsl");
const DECODE: &str = include_str!("shaders/decode.wgsl");
const QUADS: &str = include_str!("shaders/quads.wgsl");
const MANY: &str = include_str!("shaders/gemm.wgsl");
const GEMV: &str = include_str!("shaders/gemv.wgsl");
const GEMV_BY: [&str; 2] =
    [include_str!("shaders/reduce_workgroup.wgsl"), include_str!("shaders/reduce_subgroup.wgsl")];
const CACHE: &str = include_str!("shaders/attention.wgsl");
const ATTEND: &str = include_str!("shaders/attend.wgsl");
const ATTEND_BY: [&str; 2] =
    [include_str!("shaders/attend_workgroup.wgsl"), include_str!("shaders/attend_subgroup.wgsl")];
const MERGE: &str = include_str!("shaders/attention_merge.wgsl");

impl Kernels {
    pub fn new(device: &wgpu::Device, subgroup: Option<u32>, units: Units, store: Option<Store>) -> Self {
        let buffer = |binding, ty| BindGroupLayoutEntry {
            binding,
            visibility: ShaderStages::COMPUTE,
            ty: BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
            count: None,
        };
        let (read, write) =
            (BufferBindingType::Storage { read_only: true }, BufferBindingType::Storage { read_only: false });
        let planes = (0..6).map(|binding| buffer(binding, read));
        let of_matrix: Vec<_> = planes.chain([buffer(6, BufferBindingType::Uniform)]).collect();
        let of_call = [buffer(0, read), buffer(1, write), buffer(2, BufferBindingType::Uniform)];
        let bindings = |label, entries: &[_]| {
            device.create_bind_group_layout(&BindGroupLayoutDescriptor { label: Some(label), entries })
        };
        let (matrix, call) = (bindings("matrix", &of_matrix), bindings("call", &of_call));
        let cache = bindings("cache", &of_matrix[..6]);
        let pipelines = |label, first: &BindGroupLayout| {
            device.create_pipeline_layout(&PipelineLayoutDescriptor {
                label: Some(label),
                bind_group_layouts: &[Some(first), Some(&call)],
                immediate_size: 0,
            })
        };
        let (products, attention) = (pipelines("products", &matrix), pipelines("attention", &cache));
        let (modules, pipelines) = (Mutex::default(), Mutex::default());
        Self { matrix, call, cache, products, attention, subgroup, units, modules, pipelines, store }
    }

    /// The bindings of a matrix.
    pub fn matrix(&self) -> &BindGroupLayout {
        &self.matrix
    }

    /// The bindings of a call.
    pub fn call(&self) -> &BindGroupLayout {
        &self.call
    }

    /// The bindings of a cache of keys and values.
    pub fn cache(&self) -> &BindGroupLayout {
        &self.cache
    }

    /// The kernel for products with `m` rows of activations, as halves or not.
    pub fn product(&self, m: usize, half: bool) -> Kernel {
        match m {
            0 | 1 => Kernel::Few(1),
            2..=4 => Kernel::Few(4),
            5..=FEW => Kernel::Few(8),
            _ => match self.units.size(half) {
                Some(size) => Kernel::Units { size, native: self.units.native },
                None => Kernel::Many,
            },
        }
    }

    /// Threads that share a pair of rows: a multiple of every number that a subgroup may have.
    fn lanes(&self) -> u32 {
        self.subgroup.unwrap_or(LANES).clamp(LANES, THREADS)
    }

    /// Workgroups that a kernel needs for a part of a matrix, along each dimension; for attention `rows` are heads of keys
    /// and values, `quads` runs of tokens, and `m` queries of a head, or of all heads where runs are merged.
    pub fn workgroups(&self, kernel: Kernel, rows: usize, quads: usize, m: usize) -> [u32; 3] {
        let number = match kernel {
            Kernel::Decode => (m * quads).div_ceil(64),
            Kernel::Few(_) => rows.div_ceil(2).div_ceil((THREADS / self.lanes()) as usize),
            Kernel::Many | Kernel::Units { .. } => return [count(rows.div_ceil(64)), count(m.div_ceil(32)), 1],
            Kernel::Attend(tile) => return [count(quads), count(m.div_ceil(tile as usize)), count(rows)],
            Kernel::Merge => m,
        };
        let number = count(number);
        [number.min(WORKGROUPS), number.div_ceil(WORKGROUPS), 1]
    }

    /// The pipeline of a kernel for a layout, or the format of a cache, that has these constants.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the driver cannot compile it.
    pub fn pipeline(
        &self,
        device: &Device,
        kernel: Kernel,
        half: bool,
        mut constants: Vec<(&'static str, u32)>,
    ) -> Result<Arc<ComputePipeline>> {
        match kernel {
            Kernel::Few(tile) => constants.extend([("M_TILE", tile), ("LANES", self.lanes())]),
            Kernel::Attend(tile) => constants.push(("ROWS", tile)),
            Kernel::Decode | Kernel::Many | Kernel::Units { .. } | Kernel::Merge => {}
        }
        let key = Key { kernel, half, constants };
        // Who needs the same one meanwhile waits, which is shorter than to compile it as well.
        let mut pipelines = self.pipelines.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = pipelines.get(&key) {
            return Ok(Arc::clone(found));
        }
        let made = device.watched("a kernel", 0, || {
            let module = self.module(device, kernel, half);
            let constants: Vec<_> = key.constants.iter().map(|&(name, value)| (name, f64::from(value))).collect();
            Ok(device.raw().create_compute_pipeline(&ComputePipelineDescriptor {
                label: Some("product"),
                layout: Some(match kernel {
                    Kernel::Attend(_) | Kernel::Merge => &self.attention,
                    Kernel::Decode | Kernel::Few(_) | Kernel::Many | Kernel::Units { .. } => &self.products,
                }),
                module: &module,
                entry_point: Some("main"),
                compilation_options: PipelineCompilationOptions {
                    constants: &constants,
                    // Kernels write what they read.
                    zero_initialize_workgroup_memory: false,
                },
                cache: self.store.as_ref().map(Store::cache),
            }))
        })?;
        let made = Arc::new(made);
        pipelines.insert(key, Arc::clone(&made));
        if let Some(store) = &self.store {
            store.note(pipelines.len());
        }
        Ok(made)
    }

    fn module(&self, device: &Device, kernel: Kernel, half: bool) -> ShaderModule {
        let source = source(kernel, half, self.subgroup.is_some());
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = modules.get(&source) {
            return found.clone();
        }
        let module = device.raw().create_shader_module(ShaderModuleDescriptor {
            label: Some("product"),
            source: ShaderSource::Wgsl(source.as_str().into()),
        });
        modules.insert(source, module.clone());
        module
    }
}

/// The text of a kernel.
pub(super) fn source(kernel: Kernel, half: bool, subgroups: bool) -> String {
    let by = usize::from(subgroups);
    let native = matches!(kernel, Kernel::Units { native: true, .. });
    let units = if native { "enable wgpu_cooperative_matrix;\n" } else { "" };
    let half = if half { "enable f16;\nalias half = f16;\n" } else { "alias half = f32;\n" };
    let text = match kernel {
        Kernel::Decode => vec![WEIGHTS, DECODE],
        Kernel::Few(_) => vec![WEIGHTS, GEMV, GEMV_BY[by]],
        Kernel::Many => vec![WEIGHTS, QUADS, MANY],
        Kernel::Units { size, native } => {
            return [units, half, WEIGHTS, QUADS, &units::text(size, native)].concat();
        }
        Kernel::Attend(_) => vec![CACHE, ATTEND, ATTEND_BY[by]],
        Kernel::Merge => vec![CACHE, MERGE],
    };
    [half, &text.concat()].concat()
}

/// A number of workgroups; those of any part of a matrix fit.
fn count(number: usize) -> u32 {
    u32::try_from(number).expect("bindings are less than 2^31 bytes")
}
