//! The image's tables in memory, as they are going to be: what the lock guards. No I/O here, and nothing that waits.
//!
//! What has changed is marked; `commit.rs` writes it down in an order that a crash may cut anywhere.

use std::collections::{BTreeSet, HashMap, HashSet};

use super::entry::{CORRUPT, OFFSET};
use super::header::MAX_HOST;
use super::layout::Layout;
use super::options::Checks;
use super::refcounts::Block;
use super::reuse::{Clusters, Reuse, push};
use super::snapshots::Snapshot;
use crate::base::{ByteRange, IoError, is_aligned};

/// See the module's head.
pub(super) struct Meta {
    pub(super) layout: Layout,
    /// The first 512 bytes of the file.
    pub(super) header: Vec<u8>,
    pub(super) l1: Vec<u64>,
    /// Where the L1 table is.
    pub(super) l1_at: u64,
    /// Entries of it that are not in the file yet.
    pub(super) l1_dirty: BTreeSet<usize>,
    /// Slices of L2 tables that are not in the file yet.
    pub(super) dirty: BTreeSet<u64>,
    /// Slices that are being written: not to be forgotten.
    pub(super) busy: BTreeSet<u64>,
    /// The L2 tables, by L1 index, of which it has been made sure that they may be written.
    pub(super) own_tables: HashSet<usize>,
    pub(super) refs: Refs,
    /// Clusters that nothing in memory refers to any more; in the file something may.
    pub(super) freed: Vec<Run>,
    /// Room of writes that came to nothing. Something may still be written there.
    pub(super) abandoned: Vec<Run>,
    /// Clusters of `freed` whose refcounts could not be lowered. Some commits try again, and then only one on a drained node.
    pub(super) stuck: Vec<Run>,
    /// How many commits have tried in vain.
    pub(super) tries: u32,
    /// Clusters whose refcount is 0 and that somebody may still be using.
    pub(super) reuse: Reuse,
    /// Tables that only the header or a snapshot refers to, with what they are.
    pub(super) fixed: Vec<(ByteRange, &'static str)>,
    /// Over which tables nothing else may be written.
    pub(super) checks: Checks,
    /// The internal snapshots, as the header leads to them, and where their table is.
    pub(super) snapshots: Vec<Snapshot>,
    pub(super) snapshots_at: u64,
    /// The clusters of the snapshots' L2 tables, and how many snapshots have each; nothing where they are not watched.
    pub(super) inactive: HashMap<u64, u32>,
    /// The host cluster that the next compressed data may go on in, and the byte where.
    pub(super) packed: Option<u64>,
    /// How many commits have begun, and the last of them that ended well: of those that left no refcounts behind, and of all.
    pub(super) begun: u64,
    pub(super) ended: [u64; 2],
}

/// How messages call such a table.
pub(super) const INACTIVE_L2: &str = "a snapshot's L2 table";

/// Host clusters, counted from the beginning of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) cluster: u64,
    pub(super) count: u64,
    /// The file below may be told that they are not needed.
    pub(super) punch: bool,
}

/// Refcounts, and which clusters may be handed out.
pub(super) struct Refs {
    pub(super) table: Vec<u64>,
    /// Where the refcount table is.
    pub(super) table_at: u64,
    /// Entries of it that are not in the file yet.
    pub(super) table_dirty: BTreeSet<usize>,
    pub(super) blocks: HashMap<u64, Cached>,
    /// Blocks that are kept although nothing of them has to be written.
    pub(super) room: usize,
    /// Where the search goes on: clusters before it are handed out only where `free` has them, until the node is drained.
    pub(super) next: u64,
    /// The first cluster that the file cannot have.
    pub(super) limit: u64,
    /// Clusters that were set free: a request that began before may still be using them.
    resting: Clusters,
    /// Clusters before `next` that may be handed out again.
    free: Clusters,
    /// From this cluster on the file is a hole.
    pub(super) fresh: u64,
    clock: u64,
    /// What the clock said when blocks were last forgotten.
    cleaned: u64,
}

/// A refcount block in memory.
pub(super) struct Cached {
    pub(super) block: Block,
    pub(super) dirty: bool,
    /// The file has no such block yet, so nothing may lead to it before it is written.
    pub(super) new: bool,
    /// A copy of it is being written: what is in the file may be older.
    pub(super) writing: bool,
    used: u64,
}

