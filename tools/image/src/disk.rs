//! The bytes of an open image.

use std::rc::Rc;

use block_core::base::{ByteRange, IoError};
use block_core::graph::{Child, Extent, ViewPin, WriteFlags};
use block_core::pipeline::Status;
use block_core::port::{PORT, PortLane};
use block_core::rt::IoBuf;

/// An image's bytes. Any number of requests may be under way at once.
#[derive(Clone)]
pub struct Disk {
    lane: Rc<PortLane>,
    /// Writes are stable when they complete.
    writethrough: bool,
}

impl Disk {
    pub(crate) fn new(lane: Rc<PortLane>, writethrough: bool) -> Self {
        Self { lane, writethrough }
    }

    /// Enters the graph: what the pin's [`Child`] offers can be used until it is dropped, as long as no change of the graph
    /// is waited for meanwhile. See [`top`].
    pub async fn enter(&self) -> ViewPin {
        loop {
            if let Some(pin) = self.lane.try_enter() {
                return pin;
            }
            self.lane.opened().await;
        }
    }

    /// Bytes of the disk, as it is now.
    pub async fn size(&self) -> u64 {
        let pin = self.enter().await;
        top(&pin).size()
    }

    /// Fills `buf`, which has the range's length.
    pub async fn read(&self, at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
        let pin = self.enter().await;
        top(&pin).read(at, buf).await
    }

    /// The bytes of a range.
    pub async fn read_vec(&self, at: ByteRange) -> Result<Vec<u8>, IoError> {
        let buf = IoBuf::private(at.len())?;
        self.read(at, buf.clone()).await?;
        Ok(buf.to_vec())
    }

    /// Writes `buf`, which has the range's length.
    pub async fn write(&self, at: ByteRange, buf: IoBuf, flags: WriteFlags) -> Result<(), IoError> {
        let pin = self.enter().await;
        top(&pin).write(at, buf, self.flags(flags)).await
    }

    /// Makes the range read as zeroes.
    pub async fn write_zeroes(&self, at: ByteRange, flags: WriteFlags) -> Result<(), IoError> {
        let pin = self.enter().await;
        top(&pin).write_zeroes(at, self.flags(flags)).await
    }

    /// The range is no longer needed.
    pub async fn discard(&self, at: ByteRange) -> Result<(), IoError> {
        let pin = self.enter().await;
        top(&pin).discard(at).await
    }

    /// What was written is stable.
    pub async fn flush(&self) -> Result<(), IoError> {
        let pin = self.enter().await;
        top(&pin).flush().await
    }

    /// What the first bytes of the range are, in the image or what it stands on.
    pub async fn status(&self, at: ByteRange) -> Result<Status, IoError> {
        let pin = self.enter().await;
        top(&pin).status(at).await
    }

    /// Where the first bytes of the range are, by the image's own tables.
    pub async fn map(&self, at: ByteRange) -> Result<Extent, IoError> {
        let pin = self.enter().await;
        top(&pin).map(at).await
    }

    /// Whether the first bytes of the range are in the image itself rather than in what it stands on, and for how many that
    /// is so.
    pub async fn allocated(&self, at: ByteRange) -> Result<(bool, u64), IoError> {
        let pin = self.enter().await;
        top(&pin).allocated(at).await
    }

    fn flags(&self, flags: WriteFlags) -> WriteFlags {
        WriteFlags { fua: flags.fua || self.writethrough, ..flags }
    }
}

/// The node that a pin of [`Disk::enter`] leads to.
pub fn top(pin: &ViewPin) -> Child<'_> {
    pin.cx().child(PORT)
}
