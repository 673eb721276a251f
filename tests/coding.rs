//! Coded planes: lossless, the same on any number of threads, and no bytes of any kind do harm.

#![expect(clippy::cast_possible_truncation, reason = "levels are clamped to those of codes")]

use proptest::prelude::*;
use tenpak::coding::ends::{self, Codes, Columns};
use tenpak::coding::tail::{self, Steps};
use tenpak::coding::{self, ByteStream, Stream, Trellis};
use tenpak::fit::entropy::{Choice, Quantized, quantize, quantize_step, quantize_with};

/// Numbers that look like a Gaussian's, from a fixed seed.
fn gaussian(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..count).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect()
}

/// Rows and columns of very different size.
fn uneven(rows: usize, cols: usize) -> Vec<f32> {
    let mut weights = gaussian(rows * cols, 5);
    for (i, w) in weights.iter_mut().enumerate() {
        *w *= 0.25 * (1 + i / cols % 7) as f32 * (1 + i % cols % 5) as f32;
    }
    weights
}

fn decoded(stream: &[u8], rows: usize, cols: usize) -> tenpak::Result<Vec<u8>> {
    let stream = Stream::open(stream, rows, cols)?;
    let mut codes = vec![0; rows * cols];
    stream.decode_all(&mut codes)?;
    Ok(codes)
}

/// The bytes of a plane of `rows` rows of `row` bytes.
fn decoded_bytes(stream: &[u8], rows: usize, row: usize) -> tenpak::Result<Vec<u8>> {
    let stream = ByteStream::open(stream, rows, row)?;
    let mut plane = vec![0; rows.saturating_mul(row)];
    for block in 0..stream.blocks() {
        let here = stream.rows(block);
        stream.decode_block(block, &mut plane[here.start * row..here.end * row])?;
    }
    Ok(plane)
}

/// Little-endian halves that look like scales.
fn halves(count: usize, seed: u64) -> Vec<u8> {
    gaussian(count, seed).iter().flat_map(|x| half::f16::from_f32(0.01 * (2.0 + x)).to_le_bytes()).collect()
}

/// Outliers of a matrix: how many each row has, their columns, and how many steps they are beyond their codes.
#[derive(Debug, Clone, PartialEq, Default)]
struct Beyond {
    counts: Vec<u32>,
    columns: Vec<u32>,
    steps: Vec<u32>,
}

impl Beyond {
    /// Those that `chosen` picks among codes of a magnitude of at least `least`, with numbers of steps of all sizes.
    fn of(codes: &[u8], cols: usize, least: u8, chosen: impl Fn(usize) -> bool) -> Self {
        let mut all = Self::default();
        for row in codes.chunks(cols) {
            let own = row.iter().enumerate().filter(|(_, code)| code.abs_diff(128) >= least);
            let before = all.columns.len();
            for (column, _) in own.filter(|(column, _)| chosen(all.counts.len() * cols + column)) {
                let place = all.counts.len() * cols + column;
                all.columns.push(u32::try_from(column).expect("a short row"));
                all.steps.push(1 + (place as u32 * 7919 % 64) * if place.is_multiple_of(97) { 200_000 } else { 1 });
            }
            all.counts.push((all.columns.len() - before) as u32);
        }
        all
    }

    /// The three streams.
    fn streams(&self, codes: &[u8], cols: usize) -> [Vec<u8>; 3] {
        let matrix = Codes { plane: codes, stride: cols, cols };
        let columns = ends::encode_columns(&matrix, &self.counts, &self.columns).expect("no outlier at level zero");
        let counts = ends::encode_counts(&self.counts).expect("counts of a small matrix");
        [counts, columns, tail::encode_steps(cols, &self.counts, &self.steps)]
    }

