//! What a node says about itself to those above: its size, and how it wants its requests.
//!
//! Computed bottom-up when a change is published (children first), so a request reads it from its view.

/// Size and limits of a node, as its parents see them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// In bytes, at most `i64::MAX`.
    pub size: u64,
    /// How requests have to look.
    pub limits: Limits,
}

/// How a node wants its requests. Whoever sends others gets them aligned, split or bounced by the pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Offsets and lengths are multiples of this; a power of two, 1 to 1 GiB.
    pub request_alignment: u32,
    /// Addresses and lengths of buffers are multiples of this; a power of two. 1: any buffer will do.
    pub memory_alignment: u32,
    /// Bytes in one read or write at the most; a multiple of `request_alignment`.
    pub max_transfer: u64,
    /// Buffers in one read or write at the most.
    pub max_segments: usize,
    /// Bytes in one write-zeroes at the most.
    pub max_write_zeroes: u64,
    /// The part of a write of zeroes that is not aligned to this is written from a buffer; a multiple of
    /// `request_alignment`.
    pub write_zeroes_alignment: u32,
    /// Bytes in one discard at the most.
    pub max_discard: u64,
    /// The part of a discard that is not aligned to this is left alone; a power of two.
    pub discard_alignment: u32,
    /// What the medium writes at once, in bytes; told to guests as the physical block size.
    pub physical_block: u32,
    /// A request of this many bytes, or a multiple, is fast; 0: unknown.
    pub optimal_transfer: u32,
    /// The driver makes a write stable by itself when it is asked to; otherwise the pipeline flushes after it.
    pub fua: bool,
    /// Zeroing may free the space below, where it is asked for.
    pub unmap_zeroes: bool,
    /// Discards reach something that can use them.
    pub discard: bool,
    /// Writes can be compressed; whole units of this many bytes at a time. 0: they cannot.
    pub compressed_cluster: u32,
    /// The node, or the one that it filters, stands on a backing node: what it reads may be another layer's. The graph
    /// sees to this one itself.
    pub backed: bool,
    /// The node, or one that it hands events down to, hears what is announced to it.
    pub listens: bool,
}

impl Limits {
    /// Takes everything as it comes.
    pub const ANY: Self = Self {
        request_alignment: 1,
        memory_alignment: 1,
        max_transfer: MAX_TRANSFER,
        max_segments: MAX_SEGMENTS,
        max_write_zeroes: u64::MAX,
        write_zeroes_alignment: 1,
        max_discard: u64::MAX,
        discard_alignment: 1,
        physical_block: 512,
        optimal_transfer: 0,
        fua: false,
        unmap_zeroes: false,
        discard: false,
        compressed_cluster: 0,
        backed: false,
        listens: false,
    };

    /// What a node asks for that sends requests down as they are: nothing of its own. The node below aligns and bounces
    /// what comes from all sides; only there, writes that meet in one of its blocks can be kept apart.
    pub fn passed_on(self) -> Self {
        let Self { request_alignment, memory_alignment, max_transfer, write_zeroes_alignment, .. } = Self::ANY;
        Self { request_alignment, memory_alignment, max_transfer, write_zeroes_alignment, ..self }
    }
}

/// The kernel moves at most this many bytes in one read or write (`MAX_RW_COUNT`: `i32::MAX` rounded down to pages).
pub const MAX_TRANSFER: u64 = 0x7fff_f000;
/// `IOV_MAX` of Linux.
pub const MAX_SEGMENTS: usize = 1024;
