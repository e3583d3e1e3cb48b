//! Making images: one variant a format, as `blockdev-create` has them. An image of a format is made in a node, which nobody
//! else uses meanwhile.

use std::os::unix::fs::MetadataExt;
use std::rc::Rc;

use qmp::Qapi;

use super::add::add_unnamed;
use super::amend::QCryptoBlockAmendOptionsLuks;
use super::luks::LuksCreateOptions;
use super::options::BlockdevRef;
use crate::base::{Error, Result};
use crate::drivers::format::luks;
use crate::drivers::format::qcow2::{self, AmendOptions};
use crate::drivers::keys::NewKeys;
use crate::drivers::protocol::file::{self, EXTENT_SIZE_HINT};
use crate::graph::{Child, Graph, NodeId, PermSet, Perms, Preallocation};
use crate::port::{PORT, Port, PortOptions};
use crate::rt::{Local, blocking};

/// What is to be made.
#[derive(Clone, Debug, PartialEq, Qapi)]
#[qapi(union, tag = "driver", tag_name = "BlockdevDriver")]
pub enum BlockdevCreateOptions {
    /// A regular file of the host.
    #[qapi(rename = "file")]
    File(BlockdevCreateOptionsFile),
    /// An encrypted disk (LUKS1).
    #[qapi(rename = "luks")]
    Luks(BlockdevCreateOptionsLuks),
    /// A qcow2 image.
    #[qapi(rename = "qcow2")]
    Qcow2(BlockdevCreateOptionsQcow2),
}

/// A regular file of the host.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
pub struct BlockdevCreateOptionsFile {
    /// The path. A file that is there already loses its contents, unless somebody uses it.
    pub filename: String,
    /// In bytes.
    pub size: u64,
    /// Whether space is reserved or written.
    #[qapi(default = PreallocMode::Off)]
    pub preallocation: PreallocMode,
    /// No copy-on-write (btrfs); elsewhere nothing.
    #[qapi(default = false)]
    pub nocow: bool,
    /// Allocate in pieces of this many bytes (XFS); 0: as the file system likes. Elsewhere nothing.
    #[qapi(default = u64::from(EXTENT_SIZE_HINT))]
    pub extent_size_hint: u64,
}

/// An encrypted disk (LUKS1).
#[derive(Clone, Debug, PartialEq, Qapi)]
#[qapi(name = "BlockdevCreateOptionsLUKS")]
pub struct BlockdevCreateOptionsLuks {
    /// The node that the image is made in. Its contents are lost. It may be left out where `header` is given.
    pub file: Option<BlockdevRef>,
    /// The node that the header is made in, if it is another one. Its contents are lost.
    pub header: Option<BlockdevRef>,
    /// Bytes of the disk; a multiple of 512.
    pub size: u64,
    /// How room is made; nothing is allocated if absent.
    pub preallocation: Option<PreallocMode>,
    /// How the disk is encrypted, and what opens it.
    #[qapi(flatten)]
    pub own: LuksCreateOptions,
}

/// A qcow2 image.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct BlockdevCreateOptionsQcow2 {
    /// The node that the image is made in. Its contents are lost.
    pub file: BlockdevRef,
    /// The node that holds the guest's data, if that is another one.
    pub data_file: Option<BlockdevRef>,
    /// Whether that node can be read without the image. False if absent.
    pub data_file_raw: Option<bool>,
    /// Whether clusters have subclusters. Needs version 3. False if absent.
    pub extended_l2: Option<bool>,
    /// Bytes of the disk; a multiple of 512.
    pub size: u64,
    /// The version of the format; v3 if absent.
    pub version: Option<Qcow2Version>,
    /// What the image says that it stands on. It is not looked at.
    pub backing_file: Option<String>,
    /// The format of that.
    pub backing_fmt: Option<String>,
    /// Bytes of a cluster; a power of two from 512 to 2 MiB, 64 KiB if absent.
    pub cluster_size: Option<u64>,
    /// How much is allocated from the beginning; nothing if absent.
    pub preallocation: Option<PreallocMode>,
    /// Whether the image says that its refcounts may be written late. Needs version 3. False if absent.
    pub lazy_refcounts: Option<bool>,
    /// Bits of a refcount; a power of two from 1 to 64, 16 if absent.
    pub refcount_bits: Option<i64>,
    /// How compressed clusters are compressed; zlib if absent.
    pub compression_type: Option<Qcow2CompressionType>,
    /// How the disk is encrypted; not at all if absent.
    pub encrypt: Option<QCryptoBlockCreateOptions>,
}

