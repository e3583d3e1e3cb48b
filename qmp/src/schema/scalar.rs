//! The types that are not made of others: switches, numbers, sizes, strings, lists and "anything".
//!
//! On the command line each of these is a word; what a word may look like is decided here too.

use super::{At, Collector, Definition, Kind, Mode, Qapi, TypeRef, Value};
use crate::{Error, Result};

impl Qapi for bool {
    const KIND: Kind = Kind::Bool;

    fn parse(value: Value, at: &At<'_>) -> Result<Self> {
        match (at.mode(), value) {
            (Mode::Json, Value::Bool(flag)) => Ok(flag),
            (Mode::Keyval, Value::String(word)) => switch(&word).ok_or_else(|| at.expects("'on' or 'off'")),
            _ => Err(at.wrong_type("boolean")),
        }
    }

    fn to_value(&self) -> Value {
        Value::Bool(*self)
    }

    fn define(_: &mut Collector) -> Definition {
        Definition::builtin(Kind::Bool)
    }
}

fn switch(word: &str) -> Option<bool> {
    match word {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    }
}

impl Qapi for i64 {
    const KIND: Kind = Kind::Int;

    fn parse(value: Value, at: &At<'_>) -> Result<Self> {
        match (at.mode(), value) {
            (Mode::Json, Value::Number(number)) => number.as_i64().ok_or_else(|| at.wrong_type("integer")),
            (Mode::Keyval, Value::String(word)) => {
                integer(&word).and_then(|wide| i64::try_from(wide).ok()).ok_or_else(|| at.expects("integer"))
            }
            _ => Err(at.wrong_type("integer")),
        }
    }

    fn to_value(&self) -> Value {
        Value::from(*self)
    }

    fn define(_: &mut Collector) -> Definition {
        Definition::builtin(Kind::Int)
    }
}

impl Qapi for u64 {
    const KIND: Kind = Kind::Int;

    /// Stricter than QEMU, which takes -1 for the largest number.
    fn parse(value: Value, at: &At<'_>) -> Result<Self> {
        match (at.mode(), value) {
            (Mode::Json, Value::Number(number)) => number.as_u64().ok_or_else(|| at.expects("uint64")),
            (Mode::Keyval, Value::String(word)) => match integer(&word).map(u64::try_from) {
                Some(Ok(number)) => Ok(number),
                Some(Err(_)) => Err(at.expects("uint64")),
                None => Err(at.expects("integer")),
            },
            _ => Err(at.expects("uint64")),
        }
    }

    fn to_value(&self) -> Value {
        Value::from(*self)
    }

    fn define(_: &mut Collector) -> Definition {
        Definition::builtin(Kind::Int)
    }

    fn type_ref(collector: &mut Collector) -> TypeRef {
        i64::type_ref(collector)
    }
}

/// Narrow integers: read as the wide one, then checked; to clients they all are `int`.
macro_rules! narrow {
    ($($narrow:ty as $wide:ty, $name:literal;)*) => {$(
        impl Qapi for $narrow {
            const KIND: Kind = Kind::Int;

            fn parse(value: Value, at: &At<'_>) -> Result<Self> {
                // A negative number is an integer, only not one of these.
                if value.as_i64().is_some_and(|number| <$narrow>::try_from(number).is_err()) {
                    return Err(at.expects($name));
                }
                <$wide>::parse(value, at)?.try_into().map_err(|_| at.expects($name))
            }

            fn to_value(&self) -> Value {
                Value::from(*self)
            }

            fn define(_: &mut Collector) -> Definition {
                Definition::builtin(Kind::Int)
            }

            fn type_ref(collector: &mut Collector) -> TypeRef {
                i64::type_ref(collector)
            }
        }
    )*};
}

narrow! {
    u32 as u64, "uint32_t";
    u16 as u64, "uint16_t";
    u8 as u64, "uint8_t";
    i32 as i64, "int32_t";
    i16 as i64, "int16_t";
    i8 as i64, "int8_t";
}

/// A number as C's `strtol` reads it without a base: decimal, `0x` hexadecimal or `0` octal. `None` also where it does
/// not fit 64 bits.
fn integer(word: &str) -> Option<i128> {
    let (negative, digits) = match word.as_bytes().first()? {
        b'-' => (true, &word[1..]),
        b'+' => (false, &word[1..]),
        _ => (false, word),
    };
    let wide = i128::from(natural(digits)?);
    let number = if negative { -wide } else { wide };
    (number >= i128::from(i64::MIN)).then_some(number)
}

