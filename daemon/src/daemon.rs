//! Everything that lives as long as the process. One value, on the control thread; commands get a reference to it.

use std::cell::Cell;
use std::rc::Rc;

use block_core::graph::Graph;
use block_core::job::Jobs;
use block_core::rt::Local;
use block_core::rt::sync::Notify;

use crate::commands::Commands;
use crate::control::{Chardevs, Event, Hub, Monitors};
use crate::export::Exports;
use crate::object::Objects;

/// The daemon's state.
pub struct Daemon {
    /// The control thread.
    pub local: Rc<Local>,
    /// The nodes.
    pub graph: Rc<Graph>,
    /// Work that outlives its command.
    pub jobs: Rc<Jobs>,
    /// Who serves them to guests.
    pub exports: Exports,
    /// IOThreads and the like.
    pub objects: Objects,
    /// Where monitors listen.
    pub chardevs: Chardevs,
    /// Who serves clients.
    pub monitors: Monitors,
    /// What can be said to us.
    pub commands: Commands,
    /// Who is told what happens.
    pub hub: Rc<Hub>,
    /// What the command line asks for is done.
    set_up: Cell<bool>,
    was_set_up: Notify,
    quitting: Cell<bool>,
    quit: Notify,
    /// Commands that run.
    running: Cell<usize>,
    ran: Notify,
}

/// A command that runs, for as long as this is there.
pub(crate) struct RunningCommand(Rc<Daemon>);

impl Daemon {
    /// An empty daemon on this control thread.
    pub fn new(local: Rc<Local>) -> Rc<Self> {
        let hub = Hub::start(&local);
        let graph = Graph::new(hub.sink());
        let told = hub.clone();
        let jobs = Jobs::new(move |id, status| told.tell(Event::job_status_change(id, status)));
        Rc::new(Self {
            local,
            objects: Objects::new(graph.clone()),
            graph,
            jobs,
            exports: Exports::default(),
            chardevs: Chardevs::default(),
            monitors: Monitors::default(),
            commands: Commands::all(),
            hub,
            set_up: Cell::new(false),
            was_set_up: Notify::new(),
            quitting: Cell::new(false),
            quit: Notify::new(),
            running: Cell::new(0),
            ran: Notify::new(),
        })
    }

    /// From now on commands are run.
    pub(crate) fn end_set_up(&self) {
        self.set_up.set(true);
        self.was_set_up.notify_all();
    }

    /// The command line has been obeyed, as clients of QEMU may rely on, or will not be.
    pub(crate) fn is_set_up(&self) -> bool {
        self.set_up.get()
    }

    /// Waits for that, or for something like it: look again.
    pub(crate) async fn set_up(&self) {
        if !self.is_set_up() {
            self.was_set_up.notified().await;
        }
    }

    /// The end has begun.
    pub(crate) fn is_ending(&self) -> bool {
        self.quitting.get()
    }

    /// Leave to run a command; `None` once the end has begun.
    pub(crate) fn begin_command(self: &Rc<Self>) -> Option<RunningCommand> {
        if self.quitting.get() {
            return None;
        }
        self.running.set(self.running.get() + 1);
        Some(RunningCommand(self.clone()))
    }

    /// Waits until no command runs.
    pub(crate) async fn commands_end(&self) {
        while self.running.get() > 0 {
            self.ran.notified().await;
        }
    }

    /// Asks for the end. It comes after what is going on has been answered; from now on no command begins.
    pub fn ask_to_quit(&self) {
        self.quitting.set(true);
        self.end_set_up();
        self.quit.notify_one();
    }

    /// Waits until somebody asks for the end.
    pub(crate) async fn asked_to_quit(&self) {
        while !self.quitting.get() {
            self.quit.notified().await;
        }
    }
}

impl Drop for RunningCommand {
    fn drop(&mut self) {
        self.0.running.set(self.0.running.get() - 1);
        self.0.ran.notify_one();
    }
}
