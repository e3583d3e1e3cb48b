//! What the guest reads about the disk: feature bits and `struct virtio_blk_config` (virtio 1.3, 5.2.4).

use block_core::base::SECTOR;
use block_core::graph::Geometry;

use super::request::MAX_EXTENT_SECTORS;

/// Bytes of the whole structure, zoned part included.
pub(super) const CONFIG_LEN: usize = 96;
/// Where the writeback byte is: the only one that a driver may write.
pub(super) const WRITEBACK: usize = 32;
/// Data segments of a request that we announce. More are taken, up to what a chain may have.
const SEG_MAX: u32 = 126;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
/// VIRTIO_BLK_F_FLUSH.
pub(super) const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
/// VIRTIO_BLK_F_CONFIG_WCE.
pub(super) const F_CONFIG_WCE: u64 = 1 << 11;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;
/// VHOST_F_LOG_ALL.
pub(super) const F_LOG_ALL: u64 = 1 << 26;
/// VIRTIO_F_INDIRECT_DESC.
pub(super) const F_INDIRECT: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX.
pub(super) const F_EVENT_IDX: u64 = 1 << 29;
/// VHOST_USER_F_PROTOCOL_FEATURES; never shown to a guest.
pub(super) const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// VIRTIO_F_VERSION_1.
pub(super) const F_VERSION_1: u64 = 1 << 32;

/// The bits that a disk offers.
pub(super) fn features(writable: bool) -> u64 {
    let always = F_SEG_MAX
        | F_BLK_SIZE
        | F_FLUSH
        | F_TOPOLOGY
        | F_CONFIG_WCE
        | F_MQ
        | F_LOG_ALL
        | F_INDIRECT
        | F_EVENT_IDX
        | F_PROTOCOL_FEATURES
        | F_VERSION_1;
    always | if writable { F_DISCARD | F_WRITE_ZEROES } else { F_RO }
}

/// What the structure is made from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// The node below.
    pub(super) geometry: Geometry,
    /// Logical block size in bytes, a power of two, at least 512.
    pub(super) block: u32,
    pub(super) queues: u16,
    /// Writes may be volatile until they are flushed.
    pub(super) writeback: bool,
}

/// The whole structure; what is not offered is zero.
pub(super) fn config(shape: &Shape) -> [u8; CONFIG_LEN] {
    let (limits, block) = (&shape.geometry.limits, shape.block);
    let blocks_in = |bytes: u32| bytes / block;
    let physical = blocks_in(limits.physical_block).max(1);
    let discard_alignment = limits.discard_alignment.max(block) / 512;
    let mut config = [0; CONFIG_LEN];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &(shape.geometry.size / SECTOR).to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &block.to_le_bytes());
    put(24, &[physical.ilog2().to_le_bytes()[0]]);
    put(26, &u16::try_from(physical).unwrap_or(u16::MAX).to_le_bytes());
    put(28, &blocks_in(limits.optimal_transfer).to_le_bytes());
    put(WRITEBACK, &[u8::from(shape.writeback)]);
    put(34, &shape.queues.to_le_bytes());
    put(36, &MAX_EXTENT_SECTORS.to_le_bytes());
    put(40, &1u32.to_le_bytes());
    put(44, &discard_alignment.to_le_bytes());
    put(48, &MAX_EXTENT_SECTORS.to_le_bytes());
    put(52, &1u32.to_le_bytes());
    put(56, &[u8::from(limits.unmap_zeroes)]);
    config
}

#[cfg(test)]
mod tests {
    use super::*;
    use block_core::graph::Limits;

    fn sample(block: u32) -> [u8; CONFIG_LEN] {
        let limits = Limits { physical_block: 4096, optimal_transfer: 65536, unmap_zeroes: true, ..Limits::ANY };
        let geometry = Geometry { size: 64 << 20 | 511, limits };
        config(&Shape { geometry, block, queues: 2, writeback: true })
    }

    #[test]
    fn each_field_is_where_the_specification_says() {
        let config = sample(512);
        assert_eq!(config[..8], (131_072u64).to_le_bytes());
        assert_eq!(config[8..12], [0; 4], "size_max is not offered");
        assert_eq!(config[12..16], 126u32.to_le_bytes());
        assert_eq!(config[20..24], 512u32.to_le_bytes());
        assert_eq!(config[24..32], [3, 0, 8, 0, 128, 0, 0, 0]);
        assert_eq!(config[32..36], [1, 0, 2, 0]);
        assert_eq!(config[36..40], MAX_EXTENT_SECTORS.to_le_bytes());
        assert_eq!(config[56..60], [1, 0, 0, 0]);
        assert_eq!(config[60..], [0; 36], "neither secure erase nor zones");
    }

    #[test]
    fn a_block_larger_than_the_medium_s_has_no_exponent() {
        let config = sample(8192);
        assert_eq!(config[24..28], [0, 0, 1, 0]);
        assert_eq!(config[..8], (131_072u64).to_le_bytes(), "capacity counts 512-byte sectors, whatever the block");
    }

    #[test]
    fn nothing_is_offered_that_depends_on_something_that_is_not() {
        for writable in [false, true] {
            let bits = features(writable);
            assert!(bits & F_CONFIG_WCE == 0 || bits & F_FLUSH != 0);
            assert_eq!(bits & F_RO != 0, !writable);
            assert_eq!(bits & (F_DISCARD | F_WRITE_ZEROES) != 0, writable);
        }
    }
}
