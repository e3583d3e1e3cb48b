//! Operations, timers and descriptors.
#![expect(unsafe_code, reason = "a test looks at a buffer's memory behind its back")]

use super::{Kind, on, on_every_engine};
use crate::rt::sync::{oneshot, together};
use crate::rt::{Counted, Elsewhere, Engine, Hold, IoBuf, Local, Op, SharedFd, eventfd, run_control, within};
use std::cell::Cell;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

on_every_engine! {
    bytes_go_there_and_back
    errors_are_the_kernels
    a_dropped_future_keeps_its_buffer_and_its_hold
    a_list_longer_than_the_kernel_takes_is_a_short_count
    many_operations_at_once
    sleeps_end_in_order
    a_dropped_sleep_is_cancelled
    descriptors_become_ready
    one_descriptor_may_be_watched_twice
    a_regular_file_is_always_ready
}

fn file() -> SharedFd {
    Arc::new(OwnedFd::from(tempfile::tempfile().unwrap()))
}

fn pipe() -> (SharedFd, File) {
    let (reader, writer) = std::io::pipe().unwrap();
    (Arc::new(reader.into()), OwnedFd::from(writer).into())
}

fn read(fd: &SharedFd, buf: &IoBuf, offset: u64) -> Op {
    Op::Read { fd: fd.clone(), buf: buf.clone(), offset }
}

fn write(fd: &SharedFd, buf: &IoBuf, offset: u64, dsync: bool) -> Op {
    Op::Write { fd: fd.clone(), buf: buf.clone(), offset, dsync }
}

fn bytes_go_there_and_back(kind: Kind) {
    on(&kind.thread(), |local| async move {
        for engine in [Engine::Ring, Engine::Pool] {
            there_and_back(&local, engine).await;
        }
    });
}

async fn there_and_back(local: &Local, engine: Engine) {
    let fd = file();
    let bytes: Vec<u8> = (0..=255).cycle().take(10_000).collect();
    let whole = IoBuf::from_slice(&bytes).unwrap();
    let parts = IoBuf::concat(&[whole.slice(0, 1), whole.slice(1, 4999), whole.slice(5000, 5000)]);
    assert_eq!(local.submit(engine, write(&fd, &parts, 100, true), None).await, 10_000);
    assert_eq!(local.submit(engine, Op::Sync { fd: fd.clone(), data_only: true }, None).await, 0);
    assert_eq!(local.submit(engine, Op::Sync { fd: fd.clone(), data_only: false }, None).await, 0);

    let back = IoBuf::alloc(12_000, 512).unwrap();
    assert_eq!(local.submit(engine, read(&fd, &back, 100), None).await, 10_000, "a short count at the end");
    assert_eq!(back.slice(0, 10_000).to_vec(), bytes);
    assert!(back.slice(10_000, 2000).is_zero());

    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let hole = Op::Fallocate { fd: fd.clone(), mode: punch, offset: 0, len: 4096 };
    assert_eq!(local.submit(engine, hole, None).await, 0);
    assert_eq!(local.submit(engine, read(&fd, &back, 0), None).await, 10_100);
    assert!(back.slice(0, 4096).is_zero() && !back.slice(4096, 100).is_zero());
}

fn errors_are_the_kernels(kind: Kind) {
    on(&kind.thread(), |local| async move {
        let read_only: SharedFd = Arc::new(File::open("/dev/null").unwrap().into());
        let buf = IoBuf::alloc(512, 512).unwrap();
        for engine in [Engine::Ring, Engine::Pool] {
            assert_eq!(local.submit(engine, write(&read_only, &buf, 0, false), None).await, -libc::EBADF);
            let zero = Op::Fallocate { fd: file(), mode: 0, offset: 0, len: 0 };
            assert_eq!(local.submit(engine, zero, None).await, -libc::EINVAL);
        }
    });
}

struct Count(Cell<i32>);

impl Counted for Count {
    fn up(&self) {
        self.0.set(self.0.get() + 1);
    }

    fn down(&self) {
        self.0.set(self.0.get() - 1);
    }
}

