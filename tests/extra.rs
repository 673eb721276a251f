//! Promises of extra planes: what column scales and outliers mean is what decoding and every product make of them.

#[path = "support/format.rs"]
mod format;
mod stream;

use half::f16;
use tenpak::artifact::{ArtifactFile, verify};
use tenpak::codec::extra::{Extras, Outlier};
use tenpak::codec::reference;
use tenpak::gemm::{Act, Matrix, Weights, cpu};
use tenpak::layout::{Layout, Plane};
use tenpak::{Codec, Encoded, codecs};

use format::{Artifact, Entry};
use stream::Stream;

/// Every codec with codes.
fn grouped() -> impl Iterator<Item = &'static Codec> {
    codecs::all().iter().filter(|codec| codec.layout != Layout::Raw)
}

/// A matrix with both kinds of extra planes, or one of them.
fn sample(codec: &'static Codec, rows: usize, cols: usize, kinds: (bool, bool), stream: &mut Stream) -> Encoded {
    let weights: Vec<f32> = (0..rows * cols).map(|_| stream.normal()).collect();
    let scales: Vec<f32> = (0..cols).map(|j| (0.5 + (j % 7) as f32) * if j % 3 == 0 { -1.0 } else { 1.0 }).collect();
    let mut outliers = Vec::new();
    for row in 0..rows {
        for column in 0..cols {
            if stream.bits().is_multiple_of(9) {
                outliers.push(Outlier { row, column, value: f16::from_f32(8.0 * stream.normal()) });
            }
        }
    }
    let outliers = if kinds.1 { &*outliers } else { &[] };
    codec.encode(&weights, rows, cols).unwrap().with_extras(kinds.0.then_some(&*scales), outliers).unwrap()
}

/// The weights as the format says, from what the codec's planes decode to.
fn by_hand(encoded: &Encoded) -> Vec<f32> {
    let (rows, cols) = (encoded.rows(), encoded.cols());
    let mut weights = encoded.clone().with_extras(None, &[]).unwrap().decode();
    let plane = |kind| encoded.planes().find(|(plane, _)| *plane == kind).map(|(_, bytes)| bytes.to_vec());
    if let Some(scales) = plane(Plane::ColumnScales) {
        for (i, w) in weights.iter_mut().enumerate() {
            let at = 4 * (i % cols);
            *w *= f32::from_le_bytes(scales[at..at + 4].try_into().unwrap());
        }
    }
    let Some(counts) = plane(Plane::OutlierCounts) else { return weights };
    let (columns, values) = (plane(Plane::OutlierColumns).unwrap(), plane(Plane::OutlierValues).unwrap());
    let mut i = 0;
    for row in 0..rows {
        for _ in 0..u32::from_le_bytes(counts[4 * row..4 * row + 4].try_into().unwrap()) {
            let column = usize::from(u16::from_le_bytes([columns[2 * i], columns[2 * i + 1]]));
            weights[row * cols + column] += f16::from_le_bytes([values[2 * i], values[2 * i + 1]]).to_f32();
            i += 1;
        }
    }
    weights
}

