//! Products for those who hold their own memory and streams on a device, PyTorch above all.

#![expect(unsafe_code, reason = "kernels read and write the addresses that they are given")]

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::cache::{AttendCall, Attention, Numbers, Places};
use super::device::{Device, ReadyProduct};
use super::driver::Address;
use super::launch::{Extra, Operands, Planes};
use super::plan::Problem;
use crate::attention::KvFormat;
use crate::codec::extra::Extras;
use crate::codecs;
use crate::error::{Error, Result};
use crate::layout::{Grouped, Layout, Plane};
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
    /// Addresses and bytes of the codec's planes, in stored order.
    pub planes: &'a [(Address, usize)],
    /// Those of column scales, and of counts, columns and values of outliers; zeros for what there is not.
    pub extra: [(Address, usize); 4],
}

impl Arguments<'_> {
    /// The planes, having checked that they are as long as kernels take them to be.
    fn check(&self, layout: &Grouped) -> Result<(Planes, Extra)> {
        let Self { rows, cols, .. } = *self;
        let wrong = |what: &str, found: usize, expected: u64| {
            Error::invalid(format!("{what} of {found} bytes for a matrix of {rows} x {cols}, expected {expected}"))
        };
        let expected = Layout::Grouped(*layout).plane_bytes(DType::F32, rows as u64, cols as u64)?;
        if expected.len() != self.planes.len() {
            return Err(Error::invalid(format!("{} planes, expected {}", self.planes.len(), expected.len())));
        }
        for ((plane, expected), &(_, found)) in expected.into_iter().zip(self.planes) {
            if found as u64 != expected {
                return Err(wrong(&format!("plane {}", plane.name()), found, expected));
            }
        }
        let addresses: Vec<Address> = self.planes.iter().map(|plane| plane.0).collect();
        let planes = Planes::new(layout, rows, cols, &addresses)?;
        let [scales, counts, columns, values] = self.extra;
        let extras = Extras { column_scales: scales.0 != 0, outliers: values.1 as u64 / 2 };
        let found = [scales, counts, columns, values];
        let names = [Plane::ColumnScales, Plane::OutlierCounts, Plane::OutlierColumns, Plane::OutlierValues];
        for (plane, (address, found)) in names.into_iter().zip(found) {
            let (dtype, count) = extras.elements(plane, rows as u64, cols as u64).expect("an extra plane");
            if address != 0 && found as u64 != count * dtype.size() {
                return Err(wrong(&format!("plane {}", plane.name()), found, count * dtype.size()));
            }
        }
        let total = u32::try_from(extras.outliers).map_err(|_| Error::invalid("more outliers than 32 bits count"))?;
        // Without any there are no planes to look at.
        let [counts, columns, values] = [counts, columns, values].map(|place| if total > 0 { place.0 } else { 0 });
        Ok((planes, Extra { column_scales: scales.0, counts, columns, values, total }))
    }
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
        let (planes, extra) = of.check(&layout)?;
        let aligned = planes.is_aligned() && x.is_multiple_of(16);
        let rows = of.rows / of.experts;
        let outliers = extra.counts != 0;
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
        Ok(Launchable { ready, problem, planes, extra })
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
        let (planes, extra) = of.check(layout)?;
        let operands = Operands { planes, extra, ends: 0, x: 0, y: out, workspace: 0 };
        // SAFETY: the caller vouches for the addresses.
        unsafe { self.device.decode(layout, &operands, ids, count, numbers, stream_of(stream)) }
    }
}

impl Raw {
    /// Launches the adding of `tokens` tokens to each sequence of a cache; the lengths on the device are those before.
    ///
    /// # Errors
    /// [`Error::Invalid`] for parts that do not fit together, [`Error::Unsupported`], [`Error::Device`].
    ///
    /// # Safety
    /// As [`Raw::launch`]; keys and values are as many numbers as their strides say.
    pub unsafe fn append(
        &self,
        format: &KvFormat,
        places: &Places,
        tokens: [Numbers; 2],
        count: usize,
        numbers: DType,
        stream: Address,
    ) -> Result<()> {
        // SAFETY: the caller vouches for the addresses.
        unsafe { self.device.append(format, places, tokens, count, numbers, stream_of(stream)) }
    }

    /// Bytes of workspace of attention.
    ///
    /// # Errors
    /// [`Error::Unsupported`], [`Error::Invalid`].
    pub fn attend_bytes(&self, problem: &Attention) -> Result<usize> {
        Ok(problem.plan(self.device.hardware())?.workspace_bytes)
    }

    /// Launches attention over a cache.
    ///
    /// # Errors
    /// As [`Raw::append`].
    ///
    /// # Safety
    /// As [`Raw::launch`]; queries, mask and results are as many as the problem and strides say.
    pub unsafe fn attend(
        &self,
        problem: &Attention,
        places: &Places,
        call: &AttendCall,
        stream: Address,
    ) -> Result<()> {
        // SAFETY: the caller vouches for the addresses.
        unsafe { self.device.attend(problem, places, call, stream_of(stream)) }
    }

    /// Launches what makes numbers of the first `tokens` of each sequence.
    ///
    /// # Errors
    /// As [`Raw::append`].
    ///
    /// # Safety
    /// As [`Raw::launch`]; results are `[sequences, heads, tokens, channels]` each.
    pub unsafe fn recall(
        &self,
        format: &KvFormat,
        places: &Places,
        tokens: usize,
        numbers: DType,
        out: [Address; 2],
        stream: Address,
    ) -> Result<()> {
        // SAFETY: the caller vouches for the addresses.
        unsafe { self.device.recall(format, places, tokens, numbers, out, stream_of(stream)) }
    }
}

/// A stream of PyTorch, which gives out its address; 0 is the default one.
fn stream_of(address: Address) -> super::driver::Stream {
    std::ptr::with_exposed_provenance_mut(usize::try_from(address).expect("addresses fit"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn planes_of_another_length_never_reach_a_kernel() {
        for codec in codecs::all() {
            let Ok(layout) = codec.grouped() else { continue };
            let (rows, cols) = (6, 40);
            let sizes = codec.layout.plane_bytes(DType::F32, rows, cols).unwrap();
            let planes: Vec<_> =
                (1..).zip(&sizes).map(|(n, (_, bytes))| (256 * n, usize::try_from(*bytes).unwrap())).collect();
            let extra = [(4096, 160), (8192, 24), (12288, 6), (16384, 6)];
            let check = |planes: &[(Address, usize)], extra| {
                Arguments { codec: codec.id, rows: 6, cols: 40, experts: 1, planes, extra }
                    .check(layout)
                    .map(|(_, extra)| extra)
            };
            assert_eq!(check(&planes, extra).unwrap().total, 3, "{}", codec.id);
            assert_eq!(check(&planes, [(0, 0); 4]).unwrap(), Extra::default());
            for at in 0..planes.len() {
                let mut short = planes.clone();
                short[at].1 -= 1;
                let error = check(&short, extra).unwrap_err().to_string();
                assert!(error.contains(sizes[at].0.name()), "{error}");
            }
            for at in 0..extra.len() {
                let mut short = extra;
                short[at].1 -= 2;
                assert!(check(&planes, short).is_err(), "{} extra plane {at}", codec.id);
            }
            assert!(check(&planes[1..], extra).is_err());
        }
    }
}
