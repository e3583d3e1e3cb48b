//! Clusters that read as zeroes without having any, and clusters that are no longer needed.

use smallvec::SmallVec;

use super::entry::{Cluster, Granules, L2Entry, OFFSET};
use super::meta::Run;
use super::write::mask;
use super::{Image, Shape};
use crate::base::{ByteRange, IoError};
use crate::graph::{IoCx, WriteFlags};

/// What is done to the clusters of a range.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    /// They read as zeroes; their room may go.
    Zero { unmap: bool },
    /// What they have is not needed.
    Discard,
    /// The disk ends before them.
    Cut,
}

/// What becomes of one cluster.
struct Becomes {
    entry: L2Entry,
    /// What it does not refer to any more.
    gone: Option<Run>,
    /// Room that it keeps and needs no bytes of.
    hole: Option<u64>,
}

impl Image {
    /// Whole granules become zeroes.
    pub(super) async fn zero(
        &self,
        shape: &Shape,
        cx: IoCx<'_>,
        at: ByteRange,
        flags: WriteFlags,
    ) -> Result<(), IoError> {
        self.ready(cx).await?;
        // Version 2 has no zero clusters, and a raw data file has to have the zeroes itself.
        if self.layout.version < 3 || self.raw_data {
            return Err(IoError::Unsupported);
        }
        let mut left = Some(at);
        let work = Work::Zero { unmap: flags.may_unmap };
        while let Some(now) = left {
            let piece = self.layout.within_slice(now);
            match self.clusters(shape, cx, piece, work).await {
                Err(IoError::Unsupported) if !flags.no_fallback => self.zero_one_by_one(shape, cx, piece, work).await?,
                other => other?,
            }
            left = now.split(piece.len()).1;
        }
        Ok(())
    }

    /// A part of a compressed cluster is written; what is around it is not.
    async fn zero_one_by_one(&self, shape: &Shape, cx: IoCx<'_>, at: ByteRange, work: Work) -> Result<(), IoError> {
        let wide = at.widened(self.layout.cluster()).ok_or(IoError::OutOfRange)?;
        for part in wide.pieces(self.layout.cluster()).filter_map(|whole| whole.intersection(at)) {
            match self.clusters(shape, cx, part, work).await {
                Err(IoError::Unsupported) => self.blank(shape, cx, part.start(), part.end()).await?,
                other => other?,
            }
        }
        Ok(())
    }

    /// Whole clusters are not needed.
    pub(super) async fn forget(&self, shape: &Shape, cx: IoCx<'_>, at: ByteRange) -> Result<(), IoError> {
        self.ready(cx).await?;
        if let (Some(data), true) = (self.data, self.raw_data) {
            // What an encrypted one freed would read as noise.
            return if self.crypt.is_some() { Ok(()) } else { cx.child(data).discard(at).await };
        }
        // What lies below must not come to light.
        if self.layout.version < 3 && self.stands_on(shape) {
            return Ok(());
        }
        self.all_clusters(shape, cx, at, Work::Discard).await
    }

    /// The disk ends before these clusters, or ended there: they have nothing any more.
    pub(super) async fn cut_off(&self, shape: &Shape, cx: IoCx<'_>, at: ByteRange) -> Result<(), IoError> {
        let tables: Vec<u64> = {
            let meta = self.meta();
            (0..).zip(&meta.l1).filter(|(_, entry)| **entry & OFFSET != 0).map(|(index, _)| index).collect()
        };
        let span = self.layout.l2_span();
        for table in tables.into_iter().filter_map(|index| ByteRange::new(index * span, span)) {
            if let Some(part) = table.intersection(at) {
                self.all_clusters(shape, cx, part, Work::Cut).await?;
            }
        }
        Ok(())
    }

    /// There is something below, or the image says that there should be.
    pub(super) fn stands_on(&self, shape: &Shape) -> bool {
        shape.backing.is_some() || self.extensions().backing_file.is_some()
    }

    async fn all_clusters(&self, shape: &Shape, cx: IoCx<'_>, at: ByteRange, work: Work) -> Result<(), IoError> {
        let mut left = Some(at);
        while let Some(now) = left {
            let piece = self.layout.within_slice(now);
            self.clusters(shape, cx, piece, work).await?;
            left = now.split(piece.len()).1;
        }
        Ok(())
    }

