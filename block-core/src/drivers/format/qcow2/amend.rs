//! Changing what an image is like, while nobody has it open (`qemu-img amend`, and `rebase -u`).
//!
//! | step | what | a crash behind it leaves |
//! |---|---|---|
//! | 0 | other passphrases, as `drivers/keys/ring.rs` does it | the image with these |
//! | 1 | to version 3, and other names and features: the first cluster, as `rewrite.rs` does it | the image with these |
//! | 2 | refcounts of another width behind everything else, flush, then the header leads there (`repair.rs`) | the image with these |
//! | 3 | to version 2: the first cluster again | – |
//!
//! Only what is changed is written, and all that can be refused is refused before that.

use std::ops::Range;

use super::check::{entries, words};
use super::crypt;
use super::entry::OFFSET;
use super::extensions::{BACKING_FORMAT, BITMAPS as BITMAPS_KIND, DATA_FILE as DATA_FILE_NAME, FEATURE_NAMES};
use super::header::{
    AT_AUTOCLEAR, AT_COMPATIBLE, AT_REFCOUNT_ORDER, BITMAPS, CORRUPT_BIT, DATA_FILE, DIRTY, Header, LAZY_REFCOUNTS,
    RAW_DATA_FILE, V2_LENGTH,
};
use super::heading::Heading;
use super::open::{Read, part};
use super::repair::NewRefcounts;
use super::rewrite::{LENGTH, Wanted, check_name};
use super::tables::put;
use crate::base::{ByteRange, Error, Result, ResultExt, SECTOR, is_aligned};
use crate::drivers::keys::KeyChange;
use crate::graph::Child;

/// What an image is to be like. What is `None` stays. The size is no part of it: an open node is resized. Nor are passphrases.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AmendOptions {
    /// `compat`: 3 (`1.1`), or 2 (`0.10`) where the image has nothing that only version 3 knows.
    pub version: Option<u8>,
    /// `backing_file`: what the image says that it stands on, at most 1023 bytes; empty: nothing, and no format either. The
    /// disk is another one if that has other contents.
    pub backing_file: Option<String>,
    /// `backing_fmt`: the format of that; empty: it is not named.
    pub backing_format: Option<String>,
    /// `lazy_refcounts`: the image says that refcounts may be written late. Needs version 3.
    pub lazy_refcounts: Option<bool>,
    /// `data_file`: what the image says of its data file, if it has one.
    pub data_file: Option<String>,
    /// `data_file_raw`: that file can be read without the image. It cannot be turned on.
    pub data_file_raw: Option<bool>,
    /// `refcount_bits`: a power of two up to 64. Other than 16 they need version 3.
    pub refcount_bits: Option<u32>,
}

/// Changes the image in `file`, which the caller may write and resize, and the passphrases that open it. Nobody else uses it,
/// and no node has it open: tables move. After an error that is no refusal some of it may be done; the image is in order in
/// any case.
pub async fn amend(file: Child<'_>, options: &AmendOptions, keys: Option<&KeyChange>) -> Result<()> {
    let read = Read::all(file).await?;
    let target = Target::new(&read, options)?;
    if target.version < read.header.version {
        check_old(file, &read).await?;
    }
    let refcounts = match target.refcount_order {
        order if order == read.header.refcount_order => None,
        order => {
            let new = NewRefcounts::over(file, &read, order).await.doing(|| "Could not count references")?;
            if let Some((at, count)) = new.too_many() {
                return Err(Error::new(format!(
                    "Cannot decrease refcount entry width to {} bits: Cluster at offset {at:#x} has a refcount of {count}",
                    1u32 << order
                )));
            }
            Some(new)
        }
    };
    if let Some(change) = keys {
        crypt::change_keys(file, &read.header, &read.extensions, change).await?;
        if *options == AmendOptions::default() {
            return Ok(());
        }
    }
    // Version 2 knows one width only.
    let version = if refcounts.is_some() { 3 } else { target.version };
    target.write(file, options, version).await?;
    let Some(refcounts) = refcounts else { return Ok(()) };
    let mut read = Read::all(file).await?;
    let doing = || "Could not write refcounts of another width";
    refcounts.write(file, &mut read).await.doing(doing)?;
    read.put_flags_right(file).await.doing(doing)?;
    if target.version != version { target.write(file, options, target.version).await } else { Ok(()) }
}

/// What comes of an image.
struct Target {
    version: u8,
    refcount_order: u8,
}

