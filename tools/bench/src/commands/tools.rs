//! `tools`: `trellis-img` beside `qemu-img` on a disk of 4 GiB in `/dev/shm` with 20,000 clusters of data: copies into both
//! formats and compressed, check, compare, map; and how long `info` takes to start.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use clap::Args;
use tempfile::TempDir;

use super::{least, median, order, verdict};

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// The program that is judged [default: trellis-img beside this program]
    #[arg(long, value_name = "PROGRAM")]
    tool: Option<PathBuf>,
    /// The program that it is compared with
    #[arg(long, value_name = "PROGRAM", default_value = "qemu-img")]
    with: PathBuf,
    /// Rounds of each program
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Only cells whose names contain this
    #[arg(long, value_name = "WORD")]
    only: Option<String>,
    /// Where the images are
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    folder: PathBuf,
}

/// What both are asked.
struct Cell {
    name: &'static str,
    /// Words of the command line; the target, if there is one, is `target`.
    words: &'static [&'static str],
    /// Our time by the peer's, at the most.
    aim: f64,
    /// How often in a visit, where once is too short to measure.
    times: u32,
}

const CELLS: &[Cell] = &[
    Cell {
        name: "convert raw to qcow2",
        words: &["convert", "-f", "raw", "-O", "qcow2", "raw", "target"],
        aim: 1.05,
        times: 1,
    },
    Cell {
        name: "convert qcow2 to raw",
        words: &["convert", "-f", "qcow2", "-O", "raw", "qcow2", "target"],
        aim: 1.05,
        times: 1,
    },
    Cell {
        name: "convert -c",
        words: &["convert", "-c", "-f", "raw", "-O", "qcow2", "raw", "target"],
        aim: 0.7,
        times: 1,
    },
    Cell { name: "check", words: &["check", "-q", "-f", "qcow2", "qcow2"], aim: 1.05, times: 10 },
    Cell {
        name: "compare",
        words: &["compare", "-q", "-f", "raw", "-F", "qcow2", "raw", "qcow2"],
        aim: 1.05,
        times: 1,
    },
    Cell { name: "map", words: &["map", "-f", "qcow2", "--output=json", "qcow2"], aim: 1.05, times: 10 },
    Cell { name: "info", words: &["info", "-f", "qcow2", "qcow2"], aim: 1.0, times: 20 },
];

pub(crate) fn run(arguments: &Arguments) -> io::Result<()> {
    let beside_us = || std::env::current_exe().unwrap_or_default().with_file_name("trellis-img");
    let programs = [arguments.tool.clone().unwrap_or_else(beside_us), arguments.with.clone()];
    let images = Images::new(&arguments.folder, &arguments.with)?;
    println!("subject: {}\npeer: {}\n", programs[0].display(), programs[1].display());
    println!("{HEADINGS}");
    let wanted = |cell: &&Cell| arguments.only.as_ref().is_none_or(|word| cell.name.contains(word.as_str()));
    for cell in CELLS.iter().filter(wanted) {
        let mut times: [Vec<f64>; 2] = Default::default();
        for round in 0..arguments.rounds {
            for side in order(round) {
                times[side].push(images.visit(&programs[side], cell)?);
            }
        }
        // Pair by pair, so that what disturbed a round disturbed both.
        let ratios: Vec<_> = times[0].iter().zip(&times[1]).map(|(ours, theirs)| ours / theirs).collect();
        let (ratio, best) = (median(ratios.iter().copied()), least(ratios));
        let [ours, theirs] = times.map(|times| median(times) * 1000.0);
        let aim = format!("≤ {} × {}", cell.aim, verdict(ratio <= cell.aim));
        println!("| {} | {ratio:.2} | {best:.2} | {ours:.1} / {theirs:.1} | {aim} |", cell.name);
    }
    Ok(())
}

/// The disk in both formats.
struct Images {
    folder: TempDir,
}

impl Images {
    fn new(folder: &Path, tool: &Path) -> io::Result<Self> {
        let folder = tempfile::Builder::new().prefix("trellis-bench-").tempdir_in(folder)?;
        let raw = File::create(folder.path().join("raw"))?;
        raw.set_len(SIZE)?;
        let mut random = 1u64;
        let mut next = || {
            // Knuth's MMIX.
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            random >> 33
        };
        let mut cluster = vec![0; usize::try_from(CLUSTER).unwrap_or_default()];
        for number in 0..DATA {
            // Every third byte is noise: that is worth compressing, and takes its time.
            for bytes in cluster.chunks_exact_mut(12) {
                bytes[..4].copy_from_slice(&next().to_le_bytes()[..4]);
            }
            let place = number * (SIZE / CLUSTER) / DATA;
            raw.write_all_at(&cluster, place * CLUSTER)?;
        }
        let words = ["convert", "-f", "raw", "-O", "qcow2", "raw", "qcow2"];
        let status = Command::new(tool).args(words).current_dir(folder.path()).status()?;
        if !status.success() {
            return Err(io::Error::other("the image could not be made"));
        }
        Ok(Self { folder })
    }

    /// Seconds for a cell's command.
    fn visit(&self, program: &Path, cell: &Cell) -> io::Result<f64> {
        let target = self.folder.path().join("target");
        let mut seconds = 0.0;
        for _ in 0..cell.times {
            if target.exists() {
                std::fs::remove_file(&target)?;
            }
            let mut command = Command::new(program);
            command.args(cell.words).current_dir(self.folder.path()).stdout(Stdio::null());
            let begun = Instant::now();
            let status = command.status()?;
            seconds += begun.elapsed().as_secs_f64();
            if !status.success() {
                return Err(io::Error::other(format!("{} {} failed", program.display(), cell.words.join(" "))));
            }
        }
        Ok(seconds / f64::from(cell.times))
    }
}

const SIZE: u64 = 4 << 30;
const CLUSTER: u64 = 64 << 10;
const DATA: u64 = 20_000;

const HEADINGS: &str = "\
times of a run; every pair of figures is subject / peer, in the median; ratios are of pairs, in the median\n
| command | ratio | least | ms | aims |
|---|---|---|---|---|";
