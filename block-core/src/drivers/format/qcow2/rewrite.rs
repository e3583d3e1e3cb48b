//! Writing the first cluster anew: another name of the backing file, other extensions, another version. The cluster is
//! written sector by sector, and whoever finds it half-written reads what was or what will be.
//!
//! The first sector says where everything else is. So what is new is put where nobody looks yet, and then the first sector
//! leads there. In version 3 the extensions may begin anywhere: where the new ones would lie over the old ones they are first
//! put behind everything, and moved to where they belong once nobody looks there any more.

use std::ops::Range;
use std::sync::{Arc, PoisonError};

use super::Image;
use super::extensions::{BACKING_FORMAT, Extension, Extensions};
use super::header::{Header, MAX_BACKING_NAME, V2_LENGTH};
use super::heading::Heading;
use crate::base::{Error, IoError, Result, ResultExt};
use crate::graph::{BackingName, IoCx};

/// What the first cluster is to say.
pub(super) struct Wanted {
    /// The header; the fields that say where something in this cluster is are filled in.
    pub(super) header: Vec<u8>,
    pub(super) extensions: Vec<Extension>,
    /// The backing file's name, at most [`MAX_BACKING_NAME`] bytes.
    pub(super) backing: Option<Vec<u8>>,
}

/// Nothing was changed, or (`torn`) nobody knows.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) error: IoError,
    pub(super) torn: bool,
}

/// Of a header of version 3 that is written.
pub(super) const LENGTH: usize = 112;
/// The first sector.
const FIRST: usize = 512;
const MARK: usize = 8;

impl Heading {
    /// What it says now.
    pub(super) fn wanted(&self) -> Wanted {
        let start = self.start().min(self.bytes.len());
        let mut header = self.bytes[..start].to_vec();
        if start > V2_LENGTH as usize {
            header.resize(start.max(LENGTH), 0);
        }
        let extension = |(at, kind, len): (usize, u32, usize)| {
            let data = self.bytes.get(at + 8..at + 8 + len).unwrap_or_default().to_vec();
            Extension { kind, data }
        };
        let (at, len) = self.name();
        let backing = (at != 0).then(|| self.bytes.get(at..at + len).unwrap_or_default().to_vec());
        Wanted { header, extensions: self.extensions().into_iter().map(extension).collect(), backing }
    }

    /// Lets the first cluster say this. `write` gives a range of the bytes to the file, and makes it stable.
    pub(super) async fn rewrite(
        &mut self,
        wanted: &Wanted,
        mut write: impl AsyncFnMut(&[u8], Range<usize>) -> Result<(), IoError>,
    ) -> Result<(), Failed> {
        let steps = self.steps(wanted).ok_or(Failed { error: IoError::NoSpace, torn: false })?;
        for (number, bytes) in steps.into_iter().enumerate() {
            match self.step(bytes, &mut write).await {
                Ok(()) => {}
                Err(failed) if number == 0 => return Err(failed),
                // All is said already, if not in its usual place.
                Err(Failed { error, .. }) => {
                    tracing::warn!("the first cluster of an image has its extensions in an unusual place: {error}");
                    break;
                }
            }
        }
        Ok(())
    }

    async fn step(
        &mut self,
        bytes: Vec<u8>,
        write: &mut impl AsyncFnMut(&[u8], Range<usize>) -> Result<(), IoError>,
    ) -> Result<(), Failed> {
        if let Some(part) = self.differ(&bytes, FIRST..bytes.len()) {
            write(&bytes, part).await.map_err(|error| Failed { error, torn: false })?;
        }
        if let Err(error) = write(&bytes, 0..FIRST).await {
            // Where what was can be written again, it is what all readers find.
            let torn = write(&self.bytes, 0..FIRST).await.is_err();
            return Err(Failed { error, torn });
        }
        self.bytes = bytes;
        Ok(())
    }

    /// What the cluster is after each step; `None`: there is no room for it.
    fn steps(&self, wanted: &Wanted) -> Option<Vec<Vec<u8>>> {
        let (name, len) = self.name();
        let start = wanted.header.len();
        let size = wanted.extensions.iter().map(|one| 8 + one.data.len().next_multiple_of(8)).sum::<usize>() + MARK;
        let behind = (self.end() + MARK).max(name + len).max(start + size).next_multiple_of(8);
        let usual = self.form(wanted, start, start + size)?;
        if self.is_unseen(&usual) {
            return Some(vec![usual]);
        }
        let apart = self.form(wanted, start, behind).filter(|bytes| self.is_unseen(bytes));
        if let Some(apart) = apart {
            return Some(vec![apart]);
        }
        if start == V2_LENGTH as usize {
            return None;
        }
        let usual_end = start + size + wanted.backing.as_ref().map_or(0, Vec::len);
        let behind = behind.max(usual_end.next_multiple_of(8));
        let moved = self.form(wanted, behind, behind + size).filter(|bytes| self.is_unseen(bytes))?;
        let moved = Self { bytes: moved };
        let usual = moved.form(wanted, start, start + size).filter(|bytes| moved.is_unseen(bytes))?;
        Some(vec![moved.bytes, usual])
    }

