//! Writing the tables down, in an order that a crash may cut anywhere: guest data and refcounts first, then what leads to
//! them, and only then lower refcounts. Between the steps the file is flushed, where there is anything to keep apart.
//!
//! | step | what | a crash behind it leaves |
//! |---|---|---|
//! | 1 | new refcount blocks, flush | clusters that nobody knows of |
//! | 2 | the refcount table, other blocks; flush, which also makes guest data stable | leaks |
//! | 3 | L2 slices, the L1 table; flush | leaks, where these led to something before |
//! | 4 | lower refcounts of what is free, which rests from now on (`reuse.rs`) | – |
//!
//! The next flush makes step 4 stable. One commit runs at a time; who comes while one runs waits
//! for the next, and all who wait for the same one share it.
//!
//! Where refcounts may be late (`lazy-refcounts`), the commits that a guest's flush asks for leave out steps 1, 2 and 4: before
//! the first of them the image is marked dirty, which has whoever finds it so count anew. The next commit that is not of
//! this kind writes what is late, and when the node is drained ([`Image::settle`]) the mark goes again.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering::{Acquire, Release};

use super::Image;
use super::entry::{CORRUPT, table_of};
use super::header::{AT_INCOMPATIBLE, DIRTY};
use super::meta::{Meta, Run};
use super::tables::put;
use crate::base::{ByteRange, IoError};
use crate::graph::{DebugEvent, IoCx, WriteFlags};
use crate::rt::IoBuf;
use crate::rt::sync::together;

/// What one commit writes: copies, made under the lock at one moment.
#[derive(Default)]
struct Work {
    new_blocks: Vec<(u64, u64, Vec<u8>)>,
    blocks: Vec<(u64, u64, Vec<u8>)>,
    table: Vec<Sector>,
    table_entries: BTreeSet<usize>,
    slices: Vec<(u64, u64, Vec<u8>)>,
    l1: Vec<Sector>,
    l1_entries: BTreeSet<usize>,
    freed: Vec<Run>,
}

/// Where it goes, and what.
type Sector = (u64, Vec<u8>);

impl Image {
    /// Whatever was done before this is in the file and stable when it ends.
    pub(super) async fn commit(&self, cx: IoCx<'_>) -> Result<(), IoError> {
        self.commit_with(cx, Refcounts::InTime).await
    }

    /// The same for a guest, to whom refcounts mean nothing.
    pub(super) async fn commit_for_guest(&self, cx: IoCx<'_>) -> Result<(), IoError> {
        self.commit_with(cx, if self.is_lazy { Refcounts::Late } else { Refcounts::InTime }).await
    }

    async fn commit_with(&self, cx: IoCx<'_>, refcounts: Refcounts) -> Result<(), IoError> {
        if self.is_corrupt.load(Acquire) {
            return Err(CORRUPT);
        }
        let wanted = self.meta().begun + 1;
        let _turn = self.committing.at(cx, 0).await;
        let (number, work) = loop {
            {
                let mut meta = self.meta();
                if meta.ended[refcounts as usize] >= wanted {
                    return Ok(());
                }
                if refcounts == Refcounts::InTime || self.is_late.load(Acquire) || !meta.refs.is_dirty() {
                    meta.begun += 1;
                    break (meta.begun, Work::take(&mut meta, self, refcounts)?);
                }
            }
            self.mark_late(cx).await?;
        };
        let mut unwritten = Unwritten { image: self, work: Some(work) };
        if let Some(work) = &unwritten.work {
            self.write_down(cx, work).await?;
        }
        let work = unwritten.work.take().unwrap_or_default();
        {
            let mut meta = self.meta();
            meta.settled();
            meta.ended[Refcounts::Late as usize] = number;
            if refcounts == Refcounts::InTime {
                meta.ended[Refcounts::InTime as usize] = number;
            }
        }
        if !work.freed.is_empty() {
            self.lower(cx, &work.freed).await;
            if refcounts == Refcounts::InTime {
                self.write_lowered(cx).await;
            }
        }
        self.reclaim(cx).await;
        Ok(())
    }

    /// From now on the refcounts in the file may be wrong, and the image says so. That is stable before anything is written
    /// that they do not count: the commit flushes before its step 3.
    async fn mark_late(&self, cx: IoCx<'_>) -> Result<(), IoError> {
        let bits = self.header_word(AT_INCOMPATIBLE) | DIRTY;
        write_header(self, cx, AT_INCOMPATIBLE, &bits.to_be_bytes()).await?;
        self.is_late.store(true, Release);
        Ok(())
    }

    /// All refcounts are in the file, and stable: the image says so.
    pub(super) async fn unmark_late(&self, cx: IoCx<'_>) -> Result<(), IoError> {
        if !self.is_late.load(Acquire) || !self.meta().is_clean() {
            return Ok(());
        }
        let bits = self.header_word(AT_INCOMPATIBLE) & !DIRTY;
        write_header(self, cx, AT_INCOMPATIBLE, &bits.to_be_bytes()).await?;
        cx.child(self.file).flush().await?;
        self.is_late.store(false, Release);
        Ok(())
    }

