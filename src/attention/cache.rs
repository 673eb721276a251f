//! A cache in memory: tokens are quantized as they come.

use rayon::prelude::*;

use super::format::{BLOCK, GROUP, KvFormat, KvPlane};
use super::quantize::{self, MAX, code, narrow, pack, scale_offset, unpack, widen};
use crate::error::{Error, Result};

/// Keys and values of the tokens of one sequence, quantized.
///
/// It grows as tokens come. Its bytes are the same whether they come one by one or many at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvCache {
    format: KvFormat,
    len: usize,
    /// In the order of [`KvPlane::ALL`].
    planes: [Vec<u32>; 6],
}

impl KvCache {
    /// A cache without tokens.
    #[must_use]
    pub fn new(format: KvFormat) -> Self {
        let planes = KvPlane::ALL.map(|plane| {
            let words = if plane.is_tail() { format.heads() * format.plane_words(plane) } else { 0 };
            vec![0; words]
        });
        Self { format, len: 0, planes }
    }

    /// What the planes mean.
    #[must_use]
    pub fn format(&self) -> &KvFormat {
        &self.format
    }

    /// Tokens.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no tokens.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whole blocks, which are quantized; the tokens after them are in the tail.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.len / BLOCK
    }

    /// Bytes of all planes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        4 * self.planes.iter().map(Vec::len).sum::<usize>()
    }

    /// The words of a plane: of as many blocks as are whole, or of the tail, where those beyond the last token are anything.
    #[must_use]
    pub fn plane(&self, plane: KvPlane) -> &[u32] {
        &self.planes[plane as usize]
    }

    /// Forgets all tokens and keeps their memory.
    pub fn clear(&mut self) {
        self.len = 0;
        self.planes[..KvPlane::KeyTail as usize].iter_mut().for_each(Vec::clear);
    }

    /// Adds tokens: their keys and values, `[tokens, heads, head_dim]` each.
    ///
    /// # Errors
    /// [`Error::Invalid`] when both are not as many whole tokens, or a number is not finite or beyond the range of an f16;
    /// [`Error::OutOfMemory`]. The cache is then as it was.
    pub fn append(&mut self, keys: &[f32], values: &[f32]) -> Result<()> {
        let token = self.format.token();
        if keys.len() != values.len() || !keys.len().is_multiple_of(token) {
            return Err(Error::invalid(format!(
                "{} numbers of keys and {} of values for a cache, expected as many whole tokens of {} heads of {} channels",
                keys.len(),
                values.len(),
                self.format.heads(),
                self.format.head_dim()
            )));
        }
        for (numbers, what) in [(keys, "key"), (values, "value")] {
            // NaN is not within either.
            if let Some(at) = numbers.iter().position(|x| !(-MAX..=MAX).contains(x)) {
                let (head, channel) = (at % token / self.format.head_dim(), at % self.format.head_dim());
                return Err(Error::invalid(format!(
                    "the {what} of token {}, head {head}, channel {channel} is {}, expected at most {MAX} in magnitude, as \
                     f16 holds; keep this cache in f32",
                    self.len + at / token,
                    numbers[at]
                )));
            }
        }
        self.reserve(keys.len() / token)?;
        let (mut keys, mut values) = (keys, values);
        while !keys.is_empty() {
            let there = self.len % BLOCK;
            let count = (BLOCK - there).min(keys.len() / token);
            let (these_keys, these_values);
            (these_keys, keys) = keys.split_at(count * token);
            (these_values, values) = values.split_at(count * token);
            self.put(KvPlane::KeyTail, there, these_keys);
            self.put(KvPlane::ValueTail, there, these_values);
            self.len += count;
            if self.len.is_multiple_of(BLOCK) {
                self.quantize();
            }
        }
        Ok(())
    }

    /// Makes room for the blocks of more tokens.
    fn reserve(&mut self, tokens: usize) -> Result<()> {
        let more = (self.len + tokens) / BLOCK - self.blocks();
        for (plane, words) in KvPlane::ALL.into_iter().zip(&mut self.planes) {
            let of_block = self.format.heads() * self.format.plane_words(plane);
            let size = more.saturating_mul(of_block);
            if !plane.is_tail() && words.try_reserve(size).is_err() {
                let bytes = 4 * (words.len() as u64).saturating_add(size as u64);
                return Err(Error::OutOfMemory { what: "a cache of keys and values".to_owned(), bytes });
            }
        }
        Ok(())
    }

    /// Puts tokens into a tail from its token `first` on.
    fn put(&mut self, plane: KvPlane, first: usize, numbers: &[f32]) {
        let words = self.format.tail_words();
        let rows = self.planes[plane as usize].chunks_exact_mut(words).skip(first * self.format.heads());
        for (row, numbers) in rows.zip(numbers.chunks_exact(self.format.head_dim())) {
            narrow(numbers, row);
        }
    }

    /// Makes a block of the tails, which are full.
    fn quantize(&mut self) {
        let Self { format, planes: [key_codes, key_params, value_codes, value_params, keys, values], .. } = self;
        let heads = (0..format.heads()).into_par_iter().with_min_len(4);
        let made: Vec<_> =
            heads.map(|head| (quantize_keys(format, keys, head), quantize_values(format, values, head))).collect();
        for ([codes_of_keys, params_of_keys], [codes_of_values, params_of_values]) in made {
            key_codes.extend(codes_of_keys);
            key_params.extend(params_of_keys);
            value_codes.extend(codes_of_values);
            value_params.extend(params_of_values);
        }
    }

    /// The words of a block and head of a plane that is no tail.
    fn words(&self, plane: KvPlane, block: usize, head: usize) -> &[u32] {
        let size = self.format.plane_words(plane);
        &self.plane(plane)[(block * self.format.heads() + head) * size..][..size]
    }

    /// The tokens of a tail, of a head, `[BLOCK, head_dim]`, as far as there are any.
    fn tail(&self, plane: KvPlane, head: usize, out: &mut [f32]) {
        let rows = rows_of_tail(&self.format, self.plane(plane), head).take(self.len % BLOCK);
        for (out, row) in out.chunks_exact_mut(self.format.head_dim()).zip(rows) {
            widen(row, out);
        }
    }

    /// The keys of a block of a head, `[BLOCK, head_dim]`, as far as there are tokens.
    pub(super) fn block_keys(&self, block: usize, head: usize, out: &mut [f32]) {
        if block == self.blocks() {
            return self.tail(KvPlane::KeyTail, head, out);
        }
        let params = self.words(KvPlane::KeyParams, block, head);
        let (scales, offsets): (Vec<f32>, Vec<f32>) = params.iter().map(|&word| scale_offset(word)).unzip();
        let rows = self.words(KvPlane::KeyCodes, block, head).chunks_exact(self.format.key_words());
        for (out, codes) in out.chunks_exact_mut(self.format.head_dim()).zip(rows) {
            unpack(codes, self.format.key_bits(), out);
            for ((out, scale), offset) in out.iter_mut().zip(&scales).zip(&offsets) {
                *out = *out * scale + offset;
            }
        }
    }

    /// The values of a block of a head, `[BLOCK, head_dim]`, as far as there are tokens.
    pub(super) fn block_values(&self, block: usize, head: usize, out: &mut [f32]) {
        if block == self.blocks() {
            return self.tail(KvPlane::ValueTail, head, out);
        }
        let codes = self.words(KvPlane::ValueCodes, block, head).chunks_exact(self.format.value_words());
        let params = self.words(KvPlane::ValueParams, block, head).chunks_exact(self.format.groups());
        for (out, (codes, params)) in out.chunks_exact_mut(self.format.head_dim()).zip(codes.zip(params)) {
            unpack(codes, self.format.value_bits(), out);
            for (out, &word) in out.chunks_mut(GROUP).zip(params) {
                let (scale, offset) = scale_offset(word);
                for out in out {
                    *out = *out * scale + offset;
                }
            }
        }
    }

    /// Keys and values of all tokens as attention sees them, `[tokens, heads, head_dim]` each: what everything that
    /// computes with a cache is measured against.
    #[must_use]
    pub fn decode(&self) -> (Vec<f32>, Vec<f32>) {
        let (dim, token) = (self.format.head_dim(), self.format.token());
        let (mut keys, mut values) = (vec![0.0; self.len * token], vec![0.0; self.len * token]);
        let mut rows = vec![0.0; BLOCK * dim];
        for block in 0..self.len.div_ceil(BLOCK) {
            for head in 0..self.format.heads() {
                let spread = |rows: &[f32], out: &mut [f32]| {
                    let tokens = out.chunks_exact_mut(token).skip(block * BLOCK);
                    for (out, row) in tokens.zip(rows.chunks_exact(dim)) {
                        out[head * dim..][..dim].copy_from_slice(row);
                    }
                };
                self.block_keys(block, head, &mut rows);
                spread(&rows, &mut keys);
                self.block_values(block, head, &mut rows);
                spread(&rows, &mut values);
            }
        }
        (keys, values)
    }
}

