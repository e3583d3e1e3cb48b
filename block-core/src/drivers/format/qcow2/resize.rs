//! Changing the size of the disk, and leaving the image in order.

use super::commit::write_header;
use super::entry::CORRUPT;
use super::header::{AT_L1, AT_SIZE, MAX_L1};
use super::meta::Run;
use super::tables::put;
use super::{Image, Shape};
use crate::base::{ByteRange, Error, IoError, Result, ResultExt, SECTOR, align_up, is_aligned};
use crate::graph::{DebugEvent, Extent, IoCx, Place, Preallocation, WriteFlags};
use crate::pipeline::{self, Access, Ticket};
use crate::rt::IoBuf;

impl Image {
    /// Nobody else is inside, and nobody uses what was freed any more: all is written, and what is free may be used again.
    pub(super) async fn settle(&self, cx: IoCx<'_>) -> Result<(), IoError> {
        self.meta().drained();
        // Refcounts that a commit lowers are written by the next one.
        for _ in 0..ROUNDS {
            self.commit(cx).await?;
            if self.meta().is_clean() {
                break;
            }
        }
        cx.child(self.file).flush().await?;
        self.unmark_late(cx).await?;
        let resting = self.meta().reuse.all();
        for run in resting {
            self.punch(cx, run).await;
        }
        let fresh = cx.child(self.file).size().div_ceil(self.layout.cluster());
        self.meta().refs.wake(fresh);
        Ok(())
    }

    /// Another size for the disk; nobody else is inside.
    pub(super) async fn resize(&self, shape: Shape, cx: IoCx<'_>, size: u64, how: Preallocation) -> Result<Shape> {
        if how != Preallocation::Off && size < shape.size {
            return Err(Error::new("Preallocation is for images that grow"));
        }
        if !is_aligned(size, SECTOR) {
            return Err(Error::new("The new size must be a multiple of 512"));
        }
        self.check_resize()?;
        self.check_data_file(cx, size)?;
        self.ready(cx).await.doing(|| "The image cannot be written")?;
        let doing = || format!("Could not resize the image of '{}'", self.name);
        self.settle(cx).await.doing(doing)?;
        if size < shape.size {
            self.write_size(cx, shape.size, size).await.doing(doing)?;
            // The disk ends there now, whatever becomes of what is behind.
            let cut = async {
                // Nothing is lost before that is stable.
                cx.child(self.file).flush().await?;
                self.cut(shape, cx, size).await?;
                self.settle(cx).await?;
                self.end_data(cx, size).await
            };
            if let Err(error) = cut.await {
                tracing::warn!("what lies behind the new end of '{}' stays in the image for now: {error}", self.name);
            }
        } else {
            self.grow_l1(cx, size).await?;
            let before = self.data.map_or(0, |data| cx.child(data).size());
            if let Err(error) = self.grow(shape, cx, size, how).await {
                // A data file that can be read without the image would be longer than the disk.
                let _ = self.end_data(cx, before).await;
                return Err(error).doing(doing);
            }
        }
        Ok(Shape { size, ..shape })
    }

    /// The disk has no clusters any more; nobody else is inside. It is what lies below.
    pub(super) async fn emptied(&self, shape: Shape, cx: IoCx<'_>) -> Result<()> {
        if self.data.is_some() {
            return Err(Error::new("An image that keeps its data in another file cannot be emptied yet"));
        }
        self.ready(cx).await.doing(|| "The image cannot be written")?;
        let doing = || format!("Could not empty the image of '{}'", self.name);
        let all = align_up(shape.size, self.layout.cluster()).map(ByteRange::whole);
        let all = all.ok_or(IoError::OutOfRange).doing(doing)?;
        self.settle(cx).await.doing(doing)?;
        self.cut_off(&shape, cx, all).await.doing(doing)?;
        self.settle(cx).await.doing(doing)
    }

    async fn grow(&self, shape: Shape, cx: IoCx<'_>, size: u64, how: Preallocation) -> Result<(), IoError> {
        // Without the image, too, the bytes of a raw data file are the disk's: nothing below shows through them.
        let how = if self.raw_data && how == Preallocation::Off { Preallocation::Metadata } else { how };
        let grown = Shape { size, ..shape };
        // A shrink that failed, or another program, may have left something.
        self.cut(grown, cx, shape.size).await?;
        self.grow_data(cx, shape.size, size, how).await?;
        match how {
            Preallocation::Off => self.cover(shape, cx, size).await?,
            Preallocation::Metadata | Preallocation::Falloc | Preallocation::Full => {
                self.preallocate(grown, cx, shape.size, how).await?;
            }
        }
        self.settle(cx).await?;
        self.write_size(cx, shape.size, size).await
    }

    /// A data file has to have room for the disk.
    fn check_data_file(&self, cx: IoCx<'_>, size: u64) -> Result<()> {
        let Some(data) = self.data.map(|data| cx.child(data)) else { return Ok(()) };
        if data.size() < size && data.moving_end().is_none() {
            let has = data.size();
            return Err(Error::new(format!(
                "The data file has {has} bytes and cannot grow, so the disk cannot have {size}"
            )));
        }
        Ok(())
    }