fn same(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

#[test]
fn weights_are_scaled_and_then_added_to_in_every_codec() {
    let mut stream = Stream(5);
    for codec in grouped() {
        for (rows, cols, kinds) in
            [(1, 1, (true, true)), (33, 70, (true, true)), (9, 64, (true, false)), (40, 31, (false, true))]
        {
            let encoded = sample(codec, rows, cols, kinds, &mut stream);
            let want = by_hand(&encoded);
            assert!(same(&encoded.decode(), &want), "{}", codec.id);
            let weights = Weights::from(&encoded);
            let mut out = vec![f32::NAN; rows * cols];
            weights.decode(&mut out).unwrap();
            assert!(same(&out, &want), "{}: as a matrix", codec.id);
            let ids: Vec<usize> = (0..2 * rows).map(|i| (7 * i + 3) % rows).collect();
            let mut some = vec![f32::NAN; ids.len() * cols];
            cpu::decode_rows(&weights, &ids, &mut some).unwrap();
            for (id, row) in ids.iter().zip(some.chunks(cols)) {
                assert!(same(row, &want[id * cols..][..cols]), "{}: row {id}", codec.id);
            }
            let half = weights.slice(rows / 2, rows - rows / 2);
            let mut out = vec![f32::NAN; half.rows() * cols];
            half.decode(&mut out).unwrap();
            assert!(same(&out, &want[rows / 2 * cols..]), "{}: a slice", codec.id);
        }
    }
}

/// `Σ |x| · ((|scale · level| + |offset|) · |column scale| + |outlier|)` of every result: what the bound of a product goes by.
fn magnitudes(encoded: &Encoded, x: &[f32], m: usize) -> Vec<f64> {
    let (rows, cols) = (encoded.rows(), encoded.cols());
    let weights = Weights::from(encoded);
    let layout = *weights.layout();
    let plain = encoded.clone().with_extras(None, &[]).unwrap().decode();
    let full = by_hand(encoded);
    let scales = encoded.planes().find(|(plane, _)| *plane == Plane::ColumnScales).map(|(_, bytes)| bytes.to_vec());
    let mut out = Vec::new();
    for i in 0..m {
        for n in 0..rows {
            let row = weights.slice(n, 1);
            let term = |j: usize| {
                let params = reference::load_params(&layout, row.planes(), j / layout.group_len(cols));
                let scale =
                    scales.as_ref().map_or(1.0, |s| f32::from_le_bytes(s[4 * j..4 * j + 4].try_into().unwrap()));
                let base = f64::from(plain[n * cols + j]);
                // A code and its zero point are at most 255 apart, whatever the kernel takes off both.
                let zero = if layout.levels() == tenpak::layout::Levels::ZeroPoint { 255.0 } else { 0.0 };
                let own = base.abs() + 2.0 * f64::from(params.offset).abs() + zero * f64::from(params.scale).abs();
                let added = f64::from(full[n * cols + j]) - base * f64::from(scale);
                f64::from(x[i * cols + j]).abs() * (own * f64::from(scale).abs() + added.abs())
            };
            out.push((0..cols).map(term).sum());
        }
    }
    out
}

#[test]
fn products_are_within_their_bound_in_every_codec_and_arithmetic() {
    let mut stream = Stream(6);
    for codec in grouped() {
        // The second is large enough for threads, and for more than one task.
        for (rows, cols, m) in [(37, 96, 1), (1500, 130, 1), (45, 200, 3), (64, 160, 20)] {
            let encoded = sample(codec, rows, cols, (m != 3, true), &mut stream);
            let weights = Weights::from(&encoded);
            let x: Vec<f32> = (0..m * cols).map(|_| stream.normal()).collect();
            let magnitudes = magnitudes(&encoded, &x, m);
            for act in Act::ALL {
                let (mut want, mut got) = (vec![0.0; m * rows], vec![f32::NAN; m * rows]);
                cpu::reference::multiply(&weights, &x, m, act, &mut want);
                cpu::multiply(&weights, &x, m, act, &mut got).unwrap();
                let eps = match act {
                    // What the reference rounds to bf16 once may be rounded at another place of the same product.
                    Act::Bf16 => 1.0 / 128.0,
                    Act::F32 | Act::F16 | Act::Int8 => (cols as f64 + 8.0) * f64::from(f32::EPSILON),
                };
                for (i, ((got, want), magnitude)) in got.iter().zip(&want).zip(&magnitudes).enumerate() {
                    let bound = 1.02 * eps * magnitude;
                    let off = (f64::from(*got) - f64::from(*want)).abs();
                    let what = format!("{} {} {rows}x{cols} m={m} result {i}", codec.id, act.name());
                    assert!(off <= bound, "{what}: {got} is not {want} ± {bound:e}");
                }
                if act == Act::F32 {
                    let dense = encoded.decode();
                    for (i, magnitude) in magnitudes.iter().enumerate() {
                        let (row, n) = (&x[i / rows * cols..][..cols], i % rows);
                        let exact: f64 =
                            row.iter().zip(&dense[n * cols..]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                        assert!((f64::from(want[i]) - exact).abs() <= eps * magnitude, "{}: not its weights", codec.id);
                    }
                }
            }
        }
    }
}

#[test]
fn a_stack_gives_each_row_its_own_matrix() {
    let mut stream = Stream(7);
    let codec = codecs::get("int4_g32_fp16_v1").unwrap();
    let encoded = sample(codec, 4 * 24, 64, (true, true), &mut stream);
    let stack = Weights::from(&encoded);
    let ends = [3, 3, 4, 9];
    let x: Vec<f32> = (0..9 * 64).map(|_| stream.normal()).collect();
    let mut got = vec![f32::NAN; 9 * 24];
    cpu::multiply_grouped(&stack, &x, &ends, Act::F32, &mut got).unwrap();
    let mut first = 0;
    for (e, &end) in ends.iter().enumerate() {
        let mut want = vec![f32::NAN; (end - first) * 24];
        let part = stack.slice(24 * e, 24);
        cpu::multiply(&part, &x[first * 64..end * 64], end - first, Act::F32, &mut want).unwrap();
        assert!(same(&got[first * 24..end * 24], &want), "matrix {e}");
        first = end;
    }
}

#[test]
fn a_product_does_not_depend_on_the_number_of_threads() {
    let mut stream = Stream(8);
    let encoded = sample(codecs::get("int4_g16_fp16_v1").unwrap(), 2000, 128, (true, true), &mut stream);
    for m in [1, 5] {
        let x: Vec<f32> = (0..m * 128).map(|_| stream.normal()).collect();
        let results = [1, 4].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut y = vec![0.0; m * 2000];
            pool.install(|| cpu::multiply(&Weights::from(&encoded), &x, m, Act::F32, &mut y)).unwrap();
            y
        });
        assert!(same(&results[0], &results[1]), "{m} rows");
    }
}

