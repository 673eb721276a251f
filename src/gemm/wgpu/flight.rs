//! What was submitted and is not yet read: it is waited for by blocking or by awaiting, then its results are copied out.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use wgpu::{MapMode, SubmissionIndex};

use super::device::Device;
use super::pool::Lease;
use crate::error::Result;

/// How long somebody waits for what another thread is about to tell, before looking at the device again.
const PATIENCE: Duration = Duration::from_millis(20);

/// Buffers of a submission, and how many results will lie in them.
#[derive(Debug)]
pub(super) struct Run {
    pub lease: Lease,
    pub results: usize,
}

/// How many runs have not landed, and who is to be told.
#[derive(Debug, Default)]
struct Landing {
    left: usize,
    failed: bool,
    waker: Option<Waker>,
}

#[derive(Debug, Default)]
struct Field {
    landing: Mutex<Landing>,
    landed: Condvar,
}

impl Field {
    fn lock(&self) -> MutexGuard<'_, Landing> {
        self.landing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A submission that is on its way.
#[derive(Debug)]
pub(super) struct Flight {
    device: Arc<Device>,
    submission: SubmissionIndex,
    runs: Vec<Run>,
    field: Arc<Field>,
    /// Whether the device's thread waits for it.
    watched: bool,
}

impl Flight {
    /// Asks for the results of a submission, so that they can be read once it has come to its end.
    pub fn new(device: Arc<Device>, submission: SubmissionIndex, runs: Vec<Run>) -> Self {
        let field = Arc::new(Field::default());
        field.lock().left = runs.len();
        for run in &runs {
            let field = Arc::clone(&field);
            let bytes = 4 * run.results as u64;
            run.lease.slot().staging.slice(..bytes).map_async(MapMode::Read, move |mapped| {
                let mut landing = field.lock();
                landing.left -= 1;
                landing.failed |= mapped.is_err();
                if landing.left == 0 {
                    field.landed.notify_all();
                    if let Some(waker) = landing.waker.take() {
                        waker.wake();
                    }
                }
            });
        }
        Self { device, submission, runs, field, watched: false }
    }

    /// Waits until all results can be read.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the device is lost.
    pub fn wait(&self) -> Result<()> {
        if self.field.lock().left > 0 {
            self.device.poll(Some(self.submission.clone()))?;
        }
        let mut landing = self.field.lock();
        // Another thread that polled at the same time may not have told yet.
        while landing.left > 0 {
            landing = self.field.landed.wait_timeout(landing, PATIENCE).unwrap_or_else(PoisonError::into_inner).0;
            if landing.left > 0 {
                drop(landing);
                self.device.poll(None)?;
                self.device.check()?;
                landing = self.field.lock();
            }
        }
        self.outcome(&landing)
    }

    /// As a future: whether all results can be read.
    pub fn poll(&mut self, context: &Context<'_>) -> Poll<Result<()>> {
        let mut landing = self.field.lock();
        if landing.left == 0 {
            return Poll::Ready(self.outcome(&landing));
        }
        landing.waker = Some(context.waker().clone());
        drop(landing);
        if !self.watched {
            self.watched = true;
            if let Err(e) = self.device.wait_elsewhere(self.submission.clone()) {
                return Poll::Ready(Err(e));
            }
        }
        Poll::Pending
    }

    fn outcome(&self, landing: &Landing) -> Result<()> {
        if landing.failed {
            // A device that is lost tells only when it is asked.
            self.device.poll(None)?;
            self.device.check()?;
            return Err(self.device.failed("results cannot be read"));
        }
        self.device.check()
    }

    /// Copies all results one after the other into `outputs`, which hold as many numbers, and gives the buffers back.
    ///
    /// # Errors
    /// [`crate::Error::Device`] when the driver does not let them be read.
    pub fn read<'y>(self, outputs: impl IntoIterator<Item = &'y mut [f32]>) -> Result<()> {
        let mut outputs = outputs.into_iter();
        let mut rest: &mut [f32] = &mut [];
        for run in self.runs {
            while rest.is_empty() {
                rest = outputs.next().expect("there is room for all results");
            }
            let (to, later) = rest.split_at_mut(run.results);
            rest = later;
            let staging = &run.lease.slot().staging;
            let view = staging.slice(..4 * run.results as u64).get_mapped_range();
            let view = view.map_err(|e| self.device.failed(&e.to_string()))?;
            bytemuck::cast_slice_mut(to).copy_from_slice(&view);
            drop(view);
            staging.unmap();
            run.lease.give_back();
        }
        Ok(())
    }
}
