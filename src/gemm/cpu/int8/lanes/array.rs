//! Words in an array: what any machine can do, and what the vectors must equal.

use super::Lanes;

/// Four words.
pub(in super::super) struct Words;

/// Four bytes of each of four words, as a matrix.
type Bytes = [[u8; 4]; 4];

impl Lanes for Words {
    const N: usize = 4;
    type Bytes = Bytes;
    type Ints = [i32; 4];
    type Floats = [f32; 4];
    type Index = u32;

    #[inline(always)]
    fn nibbles(codes: &[u8]) -> [Bytes; 2] {
        let (mut even, mut odd) = (Bytes::default(), Bytes::default());
        for (l, codes) in codes[..16].as_chunks::<4>().0.iter().enumerate() {
            even[l] = codes.map(|pair| pair & 15);
            odd[l] = codes.map(|pair| pair >> 4);
        }
        [even, odd]
    }

    #[inline(always)]
    fn octets(codes: &[u8]) -> [Bytes; 2] {
        let (mut first, mut last) = (Bytes::default(), Bytes::default());
        for (l, codes) in codes[..32].as_chunks::<8>().0.iter().enumerate() {
            first[l].copy_from_slice(&codes[..4]);
            last[l].copy_from_slice(&codes[4..]);
        }
        [first, last]
    }

    #[inline(always)]
    fn load_bytes(words: &[u32]) -> Bytes {
        [0, 1, 2, 3].map(|l| words[l].to_le_bytes())
    }

    #[inline(always)]
    fn load_ints(words: &[u32]) -> [i32; 4] {
        [0, 1, 2, 3].map(|l| words[l].cast_signed())
    }

    #[inline(always)]
    fn load_floats(words: &[u32]) -> [f32; 4] {
        [0, 1, 2, 3].map(|l| f32::from_bits(words[l]))
    }

    #[inline(always)]
    fn load(floats: &[f32]) -> [f32; 4] {
        [0, 1, 2, 3].map(|l| floats[l])
    }

    #[inline(always)]
    fn splat_bytes(bytes: [u8; 4]) -> Bytes {
        [bytes; 4]
    }

    #[inline(always)]
    fn splat_int(x: i32) -> [i32; 4] {
        [x; 4]
    }

    #[inline(always)]
    fn splat(x: f32) -> [f32; 4] {
        [x; 4]
    }

    #[inline(always)]
    fn dot<const BITS: u32>(mut sum: [i32; 4], codes: Bytes, x: Bytes) -> [i32; 4] {
        for l in 0..4 {
            for i in 0..4 {
                sum[l] += i32::from(codes[l][i]) * i32::from(x[l][i].cast_signed());
            }
        }
        sum
    }

    #[inline(always)]
    fn times(a: [i32; 4], b: [i32; 4]) -> [i32; 4] {
        [0, 1, 2, 3].map(|l| a[l] * b[l])
    }

    #[inline(always)]
    fn to_floats(x: [i32; 4]) -> [f32; 4] {
        #[expect(clippy::cast_precision_loss, reason = "sums of a few products have less than 24 bits")]
        x.map(|x| x as f32)
    }

    #[inline(always)]
    fn mul(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        [0, 1, 2, 3].map(|l| a[l] * b[l])
    }

    #[inline(always)]
    fn mul_add(a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        [0, 1, 2, 3].map(|l| a[l] * b[l] + c[l])
    }

    #[inline(always)]
    fn sum(x: [f32; 4]) -> f32 {
        (x[0] + x[2]) + (x[1] + x[3])
    }

    #[inline(always)]
    fn store(x: [f32; 4], out: &mut [f32]) {
        out[..4].copy_from_slice(&x);
    }

    #[inline(always)]
    fn index(shift: u32) -> u32 {
        shift
    }

    #[inline(always)]
    fn spread(floats: &[f32], shift: u32) -> [f32; 4] {
        [0usize, 1, 2, 3].map(|l| floats[l >> shift])
    }

    #[inline(always)]
    fn spread_ints(ints: &[i32], shift: u32) -> [i32; 4] {
        [0usize, 1, 2, 3].map(|l| ints[l >> shift])
    }
}
