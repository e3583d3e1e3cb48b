//! The language of the prompt: a line in, a [`Command`] or a [`Refusal`] out. Nothing here opens, reads or writes anything.
//!
//! `table` has what there is to say, `getopt` and `number` read the pieces, `transfer` and `image` the longer commands. Words
//! and the order in which mistakes are found are those of `qemu-io`, because scripts compare them.

mod getopt;
mod image;
mod number;
mod table;
mod transfer;

use self::getopt::Getopt;
pub(crate) use self::image::{Manner, Open, Reopen};
pub(crate) use self::table::{COMMANDS, Needs, Spec};
pub(crate) use self::transfer::{Fill, Read, Verify, Write};

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Read(Read),
    Write(Write),
    AioRead(Read),
    AioWrite(Write),
    /// A request that is counted as one that makes no sense.
    AioInvalid {
        write: bool,
    },
    AioFlush,
    Flush,
    Discard {
        at: u64,
        len: u64,
        report: Report,
    },
    Alloc {
        at: u64,
        len: u64,
    },
    Map,
    Truncate {
        size: u64,
        preallocation: String,
    },
    Length,
    Info,
    Open(Open),
    Close,
    Reopen(Reopen),
    /// Milliseconds.
    Sleep(u64),
    Sigraise,
    Abort,
    Break {
        event: String,
        tag: String,
    },
    Resume(String),
    RemoveBreak(String),
    WaitBreak(String),
    /// What is done to a zone, in a word.
    Zone(&'static str),
    Help(Option<String>),
    Quit,
}

/// What is said of a request that went well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Report {
    /// Nothing (`-q`).
    Quiet,
    /// Two lines for people.
    #[default]
    Lines,
    /// One line of numbers (`-C`).
    Numbers,
}

impl Report {
    fn new(quiet: bool, numbers: bool) -> Self {
        match (quiet, numbers) {
            (true, _) => Self::Quiet,
            (false, true) => Self::Numbers,
            (false, false) => Self::Lines,
        }
    }
}