/// How a disk is encrypted.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(union, tag = "format", tag_name = "QCryptoBlockFormat")]
pub enum QCryptoBlockCreateOptions {
    /// With a LUKS header in the image.
    Luks(LuksCreateOptions),
}

/// The version of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockdevQcow2Version")]
pub enum Qcow2Version {
    /// The older one (`compat=0.10`).
    V2,
    /// The one in use (`compat=1.1`).
    V3,
}

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum Qcow2CompressionType {
    /// Deflate.
    Zlib,
    /// Zstandard. Needs version 3.
    Zstd,
}

/// How room is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum PreallocMode {
    /// Nothing is allocated.
    Off,
    /// Tables are allocated, data is not.
    Metadata,
    /// Space is reserved without being written.
    Falloc,
    /// Zeroes are written.
    Full,
}

impl From<PreallocMode> for Preallocation {
    fn from(mode: PreallocMode) -> Self {
        match mode {
            PreallocMode::Off => Self::Off,
            PreallocMode::Metadata => Self::Metadata,
            PreallocMode::Falloc => Self::Falloc,
            PreallocMode::Full => Self::Full,
        }
    }
}

/// Makes an image. If that fails, what was not there before is gone again.
pub async fn create(graph: &Rc<Graph>, options: BlockdevCreateOptions) -> Result<()> {
    match options {
        BlockdevCreateOptions::File(own) => {
            check_unused(graph, &own.filename).await?;
            create_file(own).await
        }
        BlockdevCreateOptions::Luks(own) => create_luks(graph, own).await,
        BlockdevCreateOptions::Qcow2(own) => create_qcow2(graph, own).await,
    }
}

async fn create_luks(graph: &Rc<Graph>, own: BlockdevCreateOptionsLuks) -> Result<()> {
    let passphrase = own.own.passphrase(graph.objects())?;
    let preallocation = own.preallocation.map_or(Preallocation::Off, Preallocation::from);
    let options = luks::CreateOptions { preallocation, ..own.own.parsed(own.size)? };
    match (&own.file, &own.header) {
        (None, None) => return Err(Error::new("Parameter 'file' is missing")),
        (None, Some(_)) if preallocation != Preallocation::Off => {
            return Err(Error::new("Parameter 'file' is required for 'preallocation'"));
        }
        _ => {}
    }
    let keys = options.keys(own.header.is_some(), passphrase).await?;
    let (options, keys) = (&options, &keys);
    let Some(header) = &own.header else {
        let file = own.file.as_ref().ok_or_else(|| Error::new("Parameter 'file' is missing"))?;
        return in_node(graph, file, async |file, _| luks::create(Some(file), None, options, keys).await).await;
    };
    in_node(graph, header, async |header, _| match &own.file {
        None => luks::create(None, Some(header), options, keys).await,
        Some(file) => {
            in_node(graph, file, async |file, _| luks::create(Some(file), Some(header), options, keys).await).await
        }
    })
    .await
}