    /// What was lowered goes to the file at once, so that a crash leaves fewer leaks; the next flush makes it stable. Blocks
    /// that the file does not know yet come with the next commit.
    async fn write_lowered(&self, cx: IoCx<'_>) {
        let mut unwritten = Unwritten { image: self, work: Some(Work::lowered(&mut self.meta())) };
        let Some(work) = &unwritten.work else { return };
        if self.put_all(cx, work.blocks.iter().map(|(_, at, bytes)| (*at, bytes))).await.is_ok() {
            unwritten.work = None;
            self.meta().settled();
        }
    }

    async fn write_down(&self, cx: IoCx<'_>, work: &Work) -> Result<(), IoError> {
        let file = cx.child(self.file);
        if !work.new_blocks.is_empty() {
            file.announce(DebugEvent::RefblockAllocWrite).await;
            self.put_all(cx, work.new_blocks.iter().map(|(_, at, bytes)| (*at, bytes))).await?;
            file.flush().await?;
        }
        if !work.blocks.is_empty() {
            file.announce(DebugEvent::RefblockUpdate).await;
            self.put_all(cx, work.blocks.iter().map(|(_, at, bytes)| (*at, bytes))).await?;
        }
        if !work.table.is_empty() {
            file.announce(DebugEvent::RefblockAllocHookup).await;
            self.put_all(cx, work.table.iter().map(|(at, bytes)| (*at, bytes))).await?;
        }
        if let Some(data) = self.data {
            cx.child(data).flush().await?;
        }
        if !work.slices.is_empty() || !work.l1.is_empty() {
            file.flush().await?;
            self.put_all(cx, work.slices.iter().map(|(_, at, bytes)| (*at, bytes))).await?;
            self.put_all(cx, work.l1.iter().map(|(at, bytes)| (*at, bytes))).await?;
        }
        file.announce(DebugEvent::FlushToDisk).await;
        file.flush().await
    }

    async fn put_all(&self, cx: IoCx<'_>, all: impl Iterator<Item = (u64, &Vec<u8>)>) -> Result<(), IoError> {
        let all: Vec<_> = all.collect();
        for some in all.chunks(AT_ONCE) {
            let written = together(some.iter().map(|(at, bytes)| put(cx.child(self.file), *at, bytes))).await;
            written.into_iter().collect::<Result<(), IoError>>()?;
        }
        Ok(())
    }

    /// Nothing in the file leads to these clusters any more. What cannot be lowered now is tried again later.
    async fn lower(&self, cx: IoCx<'_>, freed: &[Run]) {
        let mut failed = None;
        for run in freed {
            cx.child(self.file).announce(DebugEvent::ClusterFree).await;
            for cluster in run.cluster..run.cluster + run.count {
                if let Err(error) = self.lower_one(cx, Run { cluster, count: 1, ..*run }).await {
                    self.meta().stuck.push(Run { cluster, count: run.cluster + run.count - cluster, ..*run });
                    failed = Some(error);
                    break;
                }
            }
        }
        let is_first = self.meta().tried(failed.is_none());
        if let Some(error) = failed.filter(|_| is_first) {
            tracing::warn!("a refcount of '{}' cannot be lowered, and may stay too high: {error}", self.name);
        }
    }

    async fn lower_one(&self, cx: IoCx<'_>, run: Run) -> Result<(), IoError> {
        let (layout, cluster) = (self.layout, run.cluster);
        let count = loop {
            let lowered = self.meta().refs.lower(layout, cluster);
            match lowered {
                Some(lowered) => break lowered,
                None => self.load_block(cx, cluster / layout.block_entries()).await?,
            }
        };
        let Ok(count) = count else {
            let at = ByteRange::new(cluster << layout.cluster_bits, layout.cluster()).ok_or(CORRUPT)?;
            self.corrupt(cx, "a cluster that was in use has refcount 0", at).await;
            return Ok(());
        };
        if count == 0 && self.regions.may_own(cluster) {
            let at = layout.around(cluster << layout.cluster_bits);
            let owner = self.meta().owner_of(at);
            if let Some(owner) = owner {
                // It keeps the reference that is the table's own.
                self.meta().refs.keep_used(layout, cluster);
                self.corrupt(cx, &format!("a cluster that is set free is part of {owner}"), at).await;
                return Ok(());
            }
        }
        if count == 0 {
            self.regions.unmark(cluster);
            let mut meta = self.meta();
            meta.reuse.rest(run);
            // No more goes in there.
            meta.packed = meta.packed.filter(|at| at >> layout.cluster_bits != cluster);
        }
        Ok(())
    }
}

/// What becomes of refcounts in a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refcounts {
    /// They are written, before what they count.
    InTime = 0,
    /// They stay in memory.
    Late = 1,
}

/// Writes of one step that run side by side.
const AT_ONCE: usize = 32;

