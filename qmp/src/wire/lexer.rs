//! Bytes to tokens, one at a time and without looking back, so that any chunking gives the same tokens.
//!
//! A token is judged by its shape only: what a keyword or an escape means, the parser finds out when the token is
//! complete. A byte that fits nowhere is a stray one; after it everything is skipped up to the next bracket, colon,
//! comma or control byte, where a new message may begin.

/// A piece of a message.
#[derive(Debug, PartialEq)]
pub(super) struct Token {
    pub(super) kind: TokenKind,
    /// Its bytes, a string's with quotes and escapes. Empty for punctuation, and where texts are not kept.
    pub(super) text: Vec<u8>,
    /// How many bytes it has.
    pub(super) len: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TokenKind {
    Open(Bracket),
    Close(Bracket),
    Colon,
    Comma,
    String,
    Integer,
    Float,
    /// Small letters; most are none.
    Keyword,
    /// What stood there up to and including the byte that did not fit.
    Stray,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bracket {
    Curly,
    Square,
}

#[derive(Debug)]
pub(super) struct Lexer {
    state: State,
    /// The bytes of the token so far; empty while they are not kept.
    text: Vec<u8>,
    len: usize,
    keep_text: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Between,
    Recovering,
    String { quote: u8 },
    Escape { quote: u8 },
    Keyword,
    Minus,
    Zero,
    Digits,
    Point,
    Fraction,
    ExponentMark,
    ExponentSign,
    Exponent,
}

/// What a byte does to the state it meets.
enum Step {
    /// It belongs to the token, which goes on.
    Take(State),
    /// It belongs to no token.
    Skip,
    /// It is the token's last.
    Last(TokenKind),
    /// The token was complete before it; it is looked at again.
    After(TokenKind),
    /// It may begin something after a stray one; it is looked at again.
    Recovered,
    /// It fits nowhere.
    Stray,
}

impl Lexer {
    pub(super) fn new() -> Self {
        Self { state: State::Between, text: Vec::new(), len: 0, keep_text: true }
    }

    /// How long the unfinished token is.
    pub(super) fn unfinished_len(&self) -> usize {
        self.len
    }

    /// While a broken message is skipped its texts are not kept, so that it takes no memory.
    pub(super) fn keep_text(&mut self, keep: bool) {
        self.keep_text = keep;
        if !keep {
            self.text = Vec::new();
        }
    }

    /// Consumes bytes from the front of `input` until a token is complete.
    pub(super) fn next(&mut self, input: &mut &[u8]) -> Option<Token> {
        while let Some((&byte, rest)) = input.split_first() {
            match step(self.state, byte) {
                Step::Take(state) => {
                    self.state = state;
                    self.take(input);
                }
                Step::Skip => *input = rest,
                Step::Recovered => self.state = State::Between,
                Step::After(kind) => return Some(self.token(kind)),
                Step::Last(kind) => {
                    self.push(&[byte]);
                    *input = rest;
                    return Some(self.token(kind));
                }
                Step::Stray => {
                    self.push(&[byte]);
                    *input = rest;
                    let token = self.token(TokenKind::Stray);
                    self.state = State::Recovering;
                    return Some(token);
                }
            }
        }
        None
    }

    /// Takes a byte, and in a string all plain ones behind it.
    fn take(&mut self, input: &mut &[u8]) {
        let run = match self.state {
            State::String { quote } => 1 + plain_run(&input[1..], quote),
            _ => 1,
        };
        let (taken, rest) = input.split_at(run);
        self.push(taken);
        *input = rest;
    }

    fn push(&mut self, bytes: &[u8]) {
        self.len += bytes.len();
        if self.keep_text {
            self.text.extend_from_slice(bytes);
        }
    }

    fn token(&mut self, kind: TokenKind) -> Token {
        self.state = State::Between;
        Token { kind, text: std::mem::take(&mut self.text), len: std::mem::take(&mut self.len) }
    }
}

fn step(state: State, byte: u8) -> Step {
    match (state, byte) {
        (State::Between, _) => begin(byte),
        // Control bytes, impossible ones and punctuation may stand before a new message.
        (State::Recovering, 0x00..=0x1F | 0xFE..=0xFF) => Step::Recovered,
        (State::Recovering, b'{' | b'}' | b'[' | b']' | b':' | b',') => Step::Recovered,
        (State::Recovering, _) => Step::Skip,

        (State::String { .. } | State::Escape { .. }, 0x00..=0x1F | 0xFE..=0xFF) => Step::Stray,
        (State::String { quote }, _) if byte == quote => Step::Last(TokenKind::String),
        (State::String { quote }, b'\\') => Step::Take(State::Escape { quote }),
        (State::String { quote } | State::Escape { quote }, _) => Step::Take(State::String { quote }),

        (State::Keyword, b'a'..=b'z') => Step::Take(State::Keyword),
        (State::Keyword, _) => Step::After(TokenKind::Keyword),

        (State::Minus, b'0') => Step::Take(State::Zero),
        (State::Minus, b'1'..=b'9') => Step::Take(State::Digits),
        (State::Digits, b'0'..=b'9') => Step::Take(State::Digits),
        (State::Zero | State::Digits, b'.') => Step::Take(State::Point),
        (State::Zero | State::Digits | State::Fraction, b'e' | b'E') => Step::Take(State::ExponentMark),
        (State::Zero, b'0'..=b'9') => Step::Stray,
        (State::Zero | State::Digits, _) => Step::After(TokenKind::Integer),
        (State::Point | State::Fraction, b'0'..=b'9') => Step::Take(State::Fraction),
        (State::ExponentMark, b'+' | b'-') => Step::Take(State::ExponentSign),
        (State::ExponentMark | State::ExponentSign | State::Exponent, b'0'..=b'9') => Step::Take(State::Exponent),
        (State::Fraction | State::Exponent, _) => Step::After(TokenKind::Float),
        (State::Minus | State::Point | State::ExponentMark | State::ExponentSign, _) => Step::Stray,
    }
}

fn begin(byte: u8) -> Step {
    match byte {
        b' ' | b'\t' | b'\r' | b'\n' => Step::Skip,
        b'{' => Step::Last(TokenKind::Open(Bracket::Curly)),
        b'}' => Step::Last(TokenKind::Close(Bracket::Curly)),
        b'[' => Step::Last(TokenKind::Open(Bracket::Square)),
        b']' => Step::Last(TokenKind::Close(Bracket::Square)),
        b':' => Step::Last(TokenKind::Colon),
        b',' => Step::Last(TokenKind::Comma),
        b'"' | b'\'' => Step::Take(State::String { quote: byte }),
        b'a'..=b'z' => Step::Take(State::Keyword),
        b'-' => Step::Take(State::Minus),
        b'0' => Step::Take(State::Zero),
        b'1'..=b'9' => Step::Take(State::Digits),
        _ => Step::Stray,
    }
}

/// How many bytes at the front are nothing but themselves in a string. Most of a large message is this.
fn plain_run(bytes: &[u8], quote: u8) -> usize {
    let plain = |byte: u8| (0x20..0xFE).contains(&byte) && byte != quote && byte != b'\\';
    // Whole blocks without an early way out, which the compiler turns into vector code.
    let blocks = bytes.chunks_exact(32).take_while(|block| block.iter().fold(true, |all, &byte| all & plain(byte)));
    let whole = blocks.count() * 32;
    whole + bytes[whole..].iter().take_while(|&&byte| plain(byte)).count()
}

#[cfg(test)]
mod tests {
    use super::{Lexer, TokenKind, plain_run};

    fn tokens(text: &[u8]) -> Vec<(TokenKind, String)> {
        let (mut lexer, mut rest) = (Lexer::new(), text);
        let all = std::iter::from_fn(|| lexer.next(&mut rest));
        all.map(|token| (token.kind, String::from_utf8_lossy(&token.text).into_owned())).collect()
    }

    #[test]
    fn numbers_end_where_they_must() {
        use TokenKind::{Float, Integer, Keyword, Stray};
        let cases: [(&str, &[_]); 9] = [
            ("123abc ", &[(Integer, "123"), (Keyword, "abc")]),
            ("0x10 ", &[(Integer, "0"), (Keyword, "x"), (Integer, "10")]),
            ("-0.5e+10 ", &[(Float, "-0.5e+10")]),
            ("1E5 ", &[(Float, "1E5")]),
            ("0123 ", &[(Stray, "01")]),
            ("-x ", &[(Stray, "-x")]),
            ("1. ", &[(Stray, "1. ")]),
            ("1e+ ", &[(Stray, "1e+ ")]),
            ("+1 ", &[(Stray, "+")]),
        ];
        for (text, expected) in cases {
            let found = tokens(text.as_bytes());
            let found: Vec<_> = found.iter().map(|(kind, text)| (*kind, text.as_str())).collect();
            assert_eq!(found, expected, "{text}");
        }
    }

    #[test]
    fn an_unfinished_token_waits() {
        assert_eq!(tokens(b"12"), []);
        assert_eq!(tokens(b"\"abc"), []);
    }

    #[test]
    fn a_plain_run_ends_at_each_special_byte_wherever_it_stands() {
        for special in [0x00, 0x1F, b'"', b'\\', 0xFE, 0xFF] {
            for place in 0..100 {
                let mut bytes = vec![b'x'; 100];
                bytes[place] = special;
                assert_eq!(plain_run(&bytes, b'"'), place);
            }
        }
        assert_eq!(plain_run("'é\u{7f}".as_bytes(), b'"'), 4);
    }
}
