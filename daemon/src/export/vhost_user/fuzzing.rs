//! A door for the fuzzer (`fuzz/`), there with `--cfg fuzzing` only: what a frontend sends, framed and judged.

use std::io::Write;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};

use super::config_space::CONFIG_LEN;
use super::descriptors::Received;
use super::filter::Filter;
use super::memory::Quota;
use super::wire::receive;

/// A connection on which these bytes come. Some messages have descriptors with them.
pub fn messages(bytes: &[u8]) {
    let Ok((ours, mut theirs)) = UnixStream::pair() else { return };
    if ours.set_nonblocking(false).is_err() || theirs.write_all(bytes.get(..MOST).unwrap_or(bytes)).is_err() {
        return;
    }
    let _ = theirs.shutdown(Shutdown::Write);
    let mut filter = Filter::new(u64::MAX, 4, Quota::default());
    let bin = Arc::default();
    while let Ok(Some(mut message)) = receive(&ours, &bin) {
        let fds = message.body.first().map_or(0, |byte| byte & 3);
        message.fds.extend((0..fds).filter_map(|_| descriptor()).map(|fd| Received::new(fd, &bin)));
        let _ = filter.judge(&mut message, &[0; CONFIG_LEN]);
        let _ = filter.wants_ack(&message);
    }
}

/// What fits into a socket's buffer.
const MOST: usize = 64 << 10;

fn descriptor() -> Option<OwnedFd> {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).ok()
}
