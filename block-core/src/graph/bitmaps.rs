//! Dirty bitmaps of nodes: what a write through a node touches is marked in those that record.
//!
//! Which bitmaps record is part of a view, so requests ask nobody, and a bitmap begins, ends or is replaced at one
//! moment for all of them. A change works on the copy of its edit: a transaction that fails has not happened.

use std::sync::Arc;

use super::control::Graph;
use super::edit::{DrainedSet, GraphEdit, Owner, no_such_node};
use super::id::NodeId;
use super::shape::{Kind, NodeParts, Vertex, Vertices};
use super::transaction::Step;
use crate::base::{Error, Result};
use crate::bitmap::Bitmap;

/// A bitmap of a node.
#[derive(Clone, Debug)]
pub struct NodeBitmap {
    /// Its name among those of its node.
    pub name: String,
    /// Writes mark it.
    pub recording: bool,
    /// The marks.
    pub bits: Arc<Bitmap>,
}

/// One change of a node's bitmaps: a step of a transaction.
#[derive(Clone, Debug)]
pub struct BitmapChange {
    /// Whose bitmap it is.
    pub node: NodeId,
    /// Which one.
    pub name: String,
    /// What becomes of it.
    pub what: BitmapAction,
}

/// What becomes of a bitmap.
#[derive(Clone, Debug)]
pub enum BitmapAction {
    /// It is made, clean.
    Add {
        /// Bytes for a bit; `None`: as suits the node.
        granularity: Option<u32>,
        /// It records from the beginning.
        recording: bool,
    },
    /// It goes.
    Remove,
    /// All its marks go.
    Clear,
    /// It records.
    Enable,
    /// It stays as it is.
    Disable,
    /// It gets the marks of these, too.
    Merge(Vec<(NodeId, String)>),
}

impl Step for BitmapChange {
    fn drains(&self, _: &Graph) -> Result<Vec<NodeId>> {
        // Sources, too: what is merged is then of the same moment everywhere.
        let sources = match &self.what {
            BitmapAction::Merge(sources) => &sources[..],
            _ => &[],
        };
        Ok(std::iter::once(self.node).chain(sources.iter().map(|(node, _)| *node)).collect())
    }

    fn edit<'d>(&self, edit: &mut GraphEdit<'d>, set: DrainedSet<'d>) -> Result<()> {
        let (owner, name) = (set.owner(self.node)?, &self.name[..]);
        match &self.what {
            BitmapAction::Add { granularity, recording } => edit.add_bitmap(owner, name, *granularity, *recording),
            BitmapAction::Remove => edit.change_bitmaps(owner, |bitmaps| {
                let at = position(bitmaps, name)?;
                bitmaps.remove(at);
                Ok(())
            }),
            BitmapAction::Clear => edit.change_bitmap(owner, name, |bitmap| {
                bitmap.bits = Arc::new(bitmap.bits.clean()?);
                Ok(())
            }),
            BitmapAction::Enable => edit.set_recording(owner, name, true),
            BitmapAction::Disable => edit.set_recording(owner, name, false),
            BitmapAction::Merge(sources) => edit.merge_bitmaps(owner, name, sources),
        }
    }
}

impl<'d> GraphEdit<'d> {
    fn add_bitmap(&mut self, owner: Owner<'d>, name: &str, granularity: Option<u32>, recording: bool) -> Result<()> {
        check_name(name)?;
        let geometry = self.vertex(owner.id).and_then(Vertex::node).ok_or_else(no_such_node)?.geometry;
        let granularity = granularity.unwrap_or_else(|| default_granularity(geometry.limits.compressed_cluster));
        let bits = Arc::new(Bitmap::new(geometry.size, granularity)?);
        self.change_bitmaps(owner, |bitmaps| {
            if bitmaps.iter().any(|bitmap| bitmap.name == name) {
                return Err(Error::new(format!("Bitmap already exists: {name}")));
            }
            if bitmaps.len() == MAX_BITMAPS {
                return Err(Error::new(format!("A node may not have more than {MAX_BITMAPS} bitmaps")));
            }
            // The youngest first, as clients are used to.
            bitmaps.insert(0, NodeBitmap { name: name.to_owned(), recording, bits });
            Ok(())
        })
    }

