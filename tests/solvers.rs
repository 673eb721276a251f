//! Promises of the fits that know what flows in: the weighted search, LDLQ and GPTQ, held against brute force.

#![expect(clippy::print_stdout, reason = "figures for whoever asks with --nocapture")]

use tenpak::codec::reference::{code, weight};
use tenpak::coding;
use tenpak::fit::entropy::{self, Quantized};
use tenpak::fit::gptq::{Options, decode, solve};
use tenpak::fit::hessian::{Hessian, ldlq};
use tenpak::fit::weighted::{self, Importance};
use tenpak::fit::{self, Fit, Params};
use tenpak::layout::Grouped;
use tenpak::{Codec, codecs};

/// The splitmix64 generator.
struct Stream(u64);

impl Stream {
    fn uniform(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let top = u16::try_from((z ^ (z >> 31)) >> 48).unwrap();
        (f32::from(top) + 0.5) / 65_536.0
    }

    /// Twelve uniform numbers make a bell.
    fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }

    fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }

    /// The second moment of inputs that share a direction and differ in size, from so many vectors.
    fn moment(&mut self, cols: usize, vectors: usize) -> Vec<f32> {
        let sizes: Vec<f32> = (0..cols).map(|_| 0.3 + 3.0 * self.uniform() * self.uniform()).collect();
        let mut sums = vec![0.0_f64; cols * cols];
        for _ in 0..vectors {
            let common = self.normal();
            let x: Vec<f64> = sizes.iter().map(|s| f64::from(s * (0.8 * common + 0.6 * self.normal()))).collect();
            for i in 0..cols {
                for j in 0..cols {
                    sums[i * cols + j] += x[i] * x[j];
                }
            }
        }
        #[expect(clippy::cast_possible_truncation, reason = "stored as f32")]
        sums.iter().map(|sum| (sum / vectors as f64) as f32).collect()
    }
}

fn grouped() -> impl Iterator<Item = (&'static Codec, &'static Grouped)> {
    codecs::all().iter().filter_map(|codec| codec.grouped().ok().map(|layout| (codec, layout)))
}

/// `e H eᵀ` from the definition, damping included.
fn proxy(hessian: &Hessian, e: &[f64]) -> f64 {
    let row = |i: usize| {
        let products = hessian.row(i).iter().zip(e).map(|(&h, e)| f64::from(h) * e).sum::<f64>();
        e[i] * (products + hessian.ridge() * e[i])
    };
    (0..e.len()).map(row).sum()
}

/// How far rounding can move a proxy loss that goes by way of the factor: Cholesky is backward stable, its error being
/// at most `(n + 1) ε |L| |Lᵀ|`, whose elements are at most `sqrt(H[i,i] H[j,j])`; sums of n² products add as much.
fn slack(hessian: &Hessian, e: &[f64]) -> f64 {
    let size: f64 = e.iter().enumerate().map(|(j, e)| e.abs() * hessian.diagonal(j).sqrt()).sum();
    4.0 * (e.len() + 2) as f64 * f64::EPSILON * size * size
}

#[test]
fn the_losses_that_ldlq_sums_up_are_those_of_the_definition_at_every_size() {
    let mut stream = Stream(1);
    for cols in [1, 2, 3, 7, 8, 31, 32, 33, 63, 64, 65, 97, 130] {
        let hessian = Hessian::new(stream.moment(cols, 2 * cols), cols, 0.01).unwrap();
        for rows in [1, 5, 64, 65] {
            let weights = stream.normals(rows * cols);
            let mut seen = Vec::new();
            let losses = ldlq(&hessian, &weights, |column, adjusted, chosen| {
                seen.push(column);
                assert_eq!((adjusted.len(), chosen.len()), (rows, rows));
                chosen.iter_mut().zip(adjusted).for_each(|(chosen, w)| *chosen = w.round());
                // The quantizer's choice is its own: here the first row is left out altogether.
                chosen[0] = 0.0;
            });
            assert_eq!(seen, hessian.order().collect::<Vec<_>>(), "{cols} columns in order");
            let first: Vec<f64> = weights[..cols].iter().map(|&w| f64::from(w)).collect();
            let (want, slack) = (proxy(&hessian, &first), slack(&hessian, &first));
            assert!((losses[0] - want).abs() <= slack, "{cols} x {rows}: {} is not {want} ± {slack:e}", losses[0]);
            assert!((hessian.losses(&first)[0] - want).abs() <= slack);
        }
    }
}

