//! The QMP language: what a client may say, and what it is answered. No sockets and no block words.
//!
//! * [`wire`] turns bytes into requests and answers into bytes. It is sans-I/O: a caller owns the socket and the clock.
//! * [`schema`] turns JSON into option structs, and describes those structs to clients and to the manual.
//! * [`keyval`] reads the command line's `driver=file,file.filename=…` into the same JSON, for the same structs.
//!
//! Names, types and error texts follow QEMU 10.0.2 as observed from outside, so that its clients work unchanged.

// The derive macro names this crate as `::qmp`, here too.
extern crate self as qmp;

mod error;
pub mod keyval;
pub mod schema;
pub mod wire;

pub use error::{Error, ErrorClass, Result};
pub use schema::Qapi;
