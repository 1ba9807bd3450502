//! `caponier generate`: manual pages and shell completions, made of the same words as `--help`. For packagers, and so hidden.
//!
//! Promised: every command that is not hidden has a page, with its examples as they stand in its help; pages and completions
//! are the same at each run of one version.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::CommandFactory;
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};

use super::{Cli, Exit, print};

/// Write manual pages or shell completions, for whoever makes packages.
#[derive(Debug, clap::Args)]
#[command(hide = true)]
#[command(after_help = "\
Example:
  caponier generate man /usr/share/man/man1
  caponier generate completions bash >/usr/share/bash-completion/completions/caponier")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Man(ManArgs),
    Completions(CompletionsArgs),
}

/// Write a manual page for every command into a folder, which is made if it is not there.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier generate man man1 && man -l man1/caponier-keys.1")]
struct ManArgs {
    /// The folder. Pages that are there already are replaced.
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

/// Print what a shell needs to complete commands, options and their values.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  . <(caponier generate completions bash)
  caponier generate completions zsh >/usr/share/zsh/vendor-completions/_caponier
  caponier generate completions fish >~/.config/fish/completions/caponier.fish")]
struct CompletionsArgs {
    /// Which shell.
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

/// Runs the command.
///
/// # Errors
/// If the folder or a page cannot be written, or standard output takes no more.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    match args.command {
        Command::Man(args) => pages(&args.dir)?,
        Command::Completions(args) => print(&completions(args.shell))?,
    }
    Ok(Exit::Done.into())
}

fn completions(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut visible(&Cli::command()), "caponier", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// The same without the hidden commands, which completions would offer otherwise.
fn visible(command: &clap::Command) -> clap::Command {
    clap::Command::new("caponier")
        .version(env!("CARGO_PKG_VERSION"))
        .args(command.get_arguments())
        .subcommands(command.get_subcommands().filter(|each| !each.is_hide_set()))
}

fn pages(dir: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("could not make the folder {}", dir.display()))?;
    for (name, text) in render_all(Cli::command())? {
        let path = dir.join(name);
        fs::write(&path, text).with_context(|| format!("could not write the page {}", path.display()))?;
    }
    Ok(())
}

/// The name of each page's file, and its text.
fn render_all(command: clap::Command) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut command = command.disable_help_subcommand(true);
    // Gives every subcommand its full name.
    command.build();
    let mut pages = Vec::new();
    let mut waiting = vec![command];
    while let Some(command) = waiting.pop() {
        waiting.extend(command.get_subcommands().filter(|each| !each.is_hide_set()).cloned());
        pages.push(render(command)?);
    }
    Ok(pages)
}

fn render(command: clap::Command) -> io::Result<(String, Vec<u8>)> {
    let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let (options, subcommands) = (command.get_arguments().next().is_some(), command.has_subcommands());
    let man = Man::new(command);
    let name = man.get_filename();
    let mut page = Vec::new();
    // The library leaves an empty date out, and what follows would be taken for it.
    let title = name.trim_end_matches(".1").to_uppercase();
    writeln!(page, ".TH {title} 1 \"\" \"caponier {}\" Caponier", env!("CARGO_PKG_VERSION"))?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    if options {
        man.render_options_section(&mut page)?;
    }
    if subcommands {
        man.render_subcommands_section(&mut page)?;
    }
    notes(&after).to_writer(&mut page)?;
    Ok((name, page))
}

/// What stands below the options in a help: paragraphs, and lines that are indented, which stay as they are. The library would
/// fill those too.
fn notes(text: &str) -> Roff {
    let mut page = Roff::new();
    let mut verbatim = false;
    for (at, line) in text.lines().enumerate() {
        let indented = line.starts_with("  ");
        if verbatim && !indented {
            page.control("EE", []).control("RE", []);
            verbatim = false;
        }
        if at == 0 {
            let heading = if line == "Example:" { "EXAMPLES" } else { "NOTES" };
            page.control("SH", [heading]);
            if line == "Example:" {
                continue;
            }
        }
        if indented && !verbatim {
            page.control("RS", ["4"]).control("EX", []);
            verbatim = true;
        }
        match line {
            "" => page.control("PP", []),
            _ => page.text([roman(line.strip_prefix("  ").unwrap_or(line))]),
        };
    }
    if verbatim {
        page.control("EE", []).control("RE", []);
    }
    page
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn every_command_that_is_shown_has_a_page_with_its_examples() {
        fn check(name: &str, command: &clap::Command, pages: &mut BTreeMap<String, String>) {
            let page = pages.remove(&format!("{name}.1")).unwrap_or_else(|| panic!("{name} has no page"));
            assert!(page.contains(".SH EXAMPLES\n.RS 4\n.EX\n"), "the page of {name} has no example: {page}");
            for below in command.get_subcommands().filter(|each| !each.is_hide_set() && each.get_name() != "help") {
                check(&format!("{name}-{}", below.get_name()), below, pages);
            }
        }
        let pages = render_all(Cli::command()).expect("pages");
        let mut pages: BTreeMap<_, _> =
            pages.into_iter().map(|(name, page)| (name, String::from_utf8(page).expect("UTF-8"))).collect();
        check("caponier", &Cli::command(), &mut pages);
        assert!(pages.is_empty(), "pages of no command, or of a hidden one: {:?}", pages.keys());
    }

    #[test]
    fn hidden_commands_are_not_offered() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = completions(shell);
            assert!(script.contains("kubeconfig"), "{shell}");
            assert!(!script.contains("completions"), "{shell}");
        }
    }
}
