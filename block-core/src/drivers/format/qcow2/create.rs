//! Making an image. All tables are in the file before the header is, so that half an image is none.

use super::crypt;
use super::entry::{COPIED, Granules};
use super::extensions::{BACKING_FORMAT, DATA_FILE as DATA_FILE_NAME, END};
use super::header::{
    self, COMPRESSION_TYPE, DATA_FILE, EXTENDED_L2, LAZY_REFCOUNTS, MAGIC, MAX_BACKING_NAME, MAX_L1,
    MAX_REFCOUNT_TABLE, RAW_DATA_FILE, V2_LENGTH,
};
use super::layout::Layout;
use super::refcounts::Block;
use super::tables::put;
use super::write::mask;
use crate::base::{ByteRange, Error, IoError, Result, ResultExt, SECTOR};
use crate::drivers::format::{check_room, grown};
use crate::drivers::keys::NewKeys;
use crate::graph::{Child, Preallocation, WriteFlags};
use crate::pipeline::Seal;
use crate::rt::IoBuf;

/// What a new image is to be (QEMU: `BlockdevCreateOptionsQcow2`; the files are nodes, and given apart).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// `size`: bytes of the disk, a multiple of 512.
    pub size: u64,
    /// `version`: 2 or 3.
    pub version: u8,
    /// `cluster-size`: a power of two from 512 bytes to 2 MiB; with `extended_l2` at least 16 KiB.
    pub cluster_size: u64,
    /// `refcount-bits`: a power of two from 1 to 64; version 2 has 16.
    pub refcount_bits: u32,
    /// `extended-l2`: clusters have subclusters. Needs version 3.
    pub extended_l2: bool,
    /// `compression-type`: compressed clusters are zstd's rather than zlib's. Needs version 3.
    pub zstd: bool,
    /// `lazy-refcounts`: the image says that refcounts may be written late. Needs version 3.
    pub lazy_refcounts: bool,
    /// `backing-file`: what the image says that it stands on. At most 1023 bytes.
    pub backing_file: Option<String>,
    /// `backing-fmt`: the format of that.
    pub backing_format: Option<String>,
    /// What the image says of the data file, where there is one.
    pub data_file: Option<String>,
    /// `data-file-raw`: that file can be read without the image.
    pub data_file_raw: bool,
    /// `preallocation`.
    pub preallocation: Preallocation,
}

impl CreateOptions {
    /// An image of `size` bytes as QEMU makes it where nothing else is said.
    pub fn of(size: u64) -> Self {
        Self {
            size,
            version: 3,
            cluster_size: 65536,
            refcount_bits: 16,
            extended_l2: false,
            zstd: false,
            lazy_refcounts: false,
            backing_file: None,
            backing_format: None,
            data_file: None,
            data_file_raw: false,
            preallocation: Preallocation::Off,
        }
    }
}

/// Makes an image in `file`, whose contents are lost, with its data in `data` if that is given: what a raw data file has is
/// kept, and is the disk; any other may be emptied. The caller may write and
/// resize both, and nobody else uses them. With `keys` it is encrypted: a raw data file holds the encrypted disk then.
pub async fn create(
    file: Child<'_>,
    data: Option<Child<'_>>,
    options: &CreateOptions,
    keys: Option<&NewKeys>,
) -> Result<()> {
    let plan = Plan::new(options, data.is_some(), keys)?;
    let doing = || "Could not create the qcow2 image";
    check_room(file, plan.end() << plan.layout.cluster_bits).doing(doing)?;
    data.map_or(Ok(()), |data| check_room(data, options.size)).doing(doing)?;
    // What was there is no image from here on, and is not found in clusters later.
    if file.moving_end().is_some() {
        file.set_end(0, Preallocation::Off).await.doing(doing)?;
    } else {
        put(file, 0, &[0; 512]).await.doing(doing)?;
    }
    plan.write(file, data).await.doing(doing)?;
    file.flush().await.doing(doing)?;
    put(file, 0, &plan.header()?).await.doing(doing)?;
    file.flush().await.doing(doing)
}

/// What lies where: the header, the refcount table, its blocks, the L1 table, and where clusters are allocated in advance,
/// L2 tables and data. In clusters.
struct Plan<'a> {
    options: &'a CreateOptions,
    layout: Layout,
    table: u64,
    blocks: u64,
    l1_entries: u64,
    l1: u64,
    l2: u64,
    /// Of the image's own.
    data: u64,
    keys: Option<&'a NewKeys>,
    /// How data will be encrypted.
    seal: Option<Seal>,
    blank: Blank,
}

