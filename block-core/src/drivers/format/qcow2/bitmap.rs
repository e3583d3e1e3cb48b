//! Persistent dirty bitmaps: reading them when the image is opened, and storing them when it is closed.
//!
//! The graph has the bitmaps while the image is open. What the image says of them becomes untrue with the first write, and
//! with the first change of any of them: before that, all of them are marked *in use* in the image, so that who finds it
//! after a crash knows that they may say too little. Storing writes everything anew beside what is there, and then the
//! header leads to the new directory; the old one, with its tables, is set free.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release};

use super::directory::{self, AUTO, EXTRA_COMPATIBLE, Entry, IN_USE, Part};
use super::entry::CORRUPT;
use super::extensions::Bitmaps;
use super::header::BITMAPS;
use super::heading::Heading;
use super::layout::Layout;
use super::meta::Run;
use super::open::{DIRECTORY, Read};
use super::tables::{fetch, put};
use super::{Image, Shape};
use crate::base::{ByteRange, Error, IoError, Result, ResultExt};
use crate::bitmap::Bitmap;
use crate::graph::{Child, IoCx, NodeBitmap};

/// What the image has of bitmaps.
#[derive(Default)]
pub(super) struct Stored {
    /// Where the directory is; `None`: the image has none, or does not vouch for it.
    place: Option<Bitmaps>,
    entries: Vec<Entry>,
    /// What they were when the image was opened, until they change.
    loaded: Vec<NodeBitmap>,
    /// The image says something else than memory.
    stale: bool,
}

/// Bits of all bitmaps of an image together, and bytes that are read of them.
const MAX_BITS: u64 = 65_536 << 20;
const MAX_BYTES: u64 = 1024 << 20;

impl Stored {
    /// Reads all bitmaps that the image vouches for.
    pub(super) async fn load(file: Child<'_>, read: &Read) -> Result<Self> {
        let Some(place) = read.extensions.bitmaps.filter(|_| read.header.autoclear & BITMAPS != 0) else {
            return Ok(Self::default());
        };
        let doing = || "Could not read the bitmap directory";
        let bytes = fetch(file, place.directory.start(), place.directory.len()).await.doing(doing)?;
        let (layout, size) = (read.layout(), read.header.size);
        let entries = directory::parse(&bytes, place, layout, size)?;
        let mut loading = Loading { file, layout, size, bits: 0, bytes: 0 };
        let mut loaded = Vec::new();
        for entry in &entries {
            let bitmap = loading.bitmap(entry).await;
            loaded.push(bitmap.doing(|| format!("Could not read the bitmap '{}'", entry.name))?);
        }
        // The youngest first, as the graph has them.
        loaded.reverse();
        Ok(Self { place: Some(place), entries, loaded, stale: false })
    }
}

/// Bitmaps that are being read, and what they have taken so far.
struct Loading<'a> {
    file: Child<'a>,
    layout: Layout,
    size: u64,
    bits: u64,
    bytes: u64,
}

impl Loading<'_> {
    async fn bitmap(&mut self, entry: &Entry) -> Result<NodeBitmap> {
        let is_valid = entry.is_valid();
        self.bits += if is_valid { self.size.div_ceil(entry.granularity().into()) } else { 0 };
        if self.bits > MAX_BITS {
            return Err(Error::new(format!("The bitmaps have more than {MAX_BITS} bits")));
        }
        let bits = Bitmap::new(if is_valid { self.size } else { 0 }, entry.granularity())?;
        if is_valid {
            self.read(entry, &bits).await?;
        }
        Ok(NodeBitmap {
            name: entry.name.clone(),
            recording: is_valid && entry.flags & AUTO != 0,
            persistent: true,
            inconsistent: !is_valid,
            bits: Arc::new(bits),
        })
    }

    async fn read(&mut self, entry: &Entry, bits: &Bitmap) -> Result<()> {
        let cluster = self.layout.cluster();
        let doing = || "Could not read its table";
        let table = fetch(self.file, entry.table.start(), entry.table.len()).await.doing(doing)?;
        for (number, word) in (0..).zip(table.chunks_exact(8)) {
            let word = u64::from_be_bytes(word.try_into().unwrap_or_default());
            let part = Part::parse(word, self.layout);
            let part = part.ok_or_else(|| Error::new(format!("Its table has the entry {word:#x}")))?;
            self.bytes += if part == Part::Clean { 0 } else { cluster };
            if self.bytes > MAX_BYTES {
                return Err(Error::new(format!("The bitmaps have more than {MAX_BYTES} bytes")));
            }
            let first = number * cluster / 8;
            match part {
                Part::Clean => {}
                Part::Dirty => bits.mark_words(first, (0..cluster / 8).map(|_| u64::MAX)),
                Part::At(start) => {
                    let bytes = fetch(self.file, start, cluster).await.doing(|| "Could not read its data")?;
                    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap_or_default());
                    bits.mark_words(first, bytes.chunks_exact(8).map(word));
                }
            }
        }
        Ok(())
    }
}

