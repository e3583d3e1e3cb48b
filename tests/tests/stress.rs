//! Guests do I/O at depth 32 on two queues each and check every byte, while operators on two monitors change everything
//! below and beside them: nodes are reopened, resized, added and removed, filters are put in and taken out, some of which
//! inject errors, keep what a guest writes over, or log it; bitmaps come and go; one disk is a quorum of files, one of which
//! comes and goes; exports come and go under their guests, guests leave in the middle.
//!
//! Ten seconds, or two minutes with `TRELLIS_LONG`, or as many minutes as `TRELLIS_MINUTES` says; `TRELLIS_SEED` chooses
//! another sequence.
#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]
#![expect(clippy::cast_possible_truncation, reason = "a test's numbers are small")]

use std::net::Shutdown;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use trellis_tests::qmp::Qmp;
use trellis_tests::scene::long;
use trellis_tests::vhost_user::client::{Client, DATA, Setup};
use trellis_tests::vhost_user::protocol::{blk_segment, kind, status};
use trellis_tests::vhost_user::ring::{readable, writable};
use trellis_tests::vhost_user::wire::pause;
use trellis_tests::watched::Watched;

#[test]
fn no_byte_is_lost_while_everything_changes() {
    let seed = std::env::var("TRELLIS_SEED").map_or(1, |seed| seed.parse().unwrap());
    let mut builder =
        Watched::builder().arg("--object", "iothread,id=shared").arg("--object", "throttle-group,id=unlimited");
    for file in FILES {
        builder = builder.image(file, DISK, ",discard=unmap");
    }
    let children = COPIES.iter().enumerate().map(|(number, copy)| format!(",children.{number}={copy}"));
    let quorum = "driver=quorum,rewrite-corrupted=on,vote-threshold=2,discard=unmap";
    builder = builder.arg("--blockdev", &format!("{quorum},node-name={QUORUM}{}", children.collect::<String>()));
    for disk in DISKS {
        builder = builder.export(disk, disk, EXPORT);
    }
    let mut server = builder.start();
    let stage = Stage::of(&server);
    // Threads and pools that a first client makes the server keep are no leak.
    let mut shadows: Vec<_> = DISKS.iter().map(|_| Shadow::new()).collect();
    stage.play(&mut shadows, Random(seed ^ 0x5eed), Duration::from_secs(1));
    let before = settled_fds(&server);
    let memory = server.rss_anon_kib();
    let done = stage.play(&mut shadows, Random(seed), length());
    eprintln!("seed {seed}, {:?}: {done:?}", length());
    assert!(done.rounds > 100 && done.changes > 100 && done.filters > 20, "hardly anything happened: {done:?}");
    assert!(
        done.copies > 5 && done.bitmaps > 5 && done.snapshots > 5 && done.logs > 5,
        "something never happened: {done:?}"
    );
    assert!(done.errors > 0, "no injected error reached a guest: {done:?}");
    // Takes the events that wait for this client; the server watches for room in its socket until then.
    server.qmp("query-version", &json!({}));
    let after = settled_fds(&server);
    assert!(after <= before, "{after} descriptors where there were {before}");
    let more = server.rss_anon_kib().saturating_sub(memory);
    assert!(more < MORE_KIB, "{more} KiB more than in the beginning");
    for (disk, shadow) in DISKS.iter().zip(&mut shadows) {
        let mut guest = Guest::new(&stage, disk, shadow, Random(seed));
        guest.read_everything();
    }
    server.qmp("quit", &json!({}));
    let ended = server.ends_within(Duration::from_secs(20)).expect("it ends");
    assert!(ended.success(), "{ended}: {}", server.log());
}

/// What all players share.
struct Stage {
    directory: PathBuf,
    /// Held by a guest while it connects, and by the operator while the export is away.
    doors: Vec<Mutex<()>>,
}

/// What has happened.
#[derive(Clone, Copy, Debug, Default)]
struct Done {
    rounds: u64,
    departures: u64,
    /// Requests that failed, as injected.
    errors: u64,
    changes: u64,
    /// Filters that were put in and taken out; of them those that kept what was written over, and those that logged it.
    filters: u64,
    snapshots: u64,
    logs: u64,
    /// Bitmaps that came and went, and copies of the quorum.
    bitmaps: u64,
    copies: u64,
}

