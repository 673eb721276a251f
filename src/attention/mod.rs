//! Attention over keys and values that are quantized as they come.
//!
//! A [`KvCache`] holds the keys and values of the tokens of one sequence, for the heads of one layer; [`attend`]
//! computes `softmax(scale · q · kᵀ) · v` with it on the CPU, and `gemm::wgpu` on graphics devices, from the same
//! planes. Heads of queries are a multiple of the heads of keys and values, which they share in their order
//! (grouped-query attention).
//!
//! # Format
//!
//! Tokens come in blocks of [`BLOCK`] = 32. The tokens after the last whole block stand in a tail, in f16; when it is
//! full, it is quantized and begins anew. Keys of a block share a scale and an offset along the tokens, one pair for
//! each channel; values share them along the channels, one pair for each token and [`GROUP`] = 32 channels, of which
//! the last ones may be fewer:
//!
//! ```text
//! key[t, c]   = code[t, c] * scale[c] + offset[c]                  over the tokens t of a block
//! value[t, c] = code[t, c] * scale[t, g] + offset[t, g]            g = c / 32
//! ```
//!
//! in f32, one rounding for the product and one for the sum. Planes are separate arrays of words of 32 bits. All but
//! the tails are `[blocks, heads, words]`, so that a cache grows at its end and a block may lie anywhere. Tails are
//! `[tokens, heads, words]`, so that a token is added in one piece. With D channels, and bits that may differ between
//! keys and values:
//!
//! | plane | words of a block, or of 32 tokens, and a head | holds |
//! |---|---|---|
//! | `key_codes` | `32 · ceil(D · bits / 32)` | a row for each token: the codes of its channels, low bits first |
//! | `key_params` | `D` | a word for each channel: the scale as f16 in the low half, the offset as f16 in the high half |
//! | `value_codes` | `32 · ceil(D · bits / 32)` | as `key_codes` |
//! | `value_params` | `32 · ceil(D / 32)` | a row for each token: a word for each group, as in `key_params` |
//! | `key_tail` | `32 · ceil(D / 2)` | a row for each token: f16, two in a word, the first one in the low half |
//! | `value_tail` | `32 · ceil(D / 2)` | as `key_tail` |
//!
//! Bits of the last word of a row that belong to no channel are zero. What is quantized are the f16 of the tail: with
//! `levels = 2^bits - 1`, the offset is the least number, the scale is the f16 nearest to `(greatest - least) /
//! levels`, and a code is the integer nearest to `(x - offset) / scale`, a true division in f32, ties to even, clamped
//! to `0..=levels`; with a scale of zero it is 0. So the bytes are the same on every machine, and for tokens that come
//! one by one or all at once. Numbers beyond ±65504 are refused.
//!
//! # Why this one
//!
//! `benches/kv.py` measures forms of caches in every attention of a model; on `books5m` (heads of 32 channels, 32
//! windows of 256 tokens of WikiText), `Σ (o - ô)² / Σ o²` of what attention puts out is:
//!
//! | form, 4 bits | bits a number | keys | values | both |
//! |---|---|---|---|---|
//! | keys and values by token, groups of 32 (`token 32`) | 5.0 | 7.7e-3 | 4.5e-3 | 1.2e-2 |
//! | the same, the last keys in f16 until 32 are there (`recent 32`) | 5.0 | 1.5e-3 | 4.5e-3 | 6.1e-3 |
//! | keys by channel of 32 tokens (KIVI), the last ones in f16 (`channel 32`) | 5.0 | 3.6e-4 | 4.5e-3 | 4.9e-3 |
//! | **the same, the last values in f16 too** (`tail 32`) | 5.0 | 3.6e-4 | 7.8e-4 | 1.1e-3 |
//! | the same with blocks of 64 tokens (`tail 64`) | 4.75 | 2.8e-4 | 4.1e-4 | 6.8e-4 |
//! | values by channel as well, blocks of 32 (`columns 32`) | 5.0 | 3.6e-4 | 4.9e-4 | 8.5e-4 |
//!
//! Keys want their channels apart, and what was said last is looked at most, so the f16 of the tail are worth more
//! than they cost. Part of the gain of longer blocks is their longer tail, which in windows of 256 tokens is a large
//! part of the text and in longer ones is not; blocks of 32 leave at most 31 tokens in 16 bits. Values by channel are
//! better here and are not taken: the error of a token then follows the largest of its 31 neighbours, and models whose
//! attention rests on a first token with small values, as most larger ones do, would pay for that (KIVI, Liu et al.,
//! 2024, measured so). Subtracting a mean from the keys, or turning them by a Hadamard matrix, changes less than a
//! third of the error of keys by token.

mod attend;
mod cache;
mod exp;
mod format;
mod quantize;
mod view;

pub use attend::{Attend, attend, attend_view};
pub use cache::KvCache;
pub use format::{BLOCK, GROUP, KvFormat, KvPlane};
pub use view::{KvPages, KvView};
