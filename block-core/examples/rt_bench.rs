//! What the runtime costs: 4 KiB buffered reads at depth 32 from a cached file, through `push_direct`, beside a bare
//! io_uring loop. On /dev/shm (the default) the kernel hands each read to a worker; on ext4 or xfs it answers at once. Prints nanoseconds of CPU a read for interleaved rounds (the clock on the wall would count other
//! programs as well), and the ratio; the aim is 1.1 at most.
//!
//! `cargo run --release -p block-core --example rt_bench [READS [FOLDER]]`
#![expect(unsafe_code, reason = "both sides hand raw memory to the kernel")]

use block_core::rt::{DirectOp, Engine, IoThread, Local, PollParams, Source, SourceId};
use io_uring::{IoUring, opcode, types};
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::{Arc, mpsc};

const BLOCK: usize = 4096;
const DEPTH: u32 = 32;
const BLOCKS: u64 = 16_384;
const ROUNDS: usize = 7;

fn main() {
    let reads = std::env::args().nth(1).map_or(1_000_000, |text| text.parse().expect("a number of reads"));
    let folder = std::env::args().nth(2).unwrap_or_else(|| "/dev/shm".into());
    let file = Arc::new(test_file(&folder));
    let thread = IoThread::spawn("rt-bench", PollParams::default()).expect("a thread with a driver");
    println!("4 KiB buffered reads, depth {DEPTH}, {folder}, {reads} reads a round, engine {}", thread.engine_name());
    let mut ratios: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let (bare, ours) = (bare_loop(&file, reads), through_runtime(&thread, &file, reads));
            println!("bare {bare:7.1} ns   runtime {ours:7.1} ns   ratio {:.3}", ours / bare);
            ours / bare
        })
        .collect();
    ratios.sort_by(f64::total_cmp);
    println!("median ratio {:.3}, least {:.3}", ratios[ROUNDS / 2], ratios[0]);
}

fn test_file(folder: &str) -> File {
    let mut file = tempfile::tempfile_in(folder).expect("a file in the folder");
    let block = [0x5a; BLOCK];
    (0..BLOCKS).for_each(|_| file.write_all(&block).expect("room for 64 MiB"));
    file
}

/// The same pseudo-random walk over the file for both.
#[derive(Clone, Copy)]
struct Walk(u64);

impl Walk {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % BLOCKS * BLOCK as u64
    }
}

fn buffers() -> Vec<libc::iovec> {
    let memory: &'static mut [u8] = Box::leak(vec![0u8; BLOCK * DEPTH as usize].into_boxed_slice());
    memory.chunks_mut(BLOCK).map(|part| libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: BLOCK }).collect()
}

fn bare_loop(file: &File, reads: u64) -> f64 {
    let mut ring: IoUring = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(512).expect("a ring");
    let (buffers, fd) = (buffers(), types::Fd(file.as_raw_fd()));
    let (mut walk, mut free) = (Walk(1), (0..DEPTH as usize).collect::<Vec<_>>());
    let (mut started, mut done) = (0, 0);
    let before = cpu_ns("thread-self");
    while done < reads {
        while started < reads {
            let Some(slot) = free.pop() else { break };
            let read = opcode::Read::new(fd, buffers[slot].iov_base.cast(), 4096).offset(walk.next()).build();
            // SAFETY: the buffers are never freed.
            unsafe { ring.submission().push(&read.user_data(slot as u64)) }.expect("room for the whole depth");
            started += 1;
        }
        ring.submit_and_wait(1).expect("io_uring_enter");
        for entry in ring.completion() {
            assert_eq!(entry.result(), 4096);
            free.push(usize::try_from(entry.user_data()).expect("a slot"));
            done += 1;
        }
    }
    (cpu_ns("thread-self") - before) / reads as f64
}

/// A source that keeps its depth full until it has read enough.
struct Reader {
    file: Arc<File>,
    buffers: Vec<libc::iovec>,
    id: Cell<Option<SourceId>>,
    walk: Cell<Walk>,
    free: RefCell<Vec<u32>>,
    left: Cell<u64>,
    missing: Cell<u64>,
    finished: mpsc::Sender<SourceId>,
    local: Rc<Local>,
}

impl Source for Reader {
    fn kicked(&self, _: u32) {}

    fn run(&self) -> bool {
        let (id, mut free) = (self.id.get().expect("set when it was added"), self.free.borrow_mut());
        while self.left.get() > 0 {
            let Some(slot) = free.pop() else { break };
            self.left.set(self.left.get() - 1);
            let mut walk = self.walk.get();
            let (fd, iovecs) = (self.file.as_raw_fd(), &raw const self.buffers[slot as usize]);
            let op = DirectOp {
                write: false,
                dsync: false,
                fd,
                iovecs,
                count: 1,
                len: 4096,
                offset: walk.next(),
                engine: Engine::Ring,
            };
            self.walk.set(walk);
            // SAFETY: the source, with file and list, is removed after its last completion; the buffers stay for ever.
            unsafe { self.local.push_direct(id, slot, op) };
        }
        false
    }

    fn complete(&self, slot: u32, result: i32) {
        assert_eq!(result, 4096);
        self.free.borrow_mut().push(slot);
        self.missing.set(self.missing.get() - 1);
    }

    fn publish(&self) {
        let id = self.id.get().expect("set when it was added");
        if self.missing.get() == 0 {
            self.finished.send(id).expect("the main thread waits");
        } else if self.has_work() {
            self.local.make_ready(id);
        }
    }

    fn has_work(&self) -> bool {
        self.left.get() > 0 && !self.free.borrow().is_empty()
    }

    fn suppress(&self, _: bool) {}
}

fn through_runtime(thread: &IoThread, file: &Arc<File>, reads: u64) -> f64 {
    let (sender, finished) = mpsc::channel();
    let file = file.clone();
    let task = format!("self/task/{}", thread.tid());
    let before = cpu_ns(&task);
    thread.remote().send(move |local| {
        let reader = Rc::new(Reader {
            file,
            buffers: buffers(),
            id: Cell::new(None),
            walk: Cell::new(Walk(1)),
            free: RefCell::new((0..DEPTH).collect()),
            left: Cell::new(reads),
            missing: Cell::new(reads),
            finished: sender,
            local: local.clone(),
        });
        let id = local.add_source(reader.clone());
        reader.id.set(Some(id));
        local.make_ready(id);
    });
    let id = finished.recv().expect("the source sends when it has finished");
    let used = cpu_ns(&task) - before;
    thread.remote().send(move |local| local.remove_source(id));
    used / reads as f64
}

/// Time on a processor, of one thread.
fn cpu_ns(task: &str) -> f64 {
    let line = std::fs::read_to_string(format!("/proc/{task}/schedstat")).expect("schedstat");
    line.split(' ').next().and_then(|text| text.parse().ok()).expect("nanoseconds first")
}
