//! Two implementations work on one image in turn: ours and QEMU's. After each turn both have to see what was written, agree
//! on where everything is, and find the image in order. A third one, imago, reads what it knows.
//!
//! `TRELLIS_OPS` says how many operations (40000 if absent), `TRELLIS_SEED` which. A world that fails says its number, and
//! `TRELLIS_WORLD` runs that one alone.

use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::sync::Arc;

use block_core::base::{ByteRange, IoError};
use block_core::graph::{Graph, NodeId, Place, Preallocation, WriteFlags};
use block_core::pipeline::{Content, Status};
use block_core::port::{PORT, PortLane};
use block_core::rt::{Local, run_control};
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use serde_json::{Value, json};

use crate::bench::{READER, add, attach, enter, flush, range, read, reopen, with, write, writer};
use crate::peer::{KINDS, Kind, check, contents, create, file, node, run, work};
use crate::random::Random;

/// Operations of one turn at the most, and turns in a world.
const TURN: u64 = 300;
const TURNS: u64 = 8;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|value| value.parse().ok())
}

#[test]
fn two_implementations_see_the_same() {
    let (wanted, seed, one) =
        (number("TRELLIS_OPS").unwrap_or(40_000), number("TRELLIS_SEED").unwrap_or(1), number("TRELLIS_WORLD"));
    let mut done = Done::default();
    for number in one.unwrap_or(0).. {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut world = World::new(number, seed, dir.path());
        let what = format!("world {number} of seed {seed}: {}, depth {}", world.kind.options, world.depth);
        if one.is_some() || wanted > 100_000 && number % 100 == 0 {
            eprintln!("{what}; {done:?}");
        }
        let told = Told(what);
        for turn in 0..TURNS {
            world.turn(turn, &mut done);
        }
        drop(told);
        if one.is_some() || done.ours + done.theirs >= wanted {
            break;
        }
    }
    eprintln!("seed {seed}: {done:?}");
    assert!(
        one.is_some() || done.ours > wanted / 4 && done.theirs > wanted / 4 && done.extents > 0 && done.by_imago > 0
    );
}

/// Says which world it was, of a panic.
struct Told(String);

impl Drop for Told {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.0);
        }
    }
}

/// What was done.
#[derive(Debug, Default)]
struct Done {
    /// Operations of each.
    ours: u64,
    theirs: u64,
    resizes: u64,
    reopens: u64,
    /// Times that imago read all of an image.
    by_imago: u64,
    /// That both gave the same, and that lie in files below.
    extents: u64,
    offsets: u64,
}

/// An image, what it stands on, and what a reader has to see.
struct World {
    kind: Kind,
    /// Files below it.
    depth: u64,
    path: String,
    /// From the image down: what a node over each of them is.
    layers: Vec<Value>,
    shadow: Shadow,
    random: Random,
}

/// The bytes of the disk.
struct Shadow {
    bytes: Vec<u8>,
    /// Discarded: either what the shadow says, or zero.
    loose: Vec<bool>,
}

impl Shadow {
    fn set(&mut self, at: ByteRange, byte: u8) {
        let at = at.start() as usize..at.end() as usize;
        self.bytes[at.clone()].fill(byte);
        self.loose[at].fill(false);
    }

    fn discard(&mut self, at: ByteRange) {
        self.loose[at.start() as usize..at.end() as usize].fill(true);
    }

    fn resize(&mut self, size: u64) {
        self.bytes.resize(size as usize, 0);
        self.loose.resize(size as usize, false);
    }

    /// Somebody has seen this from `start` on: it has to be right, and what was open is decided.
    fn seen(&mut self, start: u64, found: &[u8], by: &str) {
        let start = start as usize;
        let (bytes, loose) = (&mut self.bytes[start..start + found.len()], &mut self.loose[start..start + found.len()]);
        if bytes != found {
            let open = |at: usize| loose[at] && found[at] == 0;
            let wrong = (0..found.len()).find(|at| bytes[*at] != found[*at] && !open(*at));
            if let Some(at) = wrong {
                panic!("{by} reads {:#x} at {:#x}, expected {:#x}", found[at], start + at, bytes[at]);
            }
            bytes.copy_from_slice(found);
        }
        loose.fill(false);
    }
}

