//! Requests that do not look as a node wants them, on their way through several nodes.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

mod support;

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use block_core::base::{ByteRange, IoError};
use block_core::catalog::{self, BlockdevOptions, DriverOptions};
use block_core::graph::{
    DirectRequest, Graph, NewNode, NodeId, NodeOptions, OpKind, Passage, Passed, PermSet, Perms, Settled, WriteFlags,
};
use block_core::port::{Port, PortLane, PortOptions};
use block_core::rt::{IoBuf, Local, run_control};
use serde_json::{Value, json};
use support::{Mem, Seen, add, graph, park};

/// One who may write to an incomplete last block.
fn writer() -> Perms {
    Perms { uses: PermSet::WRITE | PermSet::RESIZE, shares: PermSet::ALL }
}

fn range(start: u64, len: u64) -> ByteRange {
    ByteRange::new(start, len).unwrap()
}

/// A user's way to a node, which may write the incomplete block at its end. The port lives as long as the graph.
async fn lane(graph: &Rc<Graph>, node: NodeId) -> Rc<PortLane> {
    lane_with(graph, node, writer()).await
}

async fn lane_with(graph: &Rc<Graph>, node: NodeId, perms: Perms) -> Rc<PortLane> {
    let options = PortOptions { name: "test port".into(), perms };
    let port = Port::attach(&mut graph.permit(), node, options, Rc::new(|_| ())).await.unwrap();
    port.handle().lane(&Local::current())
}

async fn write(lane: &PortLane, at: u64, bytes: &[u8]) -> Result<(), IoError> {
    let pin = lane.try_enter().unwrap();
    let buf = IoBuf::from_slice(bytes).unwrap();
    lane.write(&pin, range(at, buf.len()), buf, WriteFlags::default()).await
}

async fn read(lane: &PortLane, at: u64, len: usize) -> Result<Vec<u8>, IoError> {
    let pin = lane.try_enter().unwrap();
    let buf = IoBuf::alloc(len, 1).unwrap();
    lane.read(&pin, range(at, buf.len()), buf.clone()).await?;
    Ok(buf.to_vec())
}

/// A node with blocks of 4 KiB. Its last block reaches past its end, where its driver has room.
fn blocks(size: usize, seen: &Arc<Seen>, take: u64) -> NewNode {
    let room = vec![1; size.next_multiple_of(4096)];
    NewNode::new("blocks".into(), NodeOptions::default(), |_| {
        (Mem::aligned(room, seen, 4096).taking(take), u64::try_from(size).unwrap())
    })
}

async fn catalogued(graph: &Rc<Graph>, options: Value) -> NodeId {
    let options: BlockdevOptions = qmp::schema::from_value(options).unwrap();
    catalog::add(&mut graph.permit(), options).await.unwrap()
}

/// `cache.direct` on a disk of 4 KiB blocks, and an image whose size is no multiple of that.
#[test]
fn the_incomplete_last_block_is_reached_through_other_nodes() {
    run_control(|_| async {
        let graph = graph();
        let below = add(&graph, blocks(8192 + 512, &Arc::default(), 1 << 20)).await;
        let filter = add(&graph, park("filter", below, &Arc::default(), false)).await;
        let raw = catalogued(&graph, json!({"driver": "raw", "node-name": "raw", "file": "filter"})).await;
        for node in [below, filter, raw] {
            let lane = lane(&graph, node).await;
            assert_eq!(read(&lane, 8192, 512).await, Ok(vec![1; 512]));
            write(&lane, 8192 + 100, &[2; 412]).await.unwrap();
            assert_eq!(read(&lane, 8192 + 99, 2).await, Ok(vec![1, 2]));
            assert_eq!(read(&lane, 8192, 513).await, Err(IoError::OutOfRange));
            write(&lane, 8192, &[1; 512]).await.unwrap();
        }
    });
}

/// Only the node with the blocks sees all writes that meet in one of them.
#[test]
fn writes_that_meet_in_a_block_by_different_ways_are_kept_apart() {
    run_control(|_| async {
        let graph = graph();
        let below = add(&graph, blocks(8192, &Arc::default(), 1 << 20)).await;
        let left = add(&graph, park("left", below, &Arc::default(), false)).await;
        let right = catalogued(&graph, json!({"driver": "raw", "node-name": "right", "file": "blocks"})).await;
        let (left, right, look) = (lane(&graph, left).await, lane(&graph, right).await, lane(&graph, below).await);
        let other = right.clone();
        let (done, over) = block_core::rt::sync::oneshot();
        Local::current().spawn(async move {
            write(&other, 512, &[3; 512]).await.unwrap();
            let _ = done.send(());
        });
        write(&left, 0, &[2; 512]).await.unwrap();
        over.await.unwrap();
        let block = read(&look, 0, 4096).await.unwrap();
        assert_eq!((&block[..512], &block[512..1024], &block[1024..]), (&[2; 512][..], &[3; 512][..], &[1; 3072][..]));
    });
}

