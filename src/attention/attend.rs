//! Attention on the CPU: blocks are decoded one at a time and shared by all queries of their head.
//!
//! Each head of keys and values goes through its blocks with an online softmax, for all of its queries at once. Where
//! there are few of them, the blocks are divided into runs, for other threads, whose results are then merged; how depends
//! on the shape alone, so that results are the same with any number of threads and on every machine.

use rayon::prelude::*;

use super::cache::KvCache;
use super::exp::exp;
use super::format::BLOCK;
use super::view::KvView;
use crate::error::{Error, Result};

/// Blocks of a run, where there are few queries.
const RUN: usize = 16;

/// Queries that go through blocks together.
const TOGETHER: usize = 32;

/// Scores of what a query does not see.
const UNSEEN: f32 = f32::MIN;

/// What a call of attention wants beside its queries.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Attend {
    /// What scores are multiplied by; `1 / sqrt(head_dim)` where nothing is given.
    pub scale: Option<f32>,
    /// Whether the queries are those of the last tokens, each of which sees no token after its own.
    pub causal: bool,
}

impl Attend {
    /// What scores are multiplied by.
    #[must_use]
    pub fn scale(&self, head_dim: usize) -> f32 {
        let dim = u16::try_from(head_dim).map_or(f32::INFINITY, f32::from);
        self.scale.unwrap_or_else(|| dim.sqrt().recip())
    }

    /// Tokens that query `i` of `m` sees of `len`.
    #[must_use]
    pub const fn seen(&self, i: usize, m: usize, len: usize) -> usize {
        if self.causal { len + i + 1 - m } else { len }
    }

    /// Heads of queries of a call, or why it is none.
    ///
    /// # Errors
    /// [`Error::Invalid`], see [`attend`].
    pub(crate) fn check(&self, cache: &KvView<'_>, q: usize, m: usize, out: usize) -> Result<usize> {
        let token = cache.format().token();
        let dim = cache.format().head_dim();
        if q != out || m.checked_mul(token).is_none_or(|least| !q.is_multiple_of(least)) {
            return Err(Error::invalid(format!(
                "{q} numbers of queries and {out} of results for {m} tokens, expected as many of both, and for each token a \
                 multiple of {} heads of {dim} channels",
                cache.format().heads()
            )));
        }
        if m > 0 && cache.is_empty() {
            return Err(Error::invalid(
                "a cache without tokens has nothing to attend to; append the token itself first",
            ));
        }
        if self.causal && m > cache.len() {
            return Err(Error::invalid(format!(
                "{m} queries of the last tokens of a cache of {}, expected no more of them; append their keys and values first",
                cache.len()
            )));
        }
        if !self.scale(dim).is_finite() {
            return Err(Error::invalid(format!("a scale of scores of {}, expected a finite number", self.scale(dim))));
        }
        Ok(q.checked_div(m).map_or(0, |of_token| of_token / dim))
    }
}

/// What a query sees.
struct Seen<'a> {
    /// So many of the first tokens,
    tokens: usize,
    /// but not those with a zero here.
    mask: Option<&'a [u8]>,
}

/// Queries of one head of keys and values, and how far they have come.
struct Run {
    /// Queries, each multiplied by the scale of scores.
    q: Vec<f32>,
    /// The greatest score of each query.
    greatest: Vec<f32>,
    /// The sum of its weights, relative to that.
    sums: Vec<f32>,
    /// Values times weights, relative to that.
    out: Vec<f32>,
}

/// `out = softmax(scale · q · kᵀ) · v` for `m` tokens of queries, `[m, query heads, head_dim]`; overwrites `out`.
///
/// The error of a result is bounded with the scores' own: where `u = 2^-24`, `s` are the scores and `p` their softmax, a
/// score is off by at most `δ = (head_dim + 4) · u · |scale| · Σ |q| · (|code · scale| + |offset|)`, a weight relatively
/// by `2δ + 8u`, and sums add `(tokens + 8) · u` of the sum of magnitudes. A query whose scores are not finite has results
/// that are NaN.
///
/// # Errors
/// [`Error::Invalid`] when `q` and `out` are not as many numbers, of whole heads that the cache's divide; when there are
/// queries but no tokens; or more queries of the last tokens than tokens.
pub fn attend(cache: &KvCache, q: &[f32], m: usize, options: Attend, out: &mut [f32]) -> Result<()> {
    attend_view(&cache.view(), q, m, options, None, out)
}

