//! Numbers and names in a header of others: every look may be past the end, and a name may be anything.

use crate::base::{Error, Result};

/// Big-endian fields by their offsets.
pub(super) struct Fields<'b>(pub(super) &'b [u8]);

impl<'b> Fields<'b> {
    pub(super) fn bytes<const N: usize>(&self, at: usize) -> Result<[u8; N]> {
        let bytes = self.slice(at, N)?;
        Ok(bytes.try_into().unwrap_or([0; N]))
    }

    pub(super) fn slice(&self, at: usize, len: usize) -> Result<&'b [u8]> {
        let bytes = at.checked_add(len).and_then(|end| self.0.get(at..end));
        bytes.ok_or_else(|| Error::new("The header ends too early"))
    }

    pub(super) fn u16(&self, at: usize) -> Result<u16> {
        self.bytes(at).map(u16::from_be_bytes)
    }

    pub(super) fn u32(&self, at: usize) -> Result<u32> {
        self.bytes(at).map(u32::from_be_bytes)
    }

    pub(super) fn u64(&self, at: usize) -> Result<u64> {
        self.bytes(at).map(u64::from_be_bytes)
    }

    /// A name that ends with a zero byte inside its `len` bytes, or fills them.
    pub(super) fn name(&self, what: &str, at: usize, len: usize) -> Result<&'b str> {
        let bytes = self.slice(at, len)?;
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(len);
        let name = bytes.get(..end).and_then(|name| std::str::from_utf8(name).ok());
        let name = name.filter(|name| name.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' '));
        name.ok_or_else(|| Error::new(format!("{what} is no name")))
    }
}

/// Text of others, as an error may repeat it: at most 32 characters, all of which can be printed.
pub(super) fn shown(text: &str) -> String {
    text.chars().flat_map(char::escape_default).take(SHOWN).collect()
}

const SHOWN: usize = 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_of_others_is_short_and_can_be_printed() {
        assert_eq!(shown("aes-xts-plain64"), "aes-xts-plain64");
        assert_eq!(shown("a\n\u{1b}[2J\u{202e}é"), "a\\n\\u{1b}[2J\\u{202e}\\u{e9}");
        assert_eq!(shown(&"long".repeat(1000)).len(), 32);
        assert_eq!(shown(&"\0".repeat(1000)).len(), 32);
    }
}
