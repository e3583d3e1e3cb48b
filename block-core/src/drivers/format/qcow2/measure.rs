//! How large the file of an image will be, before there is one.

use super::create::{CreateOptions, layout};
use crate::base::{Error, Result};
use crate::graph::Preallocation;

/// Bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    /// With the data that there is.
    pub required: u64,
    /// With all of the disk.
    pub fully_allocated: u64,
}

/// What an image with `options` takes, if `data` bytes of its clusters will hold data, and `keys` bytes are its LUKS header;
/// 0: it is not encrypted. Its tables are counted in full, as QEMU counts them.
pub fn measure(options: &CreateOptions, data: u64, keys: u64) -> Result<Measured> {
    let layout = layout(options, options.data_file.is_some())?;
    let cluster = layout.cluster();
    let too_large = || Error::new("The image size is too large (try using a larger cluster size)");
    let size = options.size.checked_next_multiple_of(cluster).ok_or_else(too_large)?;
    let l2 = (size / cluster).div_ceil(layout.l2_entries());
    let l1 = (l2 * 8).div_ceil(cluster);
    if l2 * 8 > super::header::MAX_L1 || i64::try_from(size).is_err() {
        return Err(too_large());
    }
    let others = 1 + l1 + l2;
    let (mut blocks, mut table) = (0, 0);
    loop {
        let all = size / cluster + others + blocks + table;
        let next = all.div_ceil(layout.block_entries());
        let next_table = (next * 8).div_ceil(cluster);
        if (next, next_table) == (blocks, table) {
            break;
        }
        (blocks, table) = (next, next_table);
    }
    // As QEMU does it, the refcounts of the keys are not counted.
    let tables = (others + blocks + table) * cluster + keys.next_multiple_of(cluster);
    let data = match options.preallocation {
        Preallocation::Off | Preallocation::Metadata => data,
        Preallocation::Falloc | Preallocation::Full => size,
    };
    Ok(Measured { required: tables + data, fully_allocated: tables + size })
}

/// Bytes that bitmaps take in an image with clusters of `cluster` bytes, all their marks stored: their names' lengths, and
/// how many marks they have.
pub fn measure_bitmaps(bitmaps: &[(u64, u64)], cluster: u64) -> u64 {
    let marks = |count: u64| {
        let clusters = count.div_ceil(8).div_ceil(cluster);
        clusters * cluster + (clusters * 8).next_multiple_of(cluster)
    };
    let directory: u64 = bitmaps.iter().map(|(name, _)| (24 + name).next_multiple_of(8)).sum();
    bitmaps.iter().map(|(_, count)| marks(*count)).sum::<u64>() + directory.next_multiple_of(cluster)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measures_are_those_of_qemu_img() {
        for (size, required, all) in
            [(0, 196_608, 196_608), (1 << 30, 393_216, 1_074_135_040), (1 << 40, 168_034_304, 1_099_679_662_080)]
        {
            let measured = measure(&CreateOptions::of(size), 0, 0).unwrap();
            assert_eq!(measured, Measured { required, fully_allocated: all });
        }
        let small = CreateOptions { cluster_size: 4096, ..CreateOptions::of(1 << 30) };
        assert_eq!(measure(&small, 0, 0).unwrap(), Measured { required: 2_637_824, fully_allocated: 1_076_379_648 });
        let narrow = CreateOptions { refcount_bits: 1, ..CreateOptions::of(1 << 40) };
        assert_eq!(measure(&narrow, 0, 0).unwrap().required, 136_577_024);
        let sub = CreateOptions { extended_l2: true, ..CreateOptions::of(1 << 40) };
        assert_eq!(measure(&sub, 0, 0).unwrap().required, 302_252_032);
        measure(&CreateOptions::of(8191 << 50), 0, 0).unwrap_err();
        // With keys for aes-256: they take whole clusters.
        assert_eq!(measure(&CreateOptions::of(1 << 30), 0, 2_068_480).unwrap().required, 2_490_368);
        assert_eq!(measure_bitmaps(&[], 65536), 0);
        assert_eq!(measure_bitmaps(&[(2, 64)], 65536), 3 * 65536);
    }
}