/// How clusters that are allocated in advance read as zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Blank {
    /// Nothing has been written there.
    Unwritten,
    /// Tables say so.
    Said,
    /// Zeroes are written, encrypted.
    Sealed,
}

impl Blank {
    fn of(options: &CreateOptions, is_sealed: bool) -> Self {
        match options.preallocation {
            // What a raw data file has is kept, whatever comes of decrypting it.
            _ if !is_sealed || options.data_file_raw => Self::Unwritten,
            Preallocation::Off => Self::Unwritten,
            Preallocation::Metadata | Preallocation::Falloc if options.version > 2 => Self::Said,
            Preallocation::Metadata | Preallocation::Falloc | Preallocation::Full => Self::Sealed,
        }
    }
}

impl<'a> Plan<'a> {
    fn new(options: &'a CreateOptions, external: bool, keys: Option<&'a NewKeys>) -> Result<Self> {
        let layout = layout(options, external)?;
        let size = options.size;
        if i64::try_from(size).is_err() || !size.is_multiple_of(SECTOR) {
            return Err(Error::new("Image size must be a multiple of 512 bytes, and at most 8 EiB"));
        }
        let l1_entries = layout.l1_entries(size);
        if l1_entries * 8 > MAX_L1 {
            return Err(Error::new("The image cannot be that large with clusters of this size"));
        }
        // A raw data file may hold data already: all of it is the disk's.
        let allocates = options.preallocation != Preallocation::Off || (external && options.data_file_raw);
        let data = if allocates { size.div_ceil(layout.cluster()) } else { 0 };
        let mut plan = Self {
            options,
            layout,
            table: 1,
            blocks: 1,
            l1_entries,
            l1: (l1_entries * 8).div_ceil(layout.cluster()),
            l2: if allocates { l1_entries } else { 0 },
            data: if external { 0 } else { data },
            keys,
            seal: keys
                .map(|keys| keys.cipher().map(|cipher| Seal { cipher: Some(cipher), by_guest: false }))
                .transpose()?,
            blank: Blank::of(options, keys.is_some()),
        };
        loop {
            let blocks = plan.end().div_ceil(layout.block_entries());
            let table = (blocks * 8).div_ceil(layout.cluster());
            if (blocks, table) == (plan.blocks, plan.table) {
                break;
            }
            (plan.blocks, plan.table) = (blocks.max(plan.blocks), table.max(plan.table));
        }
        if plan.table * layout.cluster() > MAX_REFCOUNT_TABLE {
            return Err(Error::new("The image cannot be that large with refcounts of this width"));
        }
        Ok(plan)
    }

    fn first_l1(&self) -> u64 {
        1 + self.table + self.blocks
    }

    fn first_keys(&self) -> u64 {
        self.first_l1() + self.l1 + self.l2
    }

    fn first_data(&self) -> u64 {
        self.first_keys() + self.keys.map_or(0, |keys| room(keys).div_ceil(self.layout.cluster()))
    }

    fn end(&self) -> u64 {
        self.first_data() + self.data
    }

    async fn write(&self, file: Child<'_>, data: Option<Child<'_>>) -> Result<(), IoError> {
        let (layout, bits) = (self.layout, self.layout.cluster_bits);
        let cluster = usize::try_from(layout.cluster()).map_err(|_| IoError::NoMemory)?;
        let table = words(self.table, cluster, (1 + self.table..).map(|at| at << bits).take(to_usize(self.blocks)));
        put(file, 1 << bits, &table).await?;
        for number in 0..self.blocks {
            let (mut block, base) = (Block::empty(layout), number * layout.block_entries());
            let used = self.end().saturating_sub(base).min(layout.block_entries());
            (0..used).for_each(|index| block.set(layout, index, 1));
            put(file, (1 + self.table + number) << bits, block.bytes()).await?;
        }
        let first_l2 = self.first_l1() + self.l1;
        let l1 = (first_l2..first_l2 + self.l2).map(|at| at << bits | COPIED);
        if self.l1 > 0 {
            put(file, self.first_l1() << bits, &words(self.l1, cluster, l1)).await?;
        }
        for number in 0..self.l2 {
            put(file, (first_l2 + number) << bits, &self.l2_table(number, cluster)).await?;
        }
        if let Some(NewKeys { header, material, .. }) = self.keys {
            let start = self.first_keys() << bits;
            put(file, start + header.material(0).start(), material.expose()).await?;
            put(file, start, &header.to_bytes()).await?;
        }
        self.reserve(file, data).await
    }