/// Why a line is no command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// How the command is called, for the standard output.
    Usage(&'static Spec),
    /// A sentence for the error output, and then how the command is called.
    BadOption(String, &'static Spec),
    /// A sentence for the standard output.
    Said(String),
    /// A sentence for the error output.
    Complained(String),
    /// The same behind the name of the program.
    Named(String),
}

/// The words of a line. Only spaces separate them: nothing is quoted.
pub(crate) fn words(line: &str) -> Vec<&str> {
    line.split(' ').filter(|word| !word.is_empty()).collect()
}

impl Spec {
    /// The command that a word names.
    pub(crate) fn named(word: &str) -> Result<&'static Self, Refusal> {
        let known = COMMANDS.iter().find(|spec| spec.name == word || spec.alias == Some(word));
        known.ok_or_else(|| Refusal::Complained(format!("command \"{word}\" not found")))
    }

    /// There are as many words as the command takes.
    pub(crate) fn check_count(&self, words: &[&str]) -> Result<(), Refusal> {
        let [name, given @ ..] = words else { return Ok(()) };
        let (least, most) = (self.least, self.most);
        if given.len() >= least && most.is_none_or(|most| given.len() <= most) {
            return Ok(());
        }
        let expected = match most {
            None => format!("at least {least}"),
            Some(most) if most == least => format!("{least}"),
            Some(most) => format!("between {least} and {most}"),
        };
        let text = format!("bad argument count {} to {name}, expected {expected} arguments", given.len());
        Err(Refusal::Complained(text))
    }

    /// Reads the words of a line, the first of which names this command.
    pub(crate) fn parse(&'static self, words: &[&str]) -> Result<Command, Refusal> {
        let given = words.get(1..).unwrap_or_default();
        let word = |number: usize| given.get(number).copied().unwrap_or_default();
        Ok(match self.name {
            "read" => Command::Read(transfer::read(self, words)?),
            "readv" => Command::Read(transfer::readv(self, words)?),
            "write" => Command::Write(transfer::write(self, words)?),
            "writev" => Command::Write(transfer::writev(self, words)?),
            "aio_read" => transfer::aio_read(self, words)?,
            "aio_write" => transfer::aio_write(self, words)?,
            "aio_flush" => Command::AioFlush,
            "flush" => Command::Flush,
            "discard" => self.discard(words)?,
            "alloc" => {
                let at = number::bytes(word(0))?;
                let len = given.get(1).map_or(Ok(SECTOR), |word| number::bytes(word))?;
                Command::Alloc { at, len }
            }
            "map" => Command::Map,
            "truncate" => self.truncate(words)?,
            "length" => Command::Length,
            "info" => Command::Info,
            "open" => Command::Open(image::open(self, words)?),
            "close" => Command::Close,
            "reopen" => Command::Reopen(image::reopen(self, words)?),
            "sleep" => Command::Sleep(number::milliseconds(word(0))?),
            "sigraise" => number::bytes(word(0)).map(|_| Command::Sigraise)?,
            "abort" => Command::Abort,
            "break" => Command::Break { event: word(0).to_owned(), tag: word(1).to_owned() },
            "resume" => Command::Resume(word(0).to_owned()),
            "remove_break" => Command::RemoveBreak(word(0).to_owned()),
            "wait_break" => Command::WaitBreak(word(0).to_owned()),
            "help" => Command::Help(given.first().map(|name| (*name).to_owned())),
            "quit" => Command::Quit,
            zone => {
                let what = zone.strip_prefix("zone_").expect("the table has no other names");
                given.iter().try_for_each(|number| number::bytes(number).map(drop))?;
                Command::Zone(what)
            }
        })
    }

    fn discard(&'static self, words: &[&str]) -> Result<Command, Refusal> {
        let (mut quiet, mut numbers) = (false, false);
        let mut options = Getopt::new("Cq", words);
        while let Some(option) = options.next(self)? {
            match option {
                ('C', _) => numbers = true,
                _ => quiet = true,
            }
        }
        let [at, len] = options.operands()[..] else { return Err(Refusal::Usage(self)) };
        let (at, bytes) = (number::bytes(at)?, number::bytes(len)?);
        if bytes > MOST_BYTES {
            return Err(Refusal::Said(format!("length cannot exceed {MOST_BYTES}, given {len}")));
        }
        Ok(Command::Discard { at, len: bytes, report: Report::new(quiet, numbers) })
    }

    /// Of several operands the first is taken, and what is wrong with it is said of the first word, as `qemu-io` does.
    fn truncate(&'static self, words: &[&str]) -> Result<Command, Refusal> {
        let mut preallocation = "off".to_owned();
        let mut options = Getopt::new("m:", words);
        while let Some((_, mode)) = options.next(self)? {
            if !PREALLOCATIONS.contains(&mode) {
                return Err(Refusal::Named(format!("Invalid preallocation mode '{mode}'")));
            }
            preallocation = mode.to_owned();
        }
        let named = words.get(1).copied().unwrap_or_default();
        let size = number::bytes_named(options.operands().first().copied().unwrap_or_default(), named)?;
        Ok(Command::Truncate { size, preallocation })
    }

    /// `name arguments`.
    pub(crate) fn usage(&self) -> String {
        self.arguments.map_or(self.name.to_owned(), |arguments| format!("{} {arguments}", self.name))
    }

    /// `name arguments -- summary`.
    pub(crate) fn synopsis(&self) -> String {
        format!("{} -- {}", self.usage(), self.summary)
    }
}

