//! One visit to a ring: each chain is parsed and answered, sent to the kernel, or made a task.

use std::rc::Rc;

use block_core::base::ByteRange;
use block_core::graph::{DirectRequest, Limits, Passed, RingEntry, ViewPin, WriteFlags};
use block_core::rt::{IoBuf, STEP};

use super::chain::{Broken, Chain};
use super::memory::{Mapped, Piece, Target, Transfers};
use super::queue::Queue;
use super::request::{Data, Disk, HEADER, ID_LEN, Request, SEGMENT, Status, kind, parse};
use super::ring::Ring;
use super::settings::Settings;
use super::slots::{Flight, InKernel, Reply, Slots};

/// A request on the async path.
pub(super) enum Job {
    Read(ByteRange, IoBuf),
    /// A read of nothing but zeroes.
    Zero(IoBuf),
    Write(ByteRange, IoBuf, WriteFlags),
    WriteZeroes(ByteRange, WriteFlags),
    Discard(ByteRange),
    Flush,
}

impl Job {
    pub(super) fn from_direct(request: DirectRequest, buffer: IoBuf) -> Self {
        if request.write {
            Self::Write(request.at, buffer, WriteFlags { fua: request.fua, ..WriteFlags::default() })
        } else {
            Self::Read(request.at, buffer)
        }
    }
}

/// What stays the same from one request of a visit to the next.
pub(super) struct Visit<'v> {
    pub(super) queue: &'v Queue,
    pub(super) pin: &'v ViewPin,
    pub(super) limits: &'v Limits,
    pub(super) disk: &'v Disk,
    pub(super) settings: &'v Settings,
    pub(super) map: &'v Rc<Mapped>,
    pub(super) ring: &'v mut Ring,
    pub(super) slots: &'v mut Slots,
    pub(super) transfers: &'v mut Transfers,
    pub(super) spent: Spent,
}

/// What a visit has cost so far: requests alone say little about the time that they take.
#[derive(Default)]
pub(super) struct Spent {
    /// Bytes cleared, or moved by the kernel, which may copy them as they are submitted.
    bytes: u64,
    descriptors: u32,
}

impl Spent {
    /// Other queues have their turn. What a visit costs beyond this is one request.
    pub(super) fn is_enough(&self) -> bool {
        self.bytes >= ENOUGH_BYTES || self.descriptors >= ENOUGH_DESCRIPTORS
    }
}

const ENOUGH_BYTES: u64 = 4 << 20;
/// Each costs a look into the memory table, and two copies.
const ENOUGH_DESCRIPTORS: u32 = 4096;

