//! Recording products and decodings for one submission, and arranging activations for the kernels.

use std::borrow::Cow;
use std::sync::Arc;

use wgpu::{BindGroup, CommandEncoder, CommandEncoderDescriptor, ComputePassDescriptor};

use super::adapter::WORKGROUPS;
use super::cache::Call;
use super::device::Device;
use super::flight::{Flight, Run};
use super::kernel::Kernel;
use super::planes::{Part, Uploaded, words};
use super::pool::Lease;
use crate::attention::KvFormat;
use crate::codec::isa;
use crate::error::{Error, Result};

/// Rows of activations at once, at most: workgroups of [`Kernel::Many`] take 32 of them.
const MOST: usize = WORKGROUPS as usize * 32;

/// Columns that activations are filled up to: those of an octet of weights.
const OCTET: usize = 8;

/// Commands for one submission.
#[derive(Debug)]
pub(super) struct Recording {
    device: Arc<Device>,
    encoder: CommandEncoder,
    runs: Vec<Run>,
}

impl Recording {
    pub fn new(device: &Arc<Device>) -> Self {
        let encoder = device.raw().create_command_encoder(&CommandEncoderDescriptor { label: Some("products") });
        Self { device: Arc::clone(device), encoder, runs: Vec::new() }
    }

    /// Records the product of a matrix with `m` rows of activations, rounded to halves first where `half` says so.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Device`], and [`Error::Unsupported`] when not even a row fits.
    pub fn multiply(&mut self, matrix: &Uploaded, x: &[f32], m: usize, half: bool) -> Result<()> {
        let (rows, cols) = (matrix.rows, matrix.cols);
        let at_once = self.fitting(m, |m| {
            let x = x_len(self.device.kernels.product(m, half), m, cols).saturating_mul(number_bytes(half));
            x.max(m.saturating_mul(rows).saturating_mul(4))
        })?;
        let at_once = at_once.min(MOST);
        for x in x.chunks(at_once * cols) {
            let m = x.len() / cols;
            let kernel = self.device.kernels.product(m, half);
            let arranged = arrange(kernel, x, m, cols);
            let bytes = if half {
                let mut halves = vec![0; 2 * arranged.len()];
                isa::best().f32_to_f16(&arranged, &mut halves);
                Cow::Owned(halves)
            } else {
                Cow::Borrowed(bytemuck::cast_slice(&arranged))
            };
            let stride = cols.next_multiple_of(OCTET) / 4;
            let lease = self.lease(&bytes, m * rows, &[m, stride, 0, 0])?;
            let pipeline = self.device.kernels.pipeline(&self.device, kernel, half, matrix.constants())?;
            let mut pass = self.encoder.begin_compute_pass(&ComputePassDescriptor::default());
            pass.set_pipeline(&pipeline);
            pass.set_bind_group(1, &lease.slot().group, &[]);
            for part in &matrix.parts {
                pass.set_bind_group(0, &part.group, &[]);
                let [a, b, c] = self.device.kernels.workgroups(kernel, part.rows, 0, m);
                pass.dispatch_workgroups(a, b, c);
            }
            drop(pass);
            self.read_back(lease, m * rows);
        }
        Ok(())
    }

    /// Records the decoding of a matrix.
    ///
    /// # Errors
    /// As [`Recording::multiply`].
    pub fn decode(&mut self, matrix: &Uploaded) -> Result<()> {
        for part in &matrix.parts {
            let at_once = self.fitting(part.rows, |rows| rows.saturating_mul(matrix.cols).saturating_mul(4))?;
            for first in (0..part.rows).step_by(at_once) {
                self.decode_rows(matrix, part, first, at_once.min(part.rows - first))?;
            }
        }
        Ok(())
    }

    fn decode_rows(&mut self, matrix: &Uploaded, part: &Part, first: usize, rows: usize) -> Result<()> {
        let lease = self.lease(&[], rows * matrix.cols, &[rows, 0, first, 0])?;
        let kernel = Kernel::Decode;
        let pipeline = self.device.kernels.pipeline(&self.device, kernel, false, matrix.constants())?;
        let mut pass = self.encoder.begin_compute_pass(&ComputePassDescriptor::default());
        pass.set_pipeline(&pipeline);
        pass.set_bind_group(0, &part.group, &[]);
        pass.set_bind_group(1, &lease.slot().group, &[]);
        let [a, b, c] = self.device.kernels.workgroups(kernel, rows, matrix.cols.div_ceil(4), rows);
        pass.dispatch_workgroups(a, b, c);
        drop(pass);
        self.read_back(lease, rows * matrix.cols);
        Ok(())
    }

