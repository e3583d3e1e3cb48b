//! Looks whether exports get on: storage that hangs (a network file system without its server, a disk that answers to
//! nothing) fails no request, so nobody would be told otherwise. The looking is the control thread's, now and then; queues
//! are not asked for anything that they do not count anyway.

use std::rc::Rc;
use std::time::Duration;

use crate::control::Event;
use crate::daemon::Daemon;

/// How often exports are looked at.
const INTERVAL: Duration = Duration::from_secs(5);
/// So many times in a row an export has to be found as it was: 10 to 15 seconds.
const LOOKS: u32 = 2;

/// Looks at all exports as long as the daemon lives.
pub fn keep_watch(daemon: &Rc<Daemon>) {
    let watched = Rc::downgrade(daemon);
    let local = daemon.local.clone();
    daemon.local.spawn(async move {
        loop {
            local.sleep(INTERVAL).await;
            let Some(daemon) = watched.upgrade() else { return };
            for (id, stall) in daemon.exports.look() {
                match stall {
                    Found::Stalled { in_flight } => {
                        tracing::warn!("export '{id}': {in_flight} requests, and none has ended for {} s", seconds());
                        daemon.hub.tell(Event::export_stalled(&id, in_flight, seconds()));
                    }
                    Found::GoesOn => tracing::info!("export '{id}' goes on"),
                }
            }
        }
    });
}

fn seconds() -> u64 {
    INTERVAL.as_secs() * u64::from(LOOKS)
}

/// What looking at an export shows that is new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Nothing ends any more.
    Stalled { in_flight: u32 },
    /// Something does again, or nothing is left to end.
    GoesOn,
}

/// How an export was found the last times.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Watch {
    answered: u64,
    /// Looks since then that found no more answered, and requests inside.
    unchanged: u32,
}

impl Watch {
    /// `answered`: requests answered so far; `in_flight`: inside now.
    pub(super) fn look(&mut self, answered: u64, in_flight: u32) -> Option<Found> {
        let was_stalled = self.unchanged >= LOOKS;
        // Requests that came since the last look have not been waiting since then.
        let waits = in_flight > 0 && answered == self.answered;
        self.unchanged = if waits { self.unchanged.saturating_add(1) } else { 0 };
        self.answered = answered;
        match (was_stalled, self.unchanged >= LOOKS) {
            (false, true) => Some(Found::Stalled { in_flight }),
            (true, false) => Some(Found::GoesOn),
            (true, true) | (false, false) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_is_told_once_and_so_is_its_end() {
        let mut watch = Watch::default();
        let stalled = Some(Found::Stalled { in_flight: 3 });
        let seen: Vec<_> = [(0, 0), (7, 3), (7, 3), (7, 3), (7, 4), (8, 3), (8, 3), (8, 3), (8, 0), (8, 0)]
            .into_iter()
            .map(|(answered, in_flight)| watch.look(answered, in_flight))
            .collect();
        let expected = [None, None, None, stalled, None, Some(Found::GoesOn), None, stalled, Some(Found::GoesOn), None];
        assert_eq!(seen, expected);
    }

    #[test]
    fn who_is_idle_or_gets_on_is_not_stalled() {
        let mut watch = Watch::default();
        assert!((0..20).all(|_| watch.look(5, 0).is_none()));
        assert!((6..26).all(|answered| watch.look(answered, 32).is_none()));
    }
}
