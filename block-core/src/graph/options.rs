//! The options that every node has, whatever its driver (QEMU: the common members of `BlockdevOptions`).

/// What becomes of a discard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DiscardMode {
    /// It succeeds, and nothing happens.
    #[default]
    Ignore,
    /// It is passed down.
    Unmap,
}

/// What becomes of a write whose data is all zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum DetectZeroes {
    /// It is written like any other.
    #[default]
    Off,
    /// It becomes a write-zeroes that keeps the space allocated.
    On,
    /// It becomes a write-zeroes that may free the space; needs `discard: unmap`.
    Unmap,
}

/// The common options of a node as they are in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeOptions {
    /// No write gets through this node.
    pub read_only: bool,
    /// The node may turn read-only by itself where writing is refused from below.
    pub auto_read_only: bool,
    /// Other programs may do what they like with the image; needs `read_only`.
    pub force_share: bool,
    /// What becomes of a discard.
    pub discard: DiscardMode,
    /// What becomes of a write of zeroes.
    pub detect_zeroes: DetectZeroes,
    /// Bypass the host's page cache (`O_DIRECT`).
    pub direct: bool,
    /// Flushes end here, successfully: data may be lost with the host.
    pub no_flush: bool,
    /// An inactive node takes no locks and no writes.
    pub active: bool,
}

impl Default for NodeOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            auto_read_only: false,
            force_share: false,
            discard: DiscardMode::default(),
            detect_zeroes: DetectZeroes::default(),
            direct: false,
            no_flush: false,
            active: true,
        }
    }
}
