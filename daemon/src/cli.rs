//! The command line: its definition, and the order in which it is to be obeyed.
//!
//! The first pass ([`parse`]) takes out what concerns the process itself (help, version, `--daemonize`, `--pidfile`,
//! logging); everything else becomes a list of [`Step`]s, strictly in the order of the command line. What a step's
//! argument means is read when its turn comes, by the code that QMP uses too. Manual page and shell completions are
//! generated from [`definition`].

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, ArgAction, ArgMatches, Command, ValueHint};

use crate::log::{self, LogTarget};

/// What the command line asks for.
#[derive(Debug)]
pub enum Invocation {
    /// Print this and end well.
    Print(String),
    /// Run.
    Run(Box<Plan>),
}

/// A run of the daemon.
#[derive(Debug, Default)]
pub struct Plan {
    /// Go on in the background; the foreground ends once everything is set up.
    pub daemonize: bool,
    /// Where the process id is to be written, last of all.
    pub pidfile: Option<PathBuf>,
    /// Where log lines go.
    pub log: LogTarget,
    /// Filters for the log, in order.
    pub traces: Vec<String>,
    /// The rest, in order.
    pub steps: Vec<Step>,
}

/// One option that sets something up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Which option.
    pub option: StepOption,
    /// Its argument as it was written.
    pub text: String,
}

/// The options that set something up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepOption {
    /// Adds a node.
    Blockdev,
    /// Adds a character device: where a monitor listens.
    Chardev,
    /// Adds an export.
    Export,
    /// Adds a monitor on a character device.
    Monitor,
    /// Starts the NBD server.
    NbdServer,
    /// Adds an object.
    Object,
    /// A character device and a monitor in one.
    Qmp,
}

impl StepOption {
    const ALL: [Self; 7] =
        [Self::Blockdev, Self::Chardev, Self::Export, Self::Monitor, Self::NbdServer, Self::Object, Self::Qmp];

    /// The option's name without its dashes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Blockdev => "blockdev",
            Self::Chardev => "chardev",
            Self::Export => "export",
            Self::Monitor => "monitor",
            Self::NbdServer => "nbd-server",
            Self::Object => "object",
            Self::Qmp => "qmp",
        }
    }
}

impl std::fmt::Display for Step {
    /// An object may be a secret, however it is written, and is not shown.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.option {
            StepOption::Object => write!(f, "--{}", self.option.name()),
            option => write!(f, "--{} {}", option.name(), self.text),
        }
    }
}

/// Reads the command line, program name first. An error is the sentence to print.
pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Invocation, String> {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let matches = match definition().try_get_matches_from(&arguments) {
        Ok(matches) => matches,
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            return Ok(Invocation::Print(error.to_string()));
        }
        Err(error) if error.kind() == ErrorKind::InvalidUtf8 => return Err(no_text(&arguments)),
        Err(error) => return Err(sentence(&error)),
    };
    if texts(&matches, "trace").any(|(_, text)| log::asks_for_help(&text)) {
        return Ok(Invocation::Print(log::TRACE_HELP.to_owned()));
    }
    let log = matches.get_one::<LogTarget>("log").copied().unwrap_or_default();
    Ok(Invocation::Run(Box::new(Plan {
        daemonize: matches.get_flag("daemonize"),
        pidfile: matches.get_one::<PathBuf>("pidfile").cloned(),
        log,
        traces: texts(&matches, "trace").map(|(_, text)| text).collect(),
        steps: steps(&matches),
    })))
}

