//! `trellis-io`: reads and writes disk images by hand, with the commands, the words and the exit codes of `qemu-io`.
//!
//! `command` is the language of the prompt, `shell` carries it out, `opening` opens images, `requests` and `stops` are about
//! requests, `report` is what is printed.

mod command;
mod opening;
mod report;
mod requests;
mod shell;
mod stops;

use std::ffi::OsString;
use std::process::ExitCode;

use trellis_image::args::{Args, Definition, Read, flag, long_flag, long_option, option};
use trellis_image::{Failure, FileName, Session, add_object, complain, say};

use crate::command::Manner;
use crate::opening::Wanted;
use crate::requests::Misaligned;
use crate::shell::Shell;

/// The name that the program has where nobody calls it otherwise.
pub const NAME: &str = "trellis-io";

/// What it takes.
pub const DEFINITION: Definition = Definition {
    name: "",
    about: "Reads and writes disk images by hand",
    options: &[
        long_option("object", "OBJECTDEF", "make an object that nodes refer to"),
        long_flag("image-opts", "FILE is a list of options, as in driver=qcow2,file.filename=a.img"),
        option('c', "cmd", "STRING", "carry out a command, and do not ask for others"),
        option('f', "format", "FMT", "the image's format, which is guessed otherwise"),
        flag('r', "read-only", "only read"),
        flag('s', "snapshot", "write to an overlay that is thrown away"),
        flag('n', "nocache", "past the host's cache, as -t none"),
        flag('C', "copy-on-read", "copy what is read from below into the image"),
        flag('m', "misalign", "buffers that are aligned to nothing"),
        flag('k', "native-aio", "as -i native"),
        option('i', "aio", "MODE", "threads, native or io_uring: accepted, the runtime chooses"),
        option('t', "cache", "MODE", "how the host caches: none, writeback, unsafe, directsync, writethrough"),
        option('d', "discard", "MODE", "what becomes of discards: ignore or unmap"),
        flag('U', "force-share", "whatever other programs do with the image"),
        flag('V', "version", "print the version and end"),
    ],
    words: "[FILE]",
};

/// The commands of its prompt: how each is called, and what it does, in a line.
pub fn commands() -> impl Iterator<Item = (String, &'static str)> {
    command::COMMANDS.iter().map(|spec| (spec.usage(), spec.summary))
}

/// Runs the program: its name first, then its arguments.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let mut arguments = arguments.into_iter().map(|argument| argument.to_string_lossy().into_owned());
    let called = arguments.next().unwrap_or_default();
    let program = called.rsplit('/').next().unwrap_or_default().to_owned();
    let arguments: Vec<_> = arguments.collect();
    match DEFINITION.read(&arguments) {
        Ok(Read::Help) => {
            say(&page(&program));
            ExitCode::SUCCESS
        }
        Ok(Read::Run(args)) => obey(&program, &args),
        Err(failure) => {
            complain(&format!("{program}: {}\n", failure.text));
            say(&page(&program));
            ExitCode::FAILURE
        }
    }
}

fn obey(program: &str, args: &Args) -> ExitCode {
    if args.has("version") {
        say(&format!("{program} version {}\n", env!("CARGO_PKG_VERSION")));
        return ExitCode::SUCCESS;
    }
    let is_good = Session::run(program, async |session| {
        let mut shell = Shell::new(session, Misaligned(args.has("misalign")));
        let mut manner = Manner::default();
        for (id, value) in args.given() {
            let letter = DEFINITION.options.iter().find(|option| option.id == id).and_then(|option| option.short);
            if let Some(letter) = letter.filter(|letter| "rsnCkitdU".contains(*letter))
                && let Err(refusal) = manner.hear(letter, value)
            {
                shell.refuse(&refusal);
                return false;
            }
        }
        let wanted = match wanted(args, manner) {
            Ok(wanted) => wanted,
            Err(Failure { text, .. }) if text.is_empty() => {
                say(&page(program));
                return false;
            }
            Err(failure) => {
                session.complain(&failure.text);
                return false;
            }
        };
        for object in args.all("object") {
            if let Err(error) = add_object(session, object).await {
                session.complain(&error.full());
                return false;
            }
        }
        if let Some(wanted) = wanted
            && shell.open(wanted).await.is_err()
        {
            return false;
        }
        let commands: Vec<_> = args.all("cmd").collect();
        shell.run(commands.into_iter()).await
    });
    if is_good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The image on the command line; an error without a text is one that the help page answers.
fn wanted(args: &Args, manner: Manner) -> Result<Option<Wanted>, Failure> {
    let format = args.get("format").map(str::to_owned);
    if format.is_some() && args.has("image-opts") {
        return Err(Failure::new("--image-opts and -f are mutually exclusive"));
    }
    let name = match &args.words[..] {
        [] => return Ok(None),
        [options] if args.has("image-opts") => FileName::Options(options.clone()),
        [name] => FileName::Name(name.clone()),
        _ => return Err(Failure::new("")),
    };
    let label = matches!(name, FileName::Name(_)).then(|| name.text().to_owned());
    Ok(Some(Wanted { label, name, format, manner }))
}

fn page(program: &str) -> String {
    let options = DEFINITION.help(program);
    format!("{options}\nSee '{program} -c help' for the commands.\n")
}
