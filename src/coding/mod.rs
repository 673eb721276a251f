//! How planes lie on disk where they are not stored as they are: bytes in, a stream out, and back. Lossless.
//!
//! A plane of 8-bit codes: the level of a code is `code - 128`, from −127 to 127. In memory codes take eight bits each,
//! so that products need nothing new; on disk they take about their entropy. Every code has a *context*, the sum of a
//! number of its row and one of its column, and each context expects levels of another deviation; the coder is
//! interleaved rANS over the model's integer frequencies, so it gives the same bytes on every machine. Any other plane:
//! rANS with the frequencies of its own bytes. `FORMAT.md` says what every byte means.
//!
//! | module | what |
//! |---|---|
//! | `table` | frequencies of the codes in a context |
//! | `context` | which contexts the rows and columns of a matrix get |
//! | `head`, `range` | how that is written |
//! | `block` | rows of codes |
//! | `trellis` | codes that follow a state machine |
//! | `bytes` | planes of any bytes |
//! | `vector`, `lanes` | decoders of many lanes at once |
//! | `scales` | planes of scales, which often are all equal |
//! | `words` | tensors that differ from others in little |
//! | `ends` | outliers that go on where the codes end |

pub(crate) mod block;
mod bytes;
pub(crate) mod context;
pub mod ends;
pub(crate) mod head;
#[cfg(target_arch = "x86_64")]
mod lanes;
mod range;
mod scales;
pub(crate) mod table;
pub mod tail;
mod trellis;
#[cfg(target_arch = "x86_64")]
mod vector;
pub mod words;

use std::ops::Range;

use rayon::prelude::*;

pub use bytes::{ByteStream, encode_bytes};
pub use scales::{decode_scales, encode_scales};
pub use trellis::Trellis;

use crate::error::{Error, Result};
use head::{Contexts, Span};

/// A plane is at most so many times as long as its stream, so that a short file cannot ask for memory without end: no
/// code takes less than a thousandth of a bit.
pub(crate) const EXPANSION: u64 = 1 << 14;

/// Whether a stream of so many bytes may stand for a plane of `plain` bytes: it is shorter, and not too short.
pub(crate) fn is_worth(plain: u64, stream: u64) -> bool {
    stream < plain && plain / EXPANSION <= stream
}

/// Codes that lie in rows of `cols`, as a stream.
///
/// # Errors
/// [`Error::Invalid`] for code 0, which is no level.
///
/// # Panics
/// When there are not `rows * cols` codes.
pub fn encode(codes: &[u8], rows: usize, cols: usize) -> Result<Vec<u8>> {
    encode_following(codes, rows, cols, None)
}

/// The same for codes that follow a trellis.
///
/// # Errors
/// [`Error::Invalid`] for a code that the trellis does not allow where it stands, and for code 0.
///
/// # Panics
/// When there are not `rows * cols` codes.
pub fn encode_following(codes: &[u8], rows: usize, cols: usize, trellis: Option<Trellis>) -> Result<Vec<u8>> {
    assert_eq!(codes.len(), rows * cols, "codes do not fill the matrix");
    if codes.is_empty() {
        return Ok(Vec::new());
    }
    write(codes, cols, &context::fit(codes, rows, cols, trellis))
}

/// Longer rows would not fit the numbers of a block.
const MOST_COLS: usize = 1 << 26;

/// The stream of codes in these contexts.
pub(crate) fn write(codes: &[u8], cols: usize, contexts: &Contexts) -> Result<Vec<u8>> {
    if cols > MOST_COLS {
        return Err(Error::invalid(format!("rows of {cols} codes, at most {MOST_COLS} can be coded")));
    }
    let symbols = block::Symbols::new(contexts);
    let per_block = head::rows_per_block(cols);
    let blocks: Result<Vec<_>> = codes
        .par_chunks(per_block * cols)
        .enumerate()
        .map(|(i, codes)| {
            block::encode(contexts, &symbols, i * per_block, codes, cols).map_err(|(row, col)| {
                let code = codes[row * cols + col];
                let row = i * per_block + row;
                Error::invalid(format!("code {code} at row {row}, column {col} is none that can be coded there"))
            })
        })
        .collect();
    let blocks = blocks?;
    let index: Vec<_> = blocks.iter().map(|block| (block.words, block.escapes)).collect();
    let mut out = head::write(contexts, &index);
    for block in &blocks {
        out.extend(&block.bytes);
    }
    Ok(out)
}

/// Whether the last levels of a stream of codes stand for all that lies beyond them too.
pub(crate) fn has_ends(stream: &[u8]) -> bool {
    stream.get(7) == Some(&1)
}

/// A stream whose head was read and checked.
#[derive(Debug)]
pub struct Stream<'a> {
    bytes: &'a [u8],
    cols: usize,
    contexts: Option<Contexts>,
    slots: Vec<u32>,
    spans: Vec<Span>,
}

impl<'a> Stream<'a> {
    /// Reads the head of the stream of a matrix.
    ///
    /// # Errors
    /// [`Error::Corrupt`], with the byte of the stream, when the head contradicts itself, the matrix or the length.
    pub fn open(bytes: &'a [u8], rows: usize, cols: usize) -> Result<Self> {
        if rows == 0 || cols == 0 {
            if !bytes.is_empty() {
                return Err(Error::corrupt(0, format!("a stream of {} bytes for no codes", bytes.len())));
            }
            return Ok(Self { bytes, cols, contexts: None, slots: Vec::new(), spans: Vec::new() });
        }
        let (contexts, spans) = head::read(bytes, rows, cols)?;
        let slots = block::slots(&contexts.model.tables());
        Ok(Self { bytes, cols, contexts: Some(contexts), slots, spans })
    }

    /// Whether the last levels stand for all that lies beyond them too.
    #[must_use]
    pub fn ends(&self) -> bool {
        self.contexts.as_ref().is_some_and(|contexts| contexts.model.ends)
    }

    /// How many blocks there are; each is decoded on its own.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.spans.len()
    }

    /// The rows in a block.
    ///
    /// # Panics
    /// When there is no such block.
    #[must_use]
    pub fn rows(&self, block: usize) -> Range<usize> {
        self.spans[block].rows.clone()
    }

    /// The machine that the codes follow, if any.
    #[must_use]
    pub fn trellis(&self) -> Option<Trellis> {
        self.contexts.as_ref()?.model.trellis
    }

    /// Decodes a block, on this thread.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when its bytes are not those of a block; `out` then holds anything.
    ///
    /// # Panics
    /// When there is no such block, or `out` does not have its size.
    pub fn decode_block(&self, block: usize, out: &mut [u8]) -> Result<()> {
        let (span, contexts) = (&self.spans[block], self.contexts.as_ref().expect("streams with blocks have contexts"));
        assert_eq!(out.len(), span.rows.len() * self.cols, "codes do not fill the block");
        block::decode(contexts, &self.slots, self.bytes, span, self.cols, out)
    }

    /// Decodes all blocks, on all threads.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for the first block that is none.
    ///
    /// # Panics
    /// When `out` does not have the size of the matrix.
    pub fn decode_all(&self, out: &mut [u8]) -> Result<()> {
        let codes = self.spans.last().map_or(0, |span| span.rows.end * self.cols);
        assert_eq!(out.len(), codes, "codes do not fill the matrix");
        if codes == 0 {
            return Ok(());
        }
        let chunk = self.spans[0].rows.len() * self.cols;
        out.par_chunks_mut(chunk).enumerate().map(|(i, out)| self.decode_block(i, out)).collect()
    }
}
