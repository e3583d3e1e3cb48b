//! `qcow2`: an image of 64 KiB clusters in `/dev/shm`, served by both servers in turn: reads, writes in place, writes that
//! allocate, two queues; and what opening an image of 1 TiB costs.

use std::io;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;
use tempfile::TempDir;
use trellis_bench::client::load::{self, Moment, Outcome, Pattern, STALL, Wait, Workload};
use trellis_bench::process::CpuUse;
use trellis_bench::server::{Program, Server, Threads, export, export_path, option};

use super::{Pair, least, median, order, verdict};

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Rounds of each server
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of each visit; a visit that allocates has a third of it
    #[arg(long, default_value_t = 1.5)]
    seconds: f64,
    /// Only cells whose names contain this
    #[arg(long, value_name = "WORD")]
    only: Option<String>,
}

impl Arguments {
    fn want(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|word| name.contains(word.as_str()))
    }
}

pub(crate) fn run(pair: &Pair, arguments: &Arguments) -> io::Result<()> {
    let measured = measure(pair, arguments, CELLS);
    if arguments.want("open") {
        println!("\n{OPEN_HEADINGS}");
        open(pair, arguments.rounds)?;
    }
    measured
}

/// Measures the cells that are wanted, and prints a table of them.
pub(crate) fn measure(pair: &Pair, arguments: &Arguments, cells: &[Cell]) -> io::Result<()> {
    println!("{}", pair.introduce()?);
    println!("{HEADINGS}");
    let mut failed = Vec::new();
    for cell in cells.iter().filter(|cell| arguments.want(cell.name)) {
        match cell.measure(pair, arguments) {
            Ok(line) => println!("{line}"),
            Err(error) => {
                println!("| {} | not measured: {error} |", cell.name);
                failed.push(cell.name);
            }
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(io::Error::other(format!("not measured: {}", failed.join(", ")))) }
}

/// What is asked, and what is aimed at.
pub(crate) struct Cell {
    pub(crate) name: &'static str,
    /// The image that all visits share.
    pub(crate) image: fn() -> io::Result<Image>,
    pub(crate) pattern: Pattern,
    pub(crate) queues: usize,
    pub(crate) depth: u32,
    /// Bytes of a request.
    pub(crate) block: usize,
    /// Every visit has a new image instead, much larger than what it writes.
    pub(crate) allocates: bool,
    /// IOPS of ours by the peer's, at least.
    pub(crate) iops: f64,
    /// CPU time of ours for a request by the peer's, at most.
    pub(crate) cpu: Option<f64>,
    /// p99.9 is no worse than the peer's.
    pub(crate) tail: bool,
}

pub(crate) const PLAIN: Cell = Cell {
    name: "",
    image: Image::full,
    block: 4096,
    pattern: Pattern::RandRead,
    queues: 1,
    depth: 32,
    allocates: false,
    iops: 1.0,
    cpu: None,
    tail: false,
};

const CELLS: &[Cell] = &[
    Cell { name: "read-d32", iops: 1.5, cpu: Some(0.7), ..PLAIN },
    Cell { name: "read-d1", depth: 1, iops: 1.5, ..PLAIN },
    Cell { name: "write-d32", pattern: Pattern::RandWrite, iops: 1.2, cpu: Some(0.8), ..PLAIN },
    Cell { name: "allocate-d32", pattern: Pattern::RandWrite, allocates: true, iops: 1.1, tail: true, ..PLAIN },
    Cell { name: "read-q2-d32", queues: 2, iops: 2.0, ..PLAIN },
];

/// One visit to one server.
struct Sample {
    outcome: Outcome,
    cpu: CpuUse,
}

impl Sample {
    fn cpu_ns_per_io(&self) -> f64 {
        self.cpu.process * 1e9 / self.outcome.iops()
    }
}

impl Cell {
    fn measure(&self, pair: &Pair, arguments: &Arguments) -> io::Result<String> {
        let image = if self.allocates { None } else { Some((self.image)()?) };
        let mut samples: [Vec<Sample>; 2] = Default::default();
        for round in 0..arguments.rounds {
            for side in order(round) {
                let fresh = if self.allocates { Some(Image::empty(LARGE)?) } else { None };
                let Some(image) = fresh.as_ref().or(image.as_ref()) else { continue };
                samples[side].push(self.visit(pair, side, image, arguments.seconds, round as u64)?);
            }
        }
        Ok(self.line(&samples))
    }

    fn visit(&self, pair: &Pair, side: usize, image: &Image, seconds: f64, seed: u64) -> io::Result<Sample> {
        let program = pair.both()[side];
        let threads = if self.queues > 1 && program.maps_queues() { Threads::Split } else { Threads::Shared };
        let server = Server::start(program, |directory| {
            [threads.objects(), image.node(), export(directory, "e", "disk", self.queues, threads)].concat()
        })?;
        let duration = Duration::from_secs_f64(if self.allocates { seconds / 3.0 } else { seconds });
        let _watch = server.watch(duration * 2 + STALL * 2);
        let workload = Workload {
            pattern: self.pattern,
            wait: Wait::Sleep,
            queues: self.queues,
            depth: self.depth,
            block: self.block,
            seed,
            warm_up: duration / 10,
            duration,
        };
        let mut moments = Vec::new();
        let outcome = load::run(&export_path(server.directory(), "e"), &workload, |_: Moment| {
            moments.push(server.cpu()?);
            Ok(())
        })?;
        if outcome.errors > 0 {
            return Err(io::Error::other(format!("{} of {} requests failed", outcome.errors, outcome.ios)));
        }
        let [begin, end] = &moments[..] else { return Err(io::Error::other("both ends were not sampled")) };
        Ok(Sample { outcome, cpu: begin.until(end) })
    }

    fn line(&self, samples: &[Vec<Sample>; 2]) -> String {
        let side = |side: usize, of: &dyn Fn(&Sample) -> f64| median(samples[side].iter().map(of));
        let both =
            |digits: usize, of: &dyn Fn(&Sample) -> f64| format!("{:.digits$} / {:.digits$}", side(0, of), side(1, of));
        // Pair by pair, so that what disturbed a round disturbed both.
        let ratios = |of: &dyn Fn(&Sample) -> f64| -> Vec<f64> {
            samples[0].iter().zip(&samples[1]).map(|(ours, theirs)| of(ours) / of(theirs)).collect()
        };
        let iops = ratios(&|sample| sample.outcome.iops());
        let cpu = median(ratios(&Sample::cpu_ns_per_io));
        let tail = median(ratios(&|sample| sample.outcome.quantile_us(0.999)));
        let (ratio, lowest) = (median(iops.iter().copied()), least(iops));
        let mut aims = vec![format!("IOPS ≥ {} × {}", self.iops, verdict(ratio >= self.iops))];
        aims.extend(self.cpu.map(|aim| format!("CPU ≤ {aim} × {}", verdict(cpu <= aim))));
        aims.extend(self.tail.then(|| format!("p99.9 ≤ 1 × ({tail:.2}) {}", verdict(tail <= 1.0))));
        format!(
            "| {} | {ratio:.2} | {lowest:.2} | {} | {cpu:.2} | {} | {} | {} | {} | {} |",
            self.name,
            both(1, &|sample| sample.outcome.iops() / 1000.0),
            both(0, &Sample::cpu_ns_per_io),
            both(0, &|sample| sample.outcome.quantile_us(0.5)),
            both(0, &|sample| sample.outcome.quantile_us(0.999)),
            both(2, &|sample| sample.cpu.others),
            aims.join("; "),
        )
    }
}

/// Milliseconds of `blockdev-add`, and MiB that the server has more after it.
fn open(pair: &Pair, rounds: usize) -> io::Result<()> {
    let image = Image::empty(HUGE)?;
    let mut samples: [Vec<(f64, f64)>; 2] = Default::default();
    for round in 0..rounds {
        for side in order(round) {
            samples[side].push(open_once(pair.both()[side], &image)?);
        }
    }
    for (program, samples) in pair.both().into_iter().zip(&samples) {
        let (time, memory) = (median(samples.iter().map(|one| one.0)), median(samples.iter().map(|one| one.1)));
        let aims = format!("≤ 50 ms {}; ≤ 20 MiB {}", verdict(time <= 50.0), verdict(memory <= 20.0));
        println!("| {} | {time:.2} | {memory:.2} | {aims} |", program.name());
    }
    Ok(())
}

fn open_once(program: &Program, image: &Image) -> io::Result<(f64, f64)> {
    let server = Server::start(program, |_| Vec::new())?;
    let _watch = server.watch(STALL);
    let mut monitor = server.monitor(0, STALL)?;
    let before = server.memory()?;
    let file = json!({ "driver": "file", "filename": image.path });
    let start = Instant::now();
    monitor.run("blockdev-add", json!({ "driver": "qcow2", "node-name": "disk", "file": file }))?;
    let time = start.elapsed().as_secs_f64() * 1000.0;
    let more = server.memory()?.rss_kib.saturating_sub(before.rss_kib);
    Ok((time, more as f64 / 1024.0))
}

/// An image in `/dev/shm`.
pub(crate) struct Image {
    pub(crate) path: String,
    is_luks: bool,
    /// Of the disk, in bytes.
    pub(crate) size: u64,
    _directory: TempDir,
}

impl Image {
    /// A qcow2 image with nothing in it.
    pub(crate) fn empty(size: u64) -> io::Result<Self> {
        Self::made(size, false, &["-f", "qcow2"])
    }

    fn made(size: u64, is_luks: bool, options: &[&str]) -> io::Result<Self> {
        let directory = tempfile::Builder::new().prefix("trellis-bench-").tempdir_in(Path::new("/dev/shm"))?;
        let path = directory.path().join("disk.img").to_string_lossy().into_owned();
        let size_word = size.to_string();
        tool("qemu-img", &[&["create", "-q"], options, &[&path, &size_word]].concat())?;
        Ok(Self { path, size, is_luks, _directory: directory })
    }

    /// A qcow2 image with data everywhere.
    pub(crate) fn full() -> io::Result<Self> {
        Self::empty(SIZE)?.filled(&["-f", "qcow2"])
    }

    /// A luks image with data everywhere, in QEMU's and our default, aes-256 in XTS mode.
    pub(crate) fn luks() -> io::Result<Self> {
        let image = Self::made(SIZE, true, &["--object", KEY, "-f", "luks", "-o", "key-secret=key,iter-time=10"])?;
        image.filled(&["--object", KEY, "--image-opts"])
    }

    fn filled(self, options: &[&str]) -> io::Result<Self> {
        let write = |start: u64| format!("write -P {} {} {}", 1 + start % 250, start << 20, 16 << 20);
        let writes: Vec<String> = (0..SIZE >> 20).step_by(16).map(write).collect();
        let mut arguments = options.to_vec();
        arguments.extend(writes.iter().flat_map(|write| ["-c", write.as_str()]));
        let name = if self.is_luks { format!("{LUKS},file.filename={}", self.path) } else { self.path.clone() };
        arguments.push(&name);
        tool("qemu-io", &arguments)?;
        Ok(self)
    }

    /// `--blockdev` arguments that make a node `disk`.
    pub(crate) fn node(&self) -> Vec<String> {
        let file = format!("file,node-name=file,filename={},aio=io_uring", self.path);
        match self.is_luks {
            true => {
                let disk = format!("{LUKS},node-name=disk,file=file");
                [option("object", KEY), option("blockdev", &file), option("blockdev", &disk)].concat()
            }
            false => {
                [option("blockdev", &file), option("blockdev", "qcow2,node-name=disk,file=file,discard=unmap")].concat()
            }
        }
    }
}

fn tool(program: &str, arguments: &[&str]) -> io::Result<()> {
    let output = Command::new(program).args(arguments).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("{program} failed: {}", String::from_utf8_lossy(&output.stderr).trim())))
}

/// Of a luks image.
const KEY: &str = "secret,id=key,data=passphrase";
const LUKS: &str = "driver=luks,key-secret=key";

/// Of an image with data, of one that is written to at random and hardly twice at the same place, and of one that is only
/// opened, in bytes.
const SIZE: u64 = 256 << 20;
const LARGE: u64 = 64 << 30;
const HUGE: u64 = 1 << 40;

const HEADINGS: &str = "\
every pair of figures is subject / peer, in the median; ratios are of pairs, in the median\n
| cell | IOPS ratio | least | kIOPS | CPU ratio | CPU ns/IO | p50 µs | p99.9 µs | other load, CPUs | aims |
|---|---|---|---|---|---|---|---|---|---|";
const OPEN_HEADINGS: &str = "\
| server | open of 1 TiB, ms | RSS more, MiB | aims |
|---|---|---|---|";
