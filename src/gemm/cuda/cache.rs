//! Caches of keys and values on a device: which kernels, on how many blocks, and their launches with memory that is there
//! already. The format is that of [`crate::attention`], blocks on pages of a pool; see `cuda/cache.cuh`.
//!
//! Nothing here depends on how long sequences are but how finely they are divided, for which a bound is enough: lengths
//! are on the device, so that a recorded launch stays right while sequences grow.

#![expect(unsafe_code, reason = "kernels read and write the addresses that they are given")]

use std::ffi::c_void;

use super::device::{Device, Ready};
use super::driver::{Address, Stream};
use super::launch::parameter;
use super::plan::{Hardware, STATIC_BYTES, Step, count};
use super::source::{Kernel, Variant};
use crate::attention::{BLOCK, GROUP, KvFormat, KvPlane};
use crate::error::{Error, Result};
use crate::tensor::DType;

/// Most channels of a head; `attend.cu` holds what a query makes of all of them in registers.
const CHANNELS: usize = 256;
/// Most blocks of threads that share the tokens of a result: `merge.cu` goes through all of them.
const SHARES: usize = 64;
/// Threads of `append.cu` and `recall.cu`.
const APPEND_THREADS: usize = 128;
const RECALL_THREADS: usize = 256;

/// Attention, as far as sizes go.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Attention {
    /// What the planes mean.
    pub format: KvFormat,
    /// Type of queries and results.
    pub numbers: DType,
    /// Sequences.
    pub sequences: usize,
    /// Tokens of queries of each.
    pub m: usize,
    /// Heads of queries that share a head of keys and values.
    pub per_head: usize,
    /// Tokens of the longest sequence, or more.
    pub longest: usize,
}

/// The launches of attention.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attended {
    /// What makes results, or those of shares.
    pub attend: Step,
    /// What makes results of shares, where there are several.
    pub merge: Option<Step>,
    /// Bytes of the results of shares.
    pub workspace_bytes: usize,
}

impl Attention {
    /// How to compute it on a device.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for heads that kernels have no room for, [`Error::Invalid`] for sizes beyond what a launch
    /// can count.
    pub fn plan(&self, hardware: Hardware) -> Result<Attended> {
        let Self { format, m, per_head, sequences, .. } = *self;
        supported(&format)?;
        let rows = m.saturating_mul(per_head);
        // Registers have room for sixteen queries of 128 channels.
        let row_tiles: usize = if rows <= 8 || format.head_dim() > 128 { 1 } else { 2 };
        let tiles = rows.div_ceil(8 * row_tiles);
        let room = hardware.shared_bytes - STATIC_BYTES;
        let forms = [(4, 4), (4, 3), (4, 2), (2, 3), (2, 2)];
        let shared_of = |(warps, stages): (usize, usize)| {
            let parts = format.head_dim().div_ceil(32);
            let results = warps * 8 * row_tiles * (parts * 32 + 2) * 4;
            (warps * stages * 4 * stage_words(&format)).max(results)
        };
        // Blocks of threads that fit side by side have more of their memory on its way than one that has it all.
        let fits = |share: usize| forms.into_iter().find(|&form| shared_of(form) <= room / share);
        let form = (1..=3).rev().find_map(fits).unwrap_or((1, 2));
        let ((warps, stages), shared) = (form, shared_of(form));
        let blocks = self.longest.div_ceil(BLOCK).max(1);
        let together = (room / shared).clamp(1, 4) * hardware.multiprocessors;
        // Every warp should have a block of tokens, and all blocks of threads should run at once.
        let others = format.heads() * tiles * sequences.max(1);
        let shares = (together / others.max(1)).min(blocks.div_ceil(warps)).clamp(1, SHARES);
        let own = [("ROW_TILES", count(row_tiles, 2)?), ("WARPS", count(warps, 4)?), ("STAGES", count(stages, 4)?)];
        let variant = Variant::of_cache(Kernel::Attend, &format, self.numbers, &own)?;
        let attend = step(variant, [shares, format.heads() * tiles, sequences], 32 * warps, shared)?;
        let queries = sequences * rows * format.heads();
        let merge = (shares > 1)
            .then(|| {
                let variant = Variant::of_cache(Kernel::Merge, &format, self.numbers, &[])?;
                step(variant, [queries, 1, 1], format.head_dim(), 0)
            })
            .transpose()?;
        let workspace_bytes = if shares > 1 { 4 * shares * queries * (format.head_dim() + 2) } else { 0 };
        Ok(Attended { attend, merge, workspace_bytes })
    }
}

/// How `tokens` more of each sequence are added.
///
/// # Errors
/// As [`Attention::plan`].
pub fn append_step(format: &KvFormat, numbers: DType, sequences: usize, tokens: usize) -> Result<Step> {
    supported(format)?;
    let variant = Variant::of_cache(Kernel::Append, format, numbers, &[])?;
    // However many tokens the tail has, so many blocks of them get whole at most.
    step(variant, [tokens.div_ceil(BLOCK).max(1), format.heads(), sequences], APPEND_THREADS, 0)
}

