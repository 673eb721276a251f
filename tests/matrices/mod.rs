//! Random matrices of every layout, for tests of products.
//!
//! Planes are random bytes, also where no column looks, so they need no encoder; a seed of the clock is printed with
//! every failure, and `TENPAK_SEED` repeats it.

use std::time::{SystemTime, UNIX_EPOCH};

use tenpak::codec::reference::load_params;
use tenpak::gemm::Weights;
use tenpak::layout::{BANK5, Float, Grouped, Layout, Levels, NF4, Plane, ROW};
use tenpak::{DType, codecs};

#[path = "../stream/mod.rs"]
mod stream;
pub use stream::Stream;

/// The seed of this run.
pub fn seed() -> u64 {
    match std::env::var("TENPAK_SEED") {
        Ok(seed) => seed.parse().expect("TENPAK_SEED is a number"),
        Err(_) => u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() >> 10).unwrap(),
    }
}

/// Every layout of the registry, and some that a later codec might have.
pub fn layouts() -> Vec<Layout> {
    let mut layouts: Vec<Layout> =
        codecs::all().iter().map(|codec| codec.layout).filter(|layout| *layout != Layout::Raw).collect();
    let more = [
        Grouped::new(4, Levels::Unsigned, 24, Float::F32, None),
        Grouped::new(4, Levels::Signed, ROW, Float::F16, None),
        Grouped::new(4, Levels::Table(&NF4), ROW, Float::F32, None),
        Grouped::new(4, Levels::ZeroPoint, 8, Float::F32, None),
        Grouped::new(4, Levels::Unsigned, 256, Float::F16, Some(Float::F32)),
        Grouped::new(8, Levels::Unsigned, 4, Float::F16, Some(Float::F32)),
        Grouped::new(8, Levels::ZeroPoint, 12, Float::F16, None),
        Grouped::new(8, Levels::Signed, 8, Float::F32, None),
        Grouped::new(5, Levels::Bank(&BANK5), 24, Float::F32, None),
    ];
    layouts.extend(more.map(Layout::Grouped));
    layouts.dedup();
    layouts
}

/// Scales and offsets of a kind.
pub type Draw = fn(&mut Stream) -> f32;

/// Scales as most matrices have them.
pub fn ordinary(stream: &mut Stream) -> f32 {
    0.01 * stream.normal()
}

/// Zeros, subnormals, and numbers from one end of the range of a half to the other, of either sign.
pub fn extreme(stream: &mut Stream) -> f32 {
    let magnitude = [0.0, 1e-7, 3e-5, 1.0, 300.0, 65_504.0][usize::try_from(stream.next() % 6).unwrap()];
    if stream.next().is_multiple_of(2) { magnitude } else { -magnitude }
}

/// Activations that are mostly zero, subnormal, of very different magnitudes, or nothing.
pub const HARD: [Draw; 4] = [
    |stream| if stream.next().is_multiple_of(3) { stream.normal() } else { 0.0 },
    |stream| if stream.next().is_multiple_of(2) { f32::from_bits(stream.bits() & 0x807f_ffff) } else { -0.0 },
    |stream| stream.normal() * [1e-30, 1e-3, 1.0, 1e5, 1e25][usize::try_from(stream.next() % 5).unwrap()],
    |_| 0.0,
];

/// A random matrix; every plane ends where its allocation does.
pub struct Owned {
    pub layout: Layout,
    pub rows: usize,
    pub cols: usize,
    pub planes: Vec<Box<[u8]>>,
}

impl Owned {
    /// Random planes whose scales and offsets are drawn by `draw`.
    pub fn new(layout: Layout, rows: usize, cols: usize, stream: &mut Stream, draw: Draw) -> Self {
        let Layout::Grouped(grouped) = layout else { panic!("a layout with codes") };
        let mut planes = Vec::new();
        for (plane, bytes) in layout.plane_bytes(DType::F32, rows as u64, cols as u64).unwrap() {
            let mut bytes = vec![0; usize::try_from(bytes).unwrap()];
            let float = match plane {
                Plane::Scales if grouped.bank().is_none() => Some(grouped.scale()),
                Plane::RowScales => Some(grouped.scale()),
                Plane::Offsets => grouped.offset(),
                _ => None,
            };
            match float {
                Some(float) => (0..bytes.len() / float.size()).for_each(|i| float.store(&mut bytes, i, draw(stream))),
                None => bytes.fill_with(|| stream.next().to_le_bytes()[0]),
            }
            planes.push(bytes.into_boxed_slice());
        }
        Self { layout, rows, cols, planes }
    }

    /// The matrix.
    pub fn weights(&self) -> Weights<'_> {
        let planes: Vec<&[u8]> = self.planes.iter().map(|plane| &**plane).collect();
        Weights::new(&self.layout, self.rows, self.cols, &planes).unwrap()
    }

    /// `Σ |x| · (|scale · level| + |offset|)` for a row of weights and one of activations, and the greatest scale.
    pub fn magnitude(&self, n: usize, x: &[f32]) -> (f64, f64) {
        let weights = self.weights();
        let (layout, row) = (weights.layout(), weights.slice(n, 1));
        let middle = f64::from(1 << (layout.bits() - 1));
        let (mut sum, mut greatest) = (0.0, 0.0f64);
        for (j, &x) in x.iter().enumerate() {
            let params = load_params(layout, row.planes(), j / layout.group_len(self.cols));
            let code = layout.load_code(row.planes().codes, row.planes().high_codes, j);
            let scale = f64::from(params.scale);
            let (level, offset) = match layout.levels() {
                Levels::ZeroPoint => (f64::from(code) - middle, scale * (middle - f64::from(params.zero_point))),
                _ => (f64::from(layout.level(code, params.zero_point)), f64::from(params.offset)),
            };
            sum += f64::from(x).abs() * ((scale * level).abs() + offset.abs());
            greatest = greatest.max(scale.abs());
        }
        (sum, greatest)
    }
}

/// Normal numbers.
pub fn random(count: usize, stream: &mut Stream) -> Vec<f32> {
    (0..count).map(|_| stream.normal()).collect()
}

/// Refuses results that are further from those wanted than their bounds.
pub fn assert_within(got: &[f32], wanted: &[f32], bounds: &[f64], what: &dyn Fn() -> String) {
    for (i, (&got, (&want, &bound))) in got.iter().zip(wanted.iter().zip(bounds)).enumerate() {
        let off = (f64::from(got) - f64::from(want)).abs();
        assert!(off <= bound, "{}: result {i} is {got}, not {want} ± {bound:e}", what());
    }
}

/// The bits of numbers.
pub fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|x| x.to_bits()).collect()
}
