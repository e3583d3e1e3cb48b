//! Tokens to messages, as they come: a message in progress is a stack of unfinished objects and lists.
//!
//! A broken message gives one error, at once; the rest of it, up to the bracket that closes it, is skipped without
//! being kept. A stray byte ends the message then and there, so that 0xFF always makes a fresh start.

use std::fmt;

use serde_json::{Map, Number, Value};

use super::lexer::{Bracket, Lexer, Token, TokenKind};

/// How many bytes the tokens of one message may have together.
pub const MAX_MESSAGE_BYTES: usize = 64 << 20;
/// How many tokens one message may have.
pub const MAX_MESSAGE_TOKENS: usize = 2 << 20;
/// How many brackets may be open at a time.
pub const MAX_NESTING: usize = 1024;

/// What the bytes so far amount to.
#[derive(Debug, PartialEq)]
pub enum Event {
    /// A complete message. It need not be an object.
    Message(Value),
    /// A message, or something between messages, that is not QMP.
    Error(SyntaxError),
}

/// Why something is not QMP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SyntaxError {
    /// A byte that fits nowhere, with what stood before it.
    Stray(String),
    /// A word that is none of `true`, `false` and `null`.
    Keyword(String),
    /// Something else stands where a value must.
    ExpectingValue,
    /// Two elements of a list, or two members of an object, without a comma between them.
    ExpectingSeparator,
    /// A name without its value.
    MissingColon,
    /// A name that is not a string.
    KeyNotString,
    /// A name that stands twice in one object.
    DuplicateKey,
    /// A string that is not UTF-8, or has a code point that is no character.
    InvalidUtf8,
    /// A backslash with something behind it that is no escape.
    InvalidEscape,
    /// `\u` with something behind it that is no character.
    InvalidUnicode(String),
    /// A number that no double can hold.
    NumberRange(String),
    /// More than [`MAX_NESTING`] open brackets.
    TooDeep,
    /// More than [`MAX_MESSAGE_TOKENS`] tokens.
    TooManyTokens,
    /// More than [`MAX_MESSAGE_BYTES`]. Whoever sends that is not listened to any more.
    TooLong,
    /// The text ends within a value.
    Premature,
    /// There is more than one value.
    Trailing,
}

/// Makes messages of bytes.
#[derive(Debug)]
pub struct Parser {
    lexer: Lexer,
    message: Message,
    tokens: usize,
    bytes: usize,
}

#[derive(Debug)]
enum Message {
    Building(Builder),
    Skipping(Brackets),
}

impl Default for Parser {
    fn default() -> Self {
        Self::new()
    }
}

impl Parser {
    /// A parser between messages.
    pub fn new() -> Self {
        Self { lexer: Lexer::new(), message: Message::Building(Builder::default()), tokens: 0, bytes: 0 }
    }

    /// Consumes bytes from the front of `input` until there is something to say. `None` once all is consumed.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Event> {
        while let Some(token) = self.lexer.next(input) {
            if let Some(event) = self.token(token) {
                return Some(event);
            }
        }
        (self.bytes + self.lexer.unfinished_len() > MAX_MESSAGE_BYTES).then(|| self.too_long())
    }

    fn token(&mut self, token: Token) -> Option<Event> {
        if token.kind == TokenKind::Stray {
            self.start_afresh();
            return Some(Event::Error(SyntaxError::Stray(excerpt(&token.text))));
        }
        self.tokens += 1;
        self.bytes += token.len;
        if self.bytes > MAX_MESSAGE_BYTES {
            return Some(self.too_long());
        }
        match &mut self.message {
            Message::Skipping(open) => {
                if open.skip(token.kind) {
                    self.start_afresh();
                }
                None
            }
            Message::Building(_) if self.tokens > MAX_MESSAGE_TOKENS => {
                Some(self.broken(token.kind, SyntaxError::TooManyTokens))
            }
            Message::Building(builder) => match builder.token(token.kind, token.text) {
                Ok(None) => None,
                Ok(Some(value)) => {
                    self.start_afresh();
                    Some(Event::Message(value))
                }
                Err(error) => Some(self.broken(token.kind, error)),
            },
        }
    }

    /// The message broke at a token of this kind: what is left of it will be skipped.
    fn broken(&mut self, at: TokenKind, error: SyntaxError) -> Event {
        let mut open = match &self.message {
            Message::Building(builder) => builder.open_brackets(),
            Message::Skipping(_) => Brackets::default(),
        };
        if open.skip(at) {
            self.start_afresh();
        } else {
            self.message = Message::Skipping(open);
            self.lexer.keep_text(false);
        }
        Event::Error(error)
    }

    fn too_long(&mut self) -> Event {
        *self = Self::new();
        Event::Error(SyntaxError::TooLong)
    }

    fn start_afresh(&mut self) {
        self.message = Message::Building(Builder::default());
        self.lexer.keep_text(true);
        (self.tokens, self.bytes) = (0, 0);
    }

    fn is_between_messages(&self) -> bool {
        self.tokens == 0 && matches!(&self.message, Message::Building(_))
    }
}

