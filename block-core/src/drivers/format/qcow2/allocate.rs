//! Handing out host clusters, and making the refcount table larger where it ends.
//!
//! A cluster's refcount goes up in memory before anybody learns of the cluster, and in the file before anything in the
//! file leads to it (`commit.rs`). What is set free is handed out again when nobody can be on his way there any more
//! (`reuse.rs`).

use super::Image;
use super::commit::write_header;
use super::entry::CORRUPT;
use super::header::{AT_REFCOUNT_TABLE, MAX_HOST, MAX_REFCOUNT_TABLE};
use super::meta::{Found, Run};
use super::refcounts::Block;
use super::tables::put;
use crate::base::IoError;
use crate::graph::{DebugEvent, IoCx};

/// Blocks that one search reads before it goes on at the end of the file.
const PATIENCE: u32 = 1024;

impl Image {
    /// Up to `wanted` clusters (at least one) that lie one after another, for guest data.
    pub(super) async fn take(&self, cx: IoCx<'_>, wanted: u64) -> Result<Run, IoError> {
        self.take_run(cx, wanted, false).await
    }

    async fn take_run(&self, cx: IoCx<'_>, wanted: u64, whole: bool) -> Result<Run, IoError> {
        let file = cx.child(self.file);
        file.announce(DebugEvent::ClusterAlloc).await;
        let (is_full, is_ready) = {
            let meta = self.meta();
            // Who rewrites and never flushes would make the file grow.
            let much = (file.size() / self.layout.cluster() / 8).max(FREED);
            (meta.is_full(self.slices.capacity()) || meta.to_be_free() > much, meta.reuse.is_ready())
        };
        if is_full {
            self.commit(cx).await?;
        } else if is_ready {
            self.reclaim(cx).await;
        }
        loop {
            let released = self.meta().reuse.released();
            match self.search(cx, wanted, whole).await {
                Err(IoError::NoSpace) if self.room_comes(cx, released).await? => {}
                other => return other,
            }
        }
    }

    async fn search(&self, cx: IoCx<'_>, wanted: u64, whole: bool) -> Result<Run, IoError> {
        let mut read = 0;
        loop {
            match self.find(cx, wanted, whole)? {
                Found::Clusters(run) => return Ok(run),
                Found::Block(index) => {
                    read += 1;
                    if read == PATIENCE && cx.child(self.file).moving_end().is_some() {
                        self.skip_to_end(cx);
                    }
                    self.load_block(cx, index).await?;
                }
                Found::TableIsFull => self.grow_refcounts(cx, 0).await.map(drop)?,
            }
        }
    }

    fn find(&self, cx: IoCx<'_>, wanted: u64, whole: bool) -> Result<Found, IoError> {
        let file = cx.child(self.file);
        let is_fixed = file.moving_end().is_none();
        let mut meta = self.meta();
        meta.refs.limit = if is_fixed { file.size() / self.layout.cluster() } else { u64::MAX };
        let found = meta.refs.take(self.layout, wanted, whole, |cluster| self.regions.may_own(cluster));
        let refs = &meta.refs;
        let new = refs.table_dirty.iter().filter_map(|index| refs.table.get(*index));
        new.for_each(|block| self.regions.mark(block >> self.layout.cluster_bits));
        found
    }

    fn skip_to_end(&self, cx: IoCx<'_>) {
        let end = cx.child(self.file).size().div_ceil(self.layout.cluster());
        let mut meta = self.meta();
        meta.refs.next = meta.refs.next.max(end);
    }