impl Stage {
    fn of(server: &Watched) -> Self {
        Self { directory: server.dir().to_owned(), doors: DISKS.iter().map(|_| Mutex::new(())).collect() }
    }

    fn play(&self, shadows: &mut [Shadow], mut random: Random, time: Duration) -> Done {
        let end = Instant::now() + time;
        std::thread::scope(|scope| {
            let guests: Vec<_> = shadows
                .iter_mut()
                .zip(DISKS)
                .map(|(shadow, disk)| {
                    let random = Random(random.next());
                    scope.spawn(move || Guest::new(self, disk, shadow, random).stay_until(end))
                })
                .collect();
            let second = Random(random.next());
            let plumber = scope.spawn(move || {
                let mut plumber = Plumber(Operator::new(self, second));
                plumber.work_until(end);
                plumber.0.done
            });
            let mut operator = Operator::new(self, Random(random.next()));
            operator.work_until(end);
            let Done { filters, snapshots, logs, .. } = plumber.join().expect("the second operator is content");
            let mut done = Done { filters, snapshots, logs, ..operator.done };
            for guest in guests {
                let guest = guest.join().expect("the guest is content");
                done.rounds += guest.rounds;
                done.departures += guest.departures;
                done.errors += guest.errors;
            }
            done
        })
    }

    fn path(&self, name: &str, extension: &str) -> PathBuf {
        self.directory.join(name).with_extension(extension)
    }
}

/// One guest after the other on one disk.
struct Guest<'s> {
    stage: &'s Stage,
    disk: &'static str,
    shadow: &'s mut Shadow,
    random: Random,
    client: Client,
    errors: u64,
}

/// A request on its way.
struct Pending {
    block: u64,
    kind: u32,
    generation: u64,
}

impl<'s> Guest<'s> {
    fn new(stage: &'s Stage, disk: &'static str, shadow: &'s mut Shadow, random: Random) -> Self {
        let client = connect(stage, disk);
        Self { stage, disk, shadow, random, client, errors: 0 }
    }

    fn stay_until(mut self, end: Instant) -> Done {
        let mut done = Done::default();
        while Instant::now() < end {
            let leaves = self.random.below(60) == 0;
            if leaves || !self.round() {
                if leaves {
                    self.leave_in_the_middle();
                }
                done.departures += 1;
                self.client = connect(self.stage, self.disk);
            }
            done.rounds += 1;
        }
        done.errors = self.errors;
        done
    }

    /// A batch of requests that touch no block twice. False where the server has hung up meanwhile.
    fn round(&mut self) -> bool {
        let queue = self.random.below(2) as u16;
        let mut pending = self.submit(queue);
        while pending.iter().any(Option::is_some) {
            let Some(head) = self.next_head(queue) else {
                pending.iter().flatten().for_each(|request| self.shadow.maybe(request));
                return false;
            };
            let slot = head as usize / 3;
            let request = pending[slot].take().expect("each request comes back once");
            self.check(slot as u64, &request);
        }
        true
    }

    fn leave_in_the_middle(&mut self) {
        let queue = self.random.below(2) as u16;
        let pending = self.submit(queue);
        pending.iter().flatten().for_each(|request| self.shadow.maybe(request));
        self.client.wire().stream().shutdown(Shutdown::Both).unwrap();
    }

    fn submit(&mut self, queue: u16) -> Vec<Option<Pending>> {
        let (start, stride) = (self.random.below(BLOCKS), 2 * self.random.below(BLOCKS / 2) + 1);
        let requests: Vec<_> =
            (0..DEPTH).map(|slot| Some(self.prepare(queue, slot, (start + slot * stride) % BLOCKS))).collect();
        let heads: Vec<_> = (0..DEPTH).map(|slot| 3 * slot as u16).collect();
        self.client.queue(queue).ring.publish_all(&heads);
        self.client.kick(queue);
        requests
    }

