//! Nested scales: codes of a bank as levels, a byte each, and scale bytes as numbers.
//!
//! A level of a bank is a signed byte whatever the width of its code, so an unpacked matrix is one of 8-bit codes with a
//! scale for each group ([`plain`]), and the kernels of those multiply it: a row, a panel or a run of columns at a time
//! is unpacked into memory that stays in the first-level cache, and no kernel exists twice. What a machine does to find
//! 64 levels is all that differs, and is chosen once, by [`best`]: one byte permutation of AVX-512 VBMI or NEON, or
//! shuffles of sixteen bytes. All of them give the same bytes.

#![expect(unsafe_code, reason = "functions that enable an instruction set are unsafe to call without it")]

mod array;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

use std::ops::Range;
use std::sync::OnceLock;

use crate::gemm::Weights;
use crate::layout::{Bank, Float, Grouped, LEVELS, Levels};

/// What is added to a level to make it the code of 8 bits that has this level.
pub(super) const BIAS: u8 = 128;

/// The layout of an unpacked matrix; of any but a nested one its own.
pub(super) fn plain(layout: &Grouped) -> Grouped {
    match layout.bank() {
        Some(_) => Grouped::new(8, Levels::Signed, layout.group(), Float::F32, None),
        None => *layout,
    }
}

/// Writes the levels of some columns of all rows, each plus `bias`, to rows of `out` that are `stride` bytes apart. The
/// first column is a multiple of [`COLUMNS`].
///
/// # Panics
/// When the layout has no bank, or there are no such columns: bugs of the caller.
pub(super) fn levels(weights: &Weights<'_>, columns: Range<usize>, bias: u8, out: &mut [u8], stride: usize) {
    best().levels(weights, columns, bias, out, stride);
}

/// The scales of groups of a row with this scale, by their bytes.
pub(super) fn scales(bank: &Bank, bytes: &[u8], row_scale: f32, out: &mut [f32]) {
    // SAFETY: tables leave this module only where their instruction set was detected.
    unsafe { (best().scales)(bank, bytes, row_scale, out) }
}

/// Columns that are unpacked at once.
const COLUMNS: usize = 64;

/// How far ahead codes are asked for where rows follow each other: the processor's own prefetching stops at the end of a
/// page.
const AHEAD: usize = 4096;

/// The functions for one instruction set.
struct Isa {
    #[cfg(test)]
    name: &'static str,
    levels: unsafe fn(&Task<'_, '_>, &mut [u8], usize),
    scales: unsafe fn(&Bank, &[u8], f32, &mut [f32]),
}

/// What is to be unpacked.
struct Task<'w, 'a> {
    weights: &'w Weights<'a>,
    columns: Range<usize>,
    /// The bank, each level with the bias.
    table: [u8; LEVELS],
}

/// The 64 levels of a bank in registers.
trait Unpacker: Copy {
    /// Holds the levels of a bank.
    fn new(table: &[u8; LEVELS], group: usize) -> Self;

    /// The levels of 64 columns: of 32 bytes of codes, `8 * HIGH` bytes of high codes, and the scale bytes of groups of
    /// `GROUP` columns, the first in the low bits.
    fn unpack<const HIGH: usize, const GROUP: usize>(
        self,
        low: &[u8; 32],
        high: &[u8],
        scales: u32,
        out: &mut [u8; COLUMNS],
    );

    /// Asks for the cache line that is `ahead` bytes after the start of `bytes`, which may lie beyond all memory.
    #[inline(always)]
    fn prefetch(_bytes: &[u8], _ahead: usize) {}
}