/// Codes and parameters of the keys of a full tail.
fn quantize_keys(format: &KvFormat, tail: &[u32], head: usize) -> [Vec<u32>; 2] {
    let (dim, bits) = (format.head_dim(), format.key_bits());
    let [mut codes, mut params] =
        [KvPlane::KeyCodes, KvPlane::KeyParams].map(|plane| vec![0; format.plane_words(plane)]);
    let keys = numbers_of_tail(format, tail, head);
    let (mut least, mut greatest) = (vec![f32::INFINITY; dim], vec![f32::NEG_INFINITY; dim]);
    for key in keys.chunks_exact(dim) {
        for ((least, greatest), &x) in least.iter_mut().zip(&mut greatest).zip(key) {
            *least = if x < *least { x } else { *least };
            *greatest = if x > *greatest { x } else { *greatest };
        }
    }
    for ((word, &least), &greatest) in params.iter_mut().zip(&least).zip(&greatest) {
        *word = quantize::params(least, greatest, bits);
    }
    let scaling: Vec<(f32, f32)> = params.iter().map(|&word| scale_offset(word)).collect();
    for (row, key) in codes.chunks_exact_mut(format.key_words()).zip(keys.chunks_exact(dim)) {
        for ((channel, &x), &(scale, offset)) in key.iter().enumerate().zip(&scaling) {
            pack(row, bits, channel, code(x, scale, offset, bits));
        }
    }
    [codes, params]
}

