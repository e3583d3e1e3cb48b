//! What every node accepts, whatever its driver: QEMU's common members, their inheritance and their rules.

use qmp::Qapi;

use super::DriverOptions;
use crate::base::{Error, Result};
use crate::graph::{DetectZeroes, DiscardMode, NodeOptions};

/// How deep nodes may be defined inside each other.
pub const MAX_DEPTH: usize = 64;

/// A node of the graph.
#[derive(Clone, Debug, PartialEq, Qapi)]
pub struct BlockdevOptions {
    /// What every node accepts.
    #[qapi(flatten)]
    pub common: CommonOptions,
    /// What the driver accepts besides.
    #[qapi(flatten)]
    pub driver: DriverOptions,
}

/// A node by its name, or defined in place.
#[derive(Clone, Debug, PartialEq, Qapi)]
#[qapi(alternate)]
pub enum BlockdevRef {
    /// A new node. It takes options that it does not give from the node that it is defined in.
    Definition(Box<BlockdevOptions>),
    /// The node-name of a node that is there already.
    Reference(String),
}

/// A node by its name, or defined in place, or none.
#[derive(Clone, Debug, PartialEq, Qapi)]
#[qapi(alternate)]
pub enum BlockdevRefOrNull {
    /// A new node. It takes options that it does not give from the node that it is defined in.
    Definition(Box<BlockdevOptions>),
    /// The node-name of a node that is there already; empty for none.
    Reference(String),
    /// None.
    Null,
}

/// What every node accepts. A node that is defined inside another takes what is absent from that one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockdevOptionsBase")]
pub struct CommonOptions {
    /// The name by which others refer to this node: at most 31 characters, a letter and then letters, digits, `-`,
    /// `.` and `_`. A node that is defined inside another may go without.
    pub node_name: Option<String>,
    /// What becomes of a discard; `ignore` if absent, `unmap` for a node that is defined inside another.
    pub discard: Option<DiscardOption>,
    /// How the host caches.
    pub cache: Option<CacheOptions>,
    /// Whether the node may be used; an inactive one takes no locks and no writes. True if absent.
    pub active: Option<bool>,
    /// Whether the node refuses writes. False if absent.
    pub read_only: Option<bool>,
    /// Whether the node may turn read-only where its storage refuses writing. False if absent.
    pub auto_read_only: Option<bool>,
    /// Whether other programs may do what they like with the image; needs `read-only`. False if absent.
    pub force_share: Option<bool>,
    /// What becomes of a write whose data is all zeroes.
    pub detect_zeroes: Option<DetectZeroesOption>,
}

/// How the host caches a node's data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockdevCacheOptions")]
pub struct CacheOptions {
    /// Bypass the page cache. False if absent.
    pub direct: Option<bool>,
    /// Ignore flushes: data may be lost with the host. False if absent.
    pub no_flush: Option<bool>,
}

/// What becomes of a discard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockdevDiscardOptions")]
pub enum DiscardOption {
    /// It succeeds, and nothing happens.
    Ignore,
    /// It is passed down.
    Unmap,
}

/// What becomes of a write whose data is all zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockdevDetectZeroesOptions")]
pub enum DetectZeroesOption {
    /// It is written like any other.
    Off,
    /// It becomes a write-zeroes that keeps the space.
    On,
    /// It becomes a write-zeroes that may free the space; needs `discard` to be `unmap`.
    Unmap,
}

impl CommonOptions {
    /// The options in force, for a node that is defined inside one with `parent`'s.
    pub(super) fn in_force(&self, parent: Option<NodeOptions>) -> Result<NodeOptions> {
        let base = parent.map_or_else(NodeOptions::default, below);
        let cache = self.cache.unwrap_or_default();
        let options = NodeOptions {
            read_only: self.read_only.unwrap_or(base.read_only),
            auto_read_only: self.auto_read_only.unwrap_or(base.auto_read_only),
            force_share: self.force_share.unwrap_or(base.force_share),
            discard: self.discard.map_or(base.discard, Into::into),
            detect_zeroes: self.detect_zeroes.map_or(base.detect_zeroes, Into::into),
            direct: cache.direct.unwrap_or(base.direct),
            no_flush: cache.no_flush.unwrap_or(base.no_flush),
            active: self.active.unwrap_or(base.active),
        };
        check(options).map(|()| options)
    }
}