/// What has to be done before clusters can be had.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// They are the caller's now.
    Clusters(Run),
    /// A refcount block has to be read.
    Block(u64),
    /// The refcount table has to become larger.
    TableIsFull,
}

impl Meta {
    /// Which table that is watched has a part of the range, if one has. Goes through all of them.
    pub(super) fn owner_of(&self, at: ByteRange) -> Option<&'static str> {
        self.other_owner_of(at, "")
    }

    /// The same for a place where a table of kind `own` is going to be written.
    pub(super) fn other_owner_of(&self, at: ByteRange, own: &str) -> Option<&'static str> {
        let (cluster, checks) = (self.layout.cluster(), self.checks);
        let hits = |offset: u64| offset != 0 && ByteRange::new(offset, cluster).is_some_and(|table| table.overlaps(at));
        if let Some((_, what)) = self.fixed.iter().find(|(range, what)| *what != own && range.overlaps(at)) {
            return Some(what);
        }
        if checks.l1 && self.l1_range().overlaps(at) {
            return Some("the active L1 table");
        }
        if checks.refcount_table && self.refs.range().overlaps(at) {
            return Some("the refcount table");
        }
        let (block, l2) = ("a refcount block", "an active L2 table");
        if checks.refcount_block && own != block && self.refs.table.iter().any(|offset| hits(*offset)) {
            return Some(block);
        }
        if checks.l2 && own != l2 && self.l1.iter().any(|entry| hits(entry & OFFSET)) {
            return Some(l2);
        }
        // A table may be a snapshot's and the active one's.
        if own == l2 {
            return None;
        }
        let bits = self.layout.cluster_bits;
        let mut clusters = at.start() >> bits..at.end().div_ceil(cluster);
        clusters.any(|cluster| self.inactive.contains_key(&cluster)).then_some(INACTIVE_L2)
    }

    /// Shows `mark` every cluster of the tables that are watched.
    pub(super) fn watched(&self, mut mark: impl FnMut(u64)) {
        let (bits, checks) = (self.layout.cluster_bits, self.checks);
        let mut all: Vec<ByteRange> = self.fixed.iter().map(|(range, _)| *range).collect();
        all.extend(checks.l1.then(|| self.l1_range()));
        all.extend(checks.refcount_table.then(|| self.refs.range()));
        for range in all.into_iter().filter(|range| !range.is_empty()) {
            (range.start() >> bits..=(range.end() - 1) >> bits).for_each(&mut mark);
        }
        let blocks = self.refs.table.iter().filter(|offset| checks.refcount_block && **offset != 0);
        blocks.for_each(|offset| mark(offset >> bits));
        let tables = self.l1.iter().map(|entry| entry & OFFSET).filter(|offset| checks.l2 && *offset != 0);
        tables.for_each(|offset| mark(offset >> bits));
        self.inactive.keys().for_each(|cluster| mark(*cluster));
    }

    /// These are the L2 tables of one snapshot more, or of one less.
    pub(super) fn watch_inactive(&mut self, tables: &[u64], is_new: bool) {
        for cluster in tables.iter().map(|entry| (entry & OFFSET) >> self.layout.cluster_bits).filter(|at| *at != 0) {
            let count = self.inactive.entry(cluster).or_default();
            *count = if is_new { *count + 1 } else { count.saturating_sub(1) };
            if *count == 0 {
                self.inactive.remove(&cluster);
            }
        }
    }

    pub(super) fn l1_range(&self) -> ByteRange {
        ByteRange::new(self.l1_at, self.l1.len() as u64 * 8).unwrap_or(ByteRange::whole(0))
    }

    /// Nothing in memory refers to the clusters any more.
    pub(super) fn free(&mut self, run: Run) {
        push(&mut self.freed, run);
    }

    /// Clusters that the next commit is going to set free.
    pub(super) fn to_be_free(&self) -> u64 {
        self.freed.iter().chain(&self.abandoned).map(|run| run.count).sum()
    }

    /// A commit has lowered all refcounts that it had to, or not. True for the first time that it was not so.
    pub(super) fn tried(&mut self, all_went_well: bool) -> bool {
        let is_first = self.tries == 0;
        self.tries = match all_went_well {
            true if self.stuck.is_empty() => 0,
            true => self.tries,
            false => self.tries + 1,
        };
        is_first
    }

    /// What a commit sets free.
    pub(super) fn take_freed(&mut self) -> Vec<Run> {
        std::mem::take(&mut self.abandoned).into_iter().for_each(|run| self.free(run));
        if self.tries < TRIES {
            self.freed.append(&mut self.stuck);
        }
        std::mem::take(&mut self.freed)
    }

    /// Nothing is being written any more.
    pub(super) fn settled(&mut self) {
        self.busy.clear();
        self.refs.blocks.values_mut().for_each(|cached| cached.writing = false);
    }

    /// Nothing waits to be written.
    pub(super) fn is_clean(&self) -> bool {
        self.dirty.is_empty() && self.l1_dirty.is_empty() && self.freed.is_empty() && !self.refs.is_dirty()
    }

    /// So much waits that whoever adds to it should write it down first.
    pub(super) fn is_full(&self, slices: usize) -> bool {
        let blocks = self.refs.blocks.values().filter(|cached| cached.dirty).count();
        self.dirty.len() > (slices / 2).clamp(1, 4096) || self.freed.len() > 4096 || blocks > self.refs.room.max(64)
    }

    /// The file is as it is said to be here, and nothing waits to be written.
    pub(super) fn reload(&mut self, header: Vec<u8>, l1: Vec<u64>, l1_at: u64) {
        (self.header, self.l1, self.l1_at) = (header, l1, l1_at);
        self.l1_dirty.clear();
        self.dirty.clear();
        self.busy.clear();
        self.own_tables.clear();
        self.freed.clear();
        self.stuck.clear();
        self.abandoned.clear();
        // Whether they are free is for the new refcounts to say, and nobody is on the way to them any more.
        drop(self.reuse.all());
        self.packed = None;
    }

    /// Nobody uses anything any more: what could not be set free is tried once more.
    pub(super) fn drained(&mut self) {
        self.freed.append(&mut self.stuck);
        self.packed = None;
    }
}