    /// What three streams say.
    fn read(streams: [&[u8]; 3], codes: &[u8], cols: usize) -> tenpak::Result<Self> {
        let rows = codes.len() / cols;
        let mut all = Self { counts: ends::decode_counts(streams[0], rows)?, ..Self::default() };
        let columns = Columns::open(streams[1], rows, cols)?;
        let steps = Steps::open(streams[2], rows, cols)?;
        let per_block = columns.blocks().rows();
        for (block, counts) in all.counts.chunks(per_block).enumerate() {
            let plane = &codes[block * per_block * cols..][..counts.len() * cols];
            columns.decode(block, &Codes { plane, stride: cols, cols }, counts, &mut all.columns)?;
            // As a reader does that has compared counts with the matrix.
            let number = counts.iter().map(|&count| (count as usize).min(cols)).sum();
            steps.decode(block, number, &mut all.steps)?;
        }
        Ok(all)
    }
}

/// Codes of a wide distribution, clipped to the ends.
fn clipped(rows: usize, cols: usize, spread: f32, seed: u64) -> Vec<u8> {
    let level = |x: &f32| (x * spread).round().clamp(-127.0, 127.0) as i16;
    gaussian(rows * cols, seed).iter().map(|x| u8::try_from(level(x) + 128).expect("clamped")).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_outliers_come_back(rows in 1usize..80, cols in 1usize..90, least in 1u8..=127, every in 1usize..40, spread in 1f32..300.0, seed in any::<u64>()) {
        let codes = clipped(rows, cols, spread, seed);
        let beyond = Beyond::of(&codes, cols, least, |place| (place * 31).is_multiple_of(every));
        let [counts, columns, steps] = beyond.streams(&codes, cols);
        prop_assert_eq!(Beyond::read([&counts, &columns, &steps], &codes, cols).expect("what was encoded decodes"), beyond);
    }

    #[test]
    fn no_bytes_of_outliers_do_harm(bytes in prop::collection::vec(any::<u8>(), 0..60), rows in 1usize..70, cols in 1usize..70) {
        let codes = clipped(rows, cols, 200.0, 1);
        let sound = Beyond::of(&codes, cols, 127, |_| true);
        let [counts, columns, steps] = sound.streams(&codes, cols);
        for streams in [[&*bytes, &*columns, &*steps], [&*counts, &*bytes, &*steps], [&*counts, &*columns, &*bytes]] {
            let _ = Beyond::read(streams, &codes, cols);
        }
    }

    #[test]
    fn any_bytes_come_back(rows in 1usize..80, row in 1usize..90, log in 0u32..4, spread in 0.0f32..300.0, seed in any::<u64>()) {
        let (size, row) = (1usize << log, row << log);
        let plane: Vec<u8> = gaussian(rows * row, seed).iter().map(|x| (x * spread) as i32 as u8).collect();
        let stream = coding::encode_bytes(&plane, row, size);
        prop_assert_eq!(decoded_bytes(&stream, rows, row).expect("what was encoded decodes"), plane);
    }

    #[test]
    fn any_codes_come_back(rows in 1usize..80, cols in 1usize..90, spread in 1u32..128, seed in any::<u64>()) {
        let codes: Vec<u8> = gaussian(rows * cols, seed)
            .iter()
            .map(|x| (x * spread as f32 / 3.0).clamp(-127.0, 127.0) as i16)
            .map(|level| u8::try_from(level + 128).expect("clamped"))
            .collect();
        let stream = coding::encode(&codes, rows, cols).expect("these are codes");
        prop_assert_eq!(decoded(&stream, rows, cols).expect("what was encoded decodes"), codes);
    }

    #[test]
    fn codes_that_follow_a_trellis_come_back(rows in 1usize..70, cols in 1usize..90, log in 2u8..=8, exponent in -6i32..4) {
        let weights = uneven(rows, cols);
        let choice = Choice::of(Trellis::new(log));
        let q = quantize_step(&weights, rows, cols, 2f32.powi(exponent), choice, None).expect("finite weights");
        prop_assert_eq!(decoded(&q.stream, rows, cols).expect("what was encoded decodes"), q.codes);
        prop_assert_eq!(Stream::open(&q.stream, rows, cols).expect("a stream").trellis(), Trellis::new(log));
        prop_assert_eq!(coding::decode_scales(&q.scales_stream, rows).expect("scales"), q.scales);
    }

    #[test]
    fn any_scales_come_back(bits in prop::collection::vec(any::<u32>(), 0..300), values in 1usize..300) {
        let scales: Vec<f32> = bits.iter().map(|b| f32::from_bits(bits[*b as usize % bits.len().min(values)])).collect();
        let stream = coding::encode_scales(&scales);
        prop_assert!(stream.len() <= 1 + 4 * scales.len());
        let back = coding::decode_scales(&stream, scales.len()).expect("what was encoded decodes");
        prop_assert!(back.iter().map(|s| s.to_bits()).eq(scales.iter().map(|s| s.to_bits())));
    }

    #[test]
    fn no_bytes_do_harm(bytes in prop::collection::vec(any::<u8>(), 0..400), rows in 0usize..70, cols in 0usize..70) {
        let _ = decoded(&bytes, rows, cols);
        let _ = decoded_bytes(&bytes, rows, cols);
        let _ = coding::decode_scales(&bytes, rows);
    }
}