#[test]
fn columns_go_by_falling_second_moment_and_are_adjusted_by_what_those_before_have_lost() {
    // For two columns the formula of GPTQ can be written down: the second one gains e · H[0,1] / H[1,1].
    let hessian = Hessian::new(vec![4.0, 1.5, 1.5, 2.0], 2, 0.0).unwrap();
    let mut calls = Vec::new();
    let losses = ldlq(&hessian, &[0.6, 0.3], |column, adjusted, chosen| {
        chosen[0] = adjusted[0].round();
        calls.push((column, adjusted[0], chosen[0]));
    });
    let (lost, adjusted) = (f64::from(0.6_f32) - 1.0, f64::from(0.3_f32) + (f64::from(0.6_f32) - 1.0) * 1.5 / 2.0);
    assert_eq!(calls[0], (0, f64::from(0.6_f32), 1.0));
    assert!(calls[1].0 == 1 && (calls[1].1 - adjusted).abs() < 1e-15 && calls[1].2 == 0.0);
    let e = [lost, f64::from(0.3_f32)];
    assert!((losses[0] - proxy(&hessian, &e)).abs() <= slack(&hessian, &e));
}

/// The least proxy loss of a row over all combinations of choices per column.
fn brute_force(hessian: &Hessian, weights: &[f32], choices: &[Vec<f64>]) -> f64 {
    let n = weights.len();
    let mut index = vec![0; n];
    let mut best = f64::INFINITY;
    loop {
        let e: Vec<f64> = (0..n).map(|j| f64::from(weights[j]) - choices[j][index[j]]).collect();
        best = best.min(proxy(hessian, &e));
        let Some(j) = (0..n).find(|&j| index[j] + 1 < choices[j].len()) else { return best };
        index[j] += 1;
        index[..j].fill(0);
    }
}

#[test]
fn ldlq_lies_between_brute_force_and_its_bound_on_eight_columns() {
    let mut stream = Stream(2);
    let (mut optimum, mut solved, mut nearest) = (0.0, 0.0, 0.0);
    for _ in 0..6 {
        let hessian = Hessian::new(stream.moment(8, 40), 8, 0.01).unwrap();
        let weights: Vec<f32> = (0..64).map(|_| 2.4 * stream.uniform() - 1.2).collect();
        let round = |w: f64| (w + 0.5).floor().clamp(-1.0, 2.0);
        let mut clipped = [false; 8];
        let losses = ldlq(&hessian, &weights, |_, adjusted, chosen| {
            for (r, (chosen, &w)) in chosen.iter_mut().zip(adjusted).enumerate() {
                *chosen = round(w);
                clipped[r] |= (w - *chosen).abs() > 0.5;
            }
        });
        let bound: f64 = (0..8).map(|p| 0.25 * hessian.pivot(p)).sum();
        for (r, row) in weights.chunks(8).enumerate() {
            let least = brute_force(&hessian, row, &vec![vec![-1.0, 0.0, 1.0, 2.0]; 8]);
            let e: Vec<f64> = row.iter().map(|&w| f64::from(w) - round(f64::from(w))).collect();
            assert!(losses[r] >= least - slack(&hessian, &[2.0; 8]), "row {r}: {} is below {least}", losses[r]);
            assert!(clipped[r] || losses[r] <= bound * (1.0 + 1e-12), "row {r}: {} is above {bound}", losses[r]);
            optimum += least;
            solved += losses[r];
            nearest += proxy(&hessian, &e);
        }
    }
    println!("8x8, 4 levels: nearest {nearest:.4}, LDLQ {solved:.4}, brute force {optimum:.4}");
    assert!(solved - optimum < 0.5 * (nearest - optimum), "LDLQ closes less than half of the gap");
}

#[test]
fn gptq_lies_between_brute_force_and_rounding_to_nearest_on_four_columns_for_every_codec_of_four_bits() {
    let mut stream = Stream(3);
    for (codec, layout) in grouped().filter(|(_, layout)| layout.bits() == 4) {
        let (mut optimum, mut solved, mut nearest) = (0.0, 0.0, 0.0);
        for _ in 0..2 {
            let moment = stream.moment(4, 20);
            let hessian = Hessian::new(moment.clone(), 4, 0.01).unwrap();
            let importance = Importance::new(&[moment[0], moment[5], moment[10], moment[15]]);
            let weights = stream.normals(16);
            let plain = solve(layout, codec.fit, &hessian, &importance, &weights, &Options { polish: 0 }).unwrap();
            for (row, weights) in plain.iter().zip(weights.chunks(4)) {
                let choices: Vec<f64> = (0..16).map(|c| f64::from(weight(layout, &row.params[0], c))).collect();
                let least = brute_force(&hessian, weights, &vec![choices; 4]);
                let e: Vec<f64> =
                    weights.iter().zip(decode(layout, row)).map(|(&w, d)| f64::from(w) - f64::from(d)).collect();
                assert!((proxy(&hessian, &e) - row.loss).abs() <= slack(&hessian, &e) + slack(&hessian, &[1.0; 4]));
                assert!(row.loss >= least - slack(&hessian, &[1.0; 4]), "{}", codec.id);
                assert!(row.loss <= row.nearest, "{}", codec.id);
                optimum += least;
                solved += row.loss;
                nearest += row.nearest;
            }
        }
        println!("{} 4x4: nearest {nearest:.4e}, GPTQ {solved:.4e}, brute force {optimum:.4e}", codec.id);
    }
}

