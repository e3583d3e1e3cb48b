//! What operators write about a qcow2 node, and what it comes to.

use std::time::Duration;

use qmp::Qapi;

use super::crypt::Qcow2Encryption;
use super::layout::Layout;
use crate::base::{Error, Result};
use crate::graph::{DiscardMode, NodeOptions, SnapshotName};

/// A qcow2 image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockdevOptionsQcow2")]
pub struct Qcow2Options {
    /// Refcounts may be written late, with the image marked dirty meanwhile: flushes write less, and an image that was not
    /// closed is repaired when it is opened. As the image says if absent. Needs version 3.
    pub lazy_refcounts: Option<bool>,
    /// Whether the file is told of what the guest discards; true if absent and `discard` is `unmap`.
    pub pass_discard_request: Option<bool>,
    /// Whether the file is told of what a deleted snapshot leaves. True if absent.
    pub pass_discard_snapshot: Option<bool>,
    /// Whether the file is told of other clusters that are set free. False if absent.
    pub pass_discard_other: Option<bool>,
    /// Discarded clusters keep their place in the file, so that they are not scattered by use. Needs version 3. False if
    /// absent.
    pub discard_no_unref: Option<bool>,
    /// Over which of the image's own tables nothing else may be written. `cached` if absent.
    pub overlap_check: Option<OverlapChecks>,
    /// Bytes for both caches of tables together.
    pub cache_size: Option<i64>,
    /// Bytes for the cache of L2 tables; without it as many as the image has, at most 32 MiB.
    pub l2_cache_size: Option<i64>,
    /// Bytes of an L2 table that are cached together: a power of two from 512 to the size of a cluster. Without it 4096,
    /// or a cluster where that is less.
    pub l2_cache_entry_size: Option<i64>,
    /// Bytes for the cache of refcount blocks; without it 256 KiB, and room for 4 blocks at least.
    pub refcount_cache_size: Option<i64>,
    /// Seconds after which tables that were not used meanwhile are forgotten; 0: never, 600 if absent.
    pub cache_clean_interval: Option<i64>,
    /// What opens an encrypted image.
    pub encrypt: Option<Qcow2Encryption>,
    /// The node shows this internal snapshot instead of the disk, and can only be read. For programs: operators cannot ask for
    /// it, as they cannot with QEMU.
    #[qapi(skip)]
    pub snapshot: Option<SnapshotName>,
    /// Nothing is asked for that opens an encrypted image: what it says of itself can be read, and nothing else. For programs,
    /// like the last one.
    #[qapi(skip)]
    pub locked: bool,
}

/// Which tables are watched.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(alternate, name = "Qcow2OverlapChecks")]
pub enum OverlapChecks {
    /// One by one.
    Flags(OverlapFlags),
    /// All that cost no more than this.
    Mode(OverlapMode),
}

/// Tables by what it costs to watch them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "Qcow2OverlapCheckMode")]
pub enum OverlapMode {
    /// Nothing is watched.
    None,
    /// What stays in its place: the header, the active L1 table, the refcount table, the snapshot table, the bitmap
    /// directory.
    Constant,
    /// Also the active L2 tables, the refcount blocks and the snapshots' L1 tables.
    Cached,
    /// Also the snapshots' L2 tables.
    All,
}

/// Which tables are watched, one by one; what is absent is as in the template.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
#[qapi(name = "Qcow2OverlapCheckFlags")]
pub struct OverlapFlags {
    /// Where the others come from; `cached` if absent.
    pub template: Option<OverlapMode>,
    /// The header.
    pub main_header: Option<bool>,
    /// The active L1 table.
    pub active_l1: Option<bool>,
    /// The active L2 tables.
    pub active_l2: Option<bool>,
    /// The refcount table.
    pub refcount_table: Option<bool>,
    /// The refcount blocks.
    pub refcount_block: Option<bool>,
    /// The snapshot table.
    pub snapshot_table: Option<bool>,
    /// The snapshots' L1 tables.
    pub inactive_l1: Option<bool>,
    /// The snapshots' L2 tables.
    pub inactive_l2: Option<bool>,
    /// The bitmap directory.
    pub bitmap_directory: Option<bool>,
}

/// What is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Checks {
    pub(super) header: bool,
    pub(super) l1: bool,
    pub(super) l2: bool,
    pub(super) refcount_table: bool,
    pub(super) refcount_block: bool,
    pub(super) snapshot_table: bool,
    pub(super) inactive_l1: bool,
    pub(super) inactive_l2: bool,
    pub(super) bitmaps: bool,
}

