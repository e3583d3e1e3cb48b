//! Dirty bitmaps of nodes: what a write through a node touches is marked in those that record.
//!
//! Which bitmaps record is part of a view, so requests ask nobody, and a bitmap begins, ends or is replaced at one
//! moment for all of them. A change works on the copy of its edit: a transaction that fails has not happened.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::control::Graph;
use super::drain::Drained;
use super::edit::{DrainedSet, GraphEdit, Owner, no_such_node};
use super::geometry::Geometry;
use super::id::NodeId;
use super::shape::{Kind, NodeParts, Vertex, Vertices};
use super::transaction::{Pending, Step};
use crate::base::{ByteRange, Error, Result};
use crate::bitmap::Bitmap;

/// A bitmap of a node.
#[derive(Clone, Debug)]
pub struct NodeBitmap {
    /// Its name among those of its node.
    pub name: String,
    /// Writes mark it.
    pub recording: bool,
    /// The image stores it.
    pub persistent: bool,
    /// What the image stores of it may be too little: it can only be removed, and has no marks.
    pub inconsistent: bool,
    /// The marks.
    pub bits: Arc<Bitmap>,
}

/// The bitmaps of a node: one transaction may have to do with thousands of them.
#[derive(Clone, Default)]
pub(crate) struct Bitmaps {
    /// By a number that is higher for those that came later.
    by_age: BTreeMap<u64, NodeBitmap>,
    ages: HashMap<String, u64>,
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
        /// The image stores it.
        persistent: bool,
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

    fn changes_image(&self, graph: &Graph) -> Option<NodeId> {
        let is_kept = match self.what {
            BitmapAction::Add { persistent, .. } => persistent,
            _ => graph.bitmap(self.node, &self.name).is_ok_and(|bitmap| bitmap.persistent),
        };
        is_kept.then_some(self.node)
    }

