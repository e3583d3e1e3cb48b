//! Messages that a guest can cause as often as it likes, and that are wanted at most once a second.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_secs(1);

/// When the last message of a kind was given. From any thread.
#[derive(Debug, Default)]
pub struct Sparingly(Mutex<Given>);

#[derive(Debug, Default)]
struct Given {
    last: Option<Instant>,
    left_out: u64,
}

impl Sparingly {
    /// `Some` where a message is due, with the number of those that were left out before it.
    pub fn due(&self) -> Option<u64> {
        self.due_at(Instant::now())
    }

    fn due_at(&self, now: Instant) -> Option<u64> {
        let mut given = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if given.last.is_some_and(|last| now.saturating_duration_since(last) < INTERVAL) {
            given.left_out += 1;
            return None;
        }
        given.last = Some(now);
        Some(std::mem::take(&mut given.left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_message_a_second_says_how_many_were_left_out() {
        let (sparingly, start) = (Sparingly::default(), Instant::now());
        assert_eq!(sparingly.due_at(start), Some(0));
        assert_eq!(sparingly.due_at(start), None);
        assert_eq!(sparingly.due_at(start + INTERVAL / 2), None);
        assert_eq!(sparingly.due_at(start + INTERVAL), Some(2));
    }
}
