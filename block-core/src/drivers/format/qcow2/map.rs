//! Where guest data is. What can be said from memory takes no lock; the rest loads what is missing, and asks again.

use super::compression::unpack;
use super::entry::{CORRUPT, Cluster, Granules, Kind, L2Entry, OFFSET};
use super::tables::fetch;
use super::{Image, Shape};
use crate::base::{ByteRange, IoError};
use crate::graph::{DebugEvent, Extent, IoCx, Place};
use crate::pipeline::Access;
use crate::rt::IoBuf;

impl Image {
    /// Where the first bytes are, if memory says so: nothing is waited for, nothing is allocated.
    #[inline]
    pub(super) fn place_now(&self, shape: &Shape, at: ByteRange, access: Access) -> Option<Extent> {
        let at = self.layout.within_slice(at);
        let mut walk = Walk::new(self, at, access);
        self.slices
            .look(self.layout.slice_of(at.start()), self.layout.entry_of(at.start()), |entry| walk.take(entry))?;
        walk.extent(self, shape)
    }

    /// The same, whatever it takes.
    pub(super) async fn place(
        &self,
        shape: &Shape,
        cx: IoCx<'_>,
        at: ByteRange,
        access: Access,
    ) -> Result<Extent, IoError> {
        let layout = self.layout;
        let all = at;
        let at = layout.within_slice(at);
        loop {
            if let Some(extent) = self.place_now(shape, at, access) {
                return Ok(extent);
            }
            let slice = layout.slice_of(at.start());
            if !self.load(cx, slice).await? {
                // Room is made table by table; who only looks need not ask for each table that is not there.
                let len = if access == Access::Read { at.len().max(self.without_tables(all)) } else { at.len() };
                return Ok(Extent { len, place: self.nothing(shape) });
            }
            let mut found = None;
            let looked = self.slices.look(slice, layout.entry_of(at.start()), |entry| {
                found = Some(entry);
                false
            });
            let (Some(()), Some(entry)) = (looked, found) else { continue };
            // Nonsense does not become better by looking again.
            let guest = layout.around(at.start());
            let cluster = entry.parse(layout, guest.start())?;
            if access == Access::Write {
                self.check_place(cx, cluster).await?;
            }
        }
    }

    /// How many bytes from the beginning of the range on have no L2 table.
    fn without_tables(&self, at: ByteRange) -> u64 {
        let span = self.layout.l2_span();
        let first = at.start() / span;
        let meta = self.meta();
        let tables = usize::try_from(first).ok().and_then(|first| meta.l1.get(first..)).unwrap_or_default();
        let missing = (first..).zip(tables).take_while(|(_, entry)| **entry & OFFSET == 0).last();
        let end = missing.map_or(at.start(), |(index, _)| index.saturating_add(1).saturating_mul(span));
        end.min(at.end()).saturating_sub(at.start())
    }

    /// Memory says that the cluster may be a table's; `owner_of` knows.
    async fn check_place(&self, cx: IoCx<'_>, cluster: Cluster) -> Result<(), IoError> {
        let Cluster::Standard(Granules { host: Some(host), own: true, .. }) = cluster else { return Ok(()) };
        if self.data.is_some() || !self.regions.may_own(host >> self.layout.cluster_bits) {
            return Ok(());
        }
        let at = self.layout.around(host);
        let owner = self.meta().owner_of(at);
        Err(match owner {
            Some(owner) => self.corrupt(cx, &format!("guest data lies over {owner}"), at).await,
            // No table that is watched is here, so it is written in place.
            None => return Ok(()),
        })
    }

    /// What there is where this layer has nothing.
    fn nothing(&self, shape: &Shape) -> Place {
        shape.backing.map_or(Place::Zero { allocated: false }, Place::Below)
    }

