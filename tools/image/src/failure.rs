//! How a command ends, and what is said of an error: one line in QEMU's words, behind the name of the program.

use block_core::base::Error;

/// How a command ends: its exit code, or what is to be said first.
pub type Outcome = Result<u8, Failure>;

/// Why a command did not do what it was asked to.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    /// The exit code.
    pub code: u8,
    /// What is said, without the program's name; several lines if need be. Empty: nothing is.
    pub text: String,
    /// The command line was wrong: whoever wrote it is told where help is.
    pub usage: bool,
    /// The command's name stands before the text too, as where options are wrong.
    pub names_command: bool,
}

impl Failure {
    /// With an exit code of its own.
    pub fn with_code(code: u8, text: impl Into<String>) -> Self {
        Self { code, text: text.into(), usage: false, names_command: false }
    }

    /// Exit code 1, as nearly always.
    pub fn new(text: impl Into<String>) -> Self {
        Self::with_code(1, text)
    }

    /// The command line does not say what it has to.
    pub fn usage(text: impl Into<String>) -> Self {
        Self { usage: true, ..Self::new(text) }
    }

    /// An error, and what it was about: `doing: error`.
    pub fn of(doing: impl std::fmt::Display, error: &Error) -> Self {
        Self::new(format!("{doing}: {}", words(error)))
    }

    /// The lines for the standard error output.
    pub fn lines(&self, program: &str, command: &str) -> String {
        let name = if self.names_command { format!("{program} {command}") } else { program.to_owned() };
        let help = if command.is_empty() { program.to_owned() } else { format!("{program} {command}") };
        match (self.text.is_empty(), self.usage) {
            (true, _) => String::new(),
            (false, false) => format!("{name}: {}\n", self.text),
            (false, true) => format!("{name}: {}\nTry '{help} --help' for more info\n", self.text),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::new(words(&error))
    }
}

/// An error for people at a shell: its sentences, but for those about nodes that nobody has named, and who holds a lock on a
/// line of its own, as QEMU's programs have it.
pub fn words(error: &Error) -> String {
    let mut said = Vec::new();
    let mut next = Some(error as &dyn std::error::Error);
    while let Some(cause) = next {
        said.push(without_number(cause.to_string()));
        next = cause.source();
    }
    let innermost = said.len().saturating_sub(1);
    let mut number = 0;
    said.retain(|sentence| {
        number += 1;
        number - 1 == innermost || !sentence.contains("'#block")
    });
    said.join(": ").replacen(" lock: Is another process", " lock\nIs another process", 1)
}

/// The library's words for an error of the system, without its number.
fn without_number(mut text: String) -> String {
    let number = text.rfind(" (os error ").filter(|at| {
        let rest = text[*at..].trim_start_matches(" (os error ");
        rest.strip_suffix(')').is_some_and(|digits| digits.chars().all(|digit| digit.is_ascii_digit()))
    });
    if let Some(at) = number {
        text.truncate(at);
    }
    text
}

#[cfg(test)]
mod tests {
    use block_core::base::ResultExt;

    use super::*;

    #[test]
    fn nodes_without_a_name_are_not_spoken_of() {
        let inner = Err::<(), _>(Error::new("Failed to get \"write\" lock: Is another process using the image [x]?"));
        let outer = inner.doing(|| "Could not open the qcow2 image of '#block001'").unwrap_err();
        assert_eq!(words(&outer), "Failed to get \"write\" lock\nIs another process using the image [x]?");
        assert_eq!(words(&Error::new("'#block1' is odd")), "'#block1' is odd");
        assert_eq!(words(&Error::new("No such file or directory (os error 2)")), "No such file or directory");
    }

    #[test]
    fn whoever_wrote_nonsense_is_told_where_help_is() {
        let lines = Failure::usage("Expecting one image file name").lines("trellis-img", "info");
        assert_eq!(lines, "trellis-img: Expecting one image file name\nTry 'trellis-img info --help' for more info\n");
    }
}
