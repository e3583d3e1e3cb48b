//! One queue of an attached device: put requests in, ring the bell where the device asks for it, take answers out.
//!
//! Counts the kicks that were sent and the interrupts that came. Which requests to send is the caller's business.

use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use virtio_driver::{EventFd, QueueNotifier, VirtioBlkQueue, VirtioBlkTransport};

use crate::sys::{SharedMemory, wait_readable};

/// A request. Offsets and lengths are bytes, multiples of 512; buffers count from the start of this queue's memory.
#[derive(Clone, Debug)]
pub enum Request {
    /// Disk to buffer.
    Read {
        /// Where on the disk.
        offset: u64,
        /// Where to; its length is the request's.
        buffer: Range<usize>,
    },
    /// Buffer to disk.
    Write {
        /// Where on the disk.
        offset: u64,
        /// Where from; its length is the request's.
        buffer: Range<usize>,
    },
    /// The device may forget the data.
    Discard {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// The data becomes zeroes.
    WriteZeroes {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u64,
        /// Space may be freed.
        unmap: bool,
    },
    /// What was written becomes stable.
    Flush,
}

/// A running queue. May be sent to another thread; keeps its device attached.
pub struct Queue {
    ring: VirtioBlkQueue<'static, u32>,
    kick: Box<dyn QueueNotifier>,
    call: Arc<EventFd>,
    memory: Arc<SharedMemory>,
    memory_start: usize,
    index: usize,
    kicks: u64,
    interrupts: u64,
    // Last, so that it is dropped last: `ring` points into memory that the transport has mapped.
    _transport: Arc<Box<VirtioBlkTransport>>,
}

impl Queue {
    pub(super) fn new(
        index: usize,
        ring: VirtioBlkQueue<'static, u32>,
        transport: Arc<Box<VirtioBlkTransport>>,
        memory: Arc<SharedMemory>,
        memory_start: usize,
    ) -> Self {
        let kick = transport.get_submission_notifier(index);
        let call = transport.get_completion_fd(index);
        Self { ring, kick, call, memory, memory_start, index, kicks: 0, interrupts: 0, _transport: transport }
    }

    /// The number of this queue in its device.
    #[must_use]
    pub fn index(&self) -> usize {
        self.index
    }

    /// Puts a request into the ring; `tag` comes back with its answer. The device may look at once, or only after
    /// [`Queue::kick`].
    ///
    /// # Errors
    /// The ring is full, or an offset is not a multiple of 512.
    pub fn submit(&mut self, request: Request, tag: u32) -> io::Result<()> {
        match request {
            Request::Read { offset, buffer } => {
                self.memory.queue_read(&mut self.ring, offset, shift(&buffer, self.memory_start), tag)
            }
            Request::Write { offset, buffer } => {
                self.memory.queue_write(&mut self.ring, offset, shift(&buffer, self.memory_start), tag)
            }
            Request::Discard { offset, len } => self.ring.discard(offset, len, tag),
            Request::WriteZeroes { offset, len, unmap } => self.ring.write_zeroes(offset, len, unmap, tag),
            Request::Flush => self.ring.flush(tag),
        }
    }

    /// Notifies the device of what was submitted, if it wants to know.
    ///
    /// # Errors
    /// The eventfd's.
    pub fn kick(&mut self) -> io::Result<()> {
        if self.ring.avail_notif_needed() {
            self.kicks += 1;
            self.kick.notify()?;
        }
        Ok(())
    }

    /// Appends the answers that are there now: tag, and 0 or a negative errno. Never waits.
    pub fn reap(&mut self, answers: &mut Vec<(u32, i32)>) {
        answers.extend(self.ring.completions().map(|done| (done.context, done.ret)));
    }

    /// Fills a part of this queue's memory.
    pub fn store(&self, offset: usize, bytes: &[u8]) {
        self.memory.store(self.memory_start + offset, bytes);
    }

    /// Reads a part of this queue's memory.
    pub fn load(&self, offset: usize, bytes: &mut [u8]) {
        self.memory.load(self.memory_start + offset, bytes);
    }

    /// Kicks sent since the queue was made.
    #[must_use]
    pub fn kicks(&self) -> u64 {
        self.kicks
    }

    /// Interrupts received since the queue was made: every write of the server to the call eventfd counts.
    ///
    /// # Errors
    /// The eventfd's.
    pub fn interrupts(&mut self) -> io::Result<u64> {
        if wait_readable(&[self.call.as_fd()], Duration::ZERO)? != 0 {
            self.take_interrupts()?;
        }
        Ok(self.interrupts)
    }

    /// Would sleep if none had come.
    fn take_interrupts(&mut self) -> io::Result<()> {
        self.interrupts += self.call.read()?;
        Ok(())
    }

    fn has_answer(&mut self) -> bool {
        self.ring.completions().has_next()
    }

    /// Asks for an interrupt at the next answer. The fence orders this before the look at the ring that must follow; the
    /// driver crate has it only where the event index is in force.
    fn want_interrupt(&mut self) {
        self.ring.set_used_notif_enabled(true);
        fence(Ordering::SeqCst);
    }

    /// With an event index "off" means an index in the past, so this may be said only while an answer waits: the driver
    /// crate then stores that answer's index, which the server has passed.
    fn spare_interrupt(&mut self) {
        if self.has_answer() {
            self.ring.set_used_notif_enabled(false);
        }
    }
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").field("index", &self.index).field("kicks", &self.kicks).finish_non_exhaustive()
    }
}

/// Sleeps like a guest until one of the queues has an answer: interrupts on, a last look, poll(2), interrupts off while
/// the caller reaps. `false` when the time ran out first.
///
/// # Errors
/// Those of poll(2) and the eventfds.
pub fn wait_any(queues: &mut [Queue], timeout: Duration) -> io::Result<bool> {
    loop {
        queues.iter_mut().for_each(Queue::want_interrupt);
        if any_answer(queues) {
            break;
        }
        let calls: Vec<_> = queues.iter().map(|queue| queue.call.as_fd()).collect();
        let ready = wait_readable(&calls, timeout)?;
        for (_, queue) in queues.iter_mut().enumerate().filter(|(n, _)| ready >> n & 1 == 1) {
            queue.take_interrupts()?;
        }
        if any_answer(queues) {
            break;
        }
        if ready == 0 {
            return Ok(false);
        }
    }
    queues.iter_mut().for_each(Queue::spare_interrupt);
    Ok(true)
}

fn any_answer(queues: &mut [Queue]) -> bool {
    queues.iter_mut().any(Queue::has_answer)
}

fn shift(range: &Range<usize>, by: usize) -> Range<usize> {
    range.start + by..range.end + by
}
