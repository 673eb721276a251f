//! Thirty-two lanes of a block at once, by the widest vectors of this machine: the same codes as [`super::block`] gives.
//!
//! A lane's table, slot and state live in one vector element each; the next words are spread over the lanes that need
//! one. Codes come out column by column and leave through a tile of 64 columns, because 32 rows a power of two apart
//! would evict each other from the first cache.

#![expect(
    unsafe_code,
    reason = "vector instructions are unsafe to call where they may be missing, and gathers read memory"
)]

use super::block::{Progress, Rows};
use super::bytes::Progress as Bytes;
use super::head::LANES;
use super::lanes::Vector;
use super::table::LOG_TOTAL;

/// Columns that leave together.
const TILE: usize = 64;
/// Columns between two looks at how many words are left; as many codes fit a word of a lane.
const STRIDE: usize = 4;

/// Decodes full sets of rows until words run low; says at which column.
#[inline(always)]
fn decode<V: Vector, const VECTORS: usize>(rows: &Rows<'_>, progress: &mut Progress<'_>, out: &mut [u8]) -> usize {
    let contexts = rows.contexts;
    let model = &contexts.model;
    assert!(VECTORS * V::WIDTH == LANES && out.len() == LANES * rows.cols, "lanes and rows do not match");
    let tables = model.quantizers() * usize::from(model.contexts);
    assert!(rows.slots.len() == tables << LOG_TOTAL && contexts.cols.len() == rows.cols, "tables do not match");
    let trellis = model.trellis.is_some();
    let (odd, second) = model.trellis.map_or((0, 0), |trellis| trellis.taps());
    let (odd, second) = (V::splat(i32::from(odd)), V::splat(i32::from(second)));
    let top = V::splat(i32::from(model.contexts) - 1);
    let next_quantizer = V::splat(i32::from(model.contexts) << LOG_TOTAL);
    let low_slot = V::splat((1 << LOG_TOTAL) - 1);
    let low_byte = V::splat(255);
    let mut base = [V::splat(0); VECTORS];
    let mut state = [V::splat(0); VECTORS];
    let mut machine = [V::splat(0); VECTORS];
    for v in 0..VECTORS {
        let mut lanes = [0u32; 16];
        for (l, lane) in lanes[..V::WIDTH].iter_mut().enumerate() {
            *lane = (i32::from(contexts.center) + i32::from(contexts.rows[rows.first + v * V::WIDTH + l])) as u32;
        }
        base[v] = V::load(&lanes);
        state[v] = V::load(&progress.states[v * V::WIDTH..]);
    }
    let mut tile = [[0u32; TILE / STRIDE]; LANES];
    let mut words = progress.words;
    let mut col = 0;
    let mut shown = 0;
    while col < rows.cols {
        let here = (rows.cols - col).min(STRIDE);
        if words.len() < 2 * LANES * STRIDE {
            break;
        }
        let mut codes = [V::splat(0); VECTORS];
        let mut at = 0;
        for i in 0..here {
            let column = V::splat(i32::from(contexts.cols[col + i]));
            for v in 0..VECTORS {
                let x = state[v];
                let mut slot = base[v].add(column).clamp(top).left::<LOG_TOTAL>().or(x.and(low_slot));
                if trellis {
                    slot = slot.add(machine[v].lowest().and(next_quantizer));
                }
                // SAFETY: the context is clamped to those of the model, the slot has 12 bits, and the quantizer is
                // the second one only with a trellis: the index is below the length asserted above.
                let entry = unsafe { slot.gather(rows.slots) };
                let code = entry.and(low_byte);
                let x = entry.right::<20>().multiply(x.right::<LOG_TOTAL>()).add(entry.right::<8>().and(low_slot));
                // SAFETY: a column takes at most one word per lane, and `STRIDE` columns of them are there.
                let (x, taken) = unsafe { x.refill(words.as_ptr().add(2 * at)) };
                at += taken;
                state[v] = x;
                if trellis {
                    let turned = machine[v].lowest().and(odd).xor(code.right::<1>().lowest().and(second));
                    machine[v] = machine[v].right::<1>().xor(turned);
                }
                codes[v] = codes[v].right::<8>().or(code.left::<24>());
            }
        }
        words = &words[2 * at..];
        for v in 0..VECTORS {
            let mut lanes = [0u32; 16];
            codes[v].store(&mut lanes);
            for (l, lane) in lanes[..V::WIDTH].iter().enumerate() {
                tile[v * V::WIDTH + l][(col - shown) / STRIDE] = lane >> (8 * (STRIDE - here));
            }
        }
        col += here;
        if col - shown == TILE {
            show(&tile, rows.cols, shown, col, out);
            shown = col;
        }
    }
    show(&tile, rows.cols, shown, col, out);
    for v in 0..VECTORS {
        state[v].store(&mut progress.states[v * V::WIDTH..]);
        let mut lanes = [0u32; 16];
        machine[v].store(&mut lanes);
        for (l, lane) in lanes[..V::WIDTH].iter().enumerate() {
            progress.machines[v * V::WIDTH + l] = (lane & 255) as u8;
        }
    }
    progress.words = words;
    col
}

