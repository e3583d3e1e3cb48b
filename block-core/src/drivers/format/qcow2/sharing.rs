//! What an L1 table leads to, and how many others lead there: references that are raised and let go, table by table, and
//! entries that say that what is behind them is theirs alone. Only while nobody else is inside, and nothing waits to be
//! written.

use super::Image;
use super::entry::{COPIED, CORRUPT, Cluster, Granules, L2Entry, table_of};
use super::meta::Run;
use super::tables::{fetch, put};
use crate::base::{Error, IoError, Result, ResultExt};
use crate::graph::{DebugEvent, IoCx};

/// References of an L1 table that are raised one after another, so that it is known which of them to let go.
#[derive(Default)]
pub(super) struct Raised {
    /// Clusters, in the order of the table.
    count: u64,
}

impl Image {
    /// One reference more for all that the entries lead to. `raised` says after an error how many have one.
    pub(super) async fn raise(&self, cx: IoCx<'_>, l1: &[u64], raised: &mut Raised) -> Result<()> {
        for entry in l1 {
            let clusters = self.led_to(cx, *entry, false).await.doing(|| "Could not read an L2 table")?;
            for cluster in clusters.iter().flat_map(|run| run.cluster..run.cluster + run.count) {
                if raised.count.is_multiple_of(STEPS) {
                    self.make_way(cx).await.doing(|| "Could not write refcounts")?;
                }
                self.raise_one(cx, cluster).await?;
                raised.count += 1;
            }
        }
        Ok(())
    }

    async fn raise_one(&self, cx: IoCx<'_>, cluster: u64) -> Result<()> {
        let layout = self.layout;
        loop {
            {
                let mut meta = self.meta();
                match meta.refs.get(layout, cluster) {
                    Some(0) => return Err(Error::new(format!("Cluster {cluster} is in use and has refcount 0"))),
                    Some(count) if count == layout.max_refcount() => {
                        let bits = 1u64 << layout.refcount_order;
                        let text =
                            format!("A cluster has {count} references already, and refcounts of {bits} bits end there");
                        return Err(Error::new(text));
                    }
                    Some(_) => {
                        meta.refs.raise(layout, cluster);
                        return Ok(());
                    }
                    None => {}
                }
            }
            let loaded = self.load_block(cx, cluster / layout.block_entries()).await;
            loaded.doing(|| format!("Could not read the refcount of cluster {cluster}"))?;
        }
    }

    /// Lets go what was raised for the entries.
    pub(super) async fn unraise(&self, cx: IoCx<'_>, l1: &[u64], raised: Raised) -> Result<(), IoError> {
        let mut left = raised.count;
        for entry in l1 {
            if left == 0 {
                break;
            }
            let runs = self.led_to(cx, *entry, false).await?;
            left -= self.free_all(cx, &runs, left).await?;
        }
        Ok(())
    }

    /// Nothing leads to the entries any more. What cannot be found out stays as it is: it leaks.
    pub(super) async fn let_go(&self, cx: IoCx<'_>, l1: &[u64], punch: bool) -> Result<(), IoError> {
        let mut result = Ok(());
        for entry in l1 {
            match self.led_to(cx, *entry, punch).await {
                Ok(runs) => drop(self.free_all(cx, &runs, u64::MAX).await?),
                Err(error) => result = Err(error),
            }
        }
        result
    }

    /// Sets the first `most` clusters free; gives how many there were.
    async fn free_all(&self, cx: IoCx<'_>, runs: &[Run], most: u64) -> Result<u64, IoError> {
        let mut freed = 0;
        for some in runs.chunks(AT_ONCE) {
            for run in some {
                let count = run.count.min(most - freed);
                if count > 0 {
                    self.meta().free(Run { count, ..*run });
                }
                freed += count;
            }
            self.make_way(cx).await?;
        }
        Ok(freed)
    }

    /// What waits to be written is kept within bounds.
    async fn make_way(&self, cx: IoCx<'_>) -> Result<(), IoError> {
        if self.meta().is_full(self.slices.capacity()) { self.commit(cx).await } else { Ok(()) }
    }

    /// The L2 table behind an entry, and all that it leads to.
    async fn led_to(&self, cx: IoCx<'_>, entry: u64, punch: bool) -> Result<Vec<Run>, IoError> {
        let layout = self.layout;
        let Some(table) = table_of(entry, layout)? else { return Ok(Vec::new()) };
        let bytes = self.l2_table(cx, table).await?;
        let mut runs = vec![Run { cluster: table >> layout.cluster_bits, count: 1, punch }];
        for entry in self.entries_of(&bytes) {
            runs.extend(self.runs_of(entry.parse(layout, 0)?, punch));
        }
        Ok(runs)
    }

    /// No entry of the active tables says any more that anything is its alone; that is stable.
    pub(super) async fn disown(&self, cx: IoCx<'_>) -> Result<(), IoError> {
        let l1 = {
            let mut meta = self.meta();
            meta.own_tables.clear();
            meta.l1.clone()
        };
        self.disown_behind(cx, &l1).await?;
        self.mark_l1(&vec![false; l1.len()]);
        self.commit(cx).await
    }

