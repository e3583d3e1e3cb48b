//! The dirty log of an export, model-checked: a frontend that takes a bit away copies the page as it is now, or finds the
//! bit again. Run with `RUSTFLAGS="--cfg loom" cargo test -p block-core --test dirty_log_loom --release --target-dir
//! target/loom`.
//!
//! The daemon needs no loom for this: the one function that sets bits comes from its file.
#![cfg(loom)]

use loom::sync::Arc;
use loom::sync::atomic::{self, AtomicU8, AtomicU32, Ordering};
use loom::thread;

#[path = "../../daemon/src/export/vhost_user/memory/mark.rs"]
mod mark;

const BIT: u8 = 1 << 3;

/// The device writes a page and marks it, the frontend looks for marks and copies. What is copied last is what was written.
fn migrate(set: fn(&AtomicU8, u8)) {
    loom::model(move || {
        let shared = Arc::new((AtomicU32::new(0), AtomicU8::new(0)));
        let device = thread::spawn({
            let shared = shared.clone();
            move || {
                let (page, log) = &*shared;
                page.store(1, Ordering::Relaxed);
                set(log, BIT);
            }
        });
        let (page, log) = &*shared;
        let mut copy = page.load(Ordering::Relaxed);
        if log.swap(0, Ordering::Acquire) & BIT != 0 {
            copy = page.load(Ordering::Relaxed);
            assert_eq!(copy, 1, "the bit is gone, and the page is the old one");
        }
        device.join().unwrap();
        if log.swap(0, Ordering::Acquire) & BIT != 0 {
            copy = page.load(Ordering::Relaxed);
        }
        assert_eq!(copy, 1, "a write was lost");
    });
}

#[test]
fn no_write_is_lost_to_a_migration() {
    migrate(mark::set);
}

#[test]
#[should_panic(expected = "the bit is gone")]
fn canary_a_bit_that_may_be_seen_before_its_data() {
    migrate(|log, bit| {
        log.fetch_or(bit, Ordering::Relaxed);
    });
}

#[test]
#[should_panic(expected = "a write was lost")]
fn canary_no_bit() {
    migrate(|_, _| ());
}
