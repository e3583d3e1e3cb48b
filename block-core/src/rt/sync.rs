//! Waiting for each other: on one thread ([`Notify`], [`LocalMutex`]), and across threads ([`oneshot`], [`WakerSet`]).
//! None of them blocks a thread.

use super::Gone;
use slab::Slab;
use std::cell::{Cell, RefCell, RefMut};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// Wakes tasks of the same thread. A notification that nobody waits for is kept, once.
#[derive(Default)]
pub struct Notify {
    kept: Cell<bool>,
    line: Line,
}

impl Notify {
    /// Nothing has been notified.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends the wait of who has waited longest, or of the next one who will.
    pub fn notify_one(&self) {
        if !self.line.grant_first(Grant::Own) {
            self.kept.set(true);
        }
    }

    /// Ends the wait of all who wait now; keeps nothing.
    pub fn notify_all(&self) {
        while self.line.grant_first(Grant::Shared) {}
    }

    /// Ends with the next notification, or at once where one was kept.
    pub fn notified(&self) -> Notified<'_> {
        Notified { notify: self, place: None }
    }
}

/// The wait for a [`Notify`].
#[must_use = "a wait does nothing unless it is awaited"]
pub struct Notified<'a> {
    notify: &'a Notify,
    place: Option<Rc<Place>>,
}

impl Future for Notified<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.place.is_none() && self.notify.kept.take() {
            return Poll::Ready(());
        }
        let notify = self.notify;
        let place = self.place.get_or_insert_with(|| notify.line.join());
        if place.wait(cx.waker()) == Grant::None {
            return Poll::Pending;
        }
        self.place = None;
        Poll::Ready(())
    }
}

impl Drop for Notified<'_> {
    fn drop(&mut self) {
        // A notification for one that went unheard goes to the next.
        if let Some(place) = self.place.take()
            && self.notify.line.leave(&place) == Grant::Own
        {
            self.notify.notify_one();
        }
    }
}

/// Runs all at once, on this thread; gives their values in order when the last has ended.
pub async fn together<F: Future>(futures: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    let mut all: Vec<_> = futures.into_iter().map(|future| (Box::pin(future), None)).collect();
    poll_fn(|cx| {
        for (future, value) in all.iter_mut().filter(|(_, value)| value.is_none()) {
            if let Poll::Ready(ready) = future.as_mut().poll(cx) {
                *value = Some(ready);
            }
        }
        if all.iter().all(|(_, value)| value.is_some()) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    all.into_iter().filter_map(|(_, value)| value).collect()
}

/// Lets the thread's other tasks go on first: for work that is long and never waits.
pub async fn yield_now() {
    let mut yielded = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Work that is long and never waits, cut into turns: between its steps the thread's other tasks go on whenever a turn is over.
pub struct Turns {
    since: Instant,
}

impl Turns {
    /// The first turn begins.
    #[must_use]
    pub fn begin() -> Self {
        Self { since: Instant::now() }
    }

    /// To be called after each step, which should take much less than a turn.
    pub async fn step(&mut self) {
        if self.since.elapsed() >= TURN {
            yield_now().await;
            self.since = Instant::now();
        }
    }
}

/// So long others are kept waiting by one task.
const TURN: Duration = Duration::from_millis(1);

/// A mutex for tasks of one thread, which may be held across a pause point. First come, first served.
#[derive(Default)]
pub struct LocalMutex<T> {
    locked: Cell<bool>,
    line: Line,
    value: RefCell<T>,
}

impl<T> LocalMutex<T> {
    /// Open, around `value`.
    pub fn new(value: T) -> Self {
        Self { locked: Cell::new(false), line: Line::default(), value: RefCell::new(value) }
    }

    /// Waits for its turn.
    pub fn lock(&self) -> Lock<'_, T> {
        Lock { mutex: self, place: None }
    }

    /// `None` where somebody has it, or is about to.
    pub fn try_lock(&self) -> Option<LocalGuard<'_, T>> {
        (!self.locked.replace(true)).then(|| self.guard())
    }

    fn guard(&self) -> LocalGuard<'_, T> {
        LocalGuard { mutex: self, value: Some(self.value.borrow_mut()) }
    }

    /// Gives the lock to the next in line; it stays locked meanwhile, so that nobody comes in between.
    fn pass_on(&self) {
        if !self.line.grant_first(Grant::Own) {
            self.locked.set(false);
        }
    }
}

/// The wait for a [`LocalMutex`].
#[must_use = "a wait does nothing unless it is awaited"]
pub struct Lock<'a, T> {
    mutex: &'a LocalMutex<T>,
    place: Option<Rc<Place>>,
}

impl<'a, T> Future for Lock<'a, T> {
    type Output = LocalGuard<'a, T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mutex = self.mutex;
        if self.place.is_none()
            && let Some(guard) = mutex.try_lock()
        {
            return Poll::Ready(guard);
        }
        let place = self.place.get_or_insert_with(|| mutex.line.join());
        if place.wait(cx.waker()) == Grant::None {
            return Poll::Pending;
        }
        self.place = None;
        Poll::Ready(mutex.guard())
    }
}

impl<T> Drop for Lock<'_, T> {
    fn drop(&mut self) {
        if let Some(place) = self.place.take()
            && self.mutex.line.leave(&place) == Grant::Own
        {
            self.mutex.pass_on();
        }
    }
}

/// What a [`LocalMutex`] guards, until it is dropped.
pub struct LocalGuard<'a, T> {
    mutex: &'a LocalMutex<T>,
    /// `None` only while it is dropped.
    value: Option<RefMut<'a, T>>,
}

