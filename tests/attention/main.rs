//! Promises of attention over quantized keys and values on the CPU.

use half::f16;
use tenpak::Error;
use tenpak::attention::{Attend, BLOCK, GROUP, KvCache, KvFormat, KvPages, KvPlane, KvView, attend, attend_view};

mod expected;
#[path = "../stream/mod.rs"]
mod stream;

use expected::{Expected, filled, read, tokens};
use stream::Stream;

/// Units of the last place that a power is off.
fn ulps(_: f64) -> f64 {
    4.0
}

fn random(count: usize, stream: &mut Stream) -> Vec<f32> {
    (0..count).map(|_| stream.normal()).collect()
}

fn attended(cache: &KvCache, q: &[f32], m: usize, options: Attend) -> Vec<f32> {
    let mut out = vec![f32::NAN; q.len()];
    attend(cache, q, m, options, &mut out).unwrap_or_else(|e| panic!("{e}"));
    out
}

#[test]
fn the_bytes_are_the_same_for_tokens_one_by_one_or_all_at_once() {
    let mut stream = Stream(1);
    for (heads, dim, bits) in [(1, 1, (4, 4)), (2, 80, (4, 8)), (3, 33, (8, 4))] {
        let format = KvFormat::new(heads, dim, bits.0, bits.1).unwrap();
        let [keys, values] = tokens(&format, 101, &mut stream);
        let mut whole = KvCache::new(format);
        whole.append(&keys, &values).unwrap();
        let mut parts = KvCache::new(format);
        let mut first = 0;
        while first < 101 {
            let count = usize::try_from(stream.bits() % 41).unwrap().min(101 - first);
            let these = first * format.token()..(first + count) * format.token();
            parts.append(&keys[these.clone()], &values[these]).unwrap();
            first += count;
        }
        assert_eq!(parts.len(), 101);
        assert!(whole.decode() == parts.decode());
        for plane in &KvPlane::ALL[..4] {
            assert!(whole.plane(*plane) == parts.plane(*plane), "{plane:?}");
            assert_eq!(whole.plane(*plane).len(), 3 * heads * format.plane_words(*plane));
        }
        parts.clear();
        parts.append(&keys, &values).unwrap();
        assert!(whole.decode() == parts.decode(), "after it was cleared");
    }
}

/// Scale, offset and codes of numbers that share them, by the rule of the format and nothing else.
fn quantized(numbers: &[f16], bits: u32) -> (u32, Vec<u32>) {
    let levels = if bits == 4 { 15.0 } else { 255.0f32 };
    let numbers: Vec<f32> = numbers.iter().map(|x| x.to_f32()).collect();
    let least = numbers.iter().copied().fold(f32::INFINITY, f32::min);
    let greatest = numbers.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let (scale, offset) = (f16::from_f32((greatest - least) / levels), f16::from_f32(least + 0.0));
    let code = |x: &f32| match scale.to_f32() {
        0.0 => 0,
        step => {
            (0..256u16).find(|&code| ((x - offset.to_f32()) / step).round_ties_even() <= f32::from(code)).unwrap_or(255)
        }
    };
    let codes = numbers.iter().map(|x| u32::from(code(x)).min(if bits == 4 { 15 } else { 255 })).collect();
    (u32::from(scale.to_bits()) | u32::from(offset.to_bits()) << 16, codes)
}

