//! Getting tables into memory, and making an L2 table that may be written. One task at a time works on a table; others
//! that need the same one wait for it.

use super::Image;
use super::entry::{COPIED, CORRUPT, L2Entry, table_of};
use super::meta::Run;
use super::refcounts::Block;
use crate::base::{ByteRange, IoError};
use crate::graph::{Child, DebugEvent, IoCx, WriteFlags};
use crate::rt::IoBuf;

/// Reads a piece of a table; all of it has to be there.
pub(super) async fn fetch(file: Child<'_>, start: u64, len: u64) -> Result<Vec<u8>, IoError> {
    let at = ByteRange::new(start, len).ok_or(CORRUPT)?;
    let buf = IoBuf::private(len)?;
    file.read(at, buf.clone()).await?;
    Ok(buf.to_vec())
}

/// Writes a piece of a table.
pub(super) async fn put(file: Child<'_>, start: u64, bytes: &[u8]) -> Result<(), IoError> {
    let at = ByteRange::new(start, bytes.len() as u64).ok_or(IoError::OutOfRange)?;
    let buf = IoBuf::private(at.len())?;
    buf.write_at(0, bytes);
    file.write(at, buf, WriteFlags::default()).await
}

impl Image {
    /// Sees to it that the slice is in memory. `false`: there is no table that it is part of.
    pub(super) async fn load(&self, cx: IoCx<'_>, slice: u64) -> Result<bool, IoError> {
        let layout = self.layout;
        let _turn = self.loads.at(cx, slice).await;
        loop {
            let entry = {
                let meta = self.meta();
                if self.slices.has(slice) {
                    return Ok(true);
                }
                meta.l1.get(layout.l1_index(slice)).copied().unwrap_or(0)
            };
            let Some(table) = table_of(entry, layout)? else { return Ok(false) };
            let file = cx.child(self.file);
            file.announce(DebugEvent::L2Load).await;
            let bytes = fetch(file, table + layout.slice_offset(slice), layout.slice_bytes()).await?;
            let is_in = {
                let meta = self.meta();
                // The table may have been copied to another place meanwhile, and this one used for something else.
                let is_same = meta.l1.get(layout.l1_index(slice)) == Some(&entry);
                is_same.then(|| {
                    self.slices.insert(slice, &bytes, |other| meta.dirty.contains(&other) || meta.busy.contains(&other))
                })
            };
            match is_in {
                Some(true) => return Ok(true),
                // All places that it could have are waiting to be written.
                Some(false) => self.commit(cx).await?,
                None => {}
            }
        }
    }

    /// The L2 entry of the cluster that a guest byte is in; one that says nothing where there is no table.
    pub(super) async fn entry(&self, cx: IoCx<'_>, byte: u64) -> Result<L2Entry, IoError> {
        let (slice, index) = (self.layout.slice_of(byte), self.layout.entry_of(byte));
        loop {
            let mut found = L2Entry::default();
            let looked = self.slices.look(slice, index, |entry| {
                found = entry;
                false
            });
            if looked.is_some() {
                return Ok(found);
            }
            if !self.load(cx, slice).await? {
                return Ok(L2Entry::default());
            }
        }
    }

    /// Changes the L2 entries of clusters that lie in one slice, whose table may be written. `old` are the clusters that
    /// they led to and do not lead to any more.
    pub(super) async fn link(&self, cx: IoCx<'_>, byte: u64, entries: &[L2Entry], old: &[Run]) -> Result<(), IoError> {
        let (slice, first) = (self.layout.slice_of(byte), self.layout.entry_of(byte));
        cx.child(self.file).announce(DebugEvent::L2Update).await;
        loop {
            {
                let mut meta = self.meta();
                if self.slices.has(slice) {
                    for (index, entry) in (first..).zip(entries) {
                        self.slices.set_entry(slice, index, *entry);
                    }
                    meta.dirty.insert(slice);
                    old.iter().for_each(|run| meta.free(*run));
                    return Ok(());
                }
            }
            if !self.load(cx, slice).await? {
                return Err(CORRUPT);
            }
        }
    }

