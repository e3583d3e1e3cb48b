//! `attach`: how long from connect to the first answer.

use std::io;
use std::time::{Duration, Instant};

use clap::Args;
use trellis_bench::client::load::STALL;
use trellis_bench::client::{Connection, Request, Shape, wait_any};
use trellis_bench::server::{Server, Threads, export, export_path};
use trellis_bench::storage::Storage;

use super::{Pair, median, order, verdict};

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Attaches to each server
    #[arg(long, default_value_t = 50)]
    rounds: usize,
}

pub(crate) fn run(pair: &Pair, arguments: &Arguments) -> io::Result<()> {
    println!("{}", pair.introduce()?);
    let mut servers = [start(pair, 0)?, start(pair, 1)?];
    let mut times_ms = [Vec::new(), Vec::new()];
    for round in 0..arguments.rounds {
        if round > 0 && round.is_multiple_of(ROUNDS_PER_PROCESS) {
            servers = [start(pair, 0)?, start(pair, 1)?];
        }
        for side in order(round) {
            times_ms[side].push(attach(&servers[side])?.as_secs_f64() * 1000.0);
        }
    }
    let [subject, peer] = times_ms.map(median);
    println!("| connect to first answer, median of {} | aims |", arguments.rounds);
    println!("|---|---|");
    println!(
        "| {subject:.3} / {peer:.3} ms (subject / peer) | ≤ 2 × {}; ≤ 5 ms {} |",
        verdict(subject <= 2.0 * peer),
        verdict(subject <= 5.0)
    );
    Ok(())
}

fn start(pair: &Pair, side: usize) -> io::Result<Server> {
    Server::start(pair.both()[side], |directory| {
        let threads = Threads::Shared;
        [threads.objects(), Storage::Null.node(), export(directory, "e", "disk", 1, threads)].concat()
    })
}

fn attach(server: &Server) -> io::Result<Duration> {
    let _watch = server.watch(STALL);
    let start = Instant::now();
    let socket = export_path(server.directory(), "e");
    let mut connection = Connection::open(&socket, Shape { queues: 1, depth: 1, buffer_len: 4096 })?;
    read_once(&mut connection)?;
    Ok(start.elapsed())
}

/// One read of the first 4096 bytes on queue 0, waited for.
pub(super) fn read_once(connection: &mut Connection) -> io::Result<()> {
    let queue = connection.queues.first_mut().ok_or_else(|| io::Error::other("the device has no queue"))?;
    queue.submit(Request::Read { offset: 0, buffer: 0..4096 }, 0)?;
    queue.kick()?;
    if !wait_any(&mut connection.queues, STALL)? {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "the first request was not answered"));
    }
    let mut answers = Vec::new();
    connection.queues.iter_mut().for_each(|queue| queue.reap(&mut answers));
    match answers[..] {
        [(0, 0)] => Ok(()),
        _ => Err(io::Error::other(format!("the first request was answered with {answers:?}"))),
    }
}

/// After so many attaches both servers start afresh: on a busy machine one process may be slow all its life.
const ROUNDS_PER_PROCESS: usize = 5;