/// Reads a text that is one value, as the command line has it.
pub fn parse_text(text: &str) -> Result<Value, SyntaxError> {
    // A number ends only where something else begins.
    let text = format!("{text}\n");
    let (mut parser, mut rest) = (Parser::new(), text.as_bytes());
    let value = match parser.next(&mut rest) {
        Some(Event::Message(value)) => value,
        Some(Event::Error(error)) => return Err(error),
        None => return Err(SyntaxError::Premature),
    };
    match parser.next(&mut rest) {
        None if parser.is_between_messages() => Ok(value),
        None | Some(Event::Message(_)) => Err(SyntaxError::Trailing),
        Some(Event::Error(error)) => Err(error),
    }
}

/// What is left open of a broken message: enough to find its end, and no more memory than a good one may take.
#[derive(Debug, Default)]
struct Brackets {
    open: Vec<Bracket>,
    /// How many more are open than a good message may have; their kinds are not kept.
    deeper: u64,
}

impl Brackets {
    /// Whether the message is over with this token. A bracket closes the last one of its kind, and all within.
    fn skip(&mut self, kind: TokenKind) -> bool {
        match kind {
            TokenKind::Open(_) if self.open.len() == MAX_NESTING => self.deeper += 1,
            TokenKind::Open(bracket) => self.open.push(bracket),
            TokenKind::Close(_) if self.deeper > 0 => self.deeper -= 1,
            TokenKind::Close(bracket) => while self.open.pop().is_some_and(|open| open != bracket) {},
            _ => {}
        }
        self.open.is_empty()
    }
}

/// A message that is good so far.
#[derive(Debug, Default)]
struct Builder {
    stack: Vec<Frame>,
    expect: Expect,
}

/// An unfinished object or list.
#[derive(Debug)]
enum Frame {
    Object { members: Map<String, Value>, name: String },
    Array(Vec<Value>),
}

/// What may come next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Expect {
    #[default]
    Value,
    ValueOrEnd,
    Name,
    NameOrEnd,
    Colon,
    CommaOrEnd,
}

impl Builder {
    /// Adds a token; gives the message if it is complete.
    fn token(&mut self, kind: TokenKind, text: Vec<u8>) -> Result<Option<Value>, SyntaxError> {
        match (self.expect, kind) {
            (Expect::Value | Expect::ValueOrEnd, TokenKind::Open(bracket)) => self.open(bracket),
            (Expect::ValueOrEnd | Expect::CommaOrEnd, TokenKind::Close(Bracket::Square)) if self.in_array() => {
                self.close()
            }
            (Expect::NameOrEnd | Expect::CommaOrEnd, TokenKind::Close(Bracket::Curly)) if !self.in_array() => {
                self.close()
            }
            (Expect::Value | Expect::ValueOrEnd, _) => self.complete(scalar(kind, text)?),
            (Expect::Name | Expect::NameOrEnd, TokenKind::String) => self.name(text),
            (Expect::Name | Expect::NameOrEnd, TokenKind::Integer | TokenKind::Float | TokenKind::Open(_)) => {
                Err(SyntaxError::KeyNotString)
            }
            (Expect::Name | Expect::NameOrEnd, _) => Err(scalar(kind, text).err().unwrap_or(SyntaxError::KeyNotString)),
            (Expect::Colon, TokenKind::Colon) => self.expecting(Expect::Value),
            (Expect::Colon, _) => Err(SyntaxError::MissingColon),
            (Expect::CommaOrEnd, TokenKind::Comma) if self.in_array() => self.expecting(Expect::Value),
            (Expect::CommaOrEnd, TokenKind::Comma) => self.expecting(Expect::Name),
            (Expect::CommaOrEnd, _) => Err(SyntaxError::ExpectingSeparator),
        }
    }

