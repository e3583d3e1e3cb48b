//! `trellis-img`: images at the shell, with the sub-commands, options, output and exit codes of `qemu-img`.
//!
//! `commands` has a line for each sub-command and a file for what it does; `output` is how JSON, sizes and nodes are shown.
//! Images are opened and worked on through `trellis-image`: nothing here knows a format's bytes.

pub mod commands;
mod output;

use std::ffi::OsString;
use std::fmt::Write;
use std::path::Path;
use std::process::ExitCode;

use trellis_image::args::{Args, Definition, Read, flag, option};
use trellis_image::{Failure, Outcome, Progress, Session, complain, say};

use crate::commands::{COMMANDS, Subcommand};

/// The name that the program has where nobody calls it otherwise.
pub const NAME: &str = "trellis-img";

/// Runs the program: its name first, then its arguments.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut arguments = arguments.into_iter();
    let program = arguments.next().unwrap_or_default();
    let program = Path::new(&program).file_name().map_or(NAME.into(), |name| name.to_string_lossy()).into_owned();
    let words: Result<Vec<String>, _> = arguments.map(OsString::into_string).collect();
    let Ok(words) = words else { return fail(&program, "", &Failure::new("The command line is not UTF-8")) };
    match standard(&program, &words) {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some((command, rest))) => match perform(&program, command, rest) {
            Ok(code) => ExitCode::from(code),
            Err(failure) => fail(&program, command.definition.name, &failure),
        },
        Err(failure) => fail(&program, "", &failure),
    }
}

fn fail(program: &str, command: &str, failure: &Failure) -> ExitCode {
    complain(&failure.lines(program, command));
    ExitCode::from(failure.code)
}

/// What stands before the command. Nothing is traced; scripts may say it all the same.
const STANDARD: Definition = Definition {
    name: "",
    about: "",
    options: &[
        flag('V', "version", "say which version it is"),
        option('T', "trace", "EVENTS", "taken, without effect"),
    ],
    words: "",
};

/// Options before the command; `None`: what was asked for has been printed.
fn standard<'w>(program: &str, words: &'w [String]) -> Result<Option<(&'static Subcommand, &'w [String])>, Failure> {
    let mut rest = words.iter();
    while let Some(word) = rest.as_slice().first().filter(|word| word.len() > 1 && word.starts_with('-')) {
        rest.next();
        if word == "--" {
            break;
        }
        let mut args = Args::default();
        let asks_for_help = STANDARD.option(word, &mut rest, &mut args);
        if args.has("version") {
            say(&format!("{program} version {}\n", env!("CARGO_PKG_VERSION")));
            return Ok(None);
        }
        if asks_for_help.map_err(|failure| Failure { names_command: false, ..failure })? {
            say(&help(program));
            return Ok(None);
        }
    }
    let Some((name, rest)) = rest.as_slice().split_first() else { return Err(Failure::usage("Not enough arguments")) };
    let found = COMMANDS.iter().find(|command| command.definition.name == name);
    let unknown = || Failure::usage(format!("Command not found: {name}"));
    Ok(Some((found.ok_or_else(unknown)?, rest)))
}

fn perform(program: &str, command: &'static Subcommand, words: &[String]) -> Outcome {
    let read = match command.takes_numbers {
        true => command.definition.read_with_numbers(words)?,
        false => command.definition.read(words)?,
    };
    match read {
        Read::Help => {
            say(&command.definition.help(program));
            Ok(0)
        }
        Read::Run(args) => {
            Progress::block_signal()?;
            Session::run(program, async |session| (command.run)(session, args).await)
        }
    }
}

fn help(program: &str) -> String {
    let mut page = format!(
        "{program} makes, inspects and changes disk images.\n\nUsage: {program} [-h | -V] COMMAND [--help | OPTIONS]\n\n\
         Commands:\n"
    );
    for command in COMMANDS {
        let _ = writeln!(page, "  {:<10} {}", command.definition.name, command.definition.about);
    }
    page.push_str("\nFormats: ");
    page.push_str(&block_core::catalog::drivers().join(" "));
    page.push('\n');
    page
}