#[test]
fn gptq_is_never_worse_than_rounding_to_nearest_and_polishing_never_worse_than_gptq() {
    let mut stream = Stream(4);
    for (codec, layout) in grouped() {
        for cols in [5, 40, 136] {
            let moment = stream.moment(cols, 1 + cols / 2);
            let hessian = Hessian::new(moment.clone(), cols, 0.01).unwrap();
            let mean_sq: Vec<f32> = (0..cols).map(|j| moment[j * cols + j]).collect();
            let importance = Importance::new(&mean_sq);
            let mut weights = stream.normals(3 * cols);
            weights[cols..2 * cols].fill(0.25);
            let [plain, polished] = [0, 4]
                .map(|polish| solve(layout, codec.fit, &hessian, &importance, &weights, &Options { polish }).unwrap());
            for (r, (plain, polished)) in plain.iter().zip(&polished).enumerate() {
                let id = codec.id;
                assert!(plain.loss <= plain.nearest, "{id}: {} is above {}", plain.loss, plain.nearest);
                assert!(polished.loss <= plain.loss, "{id}: {} is above {}", polished.loss, plain.loss);
                // What is claimed is what is decoded; a polished loss is a sum of some thousand differences.
                for (row, more) in [(plain, 1.0), (polished, 1e4)] {
                    let e: Vec<f64> = weights[r * cols..][..cols]
                        .iter()
                        .zip(decode(layout, row))
                        .map(|(&w, decoded)| f64::from(w) - f64::from(decoded))
                        .collect();
                    let (want, all) = (proxy(&hessian, &e), vec![1.0; cols]);
                    let slack = more * slack(&hessian, &e) + more * 1e-12 * slack(&hessian, &all).sqrt() + 1e-12 * want;
                    assert!((row.loss - want).abs() <= slack, "{id} {cols}: {} is not {want} ± {slack:e}", row.loss);
                }
            }
        }
    }
}

#[test]
fn rows_are_solved_alike_alone_together_and_on_any_number_of_threads() {
    let mut stream = Stream(5);
    let cols = 96;
    let moment = stream.moment(cols, 200);
    let weights = stream.normals(130 * cols);
    let codec = codecs::get("int4_g32_fp16_v1").unwrap();
    let layout = codec.grouped().unwrap();
    let importance = Importance::new(&(0..cols).map(|j| moment[j * cols + j]).collect::<Vec<_>>());
    let on = |threads: usize, weights: &[f32]| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let hessian = Hessian::new(moment.clone(), cols, 0.01).unwrap();
            solve(layout, codec.fit, &hessian, &importance, weights, &Options::default()).unwrap()
        })
    };
    let all = on(1, &weights);
    assert!(all == on(4, &weights));
    for r in [0, 63, 64, 129] {
        assert!(all[r..=r] == on(2, &weights[r * cols..][..cols])[..], "row {r}");
    }
}

/// The weighted error of a group from the definition.
fn weighted_error(layout: &Grouped, params: &Params, group: &[f32], importance: &[f32]) -> f64 {
    let lost = |(&w, &a): (&f32, &f32)| {
        f64::from(a) * (f64::from(w) - f64::from(weight(layout, params, code(layout, params, w)))).powi(2)
    };
    group.iter().zip(importance).map(lost).sum()
}

