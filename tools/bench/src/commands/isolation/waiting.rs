//! The commands that are run on a chain with a slow request in flight, and the chain that each needs.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use clap::ValueEnum;
use serde_json::{Value, json};
use trellis_bench::server::{Threads, export, option};

/// Every command that changes the graph. What takes two of them to get back where it was alternates from round to round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Waiting {
    /// Nodes above A's chain are added and deleted
    BlockdevAddDel,
    BlockdevReopen,
    /// A filter is put in below A's node, and taken out
    InsertFilter,
    /// Another node is put in above A's node; the peer has no such command
    Replace,
    /// Bitmaps of two nodes come and go together
    Transaction,
    /// What is slow is the log of A's writes, since a null node has one size
    BlockResize,
    /// A copy is added to a quorum, and taken away
    BlockdevChange,
    /// Of another node above the slow one
    SetActive,
    BitmapAddRemove,
    SetIothread,
}

impl Waiting {
    /// For tables.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::BlockdevAddDel => "blockdev-add, -del",
            Self::BlockdevReopen => "blockdev-reopen",
            Self::InsertFilter => "blockdev-reopen: a filter in, out",
            Self::Replace => "x-blockdev-replace",
            Self::Transaction => "transaction",
            Self::BlockResize => "block_resize",
            Self::BlockdevChange => "x-blockdev-change",
            Self::SetActive => "blockdev-set-active",
            Self::BitmapAddRemove => "block-dirty-bitmap-add, -remove",
            Self::SetIothread => "x-blockdev-set-iothread",
        }
    }

    /// The request in flight is in its way: it takes as long. The others touch nothing that the request uses.
    pub(super) fn waits(self) -> bool {
        !matches!(self, Self::BlockdevAddDel | Self::SetActive | Self::SetIothread)
    }

    /// What the slow request is, else a read.
    pub(super) fn writes(self) -> bool {
        self == Self::BlockResize
    }

    /// What is run in a round. Rounds are counted from 0.
    pub(super) fn commands(self, round: usize) -> Vec<(&'static str, Value)> {
        let there = round.is_multiple_of(2);
        let one = match self {
            Self::BlockdevAddDel => {
                let new = json!({ "driver": "raw", "node-name": "new", "file": "a" });
                return vec![("blockdev-add", new), ("blockdev-del", json!({ "node-name": "new" }))];
            }
            Self::BlockdevReopen => reopen("slow"),
            Self::InsertFilter => reopen(if there { "filter" } else { "slow" }),
            Self::Replace => {
                let new = if there { "above" } else { "a" };
                let edge = json!({ "parent-type": "export", "export-id": "a", "new-child": new });
                ("x-blockdev-replace", edge)
            }
            Self::Transaction => {
                let (command, _) = bitmap("a", there);
                let actions = ["a", "slow"].map(|node| json!({ "type": command, "data": bitmap(node, there).1 }));
                ("transaction", json!({ "actions": actions }))
            }
            Self::BlockResize => {
                let size = if there { SIZE_A + (1 << 20) } else { SIZE_A };
                ("block_resize", json!({ "node-name": "a", "size": size }))
            }
            Self::BlockdevChange => {
                let change = if there { ("node", "spare") } else { ("child", "children.2") };
                ("x-blockdev-change", json!({ "parent": "a", (change.0): change.1 }))
            }
            Self::SetActive => ("blockdev-set-active", json!({ "node-name": "idle", "active": !there })),
            Self::BitmapAddRemove => bitmap("a", there),
            Self::SetIothread => ("x-blockdev-set-iothread", json!({ "node-name": "above", "iothread": "i0" })),
        };
        vec![one]
    }

    /// A on `i0`, B on `i1`: what they share is only the control side.
    pub(super) fn server_arguments(self, directory: &Path, slow: Duration) -> Vec<String> {
        let node = |options: &str| option("blockdev", options);
        let latency = slow.as_nanos();
        let slow = node(&format!("null-co,node-name=slow,size={SIZE_A},read-zeroes=on,latency-ns={latency}"));
        let quick = |name| node(&format!("null-co,node-name={name},size={SIZE_A},read-zeroes=on"));
        let chain = match self {
            Self::BlockResize => {
                let image = directory.join("a.img");
                // Where this fails the server says that there is no such file.
                let _ = File::create(&image).and_then(|file| file.set_len(SIZE_A));
                let image = image.display();
                node(&format!("blklogwrites,node-name=a,log=slow,file.driver=file,file.filename={image}"))
            }
            Self::BlockdevChange => {
                let quorum = node("quorum,node-name=a,vote-threshold=1,children.0=slow,children.1=twin");
                [quick("twin"), quick("spare"), quorum].concat()
            }
            _ => {
                let unlimited = option("object", "throttle-group,id=unlimited");
                let filter = node("throttle,node-name=filter,throttle-group=unlimited,file=slow");
                [unlimited, filter, node(&format!("raw,node-name=a,file=slow,size={SIZE_A}"))].concat()
            }
        };
        // Above the slow node, where that one can be shared.
        let idle = if self == Self::BlockResize { Vec::new() } else { node("raw,node-name=idle,file=slow") };
        [
            Threads::Split.objects(),
            slow,
            chain,
            node("raw,node-name=above,file=a"),
            idle,
            node("null-co,node-name=b,size=1073741824,read-zeroes=off"),
            export(directory, "a", "a", 1, Threads::Shared),
            export(directory, "b", "b", 1, Threads::Second),
        ]
        .concat()
    }
}

fn reopen(file: &str) -> (&'static str, Value) {
    let options = json!({ "driver": "raw", "node-name": "a", "file": file, "size": SIZE_A });
    ("blockdev-reopen", json!({ "options": [options] }))
}

fn bitmap(node: &str, there: bool) -> (&'static str, Value) {
    let command = if there { "block-dirty-bitmap-add" } else { "block-dirty-bitmap-remove" };
    (command, json!({ "node": node, "name": "dirty" }))
}

/// Bytes.
const SIZE_A: u64 = 1 << 30;
