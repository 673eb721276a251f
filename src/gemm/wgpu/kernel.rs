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
use crate::error::Result;
use crate::layout::{Grouped, Layout};

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
}

impl Kernel {
    /// The kernel for products with `m` rows of activations.
    pub fn of(m: usize) -> Self {
        match m {
            0 | 1 => Self::Few(1),
            2..=4 => Self::Few(4),
            5..=FEW => Self::Few(8),
            _ => Self::Many,
        }
    }
}

/// What tells one pipeline from another.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    kernel: Kernel,
    half: bool,
    constants: Vec<(&'static str, u32)>,
}

/// The text of a shader, and whether halves are f16.
type Text = (&'static [&'static str], bool);

/// The kernels of a device.
#[derive(Debug)]
pub(super) struct Kernels {
    matrix: BindGroupLayout,
    call: BindGroupLayout,
    layout: PipelineLayout,
    /// The greatest number of threads of a subgroup, where kernels may use subgroups.
    subgroup: Option<u32>,
    modules: Mutex<HashMap<Text, ShaderModule>>,
    pipelines: Mutex<HashMap<Key, Arc<ComputePipeline>>>,
    store: Option<Store>,
}

const WEIGHTS: &str = include_str!("shaders/weights.wgsl");
const DECODE: &[&str] = &[include_str!("shaders/decode.wgsl")];
const MANY: &[&str] = &[include_str!("shaders/gemm.wgsl")];
const FEW_BY_SUBGROUP: &[&str] = &[include_str!("shaders/gemv.wgsl"), include_str!("shaders/reduce_subgroup.wgsl")];
const FEW_BY_WORKGROUP: &[&str] = &[include_str!("shaders/gemv.wgsl"), include_str!("shaders/reduce_workgroup.wgsl")];

impl Kernels {
    pub fn new(device: &wgpu::Device, subgroup: Option<u32>, store: Option<Store>) -> Self {
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
        let layout = device.create_pipeline_layout(&PipelineLayoutDescriptor {
            label: Some("products"),
            bind_group_layouts: &[Some(&matrix), Some(&call)],
            immediate_size: 0,
        });
        let (modules, pipelines) = (Mutex::default(), Mutex::default());
        Self { matrix, call, layout, subgroup, modules, pipelines, store }
    }

    /// The bindings of a matrix.
    pub fn matrix(&self) -> &BindGroupLayout {
        &self.matrix
    }

    /// The bindings of a call.
    pub fn call(&self) -> &BindGroupLayout {
        &self.call
    }

    /// Threads that share a pair of rows: a multiple of every number that a subgroup may have.
    fn lanes(&self) -> u32 {
        self.subgroup.unwrap_or(LANES).clamp(LANES, THREADS)
    }

    /// Workgroups that a kernel needs for a part of a matrix, along each dimension.
    pub fn workgroups(&self, kernel: Kernel, rows: usize, quads: usize, m: usize) -> [u32; 3] {
        let number = match kernel {
            Kernel::Decode => (m * quads).div_ceil(64),
            Kernel::Few(_) => rows.div_ceil(2).div_ceil((THREADS / self.lanes()) as usize),
            Kernel::Many => return [count(rows.div_ceil(64)), count(m.div_ceil(32)), 1],
        };
        let number = count(number);
        [number.min(WORKGROUPS), number.div_ceil(WORKGROUPS), 1]
    }

    /// The pipeline of a kernel for a layout.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the driver cannot compile it.
    pub fn pipeline(
        &self,
        device: &Device,
        kernel: Kernel,
        half: bool,
        layout: &Grouped,
    ) -> Result<Arc<ComputePipeline>> {
        let mut constants = Layout::Grouped(*layout).constants();
        if let Kernel::Few(tile) = kernel {
            constants.extend([("M_TILE", tile), ("LANES", self.lanes())]);
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
                layout: Some(&self.layout),
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
        let text = match kernel {
            Kernel::Decode => DECODE,
            Kernel::Few(_) if self.subgroup.is_some() => FEW_BY_SUBGROUP,
            Kernel::Few(_) => FEW_BY_WORKGROUP,
            Kernel::Many => MANY,
        };
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        let make = || {
            let head = if half { "enable f16;\nalias half = f16;\n" } else { "alias half = f32;\n" };
            let source = [&[head, WEIGHTS], text].concat().concat();
            device.raw().create_shader_module(ShaderModuleDescriptor {
                label: Some("product"),
                source: ShaderSource::Wgsl(source.into()),
            })
        };
        modules.entry((text, half)).or_insert_with(make).clone()
    }
}

/// A number of workgroups; those of any part of a matrix fit.
fn count(number: usize) -> u32 {
    u32::try_from(number).expect("bindings are less than 2^31 bytes")
}
