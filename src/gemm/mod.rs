//! Multiplying with encoded matrices without decoding them first: `y[m, n] = x[m, k] · w[n, k]ᵀ`.
//!
//! The stored planes are the interface: a [`Backend`] takes them as they are and may rearrange them once, on load; what
//! it makes of them is a [`Matrix`], and nothing else ever sees its order. Activations and results are f32 here;
//! [`Act`] says what arithmetic a product may use.
//!
//! Levels of nested scales are bytes for every kernel, whatever the width of their codes, and a scale is what the
//! specification makes of the group's byte and the row, rounded once: so their products have the bounds of all others.
//!
//! Offsets leave the inner loop: with `x_g` the activations of a group and `q_g` its levels,
//! `y = Σ_g scale_g · (q_g · x_g) + offset_g · Σ x_g`.
//!
//! Extra planes ([`codec::extra`]) stay out of the kernels altogether: with *s* the column scales and *o* the outliers,
//! `y = base · (x ∘ s) + o · x`. Activations are scaled first, in f32, then rounded as [`Act`] says; outliers are added
//! in f32 whatever it says, with the activations as they came.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod kept;
#[cfg(feature = "wgpu")]
pub mod wgpu;

use crate::codec::extra::ExtraPlanes;
use crate::codec::{self, Encoded, Planes};
use crate::error::{Error, Result};
use crate::layout::{Grouped, Layout};

/// What arithmetic a product may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Act {
    /// f32 throughout. The error of a result is at most `(k + 4) · eps · Σ |x| · (|scale · level| + |offset|)`, where
    /// `eps` is that of f32 and a zero point counts as an offset of `scale · (c - zero_point)` to levels `q - c`, with
    /// `c` the middle of the codes; as long as no sum of `level · x` over a group leaves the range of f32. With extra
    /// planes it is `(k + 8) · eps · Σ |x| · ((|scale · level| + |offset|) · |column scale| + |outlier|)`.
    #[default]
    F32,
    /// Activations and weights rounded to bf16 and added up in f32, as a 16-bit linear layer computes: a relative error
    /// of at most 2^-8 for each product. A backend without such instructions computes in f32.
    Bf16,
    /// Activations rounded to integers: `x̂ = round(x / s) · s` with `s = max|x| / 127` over each [`ACT_BLOCK`] columns
    /// of a row; the product with `x̂` is that of [`Act::F32`]. So the error adds at most `Σ |w| · s / 2`. A number that
    /// is not finite makes all results of its row NaN.
    Int8,
    /// Activations rounded to f16, and weights as well where a backend computes with such tiles: the product with rounded
    /// activations *x̂* is that of [`Act::F32`] but for `Σ |x̂| · (2^-10 · |w| + 2^-24)`. A backend without such
    /// instructions computes in f32. Activations or weights beyond 65504 become infinite.
    F16,
}

/// Columns of a row of activations that share a scale where they are rounded to 8 bits.
pub const ACT_BLOCK: usize = 32;

impl Act {
    /// Every kind.
    pub const ALL: [Self; 4] = [Self::F32, Self::Bf16, Self::Int8, Self::F16];

    /// The name on the command line and in Python.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::Int8 => "int8",
            Self::F16 => "float16",
        }
    }
}

impl std::str::FromStr for Act {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|act| act.name() == name).ok_or_else(|| {
            Error::invalid(format!(
                "unknown arithmetic of activations '{name}', expected float32, bfloat16, float16 or int8"
            ))
        })
    }
}

/// An encoded matrix of `rows x cols` in memory of someone else; its planes have the lengths that the layout gives.
#[derive(Debug, Clone, Copy)]
pub struct Weights<'a> {
    layout: &'a Grouped,
    rows: usize,
    cols: usize,
    planes: Planes<'a>,
    extra: ExtraPlanes<'a>,
}

impl<'a> Weights<'a> {
    /// A matrix of the planes `planes`, in stored order, extra ones last.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the number or the length of the planes is not what the layout gives, or for the raw
    /// layout.
    pub fn new(layout: &'a Layout, rows: usize, cols: usize, planes: &[&'a [u8]]) -> Result<Self> {
        let Layout::Grouped(grouped) = layout else {
            return Err(Error::invalid("a raw tensor has no codes to multiply with; decode it"));
        };
        let extra = codec::check_planes(layout, rows, cols, planes)?;
        let own = Planes::new(grouped, &planes[..layout.planes().len()]);
        Ok(Self { layout: grouped, rows, cols, planes: own, extra })
    }

    /// What the planes mean.
    #[must_use]
    pub fn layout(&self) -> &'a Grouped {
        self.layout
    }

    /// Rows: outputs of the product.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns: inputs of the product.
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The codec's planes.
    #[must_use]
    pub fn planes(&self) -> &Planes<'a> {
        &self.planes
    }

    /// The extra planes.
    #[must_use]
    pub fn extra(&self) -> &ExtraPlanes<'a> {
        &self.extra
    }

    /// The matrix that the codec's planes stand for by themselves: what kernels see.
    #[must_use]
    pub fn base(&self) -> Self {
        Self { extra: ExtraPlanes::default(), ..*self }
    }

    /// Bytes of all planes: what a product with few activations reads.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let Planes { codes, high_codes, scales, addends, row_scales } = self.planes;
        let own = codes.len() + high_codes.len() + scales.len() + addends.len() + row_scales.len();
        own + self.extra.bytes()
    }

    /// Consecutive rows, a matrix of their own: one expert of a stack, or the part of a thread.
    ///
    /// # Panics
    /// When the matrix has no such rows: a bug of the caller.
    #[must_use]
    pub fn slice(&self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.rows, "rows {first}..+{count} of {}", self.rows);
        let planes = self.planes.slice(self.layout, self.cols, first, count);
        let extra = if self.extra.is_empty() { self.extra } else { self.extra.slice(first, count) };
        Self { rows: count, planes, extra, ..*self }
    }
}

