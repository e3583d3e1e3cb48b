//! The members of a driver's options that are children: which types they may have, and what edges come of them.

use std::borrow::Cow;

use super::options::{BlockdevOptions, BlockdevRef, BlockdevRefOrNull};
use crate::graph::Role;

/// A child as the options give it.
pub(super) struct GivenChild<'a> {
    /// What QMP calls the edge.
    pub(super) edge: Cow<'static, str>,
    pub(super) role: Role,
    pub(super) node: GivenNode<'a>,
}

/// Which node it is.
#[derive(Clone, Copy)]
pub(super) enum GivenNode<'a> {
    /// A new one.
    Defined(&'a BlockdevOptions),
    /// One that is there.
    Named(&'a str),
    /// None, and that was said.
    Null,
}

/// A type that a child's member may have.
pub(super) trait ChildMember {
    /// The children that the member gives.
    fn given(&self, member: &'static str, role: Role) -> Vec<GivenChild<'_>>;

    /// Those of them that it defines, by their edges.
    fn defined(&mut self, member: &'static str) -> Vec<Defined<'_>>;
}

/// The edge to a node that is defined in place, and the node.
pub(super) type Defined<'a> = (Cow<'static, str>, &'a mut BlockdevOptions);

impl BlockdevRef {
    fn node(&self) -> GivenNode<'_> {
        match self {
            Self::Definition(options) => GivenNode::Defined(options),
            Self::Reference(name) => GivenNode::Named(name),
        }
    }
}

/// One that has to be given.
impl ChildMember for BlockdevRef {
    fn given(&self, member: &'static str, role: Role) -> Vec<GivenChild<'_>> {
        vec![GivenChild { edge: edge(member), role, node: self.node() }]
    }

    fn defined(&mut self, member: &'static str) -> Vec<Defined<'_>> {
        match self {
            Self::Definition(options) => vec![(edge(member), &mut **options)],
            Self::Reference(_) => Vec::new(),
        }
    }
}

/// One that may be left out.
impl ChildMember for Option<BlockdevRef> {
    fn given(&self, member: &'static str, role: Role) -> Vec<GivenChild<'_>> {
        self.iter().flat_map(|child| child.given(member, role)).collect()
    }

    fn defined(&mut self, member: &'static str) -> Vec<Defined<'_>> {
        self.iter_mut().flat_map(|child| child.defined(member)).collect()
    }
}

/// One that may be left out, or be said not to be there.
impl ChildMember for Option<BlockdevRefOrNull> {
    fn given(&self, member: &'static str, role: Role) -> Vec<GivenChild<'_>> {
        let node = |child| match child {
            &BlockdevRefOrNull::Null => GivenNode::Null,
            BlockdevRefOrNull::Definition(options) => GivenNode::Defined(options),
            // As people write null on a command line.
            BlockdevRefOrNull::Reference(name) if name.is_empty() => GivenNode::Null,
            BlockdevRefOrNull::Reference(name) => GivenNode::Named(name),
        };
        self.iter().map(|child| GivenChild { edge: edge(member), role, node: node(child) }).collect()
    }

    fn defined(&mut self, member: &'static str) -> Vec<Defined<'_>> {
        match self {
            Some(BlockdevRefOrNull::Definition(options)) => vec![(edge(member), &mut **options)],
            Some(BlockdevRefOrNull::Reference(_) | BlockdevRefOrNull::Null) | None => Vec::new(),
        }
    }
}

/// Any number: `children.0`, `children.1`, ….
impl ChildMember for Vec<BlockdevRef> {
    fn given(&self, member: &'static str, role: Role) -> Vec<GivenChild<'_>> {
        let numbered = self.iter().enumerate();
        let each = numbered.map(|(number, child)| (format!("{member}.{number}"), child.node()));
        each.map(|(edge, node)| GivenChild { edge: edge.into(), role, node }).collect()
    }

    fn defined(&mut self, member: &'static str) -> Vec<Defined<'_>> {
        let numbered = self.iter_mut().enumerate();
        let each =
            numbered.flat_map(|(number, child)| child.defined(member).into_iter().map(move |(_, node)| (number, node)));
        each.map(|(number, node)| (format!("{member}.{number}").into(), node)).collect()
    }
}

/// The name of a node that is there already, or nothing.
impl ChildMember for Option<String> {
    fn given(&self, member: &'static str, role: Role) -> Vec<GivenChild<'_>> {
        let named = |name| GivenChild { edge: edge(member), role, node: GivenNode::Named(name) };
        self.iter().map(|name| named(name)).collect()
    }

    fn defined(&mut self, _: &'static str) -> Vec<Defined<'_>> {
        Vec::new()
    }
}

/// What QMP calls the edge of a member.
fn edge(member: &'static str) -> Cow<'static, str> {
    if member.contains('_') { member.replace('_', "-").into() } else { member.into() }
}
