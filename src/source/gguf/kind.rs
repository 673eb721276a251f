//! Types of tensors in GGUF: how many weights a block has, in how many bytes, and what its codes mean.
//!
//! Every quantized type is codes with a scale a group, in f32: those of the K types are products of an F16 and a short
//! integer, which f32 holds exactly.

use crate::source::packed::{Levels, Scheme};
use crate::tensor::DType;

/// A type whose weights are stored one by one.
const PLAIN: &[(u32, DType)] = &[
    (0, DType::F32),
    (1, DType::F16),
    (24, DType::I8),
    (25, DType::I16),
    (26, DType::I32),
    (27, DType::I64),
    (28, DType::F64),
    (30, DType::BF16),
];

/// A quantized type.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Blocks {
    id: u32,
    /// Its name in reports.
    pub name: &'static str,
    /// Weights of a block.
    pub weights: usize,
    /// Bytes of a block.
    pub bytes: usize,
    pub scheme: Scheme,
}

const fn blocks(id: u32, name: &'static str, weights: usize, bytes: usize, scheme: (u32, Levels, usize)) -> Blocks {
    Blocks { id, name, weights, bytes, scheme: Scheme { bits: scheme.0, levels: scheme.1, group: scheme.2 } }
}

/// The sixteen levels of IQ4_NL and IQ4_XS.
const IQ4: [f32; 16] = [-127., -104., -83., -65., -49., -35., -22., -10., 1., 13., 25., 38., 53., 69., 89., 113.];

const QUANTIZED: &[Blocks] = &[
    blocks(2, "gguf q4_0", 32, 18, (4, Levels::Signed, 32)),
    blocks(3, "gguf q4_1", 32, 20, (4, Levels::Offset, 32)),
    blocks(6, "gguf q5_0", 32, 22, (5, Levels::Signed, 32)),
    blocks(7, "gguf q5_1", 32, 24, (5, Levels::Offset, 32)),
    blocks(8, "gguf q8_0", 32, 34, (8, Levels::Signed, 32)),
    blocks(10, "gguf q2_k", 256, 84, (2, Levels::Offset, 16)),
    blocks(11, "gguf q3_k", 256, 110, (3, Levels::Signed, 16)),
    blocks(12, "gguf q4_k", 256, 144, (4, Levels::Offset, 32)),
    blocks(13, "gguf q5_k", 256, 176, (5, Levels::Offset, 32)),
    blocks(14, "gguf q6_k", 256, 210, (6, Levels::Signed, 16)),
    blocks(20, "gguf iq4_nl", 32, 18, (4, Levels::Table(IQ4), 32)),
    blocks(23, "gguf iq4_xs", 256, 136, (4, Levels::Table(IQ4), 32)),
];

/// A type that is read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Kind {
    Plain(DType),
    Blocks(&'static Blocks),
}

impl Kind {
    /// The type of a number.
    pub fn of(id: u32) -> Option<Self> {
        let plain = PLAIN.iter().find(|(own, _)| *own == id).map(|(_, dtype)| Self::Plain(*dtype));
        plain.or_else(|| QUANTIZED.iter().find(|blocks| blocks.id == id).map(Self::Blocks))
    }

    /// The names of all types.
    pub fn names() -> String {
        let plain = PLAIN.iter().map(|(_, dtype)| dtype.name().to_owned());
        let quantized = QUANTIZED.iter().filter_map(|blocks| blocks.name.strip_prefix("gguf ")).map(str::to_uppercase);
        plain.chain(quantized).collect::<Vec<_>>().join(", ")
    }

    /// Bytes of a row of weights, if they fill whole blocks.
    pub fn row_bytes(self, weights: u64) -> Option<u64> {
        match self {
            Self::Plain(dtype) => weights.checked_mul(dtype.size()),
            Self::Blocks(own) if weights.is_multiple_of(own.weights as u64) => {
                (weights / own.weights as u64).checked_mul(own.bytes as u64)
            }
            Self::Blocks(_) => None,
        }
    }
}

