//! The `tenpak` binary: starts the command line of the library.
fn main() {}