impl Image {
    /// What the image had when it was opened.
    pub(super) fn loaded_bitmaps(&self) -> Vec<NodeBitmap> {
        self.stored().loaded.clone()
    }

    /// As queries show what the image has (QEMU: `Qcow2BitmapInfo`).
    pub(super) fn stored_bitmaps(&self) -> Vec<serde_json::Value> {
        let one = |entry: &Entry| {
            let known = [(IN_USE, "in-use"), (AUTO, "auto")];
            let flags: Vec<_> = known.iter().filter(|(bit, _)| entry.flags & bit != 0).map(|(_, name)| name).collect();
            serde_json::json!({ "name": entry.name, "granularity": entry.granularity(), "flags": flags })
        };
        self.stored().entries.iter().map(one).collect()
    }

    /// Autoclear bits that stay when the image is written.
    pub(super) fn vouches_for_bitmaps(&self) -> u64 {
        if self.stored().place.is_some() { BITMAPS } else { 0 }
    }

    /// The bitmaps in the image are not what they are any more: says so in the image.
    pub(super) async fn mark_in_use(&self, cx: IoCx<'_>) -> Result<(), IoError> {
        let (place, mut entries) = {
            let mut stored = self.stored();
            stored.loaded = Vec::new();
            (stored.place, stored.entries.clone())
        };
        let Some(place) = place.filter(|_| entries.iter().any(Entry::is_valid)) else { return Ok(()) };
        let owner = self.meta().other_owner_of(place.directory, DIRECTORY);
        if let Some(owner) = owner {
            let what = format!("the bitmap directory lies over {owner}");
            return Err(self.corrupt(cx, &what, place.directory).await);
        }
        entries.iter_mut().filter(|entry| entry.is_valid()).for_each(|entry| entry.flags |= IN_USE);
        let file = cx.child(self.file);
        // Flags are all that changes, so any part of this may come without the rest.
        put(file, place.directory.start(), &directory::bytes(&entries)).await?;
        file.flush().await?;
        let mut stored = self.stored();
        (stored.entries, stored.stale) = (entries, true);
        Ok(())
    }

    /// The image shall store these. What it says of those that it has is untrue from now on.
    pub(super) async fn keep(&self, shape: &Shape, cx: IoCx<'_>, bitmaps: &[NodeBitmap]) -> Result<()> {
        // The youngest is the one that comes, if one comes.
        let doing = || {
            let name = bitmaps.first().map(|bitmap| &*bitmap.name).unwrap_or_default();
            format!("Can't make bitmap '{name}' persistent in '{}'", self.name)
        };
        self.can_store(shape, cx, bitmaps).await.doing(doing)?;
        self.ready(cx).await.doing(|| "The image cannot be written")?;
        self.stored().stale = true;
        Ok(())
    }

    async fn can_store(&self, shape: &Shape, cx: IoCx<'_>, bitmaps: &[NodeBitmap]) -> Result<()> {
        if self.layout.version < 3 {
            return Err(Error::new("Cannot store dirty bitmaps in qcow2 v2 files"));
        }
        let entries = self.directory_of(bitmaps);
        // That of the disk, or the one that it is going to have.
        let size = bitmaps.iter().find(|bitmap| !bitmap.inconsistent).map_or(shape.size, |bitmap| bitmap.bits.size());
        directory::check(&entries, self.layout, size)?;
        // What is stored can be loaded again.
        let valid = entries.iter().filter(|entry| entry.is_valid());
        let clusters: u64 = valid.map(|entry| entry.table_entries(self.layout, size)).sum();
        if clusters.saturating_mul(self.layout.cluster()) > MAX_BYTES {
            return Err(Error::new(format!("The bitmaps of the image would have more than {MAX_BYTES} bytes")));
        }
        let heading = self.heading(cx).await.doing(|| "Could not read the header")?;
        if heading.has_room() {
            return Ok(());
        }
        Err(Error::new("The first cluster of the image has no room for the header extension"))
    }

