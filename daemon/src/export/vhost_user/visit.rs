//! One visit to a ring: each chain is parsed and answered, sent to the kernel, or made a task.

use std::rc::Rc;

use block_core::base::ByteRange;
use block_core::graph::{DirectRequest, Limits, Passed, RingEntry, ViewPin, WriteFlags};
use block_core::rt::IoBuf;

use super::chain::{Broken, Chain};
use super::memory::{Mapped, Piece, Target, Transfers};
use super::queue::Queue;
use super::request::{Data, Disk, ID_LEN, Request, SEGMENT, Status, parse};
use super::ring::Ring;
use super::settings::Settings;
use super::slots::{Answer, Flight, InKernel, Slots};

/// A request on the async path.
pub(super) enum Job {
    Read(ByteRange, IoBuf),
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
}

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
        let (head, fua) = (chain.head(), self.settings.fua);
        let zeroes = |unmap| WriteFlags { fua, may_unmap: unmap, ..WriteFlags::default() };
        match parsed {
            Ok(Request::Read(at)) => self.transfer(false, at, writable, (head, status)),
            Ok(Request::Write(at)) => self.transfer(true, at, readable, (head, status)),
            Ok(Request::Flush) => self.task((head, status), Job::Flush),
            Ok(Request::Discard(at)) => self.task((head, status), Job::Discard(at)),
            Ok(Request::WriteZeroes { at, unmap }) => self.task((head, status), Job::WriteZeroes(at, zeroes(unmap))),
            Ok(Request::GetId) => self.get_id((head, status), writable.0),
            Ok(Request::Nothing) => self.done((head, status), 0, Status::Ok),
            Err(refusal) => self.done((head, status), 0, refusal),
        }
        Ok(())
    }

    #[inline]
    fn transfer(&mut self, write: bool, at: ByteRange, data: (&[Piece], u64), to: (u16, Piece)) {
        let (pieces, len) = data;
        // A chain has at most 2^32 bytes, header and status among them.
        let written = if write { 0 } else { u32::try_from(len).expect("checked when the chain was read") };
        let request =
            DirectRequest { write, at, fua: write && self.settings.fua, memory_bits: self.memory_bits(pieces) };
        let passed = match pieces.len() <= self.limits.max_segments {
            true => self.queue.lane.direct(self.pin, request),
            false => None,
        };
        match passed {
            Some(passed) => self.direct(passed, write, pieces, to, written),
            None => {
                let job = Job::from_direct(request, self.map.buffer(pieces));
                let answer = self.answer(to, written);
                let slot = self.slots.take(Flight { answer, kernel: None }, pieces);
                self.queue.stats.slow();
                self.queue.spawn(slot, self.pin.another(), job);
            }
        }
    }

    #[inline]
    fn direct(&mut self, passed: Passed, write: bool, pieces: &[Piece], to: (u16, Piece), written: u32) {
        match passed {
            Passed::Ring(RingEntry { fd, offset, dsync, at_once }, passage) => {
                let kernel = Some(InKernel { passage, started: self.queue.local.batch_time() });
                let answer = self.answer(to, written);
                let slot = self.slots.take(Flight { answer, kernel }, pieces);
                let target = Target { write, dsync, fd, offset, at_once };
                let source = (&*self.queue.local, self.queue.source());
                self.transfers.push(slot, target, self.map, pieces, source);
            }
            Passed::Zeroed => {
                pieces.iter().for_each(|piece| self.map.clear(*piece));
                self.done_directly(write, pieces, to, written);
            }
            Passed::Done => self.done_directly(write, pieces, to, written),
        }
    }

    #[inline]
    fn done_directly(&mut self, write: bool, pieces: &[Piece], to: (u16, Piece), written: u32) {
        if !write {
            self.log(pieces);
        }
        self.done(to, written, Status::Ok);
    }

    fn task(&mut self, to: (u16, Piece), job: Job) {
        let answer = self.answer(to, 0);
        let slot = self.slots.take(Flight { answer, kernel: None }, &[]);
        self.queue.spawn(slot, self.pin.another(), job);
    }

    fn get_id(&mut self, to: (u16, Piece), pieces: &[Piece]) {
        let mut left = &self.queue.traits.serial[..];
        for piece in pieces {
            let part = usize::try_from(piece.len).map_or(left.len(), |len| len.min(left.len()));
            self.map.copy_in(*piece, &left[..part]);
            self.log(&[piece.first(part as u64)]);
            left = &left[part..];
        }
        let written = u32::try_from(ID_LEN - left.len()).expect("at most 20");
        self.done(to, written, Status::Ok);
    }

    /// Answers at once.
    #[inline]
    fn done(&mut self, (head, status): (u16, Piece), written: u32, result: Status) {
        self.map.copy_in(status, &[result as u8]);
        self.log(&[status]);
        self.queue.stats.completed(result == Status::Ok);
        self.ring.give_back(head, written + 1);
    }

    fn answer(&self, (head, status): (u16, Piece), written: u32) -> Answer {
        Answer { head, status, written, map: self.map.clone() }
    }

    fn log(&self, pieces: &[Piece]) {
        if let Some(log) = &self.settings.log {
            pieces.iter().for_each(|piece| log.mark(piece.gpa, piece.len));
        }
    }

    #[inline]
    fn memory_bits(&self, pieces: &[Piece]) -> usize {
        pieces.iter().fold(0, |bits, piece| {
            bits | self.map.host(*piece) as usize | usize::try_from(piece.len).unwrap_or(usize::MAX)
        })
    }
}