#[test]
fn a_large_request_beside_the_blocks_is_taken_in_pieces() {
    run_control(|_| async {
        let graph = graph();
        let seen = Arc::<Seen>::default();
        let node = add(&graph, blocks(4 << 20, &seen, 1 << 30)).await;
        let lane = lane(&graph, node).await;
        write(&lane, 512, &vec![2; 3 << 20]).await.unwrap();
        let all = read(&lane, 100, (4 << 20) - 200).await.unwrap();
        assert_eq!(all[..412], [1; 412]);
        assert!(all[412..412 + (3 << 20)].iter().all(|byte| *byte == 2));
        assert!(all[412 + (3 << 20)..].iter().all(|byte| *byte == 1));
        assert!(seen.largest.load(Ordering::Relaxed) <= 1 << 20, "more than that is never bounced at once");
    });
}

#[test]
fn a_request_beside_the_blocks_keeps_to_the_largest_transfer() {
    run_control(|_| async {
        let graph = graph();
        let node = add(&graph, blocks(65536, &Arc::default(), 8192)).await;
        let lane = lane(&graph, node).await;
        write(&lane, 512, &[2; 20000]).await.unwrap();
        assert_eq!(read(&lane, 0, 513).await.unwrap()[511..], [1, 2]);
        assert_eq!(read(&lane, 20511, 2).await.unwrap(), [2, 1]);
    });
}

/// What the direct path did is counted where it ended up.
#[test]
fn direct_requests_are_counted_in_each_nodes_own_terms() {
    run_control(|_| async {
        let graph = graph();
        let file = catalogued(&graph, json!({"driver": "null-co", "node-name": "file"})).await;
        let options = json!({"driver": "raw", "node-name": "raw", "file": "file", "offset": 1 << 20});
        let raw = catalogued(&graph, options).await;
        let lane = lane(&graph, raw).await;
        let pin = lane.try_enter().unwrap();
        let request = DirectRequest { write: true, at: range(4096, 512), fua: false, memory_bits: 0 };
        assert!(matches!(lane.direct(&pin, request), Some(Passed::Done)));
        let failed = lane.settle(&pin, request, -libc::EIO);
        drop(pin);
        let totals = |node| graph.node(node).unwrap().totals;
        assert_eq!(totals(raw).highest_write, 4096 + 512);
        assert_eq!(totals(file).highest_write, (1 << 20) + 4096 + 512);
        // Nothing fails on a disk of nothing: the request is sent again.
        assert_eq!(failed, Settled::Again);
        assert_eq!(totals(file).ops[OpKind::Write as usize].failed, 0);
    });
}

/// A raw node that nobody said is raw, over `file`.
async fn guessed(graph: &Rc<Graph>, name: &str, file: Value) -> Rc<PortLane> {
    let options = json!({"driver": "raw", "node-name": name, "file": file});
    let mut options: BlockdevOptions = qmp::schema::from_value(options).unwrap();
    let DriverOptions::Raw(raw) = &mut options.driver else { panic!("it is raw") };
    raw.own.is_guess = true;
    let node = catalog::add(&mut graph.permit(), options).await.unwrap();
    lane(graph, node).await
}

/// Whoever comes to the node, and by whatever way: its first bytes stay those of no format.
#[test]
fn a_guess_stays_one() {
    run_control(|_| async {
        let graph = graph();
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let disk = guessed(&graph, "disk", json!({"driver": "file", "filename": image.path()})).await;
        let qcow2 = b"QFI\xfb\0\0\0\x03";
        assert_eq!(write(&disk, 0, qcow2).await, Err(IoError::Os(libc::EPERM)));
        write(&disk, 0, &qcow2[..7]).await.unwrap();
        assert_eq!(write(&disk, 7, &qcow2[7..]).await, Err(IoError::Os(libc::EPERM)));
        write(&disk, 512, qcow2).await.unwrap();
        assert_eq!(read(&disk, 0, 8).await.unwrap(), b"QFI\xfb\0\0\0\0");
        // The direct path would write without looking.
        let nothing = guessed(&graph, "nothing", json!({"driver": "null-co"})).await;
        let pin = nothing.try_enter().unwrap();
        let is_direct = |write, at| {
            let request = DirectRequest { write, at: range(at, 512), fua: false, memory_bits: 0 };
            nothing.direct(&pin, request).is_some()
        };
        assert!(!is_direct(true, 0) && is_direct(true, 512) && is_direct(false, 0));
    });
}

#[test]
fn a_direct_request_that_fails_is_counted_by_all_that_it_passed() {
    run_control(|_| async {
        let graph = graph();
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(65536).unwrap();
        let path = image.path().to_str().unwrap();
        let below = json!({"driver": "file", "node-name": "file", "filename": path, "aio": "io_uring"});
        let file = catalogued(&graph, below).await;
        let raw = catalogued(&graph, json!({"driver": "raw", "node-name": "raw", "file": "file"})).await;
        let lane = lane(&graph, raw).await;
        let pin = lane.try_enter().unwrap();
        let request = DirectRequest { write: false, at: range(0, 512), fua: false, memory_bits: 0 };
        let passed = lane.direct(&pin, request).unwrap();
        assert!(matches!(passed, Passed::Ring(..)), "{passed:?}");
        assert_eq!(lane.settle(&pin, request, -libc::EIO), Settled::Failed(IoError::Os(libc::EIO)));
        assert_eq!(lane.settle(&pin, request, 100), Settled::Again);
        drop(pin);
        for node in [raw, file] {
            assert_eq!(graph.node(node).unwrap().totals.ops[OpKind::Read as usize].failed, 1);
        }
        assert_eq!(lane.failed(), 1);
    });
}