fn a_dropped_future_keeps_its_buffer_and_its_hold(kind: Kind) {
    let thread = kind.thread();
    for engine in [Engine::Ring, Engine::Pool] {
        on(&thread, move |local| async move {
            let (reader, mut writer) = pipe();
            let (count, buf) = (Rc::new(Count(Cell::new(0))), IoBuf::alloc(8, 8).unwrap());
            let watched = Rc::new(());
            // SAFETY: `buf` is kept below until the end of the test, longer than its owner here.
            let shared = unsafe { IoBuf::from_segments(buf.segments().iter().copied(), watched.clone()) };
            let hold = Hold::new(count.clone());
            drop(local.submit(engine, Op::Read { fd: reader, buf: shared, offset: u64::MAX }, Some(hold)));
            local.sleep(Duration::from_millis(20)).await;
            assert_eq!(count.0.get(), 1, "still in the kernel");
            assert_eq!(Rc::strong_count(&watched), 2, "the buffer is kept");
            writer.write_all(b"01234567").unwrap();
            until(&local, || count.0.get() == 0).await;
            assert_eq!(Rc::strong_count(&watched), 1, "and given back");
            assert_eq!(buf.to_vec(), b"01234567", "the kernel wrote where it was told to");
        });
    }
    let (sender, receiver) = channel();
    let (reader, mut writer) = pipe();
    thread.remote().spawn(move |local| async move {
        let buf = IoBuf::alloc(1, 1).unwrap();
        drop(local.submit(Engine::Ring, Op::Read { fd: reader, buf, offset: u64::MAX }, None));
        sender.send(()).unwrap();
    });
    receiver.recv().unwrap();
    let ending = std::thread::Builder::new().spawn(move || drop(thread)).unwrap();
    run_control(|local| async move { local.sleep(Duration::from_millis(20)).await });
    assert!(!ending.is_finished(), "a thread outlives what the kernel has of its memory");
    writer.write_all(b"!").unwrap();
    ending.join().unwrap();
}

/// Waits for something that has no waker.
pub(super) async fn until(local: &Local, condition: impl Fn() -> bool) {
    let patience = Instant::now() + super::PATIENCE / 2;
    while !condition() {
        assert!(Instant::now() < patience, "waited in vain");
        local.sleep(Duration::from_millis(1)).await;
    }
}

fn a_list_longer_than_the_kernel_takes_is_a_short_count(kind: Kind) {
    on(&kind.thread(), |local| async move {
        let byte = IoBuf::from_slice(&[7]).unwrap();
        let long = IoBuf::concat(&vec![byte; 1500]);
        for engine in [Engine::Ring, Engine::Pool] {
            let fd = file();
            assert_eq!(local.submit(engine, write(&fd, &long, 0, false), None).await, 1024);
        }
    });
}

fn many_operations_at_once(kind: Kind) {
    on(&kind.thread(), |local| async move {
        let fd = file();
        let buf = |byte: u32| IoBuf::from_slice(&byte.to_ne_bytes()).unwrap();
        // More than both rings have entries: some are submitted in between, and completions are kept back.
        let all = 0..10_000u32;
        let writes: Vec<_> = all
            .clone()
            .map(|n| local.submit(Engine::Ring, write(&fd, &buf(n), u64::from(n) * 4, false), None))
            .collect();
        for done in writes {
            assert_eq!(done.await, 4);
        }
        let back = IoBuf::alloc(40_000, 4).unwrap();
        assert_eq!(local.submit(Engine::Ring, read(&fd, &back, 0), None).await, 40_000);
        assert_eq!(back.to_vec(), all.flat_map(u32::to_ne_bytes).collect::<Vec<_>>());
    });
}

fn sleeps_end_in_order(kind: Kind) {
    let order = on(&kind.thread(), |local| async move {
        let order = Rc::new(std::cell::RefCell::new(Vec::new()));
        let start = Instant::now();
        for ms in [30, 10, 20, 0] {
            let order = order.clone();
            local.spawn(async move {
                Local::current().sleep_until(start + Duration::from_millis(ms)).await;
                assert!(start.elapsed() >= Duration::from_millis(ms), "never early");
                order.borrow_mut().push(ms);
            });
        }
        until(&local, || order.borrow().len() == 4).await;
        order.take()
    });
    assert_eq!(order, [0, 10, 20, 30]);
}