/// The command line's definition.
pub fn definition() -> Command {
    Command::new("trellisd")
        .about("A storage daemon for virtual machines")
        .long_about(
            "trellisd serves virtual disks to virtual machines over vhost-user-blk sockets, and is controlled through \
             a QMP socket. Its options are those of qemu-storage-daemon and are obeyed in the order in which they \
             stand. Without any option it serves a scratch disk that it makes itself.",
        )
        .version(crate::VERSION)
        .disable_version_flag(true)
        .infer_long_args(true)
        .args([
            setup(StepOption::Blockdev, "[driver=]DRIVER,node-name=NAME,...")
                .help("Add a node to the block graph (keyval or JSON; `help`, or `DRIVER,help`, lists the options)"),
            setup(StepOption::Chardev, "socket,id=ID,path=PATH,server=on,wait=off").help(
                "Add a character device for a monitor: a unix socket, one that was inherited (fd=), stdio, or null",
            ),
            setup(StepOption::Export, "[type=]vhost-user-blk,id=ID,node-name=NAME,addr.type=unix,addr.path=PATH,...")
                .help("Export a node (keyval or JSON; `help` lists the options)"),
            setup(StepOption::Monitor, "[chardev=]ID[,mode=control][,pretty=on|off]")
                .help("Serve QMP on a character device"),
            setup(StepOption::NbdServer, "addr.type=unix,addr.path=PATH")
                .help("Not there yet: it is refused with a sentence"),
            setup(StepOption::Object, "[qom-type=]TYPE,id=ID,...")
                .help("Add an object (keyval or JSON; `help`, or `TYPE,help`, lists the options)"),
            setup(StepOption::Qmp, "PATH|fd:NAME")
                .value_hint(ValueHint::FilePath)
                .help("Serve QMP on a unix socket: short for --chardev and --monitor"),
        ])
        .args([
            Arg::new("daemonize")
                .long("daemonize")
                .action(ArgAction::SetTrue)
                .overrides_with("daemonize")
                .help("Go to the background; the foreground process ends once everything is set up"),
            Arg::new("pidfile")
                .long("pidfile")
                .value_name("PATH")
                .value_hint(ValueHint::FilePath)
                .value_parser(clap::value_parser!(PathBuf))
                .overrides_with("pidfile")
                .help("Write the process id to PATH when everything is set up, locked, and removed at the end"),
            Arg::new("log")
                .long("log")
                .value_name("TARGET")
                .value_parser(LogTarget::from_word)
                .overrides_with("log")
                .help("Where log lines go: auto (the journal under systemd, else stderr), stderr, json, journald, off"),
            Arg::new("trace")
                .long("trace")
                .short('T')
                .value_name("[enable=]FILTER")
                .action(ArgAction::Append)
                .help("Log more, as `trellisd::control=debug`; may stand several times; `help` lists the targets"),
            Arg::new("version").long("version").short('V').action(ArgAction::Version).help("Print the version and end"),
        ])
}

fn setup(option: StepOption, value: &'static str) -> Arg {
    Arg::new(option.name())
        .long(option.name())
        .value_name(value)
        .action(ArgAction::Append)
        .allow_hyphen_values(true)
        .value_hint(ValueHint::Other)
}

fn steps(matches: &ArgMatches) -> Vec<Step> {
    let of =
        |option: StepOption| texts(matches, option.name()).map(move |(index, text)| (index, Step { option, text }));
    let mut steps: Vec<_> = StepOption::ALL.into_iter().flat_map(of).collect();
    steps.sort_by_key(|(index, _)| *index);
    steps.into_iter().map(|(_, step)| step).collect()
}

fn texts<'m>(matches: &'m ArgMatches, name: &'static str) -> impl Iterator<Item = (usize, String)> + 'm {
    let indices = matches.indices_of(name).into_iter().flatten();
    let texts = matches.get_many::<String>(name).into_iter().flatten().cloned();
    indices.zip(texts)
}

/// Which option's argument is not UTF-8: clap does not say it. A pid file may have any name.
fn no_text(arguments: &[OsString]) -> String {
    let before = std::iter::once(None).chain(arguments.iter().map(Some));
    let culprit = arguments.iter().zip(before).find_map(|(argument, before)| {
        if argument.to_str().is_some() || before.is_some_and(|before| before == "--pidfile") {
            return None;
        }
        let bytes = argument.as_bytes();
        let own = bytes.starts_with(b"-").then(|| bytes.split(|byte| *byte == b'=').next().unwrap_or_default());
        let name = own.or(before.map(|before| before.as_bytes())).unwrap_or_default();
        Some(String::from_utf8_lossy(name).into_owned())
    });
    match culprit {
        Some(name) if name.starts_with('-') => format!("option '{name}' expects an argument in UTF-8"),
        _ => "the command line is not UTF-8".to_owned(),
    }
}

