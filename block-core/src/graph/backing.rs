//! What an image says that it stands on (QEMU: `change-backing-file`), and layers that are emptied once what they stand on has
//! all that they had.

use super::control::{Graph, Permit};
use super::id::NodeId;
use super::permission::{PermSet, Perms, Role};
use super::shape::Vertex;
use crate::base::{Error, Result, ResultExt};

/// What an image is going to say that it stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackingName<'a> {
    /// The file's name.
    pub name: &'a str,
    /// The format of that; empty: it is not said, `None`: what was said of the file before stays.
    pub format: Option<&'a str>,
}

impl Permit {
    /// Lets the image of `image`, which is `top` or below it, name another backing file, or none. Nothing is opened, and
    /// what the node stands on stays as it is. Refused where the node stands on nothing or is read-only, and by drivers
    /// that cannot; after an error the name is what it was.
    pub async fn change_backing_file(&mut self, top: NodeId, image: NodeId, name: Option<&str>) -> Result<()> {
        self.graph().check_renaming(top, image)?;
        let mut drained = self.drain(&[image]).await?;
        drained.graph().check_renaming(top, image)?;
        let backing = name.map(|name| BackingName { name, format: None });
        let changed = drained.exclusive(image)?.with(async |child| child.change_backing_file(backing).await).await;
        changed.doing(|| format!("Could not change backing file to '{}'", name.unwrap_or_default()))
    }

    /// The same for whoever has the image to himself (`qemu-img rebase`): it may stand on nothing, and the name of a format
    /// may come along.
    pub async fn name_backing(&mut self, image: NodeId, backing: Option<BackingName<'_>>) -> Result<()> {
        self.graph().check_writable(image)?;
        let mut drained = self.drain(&[image]).await?;
        drained.graph().check_writable(image)?;
        drained.exclusive(image)?.with(async |child| child.change_backing_file(backing).await).await
    }

    /// Takes everything out of a layer, so that what it stands on is seen everywhere. Refused where it stands on nothing, is
    /// read-only, or is no layer.
    pub async fn empty(&mut self, layer: NodeId) -> Result<()> {
        self.graph().check_layer(layer)?;
        let perms = Perms { uses: PermSet::WRITE, shares: PermSet::ALL };
        let work = async |permit: &mut Self, _| {
            let mut drained = permit.drain(&[layer]).await?;
            drained.graph().check_layer(layer)?;
            drained.exclusive(layer)?.with(async |child| child.make_empty().await).await
        };
        self.as_user("a layer that is emptied", perms, layer, work).await
    }
}

impl Graph {
    fn check_layer(&self, layer: NodeId) -> Result<()> {
        let report = self.node(layer).ok_or_else(|| Error::new("There is no such node"))?;
        if self.child_in(layer, Role::Cow).is_none() {
            return Err(Error::new("Image does not have a backing file"));
        }
        if report.options.read_only || !report.options.active {
            return Err(Error::new(format!("Node '{}' is read-only", report.name)));
        }
        if report.bitmaps.iter().any(|bitmap| bitmap.recording) {
            return Err(Error::new("A layer with bitmaps that record cannot be emptied: they would not notice"));
        }
        Ok(())
    }

    fn check_renaming(&self, top: NodeId, image: NodeId) -> Result<()> {
        let missing = || Error::new("There is no such node");
        if self.child_in(image, Role::Cow).is_none() {
            return Err(Error::new("not allowing backing file change on an image without a backing file"));
        }
        let mut layer = Some(top);
        while let Some(at) = layer.filter(|at| *at != image) {
            layer = self.child_in(at, Role::Cow).or_else(|| self.child_in(at, Role::Filtered));
        }
        if layer.is_none() {
            let name = self.node(top).ok_or_else(missing)?.name;
            return Err(Error::new(format!("'{name}' and image file are not in the same chain")));
        }
        self.check_writable(image)
    }

    fn check_writable(&self, image: NodeId) -> Result<()> {
        let report = self.node(image).ok_or_else(|| Error::new("There is no such node"))?;
        if report.options.read_only || !report.options.active {
            return Err(Error::new(format!(
                "Node '{}' is read-only: make it writable with 'blockdev-reopen' before its image is changed",
                report.name
            )));
        }
        Ok(())
    }

    fn child_in(&self, node: NodeId, role: Role) -> Option<NodeId> {
        let found = |vertex: &Vertex| vertex.edges.iter().find(|edge| edge.role == role).map(|edge| edge.to);
        self.vertex(node, found).flatten()
    }

    /// Nothing but exports and jobs uses the node. In QEMU's words.
    pub fn check_root(&self, node: NodeId) -> Result<()> {
        let is_top = |vertex: &Vertex| {
            vertex.parents.iter().all(|id| self.vertex(*id, |user| user.root().is_some()) == Some(true))
        };
        if self.vertex(node, is_top) == Some(true) { Ok(()) } else { Err(Error::new("Need a root block node")) }
    }
}
