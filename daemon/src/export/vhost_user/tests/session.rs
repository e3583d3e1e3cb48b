//! Whole sessions against a real graph.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vm_memory::{Bytes, GuestAddress};

use super::frontend::{DATA, Frontend, MEMORY, wait};
use super::server::Server;
use crate::export::vhost_user::config_space::{F_CONFIG_WCE, F_EVENT_IDX, F_FLUSH, F_INDIRECT, F_LOG_ALL};
use crate::export::vhost_user::message::Kind;
use crate::export::vhost_user::regions::MAX_SLOTS;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const SIZE: u64 = 64 << 20;

fn null() -> Value {
    json!({ "driver": "null-co", "size": SIZE, "read-zeroes": true })
}

/// A raw image of [`SIZE`] zeroes, and its node.
fn image(aio: &str) -> (tempfile::NamedTempFile, Value) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(SIZE).unwrap();
    let node = json!({ "driver": "file", "filename": file.path(), "aio": aio, "discard": "unmap" });
    (file, node)
}

fn fill(frontend: &Frontend, len: usize, byte: u8) {
    frontend.memory.write_slice(&vec![byte; len], GuestAddress(DATA)).unwrap();
}

fn seen(frontend: &Frontend, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    frontend.memory.read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
    bytes
}

#[test]
fn a_null_disk_answers_in_place() {
    let server = Server::new(1, null(), |_| ());
    let mut frontend = Frontend::running(&server.socket(), F_FLUSH, 1);
    fill(&frontend, 4096, 7);
    assert_eq!(frontend.request(0, IN, 0, Some((4096, true))), (0, 4097));
    assert!(seen(&frontend, 4096).iter().all(|byte| *byte == 0), "the data is zeroes, as the node says");
    assert_eq!(frontend.request(0, OUT, 8, Some((4096, false))), (0, 1));
    assert_eq!(frontend.request(0, FLUSH, 0, None), (0, 1));
    assert_eq!(frontend.request(0, IN, SIZE / 512, Some((512, true))), (1, 1));
    assert_eq!(frontend.request(0, 0x7777, 0, None), (2, 1));
    assert_eq!(server.report().queues[0].requests, 5);
    assert_eq!(server.report().queues[0].refused, 2);
}

#[test]
fn what_was_written_is_read_on_every_path() {
    for aio in ["threads", "io_uring"] {
        let (_file, node) = image(aio);
        let server = Server::new(2, node, |_| ());
        let mut frontend = Frontend::running(&server.socket(), F_FLUSH, 2);
        for queue in [0, 1] {
            fill(&frontend, 8192, 0xA0 + u8::try_from(queue).unwrap());
            assert_eq!(frontend.request(queue, OUT, 16 * queue as u64, Some((8192, false))), (0, 1), "{aio}");
        }
        fill(&frontend, 16384, 0);
        assert_eq!(frontend.request(1, IN, 8, Some((8192, true))), (0, 8193));
        let data = seen(&frontend, 8192);
        assert!(data[..4096].iter().all(|byte| *byte == 0xA0) && data[4096..].iter().all(|byte| *byte == 0xA1));
        assert_eq!(frontend.request(0, FLUSH, 0, None), (0, 1));
    }
}

#[test]
fn space_is_given_back_and_zeroed() {
    let (_file, node) = image("threads");
    let server = Server::new(1, node, |_| ());
    let mut frontend = Frontend::running(&server.socket(), F_FLUSH, 1);
    fill(&frontend, 65536, 0x55);
    assert_eq!(frontend.request(0, OUT, 0, Some((65536, false))), (0, 1));
    let segment = |sector: u64, sectors: u32, flags: u32| {
        u128::from(sector) | u128::from(sectors) << 64 | u128::from(flags) << 96
    };
    for (kind, sector) in [(WRITE_ZEROES, 0u64), (DISCARD, 64)] {
        frontend.memory.write_slice(&segment(sector, 64, 0).to_le_bytes(), GuestAddress(DATA)).unwrap();
        assert_eq!(frontend.request(0, kind, 0, Some((16, false))), (0, 1));
    }
    assert_eq!(frontend.request(0, IN, 0, Some((32768, true))), (0, 32769));
    assert!(seen(&frontend, 32768).iter().all(|byte| *byte == 0));
}