    fn set_recording(&mut self, owner: Owner<'d>, name: &str, recording: bool) -> Result<()> {
        self.change_bitmap(owner, name, |bitmap| {
            bitmap.recording = recording;
            Ok(())
        })
    }

    fn merge_bitmaps(&mut self, owner: Owner<'d>, name: &str, sources: &[(NodeId, String)]) -> Result<()> {
        let sources = sources.iter().map(|(node, name)| self.bitmap(*node, name).map(|bitmap| bitmap.bits.clone()));
        let sources = sources.collect::<Result<Vec<_>>>()?;
        self.change_bitmap(owner, name, |bitmap| {
            let merged = bitmap.bits.copied()?;
            sources.iter().try_for_each(|source| merged.merge(source))?;
            bitmap.bits = Arc::new(merged);
            Ok(())
        })
    }

    fn bitmap(&self, node: NodeId, name: &str) -> Result<&NodeBitmap> {
        let bitmaps = &self.vertex(node).and_then(Vertex::node).ok_or_else(no_such_node)?.bitmaps;
        Ok(&bitmaps[position(bitmaps, name)?])
    }

    fn change_bitmap(
        &mut self,
        owner: Owner<'d>,
        name: &str,
        change: impl FnOnce(&mut NodeBitmap) -> Result<()>,
    ) -> Result<()> {
        self.change_bitmaps(owner, |bitmaps| {
            let at = position(bitmaps, name)?;
            change(&mut bitmaps[at])
        })
    }

    fn change_bitmaps(
        &mut self,
        owner: Owner<'d>,
        change: impl FnOnce(&mut Vec<NodeBitmap>) -> Result<()>,
    ) -> Result<()> {
        let Kind::Node(parts) = &mut self.vertex_mut(owner.id)?.kind else { return Err(no_such_node()) };
        change(&mut parts.bitmaps)?;
        self.seen_differently.insert(owner.id);
        Ok(())
    }
}

impl NodeParts {
    /// Bitmaps have the size of their node.
    pub(super) fn resize_bitmaps(&mut self) -> Result<()> {
        let size = self.geometry.size;
        for bitmap in self.bitmaps.iter_mut().filter(|bitmap| bitmap.bits.size() != size) {
            bitmap.bits = Arc::new(bitmap.bits.resized(size)?);
        }
        Ok(())
    }

    /// What writes have to mark.
    pub(super) fn recording(&self) -> Box<[Arc<Bitmap>]> {
        self.bitmaps.iter().filter(|bitmap| bitmap.recording).map(|bitmap| bitmap.bits.clone()).collect()
    }
}

impl Graph {
    /// A bitmap of a node, as it is now.
    pub fn bitmap(&self, node: NodeId, name: &str) -> Result<NodeBitmap> {
        let found = self.vertex(node, |vertex| {
            let bitmaps = &vertex.node().ok_or_else(no_such_node)?.bitmaps;
            Ok(bitmaps[position(bitmaps, name)?].clone())
        });
        found.unwrap_or_else(|| Err(no_such_node()))
    }
}

fn position(bitmaps: &[NodeBitmap], name: &str) -> Result<usize> {
    let found = bitmaps.iter().position(|bitmap| bitmap.name == name);
    found.ok_or_else(|| Error::new(format!("Dirty bitmap '{name}' not found")))
}

fn check_name(name: &str) -> Result<()> {
    if name.is_empty() {
        return Err(Error::new("Bitmap name cannot be empty"));
    }
    if name.len() > MAX_NAME {
        return Err(Error::new(format!("Bitmap name too long: {name}")));
    }
    Ok(())
}

/// Bytes for a bit over an image with clusters of `cluster` bytes; 0: it has none.
fn default_granularity(cluster: u32) -> u32 {
    if cluster == 0 { 64 << 10 } else { cluster.clamp(4 << 10, 64 << 10) }
}

/// Bytes of a bitmap's name at the most, as in qcow2.
const MAX_NAME: usize = 1023;
/// Bitmaps of a node at the most, as in qcow2.
const MAX_BITMAPS: usize = 65_535;