#[test]
fn the_bytes_are_those_of_the_rule() {
    let mut stream = Stream(8);
    for (heads, dim, key_bits, value_bits) in [(2, 40, 4, 8), (1, 7, 8, 4), (3, 64, 4, 4)] {
        let format = KvFormat::new(heads, dim, key_bits, value_bits).unwrap();
        let [keys, values] = tokens(&format, 2 * BLOCK + 5, &mut stream);
        let mut cache = KvCache::new(format);
        cache.append(&keys, &values).unwrap();
        let number =
            |of: &[f32], token: usize, head: usize, c: usize| f16::from_f32(of[(token * heads + head) * dim + c]);
        let mut planes = KvPlane::ALL.map(|plane| vec![0u32; cache.plane(plane).len()]);
        let mut put = |plane: usize, row: usize, words: usize, bits: u32, channel: usize, code: u32| {
            let bit = channel * bits as usize;
            planes[plane][row * words + bit / 32] |= code << (bit % 32);
        };
        for (block, head) in (0..2).flat_map(|block| (0..heads).map(move |head| (block, head))) {
            let (unit, first) = (block * heads + head, block * BLOCK);
            for c in 0..dim {
                let column: Vec<f16> = (0..BLOCK).map(|t| number(&keys, first + t, head, c)).collect();
                let (params, codes) = quantized(&column, key_bits);
                put(1, unit, dim, 32, c, params);
                for (t, code) in codes.into_iter().enumerate() {
                    put(0, unit * BLOCK + t, format.key_words(), key_bits, c, code);
                }
            }
            for (t, g) in (0..BLOCK).flat_map(|t| (0..dim.div_ceil(GROUP)).map(move |g| (t, g))) {
                let channels = g * GROUP..dim.min((g + 1) * GROUP);
                let group: Vec<f16> = channels.clone().map(|c| number(&values, first + t, head, c)).collect();
                let (params, codes) = quantized(&group, value_bits);
                put(3, unit * BLOCK + t, format.groups(), 32, g, params);
                for (c, code) in channels.zip(codes) {
                    put(2, unit * BLOCK + t, format.value_words(), value_bits, c, code);
                }
            }
        }
        for (plane, want) in KvPlane::ALL.into_iter().zip(&planes).take(4) {
            assert!(cache.plane(plane) == want, "{plane:?} of {format:?}");
        }
    }
}

#[test]
fn decoded_numbers_are_those_of_the_table_and_within_a_step_of_the_tokens() {
    let mut stream = Stream(2);
    for (key_bits, value_bits) in [(4, 4), (8, 8), (4, 8), (8, 4)] {
        for dim in [1, 7, 32, 80, 96] {
            let format = KvFormat::new(2, dim, key_bits, value_bits).unwrap();
            let given = tokens(&format, 70, &mut stream);
            let mut cache = KvCache::new(format);
            cache.append(&given[0], &given[1]).unwrap();
            let decoded = cache.decode();
            for (keys, decoded, given) in [(true, &decoded.0, &given[0]), (false, &decoded.1, &given[1])] {
                let levels = if if keys { key_bits } else { value_bits } == 4 { 15.0 } else { 255.0f32 };
                let number = |token: usize, head: usize, channel: usize| given[(token * 2 + head) * dim + channel];
                for (at, (&decoded, &given)) in decoded.iter().zip(given).enumerate() {
                    let (token, head, channel) = (at / (2 * dim), at / dim % 2, at % dim);
                    let parts = read(&cache, keys, token, head, channel);
                    assert_eq!(decoded.to_bits(), (parts.product + parts.offset).to_bits());
                    // Those that share a scale: a channel of a block of keys, or a group of a token's values.
                    let first = token / BLOCK * BLOCK;
                    let group: Vec<f32> = match keys {
                        _ if first == 70 / BLOCK * BLOCK => vec![],
                        true => (first..first + BLOCK).map(|token| number(token, head, channel)).collect(),
                        false => (channel / GROUP * GROUP..dim.min((channel / GROUP + 1) * GROUP))
                            .map(|channel| number(token, head, channel))
                            .collect(),
                    };
                    let (least, greatest) = group.iter().fold((0.0f32, 0.0f32), |(a, b), &x| (a.min(x), b.max(x)));
                    // Half a step, what the scale loses to f16 at the greatest level, and what the numbers lose to it.
                    let step = (greatest - least) / levels;
                    let bound =
                        step * (0.5 + levels / 2048.0) * 1.01 + (greatest - least + given.abs()) / 1024.0 + 1e-6;
                    assert!((decoded - given).abs() <= bound, "{dim}: {decoded} is not {given} ± {bound}");
                }
            }
        }
    }
}

#[test]
fn numbers_of_any_size_that_f16_holds_are_kept_and_others_refused() {
    let format = KvFormat::new(1, 4, 4, 8).unwrap();
    let rows: [[f32; 4]; 4] = [[65_504.0, -65_504.0, 1e-7, 0.0], [-65_504.0, 0.0, -1e-7, -0.0], [5.0; 4], [0.0; 4]];
    let mut cache = KvCache::new(format);
    let all: Vec<f32> = rows.iter().flatten().copied().cycle().take(4 * BLOCK).collect();
    cache.append(&all, &all).unwrap();
    let (keys, values) = cache.decode();
    assert!(keys.iter().chain(&values).all(|x| x.is_finite() && x.abs() <= 65_504.0 * 1.001));
    assert!(keys[2].abs() < 1e-6 && keys[3] == 0.0 + keys[3] && values[13] == 0.0);
    // Constant groups are exact where f16 holds them.
    assert!(values[8..12].iter().all(|&x| x == 5.0), "{:?}", &values[8..12]);
    let before = cache.clone();
    for bad in [f32::NAN, f32::INFINITY, 65_505.0, -1e30] {
        for which in 0..2 {
            let mut pair = [[1.0; 8], [1.0; 8]];
            pair[which][6] = bad;
            let refused = cache.append(&pair[0], &pair[1]);
            let Err(Error::Invalid(said)) = refused else { panic!("{bad} was taken") };
            assert!(said.contains("token 33") && said.contains("channel 2"), "{said}");
        }
    }
    assert!(cache == before, "a refused token leaves no trace");
}

