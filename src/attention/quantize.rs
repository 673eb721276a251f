//! Numbers that share a scale and an offset: the rule that makes codes of them, and back.

/// The greatest magnitude of a key or a value: that of an f16.
pub const MAX: f32 = 65_504.0;

/// Scale and offset of numbers of this range as a word: two f16, the scale in the low half. Both ends are f16 already.
pub(super) fn params(least: f32, greatest: f32, bits: u32) -> u32 {
    // A negative zero is zero, so that the order of numbers never shows.
    half((greatest - least) / top(bits)) | half(least + 0.0) << 16
}

/// Scale and offset of a word.
pub(super) fn scale_offset(word: u32) -> (f32, f32) {
    (single(word & 0xffff), single(word >> 16))
}

/// The code of a number: the level nearest to it, ties to the even one.
pub(super) fn code(x: f32, scale: f32, offset: f32, bits: u32) -> u32 {
    if scale == 0.0 {
        return 0;
    }
    // Adding 2^23 rounds what is less to an integer, ties to even, and leaves it in the low bits.
    (((x - offset) / scale).clamp(0.0, top(bits)) + 8_388_608.0).to_bits() & 0xff
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
///
/// Codes become numbers where they stand in their half of a word, and then move down by a power of two: what is the same
/// for four neighbours is one instruction on any machine, which shifts by different distances are not.
pub(super) fn unpack(row: &[u32], bits: u32, out: &mut [f32]) {
    match bits {
        8 => unpack_words(row, out, |word| {
            let codes = [word & 0xff, word & 0xff00, word >> 16 & 0xff, word >> 16 & 0xff00];
            moved(codes, [1.0, 1.0 / 256.0, 1.0, 1.0 / 256.0])
        }),
        _ => unpack_words(row, out, |word| {
            let nibbles = |half: u32| {
                let codes = [half & 0xf, half & 0xf0, half & 0xf00, half & 0xf000];
                moved(codes, [1.0, 1.0 / 16.0, 1.0 / 256.0, 1.0 / 4096.0])
            };
            let ([a, b, c, d], [e, f, g, h]) = (nibbles(word & 0xffff), nibbles(word >> 16));
            [a, b, c, d, e, f, g, h]
        }),
    }
}

/// The numbers of words, of the last one as many as are left.
#[inline]
fn unpack_words<const N: usize>(row: &[u32], out: &mut [f32], numbers: impl Fn(u32) -> [f32; N]) {
    let mut words = row.iter();
    let mut whole = out.chunks_exact_mut(N);
    for (out, &word) in (&mut whole).zip(&mut words) {
        if let Ok(out) = <&mut [f32; N]>::try_from(out) {
            *out = numbers(word);
        }
    }
    if let (rest @ [_, ..], Some(&word)) = (whole.into_remainder(), words.next()) {
        rest.copy_from_slice(&numbers(word)[..rest.len()]);
    }
}

/// Numbers below 2^16 times powers of two.
#[inline]
fn moved(numbers: [u32; 4], powers: [f32; 4]) -> [f32; 4] {
    let mut moved = [0.0; 4];
    for ((to, number), power) in moved.iter_mut().zip(numbers).zip(powers) {
        *to = number as f32 * power;
    }
    moved
}

/// Finite numbers that f16 holds as words of two f16, the first one in the low half; ties to even.
pub(super) fn narrow(numbers: &[f32], words: &mut [u32]) {
    for (word, pair) in words.iter_mut().zip(numbers.chunks(2)) {
        *word = half(pair[0]) | half(pair.get(1).copied().unwrap_or(0.0)) << 16;
    }
}

/// The bits of the f16 nearest to a number that is not beyond them, without branches, so that many are made at once.
fn half(x: f32) -> u32 {
    let (bits, sign) = (x.to_bits() & 0x7fff_ffff, x.to_bits() >> 16 & 0x8000);
    // Half a unit of the last place, but for those that are as near to an even one; then the smaller exponent.
    let normal = (bits + 0xfff + (bits >> 13 & 1)).wrapping_sub(112 << 23) >> 13;
    // Below 2^-14 units are 2^-24, which is what the last place of 0.5 is worth.
    let small = (f32::from_bits(bits) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    sign | if bits < 113 << 23 { small } else { normal }
}

/// Words of two f16 as numbers, as many as `out` holds.
pub(super) fn widen(words: &[u32], out: &mut [f32]) {
    for (out, word) in out.chunks_mut(2).zip(words) {
        out[0] = single(word & 0xffff);
        if let Some(out) = out.get_mut(1) {
            *out = single(word >> 16);
        }
    }
}

/// A finite f16 as f32.
fn single(half: u32) -> f32 {
    let magnitude = half & 0x7fff;
    let normal = f32::from_bits((magnitude << 13) + (112 << 23));
    // As many units of 2^-24: the last place of 0.5, again.
    let small = f32::from_bits(magnitude + 0.5f32.to_bits()) - 0.5;
    let positive = if magnitude < 0x400 { small } else { normal };
    f32::from_bits(positive.to_bits() | (half & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::{MAX, half, single};

    #[test]
    fn halves_are_those_of_the_standard() {
        for bits in 0..=u16::MAX {
            let half = f16::from_bits(bits);
            if half.is_finite() {
                assert_eq!(single(u32::from(bits)).to_bits(), half.to_f32().to_bits(), "{bits:#x}");
            }
        }
        for bits in (0..=MAX.to_bits()).step_by(1_009).chain((0..0x8000).map(|n| (n << 13) + (1 << 12))) {
            for x in [f32::from_bits(bits), -f32::from_bits(bits)] {
                if x.abs() <= MAX {
                    assert_eq!(half(x), u32::from(f16::from_f32(x).to_bits()), "{x:e}");
                }
            }
        }
    }
}
