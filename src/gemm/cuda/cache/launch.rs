//! Launches of the kernels of caches with memory that is on the device already: nothing is taken, copied or waited for.

#![expect(unsafe_code, reason = "kernels read and write the addresses that they are given")]

use std::ffi::c_void;

use super::super::device::{Device, Ready};
use super::super::driver::{Address, Stream};
use super::super::launch::parameter;
use super::super::plan::count;
use super::{Attention, append_step, recall_step};
use crate::attention::{KvFormat, KvPlane};
use crate::error::{Error, Result};
use crate::tensor::DType;

/// Where the parts of a cache are: address and bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Places {
    /// Planes in the order of [`KvPlane::ALL`]: of a pool of pages, and tails of each sequence.
    pub planes: [(Address, usize); 6],
    /// The table of pages, I32, a row for each sequence.
    pub pages: (Address, usize),
    /// Tokens of each sequence, I32.
    pub lengths: (Address, usize),
}

/// A cache as `cache.cuh` takes it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cache {
    planes: [Address; 6],
    pages: Address,
    lengths: Address,
    columns: u32,
    pool: u32,
}

impl Places {
    /// The cache, having checked that its parts fit each other, and how many sequences it has.
    ///
    /// # Errors
    /// [`Error::Invalid`] where they do not, or begin where vectors cannot be read.
    pub fn check(&self, format: &KvFormat) -> Result<(Cache, usize)> {
        let sequences = self.lengths.1 / 4;
        let unit = |plane: KvPlane| 4 * format.heads() * format.plane_words(plane);
        let pool = self.planes[0].1 / unit(KvPlane::KeyCodes);
        for (plane, &(address, bytes)) in KvPlane::ALL.into_iter().zip(&self.planes) {
            let expected = unit(plane) * if plane.is_tail() { sequences } else { pool };
            if bytes != expected {
                return Err(Error::invalid(format!(
                    "plane {plane:?} of {bytes} bytes for {pool} pages and {sequences} sequences, expected {expected}"
                )));
            }
            if !address.is_multiple_of(16) {
                return Err(Error::invalid(format!(
                    "plane {plane:?} begins at {address:#x}, expected a multiple of 16"
                )));
            }
        }
        let columns = (self.pages.1 / 4).checked_div(sequences).unwrap_or(0);
        if pool == 0 || columns == 0 || columns * sequences * 4 != self.pages.1 {
            return Err(Error::invalid(format!(
                "a table of {} bytes and {pool} pages for {sequences} sequences, expected as many columns for each, and at \
                 least one of all",
                self.pages.1
            )));
        }
        let cache = Cache {
            planes: self.planes.map(|plane| plane.0),
            pages: self.pages.0,
            lengths: self.lengths.0,
            columns: count(columns, u32::MAX)?,
            pool: count(pool, u32::MAX)?,
        };
        Ok((cache, sequences))
    }
}

/// Numbers of tokens, `[sequences, heads, tokens, channels]`: where they are, and how far apart neighbours are along the
/// first three of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Numbers {
    /// The address of the first one.
    pub at: Address,
    /// Numbers between neighbours.
    pub strides: [u64; 3],
}

/// What a query sees of the tokens: a byte for each token of each token of queries, `[sequences, m, tokens]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mask {
    /// The address, null for none.
    pub at: Address,
    /// Bytes between neighbours along the first two dimensions.
    pub strides: [u64; 2],
}

/// A call of attention with addresses.
#[derive(Debug, Clone, Copy)]
pub struct AttendCall {
    /// Queries.
    pub q: Numbers,
    /// What they see.
    pub mask: Mask,
    /// What scores are multiplied by.
    pub scale: f32,
    /// Whether queries are those of the last tokens and see none after their own.
    pub causal: bool,
    /// Memory of as many bytes as the plan says.
    pub workspace: Address,
    /// Results, `[sequences, m, heads of queries, channels]`.
    pub out: Address,
}

impl Device {
    fn run_cache(&self, ready: &Ready, stream: Stream, parameters: &mut [*mut c_void]) -> Result<()> {
        // SAFETY: the parameters are those of the kernel, as the callers below write them down, which are unsafe for what
        // they address.
        unsafe { self.context.launch(ready.function, &ready.step, stream, parameters) }
    }

    /// Launches the adding of `tokens` tokens to each sequence, whose lengths are those before.
    ///
    /// # Errors
    /// As [`Places::check`] and [`append_step`], and what the driver says.
    ///
    /// # Safety
    /// All addresses are of this device and of memory as long as the sizes make it; nobody else uses it until the stream
    /// has come past.
    pub(in crate::gemm::cuda) unsafe fn append(
        &self,
        format: &KvFormat,
        places: &Places,
        [mut keys, mut values]: [Numbers; 2],
        tokens: usize,
        numbers: DType,
        stream: Stream,
    ) -> Result<()> {
        let (mut cache, sequences) = places.check(format)?;
        if tokens == 0 || sequences == 0 {
            return Ok(());
        }
        let ready = self.ready_step(append_step(format, numbers, sequences, tokens)?)?;
        let mut tokens = count(tokens, i32::MAX.unsigned_abs())?;
        let mut parameters = [
            parameter(&mut cache),
            parameter(&mut keys.at),
            parameter(&mut keys.strides),
            parameter(&mut values.at),
            parameter(&mut values.strides),
            parameter(&mut tokens),
        ];
        self.run_cache(&ready, stream, &mut parameters)
    }

