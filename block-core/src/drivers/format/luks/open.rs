//! Opening an image: its header is read and judged, then the material of its key slots, and the key is derived where nobody
//! waits for the thread.

use super::{Luks, LuksOptions};
use crate::base::{ByteRange, Error, IoError, Result, ResultExt};
use crate::codec::luks::v2::{self, Copy, Whole};
use crate::codec::luks::{BEGINNING, Header, v1, version};
use crate::drivers::keys::{Home, KeyRing, fetch, needed_secret, read_material, unlock};
use crate::drivers::{Open, Opened, Site};
use crate::graph::Child;
use crate::rt::blocking_long;

impl Open for LuksOptions {
    type Driver = Luks;

    async fn open(&self, site: Site<'_>) -> Result<Opened<Luks>> {
        if !site.common.active {
            return Err(Error::new("A luks node cannot be inactive yet"));
        }
        if self.locked && !site.common.read_only {
            return Err(Error::new("An image that is not opened with a key can only be read"));
        }
        let passphrase = match self.locked {
            true => None,
            false => Some(needed_secret(site.objects, self.key_secret.as_deref())?),
        };
        let doing = || format!("Could not open the luks image of '{}'", site.name);
        let (file, header_in) = (site.child("file"), site.optional("header"));
        let read = site.visit(header_in.unwrap_or(file), async |child| {
            let header = read_header(child, header_in.is_some()).await?;
            let material = match &passphrase {
                Some(_) => read_material(child, 0, &header).await?,
                None => Vec::new(),
            };
            Ok::<_, Error>((header, material))
        });
        let (header, material) = read.await?.doing(doing)?;
        let payload = header.payload();
        let end = site.visit(file, async |child| child.size()).await?;
        header.check_payload(end).doing(doing)?;
        let (header, cipher) = match passphrase {
            None => (header, None),
            Some(passphrase) => {
                let (header, unlocked) = unlock(header, passphrase, material).await.doing(doing)?;
                (header, Some(payload.cipher(&unlocked.key).doing(doing)?))
            }
        };
        let keys = KeyRing::new(header, Home { start: 0, len: None, detached: header_in.is_some() });
        let driver = Luks { file, header_in, keys, payload, cipher };
        Ok(Opened { driver, conf: self.clone(), options: site.common })
    }
}

/// Whichever version it is.
async fn read_header(child: Child<'_>, detached: bool) -> Result<Header> {
    let beginning = part(child, ByteRange::whole(BEGINNING)).await.doing(|| "Could not read the header")?;
    match version(&beginning) {
        Ok(1) => Ok(Header::V1(v1::Header::parse(&beginning, child.size(), detached)?)),
        Ok(2) => {
            let copy = read_copies(child).await?;
            understood(copy, child.size(), detached).await
        }
        Ok(other) => Err(Error::new(format!("LUKS version {other} is not supported"))),
        // The first copy may be what was damaged.
        Err(error) => {
            let copy = read_second(child, None).await.ok_or(error)?;
            understood(copy, child.size(), detached).await
        }
    }
}

/// What a copy says. Up to 4 MiB of text are read for that, and the thread that asks goes on with other things meanwhile.
async fn understood(copy: Whole, end: u64, detached: bool) -> Result<Header> {
    blocking_long(move || v2::Header::parse(&copy, end, detached)).await.map(Header::V2)
}

/// The younger of the two copies that are whole. The other one does not count, even if we understand only that.
async fn read_copies(child: Child<'_>) -> Result<Whole> {
    let (first, size) = match read_copy(child, Copy::First, 0).await {
        Ok((copy, size)) => (Ok(copy), Some(size)),
        Err(error) => (Err(error), None),
    };
    match (first, read_second(child, size).await) {
        (Ok(first), Some(second)) => Ok(if second.sequence() > first.sequence() { second } else { first }),
        (Err(_), Some(second)) => Ok(second),
        (first, None) => first,
    }
}

/// The second copy lies right behind the first one, as large as that is; if that is not known, it is the youngest that is whole.
async fn read_second(child: Child<'_>, size: Option<u64>) -> Option<Whole> {
    let mut found: Option<Whole> = None;
    for place in v2::SIZES.into_iter().filter(|place| size.is_none_or(|size| size == *place)) {
        if let Ok((copy, _)) = read_copy(child, Copy::Second, place).await
            && found.as_ref().is_none_or(|found| copy.sequence() > found.sequence())
        {
            found = Some(copy);
        }
    }
    found
}

/// A copy and its size.
async fn read_copy(child: Child<'_>, copy: Copy, offset: u64) -> Result<(Whole, u64)> {
    let doing = || "Could not read the header";
    let too_far = || Error::new("There is no place for a header");
    let beginning = ByteRange::new(offset, BEGINNING).ok_or_else(too_far)?;
    let beginning = part(child, beginning).await.doing(doing)?;
    let size = v2::extent(copy, &beginning, offset)?;
    let all = ByteRange::new(offset, size).ok_or_else(too_far)?;
    let bytes = fetch(child, all).await.doing(doing)?;
    Ok((blocking_long(move || Whole::check(bytes)).await?, size))
}

/// As much of the range as the file has.
async fn part(child: Child<'_>, at: ByteRange) -> Result<Vec<u8>, IoError> {
    match ByteRange::whole(child.size()).intersection(at) {
        None => Ok(Vec::new()),
        Some(inside) => fetch(child, inside).await,
    }
}