#[test]
fn attention_stays_within_the_bound_for_every_shape() {
    let mut stream = Stream(3);
    let shapes = [
        // heads, shared, head_dim, tokens, queries
        (1, 1, 1, 1, 1),
        (2, 1, 64, 31, 1),
        (1, 8, 80, 32, 1),
        (2, 3, 96, 33, 2),
        (1, 2, 128, 600, 1),
        (3, 4, 17, 100, 8),
        (1, 5, 40, 1100, 3),
        (2, 2, 33, 70, 70),
    ];
    for (heads, shared, dim, len, m) in shapes {
        for (key_bits, value_bits) in [(4, 4), (8, 8), (4, 8)] {
            let cache = filled(KvFormat::new(heads, dim, key_bits, value_bits).unwrap(), len, &mut stream);
            let q = random(m * heads * shared * dim, &mut stream);
            for (scale, causal) in [(None, true), (Some(0.7), false)] {
                let options = Attend { scale, causal };
                let expected = Expected::new(&cache, &q, m, options, ulps);
                expected.check(&attended(&cache, &q, m, options), &|| {
                    format!("{heads} x {shared} heads of {dim}, {len} tokens, {m} queries, {options:?}")
                });
            }
        }
    }
}

#[test]
fn results_have_the_same_bits_with_any_number_of_threads() {
    let mut stream = Stream(4);
    let cache = filled(KvFormat::new(2, 48, 4, 4).unwrap(), 1500, &mut stream);
    let q = random(3 * 8 * 48, &mut stream);
    let with = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| attended(&cache, &q, 3, Attend { scale: None, causal: true }))
    };
    assert!(with(1) == with(5));
}

#[test]
fn scores_of_any_size_give_weights_that_sum_to_one() {
    let mut stream = Stream(5);
    let format = KvFormat::new(1, 8, 8, 8).unwrap();
    let mut cache = KvCache::new(format);
    let keys: Vec<f32> = (0..90 * 8).map(|_| 60_000.0 * (stream.uniform() - 0.5)).collect();
    cache.append(&keys, &vec![2.5; keys.len()]).unwrap();
    for size in [0.0, 1e-30, 1e10, -1e32] {
        let out = attended(&cache, &[size; 8], 1, Attend::default());
        assert!(out.iter().all(|&x| (x - 2.5).abs() <= 2.5 * 100.0 * f32::EPSILON), "{size}: {out:?}");
    }
    // What is not finite stays in its own query.
    let mut q = [1.0; 24];
    q[9] = f32::NAN;
    q[17] = f32::INFINITY;
    let out = attended(&cache, &q, 3, Attend::default());
    assert!(out[..8] == attended(&cache, &q[..8], 1, Attend::default()) && out[8..].iter().all(|x| x.is_nan()));
}

#[test]
fn a_later_token_changes_nothing_for_an_earlier_query() {
    let mut stream = Stream(6);
    let format = KvFormat::new(2, 24, 4, 4).unwrap();
    let cache = filled(format, 64, &mut stream);
    let q = random(2 * 2 * 24, &mut stream);
    let mut longer = cache.clone();
    let [keys, values] = tokens(&format, 1, &mut stream);
    longer.append(&keys, &values).unwrap();
    let last = attended(&cache, &q[..48], 1, Attend { scale: None, causal: true });
    assert!(attended(&longer, &q, 2, Attend { scale: None, causal: true })[..48] == last);
}

