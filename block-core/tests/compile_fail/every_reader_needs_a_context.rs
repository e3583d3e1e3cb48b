//! E0061: None of the operations that requests run under the reader's side of the lock can be called without a context.
#![allow(dead_code, unused_imports, clippy::all)]

use block_core::base::ByteRange;
use block_core::graph::{DebugEvent, DirectRequest, Driver, Findings, IoCx, Preallocation, Repair, SnapshotChange, WriteFlags};
use block_core::rt::IoBuf;

async fn all<D: Driver>(d: &D, conf: &D::Conf, _cx: IoCx<'_>, at: ByteRange, buf: IoBuf, direct: DirectRequest, snapshot: &SnapshotChange) {
    let flags = WriteFlags::default();
    let _ = d.direct(conf, direct);
    let _ = d.settle(conf, direct, 0);
    let _ = d.read(conf, at, buf.clone()).await;
    let _ = d.write(conf, at, buf.clone(), flags).await;
    let _ = d.write_zeroes(conf, at, flags).await;
    let _ = d.discard(conf, at).await;
    let _ = d.flush(conf).await;
    let _ = d.map(conf, at).await;
    let _ = d.read_snapshot(conf, at, buf).await;
    let _ = d.map_snapshot(conf, at).await;
    let _ = d.discard_snapshot(conf, at).await;
    let _ = d.truncate(conf, 0, Preallocation::Off).await;
    let _ = d.change_snapshots(conf, snapshot).await;
    let _ = d.change_backing_file(conf, None).await;
    let _ = d.make_empty(conf).await;
    let _ = d.set_end(conf, 0, Preallocation::Off).await;
    let _ = d.finish(conf).await;
    let _ = d.end_growth(conf).await;
    let _ = d.check(conf, Repair::All, &mut Findings::default()).await;
    let _ = d.keep_bitmaps(conf, &[]).await;
    let _ = d.store_bitmaps(conf, &[]).await;
    let _ = d.hear(conf, DebugEvent::None);
}

fn main() {}
