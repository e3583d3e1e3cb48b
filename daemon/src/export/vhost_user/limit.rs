//! Log lines that a guest or a frontend can cause: ten in five seconds from one place of an export, the rest is dropped.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const LINES: u32 = 10;
const WINDOW: Duration = Duration::from_secs(5);

/// One place that logs. Each export has its own, so that no guest silences what is said of another.
#[derive(Debug, Default)]
pub(super) struct Limit(Mutex<Option<(Instant, u32)>>);

impl Limit {
    /// True where a line may be written now.
    pub(super) fn allows(&self) -> bool {
        self.allows_at(Instant::now())
    }

    fn allows_at(&self, now: Instant) -> bool {
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, lines) = window.get_or_insert((now, 0));
        if now.saturating_duration_since(*since) >= WINDOW {
            (*since, *lines) = (now, 0);
        }
        *lines = lines.saturating_add(1);
        *lines <= LINES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_lines_and_then_silence_until_the_window_is_over() {
        let limit = Limit::default();
        let start = Instant::now();
        assert_eq!((0..100).filter(|_| limit.allows_at(start)).count(), 10);
        assert!(!limit.allows_at(start + WINDOW - Duration::from_millis(1)));
        assert!(limit.allows_at(start + WINDOW));
    }
}