impl Blocks {
    /// Reads one block.
    pub fn read(&self, block: &[u8], codes: &mut [u8], scales: &mut [f32], offsets: &mut [f32]) {
        match self.id {
            2 | 20 => {
                scales[0] = f16(&block[0..]);
                halves(&block[2..], codes);
            }
            3 => {
                (scales[0], offsets[0]) = (f16(&block[0..]), f16(&block[2..]));
                halves(&block[4..], codes);
            }
            6 => {
                scales[0] = f16(&block[0..]);
                halves(&block[6..], codes);
                fifth_bits(&block[2..6], codes);
            }
            7 => {
                (scales[0], offsets[0]) = (f16(&block[0..]), f16(&block[2..]));
                halves(&block[8..], codes);
                fifth_bits(&block[4..8], codes);
            }
            8 => {
                scales[0] = f16(&block[0..]);
                // Levels in two's complement.
                codes.iter_mut().zip(&block[2..]).for_each(|(code, level)| *code = level ^ 0x80);
            }
            10 => {
                let (d, least) = (f16(&block[80..]), f16(&block[82..]));
                for (i, &byte) in block[..16].iter().enumerate() {
                    scales[i] = d * f32::from(byte & 15);
                    offsets[i] = -(least * f32::from(byte >> 4));
                }
                pairs_of_bits(&block[16..80], codes);
            }
            11 => self.read_q3(block, codes, scales),
            12 | 13 => {
                let (d, least) = (f16(&block[0..]), f16(&block[2..]));
                let packed = &block[4..16];
                for i in 0..8 {
                    let (scale, offset) = six_bits(packed, i);
                    scales[i] = d * f32::from(scale);
                    offsets[i] = -(least * f32::from(offset));
                }
                let low = &block[self.bytes - 128..];
                for (i, code) in codes.iter_mut().enumerate() {
                    *code = low[i / 64 * 32 + i % 32] >> (i / 32 % 2 * 4) & 15;
                }
                if self.id == 13 {
                    let high = &block[16..48];
                    codes.iter_mut().enumerate().for_each(|(i, code)| *code |= (high[i % 32] >> (i / 32) & 1) << 4);
                }
            }
            14 => {
                let d = f16(&block[208..]);
                for (scale, &byte) in scales.iter_mut().zip(&block[192..208]) {
                    *scale = d * f32::from(i8::from_le_bytes([byte]));
                }
                for (i, code) in codes.iter_mut().enumerate() {
                    let low = block[i / 128 * 64 + i % 64] >> (i / 64 % 2 * 4) & 15;
                    let high = block[128 + i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3;
                    *code = low | high << 4;
                }
            }
            _ => {
                let d = f16(&block[0..]);
                let high = u16::from_le_bytes([block[2], block[3]]);
                for (i, scale) in scales.iter_mut().enumerate() {
                    let low = block[4 + i / 2] >> (i % 2 * 4) & 15;
                    let level = i16::from(low) | (high >> (2 * i) & 3).cast_signed() << 4;
                    *scale = d * f32::from(level - 32);
                }
                block[8..].chunks(16).zip(codes.chunks_mut(32)).for_each(|(bytes, codes)| halves(bytes, codes));
            }
        }
    }

    /// Reads one block of Q3_K.
    fn read_q3(&self, block: &[u8], codes: &mut [u8], scales: &mut [f32]) {
        let (mask, packed, d) = (&block[..32], &block[96..108], f16(&block[108..]));
        for (i, scale) in scales.iter_mut().enumerate() {
            let low = packed[i % 8] >> (i / 8 * 4) & 15;
            let high = packed[8 + i % 4] >> (i / 4 * 2) & 3;
            *scale = d * f32::from(i16::from(low | high << 4) - 32);
        }
        pairs_of_bits(&block[32..96], codes);
        codes.iter_mut().enumerate().for_each(|(i, code)| *code |= (mask[i % 32] >> (i / 32) & 1) << 2);
    }
}

fn f16(bytes: &[u8]) -> f32 {
    half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// 4-bit codes, the first half of a block in the low bits.
fn halves(bytes: &[u8], codes: &mut [u8]) {
    let half = codes.len() / 2;
    for (i, byte) in bytes[..half].iter().enumerate() {
        (codes[i], codes[half + i]) = (byte & 15, byte >> 4);
    }
}

/// The fifth bit of each of 32 codes.
fn fifth_bits(bits: &[u8], codes: &mut [u8]) {
    codes.iter_mut().enumerate().for_each(|(i, code)| *code |= (bits[i / 8] >> (i % 8) & 1) << 4);
}

/// Two bits of each of 256 codes: of 128 of them, four times 32 share a byte each.
fn pairs_of_bits(bytes: &[u8], codes: &mut [u8]) {
    for (i, code) in codes.iter_mut().enumerate() {
        *code = bytes[i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3;
    }
}

/// Scale and offset number `i` of eight, of six bits each in twelve bytes.
fn six_bits(packed: &[u8], i: usize) -> (u8, u8) {
    if i < 4 {
        return (packed[i] & 63, packed[i + 4] & 63);
    }
    let (scale, offset, both) = (packed[i - 4], packed[i], packed[i + 4]);
    (both & 15 | (scale >> 2 & 0x30), both >> 4 | (offset >> 2 & 0x30))
}
