//! The stretch of data that the file system told of last: asking again at each of its blocks would have it walk to the end
//! of the stretch each time.
//!
//! It may be out of date where others make holes. Then it calls a hole data, which costs time and is no lie.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::base::ByteRange;

/// See the module's head.
#[derive(Default)]
pub(super) struct Found(Mutex<Option<ByteRange>>);

impl Found {
    /// For how many bytes from the start of a range on there was data; `None`: that is not known.
    pub(super) fn data(&self, at: ByteRange) -> Option<u64> {
        let known = self.lock().filter(|known| known.start() <= at.start() && at.start() < known.end())?;
        Some(known.end().min(at.end()) - at.start())
    }

    /// There is data here.
    pub(super) fn keep(&self, data: ByteRange) {
        *self.lock() = Some(data);
    }

    /// There may be holes now.
    pub(super) fn forget(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<ByteRange>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_is_known_until_there_may_be_holes() {
        let (found, range) = (Found::default(), |start, end| ByteRange::between(start, end).unwrap());
        assert_eq!(found.data(range(0, 10)), None);
        found.keep(range(10, 20));
        assert_eq!(found.data(range(10, 12)), Some(2));
        assert_eq!(found.data(range(15, 40)), Some(5));
        assert_eq!((found.data(range(9, 12)), found.data(range(20, 21))), (None, None));
        found.forget();
        assert_eq!(found.data(range(10, 12)), None);
    }
}
