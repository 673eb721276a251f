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
use super::head::LANES;
use super::table::LOG_TOTAL;

/// Columns that leave together.
const TILE: usize = 64;
/// Columns between two looks at how many words are left; as many codes fit a word of a lane.
const STRIDE: usize = 4;

/// Unsigned integers of 32 bits side by side.
trait Vector: Copy {
    /// How many.
    const WIDTH: usize;
    fn splat(x: i32) -> Self;
    fn load(from: &[u32]) -> Self;
    fn store(self, to: &mut [u32]);
    fn add(self, other: Self) -> Self;
    fn and(self, other: Self) -> Self;
    fn or(self, other: Self) -> Self;
    fn xor(self, other: Self) -> Self;
    fn multiply(self, other: Self) -> Self;
    /// Between zero and `top`, as signed numbers.
    fn clamp(self, top: Self) -> Self;
    fn left<const BITS: u32>(self) -> Self;
    fn right<const BITS: u32>(self) -> Self;
    /// All bits where the lowest one is set.
    fn lowest(self) -> Self;
    /// # Safety
    /// Every element is an index into `slots`.
    unsafe fn gather(self, slots: &[u32]) -> Self;
    /// Elements below 2^16 go up by 16 bits and take a word each, in their order; also says how many do.
    ///
    /// # Safety
    /// As many words as elements can be read.
    unsafe fn refill(self, words: *const u8) -> (Self, usize);
}

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

mod x86 {
    use std::arch::x86_64::*;

    use super::{LANES, Progress, Rows, Vector, decode};