#[test]
fn the_serial_is_told_in_any_length() {
    let server = Server::new(1, null(), |options| options.serial = "trellis-serial".into());
    let mut frontend = Frontend::running(&server.socket(), F_FLUSH, 1);
    assert_eq!(frontend.request(0, GET_ID, 0, Some((512, true))), (0, 21));
    assert_eq!(seen(&frontend, 20), b"trellis-serial\0\0\0\0\0\0");
    assert_eq!(frontend.request(0, GET_ID, 0, Some((4, true))), (0, 5));
    assert_eq!(frontend.request(0, GET_ID, 0, None), (0, 1));
}

#[test]
fn a_stopped_queue_goes_on_where_it_was() {
    let server = Server::new(1, null(), |_| ());
    let mut frontend = Frontend::running(&server.socket(), F_FLUSH, 1);
    for _ in 0..3 {
        frontend.request(0, FLUSH, 0, None);
    }
    assert_eq!(frontend.stop_queue(0), 3);
    assert_eq!(frontend.stop_queue(0), 3);
    frontend.offer(0, FLUSH, 0, None);
    frontend.kick(0);
    assert!(!wait(&frontend.queues[0].err, Duration::from_millis(50)));
    assert_eq!(frontend.queues[0].driver.take_used(), None, "a stopped queue takes nothing");
    frontend.restart_queue(0, 3);
    assert_eq!(frontend.finish(0), (0, 1));
}

#[test]
fn a_ring_that_was_disabled_needs_no_second_kick() {
    let server = Server::new(1, null(), |_| ());
    let mut frontend = Frontend::running(&server.socket(), F_FLUSH, 1);
    let enable = |frontend: &Frontend, on: u32| {
        frontend.tell(Kind::SET_VRING_ENABLE, [0, on].map(u32::to_ne_bytes).concat());
    };
    assert_eq!(frontend.request(0, FLUSH, 0, None), (0, 1));
    enable(&frontend, 0);
    // It stays started meanwhile (vhost-user, "Ring states").
    frontend.offer(0, FLUSH, 0, None);
    enable(&frontend, 1);
    assert_eq!(frontend.finish(0), (0, 1));
    assert_eq!(frontend.stop_queue(0), 2);
}

#[test]
fn a_ring_that_stops_asks_for_kicks_again() {
    const NO_NOTIFY: u16 = 1;
    let server = Server::new(1, null(), |_| ());
    let mut frontend = Frontend::connect(&server.socket(), F_FLUSH);
    frontend.share_memory();
    frontend.start_queue(0, 0);
    let used = frontend.queues[0].driver.at.used;
    let mut base = 0;
    for round in 0..100 {
        // Quick requests teach the thread to look by itself.
        for _ in 0..10 {
            assert_eq!(frontend.request(0, FLUSH, 0, None), (0, 1));
            base += 1;
        }
        assert_eq!(frontend.stop_queue(0), u32::from(base));
        assert_eq!(u16::from_le_bytes(frontend.queues[0].driver.get(used)) & NO_NOTIFY, 0, "round {round}");
        frontend.restart_queue(0, base);
    }
}

#[test]
fn a_slow_request_is_waited_for_when_its_queue_stops() {
    let node = json!({ "driver": "null-co", "size": SIZE, "latency-ns": 200_000_000 });
    let server = Server::new(1, node, |_| ());
    let mut frontend = Frontend::running(&server.socket(), F_FLUSH, 1);
    frontend.offer(0, IN, 0, Some((512, true)));
    frontend.kick(0);
    while server.report().queues[0].slow == 0 {
        wait(&frontend.queues[0].err, Duration::from_millis(1));
    }
    assert_eq!(frontend.stop_queue(0), 1);
    assert_eq!(frontend.queues[0].driver.used_index(), 1, "the answer was there before the base");
}

