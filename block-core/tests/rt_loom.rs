//! Models of the hand-over between threads (`rt/wake.rs`): no message is slept through, none is kept after the end.
//!
//! `RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test -p block-core --test rt_loom --release`. The canary, a
//! receiver that asks too early, runs in a child: a loom deadlock can abort the process.
#![cfg(loom)]
#![expect(clippy::unwrap_used, reason = "a test")]

use block_core::rt::wake::Mailbox;
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

/// A receiver's mailbox and its eventfd: a flag that stays set until the sleeper takes it.
struct Receiver {
    mailbox: Mailbox<u32>,
    signal: Mutex<bool>,
    rung: Condvar,
}

impl Receiver {
    fn new() -> Arc<Self> {
        Arc::new(Self { mailbox: Mailbox::new(), signal: Mutex::new(false), rung: Condvar::new() })
    }

    fn post(&self, message: u32) {
        self.mailbox.post(message, || {
            *self.signal.lock().unwrap() = true;
            self.rung.notify_one();
        });
    }

    /// The receiver's loop until it has `count` messages. A lost wake-up is a deadlock, which loom reports.
    fn receive(&self, count: usize) -> Vec<u32> {
        let mut got = Vec::new();
        loop {
            got.extend(std::iter::from_fn(|| self.mailbox.take()));
            if got.len() == count {
                return got;
            }
            if self.mailbox.prepare_sleep() {
                self.sleep();
                self.mailbox.woke();
            }
        }
    }

    fn sleep(&self) {
        let mut signal = self.signal.lock().unwrap();
        while !*signal {
            signal = self.rung.wait(signal).unwrap();
        }
        *signal = false;
    }
}

#[test]
fn one_sender_is_never_slept_through() {
    bounded(3, || {
        let receiver = Receiver::new();
        let sender = thread::spawn({
            let receiver = receiver.clone();
            move || (0..2).for_each(|n| receiver.post(n))
        });
        assert_eq!(receiver.receive(2), [0, 1]);
        sender.join().unwrap();
    });
}

#[test]
fn two_senders_are_never_slept_through() {
    bounded(2, || {
        let receiver = Receiver::new();
        let senders = [1, 2].map(|n| {
            let receiver = receiver.clone();
            thread::spawn(move || receiver.post(n))
        });
        let mut got = receiver.receive(2);
        got.sort_unstable();
        assert_eq!(got, [1, 2]);
        senders.into_iter().for_each(|sender| sender.join().unwrap());
    });
}

/// A signal may be left over from a message that was taken before the sleep; it must not hide the next one.
#[test]
fn a_left_over_signal_hides_nothing() {
    bounded(2, || {
        let receiver = Receiver::new();
        let sender = thread::spawn({
            let receiver = receiver.clone();
            move || (0..3).for_each(|n| receiver.post(n))
        });
        assert_eq!(receiver.receive(3), [0, 1, 2]);
        sender.join().unwrap();
    });
}

/// Whoever comes second, the sender or the end, drops the message: a caller waits for that drop.
#[test]
fn nothing_is_kept_after_the_end() {
    bounded(5, || {
        let mailbox = Arc::new(Mailbox::new());
        let witness = std::sync::Arc::new(());
        let sender = thread::spawn({
            let (mailbox, message) = (mailbox.clone(), witness.clone());
            move || mailbox.post(message, || {})
        });
        mailbox.close();
        sender.join().unwrap();
        assert_eq!(std::sync::Arc::strong_count(&witness), 1);
    });
}

/// Explores all interleavings with at most so many preemptions.
fn bounded(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

#[test]
fn the_canary_is_caught() {
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "one_sender_is_never_slept_through"]).env("TRELLIS_CANARY", "rt_wake");
    assert!(!child.output().unwrap().status.success(), "the model does not notice a receiver that asks too early");
}