    /// As they are to be in the directory, but for their tables.
    fn directory_of(&self, bitmaps: &[NodeBitmap]) -> Vec<Entry> {
        let stored = self.stored();
        let old: HashMap<_, _> = stored.entries.iter().map(|entry| (&*entry.name, entry)).collect();
        let entry = |bitmap: &NodeBitmap| match old.get(&*bitmap.name) {
            Some(old) if bitmap.inconsistent => (*old).clone(),
            old => {
                let new = Entry::new(&bitmap.name, bitmap.bits.granularity(), bitmap.recording);
                let extra = old.map(|old| old.extra.clone()).unwrap_or_default();
                let compatible = if extra.is_empty() { 0 } else { EXTRA_COMPATIBLE };
                Entry { flags: new.flags | compatible, extra, ..new }
            }
        };
        bitmaps.iter().map(entry).collect()
    }

    /// Nobody else is inside: the image has the bitmaps as they are. The next write makes that untrue again.
    pub(super) async fn store(&self, cx: IoCx<'_>, bitmaps: &[NodeBitmap]) -> Result<(), IoError> {
        if !self.stored().stale || self.is_corrupt.load(Acquire) {
            return Ok(());
        }
        // A flag that could not be set before has to be.
        self.ready(cx).await?;
        let mut taken = Vec::new();
        let stored = self.store_anew(cx, bitmaps, &mut taken).await;
        if stored.is_err() {
            self.meta().abandoned.extend(taken);
        }
        stored
    }

    async fn store_anew(&self, cx: IoCx<'_>, bitmaps: &[NodeBitmap], taken: &mut Vec<Run>) -> Result<(), IoError> {
        let mut entries = Vec::new();
        // The oldest first.
        for (bitmap, entry) in bitmaps.iter().zip(self.directory_of(bitmaps)).rev() {
            let table =
                if bitmap.inconsistent { entry.table } else { self.write_bits(cx, &bitmap.bits, taken).await? };
            entries.push(Entry { table, ..entry });
        }
        let bytes = directory::bytes(&entries);
        let place = if entries.is_empty() {
            None
        } else {
            let directory = self.write_table(cx, &bytes, taken).await?;
            Some(Bitmaps { count: u32::try_from(entries.len()).map_err(|_| IoError::NoSpace)?, directory })
        };
        // Refcounts come before what leads there.
        self.commit(cx).await?;
        let heading = self.heading(cx).await?;
        let write = async |bytes: &[u8], part: std::ops::Range<usize>| self.write_heading(cx, bytes, part).await;
        let switched = heading.set_bitmaps(place, write).await;
        // What was taken is in use from here on, whatever comes of the rest.
        taken.clear();
        switched.inspect_err(|error| self.give_up("the change of its bitmap directory", *error))?;
        let gone = self.replaced(cx, &entries).await;
        let mut meta = self.meta();
        gone.into_iter().for_each(|run| meta.free(run));
        meta.fixed.retain(|(_, what)| *what != DIRECTORY);
        if let Some(place) = place.filter(|_| meta.checks.bitmaps) {
            meta.fixed.push((place.directory, DIRECTORY));
        }
        drop(meta);
        let mut stored = self.stored();
        (stored.place, stored.entries, stored.stale) = (place, entries, false);
        drop(stored);
        self.is_ready.store(false, Release);
        Ok(())
    }