/// Writes columns `from..to` of a tile.
#[inline(always)]
fn show(tile: &[[u32; TILE / STRIDE]; LANES], cols: usize, from: usize, to: usize, out: &mut [u8]) {
    for (row, tile) in out.chunks_exact_mut(cols).zip(tile) {
        let mut bytes = [0u8; TILE];
        for (bytes, word) in bytes.chunks_exact_mut(4).zip(tile) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        row[from..to].copy_from_slice(&bytes[..to - from]);
    }
}

/// Decodes 32 rows as far as vectors can; says at which column.
pub(super) fn decode_set(rows: &Rows<'_>, progress: &mut Progress<'_>, out: &mut [u8]) -> usize {
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the feature was detected on the line above.
        return unsafe { x86::avx512(rows, progress, out) };
    }
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the feature was detected on the line above.
        return unsafe { x86::avx2(rows, progress, out) };
    }
    0
}

/// Decodes whole rounds of lanes until words run low; says how many bytes that gave.
#[inline(always)]
fn rounds<V: Vector, const VECTORS: usize>(slots: &[u32], progress: &mut Bytes<'_>, out: &mut [u8]) -> usize {
    let tables = slots.len() >> LOG_TOTAL;
    assert!(VECTORS * V::WIDTH == LANES && tables << LOG_TOTAL == slots.len(), "lanes and tables do not match");
    assert!(tables > 0 && V::WIDTH.is_multiple_of(tables), "elements do not fill a vector");
    let mut first = [0u32; 16];
    for (table, first) in (0..tables).cycle().zip(&mut first) {
        *first = u32::try_from(table << LOG_TOTAL).expect("at most 8 tables");
    }
    let first = V::load(&first[..V::WIDTH]);
    let low_slot = V::splat((1 << LOG_TOTAL) - 1);
    let mut state = [V::splat(0); VECTORS];
    for (state, from) in state.iter_mut().zip(progress.states.chunks_exact(V::WIDTH)) {
        *state = V::load(from);
    }
    let mut words = progress.words;
    let mut done = 0;
    for round in out.chunks_exact_mut(LANES) {
        if words.len() < 2 * LANES {
            break;
        }
        let mut at = 0;
        for v in 0..VECTORS {
            let x = state[v];
            // SAFETY: the slot has 12 bits and the table is one of those asserted above.
            let entry = unsafe { first.or(x.and(low_slot)).gather(slots) };
            entry.store_bytes(&mut round[v * V::WIDTH..][..V::WIDTH]);
            let x = entry.right::<20>().multiply(x.right::<LOG_TOTAL>()).add(entry.right::<8>().and(low_slot));
            // SAFETY: a round takes at most one word per lane, and as many are there.
            let (x, taken) = unsafe { x.refill(words.as_ptr().add(2 * at)) };
            at += taken;
            state[v] = x;
        }
        words = &words[2 * at..];
        done += LANES;
    }
    for (state, to) in state.iter().zip(progress.states.chunks_exact_mut(V::WIDTH)) {
        state.store(to);
    }
    progress.words = words;
    done
}

/// Decodes bytes of a block as far as vectors can; says how many.
pub(super) fn decode_bytes(slots: &[u32], progress: &mut Bytes<'_>, out: &mut [u8]) -> usize {
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the feature was detected on the line above.
        return unsafe { x86::avx512_bytes(slots, progress, out) };
    }
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the feature was detected on the line above.
        return unsafe { x86::avx2_bytes(slots, progress, out) };
    }
    0
}

/// A bit for each code that is not one of `many` from `first` on, which may go over the end; by SSE2.
pub(super) fn outside(codes: &[u8; 64], [first, many]: [u8; 2]) -> u64 {
    let sixteen = |codes| u64::from(x86::outside(codes, first, many));
    codes.as_chunks::<16>().0.iter().rev().fold(0, |bits, codes| bits << 16 | sixteen(codes))
}

