//! What the benches work on: plausible weights, and planes that are allocated before the clock starts.

use tenpak::DType;
use tenpak::codec::{Planes, PlanesMut};
use tenpak::layout::{Grouped, Layout};

mod weights;
pub use weights::weights;

/// The planes of a matrix.
pub struct Buffers([Vec<u8>; 3]);

impl Buffers {
    /// Zeroed planes, the last one perhaps empty.
    pub fn new(layout: &Grouped, rows: usize, cols: usize) -> Self {
        let mut planes = <[Vec<u8>; 3]>::default();
        let sizes = Layout::Grouped(*layout).plane_bytes(DType::F32, rows as u64, cols as u64).expect("a small matrix");
        for (plane, (_, bytes)) in planes.iter_mut().zip(sizes) {
            // Ones first, so that the pages are there before they are timed.
            plane.resize(usize::try_from(bytes).expect("fits memory"), 1);
            plane.fill(0);
        }
        Self(planes)
    }

    /// The planes for an encoder.
    pub fn writable(&mut self) -> PlanesMut<'_> {
        let [codes, scales, addends] = &mut self.0;
        PlanesMut { codes, scales, addends }
    }

    /// The planes for a decoder.
    pub fn readable(&self) -> Planes<'_> {
        Planes { codes: &self.0[0], scales: &self.0[1], addends: &self.0[2] }
    }
}
