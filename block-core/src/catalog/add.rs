//! Adding nodes. A tree of definitions is opened bottom-up, outside the graph, and then added in one change: an error
//! leaves no node, no lock and no descriptor.

use std::collections::HashSet;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

use super::children::{GivenChild, GivenNode};
use super::options::{BlockdevOptions, MAX_DEPTH, check_name};
use crate::base::{Error, Result};
use crate::drivers::{Open, Opened, Site};
use crate::graph::{Edges, Graph, GraphEdit, NewNode, NodeId, NodeOptions, Permit, Role};

/// Opens a node with its inline children and adds them: all of them, or none.
pub async fn add(permit: &mut Permit, options: BlockdevOptions) -> Result<NodeId> {
    if options.common.node_name.is_none() {
        return Err(Error::new("'node-name' must be specified for the root node"));
    }
    add_unnamed(permit, options).await
}

/// The same for a node that need not have a name: whoever adds it removes it.
pub async fn add_unnamed(permit: &mut Permit, options: BlockdevOptions) -> Result<NodeId> {
    let opened = Opening::tree(permit, &options).await?;
    let top = permit.apply(move |edit| add_all(edit, &opened)).await?;
    if let Err(error) = permit.mend(top).await {
        // Whoever asked has no node, and no lock. The second time nobody minds what cannot be flushed.
        if permit.remove(top).await.is_err() {
            permit.remove(top).await?;
        }
        return Err(error);
    }
    Ok(top)
}

/// The same for a node over an image that has just been made: nobody may use it before [`Change::publish`].
///
/// [`Change::publish`]: crate::graph::Change::publish
pub async fn add_withheld(permit: &mut Permit, options: BlockdevOptions) -> Result<NodeId> {
    let mut opened = Opening::tree(permit, &options).await?;
    let top = opened.pop().expect("a tree has a root");
    opened.push(top.withheld());
    permit.apply(move |edit| add_all(edit, &opened)).await
}

/// Adds what was opened, children first; the last one is the root of the tree.
fn add_all(edit: &mut GraphEdit<'_>, tree: &[NewNode]) -> Result<NodeId> {
    let added = tree.iter().map(|node| edit.add(node.clone())).collect::<Result<Vec<_>>>()?;
    Ok(*added.last().expect("a tree has a root"))
}

/// A tree of definitions that is being opened.
pub(super) struct Opening {
    graph: Rc<Graph>,
    /// What is open already, children before parents.
    opened: Vec<NewNode>,
    /// The names in this tree.
    names: HashSet<String>,
    /// How many definitions the current one is in.
    depth: usize,
}

/// What an inline child takes from its parent. A backing node is only read, whatever becomes of the layer above it.
pub(super) fn as_parent_of(role: Role, parent: NodeOptions) -> NodeOptions {
    match role {
        Role::Cow => NodeOptions { read_only: true, auto_read_only: false, ..parent },
        _ => parent,
    }
}

/// A node of the tree, before its driver is opened.
pub(super) struct Header {
    name: String,
    common: NodeOptions,
    inline: bool,
}

impl Opening {
    /// Opens a definition, and what is defined in it.
    async fn tree(permit: &Permit, options: &BlockdevOptions) -> Result<Vec<NewNode>> {
        let mut opening = Self { graph: permit.graph().clone(), opened: Vec::new(), names: HashSet::new(), depth: 0 };
        opening.define(options, None).await?;
        Ok(opening.opened)
    }

    /// Opens one definition. `parent`: the options of the node that it is defined in.
    fn define<'a>(
        &'a mut self,
        options: &'a BlockdevOptions,
        parent: Option<NodeOptions>,
    ) -> Pin<Box<dyn Future<Output = Result<()>> + 'a>> {
        Box::pin(async move {
            if self.depth == MAX_DEPTH {
                return Err(Error::new(format!("Nodes may not be defined more than {MAX_DEPTH} levels deep")));
            }
            let name = self.name(options.common.node_name.as_deref())?;
            let common = options.common.in_force(parent)?;
            self.depth += 1;
            options.driver.open(self, Header { name, common, inline: parent.is_some() }).await?;
            self.depth -= 1;
            Ok(())
        })
    }

    /// Opens a node whose branch of the options has been taken apart.
    pub(super) async fn node<O: Open>(&mut self, header: Header, children: &[GivenChild<'_>], own: &O) -> Result<()> {
        let Header { name, mut common, inline } = header;
        let (mut edges, mut named) = (Edges::default(), Vec::new());
        let mut nulls = Vec::new();
        for GivenChild { edge, role, node } in children {
            let Some((child, below)) = self.child(*node, *role, common).await? else {
                nulls.push(edge.clone());
                continue;
            };
            // Who may turn read-only does so over what cannot be written.
            common.read_only |= common.auto_read_only && below.read_only;
            named.push((edge.clone(), edges.to(edge.clone(), child, *role)));
        }
        let (objects, events) = (self.graph.objects(), self.graph.events());
        let (graph, tree) = (&self.graph, &self.opened[..]);
        let site =
            Site { name: &name, common, children: &named, nulls: &nulls, edges: &edges, objects, events, graph, tree };
        let Opened { driver, conf, options } = own.open(site).await?;
        let node = NewNode::new(name, options, |declared| {
            *declared = edges;
            (driver, conf)
        });
        let node = if inline { node.inline() } else { node };
        self.opened.push(node);
        Ok(())
    }

    /// A child, opened if it is defined in place, and its options.
    async fn child(
        &mut self,
        child: GivenNode<'_>,
        role: Role,
        parent: NodeOptions,
    ) -> Result<Option<(NodeId, NodeOptions)>> {
        match child {
            GivenNode::Null => Ok(None),
            GivenNode::Defined(options) => {
                self.define(options, Some(as_parent_of(role, parent))).await?;
                let below = self.opened.last().expect("it has just been opened");
                Ok(Some((below.id(), below.options())))
            }
            GivenNode::Named(name) => {
                let known = self.graph.find(name).and_then(|id| self.graph.node(id));
                let missing = || Error::new(format!("Cannot find device='{name}' nor node-name='{name}'"));
                known.map(|node| Some((node.id, node.options))).ok_or_else(missing)
            }
        }
    }

    /// The name that was given, if it may be, or a fresh one.
    fn name(&mut self, given: Option<&str>) -> Result<String> {
        let Some(name) = given else { return Ok(self.graph.automatic_name()) };
        check_name(name)?;
        if self.graph.find(name).is_some() || !self.names.insert(name.to_owned()) {
            return Err(Error::new(format!("Duplicate nodes with node-name='{name}'")));
        }
        Ok(name.to_owned())
    }
}