/// What becomes of what is not needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Discards {
    /// The file is told of what the guest discards.
    pub(super) request: bool,
    /// And of what a snapshot leaves.
    pub(super) snapshot: bool,
    /// And of other things.
    pub(super) other: bool,
    /// Discarded clusters keep their place.
    pub(super) no_unref: bool,
}

/// How large the caches are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Caches {
    /// In slices.
    pub(super) slices: usize,
    /// In blocks.
    pub(super) blocks: usize,
}

impl Qcow2Options {
    /// Checked against the image.
    pub(super) fn discards(&self, version: u8, common: NodeOptions) -> Result<Discards> {
        if version < 3 && self.lazy_refcounts == Some(true) {
            return Err(Error::new("Lazy refcounts require a qcow2 image of version 3"));
        }
        let no_unref = self.discard_no_unref.unwrap_or(false);
        if version < 3 && no_unref {
            return Err(Error::new("'discard-no-unref' requires a qcow2 image of version 3"));
        }
        let request = self.pass_discard_request.unwrap_or(common.discard == DiscardMode::Unmap);
        let snapshot = self.pass_discard_snapshot.unwrap_or(true);
        Ok(Discards { request, snapshot, other: self.pass_discard_other.unwrap_or(false), no_unref })
    }

    pub(super) fn checks(&self) -> Checks {
        let flags = match &self.overlap_check {
            None => OverlapFlags::default(),
            Some(OverlapChecks::Mode(mode)) => OverlapFlags { template: Some(*mode), ..OverlapFlags::default() },
            Some(OverlapChecks::Flags(flags)) => flags.clone(),
        };
        let template = flags.template.unwrap_or(OverlapMode::Cached);
        let constant = template != OverlapMode::None;
        let cached = constant && template != OverlapMode::Constant;
        Checks {
            header: flags.main_header.unwrap_or(constant),
            l1: flags.active_l1.unwrap_or(constant),
            l2: flags.active_l2.unwrap_or(cached),
            refcount_table: flags.refcount_table.unwrap_or(constant),
            refcount_block: flags.refcount_block.unwrap_or(cached),
            snapshot_table: flags.snapshot_table.unwrap_or(constant),
            inactive_l1: flags.inactive_l1.unwrap_or(cached),
            inactive_l2: flags.inactive_l2.unwrap_or(template == OverlapMode::All),
            bitmaps: flags.bitmap_directory.unwrap_or(constant),
        }
    }

    /// Entries of an L2 table that are cached together.
    pub(super) fn slice_entries(&self, layout: Layout) -> Result<u64> {
        let bytes = match self.l2_cache_entry_size {
            None => layout.cluster().min(4096),
            Some(bytes) => {
                let known = u64::try_from(bytes).ok().filter(|bytes| bytes.is_power_of_two());
                let known = known.filter(|bytes| (512..=layout.cluster()).contains(bytes));
                known.ok_or_else(|| {
                    let cluster = layout.cluster();
                    Error::new(format!("'l2-cache-entry-size' must be a power of two between 512 and {cluster}"))
                })?
            }
        };
        Ok(bytes / 8 / layout.words())
    }

    /// How often unused tables are forgotten, if at all.
    pub(super) fn clean_interval(&self) -> Result<Option<Duration>> {
        let seconds = u32::try_from(self.cache_clean_interval.unwrap_or(CLEAN_INTERVAL));
        let seconds = seconds.map_err(|_| {
            Error::new(format!("Parameter 'cache-clean-interval' expects a number of seconds from 0 to {}", u32::MAX))
        })?;
        Ok((seconds > 0).then(|| Duration::from_secs(seconds.into())))
    }

    /// For a disk of `size` bytes.
    pub(super) fn caches(&self, layout: Layout, size: u64) -> Result<Caches> {
        let (total, l2) = (bytes("cache-size", self.cache_size)?, bytes("l2-cache-size", self.l2_cache_size)?);
        let blocks = bytes("refcount-cache-size", self.refcount_cache_size)?;
        if total.is_some() && l2.is_some() && blocks.is_some() {
            return Err(Error::new("'cache-size', 'l2-cache-size' and 'refcount-cache-size' may not all be given"));
        }
        if let Some(total) = total {
            let (part, name) = match l2 {
                Some(_) => (l2, "l2-cache-size"),
                None => (blocks, "refcount-cache-size"),
            };
            if part.is_some_and(|part| part > total) {
                return Err(Error::new(format!("'{name}' may not exceed 'cache-size'")));
            }
        }
        let least = 4 * layout.cluster();
        let blocks = match (blocks, total, l2) {
            (Some(blocks), ..) => blocks,
            (None, Some(total), Some(l2)) => total - l2,
            _ => REFCOUNT_CACHE,
        };
        let needed = size.div_ceil(layout.slice_span()).saturating_mul(layout.slice_bytes());
        let l2 = match (l2, total) {
            (Some(l2), _) => l2,
            (None, Some(total)) => total.saturating_sub(blocks.max(least)),
            (None, None) => needed.min(L2_CACHE),
        };
        let slices = l2.min(needed).min(MAX_CACHE) / layout.slice_bytes();
        let blocks = blocks.max(least).min(MAX_CACHE) / layout.cluster();
        let count = |number| usize::try_from(number).unwrap_or(usize::MAX);
        Ok(Caches { slices: count(slices).max(8), blocks: count(blocks) })
    }