    /// Those of one slice.
    async fn clusters(&self, shape: &Shape, cx: IoCx<'_>, at: ByteRange, work: Work) -> Result<(), IoError> {
        let layout = self.layout;
        let wide = at.widened(layout.cluster()).ok_or(IoError::OutOfRange)?;
        let _turn = self.guests.take(cx, wide).await;
        if !self.load(cx, layout.slice_of(at.start())).await?
            && (!matches!(work, Work::Zero { .. }) || !self.stands_on(shape))
        {
            // Nothing is there, and nothing would come to light.
            return Ok(());
        }
        if self.meta().is_full(self.slices.capacity()) {
            self.commit(cx).await?;
        }
        self.own_table(cx, at.start()).await?;
        let mut all: SmallVec<[Becomes; 8]> = SmallVec::new();
        let mut changed = false;
        for whole in wide.pieces(layout.cluster()) {
            let entry = self.entry(cx, whole.start()).await?;
            let cluster = entry.parse(layout, whole.start())?;
            let part = whole.intersection(at).ok_or(IoError::OutOfRange)?;
            let becomes = match work {
                Work::Zero { unmap } => self.zeroed(shape, cluster, whole, part, unmap)?,
                Work::Discard => self.discarded(shape, entry, cluster, whole),
                Work::Cut => Becomes {
                    entry: L2Entry::default(),
                    gone: self.runs_of(cluster, shape.discards.request),
                    hole: None,
                },
            };
            changed |= becomes.entry != entry || becomes.hole.is_some();
            all.push(becomes);
        }
        if !changed {
            return Ok(());
        }
        let entries: SmallVec<[L2Entry; 8]> = all.iter().map(|becomes| becomes.entry).collect();
        let gone: SmallVec<[Run; 8]> = all.iter().filter_map(|becomes| becomes.gone).collect();
        self.link(cx, wide.start(), &entries, &gone).await?;
        let child = cx.child(self.data.unwrap_or(self.file));
        for hole in all.iter().filter_map(|becomes| becomes.hole) {
            let hole = ByteRange::new(hole, layout.cluster()).ok_or(IoError::OutOfRange)?;
            if let Some(hole) = hole.intersection(ByteRange::whole(child.size())) {
                // While the cluster is ours: nobody writes there before the hole is made.
                let _ = child.discard(hole).await;
            }
        }
        Ok(())
    }

    fn zeroed(
        &self,
        shape: &Shape,
        cluster: Cluster,
        whole: ByteRange,
        part: ByteRange,
        unmap: bool,
    ) -> Result<Becomes, IoError> {
        let layout = self.layout;
        let granule = layout.granule();
        let first = (part.start() - whole.start()) / granule;
        let touched = mask(first, first + part.len().div_ceil(granule));
        let all = mask(0, layout.granules());
        let granules = match cluster {
            Cluster::Standard(granules) => granules,
            // The rest of it would have to be unpacked: it is written instead.
            Cluster::Compressed(_) if touched != all => return Err(IoError::Unsupported),
            Cluster::Compressed(_) => Granules::NONE,
        };
        if touched == all && self.data.is_none() && (!granules.own || (unmap && !shape.discards.no_unref)) {
            let entry = Granules { zero: all, ..Granules::NONE }.entry(layout);
            let gone = self.runs_of(cluster, shape.discards.request);
            return Ok(Becomes { entry, gone, hole: None });
        }
        let granules = Granules { data: granules.data & !touched, zero: granules.zero | touched, ..granules };
        Ok(Becomes { entry: granules.entry(layout), gone: None, hole: None })
    }

    fn discarded(&self, shape: &Shape, entry: L2Entry, cluster: Cluster, whole: ByteRange) -> Becomes {
        let layout = self.layout;
        let all = mask(0, layout.granules());
        let granules = match cluster {
            Cluster::Standard(granules) if granules.host.is_none() => {
                return Becomes { entry, gone: None, hole: None };
            }
            Cluster::Standard(granules) => granules,
            Cluster::Compressed(_) => Granules::NONE,
        };
        let keeps = self.data.is_some() || (shape.discards.no_unref && granules.own);
        if keeps {
            let host = if self.data.is_some() { Some(whole.start()) } else { granules.host };
            let kept = Granules { host, own: true, data: 0, zero: all };
            let hole = host.filter(|_| shape.discards.request);
            return Becomes { entry: kept.entry(layout), gone: None, hole };
        }
        let empty = if self.stands_on(shape) { Granules { zero: all, ..Granules::NONE } } else { Granules::NONE };
        Becomes { entry: empty.entry(layout), gone: self.runs_of(cluster, shape.discards.request), hole: None }
    }
}
