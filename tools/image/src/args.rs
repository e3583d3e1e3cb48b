//! Options as `getopt_long` reads them, which scripts around `qemu-img` and `qemu-io` rely on: they may stand behind what
//! they are about, long ones may be cut short, short ones may be joined, and several may be given. From the same
//! definitions come help texts, manual pages and completions.

use crate::Failure;

/// One option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opt {
    /// What code calls it: the long form, or the short one where there is no long one.
    pub id: &'static str,
    /// `-f`.
    pub short: Option<char>,
    /// `--format`.
    pub long: Option<&'static str>,
    /// Other long forms of it, which help does not show.
    pub aliases: &'static [&'static str],
    /// What help calls its argument, if it takes one.
    pub value: Option<&'static str>,
    /// What it is for, in a line.
    pub help: &'static str,
}

/// An option with both forms that takes an argument.
pub const fn option(short: char, long: &'static str, value: &'static str, help: &'static str) -> Opt {
    Opt { id: long, short: Some(short), long: Some(long), aliases: &[], value: Some(value), help }
}

/// An option with both forms that takes none.
pub const fn flag(short: char, long: &'static str, help: &'static str) -> Opt {
    Opt { id: long, short: Some(short), long: Some(long), aliases: &[], value: None, help }
}

/// An option with a long form only that takes an argument.
pub const fn long_option(long: &'static str, value: &'static str, help: &'static str) -> Opt {
    Opt { id: long, short: None, long: Some(long), aliases: &[], value: Some(value), help }
}

/// An option with a long form only that takes none.
pub const fn long_flag(long: &'static str, help: &'static str) -> Opt {
    Opt { id: long, short: None, long: Some(long), aliases: &[], value: None, help }
}

/// An option with a short form only; `id` is that form as a word.
pub const fn short_option(short: char, id: &'static str, value: Option<&'static str>, help: &'static str) -> Opt {
    Opt { id, short: Some(short), long: None, aliases: &[], value, help }
}

impl Opt {
    /// The same, with other long forms besides.
    pub const fn also(self, aliases: &'static [&'static str]) -> Self {
        Self { aliases, ..self }
    }

    fn longs(&self) -> impl Iterator<Item = &'static str> {
        self.long.into_iter().chain(self.aliases.iter().copied())
    }
}

/// A command: what it takes, and what people are told of it.
#[derive(Clone, Copy, Debug)]
pub struct Definition {
    /// The word that asks for it.
    pub name: &'static str,
    /// What it does, in a line.
    pub about: &'static str,
    /// What it takes.
    pub options: &'static [Opt],
    /// What stands behind the options, as help has it: `FILENAME [SIZE]`.
    pub words: &'static str,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Args {
    /// Options in order, by their ids.
    given: Vec<(&'static str, String)>,
    /// What is no option, in order.
    pub words: Vec<String>,
}

impl Args {
    /// The option is there.
    pub fn has(&self, id: &str) -> bool {
        self.given.iter().any(|(other, _)| *other == id)
    }

    /// An option's argument, the last time that it is given.
    pub fn get(&self, id: &str) -> Option<&str> {
        self.all(id).next_back()
    }

    /// All that an option is given, in order.
    pub fn all(&self, id: &str) -> impl DoubleEndedIterator<Item = &str> {
        self.given.iter().filter(move |(other, _)| *other == id).map(|(_, value)| value.as_str())
    }

    /// All options in order, with their arguments (empty where they take none).
    pub fn given(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.given.iter().map(|(id, value)| (*id, value.as_str()))
    }

    /// How many there are of an option.
    pub fn count(&self, id: &str) -> usize {
        self.all(id).count()
    }
}

/// What a command line comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Read {
    /// Help is asked for.
    Help,
    /// The command shall run.
    Run(Args),
}

impl Definition {
    /// Reads what stands behind the command's name.
    pub fn read(&self, arguments: &[String]) -> Result<Read, Failure> {
        self.read_with(arguments, false)
    }

    /// The same where a word like `-512k` may be meant as a number.
    pub fn read_with_numbers(&self, arguments: &[String]) -> Result<Read, Failure> {
        self.read_with(arguments, true)
    }

