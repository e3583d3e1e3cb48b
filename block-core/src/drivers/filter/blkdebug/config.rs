//! The rule file: sections `[inject-error]` and `[set-state]`, each with lines `key = "value"` (QEMU's format).

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

use qmp::schema::{Map, Value, from_keyval};

use super::rules::Rule;
use crate::base::{Error, Result, ResultExt};

/// How large a rule file may be, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// Reads and parses; waits for the file.
pub(super) fn read(path: &str) -> Result<Vec<Rule>> {
    // A pipe that nobody writes to does not keep us.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = file.doing(|| "Could not read blkdebug config file")?;
    let mut text = String::new();
    file.take(MAX_BYTES + 1).read_to_string(&mut text).doing(|| "Cannot read config file")?;
    if text.len() as u64 > MAX_BYTES {
        return Err(Error::new(format!("The blkdebug config file may not have more than {MAX_BYTES} bytes")));
    }
    parse(&text).doing(|| format!("In blkdebug config file '{path}'"))
}

fn parse(text: &str) -> Result<Vec<Rule>> {
    let mut rules = Vec::new();
    let mut open: Option<Section> = None;
    for (number, line) in (1..).zip(text.lines().map(str::trim)) {
        let at = || format!("line {number}");
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(header) = line.strip_prefix('[') {
            rules.extend(open.take().map(Section::finish).transpose()?);
            open = Some(Section::new(number, header).doing(at)?);
            continue;
        }
        let Some(section) = &mut open else { return Err(Error::new("no group defined")).doing(at) };
        let (key, value) = assignment(line).ok_or_else(|| Error::new("parse error")).doing(at)?;
        section.members.insert(key.to_owned(), value.into());
    }
    rules.extend(open.take().map(Section::finish).transpose()?);
    Ok(rules)
}

/// `key = "value"`.
fn assignment(line: &str) -> Option<(&str, &str)> {
    let (key, value) = line.split_once('=')?;
    let value = value.trim().strip_prefix('"')?.strip_suffix('"')?;
    (!value.contains('"')).then_some((key.trim(), value))
}

/// A rule that is being read.
struct Section {
    /// Where it begins.
    line: usize,
    kind: Kind,
    members: Map,
}

#[derive(Clone, Copy)]
enum Kind {
    InjectError,
    SetState,
}

impl Section {
    /// After the opening bracket: `inject-error]`, or with an id that nobody refers to, `inject-error "id"]`.
    fn new(line: usize, header: &str) -> Result<Self> {
        let header = header.strip_suffix(']').ok_or_else(|| Error::new("parse error"))?;
        let name = header.split_once(' ').map_or(header, |(name, _)| name);
        let kind = match name {
            "inject-error" => Kind::InjectError,
            "set-state" => Kind::SetState,
            other => return Err(Error::new(format!("There is no option group '{other}'"))),
        };
        Ok(Self { line, kind, members: Map::new() })
    }

    fn finish(self) -> Result<Rule> {
        let at = || format!("the rule in line {}", self.line);
        if !self.members.contains_key("event") {
            return Err(Error::new("Missing event name for rule")).doing(at);
        }
        let members = Value::Object(self.members);
        let rule = match self.kind {
            Kind::InjectError => from_keyval(members).map(|options| Rule::injecting(&options)),
            Kind::SetState => from_keyval(members).map(|options| Ok(Rule::setting(&options))),
        };
        rule.map_err(|error| Error::new(error.desc)).flatten().doing(at)
    }
}

#[cfg(test)]
mod tests {
    use super::super::options::{InjectErrorOptions, IoType, SetStateOptions};
    use super::*;
    use crate::graph::DebugEvent;

    #[test]
    fn sections_are_rules() {
        let text = "# a comment\n[inject-error]\nevent = \"pwritev\"\nerrno = \"28\"\nonce = \"on\"\n\n\
                    [set-state \"s\"]\n  event=\"read_aio\"\nstate = \"1\"\nnew_state = \"0x2\"\n\
                    [inject-error]\nevent = \"none\"\niotype = \"write-zeroes\"\nsector = \"-1\"\n";
        let inject = InjectErrorOptions {
            event: DebugEvent::Pwritev,
            state: None,
            iotype: None,
            errno: Some(28),
            sector: None,
            once: Some(true),
            immediately: None,
        };
        let set = SetStateOptions { event: DebugEvent::ReadAio, state: Some(1), new_state: 2 };
        let last = InjectErrorOptions {
            event: DebugEvent::None,
            iotype: Some(IoType::WriteZeroes),
            errno: None,
            once: None,
            ..inject.clone()
        };
        let expected = [Rule::injecting(&inject).unwrap(), Rule::setting(&set), Rule::injecting(&last).unwrap()];
        assert_eq!(parse(text).unwrap(), expected);
        assert_eq!(parse(" \n#\n").unwrap(), []);
    }

    #[test]
    fn what_is_no_rule_is_refused_with_its_line() {
        for (text, reason) in [
            ("event = \"none\"\n", "line 1: no group defined"),
            ("\n[other]\n", "line 2: There is no option group 'other'"),
            ("[inject-error\n", "line 1: parse error"),
            ("[inject-error]\nevent = none\n", "line 2: parse error"),
            ("[inject-error]\nevent\n", "line 2: parse error"),
            ("[inject-error]\nevent = \"none\" more\n", "line 2: parse error"),
            ("[inject-error]\nevent = \"none\" \"none\"\n", "line 2: parse error"),
            ("[inject-error]\n", "the rule in line 1: Missing event name for rule"),
            ("[inject-error]\nevent = \"\"\n", "the rule in line 1: Parameter 'event' does not accept value ''"),
            ("[inject-error]\nevent = \"none\"\nx = \"1\"\n", "the rule in line 1: Parameter 'x' is unexpected"),
            ("[inject-error]\nevent = \"none\"\nonce = \"maybe\"\n", "the rule in line 1: Parameter 'once' expects"),
            ("[inject-error]\nevent = \"none\"\nerrno = \"-5\"\n", "the rule in line 1: Value '-5' is out of range"),
            ("[set-state]\nevent = \"none\"\n", "the rule in line 1: Parameter 'new_state' is missing"),
        ] {
            let error = parse(text).unwrap_err().full();
            assert!(error.starts_with(reason), "{error}");
        }
    }
}
