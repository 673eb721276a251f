//! Decoding, eight weights at a time.
//!
//! The group of every layout holds whole words, so eight weights never straddle two groups; what is left of a row
//! after its whole eights goes the way of the reference. Scales and offsets are converted a batch at a time, because
//! small groups spend more on them than on the codes.

use super::lanes::{Eight, Lanes};
use super::{Planes, Strides, convert, nested, reference};
use crate::layout::{Float, Grouped, Levels, ROW, load_bits};

/// Groups whose parameters are converted together.
const BATCH: usize = 64;

/// Decodes consecutive rows: the same floats as the reference.
#[inline(always)]
pub(super) fn decode<L: Lanes, E: Eight>(layout: &Grouped, planes: &Planes<'_>, cols: usize, out: &mut [f32]) {
    if cols == 0 {
        return;
    }
    if let Some(bank) = layout.bank() {
        return nested::decode::<E>(layout, bank, planes, cols, out);
    }
    let group = layout.group_len(cols);
    let known = matches!(
        (layout.levels(), layout.bits(), layout.offset()),
        (Levels::Unsigned, 4, Some(_))
            | (Levels::Signed, 4 | 8, None)
            | (Levels::ZeroPoint, 4, None)
            | (Levels::Table(_), 4, None)
    );
    if !known || (layout.group() != ROW && !group.is_multiple_of(8)) {
        return reference_rows(layout, planes, cols, out);
    }
    let gapless = layout.group() != ROW && cols.is_multiple_of(group) && layout.levels() != Levels::ZeroPoint;
    // Rows without gaps are one long row.
    let cols = if gapless { out.len().max(1) } else { cols };
    let strides = Strides::new(layout, cols);
    for (r, row) in out.chunks_exact_mut(cols).enumerate() {
        let planes = planes.rows(&strides, r, 1);
        // The short groups as constants, so that their loops are unrolled.
        match group {
            8 => decode_row::<L, E>(layout, 8, &planes, row),
            16 => decode_row::<L, E>(layout, 16, &planes, row),
            32 => decode_row::<L, E>(layout, 32, &planes, row),
            _ => decode_row::<L, E>(layout, group, &planes, row),
        }
    }
}

/// The rows of a layout without a fast path.
pub(super) fn reference_rows(layout: &Grouped, planes: &Planes<'_>, cols: usize, out: &mut [f32]) {
    let strides = Strides::new(layout, cols);
    for (r, row) in out.chunks_exact_mut(cols.max(1)).enumerate() {
        reference::decode_row(layout, &planes.rows(&strides, r, 1), row);
    }
}

/// Numbers `first..` of a plane, as f32.
#[inline(always)]
fn load_floats<L: Lanes>(float: Float, plane: &[u8], first: usize, out: &mut [f32]) {
    let bytes = &plane[first * float.size()..][..out.len() * float.size()];
    match float {
        Float::F16 => convert::f16_to_f32::<L>(bytes, out),
        Float::F32 => {
            for (x, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *x = f32::from_le_bytes(*bytes);
            }
        }
    }
}

#[inline(always)]
fn decode_row<L: Lanes, E: Eight>(layout: &Grouped, group: usize, planes: &Planes<'_>, row: &mut [f32]) {
    let group_bytes = group * layout.bits() as usize / 8;
    let (mut scales, mut addends) = ([0.0; BATCH], [0.0; BATCH]);
    for (b, weights) in row.chunks_mut(BATCH * group).enumerate() {
        let first = b * BATCH;
        let count = weights.len().div_ceil(group);
        load_floats::<L>(layout.scale(), planes.scales, first, &mut scales[..count]);
        if let Some(float) = layout.offset() {
            load_floats::<L>(float, planes.addends, first, &mut addends[..count]);
        } else if layout.levels() == Levels::ZeroPoint {
            for (i, zero_point) in addends[..count].iter_mut().enumerate() {
                *zero_point = f32::from(load_bits(layout.bits(), planes.addends, first + i));
            }
        }
        let codes = &planes.codes[first * group_bytes..];
        match (layout.levels(), layout.bits()) {
            (Levels::Unsigned, 4) if layout.offset().is_some() => {
                eights(weights, codes, group, &scales, &addends, |word, scale, offset| {
                    E::nibbles(word) * E::splat(scale) + E::splat(offset)
                });
            }
            (Levels::Signed, 4) => eights(weights, codes, group, &scales, &addends, |word, scale, _| {
                (E::nibbles(word) - E::splat(8.0)) * E::splat(scale)
            }),
            (Levels::ZeroPoint, 4) => eights(weights, codes, group, &scales, &addends, |word, scale, zero_point| {
                (E::nibbles(word) - E::splat(zero_point)) * E::splat(scale)
            }),
            (Levels::Table(table), _) => eights(weights, codes, group, &scales, &addends, |word, scale, _| {
                E::lookup(word, table) * E::splat(scale)
            }),
            (Levels::Signed, 8) => bytes(weights, codes, group, &scales, |codes, scale| {
                (E::bytes(codes) - E::splat(128.0)) * E::splat(scale)
            }),
            _ => unreachable!("checked by decode()"),
        }
    }
    tail(layout, group, planes, row);
}

/// Decodes what whole eights leave of a row, at most seven weights of its last group.
fn tail(layout: &Grouped, group: usize, planes: &Planes<'_>, row: &mut [f32]) {
    let start = row.len() - row.len() % 8;
    let params = (start < row.len()).then(|| reference::load_params(layout, planes, start / group));
    if let Some(params) = params {
        for (i, w) in row.iter_mut().enumerate().skip(start) {
            *w = reference::weight(layout, &params, layout.load_code(planes.codes, planes.high_codes, i));
        }
    }
}

/// Whole eights of 4-bit codes, group by group.
#[inline(always)]
fn eights<E: Eight>(
    weights: &mut [f32],
    codes: &[u8],
    group: usize,
    scales: &[f32],
    addends: &[f32],
    decode: impl Fn(u32, f32, f32) -> E,
) {
    let groups = weights.chunks_mut(group).zip(codes.chunks(group / 2)).zip(scales.iter().zip(addends));
    for ((weights, codes), (&scale, &addend)) in groups {
        for (weights, word) in weights.as_chunks_mut::<8>().0.iter_mut().zip(codes.as_chunks::<4>().0) {
            decode(u32::from_le_bytes(*word), scale, addend).store(weights);
        }
    }
}

/// Whole eights of 8-bit codes, group by group.
#[inline(always)]
fn bytes<E: Eight>(
    weights: &mut [f32],
    codes: &[u8],
    group: usize,
    scales: &[f32],
    decode: impl Fn([u8; 8], f32) -> E,
) {
    for ((weights, codes), &scale) in weights.chunks_mut(group).zip(codes.chunks(group)).zip(scales) {
        for (weights, codes) in weights.as_chunks_mut::<8>().0.iter_mut().zip(codes.as_chunks::<8>().0) {
            decode(*codes, scale).store(weights);
        }
    }
}