async fn create_qcow2(graph: &Rc<Graph>, own: BlockdevCreateOptionsQcow2) -> Result<()> {
    if let Some(format) = own.backing_fmt.as_deref().filter(|format| !super::drivers().contains(format)) {
        return Err(Error::new(format!("Unknown backing format '{format}'")));
    }
    let keys = match &own.encrypt {
        None => None,
        Some(QCryptoBlockCreateOptions::Luks(encryption)) => {
            // What is refused is refused before anything is derived.
            own.parsed(own.data_file.is_some().then(String::new))?;
            let new = encryption.header(own.size, false)?;
            Some(NewKeys::derive(new, encryption.passphrase(graph.objects())?).await?)
        }
    };
    let keys = keys.as_ref();
    let Some(data) = own.data_file.clone() else {
        let options = own.parsed(None)?;
        return in_node(graph, &own.file, async |file, _| qcow2::create(file, None, &options, keys).await).await;
    };
    in_node(graph, &data, async |data, name| {
        let options = own.parsed(Some(name))?;
        in_node(graph, &own.file, async |file, _| qcow2::create(file, Some(data), &options, keys).await).await
    })
    .await
}

impl BlockdevCreateOptionsQcow2 {
    fn parsed(&self, data_file: Option<String>) -> Result<qcow2::CreateOptions> {
        if data_file.is_none() && self.data_file_raw == Some(true) {
            return Err(Error::new("data-file-raw requires data-file"));
        }
        let plain = qcow2::CreateOptions::of(self.size);
        let refcount_bits = self.refcount_bits.map(u32::try_from).transpose();
        Ok(qcow2::CreateOptions {
            version: if self.version == Some(Qcow2Version::V2) { 2 } else { 3 },
            cluster_size: self.cluster_size.unwrap_or(plain.cluster_size),
            refcount_bits: refcount_bits
                .map_err(|_| Error::new("Refcount width must be a power of two and may not exceed 64 bits"))?
                .unwrap_or(plain.refcount_bits),
            extended_l2: self.extended_l2.unwrap_or(plain.extended_l2),
            zstd: self.compression_type == Some(Qcow2CompressionType::Zstd),
            lazy_refcounts: self.lazy_refcounts.unwrap_or(plain.lazy_refcounts),
            backing_file: self.backing_file.clone(),
            backing_format: self.backing_fmt.clone(),
            data_file,
            data_file_raw: self.data_file_raw.unwrap_or(plain.data_file_raw),
            preallocation: self.preallocation.map_or(plain.preallocation, Preallocation::from),
            ..plain
        })
    }
}

