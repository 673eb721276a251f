//! Waiting for futures on this thread, and a thread that waits for the device where nobody does.
//!
//! A native device makes progress only while somebody polls it. Who waits by blocking polls it himself; who awaits does
//! not, so that a thread of the device does it for all of them.

use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};

use wgpu::{PollType, SubmissionIndex};

/// Wakes a thread that is parked.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// The value of a future, with this thread parked until it is there.
///
/// All that a native build waits for this way is there at once, which is not worth an executor from elsewhere.
pub(super) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(value) => return value,
            Poll::Pending => thread::park(),
        }
    }
}

/// The value of work that blocks, done on a thread of its own; nothing where no thread can be started.
pub(super) async fn elsewhere<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let shared = Arc::new(Mutex::new((None, None::<Waker>)));
    let theirs = Arc::clone(&shared);
    let run = move || {
        let value = work();
        let mut shared = theirs.lock().unwrap_or_else(PoisonError::into_inner);
        shared.0 = Some(value);
        if let Some(waker) = shared.1.take() {
            waker.wake();
        }
    };
    thread::Builder::new().name("tenpak-wgpu-open".to_owned()).spawn(run).ok()?;
    poll_fn(|context| {
        let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
        shared.1 = Some(context.waker().clone());
        shared.0.take().map_or(Poll::Pending, |value| Poll::Ready(Some(value)))
    })
    .await
}

/// Polls a device until a submission has come to its end, or takes notice of what has, without waiting.
///
/// `false` where the device cannot be polled any more: it panics when the driver loses it meanwhile.
pub(super) fn poll(device: &wgpu::Device, submission: Option<SubmissionIndex>) -> bool {
    let poll_type = match submission {
        Some(index) => PollType::Wait { submission_index: Some(index), timeout: None },
        None => PollType::Poll,
    };
    catch_unwind(AssertUnwindSafe(|| device.poll(poll_type))).is_ok_and(|polled| polled.is_ok())
}

/// A thread that polls a device for those who await; ends when this is dropped.
#[derive(Debug)]
pub(super) struct Waiter(Sender<SubmissionIndex>);

impl Waiter {
    /// Starts the thread, or says what the system said.
    pub fn start(device: wgpu::Device) -> std::io::Result<Self> {
        let (sender, receiver) = channel();
        thread::Builder::new().name("tenpak-wgpu".to_owned()).spawn(move || {
            // The end of a submission is told by callbacks, which also know of failures.
            while let Ok(submission) = receiver.recv() {
                poll(&device, Some(submission));
            }
        })?;
        Ok(Self(sender))
    }

    /// Asks for progress until a submission has come to its end.
    pub fn wait(&self, submission: SubmissionIndex) {
        // The thread lives as long as this.
        drop(self.0.send(submission));
    }
}
