//! The stage for hostile tests: a server with two exports, and the check that nothing was lost after each case.
//!
//! What an answer must be is said in `tests/`, one named test a row. `expect_*` say what the answer was; [`Scene::still_good`] says that everyone else did not notice.

use crate::vhost_user::PATIENCE;
use crate::vhost_user::client::{Client, Done, Setup};
use crate::vhost_user::protocol::{feature, protocol_feature, request, status};
use crate::vhost_user::wire::{Wire, hung_up_within, pause, readable_within};
use crate::watched::{Builder, Watched};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Size of the disk under attack, in bytes.
pub const DISK: u64 = 64 << 20;
/// Size of the disk under attack, in sectors.
pub const SECTORS: u64 = DISK / 512;
/// How long a read or write takes on the slow disk of [`Scene::slow`].
pub const SLOW: Duration = Duration::from_millis(300);

/// A server with export `a`, which is attacked, and export `b`, which must not notice.
#[derive(Debug)]
pub struct Scene {
    server: Watched,
    stores: bool,
    before: Baseline,
}

/// What the server holds while nobody is connected.
#[derive(Clone, Copy, Debug)]
struct Baseline {
    fds: usize,
    maps: usize,
    rss_kib: u64,
}

impl Scene {
    /// Export `a` is a file of [`DISK`] bytes with two queues.
    pub fn new() -> Self {
        Self::with_export("")
    }

    /// As [`Scene::new`], with `options` added to the export.
    pub fn with_export(options: &str) -> Self {
        Self::with_disk(",discard=unmap", options)
    }

    /// As [`Scene::new`], with options added to node and export.
    pub fn with_disk(node: &str, export: &str) -> Self {
        let builder = Watched::builder().image("disk-a", DISK, node);
        Self::open(builder, &format!(",writable=on,num-queues=2{export}"), "", true)
    }

    /// Export `a` stores nothing, reads as zeroes, and takes [`SLOW`] for each request.
    pub fn slow() -> Self {
        Self::null(DISK, &format!(",latency-ns={}", SLOW.as_nanos()))
    }

    /// Export `a` stores nothing and reads as zeroes; `size` is in bytes.
    pub fn null(size: u64, options: &str) -> Self {
        let node = format!("driver=null-co,node-name=disk-a,size={size},read-zeroes=on{options}");
        Self::open(Watched::builder().arg("--blockdev", &node), ",writable=on,num-queues=2", "", false)
    }

    /// As [`Scene::null`], with one IOThread for both exports.
    pub fn null_on_one_thread(size: u64, options: &str) -> Self {
        let node = format!("driver=null-co,node-name=disk-a,size={size},read-zeroes=on{options}");
        let builder = Watched::builder().arg("--object", "iothread,id=both").arg("--blockdev", &node);
        Self::open(builder, ",writable=on,num-queues=2,iothread=both", ",iothread=both", false)
    }

    /// As [`Scene::new`], with one IOThread for both exports and this file for a disk; `options` are the node's.
    pub fn file_on_one_thread(file: &Path, options: &str) -> Self {
        let node = format!("driver=file,node-name=disk-a,aio=io_uring,filename={}{options}", file.display());
        let builder = Watched::builder().arg("--object", "iothread,id=both").arg("--blockdev", &node);
        Self::open(builder, ",writable=on,num-queues=2,iothread=both", ",iothread=both", true)
    }

    /// Export `a` is a read-only one.
    pub fn read_only() -> Self {
        Self::open(Watched::builder().image("disk-a", DISK, ""), ",num-queues=2", "", false)
    }

    fn open(builder: Builder, export: &str, neighbour: &str, stores: bool) -> Self {
        let builder = builder.image("disk-b", 8 << 20, "");
        let server =
            builder.export("a", "disk-a", export).export("b", "disk-b", &format!(",writable=on{neighbour}")).start();
        let mut scene = Self { server, stores, before: Baseline { fds: 0, maps: 0, rss_kib: 0 } };
        // What a first client makes the server keep (threads, pools) is no leak.
        scene.good_clients();
        scene.good_clients();
        scene.before = scene.settled();
        scene
    }

    /// The server.
    pub fn server(&mut self) -> &mut Watched {
        &mut self.server
    }

    /// The socket of the attacked export.
    pub fn socket(&self) -> PathBuf {
        self.server.socket("a")
    }

