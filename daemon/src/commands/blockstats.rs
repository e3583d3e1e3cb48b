//! What went through each node.

use std::collections::HashMap;
use std::rc::Rc;
use std::vec;

use block_core::graph::{NodeId, OpKind, Totals};
use qmp::schema::Value;
use qmp::{Qapi, Result};

use super::blockdev::{file_below, signed};
use super::{Listing, Table};
use crate::daemon::Daemon;

pub(super) fn register(table: &mut Table) {
    table.add_list("query-blockstats", "Counters of nodes and exports since they were made.", query_blockstats);
}

/// The arguments of `query-blockstats`.
#[derive(Clone, Debug, Qapi)]
struct QueryBlockStatsArguments {
    /// Show nodes. Without it there is nothing to show, since there are no named devices here.
    #[qapi(default = false)]
    query_nodes: bool,
}

/// A node's counters, and those of what it lies on.
#[derive(Clone, Debug, Qapi)]
struct BlockStats {
    /// The node.
    node_name: Option<String>,
    /// What went through it.
    stats: BlockDeviceStats,
    /// What only this driver counts.
    driver_specific: Option<Value>,
    /// What it lies on.
    parent: Option<Box<BlockStats>>,
}

/// Counters since the node was added.
#[derive(Clone, Debug, Qapi)]
struct BlockDeviceStats {
    /// Bytes read.
    #[qapi(rename = "rd_bytes")]
    rd_bytes: i64,
    /// Bytes written.
    #[qapi(rename = "wr_bytes")]
    wr_bytes: i64,
    /// Bytes discarded.
    #[qapi(rename = "unmap_bytes")]
    unmap_bytes: i64,
    /// Always 0: there are no zoned devices here.
    #[qapi(rename = "zone_append_bytes")]
    zone_append_bytes: i64,
    /// Reads that went well.
    #[qapi(rename = "rd_operations")]
    rd_operations: i64,
    /// Writes that went well.
    #[qapi(rename = "wr_operations")]
    wr_operations: i64,
    /// Always 0.
    #[qapi(rename = "zone_append_operations")]
    zone_append_operations: i64,
    /// Flushes that went well.
    #[qapi(rename = "flush_operations")]
    flush_operations: i64,
    /// Discards that went well.
    #[qapi(rename = "unmap_operations")]
    unmap_operations: i64,
    /// Nanoseconds spent reading, added up.
    #[qapi(rename = "rd_total_time_ns")]
    rd_total_time_ns: i64,
    /// Nanoseconds spent writing.
    #[qapi(rename = "wr_total_time_ns")]
    wr_total_time_ns: i64,
    /// Always 0.
    #[qapi(rename = "zone_append_total_time_ns")]
    zone_append_total_time_ns: i64,
    /// Nanoseconds spent flushing.
    #[qapi(rename = "flush_total_time_ns")]
    flush_total_time_ns: i64,
    /// Nanoseconds spent discarding.
    #[qapi(rename = "unmap_total_time_ns")]
    unmap_total_time_ns: i64,
    /// One past the last byte ever written.
    #[qapi(rename = "wr_highest_offset")]
    wr_highest_offset: i64,
    /// Always 0: requests are not merged here.
    #[qapi(rename = "rd_merged")]
    rd_merged: i64,
    /// Always 0.
    #[qapi(rename = "wr_merged")]
    wr_merged: i64,
    /// Always 0.
    #[qapi(rename = "zone_append_merged")]
    zone_append_merged: i64,
    /// Always 0.
    #[qapi(rename = "unmap_merged")]
    unmap_merged: i64,
    /// Reads that failed.
    #[qapi(rename = "failed_rd_operations")]
    failed_rd_operations: i64,
    /// Writes that failed.
    #[qapi(rename = "failed_wr_operations")]
    failed_wr_operations: i64,
    /// Always 0.
    #[qapi(rename = "failed_zone_append_operations")]
    failed_zone_append_operations: i64,
    /// Flushes that failed.
    #[qapi(rename = "failed_flush_operations")]
    failed_flush_operations: i64,
    /// Discards that failed.
    #[qapi(rename = "failed_unmap_operations")]
    failed_unmap_operations: i64,
    /// Reads that made no sense.
    #[qapi(rename = "invalid_rd_operations")]
    invalid_rd_operations: i64,
    /// Writes that made no sense.
    #[qapi(rename = "invalid_wr_operations")]
    invalid_wr_operations: i64,
    /// Always 0.
    #[qapi(rename = "invalid_zone_append_operations")]
    invalid_zone_append_operations: i64,
    /// Flushes that made no sense.
    #[qapi(rename = "invalid_flush_operations")]
    invalid_flush_operations: i64,
    /// Discards that made no sense.
    #[qapi(rename = "invalid_unmap_operations")]
    invalid_unmap_operations: i64,
    /// Whether requests that made no sense are counted: they are.
    #[qapi(rename = "account_invalid")]
    account_invalid: bool,
    /// Whether requests that failed are counted: they are.
    #[qapi(rename = "account_failed")]
    account_failed: bool,
    /// Always empty: no intervals are configured.
    #[qapi(rename = "timed_stats")]
    timed_stats: Vec<Value>,
}

