//! Numbers of bytes as `qemu-img` reads them: `512`, `4k`, `1.5G`, `0x200`.

use block_core::base::{Error, Result};

/// Why a word is no number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoSize {
    /// It is none.
    Invalid,
    /// It is one that does not fit, or is below zero.
    OutOfRange,
}

/// The number of bytes that a word says. A number may have a fraction if it has a unit too; units are `b`, and `k` to `E`
/// for powers of 1024. Fractions of a byte are rounded.
pub fn parse(word: &str) -> Result<u64, NoSize> {
    let text = word.trim_start_matches(SPACES);
    if let Some(rest) = text.strip_prefix('-') {
        // Only a number can be too small.
        if !rest.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
            return Err(NoSize::Invalid);
        }
        // Not even zero has that sign.
        return match parse(rest) {
            Ok(_) | Err(NoSize::OutOfRange) if !rest.starts_with('.') => Err(NoSize::OutOfRange),
            _ => Err(NoSize::Invalid),
        };
    }
    let text = text.strip_prefix('+').unwrap_or(text);
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return hexadecimal(digits);
    }
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').map_or((number, None), |(whole, part)| (whole, Some(part)));
    if (whole.is_empty() && fraction.is_none_or(str::is_empty)) || fraction.is_some_and(|part| part.contains('.')) {
        return Err(NoSize::Invalid);
    }
    let shift = shift_of(unit)?;
    let has_fraction = fraction.is_some_and(|part| part.chars().any(|digit| digit != '0'));
    if has_fraction && shift == 0 {
        return Err(NoSize::Invalid);
    }
    let whole = if whole.is_empty() { 0 } else { whole.parse::<u128>().map_err(|_| NoSize::OutOfRange)? };
    let part = fraction.filter(|_| has_fraction).map_or(0, |part| rounded(part, shift));
    let bytes = whole.checked_mul(1 << shift).and_then(|bytes| bytes.checked_add(part)).ok_or(NoSize::OutOfRange)?;
    u64::try_from(bytes).map_err(|_| NoSize::OutOfRange)
}

/// The size of an image from the command line, at most `i64::MAX`. In QEMU's words.
pub fn parse_named(what: &str, word: &str) -> Result<u64> {
    parse_between(what, word, 0, i64::MAX as u64)
}

/// The same for any number of bytes between two.
pub fn parse_between(what: &str, word: &str, least: u64, most: u64) -> Result<u64> {
    between(what, word, parse(word), least, most)
}

/// How many there are of something: a whole number as C writes it, `0x` before hexadecimal digits and `0` before octal ones,
/// without a unit. In QEMU's words.
pub fn parse_count(what: &str, word: &str, least: u64, most: u64) -> Result<u64> {
    between(what, word, count(word), least, most)
}

fn count(word: &str) -> Result<u64, NoSize> {
    let text = word.trim_start_matches(SPACES);
    let (is_below, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let (digits, radix) = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None if digits.len() > 1 && digits.starts_with('0') => (&digits[1..], 8),
        None => (digits, 10),
    };
    if digits.is_empty() || !digits.chars().all(|digit| digit.is_digit(radix)) {
        return Err(NoSize::Invalid);
    }
    match u64::from_str_radix(digits, radix) {
        Ok(number) if number == 0 || !is_below => Ok(number),
        _ => Err(NoSize::OutOfRange),
    }
}

fn between(what: &str, word: &str, read: Result<u64, NoSize>, least: u64, most: u64) -> Result<u64> {
    match read {
        Ok(bytes) if (least..=most).contains(&bytes) => Ok(bytes),
        Err(NoSize::Invalid) => Err(Error::new(format!("Invalid {what} specified: '{word}'."))),
        Ok(_) | Err(NoSize::OutOfRange) => {
            Err(Error::new(format!("Invalid {what} specified. Must be between {least} and {most}.")))
        }
    }
}

const SPACES: [char; 6] = [' ', '\t', '\n', '\r', '\x0b', '\x0c'];

fn hexadecimal(digits: &str) -> Result<u64, NoSize> {
    if digits.is_empty() || !digits.chars().all(|digit| digit.is_ascii_hexdigit()) {
        return Err(NoSize::Invalid);
    }
    u64::from_str_radix(digits, 16).map_err(|_| NoSize::OutOfRange)
}

fn shift_of(unit: &str) -> Result<u32, NoSize> {
    let place = match unit {
        "" => 0,
        _ => "bkmgtpe".find(&unit.to_ascii_lowercase()).filter(|_| unit.len() == 1).ok_or(NoSize::Invalid)?,
    };
    Ok(u32::try_from(place).unwrap_or(0) * 10)
}

/// `0.part` times two to the power of `shift`, to the nearest number.
fn rounded(part: &str, shift: u32) -> u128 {
    // Digits beyond these change nothing that 2^60 times the fraction could show.
    let digits: String = part.chars().take(19).collect();
    let (value, scale) = (digits.parse::<u128>().unwrap_or(0), 10u128.pow(u32::try_from(digits.len()).unwrap_or(0)));
    ((value << shift) + scale / 2) / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_qemu_reads_them() {
        for (word, bytes) in [
            ("0", 0),
            ("512", 512),
            ("100b", 100),
            ("100B", 100),
            ("4k", 4096),
            ("1.5k", 1536),
            (".5k", 512),
            ("1.k", 1024),
            ("1.0", 1),
            ("1.5G", 3 << 29),
            ("1T", 1 << 40),
            ("+1k", 1024),
            (" 1k", 1024),
            ("0x10", 16),
            ("7.99E", 9_211_842_821_808_707_994),
            ("18446744073709551615", u64::MAX),
        ] {
            let read = parse(word).unwrap();
            assert!(read.abs_diff(bytes) < 1024 && (read == bytes || bytes > 1 << 60), "{word}: {read}");
        }
    }

    #[test]
    fn counts_have_no_units() {
        for (word, number) in [("5", 5), ("+5", 5), (" 5", 5), ("010", 8), ("0x10", 16), ("0", 0), ("-0", 0)] {
            assert_eq!(count(word), Ok(number), "{word}");
        }
        for word in ["", "1k", "5b", "1.0", "08", "x", "0x", "--1", "1e3", "1 "] {
            assert_eq!(count(word), Err(NoSize::Invalid), "{word}");
        }
        for word in ["-1", "18446744073709551616"] {
            assert_eq!(count(word), Err(NoSize::OutOfRange), "{word}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for word in ["", "nan", "1Q", "1kk", "1KB", "1.5", "1e3", "0x", "0x10k", "0x1p", "1..5k", ".", "k", "-", "--1"]
        {
            assert_eq!(parse(word), Err(NoSize::Invalid), "{word}");
        }
        assert_eq!(parse(&"-".repeat(1 << 20)), Err(NoSize::Invalid), "nobody runs out of stack");
        for word in ["-0", "-5", "-1k", "16E", "18446744073709551616", "0x10000000000000000"] {
            assert_eq!(parse(word), Err(NoSize::OutOfRange), "{word}");
        }
        assert_eq!(
            parse_named("image size", "8E").unwrap_err().full(),
            "Invalid image size specified. Must be between 0 and 9223372036854775807."
        );
        assert_eq!(parse_named("image size", "1Q").unwrap_err().full(), "Invalid image size specified: '1Q'.");
    }
}