    /// No entry of the L2 tables behind these says so any more. In tables that are not active such entries mean nothing,
    /// and QEMU leaves some there.
    pub(super) async fn disown_behind(&self, cx: IoCx<'_>, l1: &[u64]) -> Result<(), IoError> {
        for (index, entry) in l1.iter().enumerate() {
            if let Some(table) = table_of(*entry, self.layout)? {
                let bytes = self.l2_table(cx, table).await?;
                let words = self.entries_of(&bytes).map(|entry| entry.word & !COPIED).collect();
                self.rewrite(cx, index, table, bytes, words).await?;
            }
        }
        Ok(())
    }

    /// The entries of the active tables say that what is behind them is theirs alone where it is, and nowhere else.
    /// Refcounts that were lowered are stable.
    pub(super) async fn mark_own(&self, cx: IoCx<'_>) -> Result<(), IoError> {
        let (l1, bits) = (self.meta().l1.clone(), self.layout.cluster_bits);
        let mut own = vec![false; l1.len()];
        for (index, entry) in l1.iter().enumerate() {
            let Some(table) = table_of(*entry, self.layout)? else { continue };
            // What is behind a table that is not alone is not alone either.
            own[index] = self.refcount(cx, table >> bits).await? == 1;
            if own[index] {
                let bytes = self.l2_table(cx, table).await?;
                let mut words = Vec::new();
                for entry in self.entries_of(&bytes) {
                    words.push(self.marked(cx, entry).await?);
                }
                self.rewrite(cx, index, table, bytes, words).await?;
            }
        }
        self.mark_l1(&own);
        self.commit(cx).await
    }

    async fn marked(&self, cx: IoCx<'_>, entry: L2Entry) -> Result<u64, IoError> {
        match entry.parse(self.layout, 0) {
            Ok(Cluster::Standard(Granules { host: Some(host), .. })) => {
                let own = self.refcount(cx, host >> self.layout.cluster_bits).await? == 1;
                Ok(if own { entry.word | COPIED } else { entry.word & !COPIED })
            }
            _ => Ok(entry.word),
        }
    }

    async fn refcount(&self, cx: IoCx<'_>, cluster: u64) -> Result<u64, IoError> {
        loop {
            let count = self.meta().refs.get(self.layout, cluster);
            match count {
                Some(count) => return Ok(count),
                None => self.load_block(cx, cluster / self.layout.block_entries()).await?,
            }
        }
    }

    fn mark_l1(&self, own: &[bool]) {
        let meta = &mut *self.meta();
        for (index, (entry, own)) in meta.l1.iter_mut().zip(own).enumerate() {
            let marked = if *own { *entry | COPIED } else { *entry & !COPIED };
            if std::mem::replace(entry, marked) != marked {
                meta.l1_dirty.insert(index);
            }
        }
    }

    async fn l2_table(&self, cx: IoCx<'_>, table: u64) -> Result<Vec<u8>, IoError> {
        let file = cx.child(self.file);
        file.announce(DebugEvent::L2Load).await;
        fetch(file, table, self.layout.cluster()).await
    }

    /// An L2 table gets other words for those that it has, in the file and, where it is active, in memory.
    async fn rewrite(
        &self,
        cx: IoCx<'_>,
        index: usize,
        table: u64,
        mut bytes: Vec<u8>,
        words: Vec<u64>,
    ) -> Result<(), IoError> {
        let layout = self.layout;
        let step = usize::try_from(layout.words() * 8).map_err(|_| CORRUPT)?;
        let mut changed = false;
        for (entry, word) in bytes.chunks_exact_mut(step).zip(words) {
            let word = word.to_be_bytes();
            changed |= entry[..8] != word;
            entry[..8].copy_from_slice(&word);
        }
        if !changed {
            return Ok(());
        }
        self.check_table(cx, table).await?;
        let file = cx.child(self.file);
        file.announce(DebugEvent::L2Update).await;
        put(file, table, &bytes).await?;
        let (slice, meta) = (usize::try_from(layout.slice_bytes()).map_err(|_| CORRUPT)?, self.meta());
        let active = meta.l1.get(index).copied().unwrap_or(0);
        if table_of(active, layout)? != Some(table) {
            return Ok(());
        }
        for (number, part) in (index as u64 * layout.slices()..).zip(bytes.chunks_exact(slice)) {
            self.slices.refresh(number, part);
        }
        Ok(())
    }

    fn entries_of<'b>(&self, bytes: &'b [u8]) -> impl Iterator<Item = L2Entry> + use<'b> {
        let step = if self.layout.extended { 16 } else { 8 };
        let word = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().unwrap_or_default());
        bytes.chunks_exact(step).map(move |entry| {
            let (first, second) = entry.split_at(8);
            L2Entry { word: word(first), bitmap: if second.is_empty() { 0 } else { word(second) } }
        })
    }
}

/// Clusters between two looks at how much waits to be written, and runs of them.
const STEPS: u64 = 1024;
const AT_ONCE: usize = 1024;