/// The same over planes wherever they are, and with a mask where there is one: `[m, tokens]` bytes, zero for what a query
/// does not see beside what it does not see without a mask. The result of a query that sees nothing is a mean of values.
///
/// # Errors
/// As [`attend`], and [`Error::Invalid`] for a mask of another size.
pub fn attend_view(
    cache: &KvView<'_>,
    q: &[f32],
    m: usize,
    options: Attend,
    mask: Option<&[u8]>,
    out: &mut [f32],
) -> Result<()> {
    if let Some(mask) = mask
        && m.checked_mul(cache.len()) != Some(mask.len())
    {
        return Err(Error::invalid(format!(
            "a mask of {} bytes for {m} queries of {} tokens, expected one for each of both",
            mask.len(),
            cache.len()
        )));
    }
    let heads = options.check(cache, q.len(), m, out.len())?;
    if q.is_empty() {
        return Ok(());
    }
    let (dim, kv_heads) = (cache.format().head_dim(), cache.format().heads());
    let shared = heads / kv_heads;
    let rows = m * shared;
    let blocks = cache.len().div_ceil(BLOCK);
    let run = if rows <= TOGETHER / 2 { RUN } else { blocks };
    // Queries of a head of keys and values, row after row of tokens; chunks of them, and runs of blocks for each.
    let tasks: Vec<(usize, usize, usize)> = (0..kv_heads)
        .flat_map(|head| (0..rows).step_by(TOGETHER).map(move |first| (head, first)))
        .flat_map(|(head, first)| (0..blocks).step_by(run).map(move |block| (head, first, block)))
        .collect();
    let row_at = |head: usize, row: usize| ((row / shared * heads) + head * shared + row % shared) * dim;
    let scale = options.scale(dim);
    let done: Vec<Run> = tasks
        .par_iter()
        .map(|&(head, first, block)| {
            let last = (first + TOGETHER).min(rows);
            let q = (first..last).flat_map(|row| q[row_at(head, row)..][..dim].iter().map(|x| x * scale)).collect();
            let mut state = Run::new(q, dim);
            let seen: Vec<Seen<'_>> = (first..last)
                .map(|row| {
                    let token = row / shared;
                    let mask = mask.map(|mask| &mask[token * cache.len()..][..cache.len()]);
                    Seen { tokens: options.seen(token, m, cache.len()), mask }
                })
                .collect();
            state.go(cache, head, block..(block + run).min(blocks), &seen);
            state
        })
        .collect();
    let of_run = blocks.div_ceil(run);
    for (runs, tasks) in done.chunks(of_run).zip(tasks.chunks(of_run)) {
        let (head, first, _) = tasks[0];
        for row in 0..runs[0].greatest.len() {
            merge(runs, row, &mut out[row_at(head, first + row)..][..dim]);
        }
    }
    Ok(())
}

/// What the runs of a query make together.
fn merge(runs: &[Run], row: usize, out: &mut [f32]) {
    let greatest = runs.iter().fold(UNSEEN, |greatest, run| greatest.max(run.greatest[row]));
    let mut sum = 0.0;
    out.fill(0.0);
    for run in runs {
        let weight = exp(run.greatest[row] - greatest);
        sum += weight * run.sums[row];
        let dim = out.len();
        for (out, x) in out.iter_mut().zip(&run.out[row * dim..]) {
            *out += weight * x;
        }
    }
    out.iter_mut().for_each(|out| *out /= sum);
}

impl Run {
    fn new(q: Vec<f32>, dim: usize) -> Self {
        let rows = q.len() / dim;
        Self { greatest: vec![UNSEEN; rows], sums: vec![0.0; rows], out: vec![0.0; q.len()], q }
    }

    /// Goes through blocks of a head, of whose tokens each query sees so many.
    fn go(&mut self, cache: &KvView<'_>, head: usize, blocks: std::ops::Range<usize>, seen: &[Seen<'_>]) {
        let dim = cache.format().head_dim();
        let (mut keys, mut values) = (vec![0.0; BLOCK * dim], vec![0.0; BLOCK * dim]);
        for block in blocks {
            cache.block_keys(block, head, &mut keys);
            cache.block_values(block, head, &mut values);
            for (row, seen) in seen.iter().enumerate() {
                let there = seen.tokens.saturating_sub(block * BLOCK).min(BLOCK);
                if there > 0 {
                    let mask = seen.mask.map(|mask| &mask[block * BLOCK..][..there]);
                    self.take(row, &keys[..there * dim], &values[..there * dim], mask, dim);
                }
            }
        }
    }

    /// Adds tokens of a block to a query.
    fn take(&mut self, row: usize, keys: &[f32], values: &[f32], mask: Option<&[u8]>, dim: usize) {
        let q = &self.q[row * dim..][..dim];
        let out = &mut self.out[row * dim..][..dim];
        let mut weights = [UNSEEN; BLOCK];
        for (score, key) in weights.iter_mut().zip(keys.chunks_exact(dim)) {
            *score = dot(q, key);
        }
        for (score, _) in weights.iter_mut().zip(mask.unwrap_or_default()).filter(|(_, seen)| **seen == 0) {
            *score = UNSEEN;
        }
        let greatest = weights.iter().fold(self.greatest[row], |greatest, &score| greatest.max(score));
        let before = exp(self.greatest[row] - greatest);
        self.greatest[row] = greatest;
        let tokens = keys.len() / dim;
        weights[..tokens].iter_mut().for_each(|score| *score = exp(*score - greatest));
        let weights = &weights[..tokens];
        self.sums[row] = before * self.sums[row] + weights.iter().sum::<f32>();
        if before < 1.0 {
            out.iter_mut().for_each(|out| *out *= before);
        }
        let (fours, ones) = (weights.chunks_exact(4), values.chunks_exact(4 * dim));
        let rest = fours.remainder().iter().zip(ones.remainder().chunks_exact(dim));
        for (weights, values) in fours.zip(ones) {
            let (a, values) = values.split_at(dim);
            let (b, values) = values.split_at(dim);
            let (c, d) = values.split_at(dim);
            for ((((out, a), b), c), d) in out.iter_mut().zip(a).zip(b).zip(c).zip(d) {
                *out += (weights[0] * a + weights[1] * b) + (weights[2] * c + weights[3] * d);
            }
        }
        for (weight, values) in rest {
            out.iter_mut().zip(values).for_each(|(out, value)| *out += weight * value);
        }
    }
}

/// A sum of products, of every sixteenth by itself first.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    const N: usize = 16;
    let mut sums = [0.0f32; N];
    let (a_chunks, b_chunks) = (a.chunks_exact(N), b.chunks_exact(N));
    let rest: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    let mut n = N / 2;
    while n > 0 {
        for i in 0..n {
            sums[i] += sums[i + n];
        }
        n /= 2;
    }
    sums[0] + rest
}