#[test]
fn bytes_take_their_entropy() {
    // Nibbles two to a byte, and the two bytes of a half: within a hundredth of the sum over each byte's distribution.
    let nibbles: Vec<u8> = gaussian(1 << 20, 3).iter().map(|x| (8.0 + 2.5 * x).clamp(0.0, 15.0) as u8).collect();
    let codes: Vec<u8> = nibbles.as_chunks::<2>().0.iter().map(|[low, high]| low | high << 4).collect();
    for (plane, row, size) in [(codes, 4096, 1), (halves(1 << 19, 4), 64, 2), (vec![7; 1 << 20], 1024, 1)] {
        let mut entropy = 0.0;
        for table in 0..size {
            let mut counts = [0f64; 256];
            plane.iter().skip(table).step_by(size).for_each(|&byte| counts[usize::from(byte)] += 1.0);
            let total: f64 = counts.iter().sum();
            entropy += counts.iter().filter(|&&n| n > 0.0).map(|n| n * (total / n).log2()).sum::<f64>() / 8.0;
        }
        let stream = coding::encode_bytes(&plane, row, size);
        let most = entropy * 1.01 + 2048.0;
        assert!((stream.len() as f64) < most, "{} bytes, entropy {entropy}", stream.len());
    }
}

#[test]
fn any_byte_of_a_byte_stream_changed_gives_an_error_or_bytes_and_any_other_length_an_error() {
    let plane = halves(33 * 20, 8);
    let stream = coding::encode_bytes(&plane, 40, 2);
    assert_eq!(decoded_bytes(&stream, 33, 40).expect("what was encoded decodes"), plane);
    for at in 0..stream.len() {
        for change in [1, 0x90] {
            let mut bytes = stream.clone();
            bytes[at] ^= change;
            let _ = decoded_bytes(&bytes, 33, 40);
        }
        assert!(ByteStream::open(&stream[..at], 33, 40).is_err(), "cut at {at}");
    }
    assert!(ByteStream::open(&[&stream[..], &[0]].concat(), 33, 40).is_err());
    for (rows, row) in [(0, 40), (33, 0), (33, 41), (usize::MAX, 40), (1 << 40, 40), (1, usize::MAX)] {
        assert!(ByteStream::open(&stream, rows, row).is_err(), "{rows} x {row}");
    }
    // The last table's last frequency one higher, and the sizes that are none.
    for size in [0, 3, 5, 16] {
        let mut bytes = stream.clone();
        bytes[0] = size;
        assert!(ByteStream::open(&bytes, 33, 40).is_err(), "elements of {size} bytes");
    }
}

#[test]
fn any_byte_changed_gives_an_error_or_codes() {
    for trellis in [None, Trellis::new(4)] {
        let (rows, cols) = (40, 50);
        let q = quantize_step(&uneven(rows, cols), rows, cols, 0.4, Choice::of(trellis), None).expect("finite weights");
        for at in 0..q.stream.len() {
            for change in [1, 0x90] {
                let mut bytes = q.stream.clone();
                bytes[at] ^= change;
                if let Ok(codes) = decoded(&bytes, rows, cols) {
                    assert!(codes.iter().all(|&code| code != 0), "code 0 is no level");
                }
            }
        }
    }
}

