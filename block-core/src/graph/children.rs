//! Children that come and go while their parent is in use (QMP: `x-blockdev-change`).

use std::borrow::Cow;

use super::control::Permit;
use super::id::NodeId;
use super::permission::Role;
use crate::base::{Error, Result, ResultExt};

impl Permit {
    /// One more child for `parent`, which is drained meanwhile. `name` is what QMP calls the edge.
    pub async fn add_child(
        &mut self,
        parent: NodeId,
        name: impl Into<Cow<'static, str>>,
        child: NodeId,
        role: Role,
    ) -> Result<()> {
        let name = name.into();
        let drained = self.drain(&[parent]).await?;
        let locks = drained.prepare(|edit, set| edit.add_child(set.owner(parent)?, name.clone(), child, role)).await?;
        let committed = drained.write(|edit, set| edit.add_child(set.owner(parent)?, name, child, role));
        drop(locks);
        committed?.close(self).await;
        Ok(())
    }

    /// Takes the child that QMP calls `name` from `parent`. What was written to it is made stable first.
    pub async fn remove_child(&mut self, parent: NodeId, name: &str) -> Result<()> {
        let mut drained = self.drain(&[parent]).await?;
        let missing = || Error::new(format!("Node does not have a child '{name}'"));
        let child = drained.graph().child(parent, name).ok_or_else(missing)?;
        let flushed = drained.exclusive(parent)?.with(async |node| node.cx().child(child).flush().await).await;
        flushed.doing(|| format!("Could not flush the child '{name}' before it is removed"))?;
        let committed = drained.write(|edit, set| edit.remove_child(set.owner(parent)?, child))?;
        committed.close(self).await;
        Ok(())
    }
}
