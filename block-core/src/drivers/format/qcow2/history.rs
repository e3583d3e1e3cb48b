//! Internal snapshots: taking, deleting and applying one. Nobody else is inside.
//!
//! Whatever the header is going to lead to is in the file and stable before the header is changed, in one write of one
//! sector; and what it does not lead to any more is let go afterwards. So a crash leaves leaks, and entries that do not say
//! that they are alone (which costs a copy when they are written):
//!
//! | step | taking | deleting | applying |
//! |---|---|---|---|
//! | 1 | no entry says that it is alone; flush | | the same for the snapshot's |
//! | 2 | all that the active table leads to has one reference more | | the same for the snapshot's |
//! | 3 | a copy of the L1 table, a new snapshot table, refcounts; flush | a new snapshot table; flush | a copy of the snapshot's L1 table, refcounts; flush |
//! | 4 | the header; flush | the header; flush | the header, with the size; flush |
//! | 5 | the old table is let go | also the snapshot's tables; flush | the old L1 table and all behind it are let go |
//! | 6 | | entries say where they are alone | |

use super::commit::write_header;
use super::entry::{COPIED, CORRUPT, table_of};
use super::header::{AT_L1, AT_SIZE, AT_SNAPSHOTS, MAX_L1, MAX_SNAPSHOTS};
use super::meta::Run;
use super::open::{INACTIVE_L1, SNAPSHOTS, tables_of};
use super::sharing::Raised;
use super::snapshots::{MAX_L1S, NO_ICOUNT, Snapshot, new_id, position, written};
use super::tables::{fetch, put};
use super::{Image, Shape};
use crate::base::{ByteRange, Error, IoError, Result, ResultExt};
use crate::graph::{IoCx, NewSnapshot, SnapshotChange, SnapshotInfo, SnapshotName};

impl Image {
    pub(super) async fn change_history(
        &self,
        shape: &Shape,
        cx: IoCx<'_>,
        change: &SnapshotChange,
    ) -> Result<(SnapshotInfo, Option<Shape>)> {
        if self.data.is_some() {
            return Err(Error::new("An image that keeps its data in another file has no internal snapshots"));
        }
        self.ready(cx).await.doing(|| "The image cannot be written")?;
        self.settle(cx).await.doing(|| "What waits to be written could not be written")?;
        let mut begun = Begun { image: self, cx, runs: Vec::new(), raised: None, disowned: false };
        let result = match change {
            SnapshotChange::Take(new) => begun.take(shape, new).await.map(|info| (info, None)),
            SnapshotChange::Delete(which) => begun.delete(shape, which).await.map(|info| (info, None)),
            SnapshotChange::Apply(which) => begun.apply(shape, which).await,
        };
        if result.is_err() {
            begun.undo().await;
        }
        result
    }

    /// What is left to do when the header has been changed already is done, or leaks.
    async fn finish_change(&self, cx: IoCx<'_>, let_go: &[u64], shape: &Shape, marks: bool) {
        let finished = async {
            let gone = self.let_go(cx, let_go, shape.discards.snapshot).await;
            self.settle(cx).await?;
            if marks {
                self.mark_own(cx).await?;
            }
            gone
        };
        if let Err(error) = finished.await {
            tracing::warn!("the image of '{}' has clusters that nothing refers to: {error}", self.name);
        }
    }

    /// Changes the header, and nothing else in the file. Where that fails it is as before, or not written any more.
    async fn switch(&self, cx: IoCx<'_>, at: usize, field: &[u8]) -> Result<(), IoError> {
        let old = self.meta().header.get(at..at + field.len()).ok_or(CORRUPT)?.to_vec();
        let written = async |field: &[u8]| {
            write_header(self, cx, at, field).await?;
            cx.child(self.file).flush().await
        };
        let Err(error) = written(field).await else { return Ok(()) };
        if let Err(error) = written(&old).await {
            self.give_up("a change of its snapshots", error);
        }
        Err(error)
    }

    /// The header leads to these snapshots now, in a table at `at`.
    fn adopt_snapshots(&self, all: Vec<Snapshot>, at: u64) {
        let (meta, bits) = (&mut *self.meta(), self.layout.cluster_bits);
        let old: u64 = meta.snapshots.iter().map(|snapshot| snapshot.len).sum();
        if old > 0 {
            let count = old.div_ceil(self.layout.cluster());
            meta.free(Run { cluster: meta.snapshots_at >> bits, count, punch: true });
        }
        (meta.snapshots, meta.snapshots_at) = (all, at);
        meta.fixed.retain(|(_, what)| ![SNAPSHOTS, INACTIVE_L1].contains(what));
        let tables = tables_of(&meta.snapshots, at).filter(|(_, what)| meta.checks.watch(what));
        meta.fixed.extend(tables);
    }

    /// The L2 tables behind these entries are one snapshot's more, or less.
    fn watch_inactive(&self, l1: &[u64], is_new: bool) {
        let meta = &mut *self.meta();
        if !meta.checks.inactive_l2 {
            return;
        }
        meta.watch_inactive(l1, is_new);
        meta.inactive.keys().for_each(|cluster| self.regions.mark(*cluster));
    }