    fn prepare(&mut self, queue: u16, slot: u64, block: u64) -> Pending {
        let (data, sector) = (DATA + slot * BLOCK, block * BLOCK / 512);
        let (kind, generation) = match self.random.below(16) {
            0..=5 => (kind::IN, 0),
            6..=12 => (kind::OUT, self.shadow.next_generation()),
            13 => (kind::WRITE_ZEROES, 0),
            14 => (kind::DISCARD, 0),
            _ => (kind::FLUSH, 0),
        };
        let memory = self.client.memory();
        let buffer = match kind {
            kind::IN => {
                memory.fill(data, BLOCK as usize, 0x5a);
                vec![writable(data, BLOCK as u32)]
            }
            kind::OUT => {
                memory.write(data, &stamp(block, generation));
                vec![readable(data, BLOCK as u32)]
            }
            kind::FLUSH => Vec::new(),
            _ => {
                memory.write(data, &blk_segment(sector, (BLOCK / 512) as u32, 0));
                vec![readable(data, 16)]
            }
        };
        let chain = self.client.chain(slot, kind, sector, &buffer);
        self.client.queue(queue).ring.write_chain(3 * slot as u16, &chain);
        Pending { block, kind, generation }
    }

    /// `None` where the server has hung up.
    fn next_head(&mut self, queue: u16) -> Option<u32> {
        let hang = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(used) = self.client.used_within(queue, Duration::from_millis(200)) {
                return Some(used.head);
            }
            if self.client.wire().closes_within(Duration::from_millis(1), drop) {
                // What came before the end counts.
                return self.client.queue(queue).ring.take_used().map(|used| used.head);
            }
            assert!(Instant::now() < hang, "queue {queue} of {} hangs", self.disk);
        }
    }

    fn check(&mut self, slot: u64, request: &Pending) {
        let said = self.client.memory().byte(trellis_tests::vhost_user::client::slot(slot).status);
        if said == status::IOERR {
            // Injected: it may have happened, or not.
            self.errors += 1;
            return self.shadow.maybe(request);
        }
        assert_eq!(said, status::OK, "kind {} of block {} on {}", request.kind, request.block, self.disk);
        if request.kind == kind::IN {
            let bytes = self.client.memory().read(DATA + slot * BLOCK, BLOCK as usize);
            self.shadow.check(self.disk, request.block, &bytes);
        } else {
            self.shadow.did(request);
        }
    }

    fn read_everything(&mut self) {
        for block in 0..BLOCKS {
            let (done, bytes) = self.client.read(0, block * BLOCK / 512, BLOCK as usize);
            assert_eq!(done.status, status::OK);
            self.shadow.check(self.disk, block, &bytes);
        }
    }
}

fn connect(stage: &Stage, disk: &str) -> Client {
    let index = DISKS.iter().position(|other| *other == disk).unwrap();
    let _door = stage.doors[index].lock().unwrap();
    Client::start(&stage.path(disk, "sock"), &Setup { queues: 2, ..Setup::default() })
}

/// What each block may hold: generations, 0 for zeroes.
struct Shadow {
    blocks: Vec<Vec<u64>>,
    last: u64,
}

impl Shadow {
    fn new() -> Self {
        Self { blocks: vec![vec![0]; BLOCKS as usize], last: 0 }
    }

    fn next_generation(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    fn did(&mut self, request: &Pending) {
        match request.kind {
            kind::OUT | kind::WRITE_ZEROES => self.blocks[request.block as usize] = vec![request.generation],
            kind::DISCARD => self.maybe(request),
            _ => {}
        }
    }

    /// It was done, or it was not.
    fn maybe(&mut self, request: &Pending) {
        if !matches!(request.kind, kind::IN | kind::FLUSH) {
            self.blocks[request.block as usize].push(request.generation);
        }
    }

    fn check(&mut self, disk: &str, block: u64, bytes: &[u8]) {
        let may = &mut self.blocks[block as usize];
        let is = may.iter().copied().find(|generation| bytes == stamp(block, *generation));
        let first = u128::from_le_bytes(bytes[..16].try_into().unwrap());
        *may = vec![is.unwrap_or_else(|| panic!("block {block} of {disk} is {first:#x}, may be of {may:?}"))];
    }
}

/// A block that says where and when it was written.
fn stamp(block: u64, generation: u64) -> Vec<u8> {
    let word = if generation == 0 { 0 } else { u128::from(block) << 64 | u128::from(generation) };
    word.to_le_bytes().repeat(BLOCK as usize / 16)
}

/// Changes whatever can be changed.
struct Operator<'s> {
    stage: &'s Stage,
    monitor: Qmp,
    random: Random,
    done: Done,
}