impl Refs {
    pub(super) fn new(table: Vec<u64>, table_at: u64, room: usize, fresh: u64) -> Self {
        Self {
            table,
            table_at,
            table_dirty: BTreeSet::new(),
            blocks: HashMap::new(),
            room: room.max(4),
            next: 1,
            limit: u64::MAX,
            resting: Clusters::default(),
            free: Clusters::default(),
            fresh,
            clock: 0,
            cleaned: 0,
        }
    }

    /// Some of them are not in the file as they are.
    pub(super) fn is_dirty(&self) -> bool {
        !self.table_dirty.is_empty() || self.blocks.values().any(|cached| cached.dirty)
    }

    pub(super) fn range(&self) -> ByteRange {
        ByteRange::new(self.table_at, self.table.len() as u64 * 8).unwrap_or(ByteRange::whole(0))
    }

    /// Where block `index` is: `None` where there is none.
    pub(super) fn block_at(&self, index: u64, layout: Layout) -> Result<Option<u64>, IoError> {
        let offset = usize::try_from(index).ok().and_then(|index| self.table.get(index)).copied().unwrap_or(0);
        if !is_aligned(offset, layout.cluster()) || offset >= MAX_HOST {
            return Err(CORRUPT);
        }
        Ok((offset != 0).then_some(offset))
    }

    /// Keeps a block that was read; forgets one that has not been used for long.
    pub(super) fn keep(&mut self, index: u64, block: Block) {
        if self.blocks.len() >= self.room {
            let loose = self.blocks.iter().filter(|(_, cached)| !cached.dirty && !cached.writing);
            let oldest = loose.min_by_key(|(_, cached)| cached.used).map(|(index, _)| *index);
            oldest.map(|oldest| self.blocks.remove(&oldest));
        }
        let used = self.tick();
        self.blocks.insert(index, Cached { block, dirty: false, new: false, writing: false, used });
    }

