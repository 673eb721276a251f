//! A plane of F32 scales on disk: nearly nothing when all are equal, and never much more than the plane.
//!
//! | byte 0 | then |
//! |---|---|
//! | 0 | the one scale of all rows, 4 bytes |
//! | 1 | number of values less one (1 byte), the values, and which one each row has, range-coded |
//! | 2 | the plane itself |

#![expect(clippy::cast_possible_truncation, reason = "at most 256 values")]

use super::range::{Decoder, Encoder, Odds};
use crate::error::{Error, Result};

/// A binary tree of decisions: numbers below 256, the most usual ones cheapest.
struct Tree([Odds; 256]);

impl Tree {
    fn encode(&mut self, to: &mut Encoder, value: u8) {
        let mut node = 1;
        for i in (0..8).rev() {
            let bit = value >> i & 1 == 1;
            to.bit(&mut self.0[node], bit);
            node = node << 1 | usize::from(bit);
        }
    }

    fn decode(&mut self, from: &mut Decoder<'_>) -> u8 {
        let mut node = 1;
        for _ in 0..8 {
            node = node << 1 | usize::from(from.bit(&mut self.0[node]));
        }
        (node & 0xFF) as u8
    }
}

/// Scales as bytes; every bit of every number comes back.
#[must_use]
pub fn encode_scales(scales: &[f32]) -> Vec<u8> {
    let Some(first) = scales.first() else { return Vec::new() };
    let mut values: Vec<u32> = Vec::new();
    let indices: Option<Vec<u8>> = scales
        .iter()
        .map(|scale| {
            let bits = scale.to_bits();
            let at = values.iter().position(|&v| v == bits).unwrap_or_else(|| {
                values.push(bits);
                values.len() - 1
            });
            u8::try_from(at).ok()
        })
        .collect();
    if values.len() == 1 {
        return [&[0], &first.to_le_bytes()[..]].concat();
    }
    let mut out = vec![2];
    out.extend(scales.iter().flat_map(|scale| scale.to_le_bytes()));
    if let Some(indices) = indices {
        let (mut to, mut tree) = (Encoder::new(), Tree([Odds::EVEN; 256]));
        for &index in &indices {
            tree.encode(&mut to, index);
        }
        let mut short = vec![1, (values.len() - 1) as u8];
        short.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        short.extend(to.finish());
        if short.len() < out.len() {
            out = short;
        }
    }
    out
}

fn number(bytes: &[u8]) -> f32 {
    f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

/// The scales back.
///
/// # Errors
/// [`Error::Corrupt`], with the byte, when these are not the bytes of `count` scales.
pub fn decode_scales(bytes: &[u8], count: usize) -> Result<Vec<f32>> {
    let wrong = || Err(Error::corrupt(0, format!("{} bytes that do not code {count} scales", bytes.len())));
    let reserve = || {
        let mut scales = Vec::new();
        match scales.try_reserve_exact(count) {
            Ok(()) => Ok(scales),
            Err(_) => Err(Error::OutOfMemory { what: "scales".into(), bytes: 4 * count as u64 }),
        }
    };
    match bytes {
        [] if count == 0 => Ok(Vec::new()),
        [0, value @ ..] if count != 0 && value.len() == 4 => {
            let mut scales = reserve()?;
            scales.resize(count, number(value));
            Ok(scales)
        }
        [1, last, rest @ ..] if count != 0 && rest.len() >= 4 * (usize::from(*last) + 1) => {
            let (values, coded) = rest.split_at(4 * (usize::from(*last) + 1));
            let values: Vec<f32> = values.chunks_exact(4).map(number).collect();
            let (mut from, mut tree) = (Decoder::new(coded), Tree([Odds::EVEN; 256]));
            let mut scales = reserve()?;
            for row in 0..count {
                let index = usize::from(tree.decode(&mut from));
                let Some(&value) = values.get(index) else {
                    let what = format!("row {row} has scale {index} of {}", values.len());
                    return Err(Error::corrupt((bytes.len() - coded.len()) as u64, what));
                };
                scales.push(value);
            }
            from.finish((bytes.len() - coded.len()) as u64)?;
            Ok(scales)
        }
        [2, plane @ ..] if count != 0 && plane.len() / 4 == count && plane.len().is_multiple_of(4) => {
            Ok(plane.chunks_exact(4).map(number).collect())
        }
        _ => wrong(),
    }
}