    /// The data file grows with the disk. What it has behind the disk's end nobody has seen: it becomes zeroes where clusters
    /// are going to lead there.
    async fn grow_data(&self, cx: IoCx<'_>, from: u64, to: u64, how: Preallocation) -> Result<(), IoError> {
        let Some(data) = self.data.map(|data| cx.child(data)) else { return Ok(()) };
        let behind = ByteRange::between(from, data.size().min(to)).filter(|behind| !behind.is_empty());
        if let Some(behind) = behind.filter(|_| how != Preallocation::Off) {
            let flags = WriteFlags { may_unmap: how == Preallocation::Metadata, ..WriteFlags::default() };
            data.write_zeroes(behind, flags).await?;
        }
        if data.size() < to {
            let how = if how == Preallocation::Metadata { Preallocation::Off } else { how };
            data.set_end(to, how).await?;
        }
        Ok(())
    }

    /// The data file is no longer than that, if its end can move.
    async fn end_data(&self, cx: IoCx<'_>, size: u64) -> Result<(), IoError> {
        match self.data.map(|data| cx.child(data)).filter(|data| data.moving_end().is_some() && data.size() > size) {
            Some(data) => data.set_end(size, Preallocation::Off).await,
            None => Ok(()),
        }
    }

    /// Snapshots have to say how large the disk was; those of version 2 need not.
    fn check_resize(&self) -> Result<()> {
        let meta = self.meta();
        if !meta.snapshots.is_empty() && self.layout.version < 3 {
            return Err(Error::new("Can't resize a v2 image which has snapshots"));
        }
        if meta.snapshots.iter().any(|snapshot| snapshot.disk_size.is_none()) {
            return Err(Error::new("Can't resize an image with a snapshot that does not say the disk's size"));
        }
        Ok(())
    }

    /// The next flush makes it stable, as with any other node that is resized.
    async fn write_size(&self, cx: IoCx<'_>, before: u64, size: u64) -> Result<(), IoError> {
        let write = async |size: u64| write_header(self, cx, AT_SIZE, &size.to_be_bytes()).await;
        if let Err(error) = write(size).await {
            // Whoever asked is told that nothing has changed.
            let _ = write(before).await;
            return Err(error);
        }
        Ok(())
    }

    /// The image has nothing from `size` up to the end of `shape`: it does not come to light when the disk grows.
    async fn cut(&self, shape: Shape, cx: IoCx<'_>, size: u64) -> Result<(), IoError> {
        let edge = align_up(size, self.layout.cluster()).ok_or(IoError::OutOfRange)?;
        let mut left = ByteRange::between(size, edge.min(shape.size)).filter(|tail| !tail.is_empty());
        while let Some(now) = left {
            let Extent { len, place } = self.place(&shape, cx, now, Access::Read).await?;
            if matches!(place, Place::Data { .. } | Place::Encoded) {
                self.blank(&shape, cx, now.start(), now.start() + len).await?;
            }
            left = now.split(len).1;
        }
        let end = align_up(shape.size, self.layout.cluster()).unwrap_or(shape.size);
        match ByteRange::between(edge, end).filter(|gone| !gone.is_empty()) {
            Some(gone) => self.cut_off(&shape, cx, gone).await,
            None => Ok(()),
        }
    }

    /// What lies below the part that is new must not come to light there, nor what lies in the last cluster behind the end.
    async fn cover(&self, shape: Shape, cx: IoCx<'_>, size: u64) -> Result<(), IoError> {
        let grown = Shape { size, ..shape };
        let edge = align_up(shape.size, self.layout.cluster()).ok_or(IoError::OutOfRange)?;
        self.clear(&grown, cx, shape.size, edge.min(size)).await?;
        let Some(backing) = shape.backing else { return Ok(()) };
        // What is below may end inside a sector, of which an encrypted disk has only whole ones.
        let below = align_up(cx.child(backing).size(), SECTOR).ok_or(IoError::OutOfRange)?;
        let end = size.min(below);
        self.blank(&grown, cx, shape.size, edge.min(end)).await?;
        let Some(new) = ByteRange::between(edge, end).filter(|new| !new.is_empty()) else { return Ok(()) };
        let new = new.widened(self.layout.cluster()).ok_or(IoError::OutOfRange)?;
        match self.zero(&grown, cx, new, WriteFlags::default()).await {
            Err(IoError::Unsupported) => self.blank(&grown, cx, edge, end).await,
            other => other,
        }
    }

    /// Zeroes where this layer has data: QEMU leaves them behind the end of a disk that it makes smaller.
    async fn clear(&self, shape: &Shape, cx: IoCx<'_>, start: u64, end: u64) -> Result<(), IoError> {
        let mut left = ByteRange::between(start, end).filter(|tail| !tail.is_empty());
        while let Some(now) = left {
            let Extent { len, place } = self.place(shape, cx, now, Access::Read).await?;
            let (piece, rest) = now.split(len);
            if matches!(place, Place::Data { .. } | Place::Encoded) {
                self.blank(shape, cx, piece.start(), piece.end()).await?;
            }
            left = rest;
        }
        Ok(())
    }

