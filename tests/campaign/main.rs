//! Reliability campaigns that run the program itself: files that change while they are read, `kill -9`, faults of every
//! system call, full disks, small memory; and a table of bad files, each with its error.
//!
//! Each runs a short form, with more cases where `TENPAK_CAMPAIGN` says how many; `tests/campaigns` runs the long forms.

#![cfg(target_os = "linux")]

mod bad_files;
mod changed;
mod faults;
#[path = "../support/format.rs"]
mod format;
mod full;
#[path = "../support/gguf.rs"]
mod gguf;
mod killed;
mod models;
#[path = "../support/mod.rs"]
mod support;

/// How many cases a campaign has: what `TENPAK_CAMPAIGN` says, or this many.
fn cases(default: usize) -> usize {
    std::env::var("TENPAK_CAMPAIGN").map_or(default, |count| count.parse().expect("TENPAK_CAMPAIGN is a number"))
}

/// What `tests/campaigns` prints in its table.
fn reached(campaign: &str, cases: usize, what: &str) {
    eprintln!("campaign {campaign}: {cases} cases, 0 failures; {what}");
}
