//! Promises of every codec: each instruction set writes and reads what the reference does, bit for bit.

use proptest::prelude::*;
use tenpak::codec::isa::{self, Isa};
use tenpak::codec::{Codec, Planes, PlanesMut, reference};
use tenpak::fit::Fit;
use tenpak::layout::{Grouped, Layout, Plane};
use tenpak::{DType, codecs};

mod stream;
use stream::Stream;

/// The planes of a few rows, three of them, the last one perhaps empty.
type Buffers = [Vec<u8>; 4];

fn grouped() -> impl Iterator<Item = (&'static Codec, &'static Grouped)> {
    codecs::all().iter().filter_map(|codec| codec.grouped().ok().map(|layout| (codec, layout)))
}

fn buffers(layout: &Grouped, rows: usize, cols: usize) -> Buffers {
    let mut buffers = Buffers::default();
    let sizes = Layout::Grouped(*layout).plane_bytes(DType::F32, rows as u64, cols as u64).unwrap();
    for (buffer, (_, bytes)) in buffers.iter_mut().zip(sizes) {
        buffer.resize(usize::try_from(bytes).unwrap(), 0);
    }
    buffers
}

fn planes_mut<'a>(layout: &Grouped, buffers: &'a mut Buffers) -> PlanesMut<'a> {
    PlanesMut::new(layout, buffers)
}

fn planes<'a>(layout: &Grouped, buffers: &'a Buffers) -> Planes<'a> {
    Planes::new(layout, &buffers.each_ref().map(Vec::as_slice))
}

/// What the specification writes, or nothing where it refuses.
fn specified(codec: &Codec, layout: &Grouped, weights: &[f32], cols: usize) -> Option<Buffers> {
    let rows = weights.len() / cols.max(1);
    let mut out = buffers(layout, rows, cols);
    for (r, row) in weights.chunks_exact(cols.max(1)).enumerate() {
        reference::encode_row(layout, codec.fit, row, &mut planes_mut(layout, &mut out).row(layout, cols, r)).ok()?;
    }
    Some(out)
}

fn specified_weights(layout: &Grouped, buffers: &Buffers, rows: usize, cols: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; rows * cols];
    for (r, row) in out.chunks_exact_mut(cols.max(1)).enumerate() {
        reference::decode_row(layout, &planes(layout, buffers).slice(layout, cols, r, 1), row);
    }
    out
}

fn bits(weights: &[f32]) -> Vec<u32> {
    weights.iter().map(|w| w.to_bits()).collect()
}

/// Checks one codec on one instruction set against what the specification wrote.
fn check(isa: &Isa, codec: &Codec, layout: &Grouped, weights: &[f32], cols: usize, want: Option<&Buffers>) {
    let rows = weights.len() / cols.max(1);
    let what = format!("{} on {} at {rows} x {cols}", codec.id, isa.name());
    let mut got = buffers(layout, rows, cols);
    let encoded = isa.encode_rows(layout, codec.fit, weights, cols, &mut planes_mut(layout, &mut got));
    let Some(want) = want else {
        assert!(encoded.is_err(), "{what}: the reference refuses these weights");
        return;
    };
    assert!(encoded.is_ok(), "{what}: the reference takes these weights");
    for (plane, (got, want)) in Layout::Grouped(*layout).planes().iter().zip(got.iter().zip(want)) {
        assert_eq!(got, want, "{what}: {}", plane.name());
    }
    let mut decoded = vec![f32::NAN; rows * cols];
    isa.decode_rows(layout, &planes(layout, &got), cols, &mut decoded);
    assert_eq!(bits(&decoded), bits(&specified_weights(layout, want, rows, cols)), "{what}: decoded");
}

/// Searches over every group's tables take long in a debug build: larger matrices are left to the other codecs.
const NESTED_WEIGHTS: usize = 200;

fn check_everywhere(weights: &[f32], cols: usize) {
    let tried = |codec: &Codec| codec.fit != Fit::Nested || weights.len() <= NESTED_WEIGHTS;
    for (codec, layout) in grouped().filter(|(codec, _)| tried(codec)) {
        let want = specified(codec, layout, weights, cols);
        for isa in isa::available() {
            check(isa, codec, layout, weights, cols, want.as_ref());
        }
    }
}

