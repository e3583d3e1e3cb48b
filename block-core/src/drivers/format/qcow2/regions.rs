//! Which host clusters are the image's own tables: guest data may not be written there, whatever an L2 entry says.
//!
//! The quick answer is a set of bits that any thread reads without a lock, one for each cluster; a bit that is set is a
//! question for `Meta::owner_of`, which knows whose the cluster is.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// See the module's head. A tree, of which only the branches are there that have a bit set.
pub(super) struct Regions {
    root: Box<[OnceLock<Branch>]>,
    /// Bytes that may still be taken for branches and leaves.
    left: AtomicU64,
    /// There was no memory for a mark: every cluster is asked about.
    is_full: AtomicBool,
}

type Branch = Box<[OnceLock<Leaf>]>;
type Leaf = Box<[AtomicU64]>;

/// Entries of the root, entries of a branch, and bits of a leaf: all the same.
const FAN: u64 = 1 << 12;
/// Clusters behind these are asked about every time.
const CLUSTERS: u64 = FAN * FAN * FAN;
/// Bytes for marks. An image that QEMU or we have made takes a fraction of them; one whose tables lie as far apart as can be
/// would take gigabytes.
const MAX_MARKS: u64 = 64 << 20;

fn empty<T>() -> Box<[OnceLock<T>]> {
    (0..FAN).map(|_| OnceLock::new()).collect()
}

impl Regions {
    /// Nothing is a table's.
    pub(super) fn new() -> Self {
        Self { root: empty(), left: AtomicU64::new(MAX_MARKS), is_full: AtomicBool::new(false) }
    }

    /// The cluster is a table's.
    pub(super) fn mark(&self, cluster: u64) {
        if cluster < CLUSTERS && self.try_mark(cluster).is_none() {
            self.is_full.store(true, Relaxed);
        }
    }

    /// `None`: there is no memory for it.
    fn try_mark(&self, cluster: u64) -> Option<()> {
        let branch = &self.root[place(cluster / FAN / FAN)];
        if branch.get().is_none() {
            self.take(FAN * size_of::<OnceLock<Leaf>>() as u64)?;
        }
        let leaf = &branch.get_or_init(empty)[place(cluster / FAN % FAN)];
        if leaf.get().is_none() {
            self.take(FAN / 8)?;
        }
        let words = leaf.get_or_init(|| (0..FAN / 64).map(|_| AtomicU64::new(0)).collect());
        words[place(cluster % FAN / 64)].fetch_or(1 << (cluster % 64), Relaxed);
        Some(())
    }

    fn take(&self, bytes: u64) -> Option<()> {
        self.left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(bytes)).ok().map(drop)
    }

    /// The cluster is free: it was a table's, or it was not.
    pub(super) fn unmark(&self, cluster: u64) {
        if let Some(word) = self.word(cluster) {
            word.fetch_and(!(1 << (cluster % 64)), Relaxed);
        }
    }

    /// The cluster may be a table's.
    #[inline]
    pub(super) fn may_own(&self, cluster: u64) -> bool {
        cluster >= CLUSTERS
            || self.is_full.load(Relaxed)
            || self.word(cluster).is_some_and(|word| word.load(Relaxed) & (1 << (cluster % 64)) != 0)
    }

    #[inline]
    fn word(&self, cluster: u64) -> Option<&AtomicU64> {
        let branch = self.root.get(place(cluster / FAN / FAN))?.get()?;
        branch[place(cluster / FAN % FAN)].get()?.get(place(cluster % FAN / 64))
    }
}

#[inline]
fn place(index: u64) -> usize {
    usize::try_from(index).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_marked_is_found_and_nothing_else() {
        let regions = Regions::new();
        let marked = [0, 1, 63, 64, 4095, 4096, FAN * FAN, CLUSTERS - 1];
        marked.into_iter().for_each(|cluster| regions.mark(cluster));
        let asked = (0..10_000).chain(FAN * FAN - 2..FAN * FAN + 5000).chain(CLUSTERS - 100..CLUSTERS);
        let found: Vec<u64> = asked.filter(|cluster| regions.may_own(*cluster)).collect();
        assert_eq!(found, marked);
        regions.unmark(64);
        assert!(!regions.may_own(64) && regions.may_own(63));
        regions.mark(u64::MAX);
        assert!(regions.may_own(CLUSTERS) && regions.may_own(u64::MAX), "these are asked about");
    }

    #[test]
    fn marks_that_lie_far_apart_take_no_more_than_is_allowed() {
        let regions = Regions::new();
        (0..FAN).for_each(|branch| regions.mark(branch * FAN * FAN + 7));
        assert!(
            regions.is_full.load(Relaxed) && regions.may_own(7) && regions.may_own(8),
            "every cluster is asked about"
        );
    }
}
