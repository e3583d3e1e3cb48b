//! Opening an image: header, extensions and tables are read and judged, and nothing is written yet.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use super::bitmap::Stored;
use super::clean::Cleaner;
use super::crypt::{self, Crypt, Locked, Qcow2Encryption};
use super::extensions::Extensions;
use super::header::{BITMAPS, CORRUPT_BIT, DATA_FILE, DIRTY, EXTENDED_L2, Header, LAZY_REFCOUNTS, RAW_DATA_FILE};
use super::layout::Layout;
use super::meta::{Meta, Refs};
use super::options::{Checks, Qcow2Options};
use super::regions::Regions;
use super::reuse::Reuse;
use super::slices::Slices;
use super::snapshots::{self, Snapshot, position};
use super::tables::fetch;
use super::turns::Turns;
use super::{Image, Shape};
use crate::base::{ByteRange, Error, IoError, Result, ResultExt};
use crate::drivers::{Open, Opened, Site};
use crate::graph::{Child, Objects, SnapshotName};
use crate::pipeline::Mapped;

impl Open for Qcow2Options {
    type Driver = Mapped<Image>;

    async fn open(&self, site: Site<'_>) -> Result<Opened<Mapped<Image>>> {
        if !site.common.active {
            return Err(Error::new("A qcow2 node cannot be inactive yet"));
        }
        let file = site.child("file");
        if self.snapshot.is_some() && !site.common.read_only {
            return Err(Error::new(SNAPSHOT_IS_READ));
        }
        if self.locked && !site.common.read_only {
            return Err(Error::new("An image that is not opened with a key can only be read"));
        }
        let read = site.visit(file, async |child| {
            let mut read = Read::all(child).await?;
            let stored = Stored::load(child, &read).await?;
            read.watch(child, self.checks()).await?;
            let locked = match self.locked {
                true => read.leave_locked(child).await.map(|()| None)?,
                false => read.locked(child, self.encrypt.as_ref(), site.objects).await?,
            };
            match &self.snapshot {
                None => Ok((read, stored, locked)),
                Some(which) => read.go_back(child, which).await.map(|()| (read, Stored::default(), locked)),
            }
        });
        let (mut read, stored, locked) =
            read.await?.doing(|| format!("Could not open the qcow2 image of '{}'", site.name))?;
        let writable = !site.common.read_only;
        let refused = read.check(&site).and_then(|()| if writable { read.check_writable() } else { Ok(()) });
        refused.doing(|| format!("Could not open the qcow2 image of '{}'", site.name))?;
        if let Some(locked) = locked {
            let unlocked = locked.unlock().await;
            read.crypt = Some(unlocked.doing(|| format!("Could not open the qcow2 image of '{}'", site.name))?);
        }
        let size = read.header.size;
        let discards = self.discards(read.header.version, site.common)?;
        let image = self.image(read, stored, &site)?;
        let shape = Shape { size, backing: site.optional("backing"), discards };
        Ok(Opened { driver: Mapped(image), conf: shape, options: site.common })
    }
}

/// What is read of an image before anything is done with it.
pub(super) struct Read {
    pub(super) header: Header,
    pub(super) extensions: Extensions,
    /// Of the file, in bytes.
    end: u64,
    pub(super) sector: Vec<u8>,
    pub(super) l1: Vec<u64>,
    pub(super) refcount_table: Vec<u64>,
    pub(super) snapshots: Vec<Snapshot>,
    /// Entries of their L1 tables, where these are watched.
    inactive: Vec<u64>,
    /// Not the disk, but a snapshot of it.
    is_past: bool,
    /// What opens an encrypted one.
    crypt: Option<Crypt>,
}

