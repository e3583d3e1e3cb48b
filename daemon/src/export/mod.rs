//! Exports: how a node is offered to the outside. One module a kind.

pub mod vhost_user;
