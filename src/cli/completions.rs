//! `tenpak completions`: completions for a shell.

use clap::{Args, CommandFactory};

use super::{Cli, Context, Outcome};

/// Print completions for a shell
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// The shell
    shell: clap_complete::Shell,
}

pub(super) fn run(arguments: &Arguments, context: &mut Context<'_>) -> Outcome {
    clap_complete::generate(arguments.shell, &mut Cli::command(), "tenpak", &mut context.out);
    Outcome::Done
}