impl<'a> From<&'a Encoded> for Weights<'a> {
    fn from(encoded: &'a Encoded) -> Self {
        let planes: Vec<&[u8]> = encoded.planes().map(|(_, bytes)| bytes).collect();
        Self::new(&encoded.codec().layout, encoded.rows(), encoded.cols(), &planes).expect("an encoded matrix is sound")
    }
}

/// Something that multiplies.
pub trait Backend: Send + Sync {
    /// The name on the command line and in Python.
    fn name(&self) -> &'static str;

    /// Takes a matrix, rearranged or uploaded if the backend wants it so.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] when there is no room.
    fn load<'a>(&self, weights: &Weights<'a>) -> Result<Box<dyn Matrix + 'a>>;
}

/// A matrix that a backend has taken.
pub trait Matrix: Send + Sync {
    /// `y[m, n] = x[m, k] · w[n, k]ᵀ` for `m` rows of activations; overwrites `y`.
    ///
    /// # Errors
    /// [`Error::Invalid`] when `x` is not `m * k` or `y` not `m * n` numbers.
    fn multiply(&self, x: &[f32], m: usize, act: Act, y: &mut [f32]) -> Result<()>;

    /// The weights as this backend understands them, so that a wrong decoding and a wrong product are told apart.
    ///
    /// # Errors
    /// [`Error::Invalid`] when `out` is not `n * k` numbers.
    fn decode(&self, out: &mut [f32]) -> Result<()>;
}

/// The backends of this build that work on this machine.
#[must_use]
pub fn available() -> Vec<Box<dyn Backend>> {
    let cpu: Box<dyn Backend> = Box::new(cpu::Cpu);
    #[cfg(feature = "wgpu")]
    let wgpu = wgpu::Wgpu::new().ok().map(|device| Box::new(device) as Box<dyn Backend>);
    #[cfg(not(feature = "wgpu"))]
    let wgpu = None;
    #[cfg(feature = "cuda")]
    let cuda = cuda::Cuda::new(0).ok().map(|device| Box::new(device) as Box<dyn Backend>);
    #[cfg(not(feature = "cuda"))]
    let cuda = None;
    std::iter::once(cpu).chain(wgpu).chain(cuda).collect()
}

/// The backend that a name means: `cpu`, `wgpu` and `wgpu:N` for a graphics device, `cuda` and `cuda:N` for one of NVIDIA's.
///
/// # Errors
/// [`Error::Invalid`] for a name that no build knows, [`Error::Unsupported`] for one that this build does not know, and
/// [`Error::Device`] when there is no such device.
pub fn backend(name: &str) -> Result<Box<dyn Backend>> {
    match name.split(':').next() {
        Some("cpu") if name == "cpu" => Ok(Box::new(cpu::Cpu)),
        #[cfg(feature = "wgpu")]
        Some("wgpu") => Ok(Box::new(wgpu::Wgpu::named(name)?)),
        #[cfg(not(feature = "wgpu"))]
        Some("wgpu") => Err(Error::unsupported(format!(
            "device '{name}' is a graphics device, which this build does not know; build it with `--features wgpu`"
        ))),
        #[cfg(feature = "cuda")]
        Some("cuda") => Ok(Box::new(cuda::Cuda::named(name)?)),
        #[cfg(not(feature = "cuda"))]
        Some("cuda") => Err(Error::unsupported(format!(
            "device '{name}' is one of NVIDIA's, which this build does not know; build it with `--features cuda`"
        ))),
        _ => Err(Error::invalid(format!("unknown device '{name}', expected cpu, wgpu, wgpu:N, cuda or cuda:N"))),
    }
}

/// Refuses activations or results of the wrong size.
pub(crate) fn check_sizes(weights: &Weights<'_>, x: usize, m: usize, y: usize) -> Result<()> {
    let expected = |n: usize| m.checked_mul(n);
    if expected(weights.cols) != Some(x) || expected(weights.rows) != Some(y) {
        return Err(Error::invalid(format!(
            "{x} activations and {y} results for {m} rows with a {} x {} matrix, expected {m} x {} and {m} x {}",
            weights.rows, weights.cols, weights.cols, weights.rows
        )));
    }
    Ok(())
}
