//! Options of one letter, as the C library's `getopt` finds them: they may stand behind operands and be joined (`-qP1`),
//! and `--` ends them. They come one by one, so that what is wrong first is said first.

use super::{Refusal, Spec};

/// The options of a command's words, in order.
pub(super) struct Getopt<'a> {
    letters: &'static str,
    words: &'a [&'a str],
    /// The word that is looked at.
    next: usize,
    /// Where in it the next letter is; 0 between words.
    inside: usize,
    operands: Vec<&'a str>,
}

impl<'a> Getopt<'a> {
    /// `letters`: those that there are; behind each that takes an argument stands a colon.
    pub(super) fn new(letters: &'static str, words: &'a [&'a str]) -> Self {
        Self { letters, words, next: 1, inside: 0, operands: Vec::new() }
    }

    /// The next option and its argument, which is empty where it takes none.
    pub(super) fn next(&mut self, spec: &'static Spec) -> Result<Option<(char, &'a str)>, Refusal> {
        let Some(word) = self.word() else { return Ok(None) };
        let rest = &word[self.inside..];
        let letter = rest.chars().next().expect("a word is left before its end");
        let behind = &rest[letter.len_utf8()..];
        let name = self.words[0];
        let Some(at) = self.letters.find(letter).filter(|_| letter != ':') else {
            return Err(Refusal::BadOption(format!("{name}: invalid option -- '{letter}'"), spec));
        };
        if !self.letters[at + letter.len_utf8()..].starts_with(':') {
            self.inside += letter.len_utf8();
            if behind.is_empty() {
                self.leave();
            }
            return Ok(Some((letter, "")));
        }
        self.leave();
        if !behind.is_empty() {
            return Ok(Some((letter, behind)));
        }
        let Some(argument) = self.words.get(self.next).copied() else {
            let text = format!("{name}: option requires an argument -- '{letter}'");
            return Err(Refusal::BadOption(text, spec));
        };
        self.next += 1;
        Ok(Some((letter, argument)))
    }

    /// What is no option; to be asked after the last one.
    pub(super) fn operands(&self) -> &[&'a str] {
        &self.operands
    }

    /// The word with the next option in it.
    fn word(&mut self) -> Option<&'a str> {
        while let Some(word) = self.words.get(self.next).copied() {
            if self.inside > 0 {
                return Some(word);
            }
            if word == "--" {
                self.operands.extend(&self.words[self.next + 1..]);
                self.next = self.words.len();
                return None;
            }
            if word.len() > 1 && word.starts_with('-') {
                self.inside = 1;
                return Some(word);
            }
            self.operands.push(word);
            self.next += 1;
        }
        None
    }

    fn leave(&mut self) {
        (self.next, self.inside) = (self.next + 1, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Found = (Vec<(char, String)>, Vec<String>);

    fn all(line: &str) -> Result<Found, Refusal> {
        let spec = Spec::named("read").unwrap();
        let words: Vec<_> = line.split(' ').collect();
        let mut options = Getopt::new("qP:v", &words);
        let mut found = Vec::new();
        while let Some((letter, argument)) = options.next(spec)? {
            found.push((letter, argument.to_owned()));
        }
        Ok((found, options.operands().iter().map(|word| (*word).to_owned()).collect()))
    }

    #[test]
    fn options_are_found_wherever_they_stand() {
        let (found, operands) = all("read -qP1 0 -v 1 -P 2").unwrap();
        let expected = [('q', ""), ('P', "1"), ('v', ""), ('P', "2")].map(|(letter, text)| (letter, text.to_owned()));
        assert_eq!(found, expected);
        assert_eq!(operands, ["0", "1"]);
    }

    #[test]
    fn two_dashes_end_them_and_one_is_none() {
        let (found, operands) = all("read -q -- -v 1").unwrap();
        assert_eq!((found.len(), operands), (1, vec!["-v".to_owned(), "1".to_owned()]));
        assert_eq!(all("read - 0").unwrap().1, ["-", "0"]);
    }

    #[test]
    fn what_is_unknown_or_has_no_argument_is_refused() {
        let text = |line| match all(line) {
            Err(Refusal::BadOption(text, _)) => text,
            other => panic!("{other:?}"),
        };
        assert_eq!(text("read 0 -1"), "read: invalid option -- '1'");
        assert_eq!(text("r -:"), "r: invalid option -- ':'");
        assert_eq!(text("read -ä"), "read: invalid option -- 'ä'");
        assert_eq!(text("read -P"), "read: option requires an argument -- 'P'");
    }
}
