//! Compressed clusters: bytes to bytes, no I/O. What comes out is never more than a cluster, whatever goes in.

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use zstd::zstd_safe::{DCtx, InBuffer, OutBuffer};

use super::entry::CORRUPT;
use super::header::Compression;
use crate::base::IoError;

/// Fills `out` from compressed bytes, behind which there may be others. Fails where they do not give a whole cluster.
pub(super) fn unpack(kind: Compression, bytes: &[u8], out: &mut [u8]) -> Result<(), IoError> {
    match kind {
        Compression::Zlib => inflate(bytes, out),
        Compression::Zstd => unpack_zstd(bytes, out),
    }
}

fn inflate(bytes: &[u8], out: &mut [u8]) -> Result<(), IoError> {
    // Raw deflate. The image says nothing of the window; the largest takes all.
    let mut stream = Decompress::new(false);
    loop {
        let (before_in, before_out) = (stream.total_in(), stream.total_out());
        let from = usize::try_from(before_in).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
        let to = usize::try_from(before_out).ok().and_then(|at| out.get_mut(at..)).unwrap_or_default();
        if to.is_empty() {
            return Ok(());
        }
        let status = stream.decompress(from, to, FlushDecompress::None).map_err(|_| CORRUPT)?;
        let is_full = stream.total_out() == out.len() as u64;
        let is_stuck = stream.total_in() == before_in && stream.total_out() == before_out;
        if is_full {
            return Ok(());
        }
        if status == Status::StreamEnd || is_stuck {
            return Err(CORRUPT);
        }
    }
}

fn unpack_zstd(bytes: &[u8], out: &mut [u8]) -> Result<(), IoError> {
    let wanted = out.len();
    let mut context = DCtx::create();
    let mut from = InBuffer::around(bytes);
    let mut to = OutBuffer::around(out);
    while to.pos() < wanted {
        let before = (from.pos(), to.pos());
        context.decompress_stream(&mut to, &mut from).map_err(|_| CORRUPT)?;
        if (from.pos(), to.pos()) == before {
            return Err(CORRUPT);
        }
    }
    Ok(())
}

/// The bytes, smaller; `None` where that does not make them smaller.
pub(super) fn pack(kind: Compression, bytes: &[u8]) -> Option<Vec<u8>> {
    match kind {
        Compression::Zlib => deflate(bytes),
        Compression::Zstd => {
            let packed = zstd::bulk::compress(bytes, zstd::DEFAULT_COMPRESSION_LEVEL).ok()?;
            (packed.len() < bytes.len()).then_some(packed)
        }
    }
}

fn deflate(bytes: &[u8]) -> Option<Vec<u8>> {
    // A window of 4 KiB: what every reader of the format can take.
    let mut stream = Compress::new_with_window_bits(flate2::Compression::default(), false, 12);
    let mut packed = vec![0; bytes.len().saturating_sub(1)];
    let status = stream.compress(bytes, &mut packed, FlushCompress::Finish).ok()?;
    if status != Status::StreamEnd {
        return None;
    }
    packed.truncate(usize::try_from(stream.total_out()).ok()?);
    Some(packed)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: [Compression; 2] = [Compression::Zlib, Compression::Zstd];

    fn text(len: usize) -> Vec<u8> {
        (0..=250u8).flat_map(|byte| [byte; 7]).cycle().take(len).collect()
    }

    #[test]
    fn what_is_packed_is_unpacked_whatever_lies_behind() {
        for kind in BOTH {
            let bytes = text(65536);
            let mut packed = pack(kind, &bytes).expect("this gets smaller");
            assert!(packed.len() < 32768);
            packed.extend([0xa5; 511]);
            let mut out = vec![0; 65536];
            unpack(kind, &packed, &mut out).unwrap();
            assert_eq!(out, bytes);
        }
    }

    #[test]
    fn what_does_not_get_smaller_is_not_packed() {
        let mut state = 1u64;
        let noise: Vec<u8> = (0..4096)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                state.to_be_bytes()[0]
            })
            .collect();
        assert!(BOTH.iter().all(|kind| pack(*kind, &noise).is_none()));
    }

    /// IMG-24, and the bombs of IMG-117 to IMG-120: too little, garbage, far too much.
    #[test]
    fn only_a_whole_cluster_is_a_cluster() {
        for kind in BOTH {
            let short = pack(kind, &text(4096)).unwrap();
            assert_eq!(unpack(kind, &short, &mut [0; 8192]), Err(CORRUPT));
            let bomb = pack(kind, &vec![0; 64 << 20]).unwrap();
            let mut out = vec![1; 4096];
            unpack(kind, &bomb, &mut out).unwrap();
            assert!(out.iter().all(|byte| *byte == 0));
            for garbage in [&[][..], &[0xff; 512], &short[..short.len() / 2]] {
                assert_eq!(unpack(kind, garbage, &mut vec![0; 4096]), Err(CORRUPT), "{kind:?}");
            }
        }
    }
}