#[test]
fn what_is_answered_while_the_ring_is_away_comes_when_it_is_back() {
    let node = json!({ "driver": "null-co", "size": SIZE, "latency-ns": 100_000_000 });
    let server = Server::new(1, node, |_| ());
    let mut frontend = Frontend::connect(&server.socket(), F_FLUSH | F_EVENT_IDX | F_INDIRECT);
    frontend.tell_region(Kind::ADD_MEM_REG);
    frontend.start_queue(0, 0);
    for round in 0..3 {
        frontend.offer(0, IN, 0, Some((512, true)));
        frontend.kick(0);
        while server.report().queues[0].slow == round {
            wait(&frontend.queues[0].err, Duration::from_millis(1));
        }
        frontend.tell_region(Kind::REM_MEM_REG);
        assert!(!wait(&frontend.queues[0].err, Duration::from_millis(300)), "nobody has asked it to work");
        assert_eq!(u64::from(frontend.queues[0].driver.used_index()), round, "the memory was taken away");
        frontend.tell_region(Kind::ADD_MEM_REG);
        assert_eq!(frontend.finish(0), (0, 513));
    }
    assert_eq!(frontend.stop_queue(0), 3);
}

#[test]
fn a_ring_that_was_away_asks_for_kicks_again() {
    const NO_NOTIFY: u16 = 1;
    let server = Server::new(1, null(), |_| ());
    let mut frontend = Frontend::connect(&server.socket(), F_FLUSH);
    frontend.tell_region(Kind::ADD_MEM_REG);
    frontend.start_queue(0, 0);
    let used = frontend.queues[0].driver.at.used;
    for round in 0..20 {
        // Quick requests teach the thread to look by itself.
        for _ in 0..10 {
            assert_eq!(frontend.request(0, FLUSH, 0, None), (0, 1));
        }
        // As it is while the thread looks: caught in that moment, nobody else would undo it.
        frontend.queues[0].driver.put(used, NO_NOTIFY.to_le_bytes());
        frontend.tell_region(Kind::REM_MEM_REG);
        assert!(!wait(&frontend.queues[0].err, Duration::from_millis(20)));
        frontend.queues[0].driver.put(used, NO_NOTIFY.to_le_bytes());
        frontend.tell_region(Kind::ADD_MEM_REG);
        assert!(!wait(&frontend.queues[0].err, Duration::from_millis(20)));
        let flags = u16::from_le_bytes(frontend.queues[0].driver.get(used));
        assert_eq!(flags & NO_NOTIFY, 0, "round {round}: the driver would never kick again");
    }
}

/// Without bit 30 the features themselves enable the rings, and come after all that is needed to run one.
#[test]
fn a_ring_is_not_served_before_its_features_are_known() {
    let server = Server::new(1, null(), |_| ());
    let mut frontend = Frontend::greet(&server.socket());
    frontend.share_memory();
    frontend.make_queue(0);
    frontend.announce_queue(0, 0);
    frontend.offer(0, FLUSH, 0, None);
    frontend.kick(0);
    assert!(!wait(&frontend.queues[0].err, Duration::from_millis(20)));
    frontend.take_features(F_FLUSH | F_EVENT_IDX | F_INDIRECT);
    assert_eq!(frontend.finish(0), (0, 1));
    for n in 1..10u16 {
        // Asleep, it needs a kick, and says so in the word that belongs to the event index.
        wait(&frontend.queues[0].err, Duration::from_millis(20));
        frontend.offer(0, FLUSH, 0, None);
        let avail_event = frontend.queues[0].driver.at.used + 4 + 8 * 64;
        if u16::from_le_bytes(frontend.queues[0].driver.get(avail_event)) == n {
            frontend.kick(0);
        }
        assert_eq!(frontend.finish(0), (0, 1), "request {n}");
    }
}

