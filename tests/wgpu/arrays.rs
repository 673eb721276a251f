//! Products of arrays as they come.

use half::f16;
use tenpak::Error;
use tenpak::gemm::wgpu::{G8GemmContext, G8Number};

use crate::calls::run;
use crate::matrices::{Stream, random, seed};

/// Checks a product of arrays as they come against the specification.
fn check_g8<T: G8Number + Into<f64>>(context: &G8GemmContext, number: impl Fn(f32) -> T, stream: &mut Stream) {
    for (m, n, k) in [(1, 17, 64), (9, 40, 100), (0, 3, 8), (2, 3, 0)] {
        let groups = usize::div_ceil(k, 8);
        let codes: Vec<u8> = (0..n * groups * 4).map(|_| stream.next().to_le_bytes()[0]).collect();
        let scales: Vec<T> = (0..n * groups).map(|_| number(0.01 * stream.normal())).collect();
        let offsets: Vec<T> = (0..n * groups).map(|_| number(0.01 * stream.normal())).collect();
        let x = random(m * k, stream);
        let y = context.gemm(&x, &codes, &scales, &offsets, m, n, k).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(y.len(), m * n);
        for (at, &got) in y.iter().enumerate() {
            let (mut want, mut sum) = (0.0, 0.0);
            for j in 0..k {
                let (row, x) = (at % n, f64::from(x[at / n * k + j]));
                let code = codes[row * groups * 4 + j / 2] >> (j % 2 * 4) & 15;
                let (scale, offset) = (scales[row * groups + j / 8].into(), offsets[row * groups + j / 8].into());
                want += x * (f64::from(code) * scale + offset);
                sum += x.abs() * ((f64::from(code) * scale).abs() + offset.abs());
            }
            let bound = (k as f64 + 4.0) * f64::from(f32::EPSILON) * sum;
            assert!((f64::from(got) - want).abs() <= bound, "m={m} n={n} k={k}: {got} is not {want} ± {bound:e}");
        }
        if n * groups > 0 {
            assert!(matches!(context.gemm(&x, &codes[1..], &scales, &offsets, m, n, k), Err(Error::Invalid(_))));
            assert!(matches!(context.gemm(&x, &codes, &scales[1..], &offsets, m, n, k), Err(Error::Invalid(_))));
        }
    }
}

#[test]
fn arrays_of_groups_of_eight_are_multiplied_as_they_come() {
    let mut stream = Stream(seed());
    for context in [G8GemmContext::new().unwrap(), run(G8GemmContext::new_async()).unwrap()] {
        check_g8(&context, |number| number, &mut stream);
        check_g8(&context, f16::from_f32, &mut stream);
    }
}
