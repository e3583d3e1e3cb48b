//! What an image says that it stands on (QEMU: `change-backing-file`).

use super::control::{Graph, Permit};
use super::id::NodeId;
use super::permission::Role;
use super::shape::Vertex;
use crate::base::{Error, Result, ResultExt};

impl Permit {
    /// Lets the image of `image`, which is `top` or below it, name another backing file, or none. Nothing is opened, and
    /// what the node stands on stays as it is. Refused where the node stands on nothing or is read-only, and by drivers
    /// that cannot; after an error the name is what it was.
    pub async fn change_backing_file(&mut self, top: NodeId, image: NodeId, name: Option<&str>) -> Result<()> {
        self.graph().check_renaming(top, image)?;
        let mut drained = self.drain(&[image]).await?;
        drained.graph().check_renaming(top, image)?;
        let changed = drained.exclusive(image)?.with(async |child| child.change_backing_file(name).await).await;
        changed.doing(|| format!("Could not change backing file to '{}'", name.unwrap_or_default()))
    }
}

impl Graph {
    fn check_renaming(&self, top: NodeId, image: NodeId) -> Result<()> {
        let missing = || Error::new("There is no such node");
        let report = self.node(image).ok_or_else(missing)?;
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
