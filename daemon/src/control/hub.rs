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