    /// A client of the attacked export with one running queue.
    pub fn client(&self) -> Client {
        self.client_with(&Setup::default())
    }

    /// A client of the attacked export with running queues.
    pub fn client_with(&self, setup: &Setup) -> Client {
        Client::start(&self.socket(), setup)
    }

    /// A client of the attacked export that has negotiated and done nothing else.
    pub fn negotiated(&self) -> Client {
        Client::negotiated(&self.socket(), &Setup::default())
    }

    /// A client of the attacked export that has negotiated and announced its memory.
    pub fn mapped(&self) -> Client {
        Client::mapped(&self.socket(), &Setup::default())
    }

    /// A client that agreed on exactly these protocol features, and has announced nothing.
    pub fn negotiated_protocol(&self, protocol: u64) -> Client {
        Client::negotiated(&self.socket(), &Setup { protocol, ..Setup::default() })
    }

    /// A bare connection to the attacked export.
    pub fn wire(&self) -> Wire {
        Wire::connect(&self.socket()).expect("the export listens")
    }

    /// A bare connection on which acknowledgements have been agreed on.
    pub fn acknowledging_wire(&self) -> Wire {
        let wire = self.wire();
        let protocol = protocol_feature::REPLY_ACK | protocol_feature::CONFIG | protocol_feature::MQ;
        wire.send(request::GET_FEATURES, &[], &[]).expect("a fresh connection");
        let offered = wire.recv().expect("features in time").expect("features").u64();
        assert_ne!(offered & feature::PROTOCOL_FEATURES, 0, "protocol features are offered");
        wire.send(request::SET_PROTOCOL_FEATURES, &protocol.to_le_bytes(), &[]).expect("a fresh connection");
        wire
    }

    /// Open descriptors of the server beyond those it held before the first attack: the fewest within half a second, since it
    /// closes what it was sent a little later.
    pub fn extra_fds(&self) -> usize {
        let fds = (0..10).map(|_| {
            pause(Duration::from_millis(50));
            self.server.fds()
        });
        fds.min().unwrap_or_default().saturating_sub(self.before.fds)
    }

    /// Does I/O as another guest would, on the export that is not under attack.
    pub fn neighbour_works(&self) {
        round_trip(&mut Client::start(&self.server.socket("b"), &Setup::default()), true);
    }

    /// Asserts that the attack has left no trace: good clients work on both exports, and descriptors, mappings, memory
    /// and processor time are back. Every client of the test must be gone.
    pub fn still_good(&mut self) {
        assert!(self.server.alive(), "the server is gone");
        self.good_clients();
        let now = self.settled();
        let Baseline { fds, maps, rss_kib } = self.before;
        assert!(now.fds <= fds, "{} descriptors where there were {fds}", now.fds);
        assert!(now.maps <= maps, "{} mappings of guest memory where there were {maps}", now.maps);
        assert!(now.rss_kib <= rss_kib + MORE_RSS_KIB, "RssAnon {} KiB, was {rss_kib} KiB", now.rss_kib);
        assert!(self.idles(), "the server keeps computing with no client");
        let said = self.server.log().len();
        assert!(said < LOG, "{said} bytes of log");
        assert!(self.server.alive(), "the server is gone");
    }

    fn good_clients(&self) {
        let mut client = self.client_with(&Setup { queues: 2, ..Setup::default() });
        round_trip(&mut client, self.stores);
        drop(client);
        self.neighbour_works();
    }

    /// Descriptors, mappings and memory once they have stopped falling; a client's end is noticed a little later.
    fn settled(&self) -> Baseline {
        let end = Instant::now() + Duration::from_secs(2);
        let unmeasured = self.before.fds == 0;
        loop {
            pause(Duration::from_millis(20));
            // For a moment after a client's end there is less than while the server waits for the next one.
            let idles = unmeasured && self.idles();
            let now = Baseline {
                fds: self.server.fds(),
                maps: self.server.shared_maps(),
                rss_kib: self.server.rss_anon_kib(),
            };
            let back = now.fds <= self.before.fds && now.maps <= self.before.maps;
            if Instant::now() > end || (!unmeasured && back) || idles {
                return now;
            }
        }
    }

    /// Whether a tenth of a second exists, within one second, in which the server hardly computes.
    fn idles(&self) -> bool {
        (0..10).any(|_| {
            let before = self.server.cpu_ticks();
            pause(Duration::from_millis(100));
            self.server.cpu_ticks() - before <= 1
        })
    }
}