fn natural(digits: &str) -> Option<u64> {
    let (digits, radix) = match digits.as_bytes() {
        [b'0', b'x' | b'X', ..] => (&digits[2..], 16),
        [b'0', _, ..] => (&digits[1..], 8),
        _ => (digits, 10),
    };
    // Rust would take a second sign here.
    digits.starts_with(|c: char| c.is_ascii_hexdigit()).then(|| u64::from_str_radix(digits, radix).ok())?
}

/// A number of bytes: a plain integer in JSON; on the command line with suffixes too (`64k`, `1.5G`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Size(pub u64);

impl Qapi for Size {
    const KIND: Kind = Kind::Int;

    fn parse(value: Value, at: &At<'_>) -> Result<Self> {
        match (at.mode(), value) {
            (Mode::Keyval, Value::String(word)) => size(&word).map(Size).ok_or_else(|| at.expects("size")),
            (_, value) => u64::parse(value, at).map(Size),
        }
    }

    fn to_value(&self) -> Value {
        Value::from(self.0)
    }

    fn define(_: &mut Collector) -> Definition {
        Definition::builtin(Kind::Int)
    }

    fn type_ref(collector: &mut Collector) -> TypeRef {
        i64::type_ref(collector)
    }
}

/// Bytes as people write them: `512`, `0x200`, `64k`, `1.5G`, `10B`. A fraction needs a suffix that makes it whole bytes,
/// rounded down.
fn size(word: &str) -> Option<u64> {
    let (number, shift) = match word.as_bytes().last()?.to_ascii_lowercase() {
        _ if word.starts_with("0x") || word.starts_with("0X") => return natural(word),
        b'b' => (&word[..word.len() - 1], 0),
        b'k' => (&word[..word.len() - 1], 10),
        b'm' => (&word[..word.len() - 1], 20),
        b'g' => (&word[..word.len() - 1], 30),
        b't' => (&word[..word.len() - 1], 40),
        b'p' => (&word[..word.len() - 1], 50),
        b'e' => (&word[..word.len() - 1], 60),
        _ => (word, 0),
    };
    let (whole, fraction) = number.split_once('.').map_or((number, None), |(whole, fraction)| (whole, Some(fraction)));
    let unit = 1_u64 << shift;
    let whole = decimal(whole)?.checked_mul(unit)?;
    match fraction {
        None => Some(whole),
        Some(_) if shift == 0 => None,
        Some(digits) => whole.checked_add(part_of(unit, digits)?),
    }
}

fn decimal(digits: &str) -> Option<u64> {
    digits.starts_with(|c: char| c.is_ascii_digit()).then(|| digits.parse().ok())?
}

/// `0.digits` of `unit`, rounded down. More than 18 digits say nothing about bytes any more.
fn part_of(unit: u64, digits: &str) -> Option<u64> {
    if !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let digits = &digits[..digits.len().min(18)];
    let scale = 10_u128.pow(u32::try_from(digits.len()).ok()?);
    let parts = if digits.is_empty() { 0 } else { u128::from(decimal(digits)?) };
    u64::try_from(u128::from(unit) * parts / scale).ok()
}

impl Qapi for f64 {
    const KIND: Kind = Kind::Number;

    fn parse(value: Value, at: &At<'_>) -> Result<Self> {
        match (at.mode(), value) {
            (Mode::Json, Value::Number(number)) => number.as_f64().ok_or_else(|| at.wrong_type("number")),
            (Mode::Keyval, Value::String(word)) => {
                word.parse().ok().filter(|number: &f64| number.is_finite()).ok_or_else(|| at.expects("number"))
            }
            _ => Err(at.wrong_type("number")),
        }
    }

    fn to_value(&self) -> Value {
        Value::from(*self)
    }

    fn define(_: &mut Collector) -> Definition {
        Definition::builtin(Kind::Number)
    }
}

impl Qapi for String {
    const KIND: Kind = Kind::String;

    /// Refuses U+0000: names, paths and ids end up in C interfaces, where it would cut them short.
    fn parse(value: Value, at: &At<'_>) -> Result<Self> {
        let Value::String(text) = value else { return Err(at.wrong_type("string")) };
        if text.contains('\0') {
            return Err(Error::generic(format!("Parameter '{at}' must not contain a NUL character")));
        }
        Ok(text)
    }

