//! Dirty bitmaps of nodes: the commands, each a transaction of one step.

use std::rc::Rc;

use block_core::drivers::BlockDirtyBitmap;
use block_core::graph::{BitmapAction, BitmapChange, NodeBitmap, NodeId, Step};
use qmp::schema::Empty;
use qmp::{Error, Qapi, Result};
use sha2::{Digest, Sha256};

use super::Table;
use super::blockdev::{no_such_device, signed};
use crate::daemon::Daemon;
use crate::refused;

pub(super) fn register(table: &mut Table) {
    table.add(
        "block-dirty-bitmap-add",
        "Gives a node a bitmap, which notes what of it is written from now on.",
        block_dirty_bitmap_add,
    );
    table.add("block-dirty-bitmap-remove", "Takes a bitmap away.", block_dirty_bitmap_remove);
    table.add("block-dirty-bitmap-clear", "Forgets what a bitmap has noted.", block_dirty_bitmap_clear);
    table.add("block-dirty-bitmap-enable", "Lets a bitmap note writes.", block_dirty_bitmap_enable);
    table.add("block-dirty-bitmap-disable", "Lets a bitmap stay as it is.", block_dirty_bitmap_disable);
    table.add(
        "block-dirty-bitmap-merge",
        "Adds what some bitmaps have noted to another one: of all, or where one is refused of none.",
        block_dirty_bitmap_merge,
    );
    table.add_with(
        "x-debug-block-dirty-bitmap-sha256",
        "A digest of all bits of a bitmap, for tests.",
        &["unstable"],
        debug_block_dirty_bitmap_sha256,
    );
}

/// The arguments of `block-dirty-bitmap-add`.
#[derive(Clone, Debug, Qapi)]
pub(super) struct BlockDirtyBitmapAdd {
    /// The node.
    node: String,
    /// What the bitmap is called among those of the node.
    name: String,
    /// Bytes for a bit, a power of two from 512 on; without it, as suits the node.
    granularity: Option<u32>,
    /// The image stores it, so that it is there again when the image is opened again. Needs a qcow2 image of version 3.
    #[qapi(default = false)]
    persistent: bool,
    /// It does not note anything yet.
    #[qapi(default = false)]
    disabled: bool,
}

/// The arguments of `block-dirty-bitmap-merge`.
#[derive(Clone, Debug, Qapi)]
pub(super) struct BlockDirtyBitmapMerge {
    /// The node of the target.
    node: String,
    /// The bitmap that gets the marks.
    target: String,
    /// Whose marks it gets.
    bitmaps: Vec<BlockDirtyBitmapOrStr>,
}

/// A bitmap of the node that the command is about, or of any.
#[derive(Clone, Debug, Qapi)]
#[qapi(alternate)]
enum BlockDirtyBitmapOrStr {
    /// One of the same node.
    Local(String),
    /// One of any node.
    External(BlockDirtyBitmap),
}

/// A digest of a bitmap.
#[derive(Clone, Debug, Qapi)]
struct BlockDirtyBitmapSha256 {
    /// In hexadecimal.
    sha256: String,
}

/// A bitmap, as `query-named-block-nodes` shows it.
#[derive(Clone, Debug, Qapi)]
pub(super) struct BlockDirtyInfo {
    /// Its name.
    name: Option<String>,
    /// Bytes that have changed.
    count: i64,
    /// Bytes for a bit.
    granularity: u32,
    /// Whether it notes writes.
    recording: bool,
    /// Whether a job has it: there are none yet.
    busy: bool,
    /// Whether the image stores it.
    persistent: bool,
    /// Present and true where what the image stores cannot be used: the image was not closed in good order since. Such a
    /// bitmap can only be removed.
    inconsistent: Option<bool>,
}

impl BlockDirtyInfo {
    pub(super) fn of(bitmap: &NodeBitmap) -> Self {
        Self {
            name: Some(bitmap.name.clone()),
            count: signed(bitmap.bits.count()),
            granularity: bitmap.bits.granularity(),
            recording: bitmap.recording,
            busy: false,
            persistent: bitmap.persistent,
            inconsistent: bitmap.inconsistent.then_some(true),
        }
    }
}

