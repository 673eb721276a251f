//! Rows of a quantized matrix in memory: a code a byte, and the parameters of groups in f32, which holds those of every
//! format exactly.

use rayon::prelude::*;

use super::{Scheme, Unheld};
use crate::codec::{self, Codec, Planes, PlanesMut};
use crate::error::{Error, Result, try_zeroed};
use crate::layout::{self, Float, Grouped, store_bits};
use crate::tensor::DType;

/// What is taken off codes, or added to their multiples.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::source) enum Addends {
    /// Half of the codes is taken off.
    Middle,
    /// Numbers are taken off codes, `[rows][groups]`.
    ZeroPoints(Vec<u8>),
    /// Numbers are added to multiples, `[rows][groups]`.
    Offsets(Vec<f32>),
    /// Codes stand for levels.
    Table([f32; 16]),
}

/// Consecutive rows.
#[derive(Debug, Clone)]
pub(in crate::source) struct Block {
    pub bits: u32,
    pub cols: usize,
    /// Columns of a group, not [`layout::ROW`].
    pub group: usize,
    /// `[rows][cols]`
    pub codes: Vec<u8>,
    /// `[rows][groups]`
    pub scales: Vec<f32>,
    pub addends: Addends,
    /// The group of each column, where columns are not in the order of groups.
    pub order: Option<std::sync::Arc<[u32]>>,
}

impl Block {
    /// Columns of a full group of a scheme.
    pub fn group_of(scheme: &Scheme, cols: usize) -> usize {
        if scheme.group == layout::ROW { cols.max(1) } else { scheme.group }
    }

    fn groups(&self) -> usize {
        self.cols.div_ceil(self.group)
    }

    fn level(&self, at: usize, code: u8) -> f32 {
        let less = |zero: i16| f32::from(i16::from(code) - zero);
        match &self.addends {
            Addends::Middle => less(1 << (self.bits - 1)),
            Addends::ZeroPoints(zeros) => less(i16::from(zeros[at])),
            Addends::Offsets(_) => f32::from(code),
            Addends::Table(table) => table[usize::from(code & 15)],
        }
    }

    /// The weight of a code in group `at` of all rows.
    fn weight(&self, at: usize, code: u8) -> f32 {
        let product = self.level(at, code) * self.scales[at];
        match &self.addends {
            Addends::Offsets(offsets) => product + offsets[at],
            _ => product,
        }
    }

    /// The weights, row by row.
    pub fn weights(&self) -> Result<Vec<f32>> {
        let mut out = Vec::new();
        if out.try_reserve_exact(self.codes.len()).is_err() {
            return Err(Error::OutOfMemory { what: "rows of a matrix".to_owned(), bytes: 4 * self.codes.len() as u64 });
        }
        out.resize(self.codes.len(), 0.0);
        let (cols, groups) = (self.cols.max(1), self.groups());
        out.par_chunks_mut(cols).zip(self.codes.par_chunks(cols)).enumerate().for_each(|(row, (out, codes))| {
            let first = row * groups;
            match &self.order {
                None => {
                    for (g, (out, codes)) in out.chunks_mut(self.group).zip(codes.chunks(self.group)).enumerate() {
                        out.iter_mut().zip(codes).for_each(|(w, &code)| *w = self.weight(first + g, code));
                    }
                }
                Some(order) => {
                    for ((w, &code), &group) in out.iter_mut().zip(codes).zip(&**order) {
                        *w = self.weight(first + group as usize, code);
                    }
                }
            }
        });
        Ok(out)
    }

