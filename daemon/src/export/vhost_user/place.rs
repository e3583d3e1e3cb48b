//! Where a queue's ring is: in guest memory, or nowhere for the time being, because the frontend has taken that memory
//! away. What is answered meanwhile is kept, and given back when the ring is there again.

use super::chain::Broken;
use super::memory::MemoryMap;
use super::ring::Ring;
use super::settings::Settings;

/// See the module's head.
pub(super) enum Place {
    Here(Ring),
    Away(Away),
}

/// A ring that cannot be reached.
pub(super) struct Away {
    /// The queue breaks for this reason when it is asked to work.
    fault: Broken,
    /// As it was; `None` where there never was one.
    ring: Option<Ring>,
    /// Heads and lengths, in the order of the answers.
    held: Vec<(u16, u32)>,
}

impl Place {
    /// Looks for the ring for the first time.
    pub(super) fn find(map: &MemoryMap, settings: &Settings) -> Self {
        match Ring::start(map, settings.size, settings.at, settings.base, settings.features) {
            Ok(ring) => Self::Here(ring),
            Err(fault) => Self::Away(Away { fault, ring: None, held: Vec::new() }),
        }
    }

    /// Looks for it again, in other memory or elsewhere. A ring from which nothing was taken begins anew.
    pub(super) fn look_again(self, map: &MemoryMap, settings: &Settings) -> Self {
        let (ring, held) = match self {
            Self::Here(ring) => (Some(ring), Vec::new()),
            Self::Away(Away { ring, held, .. }) => (ring, held),
        };
        let Some(mut ring) = ring.filter(|ring| !ring.is_fresh()) else { return Self::find(map, settings) };
        ring.set_features(settings.features);
        match ring.move_to(map, settings.at) {
            Ok(()) => {
                held.into_iter().for_each(|(head, written)| ring.give_back(head, written));
                Self::Here(ring)
            }
            Err(fault) => Self::Away(Away { fault, ring: Some(ring), held }),
        }
    }

    /// The ring, or why it cannot be served.
    pub(super) fn ring(&mut self) -> Result<&mut Ring, Broken> {
        match self {
            Self::Here(ring) => Ok(ring),
            Self::Away(away) => Err(away.fault),
        }
    }

    /// The ring if it can be reached.
    pub(super) fn here(&self) -> Option<&Ring> {
        match self {
            Self::Here(ring) => Some(ring),
            Self::Away(_) => None,
        }
    }

    /// Gives a chain back: `written` bytes were written.
    #[inline]
    pub(super) fn give_back(&mut self, head: u16, written: u32) {
        match self {
            Self::Here(ring) => ring.give_back(head, written),
            Self::Away(away) => away.held.push((head, written)),
        }
    }

    /// Where to go on; `None` where there never was a ring.
    pub(super) fn next_avail(&self) -> Option<u16> {
        match self {
            Self::Here(ring) => Some(ring.next_avail()),
            Self::Away(away) => away.ring.as_ref().map(Ring::next_avail),
        }
    }
}
