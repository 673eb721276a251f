//! `tenpak man`: the manual, a page for each verb.

use std::path::PathBuf;

use clap::{Args, CommandFactory};

use super::report::thousands;
use super::{Cli, Context, Outcome};
use crate::error::{Error, Result};
use crate::output::OutputFile;

/// Write the manual, tenpak.1 and a page for each verb
#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// Directory for the pages, such as ~/.local/share/man/man1
    directory: PathBuf,
    /// Replace existing pages
    #[arg(long)]
    force: bool,
}

pub(super) fn run(arguments: &Arguments, context: &mut Context<'_>) -> Result<Outcome> {
    let directory = &arguments.directory;
    std::fs::create_dir_all(directory).map_err(|e| Error::io(directory, e))?;
    let mut command = Cli::command();
    // Without this, pages of verbs lack what every verb understands and are called by the verb alone.
    command.build();
    let verbs = command.get_subcommands().filter(|verb| verb.get_name() != "help").cloned();
    let pages: Vec<_> = std::iter::once(command.clone()).chain(verbs).map(clap_mangen::Man::new).collect();
    for page in pages {
        let path = directory.join(page.get_filename());
        let mut text = Vec::new();
        page.render(&mut text).map_err(|e| Error::io(&path, e))?;
        let bytes = text.len() as u64;
        let file = OutputFile::create(&path, arguments.force)?;
        file.write_at(0, &text)?;
        file.commit(bytes)?;
        context.line(format!("wrote {}: {} bytes", path.display(), thousands(bytes)));
    }
    Ok(Outcome::Done)
}
