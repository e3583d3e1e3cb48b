//! Putting an image right, in an order that a crash may cut anywhere.
//!
//! | step | what | a crash behind it leaves |
//! |---|---|---|
//! | 1 | refcounts that are wrong get the number of references; where that cannot be done in place, new blocks and a new table behind everything else, flush, then the header leads there | the image as it was, or better |
//! | 2 | flags of clusters that are not somebody's alone go; flush | the same |
//! | 3 | flags of those that are come; flush | less speed |
//! | 4 | the header says no more that it was not closed well, or that it is corrupt | – |

use std::collections::BTreeSet;

use super::check::{Walk, entries, words};
use super::counted::Refcounts;
use super::counts::Counts;
use super::entry::{COPIED, CORRUPT, OFFSET};
use super::header::{
    AT_INCOMPATIBLE, AT_REFCOUNT_ORDER, AT_REFCOUNT_TABLE, CORRUPT_BIT, DIRTY, MAX_HOST, MAX_REFCOUNT_TABLE,
};
use super::layout::Layout;
use super::open::Read;
use super::refcounts::Block;
use super::tables::put;
use crate::base::{ByteRange, IoError, is_aligned};
use crate::graph::{Child, Repair};

impl Walk<'_> {
    /// Puts right what can be. Gives the image as it is then.
    pub(super) async fn repaired(self, mut read: Read, repair: Repair) -> Result<Read, IoError> {
        let file = self.file;
        // Whoever wants leaks gone alone gets flags that follow from that, and nothing else.
        let only_leaks = repair == Repair::Leaks && self.report.corruptions > self.wrong_flags;
        if self.needs_new_refcounts && repair == Repair::All {
            drop(self);
            let order = read.header.refcount_order;
            NewRefcounts::over(file, &read, order).await?.write(file, &mut read).await?;
        } else {
            self.in_place(repair).await?;
        }
        if !only_leaks {
            read.put_flags_right(file).await?;
        }
        Ok(read)
    }

    /// Refcounts where there are blocks for them.
    async fn in_place(&self, repair: Repair) -> Result<(), IoError> {
        let layout = self.layout;
        let per_block = layout.block_entries();
        let known = self.end.div_ceil(layout.cluster()).max(self.counts.last().map_or(0, |last| last + 1));
        for index in (0..self.refcounts.table.len() as u64).filter(|index| self.refcounts.has(*index)) {
            // A block that lies over something else is not written.
            let at = self.refcounts.entry(index);
            if self.counts.get(at >> layout.cluster_bits) != 1 {
                continue;
            }
            let (mut block, mut changed) = (self.refcounts.load(index).await?, false);
            for cluster in index * per_block..known.min((index + 1) * per_block) {
                let (count, references) = (block.get(layout, cluster % per_block), self.counts.get(cluster));
                if count > references || (count < references && count > 0 && repair == Repair::All) {
                    block.set(layout, cluster % per_block, references);
                    changed = true;
                }
            }
            if changed {
                put(self.file, at, block.bytes()).await?;
            }
        }
        self.file.flush().await?;
        Ok(())
    }
}

/// A whole new refcount table, with its blocks, whose entries may have another width.
pub(super) struct NewRefcounts {
    layout: Layout,
    /// References, without those to what holds refcounts.
    counts: Counts,
    /// The numbers of the blocks, which lie one after another from this cluster on; the table follows.
    blocks: Vec<u64>,
    first: u64,
    table_clusters: u64,
}