    /// With the extensions at `start`, and the name at `name`.
    fn form(&self, wanted: &Wanted, start: usize, name: usize) -> Option<Vec<u8>> {
        let mut bytes = self.bytes.clone();
        let mut put = |at: usize, new: &[u8]| {
            bytes.get_mut(at..at + new.len())?.copy_from_slice(new);
            Some(())
        };
        put(0, &wanted.header)?;
        if wanted.header.len() >= LENGTH {
            put(100, &u32::try_from(start).ok()?.to_be_bytes())?;
        }
        let mut at = start;
        for Extension { kind, data } in &wanted.extensions {
            put(at, &kind.to_be_bytes())?;
            put(at + 4, &u32::try_from(data.len()).ok()?.to_be_bytes())?;
            let mut data = data.clone();
            data.resize(data.len().next_multiple_of(8), 0);
            put(at + 8, &data)?;
            at += 8 + data.len();
        }
        put(at, &[0; MARK])?;
        let backing = wanted.backing.as_deref().unwrap_or_default();
        put(8, &(if wanted.backing.is_some() { name as u64 } else { 0 }).to_be_bytes())?;
        put(16, &u32::try_from(backing.len()).ok()?.to_be_bytes())?;
        if wanted.backing.is_some() {
            put(name, backing)?;
        }
        Some(bytes)
    }

    /// Whoever reads the first sector as it is now does not look at anything behind it that is another in `bytes`.
    fn is_unseen(&self, bytes: &[u8]) -> bool {
        let (name, len) = self.name();
        let seen = [self.start()..self.end() + MARK, name..name + len];
        let behind = |range: Range<usize>| range.start.max(FIRST)..range.end.min(bytes.len());
        seen.into_iter().map(behind).all(|range| range.is_empty() || self.bytes[range.clone()] == bytes[range])
    }

    /// The part of the range outside which the bytes are the same.
    fn differ(&self, bytes: &[u8], range: Range<usize>) -> Option<Range<usize>> {
        let differs = |at: &usize| self.bytes[*at] != bytes[*at];
        let (first, last) = (range.clone().find(differs)?, range.rev().find(differs)?);
        Some(first..last + 1)
    }
}

impl Image {
    /// The image names another backing file, or none. Nobody else is inside.
    pub(super) async fn rename_backing(&self, cx: IoCx<'_>, backing: Option<BackingName<'_>>) -> Result<()> {
        if let Some(backing) = backing {
            check_name(backing.name)?;
            if self.raw_data {
                return Err(Error::new("An image whose data file is raw cannot have a backing file"));
            }
        }
        self.ready(cx).await.doing(|| "The image cannot be written")?;
        let mut heading = self.heading(cx).await.doing(|| "Could not read the header")?;
        let mut wanted = heading.wanted();
        wanted.set_backing(backing.map(|backing| backing.name));
        if let Some(format) = backing.and_then(|backing| backing.format) {
            wanted.set_text(BACKING_FORMAT, format);
        }
        let write = async |bytes: &[u8], part: Range<usize>| self.write_heading(cx, bytes, part).await;
        if let Err(Failed { error, torn }) = heading.rewrite(&wanted, write).await {
            if torn {
                self.give_up("a change of its backing file's name", error);
            }
            return Err(error).doing(|| "Could not write the first cluster");
        }
        let header = Header::parse(&heading.bytes[..FIRST])?;
        let extensions = Extensions::parse(&header, &heading.bytes)?;
        *self.extensions.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(extensions);
        Ok(())
    }
}

impl Wanted {
    /// Another name; without one the format goes, too.
    pub(super) fn set_backing(&mut self, name: Option<&str>) {
        self.backing = name.map(|name| name.as_bytes().to_vec());
        if name.is_none() {
            self.extensions.retain(|one| one.kind != BACKING_FORMAT);
        }
    }