    /// All clusters that the table describes, one after another.
    fn l2_table(&self, number: u64, cluster: usize) -> Vec<u8> {
        let (layout, bits) = (self.layout, self.layout.cluster_bits);
        let first = number * layout.l2_entries();
        let all = self.options.size.div_ceil(layout.cluster());
        let base = if layout.external { 0 } else { self.first_data() };
        let every = mask(0, layout.granules());
        let (data, zero) = if self.blank == Blank::Said { (0, every) } else { (every, 0) };
        let entries = (first..all.min(first + layout.l2_entries())).flat_map(|guest| {
            let host = Some((base + guest) << bits);
            let entry = Granules { host, own: true, data, zero }.entry(layout);
            [entry.word, entry.bitmap].into_iter().take(if layout.extended { 2 } else { 1 })
        });
        words(1, cluster, entries)
    }

    /// Space for the data that tables lead to already, of zeroes.
    async fn reserve(&self, file: Child<'_>, data: Option<Child<'_>>) -> Result<(), IoError> {
        let how = match self.options.preallocation {
            Preallocation::Metadata => Preallocation::Off,
            other => other,
        };
        if let Some(data) = data {
            // The place of the keys is not written in full.
            let end = self.end() << self.layout.cluster_bits;
            if self.keys.is_some() && file.moving_end().is_some() {
                file.set_end(end, Preallocation::Off).await?;
            }
            self.reserve_outside(data, how).await?;
            return self.seal_zeroes(data, 0, self.options.size).await;
        }
        let (start, end) = (self.first_data() << self.layout.cluster_bits, self.end() << self.layout.cluster_bits);
        if file.moving_end().is_some() {
            grown(file, end, how).await?;
        } else {
            zeroes(file, start, end).await?;
        }
        self.seal_zeroes(file, start, end).await
    }

    async fn reserve_outside(&self, data: Child<'_>, how: Preallocation) -> Result<(), IoError> {
        let size = self.options.size;
        // What a raw data file has is kept: this is how a raw disk gets an image. Elsewhere tables may lead to it already.
        if !self.options.data_file_raw && self.options.preallocation != Preallocation::Off {
            if data.moving_end().is_none() {
                return zeroes(data, 0, size).await;
            }
            data.set_end(0, Preallocation::Off).await?;
        }
        if data.size() >= size {
            return Ok(());
        }
        if data.moving_end().is_some() { grown(data, size, how).await } else { Err(IoError::NoSpace) }
    }

    /// The disk's first bytes are at `start`.
    async fn seal_zeroes(&self, child: Child<'_>, start: u64, end: u64) -> Result<(), IoError> {
        let all = ByteRange::between(start, end).filter(|all| !all.is_empty());
        let (Some(all), Some(seal), Blank::Sealed) = (all, &self.seal, self.blank) else { return Ok(()) };
        let blank = IoBuf::private(all.len().min(PIECE))?;
        for piece in all.pieces(PIECE) {
            let sealed = seal.sealed(piece.start() - start, piece.start(), &blank.slice(0, piece.len()))?;
            child.write(piece, sealed, WriteFlags::default()).await?;
        }
        Ok(())
    }

    fn header(&self) -> Result<Vec<u8>> {
        let (options, bits) = (self.options, self.layout.cluster_bits);
        let cluster = to_usize(self.layout.cluster());
        let mut bytes = vec![0; to_usize(if options.version == 2 { V2_LENGTH } else { LENGTH }.into())];
        let mut field = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        field(0, &MAGIC);
        field(4, &u32::from(options.version).to_be_bytes());
        field(20, &u32::from(bits).to_be_bytes());
        field(header::AT_SIZE, &options.size.to_be_bytes());
        field(header::AT_L1, &u32::try_from(self.l1_entries).unwrap_or(u32::MAX).to_be_bytes());
        field(40, &(if self.l1 > 0 { self.first_l1() << bits } else { 0 }).to_be_bytes());
        field(header::AT_REFCOUNT_TABLE, &(1u64 << bits).to_be_bytes());
        field(56, &u32::try_from(self.table).unwrap_or(u32::MAX).to_be_bytes());
        field(32, &(if self.keys.is_some() { crypt::LUKS } else { 0 }).to_be_bytes());
        if options.version == 3 {
            let external = self.layout.external;
            let features =
                [(DATA_FILE, external), (COMPRESSION_TYPE, options.zstd), (EXTENDED_L2, options.extended_l2)];
            let incompatible: u64 = features.iter().filter(|(_, has)| *has).map(|(bit, _)| bit).sum();
            field(header::AT_INCOMPATIBLE, &incompatible.to_be_bytes());
            field(80, &(if options.lazy_refcounts { LAZY_REFCOUNTS } else { 0 }).to_be_bytes());
            field(header::AT_AUTOCLEAR, &(if options.data_file_raw { RAW_DATA_FILE } else { 0 }).to_be_bytes());
            field(96, &u32::from(self.layout.refcount_order).to_be_bytes());
            field(100, &LENGTH.to_be_bytes());
            field(104, &[u8::from(options.zstd)]);
        }
        extension(&mut bytes, BACKING_FORMAT, options.backing_format.as_deref().map(str::as_bytes));
        extension(&mut bytes, DATA_FILE_NAME, options.data_file.as_deref().map(str::as_bytes));
        let keys = self.keys.map(|keys| [(self.first_keys() << bits).to_be_bytes(), room(keys).to_be_bytes()].concat());
        extension(&mut bytes, crypt::CRYPTO, keys.as_deref());
        bytes.extend([END.to_be_bytes(), [0; 4]].concat());
        if let Some(name) = &options.backing_file {
            let at = bytes.len() as u64;
            bytes[8..16].copy_from_slice(&at.to_be_bytes());
            bytes[16..20].copy_from_slice(&u32::try_from(name.len()).unwrap_or(u32::MAX).to_be_bytes());
            bytes.extend(name.as_bytes());
        }
        if bytes.len() > cluster {
            return Err(Error::new("The names do not fit into the first cluster"));
        }
        bytes.resize(cluster, 0);
        Ok(bytes)
    }
}

