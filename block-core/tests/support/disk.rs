//! A disk in memory that writes a log: a protocol node for crash tests, and the log's words.
//!
//! The log has what reached the disk, in order, and between it what the disk's user saw begin and end. What a crash may
//! leave of it is `crash.rs`.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "each test file uses a part")]

use std::future::poll_fn;
use std::sync::{Arc, Mutex};
use std::task::Poll;

use block_core::base::{ByteRange, IoError, Result};
use block_core::graph::{
    Driver, DriverInfo, End, Extent, Geometry, IoCx, Limits, NewNode, NodeOptions, Place, Preallocation, ReopenRequest,
    WriteFlags,
};
use block_core::rt::IoBuf;

use crate::allowed::Told;

/// One line of the log.
#[derive(Clone, Debug)]
pub enum Event {
    /// It is in the cache of the disk with this number; stable only after a flush, or if it says so.
    Change(usize, Change),
    /// A flush has begun; what was changed on that disk before it is stable at its end.
    FlushBegun(usize, u64),
    /// That flush has ended.
    FlushEnded(usize, u64),
    /// What the user was told.
    Told(Told),
}

/// How a disk changes.
#[derive(Clone, Debug)]
pub enum Change {
    Write { at: ByteRange, bytes: Vec<u8>, stable: bool },
    Zeroes { at: ByteRange, stable: bool },
    Discard { at: ByteRange },
    Truncate { size: u64 },
}

impl Change {
    /// Changes the image. What lies past its end is not there.
    pub fn apply(&self, image: &mut Vec<u8>) {
        match self {
            Self::Write { at, bytes, .. } => fill(image, *at, bytes),
            Self::Zeroes { at, .. } | Self::Discard { at } => fill(image, *at, &vec![0; len(at.len())]),
            Self::Truncate { size } => image.resize(len(*size), 0),
        }
    }

    pub fn is_stable(&self) -> bool {
        matches!(self, Self::Write { stable: true, .. } | Self::Zeroes { stable: true, .. })
    }
}

/// The log of one disk, for all who write it.
#[derive(Clone, Debug, Default)]
pub struct Log(Arc<Mutex<Vec<Event>>>);

impl Log {
    pub fn push(&self, event: Event) {
        self.0.lock().unwrap().push(event);
    }

    pub fn events(&self) -> Vec<Event> {
        self.0.lock().unwrap().clone()
    }
}

/// The node.
pub struct Disk {
    number: usize,
    image: Mutex<Vec<u8>>,
    limits: Limits,
    log: Log,
    flushes: Mutex<u64>,
}

impl Disk {
    /// A node that holds the image; called `disk` if it is the one with number 0, else `disk1` and so on.
    pub fn node(number: usize, image: Vec<u8>, limits: Limits, log: &Log) -> NewNode {
        let (size, log) = (image.len() as u64, log.clone());
        NewNode::new(
            if number == 0 { "disk".into() } else { format!("disk{number}") },
            NodeOptions { discard: block_core::graph::DiscardMode::Unmap, ..NodeOptions::default() },
            |_| (Self { number, image: Mutex::new(image), limits, log, flushes: Mutex::default() }, size),
        )
    }

    /// A write past the end moves it; which of the two a crash leaves is open.
    fn reach(&self, end: u64) {
        let mut image = self.image.lock().unwrap();
        if end > image.len() as u64 {
            image.resize(len(end), 0);
            self.log.push(Event::Change(self.number, Change::Truncate { size: end }));
        }
    }

    /// Some time passes before and after, so that requests overlap in every way.
    async fn change(&self, change: Change) {
        pause().await;
        change.apply(&mut self.image.lock().unwrap());
        self.log.push(Event::Change(self.number, change));
        pause().await;
    }
}

impl Driver for Disk {
    type Conf = u64;

    fn geometry(&self, size: &u64, _: &[Geometry]) -> Result<Geometry> {
        Ok(Geometry { size: *size, limits: self.limits })
    }

    async fn read(&self, _: &u64, _: IoCx<'_>, at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
        pause().await;
        buf.write_at(0, &self.image.lock().unwrap()[len(at.start())..len(at.end())]);
        Ok(())
    }

    fn end(&self, _: &u64) -> End {
        End::At(self.image.lock().unwrap().len() as u64)
    }

    async fn write(&self, _: &u64, _: IoCx<'_>, at: ByteRange, buf: IoBuf, flags: WriteFlags) -> Result<(), IoError> {
        self.reach(at.end());
        self.change(Change::Write { at, bytes: buf.to_vec(), stable: flags.fua }).await;
        Ok(())
    }

    async fn write_zeroes(&self, _: &u64, _: IoCx<'_>, at: ByteRange, flags: WriteFlags) -> Result<(), IoError> {
        self.reach(at.end());
        self.change(Change::Zeroes { at, stable: flags.fua }).await;
        Ok(())
    }

    async fn discard(&self, _: &u64, _: IoCx<'_>, at: ByteRange) -> Result<(), IoError> {
        self.change(Change::Discard { at }).await;
        Ok(())
    }

    async fn flush(&self, _: &u64, _: IoCx<'_>) -> Result<(), IoError> {
        let number = {
            let mut flushes = self.flushes.lock().unwrap();
            *flushes += 1;
            *flushes
        };
        self.log.push(Event::FlushBegun(self.number, number));
        pause().await;
        self.log.push(Event::FlushEnded(self.number, number));
        Ok(())
    }

    async fn map(&self, _: &u64, _: IoCx<'_>, at: ByteRange) -> Result<Extent, IoError> {
        Ok(Extent { len: at.len(), place: Place::Here })
    }

    async fn truncate(&self, _: &u64, _: IoCx<'_>, size: u64, _: Preallocation) -> Result<u64> {
        self.change(Change::Truncate { size }).await;
        Ok(size)
    }

    async fn reopen(&self, size: &u64, _: ReopenRequest<'_>) -> Result<u64> {
        Ok(*size)
    }

    async fn info(&self, _: &u64) -> DriverInfo {
        DriverInfo { driver: "disk", ..DriverInfo::default() }
    }
}

async fn pause() {
    let mut paused = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut paused, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

fn fill(image: &mut [u8], at: ByteRange, bytes: &[u8]) {
    let end = len(at.end()).min(image.len());
    let start = len(at.start()).min(end);
    image[start..end].copy_from_slice(&bytes[..end - start]);
}

fn len(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap()
}