    /// The planes of a codec, if they decode to exactly these weights; zeros may have the other sign, as where an offset that
    /// a multiple cancels comes in as a zero point.
    pub fn planes(&self, codec: &'static Codec, weights: &[f32]) -> Result<Result<Vec<Vec<u8>>, Unheld>> {
        let layout = codec.grouped()?;
        if self.order.is_some() {
            return Ok(Err(Unheld::Inexact("columns are not in the order of groups")));
        }
        let rows = self.codes.len() / self.cols.max(1);
        let mut planes = Vec::new();
        for (plane, bytes) in codec.layout.plane_bytes(DType::F32, rows as u64, self.cols as u64)? {
            let bytes = usize::try_from(bytes).map_err(|_| Error::invalid("the block is larger than memory"))?;
            planes.push(try_zeroed(bytes, || format!("plane {}", plane.name()))?);
        }
        let per_task = codec::rows_per_task(self.cols);
        let tasks = PlanesMut::new(layout, &mut planes).chunks(layout, self.cols, rows, per_task);
        let stored: Result<(), &'static str> = tasks.into_par_iter().enumerate().try_for_each(|(task, mut planes)| {
            let first = task * per_task;
            (first..rows.min(first + per_task))
                .try_for_each(|row| self.store_row(layout, row, &mut planes.row(layout, self.cols, row - first)))
        });
        if let Err(why) = stored {
            return Ok(Err(Unheld::Inexact(why)));
        }
        let slices: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
        let mut decoded = vec![0.0; weights.len()];
        codec::decode_planes(layout, &Planes::new(layout, &slices), self.cols, &mut decoded);
        let same = decoded.par_iter().zip(weights).all(|(a, b)| a == b);
        Ok(if same { Ok(planes) } else { Err(Unheld::Inexact("it would decode to other weights")) })
    }

    /// Stores one row, or says which parameter has no place.
    fn store_row(&self, layout: &Grouped, row: usize, out: &mut PlanesMut<'_>) -> Result<(), &'static str> {
        let codes = &self.codes[row * self.cols..][..self.cols];
        for (column, &code) in codes.iter().enumerate() {
            layout.store_code(out.codes, out.high_codes, column, code);
        }
        let length = layout.group_len(self.cols).max(1);
        for group in 0..layout.groups(self.cols) {
            // Groups of the layout are the matrix's, or parts of them.
            let at = row * self.groups() + group * length / self.group;
            let scale = self.scales[at];
            store(layout.scale(), out.scales, group, scale).ok_or("a scale is no number of the type of its scales")?;
            match (layout.levels(), layout.offset(), &self.addends) {
                (layout::Levels::Unsigned, Some(float), Addends::Offsets(offsets)) => {
                    store(float, out.addends, group, offsets[at])
                        .ok_or("an offset is no number of the type of its offsets")?;
                }
                (layout::Levels::ZeroPoint, _, addends) => {
                    let zero = zero_point(addends, at, scale).filter(|&zero| zero <= layout.max_code());
                    store_bits(layout.bits(), out.addends, group, zero.ok_or("a zero point is no code")?);
                }
                (layout::Levels::Signed, _, Addends::Middle) | (layout::Levels::Table(_), _, Addends::Table(_)) => {}
                (layout::Levels::Signed, _, addends) => {
                    let middle = zero_point(addends, at, scale) == Some(layout.zero_code(0));
                    middle.then_some(()).ok_or("a zero point is not in the middle of the codes")?;
                }
                _ => return Err("its levels are others"),
            }
        }
        Ok(())
    }
}

/// The zero point of a group, where it has one.
fn zero_point(addends: &Addends, at: usize, scale: f32) -> Option<u8> {
    match addends {
        Addends::ZeroPoints(zeros) => Some(zeros[at]),
        Addends::Offsets(offsets) if scale != 0.0 => {
            (0..=u8::MAX).find(|&zero| (-scale * f32::from(zero)).to_bits() == offsets[at].to_bits())
        }
        _ => None,
    }
}

/// Writes a number if it is one of the type.
fn store(float: Float, plane: &mut [u8], index: usize, x: f32) -> Option<()> {
    let exact = float.round(x).to_bits() == x.to_bits();
    exact.then(|| float.store(plane, index, x))
}

/// The codes of rows of words, `cols` of at most 8 bits a row, low bits first, across words: a byte each.
pub(in crate::source) fn unpack(bits: u32, words: &[u8], rows: usize, cols: usize) -> Result<Vec<u8>> {
    let mut codes = try_zeroed(rows * cols, || "codes of a matrix".to_owned())?;
    let stride = (words.len() / rows.max(1)).max(1);
    for (words, codes) in words.chunks(stride).zip(codes.chunks_mut(cols.max(1))) {
        for (index, code) in codes.iter_mut().enumerate() {
            *code = load(bits, words, index);
        }
    }
    Ok(codes)
}