    fn read_with(&self, arguments: &[String], numbers: bool) -> Result<Read, Failure> {
        let (mut args, mut rest) = (Args::default(), arguments.iter());
        while let Some(word) = rest.next() {
            if word == "--" {
                args.words.extend(rest.by_ref().cloned());
            } else if is_option(word) && !(numbers && is_number(word)) {
                if self.option(word, &mut rest, &mut args)? {
                    return Ok(Read::Help);
                }
            } else {
                args.words.push(word.clone());
            }
        }
        Ok(Read::Run(args))
    }

    /// Reads one word that begins with a dash, and its argument if that is the next one. True: help.
    pub fn option<'a>(
        &self,
        word: &str,
        rest: &mut impl Iterator<Item = &'a String>,
        args: &mut Args,
    ) -> Result<bool, Failure> {
        let Some(long) = word.strip_prefix("--") else { return self.shorts(&word[1..], rest, args) };
        let (name, value) = long.split_once('=').map_or((long, None), |(name, value)| (name, Some(value)));
        let opt = self.long(name, long)?;
        let shown = opt.map_or("help", |opt| opt.longs().find(|long| long.starts_with(name)).unwrap_or_default());
        let value = match (opt.and_then(|opt| opt.value), value) {
            (None, Some(_)) => return Err(wrong(format!("option '--{shown}' doesn't allow an argument"))),
            (None, None) => String::new(),
            (Some(_), Some(value)) => value.to_owned(),
            (Some(_), None) => {
                let missing = || wrong(format!("option '--{shown}' requires an argument"));
                rest.next().cloned().ok_or_else(missing)?
            }
        };
        let Some(opt) = opt else { return Ok(true) };
        args.given.push((opt.id, value));
        Ok(false)
    }

    /// The option of this name or the only one that it begins; `None`: help. `word` is what is said if there is none.
    fn long(&self, name: &str, word: &str) -> Result<Option<&Opt>, Failure> {
        let own = self.options.iter().flat_map(|opt| opt.longs().map(move |long| (long, Some(opt))));
        let all = own.chain([("help", None)]);
        let found: Vec<(&str, Option<&Opt>)> = all.filter(|(long, _)| long.starts_with(name)).collect();
        if let Some((_, exact)) = found.iter().find(|(long, _)| *long == name) {
            return Ok(*exact);
        }
        match found[..] {
            [] => Err(wrong(format!("unrecognized option '--{word}'"))),
            // Several names of one option are as good as one.
            [(_, first), ..] if found.iter().all(|(_, other)| *other == first) => Ok(first),
            _ => {
                let names: Vec<_> = found.iter().map(|(long, _)| format!("'--{long}'")).collect();
                let names = names.join(" ");
                Err(wrong(format!("option '--{word}' is ambiguous; possibilities: {names}")))
            }
        }
    }

    /// Letters behind one dash. True: help.
    fn shorts<'a>(
        &self,
        letters: &str,
        rest: &mut impl Iterator<Item = &'a String>,
        args: &mut Args,
    ) -> Result<bool, Failure> {
        let mut letters = letters.chars();
        while let Some(letter) = letters.next() {
            let found = self.options.iter().find(|opt| opt.short == Some(letter));
            let Some(opt) = found else {
                if letter == 'h' {
                    return Ok(true);
                }
                return Err(wrong(format!("invalid option -- '{letter}'")));
            };
            let value = match (opt.value, letters.as_str()) {
                (None, _) => String::new(),
                (Some(_), "") => {
                    let missing = || wrong(format!("option requires an argument -- '{letter}'"));
                    rest.next().cloned().ok_or_else(missing)?
                }
                (Some(_), joined) => {
                    let value = joined.to_owned();
                    letters = "".chars();
                    value
                }
            };
            args.given.push((opt.id, value));
        }
        Ok(false)
    }

    /// The page for `--help`.
    pub fn help(&self, program: &str) -> String {
        let mut page =
            format!("{}.\n\nUsage: {program} {} [OPTIONS] {}\n\nOptions:\n", self.about, self.name, self.words);
        for opt in self.options {
            page.push_str(&line(opt));
        }
        page.push_str(&line(&flag('h', "help", "print this help and end")));
        page
    }
}

