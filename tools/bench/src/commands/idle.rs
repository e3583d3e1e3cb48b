//! `idle`: what connected clients that do nothing cost.

use std::io;
use std::path::Path;
use std::time::Duration;

use clap::Args;
use trellis_bench::client::{Connection, Shape};
use trellis_bench::process::pause;
use trellis_bench::server::{Program, START_LIMIT, Server, Threads, export, export_path, option};

use super::attach::read_once;
use super::{Pair, verdict};

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Seconds to watch
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Exports, with one client each
    #[arg(long, default_value_t = 16)]
    clients: usize,
}

pub(crate) fn run(pair: &Pair, arguments: &Arguments) -> io::Result<()> {
    println!("{}", pair.introduce()?);
    let subject = Idle::start(&pair.subject, arguments.clients)?;
    let peer = Idle::start(&pair.peer, arguments.clients)?;
    // Polling after the last request dies down first.
    pause(Duration::from_secs(1));
    let before = [subject.server.cpu()?, peer.server.cpu()?];
    pause(Duration::from_secs(arguments.seconds));
    println!("| {} idle clients, {} s | CPU % | RssAnon MiB | RSS MiB | aims |", arguments.clients, arguments.seconds);
    println!("|---|---|---|---|---|");
    for (idle, before) in [subject, peer].iter().zip(&before) {
        let cpu = before.until(&idle.server.cpu()?).process * 100.0;
        let memory = idle.server.memory()?;
        let anon = memory.anon_kib as f64 / 1024.0;
        println!(
            "| {} | {cpu:.4} | {anon:.1} | {:.1} | ≤ 0.1 % {}; RssAnon ≤ 30 MiB {} |",
            idle.name,
            memory.rss_kib as f64 / 1024.0,
            verdict(cpu <= 0.1),
            verdict(anon <= 30.0)
        );
    }
    Ok(())
}

/// A server with attached clients; the clients leave first.
struct Idle {
    _clients: Vec<Connection>,
    server: Server,
    name: String,
}

impl Idle {
    fn start(program: &Program, count: usize) -> io::Result<Self> {
        let server = Server::start(program, |directory| (0..count).flat_map(|n| device(directory, n)).collect())?;
        let watch = server.watch(START_LIMIT * 2);
        let clients: io::Result<Vec<Connection>> =
            (0..count).map(|n| connect(&export_path(server.directory(), &format!("e{n}")))).collect();
        drop(watch);
        Ok(Self { _clients: clients?, server, name: program.name() })
    }
}

fn device(directory: &Path, number: usize) -> Vec<String> {
    let node = format!("null-co,node-name=n{number},size=1073741824,read-zeroes=off");
    let export = export(directory, &format!("e{number}"), &format!("n{number}"), 1, Threads::Default);
    [option("blockdev", &node), export].concat()
}

fn connect(socket: &Path) -> io::Result<Connection> {
    let mut connection = Connection::open(socket, Shape { queues: 1, depth: 32, buffer_len: 4096 })?;
    read_once(&mut connection)?;
    Ok(connection)
}