    /// Every cluster from `start` up to the end has room, and zeroes in it: written, unless tables are all that is wanted and
    /// the room is a hole in the file. A data file has them already, where it is not encrypted.
    async fn preallocate(&self, shape: Shape, cx: IoCx<'_>, start: u64, how: Preallocation) -> Result<(), IoError> {
        let zeroes = IoBuf::private(BUFFER)?;
        let file = cx.child(self.file);
        let mut left = ByteRange::between(start, shape.size).filter(|new| !new.is_empty());
        while let Some(now) = left {
            let room = self.room(&shape, cx, now.split(BUFFER).0).await?;
            let Extent { len, place: Place::Data { child, offset } } = room.extent() else { return Err(CORRUPT) };
            let end = align_up(offset + len, self.layout.cluster()).ok_or(IoError::OutOfRange)?;
            let is_hole = room.is_fresh() && self.crypt.is_none() && file.moving_end().is_some();
            if self.data.is_some() && self.crypt.is_none() {
                // Made by `grow_data`.
            } else if how == Preallocation::Metadata && is_hole {
                if file.size() < end {
                    file.set_end(end, Preallocation::Off).await?;
                }
            } else {
                let at = ByteRange::new(offset, len).ok_or(IoError::OutOfRange)?;
                let zeroes = zeroes.slice(0, len);
                let stored = self.crypt.as_ref().map(|crypt| crypt.seal.sealed(now.start(), offset, &zeroes));
                cx.child(child).write(at, stored.transpose()?.unwrap_or(zeroes), WriteFlags::default()).await?;
            }
            room.commit().await?;
            left = now.split(len).1;
        }
        Ok(())
    }

    /// Zeroes, by writing them.
    pub(super) async fn blank(&self, shape: &Shape, cx: IoCx<'_>, start: u64, end: u64) -> Result<(), IoError> {
        let Some(at) = ByteRange::between(start, end).filter(|at| !at.is_empty()) else { return Ok(()) };
        let zeroes = IoBuf::private(at.len().min(BUFFER))?;
        for piece in at.pieces(BUFFER) {
            pipeline::write_mapped(self, shape, cx, piece, &zeroes.slice(0, piece.len()), WriteFlags::default())
                .await?;
        }
        Ok(())
    }

    /// An L1 table for a disk of `size` bytes. The new one is in the file before the header leads to it.
    async fn grow_l1(&self, cx: IoCx<'_>, size: u64) -> Result<()> {
        let wanted = self.layout.l1_entries(size);
        let (mut l1, old) = {
            let meta = self.meta();
            (meta.l1.clone(), meta.l1_range())
        };
        if wanted <= l1.len() as u64 {
            return Ok(());
        }
        if wanted * 8 > MAX_L1 {
            return Err(Error::new("The image cannot be that large with clusters of its size"));
        }
        let doing = || "Could not make the L1 table larger";
        let file = cx.child(self.file);
        file.announce(DebugEvent::L1GrowAllocTable).await;
        let (cluster, bits) = (self.layout.cluster(), self.layout.cluster_bits);
        let run = self.take_table(cx, (wanted * 8).div_ceil(cluster)).await.doing(doing)?;
        let entries = usize::try_from(wanted).map_err(|_| Error::new("The image cannot be that large"))?;
        l1.resize(entries, 0);
        let at = run.cluster << bits;
        let written = async {
            let mut bytes: Vec<u8> = l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            bytes.resize(bytes.len().next_multiple_of(usize::try_from(cluster).unwrap_or(512)), 0);
            file.announce(DebugEvent::L1GrowWriteTable).await;
            put(file, at, &bytes).await?;
            // The table's refcounts come before what leads to it.
            self.commit(cx).await?;
            file.announce(DebugEvent::L1GrowActivateTable).await;
            let field = [&u32::try_from(wanted).unwrap_or(u32::MAX).to_be_bytes()[..], &at.to_be_bytes()].concat();
            let switched = async {
                write_header(self, cx, AT_L1, &field).await?;
                file.flush().await
            };
            switched.await.inspect_err(|error| self.give_up("the move of its L1 table", *error))
        };
        if let Err(error) = written.await {
            self.meta().abandoned.push(run);
            return Err(error).doing(doing);
        }
        let mut meta = self.meta();
        meta.l1 = l1;
        meta.l1_at = at;
        if !old.is_empty() {
            let count = old.len().div_ceil(cluster);
            meta.free(Run { cluster: old.start() >> bits, count, punch: true });
        }
        Ok(())
    }
}

/// Commits until nothing is left to be written: one for what was changed, one for what that set free, one for refcount
/// blocks that were too many for memory.
const ROUNDS: usize = 3;
/// Zeroes that are written at once, in bytes.
const BUFFER: u64 = 1 << 20;
