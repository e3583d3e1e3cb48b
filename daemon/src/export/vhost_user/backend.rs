//! What the protocol engine asks of a backend. Queues have threads of their own, so the engine gets none.

use std::io;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
use vhost_user_backend::VhostUserBackend;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};
use vmm_sys_util::epoll::EventSet;

use super::device::Device;
use super::memory::leave_out_of_dumps;
use super::ring::MAX_SIZE;
use super::session::Waiting;
use super::vring::{GuestMemory, Vring};

/// Protocol features that we offer to frontends.
pub(super) const PROTOCOL_FEATURES: u64 = Protocol::MQ.bits()
    | Protocol::LOG_SHMFD.bits()
    | Protocol::REPLY_ACK.bits()
    | Protocol::BACKEND_REQ.bits()
    | Protocol::CONFIG.bits()
    | Protocol::RESET_DEVICE.bits()
    | Protocol::CONFIGURE_MEM_SLOTS.bits();

/// See the module's head.
#[derive(Clone)]
pub(super) struct Backend {
    device: Arc<Device>,
    session: Waiting,
}

impl Backend {
    pub(super) fn new(device: Arc<Device>, session: Waiting) -> Self {
        Self { device, session }
    }
}

impl VhostUserBackend for Backend {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.device.rings().len()
    }

    fn max_queue_size(&self) -> usize {
        usize::from(MAX_SIZE)
    }

    fn features(&self) -> u64 {
        self.device.features()
    }

    fn acked_features(&self, features: u64) {
        self.device.features_acked(features);
    }

    fn protocol_features(&self) -> Protocol {
        Protocol::from_bits_truncate(PROTOCOL_FEATURES)
    }

    fn reset_device(&self) {
        self.device.reset();
    }

    // The config space is the filter's. What comes here is the session's own word for "my turn" (`engine.rs`).
    fn set_config(&self, _offset: u32, _buf: &[u8]) -> io::Result<()> {
        self.session.resume()
    }

    // Comes with all other features through `acked_features`.
    fn set_event_idx(&self, _enabled: bool) {}

    // Guest memory is the filter's, which has mapped it itself (`regions.rs`). The engine's mappings are never looked at,
    // not even by a core dump.
    fn update_memory(&self, memory: GuestMemory) -> io::Result<()> {
        for region in memory.memory().iter() {
            leave_out_of_dumps(region.as_ptr() as usize, region.size());
        }
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        Vec::new()
    }

    fn handle_event(&self, _event: u16, _set: EventSet, _vrings: &[Vring], _thread: usize) -> io::Result<()> {
        Err(io::Error::other("the protocol engine has no thread to handle events on"))
    }
}
