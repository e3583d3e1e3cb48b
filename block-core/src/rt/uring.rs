//! The ring: entries in, completions out, one system call for "submit and wait". It owns no buffer and no descriptor:
//! slots and sources do, until the completion is taken.
#![expect(unsafe_code, reason = "a ring entry carries raw pointers, whose owners are named at each push")]

use super::driver::{Completion, Interest};
use super::op::{DirectOp, Engine, RawOp};
use super::pool;
use super::thread::Shared;
use super::token::Token;
use io_uring::{IoUring, Probe, Submitter, cqueue, opcode, squeue, types};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

/// One thread's ring.
pub(super) struct Uring {
    ring: Ring,
    shared: Arc<Shared>,
    /// Completions of what was done at once, and those that had to be taken to make room for a submission.
    stash: Vec<Completion>,
    max_batch: usize,
    /// There are workers for what is much to copy, and not too many.
    has_copiers: bool,
    /// Bytes of what waits for the next system call, and may be copied in it.
    inline: u64,
}

impl Uring {
    /// A ring with the best flags that this kernel takes. Must be called on the thread that uses it.
    /// Fails where io_uring is refused, too old, or turned off by TRELLIS_NO_IO_URING=1.
    pub(super) fn new(shared: &Arc<Shared>) -> io::Result<Self> {
        if !is_allowed() {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "TRELLIS_NO_IO_URING is set"));
        }
        let ring = build()?;
        check(&ring)?;
        // What is left to workers from the start counts as work without a bound. Before Linux 5.15 it has none.
        let has_copiers = ring.submitter().register_iowq_max_workers(&mut [0, MAX_COPIERS]).is_ok();
        let mut this = Self {
            ring: Ring::new(ring),
            shared: shared.clone(),
            stash: Vec::new(),
            max_batch: usize::MAX,
            has_copiers,
            inline: 0,
        };
        this.watch_mail();
        Ok(this)
    }

    pub(super) fn set_max_batch(&mut self, entries: u64) {
        let entries = usize::try_from(entries).unwrap_or(usize::MAX);
        self.max_batch = if entries == 0 { usize::MAX } else { entries };
    }

    #[inline]
    pub(super) fn transfer(&mut self, op: &DirectOp, token: Token) {
        if op.engine == Engine::AtOnce {
            let result = pool::carry_out(&RawOp::Move(*op));
            return self.stash.push(Completion { token: token.pack(), result, more: false });
        }
        let entry = movement(op).user_data(token.pack());
        let is_for_workers = op.engine == Engine::Cached && self.has_copiers && self.is_left_to_workers(op.len);
        self.push(if is_for_workers { entry.flags(squeue::Flags::ASYNC) } else { entry });
        if self.ring.submission().len() >= self.max_batch {
            self.flush();
        }
    }

    /// What the page cache has is copied by whoever submits, whose other guests wait meanwhile: not much of it by us.
    #[inline]
    fn is_left_to_workers(&mut self, bytes: u64) -> bool {
        let inline = self.inline.saturating_add(bytes);
        let is_much = inline > MAX_INLINE;
        if !is_much {
            self.inline = inline;
        }
        is_much
    }

    pub(super) fn run(&mut self, op: &RawOp, token: Token) {
        let entry = match *op {
            RawOp::Move(movement) => return self.transfer(&movement, token),
            RawOp::Sync { fd, data_only } => {
                let flags = if data_only { types::FsyncFlags::DATASYNC } else { types::FsyncFlags::empty() };
                opcode::Fsync::new(types::Fd(fd)).flags(flags).build()
            }
            RawOp::Fallocate { fd, mode, offset, len } => {
                opcode::Fallocate::new(types::Fd(fd), len).offset(offset).mode(mode).build()
            }
        };
        self.push(entry.user_data(token.pack()));
    }

    pub(super) fn watch(&mut self, fd: RawFd, interest: Interest, token: Token) {
        let (events, multi) = match interest {
            Interest::Readable => (libc::POLLIN, false),
            Interest::Writable => (libc::POLLOUT, false),
            Interest::Edges => (libc::POLLIN, true),
        };
        let poll = opcode::PollAdd::new(types::Fd(fd), u32::from(events.cast_unsigned())).multi(multi).build();
        self.push(poll.user_data(token.pack()));
    }

    pub(super) fn unwatch(&mut self, token: Token) {
        // Not PollRemove: that one gives up (EALREADY) where an event is just being handled, and the watch lives on.
        self.push(opcode::AsyncCancel::new(token.pack()).build().user_data(Token::Cancel.pack()));
    }

    #[inline]
    pub(super) fn pending(&mut self) -> usize {
        self.ring.submission().len()
    }

    /// One system call where there is something to submit, or work that waits for us to enter the kernel.
    #[inline]
    pub(super) fn flush(&mut self) {
        let queue = self.ring.submission();
        if !queue.is_empty() || queue.taskrun() || queue.cq_overflow() {
            drop(queue);
            self.enter();
        }
    }

    #[inline]
    pub(super) fn has_completions(&mut self) -> bool {
        let queue = self.ring.submission();
        let waiting = queue.taskrun() || queue.cq_overflow();
        drop(queue);
        waiting || !self.stash.is_empty() || !self.ring.completion().is_empty()
    }

    #[inline]
    pub(super) fn reap(&mut self, out: &mut Vec<Completion>) {
        let before = out.len();
        out.append(&mut self.stash);
        out.extend(self.ring.completion().map(completion));
        let mail_ended = out[before..].iter().any(|done| done.token == Token::Mail.pack() && !done.more);
        if mail_ended {
            self.watch_mail();
        }
    }

    pub(super) fn wait(&mut self, timeout: Option<Duration>) {
        if !self.stash.is_empty() {
            return self.flush();
        }
        let result = match timeout {
            None => self.ring.submitter.submit_and_wait(1),
            Some(timeout) => {
                let timespec = types::Timespec::from(timeout);
                self.ring.submitter.submit_with_args(1, &types::SubmitArgs::new().timespec(&timespec))
            }
        };
        match result {
            Ok(_) => {}
            Err(error) if is_transient(&error) || error.raw_os_error() == Some(libc::ETIME) => {}
            Err(error) => panic!("io_uring_enter: {error}"),
        }
        self.entered();
    }

    fn watch_mail(&mut self) {
        let fd = self.shared.signal_fd().as_raw_fd();
        self.watch(fd, Interest::Edges, Token::Mail);
    }

    #[inline]
    fn push(&mut self, entry: squeue::Entry) {
        loop {
            // SAFETY: what the entry points to is kept by the slot or the source that its token names, until its
            // completion has been taken (`push_direct`'s contract, `inflight`, `readiness`).
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return;
            }
            self.enter();
        }
    }

    /// Submits. Where the kernel has no room for the completions, they are taken out of its way.
    #[cold]
    fn make_room(&mut self) {
        let Self { ring, stash, .. } = self;
        stash.extend(ring.completion().map(completion));
    }

    /// What was copied, if the kernel has taken it.
    #[inline]
    fn entered(&mut self) {
        if self.pending() == 0 {
            self.inline = 0;
        }
    }

    fn enter(&mut self) {
        match self.ring.submitter.submit() {
            Ok(_) => {}
            Err(error) if is_transient(&error) => self.make_room(),
            Err(error) => panic!("io_uring_enter: {error}"),
        }
        self.entered();
    }
}