/// What went wrong, in the words that scripts around qemu-storage-daemon know.
fn sentence(error: &clap::Error) -> String {
    let of = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.clone(),
        _ => String::new(),
    };
    let argument = of(ContextKind::InvalidArg);
    // A value's name stands behind an option's.
    let option = argument.split(' ').next().unwrap_or_default();
    match error.kind() {
        ErrorKind::UnknownArgument if argument.starts_with('-') => format!("unrecognized option '{argument}'"),
        ErrorKind::UnknownArgument => format!("{argument}: Unexpected argument"),
        ErrorKind::InvalidValue if of(ContextKind::InvalidValue).is_empty() => {
            format!("option '{option}' requires an argument")
        }
        ErrorKind::InvalidValue | ErrorKind::ValueValidation => {
            format!("option '{option}' does not accept value '{}'", of(ContextKind::InvalidValue))
        }
        ErrorKind::TooManyValues => format!("option '{option}' takes no argument"),
        _ => error.to_string().lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(words: &[&str]) -> Result<Invocation, String> {
        parse(std::iter::once("trellisd").chain(words.iter().copied()).map(OsString::from))
    }

    fn plan(words: &[&str]) -> Plan {
        match read(words) {
            Ok(Invocation::Run(plan)) => *plan,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn steps_keep_the_order_of_the_command_line() {
        let plan = plan(&[
            "--object",
            "iothread,id=a",
            "--blockdev=null-co,node-name=n",
            "--pidfile",
            "x.pid",
            "--object",
            "iothread,id=b",
            "--qmp",
            "q.sock",
            "--blockdev",
            "{\"driver\":\"raw\",\"file\":\"n\",\"node-name\":\"r\"}",
        ]);
        let steps: Vec<_> = plan.steps.iter().map(|step| format!("--{} {}", step.option.name(), step.text)).collect();
        assert_eq!(
            steps,
            [
                "--object iothread,id=a",
                "--blockdev null-co,node-name=n",
                "--object iothread,id=b",
                "--qmp q.sock",
                "--blockdev {\"driver\":\"raw\",\"file\":\"n\",\"node-name\":\"r\"}",
            ]
        );
        assert_eq!(plan.pidfile.as_deref(), Some(std::path::Path::new("x.pid")));
    }

    #[test]
    fn objects_are_not_shown() {
        let plan =
            plan(&["--object", "{\"qom-type\":\"secret\",\"d\\u0061ta\":\"marker\"}", "--object", "secret,dta=marker"]);
        assert!(plan.steps.iter().all(|step| step.to_string() == "--object"));
    }

    #[test]
    fn what_stands_before_and_after_does_not_matter_to_the_first_pass() {
        let plan = plan(&["--blockdev", "null-co,node-name=n", "--daemonize", "-T", "a=debug", "--trace", "b=info"]);
        assert!(plan.daemonize);
        assert_eq!(plan.traces, ["a=debug", "b=info"]);
        assert_eq!(plan.steps.len(), 1);
    }

    #[test]
    fn who_asks_for_the_background_twice_gets_it() {
        assert!(plan(&["--daemonize", "--daemonize"]).daemonize);
    }

    #[test]
    fn errors_are_sentences() {
        let refused = |words: &[&str]| read(words).unwrap_err();
        assert_eq!(refused(&["foo"]), "foo: Unexpected argument");
        assert_eq!(refused(&["--zzz"]), "unrecognized option '--zzz'");
        assert_eq!(refused(&["--blockdev"]), "option '--blockdev' requires an argument");
        assert_eq!(refused(&["--log", "printer"]), "option '--log' does not accept value 'printer'");
    }

    #[test]
    fn help_and_version_are_printed() {
        assert!(matches!(read(&["--help"]), Ok(Invocation::Print(text)) if text.contains("--blockdev")));
        assert!(matches!(read(&["-V"]), Ok(Invocation::Print(text)) if text.starts_with("trellisd ")));
    }

    #[test]
    fn the_definition_is_consistent() {
        definition().debug_assert();
    }
}
