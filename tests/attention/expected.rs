//! Caches of random tokens, their planes read by the table of the format, and what attention over them may be.

use half::f16;
use tenpak::attention::{Attend, BLOCK, GROUP, KvCache, KvFormat, KvPlane};

use super::Stream;

/// Keys and values of tokens: channels of very different magnitudes and means, as keys have them.
pub fn tokens(format: &KvFormat, count: usize, stream: &mut Stream) -> [Vec<f32>; 2] {
    let mut draw = || {
        let channels: Vec<(f32, f32)> =
            (0..format.token()).map(|_| (0.1 + 2.0 * stream.uniform().powi(4), stream.normal())).collect();
        (0..count)
            .flat_map(|_| channels.iter().map(|&(size, mean)| mean + size * stream.normal()).collect::<Vec<_>>())
            .collect()
    };
    [draw(), draw()]
}

/// A cache of so many random tokens.
pub fn filled(format: KvFormat, len: usize, stream: &mut Stream) -> KvCache {
    let mut cache = KvCache::new(format);
    let [keys, values] = tokens(&format, len, stream);
    cache.append(&keys, &values).unwrap();
    cache
}

/// What a number of a cache is made of: `level * scale` and the offset.
#[derive(Clone, Copy)]
pub struct Parts {
    pub product: f32,
    pub offset: f32,
}

/// Number `channel` of `token` and `head`, of keys or of values, read by the table of the format.
pub fn read(cache: &KvCache, keys: bool, token: usize, head: usize, channel: usize) -> Parts {
    let format = cache.format();
    let (dim, row) = (format.head_dim(), token % BLOCK);
    let half = |word: u32, high: bool| {
        f16::from_bits(u16::try_from(word >> (16 * u32::from(high)) & 0xffff).unwrap()).to_f32()
    };
    if token / BLOCK == cache.len() / BLOCK {
        let tail = cache.plane(if keys { KvPlane::KeyTail } else { KvPlane::ValueTail });
        let words = dim.div_ceil(2);
        let word = tail[(row * format.heads() + head) * words + channel / 2];
        return Parts { product: half(word, channel % 2 == 1), offset: 0.0 };
    }
    let block = token / BLOCK * format.heads() + head;
    let (bits, codes) = match keys {
        true => (format.key_bits() as usize, cache.plane(KvPlane::KeyCodes)),
        false => (format.value_bits() as usize, cache.plane(KvPlane::ValueCodes)),
    };
    let words = (dim * bits).div_ceil(32);
    let word = codes[(block * BLOCK + row) * words + channel * bits / 32];
    let code = word >> (channel * bits % 32) & ((1 << bits) - 1);
    let params = match keys {
        true => cache.plane(KvPlane::KeyParams)[block * dim + channel],
        false => cache.plane(KvPlane::ValueParams)[(block * BLOCK + row) * dim.div_ceil(GROUP) + channel / GROUP],
    };
    Parts { product: f32::from(u8::try_from(code).unwrap()) * half(params, false), offset: half(params, true) }
}

/// Exact results of attention, and how far each may be off.
pub struct Expected {
    pub results: Vec<f64>,
    pub bounds: Vec<f64>,
}

impl Expected {
    /// Those of `m` queries, `[m, heads, head_dim]`, with `ulps(x)` units of the last place of error of a power e^x.
    pub fn new(cache: &KvCache, q: &[f32], m: usize, options: Attend, ulps: impl Fn(f64) -> f64) -> Self {
        let unit = f64::from(f32::EPSILON) / 2.0;
        let (dim, kv_heads) = (cache.format().head_dim(), cache.format().heads());
        let heads = q.len() / m / dim;
        let scale = f64::from(options.scale(dim));
        let mut expected = Self { results: vec![0.0; q.len()], bounds: vec![0.0; q.len()] };
        let all = |keys: bool, head: usize| -> Vec<Vec<Parts>> {
            (0..cache.len()).map(|t| (0..dim).map(|c| read(cache, keys, t, head, c)).collect()).collect()
        };
        for head in 0..kv_heads {
            let (keys, values) = (all(true, head), all(false, head));
            for i in 0..m {
                for h in head * (heads / kv_heads)..(head + 1) * (heads / kv_heads) {
                    let at = (i * heads + h) * dim;
                    let q = &q[at..][..dim];
                    let seen = if options.causal { cache.len() - m + i + 1 } else { cache.len() };
                    let (mut scores, mut off) = (Vec::new(), Vec::new());
                    for key in &keys[..seen] {
                        let exact = |p: &Parts| f64::from(p.product + p.offset);
                        let score: f64 = q.iter().zip(key).map(|(&q, k)| f64::from(q) * exact(k)).sum();
                        let size: f64 = q
                            .iter()
                            .zip(key)
                            .map(|(&q, k)| f64::from(q.abs()) * f64::from(k.product.abs() + k.offset.abs()))
                            .sum();
                        scores.push(scale * score);
                        off.push(
                            (dim as f64 + 6.0) * unit * scale.abs() * size + f64::from(f32::MIN_POSITIVE) * dim as f64,
                        );
                    }
                    let greatest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let weights: Vec<f64> = scores.iter().map(|s| (s - greatest).exp()).collect();
                    let sum: f64 = weights.iter().sum();
                    // How far a weight is off relatively: its score, the greatest one, their difference, and the power;
                    // the latter twice, because sums are rescaled when a greater score comes.
                    let of_greatest = off.iter().copied().fold(0.0, f64::max);
                    let relative: Vec<f64> = scores
                        .iter()
                        .zip(&off)
                        .map(|(s, off)| {
                            let x = greatest - s;
                            (off + of_greatest + 2.0 * unit * (s.abs() + greatest.abs())).exp_m1()
                                + 2.0 * unit * (ulps(x) + x)
                        })
                        .collect();
                    let rounding = (seen as f64 + 40.0) * unit;
                    let of_sum: f64 = weights.iter().zip(&relative).map(|(w, r)| w / sum * (r + rounding)).sum::<f64>();
                    for c in 0..dim {
                        let (mut out, mut bound, mut lost) = (0.0, 0.0, 0.0f64);
                        for ((w, r), value) in weights.iter().zip(&relative).zip(&values) {
                            let v = f64::from(value[c].product + value[c].offset);
                            let size = f64::from(value[c].product.abs() + value[c].offset.abs());
                            out += w / sum * v;
                            bound += w / sum * size * (r + rounding);
                            lost += size;
                        }
                        expected.results[at + c] = out;
                        // Weights that are subnormal may count as zero.
                        let lost = f64::from(f32::MIN_POSITIVE) * (lost * 8.0 + 1.0);
                        expected.bounds[at + c] = (bound + out.abs() * of_sum) * 1.01 + lost;
                    }
                }
            }
        }
        expected
    }

    /// Refuses results that are further off.
    pub fn check(&self, got: &[f32], what: &dyn Fn() -> String) {
        assert_eq!(got.len(), self.results.len());
        for (i, (&got, (&want, &bound))) in got.iter().zip(self.results.iter().zip(&self.bounds)).enumerate() {
            let off = (f64::from(got) - want).abs();
            assert!(off <= bound, "{}: result {i} is {got}, not {want} ± {bound:e}", what());
        }
    }
}
