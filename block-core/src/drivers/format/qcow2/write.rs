//! Room for guest data that has none of its own, and what has to be copied into it so that only the write is seen.
//!
//! While a ticket lives the clusters are its own: others that want to allocate, zero or discard there wait for it.

use smallvec::SmallVec;

use super::entry::{CORRUPT, Cluster, Compressed, Granules, Kind, L2Entry};
use super::layout::Layout;
use super::meta::Run;
use super::turns::Turn;
use super::{Image, Shape};
use crate::base::{ByteRange, IoError, align_down};
use crate::graph::{DebugEvent, Extent, IoCx, Place, WriteFlags};
use crate::pipeline::{self, Access, Ticket};
use crate::rt::IoBuf;

/// Room that is not linked in yet.
pub struct Room<'t> {
    image: &'t Image,
    shape: &'t Shape,
    cx: IoCx<'t>,
    _turn: Turn<'t>,
    /// What is going to be written, and where in the child it goes.
    at: ByteRange,
    start: u64,
    /// What has to be copied before: guest bytes, and where they go.
    fills: SmallVec<[(ByteRange, u64); 2]>,
    /// Bytes in the room that were never written are zeroes.
    fresh: bool,
    /// The new entries, from the cluster of the first byte on. None: there is nothing to link.
    entries: SmallVec<[L2Entry; 4]>,
    /// What the old entries led to.
    old: SmallVec<[Run; 2]>,
    /// Clusters that nobody knows of if this comes to nothing.
    taken: Option<Run>,
}

impl Ticket for Room<'_> {
    fn extent(&self) -> Extent {
        let child = self.image.data.unwrap_or(self.image.file);
        Extent { len: self.at.len(), place: Place::Data { child, offset: self.start } }
    }

    async fn commit(mut self) -> Result<(), IoError> {
        for (guest, start) in &self.fills {
            self.image.fill(self.shape, self.cx, *guest, *start, self.fresh).await?;
        }
        if !self.entries.is_empty() {
            self.image.link(self.cx, self.at.start(), &self.entries, &self.old).await?;
        }
        self.taken = None;
        Ok(())
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        if let Some(run) = self.taken.take() {
            self.image.meta().abandoned.push(run);
        }
    }
}

impl Image {
    /// Room for the first bytes of a range, as many as get it at once.
    pub(super) async fn room<'t>(&'t self, shape: &'t Shape, cx: IoCx<'t>, at: ByteRange) -> Result<Room<'t>, IoError> {
        self.ready(cx).await?;
        let layout = self.layout;
        let at = layout.within_slice(at).split(MAX_ROOM.max(layout.cluster())).0;
        let clusters = at.widened(layout.cluster()).ok_or(IoError::OutOfRange)?;
        let turn = self.guests.take(cx, clusters).await;
        self.own_table(cx, at.start()).await?;
        let first = layout.around(at.start());
        let cluster = self.entry(cx, first.start()).await?.parse(layout, first.start())?;
        let mut room = Room {
            image: self,
            shape,
            cx,
            _turn: turn,
            at,
            start: 0,
            fills: SmallVec::new(),
            fresh: false,
            entries: SmallVec::new(),
            old: SmallVec::new(),
            taken: None,
        };
        if let Some(host) = self.own_room(cluster, first.start()) {
            if self.data.is_none() && host >= cx.child(self.file).size() {
                // What was linked was written.
                return Err(CORRUPT);
            }
            room.at = at.split(first.end() - at.start()).0;
            room.start = host + (at.start() - first.start());
            room.cluster(cluster, Some(host), host);
        } else {
            room.take(clusters).await?;
        }
        Ok(room)
    }

    /// Where the cluster's data may go without another cluster.
    fn own_room(&self, cluster: Cluster, guest: u64) -> Option<u64> {
        if self.data.is_some() {
            return Some(guest);
        }
        match cluster {
            Cluster::Standard(Granules { host: Some(host), own: true, .. }) => (!self.is_table(host)).then_some(host),
            _ => None,
        }
    }

    /// Copies what the guest sees now to a place of its new room.
    async fn fill(
        &self,
        shape: &Shape,
        cx: IoCx<'_>,
        guest: ByteRange,
        start: u64,
        fresh: bool,
    ) -> Result<(), IoError> {
        // A data file ends where the disk does.
        let inside = ByteRange::whole(shape.size).intersection(guest);
        let guest = match (self.data, inside) {
            (None, _) => guest,
            (Some(_), Some(inside)) => inside,
            (Some(_), None) => return Ok(()),
        };
        let buf = IoBuf::private(guest.len())?;
        let is_zero = match inside {
            None => true,
            Some(inside) => {
                let extent = self.place(shape, cx, inside, Access::Read).await?;
                let is_zero = extent.len == inside.len() && matches!(extent.place, Place::Zero { .. });
                if !is_zero {
                    cx.child(self.file).announce(DebugEvent::CowRead).await;
                    pipeline::read_mapped(self, shape, cx, inside, buf.slice(0, inside.len())).await?;
                }
                is_zero
            }
        };
        if is_zero && fresh {
            return Ok(());
        }
        cx.child(self.file).announce(DebugEvent::CowWrite).await;
        let at = ByteRange::new(start, guest.len()).ok_or(IoError::OutOfRange)?;
        cx.child(self.data.unwrap_or(self.file)).write(at, buf, WriteFlags::default()).await
    }

    /// The host clusters that an entry refers to.
    pub(super) fn runs_of(&self, cluster: Cluster, punch: bool) -> Option<Run> {
        if self.data.is_some() {
            return None;
        }
        let bits = self.layout.cluster_bits;
        match cluster {
            Cluster::Standard(Granules { host, .. }) => host.map(|host| Run { cluster: host >> bits, count: 1, punch }),
            Cluster::Compressed(Compressed { start, len }) => {
                let (first, last) = (start >> bits, (start + len - 1) >> bits);
                Some(Run { cluster: first, count: last - first + 1, punch })
            }
        }
    }
}

