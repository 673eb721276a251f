//! Caches of keys and values on a device: which kernels, on how many blocks; `launch` has their launches. The format is
//! that of [`crate::attention`], blocks on pages of a pool; see `cuda/cache.cuh`.
//!
//! Nothing here depends on how long sequences are but how finely they are divided, for which a bound is enough: lengths
//! are on the device, so that a recorded launch stays right while sequences grow.

mod launch;

use super::plan::{Hardware, STATIC_BYTES, Step, count};
use super::source::{Kernel, Variant};
use crate::attention::{BLOCK, GROUP, KvFormat};
use crate::error::{Error, Result};
use crate::tensor::DType;

pub use launch::{AttendCall, Cache, Mask, Numbers, Places};

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
}