impl<'s> Operator<'s> {
    fn new(stage: &'s Stage, random: Random) -> Self {
        Self { stage, monitor: Qmp::connect(&stage.directory.join("control.sock")), random, done: Done::default() }
    }

    fn work_until(&mut self, end: Instant) {
        while Instant::now() < end {
            let index = self.random.below(DISKS.len() as u64) as usize;
            let disk = DISKS[index];
            match self.random.below(13) {
                0..=3 => self.reopen(disk),
                4..=5 if disk == QUORUM => self.copy_goes_and_comes(),
                4..=5 => self.resize(disk),
                10..=12 => self.bitmap(disk),
                6 => self.refusals(disk),
                7 => self.add_and_remove(),
                8 => self.move_export(index),
                _ => drop(self.ask("query-named-block-nodes", &json!({}))),
            }
            self.done.changes += 1;
            pause(Duration::from_millis(self.random.below(5)));
        }
    }

    /// It comes back as it was, while the guest has gone on: two of three copies are right.
    fn copy_goes_and_comes(&mut self) {
        let [.., last] = COPIES;
        self.ask("x-blockdev-change", &json!({ "parent": QUORUM, "child": format!("children.{}", COPIES.len() - 1) }));
        pause(Duration::from_millis(self.random.below(5)));
        self.ask("x-blockdev-change", &json!({ "parent": QUORUM, "node": last }));
        self.done.copies += 1;
    }

    /// Each write is noted in it, for a while.
    fn bitmap(&mut self, disk: &str) {
        let bitmap = json!({ "node": disk, "name": "stress" });
        let mut made = bitmap.clone();
        made["granularity"] = json!(512_u64 << self.random.below(8));
        self.ask("block-dirty-bitmap-add", &made);
        pause(Duration::from_millis(self.random.below(5)));
        let between = ["block-dirty-bitmap-clear", "block-dirty-bitmap-disable", "query-named-block-nodes"];
        let between = between[self.random.below(3) as usize];
        let arguments = if between.starts_with("query") { json!({}) } else { bitmap.clone() };
        self.ask(between, &arguments);
        self.ask("block-dirty-bitmap-remove", &bitmap);
        self.done.bitmaps += 1;
    }

    /// The node is drained under its guest.
    fn reopen(&mut self, disk: &str) {
        let disk = if disk == QUORUM { COPIES[self.random.below(COPIES.len() as u64) as usize] } else { disk };
        let direct = self.random.below(2) == 0;
        let zeroes = ["off", "on", "unmap"][self.random.below(3) as usize];
        let options = json!({ "driver": "file", "node-name": disk, "filename": self.stage.path(disk, "img"),
            "discard": "unmap", "cache": { "direct": direct }, "detect-zeroes": zeroes });
        self.ask("blockdev-reopen", &json!({ "options": [options] }));
    }

    /// Never below what the guest uses. Not while what is written over is kept.
    fn resize(&mut self, disk: &str) {
        let size = DISK + self.random.below(64) * 4096;
        let arguments = json!({ "node-name": disk, "size": size });
        let reply = self.monitor.ask(&json!({ "execute": "block_resize", "arguments": arguments }));
        let kept = reply["error"]["desc"]
            .as_str()
            .is_some_and(|desc| desc.starts_with("Permission conflict") || desc.starts_with("The size may not change"));
        assert!(kept || reply.get("return").is_some(), "block_resize {arguments}: {reply}");
    }

    fn refusals(&mut self, disk: &str) {
        let read_only = json!({ "driver": "file", "node-name": disk, "filename": self.stage.path(disk, "img"),
            "read-only": true });
        self.refused("blockdev-reopen", &json!({ "options": [read_only] }));
        self.refused("blockdev-del", &json!({ "node-name": disk }));
        self.refused("object-del", &json!({ "id": "shared" }));
        self.refused("block-export-add", &add(self.stage, disk, disk, "other"));
    }

