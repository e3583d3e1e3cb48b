//! Changing header extensions in place. The first cluster is written sector by sector, in an order in which whoever finds
//! it half-written reads the old extensions or the new ones, and always the right backing file.

use super::extensions::{BITMAPS as KIND, Bitmaps, END};
use super::header::{AT_AUTOCLEAR, BITMAPS, Fields, V2_LENGTH};
use crate::base::{IoError, SECTOR};

/// The first cluster, as it is in the file.
pub(super) struct Heading {
    pub(super) bytes: Vec<u8>,
}

/// Bytes of the bitmaps extension, with its head; and of the mark at the end of all extensions.
const LEN: usize = 32;
const DATA: u32 = 24;
const MARK: usize = 8;

impl Heading {
    /// Lets the bitmaps extension say this, or takes it out. Each step is written from `bytes` as they are when it is given
    /// to `write`, which gives it to the file and makes it stable; a step is one sector, or several where no reader looks.
    pub(super) async fn set_bitmaps(
        mut self,
        bitmaps: Option<Bitmaps>,
        mut write: impl AsyncFnMut(&[u8], std::ops::Range<usize>) -> Result<(), IoError>,
    ) -> Result<(), IoError> {
        let found = self.extensions();
        let (at, end) = (found.iter().find(|(_, kind, _)| *kind == KIND).map(|(at, ..)| *at), self.end());
        let vouched = self.autoclear() & BITMAPS != 0;
        let Some(bitmaps) = bitmaps else {
            self.vouch(false, vouched, &mut write).await?;
            return match at {
                Some(at) => self.cut(at, end, &mut write).await,
                None => Ok(()),
            };
        };
        let data = data(bitmaps);
        if let Some(at) = at {
            let place = at + 8..at + LEN;
            // Data that lie in one sector are the old ones or the new ones.
            if !is_in_one_sector(&place) {
                self.vouch(false, vouched, &mut write).await?;
            }
            self.put(place.start, &data);
            write(&self.bytes, place).await?;
        } else {
            // Whatever is vouched for is none of ours.
            self.vouch(false, vouched, &mut write).await?;
            self.append(end, &data, &mut write).await?;
        }
        let vouched = self.autoclear() & BITMAPS != 0;
        self.vouch(true, vouched, &mut write).await
    }

    /// There is room for the extension, if it is not there already.
    pub(super) fn has_room(&self) -> bool {
        let is_there = self.extensions().iter().any(|(_, kind, _)| *kind == KIND);
        is_there || self.room(self.end()).is_some()
    }

    /// At `end`: gives where the name of the backing file has to be moved to, if it is in the way.
    fn room(&self, end: usize) -> Option<Option<usize>> {
        let behind = end + LEN + MARK;
        let (start, len) = self.name();
        let in_the_way = start != 0 && start < behind && end < start + len;
        // Never over itself: a reader may still look at the old one.
        let to = if start + len > behind { start + len } else { behind };
        let needed = if in_the_way { to + len } else { behind };
        (needed <= self.bytes.len()).then_some(in_the_way.then_some(to))
    }

    /// One more extension behind the others.
    async fn append(
        &mut self,
        end: usize,
        data: &[u8; LEN - 8],
        write: &mut impl AsyncFnMut(&[u8], std::ops::Range<usize>) -> Result<(), IoError>,
    ) -> Result<(), IoError> {
        if let Some(to) = self.room(end).ok_or(IoError::NoSpace)? {
            let (start, len) = self.name();
            self.bytes.copy_within(start..start + len, to);
            write(&self.bytes, to..to + len).await?;
            self.put(8, &(to as u64).to_be_bytes());
            write(&self.bytes, 8..16).await?;
        }
        // What makes it visible comes last.
        self.put(end + LEN, &[0; MARK]);
        write(&self.bytes, end + LEN..end + LEN + MARK).await?;
        self.put(end + 8, data);
        write(&self.bytes, end + 8..end + LEN).await?;
        self.put(end, &KIND.to_be_bytes());
        self.put(end + 4, &DATA.to_be_bytes());
        write(&self.bytes, end..end + 8).await
    }

