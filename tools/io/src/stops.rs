//! Requests that are made to wait at an event of a `blkdebug` node.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::sync::Arc;

use block_core::drivers::filter::blkdebug::{Blkdebug, Breakpoints};
use block_core::graph::DebugEvent;
use block_core::pipeline::Filtered;
use qmp::schema::from_value;
use trellis_image::{Image, Session, say};

use crate::requests::Failed;

/// The names of the image's breakpoints.
#[derive(Default)]
pub(crate) struct Stops {
    /// All that there have been.
    names: RefCell<BTreeSet<String>>,
    /// Those under which somebody is going to tell of a request that waits.
    told: Rc<RefCell<BTreeSet<String>>>,
}

impl Stops {
    /// The next request that comes to the event waits, under the name `tag`.
    pub(crate) fn set(&self, session: &Session, image: &Image, event: &str, tag: &str) -> Result<(), Failed> {
        let refused = |why| told(&format!("Could not set breakpoint: {why}\n"));
        let Some(breakpoints) = below(image) else { return Err(refused(UNSUPPORTED)) };
        let event: DebugEvent = from_value(event.into()).map_err(|_| refused(UNKNOWN))?;
        breakpoints.set(event, tag);
        self.names.borrow_mut().insert(tag.to_owned());
        if self.told.borrow_mut().insert(tag.to_owned()) {
            let (told, tag) = (self.told.clone(), tag.to_owned());
            session.local.spawn(async move {
                breakpoints.suspended(&tag).await;
                say(&format!("blkdebug: Suspended request '{tag}'\n"));
                told.borrow_mut().remove(&tag);
            });
        }
        Ok(())
    }

    /// Lets a request go on.
    pub(crate) fn resume(&self, image: &Image, tag: &str) -> Result<(), Failed> {
        let refused = |why| told(&format!("Could not resume request: {why}\n"));
        let Some(breakpoints) = below(image) else { return Err(refused(UNSUPPORTED)) };
        if resume(&breakpoints, tag) { Ok(()) } else { Err(refused(UNKNOWN)) }
    }

    /// Takes a breakpoint away, and lets all go on that wait there.
    pub(crate) fn remove(&self, image: &Image, tag: &str) -> Result<(), Failed> {
        let refused = |why| told(&format!("Could not remove breakpoint {tag}: {why}\n"));
        let Some(breakpoints) = below(image) else { return Err(refused(UNSUPPORTED)) };
        while resume(&breakpoints, tag) {}
        if breakpoints.remove(tag) { Ok(()) } else { Err(refused(UNKNOWN)) }
    }

    /// Waits until a request waits. `is_idle`: there is none that could.
    pub(crate) async fn wait(&self, image: &Image, tag: &str, is_idle: bool) -> Result<(), String> {
        let breakpoints = below(image).ok_or_else(|| format!("Could not wait for '{tag}': {UNSUPPORTED}"))?;
        if is_idle && !breakpoints.is_suspended(tag) {
            return Err(format!("Could not wait for '{tag}': no request is under way"));
        }
        breakpoints.suspended(tag).await;
        Ok(())
    }

    /// The image is going to be closed, which lets all requests go on.
    pub(crate) fn forget(&self, image: &Image) {
        if let Some(breakpoints) = below(image) {
            for tag in self.names.take() {
                breakpoints.remove(&tag);
            }
        }
        self.told.borrow_mut().clear();
    }
}

fn resume(breakpoints: &Breakpoints, tag: &str) -> bool {
    let resumed = breakpoints.is_suspended(tag);
    if resumed {
        say(&format!("blkdebug: Resuming request '{tag}'\n"));
    }
    breakpoints.resume(tag) && resumed
}

/// The breakpoints of the first `blkdebug` node below.
fn below(image: &Image) -> Option<Arc<Breakpoints>> {
    let graph = image.graph();
    let mut node = Some(image.node);
    while let Some(id) = node {
        let found = graph.look_into(id, |driver: &Filtered<Blkdebug>| driver.0.breakpoints());
        if found.is_some() {
            return found;
        }
        node = graph.child_node(id, "file");
    }
    None
}

fn told(text: &str) -> Failed {
    say(text);
    Failed
}

const UNSUPPORTED: &str = "Operation not supported";
const UNKNOWN: &str = "No such file or directory";
