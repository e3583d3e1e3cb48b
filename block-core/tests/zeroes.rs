//! Writing zeroes, rung by rung: the driver's own way that frees space, the driver's own without, and a buffer of zeroes.
//! Which of them a driver offers is switched here.
#![cfg(not(loom))]
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

#[path = "support/bench.rs"]
#[expect(dead_code, reason = "each test file uses a part")]
mod bench;

use std::rc::Rc;
use std::sync::{Arc, Mutex};

use bench::{attach, enter, range, writer};
use block_core::base::{ByteRange, IoError, Result};
use block_core::graph::{
    DiscardMode, Driver, DriverInfo, Extent, Geometry, Graph, IoCx, Limits, NewNode, NodeOptions, Place, Preallocation,
    ReopenRequest, WriteFlags,
};
use block_core::port::PortLane;
use block_core::rt::{IoBuf, Local, run_control};

const PLAIN: WriteFlags =
    WriteFlags { fua: false, may_unmap: false, no_fallback: false, compressed: false, unchanged: false };
const UNMAP: WriteFlags = WriteFlags { may_unmap: true, ..PLAIN };
const FAST: WriteFlags = WriteFlags { no_fallback: true, ..PLAIN };
const SIZE: u64 = 1 << 20;

/// What the driver was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Zeroes, with leave to free space or not.
    Unmap(ByteRange),
    Zero(ByteRange),
    /// A buffer of nothing but zeroes.
    Buffer(ByteRange),
    Flush,
}

/// Notes what it is asked for, and can do what it is told.
struct Ladder {
    can_unmap: bool,
    can_zero: bool,
    limits: Limits,
    steps: Arc<Mutex<Vec<Step>>>,
}

impl Ladder {
    fn note(&self, step: Step) {
        self.steps.lock().unwrap().push(step);
    }
}

impl Driver for Ladder {
    type Conf = u64;

    fn geometry(&self, size: &u64, _: &[Geometry]) -> Result<Geometry> {
        Ok(Geometry { size: *size, limits: self.limits })
    }

    async fn read(&self, _: &u64, _: IoCx<'_>, _: ByteRange, buf: IoBuf) -> Result<(), IoError> {
        buf.fill(0);
        Ok(())
    }

    async fn write(&self, _: &u64, _: IoCx<'_>, at: ByteRange, buf: IoBuf, _: WriteFlags) -> Result<(), IoError> {
        assert!(buf.to_vec().iter().all(|byte| *byte == 0), "something else than zeroes is written");
        self.note(Step::Buffer(at));
        Ok(())
    }

    async fn write_zeroes(&self, _: &u64, _: IoCx<'_>, at: ByteRange, flags: WriteFlags) -> Result<(), IoError> {
        self.note(if flags.may_unmap { Step::Unmap(at) } else { Step::Zero(at) });
        let can = if flags.may_unmap { self.can_unmap } else { self.can_zero };
        if can { Ok(()) } else { Err(IoError::Unsupported) }
    }

    async fn discard(&self, _: &u64, _: IoCx<'_>, _: ByteRange) -> Result<(), IoError> {
        Ok(())
    }

    async fn flush(&self, _: &u64, _: IoCx<'_>) -> Result<(), IoError> {
        self.note(Step::Flush);
        Ok(())
    }

    async fn map(&self, _: &u64, _: IoCx<'_>, at: ByteRange) -> Result<Extent, IoError> {
        Ok(Extent { len: at.len(), place: Place::Here })
    }

    async fn truncate(&self, _: &u64, _: IoCx<'_>, size: u64, _: Preallocation) -> Result<u64> {
        Ok(size)
    }

    async fn reopen(&self, size: &u64, _: ReopenRequest<'_>) -> Result<u64> {
        Ok(*size)
    }

    async fn info(&self, _: &u64) -> DriverInfo {
        DriverInfo { driver: "ladder", ..DriverInfo::default() }
    }
}

/// A driver that can do what it is told, under an option that lets space be freed or not.
struct Scene {
    lane: Rc<PortLane>,
    steps: Arc<Mutex<Vec<Step>>>,
    _graph: Rc<Graph>,
}

impl Scene {
    async fn new(can_unmap: bool, can_zero: bool, discard: DiscardMode, limits: Limits) -> Self {
        let (graph, steps) = (Graph::new(Arc::new(|_| ())), Arc::<Mutex<Vec<Step>>>::default());
        let driver = Ladder { can_unmap, can_zero, limits, steps: steps.clone() };
        let options = NodeOptions { discard, ..NodeOptions::default() };
        let node = NewNode::new("n".into(), options, |_| (driver, SIZE));
        let node = graph.permit().add(node).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        Self { lane: port.handle().lane(&Local::current()), steps, _graph: graph }
    }

