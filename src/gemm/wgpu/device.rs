//! An open device: its queue, what it can do, and how its errors come to those whose calls made them.
//!
//! wgpu panics at an error that nobody expects. Here every call that may fail runs under scopes for errors of its thread
//! ([`Device::watched`]), and what comes outside of them is kept by a handler, installed before the first call, and
//! reported by the next one. A device that is lost stays lost: whoever holds it gets an error, and the next call
//! opens another.

#![expect(unsafe_code, reason = "wgpu wants it said that experiments are used")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use wgpu::{DeviceDescriptor, ErrorFilter, ExperimentalFeatures, Features, MemoryHints, SubmissionIndex};

use super::adapter::Adapter;
use super::kernel::Kernels;
use super::pool::Pool;
use super::units::{self, MatrixUnits, Units};
use super::wait::{self, Waiter, block_on};
use super::{Options, store};
use crate::error::{DeviceError, Error, Result};

/// The largest binding that is asked for: indices of 32 bits count the bits of any plane of such a part.
const LARGEST_BINDING: u64 = 1 << 31;

/// What has gone wrong with a device so far.
#[derive(Debug, Default)]
struct Faults {
    lost: AtomicBool,
    /// What the driver said when it lost the device.
    last_words: Mutex<String>,
    /// An error that came when no call was watched.
    uncaptured: Mutex<Option<wgpu::Error>>,
}

/// An open device.
#[derive(Debug)]
pub(super) struct Device {
    name: String,
    device: wgpu::Device,
    queue: wgpu::Queue,
    faults: Arc<Faults>,
    binding_bytes: u64,
    half: bool,
    pub(super) kernels: Kernels,
    pub(super) pool: Pool,
    waiter: OnceLock<Waiter>,
}