    /// An L1 table that is not the active one; nothing in it says that it is alone.
    async fn inactive_l1(&self, cx: IoCx<'_>, at: ByteRange) -> Result<Vec<u64>, IoError> {
        let bytes = if at.is_empty() { Vec::new() } else { fetch(cx.child(self.file), at.start(), at.len()).await? };
        let words = bytes.chunks_exact(8).map(|word| u64::from_be_bytes(word.try_into().unwrap_or_default()));
        Ok(words.map(|word| word & !COPIED).collect())
    }
}

/// A change that is under way: what has to be undone where it comes to nothing.
struct Begun<'a> {
    image: &'a Image,
    cx: IoCx<'a>,
    /// Clusters that nothing in the file leads to.
    runs: Vec<Run>,
    /// What has been raised, for which L1 table.
    raised: Option<(Vec<u64>, Raised)>,
    /// The active entries do not say where they are alone.
    disowned: bool,
}

impl Begun<'_> {
    async fn take(&mut self, shape: &Shape, new: &NewSnapshot) -> Result<SnapshotInfo> {
        let (image, cx) = (self.image, self.cx);
        let (mut all, l1): (Vec<_>, Vec<_>) = {
            let meta = image.meta();
            (meta.snapshots.clone(), meta.l1.iter().map(|entry| entry & !COPIED).collect())
        };
        check_room(&all, l1.len() as u64 * 8, &new.name)?;
        if image.layout.max_refcount() == 1 && l1.iter().any(|entry| *entry != 0) {
            return Err(Error::new("An image whose refcounts have 1 bit cannot keep what it has in a snapshot too"));
        }
        self.disowned = true;
        image.disown(cx).await.doing(|| "Could not prepare its tables")?;
        self.raise(l1.clone()).await?;
        let copy = self.table(&words(&l1)).await.doing(|| "Could not copy its L1 table")?;
        all.push(Snapshot {
            l1: copy,
            id: new_id(&all).into_bytes(),
            name: new.name.clone().into_bytes(),
            date: new.date,
            vm_clock_nsec: 0,
            vm_state_size: 0,
            disk_size: Some(shape.size),
            icount: NO_ICOUNT,
            more: Vec::new(),
            len: 0,
        });
        let info = all.last().map(Snapshot::info).ok_or_else(|| Error::new("There is no such snapshot"))?;
        self.switch_snapshots(shape, all).await?;
        image.watch_inactive(&l1, true);
        image.finish_change(cx, &[], shape, false).await;
        Ok(info)
    }

    async fn delete(&mut self, shape: &Shape, which: &SnapshotName) -> Result<SnapshotInfo> {
        let (image, cx) = (self.image, self.cx);
        let mut all = image.meta().snapshots.clone();
        let gone = all.remove(position(&all, which).ok_or_else(no_such_snapshot)?);
        let l1 = image.inactive_l1(cx, gone.l1).await.doing(|| "Could not read its L1 table")?;
        self.switch_snapshots(shape, all).await?;
        image.free_table(gone.l1);
        image.watch_inactive(&l1, false);
        image.finish_change(cx, &l1, shape, true).await;
        Ok(gone.info())
    }

    async fn apply(&mut self, shape: &Shape, which: &SnapshotName) -> Result<(SnapshotInfo, Option<Shape>)> {
        let (image, cx) = (self.image, self.cx);
        let snapshot = {
            let meta = image.meta();
            position(&meta.snapshots, which)
                .and_then(|at| meta.snapshots.get(at).cloned())
                .ok_or_else(no_such_snapshot)?
        };
        let size = snapshot.disk_size.unwrap_or(shape.size);
        let mut l1 = image.inactive_l1(cx, snapshot.l1).await.doing(|| "Could not read its L1 table")?;
        let needed = image.layout.l1_entries(size).max(1);
        if needed * 8 > MAX_L1 {
            return Err(Error::new("The disk cannot be that large with clusters of its size"));
        }
        image.disown_behind(cx, &l1).await.doing(|| "Could not prepare its tables")?;
        self.raise(l1.clone()).await?;
        l1.resize(l1.len().max(usize::try_from(needed).unwrap_or(0)), 0);
        let table = self.table(&words(&l1)).await.doing(|| "Could not copy its L1 table")?;
        image.commit(cx).await.doing(|| "Could not write what leads to it")?;
        let old = {
            let mut header = image.meta().header.get(AT_SIZE..AT_L1 + 12).unwrap_or_default().to_vec();
            header[..8].copy_from_slice(&size.to_be_bytes());
            header[AT_L1 - AT_SIZE..][..4].copy_from_slice(&u32::try_from(l1.len()).unwrap_or(u32::MAX).to_be_bytes());
            header[AT_L1 - AT_SIZE + 4..].copy_from_slice(&table.start().to_be_bytes());
            image.switch(cx, AT_SIZE, &header).await.doing(|| "Could not change the header")?;
            self.is_done();
            image.adopt_l1(l1, table.start())
        };
        image.finish_change(cx, &old, shape, false).await;
        Ok((snapshot.info(), (size != shape.size).then_some(Shape { size, ..*shape })))
    }

    /// One reference more to all that an L1 table leads to.
    async fn raise(&mut self, l1: Vec<u64>) -> Result<()> {
        let (l1, raised) = self.raised.insert((l1, Raised::default()));
        self.image.raise(self.cx, l1, raised).await
    }

    /// A table in clusters of its own; where it is, as long as its words are.
    async fn table(&mut self, bytes: &[u8]) -> Result<ByteRange, IoError> {
        let (image, len) = (self.image, bytes.len() as u64);
        if bytes.is_empty() {
            return Ok(ByteRange::whole(0));
        }
        let cluster = image.layout.cluster();
        let run = image.take_table(self.cx, len.div_ceil(cluster)).await?;
        self.runs.push(run);
        let mut whole = bytes.to_vec();
        whole.resize(usize::try_from(run.count * cluster).map_err(|_| IoError::NoMemory)?, 0);
        let at = run.cluster << image.layout.cluster_bits;
        put(self.cx.child(image.file), at, &whole).await?;
        ByteRange::new(at, len).ok_or(IoError::NoSpace)
    }

    /// The header leads to these snapshots from now on.
    async fn switch_snapshots(&mut self, shape: &Shape, mut all: Vec<Snapshot>) -> Result<()> {
        // It was not said because it was the same all the time.
        all.iter_mut().for_each(|snapshot| snapshot.disk_size = snapshot.disk_size.or(Some(shape.size)));
        let bytes = written(&mut all)?;
        let (image, cx) = (self.image, self.cx);
        let table = self.table(&bytes).await.doing(|| "Could not write the snapshot table")?;
        image.commit(cx).await.doing(|| "Could not write what leads to it")?;
        let count = u32::try_from(all.len()).unwrap_or(u32::MAX);
        let field = [&count.to_be_bytes()[..], &table.start().to_be_bytes()].concat();
        image.switch(cx, AT_SNAPSHOTS, &field).await.doing(|| "Could not change the header")?;
        self.is_done();
        image.adopt_snapshots(all, table.start());
        Ok(())
    }

    /// The header leads to all of it: there is nothing to undo.
    fn is_done(&mut self) {
        self.runs.clear();
        (self.raised, self.disowned) = (None, false);
    }

    /// The header leads to none of it: all is as before, but for what cannot be written now and leaks.
    async fn undo(mut self) {
        let (image, cx) = (self.image, self.cx);
        if self.runs.is_empty() && self.raised.is_none() && !self.disowned {
            return;
        }
        let undone = async {
            if let Some((l1, raised)) = self.raised.take() {
                image.unraise(cx, &l1, raised).await?;
            }
            image.meta().abandoned.append(&mut self.runs);
            image.settle(cx).await?;
            if self.disowned { image.mark_own(cx).await } else { Ok(()) }
        };
        if let Err(error) = undone.await {
            tracing::warn!("the image of '{}' has clusters that nothing refers to: {error}", image.name);
        }
    }
}

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        self.image.meta().abandoned.append(&mut self.runs);
    }
}

