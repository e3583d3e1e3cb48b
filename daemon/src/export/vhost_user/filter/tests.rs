//! Messages in, verdicts out: one test for each thing that a frontend may lie about.

use super::*;
use crate::export::vhost_user::config_space::{F_CONFIG_WCE, F_EVENT_IDX, F_FLUSH, features};
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

const GOOD: u64 = F_VERSION_1 | F_PROTOCOL_FEATURES | F_FLUSH | F_CONFIG_WCE;
const USER: u64 = 0x7000_0000_0000;
const LEN: u64 = 1 << 20;

/// What a verdict comes to, without what it carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Is {
    Relay,
    Pass,
    Done,
    Answer,
    Refused,
    Dropped,
}

struct Bench(Filter);

impl Bench {
    /// Two queues; all protocol features and these features are acked, one megabyte is shared.
    fn new() -> Self {
        let mut bench = Self(Filter::new(features(true), 2, Quota::default()));
        assert_eq!(bench.word(Kind::SET_PROTOCOL_FEATURES, PROTOCOL_FEATURES), Is::Done);
        assert_eq!(bench.word(Kind::SET_FEATURES, GOOD), Is::Pass);
        assert_eq!(bench.table(&[(0, LEN, USER, 0)], vec![file(LEN)]), Is::Pass);
        bench
    }

    /// As [`Bench::new`], with queue 0 running.
    fn running() -> Self {
        let mut bench = Self::new();
        assert_eq!(bench.state(Kind::SET_VRING_NUM, 0, 8), Is::Pass);
        assert_eq!(bench.addr(0, 0, [0, 0x1000, 0x2000, 0]), Is::Pass);
        assert_eq!(bench.say(Kind::SET_VRING_KICK as u32, &[0; 8], vec![event()]), Is::Pass);
        assert_eq!(bench.state(Kind::SET_VRING_ENABLE, 0, 1), Is::Pass);
        bench
    }

    fn say(&mut self, request: u32, body: &[u8], fds: Vec<OwnedFd>) -> Is {
        let fds = fds.into_iter().map(|fd| Received::new(fd, &Arc::default())).collect();
        let mut message = Message { request, need_reply: true, body: body.to_vec(), fds };
        match self.0.judge(&mut message, &[0; CONFIG_LEN]) {
            Verdict::Relay => Is::Relay,
            Verdict::Pass | Verdict::PassAfter(_) => Is::Pass,
            Verdict::Done | Verdict::DoneAfter(_) | Verdict::Unmap(_) => Is::Done,
            Verdict::Answer(_) | Verdict::AnswerAfter(..) => Is::Answer,
            Verdict::Refuse(_) => Is::Refused,
            Verdict::Drop(_) => Is::Dropped,
        }
    }

    fn plain(&mut self, kind: Kind) -> Is {
        self.say(kind as u32, &[], Vec::new())
    }

    fn word(&mut self, kind: Kind, word: u64) -> Is {
        self.say(kind as u32, &word.to_ne_bytes(), Vec::new())
    }

    fn state(&mut self, kind: Kind, index: u32, num: u32) -> Is {
        self.say(kind as u32, &[index, num].map(u32::to_ne_bytes).concat(), Vec::new())
    }

    /// Descriptors, available, used (offsets in memory) and log address.
    fn addr(&mut self, index: u32, flags: u32, [desc, avail, used, log]: [u64; 4]) -> Is {
        let at = [USER + desc, USER + used, USER + avail, log].map(u64::to_ne_bytes).concat();
        self.say(Kind::SET_VRING_ADDR as u32, &[[index, flags].map(u32::to_ne_bytes).concat(), at].concat(), Vec::new())
    }

