//! Products and decoding with memory that is on the device already: addresses in, launches out, nothing is taken, copied or
//! waited for, so that CUDA graphs can record it.

#![expect(unsafe_code, reason = "kernels read and write the addresses that they are given")]

use std::ffi::c_void;

use super::device::{Device, Ready, ReadyProduct};
use super::driver::{Address, Stream};
use super::plan::{Problem, Step};
use super::source::{Kernel, Variant};
use crate::error::{Error, Result};
use crate::layout::{Grouped, Layout, Plane};
use crate::tensor::DType;

/// The planes of a matrix, as `dequant.cuh` takes them; null for what the layout does not have.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Planes {
    codes: Address,
    high_codes: Address,
    scales: Address,
    addends: Address,
    row_scales: Address,
    rows: u32,
    cols: u32,
}

impl Planes {
    /// A matrix of the planes at these addresses, in stored order.
    ///
    /// # Errors
    /// [`Error::Invalid`] for another number of planes than the layout has, or sizes beyond 31 bits.
    pub fn new(layout: &Grouped, rows: usize, cols: usize, addresses: &[Address]) -> Result<Self> {
        let kinds = Layout::Grouped(*layout);
        let kinds = kinds.planes();
        if kinds.len() != addresses.len() {
            return Err(Error::invalid(format!("{} planes, expected {}", addresses.len(), kinds.len())));
        }
        let size = |n: usize| {
            u32::try_from(n).ok().filter(|&n| n < 1 << 31).ok_or_else(|| {
                Error::invalid(format!("a matrix of {rows} x {cols} on a CUDA device, expected less than 2^31 of each"))
            })
        };
        let mut planes = Self { rows: size(rows)?, cols: size(cols)?, ..Self::default() };
        for (kind, &address) in kinds.iter().zip(addresses) {
            match kind {
                Plane::Codes => planes.codes = address,
                Plane::HighCodes => planes.high_codes = address,
                Plane::Scales => planes.scales = address,
                Plane::RowScales => planes.row_scales = address,
                _ => planes.addends = address,
            }
        }
        Ok(planes)
    }

    /// Whether all of them begin at multiples of 16 bytes.
    #[must_use]
    pub fn is_aligned(&self) -> bool {
        [self.codes, self.high_codes, self.scales, self.addends, self.row_scales].iter().all(|at| at.is_multiple_of(16))
    }
}

/// The planes beside a codec's own; null for what there is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Extra {
    /// Multipliers of columns, F32.
    pub column_scales: Address,
    /// How many outliers each row has, U32.
    pub counts: Address,
    /// Their columns, U16 or U32.
    pub columns: Address,
    /// Their values, F16.
    pub values: Address,
    /// How many there are.
    pub total: u32,
}

/// What a product reads and writes; null where there are no ends.
#[derive(Debug, Clone, Copy)]
pub struct Operands {
    /// The matrix, or the stack.
    pub planes: Planes,
    /// What the matrix has beside.
    pub extra: Extra,
    /// Where the rows of activations of each expert end, I32.
    pub ends: Address,
    /// Activations.
    pub x: Address,
    /// Results.
    pub y: Address,
    /// Memory of as many bytes as the plan says.
    pub workspace: Address,
}

/// The address of a parameter.
pub(super) fn parameter<T>(value: &mut T) -> *mut c_void {
    std::ptr::from_mut(value).cast()
}

impl Device {
    fn run(&self, ready: &Ready, stream: Stream, parameters: &mut [*mut c_void]) -> Result<()> {
        // SAFETY: the parameters are those of the kernel, as the callers below write them down; `multiply` and `decode` are
        // unsafe for what they address.
        unsafe { self.context.launch(ready.function, &ready.step, stream, parameters) }
    }

    /// Launches a product.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Safety
    /// All addresses are of this device, and of memory as long as the problem makes it; nobody writes to it until the
    /// stream has come past the product.
    pub(super) unsafe fn multiply(
        &self,
        ready: &ReadyProduct,
        problem: &Problem,
        of: &Operands,
        stream: Stream,
    ) -> Result<()> {
        let workspace = ready.plan.workspace;
        let at = |offset: usize| of.workspace + offset as Address;
        let mut planes = of.planes;
        let (mut column_scales, mut ends, mut x, mut y) = (of.extra.column_scales, of.ends, of.x, of.y);
        let (mut fragments, mut inverses) = (at(0), at(workspace.inverses));
        let (mut partial, mut counters) = (at(workspace.partial), at(workspace.counters));
        let too_many = |_| Error::invalid("more rows of activations than a launch can count");
        let mut m = u32::try_from(problem.m).map_err(too_many)?;
        let mut experts = u32::try_from(problem.experts).map_err(too_many)?;
        let (mut cols, mut tile_rows) = (planes.cols, ready.plan.tile_rows);
        if ready.plan.shares() > 1 {
            // SAFETY: the counters are the end of the workspace.
            unsafe { self.context.clear(counters, workspace.bytes - workspace.counters, stream)? };
        }
        if let Some(prepare) = &ready.prepare {
            let mut parameters = [
                parameter(&mut x),
                parameter(&mut column_scales),
                parameter(&mut ends),
                parameter(&mut experts),
                parameter(&mut m),
                parameter(&mut cols),
                parameter(&mut tile_rows),
                parameter(&mut fragments),
                parameter(&mut inverses),
            ];
            self.run(prepare, stream, &mut parameters)?;
        }
        let multiply = &ready.multiply;
        match multiply.step.variant.kernel() {
            Kernel::Gemm | Kernel::Wgmma => {
                let mut parameters = [
                    parameter(&mut planes),
                    parameter(&mut fragments),
                    parameter(&mut inverses),
                    parameter(&mut ends),
                    parameter(&mut experts),
                    parameter(&mut y),
                    parameter(&mut partial),
                    parameter(&mut counters),
                    parameter(&mut m),
                ];
                self.run(multiply, stream, &mut parameters)?;
            }
            Kernel::Gemv => {
                // Activations that were put in order, or that the kernel puts in order.
                let from = if ready.prepare.is_some() { &mut fragments } else { &mut x };
                let mut parameters = [
                    parameter(&mut planes),
                    parameter(&mut column_scales),
                    parameter(from),
                    parameter(&mut inverses),
                    parameter(&mut y),
                    parameter(&mut partial),
                    parameter(&mut counters),
                    parameter(&mut m),
                ];
                self.run(multiply, stream, &mut parameters)?;
            }
            _ => {
                let mut parameters = [
                    parameter(&mut planes),
                    parameter(&mut column_scales),
                    parameter(&mut x),
                    parameter(&mut ends),
                    parameter(&mut experts),
                    parameter(&mut y),
                    parameter(&mut m),
                ];
                self.run(multiply, stream, &mut parameters)?;
            }
        }
        ready.outliers.as_ref().map_or(Ok(()), |ready| self.add_outliers(ready, of, 0, experts, m, stream))
    }

