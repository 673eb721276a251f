//! The command line: one implementation for the binary and for the Python console script.
//!
//! Each verb is a file: its arguments, one call into the library, its report as text or, with `--format json`, as JSON
//! of the schema in `schema.json`. Results go to standard output, progress and errors to standard error.
//!
//! | exit code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | done, and something was found wrong |
//! | 2 | could not run |
//! | 130, 143 | stopped by SIGINT, SIGTERM; nothing left behind |

mod bench;
mod codecs;
mod completions;
mod compress;
mod decompress;
mod delta;
mod devices;
mod diff;
mod export;
mod inspect;
mod man;
mod materialize;
mod merge_index;
mod plan;
mod progress;
mod report;
mod verify;

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::error::{Error, Result};
use crate::file::Access;
use crate::limits::Limits;
use crate::source::{self, Source};
use progress::Signals;

/// Low-bit weights for language models: compress, verify, decode.
#[derive(Debug, Parser)]
#[command(name = "tenpak", version, about, max_term_width = 110)]
#[command(after_help = "exit codes: 0 done, 1 something was found wrong, 2 could not run, 130/143 stopped by a signal")]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
    #[command(flatten)]
    common: Common,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Compress(Box<compress::Arguments>),
    Decompress(decompress::Arguments),
    Inspect(inspect::Arguments),
    Verify(verify::Arguments),
    Bench(bench::Arguments),
    Delta(delta::Arguments),
    Diff(diff::Arguments),
    Export(export::Arguments),
    Materialize(materialize::Arguments),
    MergeIndex(merge_index::Arguments),
    Plan(plan::Arguments),
    Codecs(codecs::Arguments),
    Devices(devices::Arguments),
    Completions(completions::Arguments),
    Man(man::Arguments),
}

/// What every verb understands.
#[derive(Debug, Args)]
struct Common {
    /// Worker threads; 0 for one per core
    #[arg(long, global = true, default_value_t = 0, value_name = "N")]
    threads: usize,
    /// How to print the result
    #[arg(long, global = true, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// No progress bar and no result, only errors
    #[arg(long, short, global = true)]
    quiet: bool,
    /// Map windows of files instead of reading them; a file that shrinks meanwhile then ends the process
    #[arg(long, global = true)]
    mmap: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Json,
}

/// What a verb came to, when it came to an end.
enum Outcome {
    Done,
    FoundWrong,
}

/// The surroundings of a verb: where it prints, how it reads, who may stop it.
struct Context<'a> {
    common: &'a Common,
    signals: &'a Signals,
    out: Vec<u8>,
}

impl Context<'_> {
    fn access(&self) -> Access {
        if self.common.mmap { Access::Map } else { Access::Read }
    }

    fn source_options(&self) -> source::Options {
        source::Options { access: self.access(), limits: Limits::DEFAULT }
    }

    fn source(&self, path: &std::path::Path) -> Result<Source> {
        source::open(path, &self.source_options())
    }

    fn artifact(&self, path: &std::path::Path) -> Result<crate::artifact::ArtifactFile> {
        crate::artifact::ArtifactFile::open_with(path, self.access(), &Limits::DEFAULT)
    }

    fn json(&self) -> bool {
        self.common.format == Format::Json
    }

    /// Prints a value of the schema.
    fn print_json(&mut self, value: &impl serde::Serialize) {
        serde_json::to_writer_pretty(&mut self.out, value).expect("reports serialize and memory takes them");
        self.out.push(b'\n');
    }

    /// Says something before the work begins.
    fn warn(&self, note: impl std::fmt::Display) {
        if !self.common.quiet {
            drop(writeln!(io::stderr().lock(), "tenpak: note: {note}"));
        }
    }

    /// Prints one line of text.
    fn line(&mut self, text: impl std::fmt::Display) {
        writeln!(self.out, "{text}").expect("memory takes it");
    }
}

/// An input that may stand with or without its flag.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Input {
    /// Checkpoint: .safetensors, Hugging Face directory, .npz, .npy or JSON bundle
    #[arg(value_name = "INPUT")]
    positional: Option<PathBuf>,
    /// The same, as an option
    #[arg(long = "input", short = 'i', value_name = "INPUT")]
    option: Option<PathBuf>,
}

impl Input {
    fn path(&self) -> Result<&std::path::Path> {
        self.option.as_deref().or(self.positional.as_deref()).ok_or_else(|| Error::invalid("no input, pass --input"))
    }
}

/// Runs one command line, program name first, and gives the exit code.
pub fn run(args: impl IntoIterator<Item = OsString>) -> u8 {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(e) => {
            // Help and version are errors too, to the parser. A closed pipe is nobody's fault.
            drop(e.print());
            return u8::try_from(e.exit_code()).unwrap_or(2);
        }
    };
    let signals = match Signals::install() {
        Ok(signals) => signals,
        Err(e) => return fail(&Error::invalid(format!("signal handlers cannot be installed: {e}"))),
    };
    let pool = match rayon::ThreadPoolBuilder::new().num_threads(cli.common.threads).build() {
        Ok(pool) => pool,
        Err(e) => return fail(&Error::invalid(format!("{} threads cannot be started: {e}", cli.common.threads))),
    };
    let mut context = Context { common: &cli.common, signals: &signals, out: Vec::new() };
    let result = pool.install(|| match &cli.verb {
        Verb::Compress(arguments) => compress::run(arguments, &mut context),
        Verb::Decompress(arguments) => decompress::run(arguments, &mut context),
        Verb::Inspect(arguments) => inspect::run(arguments, &mut context),
        Verb::Verify(arguments) => verify::run(arguments, &mut context),
        Verb::Bench(arguments) => bench::run(arguments, &mut context),
        Verb::Delta(arguments) => delta::run(arguments, &mut context),
        Verb::Diff(arguments) => diff::run(arguments, &mut context),
        Verb::Export(arguments) => export::run(arguments, &mut context),
        Verb::Materialize(arguments) => materialize::run(arguments, &mut context),
        Verb::MergeIndex(arguments) => merge_index::run(arguments, &mut context),
        Verb::Plan(arguments) => plan::run(arguments, &mut context),
        Verb::Codecs(_) => Ok(codecs::run(&mut context)),
        Verb::Devices(_) => Ok(devices::run(&mut context)),
        Verb::Completions(arguments) => Ok(completions::run(arguments, &mut context)),
        Verb::Man(arguments) => man::run(arguments, &mut context),
    });
    let code = match result {
        Ok(Outcome::Done) => 0,
        Ok(Outcome::FoundWrong) => 1,
        Err(Error::Interrupted) => return signals.exit_code().unwrap_or(2),
        Err(e) => return fail(&e),
    };
    if !cli.common.quiet
        && let Err(e) = io::stdout().lock().write_all(&context.out)
        && e.kind() != io::ErrorKind::BrokenPipe
    {
        return fail(&Error::io("standard output", e));
    }
    code
}

/// Says what went wrong, in one paragraph.
fn fail(error: &Error) -> u8 {
    // Nobody is left to tell when standard error is closed too.
    drop(writeln!(io::stderr().lock(), "tenpak: {error}"));
    2
}