impl NewRefcounts {
    /// Where it goes: behind all that is in use and all that was a refcount table.
    pub(super) async fn over(file: Child<'_>, read: &Read, order: u8) -> Result<Self, IoError> {
        let walk = Walk::references(file, read).await?;
        if walk.report.check_errors > 0 {
            return Err(CORRUPT);
        }
        let (layout, bits) = (Layout { refcount_order: order, ..walk.layout }, walk.layout.cluster_bits);
        let old = walk.refcounts.table.iter().filter(|entry| walk.refcounts.is_possible(**entry));
        let last_block = old.map(|entry| (entry >> bits) + 1).max().unwrap_or(0);
        let table_end = read.header.refcount_table.end() >> bits;
        let first = walk.counts.last().map_or(0, |last| last + 1).max(last_block).max(table_end);
        let limit = if file.moving_end().is_some() { MAX_HOST } else { file.size() } >> bits;
        let (mut used, mut from) = (BTreeSet::new(), 0);
        while let Some(cluster) = walk.counts.next(from) {
            let index = cluster / layout.block_entries();
            used.insert(index);
            from = (index + 1) * layout.block_entries();
        }
        let mut table_clusters = 1;
        loop {
            let end = first + used.len() as u64 + table_clusters;
            let own = first / layout.block_entries()..=(end - 1) / layout.block_entries();
            let before = (used.len(), table_clusters);
            used.extend(own);
            let entries = used.last().map_or(0, |last| last + 1);
            table_clusters = (entries * 8).div_ceil(layout.cluster());
            if table_clusters * layout.cluster() > MAX_REFCOUNT_TABLE || end > limit {
                return Err(IoError::NoSpace);
            }
            if (used.len(), table_clusters) == before {
                break;
            }
        }
        Ok(Self { layout, counts: walk.counts, blocks: used.into_iter().collect(), first, table_clusters })
    }

    fn end(&self) -> u64 {
        self.first + self.blocks.len() as u64 + self.table_clusters
    }

    /// The first cluster that has more references than an entry can say, and how many.
    pub(super) fn too_many(&self) -> Option<(u64, u64)> {
        let mut from = 0;
        while let Some(cluster) = self.counts.next(from) {
            let count = self.counts.get(cluster);
            if count > self.layout.max_refcount() {
                return Some((cluster << self.layout.cluster_bits, count));
            }
            from = cluster + 1;
        }
        None
    }

    pub(super) async fn write(self, file: Child<'_>, read: &mut Read) -> Result<(), IoError> {
        let bits = self.layout.cluster_bits;
        for (number, index) in (0..).zip(&self.blocks) {
            put(file, (self.first + number) << bits, self.block(*index).bytes()).await?;
        }
        let at = (self.first + self.blocks.len() as u64) << bits;
        let len = self.table_clusters << bits;
        let mut table = vec![0; usize::try_from(len / 8).map_err(|_| IoError::NoMemory)?];
        for (number, index) in (0..).zip(&self.blocks) {
            let entry = usize::try_from(*index).ok().and_then(|index| table.get_mut(index));
            entry.into_iter().for_each(|entry| *entry = (self.first + number) << bits);
        }
        put(file, at, &table.iter().flat_map(|entry| entry.to_be_bytes()).collect::<Vec<_>>()).await?;
        file.flush().await?;
        let clusters = u32::try_from(self.table_clusters).map_err(|_| IoError::NoSpace)?;
        let order = self.layout.refcount_order;
        if order != read.header.refcount_order {
            read.set_field(AT_REFCOUNT_ORDER, &u32::from(order).to_be_bytes())?;
        }
        read.write_field(file, AT_REFCOUNT_TABLE, &[&at.to_be_bytes()[..], &clusters.to_be_bytes()].concat()).await?;
        file.flush().await?;
        read.header.refcount_order = order;
        read.header.refcount_table = ByteRange::new(at, len).ok_or(IoError::OutOfRange)?;
        read.refcount_table = table;
        Ok(())
    }

    fn block(&self, index: u64) -> Block {
        let (layout, mut block) = (self.layout, Block::empty(self.layout));
        let range = index * layout.block_entries()..(index + 1) * layout.block_entries();
        let mut from = range.start;
        while let Some(cluster) = self.counts.next(from).filter(|cluster| range.contains(cluster)) {
            block.set(layout, cluster - range.start, self.counts.get(cluster));
            from = cluster + 1;
        }
        let own = self.first.max(range.start)..self.end().min(range.end);
        own.for_each(|cluster| block.set(layout, cluster - range.start, 1));
        block
    }
}

/// The flags of the active tables that say of a cluster that it is somebody's alone.
struct Flags<'a, 'r> {
    file: Child<'a>,
    read: &'r mut Read,
    refcounts: Refcounts<'a>,
    /// Where nothing is written, whatever an entry says: other tables, in clusters.
    others: BTreeSet<u64>,
    /// The flags that are missing come; else those that are wrong go.
    set: bool,
}