    /// Fills `buf` from the compressed cluster that the range is in. `false`: it is not compressed (any more).
    pub(super) async fn unpacked(&self, cx: IoCx<'_>, at: ByteRange, buf: &IoBuf) -> Result<bool, IoError> {
        let guest = self.layout.around(at.start());
        let entry = self.entry(cx, guest.start()).await?;
        let Cluster::Compressed(place) = entry.parse(self.layout, guest.start())? else { return Ok(false) };
        let file = cx.child(self.file);
        // The last sector may lie past the end of the file, since only a part of it is used.
        let end = (place.start + place.len).min(file.size());
        let len = end.checked_sub(place.start).filter(|len| *len > 0).ok_or(CORRUPT)?;
        file.announce(DebugEvent::ReadCompressed).await;
        let packed = fetch(file, place.start, len).await?;
        // Between the look and the read the cluster may have been written anew; its room is not another's before a drain.
        let mut cluster = Vec::new();
        let size = usize::try_from(self.layout.cluster()).map_err(|_| IoError::NoMemory)?;
        cluster.try_reserve_exact(size).map_err(|_| IoError::NoMemory)?;
        cluster.resize(size, 0);
        unpack(self.compression, &packed, &mut cluster)?;
        let skip = usize::try_from(at.start() - guest.start()).map_err(|_| CORRUPT)?;
        let part = usize::try_from(at.len()).ok().and_then(|len| cluster.get(skip..skip + len)).ok_or(CORRUPT)?;
        buf.write_at(0, part);
        Ok(true)
    }
}

/// Goes from entry to entry as long as what they say can be one extent.
struct Walk<'a> {
    image: &'a Image,
    access: Access,
    /// What is left to be looked at.
    left: ByteRange,
    begin: u64,
    so_far: Option<Piece>,
}

/// What an extent is made of. Data: where the next byte would have to be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Piece {
    Data { start: u64, next: u64 },
    Zero,
    Below,
    Encoded,
}

impl<'a> Walk<'a> {
    fn new(image: &'a Image, at: ByteRange, access: Access) -> Self {
        Self { image, access, left: at, begin: at.start(), so_far: None }
    }

    /// `false`: the extent ends before the end of this entry.
    fn take(&mut self, entry: L2Entry) -> bool {
        let layout = self.image.layout;
        let guest = layout.around(self.left.start());
        let here = self.left.split(guest.end() - self.left.start()).0;
        match entry.parse(layout, guest.start()) {
            Err(_) => false,
            Ok(Cluster::Compressed(_)) => {
                self.add(Piece::Encoded, here.len());
                false
            }
            Ok(Cluster::Standard(granules)) => self.granules(granules, guest.start(), here),
        }
    }

    fn granules(&mut self, granules: Granules, guest: u64, here: ByteRange) -> bool {
        let layout = self.image.layout;
        let mut left = Some(here);
        while let Some(at) = left {
            let inside = at.start() - guest;
            let (kind, count) = granules.run(inside / layout.granule(), layout.granules());
            let end = (inside / layout.granule() + count) * layout.granule();
            let (piece, rest) = at.split(end - inside);
            let what = match (kind, granules.host) {
                (Kind::Data, Some(host)) => match self.data(granules, host + inside) {
                    Some(data) => data,
                    None => return false,
                },
                (Kind::Zero, _) => Piece::Zero,
                (Kind::Below | Kind::Data, _) => Piece::Below,
            };
            if !self.add(what, piece.len()) {
                return false;
            }
            left = rest;
        }
        !self.left.is_empty()
    }

    /// `None`: who writes has to take a closer look.
    fn data(&self, granules: Granules, start: u64) -> Option<Piece> {
        let image = self.image;
        if self.access == Access::Read || image.data.is_some() {
            return Some(Piece::Data { start, next: start });
        }
        if !granules.own {
            return Some(Piece::Encoded);
        }
        // A cluster of its own never moves while somebody may be writing there.
        (!image.is_table(start)).then_some(Piece::Data { start, next: start })
    }

    fn add(&mut self, piece: Piece, len: u64) -> bool {
        let joined = match (self.so_far, piece) {
            (None, Piece::Data { start, .. }) => Piece::Data { start, next: start + len },
            (None, piece) => piece,
            (Some(Piece::Data { start, next }), Piece::Data { start: here, .. }) if here == next => {
                Piece::Data { start, next: next + len }
            }
            (Some(before), piece) if before == piece && piece != Piece::Encoded => piece,
            _ => return false,
        };
        self.so_far = Some(joined);
        self.left = ByteRange::between(self.left.start() + len, self.left.end()).unwrap_or(ByteRange::whole(0));
        true
    }

    fn extent(&self, image: &Image, shape: &Shape) -> Option<Extent> {
        let place = match self.so_far? {
            Piece::Data { start, .. } => Place::Data { child: image.data.unwrap_or(image.file), offset: start },
            Piece::Zero => Place::Zero { allocated: true },
            Piece::Below => image.nothing(shape),
            Piece::Encoded => Place::Encoded,
        };
        Some(Extent { len: self.left.start() - self.begin, place })
    }
}
