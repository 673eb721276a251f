//! A cache in memory: tokens are quantized as they come.

use super::format::{BLOCK, KvFormat, KvPlane};
use super::view::{KvView, check_tokens, in_blocks, put, quantized};
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
        let count = check_tokens(&self.format, self.len, keys, values)?;
        self.reserve(count)?;
        let Self { format, planes: [key_codes, key_params, value_codes, value_params, key_tail, value_tail], .. } =
            self;
        in_blocks(self.len, count, |first, tokens, whole| {
            let numbers = tokens.start * format.token()..tokens.end * format.token();
            put(format, key_tail, first, &keys[numbers.clone()]);
            put(format, value_tail, first, &values[numbers]);
            if whole.is_none() {
                return;
            }
            for ([codes_of_keys, params_of_keys], [codes_of_values, params_of_values]) in
                quantized(format, key_tail, value_tail)
            {
                key_codes.extend(codes_of_keys);
                key_params.extend(params_of_keys);
                value_codes.extend(codes_of_values);
                value_params.extend(params_of_values);
            }
        });
        self.len += count;
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

    /// The tokens, as they are read.
    #[must_use]
    pub fn view(&self) -> KvView<'_> {
        let [a, b, c, d, e, f] = &self.planes;
        KvView::new(self.format, self.len, [a, b, c, d, e, f], None).expect("planes are as long as tokens make them")
    }

    /// Keys and values of all tokens as attention sees them, `[tokens, heads, head_dim]` each: what everything that
    /// computes with a cache is measured against.
    #[must_use]
    pub fn decode(&self) -> (Vec<f32>, Vec<f32>) {
        self.view().decode()
    }
}
