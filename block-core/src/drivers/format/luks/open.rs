//! Opening an image: its header is read and judged, then the material of its key slots, and the key is derived where nobody
//! waits for the thread.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use super::{Luks, LuksOptions};
use crate::base::{ByteRange, Error, IoError, Result, ResultExt};
use crate::codec::SecretBytes;
use crate::codec::luks::v2::{self, Copy};
use crate::codec::luks::{BEGINNING, Header, v1, version};
use crate::drivers::keys::{fetch, needed_secret, read_material, unlock};
use crate::drivers::{Open, Opened, Site};
use crate::graph::Child;

impl Open for LuksOptions {
    type Driver = Luks;

    async fn open(&self, site: Site<'_>) -> Result<Opened<Luks>> {
        if !site.common.active {
            return Err(Error::new("A luks node cannot be inactive yet"));
        }
        let passphrase = needed_secret(site.objects, self.key_secret.as_deref())?;
        let doing = || format!("Could not open the luks image of '{}'", site.name);
        let (file, header_in) = (site.child("file"), site.optional("header"));
        let read = site.visit(header_in.unwrap_or(file), async |child| read(child, header_in.is_some()).await);
        let (header, material) = read.await?.doing(doing)?;
        let payload = header.payload();
        let end = site.visit(file, async |child| child.size()).await?;
        header.check_payload(end).doing(doing)?;
        let (header, unlocked) = unlock(header, passphrase, material).await.doing(doing)?;
        let cipher = payload.cipher(&unlocked.key).doing(doing)?;
        let driver = Luks {
            file,
            header_in,
            header: Mutex::new(header),
            payload,
            cipher,
            changing: Arc::default(),
            is_unsure: AtomicBool::new(false),
        };
        Ok(Opened { driver, conf: self.clone(), options: site.common })
    }
}

/// The header, and the material of the slots that may open it. Nothing has been derived.
async fn read(child: Child<'_>, detached: bool) -> Result<(Header, Vec<SecretBytes>)> {
    let header = read_header(child, detached).await?;
    let material = read_material(child, 0, &header).await?;
    Ok((header, material))
}

/// Whichever version it is.
async fn read_header(child: Child<'_>, detached: bool) -> Result<Header> {
    let beginning = part(child, ByteRange::whole(BEGINNING)).await.doing(|| "Could not read the header")?;
    match version(&beginning) {
        Ok(1) => Ok(Header::V1(v1::Header::parse(&beginning, child.size(), detached)?)),
        Ok(2) => read_copies(child, detached).await.map(Header::V2),
        Ok(other) => Err(Error::new(format!("LUKS version {other} is not supported"))),
        // The first copy may be what was damaged.
        Err(error) => read_second(child, None, detached).await.map(Header::V2).ok_or(error),
    }
}

/// The younger of the two copies that are whole.
async fn read_copies(child: Child<'_>, detached: bool) -> Result<v2::Header> {
    let (first, size) = match read_copy(child, Copy::First, 0, detached).await {
        Ok((header, size)) => (Ok(header), Some(size)),
        Err(error) => (Err(error), None),
    };
    match (first, read_second(child, size, detached).await) {
        (Ok(first), Some(second)) => Ok(if second.sequence() > first.sequence() { second } else { first }),
        (Err(_), Some(second)) => Ok(second),
        (first, None) => first,
    }
}

/// The second copy lies right behind the first one, as large as that is.
async fn read_second(child: Child<'_>, size: Option<u64>, detached: bool) -> Option<v2::Header> {
    let places = v2::SIZES.into_iter().filter(|place| size.is_none_or(|size| size == *place));
    for place in places {
        if let Ok((header, _)) = read_copy(child, Copy::Second, place, detached).await {
            return Some(header);
        }
    }
    None
}

async fn read_copy(child: Child<'_>, copy: Copy, offset: u64, detached: bool) -> Result<(v2::Header, u64)> {
    let doing = || "Could not read the header";
    let too_far = || Error::new("There is no place for a header");
    let beginning = ByteRange::new(offset, BEGINNING).ok_or_else(too_far)?;
    let beginning = part(child, beginning).await.doing(doing)?;
    let size = v2::extent(copy, &beginning, offset)?;
    let all = ByteRange::new(offset, size).ok_or_else(too_far)?;
    let bytes = fetch(child, all).await.doing(doing)?;
    Ok((v2::Header::parse(&bytes, child.size(), detached)?, size))
}

/// As much of the range as the file has.
async fn part(child: Child<'_>, at: ByteRange) -> Result<Vec<u8>, IoError> {
    match ByteRange::whole(child.size()).intersection(at) {
        None => Ok(Vec::new()),
        Some(inside) => fetch(child, inside).await,
    }
}
