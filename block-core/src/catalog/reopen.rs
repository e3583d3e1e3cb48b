//! New options for nodes that are there: all of a list, or none.
//!
//! Each entry is complete: what it leaves out goes back to its default. The driver and the file stay; `file` and `backing`
//! may become other nodes of the graph, and a filter above a node that is in use is inserted and taken out so.

use std::any::Any;
use std::collections::BTreeSet;
use std::rc::Rc;

use qmp::schema::Union;

use super::add::as_parent_of;
use super::children::{GivenChild, GivenNode};
use super::options::BlockdevOptions;
use crate::base::{Error, Result};
use crate::graph::{Change, Graph, NodeId, NodeOptions, NodeReport, Permit, Reopen, Step};
use crate::rt::sync::Turns;

/// Reopens the nodes that the entries name. A child that was defined in place may be given in place again; then it is
/// reopened too.
pub async fn reopen(permit: &mut Permit, list: Vec<BlockdevOptions>) -> Result<()> {
    let steps = reopen_steps(permit.graph(), &list).await?;
    permit.transact(steps).await
}

/// The same as steps of a transaction.
pub async fn reopen_steps(graph: &Rc<Graph>, list: &[BlockdevOptions]) -> Result<Vec<Box<dyn Step>>> {
    let mut reopening = Reopening { graph: graph.clone(), all: Vec::new(), read: BTreeSet::new(), current: Vec::new() };
    let mut turns = Turns::begin();
    for options in list {
        turns.step().await;
        let Some(name) = &options.common.node_name else { return Err(Error::new("node-name not specified")) };
        let missing = || Error::new(format!("Failed to find node with node-name='{name}'"));
        let id = reopening.graph.find(name).ok_or_else(missing)?;
        check_driver(graph, id, options.driver.tag()).await?;
        reopening.node(id, options, None)?;
    }
    for (reopen, driver) in &reopening.all {
        turns.step().await;
        check_driver(graph, reopen.node, driver).await?;
    }
    Ok(reopening.all.into_iter().map(|(reopen, _)| reopen.step()).collect())
}

async fn check_driver(graph: &Graph, node: NodeId, driver: &str) -> Result<()> {
    let is_same = graph.info(node).await.is_some_and(|info| info.driver == driver);
    if is_same { Ok(()) } else { Err(Error::new("Cannot change the option 'driver'")) }
}

/// A list that is being read.
pub(super) struct Reopening {
    graph: Rc<Graph>,
    /// What is to be reopened, with the driver that the options are for.
    all: Vec<(Reopen, &'static str)>,
    /// The nodes whose options have been read, or are being.
    read: BTreeSet<NodeId>,
    /// The nodes whose options are being read, from the entry down.
    current: Vec<Current>,
}

/// A node whose options are being read.
struct Current {
    report: NodeReport,
    /// What its children are to be instead.
    children: Vec<Change>,
}

impl Reopening {
    fn node(&mut self, id: NodeId, options: &BlockdevOptions, parent: Option<NodeOptions>) -> Result<()> {
        let report = self.graph.node(id).ok_or_else(|| Error::new("There is no such node"))?;
        if !self.read.insert(id) {
            return Err(Error::new(format!("Node '{}' is in the list twice", report.name)));
        }
        let mut common = options.common.in_force(parent)?;
        // A node that turned read-only by itself stays so; `auto-read-only: false` asks for more.
        common.read_only |= common.auto_read_only && report.options.read_only;
        self.current.push(Current { report, children: Vec::new() });
        let own: Box<dyn Any + Send> = options.driver.reopen(self, common)?;
        let children = self.current.pop().expect("it was pushed above").children;
        self.all.push((Reopen { node: id, options: own, common, children }, options.driver.tag()));
        Ok(())
    }

    /// The children of the node that is being read: those that it has, by name or in place, or other nodes by name.
    pub(super) fn children(&mut self, common: NodeOptions, children: &[GivenChild<'_>]) -> Result<()> {
        for given in children {
            let parent = &self.current.last().expect("children are read below their node").report;
            let old = parent.children.iter().find(|(name, _)| *name == given.edge);
            let old = old.and_then(|(_, id)| self.graph.node(*id));
            match (given.node, old) {
                (GivenNode::Null, None) => {}
                (GivenNode::Null, Some(_)) if can_change(&given.edge) => {
                    let current = self.current.last_mut().expect("children are read below their node");
                    let (parent, child) = (current.report.id, given.edge.clone());
                    current.children.push(Change::Repoint { parent, child, to: None });
                }
                (GivenNode::Defined(options), Some(old)) if is_again(options, &old) => {
                    self.node(old.id, options, Some(as_parent_of(given.role, common)))?;
                }
                (GivenNode::Named(name), Some(old)) if *name == old.name => {}
                (GivenNode::Named(name), _) if can_change(&given.edge) => self.repoint(given, name)?,
                _ => return Err(cannot_change(&given.edge)),
            }
        }
        self.left_out(children)
    }

    /// Children that the node has and the options do not give.
    fn left_out(&self, given: &[GivenChild<'_>]) -> Result<()> {
        let parent = &self.current.last().expect("children are read below their node").report;
        let missing = parent.children.iter().find(|(name, _)| given.iter().all(|given| given.edge != *name));
        match missing {
            None => Ok(()),
            Some((name, _)) => Err(cannot_change(name)),
        }
    }

    fn repoint(&mut self, given: &GivenChild<'_>, name: &str) -> Result<()> {
        let missing = || Error::new(format!("Cannot find device='{name}' nor node-name='{name}'"));
        let to = self.graph.find(name).ok_or_else(missing)?;
        let current = self.current.last_mut().expect("children are read below their node");
        let to = Some((to, given.role));
        current.children.push(Change::Repoint { parent: current.report.id, child: given.edge.clone(), to });
        Ok(())
    }
}

/// Whether a child of this name may become another node. What others compare or copy has to stay.
fn can_change(edge: &str) -> bool {
    matches!(edge, "file" | "backing")
}

/// The definition is about the inline child that is there.
fn is_again(options: &BlockdevOptions, old: &NodeReport) -> bool {
    !old.explicit && options.common.node_name.as_ref().is_none_or(|name| *name == old.name)
}

fn cannot_change(edge: &str) -> Error {
    Error::new(format!("Cannot change the option '{edge}'"))
}