    #[target_feature(enable = "avx512f")]
    pub(super) fn avx512(rows: &Rows<'_>, progress: &mut Progress<'_>, out: &mut [u8]) -> usize {
        decode::<Z, { LANES / 16 }>(rows, progress, out)
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn avx2(rows: &Rows<'_>, progress: &mut Progress<'_>, out: &mut [u8]) -> usize {
        decode::<Y, { LANES / 8 }>(rows, progress, out)
    }

    /// Sixteen elements; only made where AVX-512F is.
    #[derive(Clone, Copy)]
    struct Z(__m512i);

    /// Eight elements; only made where AVX2 is.
    #[derive(Clone, Copy)]
    struct Y(__m256i);

    /// For a method whose instructions are there because its type is only used in functions that enable them.
    macro_rules! there {
        ($body:expr) => {
            // SAFETY: the type is only used inside functions that enable its instruction set.
            unsafe { $body }
        };
    }

    impl Vector for Z {
        const WIDTH: usize = 16;
        #[inline(always)]
        fn splat(x: i32) -> Self {
            Self(there!(_mm512_set1_epi32(x)))
        }
        #[inline(always)]
        fn load(from: &[u32]) -> Self {
            let from = &from[..16];
            Self(there!(_mm512_loadu_si512(from.as_ptr().cast())))
        }
        #[inline(always)]
        fn store(self, to: &mut [u32]) {
            let to = &mut to[..16];
            there!(_mm512_storeu_si512(to.as_mut_ptr().cast(), self.0));
        }
        #[inline(always)]
        fn add(self, other: Self) -> Self {
            Self(there!(_mm512_add_epi32(self.0, other.0)))
        }
        #[inline(always)]
        fn and(self, other: Self) -> Self {
            Self(there!(_mm512_and_si512(self.0, other.0)))
        }
        #[inline(always)]
        fn or(self, other: Self) -> Self {
            Self(there!(_mm512_or_si512(self.0, other.0)))
        }
        #[inline(always)]
        fn xor(self, other: Self) -> Self {
            Self(there!(_mm512_xor_si512(self.0, other.0)))
        }
        #[inline(always)]
        fn multiply(self, other: Self) -> Self {
            Self(there!(_mm512_mullo_epi32(self.0, other.0)))
        }
        #[inline(always)]
        fn clamp(self, top: Self) -> Self {
            Self(there!(_mm512_min_epi32(_mm512_max_epi32(self.0, _mm512_setzero_si512()), top.0)))
        }
        #[inline(always)]
        fn left<const BITS: u32>(self) -> Self {
            Self(there!(_mm512_slli_epi32::<BITS>(self.0)))
        }
        #[inline(always)]
        fn right<const BITS: u32>(self) -> Self {
            Self(there!(_mm512_srli_epi32::<BITS>(self.0)))
        }
        #[inline(always)]
        fn lowest(self) -> Self {
            Self(there!(_mm512_srai_epi32::<31>(_mm512_slli_epi32::<31>(self.0))))
        }
        #[inline(always)]
        unsafe fn gather(self, slots: &[u32]) -> Self {
            Self(there!(_mm512_i32gather_epi32::<4>(self.0, slots.as_ptr().cast())))
        }
        #[inline(always)]
        unsafe fn refill(self, words: *const u8) -> (Self, usize) {
            there!({
                let low = _mm512_cmplt_epu32_mask(self.0, _mm512_set1_epi32(1 << 16));
                let next = _mm512_cvtepu16_epi32(_mm256_loadu_si256(words.cast()));
                let next = _mm512_maskz_expand_epi32(low, next);
                let up = _mm512_mask_slli_epi32::<16>(self.0, low, self.0);
                (Self(_mm512_or_si512(up, next)), low.count_ones() as usize)
            })
        }
    }

    /// For each mask of lanes, which word each lane takes.
    static SPREAD: [[u8; 8]; 256] = {
        let mut spread = [[0; 8]; 256];
        let mut mask = 0;
        while mask < 256 {
            let (mut lane, mut word) = (0, 0);
            while lane < 8 {
                if mask >> lane & 1 == 1 {
                    spread[mask][lane] = word;
                    word += 1;
                }
                lane += 1;
            }
            mask += 1;
        }
        spread
    };

    impl Vector for Y {
        const WIDTH: usize = 8;
        #[inline(always)]
        fn splat(x: i32) -> Self {
            Self(there!(_mm256_set1_epi32(x)))
        }
        #[inline(always)]
        fn load(from: &[u32]) -> Self {
            let from = &from[..8];
            Self(there!(_mm256_loadu_si256(from.as_ptr().cast())))
        }
        #[inline(always)]
        fn store(self, to: &mut [u32]) {
            let to = &mut to[..8];
            there!(_mm256_storeu_si256(to.as_mut_ptr().cast(), self.0));
        }
        #[inline(always)]
        fn add(self, other: Self) -> Self {
            Self(there!(_mm256_add_epi32(self.0, other.0)))
        }
        #[inline(always)]
        fn and(self, other: Self) -> Self {
            Self(there!(_mm256_and_si256(self.0, other.0)))
        }
        #[inline(always)]
        fn or(self, other: Self) -> Self {
            Self(there!(_mm256_or_si256(self.0, other.0)))
        }
        #[inline(always)]
        fn xor(self, other: Self) -> Self {
            Self(there!(_mm256_xor_si256(self.0, other.0)))
        }
        #[inline(always)]
        fn multiply(self, other: Self) -> Self {
            Self(there!(_mm256_mullo_epi32(self.0, other.0)))
        }
        #[inline(always)]
        fn clamp(self, top: Self) -> Self {
            Self(there!(_mm256_min_epi32(_mm256_max_epi32(self.0, _mm256_setzero_si256()), top.0)))
        }
        #[inline(always)]
        fn left<const BITS: u32>(self) -> Self {
            Self(there!(_mm256_sll_epi32(self.0, _mm_cvtsi32_si128(BITS as i32))))
        }
        #[inline(always)]
        fn right<const BITS: u32>(self) -> Self {
            Self(there!(_mm256_srl_epi32(self.0, _mm_cvtsi32_si128(BITS as i32))))
        }
        #[inline(always)]
        fn lowest(self) -> Self {
            Self(there!(_mm256_srai_epi32::<31>(_mm256_slli_epi32::<31>(self.0))))
        }
        #[inline(always)]
        unsafe fn gather(self, slots: &[u32]) -> Self {
            Self(there!(_mm256_i32gather_epi32::<4>(slots.as_ptr().cast(), self.0)))
        }
        #[inline(always)]
        unsafe fn refill(self, words: *const u8) -> (Self, usize) {
            there!({
                let low = _mm256_cmpeq_epi32(_mm256_srli_epi32::<16>(self.0), _mm256_setzero_si256());
                let mask = _mm256_movemask_ps(_mm256_castsi256_ps(low));
                let next = _mm256_cvtepu16_epi32(_mm_loadu_si128(words.cast()));
                let order = _mm256_cvtepu8_epi32(_mm_loadl_epi64(SPREAD[mask as usize].as_ptr().cast()));
                let next = _mm256_permutevar8x32_epi32(next, order);
                let up = _mm256_or_si256(_mm256_slli_epi32::<16>(self.0), next);
                (Self(_mm256_blendv_epi8(self.0, up, low)), mask.count_ones() as usize)
            })
        }
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
