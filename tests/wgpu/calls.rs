//! Calls: wrong ones, many at once, many in a row, awaited ones, and those that a lost device interrupts.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use tenpak::gemm::wgpu::Options;
use tenpak::gemm::{Act, Matrix, Weights};
use tenpak::{DeviceError, Error, codecs};

use crate::decode::{decoded, reference_decode};
use crate::expected::{by_subgroups, by_workgroups, kinds, open, product};
use crate::extras::with_extras;
use crate::matrices::{Owned, Stream, bits, ordinary, random, seed};

#[test]
fn wrong_sizes_are_refused() {
    let owned = Owned::new(codecs::get(codecs::DEFAULT_IN_MEMORY).unwrap().layout, 6, 40, &mut Stream(1), ordinary);
    let weights = owned.weights();
    let matrix = by_subgroups().upload(&weights).unwrap();
    let refused = |result: tenpak::Result<()>| assert!(matches!(result, Err(Error::Invalid(_))));
    let (x, mut y) = (vec![0.0; 200], vec![0.0; 200]);
    refused(matrix.multiply(&x[..79], 2, Act::F32, &mut y[..12]));
    refused(matrix.multiply(&x[..80], 2, Act::F32, &mut y[..13]));
    refused(matrix.multiply(&x[..80], usize::MAX, Act::F32, &mut y[..12]));
    refused(matrix.decode(&mut y[..199]));
    let mut batch = by_subgroups().batch().unwrap();
    refused(batch.multiply(&matrix, &x[..79], 2, Act::F32).map(drop));
    let mut batch = by_workgroups().batch().unwrap();
    refused(batch.multiply(&matrix, &x[..80], 2, Act::F32).map(drop));
}

/// Counts how often it is woken, and lets its thread go on.
struct Alarm(std::thread::Thread, AtomicUsize);

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        self.1.fetch_add(1, Ordering::SeqCst);
        self.0.unpark();
    }
}

/// An executor as small as can be.
pub fn run<T>(future: impl Future<Output = T>) -> T {
    let alarm = Arc::new(Alarm(std::thread::current(), AtomicUsize::new(0)));
    let waker = Waker::from(Arc::clone(&alarm));
    let mut future = pin!(future);
    loop {
        let woken = alarm.1.load(Ordering::SeqCst);
        if let Poll::Ready(value) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return value;
        }
        while alarm.1.load(Ordering::SeqCst) == woken {
            std::thread::park();
        }
    }
}

#[test]
fn products_of_a_batch_are_those_of_single_calls_waited_for_and_awaited() {
    let mut stream = Stream(seed());
    let owned: Vec<_> = kinds().into_iter().map(|layout| Owned::new(layout, 70, 100, &mut stream, ordinary)).collect();
    let empty = Owned::new(kinds()[0], 0, 8, &mut stream, ordinary);
    let extras = with_extras("int4_g32_fp16_v1", true, true, &mut stream);
    let device = by_subgroups();
    let all = owned.iter().chain([&empty]).map(Owned::weights).chain([Weights::from(&extras)]);
    let matrices: Vec<_> = all.map(|weights| device.upload(&weights).unwrap()).collect();
    let ms = [1, 7, 40];
    let inputs: Vec<Vec<Vec<f32>>> =
        matrices.iter().map(|matrix| ms.map(|m| random(m * matrix.weights().cols(), &mut stream)).into()).collect();
    let mut want = Vec::new();
    for (matrix, inputs) in matrices.iter().zip(&inputs) {
        want.extend(ms.iter().zip(inputs).map(|(&m, x)| product(matrix, matrix.weights().rows(), x, m, Act::F32)));
    }
    let submit = || {
        let mut batch = device.batch().unwrap();
        for (matrix, inputs) in matrices.iter().zip(&inputs) {
            for (&m, x) in ms.iter().zip(inputs) {
                batch.multiply(matrix, x, m, Act::F32).unwrap();
            }
        }
        batch.submit().unwrap()
    };
    assert!(submit().wait().unwrap() == want);
    assert!(run(submit()).unwrap() == want);
    // Several at once, the last one first; one that nobody waits for.
    let (first, second) = (submit(), submit());
    drop(submit());
    assert!(run(second).unwrap() == want);
    assert!(first.wait().unwrap() == want);
    assert!(device.batch().unwrap().submit().unwrap().wait().unwrap().is_empty());
}

#[test]
fn many_threads_may_multiply_with_one_matrix() {
    let mut stream = Stream(seed());
    let owned = Owned::new(codecs::get("int4_g8_fp16_v1").unwrap().layout, 50, 96, &mut stream, ordinary);
    let weights = owned.weights();
    let matrix = by_subgroups().upload(&weights).unwrap();
    let inputs: Vec<_> = (1..12).map(|m| random(m * 96, &mut stream)).collect();
    let want: Vec<_> = inputs.iter().map(|x| product(&matrix, 50, x, x.len() / 96, Act::F32)).collect();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for (x, want) in inputs.iter().zip(&want) {
                    assert_eq!(bits(&product(&matrix, 50, x, x.len() / 96, Act::F32)), bits(want));
                }
            });
        }
    });
}

