//! The sub-commands: a line each, and what several of them take.

mod amend;
mod bench;
mod bitmap;
mod check;
mod commit;
mod common;
mod compare;
mod convert;
mod create;
mod dd;
mod info;
mod map;
mod measure;
mod rebase;
mod resize;
mod snapshot;

use std::pin::Pin;

use trellis_image::args::{Args, Definition};
use trellis_image::{Outcome, Session};

/// A sub-command.
pub struct Subcommand {
    /// What it takes.
    pub definition: &'static Definition,
    /// Words like `-512k` are no options where nothing else has that form.
    pub takes_numbers: bool,
    /// What it does.
    pub run: for<'s> fn(&'s Session, Args) -> Running<'s>,
}

/// A sub-command at work.
pub type Running<'s> = Pin<Box<dyn Future<Output = Outcome> + 's>>;

/// A line is the module's name; the module has `DEFINITION` and an async function `run`.
macro_rules! commands {
    ($($module:ident $(takes $numbers:ident)?,)*) => {
        /// All of them, in the order of the alphabet.
        pub const COMMANDS: &[Subcommand] = &[$(Subcommand {
            definition: &$module::DEFINITION,
            takes_numbers: <[&str]>::len(&[$(stringify!($numbers))?]) == 1,
            run: |session, args| Box::pin($module::run(session, args)),
        }),*];
    };
}

commands! {
    amend,
    bench,
    bitmap,
    check,
    commit,
    compare,
    convert,
    create,
    dd,
    info,
    map,
    measure,
    rebase,
    resize takes numbers,
    snapshot,
}
