//! The twin of `every_reader_needs_a_context.rs` that compiles.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::base::ByteRange;
use block_core::graph::{DebugEvent, DirectRequest, Driver, Findings, IoCx, Preallocation, Repair, SnapshotChange, WriteFlags};
use block_core::rt::IoBuf;

async fn all<D: Driver>(d: &D, conf: &D::Conf, cx: IoCx<'_>, at: ByteRange, buf: IoBuf, direct: DirectRequest, snapshot: &SnapshotChange) {
    let flags = WriteFlags::default();
    let _ = d.direct(conf, cx, direct);
    let _ = d.settle(conf, cx, direct, 0);
    let _ = d.read(conf, cx, at, buf.clone()).await;
    let _ = d.write(conf, cx, at, buf.clone(), flags).await;
    let _ = d.write_zeroes(conf, cx, at, flags).await;
    let _ = d.discard(conf, cx, at).await;
    let _ = d.flush(conf, cx).await;
    let _ = d.map(conf, cx, at).await;
    let _ = d.read_snapshot(conf, cx, at, buf).await;
    let _ = d.map_snapshot(conf, cx, at).await;
    let _ = d.discard_snapshot(conf, cx, at).await;
    let _ = d.truncate(conf, cx, 0, Preallocation::Off).await;
    let _ = d.change_snapshots(conf, cx, snapshot).await;
    let _ = d.change_backing_file(conf, cx, None).await;
    let _ = d.make_empty(conf, cx).await;
    let _ = d.check(conf, cx, Repair::All, &mut Findings::default()).await;
    let _ = d.keep_bitmaps(conf, cx, &[]).await;
    let _ = d.store_bitmaps(conf, cx, &[]).await;
    let _ = d.hear(conf, cx, DebugEvent::None);
}

fn main() {}
