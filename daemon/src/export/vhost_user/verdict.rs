//! What the message filter says about a message, for the session to carry out. Plain data.

use super::descriptors::Received;
use super::memory::{DirtyLog, MemoryMap};
use super::regions::Region;

/// What is to be done with a message.
#[derive(Debug)]
pub(super) enum Verdict {
    /// The engine answers it.
    Relay,
    /// The engine takes it; it is acknowledged when the engine has done it.
    Pass,
    /// [`Verdict::Pass`], after this has been done.
    PassAfter(Effect),
    /// There is no memory any more. The engine lets go of these regions; it is acknowledged then.
    Unmap(Vec<Region>),
    /// Done here; acknowledge it.
    Done,
    /// [`Verdict::Done`], after this has been done.
    DoneAfter(Effect),
    /// Answer with this body.
    Answer(Vec<u8>),
    /// [`Verdict::Answer`], after this has been done.
    AnswerAfter(Effect, Vec<u8>),
    /// Nothing was applied: a NACK if the frontend waits for one, else the end of the connection.
    Refuse(&'static str),
    /// The end of the connection.
    Drop(&'static str),
}

/// What the session has to do for a message.
pub(super) enum Effect {
    /// This queue's used ring is logged from this address on, or not at all.
    LogUsed(usize, Option<u64>),
    /// Other guest memory.
    Memory(MemoryMap),
    /// Another dirty log.
    Log(DirtyLog),
    /// The driver's word about the write cache.
    Writeback(bool),
    /// The channel on which we may speak first.
    Channel(Received),
}

impl std::fmt::Debug for Effect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::LogUsed(..) => "LogUsed",
            Self::Memory(_) => "Memory",
            Self::Log(_) => "Log",
            Self::Writeback(_) => "Writeback",
            Self::Channel(_) => "Channel",
        })
    }
}