impl Read {
    pub(super) async fn all(file: Child<'_>) -> Result<Self> {
        let end = file.size();
        let sector = part(file, ByteRange::whole(SECTOR)).await.doing(|| "Could not read the header")?;
        let header = Header::parse(&sector)?;
        let cluster = ByteRange::whole(1 << header.cluster_bits);
        let cluster = part(file, cluster).await.doing(|| "Could not read the header extensions")?;
        let extensions = Extensions::parse(&header, &cluster)?;
        let unknown = header.unknown_features();
        if unknown != 0 {
            let name = extensions.name_of(unknown);
            return Err(Error::new(format!("The image has an incompatible feature that is not known: {name}")));
        }
        let l1 = table(file, header.l1).await.doing(|| "Could not read the L1 table")?;
        let refcount_table = table(file, header.refcount_table).await.doing(|| "Could not read the refcount table")?;
        let snapshots = match header.snapshots {
            0 => Vec::new(),
            _ => {
                let at = ByteRange::new(header.snapshots_offset, snapshots::MAX_TABLE);
                let at = at.ok_or_else(|| Error::new("snapshots_offset is no place for a table"))?;
                let bytes = part(file, at).await.doing(|| "Could not read the snapshot table")?;
                snapshots::parse(&header, &bytes)?
            }
        };
        let (inactive, is_past, crypt) = (Vec::new(), false, None);
        Ok(Self { header, extensions, end, sector, l1, refcount_table, snapshots, inactive, is_past, crypt })
    }

    /// Which tables only snapshots have, where that has to be known.
    async fn watch(&mut self, file: Child<'_>, checks: Checks) -> Result<()> {
        for snapshot in self.snapshots.iter().filter(|_| checks.inactive_l2) {
            self.inactive.extend(table(file, snapshot.l1).await.doing(|| "Could not read a snapshot's L1 table")?);
        }
        Ok(())
    }

    /// An encrypted image is opened with a passphrase, and any other without one.
    async fn locked(
        &self,
        file: Child<'_>,
        given: Option<&Qcow2Encryption>,
        objects: &Objects,
    ) -> Result<Option<Locked>> {
        let Some(passphrase) = crypt::passphrase(&self.header, given, objects)? else { return Ok(None) };
        Locked::read(file, &self.header, &self.extensions, passphrase).await.map(Some)
    }

    /// Of an encrypted image, what can be known without a passphrase.
    async fn leave_locked(&mut self, file: Child<'_>) -> Result<()> {
        if crypt::kind(&self.header).is_some() {
            self.crypt = Some(Crypt::locked(file, &self.header, &self.extensions).await?);
        }
        Ok(())
    }

    /// Shows a snapshot.
    async fn go_back(&mut self, file: Child<'_>, which: &SnapshotName) -> Result<()> {
        let missing = || Error::new("Can't find the snapshot");
        let snapshot = position(&self.snapshots, which).and_then(|at| self.snapshots.get(at)).ok_or_else(missing)?;
        self.l1 = table(file, snapshot.l1).await.doing(|| "Could not read the snapshot's L1 table")?;
        self.header.l1 = snapshot.l1;
        self.header.size = snapshot.disk_size.unwrap_or(self.header.size);
        self.is_past = true;
        Ok(())
    }

    /// With slices of one entry: how large they are is a matter of options.
    pub(super) fn layout(&self) -> Layout {
        let header = &self.header;
        Layout {
            cluster_bits: header.cluster_bits,
            refcount_order: header.refcount_order,
            extended: header.has(EXTENDED_L2),
            version: header.version,
            external: header.has(DATA_FILE),
            slice_entries: 1,
        }
    }

    /// What has to be true for any use.
    fn check(&self, site: &Site<'_>) -> Result<()> {
        let Self { header, extensions, .. } = self;
        if let Some(name) = extensions.backing_file.as_ref().filter(|_| !site.is_given("backing")) {
            let format = extensions.backing_format.as_deref().unwrap_or("not recorded");
            return Err(Error::new(format!(
                "The image names the backing file '{name}' (format: {format}), and no file is opened because an image \
                 names it: give 'backing', which may be a node-name, a definition, or null"
            )));
        }
        let external = header.has(DATA_FILE);
        match (external, site.optional("data-file")) {
            (true, None) => {
                let name = extensions.data_file.as_deref().unwrap_or("not recorded");
                Err(Error::new(format!(
                    "The image keeps its data in another file (name: {name}), and no file is opened because an image \
                     names it: give 'data-file'"
                )))
            }
            (false, Some(_)) => {
                Err(Error::new("'data-file' can only be given for an image that keeps its data in another file"))
            }
            (true, Some(_)) if header.autoclear & RAW_DATA_FILE != 0 && site.optional("backing").is_some() => {
                Err(Error::new("An image whose data file is raw cannot have a backing file"))
            }
            _ => Ok(()),
        }
    }

