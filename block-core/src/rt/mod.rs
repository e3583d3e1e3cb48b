//! The runtime: one thread, one ring (or epoll and helper threads), one wait, one executor for futures that stay home.
//!
//! Here live threads, rings, timers, wake-ups and the memory that the kernel may be writing to; block-core's only
//! `unsafe` and its only system calls that wait. Nothing here knows what a node, an image or a guest is.
//!
//! - `thread` starts and ends threads; `run` is their loop; `local` is what code on such a thread can ask for.
//! - `uring` and `epoll` are the two drivers behind `driver`; `pool` runs what blocks, `elsewhere` leaves it ends that may.
//! - `exec`, `timer`, `inflight`, `readiness` and `source` hold what waits: tasks, sleeps, operations, descriptors, queues.
//! - `notifier` signals to strangers, who cannot make it wait.
//! - `fault` is where all that can fail passes, and where tests have it fail.
//! - `kept` is memory for secrets, and what is done so that they are nowhere else.
//! - `wake` (over the queue in `shim`) is the lock-free hand-over between threads, model-checked in `tests/rt_loom.rs`.

mod buf;
mod driver;
mod elsewhere;
mod epoll;
mod exec;
pub mod fault;
mod fd;
mod heap;
mod inflight;
pub mod ioctl;
mod kept;
pub mod keyring;
mod local;
mod notifier;
mod op;
mod polling;
mod pool;
mod random;
mod readiness;
mod run;
mod shim;
mod source;
pub mod sync;
#[cfg(test)]
mod tests;
mod thread;
mod timer;
mod token;
mod uring;
#[doc(hidden)]
pub mod wake;
mod words;

pub use buf::{IoBuf, STEP, Segment};
pub use elsewhere::Elsewhere;
pub use fault::{TRIES, system_call};
pub use fd::{SharedFd, eventfd};
pub use heap::trim_heap;
pub use inflight::OpFuture;
pub use kept::{Kept, KeptBytes, WipingHeap, burn_stack, leave_no_dumps};
pub use local::{Local, LoopCounters};
pub use notifier::Notifier;
pub use op::{Counted, DirectOp, Engine, Hold, Op};
pub use polling::PollParams;
pub use pool::{blocking, blocking_long, blocking_on};
pub use random::random;
pub use readiness::{Readiness, WatchId};
pub use source::{Source, SourceId};
pub use thread::{Gone, IoThread, Remote, run_control, run_io};
pub use timer::{Sleep, within};
pub use words::Words;
