//! Products with 4-bit weights in groups of eight, from arrays as they come: a thin layer over [`Wgpu`].

use half::f16;

use super::Wgpu;
use crate::error::{Error, Result};
use crate::gemm::{Act, Matrix, Weights};
use crate::layout::{Float, Grouped, Layout, Levels};

/// Weights of a group.
const GROUP: usize = 8;

/// A number that scales and offsets can be: f32 or f16.
pub trait G8Number: Copy + sealed::Sealed {
    #[doc(hidden)]
    const FLOAT: Float;
    #[doc(hidden)]
    fn store(self, out: &mut Vec<u8>);
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::f16 {}
}

impl G8Number for f32 {
    const FLOAT: Float = Float::F32;

    fn store(self, out: &mut Vec<u8>) {
        out.extend(self.to_le_bytes());
    }
}

impl G8Number for f16 {
    const FLOAT: Float = Float::F16;

    fn store(self, out: &mut Vec<u8>) {
        out.extend(self.to_le_bytes());
    }
}

/// Products on a graphics device with weights of `int4_g8_v1` (F32 scales) or `int4_g8_fp16_v1` (F16 scales).
///
/// Weights are uploaded with every call. For weights that are used again, [`G8GemmContext::backend`] takes them once.
#[derive(Debug, Clone)]
pub struct G8GemmContext {
    backend: Wgpu,
}

impl G8GemmContext {
    /// Opens the fastest device.
    ///
    /// # Errors
    /// [`Error::Device`] when there is none.
    pub fn new() -> Result<Self> {
        Ok(Self { backend: Wgpu::new()? })
    }

    /// The same for asynchronous callers, with the device opened on a thread that may block.
    ///
    /// # Errors
    /// [`Error::Device`] when there is none.
    pub async fn new_async() -> Result<Self> {
        super::wait::elsewhere(Self::new).await.unwrap_or_else(|| {
            Err(Error::invalid("no thread can be started that opens a device, expected one; end some others"))
        })
    }

    /// The backend, for weights that are used more than once.
    #[must_use]
    pub fn backend(&self) -> &Wgpu {
        &self.backend
    }

    /// `y[m, n] = x[m, k] · w[n, k]ᵀ` with `w = code * scale + offset`.
    ///
    /// `w_packed` are rows of codes, two in a byte with the low one first, each row filled up to a multiple of eight codes;
    /// `scales` and `offsets` are `n` rows of one number for each eight columns, the last group of a row may be ragged.
    ///
    /// # Errors
    /// [`Error::Invalid`] when an array has the wrong length, [`Error::OutOfMemory`], [`Error::Device`].
    #[expect(clippy::too_many_arguments, reason = "the arrays and sizes of a product")]
    pub fn gemm<T: G8Number>(
        &self,
        x: &[f32],
        w_packed: &[u8],
        scales: &[T],
        offsets: &[T],
        m: usize,
        n: usize,
        k: usize,
    ) -> Result<Vec<f32>> {
        let layout = Layout::Grouped(Grouped::new(4, Levels::Unsigned, GROUP, T::FLOAT, Some(T::FLOAT)));
        let bytes = |numbers: &[T]| {
            let mut bytes = Vec::with_capacity(numbers.len() * T::FLOAT.size());
            numbers.iter().for_each(|number| number.store(&mut bytes));
            bytes
        };
        let (scales, offsets) = (bytes(scales), bytes(offsets));
        let weights = Weights::new(&layout, n, k, &[w_packed, &scales, &offsets])?;
        let results = m.checked_mul(n).ok_or_else(|| Error::invalid(format!("{m} x {n} results are too many")))?;
        if m.checked_mul(k) != Some(x.len()) {
            return Err(Error::invalid(format!("{} activations, expected {m} x {k}", x.len())));
        }
        let mut y = vec![0.0; results];
        self.backend.upload(&weights)?.multiply(x, m, Act::F32, &mut y)?;
        Ok(y)
    }
}
