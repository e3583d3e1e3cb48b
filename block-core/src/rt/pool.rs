//! Helper threads for what blocks: one pool for the process, made on demand, gone after ten idle seconds.
//!
//! Jobs end here as a message to the thread that asked. Which operation goes here and which to a ring is `inflight`'s
//! choice; the pool is all there is where io_uring is refused.
#![expect(unsafe_code, reason = "the blocking twins of ring entries take raw iovecs")]

use super::op::{DirectOp, RawOp};
use super::thread::{Message, Shared};
use super::token::Token;
use super::{Local, fault, sync};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Runs `work` on a helper thread and gives its result. Dropping the future abandons the result, not the work.
/// Call it on a runtime thread; use it for open, locks and whatever else may block.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    called(work, Job::Call).await
}

/// The same for work that may take minutes (writing a whole file): only some of it runs at once, so that what guests wait
/// for always finds a thread.
pub async fn blocking_long<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    called(work, Job::Long).await
}

async fn called<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static, job: impl FnOnce(Call) -> Job) -> T {
    debug_assert!(Local::try_current().is_some(), "helper threads work for runtime threads");
    let (sender, receiver) = sync::oneshot();
    let work = fault::inherited(work);
    submit(job(Box::new(move || {
        // Nobody may be waiting any more: that is no error.
        let _ = sender.send(work());
    })));
    receiver.await.expect("a helper thread panicked; in release that ends the process")
}

/// Runs an operation on a helper thread; the completion comes as a message to `home`.
pub(super) fn run(op: RawOp, token: Token, home: Arc<Shared>) {
    submit(Job::Op { op, token, home });
}

enum Job {
    Op { op: RawOp, token: Token, home: Arc<Shared> },
    Call(Call),
    Long(Call),
}

type Call = Box<dyn FnOnce() + Send>;

impl Job {
    fn run(self) {
        match self {
            Self::Op { op, token, home } => home.post(Message::Completed { token, result: carry_out(&op) }),
            Self::Call(call) => call(),
            Self::Long(call) => {
                let _over = LongOver;
                call();
                // Keys are derived here.
                super::burn_stack();
            }
        }
    }
}

/// The system call itself: a count, or a negative errno, as the ring would say it.
pub(super) fn carry_out(op: &RawOp) -> i32 {
    loop {
        let result = match op {
            RawOp::Move(movement) => transfer(movement),
            // SAFETY: the call takes no pointers.
            RawOp::Sync { fd, data_only: true } => unsafe { libc::fdatasync(*fd) as isize },
            // SAFETY: the call takes no pointers.
            RawOp::Sync { fd, data_only: false } => unsafe { libc::fsync(*fd) as isize },
            RawOp::Fallocate { fd, mode, offset, len } => {
                // SAFETY: the call takes no pointers.
                unsafe { libc::fallocate(*fd, *mode, offset.cast_signed(), len.cast_signed()) as isize }
            }
        };
        if result >= 0 {
            return i32::try_from(result).expect("the kernel moves less than 2 GiB at once");
        }
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        if errno != libc::EINTR {
            return -errno;
        }
    }
}

fn transfer(op: &DirectOp) -> isize {
    let (fd, iovecs, offset) = (op.fd, op.iovecs, op.offset.cast_signed());
    let Ok(count) = i32::try_from(op.count) else { unreachable!("a scatter list is at most 1024 long") };
    if op.write {
        let flags = if op.dsync { libc::RWF_DSYNC } else { 0 };
        // SAFETY: whoever made the operation keeps the list and its memory valid until the completion is taken.
        unsafe { libc::pwritev2(fd, iovecs, count, offset, flags) }
    } else {
        // SAFETY: as above.
        unsafe { libc::preadv2(fd, iovecs, count, offset, 0) }
    }
}

/// The one pool.
static POOL: Pool = Pool {
    state: Mutex::new(State { jobs: VecDeque::new(), long: VecDeque::new(), long_running: 0, idle: 0, threads: 0 }),
    work: Condvar::new(),
};

struct Pool {
    state: Mutex<State>,
    work: Condvar,
}

struct State {
    jobs: VecDeque<Job>,
    /// Long ones that have not begun, and how many run.
    long: VecDeque<Job>,
    long_running: usize,
    idle: usize,
    threads: usize,
}

impl State {
    /// Jobs that may begin now.
    fn ready(&self) -> usize {
        self.jobs.len() + self.long.len().min(MAX_LONG - self.long_running)
    }

    fn take(&mut self) -> Option<Job> {
        let job = self.jobs.pop_front();
        if job.is_some() || self.long_running == MAX_LONG {
            return job;
        }
        let long = self.long.pop_front()?;
        self.long_running += 1;
        Some(long)
    }
}

fn submit(job: Job) {
    let mut state = POOL.lock();
    let queue = if matches!(job, Job::Long(_)) { &mut state.long } else { &mut state.jobs };
    queue.push_back(job);
    if state.ready() <= state.idle {
        // Whoever wakes up wants the lock.
        drop(state);
        POOL.work.notify_one();
    } else if state.threads < MAX_THREADS {
        state.threads += 1;
        drop(state);
        grow();
    }
}

fn grow() {
    let started = std::thread::Builder::new().name("rt-helper".into()).spawn(|| POOL.help());
    let Err(error) = started else { return };
    let mut state = POOL.lock();
    state.threads -= 1;
    tracing::warn!(%error, threads = state.threads, "no helper thread could be started");
    // Others will come to the job. Where there is nobody, waiting for ourselves is better than waiting for ever.
    if state.threads == 0
        && let Some(job) = state.take()
    {
        drop(state);
        job.run();
    }
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Jobs run outside the lock, so a panic cannot have left the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The life of a helper thread.
    fn help(&self) {
        let _leaving = Leaving;
        while let Some(job) = self.next() {
            job.run();
        }
    }

    /// `None` after ten seconds without a job.
    fn next(&self) -> Option<Job> {
        let mut state = self.lock();
        if let Some(job) = state.take() {
            return Some(job);
        }
        state.idle += 1;
        let idle = |state: &mut State| state.ready() == 0;
        let waited = self.work.wait_timeout_while(state, IDLE, idle).unwrap_or_else(PoisonError::into_inner);
        let mut state = waited.0;
        state.idle -= 1;
        state.take()
    }
}

/// Another long job may begin. Whoever has ended one looks for it, unless there is something shorter to do.
struct LongOver;

impl Drop for LongOver {
    fn drop(&mut self) {
        let mut state = POOL.lock();
        state.long_running -= 1;
        if state.idle > 0 && !state.long.is_empty() {
            POOL.work.notify_one();
        }
    }
}

/// Counts its thread out, also where a job panics (in tests: release aborts).
struct Leaving;

impl Drop for Leaving {
    fn drop(&mut self) {
        POOL.lock().threads -= 1;
    }
}

const MAX_THREADS: usize = 64;
/// Of them, those that have long jobs.
const MAX_LONG: usize = 16;
const IDLE: Duration = Duration::from_secs(10);