/// Its predecessor may have been killed between an answer and the call.
#[test]
fn a_queue_that_starts_calls_the_guest_once() {
    let server = Server::new(1, null(), |_| ());
    let frontend = Frontend::running(&server.socket(), F_FLUSH, 1);
    assert!(wait(&frontend.queues[0].call, Duration::from_secs(10)));
    assert!(!wait(&frontend.queues[0].call, Duration::from_millis(20)));
}

#[test]
fn a_broken_queue_leaves_the_others_alone() {
    let server = Server::new(2, null(), |_| ());
    let mut frontend = Frontend::running(&server.socket(), F_FLUSH, 2);
    frontend.request(0, FLUSH, 0, None);
    frontend.queues[0].driver.set_avail(5000);
    frontend.kick(0);
    assert!(wait(&frontend.queues[0].err, Duration::from_secs(10)));
    assert_eq!(frontend.request(1, FLUSH, 0, None), (0, 1));
    assert_eq!(server.report().queues[0].broken, 1);
    let base = frontend.stop_queue(0);
    assert_eq!(base, 1);
    frontend.queues[0].driver.set_avail(1);
    frontend.restart_queue(0, 1);
    assert_eq!(frontend.request(0, FLUSH, 0, None), (0, 1), "stopping it heals it");
}

#[test]
fn memory_that_vanishes_ends_the_session_and_nothing_else() {
    let server = Server::new(1, null(), |_| ());
    let mut frontend = Frontend::running(&server.socket(), F_FLUSH, 1);
    frontend.request(0, FLUSH, 0, None);
    frontend.offer(0, FLUSH, 0, None);
    rustix::fs::ftruncate(&frontend.file, 0x1_0000).unwrap();
    frontend.kick(0);
    let mut end = [0; 1];
    assert_eq!(Read::read(&mut &frontend.stream, &mut end).unwrap(), 0, "hung up");
    let mut next = Frontend::running(&server.socket(), F_FLUSH, 1);
    assert_eq!(next.request(0, FLUSH, 0, None), (0, 1));
}

#[test]
fn frontends_come_and_go_without_leaving_anything() {
    let server = Server::new(1, null(), |_| ());
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mut frontend = Frontend::running(&server.socket(), F_FLUSH, 1);
    frontend.request(0, FLUSH, 0, None);
    drop(frontend);
    while server.report().connected {
        std::thread::yield_now();
    }
    let before = open();
    for _ in 0..100 {
        let mut frontend = Frontend::running(&server.socket(), F_FLUSH, 1);
        assert_eq!(frontend.request(0, FLUSH, 0, None), (0, 1));
    }
    while server.report().connected {
        std::thread::yield_now();
    }
    // Other tests of this process may come and go too; one that each session left would be 100.
    assert!(open() < before + 40, "{} descriptors, {before} before", open());
}

#[test]
fn a_second_frontend_waits_for_the_first() {
    let server = Server::new(1, null(), |_| ());
    let mut first = Frontend::running(&server.socket(), F_FLUSH, 1);
    let path = server.socket();
    let second = std::thread::Builder::new()
        .spawn(move || Frontend::running(&path, F_FLUSH, 1).request(0, FLUSH, 0, None))
        .unwrap();
    // Time enough for the second to be served, if it were.
    for _ in 0..500 {
        assert_eq!(first.request(0, FLUSH, 0, None), (0, 1));
    }
    assert!(!second.is_finished(), "it is not served beside the first");
    drop(first);
    assert_eq!(second.join().unwrap(), (0, 1));
}