impl Visit<'_> {
    /// Takes the next chain and does with it what it asks for.
    #[inline]
    pub(super) fn one(&mut self, chain: &mut Chain) -> Result<(), Broken> {
        self.ring.take(self.map, chain)?;
        let header = chain.take_header(self.map);
        let status = chain.take_status();
        let (readable, writable) = (chain.readable(), chain.writable());
        let data = Data { readable: readable.1, writable: writable.1 };
        let parsed = parse(&header, data, self.disk, || chain.peek::<SEGMENT>(self.map));
        // Before anything is done about it: was it the guest that wrote this?
        if self.map.is_poisoned() {
            return Err(Broken::MemoryLost);
        }
        self.spent.descriptors += chain.descriptors();
        let (fua, reply) = (self.settings.fua, Reply { head: chain.head(), status, written: 0 });
        let zeroes = |unmap| WriteFlags { fua, may_unmap: unmap, ..WriteFlags::default() };
        match parsed {
            Ok(Request::Read(at)) => self.transfer(false, at, writable, reply),
            Ok(Request::Write(at)) => self.transfer(true, at, readable, reply),
            Ok(Request::Flush) => self.task(reply, &[], Job::Flush),
            Ok(Request::Discard(at)) => self.task(reply, &[], Job::Discard(at)),
            Ok(Request::WriteZeroes { at, unmap }) => self.task(reply, &[], Job::WriteZeroes(at, zeroes(unmap))),
            Ok(Request::GetId) => self.get_id(reply, writable.0),
            Ok(Request::Nothing) => self.done(reply, Status::Ok),
            Err(refusal) => self.refuse(&header, reply, refusal),
        }
        Ok(())
    }

    #[inline]
    fn transfer(&mut self, write: bool, at: ByteRange, data: (&[Piece], u64), reply: Reply) {
        let (pieces, len) = data;
        // A chain has at most 2^32 bytes, header and status among them.
        let written = if write { 0 } else { u32::try_from(len).expect("checked when the chain was read") };
        let reply = Reply { written, ..reply };
        let request =
            DirectRequest { write, at, fua: write && self.settings.fua, memory_bits: self.memory_bits(pieces) };
        let passed = match pieces.len() <= self.limits.max_segments {
            true => self.queue.lane.direct(self.pin, request),
            false => None,
        };
        match passed {
            Some(passed) => self.direct(passed, request, pieces, reply),
            None => {
                self.queue.stats.slow();
                self.task(reply, pieces, Job::from_direct(request, self.map.buffer(pieces)));
            }
        }
    }

    #[inline]
    fn direct(&mut self, passed: Passed, request: DirectRequest, pieces: &[Piece], reply: Reply) {
        let (write, len) = (request.write, request.at.len());
        match passed {
            Passed::Ring(RingEntry { fd, offset, dsync, engine }, passage) => {
                self.spent.bytes += len;
                let kernel = Some(InKernel { passage, started: self.queue.local.batch_time() });
                let slot = self.slots.take(Flight { reply, map: self.map.clone(), kernel }, pieces);
                let target = Target { write, dsync, fd, offset, engine };
                let source = (&*self.queue.local, self.queue.source());
                self.transfers.push(slot, target, self.map, pieces, source);
            }
            Passed::Zeroed if len > STEP => self.task(reply, pieces, Job::Zero(self.map.buffer(pieces))),
            Passed::Zeroed => {
                self.spent.bytes += len;
                pieces.iter().for_each(|piece| self.map.clear(*piece));
                self.done_directly(pieces, reply);
            }
            Passed::Done => self.done_directly(pieces, reply),
        }
    }

    #[inline]
    fn done_directly(&mut self, pieces: &[Piece], reply: Reply) {
        if reply.written > 0 {
            self.settings.log(pieces);
        }
        self.done(reply, Status::Ok);
    }

    fn task(&mut self, reply: Reply, pieces: &[Piece], job: Job) {
        let slot = self.slots.take(Flight { reply, map: self.map.clone(), kernel: None }, pieces);
        self.queue.spawn(slot, self.pin.another(), job);
    }

    fn get_id(&mut self, reply: Reply, pieces: &[Piece]) {
        let mut left = &self.queue.traits.serial[..];
        for piece in pieces {
            let part = usize::try_from(piece.len).map_or(left.len(), |len| len.min(left.len()));
            self.map.copy_in(*piece, &left[..part]);
            self.settings.log(&[piece.first(part as u64)]);
            left = &left[part..];
        }
        let written = u32::try_from(ID_LEN - left.len()).expect("at most 20");
        self.done(Reply { written, ..reply }, Status::Ok);
    }

    #[cold]
    fn refuse(&mut self, header: &[u8; HEADER], reply: Reply, refusal: Status) {
        if refusal == Status::IoErr
            && let Some(kind) = kind(header)
        {
            self.queue.lane.refused(self.pin, kind);
        }
        self.done(reply, refusal);
    }

    /// Answers at once.
    #[inline]
    fn done(&mut self, reply: Reply, result: Status) {
        self.map.copy_in(reply.status, &[result as u8]);
        self.settings.log(&[reply.status]);
        self.queue.stats.completed(result == Status::Ok);
        self.ring.give_back(reply.head, reply.written + 1);
    }

    #[inline]
    fn memory_bits(&self, pieces: &[Piece]) -> usize {
        pieces.iter().fold(0, |bits, piece| {
            bits | self.map.host(*piece) as usize | usize::try_from(piece.len).unwrap_or(usize::MAX)
        })
    }
}