    /// An extension that is a text; empty: there is none.
    pub(super) fn set_text(&mut self, kind: u32, text: &str) {
        let at = self.extensions.iter().position(|one| one.kind == kind);
        match at.and_then(|at| self.extensions.get_mut(at)) {
            _ if text.is_empty() => self.extensions.retain(|one| one.kind != kind),
            Some(there) => there.data = text.into(),
            None => self.extensions.insert(0, Extension { kind, data: text.into() }),
        }
    }
}

/// Of a backing file.
pub(super) fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name.len() as u64 > MAX_BACKING_NAME || name.contains('\0') {
        return Err(Error::new(format!(
            "The name of a backing file has 1 to {MAX_BACKING_NAME} bytes, none of them 0"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::super::heading::tests::{cluster, parsed};
    use super::*;

    /// What readers find in the first cluster.
    fn said(bytes: &[u8]) -> (u8, Vec<Extension>, Option<String>) {
        let (header, found) = parsed(bytes);
        (header.version, found.all, found.backing_file)
    }

    /// Makes the change on `disk`. Each sector of each step may be the last one that is written: who finds that has to see
    /// all as it was, or all as it will be. `fails` is the call that fails, and all behind it.
    fn changed(disk: &mut [u8], wanted: &Wanted, fails: usize) -> Result<(), Failed> {
        let was = said(disk);
        let mut heading = Heading { bytes: disk.to_vec() };
        let will = {
            let version = wanted.header[7];
            let name = wanted.backing.as_ref().map(|name| String::from_utf8(name.clone()).unwrap());
            (version, wanted.extensions.clone(), name)
        };
        let mut calls = 0;
        let write = async |bytes: &[u8], part: Range<usize>| {
            calls += 1;
            if calls >= fails {
                return Err(IoError::NoSpace);
            }
            for sector in part.start / FIRST..part.end.div_ceil(FIRST) {
                let part = sector * FIRST..(sector + 1) * FIRST;
                disk[part.clone()].copy_from_slice(&bytes[part]);
                let now = said(disk);
                assert!(now == was || now == will, "{now:?}, neither {was:?} nor {will:?}");
            }
            Ok(())
        };
        let done = {
            let mut future = pin!(heading.rewrite(wanted, write));
            match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(done) => done,
                Poll::Pending => panic!("nothing waits"),
            }
        };
        match done {
            Ok(()) => assert_eq!(said(disk), will),
            Err(_) => assert_eq!(said(disk), was),
        }
        done
    }

    #[test]
    fn every_sector_may_be_the_last_one_written() {
        let (mut two, mut full) = (0, 0);
        for first in (0..=420).step_by(28) {
            for name in [None, Some("base.img"), Some(&*"n".repeat(700))] {
                let fresh = cluster(&[first, 3], name, &[]);
                for len in [0, 1, 100, 900] {
                    for grow in [0, 64, 400] {
                        let mut disk = fresh.clone();
                        let mut wanted = Heading { bytes: disk.clone() }.wanted();
                        wanted.backing = (len > 0).then(|| vec![b'm'; len]);
                        if grow > 0 {
                            wanted.extensions.insert(0, Extension { kind: BACKING_FORMAT, data: vec![b'f'; grow] });
                        }
                        let Some(steps) = (Heading { bytes: disk.clone() }).steps(&wanted) else {
                            full += 1;
                            assert_eq!(changed(&mut disk, &wanted, 9).unwrap_err().error, IoError::NoSpace);
                            assert!(disk == fresh);
                            continue;
                        };
                        two += usize::from(steps.len() == 2);
                        for fails in 1..6 {
                            let mut disk = fresh.clone();
                            // Once it is said, nothing can fail any more.
                            let _ = changed(&mut disk, &wanted, fails);
                        }
                        changed(&mut disk, &wanted, 9).unwrap();
                        // And back.
                        let mut back = Heading { bytes: fresh.clone() }.wanted();
                        back.header[100..104].copy_from_slice(&disk[100..104]);
                        let _ = changed(&mut disk, &back, 9);
                    }
                }
            }
        }
        assert!(two > 50 && full > 10, "{two} in two steps, {full} without room");
    }

    #[test]
    fn a_name_goes_to_and_fro_as_often_as_one_likes() {
        let mut disk = cluster(&[400, 3], Some("base.img"), &[]);
        for len in (1..=300).chain((1..=300).rev()) {
            let mut wanted = Heading { bytes: disk.clone() }.wanted();
            wanted.backing = Some(vec![b'x'; len]);
            changed(&mut disk, &wanted, 9).unwrap();
        }
        assert_eq!(Heading { bytes: disk }.start(), LENGTH);
    }
}
