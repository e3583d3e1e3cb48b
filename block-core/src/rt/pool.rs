//! Helper threads for what blocks: one pool for the process, made on demand, gone after ten idle seconds.
//!
//! Jobs end here as a message to the thread that asked. Which operation goes here and which to a ring is `inflight`'s
//! choice; the pool is all there is where io_uring is refused.
//!
//! A file that hangs keeps the threads that work for it, so nobody else may need those. A job is *admitted* when there is a
//! thread for it, or one will be made; until then it waits with its kind: each file has some threads that no other can
//! take, and many while others leave them; calls that belong to no file, and those that take long, have their own.
#![expect(unsafe_code, reason = "the blocking twins of ring entries take raw iovecs")]

use super::op::{DirectOp, RawOp};
use super::thread::{Message, Shared};
use super::token::Token;
use super::{Local, SharedFd, fault, sync};
use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Runs `work` on a helper thread and gives its result. Dropping the future abandons the result, not the work.
/// Call it on a runtime thread; use it for open, locks and whatever else may block. What works on an open file is
/// [`blocking_on`].
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    called(Whose::Nobodys, work).await
}

/// The same for work on an open file, beside the operations on it: where that hangs, nobody else is held up.
pub async fn blocking_on<T: Send + 'static>(fd: &SharedFd, work: impl FnOnce(&OwnedFd) -> T + Send + 'static) -> T {
    let (whose, fd) = (Whose::File(fd.as_raw_fd()), fd.clone());
    called(whose, move || work(&fd)).await
}

/// The same for work that may take minutes (writing a whole file): only some of it runs at once, so that what guests wait
/// for always finds a thread.
pub async fn blocking_long<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    called(Whose::Long, work).await
}

/// Runs `work` on a helper thread some time; nobody waits for it.
pub(super) fn later(work: impl FnOnce() + Send + 'static) {
    submit(Job { whose: Whose::Nobodys, work: Work::Call(Box::new(fault::inherited(work))) });
}

async fn called<T: Send + 'static>(whose: Whose, work: impl FnOnce() -> T + Send + 'static) -> T {
    debug_assert!(Local::try_current().is_some(), "helper threads work for runtime threads");
    let (sender, receiver) = sync::oneshot();
    let work = fault::inherited(work);
    let call = move || {
        // Nobody may be waiting any more: that is no error.
        let _ = sender.send(work());
    };
    submit(Job { whose, work: Work::Call(Box::new(call)) });
    receiver.await.expect("a helper thread panicked; in release that ends the process")
}

/// Runs an operation on a helper thread; the completion comes as a message to `home`.
pub(super) fn run(op: RawOp, token: Token, home: Arc<Shared>) {
    submit(Job { whose: Whose::File(op.fd()), work: Work::Op { op, token, home } });
}

struct Job {
    whose: Whose,
    work: Work,
}

/// Who has to have a thread for a job.
#[derive(Clone, Copy)]
enum Whose {
    /// Whoever asked keeps it open until the job is over.
    File(RawFd),
    Nobodys,
    Long,
}

enum Work {
    Op { op: RawOp, token: Token, home: Arc<Shared> },
    Call(Box<dyn FnOnce() + Send>),
}