    /// The extension at `at` goes; those behind it move up.
    async fn cut(
        &mut self,
        at: usize,
        end: usize,
        write: &mut impl AsyncFnMut(&[u8], std::ops::Range<usize>) -> Result<(), IoError>,
    ) -> Result<(), IoError> {
        self.bytes.copy_within(at + LEN..end, at);
        self.bytes[end - LEN..end].fill(0);
        // Alone, it is one word that goes.
        write(&self.bytes, if at + LEN == end { at..at + 8 } else { at..end }).await
    }

    /// Whether the image says that the extension is true.
    async fn vouch(
        &mut self,
        now: bool,
        before: bool,
        write: &mut impl AsyncFnMut(&[u8], std::ops::Range<usize>) -> Result<(), IoError>,
    ) -> Result<(), IoError> {
        if now == before {
            return Ok(());
        }
        let bits = if now { self.autoclear() | BITMAPS } else { self.autoclear() & !BITMAPS };
        self.put(AT_AUTOCLEAR, &bits.to_be_bytes());
        write(&self.bytes, AT_AUTOCLEAR..AT_AUTOCLEAR + 8).await
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn autoclear(&self) -> u64 {
        Fields(&self.bytes).u64(AT_AUTOCLEAR).unwrap_or(0)
    }

    /// Where the backing file's name is, and how long; 0: there is none.
    pub(super) fn name(&self) -> (usize, usize) {
        let field = Fields(&self.bytes);
        let place = |number: u64| usize::try_from(number).unwrap_or(0);
        (place(field.u64(8).unwrap_or(0)), place(u64::from(field.u32(16).unwrap_or(0))))
    }

    /// All extensions: where each begins, its kind, and the bytes of its data. The header has been parsed: all fit.
    pub(super) fn extensions(&self) -> Vec<(usize, u32, usize)> {
        let (mut at, mut all) = (self.start(), Vec::new());
        let (start, _) = self.name();
        let end = if start == 0 { self.bytes.len() } else { start.min(self.bytes.len()) };
        while at + 8 <= end {
            let field = Fields(&self.bytes[at..]);
            let (kind, len) = (field.u32(0).unwrap_or(END), usize::try_from(field.u32(4).unwrap_or(0)).unwrap_or(0));
            if kind == END {
                break;
            }
            all.push((at, kind, len));
            at += 8 + len.next_multiple_of(8);
        }
        all
    }

    /// Where the mark at the end of all extensions is, or would be.
    pub(super) fn end(&self) -> usize {
        let last = self.extensions().last().map(|(at, _, len)| at + 8 + len.next_multiple_of(8));
        last.unwrap_or(self.start())
    }

    /// Where the extensions begin.
    pub(super) fn start(&self) -> usize {
        let field = Fields(&self.bytes);
        let length = if field.u32(4).ok() == Some(2) { V2_LENGTH } else { field.u32(100).unwrap_or(u32::MAX) };
        usize::try_from(length).unwrap_or(usize::MAX)
    }
}

fn is_in_one_sector(place: &std::ops::Range<usize>) -> bool {
    place.start as u64 / SECTOR == (place.end as u64 - 1) / SECTOR
}

fn data(bitmaps: Bitmaps) -> [u8; LEN - 8] {
    let mut data = [0; LEN - 8];
    data[..4].copy_from_slice(&bitmaps.count.to_be_bytes());
    data[8..16].copy_from_slice(&bitmaps.directory.len().to_be_bytes());
    data[16..].copy_from_slice(&bitmaps.directory.start().to_be_bytes());
    data
}

#[cfg(test)]
pub(super) mod tests {
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::super::extensions::Extensions;
    use super::super::header::Header;
    use super::*;
    use crate::base::ByteRange;

    /// A first cluster with extensions of such lengths, and perhaps the name of a backing file behind them.
    pub(crate) fn cluster(lens: &[u32], name: Option<&str>, kinds: &[u32]) -> Vec<u8> {
        let mut bytes = vec![0; 112];
        bytes[..4].copy_from_slice(&super::super::header::MAGIC);
        (bytes[7], bytes[23], bytes[59], bytes[99], bytes[103]) = (3, 11, 1, 4, 112);
        for (number, len) in lens.iter().enumerate() {
            bytes.extend(kinds.get(number).copied().unwrap_or(0x1234).to_be_bytes());
            bytes.extend(len.to_be_bytes());
            bytes.resize(bytes.len() + len.next_multiple_of(8) as usize, 1);
        }
        bytes.extend([0; 8]);
        if let Some(name) = name {
            let at = bytes.len() as u64;
            bytes[8..16].copy_from_slice(&at.to_be_bytes());
            bytes[16..20].copy_from_slice(&u32::try_from(name.len()).unwrap().to_be_bytes());
            bytes.extend(name.as_bytes());
        }
        bytes.resize(2048, 0);
        bytes
    }

