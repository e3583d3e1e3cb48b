//! The sync primitives: order, hand-over when a waiter is dropped, and both ends of a channel.

use crate::rt::sync::{LocalMutex, Notify, WakerSet, oneshot};
use crate::rt::{Gone, run_control};
use std::cell::RefCell;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};

#[derive(Default)]
struct Counting(AtomicUsize);

impl Wake for Counting {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Counting {
    fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

fn poll<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

#[test]
fn a_notification_is_kept_once() {
    let notify = Notify::new();
    notify.notify_one();
    notify.notify_one();
    assert!(poll(pin!(notify.notified())).is_ready());
    assert!(poll(pin!(notify.notified())).is_pending());
    notify.notify_all();
    assert!(poll(pin!(notify.notified())).is_pending(), "notify_all keeps nothing");
}

#[test]
fn one_or_all_who_wait_are_notified() {
    let notify = Notify::new();
    let (mut one, mut two, mut three) = (pin!(notify.notified()), pin!(notify.notified()), pin!(notify.notified()));
    for waiting in [one.as_mut(), two.as_mut(), three.as_mut()] {
        assert!(poll(waiting).is_pending());
    }
    notify.notify_one();
    assert!(poll(two.as_mut()).is_pending(), "the first comes first");
    assert!(poll(one.as_mut()).is_ready());
    notify.notify_all();
    assert!(poll(two).is_ready() && poll(three).is_ready());
}

#[test]
fn an_unheard_notification_goes_to_the_next() {
    let notify = Notify::new();
    let mut first = Box::pin(notify.notified());
    let mut second = pin!(notify.notified());
    assert!(poll(first.as_mut()).is_pending() && poll(second.as_mut()).is_pending());
    notify.notify_one();
    drop(first);
    assert!(poll(second).is_ready());
}

#[test]
fn the_mutex_is_fair_and_survives_dropped_waiters() {
    let mutex = LocalMutex::new(0);
    let guard = mutex.try_lock().unwrap();
    let mut leaves = Box::pin(mutex.lock());
    let mut first = Box::pin(mutex.lock());
    let mut second = Box::pin(mutex.lock());
    for waiting in [&mut leaves, &mut first, &mut second] {
        assert!(poll(waiting.as_mut()).is_pending());
    }
    drop(guard);
    assert!(mutex.try_lock().is_none(), "it belongs to who waited");
    assert!(poll(first.as_mut()).is_pending());
    drop(leaves);
    let Poll::Ready(mut guard) = poll(first.as_mut()) else { panic!("it was passed on") };
    *guard += 1;
    assert!(poll(second.as_mut()).is_pending());
    drop(guard);
    assert!(matches!(poll(second.as_mut()), Poll::Ready(guard) if *guard == 1));
    assert!(mutex.try_lock().is_some());
}

#[test]
fn tasks_take_turns_across_pause_points() {
    let order = run_control(|local| async move {
        let (mutex, order) = (Rc::new(LocalMutex::new(())), Rc::new(RefCell::new(Vec::new())));
        let all_done = Rc::new(Notify::new());
        for n in 0..3 {
            let (mutex, order, all_done) = (mutex.clone(), order.clone(), all_done.clone());
            local.spawn(async move {
                let _guard = mutex.lock().await;
                order.borrow_mut().push((n, "in"));
                crate::rt::blocking(|| ()).await;
                order.borrow_mut().push((n, "out"));
                all_done.notify_one();
            });
        }
        while order.borrow().len() < 6 {
            all_done.notified().await;
        }
        order.take()
    });
    assert_eq!(order, [(0, "in"), (0, "out"), (1, "in"), (1, "out"), (2, "in"), (2, "out")]);
}

#[test]
fn a_channel_tells_both_ends() {
    let (sender, mut receiver) = oneshot();
    assert!(poll(Pin::new(&mut receiver)).is_pending());
    sender.send(5).unwrap();
    assert_eq!(poll(Pin::new(&mut receiver)), Poll::Ready(Ok(5)));

    let (sender, mut receiver) = oneshot::<i32>();
    drop(sender);
    assert_eq!(poll(Pin::new(&mut receiver)), Poll::Ready(Err(Gone)));

    let (sender, receiver) = oneshot();
    assert!(!sender.is_abandoned());
    drop(receiver);
    assert!(sender.is_abandoned());
    assert_eq!(sender.send(5), Err(5));
}

#[test]
fn a_set_wakes_those_who_are_there() {
    let (set, wakes) = (WakerSet::new(), Arc::new(Counting::default()));
    let waker = Waker::from(wakes.clone());
    let (kept, left) = (set.register(&waker), set.register(&waker));
    assert_eq!(set.len(), 2);
    drop(left);
    set.wake_all();
    assert_eq!((wakes.count(), set.is_empty()), (1, true));
    set.wake_all();
    assert_eq!(wakes.count(), 1, "once for each registration");
    kept.renew(&waker);
    set.wake_all();
    assert_eq!(wakes.count(), 2);
    drop(kept);
    assert_eq!(Arc::strong_count(&wakes), 2, "nothing is remembered");
}
