//! Whose threads a product runs on: those of rayon's pool, or an OpenMP team that the process has anyway.
//!
//! PyTorch runs its loops on OpenMP threads, which spin for a while after each loop in case another follows. A product
//! of the same model on threads of its own competes with those for the processor, and first has to wake up. On the same
//! team it starts at once: a model of sixteen layers decodes up to twice as many tokens a second. `GOMP_parallel` is
//! the entry point that compilers emit for a parallel region, so it is as stable as the OpenMP library itself.

#![expect(unsafe_code, reason = "functions of another library, whose addresses the caller vouches for")]

use std::any::Any;
use std::cell::Cell;
use std::ffi::{c_int, c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, PoisonError};

thread_local! {
    static CURRENT: Cell<Option<OpenMp>> = const { Cell::new(None) };
}

/// `GOMP_parallel(body, data, threads, flags)`: calls `body(data)` on every thread of a team, and waits for all.
type Parallel = unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);
/// `omp_get_max_threads()`: how many threads the next team has.
type MaxThreads = unsafe extern "C" fn() -> c_int;

/// Two functions of one OpenMP library.
#[derive(Debug, Clone, Copy)]
pub struct OpenMp {
    parallel: Parallel,
    max_threads: MaxThreads,
}

impl OpenMp {
    /// The library with these functions.
    ///
    /// # Safety
    /// They are the addresses of `GOMP_parallel` and `omp_get_max_threads` of a library that stays loaded.
    #[must_use]
    pub unsafe fn new(parallel: *const c_void, max_threads: *const c_void) -> Option<Self> {
        if parallel.is_null() || max_threads.is_null() {
            return None;
        }
        // SAFETY: the caller vouches for what stands at the addresses.
        unsafe {
            Some(Self {
                parallel: std::mem::transmute::<*const c_void, Parallel>(parallel),
                max_threads: std::mem::transmute::<*const c_void, MaxThreads>(max_threads),
            })
        }
    }

    /// Runs `work`, whose products use this library's threads and not rayon's.
    pub fn install<R>(self, work: impl FnOnce() -> R) -> R {
        struct Restore(Option<OpenMp>);
        impl Drop for Restore {
            fn drop(&mut self) {
                CURRENT.set(self.0);
            }
        }
        let _restore = Restore(CURRENT.replace(Some(self)));
        work()
    }

    /// Threads of the next team.
    pub(super) fn threads(self) -> usize {
        // SAFETY: a function without conditions, see `new`.
        usize::try_from(unsafe { (self.max_threads)() }).unwrap_or(1).max(1)
    }

    /// Calls `work` once on every thread of a team, and returns when all are done; a panic of one goes on here.
    pub(super) fn run<F: Fn() + Sync>(self, work: F) {
        struct Shared<F> {
            work: F,
            panic: Mutex<Option<Box<dyn Any + Send>>>,
        }
        extern "C" fn body<F: Fn() + Sync>(data: *mut c_void) {
            // SAFETY: `run` passes a `Shared<F>` and waits until no thread uses it; threads share it by reference.
            let shared = unsafe { &*data.cast::<Shared<F>>().cast_const() };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(&shared.work)) {
                *shared.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
            }
        }
        let shared = Shared { work, panic: Mutex::new(None) };
        // SAFETY: see `new`; zero threads stand for the library's own number, zero flags for no wish.
        unsafe { (self.parallel)(body::<F>, (&raw const shared).cast_mut().cast(), 0, 0) };
        if let Some(panic) = shared.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
            resume_unwind(panic);
        }
    }
}

/// The library that [`OpenMp::install`] chose for this thread.
pub(super) fn current() -> Option<OpenMp> {
    CURRENT.get()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    extern "C" fn parallel(body: extern "C" fn(*mut c_void), data: *mut c_void, _: c_uint, _: c_uint) {
        let data = data.expose_provenance();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(move || body(std::ptr::with_exposed_provenance_mut(data)));
            }
        });
    }

    extern "C" fn max_threads() -> c_int {
        3
    }

    fn library() -> OpenMp {
        // SAFETY: the two functions above have the right types and live as long as the program.
        unsafe { OpenMp::new(parallel as *const c_void, max_threads as *const c_void) }.expect("not null")
    }

    #[test]
    fn every_thread_of_a_team_works_and_a_panic_arrives_where_the_team_was_called() {
        let calls = AtomicUsize::new(0);
        library().run(|| {
            calls.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(calls.into_inner(), 3);
        let panic = catch_unwind(|| library().run(|| panic!("one of them"))).expect_err("panics");
        assert_eq!(panic.downcast_ref(), Some(&"one of them"));
    }

    #[test]
    fn a_library_is_the_current_one_only_while_it_is_installed() {
        assert!(current().is_none());
        assert_eq!(library().install(|| current().map(OpenMp::threads)), Some(3));
        let _ = catch_unwind(|| library().install(|| panic!()));
        assert!(current().is_none());
    }

    #[test]
    fn a_team_does_every_task_once() {
        let done: Vec<_> = (0..100).map(|_| AtomicUsize::new(0)).collect();
        library().install(|| {
            super::super::tile::each(done.iter().collect(), false, |d| _ = d.fetch_add(1, Ordering::Relaxed));
        });
        assert!(done.into_iter().all(|d| d.into_inner() == 1));
    }
}