#[test]
fn the_config_space_follows_the_disk_and_the_driver() {
    let (_file, node) = image("threads");
    let server = Server::new(1, node, |_| ());
    let frontend = Frontend::running(&server.socket(), F_FLUSH | F_CONFIG_WCE, 1);
    let capacity = |config: &[u8]| u64::from_le_bytes(config[..8].try_into().unwrap());
    assert_eq!((capacity(&frontend.config()), frontend.config()[32]), (SIZE / 512, 1));
    let set = |offset: u32, bytes: &[u8]| {
        let words = [offset, u32::try_from(bytes.len()).unwrap(), 0].map(u32::to_ne_bytes).concat();
        frontend.try_tell(Kind::SET_CONFIG, [&words, bytes].concat(), Vec::new())
    };
    assert_eq!(set(32, &[0]), 0);
    assert_eq!(frontend.config()[32], 0);
    assert_ne!(set(32, &[2]), 0);
    assert_ne!(set(0, &[0; 8]), 0);
    server.resize(2 * SIZE);
    assert_eq!(capacity(&frontend.config()), 2 * SIZE / 512);
}

/// Who takes neither FLUSH nor CONFIG_WCE, or turns the cache off, has each write stable when it is answered (virtio
/// 1.3, 5.2.6.2): the node is asked for that, as what blklogwrites notes of the write shows.
#[test]
fn writes_are_stable_at_once_where_the_guest_counts_on_it() {
    const FUA: u64 = 2;
    let both = F_FLUSH | F_CONFIG_WCE;
    for (features, writeback, writethrough, wanted) in [
        (0, None, false, FUA),
        (F_FLUSH, None, false, 0),
        (both, None, false, 0),
        (both, Some(0), false, FUA),
        (both, Some(1), false, 0),
        (both, None, true, FUA),
        (F_FLUSH, None, true, FUA),
    ] {
        let log = tempfile::NamedTempFile::new().unwrap();
        log.as_file().set_len(1 << 20).unwrap();
        let (disk, file) = (null(), json!({ "driver": "file", "filename": log.path() }));
        let node = json!({ "driver": "blklogwrites", "file": disk, "log": file });
        let server = Server::new(1, node, |options| options.writethrough = writethrough);
        let mut frontend = Frontend::running(&server.socket(), features, 1);
        if let Some(byte) = writeback {
            let words = [32, 1, 0].map(u32::to_ne_bytes).concat();
            assert_eq!(frontend.try_tell(Kind::SET_CONFIG, [&words[..], &[byte]].concat(), Vec::new()), 0);
        }
        assert_eq!(frontend.request(0, OUT, 0, Some((512, false))), (0, 1));
        // A superblock, and then the entry of the write: sector, sectors, flags.
        let mut flags = [0; 8];
        rustix::io::pread(log.as_file(), &mut flags, 512 + 16).unwrap();
        assert_eq!(u64::from_le_bytes(flags), wanted, "{features:#x}, {writeback:?}, writethrough {writethrough}");
    }
}

