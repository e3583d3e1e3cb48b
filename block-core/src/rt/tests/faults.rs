//! Faults strike where and how the plan says, on whatever thread works for the one that entered them; and nowhere else.
#![expect(unsafe_code, reason = "direct operations fail too")]

use super::ops::until;
use super::{Kind, on, on_every_engine};
use crate::rt::fault::{Fault, Faults, Plan, Site};
use crate::rt::{DirectOp, Engine, IoBuf, Local, Op, SharedFd, Source, blocking, run_control, system_call};
use std::cell::RefCell;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

on_every_engine! {
    the_nth_operation_fails_and_the_next_goes_well
    a_short_operation_moves_half
    a_direct_operation_fails_too
}

const EIO: Fault = Fault::Errno(libc::EIO);

fn file() -> SharedFd {
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    Arc::new(OwnedFd::from(file))
}

async fn read(local: &Local, engine: Engine, fd: &SharedFd) -> i32 {
    let buf = IoBuf::alloc(4096, 4096).unwrap();
    local.submit(engine, Op::Read { fd: fd.clone(), buf, offset: 0 }, None).await
}

fn the_nth_operation_fails_and_the_next_goes_well(kind: Kind) {
    let faults = Faults::default();
    let _entered = faults.enter();
    let thread = kind.thread();
    for engine in [Engine::Ring, Engine::Pool] {
        for (lasting, last) in [(false, 4096), (true, -libc::EIO)] {
            faults.arm(Plan { nth: 2, fault: EIO, lasting });
            on(&thread, move |local| async move {
                let fd = file();
                let two = [read(&local, engine, &fd).await, read(&local, engine, &fd).await];
                assert_eq!(two, [4096, -libc::EIO]);
                assert_eq!(read(&local, engine, &fd).await, last);
            });
            let struck = faults.disarm();
            assert_eq!(struck, vec![Site::Read; if lasting { 2 } else { 1 }]);
        }
    }
}

fn a_short_operation_moves_half(kind: Kind) {
    let faults = Faults::default();
    let _entered = faults.enter();
    let thread = kind.thread();
    faults.arm(Plan { nth: 1, fault: Fault::Short, lasting: false });
    on(&thread, |local| async move {
        let fd = file();
        let sync = Op::Sync { fd: fd.clone(), data_only: true };
        assert_eq!(local.submit(Engine::Ring, sync, None).await, 0, "a sync has no half");
        let buf = IoBuf::from_slice(&[7; 4096]).unwrap();
        let write = Op::Write { fd: fd.clone(), buf, offset: 4096, dsync: false };
        assert_eq!(local.submit(Engine::Ring, write, None).await, 2048);
        assert_eq!(rustix::fs::fstat(&*fd).unwrap().st_size, 4096 + 2048, "and that half is written");
    });
}

/// Keeps the answers.
#[derive(Default)]
struct Answers(RefCell<Vec<i32>>);

impl Source for Answers {
    fn kicked(&self, _: u32) {}
    fn run(&self) -> bool {
        false
    }
    fn complete(&self, _: u32, result: i32) {
        self.0.borrow_mut().push(result);
    }
    fn publish(&self) {}
    fn has_work(&self) -> bool {
        false
    }
    fn suppress(&self, _: bool) {}
}

fn a_direct_operation_fails_too(kind: Kind) {
    let faults = Faults::default();
    let _entered = faults.enter();
    let thread = kind.thread();
    faults.arm(Plan { nth: 2, fault: EIO, lasting: false });
    on(&thread, |local| async move {
        let answers = Rc::<Answers>::default();
        let id = local.add_source(answers.clone());
        let fd = file();
        let mut block = [1_u8; 8];
        let iovec = libc::iovec { iov_base: block.as_mut_ptr().cast(), iov_len: 8 };
        for number in 1..=3 {
            let fd = fd.as_raw_fd();
            let op = DirectOp {
                write: false,
                dsync: false,
                fd,
                iovecs: &raw const iovec,
                count: 1,
                len: 8,
                offset: 0,
                engine: Engine::Ring,
            };
            // SAFETY: file, list and block live until the completion has been seen below.
            unsafe { local.push_direct(id, 0, op) };
            until(&local, || answers.0.borrow().len() == number).await;
        }
        assert_eq!(*answers.0.borrow(), [8, -libc::EIO, 8]);
        local.remove_source(id);
    });
}

#[test]
fn helpers_fail_for_whom_they_work() {
    let faults = Faults::default();
    let call = || blocking(|| system_call(|| Ok::<_, std::io::Error>(1)));
    run_control(async |_| {
        let entered = faults.enter();
        faults.arm(Plan { nth: 1, fault: EIO, lasting: true });
        assert_eq!(call().await.unwrap_err().raw_os_error(), Some(libc::EIO));
        drop(entered);
        assert_eq!(call().await.unwrap(), 1, "nobody else is struck, the helper itself neither");
        assert_eq!(faults.disarm(), [Site::Call]);
    });
}