/// A ring beside its own submitter: only a submitter that stays remembers the registered ring descriptor, which saves
/// the kernel a look-up in every call.
struct Ring {
    /// Borrows from `ring`, which therefore is only ever shared, and freed after the last use of this.
    submitter: Submitter<'static>,
    ring: NonNull<IoUring>,
}

impl Ring {
    fn new(ring: IoUring) -> Self {
        let ring = NonNull::from(Box::leak(Box::new(ring)));
        // SAFETY: the box is freed in `drop` and not before; nobody borrows it mutably.
        let mut submitter = unsafe { ring.as_ref() }.submitter();
        // Without it all works as well.
        let _ = submitter.register_ring_fd();
        Self { submitter, ring }
    }

    #[inline]
    fn submission(&mut self) -> squeue::SubmissionQueue<'_> {
        // SAFETY: as in `new`.
        let ring = unsafe { self.ring.as_ref() };
        // SAFETY: `self` is borrowed mutably as long as the queue lives, so there is no second one.
        unsafe { ring.submission_shared() }
    }

    #[inline]
    fn completion(&mut self) -> cqueue::CompletionQueue<'_> {
        // SAFETY: as in `new`.
        let ring = unsafe { self.ring.as_ref() };
        // SAFETY: as in `submission`.
        unsafe { ring.completion_shared() }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the pointer came from a leaked box, and the submitter is not used any more.
        drop(unsafe { Box::from_raw(self.ring.as_ptr()) });
    }
}

/// The operator has nothing against it.
pub(super) fn is_allowed() -> bool {
    std::env::var_os("TRELLIS_NO_IO_URING").is_none_or(|value| value != "1")
}