/// Stamps the generic code into a module with a table of its functions.
macro_rules! stamp {
    ($module:ident, $unpacker:ty $(, $features:literal)?) => {
        mod $module {
            use super::*;

            $(#[target_feature(enable = $features)])?
            fn levels(task: &Task<'_, '_>, out: &mut [u8], stride: usize) {
                let layout = task.weights.layout();
                match (layout.high_bits(), layout.group()) {
                    (0, 16) => rows::<$unpacker, 0, 16>(task, out, stride),
                    (0, 32) => rows::<$unpacker, 0, 32>(task, out, stride),
                    (1, 16) => rows::<$unpacker, 1, 16>(task, out, stride),
                    (1, 32) => rows::<$unpacker, 1, 32>(task, out, stride),
                    (2, 16) => rows::<$unpacker, 2, 16>(task, out, stride),
                    _ => one_by_one(task, out, stride),
                }
            }

            $(#[target_feature(enable = $features)])?
            fn scales(bank: &Bank, bytes: &[u8], row_scale: f32, out: &mut [f32]) {
                multiply(bank, bytes, row_scale, out);
            }

            pub(super) static ISA: Isa = Isa {
                #[cfg(test)]
                name: stringify!($module),
                levels,
                scales,
            };
        }
    };
}

stamp!(portable, array::Words);
#[cfg(target_arch = "aarch64")]
stamp!(neon_tables, neon::Tables);
#[cfg(target_arch = "x86_64")]
stamp!(avx2_shuffles, avx2::Tables, "avx2");
#[cfg(target_arch = "x86_64")]
stamp!(avx512_shuffles, avx512::Tables, "avx512f,avx512bw,avx512vl,avx512dq,avx2");
#[cfg(target_arch = "x86_64")]
stamp!(avx512_vbmi, avx512::Bytes, "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx2");

/// The instruction sets of this machine, the best one last.
fn available() -> Vec<&'static Isa> {
    let mut found = vec![&portable::ISA];
    #[cfg(target_arch = "aarch64")]
    found.push(&neon_tables::ISA);
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        found.push(&avx2_shuffles::ISA);
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
        {
            found.push(&avx512_shuffles::ISA);
            if is_x86_feature_detected!("avx512vbmi") {
                found.push(&avx512_vbmi::ISA);
            }
        }
    }
    found
}

/// The best instruction set of this machine.
fn best() -> &'static Isa {
    static BEST: OnceLock<&'static Isa> = OnceLock::new();
    BEST.get_or_init(|| available().last().copied().unwrap_or(&portable::ISA))
}

impl Isa {
    /// [`levels`] with this instruction set.
    fn levels(&self, weights: &Weights<'_>, columns: Range<usize>, bias: u8, out: &mut [u8], stride: usize) {
        let bank = weights.layout().bank().expect("only nested scales are unpacked");
        assert!(columns.start.is_multiple_of(COLUMNS) && columns.end <= weights.cols(), "columns {columns:?}");
        let table = bank.levels().map(|level| level.cast_unsigned().wrapping_add(bias));
        // SAFETY: tables leave this module only where their instruction set was detected.
        unsafe { (self.levels)(&Task { weights, columns, table }, out, stride) }
    }
}

/// Unpacks all rows.
#[inline(always)]
fn rows<U: Unpacker, const HIGH: usize, const GROUP: usize>(task: &Task<'_, '_>, out: &mut [u8], stride: usize) {
    let (weights, Range { start, end }) = (task.weights, task.columns.clone());
    let (layout, planes, cols) = (weights.layout(), weights.planes(), weights.cols());
    let strides = (layout.code_stride(cols), layout.high_code_stride(cols), layout.scale_stride(cols));
    let ahead = if end - start == cols { AHEAD } else { (end - start) / 2 };
    let unpacker = U::new(&task.table, GROUP);
    for (r, out) in out.chunks_mut(stride.max(1)).take(weights.rows()).enumerate() {
        let low = &planes.codes[r * strides.0..][..strides.0][start / 2..];
        let high = &planes.high_codes[r * strides.1..][..strides.1][start / 8 * HIGH..];
        let scales = &planes.scales[r * strides.2..][..strides.2][start / GROUP..];
        let (low, low_rest) = low.as_chunks::<32>();
        let (out, out_rest) = out[..end - start].as_chunks_mut::<COLUMNS>();
        let bytes = scales.chunks_exact(COLUMNS / GROUP);
        for (c, ((out, low), bytes)) in out.iter_mut().zip(low).zip(bytes).enumerate() {
            U::prefetch(low, ahead);
            if HIGH == 0 {
                unpacker.unpack::<0, GROUP>(low, &[], scale_bytes(bytes), out);
            } else {
                let high = &high[c * 8 * HIGH..][..8 * HIGH];
                U::prefetch(high, ahead / 4 * HIGH);
                unpacker.unpack::<HIGH, GROUP>(low, high, scale_bytes(bytes), out);
            }
        }
        if !out_rest.is_empty() {
            let c = out.len();
            let (mut low_padded, mut high_padded, mut scales_padded) = ([0; 32], [0; 16], [0; 4]);
            let low = low.get(c).map_or(low_rest, <[u8; 32]>::as_slice);
            fill(&mut low_padded, low);
            fill(&mut high_padded, high.get(c * 8 * HIGH..).unwrap_or_default());
            fill(&mut scales_padded, scales.get(c * (COLUMNS / GROUP)..).unwrap_or_default());
            let mut levels = [0; COLUMNS];
            let scales = u32::from_le_bytes(scales_padded);
            unpacker.unpack::<HIGH, GROUP>(&low_padded, &high_padded[..8 * HIGH], scales, &mut levels);
            out_rest.copy_from_slice(&levels[..out_rest.len()]);
        }
    }
}