/// Bytes of one request at the most: what an `int` counts, in whole sectors.
const MOST_BYTES: u64 = 2_147_483_136;
const SECTOR: u64 = 512;
const PREALLOCATIONS: [&str; 4] = ["off", "metadata", "falloc", "full"];

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, Refusal> {
        let words = words(line);
        let spec = Spec::named(words[0])?;
        spec.check_count(&words)?;
        spec.parse(&words)
    }

    fn said(line: &str) -> String {
        match parsed(line).unwrap_err() {
            Refusal::Usage(spec) => format!("usage of {}", spec.name),
            Refusal::BadOption(text, spec) => format!("{text}, usage of {}", spec.name),
            Refusal::Said(text) => text,
            Refusal::Complained(text) => format!("! {text}"),
            Refusal::Named(text) => format!("!! {text}"),
        }
    }

    #[test]
    fn only_spaces_part_words() {
        assert_eq!(words("  read  0 1 "), ["read", "0", "1"]);
        assert_eq!(words("read\t0"), ["read\t0"]);
        assert!(words("   ").is_empty());
    }

    #[test]
    fn names_and_counts_are_checked_first() {
        assert_eq!(said("bogus 1"), "! command \"bogus\" not found");
        assert_eq!(said("write 0"), "! bad argument count 1 to write, expected at least 2 arguments");
        assert_eq!(said("o"), "! bad argument count 0 to o, expected at least 1 arguments");
        assert_eq!(said("flush 1"), "! bad argument count 1 to flush, expected 0 arguments");
        assert_eq!(said("alloc 0 1 2"), "! bad argument count 3 to alloc, expected between 1 and 2 arguments");
    }

    #[test]
    fn short_names_are_names() {
        assert_eq!(parsed("r 0 1"), parsed("read 0 1"));
        assert_eq!(parsed("w -q 0 1"), parsed("write -q 0 1"));
        assert_eq!(parsed("? read"), Ok(Command::Help(Some("read".to_owned()))));
        assert_eq!(parsed("q"), Ok(Command::Quit));
    }

    #[test]
    fn the_small_commands_are_read() {
        assert_eq!(parsed("alloc 1k"), Ok(Command::Alloc { at: 1024, len: 512 }));
        assert_eq!(parsed("alloc 0 1M"), Ok(Command::Alloc { at: 0, len: 1 << 20 }));
        assert_eq!(said("alloc -1"), "Parsing error: argument too large -- -1");
        assert_eq!(parsed("discard -C 0 4k"), Ok(Command::Discard { at: 0, len: 4096, report: Report::Numbers }));
        assert_eq!(said("discard 0 3G"), "length cannot exceed 2147483136, given 3G");
        assert_eq!(said("discard -x 0 1"), "discard: invalid option -- 'x', usage of discard");
        assert_eq!(parsed("sleep 0x10"), Ok(Command::Sleep(16)));
        assert_eq!(said("sleep -1"), "-1 is not a valid number");
        assert_eq!(parsed("zone_report 0 1"), Ok(Command::Zone("report")));
        let no_number = "Parsing error: non-numeric argument, or extraneous/unrecognized suffix --";
        assert_eq!(said("zone_report 0 x"), format!("{no_number} x"));
        assert_eq!(said("sigraise x"), format!("{no_number} x"));
    }

    #[test]
    fn a_size_may_come_with_a_mode() {
        let truncate = |size, mode: &str| Ok(Command::Truncate { size, preallocation: mode.to_owned() });
        assert_eq!(parsed("truncate 1M"), truncate(1 << 20, "off"));
        assert_eq!(parsed("truncate -m full 1M"), truncate(1 << 20, "full"));
        assert_eq!(parsed("truncate 1k 2k"), truncate(1024, "off"));
        assert_eq!(said("truncate -m bogus 1M"), "!! Invalid preallocation mode 'bogus'");
        assert_eq!(said("truncate -m"), "truncate: option requires an argument -- 'm', usage of truncate");
        let no_number = "Parsing error: non-numeric argument, or extraneous/unrecognized suffix --";
        assert_eq!(said("truncate -m falloc"), format!("{no_number} -m"));
        assert_eq!(said("truncate 8E"), "Parsing error: argument too large -- 8E");
    }

    #[test]
    fn every_name_in_the_table_is_a_command() {
        let mut names: Vec<_> = COMMANDS.iter().map(|spec| spec.name).collect();
        assert!(names.is_sorted(), "help lists them in order");
        names.dedup();
        assert_eq!(names.len(), COMMANDS.len());
        for spec in COMMANDS {
            let words: Vec<_> = std::iter::once(spec.name).chain(std::iter::repeat_n("1", spec.least)).collect();
            spec.check_count(&words).unwrap();
            spec.parse(&words).unwrap();
        }
    }
}
