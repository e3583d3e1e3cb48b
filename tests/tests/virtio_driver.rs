//! A second virtio-blk client, `virtio-driver`, with random requests and a shadow copy of the whole disk.
//!
//! Every sector that is written carries its own number and a generation, so a sector that ends up in the wrong place, or is
//! older than it may be, names itself. Requests in flight never overlap unless both read; then the shadow knows for every
//! sector what it may hold: one generation, or zeroes, or after a discard either of them. With two queues one thread feeds
//! both, so what one queue was told is read back through the other.
//!
//! The server is `trellisd` beside this test, or the path in `TRELLIS_SERVER`. `TRELLIS_SEED` chooses another sequence.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::env;
use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::json;
use tempfile::TempDir;
use trellis_bench::client::load::Random;
use trellis_bench::client::{Connection, Request, Shape, wait_any};
use trellis_bench::server::{Program, Server, Threads, export, export_path, option};
use virtio_driver::VirtioBlkFeatureFlags as Feature;

#[test]
fn one_queue_keeps_what_it_was_told() {
    Case { queues: 1, ..Case::RAW }.run();
}

#[test]
fn two_queues_see_what_the_other_was_told() {
    Case::RAW.run();
}

#[test]
fn two_queues_without_the_page_cache() {
    Case { direct: true, ..Case::RAW }.run();
}

#[test]
fn one_queue_on_a_qcow2_image() {
    Case { queues: 1, image: Image::Qcow2("cluster_size=4096,refcount_bits=1"), ..Case::RAW }.run();
}

#[test]
fn four_queues_on_a_qcow2_image() {
    Case { queues: 4, image: Image::Qcow2("extended_l2=on"), ..Case::RAW }.run();
}

/// Two IOThreads drive one node.
#[test]
fn two_threads_on_a_qcow2_image() {
    for options in ["cluster_size=512", "cluster_size=64K", "cluster_size=2M,extended_l2=on"] {
        Case { threads: Threads::Split, image: Image::Qcow2(options), ..Case::RAW }.run();
    }
}

#[test]
fn two_threads_on_a_qcow2_image_without_the_page_cache() {
    Case { direct: true, threads: Threads::Split, image: Image::Qcow2("cluster_size=4096"), ..Case::RAW }.run();
}

/// The disk becomes the end of a chain of twenty images while it is used.
#[test]
fn snapshots_are_taken_under_load() {
    Case { threads: Threads::Split, image: Image::Qcow2("cluster_size=64K"), snapshots: 20, ..Case::RAW }.run();
}

#[test]
fn the_shadow_notices_every_kind_of_wrong_sector() {
    let mut shadow = Shadow::new();
    shadow.wrote(7, 3);
    assert_eq!(shadow.check(7, &stamp(7, 3)), Ok(()));
    assert!(shadow.check(7, &stamp(7, 2)).unwrap_err().contains("generation 2"), "an old write came back");
    assert!(shadow.check(7, &stamp(8, 3)).unwrap_err().contains("sector 8"), "another sector's data");
    assert!(shadow.check(7, &[0; SECTOR]).is_err(), "a lost write");
    let mut torn = stamp(7, 3);
    torn[500] ^= 1;
    assert!(shadow.check(7, &torn).is_err(), "one bit");
    shadow.discarded(7);
    assert_eq!(shadow.check(7, &[0; SECTOR]), Ok(()));
    assert!(shadow.check(7, &stamp(7, 3)).is_err(), "once it reads as zeroes it stays so");
    assert!(shadow.check(9, &stamp(9, 1)).is_err(), "never written");
}

struct Case {
    queues: usize,
    direct: bool,
    threads: Threads,
    image: Image,
    /// Taken while requests are under way.
    snapshots: u64,
}

#[derive(Clone, Copy)]
enum Image {
    /// The disk's bytes as they are.
    Raw,
    /// A qcow2 image that `qemu-img create` makes with these options.
    Qcow2(&'static str),
}

impl Image {
    fn driver(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2(_) => "qcow2",
        }
    }

    fn make(self, image: &Path) {
        match self {
            Self::Raw => File::create(image).unwrap().set_len(DISK as u64).unwrap(),
            Self::Qcow2(options) => {
                let size = DISK.to_string();
                qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, image.to_str().unwrap(), &size]);
            }
        }
    }
}

