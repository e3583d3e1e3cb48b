//! Manual page and shell completions are generated from the definitions of the sub-commands, and kept in the tree, since
//! packages are built from it. This keeps them as they would be generated now; TRELLIS_BLESS=1 writes them.

#![expect(clippy::unwrap_used, reason = "a test stops where its machine fails it")]

use std::path::Path;

use clap::{Arg, ArgAction, Command, ValueHint};
use clap_complete::Shell;
use clap_mangen::Man;
use trellis_image::args::{Definition, Opt};
use trellis_img::NAME;
use trellis_img::commands::COMMANDS;

#[test]
fn manual_and_completions_say_what_the_program_takes() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    for (name, fresh) in generated() {
        let path = top.join(name);
        if std::env::var_os("TRELLIS_BLESS").is_some() {
            std::fs::write(&path, &fresh).unwrap();
        }
        let kept = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(kept == fresh, "{name} is not what the definitions make now: run this test with TRELLIS_BLESS=1");
    }
}

fn generated() -> Vec<(&'static str, String)> {
    let shell = |shell: Shell| {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut program(), NAME, &mut script);
        String::from_utf8(script).unwrap()
    };
    vec![
        ("packaging/man/trellis-img.1", manual()),
        ("packaging/completions/trellis-img.bash", shell(Shell::Bash)),
        ("packaging/completions/_trellis-img", shell(Shell::Zsh)),
        ("packaging/completions/trellis-img.fish", shell(Shell::Fish)),
    ]
}

/// One page for all sub-commands.
fn manual() -> String {
    let mut page = Vec::new();
    Man::new(program()).render(&mut page).unwrap();
    let mut page = String::from_utf8(page).unwrap();
    for command in program().get_subcommands() {
        let mut part = Vec::new();
        let man = Man::new(command.clone().bin_name(format!("{NAME} {}", command.get_name())));
        man.render_synopsis_section(&mut part).unwrap();
        man.render_description_section(&mut part).unwrap();
        man.render_options_section(&mut part).unwrap();
        let part = String::from_utf8(part).unwrap().replace("\n.SH ", "\n.SS ").replace(".SH SYNOPSIS", "");
        page.push_str(&format!(".SH {NAME} {}\n{part}", command.get_name()));
    }
    page
}

fn program() -> Command {
    let about = "Makes, inspects and changes disk images";
    let more = "trellis-img does what qemu-img does, with the same sub-commands, options, output and exit codes. It guesses the \
                format of an image where none is given, and opens what an image names.";
    let commands = COMMANDS.iter().map(|command| subcommand(command.definition));
    Command::new(NAME)
        .version(env!("CARGO_PKG_VERSION"))
        .about(about)
        .long_about(format!("{about}. {more}"))
        .subcommand_required(true)
        .disable_help_subcommand(true)
        .subcommands(commands)
}

fn subcommand(definition: &Definition) -> Command {
    let word = Arg::new("words").value_name(definition.words).num_args(0..).value_hint(ValueHint::FilePath);
    Command::new(definition.name).about(definition.about).args(definition.options.iter().map(argument)).arg(word)
}

fn argument(opt: &Opt) -> Arg {
    let mut argument = Arg::new(opt.id).help(opt.help).action(ArgAction::Append);
    if let Some(short) = opt.short {
        argument = argument.short(short);
    }
    if let Some(long) = opt.long {
        argument = argument.long(long);
    }
    match opt.value {
        Some(value) => argument.value_name(value).value_hint(ValueHint::Other),
        None => argument.action(ArgAction::SetTrue),
    }
}

#[test]
fn the_definitions_are_consistent() {
    program().debug_assert();
}