    /// What cannot change while the image is open.
    pub(super) fn is_same_but_for_discards(&self, other: &Self) -> bool {
        let fixed = |options: &Self| Self {
            lazy_refcounts: None,
            pass_discard_request: None,
            pass_discard_snapshot: None,
            pass_discard_other: None,
            discard_no_unref: None,
            ..options.clone()
        };
        fixed(self) == fixed(other)
    }
}

fn bytes(name: &str, value: Option<i64>) -> Result<Option<u64>> {
    let parsed = value.map(u64::try_from).transpose();
    parsed.map_err(|_| Error::new(format!("Parameter '{name}' expects a value that is not negative")))
}

/// Of seconds, where nothing else is said.
const CLEAN_INTERVAL: i64 = 600;
/// Of bytes, where nothing else is said.
const L2_CACHE: u64 = 32 << 20;
const REFCOUNT_CACHE: u64 = 256 << 10;
/// What no cache is larger than.
const MAX_CACHE: u64 = 4 << 30;

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: Layout = Layout {
        cluster_bits: 16,
        refcount_order: 4,
        extended: false,
        version: 3,
        external: false,
        slice_entries: 512,
    };

    #[test]
    fn caches_are_as_large_as_they_are_said_to_be() {
        let size = 1 << 40;
        let caches = |options: Qcow2Options| options.caches(LAYOUT, size).unwrap();
        let none = Qcow2Options::default();
        assert_eq!(caches(none.clone()), Caches { slices: 8192, blocks: 4 });
        assert_eq!(none.caches(LAYOUT, 64 << 20).unwrap().slices, 8, "no more than the image has");
        assert_eq!(caches(Qcow2Options { l2_cache_size: Some(1 << 20), ..none.clone() }).slices, 256);
        let total = Qcow2Options { cache_size: Some(2 << 20), ..none.clone() };
        assert_eq!(caches(total.clone()), Caches { slices: (2048 - 256) / 4, blocks: 4 });
        let both = Qcow2Options { l2_cache_size: Some(1 << 20), ..total };
        assert_eq!(caches(both.clone()), Caches { slices: 256, blocks: 16 });
        for bad in [
            Qcow2Options { refcount_cache_size: Some(1), ..both.clone() },
            Qcow2Options { l2_cache_size: Some(3 << 20), ..both },
            Qcow2Options { l2_cache_size: Some(-1), ..none.clone() },
        ] {
            bad.caches(LAYOUT, size).unwrap_err();
        }
        let interval = |seconds| Qcow2Options { cache_clean_interval: seconds, ..none.clone() }.clean_interval();
        assert_eq!(interval(None).unwrap(), Some(Duration::from_secs(600)));
        assert_eq!(interval(Some(0)).unwrap(), None);
        assert!(interval(Some(-1)).is_err() && interval(Some(1 << 32)).is_err());
        for (bytes, entries) in
            [(512, Some(64)), (65536, Some(8192)), (256, None), (131_072, None), (768, None), (-8, None)]
        {
            let options = Qcow2Options { l2_cache_entry_size: Some(bytes), ..none.clone() };
            assert_eq!(options.slice_entries(LAYOUT).ok(), entries);
        }
    }

    #[test]
    fn what_is_watched_is_said_in_two_ways() {
        let checks =
            |check: OverlapChecks| Qcow2Options { overlap_check: Some(check), ..Qcow2Options::default() }.checks();
        let cached = Qcow2Options::default().checks();
        assert_eq!(checks(OverlapChecks::Mode(OverlapMode::Cached)), cached);
        let constant = checks(OverlapChecks::Mode(OverlapMode::Constant));
        assert_eq!(constant, Checks { l2: false, refcount_block: false, inactive_l1: false, ..cached });
        let flags =
            OverlapFlags { template: Some(OverlapMode::None), main_header: Some(true), ..OverlapFlags::default() };
        let header = checks(OverlapChecks::Flags(flags));
        assert!(header.header && !header.l1 && !header.bitmaps);
        let all = checks(OverlapChecks::Mode(OverlapMode::All));
        assert_eq!(all, Checks { inactive_l2: true, ..cached });
    }
}