    fn expecting(&mut self, next: Expect) -> Result<Option<Value>, SyntaxError> {
        self.expect = next;
        Ok(None)
    }

    fn in_array(&self) -> bool {
        matches!(self.stack.last(), Some(Frame::Array(_)))
    }

    fn open(&mut self, bracket: Bracket) -> Result<Option<Value>, SyntaxError> {
        if self.stack.len() == MAX_NESTING {
            return Err(SyntaxError::TooDeep);
        }
        let (frame, next) = match bracket {
            Bracket::Curly => (Frame::Object { members: Map::new(), name: String::new() }, Expect::NameOrEnd),
            Bracket::Square => (Frame::Array(vec![]), Expect::ValueOrEnd),
        };
        self.stack.push(frame);
        self.expecting(next)
    }

    fn close(&mut self) -> Result<Option<Value>, SyntaxError> {
        match self.stack.pop() {
            Some(Frame::Object { members, .. }) => self.complete(Value::Object(members)),
            Some(Frame::Array(elements)) => self.complete(Value::Array(elements)),
            None => Err(SyntaxError::ExpectingValue),
        }
    }

    fn name(&mut self, text: Vec<u8>) -> Result<Option<Value>, SyntaxError> {
        let new = unquote(text)?;
        if let Some(Frame::Object { members, name }) = self.stack.last_mut() {
            if members.contains_key(&new) {
                return Err(SyntaxError::DuplicateKey);
            }
            *name = new;
        }
        self.expecting(Expect::Colon)
    }

    fn complete(&mut self, value: Value) -> Result<Option<Value>, SyntaxError> {
        match self.stack.last_mut() {
            None => return Ok(Some(value)),
            Some(Frame::Array(elements)) => elements.push(value),
            Some(Frame::Object { members, name }) => {
                members.insert(std::mem::take(name), value);
            }
        }
        self.expecting(Expect::CommaOrEnd)
    }

    fn open_brackets(&self) -> Brackets {
        let kind = |frame: &Frame| match frame {
            Frame::Object { .. } => Bracket::Curly,
            Frame::Array(_) => Bracket::Square,
        };
        Brackets { open: self.stack.iter().map(kind).collect(), deeper: 0 }
    }
}

fn scalar(kind: TokenKind, text: Vec<u8>) -> Result<Value, SyntaxError> {
    match kind {
        TokenKind::String => unquote(text).map(Value::String),
        TokenKind::Integer | TokenKind::Float => number(kind, &text),
        TokenKind::Keyword => match text.as_slice() {
            b"true" => Ok(Value::Bool(true)),
            b"false" => Ok(Value::Bool(false)),
            b"null" => Ok(Value::Null),
            _ => Err(SyntaxError::Keyword(excerpt(&text))),
        },
        TokenKind::Open(_) | TokenKind::Close(_) | TokenKind::Colon | TokenKind::Comma | TokenKind::Stray => {
            Err(SyntaxError::ExpectingValue)
        }
    }
}

/// Whole numbers that fit 64 bits are kept exactly, signed or not; others are doubles.
fn number(kind: TokenKind, text: &[u8]) -> Result<Value, SyntaxError> {
    let range = || SyntaxError::NumberRange(excerpt(text));
    let digits = std::str::from_utf8(text).map_err(|_| range())?;
    if kind == TokenKind::Integer {
        if let Ok(signed) = digits.parse::<i64>() {
            return Ok(signed.into());
        }
        if let Ok(unsigned) = digits.parse::<u64>() {
            return Ok(unsigned.into());
        }
    }
    digits.parse().ok().and_then(Number::from_f64).map(Value::Number).ok_or_else(range)
}

