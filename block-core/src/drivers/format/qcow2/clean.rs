//! Giving back the memory of tables that nobody has needed for a while (`cache-clean-interval`).

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::meta::Meta;
use super::slices::Slices;
use crate::rt::sync::{Sender, oneshot};
use crate::rt::{Local, within};

/// As long as it lives, tables that were not used for a whole interval are forgotten, on the thread that made it.
pub(super) struct Cleaner {
    _alive: Sender<()>,
}

impl Cleaner {
    pub(super) fn every(interval: Duration, slices: &Arc<Slices>, meta: &Arc<Mutex<Meta>>) -> Self {
        let (alive, mut gone) = oneshot();
        let (slices, meta) = (Arc::downgrade(slices), Arc::downgrade(meta));
        let local = Local::current();
        local.clone().spawn(async move {
            while within(&local, interval, &mut gone).await.is_none() {
                let (Some(slices), Some(meta)) = (slices.upgrade(), meta.upgrade()) else { return };
                clean(&slices, &meta);
            }
        });
        Self { _alive: alive }
    }
}

/// Takes the lock piece by piece: requests wait for it.
fn clean(slices: &Slices, meta: &Mutex<Meta>) {
    let lock = || meta.lock().unwrap_or_else(PoisonError::into_inner);
    lock().refs.forget_unused();
    for places in slices.pieces() {
        let meta = lock();
        slices.forget_unused(places, |slice| meta.dirty.contains(&slice) || meta.busy.contains(&slice));
    }
}