    /// Exactly `count` clusters that lie one after another, for a table: no guest data goes there any more.
    pub(super) async fn take_table(&self, cx: IoCx<'_>, count: u64) -> Result<Run, IoError> {
        let mut whole: Option<Run> = None;
        for _ in 0..TRIES {
            let missing = count - whole.map_or(0, |run| run.count);
            let run = match self.take_run(cx, missing, true).await {
                Ok(run) => run,
                Err(error) => {
                    self.meta().abandoned.extend(whole);
                    return Err(error);
                }
            };
            let joined = match whole {
                Some(before) if before.cluster + before.count == run.cluster => {
                    Run { count: before.count + run.count, ..before }
                }
                Some(before) => {
                    self.meta().abandoned.push(before);
                    run
                }
                None => run,
            };
            if joined.count == count {
                self.own(joined);
                return Ok(joined);
            }
            whole = Some(joined);
        }
        if let Some(run) = whole {
            self.meta().abandoned.push(run);
        }
        // Blocks lie too close for so long a run: the run and the blocks of its own part of the file go behind all others.
        let run = self.grow_refcounts(cx, count).await?;
        self.own(run);
        Ok(run)
    }

    fn own(&self, run: Run) {
        (run.cluster..run.cluster + run.count).for_each(|cluster| self.regions.mark(cluster));
    }

    /// Moves the refcount table to the end, if it has to be larger, with the blocks that describe it and `extra` clusters
    /// more, which are the caller's.
    pub(super) async fn grow_refcounts(&self, cx: IoCx<'_>, extra: u64) -> Result<Run, IoError> {
        // No commit may come between: it would write entries of the old table.
        let _turn = self.committing.at(cx, 0).await;
        let Some(plan) = self.plan(extra)? else {
            return Ok(Run { cluster: 0, count: 0, punch: false });
        };
        let layout = self.layout;
        let (file, bits) = (cx.child(self.file), layout.cluster_bits);
        file.announce(DebugEvent::ReftableGrow).await;
        self.own(Run { cluster: plan.cluster, count: plan.blocks + plan.table_clusters, punch: false });
        let blocks: Vec<_> = (0..plan.blocks).map(|number| self.new_block(&plan, number)).collect();
        let table = {
            let meta = self.meta();
            let mut table = meta.refs.table.clone();
            table.resize(plan.entries, 0);
            for number in 0..plan.blocks {
                let index = usize::try_from(plan.first_block + number).map_err(|_| IoError::NoSpace)?;
                *table.get_mut(index).ok_or(CORRUPT)? = (plan.cluster + number) << bits;
            }
            table
        };
        for (number, block) in (0..).zip(&blocks) {
            file.announce(DebugEvent::RefblockAllocWriteBlocks).await;
            put(file, (plan.cluster + number) << bits, block.bytes()).await?;
        }
        file.announce(DebugEvent::RefblockAllocWriteTable).await;
        let at = plan.table() << bits;
        // What else is new in the table leads to blocks that are not in the file yet: those come with a commit.
        let known = self.known(table.clone());
        put(file, at, &known.iter().flat_map(|entry| entry.to_be_bytes()).collect::<Vec<_>>()).await?;
        file.flush().await?;
        file.announce(DebugEvent::RefblockAllocSwitchTable).await;
        let clusters = u32::try_from(plan.table_clusters).map_err(|_| IoError::NoSpace)?;
        let field = [&at.to_be_bytes()[..], &clusters.to_be_bytes()].concat();
        let switched = async {
            write_header(self, cx, AT_REFCOUNT_TABLE, &field).await?;
            file.flush().await
        };
        switched.await.inspect_err(|error| self.give_up("the move of its refcount table", *error))?;
        let mut meta = self.meta();
        let (old_at, old_len) = (meta.refs.table_at, meta.refs.table.len() as u64 * 8);
        // Blocks that came meanwhile are in no table of the file yet.
        let since = std::mem::replace(&mut meta.refs.table, table);
        for (entry, since) in meta.refs.table.iter_mut().zip(since) {
            *entry = if since == 0 { *entry } else { since };
        }
        meta.refs.table_at = at;
        for (index, block) in (plan.first_block..).zip(blocks) {
            meta.refs.keep(index, block);
        }
        meta.free(Run { cluster: old_at >> bits, count: old_len >> bits, punch: true });
        drop(meta);
        Ok(Run { cluster: plan.end() - extra, count: extra, punch: false })
    }