fn qemu_img(arguments: &[&str]) {
    let output = Command::new("qemu-img").args(arguments).output().expect("qemu-img is installed");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {arguments:?}: {}{said}", String::from_utf8_lossy(&output.stdout));
}

impl Case {
    const RAW: Self = Self { queues: 2, direct: false, threads: Threads::Shared, image: Image::Raw, snapshots: 0 };

    fn run(&self) {
        let seed = env::var("TRELLIS_SEED").map_or(1, |seed| seed.parse().unwrap());
        let directory = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let image = directory.path().join("disk.img");
        self.image.make(&image);
        let server = Server::start(&server_program(), |sockets| self.arguments(&image, sockets)).unwrap();
        let mut shadow = Shadow::new();
        let top = self.exercise(&server, directory.path(), &mut shadow, seed).unwrap_or(image);
        server.quit().unwrap();
        let top = top.to_str().unwrap();
        if let Image::Raw = self.image {
            shadow.check_file(Path::new(top), seed);
        } else {
            qemu_img(&["check", "-q", top]);
            let copy = directory.path().join("copy.raw");
            qemu_img(&["convert", "-O", "raw", top, copy.to_str().unwrap()]);
            shadow.check_file(&copy, seed);
        }
    }

    /// Gives the image that the disk ends with, if that is another one.
    fn exercise(&self, server: &Server, folder: &Path, shadow: &mut Shadow, seed: u64) -> Option<PathBuf> {
        let _watch = server.watch(Duration::from_secs(120));
        let shape = Shape { queues: self.queues, depth: DEPTH, buffer_len: MAX_TRANSFER };
        let connection = Connection::open(&export_path(server.directory(), "e"), shape).unwrap();
        let wanted = (Feature::DISCARD | Feature::WRITE_ZEROES | Feature::FLUSH).bits();
        assert_eq!(connection.features & wanted, wanted, "discard, write-zeroes and flush are offered");
        assert_eq!(connection.capacity, DISK as u64);
        let mut client = Client::new(connection, shadow, seed);
        let mut monitor = server.monitor(0, Duration::from_secs(60)).unwrap();
        let (mut base, mut top) = ("disk".to_owned(), None);
        for taken in 0..=self.snapshots {
            client.random_requests(REQUESTS * (taken + 1) / (self.snapshots + 1));
            if taken < self.snapshots {
                let (name, file) = (format!("s{taken}"), folder.join(format!("s{taken}.qcow2")));
                let arguments = json!({ "node-name": base, "snapshot-file": file, "snapshot-node-name": name });
                monitor.run("blockdev-snapshot-sync", arguments).unwrap();
                (base, top) = (name, Some(file));
            }
        }
        client.drain();
        client.read_everything();
        top
    }

    fn arguments(&self, image: &Path, sockets: &Path) -> Vec<String> {
        let direct = if self.direct { "on" } else { "off" };
        let common = format!("cache.direct={direct},discard=unmap");
        [
            self.threads.objects(),
            option("blockdev", &format!("file,node-name=file,filename={},aio=io_uring,{common}", image.display())),
            option("blockdev", &format!("{},node-name=disk,file=file,{common}", self.image.driver())),
            export(sockets, "e", "disk", self.queues, self.threads),
        ]
        .concat()
    }
}

/// The requests in flight, and what may be sent beside them.
struct Client<'a> {
    connection: Connection,
    shadow: &'a mut Shadow,
    random: Random,
    seed: u64,
    generation: u64,
    requests: u64,
    /// By queue and slot.
    pending: Vec<Vec<Option<Pending>>>,
}

#[derive(Clone, Debug)]
struct Pending {
    action: Action,
    sectors: Range<usize>,
    generation: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Read,
    Write,
    Discard,
    WriteZeroes,
    Flush,
}

impl<'a> Client<'a> {
    fn new(connection: Connection, shadow: &'a mut Shadow, seed: u64) -> Self {
        let pending = vec![vec![None; DEPTH as usize]; connection.queues.len()];
        Self { connection, shadow, random: Random::new(seed), seed, generation: 0, requests: 0, pending }
    }

