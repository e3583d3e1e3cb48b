//! What queries say about an image: `ImageInfoSpecificQCow2` and what is common to images.

use serde_json::json;
use std::sync::atomic::Ordering::Acquire;

use super::header::{AT_INCOMPATIBLE, CORRUPT_BIT, Compression, DIRTY, EXTENDED_L2, LAZY_REFCOUNTS};
use super::{Image, Shape};
use crate::graph::DriverInfo;

impl Image {
    pub(super) fn described(&self, shape: &Shape) -> DriverInfo {
        let (header, extensions) = (&self.header, self.extensions());
        let compression = match self.compression {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        };
        let mut data = json!({ "compat": if header.version == 2 { "0.10" } else { "1.1" } });
        let mut put = |name: &str, value: serde_json::Value| {
            drop(data.as_object_mut().map(|data| data.insert(name.into(), value)))
        };
        put("compression-type", compression.into());
        if header.version >= 3 {
            put("lazy-refcounts", (header.compatible & LAZY_REFCOUNTS != 0).into());
        }
        put("refcount-bits", (1u64 << header.refcount_order).into());
        if header.version >= 3 {
            put(
                "corrupt",
                (self.header_word(AT_INCOMPATIBLE) & CORRUPT_BIT != 0 || self.is_corrupt.load(Acquire)).into(),
            );
            put("extended-l2", header.has(EXTENDED_L2).into());
        }
        let bitmaps = self.stored_bitmaps();
        if !bitmaps.is_empty() {
            put("bitmaps", bitmaps.into());
        }
        if self.data.is_some() {
            if let Some(name) = &extensions.data_file {
                put("data-file", name.as_str().into());
            }
            put("data-file-raw", self.raw_data.into());
        }
        if let Some(crypt) = &self.crypt {
            put("encrypt", crypt.described());
        }
        let specific = Some(json!({ "type": "qcow2", "data": data }));
        let backing = extensions.backing_file.clone();
        DriverInfo {
            driver: "qcow2",
            specific,
            encrypted: self.crypt.is_some(),
            cluster_size: Some(self.layout.cluster()),
            // Behind what the L1 table says of the disk.
            vm_state_offset: Some(self.layout.l1_entries(shape.size).saturating_mul(self.layout.l2_span())),
            dirty: Some(self.header_word(AT_INCOMPATIBLE) & DIRTY != 0),
            backing: backing.map(|name| (name, extensions.backing_format.clone())),
            ..DriverInfo::default()
        }
    }
}
