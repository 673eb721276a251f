//! Conversions between f32 and the 16-bit floats, rounding to nearest even.
//!
//! Half precision goes through the lanes, whose instruction sets convert it. The upper half of a single needs only
//! integer arithmetic without branches, which the compiler vectorises for whatever instruction set it is stamped.

use super::lanes::{Lanes, MAX_LANES};

/// Reads little-endian IEEE halves as f32.
#[inline(always)]
pub(crate) fn f16_to_f32<L: Lanes>(bytes: &[u8], out: &mut [f32]) {
    let mut halves = bytes.chunks_exact(2 * L::N);
    let mut floats = out.chunks_exact_mut(L::N);
    for (halves, floats) in (&mut halves).zip(&mut floats) {
        L::load_f16(halves).store(floats);
    }
    let tail = floats.into_remainder();
    let mut padded = [0; 2 * MAX_LANES];
    let mut converted = [0.0; MAX_LANES];
    padded[..2 * tail.len()].copy_from_slice(&bytes[bytes.len() - 2 * tail.len()..]);
    L::load_f16(&padded).store(&mut converted);
    tail.copy_from_slice(&converted[..tail.len()]);
}

/// Writes f32 as little-endian IEEE halves.
#[inline(always)]
pub(super) fn f32_to_f16<L: Lanes>(values: &[f32], out: &mut [u8]) {
    let mut floats = values.chunks_exact(L::N);
    let mut halves = out.chunks_exact_mut(2 * L::N);
    for (floats, halves) in (&mut floats).zip(&mut halves) {
        L::load(floats).store_f16(halves);
    }
    let tail = floats.remainder();
    let mut padded = [0.0; MAX_LANES];
    let mut converted = [0; 2 * MAX_LANES];
    padded[..tail.len()].copy_from_slice(tail);
    L::load(&padded).store_f16(&mut converted);
    halves.into_remainder().copy_from_slice(&converted[..2 * tail.len()]);
}

/// Reads little-endian upper halves of singles as f32.
#[inline(always)]
pub(super) fn bf16_to_f32(bytes: &[u8], out: &mut [f32]) {
    for (x, half) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
        *x = f32::from_bits(u32::from(u16::from_le_bytes(*half)) << 16);
    }
}

/// Writes f32 as little-endian upper halves of singles; no NaN becomes infinite.
#[inline(always)]
pub(super) fn f32_to_bf16(values: &[f32], out: &mut [u8]) {
    for (half, x) in out.as_chunks_mut::<2>().0.iter_mut().zip(values) {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
        let quiet = bits | 0x0040_0000;
        let kept = if bits & 0x7fff_ffff > 0x7f80_0000 { quiet } else { rounded };
        let [_, _, low, high] = kept.to_le_bytes();
        *half = [low, high];
    }
}
