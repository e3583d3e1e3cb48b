//! Bytes in, requests out; answers in, bytes out. The caller owns the socket, the clock and the commands.
//!
//! `lexer.rs` cuts bytes into tokens, `parser.rs` makes messages of them, `format.rs` writes answers, `session.rs` is
//! the state of one connection, and `limit.rs` thins out events that come too often.
//!
//! What is said was compared with qemu-storage-daemon 10.0.2, request by request. It differs on purpose where
//! - a bracket closes what it cannot close (`{"a":[1}`): QEMU waits for more, here the message is over;
//! - brackets nest too deep: QEMU then answers each closing bracket with an error, here the rest is skipped;
//! - an id is larger than 1 MiB, which is refused, and a sentence about a request longer than 64 KiB, which is cut off;
//! - a string has an overlong NUL (`C0 80`), or a number is infinite (`1e400`): QEMU takes them;
//! - an error concerns an enum or a list element: its place is named in full, `file.driver` or `enable[0]`.

mod format;
mod lexer;
mod limit;
mod parser;
mod session;

pub use format::{Layout, ListReply, to_line};
pub use limit::EventLimiter;
pub use parser::{Event, MAX_MESSAGE_BYTES, MAX_MESSAGE_TOKENS, MAX_NESTING, Parser, SyntaxError, parse_text};
pub use session::{
    Action, Capability, Commands, MAX_DESC_BYTES, MAX_ERRORS_IN_A_ROW, MAX_ID_BYTES, MAX_QUEUED, MAX_QUEUED_OOB,
    NegotiateArguments, Session, VersionInfo, VersionTriple,
};