    /// What has to be true before anything is written.
    pub(super) fn check_writable(&self) -> Result<()> {
        let Self { header, .. } = self;
        if self.is_past {
            return Err(Error::new(SNAPSHOT_IS_READ));
        }
        if header.crypt == crypt::AES {
            return Err(Error::new("An image with the old encryption (aes) can only be opened with 'read-only'"));
        }
        if header.has(CORRUPT_BIT) {
            return Err(Error::new("The image is marked corrupt, so it can only be opened with 'read-only'"));
        }
        self.check_overlaps()
    }

    /// Tables that would be written lie over each other.
    pub(super) fn check_overlaps(&self) -> Result<()> {
        let tables = self.tables();
        for (number, (range, what)) in tables.iter().enumerate() {
            if let Some((_, other)) = tables.iter().skip(number + 1).find(|(other, _)| other.overlaps(*range)) {
                return Err(Error::new(format!("In the image {what} lies over {other}")));
            }
        }
        Ok(())
    }

    /// What lies where from the beginning.
    fn tables(&self) -> Vec<(ByteRange, &'static str)> {
        let Self { header, .. } = self;
        let mut all = vec![(ByteRange::whole(1 << header.cluster_bits), HEADER)];
        all.extend([(header.l1, "the active L1 table"), (header.refcount_table, "the refcount table")]);
        all.extend(self.fixed().into_iter().filter(|(_, what)| [SNAPSHOTS, KEYS].contains(what)));
        all
    }

    /// The same, with what only snapshots and bitmaps lead to.
    pub(super) fn all_tables(&self) -> Vec<(ByteRange, &'static str)> {
        let Self { header, .. } = self;
        let mut all = self.fixed();
        all.extend([(header.l1, "the active L1 table"), (header.refcount_table, "the refcount table")]);
        all
    }

    /// Tables that nothing in memory leads to; the keys are one, too.
    fn fixed(&self) -> Vec<(ByteRange, &'static str)> {
        let Self { header, extensions, snapshots, .. } = self;
        let mut all = vec![(ByteRange::whole(1 << header.cluster_bits), HEADER)];
        all.extend(tables_of(snapshots, header.snapshots_offset));
        let vouched = extensions.bitmaps.filter(|_| header.autoclear & BITMAPS != 0);
        all.extend(vouched.map(|bitmaps| (bitmaps.directory, DIRECTORY)));
        all.extend(crypt::keys_place(header, extensions).map(|keys| (keys, KEYS)));
        all
    }
}

/// The table of the snapshots, at `offset`, and their L1 tables.
pub(super) fn tables_of(snapshots: &[Snapshot], offset: u64) -> impl Iterator<Item = (ByteRange, &'static str)> {
    let len = snapshots.iter().map(|snapshot| snapshot.len).sum();
    let table = ByteRange::new(offset, len).filter(|at| !at.is_empty());
    table.map(|at| (at, SNAPSHOTS)).into_iter().chain(snapshots.iter().map(|snapshot| (snapshot.l1, INACTIVE_L1)))
}

pub(super) const HEADER: &str = "the header";
pub(super) const SNAPSHOTS: &str = "the snapshot table";
pub(super) const INACTIVE_L1: &str = "a snapshot's L1 table";
pub(super) const DIRECTORY: &str = "the bitmap directory";
const KEYS: &str = "the LUKS header";

impl Checks {
    /// Tables of this kind are watched.
    pub(super) fn watch(self, what: &str) -> bool {
        match what {
            HEADER | KEYS => self.header,
            SNAPSHOTS => self.snapshot_table,
            INACTIVE_L1 => self.inactive_l1,
            _ => self.bitmaps,
        }
    }
}

