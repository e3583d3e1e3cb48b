//! Threads: I/O threads with their rings, the control thread, and how others reach them. The only threads that start
//! elsewhere are the pool's helpers and those of libraries.

use super::driver::Driver;
use super::exec::{Root, TaskId};
use super::local::{Entered, if_home};
use super::token::Token;
use super::wake::Mailbox;
use super::{Local, PollParams, fault, fd, sync};
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::task::Poll;
use std::thread::JoinHandle;

/// An I/O thread. Dropping it waits until its sources are removed and its operations are over, then ends it.
pub struct IoThread {
    remote: Remote,
    params: Mutex<PollParams>,
    tid: i32,
    engine: &'static str,
    handle: Option<JoinHandle<()>>,
}

impl IoThread {
    /// Starts a thread named `name` (15 bytes of it show in /proc). Fails where the thread or its driver cannot be had.
    pub fn spawn(name: &str, params: PollParams) -> io::Result<Self> {
        Self::spawn_on(Driver::for_io, name, params)
    }

    /// With a driver of the caller's choice, which is made on the new thread.
    pub(super) fn spawn_on(driver: MakeDriver, name: &str, params: PollParams) -> io::Result<Self> {
        let (started, starting) = mpsc::sync_channel(1);
        let handle = named(name).spawn(fault::inherited(move || {
            super::kept::exempt_thread();
            let local = match new_local(driver, params) {
                Ok(local) => local,
                Err(error) => return drop(started.send(Err(error))),
            };
            let hello = Hello { remote: local.remote(), tid: tid(), engine: local.engine_name() };
            if started.send(Ok(hello)).is_ok() {
                live(&local);
            }
        }))?;
        let hello = starting.recv().map_err(|_| io::Error::other("the thread ended before it began"))??;
        let Hello { remote, tid, engine } = hello;
        Ok(Self { remote, params: Mutex::new(params), tid, engine, handle: Some(handle) })
    }

    /// A handle through which work gets to the thread.
    pub fn remote(&self) -> Remote {
        self.remote.clone()
    }

    /// Changes how it polls, from its next wait on.
    pub fn set_params(&self, params: PollParams) {
        *self.params.lock().unwrap_or_else(PoisonError::into_inner) = params;
        self.remote.send(move |local| local.set_params(params));
    }

    /// How it polls.
    pub fn params(&self) -> PollParams {
        *self.params.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its id in the kernel.
    pub fn tid(&self) -> i32 {
        self.tid
    }

    /// How it waits for the kernel: `io_uring` or `epoll`.
    pub fn engine_name(&self) -> &'static str {
        self.engine
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.remote.shared.post(Message::Stop);
        let Some(handle) = self.handle.take() else { return };
        // Its sources may be the panicking thread's to remove.
        if std::thread::panicking() {
            return;
        }
        assert_ne!(handle.thread().id(), std::thread::current().id(), "an I/O thread cannot wait for its own end");
        // An error is a panic, which that thread has reported; release has aborted.
        let _ = handle.join();
    }
}

fn named(name: &str) -> std::thread::Builder {
    std::thread::Builder::new().name(name.chars().filter(|letter| *letter != '\0').collect())
}

struct Hello {
    remote: Remote,
    tid: i32,
    engine: &'static str,
}

type MakeDriver = fn(&Arc<Shared>) -> io::Result<Driver>;

fn new_local(driver: MakeDriver, params: PollParams) -> io::Result<Rc<Local>> {
    let shared = Arc::new(Shared::new()?);
    let driver = driver(&shared)?;
    Ok(Local::new(shared, driver, params))
}

fn live(local: &Rc<Local>) {
    let _entered = Entered::new(local);
    local.is_io.set(true);
    local.run(|| local.stopping.get() && local.sources.is_empty());
    local.finish();
}

/// Runs a future on this thread, with timers, operations (through helpers) and tasks, until it ends.
///
/// This is the control thread's loop, and `block_on` for tests. Tasks that are left are dropped; operations in flight
/// are waited for. Panics where the thread has a runtime already, or where epoll cannot be had.
pub fn run_control<F: Future>(main: impl FnOnce(Rc<Local>) -> F) -> F::Output {
    run_on(new_local(Driver::for_control, PollParams::OFF), main)
}