/// The characters of a string token. Without escapes, which is the usual case, its bytes are not copied.
fn unquote(mut text: Vec<u8>) -> Result<String, SyntaxError> {
    text.pop();
    text.drain(..1);
    let raw = String::from_utf8(text).map_err(|_| SyntaxError::InvalidUtf8)?;
    if !raw.is_ascii() && raw.chars().any(is_noncharacter) {
        return Err(SyntaxError::InvalidUtf8);
    }
    if !raw.contains('\\') {
        return Ok(raw);
    }
    unescape(&raw)
}

fn unescape(raw: &str) -> Result<String, SyntaxError> {
    let mut out = String::with_capacity(raw.len());
    let mut rest = raw;
    while let Some((plain, escaped)) = rest.split_once('\\') {
        out.push_str(plain);
        let mut after = escaped.chars();
        let character = match after.next().ok_or(SyntaxError::InvalidEscape)? {
            same @ ('"' | '\'' | '\\' | '/') => same,
            'b' => '\u{8}',
            'f' => '\u{c}',
            'n' => '\n',
            'r' => '\r',
            't' => '\t',
            'u' => {
                let (character, behind) = unicode_escape(after.as_str())?;
                after = behind.chars();
                character
            }
            _ => return Err(SyntaxError::InvalidEscape),
        };
        out.push(character);
        rest = after.as_str();
    }
    out.push_str(rest);
    Ok(out)
}

/// The character of `\uXXXX`, or of two of them that are a surrogate pair, and what stands behind.
fn unicode_escape(text: &str) -> Result<(char, &str), SyntaxError> {
    let invalid = || SyntaxError::InvalidUnicode(format!("\\u{}", text.chars().take(4).collect::<String>()));
    let (first, behind) = hex_unit(text).ok_or_else(invalid)?;
    let second = behind.strip_prefix("\\u").and_then(hex_unit);
    let (second, behind) = match second {
        Some((second, behind)) if (0xD800..0xDC00).contains(&first) => (Some(second), behind),
        _ => (None, behind),
    };
    match char::decode_utf16([first].into_iter().chain(second)).next() {
        Some(Ok(character)) if !is_noncharacter(character) => Ok((character, behind)),
        _ => Err(invalid()),
    }
}

fn hex_unit(text: &str) -> Option<(u16, &str)> {
    let (digits, behind) = text.split_at_checked(4)?;
    let all_hex = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    Some((u16::from_str_radix(digits, 16).ok().filter(|_| all_hex)?, behind))
}

/// Code points that Unicode promises never to use; QMP refuses them.
fn is_noncharacter(c: char) -> bool {
    let code = u32::from(c);
    code & 0xFFFE == 0xFFFE || (0xFDD0..=0xFDEF).contains(&code)
}

/// Enough of hostile bytes to recognise them by.
fn excerpt(text: &[u8]) -> String {
    const LIMIT: usize = 80;
    let mut shown = String::from_utf8_lossy(&text[..text.len().min(LIMIT)]).into_owned();
    if text.len() > LIMIT {
        shown.push('…');
    }
    shown
}

impl fmt::Display for SyntaxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self {
            Self::Stray(text) => return write!(f, "JSON parse error, stray '{text}'"),
            Self::Keyword(text) => return write!(f, "JSON parse error, invalid keyword '{text}'"),
            Self::InvalidUnicode(text) => {
                return write!(f, "JSON parse error, {text} is not a valid Unicode character");
            }
            Self::NumberRange(text) => return write!(f, "JSON parse error, number out of range '{text}'"),
            Self::TooDeep => return f.write_str("JSON nesting depth limit exceeded"),
            Self::TooManyTokens => return f.write_str("JSON token count limit exceeded"),
            Self::TooLong => return f.write_str("JSON token size limit exceeded"),
            Self::Trailing => return f.write_str("Expecting at most one JSON value"),
            Self::ExpectingValue => "expecting value",
            Self::ExpectingSeparator => "expected separator in list",
            Self::MissingColon => "missing : in object pair",
            Self::KeyNotString => "key is not a string in object",
            Self::DuplicateKey => "duplicate key",
            Self::InvalidUtf8 => "invalid UTF-8 sequence in string",
            Self::InvalidEscape => "invalid escape sequence in string",
            Self::Premature => "premature EOI",
        };
        write!(f, "JSON parse error, {what}")
    }
}