impl Work {
    fn take(meta: &mut Meta, image: &Image, refcounts: Refcounts) -> Result<Self, IoError> {
        let layout = image.layout;
        let mut work = Self::default();
        // What cannot be placed is an error before anything is taken.
        let mut slices = Vec::new();
        for slice in &meta.dirty {
            let table = table_of(meta.l1.get(layout.l1_index(*slice)).copied().unwrap_or(0), layout)?;
            let bytes = image.slices.bytes(*slice).ok_or(CORRUPT)?;
            slices.push((*slice, table.ok_or(CORRUPT)? + layout.slice_offset(*slice), bytes));
        }
        work.slices = slices;
        if refcounts == Refcounts::InTime {
            work.take_refcounts(meta)?;
        }
        meta.busy = std::mem::take(&mut meta.dirty);
        work.l1_entries = std::mem::take(&mut meta.l1_dirty);
        work.l1 = sectors(&work.l1_entries, &meta.l1, meta.l1_at);
        work.freed = meta.take_freed();
        Ok(work)
    }

    fn take_refcounts(&mut self, meta: &mut Meta) -> Result<(), IoError> {
        let table = &meta.refs.table;
        for (index, cached) in &mut meta.refs.blocks {
            if !cached.dirty {
                continue;
            }
            let at = usize::try_from(*index).ok().and_then(|index| table.get(index)).copied().ok_or(CORRUPT)?;
            let list = if cached.new { &mut self.new_blocks } else { &mut self.blocks };
            list.push((*index, at, cached.block.bytes().to_vec()));
        }
        for index in self.new_blocks.iter().chain(&self.blocks).map(|(index, ..)| *index) {
            if let Some(cached) = meta.refs.blocks.get_mut(&index) {
                (cached.dirty, cached.new, cached.writing) = (false, false, true);
            }
        }
        self.table_entries = std::mem::take(&mut meta.refs.table_dirty);
        self.table = sectors(&self.table_entries, &meta.refs.table, meta.refs.table_at);
        Ok(())
    }

    /// Refcount blocks alone.
    fn lowered(meta: &mut Meta) -> Self {
        let (table, mut work) = (&meta.refs.table, Self::default());
        for (index, cached) in meta.refs.blocks.iter_mut().filter(|(_, cached)| cached.dirty && !cached.new) {
            if let Some(at) = usize::try_from(*index).ok().and_then(|index| table.get(index)) {
                work.blocks.push((*index, *at, cached.block.bytes().to_vec()));
                (cached.dirty, cached.writing) = (false, true);
            }
        }
        work
    }

    /// It is still to be done.
    fn put_back(self, meta: &mut Meta) {
        meta.settled();
        meta.dirty.extend(self.slices.iter().map(|(slice, ..)| *slice));
        for (index, ..) in &self.new_blocks {
            if let Some(cached) = meta.refs.blocks.get_mut(index) {
                (cached.dirty, cached.new) = (true, true);
            }
        }
        for (index, ..) in &self.blocks {
            if let Some(cached) = meta.refs.blocks.get_mut(index) {
                cached.dirty = true;
            }
        }
        meta.refs.table_dirty.extend(self.table_entries);
        meta.l1_dirty.extend(self.l1_entries);
        let since = std::mem::replace(&mut meta.freed, self.freed);
        meta.freed.extend(since);
    }
}

/// The sectors of a table that have the entries, each once.
fn sectors(entries: &BTreeSet<usize>, table: &[u64], at: u64) -> Vec<Sector> {
    let numbers: BTreeSet<usize> = entries.iter().map(|entry| entry / ENTRIES).collect();
    let sector = |number: usize| {
        let words = table.iter().skip(number * ENTRIES).take(ENTRIES);
        (at + (number * ENTRIES * 8) as u64, words.flat_map(|word| word.to_be_bytes()).collect())
    };
    numbers.into_iter().map(sector).collect()
}

/// Table entries in a sector.
const ENTRIES: usize = 64;

/// Work that goes back to where it came from, unless it is taken out of this.
struct Unwritten<'a> {
    image: &'a Image,
    work: Option<Work>,
}

impl Drop for Unwritten<'_> {
    fn drop(&mut self) {
        if let Some(work) = self.work.take() {
            work.put_back(&mut self.image.meta());
        }
    }
}

/// Changes fields of the header: the sector that they are in is written as a whole.
pub(super) async fn write_header(image: &Image, cx: IoCx<'_>, at: usize, field: &[u8]) -> Result<(), IoError> {
    let _turn = image.header_turn.at(cx, 0).await;
    let bytes = {
        let meta = image.meta();
        let mut bytes = meta.header.clone();
        bytes.get_mut(at..at + field.len()).ok_or(CORRUPT)?.copy_from_slice(field);
        bytes
    };
    let buf = IoBuf::from_slice(&bytes)?;
    let whole = ByteRange::new(0, bytes.len() as u64).ok_or(CORRUPT)?;
    cx.child(image.file).write(whole, buf, WriteFlags::default()).await?;
    image.meta().header = bytes;
    Ok(())
}
