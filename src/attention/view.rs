//! Planes of a cache wherever they are: what reads them, and what adds tokens to them.
//!
//! A [`KvCache`](super::KvCache) holds its planes itself, its blocks in their order. Who serves many sequences keeps the
//! blocks of all of them in one pool and has a table for each, of the pages its blocks are on: blocks then come and go
//! without anything being moved. Both are read and written by the same code.

use rayon::prelude::*;

use super::format::{BLOCK, GROUP, KvFormat, KvPlane};
use super::quantize::{self, MAX, code, narrow, pack, scale_offset, unpack, widen};
use crate::error::{Error, Result};

/// Tokens of one sequence, as they are read.
#[derive(Debug, Clone, Copy)]
pub struct KvView<'a> {
    format: KvFormat,
    len: usize,
    planes: [&'a [u32]; 6],
    pages: Option<&'a [i32]>,
}

impl<'a> KvView<'a> {
    /// The first `len` tokens of a sequence: planes in the order of [`KvPlane::ALL`], those of blocks with block `b` on page
    /// `pages[b]`, or on page `b` without a table.
    ///
    /// # Errors
    /// [`Error::Invalid`] when a plane is too short for the tokens, or the table, or a page is not there.
    pub fn new(format: KvFormat, len: usize, planes: [&'a [u32]; 6], pages: Option<&'a [i32]>) -> Result<Self> {
        check(&format, len / BLOCK, planes.map(<[u32]>::len), pages)?;
        Ok(Self { format, len, planes, pages })
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

    /// The words of a block and head of a plane that is no tail.
    fn words(&self, plane: KvPlane, block: usize, head: usize) -> &'a [u32] {
        let size = self.format.plane_words(plane);
        &self.planes[plane as usize][(page(self.pages, block) * self.format.heads() + head) * size..][..size]
    }

    /// The tokens of a tail, of a head, `[BLOCK, head_dim]`, as far as there are any.
    fn tail(&self, plane: KvPlane, head: usize, out: &mut [f32]) {
        let rows = rows_of_tail(&self.format, self.planes[plane as usize], head).take(self.len % BLOCK);
        for (out, row) in out.chunks_exact_mut(self.format.head_dim()).zip(rows) {
            widen(row, out);
        }
    }

    /// The keys of a block of a head, `[BLOCK, head_dim]`, as far as there are tokens.
    pub(super) fn block_keys(&self, block: usize, head: usize, out: &mut [f32]) {
        if block == self.len / BLOCK {
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
        if block == self.len / BLOCK {
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

/// Tokens of one sequence, as they are written: those before [`KvPages::append`] and those of it.
#[derive(Debug)]
pub struct KvPages<'a> {
    /// What the planes mean.
    pub format: KvFormat,
    /// Planes in the order of [`KvPlane::ALL`].
    pub planes: [&'a mut [u32]; 6],
    /// The page of each block.
    pub pages: &'a [i32],
}

impl KvPages<'_> {
    /// Adds tokens behind the first `len`: their keys and values, `[tokens, heads, head_dim]` each.
    ///
    /// # Errors
    /// As [`KvCache::append`](super::KvCache::append), and [`Error::Invalid`] when there is no page for a block.
    pub fn append(&mut self, len: usize, keys: &[f32], values: &[f32]) -> Result<()> {
        let Self { format, planes, pages } = self;
        let count = check_tokens(format, len, keys, values)?;
        check(format, (len + count) / BLOCK, [0, 1, 2, 3, 4, 5].map(|i| planes[i].len()), Some(pages))?;
        let [key_codes, key_params, value_codes, value_params, key_tail, value_tail] = planes;
        in_blocks(len, count, |first, tokens, whole| {
            let numbers = tokens.start * format.token()..tokens.end * format.token();
            put(format, key_tail, first, &keys[numbers.clone()]);
            put(format, value_tail, first, &values[numbers]);
            let Some(block) = whole else { return };
            let page = page(Some(pages), block) * format.heads();
            for (head, (keys, values)) in quantized(format, key_tail, value_tail).into_iter().enumerate() {
                let to = [&mut *key_codes, &mut *key_params, &mut *value_codes, &mut *value_params];
                for (plane, words) in to.into_iter().zip(keys.into_iter().chain(values)) {
                    plane[(page + head) * words.len()..][..words.len()].copy_from_slice(&words);
                }
            }
        });
        Ok(())
    }
}

/// The page of a block, which was checked to be there.
fn page(pages: Option<&[i32]>, block: usize) -> usize {
    pages.map_or(block, |pages| usize::try_from(pages[block]).expect("checked"))
}

/// Whether planes of so many words, and a table, have room for so many blocks.
fn check(format: &KvFormat, blocks: usize, words: [usize; 6], pages: Option<&[i32]>) -> Result<()> {
    let mut there = usize::MAX;
    for (plane, words) in KvPlane::ALL.into_iter().zip(words) {
        let unit = format.heads() * format.plane_words(plane);
        if plane.is_tail() && words < unit {
            return Err(Error::invalid(format!("a tail of {words} words, expected {unit}")));
        }
        if !plane.is_tail() {
            there = there.min(words / unit);
        }
    }
    let listed = pages.map_or(there, <[i32]>::len);
    if listed < blocks {
        return Err(Error::invalid(format!(
            "{blocks} blocks of tokens and pages for {listed}, expected a page for each; give the sequence more"
        )));
    }
    let inside = |&page: &i32| usize::try_from(page).is_ok_and(|page| page < there);
    match pages.unwrap_or_default().iter().take(blocks).find(|page| !inside(page)) {
        Some(page) => Err(Error::invalid(format!("page {page} of a pool of {there} pages"))),
        None => Ok(()),
    }
}

/// How many tokens are to be added to `len`, or why they cannot be.
pub(super) fn check_tokens(format: &KvFormat, len: usize, keys: &[f32], values: &[f32]) -> Result<usize> {
    let token = format.token();
    if keys.len() != values.len() || !keys.len().is_multiple_of(token) {
        return Err(Error::invalid(format!(
            "{} numbers of keys and {} of values for a cache, expected as many whole tokens of {} heads of {} channels",
            keys.len(),
            values.len(),
            format.heads(),
            format.head_dim()
        )));
    }
    for (numbers, what) in [(keys, "key"), (values, "value")] {
        // NaN is not within either.
        if let Some(at) = numbers.iter().position(|x| !(-MAX..=MAX).contains(x)) {
            let (head, channel) = (at % token / format.head_dim(), at % format.head_dim());
            return Err(Error::invalid(format!(
                "the {what} of token {}, head {head}, channel {channel} is {}, expected at most {MAX} in magnitude, as f16 \
                 holds; keep this cache in f32",
                len + at / token,
                numbers[at]
            )));
        }
    }
    Ok(keys.len() / token)
}

/// Goes through `count` tokens behind `len` as far as a block at a time: where in the tail they begin, which of them they
/// are, and the number of the block that they make whole.
pub(super) fn in_blocks(len: usize, count: usize, mut each: impl FnMut(usize, std::ops::Range<usize>, Option<usize>)) {
    let mut done = 0;
    while done < count {
        let (block, first) = ((len + done) / BLOCK, (len + done) % BLOCK);
        let next = done + (BLOCK - first).min(count - done);
        each(first, done..next, (len + next).is_multiple_of(BLOCK).then_some(block));
        done = next;
    }
}

/// Puts tokens into a tail from its token `first` on.
pub(super) fn put(format: &KvFormat, tail: &mut [u32], first: usize, numbers: &[f32]) {
    let rows = tail.chunks_exact_mut(format.tail_words()).skip(first * format.heads());
    for (row, numbers) in rows.zip(numbers.chunks_exact(format.head_dim())) {
        narrow(numbers, row);
    }
}

/// Codes and parameters of keys, and of values.
pub(super) type Quantized = ([Vec<u32>; 2], [Vec<u32>; 2]);

/// What full tails become: a block, by heads.
pub(super) fn quantized(format: &KvFormat, keys: &[u32], values: &[u32]) -> Vec<Quantized> {
    let heads = (0..format.heads()).into_par_iter().with_min_len(4);
    heads.map(|head| (quantize_keys(format, keys, head), quantize_values(format, values, head))).collect()
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
