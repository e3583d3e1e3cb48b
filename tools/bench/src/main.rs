//! `trellis-bench`: one command for each figure that Trellis is held to. Compares two servers in one run.
//!
//! ```text
//! cargo build --release --bin trellisd --bin trellis-bench
//! target/release/trellis-bench compare --output table.md          (about half an hour; --quick: five minutes)
//! target/release/trellis-bench compare --only null,sleep,q1-      (some cells; --list names them)
//! target/release/trellis-bench isolation | filters | changes | idle | attach | qcow2 | luks | snapshots
//! cargo build --release --bin trellis-img && target/release/trellis-bench tools
//! ```
//!
//! `--subject /usr/bin/qemu-storage-daemon` compares the peer with itself: then every ratio has to be about 1, or the machine
//! is too busy to measure on.

mod commands;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use commands::{Pair, attach, changes, compare, filters, idle, isolation, luks, qcow2, snapshots, tools};
use trellis_bench::server::Program;

/// Measures a vhost-user-blk server against qemu-storage-daemon, both in one run.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    /// The server that is judged [default: trellisd beside this program]
    #[arg(long, global = true, value_name = "PROGRAM")]
    subject: Option<PathBuf>,
    /// The server that it is compared with
    #[arg(long, global = true, value_name = "PROGRAM", default_value = "qemu-storage-daemon")]
    peer: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Throughput, latency, CPU time and notifications over every kind of disk
    Compare(compare::Arguments),
    /// What a busy chain does to other exports and to a second monitor
    Isolation(isolation::Arguments),
    /// What filters with nothing to do cost
    Filters(filters::Arguments),
    /// A filter put in and taken out under load
    Changes(changes::Arguments),
    /// CPU time and memory with connected clients that do nothing
    Idle(idle::Arguments),
    /// Time from connect to the first answer
    Attach(attach::Arguments),
    /// An encrypted image: small and large reads and writes
    Luks(qcow2::Arguments),
    /// A qcow2 image: reads, writes, allocation, two queues, opening
    Qcow2(qcow2::Arguments),
    /// Fifty snapshots in a row under load
    Snapshots(snapshots::Arguments),
    /// trellis-img beside qemu-img: copies, check, compare, map, starting
    Tools(tools::Arguments),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let pair = Pair { subject: Program::new(cli.subject.unwrap_or_else(beside_us)), peer: Program::new(cli.peer) };
    let result = match cli.command {
        Command::Compare(arguments) => compare::run(&pair, &arguments),
        Command::Isolation(arguments) => isolation::run(&pair, &arguments),
        Command::Filters(arguments) => filters::run(&pair, &arguments),
        Command::Changes(arguments) => changes::run(&pair, &arguments),
        Command::Idle(arguments) => idle::run(&pair, &arguments),
        Command::Attach(arguments) => attach::run(&pair, &arguments),
        Command::Luks(arguments) => luks::run(&pair, &arguments),
        Command::Qcow2(arguments) => qcow2::run(&pair, &arguments),
        Command::Snapshots(arguments) => snapshots::run(&pair, &arguments),
        Command::Tools(arguments) => tools::run(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("trellis-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn beside_us() -> PathBuf {
    std::env::current_exe().unwrap_or_default().with_file_name("trellisd")
}