impl Image {
    /// The header leads to this L1 table now; gives the old one.
    fn adopt_l1(&self, l1: Vec<u64>, at: u64) -> Vec<u64> {
        let meta = &mut *self.meta();
        let tables = l1.iter().filter_map(|entry| table_of(*entry, self.layout).ok().flatten());
        tables.for_each(|table| self.regions.mark(table >> self.layout.cluster_bits));
        let old = meta.l1_range();
        let old_l1 = std::mem::replace(&mut meta.l1, l1);
        meta.l1_at = at;
        meta.l1_dirty.clear();
        meta.own_tables.clear();
        self.slices.clear();
        let count = old.len().div_ceil(self.layout.cluster());
        if count > 0 {
            meta.free(Run { cluster: old.start() >> self.layout.cluster_bits, count, punch: true });
        }
        old_l1
    }

    fn free_table(&self, at: ByteRange) {
        let count = at.len().div_ceil(self.layout.cluster());
        if count > 0 {
            self.meta().free(Run { cluster: at.start() >> self.layout.cluster_bits, count, punch: true });
        }
    }
}

/// There is room for one snapshot more, whose L1 table has so many bytes.
fn check_room(all: &[Snapshot], l1: u64, name: &str) -> Result<()> {
    let before: u64 = all.iter().map(|snapshot| snapshot.l1.len()).sum();
    if all.len() as u64 >= u64::from(MAX_SNAPSHOTS) || before + l1 > MAX_L1S {
        return Err(Error::new(format!("The image has {} snapshots, and no room for another one", all.len())));
    }
    if name.len() > MAX_NAME {
        return Err(Error::new(format!("Names of snapshots have at most {MAX_NAME} bytes")));
    }
    Ok(())
}

fn no_such_snapshot() -> Error {
    Error::new("Can't find the snapshot")
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

/// Of a name, in bytes: what QEMU keeps of it.
const MAX_NAME: usize = 255;
