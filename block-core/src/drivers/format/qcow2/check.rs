//! Going through a whole image: who refers to which cluster, and whether refcounts and the flag that a cluster is somebody's
//! alone agree with that. Only the file is looked at, so that an image need not be open for it. What is put right, and in
//! which order, is `repair.rs`; refcounts are read by `counted.rs`.
//!
//! What counts as a corruption is what QEMU's `check` counts; a leak is a cluster whose refcount is higher than it has
//! references. Memory: the tables that an open image has in memory, a table at a time of what else there is, and a counter
//! for each cluster (`counts.rs`).

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{Ordering::Acquire, Ordering::Release};

use super::Image;
use super::counted::Refcounts;
use super::counts::Counts;
use super::crypt::CRYPTO;
use super::directory::{self, Part};
use super::entry::{COMPRESSED, COPIED, Cluster, L2Entry, OFFSET};
use super::header::{BITMAPS, DIRTY, Fields};
use super::layout::Layout;
use super::meta::Refs;
use super::open::{Read, part};
use crate::base::{ByteRange, Error, IoError, Result, ResultExt, is_aligned};
use crate::graph::{CheckReport, Child, FindingKind, Findings, IoCx, Repair};

/// Checks the image in `file`, and puts right what it is told to: then the caller may write and resize the file. Nobody
/// else uses it. `findings` says what was wrong, one by one, and what of that has been put right.
pub async fn check(file: Child<'_>, repair: Repair, findings: &mut Findings) -> Result<CheckReport> {
    let doing = || "Could not go through the image";
    let read = Read::all(file).await?;
    let mut found = Walk::over(file, &read, repair).await.doing(doing)?;
    let before = found.report;
    *findings = std::mem::take(&mut found.findings);
    if repair == Repair::Nothing {
        return Ok(before);
    }
    read.check_overlaps()?;
    if before.check_errors > 0 {
        return Err(Error::new("Parts of the image cannot be read: nothing is repaired, since it could do harm"));
    }
    let read = found.repaired(read, repair).await.doing(|| "Could not repair the image")?;
    let again = Walk::over(file, &read, Repair::Nothing).await.doing(doing)?;
    findings.without(&again.findings);
    let after = again.report;
    if repair == Repair::All && after.is_consistent() {
        read.mark_consistent(file).await.doing(|| "Could not mark the image consistent")?;
    }
    Ok(CheckReport {
        corruptions_fixed: before.corruptions.saturating_sub(after.corruptions),
        leaks_fixed: before.leaks.saturating_sub(after.leaks),
        ..after
    })
}

impl Image {
    /// The same for an image that is open; nobody else is inside.
    pub(super) async fn checked(&self, cx: IoCx<'_>, repair: Repair, findings: &mut Findings) -> Result<CheckReport> {
        if self.is_ready.load(Acquire) && !self.is_corrupt.load(Acquire) {
            self.settle(cx).await.doing(|| "Could not write down what is in memory")?;
        }
        let result = check(cx.child(self.file), repair, findings).await;
        if repair == Repair::Nothing {
            return result;
        }
        // Whatever came of it: tables may have moved.
        let reloaded = self.reload(cx).await;
        let report = result?;
        reloaded.inspect_err(|_| self.is_corrupt.store(true, Release))?;
        self.is_corrupt.store(!report.is_consistent() && self.is_corrupt.load(Acquire), Release);
        Ok(report)
    }

    /// What is in memory is what is in the file.
    async fn reload(&self, cx: IoCx<'_>) -> Result<()> {
        let file = cx.child(self.file);
        let read = Read::all(file).await?;
        self.is_ready.store(false, Release);
        self.is_unclean.store(read.header.has(DIRTY), Release);
        let mut meta = self.meta();
        let fresh = file.size().div_ceil(self.layout.cluster());
        meta.reload(read.sector, read.l1, read.header.l1.start());
        meta.refs = Refs::new(read.refcount_table, read.header.refcount_table.start(), meta.refs.room, fresh);
        self.slices.clear();
        meta.watched(|cluster| self.regions.mark(cluster));
        Ok(())
    }
}