/// Codes and parameters of the values of a full tail.
fn quantize_values(format: &KvFormat, tail: &[u32], head: usize) -> [Vec<u32>; 2] {
    let (dim, bits) = (format.head_dim(), format.value_bits());
    let planes = [KvPlane::ValueCodes, KvPlane::ValueParams];
    let [mut codes, mut params] = planes.map(|plane| vec![0; format.plane_words(plane)]);
    let rows = codes.chunks_exact_mut(format.value_words()).zip(params.chunks_exact_mut(format.groups()));
    for ((codes, params), value) in rows.zip(numbers_of_tail(format, tail, head).chunks_exact(dim)) {
        for ((number, group), word) in value.chunks(GROUP).enumerate().zip(params) {
            let least = group.iter().fold(f32::INFINITY, |least, &x| if x < least { x } else { least });
            let greatest = group.iter().fold(f32::NEG_INFINITY, |greatest, &x| if x > greatest { x } else { greatest });
            *word = quantize::params(least, greatest, bits);
            let (scale, offset) = scale_offset(*word);
            for (i, &x) in group.iter().enumerate() {
                pack(codes, bits, number * GROUP + i, code(x, scale, offset, bits));
            }
        }
    }
    [codes, params]
}

/// The rows of a head in a tail.
fn rows_of_tail<'a>(format: &KvFormat, tail: &'a [u32], head: usize) -> impl Iterator<Item = &'a [u32]> {
    tail.chunks_exact(format.tail_words()).skip(head).step_by(format.heads())
}

/// The numbers of a head in a full tail, `[BLOCK, head_dim]`.
fn numbers_of_tail(format: &KvFormat, tail: &[u32], head: usize) -> Vec<f32> {
    let mut numbers = vec![0.0; BLOCK * format.head_dim()];
    let rows = rows_of_tail(format, tail, head);
    numbers.chunks_exact_mut(format.head_dim()).zip(rows).for_each(|(out, row)| widen(row, out));
    numbers
}