    /// Sees to it that there is an L2 table for the byte, and that it is the active L1 table's alone.
    pub(super) async fn own_table(&self, cx: IoCx<'_>, byte: u64) -> Result<(), IoError> {
        let layout = self.layout;
        let index = layout.l1_index(layout.slice_of(byte));
        let entry = self.meta().l1.get(index).copied().ok_or(IoError::OutOfRange)?;
        if entry & COPIED != 0 && self.meta().own_tables.contains(&index) {
            return Ok(());
        }
        let _turn = self.tables.at(cx, index as u64).await;
        let entry = self.meta().l1.get(index).copied().ok_or(IoError::OutOfRange)?;
        let old = table_of(entry, layout)?;
        if let Some(old) = old {
            self.check_table(cx, old).await?;
        }
        if old.is_none() || entry & COPIED == 0 {
            self.new_table(cx, index, old).await?;
        }
        self.meta().own_tables.insert(index);
        Ok(())
    }

    /// Where an active L2 table is, nothing else is.
    pub(super) async fn check_table(&self, cx: IoCx<'_>, table: u64) -> Result<(), IoError> {
        let at = self.layout.around(table);
        let owner = self.meta().other_owner_of(at, "an active L2 table");
        match owner {
            Some(owner) => Err(self.corrupt(cx, &format!("an L2 table lies over {owner}"), at).await),
            None => Ok(()),
        }
    }

    /// A table in a cluster of its own: empty, or a copy. It is in the file before anything leads to it.
    async fn new_table(&self, cx: IoCx<'_>, index: usize, old: Option<u64>) -> Result<(), IoError> {
        let layout = self.layout;
        let run = self.take_table(cx, 1).await?;
        let at = run.cluster << layout.cluster_bits;
        let file = cx.child(self.file);
        let written = async {
            let bytes = match old {
                None => vec![0; usize::try_from(layout.cluster()).unwrap_or(0)],
                Some(old) => {
                    file.announce(DebugEvent::L2AllocCowRead).await;
                    fetch(file, old, layout.cluster()).await?
                }
            };
            file.announce(DebugEvent::L2AllocWrite).await;
            put(file, at, &bytes).await
        };
        if let Err(error) = written.await {
            self.meta().abandoned.push(run);
            return Err(error);
        }
        file.announce(DebugEvent::L1Update).await;
        let mut meta = self.meta();
        meta.l1[index] = at | COPIED;
        meta.l1_dirty.insert(index);
        if let Some(old) = old {
            meta.free(Run { cluster: old >> layout.cluster_bits, count: 1, punch: true });
        }
        Ok(())
    }

    /// Sees to it that the refcount block is in memory.
    pub(super) async fn load_block(&self, cx: IoCx<'_>, index: u64) -> Result<(), IoError> {
        let _turn = self.blocks.at(cx, index).await;
        let (offset, owner) = {
            let meta = self.meta();
            if meta.refs.blocks.contains_key(&index) {
                return Ok(());
            }
            let offset = meta.refs.block_at(index, self.layout)?.ok_or(CORRUPT)?;
            (offset, meta.other_owner_of(self.layout.around(offset), "a refcount block"))
        };
        if let Some(owner) = owner {
            let what = format!("a refcount block lies over {owner}");
            return Err(self.corrupt(cx, &what, self.layout.around(offset)).await);
        }
        let file = cx.child(self.file);
        file.announce(DebugEvent::RefblockLoad).await;
        let bytes = fetch(file, offset, self.layout.cluster()).await?;
        let mut meta = self.meta();
        if !meta.refs.blocks.contains_key(&index) {
            meta.refs.keep(index, Block::from_bytes(bytes));
        }
        Ok(())
    }
}
