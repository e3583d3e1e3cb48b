//! A file system that has turned read-only under us, as ext4 does after an error: it is not going to take a write again
//! before somebody has looked at it, and to go on asking it only delays guests. So the first `EROFS` is remembered: until a
//! reopen, whatever would change the file fails at once. Reads go on, and so does the flush of what was taken before.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::base::IoError;

/// One configuration's file system, for all threads.
#[derive(Debug, Default)]
pub(super) struct Turned(AtomicBool);

impl Turned {
    /// Nothing is written any more.
    pub(super) fn is_read_only(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Makes a change, or says what the file system said to an earlier one.
    pub(super) async fn unless_read_only(
        &self,
        change: impl Future<Output = Result<(), IoError>>,
    ) -> Result<(), IoError> {
        if self.is_read_only() {
            return Err(READ_ONLY);
        }
        let result = change.await;
        if let Err(error) = result {
            self.heard(error);
        }
        result
    }

    /// A change failed.
    pub(super) fn heard(&self, error: IoError) {
        if error == READ_ONLY && !self.0.swap(true, Ordering::Relaxed) {
            tracing::error!(
                "a file system has become read-only: nothing is written to its image before a blockdev-reopen"
            );
        }
    }
}

const READ_ONLY: IoError = IoError::Os(libc::EROFS);
