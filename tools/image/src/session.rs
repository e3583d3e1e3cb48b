//! One run of a tool: a control loop with a graph of its own, and a thread for I/O that is started when it is needed.

use std::cell::OnceCell;
use std::future::poll_fn;
use std::io::Write;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

use block_core::base::{Error, Result, ResultExt};
use block_core::graph::Graph;
use block_core::rt::sync::oneshot;
use block_core::rt::{IoThread, Local, PollParams, run_control};
use nix::sys::signal::{SigSet, Signal};

/// See the module's head.
pub struct Session {
    /// What the program was called as, without folders.
    pub program: String,
    /// The control loop.
    pub local: Rc<Local>,
    /// The nodes.
    pub graph: Rc<Graph>,
    io: OnceCell<IoThread>,
}

impl Session {
    /// Runs `main` on a control loop on this thread. Call it before another thread is made.
    pub fn run<R>(program: &str, main: impl AsyncFnOnce(&Session) -> R) -> R {
        let program = program.to_owned();
        // A file that may not grow any more is an error like others. If the signal cannot be blocked it ends us.
        let _ = SigSet::from(Signal::SIGXFSZ).thread_block();
        run_control(|local| async move {
            let graph = Graph::new(Arc::new(|_| ()));
            main(&Self { program, local, graph, io: OnceCell::new() }).await
        })
    }

    /// Runs `work` on the I/O thread, on that thread's ring. Give it [`DiskHandle`](crate::DiskHandle)s, of which it makes
    /// disks of its own.
    pub async fn on_io<T, F>(&self, work: impl FnOnce(Rc<Local>) -> F + Send + 'static) -> Result<T>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        let (sender, receiver) = oneshot();
        self.io()?.remote().spawn(move |local| {
            let work = work(local);
            async move { drop(sender.send(work.await)) }
        });
        receiver.await.map_err(|_| Error::new("The thread for I/O has ended"))
    }

    fn io(&self) -> Result<&IoThread> {
        if self.io.get().is_none() {
            let started = IoThread::spawn("io", PollParams::default()).doing(|| "Cannot start a thread for I/O")?;
            let _ = self.io.set(started);
        }
        Ok(self.io.get().expect("it was set above"))
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