/// What was found in an image.
pub(super) struct Walk<'a> {
    pub(super) file: Child<'a>,
    pub(super) layout: Layout,
    /// Of the file, in bytes.
    pub(super) end: u64,
    pub(super) counts: Counts,
    pub(super) refcounts: Refcounts<'a>,
    pub(super) report: CheckReport,
    findings: Findings,
    /// Refcounts cannot be put right where they are.
    pub(super) needs_new_refcounts: bool,
    /// Of the corruptions, those that are flags and follow from refcounts.
    pub(super) wrong_flags: u64,
    /// Where the next cluster of the same table would not be a fragment.
    next: Option<u64>,
}

impl<'a> Walk<'a> {
    /// Flags are told of as they will be once refcounts are repaired.
    async fn over(file: Child<'a>, read: &Read, repair: Repair) -> Result<Self, IoError> {
        let mut walk = Self::references(file, read).await?;
        walk.refer(read.header.refcount_table)?;
        walk.blocks().await?;
        walk.compare().await?;
        walk.flags(read, repair != Repair::Nothing).await?;
        walk.report.image_end = walk.report.image_end.max(1) << walk.layout.cluster_bits;
        Ok(walk)
    }

    /// Counts what is referred to, but for what holds the refcounts.
    pub(super) async fn references(file: Child<'a>, read: &Read) -> Result<Self, IoError> {
        let layout = read.layout();
        let total = read.header.size.div_ceil(layout.cluster());
        let mut walk = Self {
            file,
            layout,
            end: file.size(),
            counts: Counts::default(),
            refcounts: Refcounts::of(file, read),
            report: CheckReport { total_clusters: total, ..CheckReport::default() },
            findings: Findings::default(),
            needs_new_refcounts: false,
            wrong_flags: 0,
            next: None,
        };
        walk.refer(ByteRange::whole(layout.cluster()))?;
        walk.refer(read.header.l1)?;
        let mut tables = BTreeMap::new();
        walk.tables(&read.l1, &mut tables)?;
        for (table, times) in tables {
            walk.table(table, times, true).await?;
        }
        walk.snapshots(read).await?;
        for extension in read.extensions.all.iter().filter(|extension| extension.kind == CRYPTO) {
            let field = Fields(&extension.data);
            match field.u64(0).ok().zip(field.u64(8).ok()).and_then(|(start, len)| ByteRange::new(start, len)) {
                Some(header) => walk.refer(header)?,
                None => walk.corrupt(1, || "the LUKS header has an impossible place".to_owned()),
            }
        }
        walk.bitmaps(read).await?;
        Ok(walk)
    }

    /// Something is wrong, `times` times.
    fn corrupt(&mut self, times: u64, what: impl FnOnce() -> String) {
        self.report.corruptions += times;
        if times > 0 {
            self.findings.add(FindingKind::Corruption, what);
        }
    }

    /// A reference leads out of the file.
    fn nowhere(&mut self, times: u64, start: u64, len: u64) {
        self.report.corruptions += times;
        self.findings.add(FindingKind::Nowhere, || {
            format!(
                "counting reference for region exceeding the end of the file by one cluster or more: offset {start:#x} size \
                 {len:#x}"
            )
        });
    }

    /// What would say more cannot be read.
    fn unreadable(&mut self, start: u64) {
        self.report.check_errors += 1;
        self.findings.add(FindingKind::Nowhere, || format!("I/O error in a table at offset {start:#x}"));
    }

    /// Counts a reference to every cluster that the range touches.
    fn refer(&mut self, range: ByteRange) -> Result<(), IoError> {
        self.refer_times(range, 1)
    }

    fn refer_times(&mut self, range: ByteRange, times: u64) -> Result<(), IoError> {
        if range.is_empty() {
            return Ok(());
        }
        let (bits, cluster) = (self.layout.cluster_bits, self.layout.cluster());
        // The last cluster need not be there in full.
        if range.end() >= self.end.saturating_add(cluster) {
            self.nowhere(times, range.start(), range.len());
            return Ok(());
        }
        for number in range.start() >> bits..=(range.end() - 1) >> bits {
            let beyond = self.counts.add(number, times, self.layout.max_refcount())?;
            self.corrupt(beyond, || format!("cluster {number} has more references than a refcount can say"));
        }
        Ok(())
    }

