//! Numbers at the prompt, and what is said of words that are none.

use trellis_image::size::{self, NoSize};

use super::Refusal;

/// A number of bytes, up to `i64::MAX`.
pub(super) fn bytes(word: &str) -> Result<u64, Refusal> {
    bytes_named(word, word)
}

/// The same, where `named` is what is said of a word that is none.
pub(super) fn bytes_named(word: &str, named: &str) -> Result<u64, Refusal> {
    let why = match size::parse(word) {
        Ok(bytes) if i64::try_from(bytes).is_ok() => return Ok(bytes),
        Ok(_) | Err(NoSize::OutOfRange) => "argument too large",
        Err(NoSize::Invalid) => "non-numeric argument, or extraneous/unrecognized suffix",
    };
    Err(Refusal::Said(format!("Parsing error: {why} -- {named}")))
}

/// A byte that fills a buffer.
pub(super) fn pattern(word: &str) -> Result<u8, Refusal> {
    let byte = c_number(word).and_then(|number| u8::try_from(number).ok());
    byte.ok_or_else(|| Refusal::Said(format!("{word} is not a valid pattern byte")))
}

/// How long to sleep.
pub(super) fn milliseconds(word: &str) -> Result<u64, Refusal> {
    c_number(word).ok_or_else(|| Refusal::Said(format!("{word} is not a valid number")))
}

/// A number as the C language writes it: `0x` before hexadecimal digits, `0` before octal ones.
fn c_number(word: &str) -> Option<u64> {
    if let Some(zero) = word.strip_prefix('-').filter(|rest| !rest.starts_with(['+', '-'])) {
        return c_number(zero).filter(|number| *number == 0);
    }
    let digits = word.strip_prefix('+').unwrap_or(word);
    let (digits, radix) = match digits {
        _ if digits.starts_with("0x") || digits.starts_with("0X") => (&digits[2..], 16),
        _ if digits.len() > 1 && digits.starts_with('0') => (&digits[1..], 8),
        _ => (digits, 10),
    };
    // The standard library takes a sign of its own.
    let all = digits.chars().all(|digit| digit.is_digit(radix));
    all.then(|| u64::from_str_radix(digits, radix).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_bytes_as_c_writes_them() {
        for (word, byte) in
            [("0", 0), ("65", 65), ("0x41", 65), ("0101", 65), ("255", 255), ("0XfF", 255), ("+1", 1), ("-0", 0)]
        {
            assert_eq!(pattern(word), Ok(byte), "{word}");
        }
        for word in ["256", "-1", "x", "0x", "08", "1k", "++1", "--0", "-+0", "0x+1", ""] {
            assert_eq!(pattern(word), Err(Refusal::Said(format!("{word} is not a valid pattern byte"))));
        }
    }

    #[test]
    fn bytes_fit_an_offset() {
        assert_eq!(bytes("0.5k"), Ok(512));
        assert_eq!(bytes("9223372036854775807"), Ok(i64::MAX as u64));
        assert_eq!(bytes("8E"), Err(Refusal::Said("Parsing error: argument too large -- 8E".to_owned())));
        let none = "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- y";
        assert_eq!(bytes_named("x", "y"), Err(Refusal::Said(none.to_owned())));
    }
}