#[test]
fn the_weighted_search_is_never_worse_than_the_codecs_own_fit() {
    let mut stream = Stream(6);
    for (codec, layout) in grouped() {
        let (mut own, mut found) = (0.0, 0.0);
        for round in 0..60 {
            let len = if round % 4 == 3 { 1 + round / 4 } else { layout.group_len(48) };
            let shift = if round % 3 == 0 { 3.0 } else { 0.0 };
            let group: Vec<f32> = (0..len).map(|_| shift + stream.normal()).collect();
            let importance: Vec<f32> = match round % 5 {
                0 => vec![1.0; len],
                1 => vec![0.0; len],
                2 => (0..len).map(|j| if j % 7 == 0 { 1e6 } else { 1e-3 }).collect(),
                _ => (0..len).map(|_| stream.normal().powi(4)).collect(),
            };
            let plain = fit::params(codec.fit, layout, &group).unwrap();
            let best = weighted::params(codec.fit, layout, &group, &importance).unwrap();
            let [a, b] = [plain, best].map(|params| weighted_error(layout, &params, &group, &importance));
            assert!(b <= a * (1.0 + 1e-13), "{}: {b} is above {a} for {group:?} {importance:?}", codec.id);
            let reported = weighted::error(layout, &best, &group, &importance);
            assert!((reported - b).abs() <= 1e-13 * b, "{}: {reported} is not {b}", codec.id);
            if round % 5 > 2 {
                own += a;
                found += b;
            }
        }
        println!("{}: own fit {own:.4e}, weighted {found:.4e}", codec.id);
        assert!(found < own, "{}: the search finds nothing", codec.id);
    }
}

#[test]
fn a_weighted_line_through_sixteen_levels_is_found_exactly() {
    // Weights that lie on levels exactly lose nothing, wherever the levels are.
    let layout = codecs::get("int4_g16_v1").unwrap().grouped().unwrap();
    let group: Vec<f32> = (0..16_u8).map(|i| f32::from(i) * 0.125 - 0.75).collect();
    let params = weighted::params(Fit::MinMax, layout, &group, &[1.0; 16]).unwrap();
    assert_eq!(weighted::error(layout, &params, &group, &[1.0; 16]), 0.0);
}

#[test]
fn what_is_no_second_moment_is_refused_with_the_place() {
    let refusal = |moment: Vec<f32>, cols, damping| Hessian::new(moment, cols, damping).unwrap_err().to_string();
    assert!(refusal(vec![1.0; 3], 2, 0.01).contains("3 numbers for 2 columns"));
    assert!(refusal(vec![1.0, 0.0, f32::NAN, 1.0], 2, 0.01).contains("number 2"));
    assert!(refusal(vec![1.0, 0.0, 0.0, -1.0], 2, 0.01).contains("column 1 is -1"));
    assert!(refusal(vec![1.0, 0.5, 0.25, 1.0], 2, 0.01).contains("row 0, column 1"));
    assert!(refusal(vec![0.0; 4], 2, 0.01).contains("says nothing"));
    assert!(refusal(vec![1.0; 1], 1, f64::NAN).contains("damping is NaN"));
    assert!(refusal(vec![1.0, 1e4, 1e4, 1.0], 2, 0.0).contains("not positive semidefinite"));
}

#[test]
fn columns_without_input_and_moments_of_few_vectors_are_solved() {
    let mut stream = Stream(7);
    let cols = 32;
    let mut moment = stream.moment(cols, 3);
    for j in 0..cols {
        (moment[5 * cols + j], moment[j * cols + 5]) = (0.0, 0.0);
    }
    for damping in [0.0, 0.01] {
        let hessian = Hessian::new(moment.clone(), cols, damping).unwrap();
        let importance = Importance::new(&(0..cols).map(|j| moment[j * cols + j]).collect::<Vec<_>>());
        let weights = stream.normals(4 * cols);
        for (codec, layout) in grouped() {
            for row in solve(layout, codec.fit, &hessian, &importance, &weights, &Options::default()).unwrap() {
                assert!(row.loss.is_finite() && row.loss <= row.nearest, "{}", codec.id);
                assert!(decode(layout, &row).iter().all(|w| w.is_finite() && w.abs() < 20.0), "{}", codec.id);
            }
        }
    }
}

/// Weights, their second moment and the importance of their columns.
fn problem(rows: usize, cols: usize, vectors: usize) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let mut stream = Stream(9);
    let (weights, moment) = (stream.normals(rows * cols), stream.moment(cols, vectors));
    let importance = Importance::new(&(0..cols).map(|j| moment[j * cols + j]).collect::<Vec<_>>());
    (weights, moment, importance.columns().to_vec())
}