    fn add_and_remove(&mut self) {
        let node = json!({ "driver": "null-co", "node-name": "extra", "size": 1 << 20 });
        self.ask("blockdev-add", &node);
        self.ask("object-add", &json!({ "qom-type": "iothread", "id": "brief" }));
        let mut export = add(self.stage, "extra", "extra", "extra");
        export["iothread"] = "brief".into();
        self.ask("block-export-add", &export);
        let socket = self.stage.path("extra", "sock");
        let visitor = (self.random.below(2) == 0).then(|| Client::start(&socket, &Setup::default()));
        self.ask("block-export-del", &json!({ "id": "extra", "mode": "hard" }));
        drop(visitor);
        self.ask("object-del", &json!({ "id": "brief" }));
        self.ask("blockdev-del", &json!({ "node-name": "extra" }));
    }

    /// The guest is thrown out, and finds the export again.
    fn move_export(&mut self, index: usize) {
        let stage = self.stage;
        let _door = stage.doors[index].lock().unwrap();
        self.ask("block-export-del", &json!({ "id": DISKS[index], "mode": "hard" }));
        let export = add(stage, DISKS[index], DISKS[index], DISKS[index]);
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            let reply = self.monitor.ask(&json!({ "execute": "block-export-add", "arguments": export }));
            // A filter that keeps what is written over bears no writer beside it; it is on its way out.
            let beside = reply["error"]["desc"].as_str().is_some_and(|desc| desc.contains("not shared by node"));
            if !beside || Instant::now() > until {
                assert!(reply.get("return").is_some(), "block-export-add {export}: {reply}");
                return;
            }
            pause(Duration::from_millis(1));
        }
    }

    fn ask(&mut self, command: &str, arguments: &Value) -> Value {
        let reply = self.monitor.ask(&json!({ "execute": command, "arguments": arguments }));
        reply.get("return").unwrap_or_else(|| panic!("{command} {arguments}: {reply}")).clone()
    }

    fn refused(&mut self, command: &str, arguments: &Value) {
        let reply = self.monitor.ask(&json!({ "execute": command, "arguments": arguments }));
        assert!(reply.get("error").is_some(), "{command} {arguments}: {reply}");
    }
}

/// Puts filters in above the nodes that exports serve, and takes them out. The other operator may have moved the export
/// meanwhile, so that a command is refused: then the filter goes unused.
struct Plumber<'s>(Operator<'s>);

impl Plumber<'_> {
    fn work_until(&mut self, end: Instant) {
        while Instant::now() < end {
            let disk = DISKS[self.0.random.below(DISKS.len() as u64) as usize];
            let height = 1 + self.0.random.below(3);
            self.plumb(disk, height);
        }
    }

    /// Some filters above each other, for a while.
    fn plumb(&mut self, disk: &str, height: u64) {
        let mut below = vec![disk.to_owned()];
        for level in 0..height {
            let name = format!("{disk}-filter{level}");
            let top = below.last().unwrap().clone();
            let filter = self.filter(&name, &top);
            let reply = self.0.monitor.ask(&json!({ "execute": "blockdev-add", "arguments": filter }));
            if is_in_the_way(&reply) {
                break;
            }
            assert!(reply.get("return").is_some(), "{filter}: {reply}");
            self.lead(disk, &name);
            self.0.done.filters += 1;
            self.0.done.snapshots += u64::from(filter["driver"] == "copy-before-write");
            self.0.done.logs += u64::from(filter["driver"] == "blklogwrites");
            below.push(name);
        }
        pause(Duration::from_millis(self.0.random.below(10)));
        while let Some(filter) = below.pop().filter(|_| !below.is_empty()) {
            let next = below.last().unwrap().clone();
            self.lead(disk, &next);
            let gone = self.flushing("blockdev-del", &json!({ "node-name": filter }));
            assert!(gone.get("return").is_some(), "{filter}: {gone}");
        }
    }

    fn filter(&mut self, name: &str, below: &str) -> Value {
        let errno = 5;
        let event = ["read_aio", "write_aio", "flush_to_disk"][self.0.random.below(3) as usize];
        let rule = json!([{ "event": event, "errno": errno, "once": true }]);
        let nowhere = json!({ "driver": "null-co", "size": 1_u64 << 40, "read-zeroes": true });
        match self.0.random.below(8) {
            5 => json!({ "driver": "copy-before-write", "node-name": name, "file": below, "target": nowhere,
                "on-cbw-error": "break-snapshot", "discard": "unmap" }),
            6 => json!({ "driver": "blklogwrites", "node-name": name, "file": below, "log": nowhere }),
            0 => json!({ "driver": "throttle", "node-name": name, "throttle-group": "unlimited", "file": below }),
            1 => json!({ "driver": "copy-on-read", "node-name": name, "file": below }),
            2 => json!({ "driver": "raw", "node-name": name, "file": below, "discard": "unmap" }),
            3 => json!({ "driver": "blkdebug", "node-name": name, "image": below, "discard": "unmap" }),
            _ => json!({ "driver": "blkdebug", "node-name": name, "image": below, "inject-error": rule }),
        }
    }

    /// Alone or in a transaction.
    fn lead(&mut self, disk: &str, to: &str) {
        let replace = json!({ "parent-type": "export", "export-id": disk, "new-child": to });
        let (command, arguments) = if self.0.random.below(4) == 0 {
            let action = json!({ "type": "x-blockdev-replace", "data": replace });
            ("transaction", json!({ "actions": [action] }))
        } else {
            ("x-blockdev-replace", replace)
        };
        let reply = self.flushing(command, &arguments);
        let desc = reply["error"]["desc"].as_str().unwrap_or_default();
        let moved =
            desc.contains(&format!("Export '{disk}'")) || desc.contains("was removed while this command waited");
        let is_done = moved || is_in_the_way(&reply) || reply.get("return").is_some();
        assert!(is_done, "{command} {arguments}: {reply}");
    }
}

