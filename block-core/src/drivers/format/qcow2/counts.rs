//! How many references each cluster of a file has: counters in pages that come into being with the first one.

use std::collections::BTreeMap;

use crate::base::IoError;

/// See the module's head.
#[derive(Default)]
pub(super) struct Counts(BTreeMap<u64, Box<[u32; PAGE]>>);

/// Counters in a page.
const PAGE: usize = 512;
/// Pages at the most: 1 GiB of memory, for 16 TiB of clusters of 64 KiB that are all in use.
const MAX_PAGES: usize = 512 << 10;

impl Counts {
    /// References to a cluster.
    pub(super) fn get(&self, cluster: u64) -> u64 {
        self.0.get(&(cluster / PAGE as u64)).map_or(0, |page| page[place(cluster)].into())
    }

    /// So many more; gives how many of them are beyond what can be counted, which is `most` at the most. Fails where there
    /// would be too many pages.
    pub(super) fn add(&mut self, cluster: u64, times: u64, most: u64) -> Result<u64, IoError> {
        let number = cluster / PAGE as u64;
        if self.0.len() >= MAX_PAGES && !self.0.contains_key(&number) {
            return Err(IoError::NoMemory);
        }
        let count = &mut self.0.entry(number).or_insert_with(|| Box::new([0; PAGE]))[place(cluster)];
        let wanted = u64::from(*count).saturating_add(times);
        let now = u32::try_from(wanted.min(most)).unwrap_or(u32::MAX).max(*count);
        *count = now;
        Ok(wanted - u64::from(now))
    }

    /// The last cluster that has any.
    pub(super) fn last(&self) -> Option<u64> {
        let (number, page) = self.0.last_key_value()?;
        let index = page.iter().rposition(|count| *count != 0)?;
        Some(number * PAGE as u64 + index as u64)
    }

    /// The first cluster from `from` on that has any.
    pub(super) fn next(&self, from: u64) -> Option<u64> {
        self.0.range(from / PAGE as u64..).find_map(|(number, page)| {
            let base = number * PAGE as u64;
            let used = |index: &usize| page[*index] != 0 && base + *index as u64 >= from;
            (0..PAGE).find(used).map(|index| base + index as u64)
        })
    }
}

fn place(cluster: u64) -> usize {
    usize::try_from(cluster % PAGE as u64).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_are_counted_wherever_they_are() {
        let mut counts = Counts::default();
        assert_eq!((counts.last(), counts.next(0)), (None, None));
        let far = 1 << 47;
        for cluster in [0, 511, 512, 512, far, far, far] {
            assert_eq!(counts.add(cluster, 1, 3), Ok(0));
        }
        assert_eq!(counts.add(far, 1, 3), Ok(1), "a refcount of two bits says no more");
        assert_eq!((counts.add(far + 512, 5, 3), counts.get(far + 512)), (Ok(2), 3));
        assert_eq!((counts.add(far, 2, u64::MAX), counts.get(far)), (Ok(0), 5));
        counts.0.remove(&((far + 512) / PAGE as u64));
        assert_eq!([0, 1, 511, 512, far].map(|cluster| counts.get(cluster)), [1, 0, 1, 2, 5]);
        assert_eq!([0, 1, 512, 513, far].map(|from| counts.next(from)), [0, 511, 512, far, far].map(Some));
        assert_eq!((counts.next(far + 1), counts.last()), (None, Some(far)));
    }
}