impl Default for Scene {
    fn default() -> Self {
        Self::new()
    }
}

/// Writes where `stores`, reads back and flushes, on every queue that the client has.
fn round_trip(client: &mut Client, stores: bool) {
    const SECTOR: u64 = 4096;
    let read_only = client.features() & feature::RO != 0;
    if stores && !read_only {
        let pattern: Vec<u8> = (0..=255).cycle().take(4096).collect();
        assert_eq!(client.write(0, SECTOR, &pattern), OK_WRITE);
        let (done, bytes) = client.read(0, SECTOR, pattern.len());
        assert_eq!(done.status, status::OK);
        assert_eq!(bytes, pattern, "what was written is not what is read");
    }
    assert_eq!(client.read(0, SECTOR, 4096).0.status, status::OK);
    assert_eq!(client.flush(0).status, status::OK);
}

/// A write or flush that went well: one byte written, the status.
pub const OK_WRITE: Done = Done { status: status::OK, used: 1 };
/// A request refused: one byte written, the status.
pub const IOERR: Done = Done { status: status::IOERR, used: 1 };
/// A request unknown: one byte written, the status.
pub const UNSUPP: Done = Done { status: status::UNSUPP, used: 1 };

/// Asserts that the server hangs up, and says yes to nothing before.
pub fn expect_disconnect(wire: &Wire) {
    expect_disconnect_within(wire, PATIENCE);
}

/// As [`expect_disconnect`], for answers that have a time-out in them.
pub fn expect_disconnect_within(wire: &Wire, patience: Duration) {
    let closed = wire.closes_within(patience, |message| {
        panic!("an answer where only hanging up is right: {message:?}");
    });
    assert!(closed, "the connection is still open after {patience:?}");
}

/// Asserts that the server hangs up, whatever it may have answered to earlier messages.
pub fn expect_hang_up(wire: &Wire) {
    assert!(wire.closes_within(PATIENCE, drop), "the connection is still open after {PATIENCE:?}");
}

/// Asserts that the server hangs up without our reading anything that it has sent.
pub fn expect_hang_up_unread(wire: &Wire, patience: Duration) {
    assert!(hung_up_within(wire.stream().as_fd(), patience), "the connection is still open after {patience:?}");
}

/// Asserts that a message is refused with a word other than 0, and that the session goes on.
pub fn expect_nack(client: &Client, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
    assert_ne!(client.ask_ack(request, payload, fds), 0, "request {request} was applied");
    expect_session_alive(client);
}

/// Asserts that a session answers.
pub fn expect_session_alive(client: &Client) {
    assert_eq!(client.ask(request::GET_FEATURES, &[]).u64(), client.offered());
}

/// Asserts that queue `index` has stopped: its err event comes, nothing completes beyond `completed`, the other queues of
/// the session work, and a restart heals it.
pub fn expect_queue_broken(client: &mut Client, index: u16, completed: u16) {
    expect_err_event(client, index);
    pause(Duration::from_millis(20));
    assert_eq!(client.queue(index).ring.used_idx(), completed, "a broken queue goes on completing");
    expect_session_alive(client);
    expect_queue_works(client, 1 - index);
    client.restart_queue(index);
    expect_queue_works(client, index);
}

/// Asserts that the device says over the err event that queue `index` is broken.
pub fn expect_err_event(client: &mut Client, index: u16) {
    let broken = readable_within(client.queue(index).err.as_fd(), PATIENCE);
    assert!(broken, "nobody says that queue {index} is broken");
}

/// Asserts that a read on queue `index` goes well.
pub fn expect_queue_works(client: &mut Client, index: u16) {
    assert_eq!(client.read(index, 0, 512).0, Done { status: status::OK, used: 513 }, "a read on queue {index}");
}

/// Whether the long forms of the storms were asked for.
pub fn long() -> bool {
    std::env::var_os("TRELLIS_LONG").is_some()
}

/// `short` repeats, or `full` where the long forms were asked for.
pub fn repeats(short: usize, full: usize) -> usize {
    if long() { full } else { short }
}

/// Allocators keep some of what they were given.
const MORE_RSS_KIB: u64 = 8 << 10;
/// One line for each bad message is fine, one for each of a storm is not.
const LOG: usize = 128 << 10;
