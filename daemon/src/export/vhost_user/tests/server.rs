//! An export in a daemon of its own: a control thread, IOThreads, a graph with one node.

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use block_core::catalog;
use block_core::graph::{Graph, NodeId, PermSet, Perms, Preallocation};
use block_core::port::{Port, PortNews, PortOptions};
use block_core::rt::sync::{Sender, oneshot};
use block_core::rt::{IoThread, Local, PollParams, Remote, run_control};
use serde_json::Value;

use crate::export::vhost_user::{Address, ExportReport, VhostUserExport, VhostUserOptions};

/// See the module's head. Dropped: the export ends, and the node goes after it.
pub(super) struct Server {
    directory: tempfile::TempDir,
    control: Remote,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

struct Inside {
    graph: Rc<Graph>,
    node: NodeId,
    export: Option<VhostUserExport>,
}

thread_local! {
    static INSIDE: RefCell<Option<Inside>> = const { RefCell::new(None) };
}

impl Server {
    /// Serves the node that `node` describes (its name is added), with as many IOThreads as queues.
    pub(super) fn new(queues: u16, node: Value, change: impl FnOnce(&mut VhostUserOptions)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut options = VhostUserOptions::new("e0", Address::Unix(directory.path().join("s")));
        options.writable = true;
        options.num_queues = queues;
        change(&mut options);
        let (ready, started) = mpsc::channel();
        let (stop, stopped) = oneshot();
        let main = move || {
            run_control(async |local: Rc<Local>| {
                let threads: Vec<_> =
                    (0..queues).map(|_| IoThread::spawn("test", PollParams::default()).unwrap()).collect();
                let port = set_up(node, options, &threads).await;
                ready.send(local.remote()).unwrap();
                let _ = stopped.await;
                take_down(port).await;
            });
        };
        let thread = std::thread::Builder::new().spawn(main).unwrap();
        let control = started.recv().expect("the export starts");
        Self { directory, control, stop: Some(stop), thread: Some(thread) }
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.directory.path().join("s")
    }

    pub(super) fn report(&self) -> ExportReport {
        let (send, answer) = mpsc::channel();
        self.control.send(move |_| {
            let report = INSIDE.with_borrow(|inside| inside.as_ref().unwrap().export.as_ref().unwrap().report());
            send.send(report).unwrap();
        });
        answer.recv().unwrap()
    }

    /// `block_resize`.
    pub(super) fn resize(&self, size: u64) {
        let (send, done) = mpsc::channel();
        self.control.spawn(move |_| async move {
            let (graph, node) = INSIDE.with_borrow(|inside| {
                let inside = inside.as_ref().unwrap();
                (inside.graph.clone(), inside.node)
            });
            graph.permit().resize(node, size, Preallocation::Off).await.unwrap();
            send.send(()).unwrap();
        });
        done.recv().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.unwrap();
            assert!(!self.socket().exists(), "the socket goes with its export");
        }
    }
}

async fn set_up(node: Value, options: VhostUserOptions, threads: &[IoThread]) -> Port {
    let graph = Graph::new(Arc::new(|_| ()));
    let mut described = node;
    described["node-name"] = "disk".into();
    let parsed = qmp::schema::from_value(described).unwrap_or_else(|error| panic!("{}", error.desc));
    let node = catalog::add(&mut graph.permit(), parsed).await.unwrap();
    let uses = PermSet::CONSISTENT_READ | if options.writable { PermSet::WRITE } else { PermSet::NONE };
    let port_options = PortOptions { name: "export 'e0'".into(), perms: Perms { uses, shares: PermSet::ALL } };
    let news = Rc::new(|PortNews::Resized(_)| {
        INSIDE.with_borrow(|inside| inside.as_ref().and_then(|inside| inside.export.as_ref()).unwrap().resized());
    });
    let port = Port::attach(&mut graph.permit(), node, port_options, news).await.unwrap();
    let remotes = threads.iter().map(IoThread::remote).collect();
    let export = VhostUserExport::start(options, port.handle(), remotes).await.unwrap();
    INSIDE.set(Some(Inside { graph, node, export: Some(export) }));
    port
}

async fn take_down(port: Port) {
    let mut inside = INSIDE.take().unwrap();
    inside.export.take().unwrap().stop().await;
    let mut permit = inside.graph.permit();
    port.detach(&mut permit).await;
    permit.remove(inside.node).await.unwrap();
}