    fn place(count: u32) -> Bitmaps {
        Bitmaps { count, directory: ByteRange::new(u64::from(count) << 16, 32).unwrap() }
    }

    pub(crate) fn parsed(bytes: &[u8]) -> (Header, Extensions) {
        let header = Header::parse(&bytes[..512]).unwrap();
        let extensions = Extensions::parse(&header, bytes).unwrap();
        (header, extensions)
    }

    /// What the image vouches for.
    fn vouched(bytes: &[u8]) -> Option<Bitmaps> {
        let (header, extensions) = parsed(bytes);
        extensions.bitmaps.filter(|_| header.autoclear & BITMAPS != 0)
    }

    /// Makes the change on `disk`. Each sector of each step may be the last one that is written: who finds that has to see
    /// the bitmaps as they were, as they will be, or none, and everything else as it was.
    fn changed(disk: &mut [u8], to: Option<Bitmaps>) -> Result<(), IoError> {
        let ((_, before), was) = (parsed(disk), vouched(disk));
        let others = |all: &Extensions| all.all.iter().filter(|one| one.kind != KIND).cloned().collect::<Vec<_>>();
        let heading = Heading { bytes: disk.to_vec() };
        let has_room = heading.has_room();
        let write = async |bytes: &[u8], part: std::ops::Range<usize>| {
            let sectors = part.start / 512..part.end.div_ceil(512);
            for sector in sectors {
                let part = sector * 512..(sector + 1) * 512;
                disk[part.clone()].copy_from_slice(&bytes[part]);
                let (_, now) = parsed(disk);
                assert_eq!((&now.backing_file, others(&now)), (&before.backing_file, others(&before)));
                let found = vouched(disk);
                assert!([None, was, to].contains(&found), "{found:?}, neither {was:?} nor {to:?}");
            }
            Ok(())
        };
        let done = {
            let mut future = pin!(heading.set_bitmaps(to, write));
            match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(done) => done,
                Poll::Pending => panic!("nothing waits"),
            }
        };
        assert_eq!(has_room || to.is_none(), done.is_ok());
        if done.is_ok() {
            assert_eq!(vouched(disk), to);
        }
        done
    }

    #[test]
    fn every_sector_may_be_the_last_one_written() {
        for first in (0..=420).step_by(8) {
            for name in [None, Some("base.img"), Some(&*"n".repeat(700))] {
                let mut disk = cluster(&[first, 3], name, &[]);
                for to in [Some(place(1)), Some(place(2)), None, None, Some(place(3))] {
                    changed(&mut disk, to).unwrap();
                }
            }
        }
    }

    #[test]
    fn an_extension_between_others_goes_too() {
        let mut disk = cluster(&[16, 24, 100], Some("base.img"), &[7, 8, 9]);
        changed(&mut disk, Some(place(1))).unwrap();
        let (_, found) = parsed(&disk);
        assert_eq!(found.all.iter().map(|one| one.kind).collect::<Vec<_>>(), [7, 8, 9, KIND]);
        // Another program has put one behind it.
        let heading = Heading { bytes: disk.clone() };
        let end = heading.end();
        disk[end..end + 8].copy_from_slice(&[0, 0, 0, 10, 0, 0, 0, 0]);
        changed(&mut disk, None).unwrap();
        let (_, found) = parsed(&disk);
        assert_eq!(found.all.iter().map(|one| one.kind).collect::<Vec<_>>(), [7, 8, 9, 10]);
    }

    #[test]
    fn where_there_is_no_room_nothing_is_written() {
        let full = cluster(&[1832, 64], None, &[]);
        let mut disk = full.clone();
        assert_eq!(changed(&mut disk, Some(place(1))), Err(IoError::NoSpace));
        assert!(disk == full);
    }
}
