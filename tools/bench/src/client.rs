//! A virtio-blk client as a guest would be one: queues over shared memory, kicks, interrupts.
//!
//! [`Connection`] and [`Queue`] are the plain client, for anybody. [`load`] puts a measured workload on it.

pub mod load;
pub mod queue;

use std::io;
use std::path::Path;
use std::sync::Arc;

use virtio_driver::{VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags};

use crate::sys::SharedMemory;
pub use queue::{Queue, Request, wait_any};

/// What to ask of a server when connecting.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Request queues to set up.
    pub queues: usize,
    /// Requests that each queue can hold at once.
    pub depth: u32,
    /// Bytes of data buffer for each of these requests.
    pub buffer_len: usize,
}

/// An attached device: its queues, ready for requests, and what it said about itself.
#[derive(Debug)]
pub struct Connection {
    /// The queues, in the device's order. They may go to different threads.
    pub queues: Vec<Queue>,
    /// Capacity in bytes.
    pub capacity: u64,
    /// Virtio feature bits in force.
    pub features: u64,
}

impl Connection {
    /// Connects to the vhost-user socket, negotiates, and starts every queue.
    ///
    /// There is no time limit inside: a peer that stops answering has to be killed by whoever watches it
    /// ([`crate::server::Server`] does so).
    ///
    /// # Errors
    /// Whatever step the server refused, with the socket's path.
    pub fn open(socket: &Path, shape: Shape) -> io::Result<Self> {
        attach(socket, shape)
            .map_err(|error| io::Error::new(error.kind(), format!("attaching to {} failed: {error}", socket.display())))
    }
}

fn attach(socket: &Path, shape: Shape) -> io::Result<Connection> {
    let path = socket.to_str().ok_or_else(|| io::Error::other("the path is not UTF-8"))?;
    let mut transport: Box<VirtioBlkTransport> = Box::new(VhostUser::new(path, wanted_features())?);
    let rings = VirtioBlkQueue::<u32>::setup_queues(transport.as_mut(), shape.queues, ring_size(shape.depth))?;
    let per_queue = shape.buffer_len * shape.depth as usize;
    let memory = Arc::new(SharedMemory::new(per_queue * shape.queues)?);
    memory.announce(transport.as_mut())?;
    let capacity = u64::from(transport.get_config()?.capacity) * 512;
    let features = transport.get_features();
    let transport = Arc::new(transport);
    let queues = rings
        .into_iter()
        .enumerate()
        .map(|(index, ring)| Queue::new(index, ring, Arc::clone(&transport), Arc::clone(&memory), index * per_queue))
        .collect();
    Ok(Connection { queues, capacity, features })
}

fn wanted_features() -> u64 {
    let transport = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
    let device = VirtioBlkFeatureFlags::FLUSH
        | VirtioBlkFeatureFlags::MQ
        | VirtioBlkFeatureFlags::BLK_SIZE
        | VirtioBlkFeatureFlags::DISCARD
        | VirtioBlkFeatureFlags::WRITE_ZEROES
        | VirtioBlkFeatureFlags::RO;
    transport.bits() | device.bits()
}

/// Every request takes three descriptors (header, data, status); a ring is a power of two.
fn ring_size(depth: u32) -> u16 {
    u16::try_from((depth * 3).next_power_of_two().clamp(128, MAX_RING)).unwrap_or(1024)
}

/// The largest ring that QEMU's export takes.
const MAX_RING: u32 = 1024;
