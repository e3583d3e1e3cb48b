//! A file in memory: an image that many cases share, with what one case has changed on pages of its own. As large as it is
//! told to be; what is not there is zero.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use block_core::base::{ByteRange, IoError, Result};
use block_core::graph::{
    DiscardMode, Driver, DriverInfo, End, Extent, Geometry, IoCx, Limits, NewNode, NodeOptions, Place, Preallocation,
    ReopenRequest, WriteFlags,
};
use block_core::rt::IoBuf;
use block_core::rt::sync::yield_now;

const PAGE: u64 = 4096;
/// Pages that a case may change; then there is no space left.
const MAX_PAGES: usize = 8192;

/// The bytes, as the test sees them too.
pub(crate) struct Sheet(Mutex<Bytes>);

struct Bytes {
    image: Arc<[u8]>,
    /// Of the image, how much still shows.
    shown: u64,
    pages: HashMap<u64, Box<[u8]>>,
    size: u64,
    changes: u64,
    requests: u64,
}

impl Sheet {
    pub(crate) fn of(image: &Arc<[u8]>) -> Arc<Self> {
        let (image, size) = (image.clone(), image.len() as u64);
        Arc::new(Self(Mutex::new(Bytes { image, shown: size, pages: HashMap::new(), size, changes: 0, requests: 0 })))
    }

    /// Requests that changed it, or tried to.
    pub(crate) fn changes(&self) -> u64 {
        self.bytes().changes
    }

    pub(crate) fn requests(&self) -> u64 {
        self.bytes().requests
    }

    /// Changes it before anybody looks.
    pub(crate) fn prepare(&self, at: u64, bytes: &[u8]) {
        self.bytes().put(at, bytes).unwrap();
    }

    /// It ends here.
    pub(crate) fn cut(&self, size: u64) {
        self.bytes().resize(size);
    }

    pub(crate) fn put(&self, at: u64, bytes: &[u8]) {
        let mut all = self.bytes();
        all.changes += 1;
        all.put(at, bytes).unwrap();
    }

    pub(crate) fn zero(&self, at: u64, len: u64) {
        self.bytes().zero(ByteRange::new(at, len).unwrap()).unwrap();
    }

    pub(crate) fn get(&self, at: u64, len: u64) -> Vec<u8> {
        self.bytes().get(ByteRange::new(at, len).unwrap())
    }

    fn bytes(&self) -> MutexGuard<'_, Bytes> {
        self.0.lock().unwrap()
    }

    /// A request comes.
    fn asked(&self, changes: bool) -> MutexGuard<'_, Bytes> {
        let mut bytes = self.bytes();
        bytes.requests += 1;
        bytes.changes += u64::from(changes);
        bytes
    }
}

impl Bytes {
    fn page(&mut self, number: u64) -> Result<&mut [u8], IoError> {
        if self.pages.len() >= MAX_PAGES && !self.pages.contains_key(&number) {
            return Err(IoError::NoSpace);
        }
        let (image, shown) = (&self.image, self.shown);
        Ok(self.pages.entry(number).or_insert_with(|| {
            let mut page = vec![0; PAGE as usize];
            let (start, end) = ((number * PAGE).min(shown) as usize, ((number + 1) * PAGE).min(shown) as usize);
            page[..end - start].copy_from_slice(&image[start..end]);
            page.into()
        }))
    }

    fn put(&mut self, at: u64, bytes: &[u8]) -> Result<(), IoError> {
        self.size = self.size.max(at + bytes.len() as u64);
        let mut done = 0;
        while done < bytes.len() {
            let here = at + done as u64;
            let (number, inside) = (here / PAGE, (here % PAGE) as usize);
            let len = (PAGE as usize - inside).min(bytes.len() - done);
            self.page(number)?[inside..inside + len].copy_from_slice(&bytes[done..done + len]);
            done += len;
        }
        Ok(())
    }

