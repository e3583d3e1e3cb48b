//! Values whose end may wait, as that of a file does whose file system hangs.

use super::{Local, pool};
use std::ops::Deref;

/// A value whose end is left to a helper thread where it comes on an I/O thread, so that no guest waits for it.
#[derive(Debug)]
pub struct Elsewhere<T: Send + 'static>(Option<T>);

impl<T: Send> Elsewhere<T> {
    /// The value is owned by this one from now on.
    pub fn new(value: T) -> Self {
        Self(Some(value))
    }
}

impl<T: Send> Deref for Elsewhere<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        self.0.as_ref().expect("it is taken out by the drop alone")
    }
}

impl<T: Send> Drop for Elsewhere<T> {
    fn drop(&mut self) {
        let Some(value) = self.0.take() else { return };
        if Local::try_current().is_some_and(|local| local.is_io.get()) {
            pool::later(move || drop(value));
        }
    }
}
