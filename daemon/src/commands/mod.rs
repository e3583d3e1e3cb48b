//! What can be said on a monitor: one line a command, one file a noun. The lines also make `query-commands` and
//! `query-qmp-schema`, so that what is listed, what is parsed and what is run cannot differ.

mod bitmap;
mod blockdev;
mod blockstats;
mod chardev;
mod export;
mod graph;
mod internal_snapshot;
mod introspection;
mod job;
mod object;
mod process;
mod qom;
mod snapshot;
mod transaction;

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;

use qmp::schema::{Collector, Empty, Qapi, Value, from_value};
use qmp::wire::NegotiateArguments;
use qmp::{Error, Result};

pub(crate) use blockdev::{no_such_device, signed};
pub(crate) use job::JobStatus;

use crate::control;
use crate::daemon::Daemon;

/// All commands.
pub struct Commands {
    entries: BTreeMap<&'static str, Run>,
    names: qmp::wire::Commands,
    listed: Vec<&'static str>,
    schema: Value,
}

type Run = Box<dyn Fn(Rc<Daemon>, Value) -> Outcome>;
type Outcome = Pin<Box<dyn Future<Output = Result<Answer>>>>;

/// What a command returns.
pub enum Answer {
    /// All of it.
    Whole(Value),
    /// A list that may be long.
    Rows(Box<dyn Rows>),
}

/// A list whose rows are made one by one, with whatever others want in between.
pub trait Rows {
    /// The next row.
    fn next(&mut self) -> Pin<Box<dyn Future<Output = Option<Value>> + '_>>;
}

/// The same with its type.
pub(crate) trait Listing: 'static {
    type Row: Qapi;

    async fn next(&mut self) -> Option<Self::Row>;
}

impl<L: Listing> Rows for L {
    fn next(&mut self) -> Pin<Box<dyn Future<Output = Option<Value>> + '_>> {
        Box::pin(async { Some(Listing::next(self).await?.to_value()) })
    }
}

impl Commands {
    /// The commands of this daemon.
    #[must_use]
    pub fn all() -> Self {
        Table::all().finish()
    }

    /// Commands and events with their types, for the manual.
    #[must_use]
    pub fn described() -> Collector {
        Table::all().collector
    }

    /// The names that a session hands out.
    pub fn names(&self) -> qmp::wire::Commands {
        self.names.clone()
    }

    /// Runs a command to its end.
    pub async fn run(&self, daemon: &Rc<Daemon>, command: &str, arguments: Value) -> Result<Answer> {
        let run = self.entries.get(command).ok_or_else(|| Error::unknown_command(command))?;
        run(daemon.clone(), arguments).await
    }

    /// For `query-commands`.
    pub fn listed(&self) -> &[&'static str] {
        &self.listed
    }

    /// For `query-qmp-schema`.
    pub fn schema(&self) -> &Value {
        &self.schema
    }
}

/// Commands being gathered.
pub(crate) struct Table {
    collector: Collector,
    entries: BTreeMap<&'static str, Run>,
}

impl Table {
    fn all() -> Self {
        let mut table = Self { collector: Collector::new(), entries: BTreeMap::new() };
        // The session answers this one by itself.
        let doc = "Ends the negotiation that a session begins with. Other commands are refused before it.";
        table.collector.command::<NegotiateArguments, Empty>("qmp_capabilities", doc, &[]);
        introspection::register(&mut table);
        blockdev::register(&mut table);
        blockstats::register(&mut table);
        graph::register(&mut table);
        bitmap::register(&mut table);
        transaction::register(&mut table);
        job::register(&mut table);
        export::register(&mut table);
        object::register(&mut table);
        snapshot::register(&mut table);
        internal_snapshot::register(&mut table);
        qom::register(&mut table);
        chardev::register(&mut table);
        process::register(&mut table);
        control::describe_events(&mut table.collector);
        table
    }

    /// Adds a command: its name, what it does, and the function that its arguments and its answer are read from.
    fn add<A: Qapi, R: Qapi, F>(&mut self, name: &'static str, doc: &'static str, run: fn(Rc<Daemon>, A) -> F)
    where
        F: Future<Output = Result<R>> + 'static,
    {
        self.add_with(name, doc, &[], run);
    }

    /// Adds a command with features that clients look for in the schema.
    fn add_with<A: Qapi, R: Qapi, F>(
        &mut self,
        name: &'static str,
        doc: &'static str,
        features: &'static [&'static str],
        run: fn(Rc<Daemon>, A) -> F,
    ) where
        F: Future<Output = Result<R>> + 'static,
    {
        self.collector.command::<A, R>(name, doc, features);
        let run: Run = Box::new(move |daemon, arguments| {
            Box::pin(async move { Ok(Answer::Whole(run(daemon, from_value(arguments)?).await?.to_value())) })
        });
        self.insert(name, run);
    }

    /// Adds a command that returns a list which grows with the graph.
    fn add_list<A: Qapi, L: Listing, F>(&mut self, name: &'static str, doc: &'static str, run: fn(Rc<Daemon>, A) -> F)
    where
        F: Future<Output = Result<L>> + 'static,
    {
        self.collector.command::<A, Vec<L::Row>>(name, doc, &[]);
        let run: Run = Box::new(move |daemon, arguments| {
            Box::pin(async move {
                let rows: Box<dyn Rows> = Box::new(run(daemon, from_value(arguments)?).await?);
                Ok(Answer::Rows(rows))
            })
        });
        self.insert(name, run);
    }

    fn insert(&mut self, name: &'static str, run: Run) {
        let before = self.entries.insert(name, run);
        assert!(before.is_none(), "the command '{name}' is registered twice");
    }

    fn finish(self) -> Commands {
        let names: BTreeSet<_> = self.entries.keys().map(|name| (*name).to_owned()).collect();
        Commands {
            listed: self.collector.command_names().collect(),
            schema: self.collector.schema(),
            entries: self.entries,
            names: Arc::new(names),
        }
    }
}