    /// Forgets blocks that were not used since this was called before.
    pub(super) fn forget_unused(&mut self) {
        let before = std::mem::replace(&mut self.cleaned, self.clock);
        self.blocks.retain(|_, cached| cached.dirty || cached.writing || cached.used > before);
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Takes up to `wanted` free clusters that lie one after another, none of them one that `owned` says is a table's. Those
    /// that were used before come first; if `whole`, not fewer than are wanted, where that can be.
    pub(super) fn take(
        &mut self,
        layout: Layout,
        wanted: u64,
        whole: bool,
        owned: impl Fn(u64) -> bool,
    ) -> Result<Found, IoError> {
        let entries = layout.block_entries();
        if let Some(found) = self.take_again(layout, wanted, whole, &owned) {
            return Ok(found);
        }
        loop {
            let limit = self.limit.min(MAX_HOST >> layout.cluster_bits);
            if self.next >= limit {
                return Err(IoError::NoSpace);
            }
            let (index, first) = (self.next / entries, self.next % entries);
            if index >= self.table.len() as u64 {
                return Ok(Found::TableIsFull);
            }
            if self.block_at(index, layout)?.is_none() {
                self.add_block(layout, index, &owned);
                continue;
            }
            let used = self.tick();
            let Some(cached) = self.blocks.get_mut(&index) else { return Ok(Found::Block(index)) };
            cached.used = used;
            let base = index * entries;
            let resting = &self.resting;
            let is_free =
                |at: u64| cached.block.get(layout, at) == 0 && !resting.contains(base + at) && !owned(base + at);
            let free = (first..entries.min(limit - base)).find(|at| is_free(*at));
            let Some(start) = free else {
                self.next = base + entries;
                continue;
            };
            let last = entries.min(start + wanted).min(limit.saturating_sub(base));
            let end = (start..last).take_while(|at| is_free(*at)).count() as u64 + start;
            (start..end).for_each(|at| cached.block.set(layout, at, 1));
            cached.dirty = true;
            self.next = base + end;
            return Ok(Found::Clusters(Run { cluster: base + start, count: end - start, punch: false }));
        }
    }

    /// Clusters that were used before.
    fn take_again(&mut self, layout: Layout, wanted: u64, whole: bool, owned: impl Fn(u64) -> bool) -> Option<Found> {
        let entries = layout.block_entries();
        while let Some((cluster, count)) = self.free.find(wanted, whole) {
            let (index, first) = (cluster / entries, cluster % entries);
            let used = self.tick();
            let Some(cached) = self.blocks.get_mut(&index) else { return Some(Found::Block(index)) };
            cached.used = used;
            let last = entries.min(first + count.min(wanted));
            let is_free = |at: &u64| cached.block.get(layout, *at) == 0 && !owned(index * entries + at);
            let got = (first..last).take_while(is_free).count() as u64;
            // The image says something else by now: its tables contradict each other.
            self.free.remove(cluster, got.max(1));
            if got > 0 {
                (first..first + got).for_each(|at| cached.block.set(layout, at, 1));
                cached.dirty = true;
                return Some(Found::Clusters(Run { cluster, count: got, punch: false }));
            }
        }
        None
    }

    /// A new block in the first cluster that it describes and that may be handed out; if there is none, the search goes
    /// on behind it.
    fn add_block(&mut self, layout: Layout, index: u64, owned: impl Fn(u64) -> bool) {
        let entries = layout.block_entries();
        let first = self.next.max(index * entries);
        let end = ((index + 1) * entries).min(self.limit);
        let Some(cluster) = (first..end).find(|cluster| *cluster != 0 && !owned(*cluster)) else {
            self.next = (index + 1) * entries;
            return;
        };
        let mut block = Block::empty(layout);
        block.set(layout, cluster % entries, 1);
        self.hook(layout, index, cluster, block);
        self.next = cluster + 1;
    }

    /// The table leads to a new block in `cluster` from now on.
    pub(super) fn hook(&mut self, layout: Layout, index: u64, cluster: u64, block: Block) {
        let used = self.tick();
        self.blocks.insert(index, Cached { block, dirty: true, new: true, writing: false, used });
        let place = usize::try_from(index).unwrap_or(usize::MAX);
        if let Some(entry) = self.table.get_mut(place) {
            *entry = cluster << layout.cluster_bits;
            self.table_dirty.insert(place);
        }
    }

    /// One more refers to a cluster. `None`: its block is not in memory.
    pub(super) fn raise(&mut self, layout: Layout, cluster: u64) -> Option<Result<u64, IoError>> {
        self.change(layout, cluster, |old| old.checked_add(1).filter(|new| *new <= layout.max_refcount()))
    }

    /// One less refers to a cluster. `None`: its block is not in memory. With none left it rests, from the same moment on:
    /// whoever found it by an older entry may still be using it.
    pub(super) fn lower(&mut self, layout: Layout, cluster: u64) -> Option<Result<u64, IoError>> {
        let now = self.change(layout, cluster, |old| old.checked_sub(1));
        if now == Some(Ok(0)) && !self.resting.contains(cluster) {
            self.resting.insert(cluster, 1);
        }
        now
    }

    fn change(
        &mut self,
        layout: Layout,
        cluster: u64,
        to: impl Fn(u64) -> Option<u64>,
    ) -> Option<Result<u64, IoError>> {
        let (index, at) = (cluster / layout.block_entries(), cluster % layout.block_entries());
        let used = self.tick();
        let cached = self.blocks.get_mut(&index)?;
        cached.used = used;
        let Some(new) = to(cached.block.get(layout, at)) else { return Some(Err(CORRUPT)) };
        cached.block.set(layout, at, new);
        cached.dirty = true;
        Some(Ok(new))
    }

    /// The refcount of a cluster whose block is in memory.
    pub(super) fn get(&mut self, layout: Layout, cluster: u64) -> Option<u64> {
        let (index, at) = (cluster / layout.block_entries(), cluster % layout.block_entries());
        let used = self.tick();
        let cached = self.blocks.get_mut(&index)?;
        cached.used = used;
        Some(cached.block.get(layout, at))
    }

    /// A cluster that has just become free is a table's after all: it keeps its last reference.
    pub(super) fn keep_used(&mut self, layout: Layout, cluster: u64) {
        self.resting.remove(cluster, 1);
        // Its block is in memory: the refcount was lowered just now, and what is to be written stays there.
        let _ = self.raise(layout, cluster);
    }

    /// Nobody uses the clusters any more, and the file below has heard of it.
    pub(super) fn release(&mut self, cluster: u64, count: u64) {
        self.resting.remove(cluster, count);
        // There is something in them.
        self.fresh = self.fresh.max(cluster + count);
        let before = count.min(self.next.saturating_sub(cluster));
        if before > 0 {
            self.free.insert(cluster, before);
        }
    }

    /// All free clusters may be handed out.
    pub(super) fn wake(&mut self, fresh: u64) {
        self.resting.clear();
        self.free.clear();
        self.next = 1;
        self.fresh = self.fresh.max(fresh);
    }
}

/// Commits that try to lower refcounts which could not be lowered.
const TRIES: u32 = 3;

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: Layout =
        Layout { cluster_bits: 9, refcount_order: 4, extended: false, version: 3, external: false, slice_entries: 64 };

