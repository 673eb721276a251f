//! Scales and offsets as f32, a row at a time, because converting them one by one costs more than the codes.

use super::vector::{Vector, centre};
use crate::codec::Planes;
use crate::codec::lanes::{Eight, MAX_LANES};
use crate::layout::{Float, Grouped, Levels};

/// Whether a layout adds something to `level * scale`.
pub(super) fn has_addends(layout: &Grouped) -> bool {
    layout.offset().is_some() || layout.levels() == Levels::ZeroPoint
}

/// Scales of consecutive groups of a row from `first` on, and zeros beyond its end; `out` is whole vectors.
#[inline(always)]
pub(super) fn scales<V: Vector>(layout: &Grouped, row: &Planes<'_>, first: usize, out: &mut [f32]) {
    floats::<V>(layout.scale(), row.scales, first, out);
}

/// What is added to `level * scale` in every group: the offset, or what a zero point makes of the scale.
///
/// `first` is even where zero points are stored; `scales` are those of the same groups.
#[inline(always)]
pub(super) fn addends<V: Vector, E: Eight>(
    layout: &Grouped,
    row: &Planes<'_>,
    first: usize,
    scales: &[f32],
    out: &mut [f32],
) {
    if let Some(float) = layout.offset() {
        floats::<V>(float, row.addends, first, out);
    } else {
        let bits = layout.bits() as usize;
        let points = &row.addends[(first * bits / 8).min(row.addends.len())..];
        for (i, (scales, out)) in scales.chunks(8).zip(out.chunks_mut(8)).enumerate() {
            let rest = &points[(i * bits).min(points.len())..];
            let mut bytes = [0; 8];
            let held = rest.len().min(bits);
            bytes[..held].copy_from_slice(&rest[..held]);
            let mut eight = [0.0; 8];
            eight[..scales.len()].copy_from_slice(scales);
            let [a, b, c, d, ..] = bytes;
            let points = if bits == 4 { E::nibbles(u32::from_le_bytes([a, b, c, d])) } else { E::bytes(bytes) };
            ((E::splat(centre(layout.bits())) - points) * E::load(&eight)).store(&mut eight);
            out.copy_from_slice(&eight[..out.len()]);
        }
    }
}

#[inline(always)]
fn floats<V: Vector>(float: Float, row: &[u8], first: usize, out: &mut [f32]) {
    let size = float.size();
    let row = &row[(first * size).min(row.len())..];
    let whole = row.len() / (size * V::N);
    for (i, out) in out.chunks_exact_mut(V::N).enumerate() {
        if i < whole {
            load::<V>(float, &row[i * size * V::N..]).store(out);
        } else {
            let rest = &row[(i * size * V::N).min(row.len())..];
            let mut padded = [0; 4 * MAX_LANES];
            padded[..rest.len()].copy_from_slice(rest);
            load::<V>(float, &padded).store(out);
        }
    }
}

#[inline(always)]
fn load<V: Vector>(float: Float, bytes: &[u8]) -> V {
    match float {
        Float::F16 => V::load_f16(bytes),
        Float::F32 => {
            let mut floats = [0.0; MAX_LANES];
            for (x, bytes) in floats.iter_mut().zip(&bytes.as_chunks::<4>().0[..V::N]) {
                *x = f32::from_le_bytes(*bytes);
            }
            V::load(&floats)
        }
    }
}