#[test]
fn extra_planes_of_the_wrong_size_are_refused_and_never_read_beyond() {
    let codec = codecs::get("int4_g8_fp16_v1").unwrap();
    let encoded = sample(codec, 5, 16, (true, true), &mut Stream(9));
    let planes: Vec<Vec<u8>> = encoded.planes().map(|(_, bytes)| bytes.to_vec()).collect();
    let weights = |planes: &[Vec<u8>], work: &dyn Fn(&Weights<'_>)| {
        let slices: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
        Weights::new(&codec.layout, 5, 16, &slices).map(|weights| work(&weights))
    };
    weights(&planes, &|_| ()).unwrap();
    for plane in 3..planes.len() {
        let mut short = planes.clone();
        short[plane].pop();
        weights(&short, &|_| ()).unwrap_err();
    }
    weights(&planes[..5], &|_| ()).unwrap_err();
    let mut counts = planes.clone();
    counts[4][0] += 1;
    weights(&counts, &|_| ()).unwrap_err();
    // Kernels are given memory of anyone's: a column that is not there is an error of the product.
    let mut beyond = planes;
    beyond[5][0] = 16;
    let x = [1.0; 32];
    let product = |m: usize| {
        weights(&beyond, &|w| {
            cpu::multiply(w, &x[..16 * m], m, Act::F32, &mut vec![0.0; 5 * m]).unwrap_err().to_string().clear()
        })
    };
    product(1).unwrap();
    product(2).unwrap();
    weights(&beyond, &|w| drop(w.decode(&mut [0.0; 80]).unwrap_err())).unwrap();
    weights(&beyond, &|w| drop(cpu::decode_rows(w, &[0, 1, 2, 3, 4], &mut [0.0; 80]).unwrap_err())).unwrap();
    Encoded::from_planes(codec, 5, 16, beyond).unwrap_err();
}

#[test]
fn a_file_decodes_as_its_planes_do_in_any_part() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.tenpak");
    let codec = codecs::get("int4_g8_fp16_v1").unwrap();
    let scales: Vec<f32> = (1..=20).map(|i| i as f32 / 8.0).collect();
    let outliers = [(0, 19, 3.0), (3, 0, -1.5), (3, 7, 0.5), (6, 2, 100.0)];
    std::fs::write(&path, Artifact::new(vec![Entry::extra("e", [7, 20], codec, &scales, &outliers)]).bytes()).unwrap();
    let file = ArtifactFile::open(&path).unwrap();
    let entry = &file.tensors()[0];
    assert_eq!(entry.extras(), Extras { column_scales: true, outliers: 4 });
    assert!(verify::verify(&file, |_| Ok(())).unwrap().problems.is_empty());
    let planes = (0..entry.planes().len()).map(|plane| file.plane(0, plane).unwrap().to_vec()).collect();
    let want = Encoded::from_planes(codec, 7, 20, planes).unwrap().decode();
    for first in 0..7 {
        for count in 1..=7 - first {
            let mut out = vec![f32::NAN; count * 20];
            file.decode_rows(0, first as u64, &mut out).unwrap();
            assert!(same(&out, &want[first * 20..][..count * 20]), "rows {first}..+{count}");
        }
    }
}
