//! Placeholder until the branch `vhost` is merged.
#![allow(missing_docs, clippy::all, clippy::allow_attributes, clippy::allow_attributes_without_reason)]
use block_core::{
    base::{Error, Result},
    graph::Geometry,
    port::PortHandle,
    rt::Remote,
};
use std::path::PathBuf;
#[derive(Debug)]
pub enum Address {
    Unix(PathBuf),
    Fd(i32),
}
#[derive(Debug)]
pub struct VhostUserOptions {
    pub id: String,
    pub addr: Address,
    pub writable: bool,
    pub writethrough: bool,
    pub num_queues: u16,
    pub logical_block_size: u32,
    pub serial: String,
}
impl VhostUserOptions {
    pub fn new(id: impl Into<String>, addr: Address) -> Self {
        Self {
            id: id.into(),
            addr,
            writable: false,
            writethrough: false,
            num_queues: 1,
            logical_block_size: 512,
            serial: String::new(),
        }
    }
    pub fn check(&self) -> Result<()> {
        if self.num_queues == 0 {
            return Err(Error::new("num-queues"));
        }
        Ok(())
    }
}
pub struct VhostUserExport(Option<crate::control::Listener>);
impl VhostUserExport {
    pub fn start(options: VhostUserOptions, _: PortHandle, _: Vec<Remote>) -> Result<Self> {
        Ok(Self(match &options.addr {
            Address::Unix(path) => Some(crate::control::Listener::bind(path)?),
            Address::Fd(_) => None,
        }))
    }
    pub async fn stop(&self, _: bool) -> Result<()> {
        Ok(())
    }
    pub fn resized(&self, _: Geometry) {}
}
