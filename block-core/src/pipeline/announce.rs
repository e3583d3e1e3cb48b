//! Saying what happens to a node, for tests that want to hear it. Free where nobody listens.

use std::future::Future;
use std::pin::Pin;

use crate::graph::{Child, DebugEvent, Pause};

impl<'g> Child<'g> {
    /// Says that `event` happens to this node, and waits if who hears it wants that. Nobody waits longer than until
    /// the request's root is drained.
    #[inline]
    pub async fn announce(self, event: DebugEvent) {
        if let Some(pause) = self.until_hurried(event) {
            pause.await;
        }
    }

    /// What the request has to wait for after it said that `event` happens to this node.
    #[inline]
    pub(super) fn hear(self, event: DebugEvent) -> Option<Pause> {
        if self.geometry().limits.listens { self.placed().body.hear(self.cx(), event) } else { None }
    }

    #[inline]
    fn until_hurried(self, event: DebugEvent) -> Option<Pin<Box<dyn Future<Output = ()> + 'g>>> {
        let pause = self.hear(event)?;
        let cx = self.cx();
        Some(Box::pin(async move {
            let _ = cx.unless_hurried(pause).await;
        }))
    }
}