    /// Until so many have been sent. Some are under way when this returns.
    fn random_requests(&mut self, until: u64) {
        while self.requests < until {
            for queue in 0..self.pending.len() {
                self.fill(queue);
            }
            self.take_answers();
        }
    }

    /// One pass over the whole disk, so that nothing stays unread.
    fn read_everything(&mut self) {
        for start in (0..SECTORS).step_by(MAX_SECTORS) {
            let pending = Pending { action: Action::Read, sectors: start..start + MAX_SECTORS, generation: 0 };
            self.submit(0, 0, pending);
            self.connection.queues[0].kick().unwrap();
            self.drain();
        }
    }

    fn drain(&mut self) {
        while self.pending.iter().flatten().any(Option::is_some) {
            self.take_answers();
        }
    }

    /// Gives the free slots of the queue something to do, as far as what is drawn does not touch busy sectors.
    fn fill(&mut self, queue: usize) {
        for slot in 0..DEPTH as usize {
            if self.pending[queue][slot].is_none()
                && let Some(pending) = self.next_request()
            {
                self.submit(queue, slot, pending);
            }
        }
        self.connection.queues[queue].kick().unwrap();
    }

    fn next_request(&mut self) -> Option<Pending> {
        let action = match self.random.below(100) {
            0..40 => Action::Read,
            40..80 => Action::Write,
            80..87 => Action::Discard,
            87..97 => Action::WriteZeroes,
            _ => return Some(Pending { action: Action::Flush, sectors: 0..0, generation: 0 }),
        };
        let len = 1 + self.below(MAX_SECTORS);
        let start = self.below(SECTORS - len + 1);
        self.generation += 1;
        let request = Pending { action, sectors: start..start + len, generation: self.generation };
        let busy = self.pending.iter().flatten().flatten().any(|other| other.conflicts_with(&request));
        (!busy).then_some(request)
    }

    fn submit(&mut self, queue: usize, slot: usize, pending: Pending) {
        let offset = (pending.sectors.start * SECTOR) as u64;
        let len = pending.sectors.len() * SECTOR;
        let place = slot * MAX_TRANSFER;
        let buffer = place..place + len;
        let target = &mut self.connection.queues[queue];
        let request = match pending.action {
            Action::Read => {
                // What an earlier request left here must not pass for an answer.
                target.store(place, &vec![0xEE; len]);
                Request::Read { offset, buffer }
            }
            Action::Write => {
                let data: Vec<u8> = pending.sectors.clone().flat_map(|n| stamp(n, pending.generation)).collect();
                target.store(place, &data);
                Request::Write { offset, buffer }
            }
            Action::Discard => Request::Discard { offset, len: len as u64 },
            Action::WriteZeroes => {
                Request::WriteZeroes { offset, len: len as u64, unmap: pending.generation.is_multiple_of(2) }
            }
            Action::Flush => Request::Flush,
        };
        target.submit(request, u32::try_from(slot).unwrap()).unwrap();
        self.pending[queue][slot] = Some(pending);
        self.requests += 1;
    }

    fn take_answers(&mut self) {
        let context = format!("seed {}, about request {}", self.seed, self.requests);
        assert!(wait_any(&mut self.connection.queues, ANSWER_LIMIT).unwrap(), "{context}: no answer in time");
        for queue in 0..self.pending.len() {
            let mut answers = Vec::new();
            self.connection.queues[queue].reap(&mut answers);
            for (slot, status) in answers {
                let pending = self.pending[queue][slot as usize].take().unwrap();
                assert_eq!(status, 0, "{context}: {pending:?} on queue {queue} failed");
                let outcome = self.conclude(queue, slot as usize, &pending);
                outcome.unwrap_or_else(|wrong| panic!("{context}: {pending:?} on queue {queue}: {wrong}"));
            }
        }
    }

