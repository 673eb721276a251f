//! Matrices on a device: their planes as they are stored, uploaded once, divided by rows where they are too large.
//!
//! A shader reads words of 32 bits, so that a plane only needs to end with one. Nothing else about it changes: what
//! the bytes mean is in `shaders/weights.wgsl`, which follows [`crate::layout`].

use std::sync::Arc;

use wgpu::{BindGroup, BindGroupDescriptor, BindGroupEntry, Buffer, BufferDescriptor, BufferUsages};

use super::adapter::WORKGROUPS;
use super::device::Device;
use crate::codec::Planes;
use crate::error::{Error, Result};
use crate::gemm::Weights;
use crate::layout::{Grouped, LEVELS, Layout, Levels};

/// Bytes that are handed to the driver at once: it holds them a second time until they are on the device.
pub(super) const PIECE: usize = 32 << 20;

/// Rows of a part at most: workgroups of [`super::kernel::Kernel::Many`] take 64 of them.
const ROWS: usize = WORKGROUPS as usize * 64;

/// Consecutive rows of a matrix, and the bindings of their planes.
#[derive(Debug)]
pub(super) struct Part {
    pub rows: usize,
    pub group: BindGroup,
}

/// A matrix on a device: its parts in the order of rows.
#[derive(Debug)]
pub(super) struct Uploaded {
    pub device: Arc<Device>,
    pub layout: Grouped,
    pub rows: usize,
    pub cols: usize,
    pub parts: Vec<Part>,
}

impl Uploaded {
    /// Uploads the codec's planes of a matrix.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Device`], and [`Error::Unsupported`] when not even a row fits.
    pub fn new(device: &Arc<Device>, weights: &Weights<'_>) -> Result<Self> {
        let (layout, rows, cols) = (*weights.layout(), weights.rows(), weights.cols());
        let mut parts = Vec::new();
        if rows > 0 && cols > 0 {
            let widest = slices(weights.planes()).into_iter().map(|plane| (plane.len() / rows).max(1)).max();
            let widest = widest.unwrap_or(1);
            let at_once = usize::try_from(device.binding_bytes()).unwrap_or(usize::MAX) / widest;
            if at_once == 0 {
                return Err(Error::unsupported(format!(
                    "a row of {cols} weights takes {widest} bytes, expected at most {} that the device sees at once; \
                     multiply on the CPU",
                    device.binding_bytes()
                )));
            }
            let at_once = at_once.min(ROWS);
            let whole = weights.base();
            let base = &whole;
            parts = device.watched("a matrix", weights.bytes() as u64, || {
                let starts = (0..rows).step_by(at_once);
                Ok(starts.map(|first| part(device, base, first, at_once.min(rows - first))).collect())
            })?;
        }
        Ok(Self { device: Arc::clone(device), layout, rows, cols, parts })
    }

    /// The layout as kernels are told about it.
    pub fn constants(&self) -> Vec<(&'static str, u32)> {
        Layout::Grouped(self.layout).constants()
    }
}

fn slices<'a>(planes: &Planes<'a>) -> [&'a [u8]; 5] {
    [planes.codes, planes.high_codes, planes.scales, planes.addends, planes.row_scales]
}

fn part(device: &Device, whole: &Weights<'_>, first: usize, rows: usize) -> Part {
    let part = whole.slice(first, rows);
    let (layout, cols) = (part.layout(), part.cols());
    let [codes, high_codes, scales, addends, row_scales] = slices(part.planes());
    let planes = [codes, high_codes, scales, addends, row_scales, &levels(layout)];
    let mut buffers: Vec<Buffer> = planes.iter().map(|bytes| upload(device, bytes, BufferUsages::STORAGE)).collect();
    // In the order of `Shape` in `weights.wgsl`, filled up to whole vectors.
    let shape = [
        rows,
        cols.div_ceil(4),
        cols,
        layout.groups(cols),
        layout.code_stride(cols) / 4,
        layout.high_code_stride(cols) / 4,
        8 * layout.zero_point_stride(cols),
        first,
        whole.rows(),
        0,
        0,
        0,
    ];
    buffers.push(upload(device, &words(&shape), BufferUsages::UNIFORM));
    let entries: Vec<_> = (0..)
        .zip(&buffers)
        .map(|(binding, buffer)| BindGroupEntry { binding, resource: buffer.as_entire_binding() })
        .collect();
    let layout = device.kernels.matrix();
    let group =
        device.raw().create_bind_group(&BindGroupDescriptor { label: Some("matrix"), layout, entries: &entries });
    Part { rows, group }
}

/// Numbers as a shader reads them; those of a part fit 32 bits, because its planes do.
pub(super) fn words(numbers: &[usize]) -> Vec<u8> {
    let word = |&number: &usize| u32::try_from(number).unwrap_or(u32::MAX);
    numbers.iter().map(word).flat_map(u32::to_le_bytes).collect()
}

/// The levels that codes are looked up in; empty where levels follow from codes.
fn levels(layout: &Grouped) -> Vec<u8> {
    let mut levels = [0.0f32; LEVELS];
    match layout.levels() {
        Levels::Table(table) => levels[..table.len()].copy_from_slice(table),
        Levels::Bank(bank) => levels.iter_mut().zip(bank.levels()).for_each(|(to, &from)| *to = f32::from(from)),
        Levels::Unsigned | Levels::Signed | Levels::ZeroPoint => return Vec::new(),
    }
    levels.iter().flat_map(|level| level.to_le_bytes()).collect()
}

/// A buffer with these bytes, and zeros up to a whole word; never empty, which no binding may be.
fn upload(device: &Device, bytes: &[u8], usage: BufferUsages) -> Buffer {
    let size = (bytes.len() as u64).next_multiple_of(4).max(4);
    let usage = usage | BufferUsages::COPY_DST;
    let buffer =
        device.raw().create_buffer(&BufferDescriptor { label: Some("plane"), size, usage, mapped_at_creation: false });
    let (whole, rest) = bytes.split_at(bytes.len() / 4 * 4);
    for (number, piece) in (0u64..).zip(whole.chunks(PIECE)) {
        device.queue().write_buffer(&buffer, number * PIECE as u64, piece);
        if piece.len() == PIECE {
            // Hands the piece over, so that the next one finds its memory free.
            device.queue().submit([]);
        }
    }
    if !rest.is_empty() {
        let mut word = [0; 4];
        word[..rest.len()].copy_from_slice(rest);
        device.queue().write_buffer(&buffer, whole.len() as u64, &word);
    }
    buffer
}
