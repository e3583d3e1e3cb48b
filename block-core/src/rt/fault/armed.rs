//! Faults while tests have them armed: which call fails, and how.
//!
//! They belong to the thread that enters them, to the I/O threads that it starts and to the helpers that work for
//! either, so tests of one process do not meet each other's.

use super::super::Op;
use super::super::op::DirectOp;
use std::cell::RefCell;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What happens instead of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails with this positive errno, and nothing is done.
    Errno(i32),
    /// It moves half of its bytes, if it is a read or a write.
    Short,
    /// It says that it went well and does nothing, if it is a sync or a fallocate.
    Lie,
}

impl Fault {
    fn strikes(self, site: Site) -> bool {
        match self {
            Self::Errno(_) => true,
            Self::Short => matches!(site, Site::Read | Site::Write),
            Self::Lie => matches!(site, Site::Sync | Site::Fallocate),
        }
    }
}

/// What kind of call it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// A read of file data.
    Read,
    /// A write of file data.
    Write,
    /// fsync or fdatasync.
    Sync,
    /// fallocate, as a request's.
    Fallocate,
    /// A system call of a driver: open, locks, sizes.
    Call,
}

/// Which call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The first one that fails, counted from 1 among those that can.
    pub nth: u64,
    /// How.
    pub fault: Fault,
    /// All later ones fail too.
    pub lasting: bool,
}

/// The faults of a test.
#[derive(Clone, Debug, Default)]
pub struct Faults(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    plan: Option<Plan>,
    seen: u64,
    struck: Vec<Site>,
}

impl Faults {
    /// From now on this thread's calls are counted, until the value is dropped.
    #[must_use = "the faults are left again where it is dropped"]
    pub fn enter(&self) -> Entered {
        Entered(CURRENT.replace(Some(self.clone())))
    }

    /// Begins to count anew.
    pub fn arm(&self, plan: Plan) {
        *self.state() = State { plan: Some(plan), ..State::default() };
    }

    /// Nothing fails any more. What did, in order.
    pub fn disarm(&self) -> Vec<Site> {
        std::mem::take(&mut *self.state()).struck
    }

    /// The fault, where this call is to fail.
    fn strike(&self, site: Site) -> Option<Fault> {
        let mut state = self.state();
        let plan = state.plan?;
        if !plan.fault.strikes(site) {
            return None;
        }
        state.seen += 1;
        let hit = state.seen == plan.nth || (plan.lasting && state.seen > plan.nth);
        hit.then(|| {
            state.struck.push(site);
            plan.fault
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread's calls are counted. What was counted for before comes back with the drop.
#[derive(Debug)]
pub struct Entered(Option<Faults>);

impl Drop for Entered {
    fn drop(&mut self) {
        CURRENT.set(self.0.take());
    }
}

fn struck_here(site: Site) -> Option<Fault> {
    // A thread that is ending has no faults any more.
    CURRENT.try_with(|current| current.borrow().clone()).ok().flatten()?.strike(site)
}

/// The errno with which a driver's system call fails instead of being made.
pub(super) fn strike_call() -> Option<i32> {
    match struck_here(Site::Call)? {
        Fault::Errno(errno) => Some(errno),
        Fault::Short | Fault::Lie => unreachable!("it strikes no system call"),
    }
}

/// The operation as it is to be carried out, or the answer that it gets instead.
pub(in crate::rt) fn strike(op: Op) -> (Op, Option<i32>) {
    match struck_here(site(&op)) {
        None => (op, None),
        Some(Fault::Errno(errno)) => (op, Some(-errno)),
        Some(Fault::Short) => (halved(op), None),
        Some(Fault::Lie) => (op, Some(0)),
    }
}

/// The answer that a source's operation gets instead of being carried out. A short one moves nothing and says 1: whoever
/// is told so has to begin anew.
pub(in crate::rt) fn strike_direct(op: &DirectOp) -> Option<i32> {
    match struck_here(if op.write { Site::Write } else { Site::Read })? {
        Fault::Errno(errno) => Some(-errno),
        Fault::Short => Some(1),
        Fault::Lie => unreachable!("it strikes no transfer"),
    }
}

/// The work, under the faults of the thread that asks for it.
pub(in crate::rt) fn inherited<T>(work: impl FnOnce() -> T) -> impl FnOnce() -> T {
    let faults = CURRENT.with_borrow(Clone::clone);
    move || {
        let _entered = Entered(CURRENT.replace(faults));
        work()
    }
}

fn site(op: &Op) -> Site {
    match op {
        Op::Read { .. } => Site::Read,
        Op::Write { .. } => Site::Write,
        Op::Sync { .. } => Site::Sync,
        Op::Fallocate { .. } => Site::Fallocate,
    }
}

fn halved(op: Op) -> Op {
    let half = |buf: super::super::IoBuf| buf.slice(0, buf.len().div_ceil(2));
    match op {
        Op::Read { fd, buf, offset } => Op::Read { fd, buf: half(buf), offset },
        Op::Write { fd, buf, offset, dsync } => Op::Write { fd, buf: half(buf), offset, dsync },
        other @ (Op::Sync { .. } | Op::Fallocate { .. }) => other,
    }
}

thread_local! {
    static CURRENT: RefCell<Option<Faults>> = const { RefCell::new(None) };
}