async fn query_blockstats(daemon: Rc<Daemon>, arguments: QueryBlockStatsArguments) -> Result<StatsRows> {
    let nodes = if arguments.query_nodes { daemon.graph.node_ids() } else { Vec::new() };
    Ok(StatsRows { daemon, nodes: nodes.into_iter(), asked: HashMap::new() })
}

/// The nodes, in the order in which they were added.
struct StatsRows {
    daemon: Rc<Daemon>,
    nodes: vec::IntoIter<NodeId>,
    /// Those that were asked, however many stand on them: without what they lie on, and where that is.
    asked: HashMap<NodeId, Option<(BlockStats, Option<NodeId>)>>,
}

impl Listing for StatsRows {
    type Row = BlockStats;

    async fn next(&mut self) -> Option<BlockStats> {
        loop {
            // A node that goes away meanwhile is none to report.
            let node = self.nodes.next()?;
            if let Some(row) = self.chain(node).await {
                return Some(row);
            }
        }
    }
}

impl StatsRows {
    /// A node's counters with those of what it lies on, down to where nothing is below.
    async fn chain(&mut self, top: NodeId) -> Option<BlockStats> {
        let (mut chain, mut next) = (Vec::new(), Some(top));
        while let Some(node) = next.take_if(|_| chain.len() < MAX_CHAIN)
            && let Some((own, below)) = self.ask(node).await
        {
            chain.push(own);
            next = below;
        }
        let lowest = chain.pop()?;
        Some(chain.into_iter().rev().fold(lowest, |below, own| BlockStats { parent: Some(Box::new(below)), ..own }))
    }

    async fn ask(&mut self, id: NodeId) -> Option<(BlockStats, Option<NodeId>)> {
        if let Some(known) = self.asked.get(&id) {
            return known.clone();
        }
        let own = self.stats_of(id).await;
        self.asked.insert(id, own.clone());
        own
    }

    async fn stats_of(&self, id: NodeId) -> Option<(BlockStats, Option<NodeId>)> {
        let graph = &self.daemon.graph;
        let node = graph.node(id)?;
        let driver_specific = graph.info(id).await.and_then(|info| info.statistics);
        let below = node.filtered.or_else(|| file_below(&node));
        let stats = BlockDeviceStats::of(&node.totals);
        Some((BlockStats { node_name: Some(node.name), stats, driver_specific, parent: None }, below))
    }
}

impl BlockDeviceStats {
    fn of(totals: &Totals) -> Self {
        let [read, write, flush, unmap] = OpKind::ALL.map(|kind| totals.ops[kind as usize]);
        Self {
            rd_bytes: signed(read.bytes),
            wr_bytes: signed(write.bytes),
            unmap_bytes: signed(unmap.bytes),
            zone_append_bytes: 0,
            rd_operations: signed(read.ops),
            wr_operations: signed(write.ops),
            zone_append_operations: 0,
            flush_operations: signed(flush.ops),
            unmap_operations: signed(unmap.ops),
            rd_total_time_ns: signed(read.nanos),
            wr_total_time_ns: signed(write.nanos),
            zone_append_total_time_ns: 0,
            flush_total_time_ns: signed(flush.nanos),
            unmap_total_time_ns: signed(unmap.nanos),
            wr_highest_offset: signed(totals.highest_write),
            rd_merged: 0,
            wr_merged: 0,
            zone_append_merged: 0,
            unmap_merged: 0,
            failed_rd_operations: signed(read.failed),
            failed_wr_operations: signed(write.failed),
            failed_zone_append_operations: 0,
            failed_flush_operations: signed(flush.failed),
            failed_unmap_operations: signed(unmap.failed),
            invalid_rd_operations: signed(read.invalid),
            invalid_wr_operations: signed(write.invalid),
            invalid_zone_append_operations: 0,
            invalid_flush_operations: signed(flush.invalid),
            invalid_unmap_operations: signed(unmap.invalid),
            account_invalid: true,
            account_failed: true,
            timed_stats: vec![],
        }
    }
}

/// How deep an answer nests at most; what lies deeper has an entry of its own all the same.
const MAX_CHAIN: usize = 64;
