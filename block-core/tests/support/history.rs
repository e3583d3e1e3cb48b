//! A disk with a past: an image with two internal snapshots that share most of it, one change of them, and what is found
//! after it went well, failed, or was cut off. A test file declares `bench` and this.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "each test file uses a part")]

use std::collections::BTreeMap;
use std::rc::Rc;

use block_core::graph::{Graph, NewSnapshot, NodeId, PermSet, Perms, SnapshotName, TakeSnapshot, WriteFlags};
use block_core::port::{Port, PortLane};
use block_core::rt::Local;

use crate::bench::{attach, flush, range, read, write, writer};

/// A change of the snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    Take,
    Delete,
    Apply,
}

pub const ALL: [What; 3] = [What::Take, What::Delete, What::Apply];

/// A disk, and its snapshots by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Past {
    pub disk: Vec<u8>,
    pub kept: BTreeMap<String, Vec<u8>>,
}

impl Past {
    /// Nothing has been written yet.
    pub fn new(size: u64) -> Self {
        Self { disk: vec![0; usize::try_from(size).unwrap()], kept: BTreeMap::new() }
    }

    /// Writes, and takes the snapshots `a` and `b`; all of it is stable.
    pub async fn made(&mut self, used: &Used) {
        let quarter = self.disk.len() as u64 / 4;
        for (fill, start, len, name) in [
            (1, 0, 3 * quarter, Some("a")),
            (2, quarter, quarter, Some("b")),
            (3, 2 * quarter - 700, 1000, None),
            (4, 3 * quarter, 5000, None),
        ] {
            write(&used.lane, start, &vec![fill; usize::try_from(len).unwrap()], WriteFlags::default()).await.unwrap();
            self.disk[usize::try_from(start).unwrap()..][..usize::try_from(len).unwrap()].fill(fill);
            if let Some(name) = name {
                used.take(name).await.unwrap();
                self.kept.insert(name.into(), self.disk.clone());
            }
        }
        flush(&used.lane).await.unwrap();
    }

    /// What it is after the change.
    pub fn after(&self, what: What) -> Self {
        let mut after = self.clone();
        match what {
            What::Take => drop(after.kept.insert("c".into(), self.disk.clone())),
            What::Delete => drop(after.kept.remove("a")),
            What::Apply => after.disk.clone_from(&self.kept["a"]),
        }
        after
    }
}

/// An image with its user, who bears everything.
pub struct Used {
    pub graph: Rc<Graph>,
    pub node: NodeId,
    pub port: Port,
    pub lane: Rc<PortLane>,
}

impl Used {
    pub async fn new(graph: Rc<Graph>, node: NodeId) -> Self {
        let port = attach(&graph, node, Perms { shares: PermSet::ALL, ..writer() }).await.unwrap();
        let lane = port.handle().lane(&Local::current());
        Self { graph, node, port, lane }
    }

    async fn take(&self, name: &str) -> Result<(), String> {
        let step = TakeSnapshot::step(self.node, NewSnapshot { name: name.into(), date: (1, 2) });
        self.graph.permit().transact(vec![step]).await.map_err(|error| error.full())
    }

    /// Makes the change.
    pub async fn change(&self, what: What) -> Result<(), String> {
        let a = SnapshotName { id: None, name: Some("a".into()) };
        let mut permit = self.graph.permit();
        match what {
            What::Take => self.take("c").await,
            What::Delete => permit.delete_snapshot(self.node, a).await.map(drop).map_err(|error| error.full()),
            What::Apply => permit.apply_snapshot(self.node, a).await.map(drop).map_err(|error| error.full()),
        }
    }

    /// What the disk has, and what snapshots there are.
    pub async fn shown(&self) -> Result<(Vec<u8>, Vec<String>), String> {
        let size = self.port.geometry().size;
        let disk = read(&self.lane, range(0, size)).await.map_err(|error| error.to_string())?;
        let names = self.graph.snapshots(self.node).unwrap().into_iter().map(|one| one.name);
        Ok((disk, names.collect()))
    }

    /// Writes still work, and change no snapshot; what each of them has is seen by applying it.
    pub async fn all(&self) -> Result<Past, String> {
        let (disk, names) = self.shown().await?;
        let mut kept = BTreeMap::new();
        write(&self.lane, 300, &[9; 40_000], WriteFlags::default()).await.map_err(|error| error.to_string())?;
        for name in names {
            let which = SnapshotName { id: None, name: Some(name.clone()) };
            let applied = self.graph.permit().apply_snapshot(self.node, which).await;
            applied.map_err(|error| error.full())?;
            kept.insert(name, self.shown().await?.0);
            write(&self.lane, 5000, &[8; 30_000], WriteFlags::default()).await.map_err(|error| error.to_string())?;
        }
        flush(&self.lane).await.map_err(|error| error.to_string())?;
        Ok(Past { disk, kept })
    }

    /// Closes it; a failure that comes to light then may be told once.
    pub async fn close(self) {
        drop(self.lane);
        let _ = self.port.detach(&mut self.graph.permit()).await;
        if self.graph.permit().remove(self.node).await.is_err() {
            self.graph.permit().remove(self.node).await.unwrap();
        }
    }
}