/// The other operator resizes just then what a filter would not have resized, or has moved the export away from under it,
/// to where it writes beside it.
fn is_in_the_way(reply: &Value) -> bool {
    let desc = reply["error"]["desc"].as_str().unwrap_or_default();
    desc.contains("'resize' is used by block_resize")
        || desc.starts_with("The size may not change")
        || (desc.contains("'write' is used by export") && desc.contains("not shared by node"))
}

impl Plumber<'_> {
    /// A command that flushes what was written, where an injected error may meet it: then nothing has changed, and it
    /// works the next time.
    fn flushing(&mut self, command: &str, arguments: &Value) -> Value {
        let mut left = 10;
        loop {
            let reply = self.0.monitor.ask(&json!({ "execute": command, "arguments": arguments }));
            let failed = reply["error"]["desc"].as_str().is_some_and(|desc| desc.starts_with("Could not flush"));
            if !failed || left == 0 {
                return reply;
            }
            left -= 1;
        }
    }
}

fn length() -> Duration {
    let minutes = std::env::var("TRELLIS_MINUTES").ok().map(|minutes| minutes.parse::<u64>().unwrap() * 60);
    Duration::from_secs(minutes.unwrap_or(if long() { 120 } else { 10 }))
}

fn add(stage: &Stage, id: &str, node: &str, socket: &str) -> Value {
    json!({ "type": "vhost-user-blk", "id": id, "node-name": node, "writable": true, "num-queues": 2,
        "iothread": "shared", "addr": { "type": "unix", "path": stage.path(socket, "sock") } })
}

/// Descriptors once they have stayed the same for half a second: for a moment after a guest's end there are fewer, until the
/// session for the next one is there.
fn settled_fds(server: &Watched) -> usize {
    let (mut count, mut since) = (server.fds(), Instant::now());
    let end = since + Duration::from_secs(5);
    while since.elapsed() < Duration::from_millis(500) && Instant::now() < end {
        pause(Duration::from_millis(20));
        let now = server.fds();
        if now != count {
            (count, since) = (now, Instant::now());
        }
    }
    count
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 16) % end
    }
}

const DISKS: [&str; 4] = ["d0", "d1", "d2", QUORUM];
/// Three copies of the last disk.
const QUORUM: &str = "q";
const COPIES: [&str; 3] = ["q0", "q1", "q2"];
const FILES: [&str; 6] = ["d0", "d1", "d2", "q0", "q1", "q2"];
const EXPORT: &str = ",writable=on,num-queues=2,iothread=shared";
const DISK: u64 = 4 << 20;
const BLOCK: u64 = 4096;
const BLOCKS: u64 = DISK / BLOCK;
const DEPTH: u64 = 32;
/// Allocators keep some of what they were given.
const MORE_KIB: u64 = 16 << 10;