#[test]
fn a_stream_of_another_length_is_refused_at_every_length() {
    let (rows, cols) = (33, 40);
    let q =
        quantize_step(&uneven(rows, cols), rows, cols, 0.3, Choice::of(Trellis::new(3)), None).expect("finite weights");
    for end in 0..q.stream.len() {
        assert!(Stream::open(&q.stream[..end], rows, cols).is_err(), "cut at {end}");
    }
    assert!(Stream::open(&[&q.stream[..], &[0]].concat(), rows, cols).is_err());
    for end in 0..q.scales_stream.len() {
        assert!(coding::decode_scales(&q.scales_stream[..end], rows).is_err(), "cut at {end}");
    }
}

#[test]
fn a_matrix_that_the_stream_is_not_of_is_refused_or_fails() {
    let codes = vec![131u8; 64 * 64];
    let stream = coding::encode(&codes, 64, 64).expect("these are codes");
    for (rows, cols) in [
        (0, 64),
        (64, 0),
        (usize::MAX, 1),
        (1, usize::MAX),
        (1, 1 << 40),
        (1 << 40, 1 << 20),
        (64, 1 << 20),
        (1 << 19, 64),
    ] {
        assert!(Stream::open(&stream, rows, cols).is_err(), "{rows}x{cols}");
    }
}

#[test]
fn outliers_of_all_kinds_come_back_and_streams_of_other_lengths_are_refused() {
    let (rows, cols) = (70, 90);
    let wide = clipped(rows, cols, 90.0, 6);
    for codes in [vec![255; rows * cols], vec![1; rows * cols], wide.clone()] {
        for chosen in [|_| true, |place: usize| place.is_multiple_of(90) || place % 90 == 89, |place| place == 6299] {
            let beyond = Beyond::of(&codes, cols, 127, chosen);
            let [counts, columns, steps] = beyond.streams(&codes, cols);
            let read = |streams: [&[u8]; 3]| Beyond::read(streams, &codes, cols);
            assert_eq!(read([&counts, &columns, &steps]).expect("what was encoded decodes"), beyond);
            if beyond.columns.is_empty() {
                continue;
            }
            for end in 0..columns.len() {
                assert!(read([&counts, &columns[..end], &steps]).is_err(), "columns cut at {end}");
            }
            for end in 0..steps.len() {
                assert!(read([&counts, &columns, &steps[..end]]).is_err(), "steps cut at {end}");
            }
            assert!(read([&counts, &[&columns[..], &[0]].concat(), &steps]).is_err());
            assert!(read([&counts, &columns, &[&steps[..], &[0]].concat()]).is_err());
            assert!(read([&[&counts[..], &[0]].concat(), &columns, &steps]).is_err());
            for least in [0, 128, 255] {
                assert!(read([&counts, &[&[least], &columns[1..]].concat(), &steps]).is_err());
            }
            // No such shape, no such deviation, too few and too many classes, and a Gaussian that ends before the codes do.
            for head in [[10, 40, 90], [0, 128, 90], [0, 40, 1], [0, 40, 176], [9, 8, 90]] {
                assert!(read([&counts, &columns, &[&head, &steps[3..]].concat()]).is_err(), "{head:?}");
            }
        }
    }
    // More outliers than there are codes at the ends, and codes that are none of the ends.
    let beyond = Beyond::of(&wide, cols, 127, |_| true);
    let [counts, columns, steps] = beyond.streams(&wide, cols);
    assert!(Beyond::read([&counts, &columns, &steps], &vec![128; rows * cols], cols).is_err());
    let more = ends::encode_counts(&vec![90; rows]).expect("counts");
    assert!(Beyond::read([&more, &columns, &steps], &wide, cols).is_err());
    let flat = vec![128; rows * cols];
    assert!(
        ends::encode_columns(&Codes { plane: &flat, stride: cols, cols }, &beyond.counts, &beyond.columns).is_none()
    );
    for (rows, cols) in [(1 << 40, 1), (1 << 20, 1 << 30), (usize::MAX, 1)] {
        assert!(Columns::open(&columns, rows, cols).is_err() && Steps::open(&steps, rows, cols).is_err());
    }
}