/// Copies the first bytes, as many as there are and fit.
#[inline(always)]
fn fill(to: &mut [u8], from: &[u8]) {
    let count = to.len().min(from.len());
    to[..count].copy_from_slice(&from[..count]);
}

/// The scale bytes of 64 columns, of which there are two or four.
#[inline(always)]
fn scale_bytes(bytes: &[u8]) -> u32 {
    match *bytes {
        [a, b] => u32::from(u16::from_le_bytes([a, b])),
        [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
        _ => unreachable!("groups of 16 or 32 columns"),
    }
}

/// The scale byte of each 16 columns.
#[inline(always)]
fn each_16<const GROUP: usize>(scales: u32) -> u32 {
    if GROUP == 16 { scales } else { (scales & 0xff | (scales & 0xff00) << 8) * 0x0101 }
}

/// Unpacks a layout of which no instruction set knows more than the specification.
fn one_by_one(task: &Task<'_, '_>, out: &mut [u8], stride: usize) {
    let (weights, layout) = (task.weights, task.weights.layout());
    let bank = layout.bank().expect("checked by the caller");
    for (r, out) in out.chunks_mut(stride.max(1)).take(weights.rows()).enumerate() {
        let row = weights.slice(r, 1);
        for (out, c) in out.iter_mut().zip(task.columns.clone()) {
            let code = layout.load_code(row.planes().codes, row.planes().high_codes, c);
            *out = task.table[usize::from(bank.high(row.planes().scales[c / layout.group()]) | code)];
        }
    }
}

#[inline(always)]
fn multiply(bank: &Bank, bytes: &[u8], row_scale: f32, out: &mut [f32]) {
    for (scale, &byte) in out.iter_mut().zip(bytes) {
        *scale = bank.multiplier(byte) * row_scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{BANK4, BANK5, BANK6, Layout};

    fn layouts() -> impl Iterator<Item = Layout> {
        let banks = [&BANK4, &BANK5, &BANK6];
        banks.into_iter().flat_map(|bank| {
            [16, 32, 64]
                .map(|group| Layout::Grouped(Grouped::new(bank.bits(), Levels::Bank(bank), group, Float::F32, None)))
        })
    }

    #[test]
    fn every_instruction_set_finds_the_levels_of_the_specification() {
        let mut state = 1u32;
        let mut random = || {
            state = state.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
            state.to_be_bytes()[0]
        };
        for layout in layouts() {
            for cols in [1, 15, 31, 64, 72, 127, 128, 250] {
                let planes: Vec<Vec<u8>> = layout
                    .plane_bytes(crate::DType::F32, 3, cols)
                    .expect("small")
                    .into_iter()
                    .map(|(_, bytes)| (0..bytes).map(|_| random()).collect())
                    .collect();
                let planes: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
                let cols = usize::try_from(cols).expect("small");
                let weights = Weights::new(&layout, 3, cols, &planes).expect("as long as they should be");
                for columns in [0..cols, 0..cols.div_ceil(2), cols / 2 / COLUMNS * COLUMNS..cols] {
                    let mut want = vec![7; 3 * 260];
                    let bank = weights.layout().bank().expect("a bank");
                    let table = bank.levels().map(|level| level.cast_unsigned() ^ BIAS);
                    one_by_one(&Task { weights: &weights, columns: columns.clone(), table }, &mut want, 260);
                    for isa in available() {
                        let mut got = vec![7; 3 * 260];
                        isa.levels(&weights, columns.clone(), BIAS, &mut got, 260);
                        assert_eq!(got, want, "{} on {layout:?}, columns {columns:?} of {cols}", isa.name);
                    }
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_has_the_scales_of_the_specification() {
        let bytes: Vec<u8> = (0..=255).collect();
        for bank in [&BANK4, &BANK5, &BANK6] {
            for isa in available() {
                let mut got = vec![0.0; 256];
                // SAFETY: `available` gives what was detected.
                unsafe { (isa.scales)(bank, &bytes, 0.3, &mut got) };
                for (&byte, got) in bytes.iter().zip(got) {
                    assert_eq!(got.to_bits(), (bank.multiplier(byte) * 0.3).to_bits(), "{}: {byte}", isa.name);
                }
            }
        }
    }
}