    fn prepare<'a>(&'a mut self, drained: &'a mut Drained<'_>) -> Pending<'a, Result<()>> {
        Box::pin(self.kept(drained))
    }

    fn edit<'d>(&self, edit: &mut GraphEdit<'d>, set: DrainedSet<'d>) -> Result<()> {
        let (owner, name) = (set.owner(self.node)?, &self.name[..]);
        match &self.what {
            BitmapAction::Add { .. } => edit.add_bitmap(owner, name, &self.what),
            BitmapAction::Remove => edit.change_bitmaps(owner, |bitmaps, read_only| {
                bitmaps.named(name)?.check_kept(read_only)?;
                bitmaps.remove(name);
                Ok(())
            }),
            BitmapAction::Clear => edit.change_bitmap(owner, name, |bitmap, read_only| {
                bitmap.check_kept(read_only)?;
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
    /// Bitmaps of nodes whose end moves have noted nothing of what lies past the size that they know, and whoever moved the
    /// end has written there. To be asked before another reason makes the node larger, of a node that is drained. Once for a node
    /// is enough: what makes it larger after that is the change itself, under which nobody has written yet.
    pub(super) fn catch_up(&mut self, id: NodeId) -> Result<()> {
        if self.caught_up.contains(&id) {
            return Ok(());
        }
        for id in self.above([id]) {
            if !self.caught_up.insert(id) {
                continue;
            }
            let Some(vertex) = self.vertex(id) else { continue };
            let Some(end) = self.moving_end(vertex) else { continue };
            let Kind::Node(parts) = &mut self.vertex_mut(id)?.kind else { continue };
            if parts.geometry.size == end || parts.is_supposed {
                continue;
            }
            let grown = ByteRange::between(parts.geometry.size, end);
            parts.geometry.size = end;
            parts.resize_bitmaps()?;
            for bits in parts.recording() {
                grown.iter().for_each(|grown| bits.mark(*grown));
            }
            self.geometry_dirty.insert(id);
            self.seen_differently.insert(id);
        }
        Ok(())
    }

    fn add_bitmap(&mut self, owner: Owner<'d>, name: &str, what: &BitmapAction) -> Result<()> {
        self.catch_up(owner.id)?;
        let node = self.vertex(owner.id).and_then(Vertex::node).ok_or_else(no_such_node)?;
        let new = NodeBitmap::new(name, what, node.geometry)?;
        self.change_bitmaps(owner, |bitmaps, _| {
            if bitmaps.ages.contains_key(name) {
                return Err(Error::new(format!("Bitmap already exists: {name}")));
            }
            if bitmaps.by_age.len() == MAX_BITMAPS {
                return Err(Error::new(format!("A node may not have more than {MAX_BITMAPS} bitmaps")));
            }
            bitmaps.add(new);
            Ok(())
        })
    }

    fn set_recording(&mut self, owner: Owner<'d>, name: &str, recording: bool) -> Result<()> {
        self.change_bitmap(owner, name, |bitmap, _| {
            bitmap.recording = recording;
            Ok(())
        })
    }

    fn merge_bitmaps(&mut self, owner: Owner<'d>, name: &str, sources: &[(NodeId, String)]) -> Result<()> {
        sources.iter().try_for_each(|(node, _)| self.catch_up(*node))?;
        let source = |(node, name): &(NodeId, String)| {
            let bitmap = self.bitmap(*node, name)?;
            bitmap.check_usable()?;
            Ok(bitmap.bits.clone())
        };
        let sources = sources.iter().map(source).collect::<Result<Vec<_>>>()?;
        self.change_bitmap(owner, name, |bitmap, read_only| {
            bitmap.check_kept(read_only)?;
            let merged = bitmap.bits.copied()?;
            sources.iter().try_for_each(|source| merged.merge(source))?;
            bitmap.bits = Arc::new(merged);
            Ok(())
        })
    }

    fn bitmap(&self, node: NodeId, name: &str) -> Result<&NodeBitmap> {
        self.vertex(node).and_then(Vertex::node).ok_or_else(no_such_node)?.bitmaps.named(name)
    }

    fn change_bitmap(
        &mut self,
        owner: Owner<'d>,
        name: &str,
        change: impl FnOnce(&mut NodeBitmap, bool) -> Result<()>,
    ) -> Result<()> {
        self.change_bitmaps(owner, |bitmaps, read_only| {
            let bitmap = bitmaps.named_mut(name)?;
            bitmap.check_usable()?;
            change(bitmap, read_only)
        })
    }

    fn change_bitmaps(
        &mut self,
        owner: Owner<'d>,
        change: impl FnOnce(&mut Bitmaps, bool) -> Result<()>,
    ) -> Result<()> {
        self.catch_up(owner.id)?;
        let Kind::Node(parts) = &mut self.vertex_mut(owner.id)?.kind else { return Err(no_such_node()) };
        change(&mut parts.bitmaps, parts.options.read_only)?;
        self.seen_differently.insert(owner.id);
        Ok(())
    }
}

impl BitmapChange {
    /// What the image says of the bitmap is going to be untrue, or the image shall store one more.
    async fn kept(&self, drained: &mut Drained<'_>) -> Result<()> {
        let Some(kept) = drained.graph().kept_after(self)? else { return Ok(()) };
        drained.exclusive(self.node)?.with(async |child| child.keep_bitmaps(&kept).await).await
    }
}

impl Graph {
    /// What an image is told that it keeps, before the change is made; `None`: it says nothing that will be untrue.
    fn kept_after(&self, change: &BitmapChange) -> Result<Option<Vec<NodeBitmap>>> {
        let kept = self.vertex(change.node, |vertex| {
            let node = vertex.node().ok_or_else(no_such_node)?;
            let old = node.bitmaps.named(&change.name).ok();
            let read_only = node.options.read_only;
            let mut kept = Vec::new();
            match (&change.what, old) {
                (BitmapAction::Add { persistent: true, .. }, None) => {
                    let geometry = self.shape.borrow().geometry_now(vertex).ok_or_else(no_such_node)?;
                    kept.push(NodeBitmap::new(&change.name, &change.what, geometry)?);
                }
                (BitmapAction::Remove, Some(old)) if old.persistent => old.check_kept(read_only)?,
                // On a node that is only read this is a matter of memory.
                (BitmapAction::Enable | BitmapAction::Disable, _) if read_only => return Ok(None),
                (_, Some(old)) if old.persistent => {
                    old.check_kept(read_only)?;
                    old.check_usable()?;
                }
                _ => return Ok(None),
            }
            kept.extend(node.kept());
            Ok(Some(kept))
        });
        kept.unwrap_or_else(|| Err(no_such_node()))
    }
}

impl NodeBitmap {
    fn new(name: &str, what: &BitmapAction, geometry: Geometry) -> Result<Self> {
        let BitmapAction::Add { granularity, recording, persistent } = what else { unreachable!("it is added") };
        check_name(name)?;
        let granularity = granularity.unwrap_or_else(|| default_granularity(geometry.limits.compressed_cluster));
        let bits = Arc::new(Bitmap::new(geometry.size, granularity)?);
        let (recording, persistent) = (*recording, *persistent);
        Ok(Self { name: name.to_owned(), recording, persistent, inconsistent: false, bits })
    }

    /// In QEMU's words.
    pub(super) fn check_usable(&self) -> Result<()> {
        if self.inconsistent {
            return Err(Error::new(format!("Bitmap '{}' is inconsistent and cannot be used", self.name)));
        }
        Ok(())
    }

    /// What an image stores changes only with the image.
    fn check_kept(&self, read_only: bool) -> Result<()> {
        if self.persistent && read_only {
            return Err(Error::new(format!("Bitmap '{}' is readonly and cannot be modified", self.name)));
        }
        Ok(())
    }
}

impl Bitmaps {
    /// These, the youngest first.
    pub(super) fn new(bitmaps: Vec<NodeBitmap>) -> Self {
        let mut all = Self::default();
        bitmaps.into_iter().rev().for_each(|bitmap| all.add(bitmap));
        all
    }

    /// The youngest first, as clients are used to.
    pub(super) fn iter(&self) -> impl Iterator<Item = &NodeBitmap> {
        self.by_age.values().rev()
    }

    fn iter_mut(&mut self) -> impl Iterator<Item = &mut NodeBitmap> {
        self.by_age.values_mut().rev()
    }

    fn named(&self, name: &str) -> Result<&NodeBitmap> {
        self.ages.get(name).map(|age| &self.by_age[age]).ok_or_else(|| not_found(name))
    }

    fn named_mut(&mut self, name: &str) -> Result<&mut NodeBitmap> {
        let age = self.ages.get(name).ok_or_else(|| not_found(name))?;
        Ok(self.by_age.get_mut(age).expect("what has an age is there"))
    }

    /// Its name is free.
    fn add(&mut self, new: NodeBitmap) {
        let age = self.by_age.last_key_value().map_or(0, |(youngest, _)| youngest + 1);
        self.ages.insert(new.name.clone(), age);
        self.by_age.insert(age, new);
    }

    fn remove(&mut self, name: &str) {
        let age = self.ages.remove(name);
        age.iter().for_each(|age| drop(self.by_age.remove(age)));
    }
}

impl NodeParts {
    /// Bitmaps have the size of their node.
    pub(super) fn resize_bitmaps(&mut self) -> Result<()> {
        let size = self.geometry.size;
        let others = self.bitmaps.iter_mut().filter(|bitmap| !bitmap.inconsistent && bitmap.bits.size() != size);
        for bitmap in others {
            bitmap.bits = Arc::new(bitmap.bits.resized(size)?);
        }
        Ok(())
    }

    /// Those that the image stores.
    pub(super) fn kept(&self) -> Box<[NodeBitmap]> {
        self.bitmaps.iter().filter(|bitmap| bitmap.persistent).cloned().collect()
    }

    /// What writes have to mark.
    pub(super) fn recording(&self) -> Box<[Arc<Bitmap>]> {
        let recording = self.bitmaps.iter().filter(|bitmap| bitmap.recording && !bitmap.inconsistent);
        recording.map(|bitmap| bitmap.bits.clone()).collect()
    }
}

impl Graph {
    /// Writers may move the node's end, past what its bitmaps note.
    pub(crate) fn has_moving_end(&self, node: NodeId) -> bool {
        let shape = self.shape.borrow();
        shape.vertex(node).is_some_and(|vertex| shape.moving_end(vertex).is_some())
    }

    /// A bitmap of a node, as it is now. What a moving end has left behind it since the last change of the graph is not in it.
    pub fn bitmap(&self, node: NodeId, name: &str) -> Result<NodeBitmap> {
        let found = self.vertex(node, |vertex| {
            let bitmaps = &vertex.node().ok_or_else(no_such_node)?.bitmaps;
            bitmaps.named(name).cloned()
        });
        found.unwrap_or_else(|| Err(no_such_node()))
    }
}

fn not_found(name: &str) -> Error {
    Error::new(format!("Dirty bitmap '{name}' not found"))
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
