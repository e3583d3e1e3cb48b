//! The control side: sockets, sessions and events. All of it runs on the control thread; commands are tasks.
//!
//! - `chardev` is what `--chardev` makes: where sessions come from; `stdio` makes a socket of stdin and stdout.
//! - `monitor` takes connections of a chardev; `session` serves one; `outbox` holds what it has still to send.
//! - `event` names what clients are told unasked, and `hub` tells them.

mod chardev;
mod event;
mod hub;
mod monitor;
mod outbox;
mod session;
mod stdio;

pub use chardev::{
    Chardev, ChardevBackend, ChardevInfo, ChardevOptions, Chardevs, NullChardev, SocketChardev, StdioChardev,
};
pub use event::Event;
pub(crate) use event::describe as describe_events;
pub use hub::Hub;
pub use monitor::{MonitorMode, MonitorOptions, Monitors};