impl<'a, 'r> Flags<'a, 'r> {
    fn of(file: Child<'a>, read: &'r mut Read, set: bool) -> Self {
        let refcounts = Refcounts::of(file, read);
        let bits = read.layout().cluster_bits;
        let mut others: BTreeSet<u64> = refcounts.table.iter().map(|entry| entry >> bits).collect();
        let tables = read.all_tables().into_iter().filter(|(range, _)| !range.is_empty());
        tables.for_each(|(range, _)| others.extend(range.start() >> bits..=(range.end() - 1) >> bits));
        Self { file, read, refcounts, others, set }
    }

    async fn put_right(mut self) -> Result<(), IoError> {
        let layout = self.read.layout();
        for index in 0..self.read.l1.len() {
            let entry = self.read.l1[index];
            let table = entry & OFFSET;
            if table == 0 || !is_aligned(table, layout.cluster()) {
                continue;
            }
            let right = self.refcounts.alone(entry).await?;
            if self.is_due(entry, right) {
                self.read.l1[index] = right;
                let first = index / ENTRIES * ENTRIES;
                let sector: Vec<u64> = self.read.l1.iter().skip(first).take(ENTRIES).copied().collect();
                put_words(self.file, self.read.header.l1.start() + first as u64 * 8, &sector).await?;
            }
            if !self.others.contains(&(table >> layout.cluster_bits)) {
                self.table(table, layout).await?;
            }
        }
        Ok(())
    }

    async fn table(&mut self, table: u64, layout: Layout) -> Result<(), IoError> {
        let at = ByteRange::new(table, layout.cluster()).ok_or(IoError::OutOfRange)?;
        let mut all = words(self.file, at).await?;
        let (step, mut changed) = (if layout.extended { 2 } else { 1 }, BTreeSet::new());
        let found: Vec<_> = entries(&all, layout).collect();
        for (number, entry) in found.into_iter().enumerate() {
            let right = self.refcounts.alone_entry(entry).await?;
            if self.is_due(entry.word, right.word) {
                all[number * step] = right.word;
                changed.insert(number * step / ENTRIES);
            }
        }
        for sector in changed {
            let words = &all[sector * ENTRIES..(sector + 1) * ENTRIES];
            put_words(self.file, table + (sector * ENTRIES * 8) as u64, words).await?;
        }
        Ok(())
    }

    fn is_due(&self, is: u64, right: u64) -> bool {
        is != right && (right & COPIED != 0) == self.set
    }
}

/// Words in a sector.
const ENTRIES: usize = 64;

async fn put_words(file: Child<'_>, at: u64, words: &[u64]) -> Result<(), IoError> {
    put(file, at, &words.iter().flat_map(|word| word.to_be_bytes()).collect::<Vec<_>>()).await
}

impl Read {
    /// Changes a field of the header: the sector that it is in is written as a whole.
    async fn write_field(&mut self, file: Child<'_>, at: usize, field: &[u8]) -> Result<(), IoError> {
        self.set_field(at, field)?;
        put(file, 0, &self.sector).await
    }

    /// The next field that is written takes it along.
    fn set_field(&mut self, at: usize, field: &[u8]) -> Result<(), IoError> {
        let place = self.sector.get_mut(at..at + field.len()).ok_or(IoError::OutOfRange)?;
        place.copy_from_slice(field);
        Ok(())
    }

    /// Flags say what refcounts say: those that are wrong go before those that are missing come.
    pub(super) async fn put_flags_right(&mut self, file: Child<'_>) -> Result<(), IoError> {
        for set in [false, true] {
            Flags::of(file, self, set).put_right().await?;
            file.flush().await?;
        }
        Ok(())
    }

    /// The image says that it was closed well, and is not corrupt.
    pub(super) async fn mark_consistent(mut self, file: Child<'_>) -> Result<(), IoError> {
        if self.header.version < 3 || !self.header.has(DIRTY | CORRUPT_BIT) {
            return Ok(());
        }
        let bits = self.header.incompatible & !(DIRTY | CORRUPT_BIT);
        self.write_field(file, AT_INCOMPATIBLE, &bits.to_be_bytes()).await?;
        file.flush().await
    }
}
