//! Buffers of calls, kept for later calls: activations in, results out, and the memory that results are read from.
//!
//! A call takes a set of them at least as large as it needs and gives it back when its results are read. Sizes are
//! powers of two, so that calls of similar sizes share. What a call does not give back, because it failed, is dropped.

use std::sync::{Arc, Mutex, PoisonError};

use wgpu::{BindGroup, BindGroupDescriptor, BindGroupEntry, Buffer, BufferDescriptor, BufferUsages};

use super::device::Device;
use crate::error::{Error, Result};

/// Bytes of a set that nobody uses which are kept, in all.
const IDLE_BYTES: u64 = 256 << 20;

/// The least size of a buffer.
const LEAST: u64 = 256;

/// Bytes of the parameters of a call: up to eight numbers of 32 bits.
const CALL: u64 = 32;

/// What calls hold and have held of the memory of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Usage {
    /// Sets of buffers that calls use now.
    pub busy: usize,
    /// Sets that wait for calls.
    pub idle: usize,
    /// Sets that were ever made.
    pub made: u64,
    /// Bytes of the sets in `busy` and `idle`.
    pub bytes: u64,
}

/// The buffers of one call.
#[derive(Debug)]
pub(super) struct Slot {
    pub x: Buffer,
    pub y: Buffer,
    /// A copy of the results that the processor can read.
    pub staging: Buffer,
    pub call: Buffer,
    pub group: BindGroup,
    /// Sizes of `x` and `y`.
    sizes: (u64, u64),
}

impl Slot {
    fn bytes(sizes: (u64, u64)) -> u64 {
        sizes.0 + 2 * sizes.1 + CALL
    }
}

#[derive(Debug, Default)]
struct Shelf {
    idle: Vec<Slot>,
    usage: Usage,
}

/// The buffers of the calls of a device.
#[derive(Debug, Default, Clone)]
pub(super) struct Pool(Arc<Mutex<Shelf>>);

/// Buffers that a call uses; dropped with it unless they are given back.
#[derive(Debug)]
pub(super) struct Lease {
    slot: Option<Slot>,
    pool: Pool,
}

impl Pool {
    fn shelf(&self) -> std::sync::MutexGuard<'_, Shelf> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What calls hold.
    pub fn usage(&self) -> Usage {
        let shelf = self.shelf();
        Usage { idle: shelf.idle.len(), ..shelf.usage }
    }

    /// Buffers for `x` and `y` bytes of activations and results.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Device`].
    pub fn take(&self, device: &Device, x: u64, y: u64) -> Result<Lease> {
        let size = |bytes: u64| bytes.max(LEAST).next_power_of_two().min(device.binding_bytes()).max(bytes);
        let sizes = (size(x), size(y));
        let mut shelf = self.shelf();
        // The last one that was given back is the likeliest to be in a cache.
        if let Some(at) = shelf.idle.iter().rposition(|slot| slot.sizes == sizes) {
            shelf.usage.busy += 1;
            return Ok(Lease { slot: Some(shelf.idle.remove(at)), pool: self.clone() });
        }
        drop(shelf);
        let slot = match make(device, sizes) {
            // What others have left may be just what is missing.
            Err(Error::OutOfMemory { .. }) if self.forget_idle() => make(device, sizes)?,
            made => made?,
        };
        let mut shelf = self.shelf();
        shelf.usage.busy += 1;
        shelf.usage.made += 1;
        shelf.usage.bytes += Slot::bytes(sizes);
        Ok(Lease { slot: Some(slot), pool: self.clone() })
    }

    /// Drops what nobody uses; `false` where there is nothing.
    fn forget_idle(&self) -> bool {
        let mut shelf = self.shelf();
        let bytes: u64 = shelf.idle.iter().map(|slot| Slot::bytes(slot.sizes)).sum();
        shelf.usage.bytes -= bytes;
        !std::mem::take(&mut shelf.idle).is_empty()
    }
}

impl Lease {
    /// The buffers.
    pub fn slot(&self) -> &Slot {
        self.slot.as_ref().expect("it is there until it is given back")
    }

    /// Gives the buffers back for other calls: none of them is mapped.
    pub fn give_back(mut self) {
        let Some(slot) = self.slot.take() else { return };
        let mut shelf = self.pool.shelf();
        shelf.usage.busy -= 1;
        shelf.idle.push(slot);
        let mut idle: u64 = shelf.idle.iter().map(|slot| Slot::bytes(slot.sizes)).sum();
        while idle > IDLE_BYTES {
            let oldest = Slot::bytes(shelf.idle.remove(0).sizes);
            idle -= oldest;
            shelf.usage.bytes -= oldest;
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            let mut shelf = self.pool.shelf();
            shelf.usage.busy -= 1;
            shelf.usage.bytes -= Slot::bytes(slot.sizes);
        }
    }
}

fn make(device: &Device, sizes: (u64, u64)) -> Result<Slot> {
    device.watched("activations and results", Slot::bytes(sizes), || {
        let buffer = |label, size, usage| {
            device.raw().create_buffer(&BufferDescriptor { label: Some(label), size, usage, mapped_at_creation: false })
        };
        let x = buffer("activations", sizes.0, BufferUsages::STORAGE | BufferUsages::COPY_DST);
        let y = buffer("results", sizes.1, BufferUsages::STORAGE | BufferUsages::COPY_SRC);
        let staging = buffer("readback", sizes.1, BufferUsages::MAP_READ | BufferUsages::COPY_DST);
        let call = buffer("call", CALL, BufferUsages::UNIFORM | BufferUsages::COPY_DST);
        let bound = [(0, &x), (1, &y), (2, &call)];
        let entries = bound.map(|(binding, buffer)| BindGroupEntry { binding, resource: buffer.as_entire_binding() });
        let layout = device.kernels.call();
        let group =
            device.raw().create_bind_group(&BindGroupDescriptor { label: Some("call"), layout, entries: &entries });
        Ok(Slot { x, y, staging, call, group, sizes })
    })
}
