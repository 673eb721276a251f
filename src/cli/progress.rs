//! Progress on a terminal, and the signals that stop the work between two blocks.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use signal_hook::consts::{SIGINT, SIGTERM};

use super::Common;
use crate::compress::Progress;
use crate::error::{Error, Result};

/// SIGINT and SIGTERM as a number that is looked at between blocks.
pub(super) struct Signals(Arc<AtomicUsize>);

impl Signals {
    pub fn install() -> io::Result<Self> {
        let seen = Arc::new(AtomicUsize::new(0));
        let once = Arc::new(AtomicBool::new(false));
        for (signal, code) in [(SIGINT, 130), (SIGTERM, 143)] {
            // A second signal ends the process at once, should the work not come to its next block.
            signal_hook::flag::register_conditional_default(signal, Arc::clone(&once))?;
            signal_hook::flag::register(signal, Arc::clone(&once))?;
            signal_hook::flag::register_usize(signal, Arc::clone(&seen), code)?;
        }
        // A file that reaches the size that the process may write is an error of the write, unless nobody takes the signal.
        #[cfg(unix)]
        signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::default())?;
        Ok(Self(seen))
    }

    /// The exit code that the last signal asks for.
    pub fn exit_code(&self) -> Option<u8> {
        u8::try_from(self.0.load(Ordering::Relaxed)).ok().filter(|&code| code != 0)
    }

    pub fn check(&self) -> Result<()> {
        if self.exit_code().is_some() { Err(Error::Interrupted) } else { Ok(()) }
    }
}

/// A bar with the time left, on a terminal; nothing in a pipe or when quiet.
pub(super) struct Bar<'a> {
    bar: ProgressBar,
    signals: &'a Signals,
}

impl<'a> Bar<'a> {
    pub fn new(common: &Common, signals: &'a Signals) -> Self {
        let target = if common.quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let style = ProgressStyle::with_template(
            "{bar:30} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta} left  {wide_msg}",
        );
        let bar = ProgressBar::with_draw_target(None, target).with_style(style.expect("a fixed template"));
        Self { bar, signals }
    }

    /// Shows where the work is; an error when a signal came.
    pub fn step(&self, progress: Progress<'_>) -> Result<()> {
        self.signals.check()?;
        self.bar.set_length(progress.total);
        self.bar.set_position(progress.done);
        if self.bar.message() != progress.tensor {
            self.bar.set_message(progress.tensor.to_owned());
        }
        Ok(())
    }
}

impl Drop for Bar<'_> {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