    fn run(found: Found) -> (u64, u64) {
        let Found::Clusters(run) = found else { panic!("{found:?}") };
        (run.cluster, run.count)
    }

    #[test]
    fn clusters_are_handed_out_once_and_blocks_describe_themselves() {
        let mut refs = Refs::new(vec![0; 2], 512, 8, 0);
        let owned = |cluster| cluster < 3;
        let mut take = |count| run(refs.take(LAYOUT, count, false, owned).unwrap());
        assert_eq!(take(3), (4, 3), "the one before is the block's own");
        assert_eq!(take(300), (7, 249), "up to the end of what the block describes");
        assert_eq!(take(1), (257, 1));
        assert_eq!(refs.table, [3 << 9, 256 << 9]);
    }

    #[test]
    fn what_was_freed_rests() {
        let mut refs = Refs::new(vec![5 << 9, 0], 512, 8, 0);
        let take = |refs: &mut Refs, count| refs.take(LAYOUT, count, false, |_| false).unwrap();
        assert_eq!(take(&mut refs, 1), Found::Block(0));
        refs.keep(0, Block::empty(LAYOUT));
        for cluster in [4, 5, 8] {
            assert_eq!(refs.raise(LAYOUT, cluster), Some(Ok(1)));
        }
        assert_eq!(run(take(&mut refs, 2)), (1, 2));
        for cluster in [4, 5, 1] {
            assert_eq!(refs.lower(LAYOUT, cluster), Some(Ok(0)), "the search has not come to the first two yet");
        }
        assert_eq!(run(take(&mut refs, 9)), (3, 1));
        assert_eq!(run(take(&mut refs, 9)), (6, 2));
        assert_eq!(refs.raise(LAYOUT, 8), Some(Ok(2)));
        assert_eq!((refs.lower(LAYOUT, 8), refs.lower(LAYOUT, 8)), (Some(Ok(1)), Some(Ok(0))));
        assert_eq!(run(take(&mut refs, 9)), (9, 9));
        refs.wake(0);
        assert_eq!(run(take(&mut refs, 9)), (1, 1));
        assert_eq!(run(take(&mut refs, 9)), (4, 2));
        assert_eq!(refs.lower(LAYOUT, 300), None);
        assert_eq!(refs.lower(LAYOUT, 200), Some(Err(CORRUPT)));
    }