    /// Launches what adds outliers.
    fn add_outliers(
        &self,
        ready: &Ready,
        of: &Operands,
        mut ids: Address,
        mut experts: u32,
        mut m: u32,
        stream: Stream,
    ) -> Result<()> {
        let Extra { mut counts, mut columns, mut values, mut total, .. } = of.extra;
        let (mut x, mut ends, mut y) = (of.x, of.ends, of.y);
        let (mut rows, mut cols) = (of.planes.rows, of.planes.cols);
        let mut parameters = [
            parameter(&mut counts),
            parameter(&mut columns),
            parameter(&mut values),
            parameter(&mut x),
            parameter(&mut ends),
            parameter(&mut ids),
            parameter(&mut experts),
            parameter(&mut y),
            parameter(&mut rows),
            parameter(&mut cols),
            parameter(&mut m),
            parameter(&mut total),
        ];
        self.run(ready, stream, &mut parameters)
    }

    /// Launches decoding of `count` rows: those with the numbers at `ids` (I64), or all from the first. With outliers, only
    /// numbers in f32 are those of the specification: others are rounded before outliers are added, and then again.
    ///
    /// # Errors
    /// [`Error::Invalid`] for other numbers than F32, F16 and BF16, and what the driver says.
    ///
    /// # Safety
    /// As `Device::multiply`.
    pub(super) unsafe fn decode(
        &self,
        layout: &Grouped,
        of: &Operands,
        ids: Address,
        count: usize,
        numbers: DType,
        stream: Stream,
    ) -> Result<()> {
        let mut planes = of.planes;
        if count == 0 || planes.cols == 0 {
            return Ok(());
        }
        let step = decode_step(layout, planes, of.y, count, numbers)?;
        let ready = self.ready_step(step)?;
        let (mut column_scales, mut ids, mut out) = (of.extra.column_scales, ids, of.y);
        let mut first = 0_u32;
        let mut count = u32::try_from(count).map_err(|_| Error::invalid("more rows than a launch can count"))?;
        let mut parameters = [
            parameter(&mut planes),
            parameter(&mut column_scales),
            parameter(&mut ids),
            parameter(&mut first),
            parameter(&mut count),
            parameter(&mut out),
        ];
        self.run(&ready, stream, &mut parameters)?;
        if of.extra.counts == 0 {
            return Ok(());
        }
        let own = [("WIDE_COLUMNS", u32::from(planes.cols > 1 << 16)), ("DECODED", 1)];
        let variant = Variant::new(Kernel::Outliers, layout, numbers, false, &own)?;
        let step = Step { variant, grid: [count, 1, 1], threads: 256, shared: 0 };
        self.add_outliers(&self.ready_step(step)?, of, ids, 1, 0, stream)
    }
}

/// How rows are decoded.
fn decode_step(layout: &Grouped, planes: Planes, out: Address, count: usize, numbers: DType) -> Result<Step> {
    let aligned = planes.is_aligned() && out.is_multiple_of(16) && planes.cols.is_multiple_of(32);
    let variant = Variant::new(Kernel::Decode, layout, numbers, aligned, &[])?;
    let octets = (planes.cols as usize).div_ceil(8).saturating_mul(count);
    let blocks = u32::try_from(octets.div_ceil(256)).ok().filter(|&blocks| blocks < 1 << 31);
    let blocks =
        blocks.ok_or_else(|| Error::invalid("more weights to decode than a launch can count; decode by rows"))?;
    Ok(Step { variant, grid: [blocks, 1, 1], threads: 256, shared: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codecs;

    #[test]
    fn planes_find_their_places_whatever_their_order() {
        for codec in codecs::all() {
            let Ok(layout) = codec.grouped() else { continue };
            let kinds = codec.layout.planes();
            let addresses: Vec<Address> = (1..=kinds.len() as Address).map(|n| 16 * n).collect();
            let planes = Planes::new(layout, 3, 40, &addresses).unwrap();
            assert_eq!(planes.codes, 16, "{}", codec.id);
            let own = [planes.codes, planes.high_codes, planes.scales, planes.addends, planes.row_scales];
            assert_eq!(own.iter().sum::<Address>(), addresses.iter().sum::<Address>(), "{}", codec.id);
            assert!(planes.is_aligned());
            assert!(Planes::new(layout, 3, 40, &addresses[1..]).is_err());
            assert!(Planes::new(layout, 1 << 31, 40, &addresses).is_err());
        }
    }
}
