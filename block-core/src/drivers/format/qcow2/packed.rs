//! Writing clusters compressed. They are packed one after another, over the borders of host clusters where the next one
//! follows; each of them holds a reference to every host cluster that it has bytes in.

use super::entry::{Cluster, Compressed, L2Entry};
use super::meta::Run;
use super::tables::put;
use super::{Image, Shape, compression};
use crate::base::{ByteRange, IoError};
use crate::graph::{DebugEvent, IoCx, WriteFlags};
use crate::pipeline;
use crate::rt::{IoBuf, blocking};

impl Image {
    /// Whole clusters; the last one of the disk may be a part.
    pub(super) async fn write_packed(
        &self,
        shape: &Shape,
        cx: IoCx<'_>,
        at: ByteRange,
        buf: &IoBuf,
    ) -> Result<(), IoError> {
        let size = self.layout.cluster();
        let ends = at.end() == shape.size || at.end().is_multiple_of(size);
        if !at.start().is_multiple_of(size) || !ends {
            return Err(IoError::Misaligned);
        }
        for piece in at.pieces(size) {
            let part = buf.slice(piece.start() - at.start(), piece.len());
            self.write_one(shape, cx, piece, part).await?;
        }
        Ok(())
    }

    async fn write_one(&self, shape: &Shape, cx: IoCx<'_>, at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
        // A copy: the guest may change its memory while it is read twice.
        let mut bytes = buf.to_vec();
        bytes.resize(usize::try_from(self.layout.cluster()).map_err(|_| IoError::NoMemory)?, 0);
        // Others go on meanwhile, and several clusters are packed at once.
        let kind = self.compression;
        let Some(packed) = blocking(move || compression::pack(kind, &bytes)).await else {
            return pipeline::write_mapped(self, shape, cx, at, &buf, WriteFlags::default()).await;
        };
        self.ready(cx).await?;
        let whole = self.layout.around(at.start());
        let _turn = self.guests.take(cx, whole).await;
        self.own_table(cx, at.start()).await?;
        let old = self.entry(cx, at.start()).await?.parse(self.layout, whole.start())?;
        let place = self.take_bytes(cx, packed.len() as u64).await?;
        cx.child(self.file).announce(DebugEvent::WriteCompressed).await;
        let linked = async {
            self.put_packed(cx, place, &packed).await?;
            let entry = place.entry(self.layout);
            let gone: Vec<Run> = self.runs_of(old, shape.discards.other).into_iter().collect();
            cx.child(self.file).announce(DebugEvent::L2UpdateCompressed).await;
            self.link(cx, at.start(), &[L2Entry { bitmap: 0, ..entry }], &gone).await
        };
        let linked = linked.await;
        if linked.is_err() {
            let taken = self.runs_of(Cluster::Compressed(place), false);
            self.meta().abandoned.extend(taken);
        }
        linked
    }

    /// Where the file takes whole blocks only, neighbours share one, which is read and written as a whole: one at a time.
    async fn put_packed(&self, cx: IoCx<'_>, place: Compressed, packed: &[u8]) -> Result<(), IoError> {
        let file = cx.child(self.file);
        let blocks = ByteRange::new(place.start, place.len)
            .and_then(|at| at.widened(file.geometry().limits.request_alignment.into()));
        let _turn = self.neighbours.take(cx, blocks.ok_or(IoError::OutOfRange)?).await;
        put(file, place.start, packed).await
    }

    /// Room for so many bytes, at most a cluster, with a reference to each host cluster that it is in.
    async fn take_bytes(&self, cx: IoCx<'_>, len: u64) -> Result<Compressed, IoError> {
        let _turn = self.packing.at(cx, 0).await;
        cx.child(self.file).announce(DebugEvent::ClusterAllocBytes).await;
        let bits = self.layout.cluster_bits;
        let before = self.meta().packed;
        let left = before.map_or(0, |at| self.layout.around(at).end() - at);
        let start = match before {
            Some(at) if len <= left && self.refer(cx, at).await? => at,
            Some(at) => {
                let run = self.take(cx, 1).await?;
                let follows = run.cluster == (at >> bits) + 1 && len > left;
                let goes_on = if follows { self.refer(cx, at).await } else { Ok(false) };
                if goes_on.inspect_err(|_| self.meta().abandoned.push(run))? { at } else { run.cluster << bits }
            }
            None => self.take(cx, 1).await?.cluster << bits,
        };
        let end = start + len;
        let place = Compressed { start, len };
        if end > Compressed::limit(self.layout) {
            self.meta().abandoned.extend(self.runs_of(Cluster::Compressed(place), false));
            return Err(IoError::NoSpace);
        }
        self.meta().packed = (!end.is_multiple_of(self.layout.cluster())).then_some(end);
        Ok(place)
    }

    /// One reference more to the cluster that compressed data may go on in at `at`; `false`: it has as many as it can have,
    /// or is not that any more.
    async fn refer(&self, cx: IoCx<'_>, at: u64) -> Result<bool, IoError> {
        let cluster = at >> self.layout.cluster_bits;
        loop {
            {
                let mut meta = self.meta();
                if meta.packed != Some(at) {
                    return Ok(false);
                }
                match meta.refs.get(self.layout, cluster) {
                    // Its only user is gone, or there are too many.
                    Some(count) if count == 0 || count == self.layout.max_refcount() => return Ok(false),
                    Some(_) => return Ok(meta.refs.raise(self.layout, cluster).is_some_and(|now| now.is_ok())),
                    None => {}
                }
            }
            self.load_block(cx, cluster / self.layout.block_entries()).await?;
        }
    }
}
