//! `open` and `reopen`: how an image is asked for.

use trellis_image::Cache;
use trellis_image::pairs::Pairs;

use super::getopt::Getopt;
use super::{Refusal, Spec};

/// An image that is opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Open {
    /// The file's name; `None`: the options say it all.
    pub(crate) name: Option<String>,
    /// What the image is opened with besides.
    pub(crate) options: Option<String>,
    pub(crate) manner: Manner,
}

/// How an image is opened, beyond which one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Manner {
    pub(crate) read_only: bool,
    /// What is written goes to an overlay that nobody sees again.
    pub(crate) snapshot: bool,
    pub(crate) copy_on_read: bool,
    pub(crate) force_share: bool,
    pub(crate) cache: Option<Cache>,
    /// Discards are passed on; `None`: as where nothing is said, which they are.
    pub(crate) unmap: Option<bool>,
    /// The kernel's own asynchronous requests were asked for.
    pub(crate) native_aio: bool,
}

/// How an open image changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reopen {
    pub(crate) read_only: Option<bool>,
    pub(crate) cache: Option<Cache>,
    pub(crate) options: Pairs,
}

impl Manner {
    /// One of the options that the prompt and the program have in common.
    pub(crate) fn hear(&mut self, letter: char, argument: &str) -> Result<(), Refusal> {
        let invalid = |what: &str| Refusal::Named(format!("Invalid {what} option: {argument}"));
        match letter {
            'r' => self.read_only = true,
            's' => self.snapshot = true,
            'C' => self.copy_on_read = true,
            'U' => self.force_share = true,
            'n' => self.cache = Some(self.cache.map_or(DIRECT, |cache| Cache { direct: true, ..cache })),
            't' => self.cache = Some(Cache::named(argument).ok_or_else(|| invalid("cache"))?),
            'd' => self.unmap = Some(unmap(argument).ok_or_else(|| invalid("discard"))?),
            'k' => self.native_aio = true,
            'i' => self.native_aio = is_native(argument).ok_or_else(|| invalid("aio"))?,
            _ => {}
        }
        Ok(())
    }
}

pub(super) fn open(spec: &'static Spec, words: &[&str]) -> Result<Open, Refusal> {
    let mut open = Open::default();
    let mut options = Getopt::new("snCro:ki:t:d:U", words);
    while let Some((letter, argument)) = options.next(spec)? {
        match letter {
            'o' => add(&mut open.options, argument),
            _ => open.manner.hear(letter, argument)?,
        }
    }
    open.name = match options.operands() {
        [] if open.options.is_some() => None,
        [name] => Some((*name).to_owned()),
        _ => return Err(Refusal::Usage(spec)),
    };
    Ok(open)
}

pub(super) fn reopen(spec: &'static Spec, words: &[&str]) -> Result<Reopen, Refusal> {
    let (mut reopen, mut lists) = (Reopen::default(), Vec::new());
    let mut options = Getopt::new("rwc:o:", words);
    while let Some((letter, argument)) = options.next(spec)? {
        match letter {
            'c' => {
                let cache = Cache::named(argument);
                reopen.cache = Some(cache.ok_or_else(|| Refusal::Named(format!("Invalid cache option: {argument}")))?);
            }
            'o' => lists.push(argument),
            _ if reopen.read_only.is_some() => {
                return Err(Refusal::Named("Only one -r/-w option may be given".to_owned()));
            }
            _ => reopen.read_only = Some(letter == 'r'),
        }
    }
    if !options.operands().is_empty() {
        return Err(Refusal::Usage(spec));
    }
    reopen.options = Pairs::read(lists).map_err(|error| Refusal::Named(error.full()))?;
    let says = |name: &str| reopen.options.get(name).is_some();
    if reopen.read_only.is_some() && says("read-only") {
        return Err(Refusal::Named("Cannot set both -r/-w and 'read-only'".to_owned()));
    }
    if reopen.cache.is_some() && (says("cache.direct") || says("cache.no-flush")) {
        return Err(Refusal::Named("Cannot set both -c and the cache options".to_owned()));
    }
    Ok(reopen)
}

fn add(options: &mut Option<String>, more: &str) {
    match options {
        Some(options) => {
            options.push(',');
            options.push_str(more);
        }
        None => *options = Some(more.to_owned()),
    }
}

fn unmap(mode: &str) -> Option<bool> {
    match mode {
        "unmap" | "on" => Some(true),
        "ignore" | "off" => Some(false),
        _ => None,
    }
}

fn is_native(mode: &str) -> Option<bool> {
    match mode {
        "native" => Some(true),
        "threads" | "io_uring" => Some(false),
        _ => None,
    }
}

const DIRECT: Cache = Cache { direct: true, ..Cache::WRITEBACK };

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::{Command, words};

    fn parsed(line: &str) -> Result<Command, Refusal> {
        let words = words(line);
        Spec::named(words[0])?.parse(&words)
    }

    #[test]
    fn an_image_is_named_by_a_file_or_by_options() {
        let Ok(Command::Open(open)) = parsed("open -rs -o driver=raw -o size=512 a.img") else { panic!() };
        assert_eq!((open.name.as_deref(), open.options.as_deref()), (Some("a.img"), Some("driver=raw,size=512")));
        assert!(open.manner.read_only && open.manner.snapshot && !open.manner.copy_on_read);
        let Ok(Command::Open(open)) = parsed("open -o driver=null-co") else { panic!() };
        assert_eq!(open.name, None);
        assert!(matches!(parsed("open a b"), Err(Refusal::Usage(_))));
        assert!(matches!(parsed("open -r"), Err(Refusal::Usage(_))));
    }

    #[test]
    fn modes_are_words_that_are_known() {
        for (line, text) in [
            ("open -t bogus a", "Invalid cache option: bogus"),
            ("open -d bogus a", "Invalid discard option: bogus"),
            ("open -i bogus a", "Invalid aio option: bogus"),
            ("reopen -c bogus", "Invalid cache option: bogus"),
            ("reopen -rw", "Only one -r/-w option may be given"),
            ("reopen -r -o read-only=off", "Cannot set both -r/-w and 'read-only'"),
            ("reopen -c none -o cache.direct=on", "Cannot set both -c and the cache options"),
        ] {
            assert_eq!(parsed(line), Err(Refusal::Named(text.to_owned())), "{line}");
        }
        let Ok(Command::Open(open)) = parsed("open -n -d ignore -k a") else { panic!() };
        assert_eq!((open.manner.cache, open.manner.unmap, open.manner.native_aio), (Some(DIRECT), Some(false), true));
    }

    #[test]
    fn a_reopen_says_what_changes() {
        let Ok(Command::Reopen(reopen)) = parsed("reopen -w -o discard=unmap") else { panic!() };
        assert_eq!((reopen.read_only, reopen.options.get("discard")), (Some(false), Some("unmap")));
        assert_eq!(parsed("reopen"), Ok(Command::Reopen(Reopen::default())));
    }
}
