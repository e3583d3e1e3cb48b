//! Doors for the fuzzer (`fuzz/`), there with `--cfg fuzzing` only: each parser of this room, with what has to be true of what
//! it lets through.

use super::compression::{pack, unpack};
use super::directory;
use super::entry::{Cluster, Granules, L2Entry, table_of};
use super::extensions::{Bitmaps, Extensions};
use super::header::{Compression, Header, MAX_HOST, MAX_L1, MAX_REFCOUNT_TABLE, MAX_SNAPSHOTS};
use super::layout::Layout;
use super::snapshots;
use crate::base::ByteRange;

/// The first cluster of an image.
pub fn header(bytes: &[u8]) {
    let Ok(header) = Header::parse(bytes.get(..512).unwrap_or(bytes)) else { return };
    assert!(header.l1.len() <= MAX_L1 && header.l1.end() <= MAX_HOST);
    assert!(header.refcount_table.len() <= MAX_REFCOUNT_TABLE && header.refcount_table.end() <= MAX_HOST);
    assert!((9..=21).contains(&header.cluster_bits) && header.refcount_order <= 6);
    let cluster = bytes.get(..1 << header.cluster_bits).unwrap_or(bytes);
    let Ok(extensions) = Extensions::parse(&header, cluster) else { return };
    let _ = extensions.name_of(header.unknown_features() | 1 << 63);
    let len: usize = extensions.all.iter().map(|extension| extension.data.len() + 8).sum();
    assert!(len <= cluster.len());
}

/// The table of snapshots of an image with clusters of 64 KiB; the first byte says how many there are.
pub fn snapshots(bytes: &[u8]) {
    let Some((count, table)) = bytes.split_first() else { return };
    let mut image = vec![0; 512];
    image[..4].copy_from_slice(&super::header::MAGIC);
    (image[7], image[23], image[59], image[63], image[99], image[103]) = (3, 16, 1, *count, 4, 104);
    let header = Header::parse(&image).expect("this is a header");
    let Ok(all) = snapshots::parse(&header, table) else { return };
    assert!(all.len() == usize::from(*count) && all.len() as u64 <= u64::from(MAX_SNAPSHOTS));
    let len: u64 = all.iter().map(|snapshot| snapshot.len).sum();
    // The last one may lack its padding.
    assert!(len < table.len() as u64 + 8);
}

/// The directory of bitmaps of an image with clusters of 64 KiB; the first bytes say how many there are and how large the disk
/// is, in GiB.
pub fn bitmaps(bytes: &[u8]) {
    let [count, size, directory @ ..] = bytes else { return };
    let layout = Layout {
        cluster_bits: 16,
        refcount_order: 4,
        extended: false,
        version: 3,
        external: false,
        slice_entries: 512,
    };
    let place = Bitmaps { count: (*count).into(), directory: ByteRange::whole(directory.len() as u64) };
    let Ok(all) = directory::parse(directory, place, layout, u64::from(*size) << 30) else { return };
    assert_eq!(all.len(), usize::from(*count));
    assert!(all.iter().all(|entry| entry.table.end() <= MAX_HOST && !entry.name.is_empty()));
    // What was understood is what would be written, but for padding.
    let again = directory::bytes(&all);
    assert!(again.len() >= directory.len() && again.len() < directory.len() + 8);
    let place = Bitmaps { directory: ByteRange::whole(again.len() as u64), ..place };
    let same = directory::parse(&again, place, layout, u64::from(*size) << 30).expect("it was written here");
    assert_eq!(directory::bytes(&same), again);
}

/// Two bytes say what the layout is; then come entries of 16 bytes.
pub fn entries(bytes: &[u8]) {
    let [bits, kind, entries @ ..] = bytes else { return };
    let extended = kind & 1 != 0;
    let layout = Layout {
        cluster_bits: if extended { 14 + bits % 8 } else { 9 + bits % 13 },
        refcount_order: 4,
        extended,
        version: if extended || kind & 2 != 0 { 3 } else { 2 },
        external: kind & 4 != 0,
        slice_entries: 32,
    };
    for entry in entries.chunks_exact(16) {
        let word = |at: usize| u64::from_be_bytes(std::array::from_fn(|byte| entry[at + byte]));
        let entry = L2Entry { word: word(0), bitmap: word(8) };
        let guest = layout.around(entry.bitmap >> 8).start();
        let (parsed, again) = match entry.parse(layout, guest) {
            Err(_) => continue,
            Ok(Cluster::Standard(granules)) => {
                assert!(granules.host.is_none_or(|host| host < MAX_HOST) && granules.data & granules.zero == 0);
                // Without room there is nothing to own.
                let own = granules.own && granules.host.is_some();
                (Cluster::Standard(Granules { own, ..granules }), granules.entry(layout))
            }
            Ok(Cluster::Compressed(place)) => {
                assert!(place.len > 0 && place.start + place.len < 1 << 62);
                (Cluster::Compressed(place), place.entry(layout))
            }
        };
        assert_eq!(again.parse(layout, guest), Ok(parsed));
        let _ = table_of(entry.word, layout);
    }
}

/// A cluster of 4 KiB.
pub fn compressed(bytes: &[u8]) {
    let mut cluster = vec![0; 4096];
    for kind in [Compression::Zlib, Compression::Zstd] {
        let _ = unpack(kind, bytes, &mut cluster);
        let Some(packed) = pack(kind, bytes) else { continue };
        let mut out = vec![0; bytes.len()];
        unpack(kind, &packed, &mut out).expect("it was packed here");
        assert_eq!(out, bytes);
    }
}
