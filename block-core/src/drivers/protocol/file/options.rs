//! What an operator says about a file or a block device, under QEMU's names.

use qmp::Qapi;

/// Who carries requests out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockdevAioOptions")]
pub enum Aio {
    /// Helper threads.
    #[default]
    Threads,
    /// The thread's io_uring, as for `io_uring`; taken for compatibility, and with `cache.direct` only.
    Native,
    /// The thread's io_uring.
    #[qapi(rename = "io_uring")]
    IoUring,
}

/// Whether other programs are kept off the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Qapi)]
#[qapi(name = "OnOffAuto")]
pub enum Locking {
    /// If the file system can.
    #[default]
    Auto,
    /// Or the image is not opened.
    On,
    /// No.
    Off,
}

/// A regular file of the host.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockdevOptionsFile")]
pub struct FileOptions {
    /// The path. It is taken as it is: nothing in it is read as a protocol.
    pub filename: String,
    /// The id of a helper for SCSI persistent reservations. Not supported yet: it is refused.
    pub pr_manager: Option<String>,
    /// Whether byte-range locks tell other programs what this node does with the image.
    #[qapi(default)]
    pub locking: Locking,
    /// Who carries requests out.
    #[qapi(default)]
    pub aio: Aio,
    /// How many requests are handed to the kernel at once, 0 for the default. Accepted, without effect: all
    /// requests of one turn go together.
    #[qapi(default = 0)]
    pub aio_max_batch: i64,
    /// Give the page cache of the file up when the node is activated, so that what another host wrote is seen.
    #[qapi(default = true)]
    pub drop_cache: bool,
    /// For debugging of QEMU. Accepted, without effect.
    #[qapi(default = false, feature = "unstable")]
    pub x_check_cache_dropped: bool,
}

/// A block device of the host.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockdevOptionsHostDevice")]
pub struct HostDeviceOptions {
    /// What `file` takes; the path is that of a block device.
    #[qapi(flatten)]
    pub file: FileOptions,
}