mod x86 {
    use std::arch::x86_64::*;

    use super::super::lanes::{Y, Z};
    use super::{Bytes, LANES, Progress, Rows, decode, rounds};

    pub(super) fn outside(codes: &[u8; 16], first: u8, many: u8) -> u32 {
        // SAFETY: every x86-64 has SSE2, and sixteen codes are read.
        unsafe {
            let codes = _mm_loadu_si128(codes.as_ptr().cast());
            let from = _mm_sub_epi8(codes, _mm_set1_epi8(first.cast_signed()));
            let outside = _mm_cmpeq_epi8(_mm_max_epu8(from, _mm_set1_epi8(many.cast_signed())), from);
            _mm_movemask_epi8(outside).cast_unsigned()
        }
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn avx512(rows: &Rows<'_>, progress: &mut Progress<'_>, out: &mut [u8]) -> usize {
        decode::<Z, { LANES / 16 }>(rows, progress, out)
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn avx2(rows: &Rows<'_>, progress: &mut Progress<'_>, out: &mut [u8]) -> usize {
        decode::<Y, { LANES / 8 }>(rows, progress, out)
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn avx512_bytes(slots: &[u32], progress: &mut Bytes<'_>, out: &mut [u8]) -> usize {
        rounds::<Z, { LANES / 16 }>(slots, progress, out)
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn avx2_bytes(slots: &[u32], progress: &mut Bytes<'_>, out: &mut [u8]) -> usize {
        rounds::<Y, { LANES / 8 }>(slots, progress, out)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{block, context, table::ZERO, trellis::Trellis};
    use super::*;

    type Decode = fn(&Rows<'_>, &mut Progress<'_>, &mut [u8]) -> usize;

    /// The vectors of this machine.
    fn available() -> Vec<Decode> {
        let mut found: Vec<Decode> = Vec::new();
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the feature was detected on the line above.
            found.push(|rows, progress, out| unsafe { x86::avx2(rows, progress, out) });
        }
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the feature was detected on the line above.
            found.push(|rows, progress, out| unsafe { x86::avx512(rows, progress, out) });
        }
        found
    }

    #[test]
    fn every_vector_decodes_as_one_lane_does_wherever_words_run_low() {
        for (cols, trellis) in
            [(1, None), (63, Trellis::new(5)), (64, None), (130, Trellis::new(8)), (303, Trellis::new(2))]
        {
            // Any codes that the machine allows; those far out are escaped.
            let mut seed = 1u64;
            let mut codes = vec![0u8; LANES * cols];
            for row in codes.chunks_exact_mut(cols) {
                let mut state = 0u8;
                for code in row {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let wide = if seed >> 60 == 0 { 120 } else { 9 };
                    let level = (seed >> 33) % wide;
                    *code = ZERO - 60 + u8::try_from(level + (120 - wide) / 2).expect("below 120");
                    if let Some(trellis) = trellis {
                        *code += (*code ^ state) & 1;
                        state = trellis.next(state, *code);
                    }
                }
            }
            let contexts = context::fit(&codes, LANES, cols, trellis);
            let tables = contexts.model.tables();
            let coded = block::encode(&contexts, &block::Symbols::new(&contexts), 0, &codes, cols)
                .expect("the machine allows these codes");
            let slots = block::slots(&tables);
            let rows = Rows { contexts: &contexts, slots: &slots, first: 0, cols };
            let words = &coded.bytes[4 * LANES..][..2 * coded.words as usize];
            let start = || {
                let mut states = [0; LANES];
                for (state, bytes) in states.iter_mut().zip(coded.bytes.chunks_exact(4)) {
                    *state = u32::from_le_bytes(bytes.try_into().expect("four bytes"));
                }
                Progress { states, machines: [0; LANES], words }
            };
            let mut want = vec![0; codes.len()];
            let mut last = start();
            assert!(block::decode_set(&rows, 0, &mut last, &mut want));
            for decode in available() {
                let mut got = vec![0; codes.len()];
                let mut progress = start();
                let from = decode(&rows, &mut progress, &mut got);
                assert!(block::decode_set(&rows, from, &mut progress, &mut got));
                assert_eq!((got, progress.states), (want.clone(), last.states), "{cols} columns");
                assert!(progress.words.is_empty() && last.words.is_empty());
            }
        }
    }
}
