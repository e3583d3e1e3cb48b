//! One read or write: it is sent, waited for, and told of.

use std::io::Read as _;
use std::time::Instant;

use block_core::base::{ByteRange, IoError};
use block_core::graph::WriteFlags;
use block_core::rt::{IoBuf, blocking};
use trellis_image::{Disk, complain, say, strerror};

use crate::command::{Fill, Read, Report, Verify, Write};
use crate::report;

/// Buffers begin where no O_DIRECT would have them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Misaligned(pub(crate) bool);

/// A request did not go as it should have, which has been told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failed;

pub(crate) async fn read(disk: &Disk, read: &Read, misaligned: Misaligned) -> Result<(), Failed> {
    let begun = Instant::now();
    let fetched = match buffer(read.len, misaligned) {
        _ if read.vm_state => Err(IoError::Unsupported),
        Ok(buf) => {
            // What is not fetched shows.
            buf.fill(0xab);
            fetch(disk, read, &buf).await.map(|()| buf)
        }
        Err(error) => Err(error),
    };
    let took = begun.elapsed();
    let buf = fetched.map_err(|error| failed(read.name, error))?;
    let result = verify(read, &buf);
    if read.dump && read.report != Report::Quiet {
        for piece in ByteRange::whole(buf.len()).pieces(STEP) {
            let bytes = buf.slice(piece.start(), piece.len()).to_vec();
            say(&report::dump(read.at + piece.start(), &bytes));
        }
    }
    say(&report::transfer(read.report, "read", read.at, read.len, took));
    result
}

async fn fetch(disk: &Disk, read: &Read, buf: &IoBuf) -> Result<(), IoError> {
    disk.read(range(read.at, read.len)?, buf.clone()).await
}

fn verify(read: &Read, buf: &IoBuf) -> Result<(), Failed> {
    let Some(Verify { pattern, start, len }) = read.verify else { return Ok(()) };
    let is_full = |piece: ByteRange| {
        let bytes = buf.slice(start + piece.start(), piece.len()).to_vec();
        bytes.iter().all(|byte| *byte == pattern)
    };
    if ByteRange::whole(len).pieces(STEP).all(is_full) {
        return Ok(());
    }
    say(&format!("Pattern verification failed at offset {}, {len} bytes\n", read.at + start));
    Err(Failed)
}

pub(crate) async fn write(disk: &Disk, write: &Write, misaligned: Misaligned) -> Result<(), Failed> {
    let buf = match &write.fill {
        Fill::Zeroes { .. } => None,
        Fill::Pattern(byte) => {
            let buf = buffer(write.len, misaligned).map_err(|error| failed(write.name, error))?;
            buf.fill(*byte);
            Some(buf)
        }
        Fill::File(path) => Some(filled(path, write.len, misaligned).await?),
    };
    let begun = Instant::now();
    let stored = store(disk, write, buf).await;
    let took = begun.elapsed();
    stored.map_err(|error| failed(write.name, error))?;
    say(&report::transfer(write.report, "wrote", write.at, write.len, took));
    Ok(())
}

async fn store(disk: &Disk, write: &Write, buf: Option<IoBuf>) -> Result<(), IoError> {
    if write.vm_state {
        return Err(IoError::Unsupported);
    }
    let at = range(write.at, write.len)?;
    let flags = WriteFlags { fua: write.fua, ..WriteFlags::default() };
    match (&write.fill, buf) {
        (Fill::Zeroes { unmap, no_fallback }, _) => {
            let flags = WriteFlags { may_unmap: *unmap, no_fallback: *no_fallback, ..flags };
            disk.write_zeroes(at, flags).await
        }
        (_, Some(buf)) => disk.write(at, buf, WriteFlags { compressed: write.compressed, ..flags }).await,
        (_, None) => unreachable!("only zeroes have no buffer"),
    }
}

/// A buffer of a file's bytes, again and again.
async fn filled(path: &str, len: u64, misaligned: Misaligned) -> Result<IoBuf, Failed> {
    let (name, most) = (path.to_owned(), len);
    let bytes = blocking(move || {
        let mut bytes = Vec::new();
        std::fs::File::open(name)?.take(most).read_to_end(&mut bytes).map(|_| bytes)
    });
    let complain = |why: &str| {
        complain(&format!("{path}: {why}\n"));
        Failed
    };
    let bytes = bytes.await.map_err(|error| complain(&strerror(error.into())))?;
    if bytes.is_empty() && len > 0 {
        return Err(complain("file is empty"));
    }
    let buf = buffer(len, misaligned).map_err(|error| failed("write", error))?;
    let mut at = 0;
    while at < len {
        let part = usize::try_from(len - at).unwrap_or(usize::MAX).min(bytes.len());
        buf.write_at(at, &bytes[..part]);
        at += part as u64;
    }
    Ok(buf)
}

fn buffer(len: u64, misaligned: Misaligned) -> Result<IoBuf, IoError> {
    if misaligned.0 { Ok(IoBuf::private(len + 1)?.slice(1, len)) } else { IoBuf::private(len) }
}

fn range(at: u64, len: u64) -> Result<ByteRange, IoError> {
    ByteRange::new(at, len).ok_or(IoError::OutOfRange)
}

/// Tells of a request that failed.
pub(crate) fn failed(name: &str, error: IoError) -> Failed {
    say(&format!("{name} failed: {}\n", strerror(error)));
    Failed
}

/// Bytes that are looked at or shown at once; lines of a dump end there.
const STEP: u64 = 1 << 20;
