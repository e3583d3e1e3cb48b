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

pub(crate) fn run(pair: &Pair, arguments: &Arguments) -> io::Result<()> {
    println!("{}", pair.introduce()?);
    println!("{HEADINGS}");
    let wanted = |name: &str| arguments.only.as_ref().is_none_or(|word| name.contains(word.as_str()));
    let mut failed = Vec::new();
    for cell in CELLS.iter().filter(|cell| wanted(cell.name)) {
        match cell.measure(pair, arguments) {
            Ok(line) => println!("{line}"),
            Err(error) => {
                println!("| {} | not measured: {error} |", cell.name);
                failed.push(cell.name);
            }
        }
    }
    if wanted("open") {
        println!("\n{OPEN_HEADINGS}");
        open(pair, arguments.rounds)?;
    }
    if failed.is_empty() { Ok(()) } else { Err(io::Error::other(format!("not measured: {}", failed.join(", ")))) }
}

/// What is asked, and what is aimed at.
struct Cell {
    name: &'static str,
    pattern: Pattern,
    queues: usize,
    depth: u32,
    /// Every visit has a new image, much larger than what it writes.
    allocates: bool,
    /// IOPS of ours by the peer's, at least.
    iops: f64,
    /// CPU time of ours for a request by the peer's, at most.
    cpu: Option<f64>,
    /// p99.9 is no worse than the peer's.
    tail: bool,
}

const PLAIN: Cell = Cell {
    name: "",
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
        let image = if self.allocates { None } else { Some(Image::full()?) };
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
            block: 4096,
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

/// A qcow2 image in `/dev/shm`.
pub(crate) struct Image {
    pub(crate) path: String,
    /// Of the disk, in bytes.
    pub(crate) size: u64,
    _directory: TempDir,
}

impl Image {
    /// With nothing in it.
    pub(crate) fn empty(size: u64) -> io::Result<Self> {
        let directory = tempfile::Builder::new().prefix("trellis-bench-").tempdir_in(Path::new("/dev/shm"))?;
        let path = directory.path().join("disk.qcow2").to_string_lossy().into_owned();
        tool("qemu-img", &["create", "-q", "-f", "qcow2", &path, &size.to_string()])?;
        Ok(Self { path, size, _directory: directory })
    }

    /// With data everywhere.
    pub(crate) fn full() -> io::Result<Self> {
        let image = Self::empty(SIZE)?;
        let write = |start: u64| format!("write -P {} {} {}", 1 + start % 250, start << 20, 16 << 20);
        let writes: Vec<String> = (0..SIZE >> 20).step_by(16).map(write).collect();
        let mut arguments = vec!["-f", "qcow2"];
        arguments.extend(writes.iter().flat_map(|write| ["-c", write.as_str()]));
        arguments.push(&image.path);
        tool("qemu-io", &arguments)?;
        Ok(image)
    }

    /// `--blockdev` arguments that make a node `disk`.
    pub(crate) fn node(&self) -> Vec<String> {
        let file = format!("file,node-name=file,filename={},aio=io_uring", self.path);
        [option("blockdev", &file), option("blockdev", "qcow2,node-name=disk,file=file,discard=unmap")].concat()
    }
}

fn tool(program: &str, arguments: &[&str]) -> io::Result<()> {
    let output = Command::new(program).args(arguments).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("{program} failed: {}", String::from_utf8_lossy(&output.stderr).trim())))
}

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