    /// The table without entries whose blocks are not in the file yet.
    fn known(&self, mut table: Vec<u64>) -> Vec<u64> {
        let meta = self.meta();
        let new = meta.refs.table_dirty.iter();
        new.for_each(|index| table.get_mut(*index).into_iter().for_each(|entry| *entry = 0));
        table
    }

    /// Where everything goes; nobody else takes clusters there from now on. `None`: the table has been made larger already.
    fn plan(&self, extra: u64) -> Result<Option<Growth>, IoError> {
        let (layout, mut meta) = (self.layout, self.meta());
        if extra == 0 && meta.refs.next / layout.block_entries() < meta.refs.table.len() as u64 {
            return Ok(None);
        }
        let last = meta.refs.table.iter().rposition(|entry| *entry != 0).map_or(0, |last| last as u64 + 1);
        let first = meta.refs.next.max(last * layout.block_entries());
        let plan = Growth::new(layout, first, meta.refs.table.len() as u64, extra)?;
        if plan.end() > meta.refs.limit {
            return Err(IoError::NoSpace);
        }
        meta.refs.next = (plan.first_block + plan.blocks) * layout.block_entries();
        Ok(Some(plan))
    }

    fn new_block(&self, plan: &Growth, number: u64) -> Block {
        let (layout, mut block) = (self.layout, Block::empty(self.layout));
        let base = (plan.first_block + number) * layout.block_entries();
        let used = plan.cluster.max(base)..plan.end().min(base + layout.block_entries());
        used.for_each(|cluster| block.set(layout, cluster - base, 1));
        block
    }
}

/// Where a larger refcount table goes: first its blocks, then itself, then what else is wanted.
#[derive(Debug)]
struct Growth {
    /// The first cluster of all.
    cluster: u64,
    /// The number of the first block, and of blocks.
    first_block: u64,
    blocks: u64,
    table_clusters: u64,
    /// In the table.
    entries: usize,
    extra: u64,
}

impl Growth {
    fn new(layout: super::layout::Layout, first: u64, entries: u64, extra: u64) -> Result<Self, IoError> {
        let (per_block, per_cluster) = (layout.block_entries(), layout.cluster() / 8);
        let first_block = first.div_ceil(per_block);
        let cluster = first_block * per_block;
        let (mut blocks, mut table_clusters) = (1, 0);
        loop {
            let end = cluster + blocks + table_clusters + extra;
            if end >= MAX_HOST >> layout.cluster_bits {
                return Err(IoError::NoSpace);
            }
            let needed = end.div_ceil(per_block) - first_block;
            // Half as much again, so that it does not grow all the time.
            let most = MAX_REFCOUNT_TABLE / layout.cluster();
            let wanted = (entries + entries / 2).div_ceil(per_cluster).min(most);
            let wanted = wanted.max((first_block + needed + 1).div_ceil(per_cluster));
            if needed <= blocks && wanted <= table_clusters {
                break;
            }
            (blocks, table_clusters) = (blocks.max(needed), table_clusters.max(wanted));
        }
        if table_clusters * layout.cluster() > MAX_REFCOUNT_TABLE {
            return Err(IoError::NoSpace);
        }
        let entries = usize::try_from(table_clusters * per_cluster).map_err(|_| IoError::NoSpace)?;
        Ok(Self { cluster, first_block, blocks, table_clusters, entries, extra })
    }

    fn table(&self) -> u64 {
        self.cluster + self.blocks
    }

    fn end(&self) -> u64 {
        self.table() + self.table_clusters + self.extra
    }
}

/// Clusters that may wait for a commit to set them free, however small the file is.
const FREED: u64 = 64;
/// Times that a long run is looked for among what is free.
const TRIES: usize = 64;
