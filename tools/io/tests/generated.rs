//! Manual page and shell completions are generated from the program's definition, and kept in the tree, since packages are
//! built from it. This keeps them as they would be generated now; TRELLIS_BLESS=1 writes them.

#![expect(clippy::unwrap_used, reason = "a test stops where its machine fails it")]

use std::path::Path;

use clap::{Arg, ArgAction, Command, ValueHint};
use clap_complete::Shell;
use clap_mangen::Man;
use trellis_image::args::Opt;
use trellis_io::{DEFINITION, NAME, commands};

#[test]
fn manual_and_completions_say_what_the_program_takes() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    for (name, fresh) in generated() {
        let path = top.join(name);
        if std::env::var_os("TRELLIS_BLESS").is_some() {
            std::fs::write(&path, &fresh).unwrap();
        }
        let kept = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(kept == fresh, "{name} is not what the definition makes now: run this test with TRELLIS_BLESS=1");
    }
}

fn generated() -> Vec<(&'static str, String)> {
    let shell = |shell: Shell| {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut program(), NAME, &mut script);
        String::from_utf8(script).unwrap()
    };
    vec![
        ("packaging/man/trellis-io.1", manual()),
        ("packaging/completions/trellis-io.bash", shell(Shell::Bash)),
        ("packaging/completions/_trellis-io", shell(Shell::Zsh)),
        ("packaging/completions/trellis-io.fish", shell(Shell::Fish)),
    ]
}

/// The options, and the commands of the prompt.
fn manual() -> String {
    let mut page = Vec::new();
    Man::new(program()).render(&mut page).unwrap();
    let mut page = String::from_utf8(page).unwrap();
    page.push_str(".SH COMMANDS\nOf the prompt, and of \\fB\\-c\\fR; \\fBhelp\\fR \\fICOMMAND\\fR says more.\n");
    for (usage, summary) in commands() {
        page.push_str(&format!(".TP\n{}\n{}\n", plain(&usage), plain(summary)));
    }
    page.push_str(
        ".SH EXIT STATUS\n1 if a command failed, or if a read did not find the pattern that it was told to, else 0.\n",
    );
    page
}

/// As troff shows it as it is.
fn plain(text: &str) -> String {
    text.replace('\\', "\\e").replace('-', "\\-")
}

fn program() -> Command {
    let about = DEFINITION.about;
    let more = "trellis-io does what qemu-io does, with the same options, commands, words and exit codes. It guesses the format \
                of an image where none is given, and opens what an image names. Without -c it asks for commands.";
    let word = Arg::new("words").value_name("FILE").num_args(0..=1).value_hint(ValueHint::FilePath);
    Command::new(NAME)
        .about(about)
        .long_about(format!("{about}. {more}"))
        .args(DEFINITION.options.iter().map(argument))
        .arg(word)
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
fn the_definition_is_consistent() {
    program().debug_assert();
}
