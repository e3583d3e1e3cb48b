//! One run of a tool: a graph of its own, on a loop that is control loop and I/O thread in one.

use std::future::poll_fn;
use std::io::Write;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use block_core::graph::Graph;
use block_core::rt::{Local, run_io};
use nix::sys::signal::{SigSet, Signal};

/// See the module's head.
pub struct Session {
    /// What the program was called as, without folders.
    pub program: String,
    /// The loop.
    pub local: Rc<Local>,
    /// The nodes.
    pub graph: Rc<Graph>,
}

impl Session {
    /// Runs `main` on a loop on this thread, with a ring of its own where the kernel has that. Call it before another thread
    /// is made.
    pub fn run<R>(program: &str, main: impl AsyncFnOnce(&Session) -> R) -> R {
        let program = program.to_owned();
        // A file that may not grow any more is an error like others. If the signal cannot be blocked it ends us.
        let _ = SigSet::from(Signal::SIGXFSZ).thread_block();
        run_io(|local| async move {
            let graph = Graph::new(Arc::new(|_| ()));
            main(&Self { program, local, graph }).await
        })
    }

    /// Says something on the standard error output, as the program.
    pub fn complain(&self, text: &str) {
        complain(&format!("{}: {text}\n", self.program));
    }
}

/// Prints for people and scripts. Nobody may be reading, which is no reason to stop.
pub fn say(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
}

/// The same on the standard error output.
pub fn complain(text: &str) {
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

/// Waits for both.
pub async fn both<A, B>(one: impl Future<Output = A>, other: impl Future<Output = B>) -> (A, B) {
    let (mut one, mut other) = (pin!(one), pin!(other));
    let (mut first, mut second) = (None, None);
    poll_fn(|cx| {
        if first.is_none()
            && let Poll::Ready(value) = one.as_mut().poll(cx)
        {
            first = Some(value);
        }
        if second.is_none()
            && let Poll::Ready(value) = other.as_mut().poll(cx)
        {
            second = Some(value);
        }
        if first.is_none() || second.is_none() {
            return Poll::Pending;
        }
        Poll::Ready(first.take().zip(second.take()).expect("both are there"))
    })
    .await
}