/// An option as pages show it.
fn line(opt: &Opt) -> String {
    let short = opt.short.map_or("    ".to_owned(), |short| format!("-{short}, "));
    let value = opt.value.map(|value| format!(" {value}")).unwrap_or_default();
    let names = match opt.long {
        Some(long) => format!("{short}--{long}{value}"),
        None => format!("{}{value}", short.trim_end_matches(", ")),
    };
    format!("  {names:<34} {}\n", opt.help)
}

fn wrong(text: String) -> Failure {
    Failure { names_command: true, ..Failure::usage(text) }
}

/// A word is an option, or several.
fn is_option(word: &str) -> bool {
    word.len() > 1 && word.starts_with('-')
}

fn is_number(word: &str) -> bool {
    word[1..].starts_with(|c: char| c.is_ascii_digit() || c == '.')
}

#[cfg(test)]
mod tests {
    use super::*;

    const TESTED: Definition = Definition {
        name: "info",
        about: "Says what an image is",
        options: &[
            option('f', "format", "FMT", "the format"),
            flag('U', "force-share", "share"),
            long_flag("image-opts", "what follows is a list of options"),
            flag('q', "quiet", "say less"),
            short_option('o', "o", Some("OPTIONS"), "options of the format"),
            option('r', "rate-limit", "RATE", "bytes a second").also(&["rate", "speed"]),
        ],
        words: "FILENAME",
    };

    fn read(words: &[&str]) -> Result<Args, String> {
        let words: Vec<_> = words.iter().map(|word| (*word).to_owned()).collect();
        match TESTED.read_with_numbers(&words) {
            Ok(Read::Run(args)) => Ok(args),
            Ok(Read::Help) => Err("help".to_owned()),
            Err(failure) => Err(failure.text),
        }
    }

    #[test]
    fn options_may_stand_anywhere_and_be_cut_short() {
        let args = read(&["a", "--form", "raw", "-Uq", "-oa=b", "-o", "c", "b", "--", "-f"]).unwrap();
        assert_eq!(args.words, ["a", "b", "-f"]);
        assert_eq!(args.get("format"), Some("raw"));
        assert_eq!(args.all("o").collect::<Vec<_>>(), ["a=b", "c"]);
        assert!(args.has("force-share") && args.has("quiet") && !args.has("image-opts"));
        assert_eq!(
            read(&["--format=x=y", "-"]).unwrap(),
            Args { given: vec![("format", "x=y".into())], words: vec!["-".into()] }
        );
        for name in ["--rate-limit", "--rate", "--ra", "--rate-l", "--speed", "--sp"] {
            assert_eq!(read(&[name, "7"]).unwrap().get("rate-limit"), Some("7"), "{name}");
        }
        assert_eq!(read(&["x", "-512k"]).unwrap().words, ["x", "-512k"]);
    }

    #[test]
    fn what_is_wrong_is_said_as_getopt_says_it() {
        for (words, text) in [
            (&["--zzz"][..], "unrecognized option '--zzz'"),
            (&["-z"], "invalid option -- 'z'"),
            (&["-f"], "option requires an argument -- 'f'"),
            (&["--format"], "option '--format' requires an argument"),
            (&["--image-opts=x"], "option '--image-opts' doesn't allow an argument"),
            (&["--fo"], "option '--fo' is ambiguous; possibilities: '--format' '--force-share'"),
            (&["--fo=x"], "option '--fo=x' is ambiguous; possibilities: '--format' '--force-share'"),
            (&["--help=x"], "option '--help' doesn't allow an argument"),
            (&["--spee"], "option '--speed' requires an argument"),
            (&["-h"], "help"),
            (&["--help"], "help"),
        ] {
            assert_eq!(read(words).unwrap_err(), text);
        }
    }

    #[test]
    fn help_shows_all_options() {
        let page = TESTED.help("trellis-img");
        for part in ["Usage: trellis-img info [OPTIONS] FILENAME", "-f, --format FMT", "    --image-opts", "-o OPTIONS"]
        {
            assert!(page.contains(part), "{page}");
        }
    }
}
