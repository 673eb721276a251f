//! Attention over quantized keys and values on devices.

use tenpak::attention::{Attend, BLOCK, KvCache, KvFormat};
use tenpak::gemm::Act;
use tenpak::gemm::wgpu::{LoadedCache, Options, Wgpu};
use tenpak::{DeviceError, Error, codecs};

use crate::cached::{Expected, filled, tokens};
use crate::expected::{by_subgroups, by_workgroups, open, paths, product};
use crate::matrices::{Owned, Stream, bits, ordinary, random, seed};

/// Units of the last place that a power of e may be off in a shader, and one that it counts as zero.
fn ulps(x: f64) -> f64 {
    4.0 + 2.0 * x
}

fn attended(cache: &LoadedCache, q: &[f32], m: usize, options: Attend) -> Vec<f32> {
    let mut out = vec![f32::NAN; q.len()];
    cache.attend(q, m, options, &mut out).unwrap_or_else(|e| panic!("{e}"));
    out
}

/// Checks attention of `m` tokens of queries, `per_head` for each head of keys and values.
fn check(device: &Wgpu, cache: &KvCache, per_head: usize, m: usize, options: Attend, stream: &mut Stream, what: &str) {
    let format = *cache.format();
    let q = random(m * per_head * format.token(), stream);
    let loaded = device.upload_cache(cache.clone()).unwrap_or_else(|e| panic!("{e}"));
    Expected::new(cache, &q, m, options, ulps).check(&attended(&loaded, &q, m, options), &|| {
        format!("{what}: {format:?}, {per_head} queries a head, {} tokens, m={m}, {options:?}", cache.len())
    });
}

#[test]
fn attention_stays_within_the_bound_for_every_shape() {
    let seed = seed();
    let mut stream = Stream(seed);
    let what = |path| format!("TENPAK_SEED={seed}: {path}");
    for per_head in 1..=8 {
        // Heads of every odd kind, and all that stands at an edge of blocks and of tiles.
        let dim = [64, 80, 96, 128, 1, 7, 33, 12][per_head - 1];
        let len = [1, 31, 32, 33, 127, 129, 160, 300][per_head - 1];
        let (key_bits, value_bits) = [(4, 4), (8, 8), (4, 8), (8, 4)][per_head % 4];
        let format = KvFormat::new(1 + per_head % 3, dim, key_bits, value_bits).unwrap();
        let cache = filled(format, len, &mut stream);
        let options = Attend { scale: (per_head == 1).then_some(0.4), causal: true };
        let (path, device) = paths()[per_head / 2 % 2];
        check(device, &cache, per_head, 1, options, &mut stream, &what(path));
    }
    // Several runs, and several queries, some of which see less than others.
    for (path, device) in paths() {
        let cache = filled(KvFormat::new(2, 40, 4, 4).unwrap(), 700, &mut stream);
        for (per_head, m) in [(1, 1), (3, 1), (2, 8)] {
            check(device, &cache, per_head, m, Attend { scale: None, causal: true }, &mut stream, &what(path));
        }
        let cache = filled(KvFormat::new(1, 32, 8, 8).unwrap(), 70, &mut stream);
        check(device, &cache, 2, 70, Attend { scale: None, causal: true }, &mut stream, &what(path));
        check(device, &cache, 3, 5, Attend::default(), &mut stream, &what(path));
        let cache = filled(KvFormat::new(1, 300, 4, 8).unwrap(), 150, &mut stream);
        check(device, &cache, 5, 1, Attend::default(), &mut stream, &what(path));
        let cache = filled(KvFormat::new(1, 512, 8, 4).unwrap(), 40, &mut stream);
        check(device, &cache, 1, 1, Attend::default(), &mut stream, &what(path));
    }
}

#[test]
fn a_cache_that_grows_attends_as_one_that_was_whole() {
    let mut stream = Stream(seed());
    let format = KvFormat::new(2, 24, 4, 8).unwrap();
    let [keys, values] = tokens(&format, 1200, &mut stream);
    let q = random(3 * 4 * 24, &mut stream);
    let mut growing = by_subgroups().upload_cache(KvCache::new(format)).unwrap();
    for round in 0..2 {
        let mut first = 0;
        // One by one over the end of a block, then in pieces that outgrow every room there was.
        let counts = std::iter::repeat_n(1, BLOCK + 3).chain([61, 1, 300, 2, 800, 1]);
        for count in counts {
            let these = first * format.token()..(first + count) * format.token();
            growing.append(&keys[these.clone()], &values[these]).unwrap();
            first += count;
            let m = first.min(3);
            let options = Attend { scale: None, causal: true };
            let whole = by_subgroups().upload_cache(growing.tokens().clone()).unwrap();
            let q = &q[..m * 4 * 24];
            assert_eq!(
                bits(&attended(&growing, q, m, options)),
                bits(&attended(&whole, q, m, options)),
                "{first} tokens, round {round}"
            );
        }
        growing.clear();
    }
}

