//! Work without the GIL: on a thread of its own while the caller watches for Ctrl-C, errors as exceptions, no panics.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pyo3::exceptions::{PyKeyboardInterrupt, PyMemoryError, PyOSError};
use pyo3::prelude::*;

use crate::compress::{OnProgress, Progress};
use crate::error::{Error, Result};

/// How long Ctrl-C may wait to be seen.
const PATIENCE: Duration = Duration::from_millis(50);

/// What the worker tells the caller.
enum Message {
    Progress { done: u64, total: u64, tensor: String },
    Finished,
}

/// A report as JSON.
pub(super) fn json(value: &impl serde::Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::invalid(format!("the report cannot be printed: {e}")))
}

/// Runs short work without the GIL.
pub(super) fn guarded<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    match py.detach(|| catch_unwind(AssertUnwindSafe(work))) {
        Ok(result) => result.map_err(|e| raise(py, e)),
        Err(panic) => Err(panicked(py, panic.as_ref())),
    }
}

/// Runs long work in the pool of `threads` threads, calling `progress(done, total, tensor)` from the calling thread.
///
/// The work waits for the callback, so that an exception in it stops the work where it stands. One of a signal handler
/// stops the work at its next step. Either is raised, even when the work came to its end meanwhile.
pub(super) fn interruptible<T: Send>(
    py: Python<'_>,
    threads: usize,
    progress: Option<Py<PyAny>>,
    work: impl FnOnce(&mut OnProgress<'_>) -> Result<T> + Send,
) -> PyResult<T> {
    let stop = AtomicBool::new(false);
    let (sender, mut receiver) = channel();
    let (called_back, resume) = channel();
    let wanted = progress.is_some();
    let outcome = std::thread::scope(|scope| {
        let stop = &stop;
        let worker = scope.spawn(move || {
            let told = sender.clone();
            let mut on_progress = move |p: Progress<'_>| {
                if wanted {
                    // The caller listens until the work has ended.
                    drop(told.send(Message::Progress { done: p.done, total: p.total, tensor: p.tensor.to_owned() }));
                    let _ = resume.recv();
                }
                if stop.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
            };
            let result = catch_unwind(AssertUnwindSafe(|| {
                let pool = pool(threads)?;
                pool.install(|| work(&mut on_progress))
            }));
            drop(sender.send(Message::Finished));
            result
        });
        let mut raised = None;
        loop {
            let (message, back) = py.detach(move || (receiver.recv_timeout(PATIENCE), receiver));
            receiver = back;
            let called = matches!(message, Ok(Message::Progress { .. }));
            let outcome = match message {
                Ok(Message::Finished) | Err(RecvTimeoutError::Disconnected) => break,
                Ok(Message::Progress { done, total, tensor }) => match &progress {
                    Some(callback) if raised.is_none() => callback.call1(py, (done, total, tensor)).map(drop),
                    _ => Ok(()),
                },
                Err(RecvTimeoutError::Timeout) => Ok(()),
            };
            if let Err(e) = outcome.and_then(|()| py.check_signals())
                && raised.is_none()
            {
                stop.store(true, Ordering::Relaxed);
                raised = Some(e);
            }
            if called {
                // The work may have ended since.
                let _ = called_back.send(());
            }
        }
        let result = py.detach(|| worker.join());
        match (raised, result) {
            (Some(e), Ok(Ok(Ok(_) | Err(Error::Interrupted)))) => Err(e),
            (_, Ok(Ok(result))) => result.map_err(|e| raise(py, e)),
            (_, Ok(Err(panic)) | Err(panic)) => Err(panicked(py, panic.as_ref())),
        }
    });
    // A signal that came after the last look is still the caller's.
    py.check_signals()?;
    outcome
}

/// The pool of the whole process, or one of a size of its own. A forked child does not inherit threads, so the pool
/// belongs to a process id.
pub(super) fn pool(threads: usize) -> Result<Arc<rayon::ThreadPool>> {
    static SHARED: Mutex<Option<(u32, Arc<rayon::ThreadPool>)>> = Mutex::new(None);
    let build = || {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.map(Arc::new).map_err(|e| Error::invalid(format!("{threads} threads cannot be started: {e}")))
    };
    // A lock that was held when the process forked stays held: then this call brings its own threads.
    let Some(mut shared) = SHARED.try_lock().ok().filter(|_| threads == 0) else { return build() };
    let this = std::process::id();
    if let Some((owner, pool)) = shared.as_ref() {
        if *owner == this {
            return Ok(Arc::clone(pool));
        }
        // Waiting for threads that do not exist here would never end.
        std::mem::forget(shared.take());
    }
    let pool = build()?;
    *shared = Some((this, Arc::clone(&pool)));
    Ok(pool)
}

/// The exception of an error.
pub(super) fn raise(py: Python<'_>, error: Error) -> PyErr {
    let class = match error.root() {
        Error::Io { path, source } => {
            let path = path.display().to_string();
            return match source.raw_os_error() {
                Some(code) => {
                    let what = source.to_string();
                    let what = what.strip_suffix(&format!(" (os error {code})")).unwrap_or(&what);
                    PyOSError::new_err((code, what.to_owned(), path))
                }
                // The kind alone decides the subclass.
                None => std::io::Error::new(source.kind(), error.to_string()).into(),
            };
        }
        Error::OutOfMemory { .. } => return PyMemoryError::new_err(error.to_string()),
        Error::Interrupted => return PyKeyboardInterrupt::new_err(error.to_string()),
        Error::Invalid(_) => "InvalidError",
        Error::Corrupt { .. } => "CorruptError",
        Error::Unsupported(_) => "UnsupportedError",
        Error::Limit { .. } => "LimitError",
        Error::Nonfinite { .. } => "NonfiniteError",
        Error::Device(_) | Error::InFile { .. } => "TenpakError",
    };
    exception(py, class, error.to_string())
}

fn exception(py: Python<'_>, class: &str, message: String) -> PyErr {
    match py.import("tenpak._errors").and_then(|errors| errors.getattr(class)?.call1((message,))) {
        Ok(value) => PyErr::from_value(value),
        Err(e) => e,
    }
}

pub(super) fn panicked(py: Python<'_>, panic: &(dyn Any + Send)) -> PyErr {
    let what = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message");
    exception(py, "TenpakError", format!("internal error: {what}; this is a bug of tenpak, please report it"))
}