/// How the first `tokens` of each sequence become numbers.
///
/// # Errors
/// As [`Attention::plan`].
pub fn recall_step(format: &KvFormat, numbers: DType, sequences: usize, tokens: usize) -> Result<Step> {
    supported(format)?;
    let variant = Variant::of_cache(Kernel::Recall, format, numbers, &[])?;
    let octets = (sequences * tokens).saturating_mul(format.token() / 8);
    step(variant, [octets.div_ceil(RECALL_THREADS), 1, 1], RECALL_THREADS, 0)
}

fn step(variant: Variant, grid: [usize; 3], threads: usize, shared: usize) -> Result<Step> {
    let grid = [count(grid[0], i32::MAX.unsigned_abs())?, count(grid[1], 65_535)?, count(grid[2], 65_535)?];
    Ok(Step { variant, grid, threads: count(threads, 1024)?, shared: count(shared, u32::MAX)? })
}

/// Words of a block of tokens of a head in shared memory, as `attend.cu` has them.
fn stage_words(format: &KvFormat) -> usize {
    let row = format.value_words() + if format.value_words().is_multiple_of(4) { 4 } else { 0 };
    BLOCK * (format.key_words() + row + format.groups()) + format.head_dim()
}

/// Whether kernels have room for heads.
fn supported(format: &KvFormat) -> Result<()> {
    let dim = format.head_dim();
    if dim > CHANNELS || !dim.is_multiple_of(8) {
        return Err(Error::unsupported(format!(
            "a cache with heads of {dim} channels on a CUDA device, expected a multiple of 8 up to {CHANNELS}; attend on \
             the CPU, or keep this cache in 16 bits"
        )));
    }
    Ok(())
}

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
    pub(super) unsafe fn append(
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
    pub(super) unsafe fn attend(
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
    pub(super) unsafe fn recall(
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

// What kernels take for granted about groups and blocks: a warp has a lane for each token of a block.
const _: () = assert!(BLOCK == 32 && GROUP == 32);

#[cfg(test)]
mod tests {
    use super::*;

    const H200: Hardware = Hardware { multiprocessors: 132, shared_bytes: 232_448, wgmma: true };
    const SMALL: Hardware = Hardware { multiprocessors: 16, shared_bytes: 101_376, wgmma: false };

    fn attention(dim: usize, bits: u32, m: usize, per_head: usize, longest: usize) -> Attention {
        let format = KvFormat::new(8, dim, bits, bits).unwrap();
        Attention { format, numbers: DType::BF16, sequences: 1, m, per_head, longest }
    }

    #[test]
    fn every_plan_of_attention_fits_its_device_and_covers_its_queries() {
        for hardware in [H200, SMALL] {
            for dim in (8..=256).step_by(8) {
                for bits in [4, 8] {
                    for (m, per_head) in [(1, 1), (1, 4), (1, 8), (2, 8), (5, 7), (16, 16)] {
                        for longest in [1, 33, 2048, 1 << 20] {
                            let plan = attention(dim, bits, m, per_head, longest).plan(hardware).unwrap();
                            let what = format!("{dim} {bits} {m} {per_head} {longest}: {plan:?}");
                            let Step { grid: [shares, rows, _], shared, ref variant, .. } = plan.attend;
                            let defined = variant.definitions();
                            let value = |name| {
                                let found = defined.iter().find(|(n, _)| *n == name).expect("a constant");
                                found.1.parse::<usize>().unwrap()
                            };
                            assert!(shared as usize + STATIC_BYTES <= hardware.shared_bytes, "{what}");
                            assert!(value("STAGES") >= 2, "{what}");
                            assert!(rows as usize / 8 * 8 * value("ROW_TILES") >= m * per_head, "{what}");
                            assert!(shares as usize <= longest.div_ceil(BLOCK), "{what}");
                            assert_eq!(plan.merge.is_some(), shares > 1, "{what}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn long_sequences_keep_every_multiprocessor_busy_and_short_ones_take_one_launch() {
        let plan = |longest| attention(128, 4, 1, 4, longest).plan(H200).unwrap();
        let [shares, rows, _] = plan(32_768).attend.grid;
        assert!(shares * rows >= 2 * 132, "{shares} x {rows}");
        assert!(plan(100).merge.is_none());
    }

    #[test]
    fn heads_that_kernels_have_no_room_for_are_told_what_to_do() {
        for dim in [33, 264] {
            let error = attention(dim, 4, 1, 1, 100).plan(H200).unwrap_err().to_string();
            assert!(error.contains("attend on the CPU"), "{error}");
        }
    }

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
