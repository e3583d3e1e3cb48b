//! `compare`: every cell over every kind of disk, as one Markdown table.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use trellis_bench::client::load::Pattern;
use trellis_bench::storage::Storage;

use super::Pair;
use super::cell::{Cell, Disk, Effort};
use super::table::Table;

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Directory on a real disk
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    disk: PathBuf,
    /// Directory whose O_DIRECT I/O completes at once [default: an ext4 on a new zram device, which takes root]
    #[arg(long, value_name = "DIR")]
    inline: Option<PathBuf>,
    /// Short cells and 3 rounds: for a look, not for a judgement
    #[arg(long)]
    quick: bool,
    /// Rounds of each cell [default: 5; quick: 3]
    #[arg(long)]
    rounds: Option<usize>,
    /// Seconds of each visit [default: 2; quick: 0.5]
    #[arg(long)]
    seconds: Option<f64>,
    /// Only cells whose names contain all of these words, as in "null,sleep,q1-" (see --list)
    #[arg(long, value_delimiter = ',', value_name = "WORD,…")]
    only: Vec<String>,
    /// Print the names of the cells and stop
    #[arg(long)]
    list: bool,
    /// Order and direction of the requests
    #[arg(long, value_enum, default_value = "randread")]
    pattern: PatternName,
    /// Bytes of each request
    #[arg(long, default_value_t = 4096)]
    block: usize,
    /// Seed of the random offsets
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Size of the file, in MiB
    #[arg(long, default_value_t = 256)]
    size_mib: u64,
    /// Keep idle CPUs from halting while this runs: in a virtual machine waking one takes longer than most requests
    #[arg(long)]
    awake: bool,
    /// Write the table here too
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum PatternName {
    Read,
    Write,
    Randread,
    Randwrite,
}

pub(crate) fn run(pair: &Pair, arguments: &Arguments) -> io::Result<()> {
    let cells = arguments.cells();
    if arguments.list {
        cells.iter().for_each(|cell| println!("{}", cell.name()));
        return Ok(());
    }
    if cells.is_empty() {
        return Err(io::Error::other("no cell has all of these words in its name"));
    }
    let _awake = arguments.awake.then(keep_cpus_awake).transpose()?;
    let started = Instant::now();
    let effort = arguments.effort();
    let mut table = Table::new(format!("{}{}", pair.introduce()?, arguments.describe(effort)));
    for disk in [Disk::Null, Disk::Shm, Disk::Inline, Disk::Real] {
        let cells: Vec<Cell> = cells.iter().filter(|cell| cell.disk == disk).copied().collect();
        if !cells.is_empty() {
            measure(pair, &arguments.storage(disk)?, &cells, effort, &mut table);
        }
    }
    let report = table.finish(started.elapsed());
    println!("{report}");
    if let Some(path) = &arguments.output {
        fs::write(path, &report)?;
    }
    match table.failures() {
        0 => Ok(()),
        count => Err(io::Error::other(format!("{count} cells could not be measured; the table says why"))),
    }
}

/// A cell that fails is a row that says so: it must not cost the others.
fn measure(pair: &Pair, storage: &Storage, cells: &[Cell], effort: Effort, table: &mut Table) {
    for (done, cell) in cells.iter().enumerate() {
        eprintln!("[{}/{}] {} ({})", done + 1, cells.len(), cell.name(), storage.describe());
        let rounds = cell.run(pair, storage, effort);
        if let Err(error) = &rounds {
            eprintln!("    failed: {error}");
        }
        table.add(*cell, &storage.describe(), rounds);
    }
}

impl Arguments {
    fn cells(&self) -> Vec<Cell> {
        let wanted = |cell: &Cell| self.only.iter().all(|word| cell.name().contains(word));
        Cell::all().into_iter().filter(wanted).collect()
    }

    fn effort(&self) -> Effort {
        let (rounds, seconds) = if self.quick { (3, 0.5) } else { (5, 2.0) };
        Effort {
            rounds: self.rounds.unwrap_or(rounds),
            duration: Duration::from_secs_f64(self.seconds.unwrap_or(seconds)),
            pattern: match self.pattern {
                PatternName::Read => Pattern::Read,
                PatternName::Write => Pattern::Write,
                PatternName::Randread => Pattern::RandRead,
                PatternName::Randwrite => Pattern::RandWrite,
            },
            block: self.block,
            seed: self.seed,
        }
    }

    fn storage(&self, disk: Disk) -> io::Result<Storage> {
        let size = self.size_mib << 20;
        match (disk, &self.inline) {
            (Disk::Null, _) => Ok(Storage::Null),
            (Disk::Shm, _) => Storage::file(Path::new(SHM), size),
            (Disk::Real, _) => Storage::file(&self.disk, size),
            (Disk::Inline, Some(directory)) => Storage::file(directory, size),
            (Disk::Inline, None) => Storage::zram(size).or_else(|error| {
                eprintln!("WARNING: no inline disk ({error}): its cells run on {SHM} and prove less; see --inline");
                Storage::file(Path::new(SHM), size)
            }),
        }
    }

    fn describe(&self, effort: Effort) -> String {
        format!(
            "{:?} of {} bytes, seed {}, {} interleaved rounds of {:.1} s a server, each with a fresh process; depth is for each queue; a sleeping \
             client has a thread for each queue, a spinning one has one for all; own iothreads, default polling, \
             aio=io_uring; a file of {} MiB of random bytes; idle CPUs {}\n",
            effort.pattern,
            effort.block,
            effort.seed,
            effort.rounds,
            effort.duration.as_secs_f64(),
            self.size_mib,
            if self.awake { "kept from halting" } else { "may halt" }
        )
    }
}

/// The kernel's wish list for wake-up latency: 0 µs, for as long as the file is open. Needs root.
fn keep_cpus_awake() -> io::Result<File> {
    let mut wish = File::options().write(true).open("/dev/cpu_dma_latency")?;
    wish.write_all(&0_i32.to_ne_bytes())?;
    Ok(wish)
}

const SHM: &str = "/dev/shm";