    #[test]
    fn unused_blocks_are_forgotten_in_the_second_round() {
        let mut refs = Refs::new(vec![5 << 9, 6 << 9, 7 << 9], 512, 8, 0);
        (0..3).for_each(|index| refs.keep(index, Block::empty(LAYOUT)));
        refs.forget_unused();
        assert_eq!((refs.get(LAYOUT, 1), refs.raise(LAYOUT, 300)), (Some(0), Some(Ok(1))));
        refs.forget_unused();
        assert_eq!(refs.blocks.len(), 2, "one was not asked for");
        refs.forget_unused();
        assert_eq!(refs.blocks.keys().collect::<Vec<_>>(), [&1], "what is to be written stays");
    }

    #[test]
    fn the_table_ends() {
        let mut refs = Refs::new(vec![0x4000], 512, 8, 0);
        refs.keep(0, Block::from_bytes(vec![1; 512]));
        assert_eq!(refs.take(LAYOUT, 1, false, |_| false).unwrap(), Found::TableIsFull);
    }

    #[test]
    fn what_was_released_is_handed_out_before_the_rest() {
        let mut refs = Refs::new(vec![5 << 9], 512, 8, 20);
        refs.keep(0, Block::empty(LAYOUT));
        let take = |refs: &mut Refs, count, whole| run(refs.take(LAYOUT, count, whole, |_| false).unwrap());
        assert_eq!(take(&mut refs, 40, false), (1, 40));
        for cluster in [3, 10, 11, 12, 30] {
            assert_eq!(refs.lower(LAYOUT, cluster), Some(Ok(0)));
        }
        assert_eq!(take(&mut refs, 1, false), (41, 1), "they rest");
        refs.release(3, 1);
        refs.release(10, 3);
        assert_eq!(refs.fresh, 20);
        assert_eq!(take(&mut refs, 2, true), (10, 2));
        assert_eq!(take(&mut refs, 2, true), (42, 2), "no run is long enough");
        assert_eq!(take(&mut refs, 5, false), (3, 1));
        assert_eq!(take(&mut refs, 5, false), (12, 1));
        assert_eq!(take(&mut refs, 1, false), (44, 1));
        refs.release(30, 1);
        assert_eq!(refs.fresh, 31, "what was used before is not fresh");
        assert_eq!(take(&mut refs, 1, false), (30, 1));
    }

    #[test]
    fn a_block_lies_where_the_file_is() {
        let mut refs = Refs::new(vec![5 << 9, 0], 512, 8, 0);
        refs.keep(0, Block::from_bytes(vec![1; 512]));
        refs.limit = 256;
        assert_eq!(refs.take(LAYOUT, 1, false, |_| false), Err(IoError::NoSpace));
        refs.limit = 258;
        refs.next = 256;
        assert_eq!(run(refs.take(LAYOUT, 4, false, |_| false).unwrap()), (257, 1));
        assert_eq!(refs.table[1], 256 << 9);
    }
}
