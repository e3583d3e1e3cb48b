//! What a quorum is told, and which of it makes sense.

use qmp::Qapi;

use crate::base::{Error, Result};
use crate::graph::{ChildChange, ChildId, NodeOptions};

/// Copies of one disk, which vote.
#[derive(Clone, Debug, PartialEq, Eq, Qapi)]
#[qapi(name = "BlockdevOptionsQuorum")]
pub struct QuorumOptions {
    /// How many copies have to agree; at most as many as there are.
    pub vote_threshold: i64,
    /// Exactly two copies, which have to agree. A read on which they do not fails; QEMU ends its process.
    #[qapi(default = false)]
    pub blkverify: bool,
    /// A copy that read something else than most is written anew. A node that is read-only writes nothing. Without
    /// effect where `read-pattern` is `fifo`.
    #[qapi(default = false)]
    pub rewrite_corrupted: bool,
    /// Which copies are read.
    #[qapi(default = QuorumReadPattern::Quorum)]
    pub read_pattern: QuorumReadPattern,
}

/// Which copies are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Qapi)]
pub enum QuorumReadPattern {
    /// All; what most of them say counts.
    Quorum,
    /// One after the other, until one can be read. Nothing is compared.
    Fifo,
}

/// The options, checked, with what else requests have to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conf {
    pub(super) threshold: usize,
    pub(super) compares: bool,
    pub(super) blkverify: bool,
    rewrite_corrupted: bool,
    writable: bool,
    children: u32,
    /// The number of the next child's edge.
    next: u32,
}

impl Conf {
    pub(super) fn new(options: &QuorumOptions, children: usize, common: NodeOptions) -> Result<Self> {
        let threshold = threshold(options.vote_threshold, children)?;
        let compares = options.read_pattern == QuorumReadPattern::Quorum;
        // As with QEMU, what belongs to comparing says nothing where nothing is compared.
        let QuorumOptions { blkverify, rewrite_corrupted, .. } = *options;
        let (blkverify, rewrite_corrupted) = (blkverify && compares, rewrite_corrupted && compares);
        if blkverify && (children, threshold) != (2, 2) {
            return Err(Error::new(
                "blkverify=on can only be set if there are exactly two files and vote-threshold is 2",
            ));
        }
        if blkverify && rewrite_corrupted {
            return Err(Error::new("rewrite-corrupted=on cannot be used with blkverify=on"));
        }
        let children = u32::try_from(children).map_err(|_| Error::new("Too many children"))?;
        let next = children;
        let conf = Self { threshold, compares, blkverify, rewrite_corrupted, writable: false, children, next };
        Ok(conf.under(common))
    }

    /// The same under other common options.
    pub(super) fn under(&self, common: NodeOptions) -> Self {
        Self { writable: !common.read_only && common.active, ..self.clone() }
    }

    /// Copies that disagree are put right.
    pub(super) fn rewrites(&self) -> bool {
        self.rewrite_corrupted && self.writable
    }

    pub(super) fn all_children(&self) -> impl Iterator<Item = ChildId> {
        ChildId::all(self.children)
    }

    pub(super) fn has_several(&self) -> bool {
        self.children > 1
    }

    pub(super) fn next_child(&self) -> Result<String> {
        if self.blkverify {
            return Err(Error::new("Cannot add a child to a quorum in blkverify mode"));
        }
        Ok(edge(self.next))
    }

    /// The number of a child that was the last to come is given again, as with QEMU; any other is not.
    pub(super) fn after(&self, change: ChildChange<'_>) -> Result<Self> {
        match change {
            ChildChange::Comes(..) => {
                let next = self.next.checked_add(1).ok_or_else(|| Error::new("Too many children"))?;
                Ok(Self { children: self.children + 1, next, ..self.clone() })
            }
            ChildChange::Goes(..) if self.children as usize <= self.threshold => {
                let Self { threshold, .. } = self;
                let text = format!("The number of children cannot be lower than the vote threshold {threshold}");
                Err(Error::new(text))
            }
            ChildChange::Goes(name, _) => {
                let last = self.next.saturating_sub(1);
                let next = if name == edge(last) { last } else { self.next };
                Ok(Self { children: self.children - 1, next, ..self.clone() })
            }
        }
    }
}

fn edge(number: u32) -> String {
    format!("children.{number}")
}

fn threshold(given: i64, children: usize) -> Result<usize> {
    if children == 0 {
        return Err(Error::new("Number of provided children must be 1 or more"));
    }
    if given < 1 {
        return Err(Error::new("Parameter 'vote-threshold' expects a value >= 1"));
    }
    let threshold = usize::try_from(given).ok().filter(|threshold| *threshold <= children);
    threshold.ok_or_else(|| Error::new("threshold may not exceed children count"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::ChildId;

    const ANY: ChildId = ChildId::FIRST;

    fn conf(children: usize) -> Conf {
        let options: QuorumOptions = qmp::schema::from_value(serde_json::json!({ "vote-threshold": 1 })).unwrap();
        Conf::new(&options, children, NodeOptions::default()).unwrap()
    }

    /// The names that `qemu-storage-daemon` 10.0.2 gives for the same changes.
    #[test]
    fn edges_are_numbered_as_by_qemu() {
        let gone = |conf: &Conf, name| conf.after(ChildChange::Goes(name, ANY)).unwrap();
        let come = |conf: &Conf| conf.after(ChildChange::Comes("", ANY)).unwrap();
        let three = conf(3);
        assert_eq!(three.next_child().unwrap(), "children.3");
        let without_middle = gone(&three, "children.1");
        assert_eq!(without_middle.next_child().unwrap(), "children.3");
        let first_alone = gone(&without_middle, "children.2");
        assert_eq!(first_alone.next_child().unwrap(), "children.2");
        assert_eq!(come(&first_alone).next_child().unwrap(), "children.3");
        let error = first_alone.after(ChildChange::Goes("children.0", ANY)).unwrap_err();
        assert_eq!(error.to_string(), "The number of children cannot be lower than the vote threshold 1");
    }

    #[test]
    fn a_node_that_may_not_write_puts_nothing_right() {
        let json = serde_json::json!({ "vote-threshold": 2, "rewrite-corrupted": true });
        let options: QuorumOptions = qmp::schema::from_value(json).unwrap();
        let common = NodeOptions::default();
        let conf = Conf::new(&options, 3, common).unwrap();
        assert!(conf.rewrites());
        assert!(!conf.under(NodeOptions { read_only: true, ..common }).rewrites());
        assert!(!conf.under(NodeOptions { active: false, ..common }).rewrites());
        let fifo = QuorumOptions { read_pattern: QuorumReadPattern::Fifo, ..options };
        assert!(!Conf::new(&fifo, 3, common).unwrap().rewrites());
    }
}