/// Lets `work` have a node for itself, and tells it what a person would call the node's file. A node that was defined in
/// place is there for as long as that takes.
async fn in_node<R>(
    graph: &Rc<Graph>,
    given: &BlockdevRef,
    work: impl AsyncFnOnce(Child<'_>, String) -> Result<R>,
) -> Result<R> {
    let name = match given {
        BlockdevRef::Reference(name) => name,
        BlockdevRef::Definition(options) => {
            let node = add_unnamed(&mut graph.permit(), (**options).clone()).await?;
            let result = alone(graph, node, work).await;
            let removed = graph.permit().remove(node).await;
            return result.and_then(|value| removed.map(|()| value));
        }
    };
    let missing = || Error::new(format!("Cannot find device='{name}' nor node-name='{name}'"));
    alone(graph, graph.find(name).ok_or_else(missing)?, work).await
}

async fn alone<R>(
    graph: &Rc<Graph>,
    node: NodeId,
    work: impl AsyncFnOnce(Child<'_>, String) -> Result<R>,
) -> Result<R> {
    let filename = super::info(graph, node).await.map(|info| info.filename).unwrap_or_default();
    let uses = PermSet::CONSISTENT_READ | PermSet::WRITE | PermSet::RESIZE;
    let perms = Perms { uses, shares: PermSet::ALL.without(PermSet::WRITE | PermSet::RESIZE) };
    let options = PortOptions { name: "the making of an image".into(), perms };
    let port = Port::attach(&mut graph.permit(), node, options, Rc::new(|_| ())).await?;
    let result = port.handle().job(&Local::current()).step(async |cx| work(cx.child(PORT), filename).await).await;
    port.detach(&mut graph.permit()).await;
    result
}

/// A file that a node of the graph has open, under whatever name, keeps its contents.
async fn check_unused(graph: &Rc<Graph>, filename: &str) -> Result<()> {
    let mut open = Vec::new();
    for node in graph.nodes().into_iter().filter(|node| node.children.is_empty()) {
        if let Some(info) = graph.info(node.id).await.filter(|info| !info.filename.is_empty()) {
            open.push((node.name, info.filename));
        }
    }
    let wanted = filename.to_owned();
    let user = blocking(move || {
        let identity = |path: &str| {
            let stat = std::fs::metadata(path).ok()?;
            Some((stat.dev(), stat.ino()))
        };
        let wanted = identity(&wanted)?;
        open.into_iter().find(|(_, path)| identity(path) == Some(wanted))
    });
    match user.await {
        None => Ok(()),
        // Nobody knows that name. In QEMU's words for a file that somebody holds.
        Some((name, _)) if name.starts_with('#') => {
            Err(Error::new(format!("Failed to get \"write\" lock: Is another process using the image [{filename}]?")))
        }
        Some((name, _)) => Err(Error::new(format!("Could not create '{filename}': it is in use by node '{name}'"))),
    }
}

async fn create_file(own: BlockdevCreateOptionsFile) -> Result<()> {
    let hint = u32::try_from(own.extent_size_hint);
    file::create(file::CreateOptions {
        filename: own.filename,
        size: own.size,
        preallocation: own.preallocation.into(),
        nocow: own.nocow,
        extent_size_hint: hint.map_err(|_| Error::new("Extent size hint must not be larger than 4294967295"))?,
    })
    .await
}

/// Changes what the qcow2 image in `file` is like, and its key slots, as `keys` says; no node has the image open. `keys` names
/// in `secret` what opens it now, if a slot is filled. `force`: also what makes data unreadable for good. See
/// [`qcow2::amend`].
pub async fn amend_image(
    graph: &Rc<Graph>,
    file: &BlockdevRef,
    options: &AmendOptions,
    keys: Option<&QCryptoBlockAmendOptionsLuks>,
    force: bool,
) -> Result<()> {
    let change = keys.map(|keys| keys.change(graph.objects(), force)).transpose()?;
    in_node(graph, file, async |file, _| qcow2::amend(file, options, change.as_ref()).await).await
}

/// How large the file of an image will be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measurement {
    /// Bytes, with the data that there is.
    pub required: u64,
    /// Bytes, with all of the disk.
    pub fully_allocated: u64,
    /// Bytes for bitmaps besides, where both formats can store them.
    pub bitmaps: Option<u64>,
}

/// Measures an image that is not there yet, if `data` bytes of its clusters will hold data. `bitmaps`: what shall be stored
/// with it, by the lengths of their names and how many marks they have. Nodes that the options name are not looked at.
pub fn measure(options: &BlockdevCreateOptions, data: u64, bitmaps: Option<&[(u64, u64)]>) -> Result<Measurement> {
    match options {
        BlockdevCreateOptions::File(own) => {
            Ok(Measurement { required: own.size, fully_allocated: own.size, bitmaps: None })
        }
        BlockdevCreateOptions::Luks(own) => {
            let header = own.own.header(own.size, false)?.header_len();
            // The disk is elsewhere where the header has a file for itself.
            let disk = if own.header.is_some() { 0 } else { own.size };
            let too_large = || Error::new("The disk is too large for a file");
            let all = header.checked_add(disk).filter(|all| i64::try_from(*all).is_ok()).ok_or_else(too_large)?;
            Ok(Measurement { required: all, fully_allocated: all, bitmaps: None })
        }
        BlockdevCreateOptions::Qcow2(own) => {
            let file = own.data_file.is_some().then(|| "a data file".to_owned());
            let options = own.parsed(file)?;
            let keys = match &own.encrypt {
                None => 0,
                Some(QCryptoBlockCreateOptions::Luks(own)) => own.header(options.size, false)?.header_len(),
            };
            let qcow2::Measured { required, fully_allocated } = qcow2::measure(&options, data, keys)?;
            let bitmaps = bitmaps.filter(|_| options.version > 2);
            let bitmaps = bitmaps.map(|bitmaps| qcow2::measure_bitmaps(bitmaps, options.cluster_size));
            Ok(Measurement { required, fully_allocated, bitmaps })
        }
    }
}
