//! Bytes in, requests out; answers in, bytes out. The caller owns the socket, the clock and the commands.
//!
//! `lexer.rs` cuts bytes into tokens, `parser.rs` makes messages of them, `format.rs` writes answers, `session.rs` is
//! the state of one connection, and `limit.rs` thins out events that come too often.

mod format;
mod lexer;
mod limit;
mod parser;
mod session;

pub use format::{Layout, to_line};
pub use limit::EventLimiter;
pub use parser::{Event, MAX_MESSAGE_BYTES, MAX_MESSAGE_TOKENS, MAX_NESTING, Parser, SyntaxError, parse_text};
pub use session::{
    Action, Capability, Commands, MAX_ERRORS_IN_A_ROW, MAX_QUEUED, MAX_QUEUED_OOB, NegotiateArguments, Session,
    VersionInfo, VersionTriple,
};