#[test]
fn ten_thousand_products_leave_no_buffers_behind() {
    let mut stream = Stream(seed());
    let device = open(Options::default());
    let owned = Owned::new(codecs::get("int4_g32_fp16_v1").unwrap().layout, 10, 64, &mut stream, ordinary);
    let weights = owned.weights();
    let matrix = device.upload(&weights).unwrap();
    let x = random(40 * 64, &mut stream);
    let once = |m: usize| product(&matrix, 10, &x[..m * 64], m, Act::F32);
    (1..=40).for_each(|m| drop(once(m)));
    let before = device.usage();
    assert!(before.busy == 0 && before.made == before.idle as u64, "{before:?}");
    for _ in 0..10_000 {
        once(1 + usize::try_from(stream.next() % 40).unwrap());
    }
    assert_eq!(device.usage(), before);
    // Shapes that never come again fill no more than a fixed room.
    for cols in (8..400).step_by(8) {
        let owned = Owned::new(codecs::get("int8_sym_v1").unwrap().layout, cols, cols, &mut stream, ordinary);
        let weights = owned.weights();
        let matrix = device.upload(&weights).unwrap();
        product(&matrix, cols, &random(cols, &mut stream), 1, Act::F32);
        assert!(matrix.multiply(&[0.0], 1, Act::F32, &mut [0.0]).is_err());
    }
    let after = device.usage();
    assert!(after.busy == 0 && after.idle < 20 && after.bytes < 1 << 20, "{after:?}");
    // What is in use when it is dropped is not kept.
    let mut batch = device.batch().unwrap();
    batch.multiply(&matrix, &x[..64], 1, Act::F32).unwrap();
    assert_eq!(device.usage().busy, 1);
    drop(batch);
    assert_eq!((device.usage().busy, device.usage().idle), (0, after.idle - 1));
}

#[test]
fn a_lost_device_is_an_error_and_the_next_call_works() {
    let mut stream = Stream(seed());
    let device = open(Options::default());
    let owned = Owned::new(codecs::get("int5_k16_v1").unwrap().layout, 30, 96, &mut stream, ordinary);
    let weights = owned.weights();
    let matrix = device.upload(&weights).unwrap();
    let x = random(9 * 96, &mut stream);
    let want = product(&matrix, 30, &x, 9, Act::F32);
    let lost = |result: tenpak::Result<()>| match result {
        Err(Error::Device(DeviceError::Lost { device, .. })) => assert_eq!(device, by_subgroups().adapter().name),
        other => panic!("expected a lost device, not {other:?}"),
    };
    for round in 0..3 {
        // In the middle of a call, waited for and awaited, and before one.
        let mut batch = device.batch().unwrap();
        batch.multiply(&matrix, &x, 9, Act::F32).unwrap();
        match round {
            0 => device.lose_device(),
            1 => {
                device.lose_device();
                lost(batch.submit().and_then(run).map(drop));
            }
            _ => {
                // What was submitted before comes to its end, one way or the other.
                let pending = batch.submit().unwrap();
                device.lose_device();
                match pending.wait() {
                    Ok(results) => assert_eq!(bits(&results[0]), bits(&want)),
                    other => lost(other.map(drop)),
                }
            }
        }
        let mut y = vec![f32::NAN; 9 * 30];
        if let Err(e) = matrix.multiply(&x, 9, Act::F32, &mut y) {
            lost(Err(e));
        }
        assert_eq!(bits(&product(&matrix, 30, &x, 9, Act::F32)), bits(&want), "the next call");
        assert_eq!(bits(&decoded(&device, &weights)), bits(&reference_decode(&weights)));
    }
}

/// Run by the next test in a process of its own, whose memory it caps.
#[test]
#[ignore = "needs a process of its own"]
#[cfg(target_os = "linux")]
fn memory_runs_out_alone() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    let mut stream = Stream(6);
    let device = open(Options::default());
    let codec = codecs::get("int8_sym_v1").unwrap();
    let small = Owned::new(codec.layout, 40, 64, &mut stream, ordinary);
    let weights = small.weights();
    let matrix = device.upload(&weights).unwrap();
    let x = random(64, &mut stream);
    let want = product(&matrix, 40, &x, 1, Act::F32);
    // Zeros that nobody writes take no memory here, but do on the device.
    let (rows, cols) = (1 << 18, 4096);
    let (codes, scales) = (vec![0; rows * cols], vec![0; 4 * rows]);
    let large = Weights::new(&codec.layout, rows, cols, &[&codes, &scales]).unwrap();
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    let taken: u64 = pages.split(' ').next().unwrap().parse::<u64>().unwrap() * 4096;
    let before = getrlimit(Resource::As);
    setrlimit(Resource::As, Rlimit { current: Some(taken + (512 << 20)), ..before }).unwrap();
    for _ in 0..3 {
        match device.upload(&large) {
            Err(Error::OutOfMemory { what, bytes }) => {
                assert!(what.contains("a matrix") && bytes > 1 << 30, "{bytes} bytes for {what}");
            }
            other => panic!("expected no memory, not {other:?}"),
        }
        assert_eq!(bits(&product(&matrix, 40, &x, 1, Act::F32)), bits(&want), "the next smaller call");
    }
    setrlimit(Resource::As, before).unwrap();
}

#[test]
#[cfg(target_os = "linux")]
fn memory_that_runs_out_is_an_error_and_the_next_smaller_call_works() {
    if by_subgroups().adapter().kind != "cpu" {
        // The memory of a device of its own is not that of a process.
        return;
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "calls::memory_runs_out_alone"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&output.stderr));
}