#[test]
fn calls_that_make_no_sense_are_refused() {
    let refused = |result: tenpak::Result<()>| assert!(matches!(result, Err(Error::Invalid(_))), "{result:?}");
    for (heads, dim, bits) in [(0, 4, 4), (4, 0, 4), (4, 4, 5), (1 << 16, 4, 4), (4, 1 << 16, 8)] {
        refused(KvFormat::new(heads, dim, bits, bits).map(drop));
        refused(
            KvFormat::new(heads, dim, bits, 4).map(drop).and_then(|()| KvFormat::new(heads, dim, 4, bits).map(drop)),
        );
    }
    let format = KvFormat::new(2, 4, 4, 4).unwrap();
    let mut cache = KvCache::new(format);
    let (q, mut out) = ([1.0; 64], [0.0; 64]);
    refused(attend(&cache, &q[..8], 1, Attend::default(), &mut out[..8]));
    assert!(attend(&cache, &[], 0, Attend::default(), &mut []).is_ok());
    refused(cache.append(&q[..8], &q[..16]));
    refused(cache.append(&q[..9], &q[..9]));
    cache.append(&q[..16], &q[..16]).unwrap();
    refused(attend(&cache, &q[..8], 1, Attend::default(), &mut out[..16]));
    refused(attend(&cache, &q[..12], 1, Attend::default(), &mut out[..12]));
    refused(attend(&cache, &q[..8], 0, Attend::default(), &mut out[..8]));
    refused(attend(&cache, &q[..8], usize::MAX, Attend::default(), &mut out[..8]));
    refused(attend(&cache, &q[..24], 3, Attend { scale: None, causal: true }, &mut out[..24]));
    refused(attend(&cache, &q[..8], 1, Attend { scale: Some(f32::NAN), causal: false }, &mut out[..8]));
    assert!(attend(&cache, &q[..24], 3, Attend::default(), &mut out[..24]).is_ok());
}

#[test]
fn blocks_on_pages_in_any_order_are_those_of_a_cache() {
    let mut stream = Stream(11);
    let format = KvFormat::new(2, 40, 4, 8).unwrap();
    let [keys, values] = tokens(&format, 3 * BLOCK + 7, &mut stream);
    let mut cache = KvCache::new(format);
    cache.append(&keys, &values).unwrap();
    let pages = [4, 0, 2];
    let mut planes = KvPlane::ALL
        .map(|plane| vec![u32::MAX; if plane.is_tail() { 1 } else { 5 } * format.heads() * format.plane_words(plane)]);
    let mut len = 0;
    for count in [20, 50, 33] {
        let [a, b, c, d, e, f] = &mut planes;
        let these = len * format.token()..(len + count) * format.token();
        let mut paged = KvPages { format, planes: [a, b, c, d, e, f], pages: &pages };
        paged.append(len, &keys[these.clone()], &values[these]).unwrap();
        len += count;
    }
    let [a, b, c, d, e, f] = &planes;
    let view = KvView::new(format, len, [a, b, c, d, e, f], Some(&pages)).unwrap();
    assert!(view.decode() == cache.decode());
    let unit = format.heads() * format.plane_words(KvPlane::KeyCodes);
    assert!(planes[0][unit..2 * unit].iter().all(|&word| word == u32::MAX), "a page that is nobody's was written");
    let q = random(3 * 4 * 40, &mut stream);
    let options = Attend { scale: None, causal: true };
    let mut out = vec![f32::NAN; q.len()];
    attend_view(&view, &q, 3, options, None, &mut out).unwrap();
    assert!(out == attended(&cache, &q, 3, options));
    // What a mask hides has no weight.
    let options = Attend { scale: None, causal: false };
    let (long, whole) = (cache.decode(), &cache);
    let hidden: Vec<u8> = (0..3 * len).map(|at| u8::from(at % len == 0)).collect();
    attend_view(&whole.view(), &q, 3, options, Some(&hidden), &mut out).unwrap();
    for (query, out) in out.chunks_exact(40).enumerate() {
        let head = query % 4 / 2;
        let value = &long.1[head * 40..][..40];
        assert!(out.iter().zip(value).all(|(a, b)| (a - b).abs() <= 1e-6 * b.abs()), "only the first token is seen");
    }
    for (pages, planes) in
        [(&pages[..2], [a, b, c, d, e, f]), (&[4, 0, 5], [a, b, c, d, e, f]), (&[4, -1, 2], [a, b, c, d, e, f])]
    {
        let planes = planes.map(Vec::as_slice);
        assert!(matches!(KvView::new(format, len, planes, Some(pages)), Err(Error::Invalid(_))), "{pages:?}");
    }
    let refusal = attend_view(&whole.view(), &q, 3, options, Some(&hidden[1..]), &mut out);
    assert!(matches!(refusal, Err(Error::Invalid(_))));
}