/// A file, and above it two nodes with blocks of 1 and 4 KiB, of which the lower one is seen through a window.
async fn two_block_sizes(graph: &Rc<Graph>, image: &tempfile::NamedTempFile) -> [NodeId; 2] {
    image.as_file().set_len(1 << 20).unwrap();
    let file = json!({"driver": "file", "filename": image.path().to_str().unwrap(), "aio": "io_uring"});
    let small = json!({"driver": "blkdebug", "node-name": "small", "align": 1024, "image": file});
    let small = catalogued(graph, small).await;
    let window = json!({"driver": "raw", "file": "small", "offset": 65536});
    let large = json!({"driver": "blkdebug", "node-name": "large", "align": 4096, "image": window});
    [small, catalogued(graph, large).await]
}

/// The same for a node that somebody sees through a window, who bears no other size.
async fn lane_beside_a_window(graph: &Rc<Graph>, node: NodeId) -> Rc<PortLane> {
    lane_with(graph, node, Perms { uses: PermSet::WRITE, shares: PermSet::ALL }).await
}

fn sent(lane: &PortLane, at: ByteRange, write: bool) -> Option<Passage> {
    let pin = lane.try_enter().unwrap();
    match lane.direct(&pin, DirectRequest { write, at, fua: false, memory_bits: 0 })? {
        Passed::Ring(_, passage) => Some(passage),
        other => panic!("no ring entry: {other:?}"),
    }
}

async fn is_over(done: &std::cell::Cell<bool>) -> bool {
    Local::current().sleep(std::time::Duration::from_millis(20)).await;
    done.get()
}

/// A write that is under way in the kernel has no future, and is waited for all the same; and none sets out while a
/// block is rewritten.
#[test]
fn a_ring_entry_and_a_rewrite_of_a_block_keep_each_other_out() {
    run_control(|_| async {
        let graph = graph();
        let image = tempfile::NamedTempFile::new().unwrap();
        let [small, large] = two_block_sizes(&graph, &image).await;
        let (small, large) = (lane_beside_a_window(&graph, small).await, lane(&graph, large).await);
        for rewriter in [&small, &large] {
            let (first, second) = (sent(&large, range(0, 4096), true).unwrap(), sent(&large, range(8192, 4096), true));
            let done = Rc::new(std::cell::Cell::new(false));
            Local::current().spawn({
                let (rewriter, done) = (rewriter.clone(), done.clone());
                async move {
                    write(&rewriter, 512, &[2; 512]).await.unwrap();
                    done.set(true);
                }
            });
            assert!(!is_over(&done).await);
            assert!(sent(&large, range(65536, 4096), true).is_none(), "it has to wait its turn");
            assert!(sent(&large, range(65536, 4096), false).is_some(), "reads are kept apart from nobody");
            drop(first);
            assert!(!is_over(&done).await);
            drop(second.unwrap());
            assert!(is_over(&done).await);
            assert!(sent(&large, range(65536, 4096), true).is_some());
            assert_eq!(read(rewriter, 511, 2).await.unwrap(), [0, 2]);
        }
    });
}

/// One of the nodes on the way is being rewritten: the other one is not left counted.
#[test]
fn a_ring_entry_that_is_refused_below_leaves_what_it_had_entered() {
    run_control(|_| async {
        let graph = graph();
        let image = tempfile::NamedTempFile::new().unwrap();
        let [small, large] = two_block_sizes(&graph, &image).await;
        let (small, large) = (lane_beside_a_window(&graph, small).await, lane(&graph, large).await);
        let under_way = sent(&small, range(0, 1024), true).unwrap();
        let done = Rc::new(std::cell::Cell::new(false));
        Local::current().spawn({
            let (large, done) = (large.clone(), done.clone());
            async move {
                // Whole blocks of the lower node, so only the upper one rewrites.
                write(&large, 1024, &[2; 1024]).await.unwrap();
                done.set(true);
            }
        });
        assert!(sent(&large, range(65536, 4096), true).is_some());
        assert!(is_over(&done).await, "what is under way below is nothing to it");
        drop(under_way);
        // Now the upper one refuses, which is asked after the lower one.
        let above = sent(&large, range(0, 4096), true).unwrap();
        done.set(false);
        Local::current().spawn({
            let (large, done) = (large.clone(), done.clone());
            async move {
                write(&large, 1024, &[3; 1024]).await.unwrap();
                done.set(true);
            }
        });
        assert!(!is_over(&done).await);
        assert!(sent(&large, range(65536, 4096), true).is_none());
        drop(above);
        assert!(is_over(&done).await);
        write(&small, 512, &[4; 512]).await.unwrap();
        assert_eq!(read(&small, 1023, 1).await.unwrap(), [4]);
    });
}