    fn refer_cluster(&mut self, start: u64, times: u64) -> Result<(), IoError> {
        match ByteRange::new(start, self.layout.cluster()) {
            Some(range) => self.refer_times(range, times),
            None => {
                self.nowhere(times, start, self.layout.cluster());
                Ok(())
            }
        }
    }

    /// A piece of a table; what the file has not got of it is zeroes, as readers see it. `None`: it cannot be read.
    async fn words(&mut self, at: ByteRange) -> Option<Vec<u64>> {
        let found = words(self.file, at).await.ok();
        if found.is_none() {
            self.unreadable(at.start());
        }
        found
    }

    /// The L2 tables behind an L1 table; `into` says how many such tables lead to each.
    fn tables(&mut self, l1: &[u64], into: &mut BTreeMap<u64, u64>) -> Result<(), IoError> {
        let mut seen = HashSet::new();
        for entry in l1.iter().filter(|entry| **entry != 0) {
            let reserved = u64::from(entry & !(OFFSET | COPIED) != 0);
            self.corrupt(reserved, || format!("found L1 entry with reserved bits set: {entry:x}"));
            let table = entry & OFFSET;
            if table == 0 {
                continue;
            }
            self.refer_cluster(table, 1)?;
            // Nobody makes a table that stands for two parts of a disk; following it each time could take days.
            if !is_aligned(table, self.layout.cluster()) {
                self.corrupt(1, || format!("l2_offset={table:x}: Table is not cluster aligned; L1 entry corrupted"));
                continue;
            }
            if !seen.insert(table) {
                self.corrupt(1, || format!("l2_offset={table:x}: Table stands for two parts of a disk"));
                continue;
            }
            *into.entry(table).or_default() += 1;
        }
        Ok(())
    }

    /// All behind an L2 table, as many times as something leads to it: snapshots share most of theirs.
    async fn table(&mut self, table: u64, times: u64, active: bool) -> Result<(), IoError> {
        let Some(at) = ByteRange::new(table, self.layout.cluster()) else { return Ok(()) };
        let Some(words) = self.words(at).await else { return Ok(()) };
        self.next = None;
        for entry in entries(&words, self.layout) {
            self.entry(entry, times, active)?;
        }
        Ok(())
    }

    fn entry(&mut self, entry: L2Entry, times: u64, active: bool) -> Result<(), IoError> {
        let layout = self.layout;
        if entry.word & COMPRESSED != 0 {
            let strange = entry.word & COPIED != 0 || entry.bitmap != 0 || layout.external;
            self.corrupt(times * u64::from(strange), || {
                let at = entry.word & !(COMPRESSED | COPIED);
                format!("coffset={at:#x}: copied flag must never be set for compressed clusters")
            });
            if active {
                self.report.allocated_clusters += 1;
                self.report.compressed_clusters += 1;
                // They are by their nature.
                self.report.fragmented_clusters += 1;
            }
            let Ok(Cluster::Compressed(packed)) = entry.parse(layout, 0) else { return Ok(()) };
            return match ByteRange::new(packed.start, packed.len) {
                Some(range) => self.refer_times(range, times),
                None => {
                    self.nowhere(times, packed.start, packed.len);
                    Ok(())
                }
            };
        }
        self.corrupt(times * u64::from(is_strange(entry, layout)), || {
            format!("found l2 entry with reserved bits set: {:x}", entry.word)
        });
        let offset = entry.word & OFFSET;
        if offset == 0 && !(layout.external && entry.word & COPIED != 0) {
            return Ok(());
        }
        if !is_aligned(offset, layout.cluster()) {
            self.corrupt(times, || {
                format!("offset={offset:x}: Data cluster is not properly aligned; L2 entry corrupted.")
            });
            return Ok(());
        }
        if active {
            self.report.allocated_clusters += 1;
            self.report.fragmented_clusters += u64::from(self.next.is_some_and(|next| next != offset));
            self.next = Some(offset + layout.cluster());
        }
        if layout.external { Ok(()) } else { self.refer_cluster(offset, times) }
    }