/// A full completion queue, a signal, or the kernel short of memory: to be tried again.
fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN | libc::EINTR))
}

#[inline]
fn completion(entry: cqueue::Entry) -> Completion {
    Completion { token: entry.user_data(), result: entry.result(), more: cqueue::more(entry.flags()) }
}

#[inline]
fn movement(op: &DirectOp) -> squeue::Entry {
    let fd = types::Fd(op.fd);
    let flags = if op.dsync { libc::RWF_DSYNC } else { 0 };
    if op.count != 1 {
        return match op.write {
            true => opcode::Writev::new(fd, op.iovecs, op.count).offset(op.offset).rw_flags(flags).build(),
            false => opcode::Readv::new(fd, op.iovecs, op.count).offset(op.offset).build(),
        };
    }
    // SAFETY: the list is valid and has one entry (contract of whoever made the operation).
    let iovec = unsafe { *op.iovecs };
    let (base, len) = (iovec.iov_base.cast::<u8>(), u32::try_from(iovec.iov_len).unwrap_or(MAX_RW).min(MAX_RW));
    match op.write {
        true => opcode::Write::new(fd, base, len).offset(op.offset).rw_flags(flags).build(),
        false => opcode::Read::new(fd, base, len).offset(op.offset).build(),
    }
}

fn build() -> io::Result<IoUring> {
    let base = || {
        let mut builder = IoUring::builder();
        builder.setup_cqsize(COMPLETIONS).setup_clamp();
        builder
    };
    // Newest first: task work when we ask for it (6.1), only in our own context (5.19), plain.
    let newest =
        base().setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().setup_submit_all().build(ENTRIES);
    newest
        .or_else(|_| base().setup_coop_taskrun().setup_taskrun_flag().setup_submit_all().build(ENTRIES))
        .or_else(|_| base().build(ENTRIES))
}

/// Everything that is used must be there: 5.13 brought the last of it, multishot poll, together with resource tags.
fn check(ring: &IoUring) -> io::Result<()> {
    let params = ring.params();
    let features = params.is_feature_nodrop()
        && params.is_feature_submit_stable()
        && params.is_feature_ext_arg()
        && params.is_feature_resource_tagging();
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let codes = [
        opcode::Read::CODE,
        opcode::Write::CODE,
        opcode::Readv::CODE,
        opcode::Writev::CODE,
        opcode::Fsync::CODE,
        opcode::Fallocate::CODE,
        opcode::PollAdd::CODE,
        opcode::AsyncCancel::CODE,
    ];
    if !features || !codes.iter().all(|code| probe.is_supported(*code)) {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "this kernel's io_uring is older than Linux 5.13"));
    }
    Ok(())
}

/// Submission entries: several queues' batches between two system calls.
const ENTRIES: u32 = 512;
/// Completion entries. Where more come at once the kernel keeps them back and says so.
const COMPLETIONS: u32 = 4096;
/// Bytes that may be copied in one system call of the thread itself: half a millisecond to a millisecond.
const MAX_INLINE: u64 = 4 << 20;
/// Workers that copy: each has a stack, and a place in the unit's `TasksMax`.
const MAX_COPIERS: u32 = 4;
/// What Linux moves at most in one call (MAX_RW_COUNT).
const MAX_RW: u32 = 0x7fff_f000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_much_to_copy_in_one_submission_is_left_to_workers() {
        let mut ring = Uring::new(&Arc::new(Shared::new().unwrap())).unwrap();
        let mut left = |sizes: &[u64]| sizes.iter().map(|len| ring.is_left_to_workers(*len)).collect::<Vec<_>>();
        let half = MAX_INLINE / 2;
        assert_eq!(left(&[half, half + 1, 4096, half, half - 4096, 1]), [false, true, false, true, false, true]);
        ring.flush();
        let mut left = |len| ring.is_left_to_workers(len);
        assert_eq!([left(u64::MAX), left(MAX_INLINE), left(1)], [true, false, true], "the next submission");
    }

    /// The kernel ends the watch of the mailbox where it has no room for another completion, and that is when room is made.
    #[test]
    fn a_watch_of_the_mailbox_that_ended_while_room_was_made_is_armed_again() {
        let mut ring = Uring::new(&Arc::new(Shared::new().unwrap())).unwrap();
        ring.flush();
        assert_eq!(ring.pending(), 0);
        let ended = Completion { token: Token::Mail.pack(), result: libc::POLLIN.into(), more: false };
        ring.stash.push(ended);
        ring.reap(&mut Vec::new());
        assert_eq!(ring.pending(), 1);
    }
}
