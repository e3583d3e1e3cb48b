//! JSON as QMP writes it: ASCII only, a space after `:` and `,`, ended by CR LF.

use serde_json::Value;

/// How an answer is laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// One line a message.
    #[default]
    Compact,
    /// Indented, as the monitor option `pretty=on` asks.
    Pretty,
}

/// The bytes of one message.
pub fn to_line(value: &Value, layout: Layout) -> Vec<u8> {
    let mut writer = Writer { out: String::new(), layout, depth: 0 };
    writer.value(value);
    writer.out.push_str("\r\n");
    writer.out.into_bytes()
}

/// A reply whose answer is a list that is too long to be made, or written, in one go. Its rows are written as they come.
#[derive(Debug)]
pub struct ListReply {
    writer: Writer,
    any: bool,
}

impl ListReply {
    pub(super) fn begin(layout: Layout) -> Self {
        let mut writer = Writer { out: String::new(), layout, depth: 0 };
        writer.open('{');
        writer.separate(false);
        writer.name("return");
        writer.open('[');
        Self { writer, any: false }
    }

    /// Adds a row.
    pub fn row(&mut self, row: &Value) {
        self.writer.separate(self.any);
        self.writer.value(row);
        self.any = true;
    }

    /// What has been written since this was last asked.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.writer.out).into_bytes()
    }

    /// How many bytes that is.
    #[must_use]
    pub fn untaken(&self) -> usize {
        self.writer.out.len()
    }

    pub(super) fn end(mut self, id: Option<&Value>) -> Vec<u8> {
        self.writer.close(']', self.any);
        if let Some(id) = id {
            self.writer.separate(true);
            self.writer.name("id");
            self.writer.value(id);
        }
        self.writer.close('}', true);
        self.writer.out.push_str("\r\n");
        self.take()
    }
}

#[derive(Debug)]
struct Writer {
    out: String,
    layout: Layout,
    depth: usize,
}

impl Writer {
    /// Recursion is bounded by what the parser lets in, and by what commands build.
    fn value(&mut self, value: &Value) {
        match value {
            Value::Null => self.out.push_str("null"),
            Value::Bool(true) => self.out.push_str("true"),
            Value::Bool(false) => self.out.push_str("false"),
            Value::Number(number) => self.out.push_str(&number.to_string()),
            Value::String(text) => self.string(text),
            Value::Array(elements) => self.group(['[', ']'], elements, |writer, element| writer.value(element)),
            Value::Object(members) => self.group(['{', '}'], members, |writer, (name, value)| {
                writer.name(name);
                writer.value(value);
            }),
        }
    }

    fn group<T>(&mut self, [open, close]: [char; 2], parts: impl IntoIterator<Item = T>, each: impl Fn(&mut Self, T)) {
        self.open(open);
        let mut any = false;
        for part in parts {
            self.separate(any);
            each(self, part);
            any = true;
        }
        self.close(close, any);
    }

    fn open(&mut self, bracket: char) {
        self.out.push(bracket);
        self.depth += 1;
    }

    /// `any`: there is something inside.
    fn close(&mut self, bracket: char, any: bool) {
        self.depth -= 1;
        if any {
            self.new_line();
        }
        self.out.push(bracket);
    }

    fn name(&mut self, name: &str) {
        self.string(name);
        self.out.push_str(": ");
    }

    fn separate(&mut self, after_another: bool) {
        match (self.layout, after_another) {
            (Layout::Compact, true) => self.out.push_str(", "),
            (Layout::Pretty, true) => self.out.push(','),
            (_, false) => {}
        }
        self.new_line();
    }

    fn new_line(&mut self) {
        if self.layout == Layout::Pretty {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n("    ", self.depth.min(MAX_INDENT)));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        let mut rest = text;
        while let Some(plain) = rest.find(|c: char| !is_plain(c)) {
            self.out.push_str(&rest[..plain]);
            let special = rest[plain..].chars().next().unwrap_or_default();
            self.escape(special);
            rest = &rest[plain + special.len_utf8()..];
        }
        self.out.push_str(rest);
        self.out.push('"');
    }

    fn escape(&mut self, special: char) {
        match special {
            '"' => self.out.push_str("\\\""),
            '\\' => self.out.push_str("\\\\"),
            '\u{8}' => self.out.push_str("\\b"),
            '\u{c}' => self.out.push_str("\\f"),
            '\n' => self.out.push_str("\\n"),
            '\r' => self.out.push_str("\\r"),
            '\t' => self.out.push_str("\\t"),
            other => {
                for unit in other.encode_utf16(&mut [0; 2]) {
                    self.out.push_str("\\u");
                    let digit = |shift: u32| char::from(HEX[usize::from(*unit >> shift & 0xf)]);
                    self.out.extend([12, 8, 4, 0].map(digit));
                }
            }
        }
    }
}

const HEX: &[u8; 16] = b"0123456789ABCDEF";

/// Levels of nesting that are shown by indentation at the most, or what a client nests deeply would become a thousand times as
/// long.
const MAX_INDENT: usize = 16;

fn is_plain(c: char) -> bool {
    matches!(c, ' '..='~') && c != '"' && c != '\\'
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Layout, ListReply, to_line};

    #[test]
    fn a_list_in_rows_is_the_same_list() {
        let rows = [json!({ "a": [1, {}] }), json!("é"), json!([])];
        for layout in [Layout::Compact, Layout::Pretty] {
            for count in 0..=rows.len() {
                for id in [None, Some(json!({ "b": [2] }))] {
                    let mut whole = json!({ "return": rows[..count] });
                    if let Some(id) = &id {
                        whole["id"] = id.clone();
                    }
                    let (mut reply, mut bytes) = (ListReply::begin(layout), Vec::new());
                    for row in &rows[..count] {
                        reply.row(row);
                        bytes.extend(reply.take());
                    }
                    bytes.extend(reply.end(id.as_ref()));
                    assert_eq!(String::from_utf8(bytes), String::from_utf8(to_line(&whole, layout)));
                }
            }
        }
    }

    #[test]
    fn what_is_nested_deeply_does_not_grow_with_its_depth() {
        let ones = serde_json::Value::from(vec![1; 1000]);
        let nested = (0..1000).fold(ones, |inner, _| vec![inner].into());
        assert!(to_line(&nested, Layout::Pretty).len() < 250_000);
        let line = String::from_utf8(to_line(&json!([[1]]), Layout::Pretty)).unwrap();
        assert_eq!(line, "[\n    [\n        1\n    ]\n]\r\n");
    }

    #[test]
    fn answers_are_ascii_and_end_in_cr_lf() {
        let value = json!({ "a": [1, -2.5, true, null, {}, []], "b": "é😀\u{7f}\u{1}\"\\\u{8}\u{c}\n\r\t/" });
        let expected = concat!(
            r#"{"a": [1, -2.5, true, null, {}, []], "#,
            r#""b": "\u00E9\uD83D\uDE00\u007F\u0001\"\\\b\f\n\r\t/"}"#,
            "\r\n"
        );
        assert_eq!(String::from_utf8(to_line(&value, Layout::Compact)).unwrap(), expected);
    }

    #[test]
    fn pretty_answers_are_indented_by_four() {
        let value = json!({ "return": { "list": [1, 2], "none": {} } });
        let expected = "{\n    \"return\": {\n        \"list\": [\n            1,\n            2\n        ],\n        \"none\": {}\n    }\n}\r\n";
        assert_eq!(String::from_utf8(to_line(&value, Layout::Pretty)).unwrap(), expected);
    }
}