impl<T> std::ops::Deref for LocalGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.value.as_ref().expect("a guard has its value until its drop")
    }
}

impl<T> std::ops::DerefMut for LocalGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.value.as_mut().expect("a guard has its value until its drop")
    }
}

impl<T> Drop for LocalGuard<'_, T> {
    fn drop(&mut self) {
        self.value = None;
        self.mutex.pass_on();
    }
}

/// Tasks of one thread in the order of their coming.
#[derive(Default)]
struct Line(RefCell<VecDeque<Rc<Place>>>);

/// One place in a line.
struct Place {
    grant: Cell<Grant>,
    waker: RefCell<Option<Waker>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Grant {
    None,
    /// For one alone: to be passed on if it is not taken.
    Own,
    /// For all.
    Shared,
}

impl Line {
    fn join(&self) -> Rc<Place> {
        let place = Rc::new(Place { grant: Cell::new(Grant::None), waker: RefCell::default() });
        self.0.borrow_mut().push_back(place.clone());
        place
    }

    /// False where nobody waits.
    fn grant_first(&self, grant: Grant) -> bool {
        let Some(place) = self.0.borrow_mut().pop_front() else { return false };
        place.grant.set(grant);
        let waker = place.waker.take();
        if let Some(waker) = waker {
            waker.wake();
        }
        true
    }

    /// Gives back what had been granted and not taken.
    fn leave(&self, place: &Rc<Place>) -> Grant {
        if place.grant.get() == Grant::None {
            self.0.borrow_mut().retain(|other| !Rc::ptr_eq(other, place));
        }
        place.grant.get()
    }
}

impl Place {
    fn wait(&self, waker: &Waker) -> Grant {
        if self.grant.get() == Grant::None {
            self.waker.replace(Some(waker.clone()));
        }
        self.grant.get()
    }
}

/// One value, from any thread to any task.
pub fn oneshot<T>() -> (Sender<T>, Receiver<T>) {
    let channel = Arc::new(Mutex::new(Channel::Waiting(None)));
    (Sender(channel.clone()), Receiver(channel))
}

/// Gives the value. Dropping it unused tells the receiver [`Gone`].
pub struct Sender<T>(Arc<Mutex<Channel<T>>>);

/// Gets the value, or [`Gone`].
#[must_use = "an answer does not come unless it is awaited"]
pub struct Receiver<T>(Arc<Mutex<Channel<T>>>);

enum Channel<T> {
    Waiting(Option<Waker>),
    Sent(T),
    /// One side is gone.
    Closed,
}

impl<T> Sender<T> {
    /// Sends. Gives the value back where nobody waits for it any more.
    pub fn send(self, value: T) -> Result<(), T> {
        let mut channel = lock(&self.0);
        if matches!(*channel, Channel::Closed) {
            return Err(value);
        }
        let before = std::mem::replace(&mut *channel, Channel::Sent(value));
        drop(channel);
        before.wake();
        Ok(())
    }

    /// True where the receiver has been dropped.
    pub fn is_abandoned(&self) -> bool {
        matches!(*lock(&self.0), Channel::Closed)
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        let mut channel = lock(&self.0);
        if let Channel::Waiting(_) = *channel {
            let before = std::mem::replace(&mut *channel, Channel::Closed);
            drop(channel);
            before.wake();
        }
    }
}

impl<T> Channel<T> {
    fn wake(self) {
        if let Self::Waiting(Some(waker)) = self {
            waker.wake();
        }
    }
}

impl<T> Future for Receiver<T> {
    type Output = Result<T, Gone>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut channel = lock(&self.0);
        if let Channel::Waiting(waker) = &mut *channel {
            *waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        match std::mem::replace(&mut *channel, Channel::Closed) {
            Channel::Sent(value) => Poll::Ready(Ok(value)),
            Channel::Waiting(_) | Channel::Closed => Poll::Ready(Err(Gone)),
        }
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        // A value that nobody will take is dropped here, outside the lock.
        let unheard = std::mem::replace(&mut *lock(&self.0), Channel::Closed);
        drop(unheard);
    }
}

/// Tasks of any threads that wait for the same thing. Who stops waiting is forgotten.
#[derive(Clone, Default)]
pub struct WakerSet(Arc<Mutex<Slab<Option<Waker>>>>);

impl WakerSet {
    /// Nobody waits.
    pub fn new() -> Self {
        Self::default()
    }

    /// Wakes through `waker` at the next [`wake_all`](Self::wake_all), as long as the key is kept. Look at the
    /// condition again after this: it may have come between.
    pub fn register(&self, waker: &Waker) -> WakerKey {
        WakerKey { key: lock(&self.0).insert(Some(waker.clone())), set: self.0.clone() }
    }

    /// Wakes all who are registered now. To be woken again they renew their key.
    pub fn wake_all(&self) {
        let wakers: Vec<Waker> = lock(&self.0).iter_mut().filter_map(|(_, waker)| waker.take()).collect();
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Those who would be woken.
    pub fn len(&self) -> usize {
        lock(&self.0).iter().filter(|(_, waker)| waker.is_some()).count()
    }

    /// True where nobody would be woken.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A place in a [`WakerSet`]; dropping it gives the place up.
pub struct WakerKey {
    key: usize,
    set: Arc<Mutex<Slab<Option<Waker>>>>,
}

impl WakerKey {
    /// Wakes through `waker` from now on, also where it has been woken before.
    pub fn renew(&self, waker: &Waker) {
        lock(&self.set)[self.key] = Some(waker.clone());
    }
}

impl Drop for WakerKey {
    fn drop(&mut self) {
        let waker = lock(&self.set).remove(self.key);
        drop(waker);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while it is held, except out of memory: the value is whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