/// Bytes of the place where the keys are.
fn room(keys: &NewKeys) -> u64 {
    keys.header.payload().offset
}

/// Zeroes that are encrypted and written at once, in bytes.
const PIECE: u64 = 1 << 20;
/// Of a header of version 3.
const LENGTH: u32 = 112;

pub(super) fn layout(options: &CreateOptions, external: bool) -> Result<Layout> {
    let refuse = |text: &'static str| Err(Error::new(text));
    if !options.cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&options.cluster_size) {
        return refuse("Cluster size must be a power of two between 512 and 2048k");
    }
    if !options.refcount_bits.is_power_of_two() || options.refcount_bits > 64 {
        return refuse("Refcount width must be a power of two and may not exceed 64 bits");
    }
    let is_new = options.extended_l2 || options.zstd || options.lazy_refcounts || external;
    match options.version {
        3 => {}
        2 if is_new || options.refcount_bits != 16 => {
            return refuse(
                "Subclusters, zstd, lazy refcounts, data files and other refcounts than 16 bits need version 3",
            );
        }
        2 => {}
        _ => return refuse("The version is 2 or 3"),
    }
    if options.extended_l2 && options.cluster_size < 16384 {
        return refuse("Extended L2 entries need clusters of at least 16 KiB");
    }
    if options.data_file.is_some() != external || (options.data_file_raw && !external) {
        return refuse("A data file's name and 'data-file-raw' need a data file");
    }
    if options.backing_file.as_ref().is_some_and(|name| name.len() as u64 > MAX_BACKING_NAME || name.is_empty()) {
        return refuse("The name of a backing file has 1 to 1023 bytes");
    }
    if options.backing_file.is_none() && options.backing_format.is_some() {
        return refuse("Backing format cannot be used without backing file");
    }
    let prealloc = options.preallocation != Preallocation::Off;
    if options.backing_file.is_some() && (prealloc || options.data_file_raw) {
        return refuse("A backing file cannot be used with preallocation, nor with a raw data file");
    }
    #[expect(clippy::cast_possible_truncation, reason = "both are less than 64")]
    Ok(Layout {
        cluster_bits: options.cluster_size.trailing_zeros() as u8,
        refcount_order: options.refcount_bits.trailing_zeros() as u8,
        extended: options.extended_l2,
        version: options.version,
        external,
        slice_entries: 1,
    })
}

/// Clusters of big-endian words; what is left of them is zero.
fn words(clusters: u64, cluster: usize, words: impl Iterator<Item = u64>) -> Vec<u8> {
    let mut bytes: Vec<u8> = words.flat_map(u64::to_be_bytes).collect();
    bytes.resize(to_usize(clusters) * cluster, 0);
    bytes
}

fn extension(bytes: &mut Vec<u8>, kind: u32, data: Option<&[u8]>) {
    let Some(data) = data else { return };
    bytes.extend(kind.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}

async fn zeroes(child: Child<'_>, start: u64, end: u64) -> Result<(), IoError> {
    if end > child.size() {
        return Err(IoError::NoSpace);
    }
    match ByteRange::between(start, end).filter(|at| !at.is_empty()) {
        Some(at) => child.write_zeroes(at, WriteFlags::default()).await,
        None => Ok(()),
    }
}

fn to_usize(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