impl Qcow2Options {
    fn image(&self, read: Read, stored: Stored, site: &Site<'_>) -> Result<Image> {
        let (fixed, refusal) = (read.fixed(), read.check_writable().err().map(|refusal| refusal.full()));
        let mut layout = read.layout();
        let Read { header, extensions, end, sector, l1, refcount_table, snapshots, inactive, crypt, .. } = read;
        layout.slice_entries = self.slice_entries(layout)?;
        let caches = self.caches(layout, header.size)?;
        let slices = Slices::new(layout, caches.slices);
        let slices = Arc::new(slices.doing(|| "There is no room for the cache of L2 tables")?);
        let checks = self.checks();
        let fixed = fixed.into_iter().filter(|(_, what)| checks.watch(what));
        let mut meta = Meta {
            layout,
            header: sector,
            l1_at: header.l1.start(),
            l1,
            l1_dirty: BTreeSet::new(),
            dirty: BTreeSet::new(),
            busy: BTreeSet::new(),
            own_tables: HashSet::new(),
            refs: Refs::new(
                refcount_table,
                header.refcount_table.start(),
                caches.blocks,
                end.div_ceil(layout.cluster()),
            ),
            freed: Vec::new(),
            abandoned: Vec::new(),
            stuck: Vec::new(),
            tries: 0,
            reuse: Reuse::default(),
            fixed: fixed.collect(),
            checks,
            snapshots,
            snapshots_at: header.snapshots_offset,
            inactive: HashMap::new(),
            packed: None,
            begun: 0,
            ended: [0; 2],
        };
        meta.watch_inactive(&inactive, true);
        let regions = Regions::new();
        meta.watched(|cluster| regions.mark(cluster));
        let meta = Arc::new(Mutex::new(meta));
        let cleaner = self.clean_interval()?.map(|interval| Cleaner::every(interval, &slices, &meta));
        Ok(Image {
            name: site.name.to_owned(),
            events: site.events.clone(),
            file: site.child("file"),
            data: site.optional("data-file"),
            raw_data: header.autoclear & RAW_DATA_FILE != 0,
            compression: header.compression,
            crypt,
            refusal,
            options: self.clone(),
            stored: Mutex::new(stored),
            readying: Turns::default(),
            slices,
            regions,
            meta,
            _cleaner: cleaner,
            loads: Turns::default(),
            tables: Turns::default(),
            blocks: Turns::default(),
            guests: Turns::default(),
            committing: Turns::default(),
            reclaiming: Turns::default(),
            packing: Turns::default(),
            neighbours: Turns::default(),
            header_turn: Turns::default(),
            is_ready: AtomicBool::new(false),
            is_corrupt: AtomicBool::new(false),
            is_unclean: AtomicBool::new(header.has(DIRTY)),
            is_lazy: header.version >= 3 && self.lazy_refcounts.unwrap_or(header.compatible & LAZY_REFCOUNTS != 0),
            is_late: AtomicBool::new(false),
            extensions: Mutex::new(Arc::new(extensions)),
            header,
            layout,
        })
    }
}

const SNAPSHOT_IS_READ: &str = "An internal snapshot can only be opened with 'read-only'";
const SECTOR: u64 = 512;

/// As much of the range as the file has.
pub(super) async fn part(file: Child<'_>, at: ByteRange) -> Result<Vec<u8>, IoError> {
    match ByteRange::whole(file.size()).intersection(at) {
        None => Ok(Vec::new()),
        Some(inside) => fetch(file, inside.start(), inside.len()).await,
    }
}

/// A table of words. One that the file does not have all of is not there.
async fn table(file: Child<'_>, at: ByteRange) -> Result<Vec<u64>, IoError> {
    let bytes = if at.is_empty() { Vec::new() } else { fetch(file, at.start(), at.len()).await? };
    Ok(bytes.chunks_exact(8).map(|word| u64::from_be_bytes(word.try_into().unwrap_or_default())).collect())
}