/// On ARM, which the continuous integration emulates, fewer widths and cases are tried.
const EMULATED: bool = cfg!(target_arch = "aarch64");
/// One of so many widths is tried.
const STEP: usize = if EMULATED { 5 } else { 1 };
const COLS: [usize; 24] =
    [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 33, 63, 64, 65, 127, 128, 129, 172, 255, 256, 384, 1000];

#[test]
fn every_instruction_set_writes_the_reference_s_bytes_at_every_width() {
    let mut stream = Stream(1);
    for cols in COLS {
        for rows in [0, 1, 2, 5, 19] {
            let weights: Vec<f32> = (0..rows * cols).map(|_| 0.05 * stream.normal()).collect();
            check_everywhere(&weights, cols);
        }
    }
}

/// Weight `i` of a matrix of hard numbers.
type Kind = dyn Fn(&mut Stream, usize) -> f32;

#[test]
fn hard_numbers_are_no_exception() {
    let mut stream = Stream(2);
    let kinds: [&Kind; 14] = [
        // Ties exactly at half steps, of steps that are powers of two, with both ends of the range present.
        &|s, i| {
            if i % 8 == 0 {
                0.0
            } else if i % 8 == 1 {
                15.0
            } else {
                0.5 * (s.next() % 31) as f32
            }
        },
        &|s, i| {
            if i % 8 == 0 {
                -7.5
            } else if i % 8 == 1 {
                7.5
            } else {
                0.5 * (s.next() % 31) as f32 - 7.5
            }
        },
        &|s, i| if i % 8 == 0 { 127.0 } else { 0.5 * (s.next() % 509) as f32 - 127.0 },
        // One unit in the last place from a tie.
        &|s, i| match i % 8 {
            0 => -7.5,
            1 => 7.5,
            _ => {
                f32::from_bits((0.5 * (s.next() % 15) as f32 + 0.5).to_bits() - 1 + s.bits() % 3)
                    * if s.next() % 2 == 0 { 1.0 } else { -1.0 }
            }
        },
        &|_, _| 0.0,
        &|_, _| -0.0,
        &|s, _| if s.next() % 2 == 0 { 0.0 } else { -0.0 },
        &|_, i| if i / 128 % 2 == 0 { 0.3 } else { -0.7 },
        &|_, i| if i % 5 == 0 { -1.5 } else { -0.0 },
        // From subnormal halves to their largest, a magnitude for each run of 128.
        &|s, i| s.normal() * [2e-8, 1e-6, 6e-5, 4e-3, 0.25, 16.0, 1000.0, 65_000.0][i / 128 % 8],
        &|s, i| s.normal() * if i % 64 < 32 { 1e-4 } else { 3e-5 },
        // A small range far from zero.
        &|s, _| 1000.0 + s.uniform(),
        &|s, _| -3.0 + 0.01 * s.normal(),
        // Mostly zero.
        &|s, _| if s.next() % 16 == 0 { s.normal() } else { 0.0 },
    ];
    for kind in kinds {
        for cols in COLS.into_iter().step_by(STEP) {
            let weights: Vec<f32> = (0..3 * cols).map(|i| kind(&mut stream, i)).collect();
            check_everywhere(&weights, cols);
        }
    }
}