impl Device {
    /// Opens an adapter.
    ///
    /// # Errors
    /// [`Error::Device`] when the driver refuses.
    pub fn open(adapter: &wgpu::Adapter, described: &Adapter, options: &Options) -> Result<Arc<Self>> {
        let native = options.subgroups && options.units == MatrixUnits::Native;
        let wanted = [
            (native, units::FEATURES),
            (options.half, Features::SHADER_F16),
            (options.subgroups, Features::SUBGROUP),
            (options.pipelines.is_some(), Features::PIPELINE_CACHE),
        ];
        let wanted =
            wanted.into_iter().filter(|(wanted, _)| *wanted).fold(Features::empty(), |all, (_, one)| all | one);
        let features = adapter.features() & wanted;
        let experimental_features = if features.intersects(Features::all_experimental_mask()) {
            // SAFETY: the kernel for matrix units, the only one that needs an experiment, stays within its tiles and buffers.
            unsafe { ExperimentalFeatures::enabled() }
        } else {
            ExperimentalFeatures::disabled()
        };
        let name = described.name.clone();
        let opened = block_on(adapter.request_device(&DeviceDescriptor {
            label: Some("tenpak"),
            required_features: features,
            required_limits: adapter.limits(),
            experimental_features,
            memory_hints: MemoryHints::Performance,
            ..DeviceDescriptor::default()
        }));
        let (device, queue) =
            opened.map_err(|e| DeviceError::Failed { device: name.clone(), what: sentence(&e.to_string()) })?;
        let faults = Arc::new(Faults::default());
        let heard = Arc::clone(&faults);
        device.on_uncaptured_error(Arc::new(move |error| {
            heard.uncaptured.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }));
        let heard = Arc::clone(&faults);
        device.set_device_lost_callback(move |reason, message| {
            let words = if message.is_empty() { format!("{reason:?}").to_lowercase() } else { sentence(&message) };
            *heard.last_words.lock().unwrap_or_else(PoisonError::into_inner) = words;
            heard.lost.store(true, Ordering::Release);
        });
        let limits = device.limits();
        let most = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size).min(LARGEST_BINDING);
        let binding_bytes = options.binding_bytes.unwrap_or(most).min(most) / 16 * 16;
        let kept = options
            .pipelines
            .as_deref()
            .filter(|_| features.contains(Features::PIPELINE_CACHE))
            .and_then(|folder| store::Store::open(&device, &adapter.get_info(), folder));
        let subgroups = described.subgroups.filter(|_| features.contains(Features::SUBGROUP));
        let units = Units::new(options.units, features, described, adapter);
        let kernels = Kernels::new(&device, subgroups.map(|(_, most)| most), units, kept);
        let half = features.contains(Features::SHADER_F16);
        let (pool, waiter) = (Pool::default(), OnceLock::new());
        let opened = Self { name, device, queue, faults, binding_bytes, half, kernels, pool, waiter };
        opened.check()?;
        Ok(Arc::new(opened))
    }

    /// The device itself.
    pub fn raw(&self) -> &wgpu::Device {
        &self.device
    }

    /// The queue of the device.
    pub fn queue(&self) -> &wgpu::Queue {
        &self.queue
    }

    /// The largest buffer that a kernel sees, in bytes, a multiple of 16.
    pub fn binding_bytes(&self) -> u64 {
        self.binding_bytes
    }

    /// Whether kernels may compute with halves.
    pub fn half(&self) -> bool {
        self.half
    }

    /// Whether the device was lost, as far as anyone has noticed.
    pub fn is_lost(&self) -> bool {
        self.faults.lost.load(Ordering::Acquire)
    }

    /// Does what a driver does that loses the device.
    pub fn lose(&self) {
        self.device.destroy();
    }

    /// Runs a call and gives its errors to the caller; `bytes` of memory for `what` are asked for in it.
    ///
    /// # Errors
    /// Those of `work`, [`Error::OutOfMemory`], [`Error::Device`].
    pub fn watched<T>(&self, what: &str, bytes: u64, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let memory = self.device.push_error_scope(ErrorFilter::OutOfMemory);
        let validation = self.device.push_error_scope(ErrorFilter::Validation);
        let internal = self.device.push_error_scope(ErrorFilter::Internal);
        let result = work();
        let internal = block_on(internal.pop());
        let validation = block_on(validation.pop());
        let memory = block_on(memory.pop());
        // A device that is lost refuses everything: that is then the reason.
        if let Some(error) = memory.or(internal).or(validation) {
            wait::poll(&self.device, None);
            self.check_lost()?;
            return Err(self.error(&error, what, bytes));
        }
        self.check()?;
        result
    }

    /// Refuses to go on with a device that is lost, or that has failed when nobody watched.
    ///
    /// # Errors
    /// [`Error::Device`], [`Error::OutOfMemory`].
    pub fn check(&self) -> Result<()> {
        self.check_lost()?;
        let uncaptured = self.faults.uncaptured.lock().unwrap_or_else(PoisonError::into_inner).take();
        uncaptured.map_or(Ok(()), |error| Err(self.error(&error, "the work of another call", 0)))
    }

    fn check_lost(&self) -> Result<()> {
        if !self.is_lost() {
            return Ok(());
        }
        let what = self.faults.last_words.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Err(DeviceError::Lost { device: self.name.clone(), what }.into())
    }

    /// Waits for a submission, or takes notice of how things stand without waiting.
    ///
    /// # Errors
    /// [`Error::Device`] when the device is lost, or cannot be waited for.
    pub fn poll(&self, submission: Option<SubmissionIndex>) -> Result<()> {
        if wait::poll(&self.device, submission) {
            return Ok(());
        }
        self.check()?;
        Err(self.failed("it cannot be waited for"))
    }

    /// Has a thread wait for a submission.
    ///
    /// # Errors
    /// [`Error::Device`] when no thread can be started.
    pub fn wait_elsewhere(&self, submission: SubmissionIndex) -> Result<()> {
        if self.waiter.get().is_none() {
            let started = Waiter::start(self.device.clone());
            let waiter = started.map_err(|e| self.failed(&format!("no thread can wait for it: {e}")))?;
            // Where two calls come here at once, one thread ends again.
            drop(self.waiter.set(waiter));
        }
        self.waiter.get().expect("it was started above").wait(submission);
        Ok(())
    }

    /// The error of a device that did not do what it must.
    pub fn failed(&self, what: &str) -> Error {
        DeviceError::Failed { device: self.name.clone(), what: what.to_owned() }.into()
    }

    fn error(&self, error: &wgpu::Error, what: &str, bytes: u64) -> Error {
        match error {
            wgpu::Error::OutOfMemory { .. } => {
                Error::OutOfMemory { what: format!("{what} on device '{}'", self.name), bytes }
            }
            wgpu::Error::Validation { description, .. } | wgpu::Error::Internal { description, .. } => {
                self.failed(&sentence(description))
            }
        }
    }
}

/// Text of several lines as one sentence of ours.
fn sentence(text: &str) -> String {
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    words.trim_end_matches('.').to_owned()
}
