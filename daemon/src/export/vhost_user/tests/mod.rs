//! The export as a whole: a frontend on a socket, guest memory, a graph below.

pub(super) mod driver;
mod frontend;
mod server;
mod session;