    /// Launches attention.
    ///
    /// # Errors
    /// As [`Places::check`] and [`Attention::plan`], and what the driver says.
    ///
    /// # Safety
    /// As `Device::append`.
    pub(in crate::gemm::cuda) unsafe fn attend(
        &self,
        problem: &Attention,
        places: &Places,
        call: &AttendCall,
        stream: Stream,
    ) -> Result<()> {
        let (mut cache, sequences) = places.check(&problem.format)?;
        if sequences != problem.sequences {
            return Err(Error::invalid(format!("queries of {} sequences for {sequences}", problem.sequences)));
        }
        if problem.m == 0 || sequences == 0 {
            return Ok(());
        }
        let plan = problem.plan(self.hardware())?;
        let (mut q, mut mask, mut scale) = (call.q, call.mask, call.scale);
        let (mut partial, mut out) = (call.workspace, call.out);
        let most = i32::MAX.unsigned_abs();
        let (mut m, mut per_head) = (count(problem.m, most)?, count(problem.per_head, most)?);
        let (mut causal, [mut shares, ..]) = (u32::from(call.causal), plan.attend.grid);
        let [sequence, token] = &mut mask.strides;
        let mut parameters = [
            parameter(&mut cache),
            parameter(&mut q.at),
            parameter(&mut q.strides),
            parameter(&mut mask.at),
            parameter(sequence),
            parameter(token),
            parameter(&mut scale),
            parameter(&mut m),
            parameter(&mut per_head),
            parameter(&mut causal),
            parameter(&mut partial),
            parameter(&mut out),
        ];
        self.run_cache(&self.ready_step(plan.attend)?, stream, &mut parameters)?;
        let Some(merge) = plan.merge else { return Ok(()) };
        let [mut queries, ..] = merge.grid;
        let mut parameters =
            [parameter(&mut partial), parameter(&mut shares), parameter(&mut queries), parameter(&mut out)];
        self.run_cache(&self.ready_step(merge)?, stream, &mut parameters)
    }

    /// Launches what makes numbers of the first `tokens` of each sequence, `[sequences, heads, tokens, channels]`.
    ///
    /// # Errors
    /// As [`Places::check`] and [`recall_step`], and what the driver says.
    ///
    /// # Safety
    /// As `Device::append`.
    pub(in crate::gemm::cuda) unsafe fn recall(
        &self,
        format: &KvFormat,
        places: &Places,
        tokens: usize,
        numbers: DType,
        [mut keys, mut values]: [Address; 2],
        stream: Stream,
    ) -> Result<()> {
        let (mut cache, sequences) = places.check(format)?;
        if tokens == 0 || sequences == 0 {
            return Ok(());
        }
        let ready = self.ready_step(recall_step(format, numbers, sequences, tokens)?)?;
        let (mut sequences, mut tokens) = (count(sequences, u32::MAX)?, count(tokens, i32::MAX.unsigned_abs())?);
        let mut parameters = [
            parameter(&mut cache),
            parameter(&mut sequences),
            parameter(&mut tokens),
            parameter(&mut keys),
            parameter(&mut values),
        ];
        self.run_cache(&ready, stream, &mut parameters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_another_length_never_reach_a_kernel() {
        let format = KvFormat::new(2, 64, 4, 8).unwrap();
        let (pool, sequences, columns) = (7, 3, 4);
        let planes = KvPlane::ALL.map(|plane| {
            let unit = 4 * format.heads() * format.plane_words(plane);
            (4096, unit * if plane.is_tail() { sequences } else { pool })
        });
        let good = Places { planes, pages: (64, 4 * sequences * columns), lengths: (64, 4 * sequences) };
        let (cache, found) = good.check(&format).unwrap();
        assert_eq!((found, cache.columns, cache.pool), (3, 4, 7));
        for at in 0..6 {
            let mut short = good;
            short.planes[at].1 -= 4;
            assert!(short.check(&format).is_err(), "plane {at}");
            let mut odd = good;
            odd.planes[at].0 += 4;
            assert!(odd.check(&format).is_err(), "plane {at}");
        }
        assert!(Places { pages: (64, 4 * sequences * columns - 4), ..good }.check(&format).is_err());
        assert!(Places { pages: (64, 0), ..good }.check(&format).is_err());
    }
}