impl World {
    fn new(number: u64, seed: u64, dir: &Path) -> Self {
        let mut random = Random((number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (seed << 32) | 1);
        (0..4).for_each(|_| _ = random.next());
        let kind = KINDS[(number % KINDS.len() as u64) as usize];
        let raw_data = kind.options.contains("raw");
        let depth = if raw_data { 0 } else { random.below(4) };
        let size = if kind.cluster > 1 << 20 { 9 << 20 } else { (1 << 20) + random.below(4096) * 512 };
        let mut layers = Vec::new();
        let mut below: Option<(String, &str)> = None;
        for layer in (0..depth).rev() {
            // The lowest is raw, and all of them have something everywhere.
            if below.is_none() {
                let base = dir.join("base").to_str().unwrap().to_owned();
                let bytes: Vec<u8> = (0..size + 4096).map(|at| (at / 512 % 253) as u8 | 1).collect();
                std::fs::write(&base, bytes).unwrap();
                layers.push(json!({ "driver": "raw", "node-name": "layer1", "file": file(&base) }));
                below = Some((base, "raw"));
                continue;
            }
            let other = [KINDS[0], KINDS[4], KINDS[6], KINDS[10]][random.below(4) as usize];
            let backing = below.as_ref().map(|(path, format)| (path.as_str(), *format));
            let path = create(dir, &format!("layer{layer}"), other, size, backing);
            work(&path, other, size, &mut random, 20);
            layers.push(node(&path, other, layers.last().cloned()));
            below = Some((path, "qcow2"));
        }
        let path = create(dir, "top", kind, size, below.as_ref().map(|(path, format)| (path.as_str(), *format)));
        layers.push(node(&path, kind, layers.last().cloned()));
        layers.reverse();
        let bytes = contents(&path);
        let loose = vec![false; bytes.len()];
        Self { kind, depth, path, layers, shadow: Shadow { bytes, loose }, random }
    }

    fn size(&self) -> u64 {
        self.shadow.bytes.len() as u64
    }

    fn turn(&mut self, turn: u64, done: &mut Done) {
        let steps = 1 + self.random.below(TURN);
        let changes_size = self.random.below(4) == 0;
        // The first two are one of each.
        let ours = if turn < 2 { turn == 0 } else { self.random.below(2) == 0 };
        let options = self.named();
        if ours {
            run_control(async |_| self.ours(&options, steps, changes_size, done).await);
            done.ours += steps;
        } else {
            self.theirs(steps);
            done.theirs += steps;
            if changes_size {
                // QEMU does not enlarge an image of version 2 that something lies below; and what it has cut off inside a
                // cluster comes back when it enlarges the image again (`resize --shrink` to 1M and back, clusters of 2M).
                let fixed = self.depth > 0 && self.kind.options.contains("0.10");
                let fixed = fixed || !self.size().is_multiple_of(self.kind.cluster);
                let size = if fixed { self.new_size().min(self.size()) } else { self.new_size() };
                run("qemu-img", &["resize", "-q", "--shrink", "-f", "qcow2", &self.path, &size.to_string()]);
                self.shadow.resize(size);
            }
        }
        done.resizes += u64::from(changes_size);
        check(&self.path);
        let by_them = self.map_of_theirs();
        let by_us = run_control(async |_| self.look(&options, ours).await);
        assert_eq!(
            by_us,
            by_them,
            "where everything is, ours and QEMU's; the turn was {}",
            if ours { "ours" } else { "QEMU's" }
        );
        done.extents += by_us.len() as u64;
        done.offsets += by_us.iter().filter(|extent| extent.offset.is_some()).count() as u64;
        if ours {
            let bytes = contents(&self.path);
            assert_eq!(bytes.len() as u64, self.size());
            self.shadow.seen(0, &bytes, "QEMU");
            done.by_imago += u64::from(self.read_by_imago());
        }
    }

    /// `false`: the image has what imago does not know.
    fn read_by_imago(&mut self) -> bool {
        let unknown = ["zstd", "extended_l2"];
        let options = self.kind.options;
        if self.depth > 1 || unknown.iter().any(|word| options.contains(word)) {
            return false;
        }
        let image = Qcow2::<File>::builder_path(&self.path).open(PermissiveImplicitOpenGate::default()).unwrap();
        let image = FormatAccess::new(image);
        assert_eq!(image.size(), self.size());
        let mut bytes = vec![0xee; self.shadow.bytes.len()];
        image.read(&mut bytes[..], 0).unwrap();
        self.shadow.seen(0, &bytes, "imago");
        true
    }

    fn new_size(&mut self) -> u64 {
        let size = (1 << 20) + self.random.below(4096) * 512;
        if self.random.below(2) == 0 { size.next_multiple_of(self.kind.cluster) } else { size }
    }

    /// The stack, each layer with a name.
    fn named(&self) -> Value {
        fn name(mut options: Value, number: usize) -> Value {
            options["node-name"] = format!("layer{number}").into();
            for child in ["file", "data-file"] {
                if options[child].is_object() {
                    options[child]["node-name"] = format!("{child}{number}").into();
                }
            }
            if options["backing"].is_object() {
                options["backing"] = name(options["backing"].take(), number + 1);
            }
            options
        }
        name(self.layers[0].clone(), 0)
    }

    fn at(&mut self) -> ByteRange {
        let size = self.size();
        let unit = if self.random.below(4) == 0 { 1 } else { 512 };
        let start = self.random.below(size) / unit * unit;
        let most = [512, 5000, 3 * self.kind.cluster.min(150_000), 300_000][self.random.below(4) as usize];
        let len = (1 + self.random.below(most)).next_multiple_of(unit);
        range(start, len.min(size - start))
    }

    /// A cluster that may be packed.
    fn cluster(&mut self) -> Option<ByteRange> {
        let (cluster, size) = (self.kind.cluster, self.size());
        let start = self.random.below(size) / cluster * cluster;
        (!self.kind.external && cluster < 1 << 20).then(|| range(start, cluster.min(size - start)))
    }

    fn pattern(&mut self) -> u8 {
        1 + self.random.below(250) as u8
    }

    /// A turn of ours, in one opening.
    async fn ours(&mut self, options: &Value, steps: u64, changes_size: bool, done: &mut Done) {
        let graph = Graph::new(Arc::new(|_| ()));
        let node = add(&graph, options.clone()).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        let lane = port.handle().lane(&Local::current());
        for _ in 0..steps {
            if self.random.below(60) == 0 {
                let more = json!({ "pass-discard-other": self.random.below(2) == 0 });
                reopen(&graph, &[with(Self::reopened(options), &more)]).await.unwrap();
                done.reopens += 1;
                continue;
            }
            self.step(&lane).await.unwrap();
        }
        drop(lane);
        port.detach(&mut graph.permit()).await;
        if changes_size {
            let size = self.new_size();
            graph.permit().resize(node, size, Preallocation::Off).await.unwrap();
            self.shadow.resize(size);
        }
        graph.permit().remove(node).await.unwrap();
    }

    /// The top as it is reopened: what it stands on is named.
    fn reopened(options: &Value) -> Value {
        let mut options = options.clone();
        for (child, name) in [("file", "file0"), ("data-file", "data-file0"), ("backing", "layer1")] {
            if options[child].is_object() {
                options[child] = name.into();
            }
        }
        options
    }

    async fn step(&mut self, lane: &PortLane) -> Result<(), IoError> {
        let (at, pattern) = (self.at(), self.pattern());
        match self.random.below(20) {
            0..7 => {
                write(lane, at.start(), &vec![pattern; at.len() as usize], WriteFlags::default()).await?;
                self.shadow.set(at, pattern);
            }
            7..10 => {
                let flags = WriteFlags { may_unmap: self.random.below(2) == 0, ..WriteFlags::default() };
                lane.write_zeroes(&enter(lane).await, at, flags).await?;
                self.shadow.set(at, 0);
            }
            10..12 => {
                lane.discard(&enter(lane).await, at).await?;
                self.shadow.discard(at);
            }
            12 => {
                let Some(at) = self.cluster() else { return Ok(()) };
                let flags = WriteFlags { compressed: true, ..WriteFlags::default() };
                write(lane, at.start(), &vec![pattern; at.len() as usize], flags).await?;
                self.shadow.set(at, pattern);
            }
            13 => flush(lane).await?,
            14..17 => {
                let Status { len, content, .. } = enter(lane).await.cx().child(PORT).status(at).await?;
                assert!(len > 0 && len <= at.len(), "{at:?}: status of {len} bytes");
                if matches!(content, Content::Zero | Content::Absent) {
                    self.shadow.seen(at.start(), &vec![0; len as usize], "our status");
                }
            }
            _ => self.shadow.seen(at.start(), &read(lane, at).await?, "ours"),
        }
        Ok(())
    }

    /// A turn of QEMU's. It packs first, in a process of its own (why: `peer::work`).
    fn theirs(&mut self, steps: u64) {
        let (mut packing, mut packed, mut commands) = (Vec::new(), Vec::new(), Vec::new());
        let mut later: Vec<(ByteRange, Option<u8>)> = Vec::new();
        for _ in 0..steps {
            let (at, pattern) = (self.at(), self.pattern());
            let (start, len) = (at.start(), at.len());
            let (command, becomes) = match self.random.below(20) {
                0..8 => (format!("write -P {pattern} {start} {len}"), Some(pattern)),
                8..10 => (format!("write -z {start} {len}"), Some(0)),
                10 => (format!("write -z -u {start} {len}"), Some(0)),
                11..13 => (format!("discard {start} {len}"), None),
                13 => {
                    if let Some(at) = self.cluster() {
                        packing.push(format!("write -c -P {pattern} {} {}", at.start(), at.len()));
                        packed.push((at, pattern));
                    }
                    continue;
                }
                14 => {
                    commands.push("flush".to_owned());
                    continue;
                }
                _ => {
                    commands.push(format!("read {start} {len}"));
                    continue;
                }
            };
            commands.push(command);
            later.push((at, becomes));
        }
        // QEMU does not pack over what is there.
        let outcomes = self.qemu_io(&packing);
        for ((at, pattern), well) in packed.into_iter().zip(outcomes) {
            if well {
                self.shadow.set(at, pattern);
            }
        }
        assert!(self.qemu_io(&commands).into_iter().all(|well| well), "QEMU fails: {commands:?}");
        for (at, becomes) in later {
            match becomes {
                Some(byte) => self.shadow.set(at, byte),
                None => self.shadow.discard(at),
            }
        }
    }

    /// Which commands went well, of those that say so.
    fn qemu_io(&self, commands: &[String]) -> Vec<bool> {
        if commands.is_empty() {
            return Vec::new();
        }
        let arguments = commands.iter().flat_map(|command| ["-c", command.as_str()]);
        let output = Command::new("timeout")
            .args(["60", "qemu-io", "-f", "qcow2", "-d", "unmap"])
            .args(arguments)
            .arg(&self.path)
            .output()
            .unwrap();
        assert!(output.status.code().is_some_and(|code| code < 2), "{output:?}");
        let said = String::from_utf8(output.stdout).unwrap();
        let well = |line: &str| {
            ["wrote ", "read ", "discard "].iter().any(|word| line.starts_with(word) && !line.contains("failed"))
        };
        said.lines().filter(|line| well(line) || line.contains("failed")).map(well).collect()
    }

    /// Reads everything, and says where it is.
    async fn look(&mut self, options: &Value, seen: bool) -> Vec<Piece> {
        let graph = Graph::new(Arc::new(|_| ()));
        let top = add(&graph, with(options.clone(), &json!({ "read-only": true }))).await.unwrap();
        let (mut ports, mut lanes) = (Vec::new(), Vec::new());
        for layer in 0..=self.depth {
            let node = graph.find(&format!("layer{layer}")).unwrap();
            let port = attach(&graph, node, READER).await.unwrap();
            lanes.push(port.handle().lane(&Local::current()));
            ports.push(port);
        }
        let size = self.size();
        assert_eq!(ports[0].geometry().size, size);
        if !seen {
            let bytes = read(&lanes[0], range(0, size)).await.unwrap();
            self.shadow.seen(0, &bytes, "ours");
        }
        let mut all = Vec::new();
        let mut left = Some(range(0, size));
        while let Some(at) = left {
            let piece = found(&lanes, at).await;
            self.agree(&lanes[0], piece).await;
            all.push(piece);
            left = at.split(piece.len).1;
        }
        lanes.clear();
        for port in ports {
            port.detach(&mut graph.permit()).await;
        }
        remove(&graph, top).await;
        joined(all)
    }

    /// What the pipeline says of the piece is the same, but that it knows of holes in files.
    async fn agree(&self, lane: &PortLane, piece: Piece) {
        let at = range(piece.start, piece.len);
        let pin = enter(lane).await;
        let status = pin.cx().child(PORT).status(at).await.unwrap();
        let fits = match status.content {
            Content::Data | Content::Encoded => piece.data && Some(u64::from(status.depth)) == piece.depth,
            Content::Zero => piece.depth == Some(u64::from(status.depth)),
            Content::Absent => !piece.data && piece.depth.is_none(),
        };
        assert!(fits, "{piece:?} is said to be {status:?}");
    }

    fn map_of_theirs(&self) -> Vec<Piece> {
        let said = run("qemu-img", &["map", "--output=json", "-f", "qcow2", &self.path]);
        let said: Vec<Value> = serde_json::from_str(&said).unwrap();
        let number = |value: &Value, name: &str| value[name].as_u64();
        let pieces = said.iter().map(|one| {
            let data = one["data"].as_bool().unwrap();
            let present = one["present"].as_bool().unwrap();
            assert!(data || one["zero"] == true, "{one}");
            Piece {
                start: number(one, "start").unwrap(),
                len: number(one, "length").unwrap(),
                data,
                depth: number(one, "depth").filter(|_| present),
                offset: number(one, "offset").filter(|_| data),
            }
        });
        joined(pieces.collect())
    }
}

async fn remove(graph: &Rc<Graph>, node: NodeId) {
    graph.permit().remove(node).await.unwrap();
}

/// Where the first bytes of a range are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    start: u64,
    len: u64,
    /// Else they read as zeroes.
    data: bool,
    /// Of the layer that says so. `None`: none does.
    depth: Option<u64>,
    /// In that layer's file, unless they are compressed.
    offset: Option<u64>,
}

