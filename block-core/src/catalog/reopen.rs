//! New options for nodes that are there: all of a list, or none.
//!
//! Each entry is complete: what it leaves out goes back to its default. The driver, the file and the children stay.

use std::any::Any;
use std::rc::Rc;

use qmp::schema::Union;

use super::children::{GivenChild, GivenNode};
use super::options::BlockdevOptions;
use crate::base::{Error, Result};
use crate::graph::{Graph, NodeId, NodeOptions, NodeReport, Permit, Reopen};

/// Reopens the nodes that the entries name. A child that was defined in place may be given in place again; then it is
/// reopened too.
pub async fn reopen(permit: &mut Permit, list: Vec<BlockdevOptions>) -> Result<()> {
    let mut reopening = Reopening { graph: permit.graph().clone(), all: Vec::new(), current: Vec::new() };
    for options in &list {
        let Some(name) = &options.common.node_name else { return Err(Error::new("node-name not specified")) };
        let missing = || Error::new(format!("Failed to find node with node-name='{name}'"));
        let id = reopening.graph.find(name).ok_or_else(missing)?;
        reopening.node(id, options, None)?;
    }
    let graph = permit.graph().clone();
    for (reopen, driver) in &reopening.all {
        if graph.info(reopen.node).await.is_none_or(|info| info.driver != *driver) {
            return Err(Error::new("Cannot change the option 'driver'"));
        }
    }
    permit.reopen(reopening.all.into_iter().map(|(reopen, _)| reopen).collect()).await
}

/// A list that is being read.
pub(super) struct Reopening {
    graph: Rc<Graph>,
    /// What is to be reopened, with the driver that the options are for.
    all: Vec<(Reopen, &'static str)>,
    /// The nodes whose options are being read, from the entry down.
    current: Vec<NodeReport>,
}

impl Reopening {
    fn node(&mut self, id: NodeId, options: &BlockdevOptions, parent: Option<NodeOptions>) -> Result<()> {
        let report = self.graph.node(id).ok_or_else(|| Error::new("There is no such node"))?;
        if self.all.iter().any(|(other, _)| other.node == id) {
            return Err(Error::new(format!("Node '{}' is in the list twice", report.name)));
        }
        let mut common = options.common.in_force(parent)?;
        // A node that turned read-only by itself stays so; `auto-read-only: false` asks for more.
        common.read_only |= common.auto_read_only && report.options.read_only;
        self.current.push(report);
        let own: Box<dyn Any + Send> = options.driver.reopen(self, common)?;
        self.current.pop();
        self.all.push((Reopen { node: id, options: own, common }, options.driver.tag()));
        Ok(())
    }

    /// The children of the node that is being read: the same as before, by name or in place.
    pub(super) fn children(&mut self, common: NodeOptions, children: &[GivenChild<'_>]) -> Result<()> {
        for GivenChild { edge, node, .. } in children {
            let parent = self.current.last().expect("children are read below their node");
            let old = parent.children.iter().find(|(name, _)| name == edge);
            let old = old.and_then(|(_, id)| self.graph.node(*id));
            let Some(old) = old else { return Err(cannot_change(edge)) };
            match *node {
                GivenNode::Defined(options) if is_again(options, &old) => self.node(old.id, options, Some(common))?,
                GivenNode::Named(name) if *name == old.name => {}
                GivenNode::Defined(_) | GivenNode::Named(_) => return Err(cannot_change(edge)),
            }
        }
        Ok(())
    }
}

/// The definition is about the inline child that is there.
fn is_again(options: &BlockdevOptions, old: &NodeReport) -> bool {
    !old.explicit && options.common.node_name.as_ref().is_none_or(|name| *name == old.name)
}

fn cannot_change(edge: &str) -> Error {
    Error::new(format!("Changing the child '{edge}' of a node that is there is not supported yet"))
}