#[test]
fn weights_at_and_beyond_the_limits_are_refused_alike() {
    let mut stream = Stream(3);
    for magnitude in [
        f32::from_bits(1),
        1e-42,
        1e-38,
        1e-30,
        1e-10,
        5e-7,
        2e-6,
        1e-5,
        2e-5,
        6e-5,
        1e-4,
        3e4,
        65_504.0,
        65_519.9,
        65_520.0,
        7e4,
        4e5,
        9e5,
        1e6,
        1e20,
        1.7e38,
        f32::MAX,
    ] {
        for cols in [17, 128, 1, 8, 172].into_iter().step_by(STEP) {
            let scaled: Vec<f32> = (0..2 * cols).map(|_| magnitude * (2.0 * stream.uniform() - 1.0)).collect();
            check_everywhere(&scaled, cols);
            check_everywhere(&vec![magnitude; 2 * cols], cols);
            check_everywhere(&vec![-magnitude; 2 * cols], cols);
            // One bad group among good ones.
            let mut one: Vec<f32> = (0..3 * cols).map(|_| stream.normal()).collect();
            let middle = one.len() / 2;
            one[middle] = magnitude;
            check_everywhere(&one, cols);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if EMULATED { 20 } else { 200 }))]

    #[test]
    fn any_finite_weights_give_the_reference_s_bytes(
        cols in 1usize..300,
        bits in prop::collection::vec(any::<u32>(), 1..900),
        exponent in 100u32..140,
    ) {
        let weights: Vec<f32> = bits
            .iter()
            .map(|&b| f32::from_bits(b & 0x807f_ffff | (exponent + (b >> 23 & 7)) << 23))
            .collect();
        let rows = weights.len() / cols;
        check_everywhere(&weights[..rows * cols], cols);
    }
}

#[test]
fn conversions_are_those_of_the_half_crate_on_every_instruction_set() {
    let mut stream = Stream(4);
    let halves: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let mut values: Vec<f32> = (0..50_000).map(|_| f32::from_bits(stream.bits())).collect();
    values.extend((0..=u16::MAX).map(|b| half::f16::from_bits(b).to_f32()));
    // Halfway between neighbouring halves, and one unit in the last place to either side.
    for b in 0..0x7c00u16 {
        let middle = (half::f16::from_bits(b).to_f32() + half::f16::from_bits(b + 1).to_f32()) / 2.0;
        for off in [-1i32, 0, 1] {
            values.push(f32::from_bits(middle.to_bits().saturating_add_signed(off)));
            values.push(-f32::from_bits(middle.to_bits().saturating_add_signed(off)));
        }
    }
    values.retain(|x| !x.is_nan());
    for isa in isa::available() {
        for len in [0, 1, 7, 15, 17, 33, 65_535] {
            let mut floats = vec![0.0; len];
            isa.f16_to_f32(&halves[..2 * len], &mut floats);
            for (b, x) in (0..=u16::MAX).zip(&floats) {
                let want = half::f16::from_bits(b).to_f32();
                assert!(x.to_bits() == want.to_bits() || want.is_nan(), "{isa:?}: half {b:#x}");
            }
            isa.bf16_to_f32(&halves[..2 * len], &mut floats);
            for (b, x) in (0..=u16::MAX).zip(&floats) {
                let want = half::bf16::from_bits(b).to_f32();
                assert!(x.to_bits() == want.to_bits() || want.is_nan(), "{isa:?}: bfloat {b:#x}");
            }
        }
        let mut bytes = vec![0; 2 * values.len()];
        isa.f32_to_f16(&values, &mut bytes);
        for (x, b) in values.iter().zip(bytes.as_chunks::<2>().0) {
            assert_eq!(u16::from_le_bytes(*b), half::f16::from_f32(*x).to_bits(), "{isa:?}: {x} as f16");
        }
        isa.f32_to_bf16(&values, &mut bytes);
        for (x, b) in values.iter().zip(bytes.as_chunks::<2>().0) {
            assert_eq!(u16::from_le_bytes(*b), half::bf16::from_f32(*x).to_bits(), "{isa:?}: {x} as bf16");
        }
    }
}

#[test]
fn parallel_encoding_gives_the_bytes_of_one_thread() {
    let mut stream = Stream(5);
    let (rows, cols) = (300, 172);
    let weights: Vec<f32> = (0..rows * cols).map(|_| stream.normal()).collect();
    for (codec, layout) in grouped() {
        let encoded = codec.encode(&weights, rows, cols).unwrap();
        let mut alone = buffers(layout, rows, cols);
        isa::best().encode_rows(layout, codec.fit, &weights, cols, &mut planes_mut(layout, &mut alone)).unwrap();
        let planes: Vec<(Plane, &[u8])> = encoded.planes().collect();
        for ((_, got), want) in planes.iter().zip(&alone) {
            assert_eq!(got, want, "{}", codec.id);
        }
        assert_eq!(bits(&encoded.decode()), bits(&specified_weights(layout, &alone, rows, cols)), "{}", codec.id);
    }
}
