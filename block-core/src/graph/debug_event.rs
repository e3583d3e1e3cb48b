//! What happens inside nodes while they serve requests, as tests can hear it (QEMU: `BlkdebugEvent`).
//!
//! Two kinds. What the *pipeline* does for a node (read-modify-write, the write itself) is said to that node. What a
//! *format* does with its image (reads data, loads a table) is said to its file, and filters hand it down. Who hears it
//! is blkdebug; where it is not in a node's way, its limits say that nobody listens, and nothing is said.

use std::future::Future;
use std::pin::Pin;

use qmp::Qapi;

/// What a request waits for before it goes on, because somebody heard an event and wants it to.
pub type Pause = Pin<Box<dyn Future<Output = ()>>>;

macro_rules! events {
    ($($name:literal $event:ident, $doc:literal;)*) => {
        /// Something that happens inside a node.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Qapi)]
        #[qapi(name = "BlkdebugEvent")]
        pub enum DebugEvent {
            $(#[doc = $doc] #[qapi(rename = $name)] $event,)*
        }
    };
}

events! {
    "l1_update" L1Update, "An entry of the L1 table is going to be written.";
    "l1_grow_alloc_table" L1GrowAllocTable, "Room for a larger L1 table is going to be allocated.";
    "l1_grow_write_table" L1GrowWriteTable, "A larger L1 table is going to be written.";
    "l1_grow_activate_table" L1GrowActivateTable, "The header is going to name the larger L1 table.";
    "l2_load" L2Load, "An L2 table is going to be read.";
    "l2_update" L2Update, "Entries of an L2 table are going to be changed.";
    "l2_update_compressed" L2UpdateCompressed, "The L2 entry of a compressed cluster is going to be changed.";
    "l2_alloc_cow_read" L2AllocCowRead, "A shared L2 table is going to be read, to be copied.";
    "l2_alloc_write" L2AllocWrite, "A new L2 table is going to be written.";
    "read_aio" ReadAio, "Guest data is going to be read from the image.";
    "read_backing_aio" ReadBackingAio, "Guest data is going to be read from what the image stands on.";
    "read_compressed" ReadCompressed, "A compressed cluster is going to be read.";
    "write_aio" WriteAio, "Guest data is going to be written to the image.";
    "write_compressed" WriteCompressed, "A compressed cluster is going to be written.";
    "vmstate_load" VmstateLoad, "The state of a machine is going to be read.";
    "vmstate_save" VmstateSave, "The state of a machine is going to be written.";
    "cow_read" CowRead, "The rest of a cluster is going to be read, to be copied.";
    "cow_write" CowWrite, "The rest of a cluster is going to be written.";
    "reftable_load" ReftableLoad, "The refcount table is going to be read.";
    "reftable_grow" ReftableGrow, "The refcount table is going to grow.";
    "reftable_update" ReftableUpdate, "An entry of the refcount table is going to be written.";
    "refblock_load" RefblockLoad, "A refcount block is going to be read.";
    "refblock_update" RefblockUpdate, "A refcount block is going to be written.";
    "refblock_update_part" RefblockUpdatePart, "Part of a refcount block is going to be written.";
    "refblock_alloc" RefblockAlloc, "A refcount block is going to be allocated.";
    "refblock_alloc_hookup" RefblockAllocHookup, "The refcount table is going to name a new refcount block.";
    "refblock_alloc_write" RefblockAllocWrite, "A new refcount block is going to be written.";
    "refblock_alloc_write_blocks" RefblockAllocWriteBlocks, "The blocks of a larger refcount table are going to be written.";
    "refblock_alloc_write_table" RefblockAllocWriteTable, "A larger refcount table is going to be written.";
    "refblock_alloc_switch_table" RefblockAllocSwitchTable, "The header is going to name the larger refcount table.";
    "cluster_alloc" ClusterAlloc, "Clusters are going to be allocated.";
    "cluster_alloc_bytes" ClusterAllocBytes, "Part of a cluster is going to be allocated.";
    "cluster_free" ClusterFree, "Clusters are going to be freed.";
    "flush_to_os" FlushToOs, "A format's caches are going to be written to its file.";
    "flush_to_disk" FlushToDisk, "A format's file is going to be made stable.";
    "pwritev_rmw_head" PwritevRmwHead, "The block that a write begins in the middle of is going to be read.";
    "pwritev_rmw_after_head" PwritevRmwAfterHead, "The block that a write begins in the middle of has been read.";
    "pwritev_rmw_tail" PwritevRmwTail, "The block that a write ends in the middle of is going to be read.";
    "pwritev_rmw_after_tail" PwritevRmwAfterTail, "The block that a write ends in the middle of has been read.";
    "pwritev" Pwritev, "Data is going to be written.";
    "pwritev_zero" PwritevZero, "Zeroes are going to be written, without a buffer.";
    "pwritev_done" PwritevDone, "A write is over, whether it failed or not.";
    "empty_image_prepare" EmptyImagePrepare, "An image is going to be made empty.";
    "l1_shrink_write_table" L1ShrinkWriteTable, "The end of the L1 table is going to be overwritten.";
    "l1_shrink_free_l2_clusters" L1ShrinkFreeL2Clusters, "L2 tables beyond the new end are going to be freed.";
    "cor_write" CorWrite, "Copy-on-read is going to write what was read.";
    "cluster_alloc_space" ClusterAllocSpace, "Clusters that were not written are going to be given their space.";
    "none" None, "Never happens again once the node is open.";
}

impl DebugEvent {
    /// The pipeline says it to the node that it works for, and to no other.
    pub fn is_about_one_node(self) -> bool {
        use DebugEvent::{
            Pwritev, PwritevDone, PwritevRmwAfterHead, PwritevRmwAfterTail, PwritevRmwHead, PwritevRmwTail, PwritevZero,
        };
        let rmw = matches!(self, PwritevRmwHead | PwritevRmwAfterHead | PwritevRmwTail | PwritevRmwAfterTail);
        rmw || matches!(self, Pwritev | PwritevZero | PwritevDone)
    }
}