/// Asks layer by layer.
async fn found(lanes: &[Rc<PortLane>], at: ByteRange) -> Piece {
    let mut at = at;
    for (depth, lane) in (0..).zip(lanes) {
        let pin = enter(lane).await;
        let size = lane.geometry(&pin).size;
        let Some(inside) = ByteRange::whole(size).intersection(at).filter(|inside| inside.start() == at.start()) else {
            break;
        };
        let extent = lane.map(&pin, inside).await.unwrap();
        at = inside.split(extent.len).0;
        let piece = |data, depth, offset| Piece { start: at.start(), len: at.len(), data, depth, offset };
        match extent.place {
            Place::Data { offset, .. } => return piece(true, Some(depth), Some(offset)),
            Place::Encoded => return piece(true, Some(depth), None),
            Place::Zero { allocated: true } => return piece(false, Some(depth), None),
            // The raw image, which is its file.
            Place::Passed(_) | Place::Here => return piece(true, Some(depth), Some(at.start())),
            Place::Zero { allocated: false } => break,
            Place::Below(_) => {}
        }
    }
    Piece { start: at.start(), len: at.len(), data: false, depth: None, offset: None }
}

/// Neighbours that say the same are one piece.
fn joined(pieces: Vec<Piece>) -> Vec<Piece> {
    let mut all: Vec<Piece> = Vec::new();
    for piece in pieces {
        match all.last_mut() {
            Some(last)
                if (last.data, last.depth) == (piece.data, piece.depth)
                    && last.offset.map(|offset| offset + last.len) == piece.offset =>
            {
                last.len += piece.len;
            }
            _ => all.push(piece),
        }
    }
    all
}