/// The proxy loss of a quantized matrix, and how far rounding can move it.
fn coded_loss(hessian: &Hessian, weights: &[f32], quantized: &Quantized) -> (f64, f64) {
    let cols = hessian.cols();
    let rows = weights.chunks(cols).zip(quantized.codes.chunks(cols)).zip(&quantized.scales);
    rows.fold((0.0, 0.0), |sum, ((weights, codes), &scale)| {
        let column = |j: usize| quantized.column_scales.as_ref().map_or(1.0, |columns| columns[j]);
        let value = |j: usize| f64::from(f32::from(i16::from(codes[j]) - 128) * scale * column(j));
        let e: Vec<f64> = weights.iter().enumerate().map(|(j, &w)| f64::from(w) - value(j)).collect();
        (sum.0 + proxy(hessian, &e), sum.1 + slack(hessian, &e))
    })
}

#[test]
fn codes_for_a_rate_keep_it_and_lose_no_more_of_the_output_than_those_chosen_without_second_moments() {
    for (vectors, bits) in [(24, 4.25), (24, 2.5), (400, 3.5), (400, 5.0)] {
        let (rows, cols) = (96, 128);
        let (weights, moment, importance) = problem(rows, cols, vectors);
        let hessian = Hessian::new(moment, cols, 0.05).unwrap();
        let plain = entropy::quantize(&weights, rows, cols, bits, Some(&importance)).unwrap();
        let solved = entropy::solve(&weights, rows, cols, bits, &hessian, &importance).unwrap();
        assert!(solved.bits_per_weight() <= bits, "{} bits of {bits}", solved.bits_per_weight());
        let mut codes = vec![0; rows * cols];
        coding::Stream::open(&solved.stream, rows, cols).unwrap().decode_all(&mut codes).unwrap();
        assert_eq!(codes, solved.codes);
        let (loss, slack) = coded_loss(&hessian, &weights, &solved);
        assert!((solved.weighted_error - loss).abs() <= slack, "{} is not {loss} ± {slack:e}", solved.weighted_error);
        let (without, slack) = coded_loss(&hessian, &weights, &plain);
        assert!(loss <= without + slack, "{vectors} vectors, {bits} bits: {loss} with, {without} without");
        if vectors < cols {
            // Inputs of few dimensions leave most errors unseen: there the columns make up for each other.
            assert!(solved.choice.trellis.is_none() && loss < 0.8 * without, "{loss} with, {without} without");
        }
    }
}

#[test]
fn columns_of_many_rows_get_steps_of_their_own_where_that_loses_less_at_the_same_bits() {
    let (rows, cols, bits) = (768, 64, 3.0);
    let (weights, moment, importance) = problem(rows, cols, 400);
    let hessian = Hessian::new(moment, cols, 0.05).unwrap();
    let solved = entropy::solve(&weights, rows, cols, bits, &hessian, &importance).unwrap();
    let columns = solved.column_scales.as_ref().expect("inputs differ in size and have much in common");
    assert!(columns.iter().all(|s| s.is_finite() && *s > 0.0) && columns.len() == cols);
    let bytes = solved.stream.len() + solved.scales_stream.len() + 4 * cols;
    assert!(bytes as f64 * 8.0 <= bits * weights.len() as f64, "{bytes} bytes");
    let (loss, slack) = coded_loss(&hessian, &weights, &solved);
    assert!((solved.weighted_error - loss).abs() <= slack, "{} is not {loss} ± {slack:e}", solved.weighted_error);
    // Few rows cannot pay for them.
    let few = entropy::solve(&weights[..4 * cols], 4, cols, bits, &hessian, &importance);
    assert!(few.is_err() || few.is_ok_and(|few| few.column_scales.is_none()));
}

#[test]
fn inputs_without_anything_in_common_leave_the_trellis_as_it_is() {
    let (rows, cols) = (96, 64);
    let (weights, _, _) = problem(rows, cols, 1);
    let moment = (0..cols * cols).map(|at| if at % (cols + 1) == 0 { 1.0 } else { 0.0 }).collect();
    let hessian = Hessian::new(moment, cols, 0.0).unwrap();
    let importance = vec![1.0; cols];
    let plain = entropy::quantize(&weights, rows, cols, 4.0, Some(&importance)).unwrap();
    let solved = entropy::solve(&weights, rows, cols, 4.0, &hessian, &importance).unwrap();
    assert!(solved.choice.trellis.is_some() && solved.stream == plain.stream);
}

#[test]
fn codes_for_a_rate_are_the_same_on_any_number_of_threads() {
    let (rows, cols) = (130, 96);
    let (weights, moment, importance) = problem(rows, cols, 50);
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let hessian = Hessian::new(moment.clone(), cols, 0.01).unwrap();
            entropy::solve(&weights, rows, cols, 3.25, &hessian, &importance).unwrap().stream
        })
    };
    assert_eq!(on(1), on(3));
}
