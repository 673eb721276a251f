//! The `tenpak` binary: starts the command line of the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(tenpak::cli::run(std::env::args_os()))
}