impl Room<'_> {
    /// What is not written of it reads as zeroes.
    pub(super) fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// New clusters, for as many as need them from the first one on.
    async fn take(&mut self, clusters: ByteRange) -> Result<(), IoError> {
        let (image, layout) = (self.image, self.image.layout);
        let mut old: SmallVec<[Cluster; 4]> = SmallVec::new();
        let mut guest = clusters.start();
        while guest < clusters.end() {
            let entry = image.entry(self.cx, guest).await?;
            // One that is nonsense is not part of this request.
            let Ok(cluster) = entry.parse(layout, guest) else { break };
            if !old.is_empty() && image.own_room(cluster, guest).is_some() {
                break;
            }
            old.push(cluster);
            guest += layout.cluster();
        }
        let run = image.take(self.cx, old.len() as u64).await?;
        self.taken = Some(run);
        self.fresh = run.cluster >= image.meta().refs.fresh;
        let end = clusters.start() + (run.count << layout.cluster_bits);
        self.at = ByteRange::between(self.at.start(), self.at.end().min(end)).ok_or(IoError::OutOfRange)?;
        let host = run.cluster << layout.cluster_bits;
        self.start = host + (self.at.start() - clusters.start());
        for (number, cluster) in (0..run.count).zip(old) {
            self.cluster(cluster, None, host + (number << layout.cluster_bits));
        }
        Ok(())
    }

    /// What becomes of one cluster, whose data goes to `host`: where it is already (`stays`), or to a new place.
    fn cluster(&mut self, old: Cluster, stays: Option<u64>, host: u64) {
        let layout = self.image.layout;
        let guest = layout.around(self.at.start()).start() + ((self.entries.len() as u64) << layout.cluster_bits);
        let whole = layout.around(guest);
        let Some(data) = whole.intersection(self.at) else { return };
        let all = mask(0, layout.granules());
        let before = match old {
            Cluster::Standard(granules) => granules,
            Cluster::Compressed(_) => Granules { data: all, ..Granules::NONE },
        };
        let granule = layout.granule();
        let (first, last) = ((data.start() - guest) / granule, (data.end() - 1 - guest) / granule);
        let touched = mask(first, last + 1);
        let kept = if stays.is_some() { before.data } else { 0 };
        let head = ByteRange::between(align_down(data.start(), granule), data.start());
        let tail = ByteRange::between(data.end(), guest + (last + 1) * granule);
        for (part, number) in [(head, first), (tail, last)] {
            if let Some(part) = part.filter(|part| !part.is_empty() && kept & mask(number, number + 1) == 0) {
                self.fills.push((part, host + (part.start() - guest)));
            }
        }
        let moved = before.data & !touched & !kept;
        self.copy_granules(layout, moved, guest, host);
        let granules =
            Granules { host: Some(host), own: true, data: before.data | touched, zero: before.zero & !touched };
        let entry = granules.entry(layout);
        if stays.is_none() {
            self.old.extend(self.image.runs_of(old, self.shape.discards.other));
        }
        self.entries.push(entry);
    }

    fn copy_granules(&mut self, layout: Layout, moved: u32, guest: u64, host: u64) {
        let granules = Granules { data: moved, ..Granules::NONE };
        let (mut number, count) = (0, layout.granules());
        while number < count {
            let (kind, same) = granules.run(number, count);
            if kind == Kind::Data {
                let (start, len) = (number * layout.granule(), same * layout.granule());
                self.fills.extend(ByteRange::new(guest + start, len).map(|part| (part, host + start)));
            }
            number += same;
        }
    }
}

/// The bits from `first` up to `end` (at most 32).
pub(super) fn mask(first: u64, end: u64) -> u32 {
    let up_to = |number: u64| if number >= 32 { u32::MAX } else { (1 << number) - 1 };
    up_to(end) & !up_to(first)
}

/// Bytes for which one ticket makes room at the most.
const MAX_ROOM: u64 = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_have_their_bits() {
        assert_eq!((mask(0, 1), mask(0, 32), mask(3, 5), mask(31, 32), mask(4, 4)), (1, u32::MAX, 0b11000, 1 << 31, 0));
    }
}