/// What an inline child starts from. Its parent sends only the discards that it means, so the child passes them on.
fn below(parent: NodeOptions) -> NodeOptions {
    NodeOptions { discard: DiscardMode::Unmap, detect_zeroes: DetectZeroes::Off, ..parent }
}

fn check(options: NodeOptions) -> Result<()> {
    if options.detect_zeroes == DetectZeroes::Unmap && options.discard != DiscardMode::Unmap {
        return Err(Error::new(
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
        ));
    }
    if options.force_share && !options.read_only {
        return Err(Error::new("force-share=on can only be used with read-only images"));
    }
    Ok(())
}

/// QEMU's rule for ids: a letter, then letters, digits, `-`, `.` and `_`.
pub fn is_identifier(text: &str) -> bool {
    let is_tail = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    text.starts_with(|c: char| c.is_ascii_alphabetic()) && text.chars().all(is_tail)
}

/// A name that an operator gave: QEMU's rules.
pub(super) fn check_name(name: &str) -> Result<()> {
    if !is_identifier(name) {
        return Err(Error::new(format!("Invalid node-name: '{name}'")));
    }
    if name.len() > MAX_NAME {
        return Err(Error::new("Node name too long"));
    }
    Ok(())
}

/// Characters in a node-name at the most.
const MAX_NAME: usize = 31;

impl From<DiscardOption> for DiscardMode {
    fn from(option: DiscardOption) -> Self {
        match option {
            DiscardOption::Ignore => Self::Ignore,
            DiscardOption::Unmap => Self::Unmap,
        }
    }
}

impl From<DetectZeroesOption> for DetectZeroes {
    fn from(option: DetectZeroesOption) -> Self {
        match option {
            DetectZeroesOption::Off => Self::Off,
            DetectZeroesOption::On => Self::On,
            DetectZeroesOption::Unmap => Self::Unmap,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_qemus_rules() {
        for good in ["a", "A-b.c_9", &"n".repeat(31)] {
            check_name(good).unwrap();
        }
        for bad in ["", "1n", "a/b", "-a", "#block1", "a b", "\u{e4}", &"n".repeat(32)] {
            check_name(bad).unwrap_err();
        }
    }

    #[test]
    fn an_inline_child_takes_what_it_does_not_give() {
        let parent = NodeOptions {
            read_only: true,
            auto_read_only: true,
            force_share: true,
            direct: true,
            no_flush: true,
            active: false,
            discard: DiscardMode::Ignore,
            detect_zeroes: DetectZeroes::On,
        };
        let child = CommonOptions::default().in_force(Some(parent)).unwrap();
        let expected = NodeOptions { discard: DiscardMode::Unmap, detect_zeroes: DetectZeroes::Off, ..parent };
        assert_eq!(child, expected);
        let cache = Some(CacheOptions { direct: Some(false), no_flush: None });
        let own = CommonOptions { cache, discard: Some(DiscardOption::Ignore), ..CommonOptions::default() };
        let child = own.in_force(Some(parent)).unwrap();
        assert_eq!(child, NodeOptions { direct: false, discard: DiscardMode::Ignore, ..expected });
    }

    #[test]
    fn options_that_contradict_each_other_are_refused() {
        let none = CommonOptions::default();
        let unmap = Some(DetectZeroesOption::Unmap);
        CommonOptions { detect_zeroes: unmap, ..none.clone() }.in_force(None).unwrap_err();
        let discard = Some(DiscardOption::Unmap);
        CommonOptions { detect_zeroes: unmap, discard, ..none.clone() }.in_force(None).unwrap();
        CommonOptions { force_share: Some(true), ..none.clone() }.in_force(None).unwrap_err();
        CommonOptions { force_share: Some(true), read_only: Some(true), ..none }.in_force(None).unwrap();
    }
}
