//! Block status through a chain: which layer has a range, and whether it reads as zeroes.
//!
//! Nodes answer for themselves ([`Child::map`]); here their answers are followed down: through filters, into the file of
//! a format to find its holes, and past each overlay to what it stands on.

use crate::base::{ByteRange, IoError};
use crate::graph::{Child, Extent, Place};

/// What a chain says of the first bytes of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status {
    /// Bytes from the start of the range, at least 1.
    pub len: u64,
    /// What they are.
    pub content: Content,
    /// How many layers down they were found; 0 is the node that was asked, filters not counted.
    pub depth: u32,
}

/// What the bytes of a range are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Data.
    Data,
    /// Data, but not byte for byte in any file (compressed, encrypted).
    Encoded,
    /// They read as zeroes, and a layer says so.
    Zero,
    /// No layer has them; they read as zeroes.
    Absent,
}

impl Status {
    fn new(len: u64, content: Content, depth: u32) -> Self {
        Self { len, content, depth }
    }
}

impl<'g> Child<'g> {
    /// What the first bytes of the range are, in this node or what lies below it.
    pub async fn status(self, at: ByteRange) -> Result<Status, IoError> {
        let (mut node, mut at, mut depth) = (self, at, 0);
        loop {
            let extent = node.map(at).await?;
            at = at.split(extent.len).0;
            let next = match extent.place {
                Place::Here => return Ok(Status::new(at.len(), Content::Data, depth)),
                Place::Encoded => return Ok(Status::new(at.len(), Content::Encoded, depth)),
                Place::Zero { allocated: true } => return Ok(Status::new(at.len(), Content::Zero, depth)),
                Place::Zero { allocated: false } => return Ok(Status::new(at.len(), Content::Absent, depth)),
                Place::Data { child, offset } => {
                    let (len, content) = within_file(node.cx().child(child), offset, at.len()).await?;
                    // What moved away meanwhile may have left a hole.
                    let moved = content != Content::Data && node.map(at).await?.place != extent.place;
                    let content = if moved { Content::Data } else { content };
                    return Ok(Status::new(len, content, depth));
                }
                Place::Passed(child) => node.cx().child(child),
                Place::Below(child) => {
                    depth += 1;
                    node.cx().child(child)
                }
            };
            let Some(inside) = ByteRange::whole(next.size()).intersection(at).filter(|part| part.start() == at.start())
            else {
                // A backing file may be shorter than its overlay.
                return Ok(Status::new(at.len(), Content::Absent, depth));
            };
            (node, at) = (next, inside);
        }
    }

    /// For how many bytes from the start of the range on, this layer has data or zeroes of its own (`true`), or leaves
    /// them to what it stands on (`false`).
    pub async fn allocated(self, at: ByteRange) -> Result<(bool, u64), IoError> {
        let (_, Extent { len, place }) = self.layer(at).await?;
        Ok((!matches!(place, Place::Below(_) | Place::Zero { allocated: false }), len))
    }

    /// The same for this layer and those below it down to that of `bottom`, which is looked at too.
    pub async fn allocated_down_to(self, bottom: Child<'g>, at: ByteRange) -> Result<(bool, u64), IoError> {
        let (mut node, mut at) = (self, at);
        loop {
            let reached = node.leads_to(bottom);
            let (layer, Extent { len, place }) = node.layer(at).await?;
            at = at.split(len).0;
            let Place::Below(child) = place else {
                return Ok((!matches!(place, Place::Zero { allocated: false }), at.len()));
            };
            let next = layer.cx().child(child);
            let inside = ByteRange::whole(next.size()).intersection(at).filter(|part| part.start() == at.start());
            match inside {
                Some(inside) if !reached => (node, at) = (next, inside),
                // Past the end of a layer above the bottom there are zeroes, whatever the layers below it have there.
                _ => return Ok((!reached, at.len())),
            }
        }
    }

    /// The node below this one's filters that has an opinion, and its opinion.
    async fn layer(self, at: ByteRange) -> Result<(Self, Extent), IoError> {
        let mut node = self;
        loop {
            let extent = node.map(at).await?;
            match extent.place {
                Place::Passed(child) => node = node.cx().child(child),
                _ => return Ok((node, extent)),
            }
        }
    }

    /// This is `bottom`, or only filters are between them.
    fn leads_to(self, bottom: Child<'g>) -> bool {
        let mut node = self;
        while node.slot() != bottom.slot() {
            let Some(below) = node.placed().body.filtered() else { return false };
            node = node.cx().child(below);
        }
        true
    }
}

/// Data in a file may be a hole there, or lie past its end.
async fn within_file(file: Child<'_>, offset: u64, len: u64) -> Result<(u64, Content), IoError> {
    let at = ByteRange::new(offset, len).ok_or(IoError::OutOfRange)?;
    let Some(inside) = ByteRange::whole(file.size()).intersection(at).filter(|part| part.start() == offset) else {
        return Ok((len, Content::Zero));
    };
    let Status { len, content, .. } = Box::pin(file.status(inside)).await?;
    Ok((len, if content == Content::Absent { Content::Zero } else { content }))
}