#[test]
fn a_number_of_steps_is_what_its_half_precision_value_says() {
    for step in [1.5e-3f32, 0.25, 1.0, -0.125, 3e-8, 600.0] {
        for number in [1u32, 2, 3, 17, 100, 2047, 2048, 5000, 70_000] {
            for negative in [false, true] {
                let value = tail::value(number, negative, step);
                let found = tail::steps(value, negative, step);
                if !value.is_finite() {
                    assert_eq!(found, None, "{number} of {step}");
                } else if let Some(found) = found {
                    assert_eq!(tail::value(found, negative, step).to_bits(), value.to_bits(), "{number} of {step}");
                } else {
                    // Below the subnormals of half precision all numbers are zero, which is none.
                    assert!(value.to_f32().abs() <= step.abs(), "{number} of {step} is {value}, which no number is");
                }
                assert_eq!(tail::steps(-value, negative, step).is_some(), value.to_bits() == 0 && found.is_some());
            }
        }
    }
    assert_eq!(tail::steps(half::f16::NAN, false, 1.0), None);
    assert_eq!(tail::steps(half::f16::from_f32(0.3), false, 1.0), None);
}

#[test]
fn codes_at_the_ends_take_what_lies_beyond_them() {
    // 4 % of a Gaussian beyond the ends: what they take is the entropy of the clipped distribution, within a hundredth.
    let (rows, cols) = (256, 1024);
    let codes = clipped(rows, cols, 62.0, 12);
    let stream = coding::encode(&codes, rows, cols).expect("these are codes");
    let mut counts = [0f64; 256];
    codes.iter().for_each(|&code| counts[usize::from(code)] += 1.0);
    let total = codes.len() as f64;
    let entropy: f64 = counts.iter().filter(|n| **n > 0.0).map(|n| n / total * (total / n).log2()).sum();
    let bits = 8.0 * stream.len() as f64 / total;
    assert!(bits < 1.01 * entropy, "{bits} bits of {entropy}");
    assert_eq!(decoded(&stream, rows, cols).expect("what was encoded decodes"), codes);
}

#[test]
fn at_eight_bits_a_gaussian_loses_what_a_quantizer_without_ends_would() {
    let (rows, cols) = (512, 512);
    let weights = gaussian(rows * cols, 21);
    let q = quantize(&weights, rows, cols, 8.0, None).expect("finite weights");
    let nmse = q.squared_error / sum_of_squares(&weights.iter().map(|&w| f64::from(w)).collect::<Vec<_>>());
    // An entropy-coded uniform quantizer in theory: 2.17e-5.
    assert!(q.bits_per_weight() <= 8.0 && nmse <= 2.3e-5, "{nmse:e} at {}", q.bits_per_weight());
    let [counts, columns, steps] = q.outlier_streams.map(|stream| stream.expect("outliers go on where codes end"));
    let bytes = counts.len() + columns.len() + steps.len();
    // Of a geometric distribution of mean 23, a sign that costs nothing, and where they are.
    assert!(8 * bytes < 10 * q.outliers.len(), "{bytes} bytes of {} outliers", q.outliers.len());
}

#[test]
fn code_zero_and_codes_off_the_trellis_are_refused() {
    assert!(coding::encode(&[128, 0], 1, 2).is_err());
    // The first state is even.
    assert!(coding::encode_following(&[129], 1, 1, Trellis::new(3)).is_err());
    assert!(coding::encode_following(&[130], 1, 1, Trellis::new(3)).is_ok());
    assert!(Trellis::new(1).is_none() && Trellis::new(9).is_none());
}