impl Target {
    fn new(read: &Read, options: &AmendOptions) -> Result<Self> {
        let (header, refuse) = (&read.header, |text: &'static str| Err(Error::new(text)));
        if header.has(DIRTY | CORRUPT_BIT) {
            return refuse("The image was not closed in good order, or is corrupt: it has to be repaired first");
        }
        read.check_overlaps()?;
        let version = options.version.unwrap_or(header.version);
        if !(2..=3).contains(&version) {
            return refuse("The version is 2 or 3");
        }
        let bits = options.refcount_bits.unwrap_or(1 << header.refcount_order);
        if !bits.is_power_of_two() || bits > 64 {
            return refuse("Refcount width must be a power of two and may not exceed 64 bits");
        }
        if version == 2 && bits != 16 {
            return refuse(if options.refcount_bits.is_some() {
                "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)"
            } else {
                "compat=0.10 requires refcount_bits=16"
            });
        }
        if version == 2 && options.lazy_refcounts == Some(true) {
            return refuse(
                "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)",
            );
        }
        let (external, raw) = (header.has(DATA_FILE), header.autoclear & RAW_DATA_FILE != 0);
        if options.data_file.is_some() && !external {
            return refuse("data-file can only be set for images that use an external data file");
        }
        if options.data_file.as_ref().is_some_and(|name| name.is_empty()) {
            return refuse("An image cannot lose its data file");
        }
        if options.data_file_raw == Some(true) && !raw {
            return refuse("data-file-raw cannot be set on existing images");
        }
        let backing = options.backing_file.as_deref().or(read.extensions.backing_file.as_deref()).unwrap_or_default();
        if let Some(name) = options.backing_file.as_deref().filter(|name| !name.is_empty()) {
            check_name(name)?;
            if raw && options.data_file_raw != Some(false) {
                return refuse("An image whose data file is raw cannot have a backing file");
            }
        }
        if backing.is_empty() && options.backing_format.as_ref().is_some_and(|format| !format.is_empty()) {
            return refuse("A backing format needs a backing file");
        }
        #[expect(clippy::cast_possible_truncation, reason = "it is at most 6")]
        Ok(Self { version, refcount_order: bits.trailing_zeros() as u8 })
    }

    /// All but the refcounts, in this version.
    async fn write(&self, file: Child<'_>, options: &AmendOptions, version: u8) -> Result<()> {
        let doing = || "Could not change the first cluster";
        let sector = part(file, ByteRange::whole(SECTOR)).await.doing(doing)?;
        let cluster = 1u64 << Header::parse(&sector)?.cluster_bits;
        let mut bytes = part(file, ByteRange::whole(cluster)).await.doing(doing)?;
        bytes.resize(usize::try_from(cluster).unwrap_or(usize::MAX), 0);
        let mut heading = Heading { bytes };
        let mut wanted = heading.wanted();
        wanted.take(options);
        wanted.become_version(version);
        wanted.features(options);
        let write = async |bytes: &[u8], part: Range<usize>| {
            let (start, end) = (part.start / 512 * 512, part.end.next_multiple_of(512));
            put(file, start as u64, &bytes[start..end]).await?;
            file.flush().await
        };
        heading.rewrite(&wanted, write).await.map_err(|failed| failed.error).doing(doing)
    }
}

impl Wanted {
    /// The names.
    fn take(&mut self, options: &AmendOptions) {
        if let Some(name) = &options.backing_file {
            self.set_backing(Some(&**name).filter(|name| !name.is_empty()));
        }
        if let Some(format) = &options.backing_format {
            self.set_text(BACKING_FORMAT, format);
        }
        if let Some(name) = &options.data_file {
            self.set_text(DATA_FILE_NAME, name);
        }
    }

    fn become_version(&mut self, version: u8) {
        let is = self.header[7];
        self.header[7] = version;
        if version == 2 {
            // Their names are of no use there.
            self.extensions.retain(|one| ![FEATURE_NAMES, BITMAPS_KIND].contains(&one.kind));
            self.header.truncate(V2_LENGTH as usize);
        } else if is == 2 {
            self.header.resize(LENGTH, 0);
            self.put(AT_REFCOUNT_ORDER, &4u32.to_be_bytes());
        }
    }

    /// Those that the image need not have. What others know of it may not be true any more.
    fn features(&mut self, options: &AmendOptions) {
        let word = |header: &[u8], at: usize| super::header::Fields(header).u64(at).ok();
        if let Some(bits) = word(&self.header, AT_COMPATIBLE) {
            let bits = match options.lazy_refcounts {
                None => bits,
                Some(true) => bits | LAZY_REFCOUNTS,
                Some(false) => bits & !LAZY_REFCOUNTS,
            };
            self.put(AT_COMPATIBLE, &bits.to_be_bytes());
        }
        if let Some(bits) = word(&self.header, AT_AUTOCLEAR) {
            let raw = if options.data_file_raw == Some(false) { 0 } else { RAW_DATA_FILE };
            self.put(AT_AUTOCLEAR, &(bits & (BITMAPS | raw)).to_be_bytes());
        }
    }

    fn put(&mut self, at: usize, field: &[u8]) {
        self.header[at..at + field.len()].copy_from_slice(field);
    }
}

/// The image has nothing that version 2 does not know.
async fn check_old(file: Child<'_>, read: &Read) -> Result<()> {
    let header = &read.header;
    if header.has(DATA_FILE) {
        return Err(Error::new("Cannot downgrade an image with a data file"));
    }
    if header.incompatible != 0 {
        let bits = header.incompatible;
        return Err(Error::new(format!("Cannot downgrade an image with incompatible features {bits:#x} set")));
    }
    if read.extensions.bitmaps.is_some() && header.autoclear & BITMAPS != 0 {
        return Err(Error::new("Cannot downgrade an image with bitmaps: remove them first"));
    }
    if read.snapshots.iter().any(|snapshot| snapshot.disk_size.is_some_and(|size| size != header.size)) {
        return Err(Error::new("Cannot downgrade an image with snapshots of another size"));
    }
    let doing = || "Could not read a table";
    let mut all = vec![read.l1.clone()];
    for snapshot in &read.snapshots {
        all.push(words(file, snapshot.l1).await.doing(doing)?);
    }
    let layout = read.layout();
    for table in all.iter().flatten().map(|entry| entry & OFFSET).filter(|table| *table != 0) {
        let at = ByteRange::new(table, layout.cluster()).filter(|_| is_aligned(table, layout.cluster()));
        let at = at.ok_or_else(|| Error::new("An L2 table is where none can be"))?;
        if entries(&words(file, at).await.doing(doing)?, layout).any(|entry| entry.is_zero()) {
            return Err(Error::new("Cannot downgrade an image with clusters of zeroes, which version 2 does not know"));
        }
    }
    Ok(())
}