/// The `index`-th number of at most 8 bits, low bits first, which may span two bytes.
fn load(bits: u32, words: &[u8], index: usize) -> u8 {
    let at = index * bits as usize;
    let two = u16::from_le_bytes([words[at / 8], words.get(at / 8 + 1).copied().unwrap_or(0)]);
    let mask = u8::MAX >> (8 - bits);
    (two >> (at % 8)).to_le_bytes()[0] & mask
}

/// Numbers of at most 8 bits that are packed along rows, low bits first, across words: those of `rows` rows from `first` on,
/// `words` being `[…][cols]` from the word on that has the first of them.
pub(in crate::source) fn unpack_along(bits: u32, words: &[u8], (first, rows): (u64, u64), cols: usize) -> Vec<u8> {
    let bits_before = first * u64::from(bits) / 32 * 32;
    let word = |at: usize, col: usize| {
        let at = 4 * (at * cols + col);
        words.get(at..at + 4).map_or(0, |word| u64::from(u32::from_le_bytes([word[0], word[1], word[2], word[3]])))
    };
    let mask = u8::MAX >> (8 - bits);
    let number = |row: u64, col: usize| {
        let at = row * u64::from(bits) - bits_before;
        let index = usize::try_from(at / 32).unwrap_or(usize::MAX / 2);
        let both = word(index, col) | word(index + 1, col) << 32;
        (both >> (at % 32)).to_le_bytes()[0] & mask
    };
    (first..first + rows).flat_map(|row| (0..cols).map(move |col| number(row, col))).collect()
}

/// The rows of words that hold numbers of rows, see [`unpack_along`]: where they begin, and how many they are.
pub(in crate::source) fn words_along(bits: u32, first: u64, rows: u64) -> (u64, u64) {
    let from = first * u64::from(bits) / 32;
    (from, ((first + rows) * u64::from(bits)).div_ceil(32) - from)
}

/// Little-endian floats of a dtype that f32 holds.
pub(in crate::source) fn floats(dtype: DType, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![0.0; bytes.len() / usize::try_from(dtype.size()).unwrap_or(1)];
    crate::tensor::to_f32(dtype, bytes, &mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers as bits one after the other, low ones first, in whole words.
    fn pack(bits: u32, numbers: &[u8]) -> Vec<u8> {
        let mut words = vec![0_u8; (numbers.len() * bits as usize).div_ceil(32) * 4];
        for (index, &number) in numbers.iter().enumerate() {
            for bit in 0..bits as usize {
                let at = index * bits as usize + bit;
                words[at / 8] |= (number >> bit & 1) << (at % 8);
            }
        }
        words
    }

    fn word_of(words: &[u8], index: u64) -> [u8; 4] {
        let at = usize::try_from(index).unwrap();
        words.as_chunks().0[at]
    }

    #[test]
    fn numbers_of_any_width_are_read_across_words() {
        for bits in 1..=8 {
            let number = |row: u64, col: u64| {
                let any = (row * 37 + col * 11 + row * col).to_le_bytes()[0];
                any & u8::MAX >> (8 - bits)
            };
            let cols = 5;
            let along: Vec<Vec<u8>> =
                (0..cols).map(|col| pack(bits, &(0..64).map(|row| number(row, col)).collect::<Vec<_>>())).collect();
            for (first, count) in [(0, 64), (0, 1), (9, 3), (10, 1), (31, 2), (63, 1), (20, 30)] {
                let (from, many) = words_along(bits, first, count);
                let words: Vec<u8> =
                    (from..from + many).flat_map(|word| along.iter().flat_map(move |col| word_of(col, word))).collect();
                let expected: Vec<u8> =
                    (first..first + count).flat_map(|row| (0..cols).map(move |col| number(row, col))).collect();
                assert_eq!(unpack_along(bits, &words, (first, count), 5), expected, "{bits} bits from {first}");
            }
            let plain: Vec<u8> = (0..64).map(|col| number(3, col)).collect();
            let both = [pack(bits, &plain), pack(bits, &plain)].concat();
            assert_eq!(unpack(bits, &both, 2, 64).unwrap(), [plain.clone(), plain].concat(), "{bits} bits");
        }
    }
}