    /// How a write of zeroes ends, and what the driver was asked for.
    async fn zeroes(&self, at: ByteRange, flags: WriteFlags) -> (Result<(), IoError>, Vec<Step>) {
        let result = self.lane.write_zeroes(&enter(&self.lane).await, at, flags).await;
        (result, std::mem::take(&mut self.steps.lock().unwrap()))
    }
}

#[test]
fn every_rung_is_tried_until_one_holds() {
    let at = range(4096, 8192);
    let (unmap, zero, buffer) = (Step::Unmap(at), Step::Zero(at), Step::Buffer(at));
    let unsupported = Err(IoError::Unsupported);
    run_control(async |_| {
        // What the driver can do; what is asked for; what happens.
        for ((can_unmap, can_zero), flags, ended, steps) in [
            ((true, true), UNMAP, Ok(()), vec![unmap]),
            ((false, true), UNMAP, Ok(()), vec![unmap, zero]),
            ((false, false), UNMAP, Ok(()), vec![unmap, zero, buffer]),
            ((true, true), PLAIN, Ok(()), vec![zero]),
            ((true, false), PLAIN, Ok(()), vec![zero, buffer]),
            ((true, true), FAST, Ok(()), vec![zero]),
            ((true, false), FAST, unsupported, vec![zero]),
            ((true, false), WriteFlags { may_unmap: true, ..FAST }, Ok(()), vec![unmap]),
            ((false, false), WriteFlags { may_unmap: true, ..FAST }, unsupported, vec![unmap, zero]),
            ((false, false), WriteFlags { fua: true, ..UNMAP }, Ok(()), vec![unmap, zero, buffer, Step::Flush]),
        ] {
            let scene = Scene::new(can_unmap, can_zero, DiscardMode::Unmap, Limits::ANY).await;
            let what = format!("unmap {can_unmap}, zero {can_zero}, {flags:?}");
            assert_eq!(scene.zeroes(at, flags).await, (ended, steps), "{what}");
        }
    });
}

/// The first rung is left out where the operator has not allowed that space is freed.
#[test]
fn space_is_kept_where_discards_are_ignored() {
    run_control(async |_| {
        let scene = Scene::new(true, true, DiscardMode::Ignore, Limits::ANY).await;
        assert_eq!(scene.zeroes(range(0, 4096), UNMAP).await, (Ok(()), vec![Step::Zero(range(0, 4096))]));
    });
}

/// What is no whole unit of the driver's is written from a buffer, unless that is just what was not wanted.
#[test]
fn ragged_ends_are_on_the_last_rung_from_the_beginning() {
    let limits = Limits { request_alignment: 512, write_zeroes_alignment: 4096, ..Limits::ANY };
    run_control(async |_| {
        let scene = Scene::new(true, true, DiscardMode::Unmap, limits).await;
        let (head, whole, tail) = (range(3584, 512), range(4096, 8192), range(12288, 1024));
        let all = range(3584, 512 + 8192 + 1024);
        let steps = vec![Step::Buffer(head), Step::Unmap(whole), Step::Buffer(tail)];
        assert_eq!(scene.zeroes(all, UNMAP).await, (Ok(()), steps));
        assert_eq!(scene.zeroes(all, FAST).await, (Err(IoError::Unsupported), vec![]), "before anything is written");
        assert_eq!(scene.zeroes(whole, FAST).await, (Ok(()), vec![Step::Zero(whole)]));
    });
}

/// Each piece finds its own rung; a piece is no larger than what the driver takes.
#[test]
fn large_requests_come_in_pieces() {
    let limits = Limits { max_write_zeroes: 8192, max_transfer: 4096, ..Limits::ANY };
    run_control(async |_| {
        let scene = Scene::new(false, false, DiscardMode::Unmap, limits).await;
        let (one, two) = (range(0, 8192), range(8192, 4096));
        let pieces = |at: ByteRange| at.pieces(4096).map(Step::Buffer).collect::<Vec<_>>();
        let steps = [vec![Step::Zero(one)], pieces(one), vec![Step::Zero(two)], pieces(two)].concat();
        assert_eq!(scene.zeroes(range(0, 12288), PLAIN).await, (Ok(()), steps));
    });
}
