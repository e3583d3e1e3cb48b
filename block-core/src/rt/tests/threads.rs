//! Messages and wake-ups between threads, tasks, and the end.

use super::{Kind, on, on_every_engine};
use crate::rt::{Gone, Local, run_control, sync};
use std::cell::Cell;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};
use std::time::Duration;

on_every_engine! {
    no_message_is_lost
    messages_of_one_sender_keep_their_order
    no_wake_is_lost
    a_wake_on_the_same_thread_sends_no_message
    a_busy_task_does_not_starve_the_others
    a_waker_may_outlive_its_thread
    calls_to_an_ended_thread_say_so
    tasks_that_are_left_are_dropped
    the_thread_has_its_name
    an_idle_thread_sleeps
}

const SENDERS: usize = 4;
const MESSAGES: usize = 5_000;

fn no_message_is_lost(kind: Kind) {
    let thread = kind.thread();
    let arrived = Arc::new(AtomicUsize::new(0));
    let senders: Vec<_> = (0..SENDERS)
        .map(|_| {
            let (remote, arrived) = (thread.remote(), arrived.clone());
            let send = move || {
                run_control(|_| async {
                    for _ in 0..MESSAGES / 10 {
                        // A burst, and then an answer: the receiver falls asleep in between.
                        for _ in 0..9 {
                            let arrived = arrived.clone();
                            remote.send(move |_| {
                                arrived.fetch_add(1, Ordering::Relaxed);
                            });
                        }
                        let arrived = arrived.clone();
                        remote.call(move |_| arrived.fetch_add(1, Ordering::Relaxed)).await.unwrap();
                    }
                });
            };
            std::thread::Builder::new().spawn(send).unwrap()
        })
        .collect();
    senders.into_iter().for_each(|sender| sender.join().unwrap());
    on(&thread, |_| async {});
    assert_eq!(arrived.load(Ordering::Relaxed), SENDERS * MESSAGES);
}

fn messages_of_one_sender_keep_their_order(kind: Kind) {
    let thread = kind.thread();
    let seen = Arc::new(Mutex::new(Vec::new()));
    for n in 0..3000 {
        let seen = seen.clone();
        thread.remote().send(move |_| seen.lock().unwrap().push(n));
    }
    on(&thread, |_| async {});
    assert_eq!(*seen.lock().unwrap(), (0..3000).collect::<Vec<_>>());
}

/// Two tasks on two threads hand a token to and fro, each through the other's waker.
fn no_wake_is_lost(kind: Kind) {
    struct Table {
        turn: usize,
        wakers: [Option<Waker>; 2],
    }
    let (here, there) = (kind.thread(), kind.thread());
    let table = Arc::new(Mutex::new(Table { turn: 0, wakers: [None, None] }));
    let play = |me: usize| {
        let table = table.clone();
        async move {
            for round in 0..MESSAGES {
                std::future::poll_fn(|cx| {
                    let mut table = table.lock().unwrap();
                    if table.turn != 2 * round + me {
                        table.wakers[me] = Some(cx.waker().clone());
                        return Poll::Pending;
                    }
                    table.turn += 1;
                    if let Some(other) = table.wakers[1 - me].take() {
                        other.wake();
                    }
                    Poll::Ready(())
                })
                .await;
            }
        }
    };
    let (second, (done, finished)) = (play(1), std::sync::mpsc::channel());
    there.remote().spawn(move |_| async move {
        second.await;
        done.send(()).unwrap();
    });
    let first = play(0);
    on(&here, move |_| first);
    finished.recv_timeout(super::PATIENCE).expect("a wake was lost");
    assert_eq!(table.lock().unwrap().turn, 2 * MESSAGES);
}

fn a_wake_on_the_same_thread_sends_no_message(kind: Kind) {
    on(&kind.thread(), |local| async move {
        let (notify, rounds) = (Rc::new(sync::Notify::new()), Rc::new(Cell::new(0)));
        local.spawn({
            let (notify, rounds) = (notify.clone(), rounds.clone());
            async move {
                loop {
                    notify.notified().await;
                    rounds.set(rounds.get() + 1);
                }
            }
        });
        for round in 1..100 {
            notify.notify_one();
            assert!(local.shared().is_empty(), "no message for ourselves");
            yield_now().await;
            yield_now().await;
            assert_eq!(rounds.get(), round);
        }
    });
}

async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

fn a_busy_task_does_not_starve_the_others(kind: Kind) {
    on(&kind.thread(), |local| async move {
        let stop = Rc::new(Cell::new(false));
        local.spawn({
            let stop = stop.clone();
            async move {
                while !stop.get() {
                    yield_now().await;
                }
            }
        });
        // A timer and a message get through.
        local.sleep(Duration::from_millis(2)).await;
        local.remote().call(|_| ()).await.unwrap();
        stop.set(true);
    });
}

fn a_waker_may_outlive_its_thread(kind: Kind) {
    let thread = kind.thread();
    let (sender, receiver) = std::sync::mpsc::channel();
    thread.remote().spawn(move |_| {
        std::future::poll_fn(move |cx| {
            // Nobody may be listening any more when the task is polled for the last time.
            let _ = sender.send(cx.waker().clone());
            Poll::Pending
        })
    });
    let waker = receiver.recv_timeout(super::PATIENCE).unwrap();
    drop(thread);
    waker.wake_by_ref();
    waker.wake();
}

fn calls_to_an_ended_thread_say_so(kind: Kind) {
    let thread = kind.thread();
    let remote = thread.remote();
    drop(thread);
    run_control(|local| async move {
        assert_eq!(remote.call(|_| ()).await, Err(Gone));
        let witness = Arc::new(());
        let kept = witness.clone();
        remote.send(move |_| drop(kept));
        assert_eq!(Arc::strong_count(&witness), 1, "what comes late is dropped, not kept");
        drop(local);
    });
}

fn tasks_that_are_left_are_dropped(kind: Kind) {
    let thread = kind.thread();
    let witness = Arc::new(());
    let kept = witness.clone();
    on(&thread, |local| async move {
        local.spawn(async move {
            let _kept = kept;
            Local::current().sleep(Duration::from_secs(1000)).await;
        });
        yield_now().await;
    });
    assert_eq!(Arc::strong_count(&witness), 2);
    drop(thread);
    assert_eq!(Arc::strong_count(&witness), 1);
}

fn the_thread_has_its_name(kind: Kind) {
    let thread = kind.thread();
    let name = std::fs::read_to_string(format!("/proc/self/task/{}/comm", thread.tid())).unwrap();
    assert_eq!(name, "rt-test\n");
}

fn an_idle_thread_sleeps(kind: Kind) {
    let thread = kind.thread();
    let remote = thread.remote();
    run_control(|local| async move {
        let before = remote.call(|local| local.counters()).await.unwrap();
        local.sleep(Duration::from_millis(100)).await;
        let after = remote.call(|local| local.counters()).await.unwrap();
        assert!(after.passes - before.passes < 10, "{before:?} to {after:?}");
    });
}
