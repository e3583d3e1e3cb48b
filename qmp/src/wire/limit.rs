//! At most one event a second for each key; of those held back, the last one wins.
//!
//! A guest can cause some events as often as it likes. A key is what makes two events the same to a client, such as
//! the event's name and its node.

use std::collections::HashMap;
use std::hash::Hash;
use std::time::{Duration, Instant};

/// Decides which events go out now, which wait, and which are replaced by a later one.
#[derive(Debug)]
pub struct EventLimiter<K, E> {
    interval: Duration,
    keys: HashMap<K, Window<E>>,
}

#[derive(Debug)]
struct Window<E> {
    ends: Instant,
    waiting: Option<E>,
}

impl<K: Eq + Hash + Clone, E> EventLimiter<K, E> {
    /// One event each `interval` for each key. QMP's interval is a second.
    pub fn new(interval: Duration) -> Self {
        Self { interval, keys: HashMap::new() }
    }

    /// An event happened: gives it back if it may go out now. Else it waits, instead of any that waited before.
    pub fn offer(&mut self, key: K, event: E, now: Instant) -> Option<E> {
        match self.keys.get_mut(&key) {
            Some(window) if now < window.ends || window.waiting.is_some() => {
                window.waiting = Some(event);
                None
            }
            _ => {
                self.keys.insert(key, Window { ends: now + self.interval, waiting: None });
                Some(event)
            }
        }
    }

    /// When [`due`](Self::due) is next worth asking. `None`: nothing waits.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.keys.values().filter(|window| window.waiting.is_some()).map(|window| window.ends).min()
    }

    /// The events whose waiting is over. Keys that were quiet for an interval are forgotten.
    pub fn due(&mut self, now: Instant) -> Vec<E> {
        let mut due = vec![];
        let interval = self.interval;
        self.keys.retain(|_, window| {
            if now < window.ends {
                return true;
            }
            let Some(event) = window.waiting.take() else { return false };
            due.push(event);
            window.ends = now + interval;
            true
        });
        due
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::EventLimiter;

    #[test]
    fn the_first_goes_out_and_the_last_follows_after_a_second() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut limiter = EventLimiter::new(Duration::from_secs(1));
        assert_eq!(limiter.offer("a", 1, at(0)), Some(1));
        assert_eq!(limiter.offer("a", 2, at(10)), None);
        assert_eq!(limiter.offer("a", 3, at(20)), None);
        assert_eq!(limiter.offer("b", 4, at(30)), Some(4), "another key has its own second");
        assert_eq!(limiter.next_deadline(), Some(at(1000)));
        assert!(limiter.due(at(999)).is_empty());
        assert_eq!(limiter.due(at(1000)), [3]);
        assert_eq!(limiter.offer("a", 5, at(1500)), None, "what waited has begun a new second");
        assert_eq!(limiter.due(at(2000)), [5]);
        assert_eq!(limiter.offer("a", 6, at(3000)), Some(6));
    }

    #[test]
    fn an_event_does_not_overtake_a_waiting_one_whose_second_is_over() {
        let start = Instant::now();
        let mut limiter = EventLimiter::new(Duration::from_secs(1));
        assert_eq!(limiter.offer("a", 1, start), Some(1));
        assert_eq!(limiter.offer("a", 2, start), None);
        let later = start + Duration::from_secs(5);
        assert_eq!(limiter.offer("a", 3, later), None);
        assert_eq!(limiter.due(later), [3]);
    }

    #[test]
    fn quiet_keys_are_forgotten() {
        let start = Instant::now();
        let mut limiter = EventLimiter::new(Duration::from_secs(1));
        for key in 0..1000 {
            assert!(limiter.offer(key, (), start).is_some());
        }
        assert!(limiter.due(start + Duration::from_secs(1)).is_empty());
        assert!(limiter.keys.is_empty());
    }
}