async fn block_dirty_bitmap_add(daemon: Rc<Daemon>, arguments: BlockDirtyBitmapAdd) -> Result<Empty> {
    change(&daemon, arguments.step(&daemon)?).await
}

async fn block_dirty_bitmap_remove(daemon: Rc<Daemon>, bitmap: BlockDirtyBitmap) -> Result<Empty> {
    change(&daemon, step(&daemon, bitmap, BitmapAction::Remove)?).await
}

async fn block_dirty_bitmap_clear(daemon: Rc<Daemon>, bitmap: BlockDirtyBitmap) -> Result<Empty> {
    change(&daemon, step(&daemon, bitmap, BitmapAction::Clear)?).await
}

async fn block_dirty_bitmap_enable(daemon: Rc<Daemon>, bitmap: BlockDirtyBitmap) -> Result<Empty> {
    change(&daemon, step(&daemon, bitmap, BitmapAction::Enable)?).await
}

async fn block_dirty_bitmap_disable(daemon: Rc<Daemon>, bitmap: BlockDirtyBitmap) -> Result<Empty> {
    change(&daemon, step(&daemon, bitmap, BitmapAction::Disable)?).await
}

async fn block_dirty_bitmap_merge(daemon: Rc<Daemon>, arguments: BlockDirtyBitmapMerge) -> Result<Empty> {
    change(&daemon, arguments.step(&daemon)?).await
}

async fn debug_block_dirty_bitmap_sha256(
    daemon: Rc<Daemon>,
    bitmap: BlockDirtyBitmap,
) -> Result<BlockDirtyBitmapSha256> {
    let found = daemon.graph.bitmap(node(&daemon, &bitmap.node)?, &bitmap.name).map_err(refused)?;
    let mut digest = Sha256::new();
    found.bits.all_words().for_each(|word| digest.update(word.to_le_bytes()));
    let sha256 = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(BlockDirtyBitmapSha256 { sha256 })
}

async fn change(daemon: &Daemon, step: Box<dyn Step>) -> Result<Empty> {
    daemon.graph.permit().transact(vec![step]).await.map_err(refused)?;
    Ok(Empty {})
}

impl BlockDirtyBitmapAdd {
    pub(super) fn step(self, daemon: &Daemon) -> Result<Box<dyn Step>> {
        let Self { node, name, granularity, persistent, disabled } = self;
        let found = daemon.graph.find(&node).ok_or_else(|| no_such_device(Some(&node), Some(&node)))?;
        let what = BitmapAction::Add { granularity, recording: !disabled, persistent };
        Ok(Box::new(BitmapChange { node: found, name, what }))
    }
}

impl BlockDirtyBitmapMerge {
    pub(super) fn step(self, daemon: &Daemon) -> Result<Box<dyn Step>> {
        let own = node(daemon, &self.node)?;
        let sources = self.bitmaps.into_iter().map(|source| match source {
            BlockDirtyBitmapOrStr::Local(name) => Ok((own, name)),
            BlockDirtyBitmapOrStr::External(bitmap) => Ok((node(daemon, &bitmap.node)?, bitmap.name)),
        });
        let what = BitmapAction::Merge(sources.collect::<Result<_>>()?);
        Ok(Box::new(BitmapChange { node: own, name: self.target, what }))
    }
}

/// A change of a bitmap that is there.
pub(super) fn step(daemon: &Daemon, bitmap: BlockDirtyBitmap, what: BitmapAction) -> Result<Box<dyn Step>> {
    Ok(Box::new(BitmapChange { node: node(daemon, &bitmap.node)?, name: bitmap.name, what }))
}

fn node(daemon: &Daemon, name: &str) -> Result<NodeId> {
    daemon.graph.find(name).ok_or_else(|| Error::generic(format!("Node '{name}' not found")))
}
