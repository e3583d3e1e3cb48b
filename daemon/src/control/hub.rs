//! Tells events to all sessions that negotiated. Those that a guest can cause at will are thinned out first.

use std::cell::RefCell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::future::poll_fn;
use std::mem::{Discriminant, discriminant};
use std::rc::{Rc, Weak};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use block_core::graph::{EventSink, NodeEvent};
use block_core::rt::Local;
use block_core::rt::sync::{Notify, WakerSet, yield_now};
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
    waiting: Mutex<Pile>,
    arrived: WakerSet,
}

/// In order. Of one kind and node only the first and the last: a guest can cause some as often as it likes, and more is
/// not told of them anyway.
#[derive(Default)]
struct Pile {
    letters: Vec<NodeEvent>,
    /// Where the last one is.
    last: HashMap<(Discriminant<NodeEvent>, String), Last>,
}

enum Last {
    IsFirst,
    IsAt(usize),
}

impl Pile {
    fn push(&mut self, letter: NodeEvent) {
        match self.last.entry((discriminant(&letter), letter.node().to_owned())) {
            Entry::Vacant(none) => {
                none.insert(Last::IsFirst);
                self.letters.push(letter);
            }
            Entry::Occupied(mut last) => match *last.get() {
                Last::IsFirst => {
                    last.insert(Last::IsAt(self.letters.len()));
                    self.letters.push(letter);
                }
                Last::IsAt(place) => self.letters[place] = letter,
            },
        }
    }
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
                let pile = std::mem::take(&mut *self.letters.waiting.lock().unwrap_or_else(PoisonError::into_inner));
                if pile.letters.is_empty() { Poll::Pending } else { Poll::Ready(pile.letters) }
            });
            letters.await.into_iter().for_each(|letter| self.tell(Event::of_node(letter)));
            // There may be some again already: commands and signals have their turn first.
            yield_now().await;
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

    use block_core::base::IoError;
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
    fn of_a_flood_the_first_and_the_last_wait_for_each_kind_and_node() {
        let error = |node: &str, write| NodeEvent::IoError { node: node.to_owned(), write, error: IoError::NoSpace };
        let mut pile = Pile::default();
        for round in 0..100 {
            pile.push(write_beyond(round));
            pile.push(error("n0", round == 99));
            pile.push(error("n1", round == 0));
        }
        let expected = [
            write_beyond(0),
            error("n0", false),
            error("n1", true),
            write_beyond(99),
            error("n0", true),
            error("n1", false),
        ];
        assert_eq!(pile.letters, expected);
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
