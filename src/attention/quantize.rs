//! Numbers that share a scale and an offset: the rule that makes codes of them, and back.

use half::f16;

/// The greatest magnitude of a key or a value: that of an f16.
pub const MAX: f32 = 65_504.0;

/// Scale and offset of f16 numbers as a word: two f16, the scale in the low half.
pub(super) fn params(numbers: impl Iterator<Item = f32> + Clone, bits: u32) -> u32 {
    let least = numbers.clone().fold(f32::INFINITY, |least, x| if x < least { x } else { least }) + 0.0;
    let greatest = numbers.fold(f32::NEG_INFINITY, |greatest, x| if x > greatest { x } else { greatest });
    let offset = f16::from_f32(least);
    let scale = f16::from_f32((greatest - offset.to_f32()) / top(bits));
    u32::from(scale.to_bits()) | u32::from(offset.to_bits()) << 16
}

/// Scale and offset of a word.
pub(super) fn scale_offset(word: u32) -> (f32, f32) {
    let [a, b, c, d] = word.to_le_bytes();
    (f16::from_le_bytes([a, b]).to_f32(), f16::from_le_bytes([c, d]).to_f32())
}

/// The code of a number: the level nearest to it, ties to the even one.
pub(super) fn code(x: f32, scale: f32, offset: f32, bits: u32) -> u32 {
    if scale == 0.0 {
        return 0;
    }
    let level = ((x - offset) / scale).round_ties_even().clamp(0.0, top(bits));
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to the codes above")]
    let code = level as u32;
    code
}

/// The greatest level.
fn top(bits: u32) -> f32 {
    if bits == 8 { 255.0 } else { 15.0 }
}

/// Stores the codes of a row of zeroed words.
pub(super) fn pack(row: &mut [u32], bits: u32, channel: usize, code: u32) {
    let bit = channel * bits as usize;
    row[bit / 32] |= code << (bit % 32);
}

/// The codes of a row as numbers, as many as `out` holds.
pub(super) fn unpack(row: &[u32], bits: u32, out: &mut [f32]) {
    /// Both codes of a byte.
    const PAIRS: [[f32; 2]; 256] = {
        let mut pairs = [[0.0; 2]; 256];
        let mut byte = 0;
        while byte < 256 {
            pairs[byte] = [(byte % 16) as f32, (byte / 16) as f32];
            byte += 1;
        }
        pairs
    };
    if bits == 8 {
        for (out, word) in out.chunks_mut(4).zip(row) {
            let codes = word.to_le_bytes().map(f32::from);
            out.copy_from_slice(&codes[..out.len()]);
        }
        return;
    }
    for (out, word) in out.chunks_mut(8).zip(row) {
        let mut codes = [0.0; 8];
        for (to, byte) in codes.chunks_exact_mut(2).zip(word.to_le_bytes()) {
            to.copy_from_slice(&PAIRS[usize::from(byte)]);
        }
        out.copy_from_slice(&codes[..out.len()]);
    }
}
