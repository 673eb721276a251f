//! Scales, offsets and zero points of a run of rows, as numbers that a kernel can load.

use super::lanes::MAX_LANES;
use crate::codec::isa;
use crate::gemm::Weights;
use crate::gemm::cpu::nested;
use crate::layout::{Float, Levels};

/// Numbers that are converted together: they and the activations share the first-level cache.
const BATCH: usize = 2048;

/// The numbers of the groups of consecutive rows, row after row.
pub(in super::super) struct Params {
    groups: usize,
    scales: Vec<f32>,
    offsets: Vec<f32>,
    zero_points: Vec<i32>,
    bytes: Vec<u8>,
}

impl Params {
    /// Room for some rows: zeroes.
    pub(in super::super) fn new(weights: &Weights<'_>, rows: usize) -> Self {
        let groups = weights.layout().groups(weights.cols());
        // A vector is loaded from the first number that any of its lanes wants, so there is one more vector.
        let room = rows * groups + MAX_LANES;
        let zero_points = if weights.layout().levels() == Levels::ZeroPoint { room } else { 0 };
        let offsets = if weights.layout().offset().is_some() { room } else { 0 };
        let bytes = if weights.layout().bank().is_some() { room } else { 0 };
        Self {
            groups,
            scales: vec![0.0; room],
            offsets: vec![0.0; offsets],
            zero_points: vec![0; zero_points],
            bytes: vec![0; bytes],
        }
    }

    /// How many rows to load at once where each is used once.
    pub(in super::super) fn batch(weights: &Weights<'_>) -> usize {
        let groups = weights.layout().groups(weights.cols());
        (BATCH / groups.max(1)).clamp(1, weights.rows().max(1))
    }

    /// Loads the numbers of all rows of `weights`.
    #[inline(always)]
    pub(in super::super) fn load(&mut self, weights: &Weights<'_>) {
        let (layout, planes) = (weights.layout(), weights.planes());
        let count = weights.rows() * self.groups;
        if let Some(bank) = layout.bank() {
            self.bytes[..count].copy_from_slice(planes.scales);
            let rows = self.scales[..count].chunks_exact_mut(self.groups.max(1));
            for (r, (row, bytes)) in rows.zip(planes.scales.chunks_exact(self.groups.max(1))).enumerate() {
                nested::scales(bank, bytes, layout.scale().load(planes.row_scales, r), row);
            }
        } else {
            load_floats(layout.scale(), planes.scales, &mut self.scales[..count]);
        }
        if let Some(float) = layout.offset() {
            load_floats(float, planes.addends, &mut self.offsets[..count]);
        } else if layout.levels() == Levels::ZeroPoint {
            let stride = layout.zero_point_stride(weights.cols());
            let rows = self.zero_points[..count].chunks_exact_mut(self.groups.max(1));
            for (row, bytes) in rows.zip(planes.addends.chunks_exact(stride.max(1))) {
                for (pair, byte) in row.chunks_mut(2).zip(bytes) {
                    pair[0] = i32::from(byte & 15);
                    if let Some(second) = pair.get_mut(1) {
                        *second = i32::from(byte >> 4);
                    }
                }
            }
        }
    }

    /// The scales from those of row `r` on, a vector more than it has.
    #[inline(always)]
    pub(in super::super) fn scales(&self, r: usize) -> &[f32] {
        &self.scales[r * self.groups..][..self.groups + MAX_LANES]
    }

    /// The scale bytes from those of row `r` on, a vector more than it has; empty where there are none.
    #[inline(always)]
    pub(in super::super) fn bytes(&self, r: usize) -> &[u8] {
        if self.bytes.is_empty() { &[] } else { &self.bytes[r * self.groups..][..self.groups + MAX_LANES] }
    }

    /// The zero points from those of row `r` on, a vector more than it has; empty where there are none.
    #[inline(always)]
    pub(in super::super) fn zero_points(&self, r: usize) -> &[i32] {
        if self.zero_points.is_empty() { &[] } else { &self.zero_points[r * self.groups..][..self.groups + MAX_LANES] }
    }

    /// The offsets from those of row `r` on, a vector more than it has; empty where there are none.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(in super::super) fn offsets_padded(&self, r: usize) -> &[f32] {
        if self.offsets.is_empty() { &[] } else { &self.offsets[r * self.groups..][..self.groups + MAX_LANES] }
    }

    /// The offsets of row `r`; empty where there are none.
    #[inline(always)]
    pub(in super::super) fn offsets(&self, r: usize) -> &[f32] {
        if self.offsets.is_empty() { &[] } else { &self.offsets[r * self.groups..][..self.groups] }
    }
}

/// The numbers of a plane.
fn load_floats(float: Float, plane: &[u8], out: &mut [f32]) {
    match float {
        Float::F16 => isa::best().f16_to_f32(plane, out),
        Float::F32 => {
            for (x, bytes) in out.iter_mut().zip(plane.as_chunks::<4>().0) {
                *x = f32::from_le_bytes(*bytes);
            }
        }
    }
}