impl std::error::Error for SyntaxError {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::{Event, MAX_MESSAGE_BYTES, MAX_MESSAGE_TOKENS, MAX_NESTING, Message, Parser, SyntaxError, parse_text};

    fn events(text: &[u8]) -> Vec<Event> {
        let (mut parser, mut rest) = (Parser::new(), text);
        std::iter::from_fn(|| parser.next(&mut rest)).collect()
    }

    /// The values and error texts of `text`, and of the good message that follows it.
    fn said(text: &[u8]) -> Vec<Value> {
        let text = [text, GOOD].concat();
        let said = |event| match event {
            Event::Message(value) => value,
            Event::Error(error) => Value::from(error.to_string().trim_start_matches("JSON parse error, ")),
        };
        events(&text).into_iter().map(said).collect()
    }

    fn good() -> Value {
        json!({ "good": 1 })
    }

    const GOOD: &[u8] = br#"{"good":1}"#;

    #[test]
    fn values_are_read_exactly() {
        let text = br#"{"i":[0,-0,9223372036854775807,-9223372036854775808,18446744073709551615],
            "f":[1.0,-0.5,1e3,18446744073709551616],"s":"\"\/\\\b\f\n\r\t\u00e9\ud83d\ude00\u0000","n":[null,true,false,{},[]]}"#;
        let expected = json!({
            "i": [0, 0, i64::MAX, i64::MIN, u64::MAX],
            "f": [1.0, -0.5, 1000.0, 18446744073709551616.0],
            "s": "\"/\\\u{8}\u{c}\n\r\t\u{e9}\u{1F600}\0",
            "n": [null, true, false, {}, []],
        });
        assert_eq!(events(text), [Event::Message(expected)]);
        assert_eq!(said(b"1e400 "), [json!("number out of range '1e400'"), good()]);
    }

    #[test]
    fn qmp_03_a_truncated_message_waits_and_resynchronises() {
        assert_eq!(events(b"{\"execute\":\"query-ver"), []);
        assert_eq!(events(b"{\"execute\":\n"), [], "a new line is white space between tokens");
        assert_eq!(said(b"{\"execute\":\"query-ver\n"), [json!("stray '\"query-ver\n'"), good()]);
        assert_eq!(said(b"{\"execute\":\xff"), [json!("stray '\u{FFFD}'"), good()]);
    }

    #[test]
    fn qmp_04_garbage_gives_an_error_a_stray_token() {
        assert_eq!(said(b"@\x00\x01"), [json!("stray '@'"), json!("stray '\0'"), json!("stray '\u{1}'"), good()]);
        assert_eq!(
            said(b"} , abc "),
            [json!("expecting value"), json!("expecting value"), json!("invalid keyword 'abc'"), good()]
        );
        assert_eq!(said(b"\x80\x81 garbage \"of\" 'all' 123 sorts"), [json!("stray '\u{FFFD}'"), good()]);
        let long = [b"\"".as_slice(), &[b'x'; 1000], b"\n"].concat();
        assert!(said(&long)[0].as_str().unwrap().len() < 100, "an error does not repeat what it refuses");
    }

    #[test]
    fn qmp_05_0xff_within_a_message_makes_a_fresh_start() {
        assert_eq!(said(b"{\"execute\":\"query-ver\xff"), [json!("stray '\"query-ver\u{FFFD}'"), good()]);
        assert_eq!(said(b"[[[{\"a\":[\xff"), [json!("stray '\u{FFFD}'"), good()]);
        assert_eq!(said(b"{\"a\" \"b\" [[[ \xff").last(), Some(&good()), "while a broken message is skipped, too");
    }

    #[test]
    fn qmp_06_what_is_no_unicode_is_refused() {
        let utf8 = "invalid UTF-8 sequence in string";
        for bytes in [b"\x80".as_slice(), b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xef\xbf\xbe", b"\xc3"] {
            assert_eq!(said(&[b"{\"execute\":\"", bytes, b"\"}"].concat()), [json!(utf8), good()], "{bytes:?}");
        }
        for escape in ["\\ud800", "\\udc00", "\\uffff", "\\u12 x", "\\u+123", "\\ud800\\ud800"] {
            let said = said(format!("[\"{escape}\"]").as_bytes());
            let shown = escape.get(..6).unwrap();
            assert_eq!(said, [json!(format!("{shown} is not a valid Unicode character")), good()]);
        }
        assert_eq!(said(b"[\"\\x\"]"), [json!("invalid escape sequence in string"), good()]);
    }

    #[test]
    fn qmp_07_an_overlong_nul_is_refused() {
        assert_eq!(said(b"{\"execute\":\"\xc0\x80\"}"), [json!("invalid UTF-8 sequence in string"), good()]);
    }

    #[test]
    fn qmp_09_strings_may_have_single_quotes() {
        assert_eq!(said(br#"{'it\'s':'"','a':"'"}"#), [json!({ "it's": "\"", "a": "'" }), good()]);
    }

    #[test]
    fn qmp_10_a_broken_message_gives_one_error() {
        let cases = [
            ("{\"a\":1,}", "expecting value"),
            ("[1,]", "expecting value"),
            ("[1 2]", "expected separator in list"),
            ("[}", "expecting value"),
            ("{]", "expecting value"),
            ("{\"a\":]", "expecting value"),
            ("{\"a\":[1}", "expected separator in list"),
            ("{\"a\" \"b\"}", "missing : in object pair"),
            ("{a:1}", "invalid keyword 'a'"),
            ("{1:2}", "key is not a string in object"),
            ("{[1]:2}", "key is not a string in object"),
            ("{\"a\":nul}", "invalid keyword 'nul'"),
            ("{\"a\":{\"b\":[nul,[{}],{\"c\":[]}]}}", "invalid keyword 'nul'"),
        ];
        for (text, error) in cases {
            assert_eq!(said(text.as_bytes()), [json!(error), good()], "{text}");
        }
        assert_eq!(said(b"{\"a\":1 /* c */}"), [json!("stray '/'"), json!("expecting value"), good()]);
    }

    #[test]
    fn qmp_11_a_duplicate_key_is_refused_at_any_depth() {
        assert_eq!(said(br#"{"a":1,"a":1}"#), [json!("duplicate key"), good()]);
        assert_eq!(said(br#"[{"x":{"a":1,"\u0061":1}}]"#), [json!("duplicate key"), good()]);
        assert_eq!(said(br#"{"a":{"a":1},"b":{"a":1}}"#), [json!({ "a": { "a": 1 }, "b": { "a": 1 } }), good()]);
    }

    #[test]
    fn qmp_16_nesting_ends_at_1024() {
        let nested = |depth| [vec![b'['; depth], vec![b']'; depth]].concat();
        assert!(matches!(events(&nested(MAX_NESTING)).as_slice(), [Event::Message(_)]));
        for depth in [MAX_NESTING + 1, 1030, 5000] {
            assert_eq!(said(&nested(depth)), [json!("JSON nesting depth limit exceeded"), good()], "{depth}");
        }
    }

    #[test]
    fn qmp_16_a_million_brackets_take_no_memory() {
        let mut parser = Parser::new();
        let open = vec![b'['; 1_000_000];
        let mut rest = open.as_slice();
        assert_eq!(parser.next(&mut rest), Some(Event::Error(SyntaxError::TooDeep)));
        assert_eq!(parser.next(&mut rest), None);
        assert_eq!(parser.next(&mut open.as_slice()), None);
        let Message::Skipping(brackets) = &parser.message else { panic!("{parser:?}") };
        // The bracket that was one too many is counted as well.
        assert_eq!((brackets.open.len(), brackets.deeper), (MAX_NESTING, 2_000_000 - 1024));
    }

    #[test]
    fn qmp_17_a_string_of_a_mebibyte_is_a_string() {
        let text = "x".repeat(1 << 20);
        assert_eq!(events(format!("\"{text}\"").as_bytes()), [Event::Message(Value::from(text))]);
    }

    #[test]
    fn qmp_18_a_message_ends_at_64_mebibytes() {
        let string = |len| [b"\"".as_slice(), &vec![b'x'; len], b"\""].concat();
        assert!(matches!(events(&string(63 << 20)).as_slice(), [Event::Message(_)]));

        let mut parser = Parser::new();
        let chunk = vec![b'x'; 1 << 16];
        assert_eq!(parser.next(&mut b"\"".as_slice()), None);
        for _ in 0..MAX_MESSAGE_BYTES / chunk.len() - 1 {
            assert_eq!(parser.next(&mut chunk.as_slice()), None);
        }
        assert_eq!(parser.next(&mut chunk.as_slice()), Some(Event::Error(SyntaxError::TooLong)));
    }

    #[test]
    fn qmp_18_many_small_tokens_count_as_well() {
        let more = format!(",\"{}\"", "x".repeat(125)).repeat(1 << 13);
        let mut parser = Parser::new();
        assert_eq!(parser.next(&mut b"[0".as_slice()), None);
        let first = (0..1 << 10).find_map(|_| parser.next(&mut more.as_bytes()));
        assert_eq!(first, Some(Event::Error(SyntaxError::TooLong)));
    }

    #[test]
    fn qmp_19_a_message_has_at_most_two_mebi_tokens() {
        let list = |elements: usize| format!("[{}0]", "0,".repeat(elements - 1));
        assert!(matches!(events(list(MAX_MESSAGE_TOKENS / 2 - 1).as_bytes()).as_slice(), [Event::Message(_)]));
        let said = said(list(MAX_MESSAGE_TOKENS / 2 + 1).as_bytes());
        assert_eq!(said, [json!("JSON token count limit exceeded"), good()]);
    }

    #[test]
    fn a_text_is_one_value() {
        assert_eq!(parse_text("12"), Ok(json!(12)));
        assert_eq!(parse_text(""), Err(SyntaxError::Premature));
        assert_eq!(parse_text("[1"), Err(SyntaxError::Premature));
        assert_eq!(parse_text("\"a"), Err(SyntaxError::Stray("\"a\n".to_owned())));
        assert_eq!(parse_text("1 2"), Err(SyntaxError::Trailing));
    }

    /// Pieces of messages, good and broken, in any order.
    fn soup() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            prop::sample::select(vec![
                b"{\"execute\":\"a\",\"id\":1}".as_slice(),
                b"{'a':[1,-2.5e3,true,null]}",
                b"\"\\u00e9\\ud83d\\ude00\"",
                b"{",
                b"}",
                b"[",
                b"]",
                b":",
                b",",
                b"\"k\"",
                b"'",
                b"\"",
                b"\\",
                b"\xff",
                b"\n",
                b" ",
                b"-0.",
                b"12",
                b"nul",
                b"\xc3\xa9",
                b"/*",
            ])
            .prop_map(<[u8]>::to_vec),
            prop::collection::vec(any::<u8>(), 1..4),
        ];
        prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn any_chunking_gives_the_same_events(text in soup(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20)) {
            let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(text.len() + 1)).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let mut parser = Parser::new();
            let mut chunked = vec![];
            for ends in cuts.windows(2) {
                let mut chunk = &text[ends[0]..ends[1]];
                chunked.extend(std::iter::from_fn(|| parser.next(&mut chunk)));
            }
            prop_assert_eq!(chunked, events(&text));
        }

        #[test]
        fn a_fresh_start_is_always_possible(mut text in soup()) {
            text.push(0xFF);
            text.extend_from_slice(GOOD);
            prop_assert_eq!(events(&text).pop(), Some(Event::Message(good())));
        }

        #[test]
        fn what_is_written_is_read_back(text in any::<String>(), number in any::<i64>()) {
            prop_assume!(!text.chars().any(super::is_noncharacter));
            let value = json!({ "id": [text, number] });
            let line = crate::wire::to_line(&value, crate::wire::Layout::Pretty);
            prop_assert!(line.is_ascii());
            prop_assert_eq!(events(&line), [Event::Message(value)]);
        }
    }
}
