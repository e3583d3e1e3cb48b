//! Tells events to all sessions that negotiated. Those that a guest can cause at will are thinned out first.

use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::{Rc, Weak};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use block_core::graph::{EventSink, NodeEvent};
use block_core::rt::Local;
use block_core::rt::sync::{Notify, WakerSet};
use qmp::wire::EventLimiter;

use super::event::Event;
use super::session::Session;

/// Where events come together and go out.
pub struct Hub {
    local: Rc<Local>,
    sessions: RefCell<Vec<Weak<Session>>>,
    limiter: RefCell<EventLimiter<String, Event>>,
    /// Something waits in the limiter that did not before.
    held_back: Notify,
    letters: Arc<Letters>,
}

/// Events on their way from other threads.
#[derive(Default)]
struct Letters {
    waiting: Mutex<Vec<NodeEvent>>,
    arrived: WakerSet,
}

impl Hub {
    /// Starts the tasks that carry events.
    pub fn start(local: &Rc<Local>) -> Rc<Self> {
        let hub = Rc::new(Self {
            local: local.clone(),
            sessions: RefCell::default(),
            limiter: RefCell::new(EventLimiter::new(Duration::from_secs(1))),
            held_back: Notify::new(),
            letters: Arc::default(),
        });
        let (letters, waiting) = (hub.clone(), hub.clone());
        local.spawn(async move { letters.carry_letters().await });
        local.spawn(async move { waiting.carry_held_back().await });
        hub
    }

    /// What the graph calls on any thread. It never blocks for long: a letter box is all it touches.
    pub fn sink(&self) -> EventSink {
        let letters = self.letters.clone();
        Arc::new(move |event| {
            letters.waiting.lock().unwrap_or_else(PoisonError::into_inner).push(event);
            letters.arrived.wake_all();
        })
    }

    /// Tells an event to all, now or, if it comes too often, later.
    pub fn tell(&self, event: Event) {
        let Some(key) = event.key.clone() else { return self.send(&event) };
        let now = Instant::now();
        match self.limiter.borrow_mut().offer(key, event, now) {
            Some(event) => self.send(&event),
            None => self.held_back.notify_one(),
        }
    }

    pub(super) fn join(&self, session: &Rc<Session>) {
        self.sessions.borrow_mut().push(Rc::downgrade(session));
    }

    fn send(&self, event: &Event) {
        let mut sessions = self.sessions.borrow_mut();
        sessions.retain(|session| session.upgrade().inspect(|session| session.tell(event)).is_some());
    }

    async fn carry_letters(&self) {
        loop {
            let mut key = None;
            let letters = poll_fn(|cx| {
                key = Some(self.letters.arrived.register(cx.waker()));
                let letters = std::mem::take(&mut *self.letters.waiting.lock().unwrap_or_else(PoisonError::into_inner));
                if letters.is_empty() { Poll::Pending } else { Poll::Ready(letters) }
            });
            letters.await.into_iter().for_each(|letter| self.tell(Event::of_node(letter)));
        }
    }

    async fn carry_held_back(&self) {
        loop {
            let deadline = self.limiter.borrow().next_deadline();
            match deadline {
                Some(deadline) => self.local.sleep_until(deadline).await,
                None => self.held_back.notified().await,
            }
            let due = self.limiter.borrow_mut().due(Instant::now());
            due.iter().for_each(|event| self.send(event));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixStream;

    use block_core::rt::{blocking, run_control};
    use qmp::wire::Layout;
    use serde_json::Value;

    use super::*;
    use crate::daemon::Daemon;

    fn write_beyond(threshold: u64) -> NodeEvent {
        NodeEvent::WriteThreshold { node: "n0".to_owned(), exceeded: 1, threshold }
    }

    /// A client that negotiates, and the session that serves it.
    fn client(daemon: &Rc<Daemon>) -> BufReader<UnixStream> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        theirs.write_all(b"{\"execute\": \"qmp_capabilities\"}").unwrap();
        let session = Session::new(daemon, Arc::new(ours.into()), Layout::Compact);
        daemon.hub.join(&session);
        let daemon = daemon.clone();
        daemon.local.clone().spawn(async move { session.serve(&daemon).await });
        BufReader::new(theirs)
    }

    async fn lines(mut client: BufReader<UnixStream>, count: usize) -> (BufReader<UnixStream>, Vec<Value>) {
        blocking(move || {
            let mut lines = Vec::new();
            for _ in 0..count {
                let mut line = String::new();
                client.read_line(&mut line).unwrap();
                lines.push(serde_json::from_str(&line).unwrap());
            }
            (client, lines)
        })
        .await
    }

    #[test]
    fn a_flood_from_other_threads_is_told_at_once_and_then_by_its_last() {
        run_control(async |local| {
            let daemon = Daemon::new(local);
            let (client, hello) = lines(client(&daemon), 2).await;
            assert!(hello[1]["return"].is_object());
            let sink = daemon.hub.sink();
            let start = Instant::now();
            blocking(move || (0..1000).for_each(|threshold| sink(write_beyond(threshold)))).await;
            let (_, told) = lines(client, 2).await;
            let thresholds: Vec<_> = told.iter().map(|event| &event["data"]["write-threshold"]).collect();
            assert_eq!(thresholds, [0, 999]);
            assert!(told.iter().all(|event| event["event"] == "BLOCK_WRITE_THRESHOLD"));
            assert!(start.elapsed() >= Duration::from_secs(1), "the second one was held back");
        });
    }
}
