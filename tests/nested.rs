//! Promises of nested scales: what bytes mean, what the search must beat, and that no machine finds something else.

use proptest::prelude::*;
use tenpak::codec::isa;
use tenpak::codec::reference::{code, weight};
use tenpak::fit::{Params, nested};
use tenpak::layout::{BANK4, BANK5, BANK6, Bank, Grouped, ROW_SCALE_END};
use tenpak::{Codec, Encoded, codecs};

fn banked() -> impl Iterator<Item = (&'static Codec, &'static Grouped)> {
    let grouped = codecs::all().iter().filter_map(|codec| codec.grouped().ok().map(|layout| (codec, layout)));
    grouped.filter(|(_, layout)| layout.bank().is_some())
}

/// The weighted squared error of a row, weights as decoded.
fn error(layout: &Grouped, params: &[Params], weights: &[f32], importance: Option<&[f32]>) -> f64 {
    let one = |(j, &w): (usize, &f32)| {
        let params = &params[j / layout.group()];
        let lost = f64::from(w) - f64::from(weight(layout, params, code(layout, params, w)));
        importance.map_or(1.0, |a| f64::from(a[j])) * lost * lost
    };
    weights.iter().enumerate().map(one).sum()
}

#[test]
fn the_fields_of_a_scale_byte_are_where_the_format_says() {
    for bank in [&BANK4, &BANK5, &BANK6] {
        let bits = bank.bits();
        for byte in 0..=u8::MAX {
            let magnitude = u32::from(byte) % (2 << bits);
            let table = (u32::from(byte) >> (bits + 1)) % (1 << (6 - bits));
            let (knee, step) = (u32::from(bank.knee()), u32::from(bank.step()));
            let multiplier = if magnitude <= knee { magnitude } else { knee + (magnitude - knee) * step };
            assert!(multiplier <= 255);
            let signed = if byte < 128 { f64::from(multiplier) } else { -f64::from(multiplier) };
            assert_eq!(f64::from(bank.multiplier(byte)), signed);
            assert_eq!(bank.multiplier(byte).is_sign_negative(), byte >= 128);
            assert_eq!(u32::from(bank.high(byte)), table << bits);
            assert_eq!(bank.byte(byte >= 128, u8::try_from(table).unwrap(), u8::try_from(magnitude).unwrap()), byte);
            assert_eq!(bank.table(byte).len(), 1 << bits);
            assert!(bank.table(byte).is_sorted());
        }
    }
}

#[test]
fn no_multiple_of_the_greatest_row_scale_is_infinite() {
    let greatest = ROW_SCALE_END.next_down();
    for (bank, byte) in [&BANK4, &BANK5, &BANK6].into_iter().flat_map(|b: &Bank| (0..=u8::MAX).map(move |i| (b, i))) {
        let scale = bank.multiplier(byte) * greatest;
        assert!(bank.table(byte).iter().all(|&level| (f32::from(level) * scale).is_finite()));
    }
}

#[test]
fn codes_of_every_width_come_back_from_their_planes() {
    for (codec, layout) in banked() {
        let cols = 77;
        let codes: Vec<u8> = (0..cols).map(|c| u8::try_from(c * 37 % (1 << layout.bits())).unwrap()).collect();
        let (mut low, mut high) = (vec![0; layout.code_stride(cols)], vec![0; layout.high_code_stride(cols)]);
        for (c, &code) in codes.iter().enumerate() {
            layout.store_code(&mut low, &mut high, c, code);
        }
        for (c, &code) in codes.iter().enumerate() {
            assert_eq!(layout.load_code(&low, &high, c), code, "{}", codec.id);
        }
    }
}

#[test]
fn rows_of_zeros_and_constants_come_back() {
    for (codec, _) in banked() {
        for value in [0.0_f32, -0.0] {
            let encoded = codec.encode(&[value; 70], 2, 35).unwrap();
            assert!(encoded.planes().all(|(_, bytes)| bytes.iter().all(|&b| b == 0)), "{}", codec.id);
            assert!(encoded.decode().iter().all(|&w| w == 0.0));
        }
        // The end of a table is a level, and so is a multiple of it that suits one value exactly but for rounding.
        let encoded = codec.encode(&[-0.3; 70], 2, 35).unwrap();
        assert!(encoded.decode().iter().all(|w| (w + 0.3).abs() < 1e-6), "{} {:?}", codec.id, encoded.decode()[0]);
    }
}

#[test]
fn weights_beyond_the_range_of_row_scales_are_refused() {
    for (codec, _) in banked() {
        assert!(codec.encode(&[1e-37; 32], 1, 32).is_err(), "{}", codec.id);
        assert!(codec.encode(&[f32::MAX; 32], 1, 32).is_err(), "{}", codec.id);
        let encoded: Encoded = codec.encode(&[1e-30; 32], 1, 32).unwrap();
        assert!(encoded.decode().iter().all(|&w| (w / 1e-30 - 1.0).abs() < 1e-6));
    }
}

fn row() -> impl Strategy<Value = Vec<f32>> {
    let weight = (-1.0_f32..1.0, 0_u8..40).prop_map(|(x, tail)| match tail {
        0 => x * 20.0,
        1 => 0.0,
        2..8 => x * x * x * 3.0,
        _ => x,
    });
    (prop::collection::vec(weight, 1..200), -60_i32..60)
        .prop_map(|(row, size)| row.iter().map(|w| w * 2.0_f32.powi(size)).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_search_is_never_worse_than_plain(weights in row(), seed in prop::collection::vec(0.0_f32..4.0, 200)) {
        for (codec, layout) in banked() {
            for importance in [None, Some(&seed[..weights.len()])] {
                let (Ok(plain), Ok(found)) =
                    (nested::plain(layout, &weights), nested::row(layout, &weights, importance)) else { continue };
                let (most, got) = (error(layout, &plain, &weights, importance), error(layout, &found, &weights, importance));
                // What the search gains in f32 exceeds the rounding of its sums, so in f64 it is a gain as well.
                prop_assert!(got <= most, "{} {got:e} above {most:e}", codec.id);
            }
        }
    }

    #[test]
    fn every_instruction_set_finds_the_same_under_importances(weights in row(), seed in prop::collection::vec(0.0_f32..4.0, 200)) {
        for (codec, layout) in banked() {
            let importance = Some(&seed[..weights.len()]);
            let want = isa::available()[0].nested(layout, &weights, importance);
            for isa in isa::available() {
                prop_assert_eq!(&isa.nested(layout, &weights, importance), &want, "{} {:?}", codec.id, isa);
            }
        }
    }
}
