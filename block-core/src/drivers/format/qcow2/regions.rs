//! Which host clusters are the image's own tables: guest data may not be written there, whatever an L2 entry says.
//!
//! The quick answer is a set of bits that any thread reads without a lock; clusters share bits where the file is very
//! large, so a bit that is set is a question for `Meta::owner_of`, which knows for certain.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// See the module's head.
pub(super) struct Regions {
    bits: Box<[AtomicU64]>,
}

/// Bits at the most: 16 MiB of them.
const MOST_BITS: u64 = 1 << 27;
const LEAST_BITS: u64 = 1 << 12;

impl Regions {
    /// For a file of so many clusters, which may become twice as many before clusters share bits.
    pub(super) fn new(clusters: u64) -> Self {
        let bits = clusters.saturating_mul(2).clamp(LEAST_BITS, MOST_BITS).next_power_of_two();
        Self { bits: (0..bits / 64).map(|_| AtomicU64::new(0)).collect() }
    }

    /// The cluster is a table's. It stays so: who is set free is not looked for again.
    pub(super) fn mark(&self, cluster: u64) {
        let (word, bit) = self.place(cluster);
        self.bits[word].fetch_or(bit, Relaxed);
    }

    /// The cluster may be a table's.
    #[inline]
    pub(super) fn may_own(&self, cluster: u64) -> bool {
        let (word, bit) = self.place(cluster);
        self.bits[word].load(Relaxed) & bit != 0
    }

    #[inline]
    fn place(&self, cluster: u64) -> (usize, u64) {
        ((cluster / 64 % self.bits.len() as u64) as usize, 1 << (cluster % 64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_marked_is_found_and_nothing_else_in_a_small_file() {
        let regions = Regions::new(2048);
        for cluster in [0, 1, 63, 64, 4095] {
            regions.mark(cluster);
        }
        let found: Vec<u64> = (0..4096).filter(|cluster| regions.may_own(*cluster)).collect();
        assert_eq!(found, [0, 1, 63, 64, 4095]);
        assert!(regions.may_own(4096), "they share a bit");
    }
}