#[test]
fn blocks_are_whole_rows_that_decode_alone() {
    let (rows, cols) = (700, 1024);
    let codes: Vec<u8> =
        gaussian(rows * cols, 9).iter().map(|x| 128u8.saturating_add_signed((x * 4.0) as i8)).collect();
    let stream = coding::encode(&codes, rows, cols).expect("these are codes");
    let stream = Stream::open(&stream, rows, cols).expect("a stream");
    assert!(stream.blocks() > 1);
    let mut next = 0;
    for block in (0..stream.blocks()).rev() {
        let rows = stream.rows(block);
        let mut out = vec![0; rows.len() * cols];
        stream.decode_block(block, &mut out).expect("a block");
        assert_eq!(out, codes[rows.start * cols..rows.end * cols]);
        next += rows.len();
    }
    assert_eq!(next, rows);
}

#[test]
fn constant_planes_cost_nearly_nothing() {
    let stream = coding::encode(&vec![128; 512 * 512], 512, 512).expect("these are codes");
    assert!(stream.len() < 400, "{} bytes", stream.len());
    assert_eq!(coding::encode_scales(&[0.25; 4096]).len(), 5);
    assert!(decoded(&[], 0, 7).expect("nothing").is_empty());
    assert!(coding::encode(&[], 7, 0).expect("nothing").is_empty());
}

#[test]
fn bytes_do_not_depend_on_threads() {
    let (rows, cols) = (300, 256);
    let weights = uneven(rows, cols);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        pool.install(|| quantize(&weights, rows, cols, 3.5, None).expect("finite weights"))
    };
    let (one, three) = (run(1), run(3));
    assert_eq!((one.stream, one.scales_stream, one.step), (three.stream, three.scales_stream, three.step));
}

#[test]
fn a_rate_is_met_from_below_and_errors_are_those_of_the_codes() {
    let (rows, cols) = (96, 256);
    let weights = uneven(rows, cols);
    for target in [2.0, 3.0, 4.25] {
        let q = quantize(&weights, rows, cols, target, None).expect("finite weights");
        let bits = q.bits_per_weight();
        assert!(bits <= target && bits >= target * 0.995, "{bits} for {target}");
        let error = sum_of_squares(&errors(&weights, cols, &q));
        assert!((error - q.squared_error).abs() <= 1e-9 * error, "{error} is not {}", q.squared_error);
    }
    assert!(quantize(&weights, rows, cols, 0.001, None).is_err());
}

#[test]
fn a_trellis_gains_over_rounding_at_equal_bits() {
    let (rows, cols) = (128, 256);
    let weights = gaussian(rows * cols, 3);
    let error = |choice| quantize_with(&weights, rows, cols, 4.0, choice, None).expect("finite weights").squared_error;
    let rounded = error(Choice { trellis: None, lambda: 0.0 });
    assert!(error(Choice::of(None)) < 1.01 * rounded);
    // 0.99 and 1.22 dB in theory, for 4 and 32 states.
    assert!(error(Choice::of(Trellis::new(2))) < 0.82 * rounded);
    assert!(error(Choice::of(Trellis::new(5))) < 0.78 * rounded);
}

#[test]
fn importance_moves_error_to_where_it_counts_less() {
    let (rows, cols) = (64, 128);
    let weights = gaussian(rows * cols, 8);
    let importance: Vec<f32> = (0..cols).map(|c| if c < 16 { 8.0 } else { 0.2 }).collect();
    let with = quantize(&weights, rows, cols, 3.0, Some(&importance)).expect("finite weights");
    let choice = Choice { lambda: 0.0, ..Choice::of(with.choice.trellis) };
    let without = quantize_with(&weights, rows, cols, 3.0, choice, Some(&importance)).expect("finite weights");
    assert!(with.weighted_error < without.weighted_error);
}

