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
}

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
}

/// One that may be left out.
impl ChildMember for Option<BlockdevRef> {
    fn given(&self, member: &'static str, role: Role) -> Vec<GivenChild<'_>> {
        self.iter().flat_map(|child| child.given(member, role)).collect()
    }
}

/// One that may be left out, or be said not to be there.
impl ChildMember for Option<BlockdevRefOrNull> {
    fn given(&self, member: &'static str, role: Role) -> Vec<GivenChild<'_>> {
        let node = |child| match child {
            &BlockdevRefOrNull::Null => GivenNode::Null,
            BlockdevRefOrNull::Definition(options) => GivenNode::Defined(options),
            BlockdevRefOrNull::Reference(name) => GivenNode::Named(name),
        };
        self.iter().map(|child| GivenChild { edge: edge(member), role, node: node(child) }).collect()
    }
}

/// Any number: `children.0`, `children.1`, ….
impl ChildMember for Vec<BlockdevRef> {
    fn given(&self, member: &'static str, role: Role) -> Vec<GivenChild<'_>> {
        let numbered = self.iter().enumerate();
        let each = numbered.map(|(number, child)| (format!("{member}.{number}"), child.node()));
        each.map(|(edge, node)| GivenChild { edge: edge.into(), role, node }).collect()
    }
}

/// The name of a node that is there already, or nothing.
impl ChildMember for Option<String> {
    fn given(&self, member: &'static str, role: Role) -> Vec<GivenChild<'_>> {
        let named = |name| GivenChild { edge: edge(member), role, node: GivenNode::Named(name) };
        self.iter().map(|name| named(name)).collect()
    }
}

/// What QMP calls the edge of a member.
fn edge(member: &'static str) -> Cow<'static, str> {
    if member.contains('_') { member.replace('_', "-").into() } else { member.into() }
}