    async fn snapshots(&mut self, read: &Read) -> Result<(), IoError> {
        let mut tables = BTreeMap::new();
        for snapshot in &read.snapshots {
            self.refer(snapshot.l1)?;
            if let Some(l1) = self.words(snapshot.l1).await {
                self.tables(&l1, &mut tables)?;
            }
        }
        for (table, times) in tables {
            self.table(table, times, false).await?;
        }
        let len = read.snapshots.iter().map(|snapshot| snapshot.len).sum();
        match ByteRange::new(read.header.snapshots_offset, len) {
            Some(table) => self.refer(table),
            None => Ok(()),
        }
    }

    /// Bitmaps that the image does not vouch for are none.
    async fn bitmaps(&mut self, read: &Read) -> Result<(), IoError> {
        let Some(extension) = read.extensions.bitmaps.filter(|_| read.header.autoclear & BITMAPS != 0) else {
            return Ok(());
        };
        self.refer(extension.directory)?;
        let Ok(bytes) = part(self.file, extension.directory).await else {
            self.unreadable(extension.directory.start());
            return Ok(());
        };
        let Ok(entries) = directory::parse(&bytes, extension, self.layout, read.header.size) else {
            self.corrupt(1, || "the bitmap directory cannot be understood".to_owned());
            return Ok(());
        };
        let mut seen = HashSet::new();
        for entry in entries {
            self.refer(entry.table)?;
            if !seen.insert(entry.table.start()) {
                self.corrupt(1, || "two bitmaps have the same table".to_owned());
                continue;
            }
            for word in self.words(entry.table).await.unwrap_or_default() {
                match Part::parse(word, self.layout) {
                    None => self.corrupt(1, || format!("found bitmap table entry with reserved bits set: {word:x}")),
                    Some(Part::At(offset)) => self.refer_cluster(offset, 1)?,
                    Some(Part::Clean | Part::Dirty) => {}
                }
            }
        }
        Ok(())
    }

    /// The refcount blocks: each is where it can be, and belongs to the table alone.
    async fn blocks(&mut self) -> Result<(), IoError> {
        let table = self.refcounts.table.clone();
        for (index, entry) in table.iter().enumerate().filter(|(_, entry)| **entry != 0) {
            if !self.refcounts.is_possible(*entry) {
                let how = match is_aligned(*entry, self.layout.cluster()) {
                    true => "is outside image",
                    false => "is not cluster aligned; refcount table entry corrupted",
                };
                self.corrupt(1, || format!("refcount block {index} {how}"));
                self.needs_new_refcounts = true;
                continue;
            }
            self.refer_cluster(*entry, 1)?;
        }
        for (index, entry) in table.into_iter().enumerate() {
            if !self.refcounts.is_possible(entry) {
                continue;
            }
            // Something else lies there, too.
            let count = self.counts.get(entry >> self.layout.cluster_bits);
            if count != 1 {
                self.corrupt(1, || format!("refcount block {index} refcount={count}"));
                self.needs_new_refcounts = true;
            }
        }
        Ok(())
    }

    /// Refcounts against references.
    async fn compare(&mut self) -> Result<(), IoError> {
        let per_block = self.layout.block_entries();
        // What lies behind the end is nobody's concern.
        let known = self.end.div_ceil(self.layout.cluster()).max(self.counts.last().map_or(0, |last| last + 1));
        for index in 0..self.refcounts.table.len() as u64 {
            if self.refcounts.has(index) {
                for cluster in index * per_block..known.min((index + 1) * per_block) {
                    match self.refcounts.get(cluster).await {
                        Ok(count) => self.judge(cluster, count),
                        Err(_) => {
                            self.unreadable(self.refcounts.entry(index));
                            break;
                        }
                    }
                }
            }
        }
        // Those that no block knows of.
        let mut from = 0;
        while let Some(cluster) = self.counts.next(from) {
            let index = cluster / per_block;
            if self.refcounts.has(index) {
                from = (index + 1) * per_block;
            } else {
                self.judge(cluster, 0);
                from = cluster + 1;
            }
        }
        Ok(())
    }

