//! What the benches work on: plausible weights, and planes that are allocated before the clock starts.

use tenpak::DType;
use tenpak::codec::{Planes, PlanesMut};
use tenpak::layout::{Grouped, Layout};

mod weights;
pub use weights::weights;

/// The planes of a matrix.
pub struct Buffers(Grouped, [Vec<u8>; 4]);

impl Buffers {
    /// Zeroed planes, the last one perhaps empty.
    pub fn new(layout: &Grouped, rows: usize, cols: usize) -> Self {
        let mut planes = <[Vec<u8>; 4]>::default();
        let sizes = Layout::Grouped(*layout).plane_bytes(DType::F32, rows as u64, cols as u64).expect("a small matrix");
        for (plane, (_, bytes)) in planes.iter_mut().zip(sizes) {
            // Ones first, so that the pages are there before they are timed.
            plane.resize(usize::try_from(bytes).expect("fits memory"), 1);
            plane.fill(0);
        }
        Self(*layout, planes)
    }

    /// The planes for an encoder.
    pub fn writable(&mut self) -> PlanesMut<'_> {
        PlanesMut::new(&self.0, &mut self.1)
    }

    /// The planes for a decoder.
    pub fn readable(&self) -> Planes<'_> {
        Planes::new(&self.0, &self.1.each_ref().map(Vec::as_slice))
    }
}