#[test]
fn attention_of_a_batch_is_that_of_single_calls_beside_products() {
    let mut stream = Stream(seed());
    let device = by_subgroups();
    let owned = Owned::new(codecs::get("int4_g32_fp16_v1").unwrap().layout, 70, 100, &mut stream, ordinary);
    let weights = owned.weights();
    let matrix = device.upload(&weights).unwrap();
    let caches: Vec<_> = [(2, 64, 400), (3, 20, 33)]
        .map(|(heads, dim, len)| filled(KvFormat::new(heads, dim, 4, 4).unwrap(), len, &mut stream))
        .map(|cache| device.upload_cache(cache).unwrap())
        .into();
    let (x, options) = (random(300, &mut stream), Attend { scale: None, causal: true });
    let queries: Vec<_> = caches.iter().map(|cache| random(4 * cache.tokens().format().token(), &mut stream)).collect();
    let mut want = vec![product(&matrix, 70, &x, 3, Act::F32)];
    want.extend(caches.iter().zip(&queries).map(|(cache, q)| attended(cache, q, 2, options)));
    want.extend([vec![], product(&matrix, 70, &x[..100], 1, Act::F32)]);
    let mut batch = device.batch().unwrap();
    batch.multiply(&matrix, &x, 3, Act::F32).unwrap();
    for (cache, q) in caches.iter().zip(&queries) {
        batch.attend(cache, q, 2, options).unwrap();
    }
    assert_eq!(batch.attend(&caches[0], &[], 0, options).unwrap(), 3);
    batch.multiply(&matrix, &x[..100], 1, Act::F32).unwrap();
    assert!(batch.submit().unwrap().wait().unwrap() == want);
    // Calls that come at once from several threads.
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| assert!(attended(&caches[0], &queries[0], 2, options) == want[1]));
        }
    });
}

#[test]
fn a_lost_device_gets_the_cache_again() {
    let mut stream = Stream(seed());
    let device = open(Options::default());
    let mut cache = device.upload_cache(filled(KvFormat::new(2, 32, 4, 4).unwrap(), 70, &mut stream)).unwrap();
    let q = random(64, &mut stream);
    let want = attended(&cache, &q, 1, Attend::default());
    device.lose_device();
    let mut out = vec![f32::NAN; 64];
    match cache.attend(&q, 1, Attend::default(), &mut out) {
        Ok(()) => {}
        Err(Error::Device(DeviceError::Lost { .. })) => out = attended(&cache, &q, 1, Attend::default()),
        Err(e) => panic!("{e}"),
    }
    assert_eq!(bits(&out), bits(&want));
    device.lose_device();
    let [keys, values] = tokens(cache.tokens().format(), 30, &mut stream);
    cache.append(&keys, &values).unwrap();
    drop(cache.attend(&q, 1, Attend::default(), &mut out));
    let whole = device.upload_cache(cache.tokens().clone()).unwrap();
    assert_eq!(bits(&attended(&cache, &q, 1, Attend::default())), bits(&attended(&whole, &q, 1, Attend::default())));
}

#[test]
fn what_is_not_finite_stays_in_its_own_query() {
    let mut stream = Stream(seed());
    for (path, device) in paths() {
        let cache = filled(KvFormat::new(2, 16, 8, 4).unwrap(), 300, &mut stream);
        let cache = device.upload_cache(cache).unwrap();
        let good = random(3 * 6 * 16, &mut stream);
        let want = attended(&cache, &good, 3, Attend::default());
        for bad in [0, 7, 17] {
            let mut q = good.clone();
            q[bad * 16 + 3] = f32::NAN;
            for (i, (got, want)) in
                attended(&cache, &q, 3, Attend::default()).chunks(16).zip(want.chunks(16)).enumerate()
            {
                assert!(i == bad || bits(got) == bits(want), "{path}: query {i} beside {bad}");
            }
        }
        assert_eq!(bits(&attended(&cache, &good, 3, Attend::default())), bits(&want), "{path}: the next call");
    }
}

#[test]
fn calls_that_make_no_sense_or_do_not_fit_are_refused() {
    let mut stream = Stream(seed());
    let invalid = |result: tenpak::Result<()>| assert!(matches!(result, Err(Error::Invalid(_))), "{result:?}");
    let unsupported = |result: tenpak::Result<()>| assert!(matches!(result, Err(Error::Unsupported(_))), "{result:?}");
    let format = KvFormat::new(2, 8, 4, 4).unwrap();
    let (q, mut out) = (random(64, &mut stream), vec![0.0; 64]);
    let empty = by_subgroups().upload_cache(KvCache::new(format)).unwrap();
    invalid(empty.attend(&q[..16], 1, Attend::default(), &mut out[..16]));
    assert!(empty.attend(&[], 0, Attend::default(), &mut []).is_ok());
    let cache = by_subgroups().upload_cache(filled(format, 3, &mut stream)).unwrap();
    invalid(cache.attend(&q[..16], 1, Attend::default(), &mut out[..8]));
    invalid(cache.attend(&q, 4, Attend { scale: None, causal: true }, &mut out));
    invalid(by_workgroups().batch().unwrap().attend(&cache, &q[..16], 1, Attend::default()).map(drop));
    let wide = KvCache::new(KvFormat::new(1, 513, 4, 4).unwrap());
    unsupported(by_subgroups().upload_cache(wide).map(drop));
    // Room for 39 blocks of these heads: more of them, or queries of more numbers, do not fit.
    let small = open(Options { binding_bytes: Some(10_000), ..Options::default() });
    let mut cache = small.upload_cache(filled(format, 32 * 38, &mut stream)).unwrap();
    let options = Attend { scale: None, causal: true };
    let whole = by_subgroups().upload_cache(cache.tokens().clone()).unwrap();
    let expected = Expected::new(cache.tokens(), &q, 4, options, ulps);
    expected.check(&attended(&cache, &q, 4, options), &|| "with little room for results of runs".to_owned());
    expected.check(&attended(&whole, &q, 4, options), &|| "with room".to_owned());
    let many = vec![0.5; 16 * 400];
    unsupported(cache.attend(&many, 400, options, &mut many.clone()));
    let [keys, values] = tokens(&format, 64, &mut stream);
    cache.append(&keys, &values).unwrap();
    unsupported(cache.attend(&q[..16], 1, options, &mut out[..16]));
    assert_eq!(cache.tokens().len(), 32 * 40, "the tokens are still there");
}
