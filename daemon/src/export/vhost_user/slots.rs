//! Requests under way in one queue, by slot. A slot keeps its lists when it is free, so that taking one allocates
//! nothing once the queue has been busy.

use std::rc::Rc;
use std::time::Instant;

use block_core::graph::Passage;

use super::memory::{Mapped, Piece};

/// What is given back to the guest, and where.
#[derive(Clone, Copy)]
pub(super) struct Reply {
    /// By which the chain is given back.
    pub(super) head: u16,
    /// Where the status byte goes.
    pub(super) status: Piece,
    /// Bytes written to the guest if the request succeeds, without the status.
    pub(super) written: u32,
}

/// A request that went to the kernel on the direct path.
pub(super) struct InKernel {
    pub(super) passage: Passage,
    pub(super) started: Instant,
}

/// A request under way.
pub(super) struct Flight {
    pub(super) reply: Reply,
    /// The memory that the chain lies in: an old table lives as long as its requests.
    pub(super) map: Rc<Mapped>,
    /// `None` on the async path.
    pub(super) kernel: Option<InKernel>,
}

#[derive(Default)]
struct Slot {
    flight: Option<Flight>,
    pieces: Vec<Piece>,
    /// What the request counts for.
    weight: usize,
}

/// Pieces under way in one queue before it takes nothing more (3 MiB of lists). Chains may share descriptors, so a
/// guest's own memory is no bound: 32768 chains of as many pieces fit into one ring.
const MAX_PIECES: usize = 1 << 16;
/// A task takes memory however short its list is; it counts for this many pieces at least. 1024 are as many as a queue has.
const TASK_PIECES: usize = 64;
/// It may have to copy its data to memory of ours, too: 64 MiB are as much as a queue may have under way, and one request.
const BYTES_A_PIECE: u64 = 1 << 10;
/// A longer list is not kept by a free slot.
pub(super) const KEPT_PIECES: usize = 32;

/// See the module's head.
#[derive(Default)]
pub(super) struct Slots {
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Weights of all requests under way, in pieces.
    weight: usize,
}

impl Slots {
    /// Puts a request with its data into a free slot.
    pub(super) fn take(&mut self, flight: Flight, pieces: &[Piece]) -> u32 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            u32::try_from(self.slots.len() - 1).expect("a queue has at most 32768 requests")
        });
        let slot = &mut self.slots[index as usize];
        slot.weight = if flight.kernel.is_some() { pieces.len() } else { task_weight(pieces) };
        slot.flight = Some(flight);
        slot.pieces.clear();
        slot.pieces.extend_from_slice(pieces);
        self.weight += slot.weight;
        index
    }

    /// A request of the direct path goes on as a task, and counts as one.
    pub(super) fn is_task_now(&mut self, slot: u32) {
        let place = &mut self.slots[slot as usize];
        let weight = task_weight(&place.pieces);
        self.weight = self.weight - place.weight + weight;
        place.weight = weight;
    }

    /// The request's data in guest memory.
    pub(super) fn pieces(&self, slot: u32) -> &[Piece] {
        &self.slots[slot as usize].pieces
    }

    /// The request in a slot.
    pub(super) fn flight(&mut self, slot: u32) -> &mut Flight {
        self.slots[slot as usize].flight.as_mut().expect("the slot is taken")
    }

    /// The request is over.
    pub(super) fn release(&mut self, slot: u32) -> Flight {
        let place = &mut self.slots[slot as usize];
        let flight = place.flight.take().expect("a slot is released once");
        self.weight -= place.weight;
        if place.pieces.capacity() > KEPT_PIECES {
            place.pieces = Vec::new();
        }
        self.free.push(slot);
        flight
    }

    /// So much is under way that nothing more is to be taken before some of it is over.
    #[inline]
    pub(super) fn is_full(&self) -> bool {
        self.weight >= MAX_PIECES
    }

    /// No request is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }
}

fn task_weight(pieces: &[Piece]) -> usize {
    let bytes: u64 = pieces.iter().map(|piece| piece.len).sum();
    pieces.len().max(TASK_PIECES).max(usize::try_from(bytes / BYTES_A_PIECE).unwrap_or(MAX_PIECES))
}
