//! Whether what an image says of itself is true, and putting it right (`qemu-img check`): a driver goes through its image
//! with nobody else inside.

use std::collections::HashSet;

use super::control::{Graph, Permit};
use super::id::NodeId;
use super::permission::{PermSet, Perms};
use super::shape::Vertex;
use crate::base::{Error, Result, ResultExt};

/// What is to be put right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing: only looking.
    #[default]
    Nothing,
    /// Space that nobody uses is given back.
    Leaks,
    /// That, and whatever could harm the data.
    All,
}

/// What is known after a check: what is wrong now, and what was put right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Things that are wrong and may cost data.
    pub corruptions: u64,
    /// Clusters with a higher refcount than they have users.
    pub leaks: u64,
    /// Tables that could not be read: what is said else is only a part.
    pub check_errors: u64,
    /// Corruptions that are gone.
    pub corruptions_fixed: u64,
    /// Leaks that are gone.
    pub leaks_fixed: u64,
    /// The byte behind the last cluster that is in use, or said to be.
    pub image_end: u64,
    /// Clusters that the disk has.
    pub total_clusters: u64,
    /// Of them, those with room in the file.
    pub allocated_clusters: u64,
    /// Of those, those that do not follow the one before; compressed ones never do.
    pub fragmented_clusters: u64,
    /// Of those, those that are compressed.
    pub compressed_clusters: u64,
}

/// What kind of thing is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FindingKind {
    /// A cluster has a higher refcount than it has users.
    Leak,
    /// It may cost data.
    Corruption,
    /// Something leads to where nothing can be, or where nothing can be read.
    Nowhere,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Finding {
    /// What kind of thing it is.
    pub kind: FindingKind,
    /// What it is about, as `qemu-img` says it: `cluster 5 refcount=1 reference=0`.
    pub what: String,
}

/// What a check finds, one by one, in the order in which it comes by. The numbers in [`CheckReport`] are of all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// The first [`Findings::MOST`].
    pub all: Vec<Finding>,
    /// Those of them that have been put right, by their places.
    pub repaired: Vec<usize>,
    /// How many there are besides.
    pub more: u64,
}

impl Findings {
    /// As many as are kept: a broken image may have as many as it has clusters.
    pub const MOST: usize = 10_000;

    /// One more.
    pub fn add(&mut self, kind: FindingKind, what: impl FnOnce() -> String) {
        match self.all.len() < Self::MOST {
            true => self.all.push(Finding { kind, what: what() }),
            false => self.more += 1,
        }
    }

    /// Those that another look does not find any more have been put right.
    pub fn without(&mut self, left: &Self) {
        let still: HashSet<_> = left.all.iter().collect();
        let gone = |finding: &Finding| left.more == 0 && !still.contains(finding);
        self.repaired = (0..self.all.len()).filter(|at| gone(&self.all[*at])).collect();
    }
}

impl CheckReport {
    /// Nothing is wrong that may cost data.
    pub fn is_consistent(&self) -> bool {
        self.corruptions == 0 && self.check_errors == 0
    }
}

impl Permit {
    /// Checks the image of a node, and puts right what it is told to. Refused by drivers that cannot, and, where
    /// something shall be put right, while somebody uses the node or what it lies on without bearing writers.
    pub async fn check(&mut self, id: NodeId, repair: Repair) -> Result<CheckReport> {
        self.check_listing(id, repair, &mut Findings::default()).await
    }

    /// The same, with what was found, which is there after an error too.
    pub async fn check_listing(&mut self, id: NodeId, repair: Repair, findings: &mut Findings) -> Result<CheckReport> {
        let writes = if repair == Repair::Nothing { PermSet::NONE } else { PermSet::WRITE | PermSet::RESIZE };
        let perms = Perms { uses: PermSet::CONSISTENT_READ | writes, shares: PermSet::ALL };
        self.as_user("check", perms, id, async |permit, _| permit.checked(id, repair, findings).await).await
    }

    async fn checked(&mut self, id: NodeId, repair: Repair, findings: &mut Findings) -> Result<CheckReport> {
        let mut drained = self.drain(&[id]).await?;
        drained.exclusive(id)?.with(async |child| child.check_image(repair, findings).await).await
    }

    /// Puts those images right, of a node that has just come and of what was defined with it, that have to be before they
    /// are written.
    pub(crate) async fn mend(&mut self, top: NodeId) -> Result<()> {
        for id in self.graph().unclean(top) {
            let doing = || "The image was not closed in good order, and could not be repaired";
            let report = self.check(id, Repair::All).await.doing(doing)?;
            if !report.is_consistent() {
                let CheckReport { corruptions, check_errors, .. } = report;
                let text = format!("{corruptions} corruptions and {check_errors} errors are left");
                return Err(Error::new(text)).doing(doing);
            }
        }
        Ok(())
    }
}

impl Graph {
    /// Children before their parents.
    fn unclean(&self, top: NodeId) -> Vec<NodeId> {
        let written = |vertex: &Vertex| {
            let node = vertex.node();
            node.is_some_and(|node| !node.options.read_only && node.options.active && node.body.is_unclean())
        };
        let family = self.family(top).into_iter().rev();
        family.filter(|id| self.vertex(*id, written) == Some(true)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_bounded_and_what_is_gone_is_repaired() {
        let mut found = Findings::default();
        for number in 0..Findings::MOST + 3 {
            found.add(FindingKind::Leak, || number.to_string());
        }
        assert_eq!((found.all.len(), found.more), (Findings::MOST, 3));
        let left = Findings { all: vec![found.all[1].clone()], ..Findings::default() };
        found.all.truncate(3);
        found.without(&left);
        assert_eq!(found.repaired, [0, 2]);
        found.without(&Findings { more: 1, ..left });
        assert!(found.repaired.is_empty(), "nobody knows what else is left");
    }
}
