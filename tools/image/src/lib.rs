//! What the image tools share: a disk image as `qemu-img` and `qemu-io` open it, and their habits at the shell.
//!
//! | | |
//! |---|---|
//! | `session` | one run of a tool: a loop with a ring, a graph |
//! | `given` `source` `encrypted` `cache` | what stands on the command line for an image, and the tree of nodes that it comes to |
//! | `image` `disk` `identity` | an open image: its node, and its bytes as a thread has them; which files are the same |
//! | `size` `pairs` `args` | how sizes, `-o a=b,c=d` and options are written |
//! | `creation` `keys` | what a new image is to be like, and what opens it |
//! | `objects` | what images refer to by id: secrets, limits |
//! | `failure` `errno` `progress` `clock` | what is said of errors, of long work, and of moments |
//! | `interrupt` | being asked to end in the middle of it |
//!
//! Unlike the daemon, tools guess formats and open what images name, within the limits of the graph. Formats' bytes are the
//! drivers' business: nothing here knows them.

pub mod args;
mod cache;
mod clock;
mod creation;
mod disk;
mod encrypted;
mod errno;
mod failure;
mod given;
mod identity;
mod image;
mod interrupt;
mod keys;
mod objects;
pub mod pairs;
mod progress;
mod session;
pub mod size;
mod source;

pub use cache::Cache;
pub use clock::local_time;
pub use creation::{Creation, Described, Kind, NewImage, option_help, read_option};
pub use disk::{Disk, top};
pub use errno::strerror;
pub use failure::{Failure, Outcome, words};
pub use given::{FileName, Given};
pub use identity::{Identity, identity, is_any_of};
pub use image::{Below, Image};
pub use interrupt::Interrupt;
pub use keys::key_change;
pub use objects::add_object;
pub use progress::Progress;
pub use session::{Session, both, complain, say};
pub use source::{GUESSED, beside, is_driver, plain, warn_of_guess};