    fn to_value(&self) -> Value {
        Value::String(self.clone())
    }

    fn define(_: &mut Collector) -> Definition {
        Definition::builtin(Kind::String)
    }
}

impl<T: Qapi> Qapi for Vec<T> {
    const KIND: Kind = Kind::Array;

    fn parse(value: Value, at: &At<'_>) -> Result<Self> {
        let Value::Array(elements) = value else { return Err(at.wrong_type("array")) };
        at.check_depth()?;
        elements.into_iter().enumerate().map(|(index, element)| T::parse(element, &at.index(index))).collect()
    }

    fn to_value(&self) -> Value {
        self.iter().map(T::to_value).collect()
    }

    fn define(collector: &mut Collector) -> Definition {
        Definition::Array { element: T::type_ref(collector) }
    }

    fn type_ref(collector: &mut Collector) -> TypeRef {
        collector.array::<T>()
    }
}

/// `null` and nothing else; an alternate's unit variant is described by it.
impl Qapi for () {
    const KIND: Kind = Kind::Null;

    fn parse(value: Value, at: &At<'_>) -> Result<Self> {
        if value.is_null() { Ok(()) } else { Err(at.wrong_type("null")) }
    }

    fn to_value(&self) -> Value {
        Value::Null
    }

    fn define(_: &mut Collector) -> Definition {
        Definition::builtin(Kind::Null)
    }
}

/// Anything at all.
impl Qapi for Value {
    const KIND: Kind = Kind::Any;

    fn parse(value: Value, _: &At<'_>) -> Result<Self> {
        Ok(value)
    }

    fn to_value(&self) -> Value {
        self.clone()
    }

    fn define(_: &mut Collector) -> Definition {
        Definition::builtin(Kind::Any)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{integer, size, switch};

    #[test]
    fn words_are_read_as_qemu_reads_them() {
        assert_eq!(["on", "yes", "true", "y"].map(switch), [Some(true); 4]);
        assert_eq!(["off", "no", "false", "n"].map(switch), [Some(false); 4]);
        assert_eq!(["", "1", "ON", "Yes"].map(switch), [None; 4]);

        assert_eq!(integer("0x10"), Some(16));
        assert_eq!(integer("010"), Some(8));
        assert_eq!(integer("-9223372036854775808"), Some(i64::MIN.into()));
        assert_eq!(integer("18446744073709551615"), Some(u64::MAX.into()));
        let refused =
            ["", "-", "+-1", "0x", "0x+1", "1k", "5 ", "1.0", "08", "-9223372036854775809", "18446744073709551616"];
        for word in refused {
            assert_eq!(integer(word), None, "{word}");
        }
    }

    #[test]
    fn sizes_take_suffixes_and_fractions() {
        let taken =
            [("0", 0), ("512", 512), ("0x200", 512), ("1b", 1), ("64k", 65536), ("1.5K", 1536), ("2M", 2 << 20)];
        for (word, bytes) in taken {
            assert_eq!(size(word), Some(bytes), "{word}");
        }
        assert_eq!(size("15E"), Some(15 << 60));
        assert_eq!(size("0.0000000000000000001k"), Some(0));
        for word in ["", "k", "-1", "1.5", "1.5b", "1.xk", "16E", "1kk", "99999E", " 1", "1e3", "0xfffffffffffffffff"] {
            assert_eq!(size(word), None, "{word}");
        }
    }

    proptest! {
        #[test]
        fn any_number_is_read_in_any_base(number in any::<u64>()) {
            for text in [format!("{number}"), format!("{number:#x}"), format!("0{number:o}"), format!("+{number}")] {
                prop_assert_eq!(integer(&text), Some(number.into()), "{}", text);
            }
            prop_assert_eq!(size(&number.to_string()), Some(number));
        }

        #[test]
        fn any_word_is_read_or_refused(word in "[0-9a-fxkKMGTPE.+é-]{0,24}") {
            let (read, sized) = (integer(&word), size(&word));
            prop_assert!(read.is_none_or(|number| number >= i64::MIN.into() && number <= u64::MAX.into()));
            prop_assert!(sized.is_none() || word.starts_with(|c: char| c.is_ascii_digit()));
        }
    }
}