    /// Records attention over the cache with these bindings.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Device`].
    pub fn attend(&mut self, cache: &BindGroup, format: &KvFormat, call: &Call) -> Result<()> {
        let lease = self.lease(bytemuck::cast_slice(&call.x), call.numbers(format), &call.words)?;
        let kernel = Kernel::Attend(call.tile);
        let mut stages = vec![(kernel, format.heads(), call.runs, call.rows)];
        if call.runs > 1 {
            stages.push((Kernel::Merge, 0, 0, call.queries));
        }
        for (kernel, heads, runs, queries) in stages {
            let pipeline = self.device.kernels.pipeline(&self.device, kernel, false, format.constants())?;
            // A pass of its own, so that results of runs are there when they are merged.
            let mut pass = self.encoder.begin_compute_pass(&ComputePassDescriptor::default());
            pass.set_pipeline(&pipeline);
            pass.set_bind_group(0, cache, &[]);
            pass.set_bind_group(1, &lease.slot().group, &[]);
            let [a, b, c] = self.device.kernels.workgroups(kernel, heads, runs, queries);
            pass.dispatch_workgroups(a, b, c);
        }
        self.read_back(lease, call.results);
        Ok(())
    }

    /// Submits what was recorded.
    pub fn submit(self) -> Flight {
        let submission = self.device.queue().submit([self.encoder.finish()]);
        Flight::new(self.device, submission, self.runs)
    }

    /// The greatest number of rows, halved as often as it takes, whose buffers a kernel sees as a whole.
    fn fitting(&self, rows: usize, bytes: impl Fn(usize) -> usize) -> Result<usize> {
        let most = self.device.binding_bytes();
        let mut fitting = rows;
        while bytes(fitting) as u64 > most {
            if fitting == 1 {
                return Err(Error::unsupported(format!(
                    "a row takes {} bytes, expected at most {most} that the device sees at once; multiply on the CPU",
                    bytes(1)
                )));
            }
            fitting = fitting.div_ceil(2);
        }
        Ok(fitting)
    }

    /// Buffers with these activations and parameters, and room for so many results.
    fn lease(&self, x: &[u8], results: usize, call: &[usize]) -> Result<Lease> {
        let lease = self.device.pool.take(&self.device, x.len() as u64, 4 * results as u64)?;
        if !x.is_empty() {
            self.device.queue().write_buffer(&lease.slot().x, 0, x);
        }
        self.device.queue().write_buffer(&lease.slot().call, 0, &words(call));
        Ok(lease)
    }

    fn read_back(&mut self, lease: Lease, results: usize) {
        let slot = lease.slot();
        self.encoder.copy_buffer_to_buffer(&slot.y, 0, &slot.staging, 0, 4 * results as u64);
        self.runs.push(Run { lease, results });
    }
}

fn number_bytes(half: bool) -> usize {
    if half { 2 } else { 4 }
}

/// Numbers of activations as a kernel reads them.
fn x_len(kernel: Kernel, m: usize, cols: usize) -> usize {
    let rows = if let Kernel::Few(tile) = kernel { tile as usize } else { m };
    rows.saturating_mul(cols.next_multiple_of(OCTET))
}

/// Activations as a kernel reads them: rows filled up with zeros to whole octets, and for few rows, where there are more
/// than one, transposed with as many rows as the kernel has, so that it reads four rows of a column at once.
fn arrange(kernel: Kernel, x: &[f32], m: usize, cols: usize) -> Cow<'_, [f32]> {
    let wide = cols.next_multiple_of(OCTET);
    match kernel {
        Kernel::Few(tile) if tile > 1 => {
            let tile = tile as usize;
            let mut arranged = vec![0.0; tile * wide];
            for (i, row) in x.chunks_exact(cols).enumerate() {
                for (column, &value) in arranged.chunks_exact_mut(tile).zip(row) {
                    column[i] = value;
                }
            }
            Cow::Owned(arranged)
        }
        _ if wide == cols => Cow::Borrowed(x),
        _ => {
            let mut arranged = vec![0.0; m * wide];
            for (to, row) in arranged.chunks_exact_mut(wide).zip(x.chunks_exact(cols)) {
                to[..cols].copy_from_slice(row);
            }
            Cow::Owned(arranged)
        }
    }
}