    fn conclude(&mut self, queue: usize, slot: usize, pending: &Pending) -> Result<(), String> {
        let sectors = pending.sectors.clone();
        match pending.action {
            Action::Write => sectors.for_each(|n| self.shadow.wrote(n, pending.generation)),
            Action::WriteZeroes => sectors.for_each(|n| self.shadow.zeroed(n)),
            Action::Discard => sectors.for_each(|n| self.shadow.discarded(n)),
            Action::Flush => {}
            Action::Read => {
                let mut data = vec![0; sectors.len() * SECTOR];
                self.connection.queues[queue].load(slot * MAX_TRANSFER, &mut data);
                return sectors.zip(data.chunks(SECTOR)).try_for_each(|(n, bytes)| self.shadow.check(n, bytes));
            }
        }
        Ok(())
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.random.below(bound as u64)).unwrap()
    }
}

impl Pending {
    fn conflicts_with(&self, other: &Self) -> bool {
        let both_read = self.action == Action::Read && other.action == Action::Read;
        let overlap = self.sectors.start < other.sectors.end && other.sectors.start < self.sectors.end;
        overlap && !both_read
    }
}

/// What each sector may hold.
struct Shadow {
    sectors: Vec<Allowed>,
}

#[derive(Clone, Copy)]
struct Allowed {
    generation: Option<u64>,
    zeroes: bool,
}

impl Shadow {
    /// A disk of zeroes.
    fn new() -> Self {
        Self { sectors: vec![Allowed { generation: None, zeroes: true }; SECTORS] }
    }

    fn wrote(&mut self, sector: usize, generation: u64) {
        self.sectors[sector] = Allowed { generation: Some(generation), zeroes: false };
    }

    fn zeroed(&mut self, sector: usize) {
        self.sectors[sector] = Allowed { generation: None, zeroes: true };
    }

    fn discarded(&mut self, sector: usize) {
        self.sectors[sector].zeroes = true;
    }

    /// Compares, and remembers which of two allowed contents it was: a discarded sector may not change its mind.
    fn check(&mut self, sector: usize, bytes: &[u8]) -> Result<(), String> {
        let allowed = &mut self.sectors[sector];
        if allowed.zeroes && bytes.iter().all(|&byte| byte == 0) {
            allowed.generation = None;
            return Ok(());
        }
        if allowed.generation.is_some_and(|generation| bytes == stamp(sector, generation)) {
            allowed.zeroes = false;
            return Ok(());
        }
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let expected = allowed.generation.map_or("zeroes".to_owned(), |generation| format!("generation {generation}"));
        let or_zeroes = if allowed.zeroes { " or zeroes" } else { "" };
        let found = format!("begins with sector {} generation {}", word(0), word(8));
        Err(format!("sector {sector} should hold {expected}{or_zeroes} but {found}"))
    }

    /// After the server ended, the file itself must agree.
    fn check_file(&mut self, image: &Path, seed: u64) {
        let data = fs::read(image).unwrap();
        assert_eq!(data.len(), DISK, "seed {seed}: the disk changed its length");
        for (sector, bytes) in data.chunks(SECTOR).enumerate() {
            self.check(sector, bytes).unwrap_or_else(|wrong| panic!("seed {seed}: in the file: {wrong}"));
        }
    }
}

/// The content of a sector: its number and the generation of its write, again and again.
fn stamp(sector: usize, generation: u64) -> Vec<u8> {
    [(sector as u64).to_le_bytes(), generation.to_le_bytes()].concat().repeat(SECTOR / 16)
}

fn server_program() -> Program {
    let path = env::var_os("TRELLIS_SERVER").map_or_else(beside_the_test, PathBuf::from);
    assert!(
        path.exists(),
        "there is no server to test at {}: run `cargo build --bin trellisd` first, or put a path into TRELLIS_SERVER",
        path.display()
    );
    Program::new(path)
}

/// Test executables lie in `deps`, one below the programs.
fn beside_the_test() -> PathBuf {
    let test = env::current_exe().unwrap();
    test.parent().and_then(Path::parent).unwrap().join("trellisd")
}

const SECTOR: usize = 512;
const SECTORS: usize = 16 * 1024;
const DISK: usize = SECTORS * SECTOR;
/// Sectors of the longest request; divides `SECTORS`.
const MAX_SECTORS: usize = 256;
const MAX_TRANSFER: usize = MAX_SECTORS * SECTOR;
const DEPTH: u32 = 16;
/// For each case, before the last reading pass.
const REQUESTS: u64 = 8000;
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
