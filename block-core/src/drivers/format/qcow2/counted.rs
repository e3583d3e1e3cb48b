//! The refcounts of an image as a check has them: from the file, a block at a time, with some of them kept.

use std::collections::HashMap;

use super::entry::{COMPRESSED, COPIED, L2Entry, OFFSET};
use super::layout::Layout;
use super::open::{Read, part};
use super::refcounts::Block;
use crate::base::{IoError, is_aligned};
use crate::graph::Child;

/// The refcounts as the file has them.
pub(super) struct Refcounts<'a> {
    pub(super) file: Child<'a>,
    pub(super) layout: Layout,
    pub(super) table: Vec<u64>,
    /// Of the file, in bytes.
    end: u64,
    blocks: HashMap<u64, Block>,
}

/// Bytes of blocks that are kept in memory.
const BLOCKS: u64 = 16 << 20;

impl<'a> Refcounts<'a> {
    pub(super) fn of(file: Child<'a>, read: &Read) -> Self {
        let table = read.refcount_table.clone();
        Self { file, layout: read.layout(), table, end: file.size(), blocks: HashMap::new() }
    }

    /// A block can be there.
    pub(super) fn is_possible(&self, entry: u64) -> bool {
        entry != 0 && is_aligned(entry, self.layout.cluster()) && entry < self.end
    }

    pub(super) fn entry(&self, index: u64) -> u64 {
        usize::try_from(index).ok().and_then(|index| self.table.get(index)).copied().unwrap_or(0)
    }

    pub(super) fn has(&self, index: u64) -> bool {
        self.is_possible(self.entry(index))
    }

    /// Of a cluster; where there is no block, or none that can be, 0.
    pub(super) async fn get(&mut self, cluster: u64) -> Result<u64, IoError> {
        let (layout, index) = (self.layout, cluster / self.layout.block_entries());
        if !self.has(index) {
            return Ok(0);
        }
        if !self.blocks.contains_key(&index) {
            let block = self.load(index).await?;
            if self.blocks.len() as u64 >= (BLOCKS / layout.cluster()).max(4) {
                self.blocks.clear();
            }
            self.blocks.insert(index, block);
        }
        Ok(self.blocks.get(&index).map_or(0, |block| block.get(layout, cluster % layout.block_entries())))
    }

    pub(super) async fn load(&self, index: u64) -> Result<Block, IoError> {
        let at = self.layout.around(self.entry(index));
        let mut bytes = part(self.file, at).await?;
        bytes.resize(usize::try_from(self.layout.cluster()).map_err(|_| IoError::NoMemory)?, 0);
        Ok(Block::from_bytes(bytes))
    }

    /// An L1 entry, or the word of an L2 entry, with the flag as it should be.
    pub(super) async fn alone(&mut self, word: u64) -> Result<u64, IoError> {
        let count = self.get((word & OFFSET) >> self.layout.cluster_bits).await?;
        Ok(if count == 1 { word | COPIED } else { word & !COPIED })
    }

    /// The same for an L2 entry: clusters in another file, and compressed ones, are nobody's alone.
    pub(super) async fn alone_entry(&mut self, entry: L2Entry) -> Result<L2Entry, IoError> {
        let offset = entry.word & OFFSET;
        let counts = offset != 0 && is_aligned(offset, self.layout.cluster());
        if entry.word & COMPRESSED != 0 || self.layout.external || !counts {
            return Ok(entry);
        }
        Ok(L2Entry { word: self.alone(entry.word).await?, ..entry })
    }
}
