//! Interrupt moderation: whether the guest is called now for what is complete, or after the next visit.
//!
//! Waking a sleeping guest costs more than a request on a disk that answers at once. A call is kept back while more
//! waits in the ring than it would tell of; the next pass takes what waits, so that no call ever waits for a device.

use std::time::{Duration, Instant};

/// A call that the driver wants is kept back this long, at the most: a sleeping guest is woken once for the half of its
/// batch instead of for each visit.
const CALL_KEPT: Duration = Duration::from_micros(50);

/// The same where the guest has let the ring run dry: it wakes so late that each delay is one more in which nobody
/// works. Little beside a wake-up, and enough for many requests where a request takes a fraction of a microsecond.
const CALL_KEPT_DRY: Duration = Duration::from_micros(8);

/// Calls for which a guest that has let the ring run dry counts as one that wakes late.
const DRY_CALLS: u8 = 16;

/// What one queue knows of its guest.
#[derive(Debug, Default)]
pub(super) struct Moderation {
    kept_since: Option<Instant>,
    /// The guest wakes late, as far as the next so many calls go.
    dry: u8,
}

/// A queue at the end of a pass.
#[derive(Clone, Copy, Debug)]
pub(super) struct Moment {
    /// When the pass began.
    pub(super) began: Instant,
    /// Answers that the driver can see and was not called for.
    pub(super) untold: u16,
    /// Requests that the next pass will find in the ring for certain.
    pub(super) left: u16,
    /// Nothing is under way.
    pub(super) idle: bool,
}

impl Moderation {
    /// True where the call is better made later. `now` is asked only where it matters.
    #[inline]
    pub(super) fn keeps(&mut self, at: Moment, now: impl FnOnce() -> Instant) -> bool {
        let at_most = if self.dry > 0 { CALL_KEPT_DRY } else { CALL_KEPT };
        if (1..at.left).contains(&at.untold) && now() - *self.kept_since.get_or_insert(at.began) < at_most {
            return true;
        }
        self.kept_since = None;
        self.dry = if at.left == 0 && at.idle { DRY_CALLS } else { self.dry.saturating_sub(1) };
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Passes of `each` that answer 8 of `count` requests: what each call tells of. A guest that is not `late` refills
    /// the ring before it is empty.
    fn calls(moderation: &mut Moderation, count: u16, each: Duration, late: bool) -> Vec<u16> {
        let (mut began, mut untold, mut told) = (Instant::now(), 0, Vec::new());
        for left in (0..count).rev().step_by(8).map(|left| left / 8 * 8) {
            untold += 8;
            let at = Moment { began, untold, left, idle: left == 0 && late };
            began += each;
            if !moderation.keeps(at, || began) {
                told.push(untold);
                untold = 0;
            }
        }
        told
    }

    #[test]
    fn a_guest_is_called_for_the_half_of_what_there_is() {
        let fast = Duration::from_micros(2);
        let mut moderation = Moderation::default();
        assert_eq!(calls(&mut moderation, 32, fast, false), [16, 8, 8]);
        assert_eq!(calls(&mut moderation, 128, fast, false), [64, 32, 16, 8, 8]);
        assert_eq!(calls(&mut moderation, 16, fast, false), [8, 8], "not more waits than there is to tell of");
        assert_eq!(calls(&mut moderation, 8, fast, false), [8]);
    }

    #[test]
    fn no_call_is_kept_longer_than_it_may_be() {
        let mut moderation = Moderation::default();
        let slow = Duration::from_micros(20);
        assert_eq!(calls(&mut moderation, 128, slow, false)[..2], [24, 24], "three passes are 60 µs");
        assert_eq!(calls(&mut moderation, 128, CALL_KEPT, false), [8; 16]);
    }

    #[test]
    fn a_guest_that_wakes_late_is_called_early_for_some_time() {
        let mut moderation = Moderation::default();
        let each = Duration::from_micros(10);
        assert_eq!(calls(&mut moderation, 32, each, true), [16, 8, 8], "nothing is known of it");
        assert_eq!(calls(&mut moderation, 32, each, true), [8; 4]);
        for _ in 0..4 {
            assert_eq!(calls(&mut moderation, 32, each, false), [8; 4], "16 calls");
        }
        assert_eq!(calls(&mut moderation, 32, each, false), [16, 8, 8]);
        calls(&mut moderation, 8, each, true);
        let brief = Duration::from_micros(2);
        assert_eq!(calls(&mut moderation, 32, brief, false)[0], 16, "a delay of no account");
    }
}