    /// Only what is there has to be made zero.
    fn zero(&mut self, at: ByteRange) -> Result<(), IoError> {
        self.size = self.size.max(at.end());
        let (first, last) = (at.start() / PAGE, at.end().div_ceil(PAGE));
        let mut numbers: Vec<u64> = (first..last.min(self.shown.div_ceil(PAGE)).max(first)).collect();
        numbers.extend(self.pages.keys().filter(|number| (first..last).contains(number)));
        for number in numbers {
            let (start, end) = (at.start().max(number * PAGE), at.end().min((number + 1) * PAGE));
            self.page(number)?[(start - number * PAGE) as usize..(end - number * PAGE) as usize].fill(0);
        }
        Ok(())
    }

    fn get(&self, at: ByteRange) -> Vec<u8> {
        let mut bytes = vec![0; at.len() as usize];
        let shown = at.end().min(self.shown).saturating_sub(at.start()) as usize;
        bytes[..shown].copy_from_slice(&self.image[at.start().min(self.shown) as usize..][..shown]);
        for number in at.start() / PAGE..at.end().div_ceil(PAGE) {
            let Some(page) = self.pages.get(&number) else { continue };
            let (start, end) = (at.start().max(number * PAGE), at.end().min((number + 1) * PAGE));
            let from = &page[(start - number * PAGE) as usize..(end - number * PAGE) as usize];
            bytes[(start - at.start()) as usize..(end - at.start()) as usize].copy_from_slice(from);
        }
        bytes
    }

    fn resize(&mut self, size: u64) {
        self.shown = self.shown.min(size);
        self.pages.retain(|number, _| number * PAGE < size);
        if let Some(page) = self.pages.get_mut(&(size / PAGE)) {
            page[(size % PAGE) as usize..].fill(0);
        }
        self.size = size;
    }
}

/// The node over a sheet.
pub(crate) struct Paper(Arc<Sheet>);

impl Paper {
    pub(crate) fn node(name: &str, sheet: &Arc<Sheet>) -> NewNode {
        let (options, size) =
            (NodeOptions { discard: DiscardMode::Unmap, ..NodeOptions::default() }, sheet.bytes().size);
        NewNode::new(name.into(), options, |_| (Self(sheet.clone()), size))
    }
}

impl Driver for Paper {
    type Conf = u64;

    fn geometry(&self, size: &u64, _: &[Geometry]) -> Result<Geometry> {
        let limits = Limits { fua: true, discard: true, unmap_zeroes: true, ..Limits::ANY };
        Ok(Geometry { size: *size, limits })
    }

    fn end(&self, _: &u64) -> End {
        End::At(self.0.bytes().size)
    }

    async fn read(&self, _: &u64, _: IoCx<'_>, at: ByteRange, buf: IoBuf) -> Result<(), IoError> {
        let bytes = self.0.asked(false).get(at);
        yield_now().await;
        buf.write_at(0, &bytes);
        Ok(())
    }

    async fn write(&self, _: &u64, _: IoCx<'_>, at: ByteRange, buf: IoBuf, _: WriteFlags) -> Result<(), IoError> {
        yield_now().await;
        self.0.asked(true).put(at.start(), &buf.to_vec())
    }

    async fn write_zeroes(&self, _: &u64, _: IoCx<'_>, at: ByteRange, _: WriteFlags) -> Result<(), IoError> {
        self.0.asked(true).zero(at)
    }

    async fn discard(&self, _: &u64, _: IoCx<'_>, at: ByteRange) -> Result<(), IoError> {
        self.0.asked(true).zero(at)
    }

    async fn flush(&self, _: &u64, _: IoCx<'_>) -> Result<(), IoError> {
        yield_now().await;
        Ok(())
    }

    async fn map(&self, _: &u64, _: IoCx<'_>, at: ByteRange) -> Result<Extent, IoError> {
        Ok(Extent { len: at.len(), place: Place::Here })
    }

    async fn truncate(&self, _: &u64, _: IoCx<'_>, size: u64, _: Preallocation) -> Result<u64> {
        self.0.asked(true).resize(size);
        Ok(size)
    }

    async fn reopen(&self, size: &u64, _: ReopenRequest<'_>) -> Result<u64> {
        Ok(*size)
    }

    async fn info(&self, _: &u64) -> DriverInfo {
        DriverInfo { driver: "paper", ..DriverInfo::default() }
    }
}