    fn judge(&mut self, cluster: u64, count: u64) {
        let references = self.counts.get(cluster);
        if count > 0 || references > 0 {
            self.report.image_end = self.report.image_end.max(cluster + 1);
        }
        let what = || format!("cluster {cluster} refcount={count} reference={references}");
        if count > references {
            self.report.leaks += 1;
            self.findings.add(FindingKind::Leak, what);
        }
        if count < references {
            self.corrupt(1, what);
            self.needs_new_refcounts |= count == 0;
        }
    }

    /// Who says of a cluster that it is his alone, and whether it is. `by_references`: told of are those that are wrong by
    /// the references that there are, whatever the refcounts say.
    async fn flags(&mut self, read: &Read, by_references: bool) -> Result<(), IoError> {
        for (index, entry) in read.l1.iter().enumerate() {
            let table = entry & OFFSET;
            if table == 0 || !is_aligned(table, self.layout.cluster()) {
                continue;
            }
            let is_wrong = self.refcounts.alone(*entry).await? != *entry;
            let what = |count| format!("OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={count}");
            self.flag(*entry, is_wrong, by_references, what).await?;
            let Some(at) = ByteRange::new(table, self.layout.cluster()) else { continue };
            // What cannot be read has been counted.
            for entry in entries(&words(self.file, at).await.unwrap_or_default(), self.layout) {
                let right = self.refcounts.alone_entry(entry).await?;
                let what = |count| format!("OFLAG_COPIED data cluster: l2_entry={:x} refcount={count}", entry.word);
                self.flag(entry.word, right != entry, by_references, what).await?;
            }
        }
        self.report.corruptions += self.wrong_flags;
        Ok(())
    }

    /// A flag of an entry, which is wrong by the refcounts or not.
    async fn flag(
        &mut self,
        entry: u64,
        is_wrong: bool,
        by_references: bool,
        what: impl FnOnce(u64) -> String,
    ) -> Result<(), IoError> {
        self.wrong_flags += u64::from(is_wrong);
        let cluster = (entry & OFFSET) >> self.layout.cluster_bits;
        if by_references {
            let references = self.counts.get(cluster);
            let has_flag = entry & COMPRESSED == 0 && is_aligned(entry & OFFSET, self.layout.cluster());
            let counts = has_flag && entry & OFFSET != 0 && !self.layout.external;
            if counts && (entry & COPIED != 0) != (references == 1) {
                self.findings.add(FindingKind::Corruption, || what(references));
            }
        } else if is_wrong {
            let count = self.refcounts.get(cluster).await?;
            self.findings.add(FindingKind::Corruption, || what(count));
        }
        Ok(())
    }
}

/// Bits that no entry of a standard cluster has, or subclusters that are two things at once.
fn is_strange(entry: L2Entry, layout: Layout) -> bool {
    let zero = u64::from(!layout.extended);
    let reserved = entry.word & !(OFFSET | COPIED | COMPRESSED | zero) != 0;
    let (data, zeroes) = (entry.bitmap & u64::from(u32::MAX), entry.bitmap >> 32);
    let has_room = entry.word & OFFSET != 0 || (layout.external && entry.word & COPIED != 0);
    reserved || data & zeroes != 0 || (data != 0 && !has_room)
}

/// The entries of an L2 table, or of a part of one.
pub(super) fn entries(words: &[u64], layout: Layout) -> impl Iterator<Item = L2Entry> {
    words.chunks_exact(if layout.extended { 2 } else { 1 }).map(|words| match *words {
        [word, bitmap] => L2Entry { word, bitmap },
        [word] => L2Entry { word, bitmap: 0 },
        _ => L2Entry::default(),
    })
}

/// What the file has not got of it is zeroes.
pub(super) async fn words(file: Child<'_>, at: ByteRange) -> Result<Vec<u64>, IoError> {
    let mut bytes = if at.is_empty() { Vec::new() } else { part(file, at).await? };
    bytes.resize(usize::try_from(at.len()).map_err(|_| IoError::NoMemory)?, 0);
    Ok(bytes.chunks_exact(8).map(|word| u64::from_be_bytes(word.try_into().unwrap_or_default())).collect())
}