    fn table(&mut self, regions: &[(u64, u64, u64, u64)], fds: Vec<OwnedFd>) -> Is {
        let count = u64::try_from(regions.len()).unwrap().to_ne_bytes().to_vec();
        let words = regions.iter().flat_map(|(gpa, len, uva, offset)| [*gpa, *len, *uva, *offset]);
        let body = count.into_iter().chain(words.flat_map(u64::to_ne_bytes)).collect::<Vec<u8>>();
        self.say(Kind::SET_MEM_TABLE as u32, &body, fds)
    }

    fn config(&mut self, kind: Kind, offset: u32, data: &[u8]) -> Is {
        let words = [offset, u32::try_from(data.len()).unwrap(), 0].map(u32::to_ne_bytes).concat();
        self.say(kind as u32, &[&words, data].concat(), Vec::new())
    }
}

fn file(len: u64) -> OwnedFd {
    let file = rustix::fs::memfd_create("filter", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, len).unwrap();
    file
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

fn open(path: &str) -> OwnedFd {
    std::fs::File::open(path).unwrap().into()
}

#[test]
fn foreign_requests_are_refused() {
    let mut bench = Bench::new();
    for request in [0, 19, 20, 22, 23, 26, 27, 28, 31, 32, 33, 35, 39, 40, 41, 42, 44, 999] {
        assert_eq!(bench.say(request, &[0; 8], Vec::new()), Is::Refused, "{request}");
    }
}

#[test]
fn each_body_has_its_length() {
    let lengths = [(1, 0usize), (2, 8), (3, 0), (6, 16), (8, 8), (9, 40), (11, 8), (12, 8), (18, 8), (34, 0), (37, 40)];
    for (request, len) in lengths {
        for wrong in [len + 1, len + 8].into_iter().chain(len.checked_sub(1)) {
            assert_eq!(Bench::new().say(request, &vec![0; wrong], Vec::new()), Is::Dropped, "{request} {wrong}");
        }
    }
}

#[test]
fn gates_are_shut_until_their_feature_is_acked() {
    let gated = [(17, 0), (24, 12), (25, 12), (6, 16), (21, 0), (34, 0), (36, 0), (37, 40), (38, 40)];
    let mut bench = Bench(Filter::new(features(true), 1, Quota::default()));
    for (request, len) in gated {
        assert_eq!(bench.say(request, &vec![0; len], Vec::new()), Is::Refused, "{request}");
    }
    assert_eq!(bench.state(Kind::SET_VRING_ENABLE, 0, 1), Is::Refused, "needs bit 30");
}

#[test]
fn only_offered_features_can_be_acked() {
    let mut bench = Bench::new();
    for bits in [u64::MAX, GOOD & !F_VERSION_1, 1 << 5, 1 << 34] {
        assert_eq!(bench.word(Kind::SET_FEATURES, bits), Is::Refused, "{bits:#x}");
    }
    assert_eq!(bench.word(Kind::SET_PROTOCOL_FEATURES, u64::MAX), Is::Refused);
    assert_eq!(bench.word(Kind::SET_PROTOCOL_FEATURES, P_INBAND), Is::Dropped);
    assert_eq!(bench.word(Kind::SET_PROTOCOL_FEATURES, P_INBAND | P_REPLY_ACK | P_BACKEND_REQ), Is::Refused);
    assert_eq!(bench.word(Kind::SET_FEATURES, GOOD), Is::Pass);
}

#[test]
fn features_stay_while_a_ring_runs_except_for_logging() {
    let mut bench = Bench::running();
    for bit in [F_FLUSH, F_EVENT_IDX, 1 << 28] {
        assert_eq!(bench.word(Kind::SET_FEATURES, GOOD ^ bit), Is::Refused);
    }
    assert_eq!(bench.word(Kind::SET_FEATURES, GOOD | F_LOG_ALL), Is::Pass);
    assert_eq!(bench.word(Kind::SET_FEATURES, GOOD), Is::Pass);
    assert_eq!(bench.state(Kind::GET_VRING_BASE, 0, 0), Is::Relay);
    assert_eq!(bench.word(Kind::SET_FEATURES, GOOD ^ F_FLUSH), Is::Pass, "it was stopped");
}

#[test]
fn an_acknowledgement_is_given_where_it_was_agreed_on() {
    let ask = |filter: &Filter, request, body: &[u8]| {
        filter.wants_ack(&Message { request, need_reply: true, body: body.to_vec(), fds: Vec::new() })
    };
    let fresh = Filter::new(features(true), 1, Quota::default());
    assert!(!ask(&fresh, Kind::SET_OWNER as u32, &[]));
    assert!(ask(&fresh, Kind::SET_PROTOCOL_FEATURES as u32, &P_REPLY_ACK.to_ne_bytes()));
    assert!(ask(&Bench::new().0, 999, &[]));
}

#[test]
fn rings_are_set_up_with_what_can_be() {
    let mut bench = Bench::new();
    for index in [2, 1000, i32::MAX as u32, u32::MAX] {
        for kind in [Kind::SET_VRING_NUM, Kind::SET_VRING_BASE, Kind::SET_VRING_ENABLE] {
            assert_eq!(bench.state(kind, index, 1), Is::Refused, "{index} {kind:?}");
        }
        assert_eq!(bench.state(Kind::GET_VRING_BASE, index, 0), Is::Dropped);
        assert_eq!(bench.addr(index, 0, [0; 4]), Is::Refused);
    }
    for size in [0, 7, 65536, u32::MAX] {
        assert_eq!(bench.state(Kind::SET_VRING_NUM, 0, size), Is::Refused, "{size}");
    }
    assert_eq!(bench.state(Kind::SET_VRING_NUM, 0, 32768), Is::Pass);
    assert_eq!(bench.state(Kind::SET_VRING_BASE, 0, 65536), Is::Refused);
    assert_eq!(bench.state(Kind::SET_VRING_ENABLE, 0, 2), Is::Refused);
}

#[test]
fn a_running_ring_keeps_its_size_and_base() {
    let mut bench = Bench::running();
    assert_eq!(bench.state(Kind::SET_VRING_NUM, 0, 16), Is::Refused);
    assert_eq!(bench.state(Kind::SET_VRING_BASE, 0, 0), Is::Refused);
    assert_eq!(bench.state(Kind::SET_VRING_NUM, 1, 16), Is::Pass, "the other does not run");
    assert_eq!(bench.plain(Kind::RESET_DEVICE), Is::Pass);
    assert_eq!(bench.state(Kind::SET_VRING_BASE, 0, 0), Is::Pass);
}

#[test]
fn ring_parts_are_aligned_and_inside_one_region() {
    let mut bench = Bench::new();
    assert_eq!(bench.state(Kind::SET_VRING_NUM, 0, 256), Is::Pass);
    assert_eq!(bench.addr(0, 0, [0, 0x1000, 0x2000, 0]), Is::Pass);
    for wrong in [[8, 0x1000, 0x2000, 0], [0, 0x1001, 0x2000, 0], [0, 0x1000, 0x2002, 0]] {
        assert_eq!(bench.addr(0, 0, wrong), Is::Refused, "misaligned: {wrong:x?}");
    }
    for outside in [[LEN, 0, 0, 0], [LEN - 16, 0, 0, 0], [0, LEN - 16, 0, 0], [0, 0, LEN - 16, 0]] {
        assert_eq!(bench.addr(0, 0, outside), Is::Refused, "outside: {outside:x?}");
    }
    assert_eq!(bench.addr(0, 2, [0, 0x1000, 0x2000, 0]), Is::Refused, "unknown flag");
}

#[test]
fn kicks_are_eventfds_and_calls_may_be_pipes() {
    let mut bench = Bench::new();
    let kick = |bench: &mut Bench, word: u64, fds| bench.say(Kind::SET_VRING_KICK as u32, &word.to_ne_bytes(), fds);
    let socket = || OwnedFd::from(UnixStream::pair().unwrap().0);
    for wrong in [open("/dev/null"), file(8), socket(), rustix::pipe::pipe().unwrap().0] {
        assert_eq!(kick(&mut bench, 0, vec![wrong]), Is::Refused);
    }
    assert_eq!(kick(&mut bench, NO_FD, Vec::new()), Is::Refused, "we do not poll");
    assert_eq!(kick(&mut bench, 2, vec![event()]), Is::Refused, "no such ring");
    assert_eq!(kick(&mut bench, 0, Vec::new()), Is::Dropped);
    assert_eq!(kick(&mut bench, 0, vec![event()]), Is::Pass);
    for kind in [Kind::SET_VRING_CALL, Kind::SET_VRING_ERR] {
        let mut call = |word: u64, fds| bench.say(kind as u32, &word.to_ne_bytes(), fds);
        assert_eq!(call(0, vec![event()]), Is::Pass);
        assert_eq!(call(0, vec![rustix::pipe::pipe().unwrap().1]), Is::Pass);
        assert_eq!(call(NO_FD, Vec::new()), Is::Pass);
        assert_eq!(call(0, vec![file(8)]), Is::Refused);
        assert_eq!(call(0, vec![socket()]), Is::Refused, "its closing may wait");
        assert_eq!(call(2, vec![event()]), Is::Refused);
        assert_eq!(call(NO_FD, vec![event()]), Is::Dropped);
        assert_eq!(call(0, vec![event(), event()]), Is::Dropped);
    }
}

#[test]
fn tables_are_counted_before_they_are_read() {
    let mut bench = Bench::new();
    let region = |n: u64| (n << 24, 4096, USER + (n << 24), 0);
    let files = |n: u64| (0..n).map(|_| file(4096)).collect();
    let nine: Vec<_> = (0..9).map(region).collect();
    assert_eq!(bench.table(&nine, files(8)), Is::Refused);
    assert_eq!(bench.table(&nine[..8], files(9)), Is::Dropped);
    assert_eq!(bench.table(&nine[..3], files(1)), Is::Refused);
    assert_eq!(bench.say(Kind::SET_MEM_TABLE as u32, &1u64.to_ne_bytes(), files(1)), Is::Dropped);
    assert_eq!(bench.table(&nine[..8], files(8)), Is::Pass);
    assert_eq!(bench.table(&[], Vec::new()), Is::Done);
    assert_eq!(Bench::running().table(&[], Vec::new()), Is::Refused);
}

#[test]
fn slots_take_exactly_one_descriptor() {
    let mut bench = Bench::new();
    let body = [[0; 8].to_vec(), Region { gpa: LEN, len: 4096, uva: USER + LEN, offset: 0 }.bytes()].concat();
    assert_eq!(bench.say(Kind::ADD_MEM_REG as u32, &body, Vec::new()), Is::Refused);
    assert_eq!(bench.say(Kind::ADD_MEM_REG as u32, &body, vec![file(4096), file(4096)]), Is::Refused);
    assert_eq!(bench.say(Kind::REM_MEM_REG as u32, &body, Vec::new()), Is::Refused);
    assert_eq!(bench.say(Kind::ADD_MEM_REG as u32, &body, vec![file(4096)]), Is::Pass);
    assert_eq!(bench.say(Kind::REM_MEM_REG as u32, &body, vec![file(4096)]), Is::Pass, "a stray descriptor is closed");
}

#[test]
fn descriptors_that_nobody_asked_for_go_no_further() {
    let mut bench = Bench::new();
    let mut message = Message {
        request: Kind::GET_FEATURES as u32,
        need_reply: false,
        body: Vec::new(),
        fds: vec![Received::new(event(), &Arc::default())],
    };
    assert!(matches!(bench.0.judge(&mut message, &[0; CONFIG_LEN]), Verdict::Answer(_)));
    assert!(message.fds.is_empty());
}

#[test]
fn only_the_write_cache_can_be_configured() {
    let mut bench = Bench::new();
    assert_eq!(bench.config(Kind::SET_CONFIG, 32, &[1]), Is::Done);
    assert_eq!(bench.config(Kind::SET_CONFIG, 32, &[2]), Is::Refused);
    assert_eq!(bench.config(Kind::SET_CONFIG, 0, &[1; 8]), Is::Refused);
    assert_eq!(bench.config(Kind::SET_CONFIG, 0, &[0; 8]), Is::Refused, "even if it is what is there");
    assert_eq!(bench.config(Kind::SET_CONFIG, 0, &[0; CONFIG_LEN]), Is::Done);
    assert_eq!(bench.config(Kind::SET_CONFIG, u32::MAX, &[1]), Is::Refused);
    let mut read = |offset: u32, size: u32| {
        let body = [[offset, size, 0].map(u32::to_ne_bytes).concat(), vec![0; usize::try_from(size).unwrap()]].concat();
        let mut message = Message { request: Kind::GET_CONFIG as u32, need_reply: false, body, fds: Vec::new() };
        match bench.0.judge(&mut message, &[7; CONFIG_LEN]) {
            Verdict::Answer(body) => body,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(read(32, 2), [32, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 7, 7]);
    for (offset, len) in [(0, 256), (0xffff_0000, 4), (u32::MAX, 2), (96, 1), (0, 0)] {
        assert!(read(offset, len).is_empty(), "{offset} {len}");
    }
    let lying = [[0u32, 60, 0].map(u32::to_ne_bytes).concat(), vec![0; 4]].concat();
    assert_eq!(bench.say(Kind::GET_CONFIG as u32, &lying, Vec::new()), Is::Dropped);
}

#[test]
fn a_log_is_an_ordinary_file_that_covers_the_guest() {
    let needed = LEN / 4096 / 8;
    let ask = |len: u64, offset: u64, fds| {
        Bench::new().say(Kind::SET_LOG_BASE as u32, &[len, offset].map(u64::to_ne_bytes).concat(), fds)
    };
    assert_eq!(ask(needed, 0, vec![file(4096)]), Is::Answer);
    assert_eq!(ask(needed - 1, 0, vec![file(4096)]), Is::Refused);
    assert_eq!(ask(8192, 0, vec![file(4096)]), Is::Refused, "larger than its file");
    assert_eq!(ask(needed, u64::MAX - 1, vec![file(4096)]), Is::Refused);
    assert_eq!(ask(0, 0, vec![file(4096)]), Is::Refused);
    assert_eq!(ask(needed, 0, Vec::new()), Is::Refused);
    assert_eq!(ask(needed, 0, vec![open("/")]), Is::Refused);
}

#[test]
fn a_used_ring_is_logged_inside_guest_and_log() {
    let mut bench = Bench::new();
    let log = [LEN / 4096 / 8, 0].map(u64::to_ne_bytes).concat();
    assert_eq!(bench.say(Kind::SET_LOG_BASE as u32, &log, vec![file(4096)]), Is::Answer);
    assert_eq!(bench.state(Kind::SET_VRING_NUM, 0, 8), Is::Pass);
    assert_eq!(bench.addr(0, LOG_FLAG, [0, 0x1000, 0x2000, 0x2000]), Is::Pass);
    for far in [LEN, LEN - 8, u64::MAX, 1 << 60] {
        assert_eq!(bench.addr(0, LOG_FLAG, [0, 0x1000, 0x2000, far]), Is::Refused, "{far:#x}");
    }
}

#[test]
fn the_channel_is_one_unix_stream_socket() {
    let mut bench = Bench::new();
    let mut say = |fds| bench.say(Kind::SET_BACKEND_REQ_FD as u32, &[], fds);
    let socket = || OwnedFd::from(UnixStream::pair().unwrap().0);
    assert_eq!(say(vec![socket()]), Is::Done);
    assert_eq!(say(vec![socket(), socket()]), Is::Refused);
    assert_eq!(say(vec![event()]), Is::Refused);
    assert_eq!(say(Vec::new()), Is::Refused);
}