/// What the weights of a matrix are off by.
fn errors(weights: &[f32], cols: usize, q: &Quantized) -> Vec<f64> {
    let mut decoded: Vec<f32> =
        q.codes.iter().enumerate().map(|(i, &code)| (f32::from(code) - 128.0) * q.scales[i / cols]).collect();
    for outlier in &q.outliers {
        decoded[outlier.row * cols + outlier.column] += outlier.value.to_f32();
    }
    weights.iter().zip(decoded).map(|(&w, d)| f64::from(w) - f64::from(d)).collect()
}

fn sum_of_squares(errors: &[f64]) -> f64 {
    errors.iter().map(|e| e * e).sum()
}

#[test]
fn outliers_and_zeros_are_quantized() {
    let (rows, cols) = (40, 96);
    let mut weights = gaussian(rows * cols, 4);
    weights[..cols].fill(0.0);
    weights[5 * cols + 7] = 1e3;
    let q = quantize(&weights, rows, cols, 4.0, None).expect("finite weights");
    let outliers: Vec<_> = q.outliers.iter().map(|outlier| (outlier.row, outlier.column)).collect();
    assert_eq!(outliers, [(5, 7)], "what lies beyond the codes is stored beside them");
    let errors = errors(&weights, cols, &q);
    assert!((sum_of_squares(&errors) - q.squared_error).abs() <= 1e-9 * q.squared_error);
    // The row with the outlier loses what the others lose, a few of its own F16 steps apart.
    let mean = q.squared_error / (rows - 1) as f64;
    assert!(sum_of_squares(&errors[5 * cols..6 * cols]) < 1.5 * mean + 0.25);
    assert!(q.codes[..cols].iter().all(|&code| code == 128));
    let zeros = quantize(&vec![0.0; 300], 3, 100, 2.0, None).expect("finite weights");
    assert_eq!(zeros.squared_error, 0.0);
    assert!(quantize(&[], 0, 5, 4.0, None).is_ok());
}

#[test]
fn what_no_f16_holds_stretches_its_row_instead() {
    let (rows, cols) = (40, 96);
    let mut weights: Vec<f32> = gaussian(rows * cols, 4).iter().map(|w| w * 1e4).collect();
    weights[5 * cols + 7] = 1e7;
    let q = quantize(&weights, rows, cols, 4.0, None).expect("finite weights");
    assert_eq!((q.stretched, q.outliers.len()), (1, 0));
    assert!(q.scales[5] > 2.0 * q.scales[6]);
}

#[test]
fn with_all_bits_a_matrix_loses_less_than_rounded_within_the_range_of_its_rows() {
    let (rows, cols) = (48, 512);
    for (weights, least) in [(uneven(rows, cols), 2.0), (gaussian(rows * cols, 2), 1.4)] {
        let q = quantize(&weights, rows, cols, 8.0, None).expect("finite weights");
        assert!(q.bits_per_weight() <= 8.0);
        let ranged = |row: &[f32]| {
            let scale = row.iter().fold(0f32, |most, w| most.max(w.abs())) / 127.0;
            sum_of_squares(&row.iter().map(|w| f64::from(w - (w / scale).round() * scale)).collect::<Vec<_>>())
        };
        let ranged: f64 = weights.chunks(cols).map(ranged).sum();
        assert!(least * q.squared_error < ranged, "{:e}, rounded within ranges {ranged:e}", q.squared_error);
        let less = quantize(&weights, rows, cols, 6.5, None).expect("finite weights");
        assert!(less.bits_per_weight() <= 6.5 && less.squared_error > q.squared_error);
    }
}

/// Codes that a formula gives, as `tests/python/test_coded.py` states it too.
fn pinned(rows: usize, cols: usize, spread: i32, trellis: Option<Trellis>) -> Vec<u8> {
    let mut seed = 1u64;
    let mut codes = Vec::new();
    for row in 0..rows as i32 {
        let mut state = 0u8;
        for col in 0..cols as i32 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let level: i32 = [40, 46, 52, 58].iter().map(|shift| (seed >> shift & 63) as i32).sum::<i32>() - 126;
            let level = (level * spread * (row % 5 + 1) * (col % 3 + 1)).div_euclid(512);
            let mut code = u8::try_from(level.clamp(-120, 120) + 128).expect("clamped");
            if let Some(trellis) = trellis {
                code += (code ^ state) & 1;
                state = trellis.next(state, code);
            }
            codes.push(code);
        }
    }
    codes
}

