//! Promises of the searching fits: never worse than minmax, and nearly as good as trying everything.

#![expect(clippy::print_stdout, reason = "the measured figures are worth reading")]

use proptest::prelude::*;
use tenpak::codec::{Codec, reference};
use tenpak::codecs;
use tenpak::fit::{self, Fit, Params};
use tenpak::layout::Grouped;

mod stream;
use stream::Stream;

/// The true squared error of a group as it decodes.
fn squared_error(layout: &Grouped, params: &Params, group: &[f32]) -> f64 {
    group
        .iter()
        .map(|&w| {
            let decoded = reference::weight(layout, params, reference::code(layout, params, w));
            (f64::from(w) - f64::from(decoded)).powi(2)
        })
        .sum()
}

fn searching() -> impl Iterator<Item = (&'static Codec, &'static Grouped)> {
    codecs::all()
        .iter()
        .filter(|codec| codec.fit == Fit::Search)
        .filter_map(|codec| codec.grouped().ok().map(|layout| (codec, layout)))
}

/// Checks that the search takes the groups that minmax takes, and is nowhere worse.
fn never_worse(group: &[f32]) {
    for (codec, layout) in searching() {
        for group in group.chunks(layout.group()) {
            let minmax = fit::params(Fit::MinMax, layout, group);
            let searched = fit::params(Fit::Search, layout, group);
            match (minmax, searched) {
                (Ok(minmax), Ok(searched)) => {
                    let (least, got) = (squared_error(layout, &minmax, group), squared_error(layout, &searched, group));
                    assert!(got <= least, "{}: {got:e} after the search, {least:e} before, {group:?}", codec.id);
                }
                (minmax, searched) => assert_eq!(minmax.err(), searched.err(), "{}: {group:?}", codec.id),
            }
        }
    }
}

#[test]
fn the_search_is_never_worse_than_minmax() {
    let mut stream = Stream(6);
    for len in 1..=16 {
        for exponent in -30..18 {
            let magnitude = 2.0f32.powi(exponent);
            for kind in 0..8 {
                let group: Vec<f32> = (0..len)
                    .map(|i| match kind {
                        0 => magnitude * stream.normal(),
                        1 => magnitude,
                        2 => {
                            if i == 0 {
                                magnitude
                            } else {
                                0.0
                            }
                        }
                        3 => magnitude * (i % 2) as f32,
                        4 => magnitude * (stream.next() % 16) as f32,
                        5 => 100.0 * magnitude + magnitude * stream.uniform(),
                        6 => magnitude * stream.normal().powi(5),
                        _ => -3000.0 * magnitude + magnitude * stream.uniform(),
                    })
                    .collect();
                never_worse(&group);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn the_search_is_never_worse_than_minmax_on_any_bits(
        bits in prop::collection::vec(any::<u32>(), 1..64),
        exponent in 90u32..145,
        spread in 0u32..12,
    ) {
        let weights: Vec<f32> = bits
            .iter()
            .map(|&b| f32::from_bits(b & 0x807f_ffff | (exponent + if spread > 0 { (b >> 23 & 255) % spread } else { 0 }) << 23))
            .collect();
        never_worse(&weights);
    }
}

/// The least error of any line through (code, weight) over 3025 ranges, each settled, without rounding of the line.
fn exhaustive(group: &[f64]) -> f64 {
    let n = group.len() as f64;
    let mean = group.iter().sum::<f64>() / n;
    let variance: f64 = group.iter().map(|w| (w - mean).powi(2)).sum();
    let (min, max) = group.iter().fold((f64::MAX, f64::MIN), |(a, b), &w| (a.min(w), b.max(w)));
    let step = (max - min) / 15.0;
    let line = |slope: f64, start: f64| {
        let (mut codes, mut squares, mut products) = (0.0, 0.0, 0.0);
        for w in group {
            let code = ((w - start) / slope).round().clamp(0.0, 15.0);
            codes += code;
            squares += code * code;
            products += code * w;
        }
        let (covariance, spread) = (products - mean * codes, squares - codes * codes / n);
        let slope = if spread > 0.0 { covariance / spread } else { 1.0 };
        (if spread > 0.0 { covariance * slope } else { 0.0 }, slope, mean - slope * codes / n)
    };
    let mut best: f64 = 0.0;
    for low in 0..55 {
        for high in 0..55 {
            let (low, high) = (f64::from(low) * 0.25 - 9.0, f64::from(high) * 0.25 - 9.0);
            let mut slope = step * (15.0 - low - high) / 15.0;
            let mut start = min + low * step;
            let mut explained = 0.0;
            for _ in 0..4 {
                let next = line(slope, start);
                if next.0 <= explained {
                    break;
                }
                (explained, slope, start) = next;
            }
            best = best.max(explained);
        }
    }
    (variance - best).max(0.0)
}

#[test]
fn the_search_is_within_two_percent_of_an_exhaustive_one() {
    let mut stream = Stream(7);
    for (codec, layout) in searching() {
        for name in ["normal", "uniform", "t5", "laplace", "a far offset"] {
            let (mut least, mut got, mut minmax, mut power) = (0.0, 0.0, 0.0, 0.0);
            for _ in 0..200 {
                let group: Vec<f32> = (0..layout.group())
                    .map(|_| {
                        0.02 * match name {
                            "normal" => stream.normal(),
                            "uniform" => stream.uniform(),
                            "t5" => {
                                stream.normal() / ((0..5).map(|_| stream.normal().powi(2)).sum::<f32>() / 5.0).sqrt()
                            }
                            "laplace" => {
                                (stream.uniform() + 1e-5).ln()
                                    * if stream.bits().is_multiple_of(2) { 1.0 } else { -1.0 }
                            }
                            _ => 5.0 + stream.normal(),
                        }
                    })
                    .collect();
                let wide: Vec<f64> = group.iter().map(|&w| f64::from(w)).collect();
                least += exhaustive(&wide);
                got += squared_error(layout, &fit::params(Fit::Search, layout, &group).unwrap(), &group);
                minmax += squared_error(layout, &fit::params(Fit::MinMax, layout, &group).unwrap(), &group);
                power += wide.iter().map(|w| w * w).sum::<f64>();
            }
            println!(
                "{} {name}: minmax {:.3e}, search {:.3e}, exhaustive {:.3e}, ratio {:.4}",
                codec.id,
                minmax / power,
                got / power,
                least / power,
                got / least
            );
            assert!(got <= 1.02 * least, "{} {name}: {:.4} of the exhaustive error", codec.id, got / least);
        }
    }
}
