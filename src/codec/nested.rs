//! Decoding nested scales: the table of a group is found once, its levels eight at a time.

use super::lanes::Eight;
use super::{Planes, Strides};
use crate::layout::{Bank, Grouped, LEVELS};

/// Decodes consecutive rows: the same floats as the reference.
#[inline(always)]
pub(super) fn decode<E: Eight>(layout: &Grouped, bank: &Bank, planes: &Planes<'_>, cols: usize, out: &mut [f32]) {
    let levels = bank.levels().map(f32::from);
    let strides = Strides::new(layout, cols);
    for (r, row) in out.chunks_exact_mut(cols).enumerate() {
        let planes = planes.rows(&strides, r, 1);
        let row_scale = layout.scale().load(planes.row_scales, 0);
        let groups = row.chunks_mut(layout.group()).zip(planes.scales);
        let codes = planes.codes.chunks(layout.group() / 2);
        if bank.bits() == 4 {
            for ((weights, &byte), codes) in groups.zip(codes) {
                let scale = bank.multiplier(byte) * row_scale;
                short::<E>(&levels, bank.high(byte), scale, codes, weights);
            }
        } else {
            let bits = layout.high_bits() as usize;
            let high_codes = planes.high_codes.chunks(layout.group() * bits / 8);
            for ((weights, &byte), codes) in groups.zip(codes.zip(high_codes)) {
                let scale = bank.multiplier(byte) * row_scale;
                long(&levels, bank.high(byte), scale, bits, codes, weights);
            }
        }
    }
}

/// A group of 4-bit codes.
#[inline(always)]
fn short<E: Eight>(levels: &[f32; LEVELS], first: u8, scale: f32, codes: &[u8], weights: &mut [f32]) {
    let table = levels.as_chunks::<16>().0[usize::from(first) / 16 % 4];
    let (eights, rest) = weights.as_chunks_mut::<8>();
    let (words, _) = codes.as_chunks::<4>();
    for (weights, word) in eights.iter_mut().zip(words) {
        (E::lookup(u32::from_le_bytes(*word), &table) * E::splat(scale)).store(weights);
    }
    // A row of codes ends with a whole word.
    let codes = &codes[4 * eights.len()..];
    for (i, weight) in rest.iter_mut().enumerate() {
        *weight = table[usize::from(codes[i / 2] >> (4 * (i % 2)) & 15)] * scale;
    }
}

/// A group of codes whose high bits lie apart.
#[inline(always)]
fn long(
    levels: &[f32; LEVELS],
    first: u8,
    scale: f32,
    bits: usize,
    (codes, high_codes): (&[u8], &[u8]),
    weights: &mut [f32],
) {
    let mask = (1 << bits) - 1;
    // Both planes pad rows to whole words, so that eight codes are there where one is.
    let words = codes.chunks(4).zip(high_codes.chunks(bits));
    for (weights, (low, high)) in weights.chunks_mut(8).zip(words) {
        let mut word = [0; 4];
        word[..low.len()].copy_from_slice(low);
        let low = u32::from_le_bytes(word);
        let high = high.iter().rev().fold(0_u32, |word, &byte| word << 8 | u32::from(byte));
        for (i, weight) in weights.iter_mut().enumerate() {
            let code = (low >> (4 * i) & 15) | (high >> (bits * i) & mask) << 4;
            *weight = levels[(usize::from(first) | code as usize) % LEVELS] * scale;
        }
    }
}