fn a_dropped_sleep_is_cancelled(kind: Kind) {
    on(&kind.thread(), |local| async move {
        let mut long = Box::pin(local.sleep(Duration::MAX));
        std::future::poll_fn(|cx| {
            assert!(long.as_mut().poll(cx).is_pending());
            std::task::Poll::Ready(())
        })
        .await;
        drop(long);
        assert_eq!(local.timers().borrow_mut().next(), None);
    });
}

fn descriptors_become_ready(kind: Kind) {
    on(&kind.thread(), |local| async move {
        let (reader, mut writer) = pipe();
        let (done, seen) = (Rc::new(Cell::new(false)), reader.clone());
        local.spawn({
            let done = done.clone();
            async move {
                Local::current().readable(&seen).await;
                done.set(true);
            }
        });
        local.sleep(Duration::from_millis(10)).await;
        assert!(!done.get(), "nothing to read yet");
        drop(local.readable(&reader));
        writer.write_all(b"x").unwrap();
        until(&local, || done.get()).await;
        let writer: SharedFd = Arc::new(writer.into());
        local.writable(&writer).await;
    });
}

fn one_descriptor_may_be_watched_twice(kind: Kind) {
    on(&kind.thread(), |local| async move {
        let (reader, mut writer) = pipe();
        let (one, two) = (local.readable(&reader), local.readable(&reader));
        writer.write_all(b"x").unwrap();
        one.await;
        two.await;
    });
}

fn a_regular_file_is_always_ready(kind: Kind) {
    on(&kind.thread(), |local| async move {
        local.readable(&file()).await;
        local.writable(&file()).await;
    });
}

#[test]
fn the_control_thread_does_all_of_it_through_helpers() {
    let name = run_control(|local| async move {
        there_and_back(&local, Engine::Ring).await;
        let fd: SharedFd = Arc::new(eventfd().unwrap());
        local.writable(&fd).await;
        crate::rt::blocking(|| std::thread::current().name().map(String::from)).await
    });
    assert_eq!(name.as_deref(), Some("rt-helper"));
}

/// Other tests of the process use the pool too, so only what this one adds is counted.
#[test]
fn many_long_jobs_leave_threads_for_others() {
    let (running, peak) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (release, released) = channel::<()>();
    let released: Arc<Mutex<Receiver<()>>> = Arc::new(Mutex::new(released));
    run_control(|local| async move {
        let jobs: Vec<_> = (0..100)
            .map(|_| {
                let (running, peak, released) = (running.clone(), peak.clone(), released.clone());
                crate::rt::blocking_long(move || {
                    peak.fetch_max(running.fetch_add(1, Relaxed) + 1, Relaxed);
                    // Ends when everybody may go.
                    let _ = released.lock().unwrap().recv();
                    running.fetch_sub(1, Relaxed);
                })
            })
            .collect();
        let (done, over) = oneshot();
        local.spawn(async move {
            together(jobs).await;
            done.send(()).unwrap();
        });
        local.sleep(Duration::from_millis(50)).await;
        // With all threads taken this would never come.
        assert_eq!(crate::rt::blocking(|| 7).await, 7);
        drop(release);
        over.await.unwrap();
        assert!((1..=16).contains(&peak.load(Relaxed)), "{peak:?} at once");
    });
}

