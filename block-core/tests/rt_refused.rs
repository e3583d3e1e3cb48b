//! Where io_uring is refused, the same thread works with epoll and helpers. In a process of its own, since the
//! environment says so.
#![expect(clippy::unwrap_used, reason = "a test")]

use block_core::rt::{Engine, IoBuf, IoThread, Op, PollParams, run_control};
use std::io::Write;
use std::process::Command;
use std::sync::Arc;

const REFUSE: &str = "TRELLIS_NO_IO_URING";

#[test]
fn a_refused_ring_is_replaced() {
    if std::env::var_os(REFUSE).is_some() {
        return works_on("epoll");
    }
    works_on("io_uring");
    let mut child = Command::new(std::env::current_exe().unwrap());
    let output = child.args(["--exact", "a_refused_ring_is_replaced"]).env(REFUSE, "1").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

fn works_on(engine: &str) {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"bytes").unwrap();
    let fd = Arc::new(std::os::fd::OwnedFd::from(file));
    let thread = IoThread::spawn("rt-refused", PollParams::default()).unwrap();
    assert_eq!(thread.engine_name(), engine);
    let (sender, receiver) = block_core::rt::sync::oneshot();
    thread.remote().spawn(move |local| async move {
        let buf = IoBuf::alloc(5, 8).unwrap();
        let count = local.submit(Engine::Ring, Op::Read { fd, buf: buf.clone(), offset: 0 }, None).await;
        sender.send((count, buf.to_vec())).unwrap();
    });
    assert_eq!(run_control(|_| receiver).unwrap(), (5, b"bytes".to_vec()));
}
