//! Products for those who hold their own memory and streams on a device, PyTorch above all.

#![expect(unsafe_code, reason = "kernels read and write the addresses that they are given")]

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::device::{Device, ReadyProduct};
use super::driver::Address;
pub use super::launch::Extra;
use super::launch::{Operands, Planes};
use super::plan::Problem;
use crate::codecs;
use crate::error::{Error, Result};
use crate::tensor::DType;

/// Most plans that are remembered.
const PLANS: usize = 4096;

/// Codec, rows, columns, experts, rows of activations, their type; whether exact, whether aligned, whether with outliers.
type Key = (&'static str, [usize; 4], DType, [bool; 3]);

/// What a call is about: a matrix, or a stack of `experts` of them, and where its planes are.
#[derive(Debug, Clone)]
pub struct Arguments<'a> {
    /// Id of the codec.
    pub codec: &'a str,
    /// Rows of the stack.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Matrices of the stack.
    pub experts: usize,
    /// Addresses of the codec's planes, in stored order.
    pub planes: &'a [Address],
    /// Addresses of the planes beside them.
    pub extra: Extra,
}

/// A device for those who hold their own memory.
#[derive(Debug)]
pub struct Raw {
    device: Device,
    plans: Mutex<HashMap<Key, Arc<ReadyProduct>>>,
}

/// A product that is ready to be launched.
#[derive(Debug, Clone)]
pub struct Launchable {
    ready: Arc<ReadyProduct>,
    problem: Problem,
    planes: Planes,
    extra: Extra,
}

impl Launchable {
    /// Bytes of memory that the launch needs beside operands.
    #[must_use]
    pub fn workspace_bytes(&self) -> usize {
        self.ready.plan.workspace.bytes
    }
}

impl Raw {
    /// Opens a device.
    ///
    /// # Errors
    /// As [`Device::open`].
    pub fn open(index: usize) -> Result<Self> {
        Ok(Self { device: Device::open(index)?, plans: Mutex::default() })
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Chooses and compiles the kernels of a product of `m` rows of activations at an address; what was chosen once is
    /// found again.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a call that does not fit together, [`Error::Unsupported`], [`Error::Device`].
    pub fn product(&self, of: &Arguments<'_>, m: usize, numbers: DType, exact: bool, x: Address) -> Result<Launchable> {
        let codec = codecs::get(of.codec)?;
        let layout = *codec.grouped()?;
        if of.experts == 0 || !of.rows.is_multiple_of(of.experts) {
            return Err(Error::invalid(format!("a stack of {} rows for {} experts", of.rows, of.experts)));
        }
        let planes = Planes::new(&layout, of.rows, of.cols, of.planes)?;
        let aligned = planes.is_aligned() && x.is_multiple_of(16);
        let rows = of.rows / of.experts;
        let outliers = of.extra.counts != 0;
        let problem =
            Problem { layout, rows, cols: of.cols, experts: of.experts, m, numbers, exact, aligned, outliers };
        let key = (codec.id, [rows, of.cols, of.experts, m], numbers, [exact, aligned, outliers]);
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let ready = if let Some(found) = plans.get(&key) {
            Arc::clone(found)
        } else {
            let fresh = Arc::new(self.device.ready(&problem)?);
            if plans.len() >= PLANS {
                plans.clear();
            }
            plans.insert(key, Arc::clone(&fresh));
            fresh
        };
        Ok(Launchable { ready, problem, planes, extra: of.extra })
    }

    /// Launches a product on a stream.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Safety
    /// All addresses are of this device and of memory as long as the product makes it, `ends` null or of as many I32 as
    /// there are experts; the stream is one of this device, and nobody writes to the memory until it has come past.
    pub unsafe fn launch(
        &self,
        product: &Launchable,
        x: Address,
        ends: Address,
        y: Address,
        workspace: Address,
        stream: Address,
    ) -> Result<()> {
        let Launchable { ready, problem, planes, extra } = product;
        let operands = Operands { planes: *planes, extra: *extra, ends, x, y, workspace };
        // SAFETY: the caller vouches for the addresses.
        unsafe { self.device.multiply(ready, problem, &operands, stream_of(stream)) }
    }

    /// Launches decoding of rows: those with the `count` numbers (I64) at `ids`, or the first ones where that is 0.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a call that does not fit together, [`Error::Device`].
    ///
    /// # Safety
    /// As [`Raw::launch`].
    pub unsafe fn decode(
        &self,
        of: &Arguments<'_>,
        ids: Address,
        count: usize,
        numbers: DType,
        out: Address,
        stream: Address,
    ) -> Result<()> {
        let layout = codecs::get(of.codec)?.grouped()?;
        if ids == 0 && count > of.rows {
            return Err(Error::invalid(format!("{count} rows of a matrix of {}", of.rows)));
        }
        let planes = Planes::new(layout, of.rows, of.cols, of.planes)?;
        let operands = Operands { planes, extra: of.extra, ends: 0, x: 0, y: out, workspace: 0 };
        // SAFETY: the caller vouches for the addresses.
        unsafe { self.device.decode(layout, &operands, ids, count, numbers, stream_of(stream)) }
    }
}

/// A stream of PyTorch, which gives out its address; 0 is the default one.
fn stream_of(address: Address) -> super::driver::Stream {
    std::ptr::with_exposed_provenance_mut(usize::try_from(address).expect("addresses fit"))
}