/// What hangs on one descriptor, or on several, holds up no other, nor what has none.
#[test]
fn what_hangs_on_some_descriptors_leaves_threads_for_others() {
    run_control(|local| async move {
        let pipes: Vec<_> = (0..4).map(|_| pipe()).collect();
        let one = IoBuf::alloc(1, 1).unwrap();
        let mut hanging: Vec<_> = pipes
            .iter()
            .flat_map(|(reader, _)| std::iter::repeat_n(reader, 100))
            .map(|reader| local.submit(Engine::Pool, read(reader, &one, u64::MAX), None))
            .collect();
        // A call on behalf of a descriptor hangs with it.
        let (reader, _) = &pipes[0];
        let called: Vec<_> = (0..100).map(|_| crate::rt::blocking_on(reader, |_| 7)).collect();
        let over = within(&local, Duration::from_secs(10), async {
            for _ in 0..3 {
                there_and_back(&local, Engine::Pool).await;
                let (fd, bytes) = (file(), IoBuf::from_slice(&[7; 512]).unwrap());
                let many =
                    (0..64).map(|block| local.submit(Engine::Pool, write(&fd, &bytes, block * 512, false), None));
                assert_eq!(together(many.collect::<Vec<_>>()).await, [512; 64]);
                assert_eq!(crate::rt::blocking(|| 7).await, 7);
                assert_eq!(crate::rt::blocking_long(|| 8).await, 8);
            }
        });
        over.await.expect("a thread for those who do not hang");
        let (threads, descriptors) = (crate::rt::pool::threads(), pipes.len() + 1);
        assert!(threads <= 64 + 2 * descriptors + 32 + 16, "{threads} threads");
        let written: Vec<_> = pipes.iter().map(|(_, writer)| writer.try_clone().unwrap()).collect();
        written.into_iter().for_each(|mut writer| writer.write_all(&[1; 100]).unwrap());
        while let Some(hung) = hanging.pop() {
            assert_eq!(hung.await, 1);
        }
        assert_eq!(together(called).await, [7; 100]);
    });
}

/// Says which thread it ended on.
struct Ending(std::sync::mpsc::Sender<String>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.send(std::thread::current().name().unwrap_or_default().to_owned()).unwrap();
    }
}

#[test]
fn what_may_wait_at_its_end_does_not_do_so_on_an_io_thread() {
    let (sender, ended) = channel();
    let ending = || Elsewhere::new(Ending(sender.clone()));
    for kind in [Kind::Ring, Kind::Fallback] {
        let here = ending();
        on(&kind.thread(), move |_| async move { drop(here) });
        assert_eq!(ended.recv().unwrap(), "rt-helper");
    }
    // Where guests do not wait, it is over when it is dropped.
    let there = ending();
    run_control(|_| async move { drop(there) });
    assert_ne!(ended.try_recv().unwrap(), "rt-helper");
    drop(ending());
    assert_ne!(ended.try_recv().unwrap(), "rt-helper");
}

#[test]
fn main_may_borrow() {
    let mut numbers = vec![1];
    let numbers = &mut numbers;
    let sum = run_control(|local| async move {
        local.sleep(Duration::from_millis(1)).await;
        numbers.push(2);
        numbers.iter().sum::<i32>()
    });
    assert_eq!(sum, 3);
}

/// Epolls may watch each other only so deep, so ours cannot watch this one; descriptors that run short are the same to it.
#[test]
fn a_watch_that_is_refused_is_not_asked_for_all_the_time() {
    let epoll = || {
        // SAFETY: the kernel has just given us this descriptor, and nobody else knows it.
        unsafe { OwnedFd::from_raw_fd(epoll::create(true).unwrap()) }
    };
    let watch = |outer: &OwnedFd, inner: &OwnedFd| {
        let event = epoll::Event::new(epoll::Events::EPOLLIN, 0);
        epoll::ctl(outer.as_raw_fd(), epoll::ControlOptions::EPOLL_CTL_ADD, inner.as_raw_fd(), event)
    };
    let mut nested = vec![epoll()];
    while nested.len() < 100 {
        let outer = epoll();
        if watch(&outer, &nested[nested.len() - 1]).is_err() {
            break;
        }
        nested.push(outer);
    }
    let refused: SharedFd = Arc::new(nested.pop().unwrap());
    assert_eq!(watch(&epoll(), &refused).unwrap_err().raw_os_error(), Some(libc::ELOOP));
    on(&Kind::Fallback.thread(), |local| async move {
        let (begun, before) = (Instant::now(), local.counters().passes);
        let dropped = local.readable(&refused);
        for _ in 0..10 {
            local.readable(&refused).await;
        }
        assert!(begun.elapsed() >= Duration::from_millis(100), "it took {:?}", begun.elapsed());
        let passes = local.counters().passes - before;
        assert!(passes < 100, "{passes} passes of the loop for ten looks");
        drop(dropped);
        let regular = file();
        let begun = Instant::now();
        local.readable(&regular).await;
        assert!(begun.elapsed() < Duration::from_millis(10), "what epoll does not take is ready at once");
    });
}