impl Job {
    fn run(self) {
        match self.work {
            Work::Op { op, token, home } => home.post(Message::Completed { token, result: carry_out(&op) }),
            Work::Call(call) => call(),
        }
        if matches!(self.whose, Whose::Long) {
            // Keys are derived here.
            super::burn_stack();
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
    state: Mutex::new(State {
        admitted: VecDeque::new(),
        files: Files { all: Vec::new(), line: VecDeque::new(), running: 0 },
        calls: Queue::EMPTY,
        long: Queue::EMPTY,
        idle: 0,
        coming: 0,
        threads: 0,
    }),
    work: Condvar::new(),
};

struct Pool {
    state: Mutex<State>,
    work: Condvar,
}

struct State {
    /// A thread comes for each of them, however long others take.
    admitted: VecDeque<Job>,
    files: Files,
    calls: Queue,
    long: Queue,
    /// Threads that wait for a job, and those that have been started and have not looked for one yet.
    idle: usize,
    coming: usize,
    threads: usize,
}

impl State {
    fn add(&mut self, job: Job) {
        match job.whose {
            Whose::File(fd) => self.files.add(fd, job),
            Whose::Nobodys => self.calls.waiting.push_back(job),
            Whose::Long => self.long.waiting.push_back(job),
        }
        self.admit();
    }

    /// A job has ended: others may be admitted, and so many are.
    fn over(&mut self, whose: Whose) -> usize {
        match whose {
            Whose::File(fd) => self.files.over(fd),
            Whose::Nobodys => self.calls.running -= 1,
            Whose::Long => self.long.running -= 1,
        }
        self.admit()
    }

    fn admit(&mut self) -> usize {
        let before = self.admitted.len();
        self.admitted.extend(std::iter::from_fn(|| self.files.next()));
        self.admitted.extend(std::iter::from_fn(|| self.calls.next(MAX_CALLS)));
        self.admitted.extend(std::iter::from_fn(|| self.long.next(MAX_LONG)));
        self.admitted.len() - before
    }
}

/// Jobs of one kind that are not admitted yet, and how many are, and have not ended.
struct Queue {
    waiting: VecDeque<Job>,
    running: usize,
}

impl Queue {
    const EMPTY: Self = Self { waiting: VecDeque::new(), running: 0 };

    fn next(&mut self, most: usize) -> Option<Job> {
        if self.running == most {
            return None;
        }
        let job = self.waiting.pop_front()?;
        self.running += 1;
        Some(job)
    }
}

/// The jobs of all files, which take turns.
struct Files {
    /// By descriptor: there are as many as have ever been open at once.
    all: Vec<File>,
    /// Those that another job could be admitted of, each once.
    line: VecDeque<RawFd>,
    running: usize,
}

struct File {
    queue: Queue,
    in_line: bool,
}

impl Files {
    fn add(&mut self, fd: RawFd, job: Job) {
        let count = index(fd) + 1;
        if self.all.len() < count {
            self.all.resize_with(count, || File { queue: Queue::EMPTY, in_line: false });
        }
        self.all[index(fd)].queue.waiting.push_back(job);
        self.line_up(fd);
    }

    fn line_up(&mut self, fd: RawFd) {
        let File { queue, in_line } = &mut self.all[index(fd)];
        if !*in_line && !queue.waiting.is_empty() && queue.running < MAX_OF_FILE {
            *in_line = true;
            self.line.push_back(fd);
        }
    }

    fn next(&mut self) -> Option<Job> {
        let may = |fd: &RawFd| self.running < MAX_OF_FILES || self.all[index(*fd)].queue.running < ALWAYS;
        let fd = self.line.remove(self.line.iter().position(may)?)?;
        let File { queue, in_line } = &mut self.all[index(fd)];
        *in_line = false;
        let job = queue.next(MAX_OF_FILE);
        self.running += usize::from(job.is_some());
        self.line_up(fd);
        job
    }

    fn over(&mut self, fd: RawFd) {
        self.running -= 1;
        self.all[index(fd)].queue.running -= 1;
        self.line_up(fd);
    }
}

fn index(fd: RawFd) -> usize {
    usize::try_from(fd).expect("an open descriptor is no negative number")
}

fn submit(job: Job) {
    let mut state = POOL.lock();
    state.add(job);
    summon(state);
}

/// Another thread for what is admitted, if there is something.
fn summon(mut state: MutexGuard<'_, State>) {
    if state.admitted.len() > state.idle + state.coming {
        state.threads += 1;
        state.coming += 1;
        drop(state);
        grow();
    } else if !state.admitted.is_empty() {
        // Whoever wakes up wants the lock.
        drop(state);
        POOL.work.notify_one();
    }
}

fn grow() {
    let started = std::thread::Builder::new().name("rt-helper".into()).spawn(|| POOL.help());
    let Err(error) = started else { return };
    let mut state = POOL.lock();
    state.threads -= 1;
    state.coming -= 1;
    tracing::warn!(%error, threads = state.threads, "no helper thread could be started");
    // Others will come to the job. Where there is nobody, waiting for ourselves is better than waiting for ever.
    while state.threads == 0
        && let Some(job) = state.admitted.pop_front()
    {
        drop(state);
        let whose = job.whose;
        job.run();
        state = POOL.lock();
        state.over(whose);
    }
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Jobs run outside the lock, so a panic cannot have left the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The life of a helper thread.
    fn help(&self) {
        let mut helper = Helper { works_for: None };
        while let Some(job) = self.next(helper.works_for.take()) {
            helper.works_for = Some(job.whose);
            job.run();
        }
    }

    /// The next job; `ended`: whose the last one was. `None` after ten seconds without a job.
    fn next(&self, ended: Option<Whose>) -> Option<Job> {
        let mut state = self.lock();
        let admitted = ended.map_or(0, |whose| state.over(whose));
        state.coming -= usize::from(ended.is_none());
        if let Some(job) = state.admitted.pop_front() {
            // One of them is for ourselves.
            if admitted > 1 {
                summon(state);
            }
            return Some(job);
        }
        state.idle += 1;
        let idle = |state: &mut State| state.admitted.is_empty();
        let waited = self.work.wait_timeout_while(state, IDLE, idle).unwrap_or_else(PoisonError::into_inner);
        let mut state = waited.0;
        state.idle -= 1;
        state.admitted.pop_front()
    }
}

/// A helper thread. Counts it out, also where a job panics (in tests: release aborts).
struct Helper {
    works_for: Option<Whose>,
}

impl Drop for Helper {
    fn drop(&mut self) {
        let mut state = POOL.lock();
        state.threads -= 1;
        if let Some(whose) = self.works_for {
            state.over(whose);
        }
        summon(state);
    }
}

/// Helper threads that there are.
#[cfg(test)]
pub(super) fn threads() -> usize {
    POOL.lock().threads
}

/// Jobs of all files at once, but for those that are always admitted.
const MAX_OF_FILES: usize = 96;
/// Of them, those of one file.
const MAX_OF_FILE: usize = 64;
/// Jobs of one file that are admitted whatever others do.
const ALWAYS: usize = 2;
/// Calls that are no file's, at once.
const MAX_CALLS: usize = 32;
/// Long calls at once.
const MAX_LONG: usize = 16;
const IDLE: Duration = Duration::from_secs(10);