/// The same with the thread's own ring, for a program that has one thread for everything, which may therefore wait. Where
/// io_uring is refused there are helpers in its place.
pub fn run_io<F: Future>(main: impl FnOnce(Rc<Local>) -> F) -> F::Output {
    let local = new_local(Driver::for_io, PollParams::OFF);
    if let Ok(local) = &local {
        local.may_wait.set(true);
    }
    run_on(local, main)
}

fn run_on<F: Future>(local: io::Result<Rc<Local>>, main: impl FnOnce(Rc<Local>) -> F) -> F::Output {
    let local = local.expect("an eventfd and an epoll instance for this thread");
    let entered = Entered::new(&local);
    let root = Root::new(local.shared(), &local.tasks);
    let mut output = None;
    {
        let mut future = std::pin::pin!(main(local.clone()));
        local.run(|| {
            if let Poll::Ready(value) = root.poll(&local.tasks, future.as_mut()) {
                output = Some(value);
            }
            output.is_some()
        });
    }
    local.finish();
    drop(entered);
    output.expect("the loop runs until there is one")
}

/// The thread is gone, or going: what was sent has not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gone;

impl std::fmt::Display for Gone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the thread has ended")
    }
}

impl std::error::Error for Gone {}

/// How others reach a runtime thread. What is sent after its end is dropped.
#[derive(Clone)]
pub struct Remote {
    shared: Arc<Shared>,
}

impl Remote {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// Runs `call` on the thread, in the order of sending.
    pub fn send(&self, call: impl FnOnce(&Rc<Local>) + Send + 'static) {
        self.shared.post(Message::Call(Box::new(call)));
    }

    /// Runs `call` on the thread and gives its answer. [`Gone`] where the thread ends before it.
    pub async fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Rc<Local>) -> T + Send + 'static,
    ) -> Result<T, Gone> {
        let (sender, receiver) = sync::oneshot();
        self.send(move |local| {
            // Nobody may be waiting any more: that is no error.
            let _ = sender.send(call(local));
        });
        receiver.await
    }

    /// Starts a task on the thread. Only `make` travels; the future is made there and stays.
    pub fn spawn<F: Future<Output = ()> + 'static>(&self, make: impl FnOnce(Rc<Local>) -> F + Send + 'static) {
        self.send(move |local| local.spawn(make(local.clone())));
    }
}

/// What other threads may touch of a runtime thread: its mailbox, and the eventfd that ends its sleep.
pub(super) struct Shared {
    mailbox: Mailbox<Message>,
    signal: OwnedFd,
}

/// What can be said to a runtime thread.
pub(super) enum Message {
    Call(Call),
    /// A task may go on.
    Wake(TaskId),
    /// A helper is done with an operation.
    Completed {
        token: Token,
        result: i32,
    },
    /// End when nothing is left.
    Stop,
}

type Call = Box<dyn FnOnce(&Rc<Local>) + Send>;

impl Shared {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { mailbox: Mailbox::new(), signal: fd::eventfd()? })
    }

    #[inline]
    pub(super) fn post(&self, message: Message) {
        self.mailbox.post(message, || fd::signal(&self.signal));
    }

    /// A task's waker was called, on whatever thread.
    #[inline]
    pub(super) fn wake(self: &Arc<Self>, task: TaskId) {
        if !if_home(self, |local| local.tasks.push(task)) {
            self.post(Message::Wake(task));
        }
    }

    pub(super) fn signal_fd(&self) -> &OwnedFd {
        &self.signal
    }

    pub(super) fn take(&self) -> Option<Message> {
        self.mailbox.take()
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.mailbox.is_empty()
    }

    pub(super) fn prepare_sleep(&self) -> bool {
        self.mailbox.prepare_sleep()
    }

    pub(super) fn woke(&self) {
        self.mailbox.woke();
    }

    pub(super) fn close(&self) {
        self.mailbox.close();
    }
}

/// Handles go to any thread.
const _: fn() = || {
    fn anywhere<T: Send + Sync>() {}
    anywhere::<IoThread>();
    anywhere::<Remote>();
};

#[expect(unsafe_code, reason = "gettid has no safe form in std")]
fn tid() -> i32 {
    // SAFETY: the call takes nothing and cannot fail.
    unsafe { libc::gettid() }
}
