//! The devices that are tested, the layouts, and what products may be.

use std::sync::OnceLock;

use tenpak::gemm::cpu::reference;
use tenpak::gemm::wgpu::{MatrixUnits, Options, Wgpu};
use tenpak::gemm::{Act, Matrix};
use tenpak::layout::{Layout, ROW};

use crate::matrices::{Owned, assert_within, layouts};

/// The default device with other options than the usual ones; kernels are not kept on disk.
pub fn open(options: Options) -> Wgpu {
    Wgpu::with(None, Options { pipelines: None, ..options }).unwrap_or_else(|e| panic!("{e}"))
}

/// The device with all that it has.
pub fn by_subgroups() -> &'static Wgpu {
    static DEVICE: OnceLock<Wgpu> = OnceLock::new();
    DEVICE.get_or_init(|| open(Options::default()))
}

/// The device as if it had neither subgroups nor halves.
pub fn by_workgroups() -> &'static Wgpu {
    static DEVICE: OnceLock<Wgpu> = OnceLock::new();
    DEVICE.get_or_init(|| open(Options { subgroups: false, half: false, ..Options::default() }))
}

/// The device as if it had matrix units of a size: loops in their place.
pub fn by_units(size: u32) -> &'static Wgpu {
    static DEVICES: [OnceLock<Wgpu>; 2] = [OnceLock::new(), OnceLock::new()];
    let units = MatrixUnits::Emulated(size);
    DEVICES[usize::from(size == 16)].get_or_init(|| open(Options { units, ..Options::default() }))
}

/// Both, with what they are there for.
pub fn paths() -> [(&'static str, &'static Wgpu); 2] {
    [("subgroups", by_subgroups()), ("workgroup memory", by_workgroups())]
}

/// One layout of each kind: kernels are compiled for every group size, but differ in nothing else.
pub fn kinds() -> Vec<Layout> {
    let mut kinds: Vec<Layout> = Vec::new();
    let kind = |layout: &Layout| {
        let Layout::Grouped(g) = layout else { panic!("a layout with codes") };
        (g.bits(), std::mem::discriminant(&g.levels()), g.scale(), g.offset(), g.group() == ROW, g.group() % 8)
    };
    for layout in layouts() {
        if kinds.iter().all(|other| kind(other) != kind(&layout)) {
            kinds.push(layout);
        }
    }
    kinds
}

/// What results may be: the exact ones, and how far each may be off.
pub struct Expected {
    pub results: Vec<f32>,
    pub bounds: Vec<f64>,
}

impl Expected {
    /// Those of a product whose activations are rounded as `act` says.
    pub fn new(owned: &Owned, x: &[f32], m: usize, act: Act) -> Self {
        let x = reference::round_activations(act, x, owned.cols);
        let mut results = vec![0.0; m * owned.rows];
        reference::multiply(&owned.weights(), &x, m, Act::F32, &mut results);
        let mut bounds = Vec::new();
        let k = owned.cols as f64;
        for i in 0..m {
            let x = &x[i * owned.cols..][..owned.cols];
            let greatest = x.iter().fold(0.0, |max: f64, x| max.max(f64::from(x.abs())));
            for n in 0..owned.rows {
                let (magnitude, scale) = owned.magnitude(n, x);
                // Subnormal numbers may count as zero, wherever they come up.
                let lost = k * f64::from(f32::MIN_POSITIVE) * (1.0 + scale + greatest);
                let halves = match act {
                    Act::F16 => {
                        magnitude / 1024.0 + x.iter().map(|x| f64::from(x.abs())).sum::<f64>() / f64::from(1 << 24)
                    }
                    _ => 0.0,
                };
                bounds.push((k + 4.0) * f64::from(f32::EPSILON) * magnitude + halves + lost);
            }
        }
        Self { results, bounds }
    }

    /// Refuses results that are further off.
    pub fn check(&self, got: &[f32], what: &dyn Fn() -> String) {
        assert_within(got, &self.results, &self.bounds, what);
    }
}

/// A product whose results would be NaN if nothing wrote them.
pub fn product(matrix: &dyn Matrix, rows: usize, x: &[f32], m: usize, act: Act) -> Vec<f32> {
    let mut y = vec![f32::NAN; m * rows];
    matrix.multiply(x, m, act, &mut y).unwrap_or_else(|e| panic!("{e}"));
    y
}

/// Checks products with each of these numbers of rows of activations.
pub fn check(path: &str, device: &Wgpu, owned: &Owned, seed: u64, x: &[f32], ms: &[usize], act: Act) {
    let expected = Expected::new(owned, x, ms.iter().copied().max().unwrap(), act);
    let weights = owned.weights();
    let matrix = device.upload(&weights).unwrap_or_else(|e| panic!("{e}"));
    for &m in ms {
        let got = product(&matrix, owned.rows, &x[..m * owned.cols], m, act);
        expected.check(&got, &|| {
            let (layout, rows, cols) = (owned.layout, owned.rows, owned.cols);
            format!("TENPAK_SEED={seed}: {layout:?} by {path}, {act:?} at m={m} n={rows} k={cols}")
        });
    }
}
