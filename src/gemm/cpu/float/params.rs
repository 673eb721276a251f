//! Scales and offsets as f32, a row at a time, because converting them one by one costs more than the codes.

use super::vector::{Vector, centre};
use crate::codec::Planes;
use crate::codec::lanes::{Eight, MAX_LANES};
use crate::gemm::cpu::nested;
use crate::layout::{Float, Grouped, Levels};

/// Whether a layout adds something to `level * scale`.
pub(super) fn has_addends(layout: &Grouped) -> bool {
    layout.offset().is_some() || layout.levels() == Levels::ZeroPoint
}

/// Row `r` of planes of `rows` rows.
#[inline(always)]
pub(super) fn row<'a>(planes: &Planes<'a>, rows: usize, r: usize) -> Planes<'a> {
    let cut = |plane: &'a [u8]| {
        let stride = plane.len() / rows;
        &plane[r * stride..][..stride]
    };
    Planes {
        codes: cut(planes.codes),
        high_codes: cut(planes.high_codes),
        scales: cut(planes.scales),
        addends: cut(planes.addends),
        row_scales: cut(planes.row_scales),
    }
}

/// Scales of consecutive groups of a row from `first` on, and zeros beyond its end; `out` is whole vectors.
#[inline(always)]
pub(super) fn scales<V: Vector>(layout: &Grouped, row: &Planes<'_>, first: usize, out: &mut [f32]) {
    if let Some(bank) = layout.bank() {
        let bytes = &row.scales[first.min(row.scales.len())..];
        let count = bytes.len().min(out.len());
        nested::scales(bank, &bytes[..count], layout.scale().load(row.row_scales, 0), out);
        out[count..].fill(0.0);
    } else {
        floats::<V>(layout.scale(), row.scales, first, out);
    }
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
        let whole = if bits == 4 { points.len() / 4 } else { points.len() / 8 }.min(out.len() / 8);
        let (scale_eights, out_eights) = (scales.as_chunks::<8>().0, out.as_chunks_mut::<8>().0);
        if bits == 4 {
            for ((scales, out), points) in scale_eights.iter().zip(out_eights).zip(points.as_chunks::<4>().0) {
                zero_points(bits, E::nibbles(u32::from_le_bytes(*points)), scales, out);
            }
        } else {
            for ((scales, out), points) in scale_eights.iter().zip(out_eights).zip(points.as_chunks::<8>().0) {
                zero_points(bits, E::bytes(*points), scales, out);
            }
        }
        let rest = &points[whole * bits..];
        for (i, (scales, out)) in scales[8 * whole..].chunks(8).zip(out[8 * whole..].chunks_mut(8)).enumerate() {
            let rest = &rest[(i * bits).min(rest.len())..];
            let mut bytes = [0; 8];
            let held = rest.len().min(bits);
            bytes[..held].copy_from_slice(&rest[..held]);
            let mut eight = [0.0; 8];
            eight[..scales.len()].copy_from_slice(scales);
            let [a, b, c, d, ..] = bytes;
            let points = if bits == 4 { E::nibbles(u32::from_le_bytes([a, b, c, d])) } else { E::bytes(bytes) };
            let mut addends = [0.0; 8];
            zero_points(bits, points, &eight, &mut addends);
            out.copy_from_slice(&addends[..out.len()]);
        }
    }
}

/// What eight zero points make of the scales of their groups.
#[inline(always)]
fn zero_points<E: Eight>(bits: usize, points: E, scales: &[f32; 8], out: &mut [f32; 8]) {
    ((E::splat(centre(bits)) - points) * E::load(scales)).store(out);
}

#[inline(always)]
fn floats<V: Vector>(float: Float, row: &[u8], first: usize, out: &mut [f32]) {
    let size = float.size();
    let row = &row[(first * size).min(row.len())..];
    let bytes = row.chunks_exact(size * V::N);
    let rest = bytes.remainder();
    let mut out = out.chunks_exact_mut(V::N);
    for bytes in bytes {
        let Some(out) = out.next() else { return };
        load::<V>(float, bytes).store(out);
    }
    let mut padded = [0; 4 * MAX_LANES];
    padded[..rest.len()].copy_from_slice(rest);
    for out in out {
        load::<V>(float, &padded).store(out);
        padded = [0; 4 * MAX_LANES];
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