/// What lies beyond 100 levels, as if it were clipped.
fn to_the_ends(code: u8) -> u8 {
    match code {
        0..=28 => 1,
        228.. => 255,
        code => code,
    }
}

/// Compares with a file of `tests/data/coded`; `TENPAK_GOLDEN=create` makes one where there is none.
fn compare(name: &str, bytes: &[u8]) {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/coded").join(name);
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    if !path.exists() && std::env::var("TENPAK_GOLDEN").as_deref() == Ok("create") {
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("the folder can be made");
        std::fs::write(&path, hex + "\n").expect("the file can be written");
        return;
    }
    let want = std::fs::read_to_string(&path).expect("TENPAK_GOLDEN=create cargo test --test coding makes the file");
    assert!(want.trim_end() == hex, "{name}: the bytes changed; streams that were written must stay readable");
}

#[test]
fn the_bytes_of_streams_stay_as_they_are() {
    for (rows, cols, spread, method) in
        [(40, 50, 6, 0), (3, 20, 400, 0), (70, 33, 40, 5), (33, 65, 3, 3), (1, 9, 90, 2), (34, 31, 500, 8)]
    {
        let trellis = Trellis::new(method);
        let codes = pinned(rows, cols, spread, trellis);
        let stream = coding::encode_following(&codes, rows, cols, trellis).expect("codes");
        assert_eq!(decoded(&stream, rows, cols).expect("a stream"), codes);
        compare(&format!("codes-{rows}-{cols}-{spread}-{method}.hex"), &stream);
    }
    let mixed: Vec<f32> = (0..35).map(|row| if row % 4 == 1 { 1.5 } else { 0.5 }).collect();
    let rising: Vec<f32> = (0..15).map(|row| 0.5 + row as f32).collect();
    for (kind, scales) in [vec![0.5; 5], mixed, rising].iter().enumerate() {
        let bytes = coding::encode_scales(scales);
        assert_eq!(usize::from(bytes[0]), kind);
        compare(&format!("scales-{kind}.hex"), &bytes);
    }
    // The last one has two blocks.
    for (rows, cols, spread) in [(40, 50, 60), (3, 20, 400), (33, 8192, 0)] {
        let mut codes: Vec<u8> = pinned(rows, cols, spread, None).into_iter().map(to_the_ends).collect();
        if spread == 0 {
            codes.iter_mut().step_by(499).for_each(|code| *code = 255);
        }
        let beyond = Beyond::of(&codes, cols, 127, |place| place % 7 != 3);
        let stream = coding::encode(&codes, rows, cols).expect("codes");
        assert_eq!(stream[7], u8::from(spread > 0), "{rows} x {cols}");
        assert_eq!(decoded(&stream, rows, cols).expect("a stream"), codes);
        let streams = beyond.streams(&codes, cols);
        assert_eq!(Beyond::read([&streams[0], &streams[1], &streams[2]], &codes, cols).expect("streams"), beyond);
        if spread > 0 {
            compare(&format!("clipped-{rows}-{cols}-{spread}.hex"), &stream);
        }
        for (name, stream) in ["counts", "columns", "tails"].iter().zip(streams) {
            compare(&format!("{name}-{rows}-{cols}-{spread}.hex"), &stream);
        }
    }
    for (rows, row, size) in [(40, 50, 1), (3, 40, 2), (70, 36, 4), (1, 8, 8), (5, 100, 1)] {
        let plane = pinned(rows, row, if rows == 5 { 0 } else { 40 }, None);
        let stream = coding::encode_bytes(&plane, row, size);
        assert_eq!(decoded_bytes(&stream, rows, row).expect("a stream"), plane);
        compare(&format!("bytes-{rows}-{row}-{size}.hex"), &stream);
    }
}