#[test]
fn a_resize_is_told_on_the_channel() {
    let (_file, node) = image("threads");
    let server = Server::new(1, node, |_| ());
    let mut frontend = Frontend::running(&server.socket(), F_FLUSH, 1);
    let (ours, theirs) = UnixStream::pair().unwrap();
    assert_eq!(frontend.try_tell(Kind::SET_BACKEND_REQ_FD, Vec::new(), vec![theirs.into()]), 0);
    ours.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    server.resize(2 * SIZE);
    let mut header = [0; 12];
    Read::read_exact(&mut &ours, &mut header).unwrap();
    assert_eq!(header, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    // Nobody reads any more of it, and nobody waits for that.
    for n in 3..6 {
        server.resize(n * SIZE);
    }
    assert_eq!(frontend.request(0, IN, 3 * SIZE / 512, Some((512, true))), (0, 513));
}

#[test]
fn a_read_only_export_writes_nothing() {
    let server = Server::new(1, null(), |options| options.writable = false);
    let mut frontend = Frontend::running(&server.socket(), F_FLUSH, 1);
    assert_eq!(frontend.request(0, OUT, 0, Some((512, false))), (1, 1));
    assert_eq!(frontend.request(0, WRITE_ZEROES, 0, Some((16, false))), (1, 1));
    assert_eq!(frontend.request(0, FLUSH, 0, None), (0, 1));
    assert_eq!(frontend.request(0, IN, 0, Some((512, true))), (0, 513));
}

#[test]
fn all_memory_goes_in_one_message_however_much_there_is() {
    let server = Server::new(1, null(), |_| ());
    let frontend = Frontend::connect(&server.socket(), F_FLUSH);
    let add = |slot: u64| {
        let words = [slot << 32, 4096, slot << 33, 0].map(u64::to_ne_bytes).concat();
        frontend.try_tell(Kind::ADD_MEM_REG, [vec![0; 8], words].concat(), vec![frontend.file.try_clone().unwrap()])
    };
    for slot in 1..=MAX_SLOTS as u64 {
        assert_eq!(add(slot), 0, "{slot}");
    }
    assert_eq!(add(1000), 1, "there is no slot left");
    frontend.tell(Kind::SET_MEM_TABLE, vec![0; 8]);
    assert_eq!(add(1000), 0);
}

/// A dirty log for `frontend`, which logs from now on.
fn log(frontend: &Frontend) -> OwnedFd {
    let log = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&log, 4096).unwrap();
    let body = [MEMORY / 4096 / 8, 0].map(u64::to_ne_bytes).concat();
    frontend.try_tell(Kind::SET_LOG_BASE, body, vec![log.try_clone().unwrap()]);
    log
}

/// Whether the page at `gpa` is marked.
fn dirty(log: &OwnedFd, gpa: u64) -> bool {
    let mut bits = [0u8; 128];
    rustix::io::pread(log, &mut bits, 0).unwrap();
    bits[usize::try_from(gpa / 4096 / 8).unwrap()] >> (gpa / 4096 % 8) & 1 == 1
}

#[test]
fn dirty_pages_are_logged() {
    let server = Server::new(1, null(), |_| ());
    let mut frontend = Frontend::running(&server.socket(), F_FLUSH | F_LOG_ALL, 1);
    let log = log(&frontend);
    assert_eq!(frontend.request(0, IN, 0, Some((8192, true))), (0, 8193));
    assert!(dirty(&log, DATA) && dirty(&log, DATA + 4096) && !dirty(&log, DATA + 8192), "the data");
    assert!(dirty(&log, 0x8_0000), "the status byte");
}

/// What was written before the error is the guest's, too.
#[test]
fn a_read_that_fails_half_way_is_logged() {
    let (file, below) = image("threads");
    file.as_file().write_all(&[7; 4096]).unwrap();
    let rule = json!({ "event": "none", "iotype": "read", "sector": 8 });
    let node = json!({ "driver": "blkdebug", "image": below, "max-transfer": 4096, "inject-error": [rule] });
    let server = Server::new(1, node, |_| ());
    let mut frontend = Frontend::running(&server.socket(), F_FLUSH | F_LOG_ALL, 1);
    let log = log(&frontend);
    assert_eq!(frontend.request(0, IN, 0, Some((8192, true))), (1, 1));
    assert_eq!(seen(&frontend, 4096), [7; 4096], "the first half was written");
    assert!(dirty(&log, DATA), "and nobody would copy it");
}

/// Each session is a thread that the control thread makes.
#[test]
fn frontends_that_come_and_go_are_let_in_at_leisure_after_a_while() {
    let server = Server::new(1, null(), |_| ());
    let (begun, mut sessions) = (Instant::now(), 0);
    while begun.elapsed() < Duration::from_secs(2) {
        let mut frontend = UnixStream::connect(server.socket()).unwrap();
        frontend.write_all(&[1_u32, 1, 0].map(u32::to_le_bytes).concat()).unwrap();
        frontend.read_exact(&mut [0; 20]).unwrap();
        sessions += 1;
    }
    assert!(sessions <= 330, "{sessions} sessions in two seconds");
}