    /// The clusters of the directory that was, and of bitmaps that are not there any more as they were.
    async fn replaced(&self, cx: IoCx<'_>, now: &[Entry]) -> Vec<Run> {
        let (place, old) = {
            let stored = self.stored();
            (stored.place, stored.entries.clone())
        };
        let (file, bits) = (cx.child(self.file), self.layout.cluster_bits);
        let run = |range: ByteRange| {
            let count = range.len().div_ceil(self.layout.cluster());
            Run { cluster: range.start() >> bits, count, punch: true }
        };
        let mut gone: Vec<Run> = place.into_iter().map(|place| run(place.directory)).collect();
        let kept: HashSet<u64> = now.iter().map(|entry| entry.table.start()).collect();
        for entry in old.iter().filter(|old| !kept.contains(&old.table.start())) {
            let Ok(table) = fetch(file, entry.table.start(), entry.table.len()).await else {
                // They leak.
                tracing::warn!("a table of the bitmap '{}' in the image of '{}' cannot be read", entry.name, self.name);
                continue;
            };
            gone.push(run(entry.table));
            for word in table.chunks_exact(8) {
                let word = u64::from_be_bytes(word.try_into().unwrap_or_default());
                if let Some(Part::At(start)) = Part::parse(word, self.layout) {
                    gone.push(Run { cluster: start >> bits, count: 1, punch: true });
                }
            }
        }
        // An image may say that its bitmaps lie over its other tables. Those stay.
        gone.retain(|run| !self.is_other_table(*run));
        gone
    }

    fn is_other_table(&self, run: Run) -> bool {
        let (bits, mut all) = (self.layout.cluster_bits, run.cluster..run.cluster + run.count);
        let range = ByteRange::new(run.cluster << bits, run.count << bits);
        all.any(|cluster| self.regions.may_own(cluster))
            && range.is_none_or(|range| self.meta().other_owner_of(range, DIRECTORY).is_some())
    }

    /// The data and the table of a bitmap.
    async fn write_bits(&self, cx: IoCx<'_>, bits: &Bitmap, taken: &mut Vec<Run>) -> Result<ByteRange, IoError> {
        let cluster = self.layout.cluster();
        let span = cluster * 8 * u64::from(bits.granularity());
        let mut table = Vec::new();
        for number in 0..bits.size().div_ceil(span).max(1) {
            let start = number * span;
            let part = ByteRange::between(start, bits.size().min(start.saturating_add(span)));
            let part = part.ok_or(IoError::OutOfRange)?;
            let what = if bits.next_dirty(part).is_none() {
                Part::Clean
            } else if part.len() == span && bits.next_clean(part).is_none() {
                Part::Dirty
            } else {
                let run = self.take(cx, 1).await?;
                taken.push(run);
                let words = bits.words(number * cluster / 8, cluster / 8);
                let at = run.cluster << self.layout.cluster_bits;
                put(cx.child(self.file), at, &words.flat_map(u64::to_le_bytes).collect::<Vec<_>>()).await?;
                Part::At(at)
            };
            table.extend(what.word().to_be_bytes());
        }
        self.write_table(cx, &table, taken).await
    }

    async fn write_table(&self, cx: IoCx<'_>, bytes: &[u8], taken: &mut Vec<Run>) -> Result<ByteRange, IoError> {
        let run = self.take_table(cx, (bytes.len() as u64).div_ceil(self.layout.cluster())).await?;
        taken.push(run);
        let at = run.cluster << self.layout.cluster_bits;
        let mut whole = bytes.to_vec();
        whole.resize(usize::try_from(run.count * self.layout.cluster()).map_err(|_| IoError::NoMemory)?, 0);
        put(cx.child(self.file), at, &whole).await?;
        ByteRange::new(at, bytes.len() as u64).ok_or(CORRUPT)
    }

    pub(super) async fn heading(&self, cx: IoCx<'_>) -> Result<Heading, IoError> {
        let cluster = self.layout.cluster();
        let there = cluster.min(cx.child(self.file).size());
        let mut bytes = fetch(cx.child(self.file), 0, there).await?;
        bytes.resize(usize::try_from(cluster).map_err(|_| IoError::NoMemory)?, 0);
        Ok(Heading { bytes })
    }

    /// Writes the sectors that have a part of the heading, and makes them stable.
    pub(super) async fn write_heading(
        &self,
        cx: IoCx<'_>,
        bytes: &[u8],
        part: std::ops::Range<usize>,
    ) -> Result<(), IoError> {
        let _turn = self.header_turn.at(cx, 0).await;
        let (start, end) = (part.start / 512 * 512, part.end.next_multiple_of(512));
        let file = cx.child(self.file);
        put(file, start as u64, &bytes[start..end]).await?;
        if start == 0 {
            self.meta().header = bytes[..512].to_vec();
        }
        file.flush().await
    }
}
