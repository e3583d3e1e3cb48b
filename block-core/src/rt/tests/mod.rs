//! Every engine runs the same suite: the ring, the fallback, and (where it makes sense) the control thread.
//! A test fails by a time-out where something is lost.

mod faults;
mod ops;
mod primitives;
mod sources;

mod threads;

use super::driver::Driver;
use super::{IoThread, Local, PollParams};
use std::rc::Rc;
use std::sync::mpsc;
use std::time::Duration;

/// What a thread under test waits with.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Ring,
    Fallback,
}

impl Kind {
    fn thread(self) -> IoThread {
        self.thread_with(PollParams::default())
    }

    fn thread_with(self, params: PollParams) -> IoThread {
        let (thread, name) = match self {
            Self::Ring => (IoThread::spawn("rt-test", params), "io_uring"),
            Self::Fallback => (IoThread::spawn_on(Driver::for_control, "rt-test", params), "epoll"),
        };
        let thread = thread.unwrap();
        assert_eq!(thread.engine_name(), name, "these tests need both engines");
        thread
    }
}

/// Runs a future on the thread, and fails where it takes longer than anything here should.
fn on<T: Send + 'static, F: Future<Output = T> + 'static>(
    thread: &IoThread,
    make: impl FnOnce(Rc<Local>) -> F + Send + 'static,
) -> T {
    let (sender, receiver) = mpsc::channel();
    thread.remote().spawn(move |local| {
        let future = make(local);
        async move { sender.send(future.await).unwrap() }
    });
    receiver.recv_timeout(PATIENCE).expect("something was lost")
}

const PATIENCE: Duration = Duration::from_secs(20);

/// Makes a test of each function for each engine.
macro_rules! on_every_engine {
    ($($test:ident)*) => {
        mod ring { $(#[test] fn $test() { super::$test(super::Kind::Ring) })* }
        mod fallback { $(#[test] fn $test() { super::$test(super::Kind::Fallback) })* }
    };
}
use on_every_engine;
